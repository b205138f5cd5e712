"""What base training, midtraining and finetuning share: their flags and the way a run is put up.

A stage script chooses a model, data and what to watch; `train_stage` gives them to the Trainer in
a locked run folder, resumes where asked, and writes the report section.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat import checkpoint_manager, report
from nanochat.common import UserError, checkpoints_dir
from nanochat.gpt import GPT
from nanochat.optimizers import OptimizerConfig
from nanochat.runtime import Runtime
from nanochat.schedule import Schedule
from nanochat.tokenizer import Tokenizer
from nanochat.tracking import MetricWriter, start_wandb
from nanochat.training import (
    EXIT_STOPPED,
    Hook,
    Plan,
    StepLoader,
    StoppedError,
    Trainer,
    wants_compile,
)

logger = logging.getLogger(__name__)

# Settings that change how a run is carried out but not what it computes: a resumed run may differ.
_FREE_ON_RESUME = frozenset(
    {
        "run",
        "resume",
        "dry_run",
        "device_batch_size",
        "device_type",
        "save_every",
        "keep_last",
        "log_every",
    }
)


@dataclass(frozen=True)
class StageConfig:
    """Flags of every training stage. A stage overrides defaults and adds its own."""

    run: str = "dummy"
    """Name of the run for the metric services; "dummy" logs to files only."""
    data: str | None = None
    """embedded, fineweb-edu, climbmix or a folder of parquet shards; default: what came before."""
    device_type: str = ""
    """cuda, cpu or mps; default: the best there is."""
    dtype: str = ""
    """Compute dtype: bfloat16 or float32; default: bfloat16 where the hardware is fast at it."""
    model_tag: str | None = None
    """Folder name of the run; default: d<depth>."""
    num_iterations: int = -1
    """Optimizer steps; -1 = derived."""
    device_batch_size: int = 32
    """Rows of one forward pass on each device."""
    embedding_lr: float = 0.2
    """Learning rate of the token embedding (AdamW)."""
    unembedding_lr: float = 0.004
    """Learning rate of the output head (AdamW)."""
    matrix_lr: float = 0.02
    """Learning rate of the transformer's matrices (Muon)."""
    weight_decay: float = 0.0
    """Weight decay of embedding and head."""
    init_lr_frac: float = 1.0
    """Multiplies all learning rates."""
    warmup_steps: int = 0
    """Steps of linear warmup."""
    warmup_ratio: float = 0.0
    """Warmup as a share of the run, if --warmup-steps is 0."""
    warmdown_ratio: float = 0.2
    """Share of the run over which learning rates fall at its end."""
    final_lr_frac: float = 0.0
    """Learning rates at the very end, as a share."""
    grad_clip: float = 0.0
    """Largest global gradient norm; 0 = off."""
    eval_every: int = 150
    """Steps between validations; -1 = only at the end."""
    eval_tokens: int = 20 * 524_288
    """Validation tokens."""
    save_every: int = -1
    """Steps between checkpoints; -1 = only at the end."""
    keep_last: int = 1
    """Checkpoints kept."""
    log_every: int = 10
    """Steps between console lines."""
    resume: bool = False
    """Continue from this run's newest valid checkpoint, if there is one."""
    dry_run: bool = False
    """Print sizes, steps and where results would go; train nothing."""
    compile: str = "auto"
    """Compile the step: auto, on or off."""
    seed: int = 42
    """Seed of everything random."""

    def optimizer(self) -> OptimizerConfig:
        """The optimizer part of the flags."""
        return OptimizerConfig(
            embedding_lr=self.embedding_lr,
            unembedding_lr=self.unembedding_lr,
            matrix_lr=self.matrix_lr,
            weight_decay=self.weight_decay,
        )

    def schedule(self, num_iterations: int) -> Schedule:
        """The schedule part of the flags."""
        return Schedule(
            num_iterations=num_iterations,
            warmup_steps=self.warmup_steps or round(self.warmup_ratio * num_iterations),
            warmdown_ratio=self.warmdown_ratio,
            peak=self.init_lr_frac,
            final_fraction=self.final_lr_frac,
        )


def train_stage(
    config: StageConfig,
    *,
    stage: str,
    title: str,
    runtime: Runtime,
    model: GPT,
    tokenizer: Tokenizer,
    tokenizer_dir: Path,
    loader: StepLoader,
    rows_per_step: int,
    num_iterations: int,
    hooks: Sequence[Hook],
    facts: dict[str, Any],
) -> int:
    """Run one stage to its end; returns the exit code, 0 or 85 when it was asked to stop.

    title: heading of the report section. facts: stage-specific entries of state.json; the
    settings, the model's sizes and the tokenizer's hash are added here.
    """
    tag = config.model_tag or f"d{model.config.n_layer}"
    run_dir = checkpoints_dir(stage) / tag
    sequence_len = model.config.sequence_len
    plan = Plan(
        schedule=config.schedule(num_iterations),
        micro_batch_rows=config.device_batch_size,
        grad_clip=config.grad_clip,
        save_every=max(config.save_every, 0),
        keep_last=config.keep_last,
        log_every=config.log_every,
        compile=wants_compile(
            config.compile,
            device=runtime.device,
            training_flops=model.estimate_flops() * rows_per_step * sequence_len * num_iterations,
        ),
    )
    facts = facts | {
        "stage": stage,
        "model_config": model.config.to_json(),
        "config": dataclasses.asdict(config),
        "num_iterations": num_iterations,
        "total_batch_size": rows_per_step * sequence_len,
        "sequence_len": sequence_len,
        "tokenizer_hash": tokenizer.hash,
    }
    _announce(title, model, plan, facts)
    if config.dry_run:
        logger.info("dry run: nothing trained; checkpoints would go to %s", run_dir)
        return 0
    with checkpoint_manager.lock_run(run_dir, runtime.world):
        checkpoint = _previous_run(run_dir, facts, resume=config.resume, runtime=runtime)
        metrics = None
        if runtime.world.is_main:
            mirror = start_wandb(config.run, project=f"nanochat-{stage}", config=facts)
            metrics = MetricWriter(run_dir / "metrics.jsonl", mirror=mirror)
        trainer = Trainer(
            model,
            loader,
            plan=plan,
            optimizer=config.optimizer(),
            runtime=runtime,
            run_dir=run_dir,
            tokenizer_dir=tokenizer_dir,
            facts=facts,
            metrics=metrics,
            hooks=hooks,
        )
        if checkpoint is not None:
            trainer.resume(checkpoint)
        try:
            trainer.run()
        except StoppedError as stopped:
            logger.warning("%s; run the same command with --resume to go on", stopped)
            return EXIT_STOPPED
    if runtime.world.is_main:
        _report(title, trainer, facts)
    return 0


def _announce(title: str, model: GPT, plan: Plan, facts: dict[str, Any]) -> None:
    counts = model.count_parameters()
    groups = ", ".join(f"{name} {count:,}" for name, count in counts.items() if name != "total")
    steps = plan.schedule.num_iterations
    tokens = steps * facts["total_batch_size"]
    logger.info("%s: %s parameters (%s)", title, f"{counts['total']:,}", groups)
    logger.info(
        "%s steps x %s tokens = %s tokens, %.2e FLOPs, %s%s",
        f"{steps:,}",
        f"{facts['total_batch_size']:,}",
        f"{tokens:,}",
        tokens * model.estimate_flops(),
        "compiled" if plan.compile else "uncompiled",
        f", {tokens / counts['total']:.1f} tokens per parameter",
    )


def _previous_run(
    run_dir: Path, facts: dict[str, Any], *, resume: bool, runtime: Runtime
) -> checkpoint_manager.Checkpoint | None:
    """The checkpoint to go on from; a run that is not continued makes way to a subfolder."""
    newest = checkpoint_manager.newest_checkpoint(run_dir)
    if newest is None:
        return None
    if resume:
        different = _differences(newest.state, facts)
        if not different:
            return newest
        logger.warning("not resuming %s: it was made with %s", run_dir, "; ".join(different))
    if runtime.world.is_main:
        aside = run_dir / "previous"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        for path in [*run_dir.glob("step_*"), *run_dir.glob("metrics.jsonl")]:
            path.rename(aside / path.name)
        logger.info("the earlier run in %s is now %s", run_dir, aside)
    runtime.world.barrier()
    return None


def _differences(saved: dict[str, Any], facts: dict[str, Any]) -> list[str]:
    """Settings that make a saved run another one than the one asked for, as `name old, not new`."""
    old = saved.get("config", {}) | {k: v for k, v in saved.items() if k in facts and k != "config"}
    new = facts["config"] | {k: v for k, v in facts.items() if k != "config"}
    return [
        f"{name} {old.get(name)!r}, not {value!r}"
        for name, value in new.items()
        if name not in _FREE_ON_RESUME and old.get(name) != value
    ]


def _report(title: str, trainer: Trainer, facts: dict[str, Any]) -> None:
    state = trainer.state
    results = {
        "Number of parameters": trainer.model.count_parameters()["total"],
        "Number of iterations": facts["num_iterations"],
        "Number of training tokens": state.tokens,
        "DDP world size": trainer.runtime.world.size,
        "Compute dtype": str(trainer.runtime.compute_dtype).removeprefix("torch."),
        "Training seconds": state.seconds,
        "Tokens per second": trainer.tokens_per_second or state.tokens / max(state.seconds, 1e-9),
        "Final training loss": state.smooth_loss,
    }
    results |= {f"Final {name.replace('_', ' ')}": v for name, v in state.evaluations.items()}
    results |= {f"Minimum {name.replace('_', ' ')}": v for name, v in state.best.items()}
    report.append(title, [facts["config"], results, {"run_dir": str(trainer.run_dir)}])


def check_positive(config: Any, *names: str) -> None:
    """Raise UserError for the first of the named flags that is not at least 1."""
    for name in names:
        value = getattr(config, name)
        if value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")


def whole_rows(total_batch_size: int, sequence_len: int) -> int:
    """Rows of a step of `total_batch_size` tokens; UserError when the division is not whole."""
    if total_batch_size % sequence_len:
        nearest = max(1, round(total_batch_size / sequence_len)) * sequence_len
        raise UserError(
            f"total batch of {total_batch_size:,} tokens is not a multiple of the context of "
            f"{sequence_len}; use --total-batch-size={nearest}"
        )
    return total_batch_size // sequence_len
