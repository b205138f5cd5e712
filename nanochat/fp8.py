"""Matrix products in 8 bits, for GPUs that multiply them twice as fast as bf16 (Hopper and later).

Tensorwise scaling (arXiv:2209.05433): each tensor has one factor, which brings its largest entry
to the largest number of the format; activations and weights are e4m3, gradients e5m2. The head and
matrices too small or crooked for the kernel stay in bf16, and so do evaluations.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nanochat.common import UserError
from nanochat.precision import convert_linears

FORWARD, GRADIENT = torch.float8_e4m3fn, torch.float8_e5m2
_LEAST_SIZE, _STEP = 128, 16  # what the kernel pays for, and what it takes
_CUDA_CAPABILITY = (8, 9)  # Ada, the first with fp8 products
_TINY = 1e-12  # an all-zero tensor keeps a finite factor


class Float8Linear(nn.Linear):
    """A bias-free Linear whose three products are made in fp8 while `is_on`."""

    is_on = True

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """input: (..., in). Returns (..., out) in input's dtype."""
        if not self.is_on:
            return F.linear(input, self.weight)
        out: Tensor = _Product.apply(input.flatten(0, -2), self.weight)  # type: ignore[no-untyped-call]
        return out.view(*input.shape[:-1], out.size(-1))


def check_device(device: torch.device) -> None:
    """UserError unless the device multiplies fp8."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < _CUDA_CAPABILITY:
        raise UserError(
            "--fp8 needs an NVIDIA GPU of compute capability 8.9 or later (RTX 4090, H100); "
            "leave it out here"
        )


def convert(model: nn.Module) -> int:
    """Let the model's large matrices multiply in fp8, in place; returns how many."""
    return convert_linears(
        model,
        Float8Linear,
        lambda name, linear: name != "lm_head" and _fits(linear.weight.shape),
    )


@contextmanager
def paused(model: nn.Module) -> Iterator[None]:
    """Products in the weights' own dtype, for evaluation."""
    converted = [module for module in model.modules() if isinstance(module, Float8Linear)]
    for module in converted:
        module.is_on = False
    try:
        yield
    finally:
        for module in converted:
            module.is_on = True


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The tensor in fp8, and the fp32 factor (0-d) that brings it back."""
    largest = x.abs().amax().float().clamp_min(_TINY)
    limit = torch.finfo(dtype).max
    scaled = (x.float() * (limit / largest)).clamp(-limit, limit)
    return scaled.to(dtype), largest / limit


def product(left: Tensor, right: Tensor, dtype: torch.dtype, kinds: Any) -> Tensor:
    """Left @ right.T in fp8, sums in fp32: (n, k) and (m, k) to (n, m) in `dtype`.

    kinds: the fp8 formats of both. Where k is no multiple of what the kernel takes, zeros fill up.
    """
    lacking = -left.size(1) % _STEP
    if lacking:
        left, right = F.pad(left, (0, lacking)), F.pad(right, (0, lacking))
    (a, a_factor), (b, b_factor) = quantize(left, kinds[0]), quantize(right, kinds[1])
    if left.device.type != "cuda":  # the same numbers without the kernel
        return ((a.float() @ b.float().t()) * (a_factor * b_factor)).to(dtype)
    # Gradients tolerate fast sums badly: they keep the exact ones.
    return torch._scaled_mm(
        a.contiguous(),
        b.contiguous().t(),
        scale_a=a_factor,
        scale_b=b_factor,
        out_dtype=dtype,
        use_fast_accum=kinds == (FORWARD, FORWARD),
    )


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, x.dtype, (FORWARD, FORWARD))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        (gradient,) = gradients
        for_x = product(gradient, weight.t(), x.dtype, (GRADIENT, FORWARD))
        for_weight = product(gradient.t(), x.t(), weight.dtype, (GRADIENT, FORWARD))
        return for_x, for_weight


def _fits(shape: torch.Size) -> bool:
    return min(shape) >= _LEAST_SIZE and all(size % _STEP == 0 for size in shape)
