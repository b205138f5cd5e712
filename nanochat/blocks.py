"""What a transformer is made of: norm, rotation, attention, MLP, block.

Legend: B = sequences, T = positions, Q = wanted positions, C = model width (n_embd), K = key/value
heads, D = head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat import fused, fused_native
from nanochat.attention import Past, cached_attention, causal_attention
from nanochat.gpt_config import GATE_CHANNELS, GPTConfig

NORM_EPS = torch.finfo(torch.float32).eps


def rms_norm(x: Tensor) -> Tensor:
    """Scale the last dimension to unit root mean square; no weights (arXiv:1910.07467)."""
    if fused_native.takes(x):
        return fused_native.rms_norm(x, NORM_EPS)
    if fused.pays_for(x):
        return fused.rms_norm(x, NORM_EPS)
    return F.rms_norm(x, (x.size(-1),), eps=NORM_EPS)


def relu_squared(x: Tensor) -> Tensor:
    """max(x, 0)^2, the activation of arXiv:2109.08668, section 3.1.

    Without gradients in place of x: fresh memory for the widest of all states costs long prompts a
    tenth of their time.
    """
    if fused.pays_for(x):
        return fused.relu_squared(x)
    return F.relu(x).square() if x.requires_grad else x.relu_().square_()


def rotary_tables(
    length: int, head_dim: int, device: torch.device | None, *, base: float = 10_000.0
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position's angles, each (length, D / 2) fp32."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    positions = torch.arange(length, dtype=torch.float32, device=device)
    angles = torch.outer(positions, base**-exponents)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate feature pairs (i, i + D/2) by their position's angle (RoPE, arXiv:2104.09864, eq. 34).

    x: (B, T, heads, D); cos, sin: (T, D / 2) or (B, T, D / 2). The turn is by minus the angle, as
    in the 2025 nanochat; attention sees only differences, so the sign is a convention of the
    weights. Returns x's dtype.
    """
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    turned = torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)
    return turned.to(x.dtype)


def rotate_and_norm(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """`rotate`, then `rms_norm` of each head (QK norm, arXiv:2010.04245)."""
    is_native = fused_native.takes(x) and fused_native.takes_head_size(x.size(-1))
    if is_native and rotary[0].ndim == 2:
        return fused_native.rotate_and_norm(x, *rotary, NORM_EPS)
    if fused.pays_for(x) and rotary[0].ndim == 2:
        return fused.rotate_and_norm(x, *rotary, NORM_EPS)
    return rms_norm(rotate(x, *rotary))


def scaled_sum(x: Tensor, first: Tensor, keep: Tensor, back: Tensor) -> Tensor:
    """A mix `keep * x + back * first` of x and first (B, T, C) by two learned scalars."""
    if fused.pays_for(x):
        return fused.scaled_sum(x, first, keep, back)
    return keep * x + back * first


def linears(x: Tensor, *layers: nn.Linear) -> tuple[Tensor, ...]:
    """Bias-free linear layers that read the same x (..., K): one (..., N) of each."""
    if fused_native.takes_layers(x, layers):
        return fused_native.linears(x, layers)
    return tuple(layer(x) for layer in layers)


class CausalSelfAttention(nn.Module):
    """Grouped-query attention with rotary positions and QK norm."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        """Four bias-free matrices, and a gate where the layer has a value embedding.

        `layer` is this block's place in the cache.
        """
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.window, self.qk_scale = config.windows[layer], config.qk_scale
        width, kv_width = config.n_embd, config.num_kv_heads * config.head_dim
        self.c_q = nn.Linear(width, width, bias=False)
        self.c_k = nn.Linear(width, kv_width, bias=False)
        self.c_v = nn.Linear(width, kv_width, bias=False)
        self.c_proj = nn.Linear(width, width, bias=False)
        if config.has_value_embedding(layer):
            self.ve_gate = nn.Linear(GATE_CHANNELS, config.num_kv_heads, bias=False)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        cached: CachedStep | None,
        wanted: Wanted | None = None,
        token_values: Tensor | None = None,
    ) -> Tensor:
        """x: (B, T, C), normed. token_values: (B, T, K * D), the tokens' value embeddings.

        Returns (B, T, C); for Q wanted columns their queries alone are made: (B, Q, C).
        """
        asking_rotary = rotary if wanted is None else wanted.rotary
        if wanted is None:
            projected = linears(x, self.c_q, self.c_k, self.c_v)
        else:
            projected = (self.c_q(wanted.of(x)), *linears(x, self.c_k, self.c_v))
        q, k, v = (part.view(*part.shape[:-1], -1, self.head_dim) for part in projected)
        if token_values is not None:
            gate: Tensor = 3.0 * torch.sigmoid(self.ve_gate(x[..., :GATE_CHANNELS]))  # (B, T, K)
            v = v + gate.unsqueeze(-1) * token_values.view_as(v)
        q, k = rotate_and_norm(q, asking_rotary), rotate_and_norm(k, rotary)
        if self.qk_scale != 1.0:
            q = q * self.qk_scale**2  # only the product of the two factors shows
        y = self._attend(q, k, v, cached, wanted)
        (out,) = linears(y.flatten(-2), self.c_proj)
        return out

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cached: CachedStep | None,
        wanted: Wanted | None,
    ) -> Tensor:
        if cached is not None:
            asked = None if wanted is None else wanted.positions
            return cached.cache.attend(self.layer, q, k, v, cached.positions, asked, self.window)
        if wanted is not None:
            k, v = k.transpose(1, 2), v.transpose(1, 2)
            return cached_attention(q, k, v, wanted.columns, self.window)
        return causal_attention(q, k, v, self.window)


class MLP(nn.Module):
    """Two matrices around a squared ReLU."""

    def __init__(self, config: GPTConfig) -> None:
        """C -> 4C -> C, no biases."""
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.mlp_width, bias=False)
        self.c_proj = nn.Linear(config.mlp_width, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, C), normed. Returns (B, T, C)."""
        if fused_native.takes_layers(x, (self.c_fc, self.c_proj)):
            return fused_native.relu_squared_mlp(x, self.c_fc, self.c_proj)
        out: Tensor = self.c_proj(relu_squared(self.c_fc(x)))
        return out


class GatedMLP(MLP):
    """Three matrices: one of two halves is the gate of the other (arXiv:2002.05202, section 2)."""

    def __init__(self, config: GPTConfig) -> None:
        """C -> two of about 8C / 3 -> C, no biases."""
        super().__init__(config)
        self.c_gate = nn.Linear(config.n_embd, config.mlp_width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, C), normed. Returns (B, T, C)."""
        gate, inner = linears(x, self.c_gate, self.c_fc)
        (out,) = linears(F.silu(gate) * inner, self.c_proj)
        return out


class Block(nn.Module):
    """Pre-norm residual block: attention, then MLP."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        """Build block number `layer`, counted from 0."""
        super().__init__()
        self.attn = CausalSelfAttention(config, layer)
        self.mlp = GatedMLP(config) if config.mlp == "swiglu" else MLP(config)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        cached: CachedStep | None,
        wanted: Wanted | None = None,
        token_values: Tensor | None = None,
    ) -> Tensor:
        """x: (B, T, C). Returns (B, T, C), or (B, Q, C) for the Q wanted columns."""
        attended = self.attn(rms_norm(x), rotary, cached, wanted, token_values)
        x = attended + (x if wanted is None else wanted.of(x))
        out: Tensor = x + self.mlp(rms_norm(x))
        return out


@dataclass(frozen=True)
class CachedStep:
    """One forward pass over a cache: where this call's tokens stand in their rows, (B, T) int64."""

    cache: Past
    positions: Tensor


@dataclass(frozen=True)
class Wanted:
    """Columns (B, Q) of a forward pass whose final states are asked for.

    positions: their places in their sequences, (B, Q); rotary: the tables there, (B, Q, D / 2).
    """

    columns: Tensor
    positions: Tensor
    rotary: tuple[Tensor, Tensor]

    def of(self, x: Tensor) -> Tensor:
        """The wanted columns of x (B, T, C): (B, Q, C)."""
        return x.gather(1, self.columns.unsqueeze(-1).expand(-1, -1, x.size(-1)))
