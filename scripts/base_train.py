"""Pretrain a base model on documents.

python -m scripts.base_train --depth=4 --data=embedded --num_iterations=500
torchrun --standalone --nproc_per_node=8 -m scripts.base_train -- --depth=20
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from nanochat import configurator, core_eval, hf_export, runtime, scaling
from nanochat.common import UserError, eval_bundle_name, tokenizer_dir
from nanochat.core_scoring import GptModel
from nanochat.core_tokens import CachedTokenizer
from nanochat.dataloader import Batch, DocumentLoader, evaluation_batches
from nanochat.dataset import open_source
from nanochat.engine import sample_prompts
from nanochat.gpt import GPT, GPTConfig
from nanochat.presets import (
    MODELS,
    OPTIMIZERS,
    PRETRAINING,
    TOKENS_PER_PARAMETER,
    TRAINING,
    PresetName,
)
from nanochat.resuming import DATA_FINGERPRINT
from nanochat.runtime import LostRankError, Runtime
from nanochat.stage import (
    StageConfig,
    check_count,
    check_numbers,
    check_positive,
    setting,
    train_stage,
)
from nanochat.tokenizer import Tokenizer, get_tokenizer
from nanochat.training import Hook, Trainer
from nanochat.validation import Validation
from tasks import mixtures

logger = logging.getLogger(__name__)

DEFAULT_DATA = "fineweb-edu"
DEFAULT_BATCH = 524_288
AUTOMATIC = -1  # --total-batch-size
CORE, CORE_PARTIAL = "core", "core_partial"  # in metrics.jsonl and the report
_OPTIONS = ("token_shift", "value_embeddings", "window_pattern")  # flags of the model, not sizes


@dataclass(frozen=True)
class Config(StageConfig):
    """Flags of base_train."""

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
    packing: Literal["stream", "best-fit"] = "stream"
    """How documents fill rows."""
    eval_every: int = 250
    """Steps between validations; 0 = only at the end, -1 = never."""
    core_metric_every: int = 2000
    """Steps between CORE evaluations; 0 or -1 = never."""
    core_metric_max_per_task: int = 500
    """Items of each CORE task; -1 = all."""
    sample_every: int = 2000
    """Steps between sample generations; 0 = only at the end, -1 = never."""


def main(config: Config) -> int:
    """Train from nothing to a base checkpoint."""
    check_numbers(config)
    check_positive(config, "max_seq_len", "device_batch_size")
    check_count(config, "num_iterations", "as many as the model's size asks for")
    check_count(config, "core_metric_max_per_task", "all items")
    with runtime.start(config.device_type, dtype=config.dtype, seed=config.seed) as rt:
        tokenizer = get_tokenizer()
        data = config.data or tokenizer.trained_on or DEFAULT_DATA
        source = open_source(data)
        model = GPT(sizes_at(config, config.depth, tokenizer.vocab_size))
        warn_if_not_exported(config.preset, model.config)
        config = settle(config, model)
        total_batch_size = int(setting(config.total_batch_size))
        scaling.gradient_accumulation(
            total_batch_size, config.device_batch_size, config.max_seq_len, rt.world.size
        )
        rows_per_step = total_batch_size // config.max_seq_len
        measure_core = None
        if config.core_metric_every > 0 and not config.dry_run:  # a dry run writes no bundle
            measure_core = core_measure(config, model, tokenizer, data, rt)
        model.init_weights(torch.Generator().manual_seed(config.seed))
        model.to(rt.device)
        counts = model.count_parameters()
        is_modern = config.optimizer == "modern"
        num_iterations = scaling.training_horizon(
            num_iterations=config.num_iterations,
            target_flops=config.target_flops,
            target_param_data_ratio=setting(config.target_param_data_ratio),
            num_parameters=scaling.scaling_parameters(counts) if is_modern else counts["total"],
            flops_per_token=model.estimate_flops(),
            total_batch_size=total_batch_size,
        )
        token_bytes = torch.from_numpy(tokenizer.token_bytes).to(rt.device)

        def validation_batches() -> Iterator[Batch]:
            return evaluation_batches(
                source,
                tokenizer,
                num_tokens=config.eval_tokens,
                batch_size=config.device_batch_size,
                sequence_len=config.max_seq_len,
                world=rt.world,
            )

        def sample(trainer: Trainer) -> dict[str, float]:
            if rt.world.is_main:
                for text in sample_prompts(trainer.model, tokenizer):
                    logger.info("sample: %s", text)
            return {}

        hooks = [
            Hook(
                "validation",
                config.eval_every,
                Validation(validation_batches, token_bytes, rt.world, config.bpb_limit),
                judges=True,
            ),
            Hook("samples", config.sample_every, sample, at_start=False),
        ]
        if measure_core is not None:
            hooks.append(Hook("CORE", config.core_metric_every, measure_core, at_start=False))
        loader = DocumentLoader(
            source,
            tokenizer,
            rows_per_step=rows_per_step,
            sequence_len=config.max_seq_len,
            world=rt.world,
            packing=config.packing,
            pin_memory=rt.device.type == "cuda",
        )
        return train_stage(
            config,
            stage="base",
            title="Base model training",
            runtime=rt,
            model=model,
            tokenizer=tokenizer,
            tokenizer_dir=tokenizer_dir(),
            loader=loader,
            rows_per_step=rows_per_step,
            num_iterations=num_iterations,
            hooks=hooks,
            facts={"data": data, "parent": None, DATA_FINGERPRINT: source.fingerprint()},
        )


def core_measure(
    config: Config, model: GPT, tokenizer: Tokenizer, data: str, rt: Runtime
) -> Callable[[Trainer], dict[str, float]]:
    """The action of a hook that measures CORE. UserError, at once, for what could not be scored."""
    cached, bundle = CachedTokenizer(tokenizer), mixtures.core_bundle(data, rt.world)
    max_per_task, max_length = config.core_metric_max_per_task, GptModel(model).max_length
    try:
        core_eval.check_core(cached, bundle, max_per_task, max_length=max_length, world=rt.world)
    except LostRankError:
        raise
    except UserError as error:
        raise UserError(f"{error}; --core-metric-every=-1 trains without CORE") from error

    def measure(trainer: Trainer) -> dict[str, float]:
        for name in (CORE, CORE_PARTIAL):  # an earlier one is not that of this step
            trainer.state.evaluations.pop(name, None)
        try:
            result = core_eval.evaluate_core(
                GptModel(trainer.model),
                cached,
                bundle,
                max_per_task,
                rt,
                bundle_name=eval_bundle_name(data),
            )
        except LostRankError:
            raise
        except UserError as error:  # files may have changed; training is worth more than a score
            logger.warning("step %d has no CORE: %s", trainer.state.step, error)
            return {}
        logger.info("step %d  %s %.4f", trainer.state.step, result.label, result.core)
        return {CORE_PARTIAL if result.is_partial else CORE: result.core}

    return measure


def warn_if_not_exported(preset: PresetName, sizes: GPTConfig) -> None:
    """Say so where a flag took from a preset's model that `scripts.export_hf` can export it."""
    plain = GPTConfig(**MODELS[preset])
    if hf_export.is_known_elsewhere(plain) and not hf_export.is_known_elsewhere(sizes):
        changed = [name for name in _OPTIONS if getattr(sizes, name) != getattr(plain, name)]
        logger.warning(
            "with --%s a %s model cannot be exported to other engines",
            " and --".join(name.replace("_", "-") for name in changed),
            preset,
        )


def sizes_at(config: Config, depth: int, vocab_size: int) -> GPTConfig:
    """The preset's model at a depth."""
    given = {name: getattr(config, name) for name in _OPTIONS}
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


def settle(config: Config, model: GPT) -> Config:
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


if __name__ == "__main__":
    configurator.run(main, Config)
