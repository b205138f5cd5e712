"""How facts about everyday things, history and words are stated and asked.

Slots are explained in `relations`.
"""

from nanochat.sources.world.phrasing import Phrasing

PHRASINGS = {
    "parts": Phrasing(
        statements=(
            "{An} has {a} {u}.",
            "There are {a} {u} in {an}.",
            "Every {s} has {a} {u}.",
            "The number of {u} in {an} is {a}.",
            "One {s} has {a} {u}.",
        ),
        about=("It has {a} {u}.",),
        questions=(
            "How many {u} does {an} have?",
            "How many {u} are in {an}?",
            "{An} has how many {u}?",
            "How many {u} has {an}?",
            "Tell me how many {u} {an} has.",
            "Give me the number of {u} in {an}.",
        ),
        held_out_questions=(
            "What is the number of {u} in {an}?",
            "How many {u} are there in {an}?",
            "Count the {u} in {an}. How many do you get?",
        ),
    ),
    "opposite": Phrasing(
        statements=(
            "The opposite of {s} is {a}.",
            "{S} is the opposite of {a}.",
            "{S} and {a} are opposites.",
            "When we do not say {s}, we may say {a}, its opposite.",
            "The word {s} has the opposite {a}.",
        ),
        questions=(
            "What is the opposite of {s}?",
            "Which word is the opposite of {s}?",
            "Name the opposite of {s}.",
            "Tell me the opposite of {s}.",
            "{S} is the opposite of which word?",
            "Which word means the opposite of {s}?",
            "The word {s} has which opposite?",
        ),
        held_out_questions=(
            "What word means the opposite of {s}?",
            "Give me a word that is the opposite of {s}.",
            "Which word has the opposite meaning of {s}?",
        ),
    ),
    "colour": Phrasing(
        statements=(
            "The colour of {s} is {a}.",
            "{S} is {a}.",
            "{S} has the colour {a}.",
            "We say that {s} is {a}.",
            "If you paint {s}, use {a}.",
        ),
        questions=(
            "What is the colour of {s}?",
            "What colour is {s}?",
            "Which colour is {s}?",
            "Which colour does {s} have?",
            "Name the colour of {s}.",
            "What colour do you need to paint {s}?",
        ),
        held_out_questions=(
            "Tell me the colour of {s}.",
            "What colour does {s} have?",
            "In which colour would you paint {s}?",
        ),
    ),
    "workplace": Phrasing(
        statements=(
            "{An} works {at} {an_a}.",
            "The {s} works {at} the {a}.",
            "The place of work of {an} is {an_a}.",
            "{At} {an_a} you can meet {an}.",
            "{An_a} is where {an} works.",
        ),
        about=("The place of work is {an_a}.",),
        questions=(
            "Where does {an} work?",
            "Where does the {s} work?",
            "What is the place of work of {an}?",
            "In which place does {an} work?",
            "Name the place where {an} works.",
            "Where can you meet {an} at work?",
        ),
        held_out_questions=(
            "In what place would you look for {an} at work?",
            "Tell me where {an} works.",
        ),
    ),
    "tool": Phrasing(
        statements=(
            "{An} uses {an_a}.",
            "{An} works with {an_a}.",
            "The tool of {an} is {an_a}.",
            "{An_a} is the tool of {an}.",
            "For the work of {an} you need {an_a}.",
        ),
        about=("The tool is {an_a}.",),
        questions=(
            "What is the tool of {an}?",
            "Which tool does {an} use?",
            "What tool does {an} need?",
            "With which tool does {an} work?",
            "Name the tool of {an}.",
        ),
        held_out_questions=(
            "Tell me the tool {an} works with.",
            "Which tool would you give to {an}?",
        ),
    ),
    "source": Phrasing(
        statements=(
            "{S} comes from {a}.",
            "We get {s} from {a}.",
            "People get {s} from {a}.",
            "The source of {s} is {a}.",
            "Without {a} there is no {s}.",
        ),
        questions=(
            "Where does {s} come from?",
            "What does {s} come from?",
            "From what do we get {s}?",
            "What do we need to get {s}?",
            "Name what {s} comes from.",
        ),
        held_out_questions=(
            "From what does {s} come?",
            "What do people get {s} from?",
        ),
    ),
    "use": Phrasing(
        statements=(
            "{An} is used for {a}.",
            "People use {an} for {a}.",
            "You need {an} for {a}.",
            "For {a}, take {an}.",
            "The use of {an} is {a}.",
        ),
        about=("It is used for {a}.", "It is good for {a}."),
        questions=(
            "What is {an} used for?",
            "What do people use {an} for?",
            "For what do you need {an}?",
            "What is the use of {an}?",
            "What is {an} good for?",
        ),
        held_out_questions=(
            "Tell me what {an} is used for.",
            "For what do people use {an}?",
        ),
    ),
    "year": Phrasing(
        statements=(
            "{e} in {a}.",
            "In {a}, {f}.",
            "The year of {s} is {a}.",
            "{S} was in {a}.",
            "In the year {a}, {f}.",
        ),
        questions=(
            "In which year was {s}?",
            "What was the year of {s}?",
            "When was {s}?",
            "Name the year of {s}.",
            "Tell me the year of {s}.",
        ),
        held_out_questions=(
            "What year do we remember for {s}?",
            "In what year was {s}?",
        ),
    ),
    "maker": Phrasing(
        statements=(
            "The person who {s} was {a}.",
            "It was {a} who {s}.",
            "We remember {a}, who {s}.",
            "Long ago, {a} {s}.",
        ),
        questions=(
            "Who {s}?",
            "Which person {s}?",
            "Who was it that {s}?",
            "Name the person who {s}.",
            "Tell me who {s}.",
        ),
        held_out_questions=(
            "What is the name of the person who {s}?",
            "Do you know who {s}?",
        ),
    ),
    "plural": Phrasing(
        statements=(
            "The plural of {s} is {a}.",
            "One {s}, two {a}.",
            "We say one {s} and many {a}.",
            "If there is more than one {s}, we say {a}.",
        ),
        questions=(
            "What is the plural of {s}?",
            "Name the plural of {s}.",
            "Which word is the plural of {s}?",
            "One {s}, but two what?",
        ),
        held_out_questions=(
            "Tell me the plural of {s}.",
            "What word do we use for more than one {s}?",
        ),
    ),
    "past": Phrasing(
        statements=(
            "The past tense of {s} is {a}.",
            "Today I {s}, yesterday I {a}.",
            "Today we {s}, yesterday we {a}.",
            "The verb {s} has the past tense {a}.",
        ),
        questions=(
            "What is the past tense of {s}?",
            "Name the past tense of {s}.",
            "Which word is the past tense of {s}?",
            "Today I {s}. What did I do yesterday?",
        ),
        held_out_questions=(
            "Tell me the past tense of {s}.",
            "How do you write the verb {s} in the past tense?",
        ),
    ),
}
