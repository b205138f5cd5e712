"""Causal attention with one contract and several backends, and the key-value cache for decoding.

Legend: B = sequences, T = new positions, S = all positions attended to, H = query heads, K =
key/value heads (H is a multiple of K), D = head size. Tensors are (B, T, heads, D) between
functions, (B, heads, T, D) inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from nanochat import fused, fused_native


def causal_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
    """Attend from every position to itself and the ones before it (arXiv:1706.03762, eq. 1).

    q: (B, T, H, D); k, v: (B, T, K, D). window: how many positions before its own each one sees,
    None = all. Returns (B, T, H, D) in q's dtype.
    """
    groups = q.size(2) // k.size(2)
    if window is not None and window >= q.size(1) - 1:
        window = None
    if fused_native.takes(q, k, v):
        if groups > 1:
            k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
        return fused_native.causal_attention(q, k, v, window)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if q.device.type == "cpu" and q.requires_grad:
        # CPU flash attention runs its backward pass at fp32 speed; matmuls over blocks of queries
        # run in the compute dtype and skip the keys of the future.
        if groups > 1:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        function = fused.causal_attention if fused.pays_for(q) else _blockwise
        out = function(q, k, v, window)
    elif window is None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=groups > 1)
    elif q.device.type == "cuda" and torch.compiler.is_compiling():
        out = _flex(q, k, v, window)
    else:
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=_near(q.size(2), window, q.device), enable_gqa=groups > 1
        )
    return out.transpose(1, 2)


def _near(length: int, window: int, device: torch.device) -> Tensor:
    """Which keys each query sees: (length, length)."""
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return (distance >= 0) & (distance <= window)


def _flex(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """A window as a kernel that skips what is outside it, for compiled steps on a GPU."""

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query - key <= window)

    length = q.size(2)
    mask = create_block_mask(sees, None, None, length, length, device=q.device)
    out = flex_attention(q, k, v, block_mask=mask, enable_gqa=q.size(1) != k.size(1))
    assert isinstance(out, Tensor)  # without the log-sum-exp, which was not asked for
    return out


def _blockwise(q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
    """Causal attention as matmuls over blocks of queries, for the compiler: (B, H, T, D)."""
    length = q.size(2)
    q = q * q.size(-1) ** -0.5
    outputs = []
    for start in range(0, length, fused.QUERY_BLOCK):
        stop = min(start + fused.QUERY_BLOCK, length)
        low = fused.first_key(start, window)
        scores = (q[:, :, start:stop] @ k[:, :, low:stop].transpose(-1, -2)).float()
        query_positions = torch.arange(start, stop, device=q.device)[:, None]
        key_positions = torch.arange(low, stop, device=q.device)[None, :]
        hidden = key_positions > query_positions
        if window is not None:
            hidden = hidden | (key_positions < query_positions - window)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
        outputs.append(weights.to(v.dtype) @ v[:, :, low:stop])
    return torch.cat(outputs, dim=2)


def cached_attention(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, window: int | None = None
) -> Tensor:
    """Attend from new positions to a cache that already holds them.

    q: (B, T, H, D); k, v: (B, K, S, D); positions: (B, T) index of each query in its own sequence;
    window as in `causal_attention`. Returns (B, T, H, D) in q's dtype.
    """
    keys = torch.arange(k.size(2), device=k.device)[None, None, None, :]
    queries = positions[:, None, :, None]
    visible = keys <= queries
    if window is not None:
        visible = visible & (keys >= queries - window)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k, v, attn_mask=visible, enable_gqa=q.size(2) != k.size(1)
    )
    return out.transpose(1, 2)


class Past(Protocol):
    """What `GPT.hidden` needs of the tokens before its own; `KVCache` is one."""

    longest: int

    def check_room(self, num_new: int) -> None:
        """ValueError when `num_new` more tokens a row do not fit."""
        ...

    def positions(self, num_new: int) -> Tensor:
        """Index of each new token in its own sequence: (B, num_new) int64."""
        ...

    def append_tokens(self, idx: Tensor, positions: Tensor) -> Tensor:
        """Note new token ids (B, T); return each one's predecessor, anything at position 0."""
        ...

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: Tensor,
        asked: Tensor | None = None,
        window: int | None = None,
    ) -> Tensor:
        """Attend from new tokens, q (B, T, H, D), to the past and to k, v (B, T, K, D).

        positions: (B, T) of k and v. asked: (B, Q) of q, where it is only some of the tokens.
        window: how many tokens before its own each one sees, None = all.
        """
        ...

    def advance(self, num_new: int) -> None:
        """All layers have seen `num_new` more tokens."""
        ...


class KVCache:
    """Keys and values of B sequences, each with its own length, in memory reserved beforehand.

    Rows grow independently: `forward(idx, kv_cache=cache)` appends idx's T tokens to every row at
    that row's own
    length. A caller that padded short rows on the right takes the padding back with `set_lengths`.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        batch_size: int,
        capacity: int,
        num_kv_heads: int,
        head_dim: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Reserve keys and values (B, K, capacity, D) of `dtype` for each layer, all empty."""
        shape = (batch_size, num_kv_heads, capacity, head_dim)
        # Keys and values of the first layer, of the second, ...: tensors of their own, so that
        # `resize` needs little memory beside them.
        self.storage = [
            torch.zeros(shape, device=device, dtype=dtype) for _ in range(2 * num_layers)
        ]
        self.tokens = torch.zeros(batch_size, capacity, dtype=torch.int64, device=device)
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.longest = (
            0  # upper bound of lengths kept on the host, so that no step waits for the device
        )
        self._places: Tensor | None = None

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return self.lengths.numel()

    @property
    def capacity(self) -> int:
        """Positions each row can hold."""
        return self.tokens.size(1)

    def positions(self, num_new: int) -> Tensor:
        """Index of each of `num_new` appended tokens in its own row: (B, num_new) int64."""
        steps = torch.arange(num_new, device=self.lengths.device)
        return self.lengths[:, None] + steps[None, :]

    def append_tokens(self, idx: Tensor, positions: Tensor) -> Tensor:
        """Note the appended token ids (B, T); return each one's predecessor, its own at position 0.

        Only a model with a token shift or a smear reads them.
        """
        rows = self._row_places()[:, None]
        self.tokens[rows, positions] = idx
        return self.tokens[rows, (positions - 1).clamp_min(0)]

    def append(self, layer: int, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, T, K, D) of one layer; return views (B, K, S, D) up to the longest row.

        `advance` moves the lengths once all layers are stored.
        """
        rows = self._row_places()[:, None]
        keys, values = self.storage[2 * layer], self.storage[2 * layer + 1]
        keys[rows, :, positions] = k.detach()
        values[rows, :, positions] = v.detach()
        span = self.longest + k.size(1)
        if self._places is None:
            return keys[: self.batch_size, :, :span], values[: self.batch_size, :, :span]
        return keys[:, :, :span][self._places], values[:, :, :span][self._places]

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: Tensor,
        asked: Tensor | None = None,
        window: int | None = None,
    ) -> Tensor:
        """Store k and v, then attend from q (B, T, H, D) to all that is stored."""
        keys, values = self.append(layer, k, v, positions)
        return cached_attention(q, keys, values, positions if asked is None else asked, window)

    def _row_places(self) -> Tensor:
        """Where each row lies in the storage: (B,) int64."""
        if self._places is not None:
            return self._places
        return torch.arange(self.batch_size, device=self.lengths.device)

    def advance(self, num_new: int) -> None:
        """Count `num_new` appended tokens in every row."""
        self.lengths += num_new
        self.longest += num_new

    def check_room(self, num_new: int) -> None:
        """Refuse an append past the reserved memory instead of writing over earlier entries."""
        if self.longest + num_new > self.capacity:
            raise ValueError(
                f"key-value cache of {self.capacity} positions is full: "
                f"{self.longest} used, {num_new} more asked for"
            )

    def set_lengths(self, lengths: Tensor) -> None:
        """Declare each row's true length (B,): what lies beyond is overwritten by later appends."""
        self.lengths.copy_(lengths)
        self.longest = int(lengths.max())

    def at(self, rows: Sequence[int], lengths: Sequence[int]) -> KVCache:
        """These rows alone, at these lengths: a view, whose appends land in this cache's memory."""
        chosen = KVCache.__new__(KVCache)
        count, device = len(rows), self.lengths.device
        chosen.storage, chosen.tokens, chosen._places = self.storage, self.tokens, None
        if list(rows) != list(range(count)):
            chosen._places = torch.tensor(rows, dtype=torch.int64, device=device)
        chosen.lengths = torch.tensor(lengths, dtype=torch.int64, device=device)
        chosen.longest = max(lengths)
        return chosen

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Give row `target` the first `length` tokens of row `source`."""
        for tensor in (*self.storage, self.tokens[:, None, :, None]):
            tensor[target, :, :length] = tensor[source, :, :length]

    def resize(self, batch_size: int, capacity: int) -> None:
        """Have so many rows of so much room; the first rows keep what still fits.

        Tensor by tensor, each freed before the next is made: beside the larger of the old and the
        new cache, memory for one tensor of the smaller is enough.
        """
        for i in range(len(self.storage)):
            self.storage[i] = _resized(self.storage[i], batch_size, capacity)
        self.tokens = _resized(self.tokens[:, None, :, None], batch_size, capacity)[:, 0, :, 0]
        lengths = self.lengths[:batch_size]
        self.lengths = F.pad(lengths, (0, batch_size - lengths.numel()))


def _resized(old: Tensor, batch_size: int, capacity: int) -> Tensor:
    """A tensor (rows, heads, tokens, features) with other numbers of rows and tokens."""
    new = old.new_zeros(batch_size, old.size(1), capacity, old.size(3))
    rows, kept = min(batch_size, old.size(0)), min(capacity, old.size(2))
    new[:rows, :, :kept] = old[:rows, :, :kept]
    return new
