"""A series of base models: which runs it has, what each command is, and what a finished run says.

A miniseries trains one model a depth, at equal tokens per parameter. Scaling laws train every depth
at every budget of training FLOPs. Each run is a `scripts.base_train` with a model tag of its own.
"""

from __future__ import annotations

import dataclasses
import math
import re
import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from nanochat import configurator, pretraining
from nanochat.checkpoint_manager import Checkpoint, newest_checkpoint
from nanochat.common import UserError, base_dir, checkpoints_dir
from nanochat.gpt import GPT
from nanochat.gpt_config import GPTConfig
from nanochat.pretraining import CORE, CORE_PARTIAL, DEFAULT_DATA, PretrainingConfig
from nanochat.resuming import defaults_of, differences
from nanochat.run_folder import lock_holder
from nanochat.scaling import scaling_parameters
from nanochat.stage import setting
from nanochat.sweep_results import Row, short
from nanochat.tokenizer import Tokenizer
from nanochat.validation import BPB

Kind = Literal["miniseries", "scaling_laws"]
Number = TypeVar("Number", int, float)

MODULE = "scripts.base_train"
# The public nanochat's runs/miniseries.sh and runs/scaling_laws.sh (2026).
DEPTHS: dict[Kind, tuple[int, ...]] = {
    "miniseries": tuple(range(12, 27, 2)),
    "scaling_laws": tuple(range(10, 21, 2)),
}
BUDGETS = (1e18, 2.15e18, 4.64e18, 1e19)  # three to a factor of ten
# What every run begins with and the caller may overrule. CORE is measured once, at the end, over
# all items: no run has so many steps.
TRAINING_FLAGS = (
    "--core_metric_every=1000000000",
    "--core_metric_max_per_task=-1",
    "--sample_every=-1",
)
# What the sweep itself says of a run.
OWN_FLAGS = (
    *("depth", "model_tag", "num_iterations", "target_flops", "target_param_data_ratio"),
    *("model_dim", "resume", "resume_from_step", "dry_run"),
)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Sweep:
    """What was asked for. Raises UserError for what no sweep can be."""

    kind: Kind
    name: str
    depths: tuple[int, ...]
    budgets: tuple[float, ...]
    """Training FLOPs; empty in a miniseries."""
    ratio: float | None
    """Tokens per parameter of a miniseries; None = the optimizer's."""
    training_flags: tuple[str, ...]
    """Of every run, as they were given."""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise UserError(
                f"--name is {self.name!r}; it becomes part of folder names: give letters, digits, "
                "dots, dashes and underscores"
            )
        given = [flag for flag in self.training_flags if _name_of(flag) in OWN_FLAGS]
        given += [flag for flag in self._spelled_out() if _name_of(flag) in OWN_FLAGS]  # of a file
        if given:
            raise UserError(f"{given[0]} behind -- is what the sweep itself sets; leave it out")

    @property
    def folder(self) -> Path:
        """Where the results lie."""
        if self.kind == "miniseries":
            return base_dir() / f"{self.name}_miniseries_results"
        return base_dir() / f"scaling_laws_results_{self.name}"

    @property
    def title(self) -> str:
        """Heading of the report's section."""
        return f"{self.kind.replace('_', ' ').capitalize()} {self.name}"

    @property
    def grid(self) -> list[tuple[float | None, int]]:
        """Budget and depth of every run, the cheapest first."""
        return [(budget, depth) for budget in self.budgets or (None,) for depth in self.depths]

    def tag(self, budget: float | None, depth: int) -> str:
        """The model tag of one run."""
        of_budget = "" if budget is None else f"{short(budget)}_"
        return f"{self.name}_{of_budget}d{depth}"

    def flags(self, budget: float | None, depth: int) -> tuple[str, ...]:
        """The flags of one run's base_train. They stand by themselves: no file is named in them."""
        own = [f"--depth={depth}", f"--model_tag={self.tag(budget, depth)}"]
        if budget is not None:
            own.append(f"--target_flops={budget:.15g}")
        elif self.ratio is not None:
            own.append(f"--target_param_data_ratio={self.ratio}")
        return (*own, *self._spelled_out())

    def _spelled_out(self) -> list[str]:
        """What every run is given and is not base_train's default, one word a flag."""
        given = configurator.parse(PretrainingConfig, (*TRAINING_FLAGS, *self.training_flags))
        values = {field: getattr(given, field.name) for field in dataclasses.fields(given)}
        return [f"--{f.name}={value}" for f, value in values.items() if value != f.default]


def _name_of(word: str) -> str | None:
    """The name of the setting that a word sets, --no-name as well; None for a value."""
    if not word.startswith("--"):
        return None
    return word.partition("=")[0].removeprefix("--").replace("-", "_").removeprefix("no_")


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep, with all that follows from its flags."""

    budget: float | None
    flags: tuple[str, ...]
    asked: PretrainingConfig
    """What the flags say."""
    config: PretrainingConfig
    """The same with what was left to the preset."""
    sizes: GPTConfig
    num_parameters: int
    num_scaling_parameters: int
    num_horizon_parameters: int
    """Those that tokens per parameter count."""
    flops_per_token: float
    num_iterations: int
    data: str
    tokenizer_hash: str

    @property
    def tag(self) -> str:
        """The model tag."""
        assert self.config.model_tag is not None
        return self.config.model_tag

    @property
    def run_dir(self) -> Path:
        """Where it keeps its checkpoints."""
        return checkpoints_dir("base") / self.tag

    @property
    def command(self) -> str:
        """The command on one process, as one types it."""
        return shlex.join(["python", "-m", MODULE, *self.flags])

    @property
    def tokens(self) -> int:
        """Training tokens."""
        return self.num_iterations * int(setting(self.config.total_batch_size))

    @property
    def flops(self) -> float:
        """Training FLOPs."""
        return self.tokens * self.flops_per_token

    def describe(self) -> str:
        """Its sizes in one line."""
        return (
            f"{self.tag}: {self.num_parameters:,} parameters "
            f"({self.num_scaling_parameters:,} of blocks and head), {self.num_iterations:,} steps "
            f"x {int(setting(self.config.total_batch_size)):,} tokens = {self.tokens:,} tokens, "
            f"{self.flops:.2e} FLOPs, {self.tokens / self.num_horizon_parameters:.1f} tokens per "
            "parameter"
        )

    def check_row(self, row: Row, path: Path) -> None:
        """Raise UserError when a row of this tag was made by another command."""
        words = shlex.split(row.command)
        if words[:3] != ["python", "-m", MODULE]:
            raise UserError(f"{path}: the row of {row.model_tag} has no command of {MODULE}")
        saved = {
            "config": dataclasses.asdict(configurator.parse(PretrainingConfig, words[3:])),
            "data": row.data,
            "tokenizer_hash": row.tokenizer,
        }
        facts = {
            "config": dataclasses.asdict(self.asked),
            "data": self.data,
            "tokenizer_hash": self.tokenizer_hash,
        }
        if different := differences(saved, facts):
            raise UserError(
                f"the row of {row.model_tag} in {path} was made with "
                f"{'; '.join(different.values())}. Give the same flags, or another --name for "
                "another sweep"
            )

    def check_unused(self) -> None:
        """Raise UserError when a process trains this run."""
        holder = lock_holder(self.run_dir)
        if holder is not None:
            raise UserError(
                f"{self.run_dir} is in use by process {holder}, which a sweep that was killed may "
                "have left behind; wait for it or stop it, then start the same command again"
            )

    def earlier_checkpoint(self) -> Checkpoint | None:
        """The newest sound checkpoint in this run's folder; UserError when it is another run's.

        `--resume` by itself would go on with other learning rates or another validation.
        """
        checkpoint = newest_checkpoint(self.run_dir, weights_only=True)
        if checkpoint is None:
            return None
        facts = {
            "config": dataclasses.asdict(self.config),
            "model_config": self.sizes.to_json(),
            "num_iterations": self.num_iterations,
            "data": self.data,
            "tokenizer_hash": self.tokenizer_hash,
        }
        if different := differences(checkpoint.state, facts, defaults_of(self.config)):
            raise UserError(
                f"{self.run_dir} holds a run that was made with {'; '.join(different.values())}. "
                "Give the same flags, another --name, or delete that folder"
            )
        return checkpoint

    def finished_row(self) -> Row | None:
        """What the run's checkpoint says of it; None when it has not come to its end."""
        checkpoint = self.earlier_checkpoint()
        if checkpoint is None or checkpoint.step < self.num_iterations:
            return None
        loop: dict[str, Any] = checkpoint.state["loop"]
        measured: dict[str, float] = loop["evaluations"]
        if loop["evaluated_step"] != checkpoint.step or BPB not in measured:
            return None  # it was stopped before the last evaluation
        return Row(
            flops_budget=self.budget,
            depth=self.sizes.n_layer,
            model_dim=self.sizes.n_embd,
            num_params=self.num_parameters,
            num_scaling_params=self.num_scaling_parameters,
            num_iterations=checkpoint.step,
            tokens_trained=loop["tokens"],
            param_data_ratio=loop["tokens"] / self.num_horizon_parameters,
            val_bpb=measured[BPB],
            core_score=measured.get(CORE),
            train_time_sec=loop["seconds"],
            train_flops=loop["tokens"] * self.flops_per_token,
            core_partial=measured.get(CORE_PARTIAL),
            model_tag=self.tag,
            data=self.data,
            tokenizer=self.tokenizer_hash,
            command=self.command,
        )


def plan(sweep: Sweep, tokenizer: Tokenizer) -> list[PlannedRun]:
    """All runs of a sweep; UserError, naming the run, for what one of them could not be."""
    return [plan_run(sweep, budget, depth, tokenizer) for budget, depth in sweep.grid]


def plan_run(sweep: Sweep, budget: float | None, depth: int, tokenizer: Tokenizer) -> PlannedRun:
    """Sizes and steps of one run, by the rules of base_train. No weights are made."""
    flags = sweep.flags(budget, depth)
    asked = configurator.parse(PretrainingConfig, flags)
    pretraining.check(asked)
    if asked.eval_every < 0:
        raise UserError(
            f"--eval-every is {asked.eval_every}: without validation there is nothing to compare; "
            "give 0 for one at the end, or steps between them"
        )
    try:
        model = _unfilled_model(asked, tokenizer.vocab_size)
        config = pretraining.settle(asked, model)
        num_iterations = pretraining.planned_iterations(config, model)
    except UserError as error:
        raise UserError(f"{sweep.tag(budget, depth)}: {error}") from error
    counts = model.count_parameters()
    return PlannedRun(
        budget=budget,
        flags=flags,
        asked=asked,
        config=config,
        sizes=model.config,
        num_parameters=counts["total"],
        num_scaling_parameters=scaling_parameters(counts),
        num_horizon_parameters=pretraining.horizon_parameters(config, counts),
        flops_per_token=model.estimate_flops(),
        num_iterations=num_iterations,
        data=config.data or tokenizer.trained_on or DEFAULT_DATA,
        tokenizer_hash=tokenizer.hash,
    )


def _unfilled_model(asked: PretrainingConfig, vocab_size: int) -> GPT:
    """The model of a run without weights; UserError with a remedy where there can be none."""
    try:
        sizes = pretraining.sizes_at(asked, asked.depth, vocab_size)
    except UserError as error:
        raise UserError(
            f"{error}; change the model behind -- (its sizes with --head_dim or --aspect_ratio), "
            f"or leave depth {asked.depth} out of --depths"
        ) from error
    with torch.device("meta"):
        return GPT(sizes)


def check_rows(sweep: Sweep, rows: Iterable[Row], path: Path, tokenizer: Tokenizer) -> None:
    """Raise UserError unless all rows, also those of other depths, come from these flags."""
    for row in rows:
        if sweep.kind == "scaling_laws" and row.flops_budget is None:
            raise UserError(f"{path}: the row of {row.model_tag} has no flops_budget")
        run = plan_run(sweep, row.flops_budget, row.depth, tokenizer)
        run.check_row(row, path)


def parse_numbers(
    flag: str, text: str, kind: Callable[[str], Number], least: Number
) -> tuple[Number, ...]:
    """Different numbers separated by commas, in ascending order. UserError naming the flag."""
    if not text.strip():
        raise UserError(
            f"--{flag} is empty; give numbers with commas between them, or leave it out"
        )
    numbers = []
    for word in text.split(","):
        try:
            numbers.append(kind(word.strip()))
        except ValueError:
            raise UserError(
                f"--{flag} is {text!r}, where {word!r} is no number; give numbers with commas "
                "between them"
            ) from None
    if wrong := [number for number in numbers if not least <= number < math.inf]:
        raise UserError(f"--{flag} has {wrong[0]:g}; give numbers of at least {least:g}")
    if len(set(map(short, numbers))) < len(numbers):
        raise UserError(f"--{flag} is {text!r}, which has a number twice")
    return tuple(sorted(numbers))
