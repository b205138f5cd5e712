"""Writing a checkpoint folder: by all ranks together, whole or not at all.

What is in it, and how it is read and found, is `checkpoint_manager`'s.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from nanochat.checkpoint_manager import (
    MANIFEST_FILE,
    MODEL_FILE,
    SHARDED_FOLDER,
    STATE_FILE,
    TOKENIZER_FILES,
    Extra,
)
from nanochat.common import STAGES, UserError, base_dir, checkpoints_dir, point_link, write_json
from nanochat.run_folder import (
    TEMPORARY,
    publish_folder,
    reject_step,
    remove_folder,
    step_folders,
    step_name,
)
from nanochat.runtime import World

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")


def save_checkpoint(
    run_dir: Path,
    step: int,
    *,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor] | None,
    state: Mapping[str, Any],
    extra: Mapping[str, Extra] | None,
    tokenizer_dir: Path,
    world: World,
    write_shards: Callable[[Path], None] | None = None,
) -> Path:
    """Write <run_dir>/step_NNNNNN; every rank calls this. Returns the folder.

    model, state and the tokenizer's files are taken from the main rank, optimizer and extra
    from each; write_shards fills a subfolder, by all ranks together. On a failed write (disk
    full) all ranks raise UserError, nothing of the folder stays and earlier checkpoints are as
    they were. A folder of the same step is replaced.
    """
    final = run_dir / step_name(step)
    temporary = run_dir / f"{TEMPORARY}{final.name}"
    own = [*(model.values() if world.is_main else ()), *(optimizer or {}).values()]
    num_bytes = int(world.sum(sum(tensor.nbytes for tensor in own)))

    def prepare() -> None:
        if world.is_main:
            remove_folder(temporary)
            temporary.mkdir(parents=True)

    def contents() -> Iterator[tuple[str, bytes]]:  # one at a time: each copies its tensors
        if world.is_main:
            yield MODEL_FILE, _serialize(model)
            yield STATE_FILE, json.dumps({**state, "step": step}, indent=2).encode()
            yield from ((name, (tokenizer_dir / name).read_bytes()) for name in TOKENIZER_FILES)
        if optimizer is not None:
            name = f"optimizer_rank{world.rank:02d}_of{world.size:02d}.safetensors"
            yield name, _serialize(optimizer)
        if extra is not None:
            yield f"extra_rank{world.rank:02d}.safetensors", _serialize_extra(extra)

    def write() -> dict[str, dict[str, Any]]:
        return {name: _write(temporary / name, data) for name, data in contents()}

    def write_together() -> None:
        if write_shards is not None:
            write_shards(temporary / SHARDED_FOLDER)

    def publish() -> None:
        if world.is_main:
            files = {name: entry for part in written for name, entry in part.items()}
            files |= {
                str(path.relative_to(temporary)): _entry(path.read_bytes())
                for path in sorted((temporary / SHARDED_FOLDER).glob("*"))
            }
            write_json(temporary / MANIFEST_FILE, {"format": 1, "files": files})
            publish_folder(temporary, final)
            _refresh_links(final)

    try:
        _on_all_ranks(prepare, world)
        written = _on_all_ranks(write, world)
        _on_all_ranks(write_together, world)
        _on_all_ranks(publish, world)
    except OSError as error:
        if world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        world.barrier()  # the free space is told without the part that was written
        raise UserError(_explain(error, run_dir, step, num_bytes)) from error
    return final


def reject(run_dir: Path, step: int) -> None:
    """Rename a step that has turned out unsound; the stage's links go back to the one before."""
    rejected = run_dir / step_name(step)
    if rejected.exists():  # else it was rejected before
        reject_step(run_dir, step)
    remaining = step_folders(run_dir)
    if remaining:
        _refresh_links(remaining[-1])
        return
    for link, target in _links(rejected).items():
        if link.is_symlink() and link.resolve() == target.resolve():
            link.unlink()


def _on_all_ranks(action: Callable[[], _Result], world: World) -> list[_Result]:
    """Run a file operation on every rank; the results of all, or one OSError on all."""
    result, problem = None, None
    try:
        result = action()
    except OSError as error:
        problem = error
    outcomes = world.gather_objects((result, problem))
    for _, problem in outcomes:
        if problem is not None:
            raise problem
    return [result for result, _ in outcomes]


def _write(path: Path, data: bytes) -> dict[str, Any]:
    """Write a file to the disk itself; its entry in the manifest."""
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return _entry(data)


def _entry(data: bytes) -> dict[str, Any]:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _serialize(tensors: Mapping[str, Tensor]) -> bytes:
    return save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def _serialize_extra(extra: Mapping[str, Extra]) -> bytes:
    """Tensors, arrays and numbers as safetensors; `kinds` remembers which were which."""
    tensors: dict[str, Tensor] = {}
    kinds: dict[str, str] = {}
    for name, value in extra.items():
        is_tensor = isinstance(value, Tensor)
        kinds[name] = (
            "tensor" if is_tensor else "array" if isinstance(value, np.ndarray) else "number"
        )
        tensor = value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
        tensors[name] = tensor.detach().cpu().contiguous()
    return save(tensors, metadata={"kinds": json.dumps(kinds)})


def _explain(error: OSError, run_dir: Path, step: int, num_bytes: int) -> str:
    """What a failed write means to the user."""
    rest = "earlier checkpoints are untouched"
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return f"cannot save step {step} in {run_dir}: {error}; {rest}"
    existing = next(folder for folder in (run_dir, *run_dir.parents) if folder.exists())
    return (
        f"no space to save step {step} in {run_dir}: it takes {num_bytes / 1e6:,.1f} MB, "
        f"{shutil.disk_usage(existing).free / 1e6:,.1f} MB are free; make room or set "
        f"NANOCHAT_BASE_DIR to another disk; {rest}"
    )


def _refresh_links(checkpoint: Path) -> None:
    """Point models/<stage>_model.safetensors and checkpoints/<stage> at the newest checkpoint."""
    for link, target in _links(checkpoint).items():
        try:
            point_link(link, target)
        except OSError as error:  # a convenience: the checkpoint is complete without it
            logger.warning("cannot link %s to %s (%s)", link, target, error.strerror)


def _links(checkpoint: Path) -> dict[Path, Path]:
    """The links to a stage's newest checkpoint, and what they point at."""
    for stage in STAGES:
        if checkpoint.parent.parent == checkpoints_dir(stage):
            return {
                base_dir() / "models" / f"{stage}_model.safetensors": checkpoint / MODEL_FILE,
                base_dir() / "checkpoints" / stage: checkpoint,
            }
    return {}
