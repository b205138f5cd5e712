"""The GPT model. Pure: no ranks, no environment, no files, no printing.

Legend: B = sequences, T = positions, C = model width (n_embd), H = query heads, K = key/value
heads,
D = head size (C / H), V = vocabulary, L = layers.

Textbook names that differ here: there is no position table `wpe` (rotary embeddings rotate queries
and keys
instead), `ln_1`, `ln_2` and `ln_f` are the weightless function `rms_norm`, and the fused `c_attn`
is three
matrices `c_q`, `c_k`, `c_v`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat import fused
from nanochat.attention import KVCache, Past, cached_attention, causal_attention
from nanochat.common import UserError

LOGIT_SOFTCAP = (
    15.0  # arXiv:2408.00118, section 2: bounds logits smoothly; 15 as in the 2025 nanochat
)
ROPE_BASE = 10_000.0  # arXiv:2104.09864, section 3.2.2
ROPE_CONTEXTS = 10  # rotary tables reach this many training contexts, so a chat may outgrow one
NORM_EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a GPT. Field names are those of the GPT-2 family."""

    sequence_len: int = 1024
    """Training context in tokens."""
    vocab_size: int = 50304
    """Token ids the model knows."""
    n_layer: int = 12
    """Transformer blocks."""
    n_head: int = 6
    """Query heads of each block."""
    n_kv_head: int | None = None
    """Key/value heads of each block; a divisor of n_head, which is also the default."""
    n_embd: int = 768
    """Width of the residual stream."""
    token_shift: float = 0.0
    """Share of the previous token's embedding that is added to each one; 0 = off (classic)."""

    def __post_init__(self) -> None:
        if self.n_kv_head is None:
            object.__setattr__(self, "n_kv_head", self.n_head)
        for name, value in asdict(self).items():
            if name != "token_shift" and value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1")
        if self.n_embd % self.n_head:
            raise UserError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        if self.head_dim % 2:
            raise UserError(
                f"head size {self.head_dim} (n_embd {self.n_embd} / n_head {self.n_head}) is odd; "
                "rotary embeddings turn pairs of features, so choose an even one"
            )
        if self.n_head % self.num_kv_heads:
            raise UserError(f"n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}")

    @property
    def num_kv_heads(self) -> int:
        """Key/value heads, resolved."""
        return self.n_kv_head or self.n_head

    @property
    def head_dim(self) -> int:
        """Features of one head."""
        return self.n_embd // self.n_head

    @property
    def block_size(self) -> int:
        """The training context by its GPT-2 name."""
        return self.sequence_len

    def to_json(self) -> dict[str, Any]:
        """Plain values for a checkpoint's state file."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> GPTConfig:
        """The inverse of `to_json`; an unknown field is an error, not a guess."""
        unknown = set(values) - set(cls.__dataclass_fields__)
        if unknown:
            raise UserError(
                f"model config has fields this version does not know: {sorted(unknown)}"
            )
        return cls(**values)


def rms_norm(x: Tensor) -> Tensor:
    """Scale the last dimension to unit root mean square; no weights (arXiv:1910.07467)."""
    if fused.pays_for(x):
        return fused.rms_norm(x, NORM_EPS)
    return F.rms_norm(x, (x.size(-1),), eps=NORM_EPS)


def relu_squared(x: Tensor) -> Tensor:
    """max(x, 0)^2, the activation of arXiv:2109.08668, section 3.1."""
    return fused.relu_squared(x) if fused.pays_for(x) else F.relu(x).square()


def softcap(logits: Tensor) -> Tensor:
    """Squash logits of any shape into (-15, 15), in fp32."""
    return LOGIT_SOFTCAP * torch.tanh(logits.float() / LOGIT_SOFTCAP)


def rotary_tables(length: int, head_dim: int, device: torch.device | None) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position's angles, each (length, D / 2) fp32."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    positions = torch.arange(length, dtype=torch.float32, device=device)
    angles = torch.outer(positions, ROPE_BASE**-exponents)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate feature pairs (i, i + D/2) by their position's angle (RoPE, arXiv:2104.09864, eq. 34).

    x: (B, T, heads, D); cos, sin: (T, D / 2) or (B, T, D / 2). The turn is by minus the angle, as
    in the 2025
    nanochat; attention sees only differences, so the sign is a convention of the weights. Returns
    x's dtype.
    """
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    turned = torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)
    return turned.to(x.dtype)


def rotate_and_norm(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """`rotate`, then `rms_norm` of each head (QK norm, arXiv:2010.04245)."""
    if fused.pays_for(x) and rotary[0].ndim == 2:
        return fused.rotate_and_norm(x, *rotary, NORM_EPS)
    return rms_norm(rotate(x, *rotary))


class CausalSelfAttention(nn.Module):
    """Grouped-query attention with rotary positions and QK norm."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        """Four bias-free matrices; `layer` is this block's place in the cache."""
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        width, kv_width = config.n_embd, config.num_kv_heads * config.head_dim
        self.c_q = nn.Linear(width, width, bias=False)
        self.c_k = nn.Linear(width, kv_width, bias=False)
        self.c_v = nn.Linear(width, kv_width, bias=False)
        self.c_proj = nn.Linear(width, width, bias=False)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        cached: CachedStep | None,
        wanted: Wanted | None = None,
    ) -> Tensor:
        """x: (B, T, C), normed. Returns (B, T, C), or (B, Q, C) for the Q wanted columns."""
        if wanted is not None:
            return self._attend_from(wanted, x, rotary, cached)
        q = self.c_q(x).unflatten(-1, (-1, self.head_dim))
        k = self.c_k(x).unflatten(-1, (-1, self.head_dim))
        v = self.c_v(x).unflatten(-1, (-1, self.head_dim))
        q, k = rotate_and_norm(q, rotary), rotate_and_norm(k, rotary)
        if cached is None:
            y = causal_attention(q, k, v)
        else:
            y = cached.cache.attend(self.layer, q, k, v, cached.positions)
        out: Tensor = self.c_proj(y.flatten(-2))
        return out

    def _attend_from(
        self,
        wanted: Wanted,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        cached: CachedStep | None,
    ) -> Tensor:
        """Keys and values of all columns, queries of the wanted ones."""
        q = self.c_q(wanted.of(x)).unflatten(-1, (-1, self.head_dim))
        k = self.c_k(x).unflatten(-1, (-1, self.head_dim))
        v = self.c_v(x).unflatten(-1, (-1, self.head_dim))
        q, k = rotate_and_norm(q, wanted.rotary), rotate_and_norm(k, rotary)
        if cached is None:
            y = cached_attention(q, k.transpose(1, 2), v.transpose(1, 2), wanted.columns)
        else:
            y = cached.cache.attend(self.layer, q, k, v, cached.positions, wanted.positions)
        out: Tensor = self.c_proj(y.flatten(-2))
        return out


class MLP(nn.Module):
    """Two matrices around a squared ReLU."""

    def __init__(self, config: GPTConfig) -> None:
        """C -> 4C -> C, no biases."""
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, C), normed. Returns (B, T, C)."""
        out: Tensor = self.c_proj(relu_squared(self.c_fc(x)))
        return out


class Block(nn.Module):
    """Pre-norm residual block: attention, then MLP."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        """Build block number `layer`, counted from 0."""
        super().__init__()
        self.attn = CausalSelfAttention(config, layer)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        cached: CachedStep | None,
        wanted: Wanted | None = None,
    ) -> Tensor:
        """x: (B, T, C). Returns (B, T, C), or (B, Q, C) for the Q wanted columns."""
        attended = self.attn(rms_norm(x), rotary, cached, wanted)
        x = attended + (x if wanted is None else wanted.of(x))
        out: Tensor = x + self.mlp(rms_norm(x))
        return out


TransformerBlock = Block


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


class Transformer(nn.Module):
    """Token embedding `wte` and the blocks `h`, under the names of the GPT-2 family."""

    def __init__(self, config: GPTConfig) -> None:
        """Embedding (V, C) and L blocks."""
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.h = nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)])


class GPT(nn.Module):
    """Embedding, norm, blocks, norm, untied head, softcap.

    Matrices may be stored in a lower precision than the embedding: the residual stream runs in the
    dtype of
    `lm_head.weight`, while norms, softmax, rotations and losses compute in fp32.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: GPTConfig) -> None:
        """Allocate parameters; `init_weights` gives them values."""
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        cos, sin = rotary_tables(config.sequence_len * ROPE_CONTEXTS, config.head_dim, None)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks by their textbook name."""
        return self.transformer.h

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return self.lm_head.weight.device

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of the residual stream and of every matmul."""
        return self.lm_head.weight.dtype

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw initial values.

        The head and every output projection start at zero, so that all blocks start silent.
        Matrices: normal with std min(1, sqrt(fan_out / fan_in)) / sqrt(fan_in) (arXiv:2310.17813).
        Embedding: std 1.
        """
        self.transformer.wte.weight.normal_(0.0, 1.0, generator=generator)
        for block in self.transformer.h:
            assert isinstance(block, Block)
            attn, mlp = block.attn, block.mlp
            for linear in (attn.c_q, attn.c_k, attn.c_v, mlp.c_fc):
                fan_out, fan_in = linear.weight.shape
                std = min(1.0, math.sqrt(fan_out / fan_in)) / math.sqrt(fan_in)
                linear.weight.normal_(0.0, std, generator=generator)
            attn.c_proj.weight.zero_()
            mlp.c_proj.weight.zero_()
        self.lm_head.weight.zero_()

    def hidden(
        self, idx: Tensor, kv_cache: Past | None = None, columns: Tensor | None = None
    ) -> Tensor:
        """Final normed states of tokens idx (B, T) int64: (B, T, C) in the compute dtype.

        columns: (B, Q) int64, the only tokens whose states are wanted: (B, Q, C). The last block
        then computes no others, a quarter less for a model of four.
        With a cache the tokens continue each row at its own length, and the cache grows by T.
        Raises ValueError when a sequence leaves the rotary tables or the cache.
        """
        num_new = idx.size(1)
        cached = None
        if kv_cache is None:
            self._check_length(num_new)
            rotary = self.cos[:num_new], self.sin[:num_new]
        else:
            kv_cache.check_room(num_new)
            self._check_length(kv_cache.longest + num_new)
            cached = CachedStep(kv_cache, kv_cache.positions(num_new))
            rotary = self.cos[cached.positions], self.sin[cached.positions]
        x = self._embed(idx, cached).to(self.compute_dtype)
        wanted = None if columns is None else self._wanted(columns, cached)
        for block in self.transformer.h[:-1]:
            x = block(x, rotary, cached)
        x = self.transformer.h[-1](x, rotary, cached, wanted)
        if kv_cache is not None:
            kv_cache.advance(num_new)
        return rms_norm(x)

    def _wanted(self, columns: Tensor, cached: CachedStep | None) -> Wanted:
        positions = columns if cached is None else cached.positions.gather(1, columns)
        return Wanted(columns, positions, (self.cos[positions], self.sin[positions]))

    def _embed(self, idx: Tensor, cached: CachedStep | None) -> Tensor:
        """Normed embeddings (B, T, C) in fp32, each with its share of its predecessor's.

        The token shift (RWKV, arXiv:2305.13048, section 3) hands every position the token before
        it. Looking up "what followed this word" is then one attention step instead of two layers
        that must be learned together, which a small model otherwise takes very long to find.
        """
        x = rms_norm(self.transformer.wte(idx))
        shift = self.config.token_shift
        if cached is not None:
            before = cached.cache.append_tokens(idx, cached.positions)
            if shift:
                is_later = (cached.positions > 0).unsqueeze(-1)
                x = x + shift * is_later * rms_norm(self.transformer.wte(before))
        elif shift:
            x = x + shift * F.pad(x[:, :-1], (0, 0, 1, 0))
        return x

    def _check_length(self, length: int) -> None:
        if length > self.cos.size(0):
            raise ValueError(
                f"sequence of {length} tokens is longer than the rotary tables "
                f"({self.cos.size(0)} = {ROPE_CONTEXTS} x context {self.config.sequence_len})"
            )

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        kv_cache: KVCache | None = None,
        loss_reduction: str = "mean",
    ) -> Tensor:
        """Logits of tokens idx (B, T), fp32 (B, T, V), or their cross-entropy if targets are given.

        targets: (B, T) int64, -1 = ignored. loss_reduction: "mean", "sum", or "none" for
        (B * T,) losses. The plain path: training and evaluation use `nanochat.objectives`,
        which gives the same values without holding all logits.
        """
        logits = softcap(self.lm_head(self.hidden(idx, kv_cache)))
        if targets is None:
            return logits
        return F.cross_entropy(
            logits.flatten(0, 1),
            targets.flatten(),
            ignore_index=-1,
            reduction=loss_reduction,
        )

    def new_cache(self, batch_size: int, capacity: int) -> KVCache:
        """An empty cache for `batch_size` rows of up to `capacity` tokens."""
        return KVCache(
            num_layers=self.config.n_layer,
            batch_size=batch_size,
            capacity=capacity,
            num_kv_heads=self.config.num_kv_heads,
            head_dim=self.config.head_dim,
            device=self.device,
            dtype=self.compute_dtype,
        )

    def cast_matrices(self, dtype: torch.dtype) -> GPT:
        """Store every matrix in `dtype`, once; the embedding is only looked up and stays fp32."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.to(dtype)
        return self

    def count_parameters(self) -> dict[str, int]:
        """Parameters by group, and their total."""
        groups = {
            "wte": self.transformer.wte.weight.numel(),
            "lm_head": self.lm_head.weight.numel(),
            "transformer_matrices": sum(p.numel() for p in self.transformer.h.parameters()),
        }
        return groups | {"total": sum(groups.values())}

    def estimate_flops(self) -> float:
        """Training FLOPs per token (arXiv:2204.02311, appendix B).

        6 per matrix parameter, and 12 L C T for attention.
        """
        counts, config = self.count_parameters(), self.config
        attention = 12 * config.n_layer * config.n_embd * config.sequence_len
        return float(6 * (counts["total"] - counts["wte"]) + attention)
