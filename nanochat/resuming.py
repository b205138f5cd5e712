"""What becomes of an earlier run in the same folder: go on from it, refuse, or move it aside."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from nanochat import checkpoint_manager
from nanochat.common import UserError
from nanochat.lineage import LINEAGE
from nanochat.run_folder import (
    DAMAGED,
    LATER,
    PREVIOUS,
    REJECTED,
    pass_over,
    rejected_folder,
    rejected_steps,
)
from nanochat.runtime import World
from nanochat.sources import changed_data

logger = logging.getLogger(__name__)

_NO_DEFAULTS: Mapping[str, Any] = MappingProxyType({})

_RUN_FILES = (
    *("step_*", f"{DAMAGED}*", f"{LATER}*", f"{REJECTED}*"),
    *("metrics.jsonl", "tensorboard"),
)

# Settings that say how a run is carried out, not what it computes: a resumed run may differ. Those
# that `scripts/stages.sh` calls free are among them.
_FREE = frozenset(
    {
        "run",
        "tensorboard",
        "resume",
        "resume_from_step",
        "dry_run",
        "device_batch_size",
        "device_type",
        "dtype",  # what it comes to is compared: compute_dtype
        "save_every",
        "keep_last",
        "keep_best",
        "background_save",
        "max_minutes",
        "spike_limit",
        "bpb_limit",
        "log_every",
    }
)
# Compared by a rule of its own.
DATA_FINGERPRINT = "data_fingerprint"
# The fingerprint, and what follows from facts that are compared: parent, tasks and settings.
_NOT_COMPARED = frozenset({DATA_FINGERPRINT, LINEAGE})
# Settings one may want to change on the way, above all after a loss that went wrong. The run goes
# on and says so; it is then another run than the one it began as.
_CHANGEABLE = frozenset(
    {
        "compile",
        "compute_dtype",
        "fp8",
        "int8",
        "embedding_lr",
        "unembedding_lr",
        "matrix_lr",
        "scalar_lr",
        "weight_decay",
        "init_lr_frac",
        "warmup_steps",
        "warmup_ratio",
        "warmdown_ratio",
        "final_lr_frac",
        "grad_clip",
        "eval_every",
        "eval_tokens",
        "eval_steps",
        "eval_metrics_every",
        "eval_metrics_max_problems",
        "chatcore_every",
        "chatcore_max_cat",
        "chatcore_max_sample",
        "core_metric_every",
        "core_metric_max_per_task",
        "sample_every",
    }
)


def previous_run(
    run_dir: Path,
    facts: dict[str, Any],
    *,
    resume: bool,
    world: World,
    step: int | None = None,
    defaults: Mapping[str, Any] = _NO_DEFAULTS,
) -> checkpoint_manager.Checkpoint | None:
    """The checkpoint to go on from, None to start from nothing. The run's folder is locked.

    Without `resume` an earlier run moves to the subfolder `previous`. With it, the newest sound
    checkpoint is taken; UserError when it belongs to another run than `facts` describe. The main
    rank looks, all get its answer: verifying once is enough, and nobody looks while folders move.
    step: to go on from instead; the ones after it are renamed. defaults: see `differences`.
    """
    found: checkpoint_manager.Checkpoint | None = None
    problem: str | None = None
    if world.is_main:
        try:
            found = _look(run_dir, facts, resume=resume, step=step, defaults=defaults)
        except UserError as error:
            problem = str(error)
    found, problem = world.gather_objects((found, problem))[0]
    if problem is not None:
        raise UserError(problem)
    return found


def _look(
    run_dir: Path,
    facts: dict[str, Any],
    *,
    resume: bool,
    step: int | None,
    defaults: Mapping[str, Any],
) -> checkpoint_manager.Checkpoint | None:
    if not resume:
        _set_aside(run_dir)
        return None
    if step is None:
        newest = _rejected(run_dir) or checkpoint_manager.newest_checkpoint(run_dir)
    else:
        newest = checkpoint_manager.open_step(run_dir, step)
    if newest is None:
        logger.info("nothing to resume in %s: starting from nothing", run_dir)
        return None
    _check_data(newest, facts)
    different = differences(newest.state, facts, defaults)
    other_run = [text for name, text in different.items() if name not in _CHANGEABLE]
    if other_run:
        raise UserError(
            f"cannot resume {run_dir}: it was made with {'; '.join(other_run)}. Give the same "
            "settings, another --model-tag, or leave out --resume to start over"
        )
    if different:
        logger.warning(
            "going on from step %d of %s, which was made with %s: it ends elsewhere "
            "than it would have",
            newest.step,
            run_dir,
            "; ".join(different.values()),
        )
    pass_over(run_dir, newest.step, prefix=DAMAGED if step is None else LATER)
    return newest


def _rejected(run_dir: Path) -> checkpoint_manager.Checkpoint | None:
    """A step behind all others that was found unsound: to be judged again, where it lies."""
    steps = [-1, *checkpoint_manager.saved_steps(run_dir)]
    rejected = [step for step in rejected_steps(run_dir) if step > steps[-1]]
    if not rejected:
        return None
    try:
        found = checkpoint_manager.open_checkpoint(rejected_folder(run_dir, rejected[-1]))
    except checkpoint_manager.DamagedCheckpointError as error:
        logger.warning("%s; it is not judged again", error)
        return None
    logger.info("%s was found unsound and is judged again", found.path)
    return found


def _check_data(newest: checkpoint_manager.Checkpoint, facts: dict[str, Any]) -> None:
    """UserError when the documents are others than those the run has read so far."""
    before, now = newest.state.get(DATA_FINGERPRINT), facts.get(DATA_FINGERPRINT)
    changed = changed_data(before, now) if before and now else None
    if changed:
        raise UserError(
            f"cannot resume {newest.path}: the data {facts.get('data')!r} changed under it (now "
            f"{changed}). Put the old shards back, or leave out --resume to start over"
        )


def _set_aside(run_dir: Path) -> None:
    """Move a run to `previous`; what is there already gets a number, for it may be a long one."""
    if not (checkpoint_manager.saved_steps(run_dir) or rejected_steps(run_dir)):
        return  # nothing worth the place of what may lie there already
    files = [path for pattern in _RUN_FILES for path in run_dir.glob(pattern)]
    aside, older = run_dir / PREVIOUS, ""
    if aside.exists():
        numbers = (path.name.removeprefix(f"{PREVIOUS}.") for path in run_dir.glob(f"{PREVIOUS}.*"))
        number = 1 + max((int(name) for name in numbers if name.isdecimal()), default=0)
        aside.rename(run_dir / f"{PREVIOUS}.{number}")
        older = f", the one before it {PREVIOUS}.{number}; delete what you no longer need"
    aside.mkdir()
    for path in files:
        path.rename(aside / path.name)
    logger.info("the earlier run in %s is now %s%s", run_dir, aside, older)


def defaults_of(config: Any) -> dict[str, Any]:
    """The defaults of a dataclass of settings, without those that follow from others (None)."""
    return {
        field.name: field.default
        for field in dataclasses.fields(config)
        if field.default is not dataclasses.MISSING and field.default is not None
    }


def differences(
    saved: dict[str, Any], facts: dict[str, Any], defaults: Mapping[str, Any] = _NO_DEFAULTS
) -> dict[str, str]:
    """Settings that make a saved run another one than the one asked for: name -> old, not new.

    saved: state.json of a checkpoint. facts: what that of the new run will say; a part is enough,
    and "config", the settings, must be in it. defaults: what settings stood at in a run from before
    there were such.
    """
    old = dict(defaults) | saved.get("config", {})
    old |= {k: v for k, v in saved.items() if k in facts and k != "config"}
    new = facts["config"] | {k: v for k, v in facts.items() if k != "config"}
    return {
        name: f"{name} {old.get(name)!r}, not {value!r}"
        for name, value in new.items()
        # A setting that neither knows is newer than the run, and follows from others.
        if name not in _FREE | _NOT_COMPARED and name in old and old[name] != value
    }
