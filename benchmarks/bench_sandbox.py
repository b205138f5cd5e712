"""Time a trivial program in the sandbox beside a bare interpreter, in one run.

    python -m benchmarks.bench_sandbox

Both take turns, so that whatever else the machine does meets both alike. A program is a function
and one test of it, from the call of `check_program` to its result; the bare interpreter is
`python -c pass`. Prints one JSON line: median and 95th percentile of each in milliseconds, and the
walls that stood. Exit code 1 if a program did not pass.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from nanochat import configurator
from nanochat.common import UserError
from nanochat.execution import ExecutionResult, check_program, sandbox_problem

PROGRAM, TESTS = "def square(x): return x * x", "assert square(3) == 9"


@dataclass(frozen=True)
class Config:
    """Flags of bench_sandbox."""

    programs: int = 50
    """Programs, and as many bare interpreters."""


def main(config: Config) -> int:
    """Measure both and print."""
    if config.programs < 2:
        raise UserError(f"--programs={config.programs}; a percentile needs 2 or more")
    problem = sandbox_problem()  # also the first start, which reads files into memory
    if problem is not None:
        raise UserError(problem)
    sandboxed, bare, results = [], [], []
    for _ in range(config.programs):
        begin = time.perf_counter()
        results.append(check_program(PROGRAM, TESTS, functions=["square"]))
        middle = time.perf_counter()
        subprocess.run([sys.executable, "-c", "pass"], check=True)
        sandboxed.append(middle - begin)
        bare.append(time.perf_counter() - middle)
    print(json.dumps(_summary(sandboxed, bare, results)))
    return 0 if all(result.success for result in results) else 1


def _summary(
    sandboxed: Sequence[float], bare: Sequence[float], results: Sequence[ExecutionResult]
) -> dict[str, object]:
    row: dict[str, object] = {"benchmark": "sandbox", "programs": len(results)}
    row["passed"] = sum(result.success for result in results)
    for name, seconds in (("sandbox", sandboxed), ("bare", bare)):
        row[f"{name}_median_ms"] = round(1000 * statistics.median(seconds), 1)
        twentieths = statistics.quantiles(seconds, n=20, method="inclusive")
        row[f"{name}_p95_ms"] = round(1000 * twentieths[-1], 1)
    row |= {"layers": list(results[-1].layers), "missing": list(results[-1].missing)}
    return row


if __name__ == "__main__":
    configurator.run(main, Config)
