"""What the training loop is given: how long and how often, and where its rows come from."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from nanochat import fused_native
from nanochat.common import UserError
from nanochat.dataloader import Batch
from nanochat.gpt_config import GPTConfig
from nanochat.schedule import Schedule

logger = logging.getLogger(__name__)


# On a CPU compiling the whole step costs about a minute and saves a fifth of the time, so it
# pays only for runs of more than about ten minutes at 250 GFLOP/s.
CPU_COMPILE_FLOPS = 1.5e14


class StepLoader(Protocol):
    """What the loop needs of a data loader."""

    def next_step(self) -> Batch:
        """All rows of this rank for one optimizer step."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Position after the last step handed out: integers and numpy arrays."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from such a position."""
        ...

    @property
    def progress(self) -> float:
        """Epochs handed out so far."""
        ...


@dataclass(frozen=True)
class Plan:
    """How long, how fast and how often."""

    schedule: Schedule
    micro_batch_rows: int
    """Rows of one forward and backward pass on each rank."""
    grad_clip: float = 0.0
    """Largest global gradient norm; 0 = off."""
    spike_limit: float = 0.0
    """Rise of the smoothed loss, in nats, at which the run stops; 0 = off."""
    save_every: int = 0
    """Steps between checkpoints besides the last one; 0 = only the last one."""
    keep_last: int = 1
    """Checkpoints kept."""
    keep_best: bool = False
    """Save a step whose evaluation is the best so far, and keep it."""
    background_save: bool = True
    """Write checkpoints while training goes on."""
    write: bool = True
    """Save checkpoints at all."""
    log_every: int = 10
    """Steps between lines on the console."""
    compile: bool = False
    """Compile the forward and backward passes."""
    fp8: bool = False
    """Multiply the large matrices in fp8 while training."""
    int8: bool = False
    """Multiply matrices in 8-bit integers while training."""
    shard: str = "optimizer"
    """What ranks share out: "optimizer" states, or "full": weights and gradients, too."""


def wants_compile(
    mode: str,
    config: GPTConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    training_flops: float,
) -> bool:
    """Resolve --compile: "on", "off", or "auto" = where compiling saves more than it costs."""
    if mode not in ("auto", "on", "off"):
        raise UserError(f"--compile is {mode!r}; use auto, on or off")
    if mode != "auto":
        return mode == "on"
    if device.type == "cuda":
        return True
    if device.type != "cpu" or training_flops < CPU_COMPILE_FLOPS:
        return False
    if fused_native.trains(config, dtype):  # faster than a compiler's code, from the first step on
        return False
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        logger.warning("no C++ compiler found: training runs uncompiled, about a fifth slower")
        return False
    return True
