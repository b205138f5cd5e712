"""How facts about months and days are stated and asked.

Slots are explained in `relations`.
"""

from nanochat.sources.world.phrasing import Phrasing

PHRASINGS = {
    "month_after": Phrasing(
        statements=(
            "The month after {s} is {a}.",
            "After {s} comes {a}.",
            "{a} comes after {s}.",
            "{a} follows {s}.",
            "When {s} is over, {a} begins.",
        ),
        questions=(
            "Which month comes after {s}?",
            "What month comes after {s}?",
            "What is the month after {s}?",
            "Which month follows {s}?",
            "Name the month after {s}.",
            "Which month begins when {s} is over?",
        ),
        held_out_questions=(
            "What month follows {s}?",
            "Tell me the month that comes after {s}.",
            "After {s}, which month is next?",
        ),
    ),
    "month_before": Phrasing(
        statements=(
            "The month before {s} is {a}.",
            "Before {s} comes {a}.",
            "{a} comes before {s}.",
            "{a} is the month before {s}.",
        ),
        questions=(
            "Which month comes before {s}?",
            "What month comes before {s}?",
            "What is the month before {s}?",
            "Name the month before {s}.",
            "Which month is just before {s}?",
        ),
        held_out_questions=(
            "Tell me the month that comes before {s}.",
            "Just before {s}, which month is it?",
        ),
    ),
    "month_order": Phrasing(
        statements=(
            "The {s} month of the year is {a}.",
            "{a} is the {s} month of the year.",
            "In the year, {a} is the {s} month.",
            "Of the twelve months, {a} is the {s}.",
        ),
        questions=(
            "Which month is the {s} month of the year?",
            "What is the {s} month of the year?",
            "Name the {s} month of the year.",
            "Tell me the {s} month of the year.",
            "Of the twelve months, which one is the {s}?",
        ),
        held_out_questions=(
            "Which month comes {s} in the year?",
            "What do we call the {s} month of the year?",
        ),
    ),
    "month_days": Phrasing(
        statements=(
            "{s} has {a} days.",
            "There are {a} days in {s}.",
            "The month of {s} has {a} days.",
            "In {s} we count {a} days.",
        ),
        questions=(
            "How many days does {s} have?",
            "How many days are in {s}?",
            "How many days has the month of {s}?",
            "Tell me the number of days in {s}.",
            "{s} has how many days?",
        ),
        held_out_questions=(
            "How many days are there in {s}?",
            "What is the number of days in {s}?",
        ),
    ),
    "day_after": Phrasing(
        statements=(
            "The day after {s} is {a}.",
            "After {s} comes {a}.",
            "{a} comes after {s}.",
            "{a} follows {s}.",
            "If today is {s}, tomorrow is {a}.",
        ),
        questions=(
            "Which day comes after {s}?",
            "What day comes after {s}?",
            "What is the day after {s}?",
            "Which day follows {s}?",
            "Name the day after {s}.",
            "If today is {s}, what day is tomorrow?",
        ),
        held_out_questions=(
            "What day follows {s}?",
            "Today is {s}. Which day will it be tomorrow?",
            "Tell me the day that comes after {s}.",
        ),
    ),
    "day_before": Phrasing(
        statements=(
            "The day before {s} is {a}.",
            "Before {s} comes {a}.",
            "{a} comes before {s}.",
            "If today is {s}, yesterday was {a}.",
        ),
        questions=(
            "Which day comes before {s}?",
            "What day comes before {s}?",
            "What is the day before {s}?",
            "Name the day before {s}.",
            "If today is {s}, what day was yesterday?",
        ),
        held_out_questions=(
            "Today is {s}. Which day was it yesterday?",
            "Tell me the day that comes before {s}.",
        ),
    ),
}
