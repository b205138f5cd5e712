"""Short stories: people who want something, what happens, why, and how it ends.

A plot is a row of steps, a step a few ways to say the same thing, so every path through a plot
is a coherent story. Slots: {n} the hero with {he} {him} {his} {He} {His}, {n2} the other person
with {he2} ..., {thing}, {colour} and {a_colour}, {size}, {place} anywhere, {outside}, {region}
where a house can be, {hide}, {pet} and its colour {coat}, {small_pet}, {food}, {fruit}, {time}
and {time_low} (inside a sentence), {number} and {number2}, which is one more.
"""

import random

from nanochat.sources.world import more_plots, plots
from nanochat.sources.world.people import (
    COAT_COLOURS,
    COLOUR_WORDS,
    FOODS,
    FRUITS,
    HIDING_PLACES,
    OUTSIDE,
    PETS,
    PLACES,
    REGIONS,
    SIZES,
    SMALL_PETS,
    THINGS,
    TIMES,
    girl_and_boy,
)
from nanochat.sources.world.plots import Plot
from nanochat.sources.world.relations import capitalized, with_article
from nanochat.sources.world.split import pick

PLOTS = plots.PLOTS + more_plots.MORE_PLOTS


def story_slots(rng: random.Random) -> dict[str, str]:
    """Draw the people, things and places of one story."""
    hero, other = girl_and_boy(rng)
    number = 2 + int(rng.random() * 8)
    colour = pick(rng, COLOUR_WORDS)
    hide = pick(rng, HIDING_PLACES)
    time = pick(rng, TIMES)
    return {
        **hero.forms(),
        **other.forms("2"),
        "thing": pick(rng, THINGS)[0],
        "place": pick(rng, PLACES),
        "outside": pick(rng, OUTSIDE),
        "region": pick(rng, REGIONS),
        "hide": hide,
        "Hide": capitalized(hide),
        "colour": colour,
        "a_colour": with_article(colour),
        "size": pick(rng, SIZES),
        "pet": pick(rng, PETS),
        "small_pet": pick(rng, SMALL_PETS),
        "coat": pick(rng, COAT_COLOURS),
        "food": pick(rng, FOODS),
        "fruit": pick(rng, FRUITS),
        "time": time,
        "time_low": time if time.startswith("On ") else time.lower(),
        "number": str(number),
        "number2": str(number + 1),
    }


def tell(rng: random.Random, plot: Plot, slots: dict[str, str]) -> str:
    """Tell a plot with the given people and things; its steps become one paragraph."""
    sentences = (pick(rng, step).format_map(slots) for step in plot)
    return " ".join(sentence for sentence in sentences if sentence)


def story(rng: random.Random) -> str:
    """Write one story, with a title three times in ten."""
    slots = story_slots(rng)
    plot = pick(rng, PLOTS)
    text = tell(rng, plot, slots)
    if rng.random() < 0.3:
        title = pick(rng, ("{n} and {n2}", "A story about {n}", "What {n} and {n2} did"))
        return f"{title.format_map(slots)}\n\n{text}"
    return text


def two_stories(rng: random.Random) -> str:
    """Write two stories, one after the other."""
    return f"{story(rng)}\n\n{story(rng)}"
