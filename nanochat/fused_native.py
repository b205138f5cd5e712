"""The parts of `fused` and more, through the training kernels (bf16, CPUs that multiply it).

Each function computes what its plain formula does, which is its oracle in the tests; callers ask
`takes` first. Legend as in `fused`; N = outputs, K = inputs of a linear layer, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nanochat.gpt_config import GPTConfig
from nanochat.kernels import training

LARGEST_CAP = 60.0  # exp of a logit at this softcap, times any vocabulary, fits fp32
_HEAD_STEP = 64  # a rotation works on two halves of a head
_PLAIN = (Tensor, nn.Parameter)


class Int8Linear(nn.Linear):
    """A bias-free Linear whose products the kernels make in 8-bit integers; see `int8`.

    It is a mark, read by `in_int8`: called by itself, as in an evaluation, it is a plain Linear.
    """


def trains(config: GPTConfig, dtype: torch.dtype) -> bool:
    """Whether training this model in this dtype on this machine's CPU goes through the kernels.

    Of a few models they do most of the work and not all of it: see `left_to_pytorch`.
    """
    is_possible = dtype == torch.bfloat16 and training.load() is not None
    return is_possible and not {"matrices", "attention"} & set(left_to_pytorch(config))


def left_to_pytorch(config: GPTConfig) -> list[str]:
    """Parts of this model whose shapes or options the kernels do not take."""
    widths = (config.n_embd, config.num_kv_heads * config.head_dim, config.mlp_width)
    is_taken = {
        "matrices": all(width % training.WIDTH == 0 for width in widths),
        "attention": config.head_dim % training.WIDTH == 0,
        "rotations": takes_head_size(config.head_dim),
        "head": config.n_embd % training.WIDTH == 0 and takes_cap(config.logit_softcap),
    }
    return [part for part, taken in is_taken.items() if not taken]


def takes_head_size(size: int) -> bool:
    """Whether heads of this size can be rotated by the kernels."""
    return size % _HEAD_STEP == 0


def takes_cap(cap: float) -> bool:
    """Whether the head's kernel is exact with this softcap: it takes no maximum off the logits."""
    return 0 < cap <= LARGEST_CAP


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
    """Whether these layers on x go through the kernels: plain matrices, none with hooks."""
    for layer in layers:
        if not (type(layer) is nn.Linear or type(layer) is Int8Linear):
            return False
        if _has_bias_or_hooks(layer) or layer.out_features % training.WIDTH:
            return False
    weights: list[Tensor] = [layer.weight for layer in layers]  # type: ignore[misc]
    return takes(x, *weights)


def has_bias(layer: nn.Module) -> bool:
    """Whether the layer adds one; `layer.bias` is a tensor to type checkers, there or not."""
    return layer._parameters.get("bias") is not None


def _has_bias_or_hooks(layer: nn.Module) -> bool:
    if has_bias(layer):
        return True
    forward = layer._forward_hooks or layer._forward_pre_hooks
    return bool(forward or layer._backward_hooks or layer._backward_pre_hooks)


def linears(x: Tensor, layers: Sequence[nn.Linear]) -> tuple[Tensor, ...]:
    """X (..., K) times the transpose of each layer's weight (N, K)."""
    weights = [layer.weight for layer in layers]
    outputs: tuple[Tensor, ...] = _Linears.apply(x, in_int8(*layers), *weights)  # type: ignore[no-untyped-call]
    return outputs


def relu_squared_mlp(x: Tensor, first: nn.Linear, second: nn.Linear) -> Tensor:
    """max(x w^T, 0)^2 v^T for x (..., C), w (F, C) and v (C, F) of these layers."""
    weights = first.weight, second.weight
    out: Tensor = _ReluSquaredMLP.apply(x, in_int8(first, second), *weights)  # type: ignore[no-untyped-call]
    return out


def in_int8(*layers: nn.Module) -> bool:
    """Whether all of these are to be multiplied in 8-bit integers."""
    return all(isinstance(layer, Int8Linear) for layer in layers)


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """`fused.rms_norm`."""
    out: Tensor = _RmsNorm.apply(x, eps)  # type: ignore[no-untyped-call]
    return out


def rotate_and_norm(x: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """`fused.rotate_and_norm`, where D is a multiple of 64: x (B, T, H, D)."""
    # The tables of a model that was cast as a whole are bf16; the kernel reads fp32.
    tables = cos.float(), sin.float()
    out: Tensor = _RotateAndNorm.apply(x, *tables, eps)  # type: ignore[no-untyped-call]
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
    int8: bool,
) -> Tensor:
    """`objectives.next_token_loss_sum` of hidden (M, C), weight (V, C), targets (M,): 0-d fp32."""
    out: Tensor = _HeadLoss.apply(hidden, weight, targets, factors, cap, vocab_size, int8)  # type: ignore[no-untyped-call]
    return out


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, int8: bool, *weights: Tensor) -> tuple[Tensor, ...]:
        x, ctx.int8 = x.contiguous(), int8
        ctx.save_for_backward(x, *weights)
        return tuple(training.linear(x, weight, int8=int8) for weight in weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        whole = [gradient.contiguous() for gradient in gradients]
        dx = training.linear_input_gradient(whole, weights, int8=ctx.int8)
        wanted = ctx.needs_input_grad[2:]  # a frozen matrix costs no product
        return (
            dx,
            None,
            *(
                training.linear_weight_gradient(gradient, x, int8=ctx.int8) if is_wanted else None
                for gradient, is_wanted in zip(whole, wanted, strict=True)
            ),
        )


class _ReluSquaredMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, int8: bool, w_in: Tensor, w_out: Tensor) -> Tensor:
        x, ctx.int8 = x.contiguous(), int8
        h = training.linear(x, w_in, relu2=True, int8=int8)
        ctx.save_for_backward(x, h, w_in, w_out)
        return training.linear(h, w_out, int8=int8)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, h, w_in, w_out = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        *_, wants_in, wants_out = ctx.needs_input_grad
        dw_out = training.linear_weight_gradient(gradient, h, int8=ctx.int8) if wants_out else None
        inner = training.linear_input_gradient([gradient], [w_out], h, int8=ctx.int8)
        dw_in = training.linear_weight_gradient(inner, x, int8=ctx.int8) if wants_in else None
        dx = training.linear_input_gradient([inner], [w_in], int8=ctx.int8)
        return dx, None, dw_in, dw_out


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        normed, inverse = training.rms_norm(x.contiguous(), eps)
        ctx.save_for_backward(normed, inverse)
        return normed

    @staticmethod
    @once_differentiable
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
    @once_differentiable
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
    @once_differentiable
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
        int8: bool,
    ) -> Tensor:
        loss, *behind = training.head_loss(
            hidden.contiguous(),
            weight,
            targets.contiguous(),
            None if factors is None else factors.contiguous(),
            cap=cap,
            vocab_size=vocab_size,
            int8=int8,
        )
        ctx.save_for_backward(*behind)
        return torch.tensor(loss, dtype=torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients made in the forward pass."""
        hidden, weight = ctx.saved_tensors
        scale = float(gradients[0])
        if scale != 1.0:
            hidden, weight = hidden * scale, weight * scale
        return hidden, weight, None, None, None, None, None
