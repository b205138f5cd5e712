"""CORE: few-shot accuracy of a base model over the tasks of a bundle, centered by chance.

The definition is that of DCLM (arXiv:2406.11794, section 3.5): centered accuracy is 0 at chance
and 1 at perfection, CORE is its plain mean over tasks. A slow implementation that scores one
sequence at a time is in tests/reference; every decision must equal the one there.
`core_bundle` makes the prompts, `core_tokens` their tokens, `core_scoring` decides,
`core_progress` remembers.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nanochat.common import UserError
from nanochat.core_bundle import CoreTask, Item, load_bundle
from nanochat.core_progress import CoreProgress
from nanochat.core_scoring import LanguageModel, decide
from nanochat.core_tokens import Tokenizer, sequences_of
from nanochat.runtime import Runtime, World

logger = logging.getLogger(__name__)

# Items tokenized together: enough that sorting by length leaves little padding in a batch, few
# enough that a killed evaluation loses little.
ITEMS_PER_GROUP = 256
_BAR_CHARS, _TERMINAL_CHARS = 20, 100


@dataclass(frozen=True)
class TaskScore:
    """How a model did on one task."""

    label: str
    accuracy: float
    centered: float
    num_items: int
    seconds: float
    decisions: tuple[bool, ...]
    """Right or wrong, item by item in the task's order."""


@dataclass(frozen=True)
class CoreResult:
    """Scores of the tasks whose items are there, and the labels of those whose are not."""

    tasks: tuple[TaskScore, ...]
    missing: tuple[str, ...]
    bundle_name: str = ""
    """Whose tasks, where they are not the 22 published ones."""
    items_a_task: int = 0
    """Of the larger tasks only so many items were scored; 0 = all of each task."""

    @property
    def core(self) -> float:
        """Mean centered accuracy of the scored tasks."""
        return sum(task.centered for task in self.tasks) / len(self.tasks)

    @property
    def is_partial(self) -> bool:
        """Whether tasks are missing, so that `core` compares with no complete CORE."""
        return bool(self.missing)

    @property
    def label(self) -> str:
        """The name `core` must be shown under."""
        notes = [self.bundle_name] if self.bundle_name else []
        if self.is_partial:
            num_tasks = len(self.tasks) + len(self.missing)
            notes.append(f"partial, {len(self.tasks)} of {num_tasks} tasks")
        if self.items_a_task:
            notes.append(f"{self.items_a_task} a task")
        return f"CORE ({', '.join(notes)})" if notes else "CORE"

    def to_csv(self) -> str:
        """Padded columns Task, Accuracy, Centered; the last row is CORE."""
        # No comma inside the label: it is a column.
        return self._table(self.label.replace(",", ""))

    def to_text(self) -> str:
        """The same for the console, with the label as it is."""
        return self._table(self.label)

    def _table(self, label: str) -> str:
        lines = [f"{'Task':<35}, {'Accuracy':<10}, {'Centered':<10}"]
        lines += [f"{t.label:<35}, {t.accuracy:<10.6f}, {t.centered:<10.6f}" for t in self.tasks]
        lines.append(f"{label:<35}, {'':<10}, {self.core:<10.6f}")
        return "\n".join(lines) + "\n"


def evaluate_core(
    model: LanguageModel,
    tokenizer: Tokenizer,
    bundle_dir: Path,
    max_per_task: int,
    runtime: Runtime,
    *,
    progress_dir: Path | None = None,
    bundle_name: str = "",
) -> CoreResult:
    """Score every task of a bundle, each on its first `max_per_task` items if that is > 0.

    All ranks take part and get the same result. UserError for a broken bundle; a task without
    item file is named in the log and in the result. progress_dir: a folder on a disk all ranks
    see, named after model and settings; an evaluation that was killed goes on from there.
    bundle_name: stands in the score's label.
    """
    present, missing, is_sample = runtime.world.together(
        lambda: _read_bundle(bundle_dir, max_per_task)
    )
    progress = CoreProgress(progress_dir, runtime.world)
    bar = _Bar(sum(len(items) for _, items in present), runtime.world.is_main)
    scores: list[TaskScore] = []
    for number, (task, items) in enumerate(present, 1):
        score = evaluate_task(model, tokenizer, task, items, progress, bar)
        scores.append(score)
        bar.scored(score)
        bar.clear()
        logger.info(
            "%d/%d %s  %d-shot  accuracy %.4f  centered %+.4f  %.1f s",
            *(number, len(present), task.label, task.num_shots),
            *(score.accuracy, score.centered, score.seconds),
        )
    progress.finish()
    return CoreResult(tuple(scores), missing, bundle_name, max_per_task if is_sample else 0)


def check_max_per_task(bundle_dir: Path, max_per_task: int) -> None:
    """Raise UserError when a task needs more items for its solved examples. Reads no items."""
    for task in load_bundle(bundle_dir):
        if task.path.exists():
            task.check_max_items(max_per_task)


def check_core(
    tokenizer: Tokenizer, bundle_dir: Path, max_per_task: int, *, max_length: int, world: World
) -> None:
    """Raise UserError, on all ranks, for a bundle of which `evaluate_core` would give no score.

    max_length: tokens that the model holds. Tokenizes what this rank will have to decide, so that
    a `CachedTokenizer` has read it when the evaluation begins.
    """

    def check() -> None:
        for task, items in _read_bundle(bundle_dir, max_per_task)[0]:
            own = range(world.rank, len(items), world.size)
            for start in range(0, len(own), ITEMS_PER_GROUP):
                group = own[start : start + ITEMS_PER_GROUP]
                sequences_of(tokenizer, task, items, group, max_length=max_length)

    world.together(check)


def _read_bundle(
    bundle_dir: Path, max_per_task: int
) -> tuple[list[tuple[CoreTask, list[Item]]], tuple[str, ...], bool]:
    """The tasks that are here with their items, labels of the missing, whether items are left out.

    All at once: a broken file of the last task must not cost the time of all before.
    """
    tasks = load_bundle(bundle_dir)
    present = [task for task in tasks if task.path.exists()]
    missing = tuple(task.label for task in tasks if not task.path.exists())
    if not present:
        raise UserError(f"no task of {bundle_dir / 'core.yaml'} has its file in eval_data")
    if missing:
        logger.warning("CORE is partial: no items for %s", ", ".join(missing))
    check_max_per_task(bundle_dir, max_per_task)
    items = [task.items() for task in present]
    limit = max_per_task if max_per_task > 0 else None
    is_sample = limit is not None and any(len(some) > limit for some in items)
    chosen = [(task, some[:limit]) for task, some in zip(present, items, strict=True)]
    return chosen, missing, is_sample


def evaluate_task(
    model: LanguageModel,
    tokenizer: Tokenizer,
    task: CoreTask,
    items: Sequence[Item],
    progress: CoreProgress,
    bar: _Bar | None = None,
) -> TaskScore:
    """Score one task; the ranks share what is not decided yet."""
    started = time.perf_counter()
    left = progress.remaining(task.label, len(items))
    bar = bar or _Bar(len(items), False)
    bar.add(task.label, len(items) - len(left) * progress.world.size)

    def decide_own() -> dict[int, bool]:
        own: dict[int, bool] = {}
        for start in range(0, len(left), ITEMS_PER_GROUP):
            group = left[start : start + ITEMS_PER_GROUP]
            decisions = decide(model, tokenizer, task, items, group)
            progress.add(task.label, group, decisions)
            own.update(zip(group, decisions, strict=True))
            bar.add(task.label, len(group) * progress.world.size)
        return own

    together = progress.gathered(task.label, progress.world.together(decide_own))
    accuracy = sum(together.values()) / len(items)
    return TaskScore(
        label=task.label,
        accuracy=accuracy,
        centered=task.center(accuracy),
        num_items=len(items),
        seconds=time.perf_counter() - started,
        decisions=tuple(together.values()),
    )


class _Bar:
    """One line on a terminal: items done, time left, mean centered accuracy of tasks so far."""

    def __init__(self, num_items: int, is_shown: bool) -> None:
        self._total, self._done = num_items, 0
        self._is_shown = is_shown and sys.stderr.isatty()
        self._started = time.perf_counter()
        self._centered: list[float] = []

    def add(self, label: str, num_items: int) -> None:
        self._done += num_items
        if not self._is_shown or self._done <= 0:
            return
        elapsed = time.perf_counter() - self._started
        minutes = elapsed / self._done * max(self._total - self._done, 0) / 60
        filled = min(self._done * _BAR_CHARS // self._total, _BAR_CHARS)
        running = "-"  # no task is complete
        if self._centered:
            running = f"{sum(self._centered) / len(self._centered):+.4f}"
        line = (
            f"[{'=' * filled}{' ' * (_BAR_CHARS - filled)}] {self._done}/{self._total} items  "
            f"{label}  CORE so far {running}  {minutes:.0f} min left"
        )
        sys.stderr.write("\r" + line[:_TERMINAL_CHARS].ljust(_TERMINAL_CHARS))
        sys.stderr.flush()

    def scored(self, score: TaskScore) -> None:
        self._centered.append(score.centered)

    def clear(self) -> None:
        """Make room for a line of the log."""
        if self._is_shown:
            sys.stderr.write("\r" + " " * _TERMINAL_CHARS + "\r")
            sys.stderr.flush()
