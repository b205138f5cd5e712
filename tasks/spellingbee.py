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
from typing import ClassVar

from nanochat.common import UserError
from nanochat.conversation import Conversation, Message, Part, chat
from nanochat.sources.world.spelling import (
    draw_word_and_letter,
    pick_letter,
    spell,
    times,
)
from nanochat.sources.world.split import pick
from nanochat.tools import calculate
from tasks import spelling_phrasings
from tasks.common import EvalType, same_final_answer
from tasks.words import WordTask

SHUFFLE_SEED = 42  # of the 2025 nanochat, for the order of SimpleSpelling

COMPACT_QUOTES = ("'", "'", '"', '"', "")  # around the word; without any, 1 in 5


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


class SpellingBee(WordTask):
    """How often a letter comes in a word; right is the number after "#### ".

    The seed of an item is a text of the split and a number: item 3 of "train" has "train 3".
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


class SimpleSpelling(WordTask):
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
