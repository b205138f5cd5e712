"""Parts of the model with hand-made backward passes, for training on a CPU without a compiler.

What limits uncompiled training on a CPU, besides the matmuls, is how often activations cross the
memory bus. Each function here reads and writes as little as it can, and keeps only what its
backward pass needs. The plain formulas in `gpt` and `attention` say what they compute and are
their oracle in the tests; a compiler, where one is used, does the same to the plain formulas.

Legend: B = sequences, T = positions, H = heads, D = head size, N = B * H.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# 128 queries keep a block of scores inside the L2 cache.
QUERY_BLOCK = 128


def pays_for(x: Tensor) -> bool:
    """Whether these functions are the faster path for a computation on x."""
    return x.device.type == "cpu" and x.requires_grad and not torch.compiler.is_compiling()


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """`gpt.rms_norm`: x (..., C) scaled to unit root mean square over the last dimension."""
    out: Tensor = _RmsNorm.apply(x, eps)  # type: ignore[no-untyped-call]
    return out


def rotate_and_norm(x: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """`gpt.rms_norm` of `gpt.rotate`: x (B, T, H, D), cos and sin (T, D / 2)."""
    tables = cos.unsqueeze(-2).to(x.dtype), sin.unsqueeze(-2).to(x.dtype)
    out: Tensor = _RotateAndNorm.apply(x, *tables, eps)  # type: ignore[no-untyped-call]
    return out


def relu_squared(x: Tensor) -> Tensor:
    """max(x, 0)^2 of any shape."""
    out: Tensor = _ReluSquared.apply(x)  # type: ignore[no-untyped-call]
    return out


def scaled_sum(x: Tensor, first: Tensor, keep: Tensor, back: Tensor) -> Tensor:
    """A mix `keep * x + back * first` of x and first (B, T, C) by two learned scalars."""
    out: Tensor = _ScaledSum.apply(x, first, keep, back)  # type: ignore[no-untyped-call]
    return out


def causal_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
    """Causal softmax attention; q, k, v and the result are (B, H, T, D) with equal head counts.

    window: positions before its own that each attends to, None = all.
    """
    flat = [part.flatten(0, 1) for part in (q, k, v)]
    out: Tensor = _CausalAttention.apply(*flat, window)  # type: ignore[no-untyped-call]
    return out.view(q.shape)


def first_key(start: int, window: int | None) -> int:
    """The earliest key that a block of queries from `start` on can see."""
    return 0 if window is None else max(0, start - window)


def too_old(start: int, stop: int, window: int, device: torch.device) -> Tensor:
    """Which of the block's first keys each of its queries can no longer see: (queries, keys)."""
    low = first_key(start, window)
    keys = torch.arange(low, max(low, stop - 1 - window), device=device)
    return keys < torch.arange(start, stop, device=device)[:, None] - window


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    inverse: Tensor = norms.square_().div_(x.size(-1)).add_(eps).rsqrt_()
    return inverse.to(x.dtype)


def _norm_gradient(gradient: Tensor, normed: Tensor, inverse: Tensor) -> Tensor:
    """(g - y mean(g y)) / rms: the gradient behind y = x / rms."""
    along = torch.linalg.vecdot(gradient, normed).unsqueeze(-1).div_(-normed.size(-1))
    return torch.addcmul(gradient, normed, along).mul_(inverse)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        inverse = _inverse_rms(x, eps)
        normed = x * inverse
        ctx.save_for_backward(normed, inverse)
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _norm_gradient(gradients[0], *ctx.saved_tensors), None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    """Rotate pairs (i, i + D / 2) of x (B, T, H, D) by -sign times the angle."""
    turned = torch.empty_like(x)
    first, second = x.chunk(2, dim=-1)
    new_first, new_second = turned.chunk(2, dim=-1)
    torch.mul(first, cos, out=new_first)
    new_first.addcmul_(second, sin, value=sign)
    torch.mul(second, cos, out=new_second)
    new_second.addcmul_(first, sin, value=-sign)
    return turned


class _RotateAndNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
        # A rotation keeps the norm, so x's own serves.
        inverse = _inverse_rms(x, eps)
        normed = _turn(x, cos, sin, 1.0).mul_(inverse)
        ctx.save_for_backward(normed, inverse, cos, sin)
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        normed, inverse, cos, sin = ctx.saved_tensors
        gradient = _norm_gradient(gradients[0], normed, inverse)
        return _turn(gradient, cos, sin, -1.0), None, None, None


class _ReluSquared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        positive = x.relu()
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        return gradients[0].mul(positive).mul_(2.0)


class _ScaledSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, first: Tensor, keep: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(x, first, keep, back)
        return torch.add(x * keep, first, alpha=float(back))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, first, keep, back = ctx.saved_tensors
        (gradient,) = gradients
        along = [
            torch.linalg.vecdot(gradient, part).sum(dtype=torch.float32) for part in (x, first)
        ]
        return gradient * keep, gradient * back, along[0], along[1]


class _CausalAttention(torch.autograd.Function):
    """Matmuls over blocks of queries, each with the keys up to its own end: q, k, v (N, T, D)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        q = q * q.size(-1) ** -0.5
        out, weights = torch.empty_like(q), []
        future = torch.ones(QUERY_BLOCK, QUERY_BLOCK, dtype=torch.bool, device=q.device).triu(1)
        for start in range(0, q.size(1), QUERY_BLOCK):
            stop = min(start + QUERY_BLOCK, q.size(1))
            low = first_key(start, window)
            scores = torch.bmm(q[:, start:stop], k[:, low:stop].transpose(1, 2))
            diagonal = future[: stop - start, : stop - start]
            scores[..., start - low : stop - low].masked_fill_(diagonal, float("-inf"))
            if window is not None:
                old = too_old(start, stop, window, q.device)
                scores[..., : old.size(1)].masked_fill_(old, float("-inf"))
            weights.append(torch.softmax(scores, dim=-1))  # sums in fp32 whatever the dtype
            out[:, start:stop] = torch.bmm(weights[-1], v[:, low:stop])
        ctx.save_for_backward(q, k, v, *weights)
        ctx.window = window
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *weights = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for index, block in enumerate(weights):
            start, stop = index * QUERY_BLOCK, min((index + 1) * QUERY_BLOCK, q.size(1))
            low = first_key(start, ctx.window)
            gradient = gradients[0][:, start:stop]
            dv[:, low:stop] += torch.bmm(block.transpose(1, 2), gradient)
            dweights = torch.bmm(gradient, v[:, low:stop].transpose(1, 2))
            dscores = torch._softmax_backward_data(dweights, block, -1, block.dtype)
            dq[:, start:stop] = torch.bmm(dscores, k[:, low:stop])
            dk[:, low:stop] += torch.bmm(dscores.transpose(1, 2), q[:, start:stop])
        return dq.mul_(q.size(-1) ** -0.5), dk, dv, None
