"""People, places and things that stories, dialogues and word problems are about."""

import random
from dataclasses import dataclass
from typing import Literal

from nanochat.sources.world.split import pick

GIRLS = (
    "Anna",
    "Clara",
    "Ella",
    "Emma",
    "Eva",
    "Hanna",
    "Ida",
    "Julia",
    "Kate",
    "Laura",
    "Lena",
    "Lily",
    "Lucy",
    "Maria",
    "Mia",
    "Nina",
    "Nora",
    "Olga",
    "Paula",
    "Ruth",
    "Sara",
    "Sofia",
    "Tina",
    "Vera",
)
BOYS = (
    "Adam",
    "Alex",
    "Ben",
    "Carl",
    "Daniel",
    "David",
    "Eric",
    "Felix",
    "Fred",
    "George",
    "Henry",
    "Hugo",
    "Ivan",
    "Jack",
    "James",
    "Jan",
    "Leo",
    "Max",
    "Oscar",
    "Paul",
    "Peter",
    "Sam",
    "Simon",
    "Tom",
)
NAMES = GIRLS + BOYS


@dataclass(frozen=True)
class Person:
    """A name with its pronouns."""

    name: str
    he: Literal["he", "she"]
    him: Literal["him", "her"]
    his: Literal["his", "her"]

    def forms(self, suffix: str = "") -> dict[str, str]:
        """Return the template slots of this person: n, he, him, his and their capitals."""
        return {
            "n" + suffix: self.name,
            "he" + suffix: self.he,
            "him" + suffix: self.him,
            "his" + suffix: self.his,
            "He" + suffix: self.he.capitalize(),
            "His" + suffix: self.his.capitalize(),
        }


def make_person(name: str) -> Person:
    """Return the person with this name from the tables."""
    if name in GIRLS:
        return Person(name, "she", "her", "her")
    return Person(name, "he", "him", "his")


def two_people(rng: random.Random) -> tuple[Person, Person]:
    """Return two different people, of either sex each."""
    first = pick(rng, NAMES)
    second = pick(rng, NAMES)
    while second == first:
        second = pick(rng, NAMES)
    return make_person(first), make_person(second)


def girl_and_boy(rng: random.Random) -> tuple[Person, Person]:
    """Return a girl and a boy in random order, so that a pronoun names one of them."""
    pair = make_person(pick(rng, GIRLS)), make_person(pick(rng, BOYS))
    return pair if rng.random() < 0.5 else (pair[1], pair[0])


# Things one can own, find, lose and carry: singular, plural.
THINGS = (
    ("ball", "balls"),
    ("book", "books"),
    ("hat", "hats"),
    ("key", "keys"),
    ("whistle", "whistles"),
    ("ring", "rings"),
    ("lamp", "lamps"),
    ("box", "boxes"),
    ("cup", "cups"),
    ("kite", "kites"),
    ("drum", "drums"),
    ("doll", "dolls"),
    ("boat", "boats"),
    ("basket", "baskets"),
    ("bell", "bells"),
    ("blanket", "blankets"),
    ("scarf", "scarves"),
    ("spoon", "spoons"),
    ("map", "maps"),
    ("pencil", "pencils"),
)
# Things one can count in a word problem (plural): owned, bought, given away.
GOODS = (
    "apples",
    "balls",
    "bananas",
    "books",
    "boxes",
    "buttons",
    "cakes",
    "candles",
    "cards",
    "coins",
    "cups",
    "eggs",
    "flowers",
    "hats",
    "keys",
    "lemons",
    "marbles",
    "nuts",
    "oranges",
    "pears",
    "pencils",
    "pens",
    "plates",
    "plums",
    "potatoes",
    "ribbons",
    "shells",
    "spoons",
    "stamps",
    "stars",
    "stickers",
    "stones",
    "tickets",
    "toys",
    "tomatoes",
)
# What grows, is picked, and is eaten one by one.
FRUITS = ("apples", "bananas", "lemons", "nuts", "oranges", "pears", "plums", "tomatoes")
FOODS = ("bread", "soup", "cake", "rice", "cheese", "porridge", "pie", "fruit")
COLOUR_WORDS = ("red", "blue", "green", "yellow", "white", "black", "brown", "orange")
SIZES = ("big", "small", "little", "large")
# Places with the preposition a story needs: "in the garden", "at the market".
PLACES = (
    "in the garden",
    "in the park",
    "in the forest",
    "in the kitchen",
    "in the barn",
    "in the library",
    "at the market",
    "at the school",
    "at the station",
    "by the river",
    "by the lake",
    "by the sea",
    "on the hill",
    "on the beach",
    "near the bridge",
    "near the old mill",
)
OUTSIDE = (
    "in the garden",
    "in the park",
    "in the forest",
    "by the river",
    "by the lake",
    "by the sea",
    "on the hill",
    "on the beach",
    "near the bridge",
    "near the old mill",
)
REGIONS = (
    "by the river",
    "by the lake",
    "by the sea",
    "on the hill",
    "near the bridge",
    "near the old mill",
    "near the forest",
    "at the end of the village",
)
HIDING_PLACES = (
    "under the bed",
    "behind the door",
    "under the table",
    "in a drawer",
    "behind a tree",
    "under a chair",
    "on the roof",
    "in the tall grass",
    "in the basket",
    "beside the well",
    "between two stones",
    "under the stairs",
)
PETS = ("dog", "cat", "rabbit", "horse", "donkey", "goat", "duck", "hen")
SMALL_PETS = ("cat", "rabbit", "duck", "hen")
COAT_COLOURS = ("brown", "white", "black", "grey")
TIMES = (
    "One morning",
    "One day",
    "One evening",
    "On Monday",
    "On Saturday",
    "On Sunday",
    "In spring",
    "In summer",
    "In autumn",
    "In winter",
    "Last week",
    "After school",
)
