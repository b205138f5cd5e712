"""What a person reads about a task: a line of the console, a row of the report. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nanochat.contamination import SetOverlap
from nanochat.task_results import TaskResult


@dataclass(frozen=True)
class Line:
    """What is said about a task: its result, or why it has none."""

    name: str
    result: TaskResult | None = None
    no_score: str = ""
    overlap: SetOverlap | None = None
    """Of its problems with the training data, if that was asked for."""
    not_compared: str = ""
    """Why that was asked for and cannot be said."""
    unseen: float | None = None
    """Accuracy on the problems that are not in the training data."""
    measure: str = ""
    """What the accuracy is of, if not of one answer to each problem."""

    def text(self) -> str:
        """One line for the console."""
        result, overlap = self.result, self.overlap
        if result is None:
            return f"{self.name:<24} no score: {self.no_score}"
        low, high = result.interval
        text = (
            f"{result.name:<24} {100 * result.accuracy:6.2f} %  "
            f"[{100 * low:.1f}, {100 * high:.1f}]  "
            f"{result.num_passed}/{result.num_problems}  chance {100 * result.chance:.0f} %  "
            f"{result.seconds:.1f} s"
        )
        if self.measure:
            text += f"  {self.measure}"
        if self.not_compared:
            text += "  not compared"
        if overlap is not None:
            text += f"  in training {len(overlap.seen)}/{overlap.num_checked}"
            if self.unseen is not None:
                text += f", others {100 * self.unseen:.2f} %"
        return text

    def row(self) -> dict[str, Any]:
        """One line of the report's table; there must be a result."""
        result = self.result
        assert result is not None
        low, high = result.interval
        columns: dict[str, Any] = {
            "task": result.name,
            "accuracy": result.accuracy,
            "95 % low": low,
            "95 % high": high,
            "chance": result.chance,
            "passed": result.num_passed,
            "problems": result.num_problems,
            "seconds": round(result.seconds, 2),
        }
        if self.measure:
            columns["measure"] = self.measure
        if self.not_compared:
            columns["in training"] = "not compared"
        if self.overlap is not None:
            columns["in training"] = f"{len(self.overlap.seen)} of {self.overlap.num_checked}"
            columns["words in a row"] = self.overlap.run_length
            columns["accuracy on others"] = self.unseen
        return columns
