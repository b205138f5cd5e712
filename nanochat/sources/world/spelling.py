"""Documents about the letters of words: spelled words, first and last letters, letter counts.

Only training words are spelled or counted, here and in conversations; `is_held_out` decides.
"""

import random
from collections.abc import Sequence
from functools import cache

from nanochat.sources.world.split import is_held_out, pick
from nanochat.sources.world.words import WORDS

_ALPHABET = frozenset("abcdefghijklmnopqrstuvwxyz")


@cache
def training_words() -> tuple[str, ...]:
    """Return the words that may be spelled in training text."""
    return tuple(word for word in WORDS.split() if not is_held_out("word", word))


@cache
def held_out_words() -> tuple[str, ...]:
    """Return the words that only evaluation spells or counts."""
    return tuple(word for word in WORDS.split() if is_held_out("word", word))


def spell(word: str) -> str:
    """Return `word:w,o,r,d`, the notation of the 2025 nanochat."""
    return f"{word}:{','.join(word)}"


def times(count: int) -> str:
    """Return the count as a person says it: "1 time", "2 times"."""
    return "1 time" if count == 1 else f"{count} times"


def pick_letter(rng: random.Random, word: str) -> str:
    """Return a letter of the word, or one time in ten any letter."""
    if rng.random() < 0.9:
        return pick(rng, word)
    return pick(rng, sorted(_ALPHABET))


def draw_word_and_letter(rng: random.Random, words: Sequence[str]) -> tuple[str, str]:
    """Return a word and a letter that is in it never (1 in 5), once (2 in 5) or more often.

    Letters drawn from the word alone are there once in six of ten cases, so that "1" would be a
    good guess; here no number is right more than two times in five.
    """
    wanted = pick(rng, (0, 1, 1, 2, 2))
    while True:
        word = pick(rng, words)
        if wanted == 0:
            letters = sorted(_ALPHABET - set(word))
        else:
            letters = [c for c in sorted(set(word)) if min(word.count(c), 2) == wanted]
        if letters:
            return word, pick(rng, letters)


def _facts_about(rng: random.Random, word: str) -> str:
    letter = pick_letter(rng, word)
    count = word.count(letter)
    lines = (
        f"The word '{word}' begins with the letter {word[0]}.",
        f"The word '{word}' ends with the letter {word[-1]}.",
        f"The word '{word}' has {len(word)} letters.",
        f"In '{word}' the letter {letter} comes {times(count)}.",
        f"If we count the letter {letter} in '{word}', we get {count}.",
        f'"{word}".count("{letter}") is {count}.',
        f"How often is {letter} in '{word}'? It is there {times(count)}.",
    )
    return pick(rng, lines)


_TITLES = (
    "We spell words.",
    "Words and their letters",
    "Spelling",
    "How these words are written",
    "Letter by letter",
    "Today the class spells words.",
)


def spelling_list(rng: random.Random) -> str:
    """Write a list of spelled words, one a line."""
    words = training_words()
    lines = [spell(pick(rng, words)) for _ in range(6 + int(rng.random() * 12))]
    return "\n".join([pick(rng, _TITLES), *lines])


def letter_facts(rng: random.Random) -> str:
    """Write a few words with what their letters are."""
    words = training_words()
    lines = [pick(rng, _TITLES)]
    for _ in range(4 + int(rng.random() * 6)):
        word = pick(rng, words)
        lines += [spell(word), _facts_about(rng, word)]
    return "\n".join(lines)
