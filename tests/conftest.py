"""What holds for every test."""

from __future__ import annotations

import signal

import pytest
import torch

from nanochat.runtime import Runtime, World


@pytest.fixture(autouse=True)
def _same_weights() -> None:
    """Weights drawn without a seed are the same each time, in whatever order the tests run."""
    torch.manual_seed(0)


@pytest.fixture
def runtime() -> Runtime:
    """One process, fp32 on the CPU."""
    return Runtime(torch.device("cpu"), torch.float32, World(), 42)


def pytest_configure() -> None:
    """Heed Ctrl-C and a lost terminal, which nohup or a shell's background may have ignored.

    Processes inherit what is ignored, those of tests too; SLURM and a terminal ignore neither.
    """
    defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    for number, handler in defaults.items():
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)
