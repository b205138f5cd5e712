"""Pretrain a base model on documents.

python -m scripts.base_train --depth=4 --data=embedded --num_iterations=500
torchrun --standalone --nproc_per_node=8 -m scripts.base_train -- --depth=20
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import torch

from nanochat import configurator, core_eval, hf_export, runtime, scaling
from nanochat.common import UserError, eval_bundle_name, tokenizer_dir
from nanochat.core_scoring import GptModel
from nanochat.core_tokens import CachedTokenizer
from nanochat.dataloader import Batch, DocumentLoader, evaluation_batches
from nanochat.dataset import open_source
from nanochat.engine import sample_prompts
from nanochat.gpt import GPT, GPTConfig
from nanochat.presets import MODELS, PresetName
from nanochat.pretraining import (
    CORE,
    CORE_PARTIAL,
    DEFAULT_DATA,
    OPTIONS,
    check,
    planned_iterations,
    settle,
    sizes_at,
)
from nanochat.pretraining import PretrainingConfig as Config
from nanochat.resuming import DATA_FINGERPRINT
from nanochat.runtime import LostRankError, Runtime
from nanochat.stage import setting, train_stage
from nanochat.tokenizer import Tokenizer, get_tokenizer
from nanochat.training import Hook, Trainer
from nanochat.validation import Validation
from tasks import mixtures

logger = logging.getLogger(__name__)


def main(config: Config) -> int:
    """Train from nothing to a base checkpoint."""
    check(config)
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
            seed=config.seed,
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
            num_iterations=planned_iterations(config, model),
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
        changed = [name for name in OPTIONS if getattr(sizes, name) != getattr(plain, name)]
        logger.warning(
            "with --%s a %s model cannot be exported to other engines",
            " and --".join(name.replace("_", "-") for name in changed),
            preset,
        )


if __name__ == "__main__":
    configurator.run(main, Config)
