"""Documents about numbers: counting, sums and differences, comparisons, parts and doubles.

Pairs of numbers that evaluation keeps for its word problems are not added, subtracted,
multiplied or divided here either; `training_pair` refuses them.
"""

import random

from nanochat.sources.world.people import GOODS, NAMES
from nanochat.sources.world.split import is_held_out, pick


def is_held_out_pair(*numbers: int) -> bool:
    """Say whether evaluation keeps these operands, in any order, for itself."""
    return is_held_out("numbers", *numbers)


def training_pair(rng: random.Random, low: int, high: int) -> tuple[int, int]:
    """Draw two numbers from low to high (inclusive) that training may calculate with."""
    span = high - low + 1
    while True:
        pair = low + int(rng.random() * span), low + int(rng.random() * span)
        if not is_held_out_pair(*pair):
            return pair


def _counting(rng: random.Random) -> str:
    step = pick(rng, (1, 1, 1, 2, 2, 5, 10))
    start = int(rng.random() * (99 - 8 * step))
    numbers = [start + step * i for i in range(5 + int(rng.random() * 4))]
    text = ", ".join(str(number) for number in numbers)
    intro = "We count" if step == 1 else f"We count in steps of {step}"
    return f"{intro}: {text}."


def _comparison(rng: random.Random) -> str:
    a, b = rng.sample(range(100), 2)
    more, less = max(a, b), min(a, b)
    return pick(
        rng,
        (
            f"{more} is more than {less}.",
            f"{less} is less than {more}.",
            f"Which number is larger, {a} or {b}? {more}.",
            f"Which number is smaller, {a} or {b}? {less}.",
            f"{more} comes after {less}.",
        ),
    )


def _sum(rng: random.Random) -> str:
    a, b = training_pair(rng, 2, 60)
    name, goods = pick(rng, NAMES), pick(rng, GOODS)
    return pick(
        rng,
        (
            f"{a} + {b} = {a + b}",
            f"{a}+{b}={a + b}",
            f"{a} plus {b} is {a + b}.",
            f"{a} {goods} and {b} {goods} are {a + b} {goods}.",
            f"{name} has {a} {goods} and gets {b} more: {a}+{b}={a + b}.",
        ),
    )


def _difference(rng: random.Random) -> str:
    b, c = training_pair(rng, 2, 49)
    a = b + c
    if is_held_out_pair(a, b):
        return _comparison(rng)
    name, goods = pick(rng, NAMES), pick(rng, GOODS)
    return pick(
        rng,
        (
            f"{a} - {b} = {c}",
            f"{a}-{b}={c}",
            f"{a} minus {b} is {c}.",
            f"{name} has {a} {goods} and gives away {b}: {a}-{b}={c}.",
            f"Take {b} from {a} and {c} are left.",
        ),
    )


def _product(rng: random.Random) -> str:
    a, b = training_pair(rng, 2, 12)
    c = a * b
    shapes = [f"{a} * {b} = {c}", f"{a}*{b}={c}", f"{a} times {b} is {c}."]
    if not is_held_out_pair(c, b):
        shapes += [f"{c} / {b} = {a}", f"{c}/{b}={a}", f"{c} divided by {b} is {a}."]
        shapes.append(
            f"{pick(rng, NAMES)} puts {c} {pick(rng, GOODS)} into {b} equal groups: {c}/{b}={a}."
        )
    return pick(rng, shapes)


_KINDS = (_counting, _comparison, _sum, _sum, _difference, _difference, _product, _product)
_TITLES = (
    "Numbers",
    "We count and compare.",
    "Sums",
    "A page of numbers",
    "Practice",
    "Number work",
)


def number_page(rng: random.Random) -> str:
    """Write a page of number facts of all kinds."""
    count = 6 + int(rng.random() * 8)
    return "\n".join([pick(rng, _TITLES), *(pick(rng, _KINDS)(rng) for _ in range(count))])


def sum_table(rng: random.Random) -> str:
    """Write the sums, differences or products of one number with several others."""
    kind = pick(rng, "+-*")
    a = 2 + int(rng.random() * (11 if kind == "*" else 40))
    lines = []
    usable = [b for b in range(2, 50) if not (is_held_out_pair(a, b) or is_held_out_pair(a + b, b))]
    for b in sorted(rng.sample(usable, 10 + int(rng.random() * 8))):
        if kind == "+":
            lines.append(f"{a}+{b}={a + b}")
        elif kind == "-":
            lines.append(f"{a + b}-{b}={a}")
        else:
            lines.append(f"{a}*{b}={a * b}")
    return "\n".join([f"{pick(rng, _TITLES)} for {pick(rng, NAMES)}", *lines])
