"""How facts about countries are stated and asked.

Slots are explained in `relations`.
"""

from nanochat.sources.world.phrasing import Phrasing

PHRASINGS = {
    "capital": Phrasing(
        statements=(
            "The capital of {s} is {a}.",
            "{a} is the capital of {s}.",
            "{a} is the capital city of {s}.",
            "{S} has the capital {a}.",
            "In {s}, the capital is {a}.",
            "{a} is a city in {s}, and it is the capital.",
            "The capital city of {s} is called {a}.",
        ),
        about=(
            "Its capital is {a}.",
            "The capital is {a}.",
            "Its capital city is called {a}.",
        ),
        questions=(
            "What is the capital of {s}?",
            "Which city is the capital of {s}?",
            "What is the capital city of {s}?",
            "Name the capital of {s}.",
            "What is the name of the capital of {s}?",
            "Tell me the capital of {s}.",
            "In {s}, which city is the capital?",
            "Do you know the capital of {s}?",
            "I want to know the capital of {s}.",
            "{S} has which capital?",
            "What city is the capital of {s}?",
        ),
        held_out_questions=(
            "Which city would a map show as the capital of {s}?",
            "Please give me the capital city of {s}.",
            "What do people call the capital of {s}?",
            "Of all the cities in {s}, which one is the capital?",
        ),
        follow_ups=("And what is its capital?", "And its capital?", "Which city is the capital?"),
        held_out_follow_ups=("And which city is its capital?", "What about its capital?"),
    ),
    "capital_of": Phrasing(
        statements=(
            "{s} is the capital of {a}.",
            "The capital of {a} is {s}.",
            "{s} is the capital city of {a}.",
            "The city of {s} is in {a}.",
            "{s} is a city in {a}.",
        ),
        about=("It is the capital of {a}.", "It is a city in {a}."),
        questions=(
            "{s} is the capital of which country?",
            "Which country has the capital {s}?",
            "Which country has {s} as its capital?",
            "Name the country whose capital is {s}.",
            "In which country is {s}?",
            "In which country is the city of {s}?",
            "{s} is the capital of what country?",
        ),
        held_out_questions=(
            "The city of {s} is the capital of which country?",
            "Tell me which country has its capital in {s}.",
            "What country is {s} the capital of?",
        ),
    ),
    "continent": Phrasing(
        statements=(
            "{S} is in {a}.",
            "{S} is a country in {a}.",
            "{S} is on the continent of {a}.",
            "{S} lies in {a}.",
            "The continent of {s} is {a}.",
            "One of the countries in {a} is {s}.",
            "You find {s} on the map of {a}.",
        ),
        about=("It is in {a}.", "It is a country in {a}.", "It lies in {a}."),
        questions=(
            "Which continent is {s} in?",
            "On which continent is {s}?",
            "What continent is {s} in?",
            "{S} is on which continent?",
            "Name the continent of {s}.",
            "Tell me the continent of {s}.",
            "Where is {s}? Name the continent.",
            "{S} is part of which continent?",
            "On which continent does {s} lie?",
        ),
        held_out_questions=(
            "To which continent does {s} belong?",
            "What is the continent of {s}?",
            "Which continent would you visit to see {s}?",
        ),
        follow_ups=(
            "And its continent?",
            "And which continent is it in?",
            "On which continent is it?",
        ),
        held_out_follow_ups=("And on which continent does it lie?", "What about its continent?"),
    ),
    "language": Phrasing(
        statements=(
            "People in {s} speak {a}.",
            "The language of {s} is {a}.",
            "The main language of {s} is {a}.",
            "In {s}, people speak {a}.",
            "Most people in {s} speak {a}.",
            "{a} is spoken in {s}.",
        ),
        about=("Its people speak {a}.", "The people there speak {a}.", "Its language is {a}."),
        questions=(
            "Which language do people in {s} speak?",
            "What language do people speak in {s}?",
            "What is the language of {s}?",
            "What is the main language of {s}?",
            "Which language is spoken in {s}?",
            "Name the language of {s}.",
            "Tell me the language people speak in {s}.",
            "In {s}, which language do most people speak?",
        ),
        held_out_questions=(
            "What language would you hear in {s}?",
            "Which language do most people use in {s}?",
            "Tell me the main language of {s}.",
        ),
        follow_ups=(
            "And its language?",
            "Which language do people speak there?",
            "And what is its language?",
        ),
        held_out_follow_ups=("And what language do its people speak?", "What about its language?"),
    ),
}
