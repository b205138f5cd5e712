"""From one dial, `depth`, to sizes; from sizes to a training horizon. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nanochat.common import UserError
from nanochat.gpt import GPTConfig
from nanochat.presets import MODELS, PresetName

REFERENCE_DEPTH = 12  # where the modern settings were tuned
REFERENCE_BATCH = 2**19
BATCH_EXPONENT = 0.383


def model_config(
    depth: int,
    *,
    vocab_size: int,
    sequence_len: int,
    aspect_ratio: int = 64,
    head_dim: int = 128,
    model_dim: int | None = None,
    preset: PresetName = "classic",
    **options: Any,
) -> GPTConfig:
    """Sizes of the model at a depth: width depth * aspect_ratio, heads of about head_dim features.

    The rule of the 2025 nanochat: depth 20 at vocabulary 65,536 has 560,988,160 parameters.
    `model_dim` overrides the width, `options` the preset's fields of `GPTConfig`. Raises UserError
    for sizes that no model can have.
    """
    if depth < 1:
        raise UserError(f"--depth is {depth}; a model needs at least 1 layer")
    width = model_dim if model_dim is not None else depth * aspect_ratio
    num_heads = max(1, (width + head_dim - 1) // head_dim)
    return GPTConfig(
        sequence_len=sequence_len,
        vocab_size=vocab_size,
        n_layer=depth,
        n_head=num_heads,
        n_embd=width,
        **(MODELS[preset] | options),
    )


def gradient_accumulation(
    total_batch_size: int, device_batch_size: int, sequence_len: int, world_size: int
) -> int:
    """Micro-batches of one step on each rank; UserError naming a valid batch if not whole."""
    per_pass = device_batch_size * sequence_len * world_size
    if device_batch_size < 1 or total_batch_size < 1:
        raise UserError(
            f"--device-batch-size {device_batch_size} and --total-batch-size {total_batch_size} "
            "must both be at least 1"
        )
    if total_batch_size % per_pass:
        nearest = max(1, round(total_batch_size / per_pass)) * per_pass
        raise UserError(
            f"total batch of {total_batch_size:,} tokens is not a multiple of {per_pass:,} "
            f"(device batch {device_batch_size} x length {sequence_len} x {world_size} ranks); "
            f"use --total-batch-size={nearest}"
        )
    return total_batch_size // per_pass


@dataclass(frozen=True)
class Automatic:
    """What the modern preset derives from sizes."""

    total_batch_size: int
    """Tokens of a step."""
    learning_rates: float
    """Factor of all learning rates."""
    weight_decay: float
    """Factor of the weight decay."""


def scaling_parameters(counts: Mapping[str, int]) -> int:
    """Parameters that a training horizon is measured in: blocks and head.

    Tables that are only looked up cost next to nothing to train, and scaling laws come out cleaner
    without them. counts: of `GPT.count_parameters`.
    """
    return counts["transformer_matrices"] + counts["lm_head"]


def automatic(
    num_parameters: int, reference_parameters: int, total_batch_size: int | None = None
) -> Automatic:
    """Batch, learning rates and weight decay, from those tuned at depth 12 with 2^19 tokens a step.

    num_parameters, reference_parameters: `scaling_parameters` of the model and of one of depth
    12; their ratio is that of the training tokens, at equal tokens per parameter. total_batch_size:
    given outright, None = the best one, which grows with the tokens to the power of 0.383
    (arXiv:2505.13738), to the nearest power of two. Learning rates grow with the square root of
    the batch; the decay keeps its time scale in tokens (arXiv:2405.13698).
    """
    tokens = num_parameters / reference_parameters
    batch = total_batch_size or 2 ** round(math.log2(REFERENCE_BATCH * tokens**BATCH_EXPONENT))
    rates = math.sqrt(batch / REFERENCE_BATCH)
    return Automatic(batch, learning_rates=rates, weight_decay=rates / tokens)


def training_horizon(
    *,
    num_iterations: int,
    target_flops: float,
    target_param_data_ratio: float,
    num_parameters: int,
    flops_per_token: float,
    total_batch_size: int,
) -> int:
    """Optimizer steps: given outright, else from a FLOP budget, else from tokens per parameter.

    The first positive setting wins, in that order. 20 tokens per parameter is the compute-optimal
    ratio of arXiv:2203.15556. Raises UserError when no setting is positive or the result is less
    than one step.
    """
    if num_iterations > 0:
        return num_iterations
    if target_flops > 0:
        steps = round(target_flops / (flops_per_token * total_batch_size))
    elif target_param_data_ratio > 0:
        steps = int(target_param_data_ratio * num_parameters) // total_batch_size
    else:
        raise UserError(
            "no training horizon: give --num-iterations, --target-flops or "
            "--target-param-data-ratio"
        )
    if steps < 1:
        raise UserError(
            f"the horizon is less than one step of {total_batch_size:,} tokens; "
            "raise the budget or lower --total-batch-size"
        )
    return steps
