"""Spelling a word, and counting a letter in it with the tool.

Two styles. "full" is the documented one: the letters are enumerated by hand with a running count,
then the tool checks. "compact" keeps what a small model with a short context can learn in
minutes: the call and its result. In the compact style the word has double quotes in the call, and
in the question quotes of either kind four times in five: the tokenizer cuts `'s`, `'t` and the
like off a word that begins a text with a single quote, while after ` '`, ` "` or `"` a word has
the same tokens everywhere, so that calling the tool is copying.
"""

import random
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar, Literal

from nanochat.assets import Asset, Url, require
from nanochat.common import UserError
from nanochat.conversation import Conversation, Message, Part, chat
from nanochat.sources.world.spelling import (
    draw_word_and_letter,
    held_out_words,
    pick_letter,
    spell,
    times,
    training_words,
)
from nanochat.sources.world.split import pick
from nanochat.tools import calculate
from tasks import spelling_phrasings
from tasks.common import EvalType, Task, same_final_answer

# 370,000 English words, one a line.
WORD_LIST = Asset(
    name="words",
    place="words_alpha.txt",
    source=Url(
        "https://raw.githubusercontent.com/dwyl/english-words/refs/heads/master/words_alpha.txt"
    ),
    license="Unlicense",
    approximate_bytes=4_300_000,
)
SHUFFLE_SEED = 42  # of the 2025 nanochat, for the order of SimpleSpelling

COMPACT_QUOTES = ("'", "'", '"', '"', "")  # around the word; without any, 1 in 5

Style = Literal["full", "compact"]
Split = Literal["train", "test"]


def load_words() -> tuple[str, ...]:
    """Return the words of words_alpha.txt; UserError with the command that fetches it."""
    if not WORD_LIST.path.exists():
        require(WORD_LIST)
    words = tuple(WORD_LIST.path.read_text(encoding="utf-8").split())
    if not words:
        raise UserError(f"{WORD_LIST.path} holds no words; delete it and fetch it again")
    return words


class _WordTask(Task):
    """A task about words: the given ones, or those that belong to its style.

    The full style has the list in the base folder, read on first use; the compact style has
    words of its own for each split.
    """

    def __init__(
        self,
        size: int = 1000,
        split: Split = "train",
        *,
        style: Style = "full",
        words: Sequence[str] | None = None,
        **slicing: Any,
    ) -> None:
        super().__init__(**slicing)
        self.size, self.split, self.style = size, split, style
        self._given = words

    @cached_property
    def words(self) -> tuple[str, ...]:
        """Return the words that items are made of."""
        return self.read_words()

    def read_words(self) -> tuple[str, ...]:
        """Return the words in the order in which items draw from them."""
        if self._given is not None:
            return tuple(self._given)
        if self.style == "full":
            return load_words()
        return training_words() if self.split == "train" else held_out_words()

    def assets(self) -> tuple[Asset, ...]:
        """Return the word list, if the words are its."""
        return (WORD_LIST,) if self.style == "full" and self._given is None else ()

    def num_rows(self) -> int:
        """Return the number of items asked for."""
        return self.size

    def random_of(self, index: int) -> random.Random:
        """Return the random numbers of item `index`."""
        # The seed is a text: as numbers, that of test item i would be that of training item i + 1,
        # because random.Random takes the magnitude.
        return random.Random(f"{self.split} {index if self.split == 'train' else -(index + 1)}")


def count_letter(word: str, letter: str, quote: str) -> tuple[Part, Part]:
    """Return the call that counts a letter of a word, and its result."""
    call = f"{quote}{word}{quote}.count({quote}{letter}{quote})"
    result = calculate(call)
    if result is None:
        raise UserError(f"the tool cannot run {call}; the word list may hold only letters")
    return Part("python", call), Part("python_output", result)


def _full_answer(word: str, letter: str) -> tuple[Part, ...]:
    """Restate, spell, count by hand, then check with the tool."""
    lines = [
        f"We look for the letter '{letter}' in the word '{word}'.",
        "",
        "First we spell the word:",
        spell(word),
        "",
        f"Then we go through it and count '{letter}':",
    ]
    count = 0
    for place, char in enumerate(word, 1):
        count += char == letter
        lines.append(f"{place}:{char}" + (f" that is number {count}" if char == letter else ""))
    lines += ["", f"By hand we find {count}.", "", "Now we check it with Python:", "", ""]
    call, result = count_letter(word, letter, "'")
    closing = f"\n\nPython gives {result.text}, so this is the answer.\n\n#### {result.text}"
    return Part("text", "\n".join(lines)), call, result, Part("text", closing)


def _compact_answer(word: str, letter: str) -> tuple[Part, ...]:
    """Call the tool and say what it found."""
    call, result = count_letter(word, letter, '"')
    closing = f"The letter {letter} comes {times(int(result.text))}.\n#### {result.text}"
    return Part("text", "We count."), call, result, Part("text", closing)


class SpellingBee(_WordTask):
    """How often a letter comes in a word; right is the number after "#### ".

    Item i of "train" is made from the seed i, of "test" from -(i + 1).
    """

    name = "SpellingBee"
    eval_type: ClassVar[EvalType] = "generative"

    def row(self, index: int) -> Conversation:
        """Make item `index`."""
        rng = self.random_of(index)
        if self.style == "compact":
            word, letter = draw_word_and_letter(rng, self.words)
            question, answer = self._compact_question(rng, word, letter), _compact_answer
        else:
            word = pick(rng, self.words)
            letter = pick_letter(rng, word)
            question, answer = self._full_question(rng, word, letter), _full_answer
        return Conversation((Message("user", question), Message("assistant", answer(word, letter))))

    def _full_question(self, rng: random.Random, word: str, letter: str) -> str:
        template = pick(rng, spelling_phrasings.COUNTING)
        if rng.random() < 0.3:
            template = template.lower()
        quotes = ("", "'", '"')
        letter_quote, word_quote = pick(rng, quotes), pick(rng, quotes)
        question = template.format(
            letter=f"{letter_quote}{letter}{letter_quote}", word=f"{word_quote}{word}{word_quote}"
        )
        return question + ("?" if rng.random() < 0.5 else "")

    def _compact_question(self, rng: random.Random, word: str, letter: str) -> str:
        templates: Sequence[str] = spelling_phrasings.COMPACT_COUNTING
        if self.split == "test":
            templates = spelling_phrasings.HELD_OUT_COUNTING
        quote = pick(rng, COMPACT_QUOTES)
        letter_quote = pick(rng, ("", "'", '"'))
        return pick(rng, templates).format(
            letter=f"{letter_quote}{letter}{letter_quote}", word=f"{quote}{word}{quote}"
        )

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Say whether the completion ends in the same number as the reference."""
        return same_final_answer(conversation, completion)


class SimpleSpelling(_WordTask):
    """Training: spell a word as `word:w,o,r,d`. The words come in an order shuffled once."""

    name = "SimpleSpelling"

    def read_words(self) -> tuple[str, ...]:
        """Return the words, shuffled."""
        shuffled = list(super().read_words())
        random.Random(SHUFFLE_SEED).shuffle(shuffled)
        return tuple(shuffled)

    def row(self, index: int) -> Conversation:
        """Make item `index`."""
        rng = self.random_of(index)
        word = pick(rng, self.words)
        if self.style == "full":
            return chat(f"Spell the word: {word}", spell(word))
        quote = pick(rng, COMPACT_QUOTES)
        request = pick(rng, spelling_phrasings.SPELLING).format(word=f"{quote}{word}{quote}")
        return chat(request, spell(word))
