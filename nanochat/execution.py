"""Run Python that a model wrote, behind walls, and learn whether it does what its tests ask.

Every program gets a fresh interpreter in its own session, an empty folder in memory, a clean
environment and the walls of `nanochat.sandbox`; this process keeps the clock, reads a limited
part of the output and kills everything at the end. docs/explanation/sandbox.md says which wall
stops what, and what is left where a wall cannot be put up.

Threads may call everything here.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from nanochat.common import UserError
from nanochat.sandbox.supervisor import (
    SCRATCH_BYTES,
    SCRATCH_ENTRIES,
    STARTUP_SECONDS,
    Run,
    remove,
)

TIMEOUT_SECONDS = 5.0
MEMORY_BYTES = 256 << 20


@dataclass(frozen=True)
class ExecutionResult:
    """What became of a program."""

    success: bool
    """It passed its tests; without tests: it ran to its end, by its own account."""
    stdout: str
    stderr: str
    error: str | None
    """Why not, None for success."""
    timeout: bool
    memory_exceeded: bool
    skipped: bool
    """Nothing was run, as there is no sandbox here; this is no wrong answer."""
    truncated: bool
    """It wrote more than is kept of its output."""
    seconds: float
    """Wall time with the start of the interpreter."""
    layers: tuple[str, ...]
    """The walls that stood."""
    missing: tuple[str, ...]
    """Those that could not be put up here, each with its reason."""


def execute_code(
    code: str,
    timeout: float = TIMEOUT_SECONDS,
    maximum_memory_bytes: int = MEMORY_BYTES,
    *,
    unsafe: bool = False,
) -> ExecutionResult:
    """Run a program as `__main__`; success means that it ran to its end.

    That is the program's own claim: to judge a model's code use `check_program`. unsafe: run it
    even where no sandbox can be set up, with nothing but limits of time and memory: it can then
    read, change and send away whatever the user can.
    """
    request = {"program": code, "tests": None}
    return _execute(request, timeout, maximum_memory_bytes, unsafe=unsafe)


def check_program(
    program: str,
    tests: str,
    *,
    functions: Sequence[str],
    prelude: str = "",
    timeout: float = TIMEOUT_SECONDS,
    maximum_memory_bytes: int = MEMORY_BYTES,
    unsafe: bool = False,
) -> ExecutionResult:
    """Run `tests` against the `functions` of a program; success means that they ran to their end.

    Program and tests are different processes, so the program can neither read the tests nor skip
    them nor replace what they compare with: its functions get arguments and give results as plain
    values (what a function changes in its arguments stays there). prelude: trusted text that is
    run before the tests, in their process.
    """
    request = {
        "program": program,
        "tests": tests,
        "prelude": prelude,
        "functions": list(functions),
    }
    return _execute(request, timeout, maximum_memory_bytes, unsafe=unsafe)


def sandbox_problem(unsafe: bool = False) -> str | None:
    """Why no program can be run here, in one sentence, or None. Finds out once a process."""
    return _probe(unsafe)


@cache
def _probe(unsafe: bool) -> str | None:
    result = execute_code("", timeout=STARTUP_SECONDS, unsafe=unsafe)
    return None if result.success else result.error


def _execute(
    request: dict[str, Any],
    timeout: float,
    memory_bytes: int,
    *,
    unsafe: bool,
    without: Sequence[str] = (),
) -> ExecutionResult:
    """without: walls to leave out, so that tests see what the others hold alone."""
    if not (math.isfinite(timeout) and timeout > 0):
        raise UserError(f"a timeout of {timeout} seconds; give a positive number")
    if memory_bytes < 64 << 20:
        raise UserError(
            f"{memory_bytes} bytes of memory; the interpreter alone needs 64 MiB ({64 << 20})"
        )
    if not sys.platform.startswith("linux") and not unsafe:
        return _skipped(
            f"the sandbox is made of Linux system calls and this is {sys.platform}; run on Linux, "
            "or with --unsafe, which runs model-written programs with all your rights"
        )
    started = time.monotonic()
    nonce = secrets.token_hex(16)
    options = {
        "seconds": math.ceil(timeout),
        "memory_bytes": memory_bytes,
        "scratch_bytes": SCRATCH_BYTES,
        "unsafe": unsafe,
        "without": list(without),
        "library_path": os.environ.get("LD_LIBRARY_PATH", ""),
    }
    try:
        run = _run(options, json.dumps({**request, "nonce": nonce}).encode(), timeout)
    except OSError as error:
        # No process, no memory, no room for the folder: that is no wrong answer.
        return _skipped(f"the sandbox cannot run here: {error}")
    return _result(run, nonce, time.monotonic() - started)


def _run(options: dict[str, Any], request: bytes, timeout: float) -> Run:
    """Run one request in a folder of its own, until its end. OSError where that cannot be."""
    # Not the user's: an inner user must be able to enter, and the name says nothing.
    work = Path(tempfile.mkdtemp(prefix="nanochat-"))
    try:
        work.chmod(0o711)
        for name in ("root", "scratch"):
            (work / name).mkdir(mode=0o700)
        folders = {"root": str(work / "root"), "scratch": str(work / "scratch")}
        run = Run({**options, **folders}, request)
        run.wait(timeout, work / "scratch")
    finally:
        remove(work)
    return run


def _skipped(reason: str) -> ExecutionResult:
    return ExecutionResult(
        success=False,
        stdout="",
        stderr="",
        error=reason,
        timeout=False,
        memory_exceeded=False,
        skipped=True,
        truncated=False,
        seconds=0.0,
        layers=(),
        missing=(),
    )


def _result(run: Run, nonce: str, seconds: float) -> ExecutionResult:
    lines = run.lines
    walls: dict[str, list[str]] = lines[0] if lines else {"active": [], "missing": []}
    verdict = lines[1] if len(lines) > 1 else {}
    passed = secrets.compare_digest(str(verdict.get("nonce")), nonce) and "passed" in verdict
    error, skipped = verdict.get("error"), False
    if "refused" in verdict:
        error, skipped = f"no program is run without a sandbox: {verdict['refused']}", True
    elif run.killed == "timeout":
        error = "it was still running at the end of its time"
    elif run.killed == "scratch":
        error = f"it wrote more than {SCRATCH_BYTES >> 20} MiB or {SCRATCH_ENTRIES} files"
    elif not lines:
        error = f"the sandbox did not start: {run.stderr.text.strip()[-300:] or run.killed}"
        skipped = True
    elif not verdict:
        error = "the sandbox ended before its verdict"
    if error is not None:
        # It may quote the program, whose texts need not be any that can be printed.
        error = error.encode("utf-8", "replace").decode("utf-8")
    own_walls = ("process group", "clean environment", "empty scratch folder", "capped output")
    return ExecutionResult(
        success=passed,
        stdout=run.stdout.text,
        stderr=run.stderr.text,
        error=None if passed else error,
        timeout=run.killed == "timeout" or "SIGXCPU" in (error or ""),
        memory_exceeded=re.match(r"MemoryError\b", error or "") is not None,
        skipped=skipped,
        truncated=run.stdout.is_truncated or run.stderr.is_truncated,
        seconds=seconds,
        layers=(*own_walls, "killed at the deadline", *walls["active"]),
        missing=tuple(walls["missing"]),
    )
