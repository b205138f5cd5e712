"""What the training stages share: their flags and the way a run is put up.

A stage script chooses a model, data and what to watch; `train_stage` gives them to the Trainer in
a locked run folder, resumes where asked, and writes the report section.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from nanochat import checkpoint_manager, fp8, fused_native, int8, report
from nanochat.common import UserError, checkpoints_dir
from nanochat.gpt import GPT, GPTConfig
from nanochat.memory import checkpoint_bytes, estimate_memory, format_bytes
from nanochat.optimizers import OptimizerConfig
from nanochat.plan import Plan, StepLoader, wants_compile
from nanochat.presets import TRAINING, OptimizerName
from nanochat.resuming import defaults_of, previous_run
from nanochat.run_folder import lock_run
from nanochat.runtime import Runtime
from nanochat.schedule import Schedule
from nanochat.stopping import EXIT_STOPPED, StoppedError, StopRequest, catch_signals
from nanochat.tokenizer import Tokenizer
from nanochat.tracking import MetricWriter, open_mirrors, wandb_project
from nanochat.training import Hook, Trainer

logger = logging.getLogger(__name__)

LEARNING_RATES = ("embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr")  # flags

AnyConfig = TypeVar("AnyConfig", bound="StageConfig")

# Pairs of settings of which each decides how a step is carried out.
_EXCLUSIVE = (
    ("--fp8", "--int8"),
    ("--fp8", "--shard=full"),
    ("--int8", "--shard=full"),
    ("--int8", "--compile=on"),
    ("--compile=on", "--shard=full"),
)
# Smallest and largest meaningful value of a flag. What is not here has a check of its own, but
# must be finite all the same.
_RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr"), (0, math.inf)),
    **dict.fromkeys(("weight_decay", "init_lr_frac", "grad_clip", "warmup_steps"), (0, math.inf)),
    **dict.fromkeys(("spike_limit", "bpb_limit", "max_minutes"), (0, math.inf)),
    **dict.fromkeys(("warmup_ratio", "warmdown_ratio", "final_lr_frac"), (0, 1)),
    **dict.fromkeys(("eval_every", "save_every"), (-1, math.inf)),
}


@dataclass(frozen=True)
class StageConfig:
    """Flags of every training stage. A stage overrides defaults and adds its own."""

    run: str = "dummy"
    """Name of the run for Weights & Biases; "dummy" logs to files only."""
    tensorboard: bool = False
    """Write metrics for TensorBoard, too."""
    data: str | None = None
    """embedded, fineweb-edu, climbmix or a folder of parquet shards; default: what came before."""
    device_type: str = ""
    """cuda, cpu or mps; default: the best there is."""
    dtype: str = ""
    """Compute dtype: bfloat16, float16 or float32; default: bfloat16 where it is fast."""
    model_tag: str | None = None
    """Folder name of the run; default: d<depth>."""
    num_iterations: int = -1
    """Optimizer steps; -1 = derived."""
    device_batch_size: int = 32
    """Rows of one forward pass on each device."""
    optimizer: OptimizerName | None = None
    """classic or modern (refined Muon, more schedules); default: the model's preset's."""
    embedding_lr: float | None = None
    """Learning rate of the token embedding (AdamW); default: the optimizer's."""
    unembedding_lr: float | None = None
    """Learning rate of the output head (AdamW); default: the optimizer's."""
    matrix_lr: float | None = None
    """Learning rate of the transformer's matrices (Muon); default: the optimizer's."""
    scalar_lr: float | None = None
    """Learning rate of the modern model's scalars (AdamW); default: the optimizer's."""
    weight_decay: float | None = None
    """Of embedding and head (classic) or of matrices (modern); default: the optimizer's."""
    init_lr_frac: float = 1.0
    """Multiplies all learning rates."""
    warmup_steps: int | None = None
    """Steps of linear warmup; default: the optimizer's."""
    warmup_ratio: float = 0.0
    """Warmup as a share of the run, if there are no warmup steps."""
    warmdown_ratio: float | None = None
    """Share of the run over which learning rates fall at its end; default: the optimizer's."""
    final_lr_frac: float | None = None
    """Learning rates at the very end, as a share; default: the optimizer's."""
    grad_clip: float | None = None
    """Largest global gradient norm, 0 = off; default: the optimizer's."""
    eval_every: int = 150
    """Steps between validations; 0 = only at the end, -1 = never."""
    eval_tokens: int = 20 * 524_288
    """Validation tokens."""
    save_every: int = -1
    """Steps between checkpoints; 0 or -1 = only at the end."""
    keep_last: int = 2
    """Checkpoints kept; the one before the newest is for a damaged disk."""
    keep_best: bool = False
    """Save each validated step that is better than all before, and keep the best, too."""
    background_save: bool = True
    """Write checkpoints while training goes on."""
    max_minutes: float = 0.0
    """Save and stop, with exit code 85, before the command has run this long; 0 = no limit."""
    spike_limit: float = 2.0
    """Stop when the smoothed loss stays this many nats above its recent lowest; 0 = never."""
    bpb_limit: float = 0.0
    """Fail when the last validation is above this; 0 = when one shows that training has failed."""
    log_every: int = 10
    """Steps between console lines."""
    resume: bool = False
    """Continue from this run's newest valid checkpoint, if there is one."""
    resume_from_step: int = -1
    """Continue from this saved step instead, and rename later ones; -1 = as --resume says."""
    dry_run: bool = False
    """Print sizes, steps and where results would go; train nothing."""
    compile: str = "auto"
    """Compile the step: auto, on or off."""
    fp8: bool = False
    """Multiply large matrices in fp8 (NVIDIA Ada, Hopper and later); evaluate without."""
    int8: bool = False
    """Multiply matrices in 8-bit integers (CPUs with AMX or AVX-512 BF16); evaluate without."""
    shard: Literal["optimizer", "full"] = "optimizer"
    """What ranks share out: optimizer states; or weights and gradients, too (FSDP2)."""
    seed: int = 42
    """Seed of everything random."""

    def settled(self: AnyConfig, optimizer: OptimizerName, **defaults: float) -> AnyConfig:
        """With a value for every flag that was left to the optimizer.

        optimizer: of the model, if no flag names one. defaults: those of the stage, which come
        before those of the optimizer.
        """
        chosen = self.optimizer or optimizer
        values: dict[str, Any] = TRAINING[chosen] | defaults
        if self.warmup_ratio:  # given, so that the optimizer's own steps do not come before it
            values["warmup_steps"] = 0
        missing = {name: value for name, value in values.items() if getattr(self, name) is None}
        return dataclasses.replace(self, optimizer=chosen, **missing)

    def optimizer_config(self) -> OptimizerConfig:
        """The optimizer part of settled flags."""
        is_refined, decay = self.optimizer == "modern", setting(self.weight_decay)
        return OptimizerConfig(
            embedding_lr=setting(self.embedding_lr),
            unembedding_lr=setting(self.unembedding_lr),
            matrix_lr=setting(self.matrix_lr),
            scalar_lr=setting(self.scalar_lr),
            weight_decay=0.0 if is_refined else decay,
            matrix_weight_decay=decay if is_refined else 0.0,
            is_refined=is_refined,
        )

    def schedule(self, num_iterations: int) -> Schedule:
        """The schedule part of settled flags."""
        return Schedule(
            num_iterations=num_iterations,
            warmup_steps=self.warmup_steps or round(self.warmup_ratio * num_iterations),
            warmdown_ratio=setting(self.warmdown_ratio),
            peak=self.init_lr_frac,
            final_fraction=setting(self.final_lr_frac),
            is_refined=self.optimizer == "modern",
        )


def setting(value: float | None) -> float:
    """A flag that `StageConfig.settled` has filled."""
    assert value is not None
    return value


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
    optimizer: OptimizerName = "classic",
    warm_start: checkpoint_manager.Checkpoint | None = None,
    dry_run_trains: bool = False,
) -> int:
    """Run one stage to its end; returns the exit code, 0 or 85 when it was asked to stop.

    title: heading of the report section. facts: stage-specific entries of state.json; the
    settings, the model's sizes and the tokenizer's hash are added here. optimizer: the model's,
    which a flag may overrule. warm_start: whose optimizer
    state a run begins with that is not resumed. dry_run_trains: a dry run of this stage trains and
    writes nothing, instead of telling its sizes and ending.
    """
    stop = StopRequest(config.max_minutes)
    config = config.settled(optimizer)
    check_positive(config, "keep_last", "log_every")
    _check_together(config)
    if config.fp8:
        fp8.check_device(runtime.device)
    if config.int8:
        int8.check_possible(model.config, runtime.device, runtime.compute_dtype)
    tag = config.model_tag or f"d{model.config.n_layer}"
    run_dir = checkpoints_dir(stage) / tag
    sequence_len = model.config.sequence_len
    plan = Plan(
        schedule=config.schedule(num_iterations),
        micro_batch_rows=config.device_batch_size,
        grad_clip=setting(config.grad_clip),
        spike_limit=config.spike_limit,
        save_every=max(config.save_every, 0),
        keep_last=config.keep_last,
        keep_best=config.keep_best,
        background_save=config.background_save,
        write=not config.dry_run,
        fp8=config.fp8,
        int8=config.int8,
        shard=config.shard,
        log_every=config.log_every,
        compile=config.shard != "full"
        and wants_compile(
            config.compile,
            model.config,
            device=runtime.device,
            dtype=runtime.compute_dtype,
            training_flops=model.estimate_flops() * rows_per_step * sequence_len * num_iterations,
        ),
    )
    facts = facts | {
        "stage": stage,
        "optimizer": config.optimizer,
        "compute_dtype": str(runtime.compute_dtype).removeprefix("torch."),
        "model_config": model.config.to_json(),
        "config": dataclasses.asdict(config),
        "num_iterations": num_iterations,
        "total_batch_size": rows_per_step * sequence_len,
        "sequence_len": sequence_len,
        "tokenizer_hash": tokenizer.hash,
    }
    _announce(title, model, plan, facts, runtime)
    if config.dry_run:
        _announce_writes(run_dir, plan, model, runtime)
        if not dry_run_trains:
            return 0
    trainer = Trainer(
        model,
        loader,
        plan=plan,
        optimizer=config.optimizer_config(),
        runtime=runtime,
        run_dir=run_dir,
        tokenizer_dir=tokenizer_dir,
        facts=facts,
        hooks=hooks,
        stop=stop,
    )
    try:
        with catch_signals(stop):
            if config.dry_run:
                _start_warm(trainer, config, warm_start)
                trainer.run()
                return 0
            with lock_run(run_dir, runtime.world):
                _train(trainer, config, facts, warm_start)
    except StoppedError as stopped:
        logger.warning("%s; run the same command with --resume to go on", stopped)
        return EXIT_STOPPED
    if runtime.world.is_main:
        _report(title, trainer, facts)
    return 0


def _start_warm(
    trainer: Trainer, config: StageConfig, parent: checkpoint_manager.Checkpoint | None
) -> None:
    """Begin with the parent's optimizer state, if there is one to begin with."""
    if parent is None:
        return
    trainer.load_optimizer(parent)
    logger.info(
        "warm start: Muon's momentum and AdamW's moments are those of %s model %s, step %d; "
        "learning rates are this run's: %s, each x %g",
        *(parent.stage, parent.tag, parent.step),
        ", ".join(f"{name} {getattr(config, name):g}" for name in LEARNING_RATES),
        config.init_lr_frac,
    )


def _train(
    trainer: Trainer,
    config: StageConfig,
    facts: dict[str, Any],
    warm_start: checkpoint_manager.Checkpoint | None,
) -> None:
    """Run the trainer in its folder, from where an earlier run ended if it is to be resumed."""
    run_dir, world = trainer.saver.run_dir, trainer.runtime.world
    step = config.resume_from_step if config.resume_from_step >= 0 else None
    resume = config.resume or step is not None
    checkpoint = previous_run(
        run_dir, facts, resume=resume, world=world, step=step, defaults=defaults_of(config)
    )
    if world.is_main:
        report.describe_machine()
        mirrors = open_mirrors(
            config.run,
            project=wandb_project(facts["stage"]),
            config=facts,
            tensorboard_dir=run_dir / "tensorboard" if config.tensorboard else None,
            first_step=0 if checkpoint is None else checkpoint.step + 1,
        )
        trainer.metrics = MetricWriter(run_dir / "metrics.jsonl", mirrors=mirrors)
        if checkpoint is None:
            trainer.metrics.truncate(-1)  # rows of a start that came to no checkpoint
    try:
        if checkpoint is not None:
            trainer.resume(checkpoint)
        else:
            _start_warm(trainer, config, warm_start)
        trainer.run()
    finally:
        if trainer.metrics is not None:
            trainer.metrics.close()


def _announce(title: str, model: GPT, plan: Plan, facts: dict[str, Any], runtime: Runtime) -> None:
    counts = model.count_parameters()
    groups = ", ".join(f"{name} {count:,}" for name, count in counts.items() if name != "total")
    steps = plan.schedule.num_iterations
    tokens = steps * facts["total_batch_size"]
    logger.info("%s: %s parameters (%s)", title, f"{counts['total']:,}", groups)
    sizes = model.config
    logger.info(
        "%d layers, width %d, %d query and %d key heads of %d, context %s, vocabulary %s",
        sizes.n_layer,
        sizes.n_embd,
        sizes.n_head,
        sizes.num_kv_heads,
        sizes.head_dim,
        f"{sizes.sequence_len:,}",
        f"{sizes.vocab_size:,}",
    )
    if facts["stage"] == "rl":  # how long answers are nobody knows before they are written
        answers = facts["total_batch_size"] // facts["sequence_len"]
        how = _how(plan, model.config, runtime)
        logger.info("%s steps x %s answers, %s", f"{steps:,}", f"{answers:,}", how)
        return
    logger.info(
        "%s steps x %s tokens = %s tokens, %.2e FLOPs, %s%s",
        f"{steps:,}",
        f"{facts['total_batch_size']:,}",
        f"{tokens:,}",
        tokens * model.estimate_flops(),
        _how(plan, model.config, runtime),
        f", {tokens / counts['total']:.1f} tokens per parameter",
    )


def _how(plan: Plan, config: GPTConfig, runtime: Runtime) -> str:
    """What the passes of a step run on."""
    if plan.compile:
        return "compiled"
    if runtime.device.type != "cpu" or not fused_native.trains(config, runtime.compute_dtype):
        return "uncompiled"
    without = fused_native.left_to_pytorch(config)
    kernels = "compiled kernels" + (" in 8-bit integers" if plan.int8 else "")
    return kernels + (f" (not for {' and '.join(without)})" if without else "")


def _check_together(config: StageConfig) -> None:
    """UserError for two settings that exclude one another."""
    given = {
        "--fp8": config.fp8,
        "--int8": config.int8,
        "--compile=on": config.compile == "on",
        "--shard=full": config.shard == "full",
    }
    for one, other in _EXCLUSIVE:
        if given[one] and given[other]:
            raise UserError(f"{one} and {other} do not go together; leave one of them out")


def _announce_writes(run_dir: Path, plan: Plan, model: GPT, runtime: Runtime) -> None:
    """What a dry run says beyond `_announce`: memory, and what would be written where."""
    memory = estimate_memory(
        model,
        rows=plan.micro_batch_rows,
        compute_dtype=runtime.compute_dtype,
        world_size=runtime.world.size,
        shard=plan.shard,
        background_save=plan.background_save,
    )
    parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in memory.items())
    logger.info("about %s of memory on each device (%s)", format_bytes(sum(memory.values())), parts)
    steps = plan.schedule.num_iterations
    saves = 1 + (steps - 1) // plan.save_every if plan.save_every else 1
    logger.info(
        "dry run: nothing is written; a run would write %d checkpoint(s) of about %s to %s and "
        "keep %d%s, %s beside them, and a section of the report",
        saves,
        format_bytes(checkpoint_bytes(model, shard=plan.shard)),
        run_dir,
        min(saves, plan.keep_last),
        " and the best" if plan.keep_best else "",
        "metrics.jsonl",
    )


def _report(title: str, trainer: Trainer, facts: dict[str, Any]) -> None:
    state = trainer.state
    results = {
        "Number of parameters": trainer.model.count_parameters()["total"],
        "Number of iterations": facts["num_iterations"],
        "Number of training tokens": state.tokens,
        "Data": facts["data"],
        "DDP world size": trainer.runtime.world.size,
        "Compute dtype": facts["compute_dtype"],
        "Training seconds": state.seconds,
        "Tokens per second": trainer.progress.speed.tokens_per_second
        or state.tokens / max(state.seconds, 1e-9),
        "Final training loss": state.smooth_loss,
    }
    results |= {f"Final {name.replace('_', ' ')}": v for name, v in state.evaluations.items()}
    results |= {f"Minimum {name.replace('_', ' ')}": v for name, v in state.best.items()}
    report.append(title, [facts["config"], results, {"run_dir": str(trainer.saver.run_dir)}])


def optimizer_of(parent: checkpoint_manager.Checkpoint) -> OptimizerName:
    """What the parent was trained with; of a checkpoint that does not say, classic."""
    return "modern" if parent.state.get("optimizer") == "modern" else "classic"


def load_parent(parent: checkpoint_manager.Checkpoint, sequence_len: int | None = None) -> GPT:
    """The parent's model in fp32, with another training context if one is asked for."""
    sizes = parent.state["model_config"]
    if sequence_len is not None:
        sizes = sizes | {"sequence_len": sequence_len}
    model = GPT(GPTConfig.from_json(sizes))
    model.load_state_dict(parent.load_model())
    return model


def origin(parent: checkpoint_manager.Checkpoint, source: str) -> dict[str, object]:
    """What the checkpoint's state says about where its weights came from."""
    return {"stage": source, "step": parent.step, "weights": parent.weights_hash}


def check_numbers(config: StageConfig) -> None:
    """Raise UserError for the first flag whose number is not finite or out of its range.

    To be called before anything is read, let alone moved. Flags that were left out are None.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        flag = f"--{field.name.replace('_', '-')}"
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{flag} is {value}; give a finite number")
        low, high = _RANGES.get(field.name, (-math.inf, math.inf))
        if value is None or not isinstance(value, int | float) or low <= value <= high:
            continue
        wanted = f"at least {low:g}" if high == math.inf else f"a number from {low:g} to {high:g}"
        raise UserError(f"{flag} is {value}; give {wanted}")


def check_positive(config: Any, *names: str) -> None:
    """Raise UserError for the first of the named flags that is not at least 1."""
    for name in names:
        value = getattr(config, name)
        if value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")


def check_count(config: Any, name: str, default: str) -> None:
    """Raise UserError unless the named flag is at least 1, or -1 for what `default` says."""
    value = getattr(config, name)
    if value < 1 and value != -1:
        flag = name.replace("_", "-")
        raise UserError(f"--{flag} is {value}; give at least 1, or -1 for {default}")


def whole_rows(total_batch_size: int, sequence_len: int) -> int:
    """Rows of a step of `total_batch_size` tokens; UserError when the division is not whole."""
    if total_batch_size % sequence_len:
        nearest = max(1, round(total_batch_size / sequence_len)) * sequence_len
        raise UserError(
            f"total batch of {total_batch_size:,} tokens is not a multiple of the context of "
            f"{sequence_len}; use --total-batch-size={nearest}"
        )
    return total_batch_size // sequence_len
