"""Saving off the critical path: a snapshot in memory, which a thread writes while training goes on.

The folder appears as atomically as when it is written at once. A failure of the thread reaches
the caller at the next `save`, `wait` or question whether there is one; it is never lost.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from nanochat.checkpoint_manager import Extra
from nanochat.checkpoint_writing import reject, save_checkpoint
from nanochat.run_folder import prune, rejected_folder, remove_rejected
from nanochat.runtime import World

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SaveCost:
    """What one checkpoint took."""

    step: int
    stall_seconds: float
    """Time that training stood still: for the snapshot and for the save before it."""
    seconds: float
    """From the snapshot's beginning until the folder was complete."""


class CheckpointSaver:
    """Writes the checkpoints of one run, one after the other. All ranks call it alike."""

    def __init__(
        self, run_dir: Path, *, tokenizer_dir: Path, world: World, in_background: bool = True
    ) -> None:
        self.run_dir, self._tokenizer_dir = run_dir, tokenizer_dir
        # Collectives of the thread need a group of their own: in a shared one they could meet
        # those of the step in another order on each rank.
        self._world = world.duplicate() if in_background else world
        self._in_background = in_background
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._finished: list[SaveCost] = []
        self.longest_seconds: float | None = None

    def __enter__(self) -> CheckpointSaver:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Finish what is being written, even when the run ends in an error."""
        self._join()
        if self._failure is not None and error is not None:
            logger.error("and the last checkpoint was not written: %s", self._failure)
        elif self._failure is not None:
            self.wait()

    def save(
        self,
        step: int,
        *,
        model: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor] | None,
        state: Mapping[str, Any],
        extra: Mapping[str, Extra] | None,
        write_shards: Callable[[Path], None] | None = None,
        keep_last: int | None,
        keep: Collection[int] = (),
    ) -> None:
        """Save `step`, then remove all but the newest `keep_last` and those in `keep`.

        keep_last None removes nothing. The tensors may change as soon as this returns. Raises
        the failure of the save before.
        """
        started = time.perf_counter()
        self.wait()
        if self._in_background:
            # Only the main rank writes the model, which is equal on all.
            model = _snapshot(model) if self._world.is_main else {}
            optimizer = None if optimizer is None else _snapshot(optimizer)
        stalled = time.perf_counter() - started

        def write() -> None:
            save_checkpoint(
                self.run_dir,
                step,
                model=model,
                optimizer=optimizer,
                state=state,
                extra=extra,
                tokenizer_dir=self._tokenizer_dir,
                world=self._world,
                write_shards=write_shards,
            )
            if keep_last is not None and self._world.is_main:
                prune(self.run_dir, keep_last, keep={step, *keep})
            seconds = time.perf_counter() - started
            self._note(SaveCost(step, stalled if self._in_background else seconds, seconds))

        if not self._in_background:
            write()
            return
        self._thread = threading.Thread(target=self._try, args=(write,), name=f"save {step}")
        self._thread.start()

    def reject(self, step: int) -> Path:
        """Keep a saved step, which has turned out unsound, where no reader takes it."""
        self.wait()
        if self._world.is_main:
            reject(self.run_dir, step)
        return rejected_folder(self.run_dir, step)

    @property
    def has_failed(self) -> bool:
        """Whether the last save failed; `wait` raises why."""
        return self._failure is not None

    def wait(self) -> None:
        """Until nothing is being written any more; raises what went wrong."""
        self._join()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def forget_rejected(self) -> None:
        """Delete what was found unsound: the run has come to a sound end, which is written."""
        if self._world.is_main:
            remove_rejected(self.run_dir)

    def take_costs(self) -> list[SaveCost]:
        """What was finished since the last call."""
        finished, self._finished = self._finished, []
        return finished

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _try(self, write: Callable[[], None]) -> None:
        try:
            write()
        except BaseException as error:
            self._failure = error

    def _note(self, cost: SaveCost) -> None:
        self.longest_seconds = max(cost.seconds, self.longest_seconds or 0.0)
        self._finished.append(cost)
        logger.info(
            "saved step %d: %.2f s of training time, %.2f s until it was on disk",
            cost.step,
            cost.stall_seconds,
            cost.seconds,
        )


def not_finite(weights: Mapping[str, Tensor]) -> list[str]:
    """Names of the weights that hold a NaN or an infinity."""
    if not weights:
        return []
    norms = torch._foreach_norm(list(weights.values()), float("inf"))
    # One transfer from the device, however many weights there are.
    are_finite = torch.isfinite(torch.stack([norm.float() for norm in norms])).tolist()
    return [name for name, is_finite in zip(weights, are_finite, strict=True) if not is_finite]


def _snapshot(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
