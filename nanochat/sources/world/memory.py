"""Documents whose second half is written in their first: repeated lists, tables, who has what.

Reading a multiple choice question or calling a tool on a word means finding something again in the
text. A model learns that late from facts and stories, where it hardly pays, and early here, where
nearly every word of the second half can only be known by looking back.
"""

import random
from collections.abc import Sequence
from functools import cache

from nanochat.sources.world.people import COLOUR_WORDS, GOODS, NAMES, PLACES, THINGS
from nanochat.sources.world.quizzes import LETTERS, look_ups
from nanochat.sources.world.relations import relations
from nanochat.sources.world.spelling import held_out_words, training_words
from nanochat.sources.world.split import pick


@cache
def word_kinds() -> tuple[tuple[str, ...], ...]:
    """Return the kinds of words that lists are made of, each kind without repetition.

    Copying a word is half of counting its letters, so no held-out word is copied here.
    """
    held_out = set(held_out_words())
    kinds: list[Sequence[str]] = [NAMES, GOODS, [thing for thing, _ in THINGS]]
    kinds += [[str(number) for number in range(2, 100)], training_words(), training_words()]
    for name in ("capital", "capital_of", "class", "symbol_of", "opposite", "past", "month_after"):
        facts = relations()[name].facts
        kinds += [[f.answer for f in facts], [f.subject for f in facts if " " not in f.subject]]
    unique = (tuple(w for w in dict.fromkeys(kind) if w not in held_out) for kind in kinds)
    return tuple(kind for kind in unique if len(kind) >= 12)


def draw_words(rng: random.Random, count: int) -> list[str]:
    """Draw different words, all of one kind or of any."""
    if rng.random() < 0.6:
        return rng.sample(pick(rng, word_kinds()), count)
    words: list[str] = []
    while len(words) < count:
        word = pick(rng, pick(rng, word_kinds()))
        if word not in words:
            words.append(word)
    return words


_REPEATS = (
    ("{n} says: {list}.", "{n2} says: {list}."),
    ("{n} says: {list}.", "{n2} says the same: {list}."),
    ("These are the words: {list}.", "Again: {list}."),
    ("Learn this: {list}.", "Say it: {list}. Once more: {list}."),
    ("In the bag of {n} are {list}.", "In the bag of {n2} are the same: {list}."),
    ("{list}", "{list}"),
    ("{list}", "{list}", "{list}"),
    ("{n}: {list}", "{n2}: {list}", "{n}: {list}"),
    ("Read: {list}.", "Write: {quoted}."),
    ("{n} reads {quoted}.", "{n2} reads {list}."),
    ("The words {quoted} are new.", "Write them again: {quoted}."),
)


def repeated_lists(rng: random.Random) -> str:
    """Write two or three lists of words, each said two or three times."""
    lines = []
    for _ in range(2 + int(rng.random() * 2)):
        words = draw_words(rng, 4 + int(rng.random() * 9))
        quote = pick(rng, "'\"")
        slots = {
            "n": pick(rng, NAMES),
            "n2": pick(rng, NAMES),
            "list": pick(rng, (", ", ", ", " ", " and ")).join(words),
            "quoted": ", ".join(f"{quote}{word}{quote}" for word in words),
        }
        lines += [line.format_map(slots) for line in pick(rng, _REPEATS)]
    return "\n".join(lines)


# A row of a table, and how its value and its key are asked for.
_ROWS = (
    ("{k}: {v}", ("{k}: {v}",)),
    ("{k} - {v}", ("{k} - {v}",)),
    ("- {k} ({v})", ("{k} ({v})", "({v}) {k}")),
    ("({v}) {k}", ("({v}) {k}", "{k} ({v})")),
)
# The same where the key is a person.
_SENTENCES = (
    ("{k} has {v}.", ("{k} has {v}.", "What does {k} have? {v}", "Who has {v}? It is {k}.")),
    ("{k} likes {v}.", ("{k} likes {v}.", "What does {k} like? {v}", "Who likes {v}? It is {k}.")),
    ("{k} chose {v}.", ("It was {k} who chose {v}.", "And {k} chose {v}.")),
    ("{k} said {v}.", ("{k} said {v}.", "Who said {v}? It was {k}.", "What did {k} say? {v}")),
)


def _values(rng: random.Random, count: int) -> list[str]:
    kind = rng.random()
    if kind < 0.3:
        return list(LETTERS[:count])
    if kind < 0.5:
        return rng.sample([str(number) for number in range(2, 100)], count)
    if kind < 0.6:
        return rng.sample(COLOUR_WORDS, count)
    return rng.sample(pick(rng, word_kinds()), count)


def table(rng: random.Random) -> str:
    """Write a table of four to six rows and look up its rows again and again."""
    count = 4 + int(rng.random() * 3)
    with_people = rng.random() < 0.35
    keys = rng.sample(NAMES, count) if with_people else draw_words(rng, count)
    values = _values(rng, count)
    while set(keys) & set(values):
        values = _values(rng, count)
    row, queries = pick(rng, _SENTENCES if with_people else _ROWS)
    rows = list(zip(keys, values, strict=True))
    lines = [row.format(k=key, v=value) for key, value in rows]
    asked = queries if rng.random() < 0.5 else (pick(rng, queries),)
    for place in look_ups(rng, count, 2 * count):
        lines.append(pick(rng, asked).format(k=keys[place], v=values[place]))
    return "\n".join(lines)


def who_has_what(rng: random.Random) -> str:
    """Write who has which thing and where it lies, then ask for all of it."""
    count = 3 + int(rng.random() * 3)
    names = rng.sample(NAMES, count)
    things = [thing for thing, _ in rng.sample(THINGS, count)]
    colours = rng.sample(COLOUR_WORDS, count)
    places = rng.sample(PLACES, count)
    telling = (
        "{n} has the {c} {t}. It lies {p}.",
        "The {c} {t} of {n} lies {p}.",
        "{n} put the {c} {t} down {p}.",
    )
    asking = (
        "What does {n} have? The {c} {t}.",
        "Who has the {t}? It is {n}.",
        "Where is the {t} of {n}? It is {p}.",
        "Which thing is {c}? The {t}.",
        "Which colour has the {t}? It is {c}.",
        "Whose {t} is it? It is the {t} of {n}.",
    )
    rows = [{"n": names[i], "t": things[i], "c": colours[i], "p": places[i]} for i in range(count)]
    lines = [pick(rng, telling).format_map(row) for row in rows]
    for place in look_ups(rng, count, 2 * count):
        lines.append(pick(rng, asking).format_map(rows[place]))
    return "\n".join(lines)
