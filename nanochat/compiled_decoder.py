"""The compiled decoder: the model's step on a CPU, in Rust (see kernels/README.md).

`CompiledDecoder` packs a model's weights once, in fp32, bf16 or int8, and keeps rows of keys and
values. Every result is computed in one order that depends on nothing else in the step, so a
request gets the same bits alone and in a crowd. `decoder.PlainDecoder` is its oracle.
"""

from __future__ import annotations

import ctypes
import weakref
from array import array
from collections.abc import Collection, Mapping, Sequence
from ctypes import byref, c_double, c_uint64, c_void_p
from dataclasses import fields
from typing import Any, Literal

import torch
from torch import Tensor

from nanochat import kernels
from nanochat.blocks import GatedMLP
from nanochat.decoder import Chunk
from nanochat.gpt import GPT, GPTConfig
from nanochat.sampling import SamplingSettings, apply_penalties

Weights = Literal["float32", "bfloat16", "int8"]
Instructions = Literal["best", "no-tiles", "no-bf16", "avx2"]
# What the compiled step computes. A model with another option set is decoded the plain way.
KNOWN_FIELDS = frozenset(
    {
        "sequence_len",
        "vocab_size",
        "n_layer",
        "n_head",
        "n_kv_head",
        "n_embd",
        "token_shift",
        "mlp",
        "rope_base",
        "qk_scale",
        "logit_softcap",
        "window_pattern",
        "value_embeddings",
        "residual_scalars",
        "smear",
        "backout",
        "vocab_multiple",
        "init",
    }
)
_NO_WINDOW = 2**63
_MAX_HEAD_DIM = 512


class _Sizes(ctypes.Structure):
    _fields_ = (
        *(
            (name, c_uint64)
            for name in (
                "vocabulary",
                "width",
                "num_layers",
                "query_heads",
                "key_heads",
                "head_size",
                "inner_width",
                "positions",
            )
        ),
        ("token_shift", c_double),
        ("qk_scale", c_double),
        ("softcap", c_double),
        ("is_gated", c_uint64),
        ("smear_share", c_double),
        ("backout_share", c_double),
        ("windows", c_void_p),
        ("kind", c_uint64),
        ("num_threads", c_uint64),
        ("without", c_uint64),
    )


def unknown_options(config: GPTConfig) -> list[str]:
    """What the compiled step does not compute of this model."""
    plain = GPTConfig(**{name: getattr(config, name) for name in KNOWN_FIELDS})
    unknown = [
        field.name
        for field in fields(config)
        if getattr(config, field.name) != getattr(plain, field.name)
    ]
    is_too_wide = config.head_dim > _MAX_HEAD_DIM
    return [*unknown, f"heads of {config.head_dim} features"] if is_too_wide else unknown


def can_decode(config: GPTConfig, device: torch.device) -> bool:
    """Whether the compiled decoder exists here and knows everything that this model computes."""
    return device.type == "cpu" and not unknown_options(config) and kernels.load() is not None


class CompiledDecoder:
    """A `decoder.Decoder` for CPUs. One thread at a time may use it."""

    def __init__(
        self,
        model: GPT,
        *,
        weights: Weights = "float32",
        num_threads: int | None = None,
        instructions: Instructions = "best",
    ) -> None:
        """Pack the model's weights as they are now; its embedding is read where it lies.

        weights: how matrices are kept. Keys and values are fp32 beside fp32 weights, else bf16.
        num_threads: default torch's. instructions: less than the best is for tests.
        """
        library = kernels.load()
        if library is None or not can_decode(model.config, model.device):
            raise kernels.KernelError(f"no compiled decoder for {model.config} on {model.device}")
        self._library, self._config = library, model.config
        self._key_bytes = 4 if weights == "float32" else 2
        self.weights: Weights = weights
        config = model.config
        windows = array("Q", (_NO_WINDOW if w is None else w for w in config.windows))
        sizes = _Sizes(
            config.vocab_size,
            config.n_embd,
            config.n_layer,
            config.n_head,
            config.num_kv_heads,
            config.head_dim,
            model.transformer.h[0].mlp.c_fc.out_features,  # type: ignore[union-attr]
            model.cos.size(0),
            config.token_shift,
            config.qk_scale,
            config.logit_softcap,
            config.mlp == "swiglu",
            float(model.smear_lambda) if config.smear else 0.0,
            float(model.backout_lambda) if config.backout else 0.0,
            windows.buffer_info()[0],
            ("float32", "bfloat16", "int8").index(weights),
            num_threads or torch.get_num_threads(),
            ("best", "no-tiles", "no-bf16", "avx2").index(instructions),
        )
        # Read by every step, so they must live as long as this object.
        self._tables = _tables(model)
        matrices = [_fp32(matrix) for matrix in _matrices(model)]
        handle = c_void_p()
        self._call(
            "nck_model_new", byref(sizes), _pointers(self._tables), _pointers(matrices),
            byref(handle),
        )  # fmt: skip
        self._handle = handle
        self._release = weakref.finalize(self, library.nck_model_free, handle)
        # At the end of the process the system takes everything back, threads included.
        self._release.atexit = False
        self._logits = torch.empty(0, config.vocab_size)
        self.num_weight_bytes = int(library.nck_model_bytes(handle))
        self._capacities: dict[int, int] = {}
        """By the number of each open row."""

    @property
    def context(self) -> int:
        """Tokens of a row that the model was trained to see."""
        return self._config.sequence_len

    @property
    def vocab_size(self) -> int:
        """Token ids the model knows."""
        return self._config.vocab_size

    @property
    def bytes_per_token(self) -> int:
        """Memory of one remembered token: keys and values of all layers."""
        config = self._config
        return 2 * config.n_layer * config.num_kv_heads * config.head_dim * self._key_bytes

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return torch.device("cpu")

    @property
    def num_reserved(self) -> int:
        """Tokens of memory that all rows take together."""
        return sum(self._capacities.values())

    def can_open(self, capacity: int, limit: int, *, closing: Collection[int] = ()) -> bool:
        """Whether all capacities together stay within `limit`."""
        freed = sum(self._capacities[row] for row in closing)
        return self.num_reserved - freed + capacity <= limit

    def open(self, capacity: int, limit: int | None = None) -> int:
        """Reserve a row; the system hands out its memory as it is written."""
        row = c_uint64()
        self._call("nck_open", self._handle, capacity, byref(row))
        self._capacities[row.value] = capacity
        return row.value

    def close(self, row: int) -> None:
        """Give the row's memory back."""
        self._call("nck_close", self._handle, row)
        del self._capacities[row]

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy keys and values of the first `length` tokens."""
        self._call("nck_copy", self._handle, source, target, length)

    def feed(self, chunks: Sequence[Chunk]) -> Tensor:
        """Append all chunks; logits (N, V) fp32 of those that want them, until the next call."""
        table = array("I")
        tokens = array("I")
        num_wanted = 0
        for chunk in chunks:
            table.extend((chunk.row, chunk.start, len(chunk.tokens), chunk.wants_logits))
            tokens.extend(chunk.tokens)
            num_wanted += chunk.wants_logits
        if num_wanted > self._logits.size(0):
            # Kept: fresh memory would cost more than the logits themselves.
            self._logits = torch.empty(num_wanted, self.vocab_size)
        logits = self._logits[:num_wanted]
        self._call(
            "nck_feed",
            self._handle,
            len(chunks),
            table.buffer_info()[0],
            tokens.buffer_info()[0],
            logits.data_ptr(),
            logits.numel(),
        )
        return logits

    def _call(self, name: str, *arguments: Any) -> None:
        kernels.call(self._library, name, *arguments)


def choose(
    logits: Tensor,
    settings: Sequence[SamplingSettings],
    uniforms: Sequence[float],
    seen: Mapping[int, Collection[int]],
) -> list[int]:
    """As `sampling.choose`, its oracle, for logits (B, V) on a CPU."""
    library = kernels.load()
    if library is None:
        raise kernels.KernelError("no compiled library")
    logits = logits.float().contiguous()
    apply_penalties(logits, settings, seen)
    numbers = array("d")
    for setting, uniform in zip(settings, uniforms, strict=True):
        numbers.extend(setting.numbers)
        numbers.append(uniform)
    tokens = array("I", bytes(4 * len(settings)))
    kernels.call(
        library,
        "nck_choose",
        len(settings),
        logits.size(-1),
        logits.data_ptr(),
        numbers.buffer_info()[0],
        tokens.buffer_info()[0],
    )
    return tokens.tolist()


def _matrices(model: GPT) -> list[Tensor]:
    """The model's matrices in the order of the C ABI."""
    matrices = []
    for block in model.transformer.h:
        attn: Any = block.attn
        mlp: Any = block.mlp
        gates = [mlp.c_gate] if isinstance(mlp, GatedMLP) else []
        modules = (attn.c_q, attn.c_k, attn.c_v, attn.c_proj, *gates, mlp.c_fc, mlp.c_proj)
        matrices += [module.weight for module in modules]
    return [*matrices, model.lm_head.weight]


def _tables(model: GPT) -> list[Tensor | None]:
    """The model's tables in the order of the C ABI, None for what it has not."""
    config = model.config
    tables: list[Tensor | None] = [model.transformer.wte.weight, model.cos, model.sin]
    tables.append(model.smear_gate.weight if config.smear else None)
    scalars = None
    if config.residual_scalars:
        scalars = torch.stack((model.resid_lambdas, model.x0_lambdas))
    tables.append(scalars)
    for layer, block in enumerate(model.transformer.h):
        if config.has_value_embedding(layer):
            attn: Any = block.attn
            table: Any = model.value_embeds[str(layer)]
            tables += [table.weight, attn.ve_gate.weight]
        else:
            tables += [None, None]
    return [None if table is None else _fp32(table) for table in tables]


def _fp32(tensor: Tensor) -> Tensor:
    return tensor.detach().float().contiguous()


def _pointers(tensors: Sequence[Tensor | None]) -> Any:
    pointers = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
    return (c_void_p * len(tensors))(*pointers)
