"""Byte pair encoding: train and encode, in Rust where a compiled core exists, else in Python.

    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=4096)
    ids = tokenizer.encode("hello world")

Both ways give the same merges and ids. Without the core one notice is logged.
"""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rustbpe import native, reference

__all__ = ["StreamDecoder", "Tokenizer", "default_threads", "has_core"]
logger = logging.getLogger(__name__)

DEFAULT_PATTERN = reference.PATTERNS["gpt4-2023"]
FEED_CHARACTERS = 1 << 22  # handed to the core at once: bounds memory, keeps threads busy
MERGES_PER_STEP = 64  # between two looks at the clock and at Ctrl-C
Progress = Callable[[int, int], None]


def has_core() -> bool:
    """Return whether the compiled core is there."""
    return native.load() is not None


def default_threads() -> int:
    """Return the number of processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@lru_cache(maxsize=1)
def _notice() -> None:
    logger.warning(
        "rustbpe: no compiled core found, using the slow Python reference "
        "(same results); install Rust and reinstall, see rustbpe/README.md"
    )


@lru_cache(maxsize=8)
def _pattern_notice(pattern: str) -> None:
    logger.warning("rustbpe: no compiled scanner for the pattern %r, using Python", pattern)


def _core_pattern(pattern: str) -> str | None:
    """Return the name under which the core knows a pattern, None if Python has to do it."""
    name = reference.pattern_name(pattern)
    if not has_core():
        _notice()
        return None
    if name is None:
        _pattern_notice(pattern)
    return name


MAX_VOCAB_SIZE = 1 << 24  # 40 times the largest vocabulary in use; a typing error beyond that
MAX_ID = (1 << 31) - 1  # ids are int32


class Tokenizer:
    """A byte level BPE vocabulary with its split pattern.

    Ids 0..255 are the bytes (in `byte_ids` order for vocabularies that permute them), later ids
    are merges in the order they were learned. Special tokens do not exist here.
    """

    def __init__(self) -> None:
        self._pattern = DEFAULT_PATTERN
        self._tokens: list[bytes] = reference.tokens_of([])
        self._merges: list[tuple[int, int]] | None = []
        self._ranks: dict[bytes, int] | None = None
        self._encoder: native.Encoder | None = None
        self._cache: dict[str, list[int]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Everything but what lives in the core, which a copy makes anew."""
        return {**self.__dict__, "_encoder": None, "_cache": {}}

    @classmethod
    def from_merges(cls, merges: Sequence[tuple[int, int]], pattern: str) -> Tokenizer:
        """Build from pairs of ids; merge i makes id 256 + i. `pattern`: name or text."""
        for index, pair in enumerate(merges):
            if not all(0 <= part < 256 + index for part in pair):
                raise ValueError(f"merge {index} is {pair}: both ids must be below {256 + index}")
        self = cls.from_tokens(reference.tokens_of(merges), pattern)
        self._merges = list(merges)
        return self

    @classmethod
    def from_tokens(cls, tokens: Sequence[bytes], pattern: str) -> Tokenizer:
        """Build from the bytes of every token in id order (ranks), e.g. of a .tiktoken file."""
        self = cls()
        self._pattern, self._tokens, self._merges = pattern, list(tokens), None
        if len(set(self._tokens)) != len(self._tokens):
            raise ValueError("a token is there twice")
        missing = [value for value in range(256) if bytes([value]) not in self._rank_table()]
        if missing:
            raise ValueError(f"{len(missing)} of the 256 bytes have no token, first {missing[0]}")
        return self

    def train_from_iterator(
        self,
        iterator: Iterable[str],
        vocab_size: int,
        buffer_size: int = 8192,
        pattern: str | None = None,
        *,
        num_threads: int | None = None,
        progress: Progress | None = None,
        byte_ids: Sequence[int] | None = None,
    ) -> None:
        """Learn `vocab_size - 256` merges from texts, fewer when nothing is left to merge.

        Texts are forgotten once counted; two batches of at most `buffer_size` texts or 4 MB wait.
        `progress(done, total)` is called between steps of merging, where Ctrl-C stops it too.
        `byte_ids[b]` is the id of byte b (for vocabularies that permute the bytes).
        """
        if vocab_size < 256:
            raise ValueError(f"a vocabulary of {vocab_size} has no room for the 256 bytes")
        if vocab_size > MAX_VOCAB_SIZE:
            raise ValueError(
                f"a vocabulary of {vocab_size:,} tokens was asked for; at most "
                f"{MAX_VOCAB_SIZE:,} are possible"
            )
        pattern = DEFAULT_PATTERN if pattern is None else pattern
        threads = num_threads or default_threads()
        num_merges = vocab_size - 256
        order = list(byte_ids) if byte_ids is not None else list(range(256))
        core = _core_pattern(pattern)
        batches = _batches(iterator, buffer_size)
        if core is None:
            counts = reference.count_chunks((t for batch in batches for t in batch), pattern)
            merges = reference.learn_merges(counts, num_merges, order)
        else:
            trainer = native.Trainer(core, threads, byte_ids)
            _feed(trainer, batches)
            merges = _run(trainer, num_merges, progress)
        self._pattern, self._merges = pattern, merges
        self._tokens = reference.tokens_of(merges, order)
        self._ranks, self._encoder, self._cache = None, None, {}

    def get_pattern(self) -> str:
        """Return the split pattern as it was given."""
        return self._pattern

    def get_mergeable_ranks(self) -> list[tuple[bytes, int]]:
        """Return (bytes, id) of every token in id order."""
        return [(token, rank) for rank, token in enumerate(self._tokens)]

    @property
    def tokens(self) -> list[bytes]:
        """Bytes of every token in id order."""
        return self._tokens

    @property
    def merges(self) -> list[tuple[int, int]] | None:
        """Pairs of ids in the order learned; None for a vocabulary imported as ranks."""
        return self._merges

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return len(self._tokens)

    def encode(self, text: str) -> list[int]:
        """Return the ids of one text."""
        ids: list[int] = self.encode_to_array([text])[0].tolist()
        return ids

    def batch_encode(self, texts: Sequence[str], num_threads: int | None = None) -> list[list[int]]:
        """Return the ids of every text."""
        ids, offsets = self.encode_to_array(texts, num_threads=num_threads)
        flat, ends = ids.tolist(), offsets.tolist()
        return [flat[a:b] for a, b in itertools.pairwise(ends)]

    def encode_to_array(
        self,
        texts: Sequence[str],
        *,
        prepend: int | None = None,
        append: int | None = None,
        num_threads: int | None = None,
    ) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Return the ids of all texts in a row, int32, and their offsets, int64 (texts + 1,).

        `prepend` and `append` are ids put around every text. Raises ValueError for a text with
        lone surrogates.
        """
        for around in (prepend, append):
            if around is not None and not 0 <= around <= MAX_ID:
                raise ValueError(f"the id {around} cannot be put around texts: not an int32")
        core = self._core()
        if core is not None:
            return core.encode(texts, prepend, append, num_threads or default_threads())
        before = [] if prepend is None else [prepend]
        after = [] if append is None else [append]
        native.Batch.of(texts)  # refuses lone surrogates
        rows = [before + self._encode_slowly(text) + after for text in texts]
        ends = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum([len(row) for row in rows], out=ends[1:])
        return np.array([i for row in rows for i in row], dtype=np.int32), ends

    def decode_bytes(self, ids: Iterable[int] | NDArray[np.int32]) -> bytes:
        """Return the bytes of some ids. Raises ValueError for an id out of range."""
        tokens = self._tokens
        if isinstance(ids, np.ndarray) and ids.dtype == np.int32:
            core = self._core()
            if core is not None:
                return core.decode(ids)
        try:
            return b"".join([tokens[_index(i)] for i in ids])
        except IndexError:
            raise ValueError(f"an id is not below the vocabulary size {len(tokens)}") from None

    def decode(self, ids: Iterable[int] | NDArray[np.int32]) -> str:
        """Return the text of some ids; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def _rank_table(self) -> dict[bytes, int]:
        if self._ranks is None:
            self._ranks = {token: rank for rank, token in enumerate(self._tokens)}
        return self._ranks

    def _core(self) -> native.Encoder | None:
        if self._encoder is None:
            name = _core_pattern(self._pattern)
            if name is not None:
                self._encoder = native.Encoder(name, self._tokens)
        return self._encoder

    def _encode_slowly(self, text: str) -> list[int]:
        ranks, cache, ids = self._rank_table(), self._cache, []
        if len(cache) > 1 << 16:
            cache.clear()
        for chunk in reference.splitter(self._pattern)(text):
            found = cache.get(chunk)
            if found is None:
                data = chunk.encode()
                whole = ranks.get(data)
                found = [whole] if whole is not None else reference.encode_chunk(data, ranks)
                cache[chunk] = found
            ids += found
        return ids


class StreamDecoder:
    """Turns ids into text one at a time: a character comes out once all its bytes are there."""

    def __init__(self, tokens: Sequence[bytes]) -> None:
        import codecs

        self._tokens = tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_id: int) -> str:
        """Return the text that this id completes, possibly empty."""
        return self._decoder.decode(self._tokens[_index(token_id)])

    def finish(self) -> str:
        """Return what is left of an unfinished character (U+FFFD) and start anew."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


def _index(token_id: int) -> int:
    if token_id < 0:
        raise ValueError(f"id {token_id} is negative")
    return token_id


def _batches(texts: Iterable[str], most: int) -> Iterator[list[str]]:
    """Group texts: at most `most` of them and about FEED_CHARACTERS, whatever comes first."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if len(batch) >= most or size >= FEED_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _feed(trainer: native.Trainer, batches: Iterable[list[str]]) -> None:
    """Count one batch while the caller's iterator produces the next (the core holds no GIL)."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        pending: Future[None] | None = None
        for batch in batches:
            if pending is not None:
                pending.result()
            pending = pool.submit(trainer.feed, batch)
        if pending is not None:
            pending.result()


def _run(trainer: native.Trainer, total: int, progress: Progress | None) -> list[tuple[int, int]]:
    """Learn all merges in steps, so that Python sees signals; log progress with an ETA."""
    num_bytes, num_chunks, distinct = trainer.start(total)
    logger.info(
        "rustbpe: %.1f MB, %s chunks, %s distinct; learning %s merges",
        num_bytes / 1e6,
        f"{num_chunks:,}",
        f"{distinct:,}",
        f"{total:,}",
    )
    done, begin, shown = 0, time.perf_counter(), time.perf_counter()
    while trainer.step(MERGES_PER_STEP):
        done += MERGES_PER_STEP
        if progress is not None:
            progress(done, total)
        now = time.perf_counter()
        if now - shown > 2.0:
            shown = now
            left = (now - begin) / done * (total - done)
            logger.info("rustbpe: merge %s/%s  eta %.0f s", f"{done:,}", f"{total:,}", left)
    return trainer.merges(total)
