"""A run on the compiled kernels, killed and resumed as a user does it, ends bit for bit as planned.

The other tests of resuming compute in fp32 or on one thread; this one takes the defaults: bf16 on
the kernels, several threads, checkpoints written in the background.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanochat.kernels import training
from tests.stage_processes import BASE, copy_of, log_of, outcome, prepare, run_dir

REPOSITORY = Path(__file__).parents[1]
SECONDS_OF_ONE_RUN = 300
COMMAND = (
    *(sys.executable, "-m", "scripts.base_train"),
    *("--depth=2", "--max_seq_len=256", "--total_batch_size=2048", "--device_batch_size=4"),
    *("--num_iterations=60", "--save_every=10", "--keep_last=2", "--eval_every=30"),
    *("--eval_tokens=2048", "--core_metric_every=-1", "--sample_every=-1"),
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(training.load() is None, reason="no AMX and no AVX-512 BF16, or no kernels"),
]


def start(base: Path, *flags: str) -> subprocess.Popen[bytes]:
    """Start the command; what it says is appended to `<base>.log`."""
    environment = os.environ | {
        "NANOCHAT_BASE_DIR": str(base),
        "OMP_NUM_THREADS": "2",
        "PYTHONPATH": str(REPOSITORY),
    }
    environment.pop("NANOCHAT_DTYPE", None)
    with log_of(base).open("ab") as log:
        return subprocess.Popen(
            [*COMMAND, *flags], cwd=base.parent, env=environment, stdout=log, stderr=log
        )


def finish(process: subprocess.Popen[bytes], base: Path, code: int = 0) -> str:
    """Wait for a command, which must end with `code`; what all of this base folder have said."""
    found = process.wait(SECONDS_OF_ONE_RUN)
    said = log_of(base).read_text(encoding="utf-8")
    assert found == code, said[-3000:]
    return said


def test_a_killed_run_on_the_kernels_ends_like_an_undisturbed_one(tmp_path: Path) -> None:
    prepare(tmp_path / "undisturbed")
    base = copy_of(tmp_path / "undisturbed", tmp_path / "killed")
    said = finish(start(tmp_path / "undisturbed"), tmp_path / "undisturbed")
    assert "compiled kernels, " in said  # and none of it left to PyTorch
    process = start(base)
    while process.poll() is None and not (run_dir(base, BASE) / "step_000020").exists():
        time.sleep(0.002)
    process.kill()
    finish(process, base, code=-signal.SIGKILL)
    said = finish(start(base, "--resume"), base)
    assert any(f"resumed from step {step} " in said for step in (20, 30, 40, 50))
    assert outcome(base, BASE) == outcome(tmp_path / "undisturbed", BASE)
