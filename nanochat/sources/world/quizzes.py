"""Quiz documents: questions with answers, with lettered options, and exercises in reading them.

A chat model must answer a multiple choice question with one letter. That takes three steps:
recall the answer, find its line, copy its letter. The last two are practised here on words
whose letters are looked up again and again, many times in one document. The letter always
stands alone, "(B)" or "B" on its own line, so that it is the same token as in a chat, and never
after "=", so that the tokenizer learns no token that joins the two.
"""

import random
from collections.abc import Sequence

from nanochat.sources.world.people import FOODS, GOODS, NAMES
from nanochat.sources.world.relations import Fact, Relation, all_facts, relations
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


def _lines_before(options: Sequence[str]) -> str:
    return "\n".join(
        f"({letter}) {option}" for letter, option in zip(LETTERS, options, strict=False)
    )


def _lines_after(options: Sequence[str]) -> str:
    return "\n".join(
        f"- {option} ({letter})" for letter, option in zip(LETTERS, options, strict=False)
    )


def _in_a_row(options: Sequence[str]) -> str:
    parts = [f"{option} ({letter})" for letter, option in zip(LETTERS, options, strict=False)]
    return f"{', '.join(parts[:-1])} or {parts[-1]}?"


def _one_quiz(rng: random.Random) -> str:
    fact = pick(rng, all_facts())
    options, place = make_options(rng, fact, 2 + int(rng.random() * 3))
    letter = LETTERS[place]
    lead = pick(rng, ("", "", "Multiple choice: "))
    shape = rng.random()
    if shape < 0.35:
        checks = ["yes" if option == fact.answer else "no" for option in options]
        lines = [
            f"- {option} ({own}): {check}"
            for own, option, check in zip(LETTERS, options, checks, strict=False)
        ]
        listed, said = "\n".join(lines), f"Answer:\n{letter}"
    else:
        layout = _lines_after if shape < 0.75 else _lines_before if shape < 0.9 else _in_a_row
        listed = layout(options)
        said = pick(
            rng,
            (
                f"Answer:\n{letter}",
                f"The answer is {fact.answer} ({letter}).",
                f"The answer is {fact.answer} ({letter}).",
            ),
        )
    return f"{lead}{pick(rng, fact.questions)}\n{listed}\n{said}"


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


def lettered_quiz(rng: random.Random) -> str:
    """Write two to five questions with lettered options and their answers."""
    return "\n\n".join(_one_quiz(rng) for _ in range(2 + int(rng.random() * 4)))


def _words_to_look_up(rng: random.Random, count: int) -> list[str]:
    kind = rng.random()
    if kind < 0.5:
        facts = pick(rng, tuple(relations().values())).facts
        names = list(dict.fromkeys(fact.answer for fact in facts))
        names += [fact.subject for fact in facts if " " not in fact.subject]
        words = list(dict.fromkeys(names))
    else:
        words = list(pick(rng, (NAMES, GOODS, FOODS)))
    return rng.sample(words, min(count, len(words)))


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


def letter_lookup(rng: random.Random) -> str:
    """Write a list of lettered words and many look-ups in it, from word to letter and back."""
    options = _words_to_look_up(rng, 4 + int(rng.random() * 3))
    layout = _lines_after if rng.random() < 0.7 else _lines_before
    to_letter = pick(
        rng,
        (
            "{w} ({l})",
            "{w} ({l})",
            "It is {w} ({l}).",
            "The letter of {w} is ({l}).",
            "{w}:\n{l}",
            "Which letter has {w}?\n{l}",
        ),
    )
    to_word = pick(rng, ("({l}) is {w}.", "The letter ({l}) has {w}.", "What is ({l})? It is {w}."))
    lines = [layout(options)]
    for place in look_ups(rng, len(options), 6 + int(rng.random() * 10)):
        shape = to_letter if rng.random() < 0.8 else to_word
        lines.append(shape.format(w=options[place], l=LETTERS[place]))
    return "\n".join(lines)


def fact_lookup(rng: random.Random) -> str:
    """Write one to three sets of lettered answers, each with the facts they belong to."""
    return "\n\n".join(_one_lookup(rng) for _ in range(1 + int(rng.random() * 3)))


def _one_lookup(rng: random.Random) -> str:
    facts = facts_with_different_answers(rng, pick(rng, tuple(relations().values())), 4)
    lines = [_lines_after([fact.answer for fact in facts])]
    for place in look_ups(rng, len(facts), 5):
        fact, letter = facts[place], LETTERS[place]
        if rng.random() < 0.4:
            lines.append(f"{pick(rng, fact.questions)}\n{letter}")
        elif fact.reply.endswith(f" {fact.answer}."):
            lines.append(f"{fact.reply[:-1]} ({letter}).")
        else:
            lines.append(f"{fact.reply} The answer is {fact.answer} ({letter}).")
    return "\n".join(lines)


def facts_with_different_answers(rng: random.Random, relation: Relation, count: int) -> list[Fact]:
    """Return up to `count` facts of a relation such that each has one right answer among them."""
    chosen: list[Fact] = []
    for fact in rng.sample(relation.facts, len(relation.facts)):
        if all(fact.answer in other.wrong and other.answer in fact.wrong for other in chosen):
            chosen.append(fact)
            if len(chosen) == count:
                break
    return chosen
