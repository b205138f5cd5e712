"""Schedules: pure functions from an optimizer step to a multiplier or a value."""

from __future__ import annotations

import math
from dataclasses import dataclass

# As in the 2026 nanochat: a longer rise to a higher momentum, which falls in the warmdown.
_LONG_RISE, _HIGH_MOMENTUM, _LAST_MOMENTUM = 400, 0.97, 0.90


@dataclass(frozen=True)
class Schedule:
    """Learning-rate multiplier over a run: linear warmup, constant, linear warmdown.

    A trapezoid (arXiv:2405.18392) needs no horizon until its warmdown begins, so a run can be
    prolonged.
    """

    num_iterations: int
    """Optimizer steps of the whole run."""
    warmup_steps: int = 0
    """Steps of the rise from 0 to the peak."""
    warmdown_ratio: float = 0.2
    """Share of the run that the fall takes at its end."""
    peak: float = 1.0
    """Multiplier of the constant part."""
    final_fraction: float = 0.0
    """Share of the peak that is left at the end."""
    is_refined: bool = False
    """Muon's momentum falls with the learning rate, and its weight decay over the whole run."""

    @property
    def warmdown_steps(self) -> int:
        """Steps of the fall at the end."""
        return round(self.warmdown_ratio * self.num_iterations)

    def multiplier(self, step: int) -> float:
        """Multiplier for the update that makes step `step` (counted from 0) into `step + 1`."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        warmdown = self.warmdown_steps
        left = self.num_iterations - step
        if warmdown == 0 or left > warmdown:
            return self.peak
        progress = left / warmdown
        return self.peak * (progress + (1.0 - progress) * self.final_fraction)

    def momentum(self, step: int) -> float:
        """Muon's momentum at a step."""
        if not self.is_refined:
            return muon_momentum(step)
        begin = self.num_iterations - self.warmdown_steps
        if step < _LONG_RISE or step < begin:
            return muon_momentum(step, end=_HIGH_MOMENTUM, steps=_LONG_RISE)
        progress = (step - begin) / self.warmdown_steps
        return _HIGH_MOMENTUM + (_LAST_MOMENTUM - _HIGH_MOMENTUM) * progress

    def decay(self, step: int) -> float:
        """Multiplier of the weight decay of matrices: a half cosine down to 0, if refined."""
        if not self.is_refined:
            return 1.0
        return 0.5 * (1.0 + math.cos(math.pi * step / self.num_iterations))


def muon_momentum(step: int, *, start: float = 0.85, end: float = 0.95, steps: int = 300) -> float:
    """Momentum of Muon at a step: a linear rise over the first `steps`, as in the 2025 nanochat."""
    progress = min(step / steps, 1.0)
    return start + (end - start) * progress
