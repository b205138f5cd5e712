"""Spelling a word, and counting a letter in it with the tool.

Two styles. "full" is the documented one: the letters are enumerated by hand with a running count,
then the tool checks. "compact" keeps what a small model with a short context can learn in
minutes: the call and its result. In the compact style the word has double quotes in the call, and
in the question quotes of either kind four times in five: the tokenizer cuts `'s`, `'t` and the
like off a word that begins a text with a single quote, while after ` '`, ` "` or `"` a word has
the same tokens everywhere, so that calling the tool is copying.
"""

import logging
import random
from collections.abc import Sequence
from typing import ClassVar, Literal

from nanochat.common import UserError, base_dir
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

logger = logging.getLogger(__name__)

WORD_LIST = "words_alpha.txt"  # 370,000 English words, one a line, in the base folder
SHUFFLE_SEED = 42  # of the 2025 nanochat, for the order of SimpleSpelling

COMPACT_QUOTES = ("'", "'", '"', '"', "")  # around the word; without any, 1 in 5

Style = Literal["full", "compact"]
Split = Literal["train", "test"]


def load_words() -> tuple[str, ...]:
    """Return the words of words_alpha.txt in the base folder, or the built-in list without it."""
    path = base_dir() / WORD_LIST
    if not path.exists():
        logger.warning("%s is not there; spelling uses the built-in list of words", path)
        return training_words() + held_out_words()
    words = tuple(path.read_text(encoding="utf-8").split())
    if not words:
        raise UserError(f"{path} holds no words; remove it to use the built-in list")
    return words


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


class SpellingBee(Task):
    """How often a letter comes in a word; right is the number after "#### ".

    Item i of "train" is made from the seed i, of "test" from -(i + 1). `words` default to the
    list in the base folder for the full style. The compact style has words and phrasings of its own
    for each split.
    """

    name = "SpellingBee"
    eval_type: ClassVar[EvalType] = "generative"

    def __init__(
        self,
        size: int = 1000,
        split: Split = "train",
        *,
        style: Style = "full",
        words: Sequence[str] | None = None,
        start: int = 0,
        stop: int | None = None,
        step: int = 1,
    ) -> None:
        super().__init__(start=start, stop=stop, step=step)
        self.size, self.split, self.style = size, split, style
        if words is None and style == "compact":
            words = training_words() if split == "train" else held_out_words()
        self.words = tuple(words) if words is not None else load_words()

    def num_rows(self) -> int:
        """Return the number of items asked for."""
        return self.size

    def row(self, index: int) -> Conversation:
        """Make item `index`."""
        # Negative seeds would collide with positive ones (random.Random takes the magnitude).
        rng = random.Random(f"{self.split} {index if self.split == 'train' else -(index + 1)}")
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


class SimpleSpelling(Task):
    """Training: spell a word as `word:w,o,r,d`. The words come in an order shuffled once."""

    name = "SimpleSpelling"

    def __init__(
        self,
        size: int = 1000,
        split: Split = "train",
        *,
        style: Style = "full",
        words: Sequence[str] | None = None,
        start: int = 0,
        stop: int | None = None,
        step: int = 1,
    ) -> None:
        super().__init__(start=start, stop=stop, step=step)
        self.size, self.split, self.style = size, split, style
        if words is None and style == "compact":
            words = training_words() if split == "train" else held_out_words()
        shuffled = list(words) if words is not None else list(load_words())
        random.Random(SHUFFLE_SEED).shuffle(shuffled)
        self.words = tuple(shuffled)

    def num_rows(self) -> int:
        """Return the number of items asked for."""
        return self.size

    def row(self, index: int) -> Conversation:
        """Make item `index`."""
        rng = random.Random(f"{self.split} {index if self.split == 'train' else -(index + 1)}")
        word = pick(rng, self.words)
        if self.style == "full":
            return chat(f"Spell the word: {word}", spell(word))
        quote = pick(rng, COMPACT_QUOTES)
        request = pick(rng, spelling_phrasings.SPELLING).format(word=f"{quote}{word}{quote}")
        return chat(request, spell(word))
