"""One beginning, several continuations: read the beginning once, the continuations beside it.

The answers of a multiple-choice question differ in their last words only. `Branches` is a past
for `GPT.hidden`: the first call reads the beginnings, the second one all continuations of each,
laid side by side in one row, where none sees another.

Legend: B = rows, P = positions of the longest beginning, T = positions of the longest row of
continuations, S = P + T, H = heads, K = key/value heads, D = head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.attention import cached_attention, causal_attention


class Branches:
    """The past of B beginnings, then of their continuations.

    prefixes: token ids of each row's beginning, not empty. branches: for each row its
    continuations, of which some may be empty. `prefix_ids` and `branch_ids` are what `hidden` is
    given, in this order; `last_columns` (B, 1) are the ends of the beginnings.
    """

    def __init__(
        self,
        prefixes: Sequence[Sequence[int]],
        branches: Sequence[Sequence[Sequence[int]]],
        *,
        padding: int,
        device: torch.device,
    ) -> None:
        self.longest = 0
        self._reads_prefixes = True
        self.last_columns = torch.tensor([[len(prefix) - 1] for prefix in prefixes], device=device)
        self._stored: dict[int, tuple[Tensor, Tensor]] = {}
        lengths = [len(prefix) for prefix in prefixes]
        self.prefix_ids = _padded(prefixes, padding, device)
        rows = [[token for branch in row for token in branch] for row in branches]
        self.branch_ids = _padded(rows, padding, device)
        owners = [[n for n, branch in enumerate(row) for _ in branch] for row in branches]
        steps = [[i for branch in row for i in range(len(branch))] for row in branches]
        starts = torch.tensor(lengths, device=device)[:, None]
        owner, step = _padded(owners, -1, device), _padded(steps, 0, device)
        self._positions = starts + step
        self._before = self._predecessors(branches, prefixes, padding)
        self._visible = torch.cat(
            (
                (torch.arange(max(lengths), device=device) < starts)[:, None, :].expand(
                    -1, owner.size(1), -1
                ),
                (owner[:, :, None] == owner[:, None, :]) & (step[:, None, :] <= step[:, :, None]),
            ),
            dim=2,
        )[:, None]

    def _predecessors(
        self,
        branches: Sequence[Sequence[Sequence[int]]],
        prefixes: Sequence[Sequence[int]],
        padding: int,
    ) -> Tensor:
        """The token before each one of a continuation: (B, T)."""
        rows = [
            [token for branch in row if branch for token in (prefix[-1], *branch[:-1])]
            for row, prefix in zip(branches, prefixes, strict=True)
        ]
        return _padded(rows, padding, self.prefix_ids.device)

    def check_room(self, num_new: int) -> None:
        """Two calls, of the sizes announced."""
        expected = self.prefix_ids if self._reads_prefixes else self.branch_ids
        if num_new != expected.size(1):
            raise ValueError(f"{num_new} positions given, {expected.size(1)} announced")

    def positions(self, num_new: int) -> Tensor:
        """Index of each token in its own sequence: (B, num_new)."""
        if self._reads_prefixes:
            steps = torch.arange(num_new, device=self.prefix_ids.device)
            return steps.expand(self.prefix_ids.size(0), -1)
        return self._positions

    def append_tokens(self, idx: Tensor, positions: Tensor) -> Tensor:
        """Each token's predecessor in its own sequence."""
        return idx.roll(1, dims=1) if self._reads_prefixes else self._before

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
        """Causal within a beginning; a continuation sees its beginning and itself."""
        if self._reads_prefixes:
            self._stored[layer] = (k, v)
            if asked is None:
                return causal_attention(q, k, v, window)
            return cached_attention(q, k.transpose(1, 2), v.transpose(1, 2), asked, window)
        if asked is not None:
            raise ValueError("continuations are read whole")
        keys, values = self._stored.pop(layer)
        keys, values = torch.cat((keys, k), dim=1), torch.cat((values, v), dim=1)
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            attn_mask=self._visible_within(window),
            enable_gqa=q.size(2) != k.size(2),
        )
        return out.transpose(1, 2)

    def _visible_within(self, window: int | None) -> Tensor:
        """Which keys a continuation's tokens see: (B, 1, T, S)."""
        if window is None:
            return self._visible
        size, device = self.prefix_ids.shape, self.prefix_ids.device
        begun = torch.arange(size[1], device=device).expand(size)
        keys = torch.cat((begun, self._positions), dim=1)
        near = keys[:, None, :] >= self._positions[:, :, None] - window
        return self._visible & near[:, None]

    def advance(self, num_new: int) -> None:
        """The beginnings are read; what follows are the continuations."""
        self._reads_prefixes = False
        # The model adds the new positions to see whether it is long enough, but here they overlap.
        longest = int(self._positions.max()) + 1 if self._positions.numel() else num_new
        self.longest = longest - self._positions.size(1)


def _padded(rows: Sequence[Sequence[int]], padding: int, device: torch.device) -> Tensor:
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[padding] * (longest - len(row))] for row in rows], device=device)
