"""Quiz documents: questions with answers, and with guesses that are judged.

Questions with lettered choices are in `choices.py`.
"""

import random

from nanochat.sources.world.relations import Fact, Relation, all_facts
from nanochat.sources.world.split import pick

LETTERS = "ABCDEF"


def make_options(rng: random.Random, fact: Fact, count: int = 4) -> tuple[list[str], int]:
    """Return `count` options, one of them right, and the place of the right one."""
    options = rng.sample(fact.wrong, min(count - 1, len(fact.wrong)))
    place = int(rng.random() * (len(options) + 1))
    options.insert(place, fact.answer)
    return options, place


_QA_SHAPES = (
    ("Question: ", "Answer: "),
    ("Q: ", "A: "),
    ("", ""),
    ("- ", "  "),
)


def questions_and_answers(rng: random.Random) -> str:
    """Write a quiz without options: questions with sentences or single words as answers."""
    ask, answer = pick(rng, _QA_SHAPES)
    in_words = rng.random() < 0.6
    blocks = []
    for _ in range(5 + int(rng.random() * 8)):
        fact = pick(rng, all_facts())
        said = pick(rng, fact.statements) if in_words else fact.answer
        blocks.append(f"{ask}{pick(rng, fact.questions)}\n{answer}{said}")
    return ("\n\n" if rng.random() < 0.5 else "\n").join(blocks)


def guesses(rng: random.Random) -> str:
    """Write questions with wrong and right guesses and a yes or no after each.

    Judging one option at a time is what choosing among lettered options consists of.
    """
    blocks = []
    for _ in range(3 + int(rng.random() * 4)):
        fact = pick(rng, all_facts())
        options, place = make_options(rng, fact, 2 + int(rng.random() * 3))
        told = options[: place + 1] if rng.random() < 0.7 else options
        judged = [(option, "Yes." if option == fact.answer else "No.") for option in told]
        ask = pick(rng, ("Is it {o}? {j}", "- {o}? {j}", "- {o}: {j}"))
        lines = [ask.format(o=option, j=judgement) for option, judgement in judged]
        blocks.append("\n".join([pick(rng, fact.questions), *lines]))
    return "\n".join(blocks)


def look_ups(rng: random.Random, num_places: int, count: int) -> list[int]:
    """Return `count` places among `num_places`, in any order, none twice in a row.

    A place may come again later: which one is left over must not give an answer away.
    """
    places = [int(rng.random() * num_places)]
    while len(places) < count:
        place = int(rng.random() * num_places)
        if place != places[-1]:
            places.append(place)
    return places


def facts_with_different_answers(rng: random.Random, relation: Relation, count: int) -> list[Fact]:
    """Return up to `count` facts of a relation such that each has one right answer among them."""
    chosen: list[Fact] = []
    for fact in rng.sample(relation.facts, len(relation.facts)):
        if all(fact.answer in other.wrong and other.answer in fact.wrong for other in chosen):
            chosen.append(fact)
            if len(chosen) == count:
                break
    return chosen
