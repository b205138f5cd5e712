"""How much of an evaluation set is in the training data: problems that share words in a row.

The measure of GPT-3 (arXiv:2005.14165, appendix C): a problem counts as seen when N words of it
stand in a row in a training text. N is the 5th percentile of the lengths of the set's problems, at
least 8 (fewer words meet by chance) and at most 13. Case and punctuation do not count, in any
script. A problem of fewer than N words cannot be checked.

Legend: C = characters of words, W = words, G = runs of N words.
"""

from __future__ import annotations

import logging
import sys
import time
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from nanochat.packing import Task
from nanochat.sources import DocumentSource

logger = logging.getLogger(__name__)

Hashes = NDArray[np.uint64]

SHORTEST_RUN, LONGEST_RUN = 8, 13
LENGTH_PERCENTILE = 5
LONGEST_WORD = 64  # characters that count
BATCH_CHARS = 1 << 20  # of texts that are looked at together; larger ones leave the CPU's cache
TABLE_BITS = 24  # of the table that tells most runs apart from those looked for
# A word of its own between two texts, so that no run of words goes over their border.
_BORDER = " \x01 "
_ALL_WORDS = 0x20000  # from this code point on there are hardly any but Chinese characters
_LOG_SECONDS = 30.0


def _random_numbers(seed: int, count: int) -> Hashes:
    numbers = np.random.default_rng(seed).integers(0, 2**64, count, dtype=np.uint64)
    return np.asarray(numbers | np.uint64(1), dtype=np.uint64)


@cache
def _word_characters() -> NDArray[np.bool_]:
    """Whether a character is part of a word, by its code point: letters, digits, their marks."""
    words = np.zeros(sys.maxunicode + 1, np.bool_)
    for code in range(_ALL_WORDS):
        words[code] = unicodedata.category(chr(code))[0] in "LNM"
    words[_ALL_WORDS:] = True
    words[ord(_BORDER.strip())] = True
    return words


class _Hasher:
    """Sums of products with fixed random numbers: 64 bits for a word, 64 bits for a run of them."""

    def __init__(self) -> None:
        self._places = _random_numbers(2, LONGEST_WORD)
        self._words = _random_numbers(3, LONGEST_RUN)
        self._is_word = _word_characters()

    def words(self, text: str) -> Hashes:
        """Hashes (W,) of the words of a text."""
        characters = np.frombuffer(text.casefold().encode("utf-32-le", "replace"), "<u4")
        is_word = self._is_word[characters]
        edges = np.flatnonzero(np.diff(is_word, prepend=False, append=False))
        starts, ends = edges[::2], edges[1::2]
        if len(starts) == 0:
            return np.zeros(0, np.uint64)
        lengths = ends - starts
        first = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        places = np.arange(lengths.sum()) - np.repeat(first, lengths)
        np.minimum(places, LONGEST_WORD - 1, out=places)
        products = characters[is_word] * self._places[places]
        return np.asarray(np.add.reduceat(products, first), dtype=np.uint64)

    def runs(self, words: Hashes, length: int) -> Hashes:
        """Hashes (G,) of all runs of `length` words; G = W - length + 1, or 0."""
        count = max(0, len(words) - length + 1)
        total = np.zeros(count, np.uint64)
        for place in range(length if count else 0):
            total += words[place : place + count] * self._words[place]
        return total


@dataclass(frozen=True)
class SetOverlap:
    """What of an evaluation set is in the training data."""

    run_length: int
    """Words in a row that make a problem a seen one."""
    num_checked: int
    """Problems that are long enough."""
    seen: frozenset[int]
    """Indices of the problems that are in the training data."""

    @property
    def share(self) -> float:
        """Seen problems among the checked ones; 0 when none could be checked."""
        return len(self.seen) / max(1, self.num_checked)


class _Runs:
    """The runs of one length that are looked for, and which of them were found."""

    def __init__(self, hashes: Hashes) -> None:
        self.hashes = np.unique(hashes)
        self.found = np.zeros(len(self.hashes), np.bool_)
        self._table = np.zeros(1 << TABLE_BITS, np.bool_)
        self._table[self._cells(self.hashes)] = True

    def look_in(self, runs: Hashes) -> None:
        candidates = runs[self._table[self._cells(runs)]]
        places = np.searchsorted(self.hashes, candidates)
        places[places == len(self.hashes)] = 0
        self.found[places[self.hashes[places] == candidates]] = True

    def has_found(self, hashes: Hashes) -> bool:
        return bool(self.found[np.searchsorted(self.hashes, hashes)].any())

    @staticmethod
    def _cells(hashes: Hashes) -> Hashes:
        # The upper bits: sums of products have the better ones there.
        cells: Hashes = hashes >> np.uint64(64 - TABLE_BITS)
        return cells


class Contamination:
    """Evaluation sets, and what training texts have shown of them so far."""

    def __init__(self, problems: Mapping[str, Sequence[str]]) -> None:
        """Problems: the texts of each evaluation set."""
        self._hasher = _Hasher()
        self._lengths: dict[str, int] = {}
        self._problems: dict[str, list[Hashes]] = {}
        for name, texts in problems.items():
            words = [self._hasher.words(text) for text in texts]
            length = run_length([len(w) for w in words])
            self._lengths[name] = length
            self._problems[name] = [self._hasher.runs(w, length) for w in words]
        self._runs = {
            length: _Runs(
                np.concatenate(
                    [
                        np.zeros(0, np.uint64),  # there may be no problems
                        *(runs for name in self._named(length) for runs in self._problems[name]),
                    ]
                )
            )
            for length in sorted(set(self._lengths.values()))
        }

    def read(self, texts: Iterable[str]) -> None:
        """Look for the problems in training texts."""
        for text in _joined(texts):
            words = self._hasher.words(text)
            for length, looked_for in self._runs.items():
                looked_for.look_in(self._hasher.runs(words, length))

    def found(self) -> dict[int, list[int]]:
        """What was found, as plain numbers that another process can `add`."""
        return {n: np.flatnonzero(runs.found).tolist() for n, runs in self._runs.items()}

    def add(self, found: Mapping[int, Sequence[int]]) -> None:
        """Take over what another reader of the same problems has found."""
        for length, places in found.items():
            self._runs[length].found[list(places)] = True

    def results(self) -> dict[str, SetOverlap]:
        """The overlap of each evaluation set with all that was read."""
        results = {}
        for name, problems in self._problems.items():
            looked_for = self._runs[self._lengths[name]]
            checked = [index for index, runs in enumerate(problems) if len(runs)]
            seen = frozenset(i for i in checked if looked_for.has_found(problems[i]))
            results[name] = SetOverlap(self._lengths[name], len(checked), seen)
        return results

    def _named(self, length: int) -> list[str]:
        return [name for name, other in self._lengths.items() if other == length]


def run_length(lengths: Sequence[int]) -> int:
    """N for problems of these lengths in words."""
    if not lengths:
        return LONGEST_RUN
    percentile = int(np.percentile(lengths, LENGTH_PERCENTILE))
    return min(max(percentile, SHORTEST_RUN), LONGEST_RUN)


def training_documents(source: DocumentSource, *, rank: int = 0, size: int = 1) -> Iterator[str]:
    """Every training document of a source whose list is this rank's; progress goes to the log."""
    started = logged = time.monotonic()
    num_chars = 0
    for number, (texts, position) in enumerate(source.documents("train", endless=False)):
        if number % size == rank:
            yield from texts
            num_chars += sum(map(len, texts))
        if time.monotonic() - logged > _LOG_SECONDS:
            logged = time.monotonic()
            share = position.row_group / source.num_row_groups("train")
            logger.info("read %.0f %% of the training documents", 100 * share)
    seconds = time.monotonic() - started
    logger.info("read %.1f million characters of documents in %.1f s", num_chars / 1e6, seconds)


def training_conversations(task: Task, *, rank: int = 0, size: int = 1) -> Iterator[str]:
    """The conversations of a training mixture that are this rank's, as texts."""
    for index in range(rank, len(task), size):
        yield "\n".join(message.text for message in task[index].messages)


def _joined(texts: Iterable[str]) -> Iterator[str]:
    """Texts put together until they are long enough to be worth a call."""
    batch: list[str] = []
    num_chars = 0
    for text in texts:
        batch.append(text)
        num_chars += len(text)
        if num_chars >= BATCH_CHARS:
            yield _BORDER.join(batch)
            batch, num_chars = [], 0
    if batch:
        yield _BORDER.join(batch)
