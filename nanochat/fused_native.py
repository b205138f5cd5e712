"""The parts of `fused` and more, through the training kernels (bf16, CPUs that multiply it).

Each function computes what its plain formula does, which is its oracle in the tests; callers ask
`takes` first. Legend as in `fused`; N = outputs, K = inputs of a linear layer, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nanochat.kernels import training

_PLAIN = (Tensor, nn.Parameter)


def trains_in(dtype: torch.dtype) -> bool:
    """Whether training in this dtype on this machine's CPU goes through the kernels."""
    return dtype == torch.bfloat16 and training.load() is not None


def takes(*tensors: Tensor) -> bool:
    """Whether a training step on these goes through the kernels: every one plain, bf16, here."""
    return (
        tensors[0].requires_grad
        and not torch.compiler.is_compiling()
        and all(type(x) in _PLAIN for x in tensors)
        and training.fits(*tensors)
        and training.load() is not None
    )


def takes_layers(x: Tensor, layers: Sequence[nn.Module]) -> bool:
    """Whether these layers on x go through the kernels: none of another kind, none with hooks."""
    for layer in layers:
        if type(layer) is not nn.Linear or layer._forward_hooks or layer._forward_pre_hooks:
            return False
        if layer.out_features % training.WIDTH:
            return False
    weights: list[Tensor] = [layer.weight for layer in layers]  # type: ignore[misc]
    return takes(x, *weights)


def linears(x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """X (..., K) times the transpose of each weight (N, K)."""
    outputs: tuple[Tensor, ...] = _Linears.apply(x, *weights)  # type: ignore[no-untyped-call]
    return outputs


def relu_squared_mlp(x: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """max(x w_in^T, 0)^2 w_out^T for x (..., C), w_in (F, C) and w_out (C, F)."""
    out: Tensor = _ReluSquaredMLP.apply(x, w_in, w_out)  # type: ignore[no-untyped-call]
    return out


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """`fused.rms_norm`."""
    out: Tensor = _RmsNorm.apply(x, eps)  # type: ignore[no-untyped-call]
    return out


def rotate_and_norm(x: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """`fused.rotate_and_norm`, where D is a multiple of 64: x (B, T, H, D)."""
    out: Tensor = _RotateAndNorm.apply(x, cos, sin, eps)  # type: ignore[no-untyped-call]
    return out


def causal_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """`attention.causal_attention` for as many heads of keys as of queries: (B, T, H, D)."""
    out: Tensor = _CausalAttention.apply(q, k, v, window)  # type: ignore[no-untyped-call]
    return out


def head_loss_sum(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    factors: Tensor | None,
    cap: float,
    vocab_size: int,
) -> Tensor:
    """`objectives.next_token_loss_sum` of hidden (M, C), weight (V, C), targets (M,): 0-d fp32."""
    out: Tensor = _HeadLoss.apply(hidden, weight, targets, factors, cap, vocab_size)  # type: ignore[no-untyped-call]
    return out


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        x = x.contiguous()
        ctx.save_for_backward(x, *weights)
        return tuple(training.linear(x, weight) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        whole = [gradient.contiguous() for gradient in gradients]
        dx = training.linear_input_gradient(whole, weights)
        return dx, *(training.linear_weight_gradient(gradient, x) for gradient in whole)


class _ReluSquaredMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
        x = x.contiguous()
        h = training.linear(x, w_in, relu2=True)
        ctx.save_for_backward(x, h, w_in, w_out)
        return training.linear(h, w_out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, h, w_in, w_out = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        dw_out = training.linear_weight_gradient(gradient, h)
        inner = training.linear_input_gradient([gradient], [w_out], h)
        dw_in = training.linear_weight_gradient(inner, x)
        return training.linear_input_gradient([inner], [w_in]), dw_in, dw_out


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        normed, inverse = training.rms_norm(x.contiguous(), eps)
        ctx.save_for_backward(normed, inverse)
        return normed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return training.rms_norm_gradient(gradients[0].contiguous(), *ctx.saved_tensors), None


class _RotateAndNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
        cos, sin = cos.contiguous(), sin.contiguous()
        normed, inverse = training.rotate_and_norm(x.contiguous(), cos, sin, eps)
        ctx.save_for_backward(normed, inverse, cos, sin)
        return normed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradients[0].contiguous()
        return training.rotate_and_norm_gradient(gradient, *ctx.saved_tensors), None, None, None


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out, lse = training.attention(q, k, v, window)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.window = window
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        return *training.attention_gradient(q, k, v, out, lse, gradient, ctx.window), None


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        factors: Tensor | None,
        cap: float,
        vocab_size: int,
    ) -> Tensor:
        loss, *behind = training.head_loss(
            hidden.contiguous(),
            weight,
            targets.contiguous(),
            None if factors is None else factors.contiguous(),
            cap=cap,
            vocab_size=vocab_size,
        )
        ctx.save_for_backward(*behind)
        return torch.tensor(loss, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients made in the forward pass."""
        hidden, weight = ctx.saved_tensors
        scale = float(gradients[0])
        if scale != 1.0:
            hidden, weight = hidden * scale, weight * scale
        return hidden, weight, None, None, None, None
