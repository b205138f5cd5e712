"""Results of tasks: accuracies with their intervals, and every answer as JSON. No torch."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat.common import UserError
from nanochat.conversation import Conversation

CONFIDENCE_Z = 1.959964  # normal quantile of a two-sided 95 % interval


@dataclass(frozen=True)
class Record:
    """What a model did on one problem."""

    index: int
    conversation: Conversation
    completions: tuple[str, ...]
    """As they were judged."""
    verdicts: tuple[bool, ...]
    shown: tuple[str, ...] = ()
    """As a person reads them, with calls in brackets; () where there are none."""

    def to_json(self, task: str) -> dict[str, Any]:
        """Plain values, for a line of JSON."""
        return {
            "task": task,
            "index": self.index,
            "messages": self.conversation.to_json(),
            "completions": list(self.completions),
            "correct": list(self.verdicts),
            **({"shown": list(self.shown)} if self.shown else {}),
        }


@dataclass(frozen=True)
class TaskResult:
    """Accuracy over all ranks; records of this rank."""

    name: str
    chance: float
    num_passed: int
    num_problems: int
    seconds: float
    records: tuple[Record, ...]

    @property
    def accuracy(self) -> float:
        """Share of problems with at least one right completion."""
        return self.num_passed / self.num_problems

    @property
    def centered(self) -> float:
        """0 at chance, 1 at perfection."""
        return (self.accuracy - self.chance) / (1.0 - self.chance)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of the accuracy."""
        return wilson_interval(self.num_passed, self.num_problems)


def wilson_interval(num_passed: int, num_total: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927, doi:10.1080/01621459.1927.10502953).

    Unlike mean +- 2 standard errors it stays within 0 and 1 and is honest at both ends.
    """
    if num_total == 0:
        return 0.0, 1.0
    share, z2 = num_passed / num_total, CONFIDENCE_Z**2
    middle = share + z2 / (2 * num_total)
    spread = CONFIDENCE_Z * math.sqrt(
        share * (1 - share) / num_total + z2 / (4 * num_total * num_total)
    )
    scale = 1 + z2 / num_total
    # Rounding may miss the ends by an ulp, to either side.
    low = (middle - spread) / scale if num_passed else 0.0
    return low, (middle + spread) / scale if num_passed < num_total else 1.0


def chat_core(results: Sequence[TaskResult], names: Sequence[str]) -> float | None:
    """ChatCORE: mean centered accuracy, or None unless exactly the tasks `names` have run."""
    if not names or sorted(result.name for result in results) != sorted(names):
        return None
    return sum(result.centered for result in results) / len(results)


# ---- answers on disk ----------------------------------------------------------------------------


def check_writable(path: Path) -> None:
    """UserError, before hours of evaluation, when no file can be written there."""
    _check_file(path, f"--save={path} cannot be written")
    if not path.parent.is_dir():
        # Made on the way, a mistyped folder would swallow the answers.
        raise UserError(
            f"--save={path} cannot be written: there is no folder {path.parent}; make it, or name "
            "another file"
        )
    try:
        # As `atomic_write_text` will begin: rights alone do not tell, in /proc for one.
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}."):
            pass
    except OSError as error:
        raise UserError(
            f"--save={path} cannot be written: {error.strerror}; name another file"
        ) from error


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read what `chat_eval --save` wrote; UserError naming the line that is something else."""
    _check_file(path, f"--show={path} cannot be read")
    if not path.exists():
        raise UserError(f"there is no file {path}; write one with chat_eval --save={path}")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"--show={path} cannot be read: {error.strerror}") from error
    if not content.strip():
        raise UserError(f"{path} is empty; give a file that chat_eval --save has written")
    records = []
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line:
            continue
        try:
            record = json.loads(line)
            is_answer = _is_answer(record)
        except ValueError:  # neither JSON nor UTF-8, or messages that are none
            is_answer = False
        if not is_answer:
            raise UserError(f"{path}, line {number} is not an answer that chat_eval has saved")
        records.append(record)
    return records


def _check_file(path: Path, failure: str) -> None:
    """UserError when something is there that is no file, such as a folder or a device."""
    if path.is_dir():
        raise UserError(f"{failure}: it is a folder; name a file in it")
    if path.exists() and not path.is_file():
        raise UserError(f"{failure}: it is a device or a pipe; name an ordinary file")


def _is_answer(record: Any) -> bool:
    """Whether a record has all that is shown of one; UserError for messages that are none."""
    if not isinstance(record, dict) or not isinstance(record.get("task"), str):
        return False
    Conversation.from_json(record.get("messages"))
    texts = record.get("completions")
    columns = [texts, record.get("correct"), record.get("shown", texts)]
    lengths = {len(column) if isinstance(column, list) else None for column in columns}
    return "index" in record and len(lengths) == 1 and None not in lengths


def show_records(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield each problem with its answers for a person to read, and a count at the end."""
    right = 0
    for record in records:
        passed = any(record["correct"])
        right += passed
        conversation = Conversation.from_json(record["messages"])
        yield f"==== {record['task']} {record['index']}: {'right' if passed else 'wrong'}"
        for message in conversation.messages[:-1]:
            yield f"[{message.role}] {message.shown}"
        yield f"[reference] {conversation.messages[-1].shown}"
        answers = record.get("shown", record["completions"])
        for completion, correct in zip(answers, record["correct"], strict=True):
            yield f"[{'right' if correct else 'wrong'}] {completion}"
        yield ""
    yield f"{len(records)} problems, {right} right, {len(records) - right} wrong"
