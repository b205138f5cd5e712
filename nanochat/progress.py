"""What a run tells about its speed: tokens per second, utilisation, time left, and slow ranks."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from nanochat.hardware import find_device
from nanochat.runtime import Runtime
from nanochat.train_state import TrainState

logger = logging.getLogger(__name__)

STEPS_UNTIMED = 10  # the first steps warm caches and compilers; speed is averaged after them
# A rank is slow when its own work takes this much longer than that of the middle one of the
# others: less is the usual jitter of machines, more makes all others wait.
SLOW_RATIO = 1.5
SLOW_SECONDS = 0.005  # differences below this are noise, whatever their ratio


class Speedometer:
    """Average speed since a run warmed up; evaluation and saving are not part of it."""

    def __init__(self) -> None:
        self._seconds, self._tokens, self._steps = 0.0, 0, 0

    def count(self, seconds: float, num_tokens: int) -> None:
        """Add one step."""
        self._steps += 1
        if self._steps > STEPS_UNTIMED:
            self._seconds += seconds
            self._tokens += num_tokens

    @property
    def tokens_per_second(self) -> float:
        """0 until the run is warm."""
        return self._tokens / self._seconds if self._seconds else 0.0


class OwnWork:
    """Seconds that this rank works between collectives; on a GPU measured on its own clock."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._seconds: list[float] = []
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event, float]] = []
        self._waited = 0.0

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Around the work of one step; what of it waits for another rank is told by `leave_out`."""
        started, self._waited = time.perf_counter(), 0.0
        begin = self._mark()
        yield
        end = self._mark()
        if begin is not None and end is not None:
            self._events.append((begin, end, self._waited))
        self._seconds.append(time.perf_counter() - started - self._waited)

    def leave_out(self, seconds: float) -> None:
        """So much of what is being measured was no work, but waiting for other ranks."""
        self._waited += seconds

    def take(self) -> float:
        """Mean seconds a step since the last call. The device must have finished those steps."""
        host = statistics.fmean(self._seconds) if self._seconds else 0.0
        # While the host waits its GPU is idle.
        on_device = [a.elapsed_time(b) / 1000 - waited for a, b, waited in self._events]
        self._seconds.clear()
        self._events.clear()
        # A rank can be slow on either side: waiting for its data, or for its GPU.
        return max(host, statistics.fmean(on_device)) if on_device else host

    def _mark(self) -> torch.cuda.Event | None:
        if not self._is_cuda:
            return None
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


class Progress:
    """The console line of a run, what it is made of, and a word about slow ranks."""

    def __init__(self, runtime: Runtime, *, num_iterations: int, flops_per_token: float) -> None:
        self.speed, self.own_work = Speedometer(), OwnWork(runtime.device)
        self._runtime = runtime
        self._num_iterations, self._flops_per_token = num_iterations, flops_per_token
        self._named_slow: set[int] = set()

    def log(
        self, state: TrainState, *, lr: float, epoch: float, measures: Mapping[str, float]
    ) -> None:
        """Tell where the run stands. All ranks call this, for they compare their own work."""
        speed, world = self.speed.tokens_per_second, self._runtime.world
        parts = [
            f"step {state.step}/{self._num_iterations}",
            f"loss {state.smooth_loss:.3f}",
            *(f"{name.replace('_', ' ')} {value:.3g}" for name, value in measures.items()),
            f"lr x{lr:.2f}",
        ]
        if speed:
            tokens_left = state.tokens / state.step * (self._num_iterations - state.step)
            parts += [
                f"{speed:,.0f} tok/s",
                utilisation(self._runtime.device, speed * self._flops_per_token, world.size),
                f"eta {duration(tokens_left / speed)}",
            ]
        parts.append(f"epoch {epoch:.2f}")
        logger.info("  ".join(part for part in parts if part))
        self._name_slow_ranks(world.gather_objects(self.own_work.take()))

    def _name_slow_ranks(self, seconds: Sequence[float]) -> None:
        for rank, usual in slow_ranks(seconds).items():
            if rank not in self._named_slow:  # once a run: a slow machine stays slow
                self._named_slow.add(rank)
                logger.warning(
                    "rank %d is slow and keeps the others waiting: %.3f s of own work a step, "
                    "%.3f s elsewhere",
                    rank,
                    seconds[rank],
                    usual,
                )


def slow_ranks(seconds: Sequence[float]) -> dict[int, float]:
    """Ranks that keep the others waiting -> the usual seconds of those others.

    seconds: own work of a step, by rank.
    """
    slow: dict[int, float] = {}
    for rank, own in enumerate(seconds):
        others = [*seconds[:rank], *seconds[rank + 1 :]]
        if not others:
            continue
        usual = statistics.median(others)
        if own > SLOW_RATIO * usual and own > usual + SLOW_SECONDS:
            slow[rank] = usual
    return slow


def utilisation(device: torch.device, flops_per_second: float, num_devices: int) -> str:
    """`mfu 41.2%` of the devices' peak; "" where no peak is known."""
    if device.type != "cuda":
        return ""
    known = find_device(torch.cuda.get_device_name(device))
    if known is None:
        return ""
    return f"mfu {100 * flops_per_second / (known.peak_flops * num_devices):.1f}%"


def duration(seconds: float) -> str:
    """`45 s`, `38 min` or `3.2 h`."""
    minutes = seconds / 60
    if minutes < 2:
        return f"{seconds:.0f} s"
    if minutes < 120:
        return f"{minutes:.0f} min"
    return f"{minutes / 60:.1f} h"
