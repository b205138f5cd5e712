"""The model as generation sees it: rows of remembered tokens, fed by chunks.

A `Decoder` keeps keys and values of several rows, each with its own length. `feed` appends a chunk
of tokens to some of them, a whole prompt to one and a single token to another, and returns the
logits after the chunks. `PlainDecoder` does it with the model's own forward pass on any device; it
is the oracle of the compiled one.

Legend: N = chunks whose logits are wanted, V = vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from nanochat.attention import KVCache
from nanochat.gpt import GPT

CAPACITY_STEP = 64  # row capacities are rounded up to it, so that memory is seldom moved
TOKEN_ID_BYTES = 8  # of the int64 beside a token's keys and values


class Chunk(NamedTuple):
    """Tokens for positions `start`, `start` + 1, ... of a row whose earlier ones are known."""

    row: int
    start: int
    tokens: Sequence[int]
    wants_logits: bool = True
    """Whether the logits after the last token are needed."""


class Decoder(Protocol):
    """Keys and values of rows, and the step that extends them."""

    @property
    def context(self) -> int:
        """Tokens of a row that the model was trained to see."""
        ...

    @property
    def vocab_size(self) -> int:
        """Token ids the model knows."""
        ...

    @property
    def bytes_per_token(self) -> int:
        """Memory of one remembered token."""
        ...

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        ...

    @property
    def num_reserved(self) -> int:
        """Tokens of memory that all rows take together."""
        ...

    def can_open(self, capacity: int, limit: int, *, closing: Collection[int] = ()) -> bool:
        """Whether a row more keeps `num_reserved` at most `limit`, once rows `closing` are closed.

        True for every capacity up to `limit` where no other row is left.
        """
        ...

    def open(self, capacity: int, limit: int | None = None) -> int:
        """Reserve a row for up to `capacity` tokens; returns its number.

        limit: as in `can_open`, which must have agreed; None = no bound.
        """
        ...

    def close(self, row: int) -> None:
        """Give the row's memory back."""
        ...

    def copy(self, source: int, target: int, length: int) -> None:
        """Give row `target` the first `length` tokens of row `source`."""
        ...

    def feed(self, chunks: Sequence[Chunk]) -> Tensor:
        """Append all chunks, each of another row; logits (N, V) fp32 of those that want them.

        The next call may overwrite the logits.
        """
        ...


class PlainDecoder:
    """Decodes with `GPT.hidden` and one rectangular `KVCache`.

    Every row takes the room of the longest one, so one long row among many short ones is dear.
    The rectangle changes only when a row does not fit into it, and goes with the last row.
    """

    def __init__(self, model: GPT) -> None:
        """The model stays where it is, in the dtype it has."""
        self._model = model
        self._cache: KVCache | None = None
        self._numbers = itertools.count()
        self._capacities: dict[int, int] = {}
        """By the number of each open row."""
        self._places: dict[int, int] = {}
        """Where each open row lies in the cache."""

    @property
    def context(self) -> int:
        """Tokens of a row that the model was trained to see."""
        return self._model.config.sequence_len

    @property
    def vocab_size(self) -> int:
        """Token ids the model knows."""
        return self._model.config.vocab_size

    @property
    def bytes_per_token(self) -> int:
        """Memory of one remembered token: keys and values of all layers, and its id."""
        config = self._model.config
        features = 2 * config.n_layer * config.num_kv_heads * config.head_dim
        return features * self._model.compute_dtype.itemsize + TOKEN_ID_BYTES

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._model.device

    @property
    def num_reserved(self) -> int:
        """Tokens of memory that the rectangle takes."""
        return 0 if self._cache is None else self._cache.batch_size * self._cache.capacity

    def can_open(self, capacity: int, limit: int, *, closing: Collection[int] = ()) -> bool:
        """Whether the rectangle, and what moving it takes, stay within `limit` tokens."""
        kept = [self._capacities[row] for row in self._capacities.keys() - set(closing)]
        if not kept:  # the old rectangle is gone before the new one is made
            return capacity <= limit
        return self._has_place(len(kept), capacity) or self._can_resize(
            len(kept) + 1, max(*kept, capacity), limit
        )

    def open(self, capacity: int, limit: int | None = None) -> int:
        """Reserve a row; where memory is not short, with places for later ones."""
        num_open = len(self._capacities)
        if not self._has_place(num_open, capacity):
            longest = max(capacity, *self._capacities.values(), 0)
            rounded = -(-longest // CAPACITY_STEP) * CAPACITY_STEP
            doubled = 1 << num_open.bit_length()  # the next power of 2 above `num_open`
            if limit is None or self._can_resize(doubled, rounded, 3 * limit // 4):
                self._resize(doubled, rounded)
            else:
                self._resize(num_open + 1, longest)
        row = next(self._numbers)
        self._capacities[row] = capacity
        # Low places first, which keeps the rows together.
        self._places[row] = min(set(range(num_open + 1)) - set(self._places.values()))
        return row

    def close(self, row: int) -> None:
        """Make the row's place free for another."""
        del self._capacities[row], self._places[row]
        if not self._places:
            self._cache = None

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy keys and values of the first `length` tokens."""
        assert self._cache is not None
        with torch.inference_mode():
            self._cache.copy_row(self._places[source], self._places[target], length)

    @torch.inference_mode()
    def feed(self, chunks: Sequence[Chunk]) -> Tensor:
        """A forward pass for single tokens, and one for longer chunks, padded; seldom more."""
        logits: dict[int, Tensor] = {}
        for group in self._groups(chunks):
            group = sorted(group, key=lambda chunk: self._places[chunk.row])
            for chunk, states in zip(group, self._last_states(group), strict=True):
                logits[chunk.row] = states
        wanted = [logits[chunk.row] for chunk in chunks if chunk.wants_logits]
        if not wanted:
            return torch.empty(0, self.vocab_size)
        return self._model.logits(torch.stack(wanted))

    def _groups(self, chunks: Sequence[Chunk]) -> list[list[Chunk]]:
        """Chunks for one forward pass each: padded to its longest, all stay in their rows."""
        assert self._cache is not None
        singles = [chunk for chunk in chunks if len(chunk.tokens) == 1]
        groups = [singles] if singles else []
        longer: list[list[Chunk]] = []
        for chunk in sorted(chunks, key=lambda chunk: -len(chunk.tokens)):
            if len(chunk.tokens) == 1:
                break
            room = self._cache.capacity - chunk.start
            fitting = (group for group in longer if len(group[0].tokens) <= room)
            group = next(fitting, None)
            if group is None:
                longer.append([chunk])
            else:
                group.append(chunk)
        return groups + longer

    def _last_states(self, chunks: Sequence[Chunk]) -> Tensor:
        """Final states (chunks, C) after each chunk."""
        longest = max(len(chunk.tokens) for chunk in chunks)
        # What stands behind a short chunk is written over by the row's next one.
        padded = [[*chunk.tokens, *[0] * (longest - len(chunk.tokens))] for chunk in chunks]
        device = self._model.device
        assert self._cache is not None
        cache = self._cache.at(
            [self._places[chunk.row] for chunk in chunks], [chunk.start for chunk in chunks]
        )
        hidden = self._model.hidden(torch.tensor(padded, device=device), cache)
        ends = torch.tensor([len(chunk.tokens) - 1 for chunk in chunks], device=device)
        return hidden[torch.arange(len(chunks), device=device), ends]

    def _has_place(self, num_open: int, capacity: int) -> bool:
        """Whether a row fits into the rectangle as it is beside `num_open` others."""
        cache = self._cache
        return cache is not None and num_open < cache.batch_size and capacity <= cache.capacity

    def _can_resize(self, num_rows: int, capacity: int, limit: int) -> bool:
        """Whether the old and the new rectangle, and the move between them, are within `limit`.

        A tensor's share is kept free for the next move, which may be to a smaller rectangle.
        """
        new = num_rows * capacity
        share = -(-new // (2 * self._model.config.n_layer))
        return max(self.num_reserved, new) + share <= limit

    @torch.inference_mode()
    def _resize(self, num_rows: int, capacity: int) -> None:
        if self._cache is None:
            self._cache = self._model.new_cache(num_rows, capacity)
            return
        # Rows that would fall off move to free places below.
        free = iter(sorted(set(range(num_rows)) - set(self._places.values())))
        for row, place in self._places.items():
            if place >= num_rows:
                self._places[row] = next(free)
                length = min(self._capacities[row], capacity)
                self._cache.copy_row(place, self._places[row], length)
        self._cache.resize(num_rows, capacity)
