"""Checkpoints: one folder per step, complete and verified or not there at all.

    <stage folder>/<tag>/step_000050/
        model.safetensors                   weights
        optimizer_rank00_of01.safetensors   optimizer state, one file per rank
        extra_rank00.safetensors            loader and random state, one file per rank
        state.json                          step, model config, user's config, metrics
        tokenizer.json, token_bytes.npy     the tokenizer the model was trained with
        manifest.json                       size and SHA-256 of every file above, written last

A folder is written under a temporary name, flushed to disk and renamed. No pickle anywhere.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import socket
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from nanochat.common import (
    STAGES,
    UserError,
    base_dir,
    checkpoints_dir,
    read_json,
    sha256_file,
    write_json,
)
from nanochat.gpt import GPT, GPTConfig
from nanochat.runtime import World
from nanochat.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

Extra: TypeAlias = "Tensor | np.ndarray[Any, Any] | int | float"

_MODEL = "model.safetensors"
_STATE = "state.json"
_MANIFEST = "manifest.json"
_TOKENIZER_FILES = ("tokenizer.json", "token_bytes.npy")
_TRAINING_FILES = re.compile(r"(optimizer|extra)_rank\d+(_of\d+)?\.safetensors")
_STEP_FOLDER = re.compile(r"step_(\d{6,})")
_TEMPORARY = "tmp."  # prefix of folders being written or removed; discovery never sees them
_LOCK = ".lock"
_COMMANDS = {
    "base": "python -m scripts.base_train",
    "mid": "python -m scripts.mid_train",
    "sft": "python -m scripts.chat_sft",
    "rl": "python -m scripts.chat_rl",
}


class DamagedCheckpointError(UserError):
    """A checkpoint folder whose files are not those its manifest describes."""


# ---- reading ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint folder. `state` is the content of state.json."""

    path: Path
    step: int
    tag: str
    state: dict[str, Any]
    files: tuple[str, ...]

    def load_model(self) -> dict[str, Tensor]:
        """The weights by parameter name, on the CPU."""
        return load_file(self.path / _MODEL)

    def load_optimizer(self, rank: int, size: int) -> dict[str, Tensor]:
        """What `Optimizer.load_state_dict` of this rank takes.

        The rank's own file when `size` processes wrote the checkpoint; else the whole tensors,
        put together from all files, of which the optimizer cuts its part.
        """
        names = sorted(name for name in self.files if name.startswith("optimizer_"))
        if not names:
            raise UserError(f"{self.path} holds weights only; it cannot resume an optimizer")
        if len(names) == size:
            return load_file(self.path / names[rank])
        shards = [load_file(self.path / name) for name in names]
        whole: dict[str, Tensor] = {}
        for name in dict.fromkeys(name for shard in shards for name in shard):
            parts = [shard[name] for shard in shards if name in shard]
            # Values without dimensions are equal on every rank; see Optimizer.state_dict.
            whole[name] = parts[0] if parts[0].ndim == 0 else torch.cat(parts)
        return whole

    def load_extra(self, rank: int) -> dict[str, Extra]:
        """What this rank saved as `extra`, in the types it was given; rank 0's for a new rank."""
        names = sorted(name for name in self.files if name.startswith("extra_"))
        if not names:
            return {}
        with safe_open(self.path / names[rank if rank < len(names) else 0], "pt") as file:
            kinds = json.loads(file.metadata()["kinds"])
            return {name: _from_tensor(file.get_tensor(name), kinds[name]) for name in kinds}

    @property
    def weights_hash(self) -> str:
        """SHA-256 of the weights file: says whether two runs ended in the same place."""
        digest: str = read_json(self.path / _MANIFEST)["files"][_MODEL]["sha256"]
        return digest

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Refuse a tokenizer other than the one the model was trained with."""
        expected = self.state.get("tokenizer_hash", tokenizer.hash)
        if tokenizer.hash != expected:
            raise UserError(
                f"{self.path} was trained with another tokenizer (hash {expected[:12]}, yours "
                f"{tokenizer.hash[:12]}); train the model again, or copy that folder's "
                f"{' and '.join(_TOKENIZER_FILES)} back into {base_dir() / 'tokenizer'}"
            )


def open_checkpoint(path: Path, *, weights_only: bool = False) -> Checkpoint:
    """Verify the folder's files against its manifest. Raises DamagedCheckpointError.

    weights_only: leave out optimizer and extra files, which inference does not read.
    """
    try:
        manifest = read_json(path / _MANIFEST)
        files: dict[str, dict[str, Any]] = manifest["files"]
        for name, entry in files.items():
            if weights_only and _TRAINING_FILES.fullmatch(name):
                continue
            size = (path / name).stat().st_size
            if size != entry["bytes"]:
                raise DamagedCheckpointError(
                    f"{path} is damaged: {name} has {size:,} bytes, not {entry['bytes']:,}"
                )
            if sha256_file(path / name) != entry["sha256"]:
                raise DamagedCheckpointError(f"{path} is damaged: {name} has another SHA-256")
        state = read_json(path / _STATE)
        return Checkpoint(path, int(state["step"]), path.parent.name, state, tuple(files))
    except FileNotFoundError as error:
        name = Path(error.filename).name
        raise DamagedCheckpointError(f"{path} is damaged: {name} is missing") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(f"{path} is damaged: unreadable {_MANIFEST}") from error
    except DamagedCheckpointError:
        raise
    except UserError as error:  # not JSON
        raise DamagedCheckpointError(f"{path} is damaged: {error}") from error


def newest_checkpoint(run_dir: Path, *, weights_only: bool = False) -> Checkpoint | None:
    """The newest sound checkpoint of a run, None if it has none yet.

    Damaged ones are reported and passed over; UserError when all are damaged.
    """
    damage: list[str] = []
    for path in reversed(_step_folders(run_dir)):
        try:
            checkpoint = open_checkpoint(path, weights_only=weights_only)
        except DamagedCheckpointError as error:
            damage.append(str(error))
            continue
        if damage:
            logger.warning("%s; using step %d instead", "; ".join(damage), checkpoint.step)
        return checkpoint
    if damage:
        raise DamagedCheckpointError(
            f"no sound checkpoint in {run_dir}: {'; '.join(damage)}; delete the damaged folders "
            "to start over"
        )
    return None


def find_checkpoint(
    stage: str, tag: str | None = None, step: int | None = None, *, weights_only: bool = False
) -> Checkpoint:
    """The newest sound checkpoint of a stage, or the one asked for.

    tag: the run's folder name; None picks the run written to last, and logs the choice.
    step: None picks the newest sound one; a damaged step that was asked for is an error.
    Raises UserError that names the command which makes the missing thing.
    """
    folder = checkpoints_dir(stage)
    runs = _runs(stage)
    if not runs:
        others = [f"{s} ({', '.join(r.name for r in _runs(s))})" for s in STAGES if _runs(s)]
        raise UserError(
            f"no {stage} checkpoint in {folder}; make one with `{_COMMANDS[stage]}`"
            + (f"; there is {', '.join(others)}" if others else "")
        )
    names = ", ".join(run.name for run in runs)
    if tag is None:
        run_dir = runs[-1]
        if len(runs) > 1:
            logger.info("taking %s model %s, written last of %s", stage, run_dir.name, names)
    else:
        run_dir = folder / tag
        if run_dir not in runs:
            raise UserError(f"no {stage} model {tag!r} in {folder}; there is {names}")
    if step is None:
        checkpoint = newest_checkpoint(run_dir, weights_only=weights_only)
        assert checkpoint is not None  # a run has at least one step folder
        return checkpoint
    path = run_dir / _step_name(step)
    if not path.is_dir():
        steps = ", ".join(str(_step_of(other)) for other in _step_folders(run_dir))
        raise UserError(f"no step {step} in {run_dir}; there is {steps}")
    return open_checkpoint(path, weights_only=weights_only)


def load_model(
    stage: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    tag: str | None = None,
    step: int | None = None,
) -> tuple[GPT, Tokenizer, Checkpoint]:
    """A model for inference: matrices cast to `dtype` once, embedding in fp32, no gradients."""
    checkpoint = find_checkpoint(stage, tag, step, weights_only=True)
    tokenizer = Tokenizer.from_directory(checkpoint.path)
    model = GPT(GPTConfig.from_json(checkpoint.state["model_config"]))
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"{checkpoint.path}: the tokenizer has {tokenizer.vocab_size:,} tokens, the model "
            f"{model.config.vocab_size:,}; use a checkpoint whose files belong together"
        )
    model.load_state_dict(checkpoint.load_model())
    model.to(device).cast_matrices(dtype).requires_grad_(False).eval()
    logger.info("loaded %s model %s, step %d", stage, checkpoint.tag, checkpoint.step)
    return model, tokenizer, checkpoint


def list_checkpoints(stage: str) -> list[Path]:
    """Every step folder of a stage, run by run (the run written last at the end), by step."""
    return [path for run in _runs(stage) for path in _step_folders(run)]


# ---- writing ----------------------------------------------------------------------------------


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
) -> Path:
    """Write <run_dir>/step_NNNNNN; every rank calls this. Returns the folder.

    model, state and the tokenizer's files are taken from the main rank, optimizer and extra
    from each. On a failed write (disk full) all ranks raise UserError, nothing of the folder
    stays and earlier checkpoints are as they were. A folder of the same step is replaced.
    """
    final = run_dir / _step_name(step)
    temporary = run_dir / f"{_TEMPORARY}{final.name}"
    tensors = [*(model.values() if world.is_main else ()), *(optimizer or {}).values()]
    num_bytes = int(world.sum(sum(tensor.nbytes for tensor in tensors)))

    def together(action: Any) -> list[Any]:
        """Run `action` here; its result on every rank, or the same UserError on every rank."""
        result, problem = None, None
        try:
            result = action()
        except OSError as error:
            problem = _explain(error, run_dir, step, num_bytes)
        outcomes = world.gather_objects((result, problem))
        problems = [problem for _, problem in outcomes if problem]
        if problems:
            if world.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise UserError(problems[0])
        return [result for result, _ in outcomes]

    def prepare() -> None:
        if world.is_main:
            _remove_folder(temporary)
            temporary.mkdir(parents=True)

    def write() -> dict[str, dict[str, Any]]:
        files: dict[str, dict[str, Any]] = {}
        if world.is_main:
            files[_MODEL] = _write(temporary / _MODEL, _serialize(model))
            text = json.dumps({**state, "step": step}, indent=2, ensure_ascii=False) + "\n"
            files[_STATE] = _write(temporary / _STATE, text.encode())
            for name in _TOKENIZER_FILES:
                files[name] = _write(temporary / name, (tokenizer_dir / name).read_bytes())
        if optimizer is not None:
            name = f"optimizer_rank{world.rank:02d}_of{world.size:02d}.safetensors"
            files[name] = _write(temporary / name, _serialize(optimizer))
        if extra is not None:
            name = f"extra_rank{world.rank:02d}.safetensors"
            files[name] = _write(temporary / name, _serialize_extra(extra))
        return files

    def publish() -> None:
        if world.is_main:
            files = {name: entry for part in written for name, entry in sorted(part.items())}
            write_json(temporary / _MANIFEST, {"format": 1, "files": files})
            _rename(temporary, final)
            _refresh_links(final)

    together(prepare)
    written = together(write)
    together(publish)
    return final


def prune(run_dir: Path, keep_last: int, *, keep: Collection[int] = ()) -> list[Path]:
    """Delete all but the newest `keep_last` steps and those in `keep`; returns what went."""
    if keep_last < 1:
        raise ValueError(f"keep_last is {keep_last}; a run keeps at least its newest checkpoint")
    removed = [p for p in _step_folders(run_dir)[:-keep_last] if _step_of(p) not in keep]
    for path in removed:
        _remove_folder(path)
    return removed


@contextlib.contextmanager
def lock_run(run_dir: Path, world: World | None = None) -> Iterator[None]:
    """Hold a run's folder for writing; UserError, on all ranks, if another process does.

    The lock ends with the process, however it ends. Leftovers of a killed save are removed.
    """
    world = world or World()
    with contextlib.ExitStack() as stack:
        problem = None
        if world.is_main:
            run_dir.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(run_dir / _LOCK, "a+", encoding="utf-8"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                problem = (
                    f"{run_dir} is in use by process {file.read().strip()}; wait for it, stop it, "
                    "or give this run another --model-tag"
                )
            else:
                file.truncate(0)
                file.write(f"{os.getpid()} on {socket.gethostname()}\n")
                file.flush()
                for leftover in run_dir.glob(f"{_TEMPORARY}*"):
                    logger.info("removing %s, left behind by an interrupted save", leftover)
                    _remove_folder(leftover)
        problem = world.gather_objects(problem)[0]
        if problem:
            raise UserError(problem)
        yield


# ---- folders and files ------------------------------------------------------------------------


def _step_name(step: int) -> str:
    return f"step_{step:06d}"


def _step_of(path: Path) -> int:
    match = _STEP_FOLDER.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def _step_folders(run_dir: Path) -> list[Path]:
    """Step folders of a run, oldest step first."""
    if not run_dir.is_dir():
        return []
    folders = (path for path in run_dir.iterdir() if _STEP_FOLDER.fullmatch(path.name))
    return sorted(folders, key=_step_of)


def _runs(stage: str) -> list[Path]:
    """Folders of a stage that hold a checkpoint; the one written to last at the end."""
    folder = checkpoints_dir(stage)
    if not folder.is_dir():
        return []
    candidates = [run for run in sorted(folder.iterdir()) if not run.is_symlink()]
    runs = {run: _step_folders(run) for run in candidates}
    written = {
        run: max(p.stat().st_mtime_ns for p in steps) for run, steps in runs.items() if steps
    }
    return sorted(written, key=lambda run: written[run])


def _write(path: Path, data: bytes) -> dict[str, Any]:
    """Write a file to the disk itself; its entry in the manifest."""
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
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


def _from_tensor(tensor: Tensor, kind: str) -> Extra:
    if kind == "tensor":
        return tensor
    return tensor.numpy() if kind == "array" else tensor.item()


def _explain(error: OSError, run_dir: Path, step: int, num_bytes: int) -> str:
    """What a failed write means to the user."""
    rest = "earlier checkpoints are untouched"
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return f"cannot save step {step} in {run_dir}: {error}; {rest}"
    free = shutil.disk_usage(run_dir).free
    return (
        f"no space to save step {step} in {run_dir}: it takes {num_bytes / 1e6:,.0f} MB, "
        f"{free / 1e6:,.0f} MB are free; make room or set NANOCHAT_BASE_DIR elsewhere; {rest}"
    )


def _rename(temporary: Path, final: Path) -> None:
    """Make a complete folder visible, replacing one of the same step."""
    old = final.with_name(f"{_TEMPORARY}old.{final.name}")
    if final.exists():
        _remove_folder(old)
        os.replace(final, old)
    os.replace(temporary, final)
    _sync_folder(final.parent)
    _remove_folder(old)


def _remove_folder(path: Path) -> None:
    """Delete a folder, if there, in one visible step: half of a checkpoint is never seen."""
    if path.name.startswith(_TEMPORARY):
        doomed = path
    else:
        doomed = path.with_name(f"{_TEMPORARY}{path.name}")
        os.replace(path, doomed)
    if doomed.exists():
        shutil.rmtree(doomed)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _refresh_links(checkpoint: Path) -> None:
    """Point models/<stage>_model.safetensors and checkpoints/<stage> at the newest checkpoint."""
    for stage in STAGES:
        if checkpoint.parent.parent != checkpoints_dir(stage):
            continue
        links = {
            base_dir() / "models" / f"{stage}_model.safetensors": checkpoint / _MODEL,
            base_dir() / "checkpoints" / stage: checkpoint,
        }
        for link, target in links.items():
            link.parent.mkdir(exist_ok=True)
            temporary = link.with_name(f"{_TEMPORARY}{link.name}")
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(os.path.relpath(target, link.parent))
            os.replace(temporary, link)
