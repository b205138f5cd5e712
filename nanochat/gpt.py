"""The GPT model. Pure: no ranks, no environment, no files, no printing.

Legend: B = sequences, T = positions, C = model width (n_embd), V = vocabulary, L = layers. `blocks`
holds the blocks, `attention` what they attend with, `gpt_config` the sizes and options.

Textbook names that differ here: there is no position table `wpe` (rotary embeddings rotate queries
and keys instead), `ln_1`, `ln_2` and `ln_f` are the weightless function `rms_norm`, and the fused
`c_attn` is three matrices `c_q`, `c_k`, `c_v`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat.attention import KVCache, Past
from nanochat.blocks import (
    MLP,
    Block,
    CachedStep,
    CausalSelfAttention,
    GatedMLP,
    Wanted,
    rms_norm,
    rotary_tables,
    scaled_sum,
)
from nanochat.gpt_config import SMEAR_CHANNELS, GPTConfig

LOGIT_SOFTCAP = GPTConfig.logit_softcap
ROPE_CONTEXTS = 10  # rotary tables reach this many training contexts, so a chat may outgrow one

__all__ = ["GPT", "MLP", "Block", "CausalSelfAttention", "GPTConfig", "TransformerBlock"]

TransformerBlock = Block


def softcap(logits: Tensor, cap: float = LOGIT_SOFTCAP) -> Tensor:
    """Squash logits of any shape into (-cap, cap), in fp32; a cap of 0 leaves them alone."""
    return cap * torch.tanh(logits.float() / cap) if cap else logits.float()


class Transformer(nn.Module):
    """Token embedding `wte` and the blocks `h`, under the names of the GPT-2 family."""

    def __init__(self, config: GPTConfig) -> None:
        """Embedding (V, C) and L blocks."""
        super().__init__()
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.h = nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)])


def _swap_halves(x: Tensor) -> Tensor:
    """The second half of the features, then the first."""
    return x.roll(x.size(-1) // 2, dims=-1)


def _first_query_of_each_key(attn: CausalSelfAttention) -> Tensor:
    """Rows of c_q for the first query head that reads each key head: c_k's shape."""
    heads = attn.c_q.weight.view(-1, attn.head_dim, attn.c_q.in_features)
    num_kv_heads = attn.c_k.out_features // attn.head_dim
    first: Tensor = heads[:: heads.size(0) // num_kv_heads].flatten(0, 1)
    return first


class GPT(nn.Module):
    """Embedding, norm, blocks, norm, untied head, softcap.

    Matrices may be stored in a lower precision than the embeddings: the residual stream runs in
    the dtype of `lm_head.weight`, while norms, softmax, rotations and losses compute in fp32.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: GPTConfig) -> None:
        """Allocate parameters; `init_weights` gives them values."""
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        rows = config.padded_vocab_size
        self.lm_head = nn.Linear(config.n_embd, rows, bias=False)
        if config.value_embeddings:
            kv_width = config.num_kv_heads * config.head_dim
            layers = filter(config.has_value_embedding, range(config.n_layer))
            tables = {str(layer): nn.Embedding(rows, kv_width) for layer in layers}
            self.value_embeds = nn.ModuleDict(tables)
        if config.residual_scalars:
            self.resid_lambdas = nn.Parameter(torch.empty(config.n_layer))
            self.x0_lambdas = nn.Parameter(torch.empty(config.n_layer))
        if config.smear:
            self.smear_gate = nn.Linear(SMEAR_CHANNELS, 1, bias=False)
            self.smear_lambda = nn.Parameter(torch.empty(1))
        if config.backout:
            self.backout_lambda = nn.Parameter(torch.empty(1))
        length = config.sequence_len * ROPE_CONTEXTS
        cos, sin = rotary_tables(length, config.head_dim, None, base=config.rope_base)
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

        Every output projection starts at zero, so that all blocks start silent. With a token shift
        the keys start as the queries of the swapped input, so that every head begins by looking for
        what followed this token earlier in the text. Classic: the head
        is zero as well; matrices are normal with std min(1, sqrt(fan_out / fan_in)) / sqrt(fan_in)
        (arXiv:2310.17813), the embedding normal with std 1. Modern: uniform matrices of std
        1 / sqrt(C), those into the MLP at 0.4 of it, embedding std 0.8, head std 0.001.
        """
        is_modern = self.config.init == "modern"
        self.transformer.wte.weight.normal_(0.0, 0.8 if is_modern else 1.0, generator=generator)
        for block in self.transformer.h:
            assert isinstance(block, Block)
            attn, mlp = block.attn, block.mlp
            gates = [mlp.c_gate] if isinstance(mlp, GatedMLP) else []
            for linear in (attn.c_q, attn.c_k, attn.c_v, mlp.c_fc, *gates):
                is_inner = linear.out_features == self.config.mlp_width
                self._draw(linear.weight, generator, scale=0.4 if is_inner else 1.0)
            if self.config.token_shift:
                attn.c_k.weight.copy_(_swap_halves(_first_query_of_each_key(attn)))
            attn.c_proj.weight.zero_()
            mlp.c_proj.weight.zero_()
        if is_modern:
            self.lm_head.weight.normal_(0.0, 0.001, generator=generator)
        else:
            self.lm_head.weight.zero_()
        self._init_options(generator)

    def _draw(self, weight: Tensor, generator: torch.Generator | None, scale: float) -> None:
        """Fill a matrix (fan_out, fan_in); only the modern rule has a scale."""
        if self.config.init == "modern":
            bound = scale * math.sqrt(3.0 / self.config.n_embd)
            weight.uniform_(-bound, bound, generator=generator)
            return
        fan_out, fan_in = weight.shape
        std = min(1.0, math.sqrt(fan_out / fan_in)) / math.sqrt(fan_in)
        weight.normal_(0.0, std, generator=generator)

    def _init_options(self, generator: torch.Generator | None) -> None:
        """Value embeddings are drawn like the matrices that make values; gates are nearly even."""
        config, last = self.config, max(self.config.n_layer - 1, 1)
        if config.value_embeddings:
            for layer, table in self.value_embeds.items():
                assert isinstance(table, nn.Embedding)
                bound = math.sqrt(3.0 / config.n_embd)
                table.weight.uniform_(-bound, bound, generator=generator)
                block: Any = self.transformer.h[int(layer)]
                block.attn.ve_gate.weight.uniform_(0.0, 0.02, generator=generator)
        if config.residual_scalars:
            depth = torch.arange(config.n_layer, device=self.device) / last
            self.resid_lambdas.copy_(1.15 - 0.10 * depth)
            self.x0_lambdas.copy_(0.20 - 0.15 * depth)
        if config.smear:
            self.smear_gate.weight.uniform_(0.0, 0.02, generator=generator)
            self.smear_lambda.zero_()
        if config.backout:
            self.backout_lambda.fill_(0.2)

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
        first = x = self._embed(idx, cached).to(self.compute_dtype)
        wanted = None if columns is None else self._wanted(columns, cached)
        middle, last = None, self.config.n_layer - 1
        for layer, block in enumerate(self.transformer.h):
            if self.config.residual_scalars:
                x = scaled_sum(x, first, self.resid_lambdas[layer], self.x0_lambdas[layer])
            asked = wanted if layer == last else None
            x = block(x, rotary, cached, asked, self._token_values(layer, idx))
            if self.config.backout and layer == self.config.n_layer // 2:
                middle = x if wanted is None or layer == last else wanted.of(x)
        if middle is not None:  # what served the first half only is kept out of the prediction
            x = x - self.backout_lambda.to(x.dtype) * middle
        if kv_cache is not None:
            kv_cache.advance(num_new)
        return rms_norm(x)

    def logits(self, states: Tensor) -> Tensor:
        """Logits of final states (..., C): (..., V) fp32, squashed and without the padding."""
        return softcap(
            self.lm_head(states)[..., : self.config.vocab_size], self.config.logit_softcap
        )

    def _token_values(self, layer: int, idx: Tensor) -> Tensor | None:
        """The tokens' value embeddings (B, T, K * D) for a layer that has them."""
        if not self.config.has_value_embedding(layer):
            return None
        table = self.value_embeds[str(layer)]
        values: Tensor = table(idx).to(self.compute_dtype)
        return values

    def _wanted(self, columns: Tensor, cached: CachedStep | None) -> Wanted:
        positions = columns if cached is None else cached.positions.gather(1, columns)
        return Wanted(columns, positions, (self.cos[positions], self.sin[positions]))

    def _embed(self, idx: Tensor, cached: CachedStep | None) -> Tensor:
        """Normed embeddings (B, T, C) in fp32, each with its share of its predecessor's.

        The token shift (after RWKV, arXiv:2305.13048, section 3) hands every position the token
        before it, with the halves of its features swapped, so that "this is the token" and "this
        was the token before" stay two things. Looking up what followed a word is then one attention
        step instead of two layers that must be learned together, and at the start of training the
        keys make that step (`init_weights`). The smear is a learned share instead, from 0 on.
        """
        x = rms_norm(self.transformer.wte(idx))
        shift, smear = self.config.token_shift, self.config.smear
        if cached is not None:
            before_ids = cached.cache.append_tokens(idx, cached.positions)
        if not (shift or smear):
            return x
        if cached is not None:
            is_later = (cached.positions > 0).unsqueeze(-1)
            before = is_later * rms_norm(self.transformer.wte(before_ids))
        else:
            before = F.pad(x[:, :-1], (0, 0, 1, 0))
        if not smear:
            return x + shift * _swap_halves(before)
        gate = torch.sigmoid(self.smear_gate(x[..., :SMEAR_CHANNELS].to(self.compute_dtype)))
        return x + self.smear_lambda * gate.float() * before

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
        logits = self.logits(self.hidden(idx, kv_cache))
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
        """Store every matrix in `dtype`, once; embeddings are only looked up and stay fp32."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.to(dtype)
        return self

    def count_parameters(self) -> dict[str, int]:
        """Parameters by group, where there are any, and their total."""
        counts = dict.fromkeys(
            ("wte", "value_embeds", "lm_head", "transformer_matrices", "scalars"), 0
        )
        for name, parameter in self.named_parameters():
            group = "scalars"
            if name.startswith("transformer."):
                group = "wte" if name.startswith("transformer.wte.") else "transformer_matrices"
            elif name.split(".")[0] in counts:
                group = name.split(".")[0]
            counts[group] += parameter.numel()
        groups = {group: count for group, count in counts.items() if count}
        return groups | {"total": sum(groups.values())}

    def estimate_flops(self) -> float:
        """Training FLOPs per token (arXiv:2204.02311, appendix B).

        6 per matrix parameter, and for attention 12 C a layer and position attended to.
        """
        config = self.config
        matrices = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        length = config.sequence_len
        attended = sum(length if w is None else min(w, length) for w in config.windows)
        return float(6 * matrices + 12 * config.n_embd * attended)
