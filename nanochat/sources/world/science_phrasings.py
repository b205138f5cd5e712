"""How facts about planets and elements are stated and asked.

Slots are explained in `relations`.
"""

from nanochat.sources.world.phrasing import Phrasing

PHRASINGS = {
    "planet_order": Phrasing(
        statements=(
            "The {s} planet from the Sun is {a}.",
            "{a} is the {s} planet from the Sun.",
            "Counted from the Sun, {a} is the {s} planet.",
        ),
        questions=(
            "Which planet is the {s} from the Sun?",
            "What is the {s} planet from the Sun?",
            "Name the {s} planet from the Sun.",
            "Counted from the Sun, which planet is the {s}?",
            "Tell me the {s} planet from the Sun.",
        ),
        held_out_questions=(
            "Which planet comes {s} when you count from the Sun?",
            "What do we call the {s} planet from the Sun?",
        ),
    ),
    "planet_feature": Phrasing(
        statements=(
            "{S} is {a}.",
            "{a} is {s}.",
            "We know that {a} is {s}.",
            "Of all the planets, {a} is {s}.",
        ),
        questions=(
            "Which planet is {s}?",
            "What is {s}?",
            "What is the name of {s}?",
            "Name {s}.",
            "Tell me the name of {s}.",
        ),
        held_out_questions=(
            "Of all the planets, which one is {s}?",
            "What do we call {s}?",
        ),
    ),
    "symbol": Phrasing(
        statements=(
            "The symbol of {s} is {a}.",
            "{S} has the symbol {a}.",
            "The element {s} has the symbol {a}.",
            "The chemical symbol for {s} is {a}.",
            "In chemistry, {a} stands for {s}.",
            "{a} is the symbol of {s}.",
        ),
        about=("Its symbol is {a}.", "It has the symbol {a}."),
        questions=(
            "What is the symbol of {s}?",
            "What is the chemical symbol for {s}?",
            "Which symbol does {s} have?",
            "What symbol stands for {s}?",
            "Name the symbol of {s}.",
            "Tell me the symbol of the element {s}.",
            "The element {s} has which symbol?",
        ),
        held_out_questions=(
            "How do you write {s} as a chemical symbol?",
            "Which symbol do we use for the element {s}?",
            "What is the symbol for {s} in chemistry?",
        ),
    ),
    "symbol_of": Phrasing(
        statements=(
            "{s} is the symbol of {a}.",
            "{s} stands for the element {a}.",
            "The symbol {s} means {a}.",
        ),
        questions=(
            "Which element has the symbol {s}?",
            "What element has the symbol {s}?",
            "{s} is the symbol of which element?",
            "Name the element with the symbol {s}.",
            "For which element does {s} stand?",
        ),
        held_out_questions=(
            "The symbol {s} belongs to which element?",
            "Tell me which element has the symbol {s}.",
        ),
    ),
}
