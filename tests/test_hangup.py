"""A run in a terminal that goes away, as when a connection to another machine breaks."""

from __future__ import annotations

import fcntl
import os
import pty
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from nanochat.stopping import EXIT_STOPPED
from tests.stage_processes import BASE, SECONDS_OF_ONE_RUN, prepare, run, run_dir


@pytest.mark.slow
def test_a_run_whose_terminal_has_gone_is_saved_and_goes_on(tmp_path: Path) -> None:
    base = tmp_path / "base"
    prepare(base)
    flags = [flag for flag in BASE.flags if not flag.startswith("--save_every")]
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", BASE.module, *flags],
        env=os.environ | {"NANOCHAT_BASE_DIR": str(base)},
        cwd=Path(__file__).parents[1],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # the terminal is its own
    )
    os.close(slave)
    said = b""
    while b"step 3 " not in said and b"step 3/" not in said:
        said += os.read(master, 4096)  # an OSError when the run has ended before
    os.close(master)
    assert process.wait(SECONDS_OF_ONE_RUN) == EXIT_STOPPED
    (step,) = run_dir(base, BASE).glob("step_*")
    assert 3 <= int(step.name.removeprefix("step_")) < 40
    assert "resumed from step" in run(base, BASE.module, *flags, "--resume")
