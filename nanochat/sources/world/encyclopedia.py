"""Encyclopaedic documents: paragraphs about one thing, lists of one relation, mixed facts."""

import random
from functools import cache

from nanochat.sources.world.relations import Fact, all_facts, capitalized, relations
from nanochat.sources.world.split import pick

# Which relations together describe one kind of thing, the introducing one first.
TOPICS = (
    ("continent", "capital", "language"),
    ("class", "legs", "young", "sound", "home", "food"),
    ("workplace", "tool"),
    ("month_days", "month_after", "month_before"),
)


@cache
def topics() -> tuple[tuple[tuple[Fact, ...], ...], ...]:
    """Return for each topic its things, each thing as its facts in the order of TOPICS."""
    table = []
    for names in TOPICS:
        subjects: dict[str, list[Fact]] = {}
        for name in names:
            for fact in relations()[name].facts:
                subjects.setdefault(fact.subject, []).append(fact)
        table.append(tuple(tuple(facts) for facts in subjects.values() if len(facts) > 1))
    return tuple(table)


@cache
def _weighted_topics() -> tuple[tuple[Fact, ...], ...]:
    return tuple(thing for topic in topics() for thing in topic)


def portrait(rng: random.Random, facts: tuple[Fact, ...]) -> str:
    """Write a paragraph about one thing: its name first, then pronouns where they exist."""
    order = list(facts)
    if rng.random() < 0.5:
        rng.shuffle(order)
    sentences = [pick(rng, order[0].statements)]
    for fact in order[1:]:
        by_pronoun = fact.about and rng.random() < 0.7
        sentences.append(pick(rng, fact.about if by_pronoun else fact.statements))
    return " ".join(sentences)


def portraits(rng: random.Random) -> str:
    """Write paragraphs about three to eight things, of one topic or of any."""
    things = _weighted_topics()
    if rng.random() < 0.5:
        things = pick(rng, topics())
    count = 3 + int(rng.random() * 6)
    return "\n\n".join(portrait(rng, pick(rng, things)) for _ in range(count))


_LIST_TITLES = {
    "capital": "Countries and their capitals",
    "capital_of": "Capitals and their countries",
    "continent": "Countries and their continents",
    "language": "Countries and their languages",
    "class": "Animals and their classes",
    "legs": "Animals and how many legs they have",
    "young": "Animals and their young",
    "home": "Animals and their homes",
    "food": "Animals and their food",
    "sound": "Animals and their sounds",
    "symbol": "Elements and their symbols",
    "symbol_of": "Symbols and their elements",
    "opposite": "Words and their opposites",
    "colour": "Things and their colours",
    "workplace": "Jobs and where people do them",
    "tool": "Jobs and their tools",
    "source": "Where things come from",
    "use": "What things are used for",
    "year": "Events and their years",
    "plural": "One and many",
    "past": "Today and yesterday",
    "month_days": "Months and their days",
    "parts": "How many parts things have",
}


def fact_list(rng: random.Random) -> str:
    """Write a list of one relation, one fact a line, as a table or as sentences."""
    name = pick(rng, tuple(_LIST_TITLES))
    facts = relations()[name].facts
    chosen = rng.sample(facts, min(len(facts), 8 + int(rng.random() * 12)))
    shape = rng.random()
    if name == "parts" or shape < 0.3:
        lines = [pick(rng, fact.statements) for fact in chosen]
    elif shape < 0.65:
        lines = [f"{capitalized(fact.subject)}: {fact.answer}" for fact in chosen]
    else:
        lines = [f"- {capitalized(fact.subject)}: {fact.answer}" for fact in chosen]
    return "\n".join([_LIST_TITLES[name], *lines])


_OPENINGS = (
    "Some things that are good to know.",
    "Did you know?",
    "Here are some facts.",
    "Facts about the world",
    "What we learned today",
    "From the notebook of a pupil",
    "Things to remember",
    "A page of facts",
)


def mixed_facts(rng: random.Random) -> str:
    """Write eight to twenty facts of all kinds as running text, some of them said twice."""
    facts = all_facts()
    sentences: list[str] = []
    for _ in range(8 + int(rng.random() * 13)):
        fact = pick(rng, facts)
        first = pick(rng, fact.statements)
        sentences.append(first)
        if rng.random() < 0.25:
            second = pick(rng, fact.statements)
            if second != first:
                sentences.append(second)
    return f"{pick(rng, _OPENINGS)}\n{' '.join(sentences)}"


_LOSES_CAPITAL = ("A ", "An ", "The ", "In ", "People ")


def _inside(sentence: str) -> str:
    """Return the sentence as it stands after "but": a proper name keeps its capital."""
    return sentence[0].lower() + sentence[1:] if sentence.startswith(_LOSES_CAPITAL) else sentence


def _contrast(rng: random.Random) -> str:
    """Write one sentence or two that set two facts of a relation side by side."""
    facts = pick(rng, tuple(relations().values())).facts
    one, other = pick(rng, facts), pick(rng, facts)
    if one.answer == other.answer:
        return pick(rng, one.statements)
    first, second = one.statements[0], other.statements[0]
    shape = rng.random()
    if shape < 0.4:
        return f"{first[:-1]}, but {_inside(second)}"
    if shape < 0.7:
        question = pick(rng, one.questions)
        return f"{question} The answer is not {other.answer}. {first}"
    return f"{first} {second}"


def contrasts(rng: random.Random) -> str:
    """Write a page of facts set side by side."""
    count = 5 + int(rng.random() * 7)
    return "\n".join([pick(rng, _OPENINGS), *(_contrast(rng) for _ in range(count))])
