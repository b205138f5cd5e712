"""How each kind of fact is stated and asked. Slots are explained in `relations`.

`questions` and `follow_ups` may appear in training; the `held_out_` ones only in evaluation
(a test compares the sets and searches the training text for them). The first statement is also
the answer a chat gives, so it restates the question: recalling is then the same act in a
document and in a conversation.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Phrasing:
    """The templates of one relation."""

    statements: tuple[str, ...]
    questions: tuple[str, ...]
    held_out_questions: tuple[str, ...]
    about: tuple[str, ...] = ()
    follow_ups: tuple[str, ...] = ()
    held_out_follow_ups: tuple[str, ...] = ()


GEOGRAPHY = {
    "capital": Phrasing(
        statements=(
            "The capital of {s} is {a}.",
            "{a} is the capital of {s}.",
            "{a} is the capital city of {s}.",
            "{S} has the capital {a}.",
            "In {s}, the capital is {a}.",
            "The government of {s} sits in {a}.",
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

ANIMALS = {
    "class": Phrasing(
        statements=(
            "{An} is {an_a}.",
            "{P} are in the class {a}.",
            "Every {s} is {an_a}.",
            "The {s} is {an_a}.",
            "The class of the {s} is {a}.",
            "{An} belongs to the class {a}.",
        ),
        about=("It is {an_a}.", "It belongs to the class {a}."),
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
            "The number of legs of {an} is {a}.",
        ),
        about=("It has {a} legs.", "Its body has {a} legs."),
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

SCIENCE = {
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


CALENDAR = {
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
            "{s} is the {a} month of the year.",
            "The {a} month of the year is {s}.",
            "In the year, {s} is the {a} month.",
        ),
        questions=(
            "Which place does {s} have among the months of the year?",
            "Counting the months of the year, what place has {s}?",
            "What place does {s} have in the year?",
        ),
        held_out_questions=(
            "Among the months of the year, which place has {s}?",
            "What is the place of {s} in the year?",
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

EVERYDAY = {
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
            "If it is not {s}, it may be {a}.",
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
            "Which word stands opposite to {s}?",
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
            "{An} works in a {a}.",
            "The {s} goes to work in the {a}.",
            "The place of work of {an} is a {a}.",
            "In a {a} you can meet {an}.",
            "A {a} is where {an} works.",
        ),
        about=("The place of work is a {a}.",),
        questions=(
            "Where does {an} work?",
            "What is the place of work of {an}?",
            "In which place does {an} work?",
            "Name the place where {an} works.",
            "Where does the {s} go to work?",
        ),
        held_out_questions=(
            "In what place can you meet {an} at work?",
            "Tell me where {an} works.",
        ),
    ),
    "tool": Phrasing(
        statements=(
            "The tool of {an} is the {a}.",
            "{An} works with the {a}.",
            "{An} uses the {a}.",
            "The {a} is the tool of {an}.",
            "For the work of {an} you need the {a}.",
        ),
        about=("The tool is the {a}.",),
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
            "People make {s} with the help of {a}.",
            "Where there is {s}, there was {a} first.",
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
            "More than one {s} are {a}.",
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

PHRASINGS: dict[str, Phrasing] = {**GEOGRAPHY, **ANIMALS, **SCIENCE, **CALENDAR, **EVERYDAY}
