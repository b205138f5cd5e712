"""Scores of tasks while a model is trained: accuracies, and ChatCORE.

Measuring changes nothing of the training: letters are compared, answers are greedy, and weights,
data and random generators stay as they are. A task that cannot be scored costs its score, never
the run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nanochat import task_eval
from nanochat.common import NotScoredError
from nanochat.gpt import GPT
from nanochat.runtime import World
from nanochat.task_eval import Task
from nanochat.task_results import TaskResult, chat_core
from nanochat.tokenizer import Tokenizer

if TYPE_CHECKING:
    from nanochat.training import Trainer

logger = logging.getLogger(__name__)

# In metrics.jsonl and the report: over all tasks, and over those of multiple choice.
CHATCORE, CHATCORE_CAT = "chatcore", "chatcore_cat"

Limit = Callable[[Task], int]  # problems of a task; -1 = all


@dataclass(frozen=True)
class TaskScores:
    """How tasks are measured between two steps."""

    tokenizer: Tokenizer
    world: World
    batch_size: int
    """Problems at a time; what fits in training fits here."""
    limit: Limit

    def measurable(self, tasks: Sequence[Task], *, context: int) -> list[Task]:
        """The tasks that a model with that context can be asked; a warning names each other one."""
        kept = []
        for task in tasks:
            reason = self._reason_to_skip(task)
            if reason is None:
                try:
                    task_eval.check_task(
                        task, self.tokenizer, context=context, max_problems=self.limit(task)
                    )
                except NotScoredError as error:
                    reason = str(error)
            if reason is None:
                kept.append(task)
            else:
                logger.warning("%s is not measured: %s", task.name, reason)
        return kept

    def _reason_to_skip(self, task: Task) -> str | None:
        """Why some rank cannot judge a task; the same on all, for they measure together."""
        reasons = self.world.gather_objects(task.reason_to_skip())
        return next((reason for reason in reasons if reason is not None), None)

    def results(self, tasks: Sequence[Task], model: GPT, step: int) -> list[TaskResult]:
        """Results of the tasks at a step; a warning names each one that has none."""
        results = []
        for task in tasks:
            try:
                result = task_eval.run_task(
                    task,
                    self.tokenizer,
                    model,
                    max_problems=self.limit(task),
                    batch_size=self.batch_size,
                    world=self.world,
                )
            except NotScoredError as error:  # training is worth more than a score
                logger.warning("step %d has no %s: %s", step, task.name, error)
                continue
            logger.info("step %d  %s %.1f %%", step, task.name, 100 * result.accuracy)
            results.append(result)
        return results


@dataclass(frozen=True)
class Accuracies:
    """The action of a hook: the accuracy of each task."""

    scores: TaskScores
    tasks: Sequence[Task]

    def __call__(self, trainer: Trainer) -> dict[str, float]:
        """Accuracies, 0 to 1, of the model as it is now."""
        _forget(trainer, [_accuracy_of(task.name) for task in self.tasks])
        return accuracies(self.scores.results(self.tasks, trainer.model, trainer.state.step))


@dataclass(frozen=True)
class ChatCore:
    """The action of a hook: ChatCORE, the part of it that is multiple choice, and accuracies."""

    scores: TaskScores
    tasks: Sequence[Task]
    """Those that can be asked."""
    kinds: Mapping[str, str]
    """Every task that ChatCORE is made of: name -> "categorical" or "generative"."""
    label: str
    """What ChatCORE is shown as."""
    scope: str = ""
    """Of how many problems it is, if not of all."""

    def __call__(self, trainer: Trainer) -> dict[str, float]:
        """Both scores, where every task they are made of has one, and accuracies, 0 to 1.

        Accuracies have names of their own: they may be over fewer problems than others are.
        """
        step = trainer.state.step
        parts = [_accuracy_of(name, group=CHATCORE) for name in self.kinds]
        _forget(trainer, [CHATCORE, CHATCORE_CAT, *parts])
        results = self.scores.results(self.tasks, trainer.model, step)
        choices = [name for name, kind in self.kinds.items() if kind == "categorical"]
        by_choice = [result for result in results if result.name in choices]
        found = {
            CHATCORE: chat_core(results, list(self.kinds)),
            CHATCORE_CAT: chat_core(by_choice, choices),
        }
        scores = {name: value for name, value in found.items() if value is not None}
        shown = {CHATCORE: self.label, CHATCORE_CAT: f"{self.label}, multiple choice alone"}
        for name, value in scores.items():
            logger.info("step %d  %s %.4f%s", step, shown[name], value, self.scope)
        if CHATCORE not in scores:
            have = {result.name for result in results}
            missing = ", ".join(name for name in self.kinds if name not in have)
            logger.warning("step %d has no ChatCORE: it needs a score of %s", step, missing)
        return scores | accuracies(results, group=CHATCORE)


def accuracies(results: Sequence[TaskResult], *, group: str = "") -> dict[str, float]:
    """Accuracies by their names in metrics.jsonl; group: what these names begin with."""
    return {_accuracy_of(result.name, group=group): result.accuracy for result in results}


def _accuracy_of(task: str, *, group: str = "") -> str:
    return f"{group}/{task}_accuracy" if group else f"{task}_accuracy"


def _forget(trainer: Trainer, names: Sequence[str]) -> None:
    """Drop earlier values of these names: they are not those of this step, which may have none."""
    for name in names:
        trainer.state.evaluations.pop(name, None)
