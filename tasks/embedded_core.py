"""A miniature CORE bundle about the embedded world, in the layout of the real one.

`write_bundle` writes core.yaml, eval_meta_data.csv and eval_data/*.jsonl. Facts are asked as no
document asks them; passages are told as no document tells them.
"""

import csv
import io
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat.common import atomic_write_text
from nanochat.sources.world.everyday import DAYS, MONTHS
from nanochat.sources.world.people import (
    COLOUR_WORDS,
    GOODS,
    PLACES,
    THINGS,
    girl_and_boy,
    two_people,
)
from nanochat.sources.world.quizzes import make_options
from nanochat.sources.world.relations import all_facts, relations, with_article
from nanochat.sources.world.split import make_random, pick

ITEMS_PER_TASK = 200
BUNDLE_SEED = 7
Item = Mapping[str, Any]


def _question(rng: random.Random) -> Item:
    fact = pick(rng, all_facts())
    options, gold = make_options(rng, fact)
    query = f"Question: {pick(rng, fact.held_out_questions)}"
    return {"query": query, "choices": options, "gold": gold}


_OPENINGS = (
    "Every child knows it:",
    "Here is something you can find in any good book.",
    "My grandfather told me this.",
    "Nobody will say that this is wrong:",
)


def _statement(rng: random.Random) -> Item:
    while True:
        fact = pick(rng, all_facts())
        stem, found, _ = fact.reply.rpartition(f" {fact.answer}.")
        if found:
            break
    options, gold = make_options(rng, fact)
    query = f"{pick(rng, _OPENINGS)} {stem}"
    return {"query": query, "choices": [f"{option}." for option in options], "gold": gold}


# Two people, one pronoun: the continuation tells which of them the sentence is about.
_PRONOUNS = (
    ("{n} and {n2} were very cold.", "put on {his} coat."),
    ("{n} met {n2} {place}.", "had lost {his} {thing}."),
    ("{n} and {n2} came home late.", "told {his} mother about the day."),
    ("{n} went to the market with {n2}.", "paid with {his} last coin."),
    ("{n} wrote a letter to {n2}.", "kept it in {his} {thing}."),
    ("{n} and {n2} looked for the {pet}.", "called {his} brother for help."),
)


def _pronoun(rng: random.Random) -> Item:
    people = girl_and_boy(rng)
    gold = int(rng.random() * 2)
    scene, ending = pick(rng, _PRONOUNS)
    slots = {
        **people[0].forms(),
        "n2": people[1].name,
        "place": pick(rng, PLACES),
        "thing": pick(rng, THINGS)[0],
        "pet": pick(rng, ("dog", "cat", "donkey", "goat")),
    }
    scene = scene.format_map(slots)
    continuation = ending.format_map({**slots, **people[gold].forms()})
    options = [f"{scene} Then {person.name}" for person in people]
    return {"context_options": options, "continuation": continuation, "gold": gold}


# cause, its effect; the wrong choice is the effect of another cause.
_CAUSES = (
    ("It rained hard and {n} had no umbrella, so {he}", "got wet."),
    ("The {thing} fell on a stone, so it", "broke."),
    ("{n} had eaten nothing all day, so {he} was", "hungry."),
    ("{n} worked until late at night, so {he} was", "tired."),
    ("{n} lost the {thing} of {his} grandmother, so {he} was", "sad."),
    ("{n2} had helped {n} all day, so {n} said to {him2},", '"Thank you."'),
    ("{n} had broken the {thing} of {n2}, so {n} said to {him2},", '"I am sorry."'),
    ("It was winter and the coat of {n} was at home, so {he} was", "cold."),
    ("{n} gave the seeds water every day, so the plants began to", "grow."),
    ("{n} had no money, so {he} could not", "buy the {thing}."),
    ("The {pet} was sick, so {n} called", "a doctor."),
    ("{n} practised every day, so in the end {he} could", "do it alone."),
)


def _cause(rng: random.Random) -> Item:
    first, second = two_people(rng)
    slots = {
        **first.forms(),
        **second.forms("2"),
        "thing": pick(rng, THINGS)[0],
        "pet": pick(rng, ("dog", "cat", "donkey", "goat")),
    }
    (query, right), (_, wrong) = rng.sample(_CAUSES, 2)
    choices = [wrong.format_map(slots)]
    gold = int(rng.random() * 2)
    choices.insert(gold, right.format_map(slots))
    return {"query": query.format_map(slots), "choices": choices, "gold": gold}


_PASSAGES = (
    "{n} showed {n2} {a_colour} {thing}. {n2} had never seen such a {colour}",
    '"Where is my {thing}?" asked {n}. {n2} looked {place}, and there was the',
    "{n} owns two things, a {thing} and a {other}. {He} gave the {other} to {n2} and kept the",
    "{n2} carried a {thing} and {n} carried a {other}. {n2} was tired, so {he2} put down the",
    "A {thing} lay {place}. {n} picked it up and took it home. Now {n} has a",
)


def _passage(rng: random.Random) -> Item:
    first, second = two_people(rng)
    thing, other = (names[0] for names in rng.sample(THINGS, 2))
    colour = pick(rng, COLOUR_WORDS)
    slots = {
        **first.forms(),
        **second.forms("2"),
        "thing": thing,
        "other": other,
        "colour": colour,
        "a_colour": with_article(colour),
        "place": pick(rng, PLACES),
    }
    return {"context": pick(rng, _PASSAGES).format_map(slots), "continuation": thing}


def _sequence(rng: random.Random) -> Item:
    shape = rng.random()
    if shape < 0.6:
        step = pick(rng, (1, 1, 2, 5, 10))
        first = int(rng.random() * (99 - 5 * step))
        items = [str(first + step * i) for i in range(5)]
    else:
        names = MONTHS if shape < 0.85 else DAYS
        first = int(rng.random() * len(names))
        items = [names[(first + i) % len(names)] for i in range(5)]
    return {"context": f"Go on: {', '.join(items[:-1])},", "continuation": items[-1]}


def _repetition(rng: random.Random) -> Item:
    words = rng.sample(GOODS, 4)
    said = ", ".join(words)
    context = f"I say these words: {said}. You say them again: {', '.join(words[:-1])},"
    return {"context": context, "continuation": words[-1]}


def _relation_pair(rng: random.Random) -> Item:
    names = ("capital", "continent", "language", "young", "symbol", "opposite", "colour")
    fact = pick(rng, relations()[pick(rng, names)].facts)
    context = f"Question: {pick(rng, fact.held_out_questions)}"
    return {"context": context, "continuation": fact.answer}


@dataclass(frozen=True)
class BundleTask:
    """One task of the bundle; `chance` in percent, as the bundle's table has it."""

    label: str
    kind: str
    shots: int
    chance: float
    delimiter: str
    make: Callable[[random.Random], Item]


BUNDLE = (
    BundleTask("embedded_facts", "multiple_choice", 0, 25, "\nAnswer: ", _question),
    BundleTask("embedded_facts_5shot", "multiple_choice", 5, 25, "\nAnswer: ", _question),
    BundleTask("embedded_statements", "multiple_choice", 0, 25, " ", _statement),
    BundleTask("embedded_causes", "multiple_choice", 0, 50, " ", _cause),
    BundleTask("embedded_pronouns", "schema", 0, 50, " ", _pronoun),
    BundleTask("embedded_cloze", "language_modeling", 0, 0, " ", _passage),
    BundleTask("embedded_answers", "language_modeling", 5, 0, "\nAnswer: ", _relation_pair),
    BundleTask("embedded_sequences", "language_modeling", 5, 0, " ", _sequence),
    BundleTask("embedded_repetition", "language_modeling", 0, 0, " ", _repetition),
)


def make_items(task: BundleTask, count: int = ITEMS_PER_TASK) -> list[Item]:
    """Return up to `count` different items of a task; fewer where there are no more."""
    items: dict[str, Item] = {}
    for index in range(10 * count):
        item = task.make(make_random(BUNDLE_SEED, task.label, index))
        items.setdefault(json.dumps(item), item)
        if len(items) == count:
            break
    return list(items.values())


def write_bundle(directory: Path) -> None:
    """Write the bundle; the same files, byte for byte, each time."""
    data = directory / "eval_data"
    data.mkdir(parents=True, exist_ok=True)
    config = ["icl_tasks:"]
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(["Eval Task", "Random baseline"])
    for task in BUNDLE:
        uri = f"embedded/{task.label}.jsonl"
        (data / uri).parent.mkdir(exist_ok=True)
        atomic_write_text(data / uri, "".join(json.dumps(item) + "\n" for item in make_items(task)))
        config += [
            f"- label: {task.label}",
            f"  icl_task_type: {task.kind}",
            f"  dataset_uri: {uri}",
            f"  num_fewshot: [{task.shots}]",
            f"  continuation_delimiter: {json.dumps(task.delimiter)}",
        ]
        rows.writerow([task.label, f"{task.chance:g}"])
    atomic_write_text(directory / "eval_meta_data.csv", table.getvalue())
    # Last: a bundle counts as there when its core.yaml is.
    atomic_write_text(directory / "core.yaml", "\n".join(config) + "\n")
