"""The model as generation sees it: rows of remembered tokens, fed by chunks.

A `Decoder` keeps keys and values of several rows, each with its own length. `feed` appends a chunk
of tokens to some of them, a whole prompt to one and a single token to another, and returns the
logits after the chunks. `PlainDecoder` does it with the model's own forward pass on any device; it
is the oracle of the compiled one.

Legend: N = chunks whose logits are wanted, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from nanochat.attention import KVCache
from nanochat.gpt import GPT

CAPACITY_STEP = 64  # row capacities are rounded up to it, so that memory is seldom moved


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

    def open(self, capacity: int) -> int:
        """Reserve a row for up to `capacity` tokens; returns its number."""
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
    """Decodes with `GPT.hidden` and one rectangular `KVCache`."""

    def __init__(self, model: GPT) -> None:
        """The model stays where it is, in the dtype it has."""
        self._model = model
        self._free: list[int] = []
        self._cache: KVCache | None = None

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
        """Memory of one remembered token: keys and values of all layers."""
        config = self._model.config
        features = 2 * config.n_layer * config.num_kv_heads * config.head_dim
        return features * self._model.compute_dtype.itemsize

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._model.device

    def open(self, capacity: int) -> int:
        """Reserve a row; the memory of all rows grows by doubling."""
        if not self._free:
            num_rows = 0 if self._cache is None else self._cache.batch_size
            self._grow(max(2 * num_rows, 1), capacity)
        else:
            self._grow(0, capacity)
        return self._free.pop(0)

    def close(self, row: int) -> None:
        """Make the row free; low numbers are taken again first, which keeps rows together."""
        self._free.append(row)
        self._free.sort()

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy keys and values of the first `length` tokens."""
        assert self._cache is not None
        with torch.inference_mode():
            self._cache.copy_row(source, target, length)

    @torch.inference_mode()
    def feed(self, chunks: Sequence[Chunk]) -> Tensor:
        """Two forward passes at most: one for single tokens, one for longer chunks, padded."""
        logits: dict[int, Tensor] = {}
        singles = [chunk for chunk in chunks if len(chunk.tokens) == 1]
        longer = [chunk for chunk in chunks if len(chunk.tokens) > 1]
        for group in (singles, longer):
            if group:
                group = sorted(group, key=lambda chunk: chunk.row)
                for chunk, states in zip(group, self._last_states(group), strict=True):
                    logits[chunk.row] = states
        wanted = [logits[chunk.row] for chunk in chunks if chunk.wants_logits]
        if not wanted:
            return torch.empty(0, self.vocab_size)
        return self._model.logits(torch.stack(wanted))

    def _last_states(self, chunks: Sequence[Chunk]) -> Tensor:
        """Final states (chunks, C) after each chunk."""
        longest = max(len(chunk.tokens) for chunk in chunks)
        # What stands behind a short chunk is written over by the row's next one.
        padded = [[*chunk.tokens, *[0] * (longest - len(chunk.tokens))] for chunk in chunks]
        device = self._model.device
        self._grow(0, max(chunk.start for chunk in chunks) + longest)
        assert self._cache is not None
        cache = self._cache.at([chunk.row for chunk in chunks], [chunk.start for chunk in chunks])
        hidden = self._model.hidden(torch.tensor(padded, device=device), cache)
        ends = torch.tensor([len(chunk.tokens) - 1 for chunk in chunks], device=device)
        return hidden[torch.arange(len(chunks), device=device), ends]

    def _grow(self, num_rows: int, capacity: int) -> None:
        """Have at least so many rows and so much room in each; keeps what is there."""
        old = self._cache
        capacity = -(-capacity // CAPACITY_STEP) * CAPACITY_STEP
        if old is not None:
            num_rows, capacity = max(num_rows, old.batch_size), max(capacity, old.capacity)
            if (num_rows, capacity) == (old.batch_size, old.capacity):
                return
        with torch.inference_mode():
            self._cache = self._model.new_cache(num_rows, capacity)
            first = 0
            if old is not None:
                first = old.batch_size
                self._cache.storage[:, :, :first, :, : old.capacity] = old.storage
                self._cache.tokens[:first, : old.capacity] = old.tokens
        self._free += range(first, num_rows)
