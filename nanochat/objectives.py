"""Losses as sums over target tokens, without ever holding the logits of a whole batch.

Legend: N = target positions (B * T), C = model width, V = vocabulary. A target of -1 is ignored.
Sums, not means: the trainer divides once by the number of targets of the whole step, so that
micro-batches, ranks and padding never show in the gradient.

Supervised learning and reinforcement learning differ in one thing: the weight of each target. It
is 1 for a text to imitate, and the advantage of the answer for a text the model wrote itself.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanochat import fused_native
from nanochat.gpt import GPT, LOGIT_SOFTCAP
from nanochat.runtime import first_line, halve_pass

IGNORED = -1
CHUNK_ROWS = 512  # rows of logits alive at once: 512 x 8,192 in bf16 is 8 MiB, which stays in cache


def next_token_loss_sum(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    *,
    weights: Tensor | None = None,
    cap: float = LOGIT_SOFTCAP,
    vocab_size: int | None = None,
    compiled: bool = False,
    int8: bool = False,
) -> Tensor:
    """Sum of the cross-entropy of softcapped logits in nats, a differentiable fp32 scalar.

    hidden: (B, T, C) or (N, C) final states; head_weight: (V, C); targets: (B, T) or (N,) int64,
    -1 = ignored; weights: what each target's loss is multiplied by, of the shape of targets,
    None = 1; cap: the model's softcap, 0 = none; vocab_size: rows of the head behind it are
    padding, None = there are none; int8: multiply in 8-bit integers, ignored where PyTorch
    multiplies. The gradient is made during the forward pass, chunk by chunk,
    from the logits at hand. Where targets and weights are given on the host, rows whose target is
    ignored never meet the head, wherever that is.

    With the advantages of sampled tokens as weights the gradient is that of the policy gradient
    (REINFORCE, doi:10.1007/BF00992696): minus the mean of advantage x gradient of log probability.
    """
    rows, flat = hidden.flatten(0, -2), targets.flatten()
    factors = None if weights is None else weights.flatten().float()
    # Asked on the host alone: for an answer of the device the host would have to wait.
    if flat.device.type == "cpu" and bool((flat == IGNORED).any()):
        kept = (flat != IGNORED).nonzero().squeeze(1)
        flat = flat.index_select(0, kept)
        factors = None if factors is None else factors.index_select(0, kept.to(factors.device))
        rows = rows.index_select(0, kept.to(rows.device, non_blocking=True))
    flat = flat.to(rows.device, non_blocking=True)
    factors = None if factors is None else factors.to(rows.device, non_blocking=True)
    is_native = fused_native.takes_cap(cap) and fused_native.takes(rows, head_weight)
    if is_native and flat.numel():
        used = head_weight.size(0) if vocab_size is None else vocab_size
        return fused_native.head_loss_sum(rows, head_weight, flat, factors, cap, used, int8)
    if vocab_size == head_weight.size(0):
        vocab_size = None
    function = _compiled_chunk() if compiled else _chunk_loss_and_gradient
    chunk = partial(function, cap=cap, vocab_size=vocab_size)
    apply: Callable[..., Tensor] = _HeadLoss.apply
    return apply(rows, head_weight, flat, factors, chunk)


def token_losses(model: GPT, idx: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each target in nats, 0 where ignored: (B, T) fp32.

    For evaluation: holds one chunk of logits at a time.
    """
    rows, flat = model.hidden(idx).flatten(0, 1), targets.flatten()
    losses = torch.zeros(flat.shape, dtype=torch.float32, device=flat.device)
    for start in range(0, flat.numel(), CHUNK_ROWS):
        part = slice(start, start + CHUNK_ROWS)
        logits = model.logits(rows[part])
        losses[part] = torch.nn.functional.cross_entropy(
            logits, flat[part], ignore_index=IGNORED, reduction="none"
        )
    return losses.view_as(targets)


def token_losses_in_passes(
    model: GPT, idx: Tensor, targets: Tensor, *, rows: int, rank: int
) -> tuple[Tensor, int]:
    """`token_losses` of at most `rows` rows a pass, fewer where the device has no room for them.

    Returns the losses and the rows that a pass may have from now on.
    """
    while True:
        size = min(rows, len(idx))
        parts = [slice(start, start + size) for start in range(0, len(idx), size)]
        try:
            return torch.cat([token_losses(model, idx[p], targets[p]) for p in parts]), rows
        except torch.OutOfMemoryError as error:
            reason = first_line(error)
        rows = halve_pass(size, reason, rank=rank)


def _chunk_loss_and_gradient(
    raw: Tensor, targets: Tensor, factors: Tensor | None, *, cap: float, vocab_size: int | None
) -> tuple[Tensor, Tensor]:
    """Weighted loss sum of one chunk and its gradient with respect to the raw logits.

    raw: (n, V) logits before the softcap; targets: (n,), -1 adds nothing; factors: (n,) fp32,
    None = 1. Returns fp32 scalar and (n, V) in raw's dtype.
    """
    # In place and without subtracting the maximum of logits that are capped low enough. Every line
    # is one pass over memory, which is what this costs.
    largest: Tensor | float = 0.0
    if cap:
        squashed = raw.float().div_(cap).tanh_()
        weights = squashed * cap
        if cap > fused_native.LARGEST_CAP:
            largest = weights.amax(dim=-1, keepdim=True)
            weights -= largest
        weights.exp_()
    else:
        squashed = raw.float() - raw.amax(dim=-1, keepdim=True).float()
        weights = squashed.exp()
    if vocab_size is not None:
        weights[:, vocab_size:] = 0.0
    normalizer = weights.sum(dim=-1, keepdim=True)
    index = targets.clamp_min(0).unsqueeze(-1)
    counted = (targets != IGNORED).unsqueeze(-1).float()
    if factors is not None:
        counted = counted * factors.unsqueeze(-1)
    losses = normalizer.log() + largest - (cap or 1.0) * squashed.gather(-1, index)
    probabilities = weights.mul_(counted / normalizer)
    probabilities.scatter_add_(-1, index, -counted)
    if cap:
        probabilities.mul_(squashed.square_().neg_().add_(1.0))
    return (losses * counted).sum(), probabilities.to(raw.dtype)


_Chunk = Callable[[Tensor, Tensor, "Tensor | None"], tuple[Tensor, Tensor]]
_COMPILED: list[Callable[..., tuple[Tensor, Tensor]]] = []


def _compiled_chunk() -> Callable[..., tuple[Tensor, Tensor]]:
    """The chunk function compiled for one fixed shape, made at first use."""
    if not _COMPILED:
        _COMPILED.append(torch.compile(_chunk_loss_and_gradient, dynamic=False))
    return _COMPILED[0]


class _HeadLoss(torch.autograd.Function):
    """Head, softcap and cross-entropy with the backward pass folded into the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        factors: Tensor | None,
        chunk_function: _Chunk,
    ) -> Tensor:
        """hidden: (N, C); weight: (V, C); targets, factors: (N,). Returns the loss sum."""
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hidden_gradient = torch.empty_like(hidden)
        weight_gradient = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for start in range(0, hidden.size(0), CHUNK_ROWS):
            part = slice(start, start + CHUNK_ROWS)
            rows, chunk = hidden[part], targets[part]
            factor = None if factors is None else factors[part]
            count = rows.size(0)
            if count < CHUNK_ROWS:  # one shape only: the compiled chunk function is made once
                missing = CHUNK_ROWS - count
                rows = torch.nn.functional.pad(rows, (0, 0, 0, missing))
                chunk = torch.nn.functional.pad(chunk, (0, missing), value=IGNORED)
                if factor is not None:
                    factor = torch.nn.functional.pad(factor, (0, missing))
            loss, logits_gradient = chunk_function(rows @ weight.t(), chunk, factor)
            total += loss
            hidden_gradient[start : start + CHUNK_ROWS] = (logits_gradient @ weight)[:count]
            if weight.dtype == torch.float32:
                weight_gradient.addmm_(logits_gradient.t(), rows)
            else:
                weight_gradient += logits_gradient.t() @ rows
        ctx.save_for_backward(hidden_gradient, weight_gradient.to(weight.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients made in the forward pass."""
        hidden_gradient, weight_gradient = ctx.saved_tensors
        (scale,) = gradients
        return hidden_gradient * scale, weight_gradient * scale, None, None, None
