"""Word problems: templates by operation, numbers that fit them, the expression that solves them.

Slots: {n} {he} {him} {his} {He} {His} and {n2} ... people, {x} goods or {f} fruit, {a} {b} {c}
numbers, written as digits. What is counted is {x} or {f} unless the template says otherwise
after "|". Training uses training templates with training numbers, evaluation held-out templates
with held-out numbers; reinforcement learning practises on templates of its own.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from nanochat.sources.world.numbers import is_held_out_pair
from nanochat.sources.world.people import FRUITS, GOODS, two_people
from nanochat.sources.world.practice_texts import PRACTICE
from nanochat.sources.world.problem_texts import FAMILIES
from nanochat.sources.world.split import pick


@dataclass(frozen=True)
class Problem:
    """A question, the operation in words, the expression that solves it, its value and unit."""

    question: str
    operation: str
    expression: str
    value: int
    unit: str


Numbers = tuple[int, ...]


def _draw_sum(rng: random.Random) -> Numbers:
    return 2 + int(rng.random() * 88), 2 + int(rng.random() * 88)


def _draw_difference(rng: random.Random) -> Numbers:
    small, rest = 2 + int(rng.random() * 48), 2 + int(rng.random() * 48)
    return small + rest, small


def _draw_product(rng: random.Random) -> Numbers:
    return 2 + int(rng.random() * 11), 2 + int(rng.random() * 24)


def _draw_quotient(rng: random.Random) -> Numbers:
    parts, size = 2 + int(rng.random() * 11), 2 + int(rng.random() * 24)
    while parts * size > 99:
        parts, size = 2 + int(rng.random() * 11), 2 + int(rng.random() * 24)
    return parts * size, parts


def _draw_sum_difference(rng: random.Random) -> Numbers:
    a, b = 10 + int(rng.random() * 60), 2 + int(rng.random() * 28)
    return a, b, 2 + int(rng.random() * (a + b - 4))


def _draw_difference_sum(rng: random.Random) -> Numbers:
    a, b = _draw_difference(rng)
    return a, b, 2 + int(rng.random() * 28)


def _draw_product_difference(rng: random.Random) -> Numbers:
    a, b = 2 + int(rng.random() * 8), 3 + int(rng.random() * 10)
    return a, b, 2 + int(rng.random() * min(a * b - 4, 90))


# family -> how its numbers are drawn, the expression, the value. Every value is an integer >= 2.
_RULES: dict[str, tuple[Callable[[random.Random], Numbers], str, Callable[..., int]]] = {
    "add": (_draw_sum, "{a}+{b}", lambda a, b: a + b),
    "subtract": (_draw_difference, "{a}-{b}", lambda a, b: a - b),
    "multiply": (_draw_product, "{a}*{b}", lambda a, b: a * b),
    "divide": (_draw_quotient, "{a}/{b}", lambda a, b: a // b),
    "add_subtract": (_draw_sum_difference, "{a}+{b}-{c}", lambda a, b, c: a + b - c),
    "subtract_add": (_draw_difference_sum, "{a}-{b}+{c}", lambda a, b, c: a - b + c),
    "multiply_subtract": (_draw_product_difference, "{a}*{b}-{c}", lambda a, b, c: a * b - c),
}
# One-step problems are the core; a two-step one needs the same reading twice.
FAMILY_ORDER = ("add", "subtract", "multiply", "divide") * 4 + (
    "add_subtract",
    "subtract_add",
    "multiply_subtract",
)


def draw_numbers(rng: random.Random, family: str, *, held_out: bool) -> Numbers:
    """Draw the numbers of a problem from those of training or from those held out."""
    draw = _RULES[family][0]
    while True:
        numbers = draw(rng)
        if is_held_out_pair(*numbers) == held_out:
            return numbers


def make_problem(rng: random.Random, *, held_out: bool, practice: bool = False) -> Problem:
    """Make one problem with numbers of training or held-out ones, in a text of the same kind.

    practice: in a text that is neither taught nor tested.
    """
    family = pick(rng, FAMILY_ORDER)
    numbers = draw_numbers(rng, family, held_out=held_out)
    texts = FAMILIES[family].held_out if held_out else FAMILIES[family].training
    template = pick(rng, PRACTICE[family] if practice else texts)
    text, _, unit = template.partition("|")
    first, second = two_people(rng)
    counted = pick(rng, FRUITS if "{f}" in text else GOODS)
    slots = {**first.forms(), **second.forms("2"), "x": counted, "f": counted}
    slots.update(zip("abc", map(str, numbers), strict=False))
    _, expression, value = _RULES[family]
    return Problem(
        question=text.format_map(slots),
        operation=pick(rng, FAMILIES[family].operations),
        expression=expression.format_map(slots),
        value=value(*numbers),
        unit=unit or counted,
    )


def problem_page(rng: random.Random) -> str:
    """Write two to four problems with their solutions in plain arithmetic."""
    blocks = []
    for _ in range(2 + int(rng.random() * 3)):
        problem = make_problem(rng, held_out=False)
        blocks.append(
            f"{problem.question}\n{problem.operation} {problem.expression}={problem.value}\n"
            f"The answer is {problem.value} {problem.unit}.\n#### {problem.value}"
        )
    return "\n\n".join(blocks)
