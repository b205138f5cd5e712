"""Which decoder a model gets: the compiled one on a CPU that can run it, else the plain one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from nanochat import compiled_decoder, kernels, sampling
from nanochat.common import UserError
from nanochat.decoder import Decoder, PlainDecoder
from nanochat.gpt import GPT
from nanochat.sampling import SamplingSettings

logger = logging.getLogger(__name__)

_WEIGHTS: dict[torch.dtype, compiled_decoder.Weights] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
}


Chooser = Callable[
    [Tensor, Sequence[SamplingSettings], Sequence[float], Mapping[int, Collection[int]]], list[int]
]


def chooser_for(device: torch.device) -> Chooser:
    """What chooses tokens from logits on a device: compiled on a CPU, else `sampling.choose`."""
    is_compiled = device.type == "cpu" and kernels.load() is not None
    return compiled_decoder.choose if is_compiled else sampling.choose


def make_decoder(model: GPT, *, int8: bool = False) -> Decoder:
    """A decoder for a model, in the precision that its matrices have, or with int8 weights.

    The compiled decoder packs the weights as they are now. UserError when int8 is asked for and
    the compiled decoder can not decode the model here.
    """
    weights = "int8" if int8 else _WEIGHTS.get(model.compute_dtype)
    if weights is not None and compiled_decoder.can_decode(model.config, model.device):
        return compiled_decoder.CompiledDecoder(model, weights=weights)
    if int8:
        raise UserError(
            f"int8 weights need the compiled decoder, which {_obstacle(model)}; "
            "use --dtype=bfloat16 or --dtype=float32"
        )
    if model.device.type == "cpu":
        _notice(_obstacle(model))
    return PlainDecoder(model)


def _obstacle(model: GPT) -> str:
    if model.device.type != "cpu":
        return f"runs on a CPU, not on {model.device.type}"
    if kernels.load() is None:
        return "is not built (install Rust 1.89 or later and reinstall)"
    if model.compute_dtype not in _WEIGHTS:
        return f"computes in float32 or bfloat16, not in {_name(model.compute_dtype)}"
    unknown = compiled_decoder.unknown_options(model.config)
    return f"does not know this model's {', '.join(unknown)}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@lru_cache(maxsize=8)  # each reason once
def _notice(reason: str) -> None:
    logger.warning(
        "answers come several times slower here: the compiled decoder %s; see "
        "nanochat/kernels/README.md",
        reason,
    )
