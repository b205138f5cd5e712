"""What a check says, what it is asked about, and what other commands on the machine say."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

State = Literal["ok", "note", "FAIL"]

REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    name: str
    state: State
    detail: str
    advice: str = ""
    """What to do; of a failing check always said."""

    def line(self) -> str:
        """The finding for people."""
        advice = f"; {self.advice}" if self.advice else ""
        return f"{self.state:<4}  {self.name:<16}  {self.detail}{advice}"


Check = Callable[[], Finding]


@dataclass(frozen=True)
class Recipe:
    """The run that the machine is examined for."""

    depth: int
    device_batch_size: int


def output_of(*command: str, cwd: Path | None = None) -> str | None:
    """What a command prints, None when it is not there or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return None
    return result.stdout if result.returncode == 0 else None
