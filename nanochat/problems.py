"""Problems, verdicts and rewards as they come from a task, which anybody may have written.

Whatever a task raises, or returns instead of what it must, becomes one sentence that names the
task and the problem. No torch.
"""

from __future__ import annotations

import logging
import math
import numbers
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from nanochat.common import NotScoredError, UserError
from nanochat.conversation import Conversation

logger = logging.getLogger(__name__)


class Problems(Protocol):
    """A numbered set of conversations."""

    @property
    def name(self) -> str:
        """Shown in messages."""
        ...

    def __len__(self) -> int:
        """Number of problems."""
        ...

    def __getitem__(self, index: int) -> Conversation:
        """A problem; its last message is the reference answer."""
        ...


class Judge(Problems, Protocol):
    """Problems whose answers are right or wrong."""

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Whether a completion is right."""
        ...


class Rewarder(Problems, Protocol):
    """Problems whose answers earn something."""

    def reward(self, conversation: Conversation, completion: str) -> float:
        """How good a completion is."""
        ...


def num_problems(task: Problems) -> int:
    """Return how many problems a task has; NotScoredError when it fails to say."""
    with _named(f"task {task.name}"):
        return len(task)


def problem(task: Problems, index: int) -> Conversation:
    """Return a problem that has an answer; NotScoredError naming one that cannot be used.

    An answer of nothing but spaces is none: every text ends with it, so that all would be right.
    """
    with _named(f"task {task.name}, problem {index}"):
        conversation: Any = task[index]
        if not isinstance(conversation, Conversation):
            raise UserError(f"it is {_shown(conversation)}, not a conversation")
        last = conversation.messages[-1]
        if last.role != "assistant":
            raise UserError(
                "it has no answer: a problem ends with a message of the assistant, this one with "
                f"a message of the {last.role}"
            )
        if not last.text.strip():
            raise UserError("its answer is empty")
        return conversation


def judged(task: Judge, index: int, conversation: Conversation, completion: str) -> bool:
    """Return the verdict of `task.evaluate`; NotScoredError when there is none."""
    with _named(f"task {task.name}, problem {index}"):
        return verdict(task.evaluate(conversation, completion))


def rewarded(task: Rewarder, index: int, conversation: Conversation, completion: str) -> float:
    """Return what `task.reward` gives, a finite number; NotScoredError when there is none."""
    with _named(f"task {task.name}, problem {index}"):
        value: Any = task.reward(conversation, completion)
        if not isinstance(value, numbers.Real | np.bool_) or not math.isfinite(value):
            raise UserError(f"reward returned {_shown(value)}; it must return a finite number")
        return float(value)


def verdict(value: Any) -> bool:
    """Return what `evaluate` has returned; UserError unless it is True or False."""
    if not isinstance(value, bool | np.bool_):
        raise UserError(f"evaluate returned {_shown(value)}; it must return True or False")
    return bool(value)


@contextmanager
def _named(place: str) -> Iterator[None]:
    """Only calls of a task belong inside: defects of our own keep their traceback."""
    try:
        yield
    except NotScoredError:  # such as a sandbox that cannot start; says all there is to say
        raise
    except UserError as error:
        raise NotScoredError(f"{place}: {error}") from error
    except Exception as error:
        logger.debug("%s", place, exc_info=True)
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"({Path(frame.filename).name}, line {frame.lineno})"
        text = " ".join([type(error).__name__, *str(error).split()])
        raise NotScoredError(f"{place}: {text} {where}") from error


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
