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
    "nck_linear": (c_uint64, *(c_void_p,) * 3, *(c_uint64,) * 5),
    "nck_linear_input_gradient": (
        *(c_uint64, c_uint64),
        *(POINTER(c_void_p), POINTER(c_void_p), POINTER(c_uint64)),
        *(c_void_p, c_void_p, *(c_uint64,) * 3),
    ),
    "nck_linear_weight_gradient": (c_uint64, *(c_void_p,) * 3, *(c_uint64,) * 4),
    "nck_rms_norm": (c_uint64, *(c_void_p,) * 3, c_uint64, c_uint64, c_float),
    "nck_rms_norm_gradient": (c_uint64, *(c_void_p,) * 4, c_uint64, c_uint64),
    "nck_rotate_and_norm": (c_uint64, *(c_void_p,) * 6, c_float),
    "nck_rotate_and_norm_gradient": (c_uint64, *(c_void_p,) * 7),
    "nck_attention": (c_uint64, *(c_void_p,) * 6),
    "nck_attention_gradient": (c_uint64, *(c_void_p,) * 10),
    "nck_head_loss": (
        *(c_uint64, *(c_void_p,) * 4, *(c_uint64,) * 4),
        *(c_float, c_uint64, POINTER(c_double), c_void_p, c_void_p),
    ),
    "nck_newton_schulz": (c_uint64, c_void_p, *(c_uint64,) * 3, POINTER(c_float), c_uint64),
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


def linear(x: Tensor, weight: Tensor, *, relu2: bool = False, int8: bool = False) -> Tensor:
    """X (..., K) weight^T for weight (N, K): (..., N); relu2: then max(y, 0)^2.

    int8: of operands rounded to 8 bits, with scales for each row and each output.
    """
    outputs, inputs = weight.size(0), _width(x.size(-1))
    out = x.new_empty(*x.shape[:-1], outputs)
    places = _place(x, x.shape), _place(weight, (outputs, inputs)), out.data_ptr()
    _call("nck_linear", *places, x.numel() // inputs, outputs, inputs, int(relu2), int(int8))
    return out


def linear_input_gradient(
    gradients: Sequence[Tensor],
    weights: Sequence[Tensor],
    h: Tensor | None = None,
    *,
    int8: bool = False,
) -> Tensor:
    """The sum of gradients (..., N) weights (N, K): (..., K).

    h: (..., K), where the inputs were h = max(x, 0)^2: the gradient of x instead.
    int8: as in `linear`.
    """
    count, inputs, before = len(gradients), weights[0].size(1), gradients[0].shape[:-1]
    outputs = [_width(weight.size(0)) for weight in weights]
    out = gradients[0].new_empty(*before, inputs)
    _call(
        "nck_linear_input_gradient",
        count,
        (c_void_p * count)(
            *(_place(g, (*before, n)) for g, n in zip(gradients, outputs, strict=True))
        ),
        (c_void_p * count)(
            *(_place(w, (n, inputs)) for w, n in zip(weights, outputs, strict=True))
        ),
        (c_uint64 * count)(*outputs),
        out.data_ptr(),
        None if h is None else _place(h, out.shape),
        out.numel() // inputs,
        inputs,
        int(int8),
    )
    return out


def linear_weight_gradient(gradient: Tensor, x: Tensor, *, int8: bool = False) -> Tensor:
    """gradient^T (N, M) x (M, K): (N, K).

    int8: of operands rounded to 8 bits, with scales for each column of every 256 rows.
    """
    outputs, inputs = gradient.size(-1), x.size(-1)
    out = x.new_empty(outputs, inputs)
    places = _place(gradient, (*x.shape[:-1], outputs)), _place(x, x.shape), out.data_ptr()
    _call("nck_linear_weight_gradient", *places, x.numel() // inputs, outputs, inputs, int(int8))
    return out


def rms_norm(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """X (..., C) at unit root mean square, and the fp32 factors (M,)."""
    width = _width(x.size(-1))
    out, rows = torch.empty_like(x), x.numel() // width
    inverse = torch.empty(rows, dtype=torch.float32)
    places = _place(x, x.shape), out.data_ptr(), inverse.data_ptr()
    _call("nck_rms_norm", *places, rows, width, eps)
    return out, inverse


def rms_norm_gradient(gradient: Tensor, normed: Tensor, inverse: Tensor) -> Tensor:
    """The gradient behind `rms_norm`, whose results `normed` and `inverse` are."""
    out, width = torch.empty_like(gradient), _width(gradient.size(-1))
    rows = gradient.numel() // width
    places = (_place(gradient, gradient.shape), _place(normed, gradient.shape))
    factors = _place(inverse, (rows,), torch.float32)
    _call("nck_rms_norm_gradient", *places, factors, out.data_ptr(), rows, width)
    return out


def rotate_and_norm(x: Tensor, cos: Tensor, sin: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """X (B, T, H, D), D a multiple of 64, turned and at unit root mean square; factors (B, T, H).

    cos, sin: (T, D / 2) fp32.
    """
    out, inverse = torch.empty_like(x), torch.empty(x.shape[:3], dtype=torch.float32)
    places = _place(x, x.shape), *_tables(x, cos, sin), out.data_ptr(), inverse.data_ptr()
    _call("nck_rotate_and_norm", _sizes(x, None), *places, eps)
    return out, inverse


def rotate_and_norm_gradient(
    gradient: Tensor, normed: Tensor, inverse: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    """The gradient behind `rotate_and_norm`, whose results `normed` and `inverse` are."""
    out, shape = torch.empty_like(gradient), gradient.shape
    places = _place(gradient, shape), _place(normed, shape)
    factors = _place(inverse, shape[:3], torch.float32)
    tables = _tables(gradient, cos, sin)
    sizes = _sizes(gradient, None)
    _call("nck_rotate_and_norm_gradient", sizes, *places, factors, *tables, out.data_ptr())
    return out


def attention(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
    """Causal attention of (B, T, H, D), and the fp32 log-sum-exp of the scores (B, H, T)."""
    out = torch.empty_like(q)
    lse = torch.empty(q.size(0), q.size(2), q.size(1), dtype=torch.float32)
    places = [_place(x, q.shape) for x in (q, k, v)]
    _width(q.size(-1))
    _call("nck_attention", _sizes(q, window), *places, out.data_ptr(), lse.data_ptr())
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
    found = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    places = [_place(x, q.shape) for x in (q, k, v, out)]
    places.append(_place(lse, (q.size(0), q.size(2), q.size(1)), torch.float32))
    places.append(_place(gradient, q.shape))
    _width(q.size(-1))
    sizes = _sizes(q, window)
    _call("nck_attention_gradient", sizes, *places, *(x.data_ptr() for x in found))
    return found


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    factors: Tensor | None,
    *,
    cap: float,
    vocab_size: int,
    int8: bool = False,
) -> tuple[float, Tensor, Tensor]:
    """The weighted sum of losses in nats, and the gradients of hidden (M, C) and weight (V, C).

    targets: (M,) int64 below vocab_size; factors: (M,) fp32, None = 1; cap: above 0, at most 60.
    int8: as in `linear`, for the logits and, from groups of 256 tokens, the gradient of hidden.
    """
    loss = c_double()
    gradients = torch.empty_like(hidden), torch.empty_like(weight)
    rows, vocabulary, width = hidden.size(0), weight.size(0), _width(hidden.size(1))
    if not 0 < vocab_size <= vocabulary:
        raise kernels.KernelError(f"{vocab_size} tokens of a head with {vocabulary} rows")
    _call(
        "nck_head_loss",
        _place(hidden, (rows, width)),
        _place(weight, (vocabulary, width)),
        _place(targets, (rows,), torch.int64),
        None if factors is None else _place(factors, (rows,), torch.float32),
        *(rows, width, vocabulary, vocab_size, cap, int(int8)),
        byref(loss),
        *(x.data_ptr() for x in gradients),
    )
    return loss.value, *gradients


def newton_schulz_(stack: Tensor, coefficients: Sequence[tuple[float, float, float]]) -> Tensor:
    """In place, for each (a, b, c): X = a X + (b G + c G G) X, G = X X^T, of matrices (K, M, N).

    M is at most N. G and the sum of its powers are rounded to bf16.
    """
    count, rows, columns = stack.shape
    if rows > columns:
        raise kernels.KernelError(f"matrices of {rows} x {columns} are taller than wide")
    place = _place(stack, (count, _width(rows), _width(columns)))
    numbers = [number for of_iteration in coefficients for number in of_iteration]
    values = (c_float * len(numbers))(*numbers)
    _call("nck_newton_schulz", place, count, rows, columns, values, len(coefficients))
    return stack


def _sizes(x: Tensor, window: int | None) -> Any:
    return _Sizes(*x.shape, _UNBOUNDED if window is None else window)


def _tables(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[int, int]:
    """Addresses of the rotary tables of x (B, T, H, D)."""
    half = _width(x.size(3) // 2)
    cos_place, sin_place = (_place(y, (x.size(1), half), torch.float32) for y in (cos, sin))
    return cos_place, sin_place


def _width(size: int) -> int:
    """The size; KernelError unless it is a multiple of 32."""
    if size == 0 or size % WIDTH:
        raise kernels.KernelError(f"a width of {size} is no multiple of {WIDTH}")
    return size


def _place(x: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.bfloat16) -> int:
    """The address of x; KernelError unless there is what a kernel would take it for."""
    if tuple(x.shape) != tuple(shape) or x.dtype != dtype or x.device.type != "cpu":
        raise kernels.KernelError(
            f"{dtype} numbers of shape {tuple(shape)} are needed on the CPU, not {x.dtype} of "
            f"shape {tuple(x.shape)} on {x.device}"
        )
    if not x.is_contiguous():
        raise kernels.KernelError(f"an argument of shape {tuple(x.shape)} has gaps")
    return x.data_ptr()


def _call(name: str, *arguments: Any) -> None:
    library = load()
    if library is None:
        raise kernels.KernelError("no training kernels here")
    kernels.call(library, name, torch.get_num_threads(), *arguments)
