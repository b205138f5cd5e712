"""The training kernels on tensors: bf16, CPUs with AMX or AVX-512 BF16. `fused` defines them.

Legend: M = rows, N = outputs, K = inputs of a linear layer; B = sequences, T = positions, H =
heads, D = head size. Arguments are contiguous bf16 tensors where nothing else is said. Widths are
multiples of 32, as tiles have 32 numbers in a row.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, byref, c_double, c_float, c_uint64, c_void_p
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanochat import kernels
from rustbpe.libraries import declare

WIDTH = 32
"""What every width must be a multiple of."""

_UNBOUNDED = 2**32  # a window that no sequence reaches
_Sizes = c_uint64 * 5
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "nck_borrow_threads": (c_void_p,),
    "nck_linear": (c_uint64, *(c_void_p,) * 3, *(c_uint64,) * 4),
    "nck_linear_input_gradient": (
        *(c_uint64, c_uint64),
        *(POINTER(c_void_p), POINTER(c_void_p), POINTER(c_uint64)),
        *(c_void_p, c_void_p, c_uint64, c_uint64),
    ),
    "nck_linear_weight_gradient": (c_uint64, *(c_void_p,) * 3, *(c_uint64,) * 3),
    "nck_rms_norm": (c_uint64, *(c_void_p,) * 3, c_uint64, c_uint64, c_float),
    "nck_rms_norm_gradient": (c_uint64, *(c_void_p,) * 4, c_uint64, c_uint64),
    "nck_rotate_and_norm": (c_uint64, *(c_void_p,) * 6, c_float),
    "nck_rotate_and_norm_gradient": (c_uint64, *(c_void_p,) * 7),
    "nck_attention": (c_uint64, *(c_void_p,) * 6),
    "nck_attention_gradient": (c_uint64, *(c_void_p,) * 10),
    "nck_head_loss": (
        *(c_uint64, *(c_void_p,) * 4, *(c_uint64,) * 4),
        *(c_float, POINTER(c_double), c_void_p, c_void_p),
    ),
}


@lru_cache(maxsize=1)
def load() -> ctypes.CDLL | None:
    """The library if this processor can train with it, else None."""
    library = kernels.load()
    if library is None or not hasattr(library, "nck_can_train") or not library.nck_can_train():
        return None
    declare(library, _SIGNATURES)
    library.nck_borrow_threads(_openmp())
    return library


def _openmp() -> c_void_p | None:
    """`GOMP_parallel` of the OpenMP that PyTorch has loaded, whose threads the kernels share."""
    root = Path(torch.__file__).parent
    for path in [*root.glob("lib/libgomp*.so*"), *root.parent.glob("torch.libs/libgomp*.so*")]:
        try:
            return ctypes.cast(ctypes.CDLL(str(path)).GOMP_parallel, c_void_p)
        except (OSError, AttributeError):
            continue
    return None


def fits(*tensors: Tensor) -> bool:
    """Whether the kernels can take these: bf16 on a CPU, the last dimension a multiple of 32."""
    return all(
        x.dtype == torch.bfloat16 and x.device.type == "cpu" and x.size(-1) % WIDTH == 0
        for x in tensors
    )


def linear(x: Tensor, weight: Tensor, *, relu2: bool = False) -> Tensor:
    """X (..., K) weight^T for weight (N, K): (..., N); relu2: then max(y, 0)^2."""
    out = x.new_empty(*x.shape[:-1], weight.size(0))
    rows, inputs = x.numel() // x.size(-1), x.size(-1)
    _call("nck_linear", x, weight, out, rows, weight.size(0), inputs, int(relu2))
    return out


def linear_input_gradient(
    gradients: Sequence[Tensor], weights: Sequence[Tensor], h: Tensor | None = None
) -> Tensor:
    """The sum of gradients (..., N) weights (N, K): (..., K).

    h: (..., K), where the inputs were h = max(x, 0)^2: the gradient of x instead.
    """
    count, inputs = len(gradients), weights[0].size(1)
    out = gradients[0].new_empty(*gradients[0].shape[:-1], inputs)
    _call(
        "nck_linear_input_gradient",
        count,
        (c_void_p * count)(*(g.data_ptr() for g in gradients)),
        (c_void_p * count)(*(w.data_ptr() for w in weights)),
        (c_uint64 * count)(*(w.size(0) for w in weights)),
        out,
        h,
        out.numel() // inputs,
        inputs,
    )
    return out


def linear_weight_gradient(gradient: Tensor, x: Tensor) -> Tensor:
    """gradient^T (N, M) x (M, K): (N, K)."""
    outputs, inputs = gradient.size(-1), x.size(-1)
    out = x.new_empty(outputs, inputs)
    _call("nck_linear_weight_gradient", gradient, x, out, x.numel() // inputs, outputs, inputs)
    return out


def rms_norm(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """X (..., C) at unit root mean square, and the fp32 factors (M,)."""
    out, rows = torch.empty_like(x), x.numel() // x.size(-1)
    inverse = torch.empty(rows, dtype=torch.float32)
    _call("nck_rms_norm", x, out, inverse, rows, x.size(-1), eps)
    return out, inverse


def rms_norm_gradient(gradient: Tensor, normed: Tensor, inverse: Tensor) -> Tensor:
    """The gradient behind `rms_norm`, whose results `normed` and `inverse` are."""
    out = torch.empty_like(gradient)
    rows, width = inverse.numel(), gradient.size(-1)
    _call("nck_rms_norm_gradient", gradient, normed, inverse, out, rows, width)
    return out


def rotate_and_norm(x: Tensor, cos: Tensor, sin: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """X (B, T, H, D), D a multiple of 64, turned and at unit root mean square; factors (B, T, H).

    cos, sin: (T, D / 2) fp32.
    """
    out, inverse = torch.empty_like(x), torch.empty(x.shape[:3], dtype=torch.float32)
    _call("nck_rotate_and_norm", _sizes(x, None), x, cos, sin, out, inverse, eps)
    return out, inverse


def rotate_and_norm_gradient(
    gradient: Tensor, normed: Tensor, inverse: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    """The gradient behind `rotate_and_norm`, whose results `normed` and `inverse` are."""
    out, sizes = torch.empty_like(gradient), _sizes(gradient, None)
    _call("nck_rotate_and_norm_gradient", sizes, gradient, normed, inverse, cos, sin, out)
    return out


def attention(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
    """Causal attention of (B, T, H, D), and the fp32 log-sum-exp of the scores (B, H, T)."""
    out = torch.empty_like(q)
    lse = torch.empty(q.size(0), q.size(2), q.size(1), dtype=torch.float32)
    _call("nck_attention", _sizes(q, window), q, k, v, out, lse)
    return out, lse


def attention_gradient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    gradient: Tensor,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v behind `attention`, whose results `out` and `lse` are."""
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    sizes = _sizes(q, window)
    _call("nck_attention_gradient", sizes, q, k, v, out, lse, gradient, dq, dk, dv)
    return dq, dk, dv


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    factors: Tensor | None,
    *,
    cap: float,
    vocab_size: int,
) -> tuple[float, Tensor, Tensor]:
    """The weighted sum of losses in nats, and the gradients of hidden (M, C) and weight (V, C).

    targets: (M,) int64 below vocab_size; factors: (M,) fp32, None = 1; cap: above 0.
    """
    loss = c_double()
    gradients = torch.empty_like(hidden), torch.empty_like(weight)
    rows, width = hidden.shape
    sizes = (rows, width, weight.size(0), vocab_size, cap)
    _call("nck_head_loss", hidden, weight, targets, factors, *sizes, byref(loss), *gradients)
    return loss.value, *gradients


def _sizes(x: Tensor, window: int | None) -> Any:
    return _Sizes(*x.shape, _UNBOUNDED if window is None else window)


def _call(name: str, *arguments: Any) -> None:
    library = load()
    if library is None:
        raise kernels.KernelError("no training kernels here")
    for x in arguments:
        if isinstance(x, Tensor) and not x.is_contiguous():
            raise kernels.KernelError(f"{name}: an argument of shape {tuple(x.shape)} has gaps")
    places = [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments]
    kernels.call(library, name, torch.get_num_threads(), *places)
