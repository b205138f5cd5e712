"""Validation of a training stage: bits per byte, and the gate that a sound stage passes.

A model that is no better than guessing, or clearly worse than it was when its stage began, is
found at the first validation that shows it, and the run ends there: nothing is built on it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from nanochat.loss_eval import LossTotals, TargetBatch, sum_losses
from nanochat.runtime import World
from nanochat.train_state import SPIKE_FROM_STEP, UnsoundModelError

if TYPE_CHECKING:
    from nanochat.training import Trainer

logger = logging.getLogger(__name__)

BPB = "val_bpb"
# How much worse than at its beginning a stage may be: finetuning on few conversations forgets some.
TOLERANCE = 1.1
LEARNED = 0.9  # share of guessing's loss below which something has been learned


@dataclass(frozen=True)
class Validation:
    """The action of a hook: measures the trainer's model and raises UnsoundModelError, or not."""

    batches: Callable[[], Iterable[TargetBatch]]
    """This rank's part of the validation set, each time anew."""
    token_bytes: Tensor
    """(V,) bytes of each token, 0 for special ones."""
    world: World
    limit: float = 0.0
    """Bits per byte that the last validation may not be above; 0 = a bound found by itself."""

    def __call__(self, trainer: Trainer) -> dict[str, float]:
        """Bits per byte of the model as it is now."""
        totals = sum_losses(trainer.model, self.batches(), self.token_bytes, self.world)
        state, bpb = trainer.state, totals.bits_per_byte
        logger.info("step %d  validation bpb %.4f", state.step, bpb)
        reason = unsound(
            totals,
            vocab_size=self.token_bytes.numel(),
            train_loss=state.smooth_loss,
            began=state.first.get(BPB),
            limit=self.limit,
            step=state.step,
            is_last=state.step >= trainer.plan.schedule.num_iterations,
        )
        if reason:
            raise UnsoundModelError(
                f"the model has {bpb:.3f} bits per byte of validation text at step {state.step}, "
                f"{reason}; nothing should be built on it. Look at the loss (python -m "
                "scripts.watch), lower --matrix-lr and --embedding-lr or mend the data, and train "
                "again; --bpb-limit=X accepts a stage that ends with up to X"
            )
        return {BPB: bpb}


def unsound(
    totals: LossTotals,
    *,
    vocab_size: int,
    train_loss: float,
    began: float | None,
    limit: float,
    step: int,
    is_last: bool,
) -> str:
    """What is wrong with a validation, "" for nothing.

    train_loss: smoothed, in nats a token. A model that learns its training text is sound even
    where validation is worse than guessing: lessons may come before the text that is validated.
    began: bits per byte when the stage began, if they were measured. limit: replaces the bounds
    that are known without it, and is for the last step alone. The first steps say nothing.
    """
    bpb = totals.bits_per_byte
    if totals.num_bytes == 0:
        return ""
    if limit > 0:
        return f"above --bpb-limit={limit:g}" if is_last and not bpb <= limit else ""
    if step < SPIKE_FROM_STEP:
        return ""
    guessing = totals.bits_per_byte_of_guessing(vocab_size)
    has_learned = math.isfinite(bpb) and train_loss < LEARNED * math.log(vocab_size)
    if not bpb < guessing and not has_learned:
        return f"no better than guessing, which has {guessing:.3f}"
    began_trained = began is not None and began < LEARNED * guessing
    if began is not None and began_trained and bpb > TOLERANCE * began:
        return f"worse than the {began:.3f} that it began with"
    return ""
