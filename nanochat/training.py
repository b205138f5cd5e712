"""The training loop: one for base, mid, SFT and RL.

A step: take all rows of this rank, run them through in micro-batches adding up gradients of the
loss sum, divide once by the number of targets of the whole step, update, publish the new weights.
Between steps, at a boundary: evaluate, save, look whether someone asked us to stop.

Saving, data order and arithmetic are exact: a run that was killed and resumed ends with the same
weights, bit for bit, as one that was left alone.
"""

from __future__ import annotations

import logging
import math
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from nanochat import checkpoint_manager
from nanochat.common import UserError
from nanochat.dataloader import Batch
from nanochat.gpt import GPT
from nanochat.hardware import find_device
from nanochat.objectives import next_token_loss_sum
from nanochat.optimizers import OptimizerConfig, build_optimizer
from nanochat.precision import MasterWeights
from nanochat.runtime import Runtime
from nanochat.schedule import Schedule, muon_momentum
from nanochat.tracking import MetricWriter

logger = logging.getLogger(__name__)

EXIT_STOPPED = 85  # "stopped, resume me": no other program we know exits with it
LOSS_SMOOTHING = 0.9
STEPS_UNTIMED = 10  # the first steps warm caches and compilers; speed is averaged after them
# On a CPU compiling the whole step costs about a minute and saves a fifth of the time, so it
# pays only for runs of more than about ten minutes at 250 GFLOP/s.
CPU_COMPILE_FLOPS = 1.5e14


class StoppedError(Exception):
    """A signal asked for a stop; everything is saved and the run can be resumed."""


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
    save_every: int = 0
    """Steps between checkpoints besides the last one; 0 = only the last one."""
    keep_last: int = 1
    """Checkpoints kept."""
    log_every: int = 10
    """Steps between lines on the console."""
    compile: bool = False
    """Compile the forward and backward passes."""


@dataclass
class TrainState:
    """Where a run stands. Travels in every checkpoint."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss_average: float = 0.0
    evaluated_step: int = -1
    evaluations: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)

    @property
    def smooth_loss(self) -> float:
        """Exponential average of the loss, corrected for its start at 0 (arXiv:1412.6980, 3)."""
        return self.loss_average / (1.0 - LOSS_SMOOTHING ** max(self.step, 1))


@dataclass(frozen=True)
class Hook:
    """An action at step 0, at every `every` steps and at the end; `every` 0 = at the end only."""

    name: str
    every: int
    action: Callable[[Trainer], dict[str, float]]
    """Returns values for metrics.jsonl; smaller is better for names that end in bpb or loss."""
    at_start: bool = True

    def is_due(self, step: int, is_last: bool) -> bool:
        """Whether to act at this boundary."""
        if is_last:
            return True
        if self.every <= 0:
            return False
        return step % self.every == 0 and (step > 0 or self.at_start)


class Trainer:
    """One training run in one folder."""

    def __init__(
        self,
        model: GPT,
        loader: StepLoader,
        *,
        plan: Plan,
        optimizer: OptimizerConfig,
        runtime: Runtime,
        run_dir: Path,
        tokenizer_dir: Path,
        facts: dict[str, Any],
        metrics: MetricWriter | None = None,
        hooks: Sequence[Hook] = (),
    ) -> None:
        """Take over an fp32 `model` on the runtime's device.

        facts: what state.json of every checkpoint says about the run besides its progress.
        metrics: where numbers go; only the main rank has one.
        """
        self.model, self.loader, self.plan = model, loader, plan
        self.runtime, self.run_dir, self.hooks = runtime, run_dir, hooks
        self.tokenizer_dir, self.facts = tokenizer_dir, facts
        self.weights = MasterWeights(model, runtime.compute_dtype)
        self.optimizer = build_optimizer(
            self.weights.named_parameters(),
            optimizer,
            model_dim=model.config.n_embd,
            world=runtime.world,
        )
        self.state = TrainState()
        self.metrics = metrics
        self._hidden: Callable[[Tensor], Tensor] = model.hidden
        if plan.compile:
            self._hidden = torch.compile(model.hidden, dynamic=False)
        self._pending: list[tuple[int, Tensor, Tensor, float]] = []
        self._saved_step = -1
        self._timed_seconds, self._timed_tokens, self._steps_here = 0.0, 0, 0

    # ---- the loop -----------------------------------------------------------------------------

    def run(self) -> TrainState:
        """Train to the end of the plan. Raises StoppedError after saving when a signal came."""
        last = self.plan.schedule.num_iterations
        with _stop_signals() as stop_requested:
            while True:
                self._boundary(is_last=self.state.step >= last)
                if self.state.step >= last:
                    return self.state
                if self.runtime.world.any(stop_requested()):
                    self.save()
                    raise StoppedError(f"stopped at step {self.state.step}; everything is saved")
                self._step()

    def _boundary(self, *, is_last: bool) -> None:
        """Evaluate and save between two steps; both once, however often the run is resumed."""
        step = self.state.step
        due = [hook for hook in self.hooks if hook.is_due(step, is_last)]
        if due and self.state.evaluated_step != step:
            self._flush()
            values: dict[str, float] = {}
            for hook in due:
                values |= hook.action(self)
            self._record(values)
        self.state.evaluated_step = step
        every = self.plan.save_every
        if self._saved_step != step and (is_last or (every > 0 and step > 0 and step % every == 0)):
            self.save()

    def _record(self, values: dict[str, float]) -> None:
        self.state.evaluations |= values
        for name, value in values.items():
            if name.endswith(("bpb", "loss")):
                self.state.best[name] = min(value, self.state.best.get(name, math.inf))
        self._write(self.state.step, **values)

    def accumulate_gradients(self) -> tuple[Batch, Tensor]:
        """Take a step's rows and add up the gradients of their losses.

        Returns the batch and the loss sum of this rank's rows in nats, an fp32 scalar.
        """
        batch = self.loader.next_step()
        loss_sum = torch.zeros((), device=self.runtime.device)
        for inputs, targets in _micro_batches(batch, self.plan.micro_batch_rows):
            part = next_token_loss_sum(
                self._hidden(inputs.to(self.runtime.device, non_blocking=True)),
                self.model.lm_head.weight,
                targets.to(self.runtime.device, non_blocking=True),
                compiled=self.plan.compile,
            )
            part.backward()  # type: ignore[no-untyped-call]
            loss_sum += part.detach()
        return batch, loss_sum

    def _step(self) -> None:
        """One optimizer step."""
        started = time.perf_counter()
        batch, loss_sum = self.accumulate_gradients()
        multiplier = self.plan.schedule.multiplier(self.state.step)
        grad_norm = self.optimizer.step(
            grad_scale=1.0 / batch.num_targets,
            lr_multiplier=multiplier,
            muon_momentum=muon_momentum(self.state.step),
            grad_clip=self.plan.grad_clip,
        )
        self.weights.publish()
        self.optimizer.zero_grad()
        self.runtime.world.all_reduce_(loss_sum)
        self.state.step += 1
        num_tokens = batch.inputs.numel() * self.runtime.world.size
        self.state.tokens += num_tokens
        self._pending.append((self.state.step, loss_sum / batch.num_targets, grad_norm, multiplier))
        step = self.state.step
        if step % self.plan.log_every == 0 or step == 1:
            self._flush()
        self._count_time(time.perf_counter() - started, num_tokens)
        if step % self.plan.log_every == 0 or step == 1:
            self._log(multiplier)

    # ---- what a run tells ---------------------------------------------------------------------

    def _count_time(self, seconds: float, num_tokens: int) -> None:
        self.state.seconds += seconds
        self._steps_here += 1
        if self._steps_here > STEPS_UNTIMED:
            self._timed_seconds += seconds
            self._timed_tokens += num_tokens

    @property
    def tokens_per_second(self) -> float:
        """Average speed since the run warmed up, evaluation and saving excluded; 0 before."""
        return self._timed_tokens / self._timed_seconds if self._timed_seconds else 0.0

    def _flush(self) -> None:
        """Read the losses that have piled up on the device; stop on one that is no number."""
        for step, loss_tensor, norm_tensor, multiplier in self._pending:
            loss = float(loss_tensor)
            if not math.isfinite(loss):
                saved = f"step {self._saved_step}" if self._saved_step >= 0 else "none yet"
                raise UserError(
                    f"the loss is {loss} at step {step}; the last good checkpoint is {saved}. "
                    "Lower the learning rates or set --grad-clip, then start again with --resume"
                )
            average = self.state.loss_average
            self.state.loss_average = LOSS_SMOOTHING * average + (1.0 - LOSS_SMOOTHING) * loss
            self._write(step, loss=loss, lr=multiplier, grad_norm=float(norm_tensor))
        self._pending.clear()

    def _write(self, step: int, **values: float) -> None:
        if self.metrics is not None and values:
            self.metrics.write(step, **values)

    def _log(self, multiplier: float) -> None:
        state, last = self.state, self.plan.schedule.num_iterations
        speed = self.tokens_per_second
        parts = [
            f"step {state.step}/{last}",
            f"loss {state.smooth_loss:.3f}",
            f"lr x{multiplier:.2f}",
        ]
        if speed:
            parts.append(f"{speed:,.0f} tok/s")
            parts += self._utilisation(speed)
            tokens_left = state.tokens / state.step * (last - state.step)
            parts.append(f"eta {_duration(tokens_left / speed)}")
            self._write(state.step, tokens_per_second=speed, total_seconds=state.seconds)
        parts.append(f"epoch {self.loader.progress:.2f}")
        logger.info("  ".join(parts))

    def _utilisation(self, speed: float) -> list[str]:
        if self.runtime.device.type != "cuda":
            return []
        device = find_device(torch.cuda.get_device_name(self.runtime.device))
        if device is None:
            return []
        peak = device.peak_flops * self.runtime.world.size
        return [f"mfu {100 * speed * self.model.estimate_flops() / peak:.1f}%"]

    # ---- saving and resuming ------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint of this boundary, once; nothing is written over a loss of NaN."""
        self._flush()
        if self._saved_step == self.state.step:
            return
        numbers, arrays = _split_state(self.loader.state_dict())
        checkpoint_manager.save_checkpoint(
            self.run_dir,
            self.state.step,
            model=self.weights.state_dict(),
            optimizer=self.optimizer.state_dict(),
            state=self.facts
            | {"step": self.state.step, "loop": asdict(self.state), "loader": numbers},
            extra=arrays,
            tokenizer_dir=self.tokenizer_dir,
            world=self.runtime.world,
        )
        self._saved_step = self.state.step
        checkpoint_manager.prune(self.run_dir, self.plan.keep_last)

    def resume(self, checkpoint: checkpoint_manager.Checkpoint) -> None:
        """Go on from a checkpoint of this run: weights, optimizer, data position, counters."""
        world = self.runtime.world
        self.weights.load_state_dict(checkpoint.load_model())
        self.optimizer.load_state_dict(checkpoint.load_optimizer(world.rank, world.size))
        self.loader.load_state_dict(checkpoint.state["loader"] | checkpoint.load_extra(world.rank))
        self.state = TrainState(**checkpoint.state["loop"])
        self._saved_step = self.state.step
        if self.metrics is not None:
            self.metrics.truncate(self.state.step)
        logger.info("resumed from step %d (%s)", self.state.step, checkpoint.path)


def wants_compile(mode: str, *, device: torch.device, training_flops: float) -> bool:
    """Resolve --compile: "on", "off", or "auto" = where compiling saves more than it costs."""
    if mode not in ("auto", "on", "off"):
        raise UserError(f"--compile is {mode!r}; use auto, on or off")
    if mode != "auto":
        return mode == "on"
    if device.type == "cuda":
        return True
    if device.type != "cpu" or training_flops < CPU_COMPILE_FLOPS:
        return False
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        logger.warning("no C++ compiler found: training runs uncompiled, about a fifth slower")
        return False
    return True


def _micro_batches(batch: Batch, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, batch.inputs.size(0), rows):
        yield batch.inputs[start : start + rows], batch.targets[start : start + rows]


def _split_state(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Loader state as JSON values and as arrays."""
    arrays = {name: value for name, value in state.items() if isinstance(value, np.ndarray)}
    return {name: value for name, value in state.items() if name not in arrays}, arrays


@contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Turn SIGTERM, SIGUSR1 and the first Ctrl-C into a flag that is read between steps."""
    received: list[int] = []
    previous: dict[int, Any] = {}

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        logger.warning("%s: saving at the next step", signal.Signals(number).name)
        if number == signal.SIGINT:  # a second Ctrl-C stops at once
            signal.signal(signal.SIGINT, signal.default_int_handler)

    for caught in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        previous[caught] = signal.signal(caught, note)
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    if minutes < 2:
        return f"{seconds:.0f} s"
    if minutes < 120:
        return f"{minutes:.0f} min"
    return f"{minutes / 60:.1f} h"
