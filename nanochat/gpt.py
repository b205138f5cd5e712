"""The GPT model. Pure: no ranks, no environment, no files, no printing.

Legend: B = sequences, T = positions, C = model width (n_embd), V = vocabulary, L = layers. `blocks`
holds the blocks, `attention` what they attend with, `gpt_config` the sizes and options.

Textbook names that differ here: there is no position table `wpe` (rotary embeddings rotate queries
and keys instead), `ln_1`, `ln_2` and `ln_f` are the weightless function `rms_norm`, and the fused
`c_attn` is three matrices `c_q`, `c_k`, `c_v`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat.attention import KVCache, Past
from nanochat.blocks import (
    MLP,
    Block,
    CachedStep,
    CausalSelfAttention,
    Wanted,
    rms_norm,
    rotary_tables,
)
from nanochat.gpt_config import GPTConfig

LOGIT_SOFTCAP = (
    15.0  # arXiv:2408.00118, section 2: bounds logits smoothly; 15 as in the 2025 nanochat
)
ROPE_CONTEXTS = 10  # rotary tables reach this many training contexts, so a chat may outgrow one

__all__ = ["GPT", "MLP", "Block", "CausalSelfAttention", "GPTConfig", "TransformerBlock"]

TransformerBlock = Block


def softcap(logits: Tensor) -> Tensor:
    """Squash logits of any shape into (-15, 15), in fp32."""
    return LOGIT_SOFTCAP * torch.tanh(logits.float() / LOGIT_SOFTCAP)


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
