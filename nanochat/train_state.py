"""Where a run stands, and whether its loss still looks sound."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from nanochat.common import UserError

LOSS_SMOOTHING = 0.9
# The rule for a spike: the smoothed loss is more than a limit in nats above the lowest it has been
# in the last SPIKE_MEMORY steps, and has been so for SPIKE_PATIENCE steps in a row. Text of another
# kind raises the loss as much, but then it falls again, and what came long before says nothing.
SPIKE_FROM_STEP = 20  # before it, losses of a few batches say little
SPIKE_MEMORY = 100
SPIKE_PATIENCE = 20
# From half of the limit on, a run is suspect: its checkpoints replace no earlier one.
SUSPECT_SHARE = 0.5
# Scaling of the loss for fp16 (arXiv:1710.03740, section 3.2): the largest scale that does not make
# gradients overflow is found by trying. Numbers of torch.amp.GradScaler.
FIRST_LOSS_SCALE = 2.0**16
LOSS_SCALE_STEPS = 2000  # sound steps in a row after which twice the scale is tried
# An unscaled mean loss whose gradient overflows fp16 is no matter of scale.
LEAST_LOSS_SCALE = 1.0


class UnsoundModelError(UserError):
    """An evaluation has shown that a model is not worth building on."""


@dataclass
class TrainState:
    """Progress of a run. Travels in every checkpoint; all values survive JSON."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss_average: float = 0.0
    lowest_loss: float | None = None
    """Lowest of `recent_losses`."""
    recent_losses: list[float] = field(default_factory=list)
    """Smoothed losses of the last SPIKE_MEMORY steps, from SPIKE_FROM_STEP on."""
    steps_above: int = 0
    """Steps in a row, up to now, whose smoothed loss was beyond the limit."""
    evaluated_step: int = -1
    evaluations: dict[str, float] = field(default_factory=dict)
    measured_step: int = -1
    """Step that `evaluations` belong to."""
    first: dict[str, float] = field(default_factory=dict)
    """What each measure was when it was taken first."""
    best: dict[str, float] = field(default_factory=dict)
    best_step: int = -1
    """The saved step with the best evaluation; -1 if there is none."""
    best_value: float | None = None
    loss_scale: float = FIRST_LOSS_SCALE
    """What the mean loss of a step is multiplied by before its backward pass, in fp16."""
    steps_at_scale: int = 0
    """Sound steps in a row with this scale."""
    skipped_steps: int = 0
    """Steps whose gradient overflowed, so that nothing was updated."""

    @property
    def smooth_loss(self) -> float:
        """Exponential average of the loss, corrected for its start at 0 (arXiv:1412.6980, 3)."""
        return _corrected(self.loss_average, self.step)

    @property
    def rise(self) -> float:
        """Nats by which the smoothed loss is above its lowest."""
        return 0.0 if self.lowest_loss is None else self.smooth_loss - self.lowest_loss

    def observe(self, step: int, loss: float, grad_norm: float, *, spike_limit: float) -> None:
        """Take the loss of the step that ended as `step`.

        Raises UserError for a loss or gradient that is not finite and for a spike; spike_limit:
        nats, 0 for none.
        """
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            what = "loss" if not math.isfinite(loss) else "gradient's norm"
            value = loss if not math.isfinite(loss) else grad_norm
            raise UserError(f"the {what} is {value} at step {step}")
        self.loss_average = LOSS_SMOOTHING * self.loss_average + (1.0 - LOSS_SMOOTHING) * loss
        if step < SPIKE_FROM_STEP:
            return
        smooth = _corrected(self.loss_average, step)
        self.recent_losses = [*self.recent_losses, smooth][-SPIKE_MEMORY:]
        self.lowest_loss = min(self.recent_losses)
        is_above = 0 < spike_limit < smooth - self.lowest_loss
        self.steps_above = self.steps_above + 1 if is_above else 0
        if self.steps_above >= SPIKE_PATIENCE:
            raise UserError(
                f"the loss has risen from {self.lowest_loss:.3f} to {smooth:.3f} (smoothed) at "
                f"step {step}: for {self.steps_above} steps more than --spike-limit={spike_limit:g}"
            )

    def is_suspect(self, spike_limit: float) -> bool:
        """Whether the loss has gone half the way to a spike."""
        return spike_limit > 0 and self.rise > SUSPECT_SHARE * spike_limit

    def note_gradient(self, *, is_finite: bool) -> None:
        """Take whether this step's scaled gradient was finite; sets the scale of the next one.

        Raises UserError when the scale can not be lowered any more.
        """
        if is_finite:
            self.steps_at_scale += 1
            if self.steps_at_scale == LOSS_SCALE_STEPS:
                self.loss_scale, self.steps_at_scale = 2.0 * self.loss_scale, 0
            return
        self.skipped_steps += 1
        self.steps_at_scale = 0
        if self.loss_scale <= LEAST_LOSS_SCALE:
            raise UserError(
                f"the gradient overflows fp16 at step {self.step} even with a loss scale of "
                f"{self.loss_scale:g}, after {self.skipped_steps} skipped steps; "
                "--dtype=bfloat16 or float32 has the range"
            )
        self.loss_scale /= 2.0

    def note_evaluation(self, values: dict[str, float]) -> None:
        """Take what was measured at this step; smaller is better for names in bpb or loss."""
        self.evaluations |= values
        self.first = values | self.first
        self.measured_step = self.step
        for name, value in values.items():
            if _is_smaller_better(name):
                self.best[name] = min(value, self.best.get(name, math.inf))

    @property
    def is_best(self) -> bool:
        """Whether this step was evaluated and no saved one was better."""
        value = self._judged
        return value is not None and (self.best_value is None or value <= self.best_value)

    def note_save(self) -> None:
        """Remember this step, which is about to be saved, if no saved one was better."""
        if self.is_best:
            self.best_step, self.best_value = self.step, self._judged

    @property
    def _judged(self) -> float | None:
        """What decides between steps, smaller is better; None if this one was not evaluated."""
        if self.measured_step != self.step:
            return None
        costs = (_cost(name, value) for name, value in self.evaluations.items())
        return next((cost for cost in costs if cost is not None), None)


def _corrected(average: float, step: int) -> float:
    return average / (1.0 - LOSS_SMOOTHING ** max(step, 1))


def _cost(name: str, value: float) -> float | None:
    """What decides which step was best, smaller is better; None for a measure that does not."""
    if _is_smaller_better(name):
        return value
    return -value if name == "pass_at_1" else None


def _is_smaller_better(name: str) -> bool:
    return name.endswith(("bpb", "loss"))
