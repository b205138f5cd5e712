"""Tasks about words: where the words come from, and how an item draws one."""

import random
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

from nanochat.assets import Asset, Url, require
from nanochat.common import UserError
from nanochat.sources.world.spelling import held_out_words, training_words
from tasks.common import Task

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


class WordTask(Task):
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
