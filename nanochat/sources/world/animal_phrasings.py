"""How facts about animals are stated and asked.

Slots are explained in `relations`.
"""

from nanochat.sources.world.phrasing import Phrasing

PHRASINGS = {
    "class": Phrasing(
        statements=(
            "{An} is {an_a}.",
            "{P} are {as}.",
            "All {p} are {as}.",
            "Every {s} is {an_a}.",
            "The {s} is {an_a}.",
            "The class of the {s} is {a}.",
            "{An} belongs to the class of {as}.",
        ),
        about=("It is {an_a}.", "It belongs to the class of {as}."),
        questions=(
            "What class of animal is {an}?",
            "What kind of animal is {an}?",
            "Which class of animal is the {s}?",
            "To which class does {an} belong?",
            "{An} is what kind of animal?",
            "Name the class of the {s}.",
            "Tell me the class of {p}.",
        ),
        held_out_questions=(
            "What is the class of the {s}?",
            "Into which class of animals do we put {p}?",
            "Which kind of animal is the {s}?",
        ),
        follow_ups=("And what class of animal is it?", "And its class?"),
        held_out_follow_ups=("And which kind of animal is it?", "What about its class?"),
    ),
    "legs": Phrasing(
        statements=(
            "{An} has {a} legs.",
            "{P} have {a} legs.",
            "The {s} has {a} legs.",
            "Every {s} has {a} legs.",
            "All {p} have {a} legs.",
        ),
        about=("It has {a} legs.",),
        questions=(
            "How many legs does {an} have?",
            "How many legs do {p} have?",
            "How many legs has {an}?",
            "Tell me the number of legs of {an}.",
            "{An} has how many legs?",
            "How many legs does the {s} have?",
        ),
        held_out_questions=(
            "What is the number of legs of {an}?",
            "How many legs are there on {an}?",
            "Count the legs of {an}. How many are there?",
        ),
        follow_ups=("And how many legs does it have?", "How many legs has it?"),
        held_out_follow_ups=("And what is the number of its legs?", "And how many legs are there?"),
    ),
    "young": Phrasing(
        statements=(
            "A young {s} is called {an_a}.",
            "A baby {s} is {an_a}.",
            "{An_a} is a young {s}.",
            "{An_a} is a baby {s}.",
            "The young of the {s} is called {an_a}.",
        ),
        about=("Its young is called {an_a}.", "Its baby is called {an_a}."),
        questions=(
            "What is a young {s} called?",
            "What is a baby {s} called?",
            "What do you call a young {s}?",
            "What do we call a baby {s}?",
            "Name the young of the {s}.",
            "A young {s} has which name?",
            "Tell me the word for a baby {s}.",
        ),
        held_out_questions=(
            "Which word names a baby {s}?",
            "What is the name for the young of {an}?",
            "Tell me what a young {s} is called.",
        ),
        follow_ups=("And what is its young called?", "And its baby?"),
        held_out_follow_ups=("And what do we call its young?", "What about its baby?"),
    ),
    "young_of": Phrasing(
        statements=(
            "{An} is a young {a}.",
            "{An} is a baby {a}.",
            "{An} grows up to be {an_a}.",
        ),
        about=("It grows up to be {an_a}.",),
        questions=(
            "{An} is the young of which animal?",
            "Which animal is called {an} when it is young?",
            "{An} grows up to be which animal?",
            "What does {an} grow up to be?",
            "Which animal has a baby called {an}?",
        ),
        held_out_questions=(
            "{An} is the baby of which animal?",
            "Which animal does {an} grow up to be?",
        ),
    ),
    "sound": Phrasing(
        statements=(
            "{An} {a}.",
            "The {s} {a}.",
            "Every {s} {a}.",
            "You can hear that {an} {a}.",
        ),
        about=("It {a}.",),
        questions=(
            "What sound does {an} make?",
            "Which sound does the {s} make?",
            "What do you hear when {an} makes its sound?",
            "Name the sound of {an}.",
            "Tell me the sound {an} makes.",
        ),
        held_out_questions=(
            "What is the sound of {an}?",
            "What sound can you hear from {an}?",
        ),
        follow_ups=("And what sound does it make?", "And its sound?"),
        held_out_follow_ups=("And which sound does it make?", "What about its sound?"),
    ),
    "sound_of": Phrasing(
        statements=(
            "The animal that {s} is the {a}.",
            "If it {s}, it is {an_a}.",
            "{An_a} {s}.",
        ),
        questions=(
            "Which animal {s}?",
            "What animal {s}?",
            "Name the animal that {s}.",
            "Tell me which animal {s}.",
        ),
        held_out_questions=(
            "You hear that an animal {s}. Which animal is it?",
            "Which of the animals {s}?",
        ),
    ),
    "home": Phrasing(
        statements=(
            "The home of {an} is {an_a}.",
            "{An} lives in {an_a}.",
            "{P} live in {an_a}.",
            "The {s} makes its home in {an_a}.",
            "{An_a} is the home of {an}.",
        ),
        about=("Its home is {an_a}.", "It lives in {an_a}."),
        questions=(
            "What is the home of {an}?",
            "Where does {an} live?",
            "Where do {p} live?",
            "What is the home of the {s} called?",
            "In what home does the {s} live?",
            "Name the home of {an}.",
        ),
        held_out_questions=(
            "In which home can you find {an}?",
            "What do we call the home of {an}?",
        ),
        follow_ups=("And where does it live?", "And its home?"),
        held_out_follow_ups=("And what is its home?", "What about its home?"),
    ),
    "food": Phrasing(
        statements=(
            "The food of {an} is {a}.",
            "{An} likes to eat {a}.",
            "{P} eat {a}.",
            "The {s} eats {a}.",
            "Give {an} some {a} to eat.",
        ),
        about=("It eats {a}.", "Its food is {a}.", "It likes to eat {a}."),
        questions=(
            "What does {an} like to eat?",
            "What do {p} eat?",
            "What does {an} eat?",
            "What is the food of the {s}?",
            "Which food does {an} eat?",
            "Name the food of {an}.",
        ),
        held_out_questions=(
            "Which food do {p} like to eat?",
            "What food would you give to {an}?",
        ),
        follow_ups=("And what does it eat?", "And its food?"),
        held_out_follow_ups=("And which food does it like?", "What about its food?"),
    ),
}
