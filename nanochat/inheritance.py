"""What a run takes over from the checkpoint that it starts from: settings and optimizer state."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any, TypeVar

from nanochat.checkpoint_manager import Checkpoint
from nanochat.common import UserError
from nanochat.presets import OptimizerName
from nanochat.stage import LEARNING_RATES, StageConfig, optimizer_of

logger = logging.getLogger(__name__)

AnyConfig = TypeVar("AnyConfig", bound=StageConfig)

AS_CHECKPOINT = -1  # of --device_batch_size, whose default is a number; None says so of others
# Stand in for what a checkpoint does not say: those of finetuning in the 2026 nanochat. What is
# not here is left to the optimizer.
UNRECORDED: dict[str, Any] = {
    "device_batch_size": 32,
    "total_batch_size": 524_288,
    "embedding_lr": 0.3,
    "unembedding_lr": 0.004,
    "matrix_lr": 0.02,
}


def inherit(config: AnyConfig, parent: Checkpoint, names: Sequence[str]) -> AnyConfig:
    """`config` with the parent's value of each named flag that was left out.

    Says what was taken, what was given in its place and what the parent does not record.
    UserError when learning rates would be those of another optimizer.
    """
    recorded = parent.state.get("config", {}) | {
        "total_batch_size": parent.state.get("total_batch_size"),
        "max_seq_len": parent.state["model_config"]["sequence_len"],
    }
    wanted = [name for name in names if _is_left_out(config, name)]
    if any(name in LEARNING_RATES for name in wanted):
        _check_optimizer(parent, config.optimizer, "--inherit", "give all learning rates")
    taken = {name: recorded[name] for name in wanted if recorded.get(name) is not None}
    missing = [name for name in wanted if name not in taken]
    usual = {name: UNRECORDED[name] for name in missing if name in UNRECORDED}
    given = {name: getattr(config, name) for name in names if name not in wanted}
    model = _name(parent)
    if taken:
        logger.info("inherited from %s: %s", model, _listed(taken))
    if given:
        logger.info(
            "given, so not inherited from %s: %s",
            model,
            ", ".join(
                f"{name} {value} (there {recorded.get(name, 'not recorded')})"
                for name, value in given.items()
            ),
        )
    if missing:
        left = {name: "the optimizer's own" for name in missing if name not in usual}
        logger.warning(
            "%s does not record what is inherited; taking %s", model, _listed(usual | left)
        )
    return dataclasses.replace(config, **(taken | usual))


def _is_left_out(config: StageConfig, name: str) -> bool:
    value = getattr(config, name)
    return value is None or (name == "device_batch_size" and value == AS_CHECKPOINT)


def check_warm_start(parent: Checkpoint, config: StageConfig) -> None:
    """Raise UserError unless the parent holds an optimizer state that the run can begin with."""
    remedy = "--no-load-optimizer begins with an empty state"
    _check_optimizer(parent, config.optimizer, "--load-optimizer", remedy)
    if not parent.is_sharded and not parent.has_optimizer:
        raise UserError(
            f"--load-optimizer: {parent.path} holds weights only, no optimizer state; start from "
            f"a checkpoint that has one (--step), or {remedy}"
        )
    if parent.is_sharded != (config.shard == "full"):
        saved = "with" if parent.is_sharded else "without"
        raise UserError(
            f"--load-optimizer: {parent.path} was saved {saved} --shard=full, whose optimizer "
            f"state is another; train {saved} it, or {remedy}"
        )


def _check_optimizer(
    parent: Checkpoint, asked: OptimizerName | None, flag: str, remedy: str
) -> None:
    theirs = optimizer_of(parent)
    if asked not in (None, theirs):
        raise UserError(
            f"{flag} and --optimizer={asked} do not go together: {parent.path} was trained with "
            f"the {theirs} optimizer; leave out --optimizer, or {remedy}"
        )


def _name(parent: Checkpoint) -> str:
    return f"{parent.stage} model {parent.tag}, step {parent.step}"


def _listed(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())
