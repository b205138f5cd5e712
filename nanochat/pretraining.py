"""Pretraining before it runs: its flags, and the sizes, settings and steps that follow from them.

`scripts.base_train` trains what they ask for; a sweep over many models plans with the same rules.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from nanochat import scaling
from nanochat.common import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.presets import (
    OPTIMIZERS,
    PRETRAINING,
    TOKENS_PER_PARAMETER,
    TRAINING,
    PresetName,
)
from nanochat.stage import StageConfig, check_count, check_numbers, check_positive, setting

logger = logging.getLogger(__name__)

DEFAULT_DATA = "fineweb-edu"
DEFAULT_BATCH = 524_288
AUTOMATIC = -1  # --total-batch-size
CORE, CORE_PARTIAL = "core", "core_partial"  # in metrics.jsonl, checkpoints and the report
OPTIONS = ("token_shift", "value_embeddings", "window_pattern")  # flags of the model, not sizes


@dataclass(frozen=True)
class PretrainingConfig(StageConfig):
    """Flags of pretraining."""

    depth: int = 20
    """Transformer layers; width and heads follow from it."""
    preset: PresetName = "classic"
    """Options of the model, and the optimizer with its settings: classic, modern or portable."""
    aspect_ratio: int = 64
    """Width per layer."""
    head_dim: int = 128
    """Features of one attention head, at most."""
    model_dim: int | None = None
    """Width, instead of depth x aspect ratio."""
    token_shift: float = 0.0
    """Share of the previous token's embedding, halves swapped, added to each one; 0 = off."""
    value_embeddings: bool | None = None
    """Tables of values by token in every second layer; default: the preset's."""
    window_pattern: str | None = None
    """Layers that see a quarter context (S) or all (L), repeated; default: the preset's."""
    max_seq_len: int = 2048
    """Context in tokens."""
    total_batch_size: int | None = None
    """Tokens of one optimizer step, -1 = by depth; default: 524,288 (modern: by depth)."""
    target_flops: float = -1.0
    """Horizon by training FLOPs, if --num-iterations is -1."""
    target_param_data_ratio: float | None = None
    """Horizon by tokens per parameter, if no other is given; default: 20 (modern: see docs)."""
    packing: Literal["stream", "shuffled", "best-fit"] = "stream"
    """How documents fill rows."""
    eval_every: int = 250
    """Steps between validations; 0 = only at the end, -1 = never."""
    core_metric_every: int = 2000
    """Steps between CORE evaluations; 0 or -1 = never."""
    core_metric_max_per_task: int = 500
    """Items of each CORE task; -1 = all."""
    sample_every: int = 2000
    """Steps between sample generations; 0 = only at the end, -1 = never."""


def check(config: PretrainingConfig) -> None:
    """Raise UserError for the first flag with a value that no run can have."""
    check_numbers(config)
    check_positive(config, "max_seq_len", "device_batch_size")
    check_count(config, "num_iterations", "as many as the model's size asks for")
    check_count(config, "core_metric_max_per_task", "all items")


def sizes_at(config: PretrainingConfig, depth: int, vocab_size: int) -> GPTConfig:
    """The preset's model at a depth."""
    given = {name: getattr(config, name) for name in OPTIONS}
    options = {name: value for name, value in given.items() if value is not None}
    return scaling.model_config(
        depth,
        vocab_size=vocab_size,
        sequence_len=config.max_seq_len,
        aspect_ratio=config.aspect_ratio,
        head_dim=config.head_dim,
        model_dim=config.model_dim if depth == config.depth else None,
        preset=config.preset,
        **options,
    )


def settle(config: PretrainingConfig, model: GPT) -> PretrainingConfig:
    """Fill in what was left to the preset: batch, horizon, learning rates, decay, schedule.

    A value given as a flag is taken as it is; only the preset's own are scaled.
    """
    optimizer = config.optimizer or OPTIMIZERS[config.preset]
    is_modern, batch = optimizer == "modern", config.total_batch_size
    if batch is not None and batch != AUTOMATIC and batch < 1:
        raise UserError(f"--total-batch-size is {batch}; use at least 1, or -1 = by depth")
    defaults = dict(PRETRAINING[optimizer])
    if is_modern or batch == AUTOMATIC:
        with torch.device("meta"):
            reference = GPT(sizes_at(config, scaling.REFERENCE_DEPTH, model.config.vocab_size))
        chosen = scaling.automatic(
            scaling.scaling_parameters(model.count_parameters()),
            scaling.scaling_parameters(reference.count_parameters()),
            batch if batch != AUTOMATIC else None,
        )
        batch = chosen.total_batch_size
        if is_modern:
            for name in ("embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr"):
                defaults[name] = TRAINING[optimizer][name] * chosen.learning_rates
            defaults["weight_decay"] *= chosen.weight_decay
            logger.info(
                "batch of %s tokens: the preset's learning rates x%.3f, its weight decay x%.3f",
                f"{batch:,}",
                chosen.learning_rates,
                chosen.weight_decay,
            )
    ratio = config.target_param_data_ratio
    return dataclasses.replace(
        config.settled(optimizer, **defaults),
        total_batch_size=batch or DEFAULT_BATCH,
        target_param_data_ratio=TOKENS_PER_PARAMETER[optimizer] if ratio is None else ratio,
    )


def horizon_parameters(config: PretrainingConfig, counts: Mapping[str, int]) -> int:
    """What tokens per parameter count: blocks and head (modern), or all parameters (classic).

    config: settled. counts: of `GPT.count_parameters`.
    """
    return scaling.scaling_parameters(counts) if config.optimizer == "modern" else counts["total"]


def planned_iterations(config: PretrainingConfig, model: GPT) -> int:
    """Optimizer steps of a run with settled flags."""
    return scaling.training_horizon(
        num_iterations=config.num_iterations,
        target_flops=config.target_flops,
        target_param_data_ratio=setting(config.target_param_data_ratio),
        num_parameters=horizon_parameters(config, model.count_parameters()),
        flops_per_token=model.estimate_flops(),
        total_batch_size=int(setting(config.total_batch_size)),
    )
