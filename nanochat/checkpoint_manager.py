"""Checkpoints: one folder per step, complete and verified or not there at all.

    <stage folder>/<tag>/step_000050/
        model.safetensors                   weights
        optimizer_rank00_of01.safetensors   optimizer state, one file per rank
        extra_rank00.safetensors            arrays of the loader's place, the same for all ranks
        state.json                          step, model config, user's config, metrics
        tokenizer.json, token_bytes.npy     the tokenizer the model was trained with
        sharded/                            instead of optimizer_*: weights and optimizer of a run
                                            with --shard=full, by torch.distributed.checkpoint
        manifest.json                       size and SHA-256 of every file above, written last

A folder is written under a temporary name, flushed to disk and renamed. No pickle, but for the
table of contents in sharded/, whose format is PyTorch's. Here they are read and found;
`checkpoint_writing` writes them.
"""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from nanochat.common import (
    STAGES,
    UserError,
    base_dir,
    checkpoints_dir,
    read_json,
    sha256_file,
)
from nanochat.gpt import GPT, GPTConfig
from nanochat.run_folder import (
    PREVIOUS,
    REJECTED,
    rejected_folder,
    rejected_steps,
    step_folders,
    step_name,
    step_of,
)
from nanochat.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

Extra: TypeAlias = "Tensor | np.ndarray[Any, Any] | int | float"

MODEL_FILE = "model.safetensors"
STATE_FILE = "state.json"
MANIFEST_FILE = "manifest.json"
TOKENIZER_FILES = ("tokenizer.json", "token_bytes.npy")
SHARDED_FOLDER = "sharded"
_TRAINING_FILES = re.compile(r"(optimizer|extra)_rank\d+(_of\d+)?\.safetensors|sharded/.*")
_RANK = re.compile(r"_rank(\d+)")
_COMMANDS = {
    "base": "python -m scripts.base_train",
    "mid": "python -m scripts.mid_train",
    "sft": "python -m scripts.chat_sft",
    "rl": "python -m scripts.chat_rl",
}
# A finetuned model answers best; what else may be there is better than nothing.
_CHAT_PREFERENCE = ("sft", "rl", "mid", "base")


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

    @property
    def stage(self) -> str:
        """The stage it lies under: base, mid, sft or rl."""
        folder = self.path.parent.parent.name
        return next(stage for stage in STAGES if checkpoints_dir(stage).name == folder)

    @property
    def is_rejected(self) -> bool:
        """Whether a validation has found it unsound."""
        return self.path.name.startswith(REJECTED)

    def load_model(self) -> dict[str, Tensor]:
        """The weights by parameter name, on the CPU."""
        return load_file(self.path / MODEL_FILE)

    def load_optimizer(self, rank: int, size: int) -> dict[str, Tensor]:
        """What `Optimizer.load_state_dict` of this rank takes.

        The rank's own file when `size` processes wrote the checkpoint; else the whole tensors,
        put together from all files, of which the optimizer cuts its part.
        """
        names = self._files_by_rank("optimizer_")
        if not names and self.is_sharded:
            raise UserError(f"{self.path} was saved with --shard=full; resume it with that flag")
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
        """The `extra` of this rank, in the types it was given; rank 0's where it saved none."""
        names = self._files_by_rank("extra_")
        if not names:
            return {}
        with safe_open(self.path / names[rank if rank < len(names) else 0], "pt") as file:
            kinds = json.loads(file.metadata()["kinds"])
            return {name: _from_tensor(file.get_tensor(name), kinds[name]) for name in kinds}

    def _files_by_rank(self, prefix: str) -> list[str]:
        names = [name for name in self.files if name.startswith(prefix)]
        return sorted(names, key=lambda name: int(_RANK.findall(name)[0]))

    @property
    def is_sharded(self) -> bool:
        """Whether weights and optimizer are there as shards of `--shard=full`."""
        return any(name.startswith(f"{SHARDED_FOLDER}/") for name in self.files)

    @property
    def has_optimizer(self) -> bool:
        """Whether each process has left its optimizer state."""
        return bool(self._files_by_rank("optimizer_"))

    @property
    def shards_folder(self) -> Path:
        """Where those shards are; UserError if there are none."""
        if not self.is_sharded:
            raise UserError(f"{self.path} was saved without --shard=full; resume it without")
        return self.path / SHARDED_FOLDER

    @property
    def weights_hash(self) -> str:
        """SHA-256 of the weights file: says whether two runs ended in the same place."""
        digest: str = read_json(self.path / MANIFEST_FILE)["files"][MODEL_FILE]["sha256"]
        return digest

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Refuse a tokenizer other than the one the model was trained with."""
        expected = self.state.get("tokenizer_hash", tokenizer.hash)
        if tokenizer.hash != expected:
            raise UserError(
                f"{self.path} was trained with another tokenizer (hash {expected[:12]}, yours "
                f"{tokenizer.hash[:12]}); train the model again, or copy that folder's "
                f"{' and '.join(TOKENIZER_FILES)} back into {base_dir() / 'tokenizer'}"
            )


def open_checkpoint(path: Path, *, weights_only: bool = False) -> Checkpoint:
    """Verify the folder's files against its manifest. Raises DamagedCheckpointError.

    weights_only: leave out optimizer and extra files, which inference does not read.
    """
    try:
        manifest = read_json(path / MANIFEST_FILE)
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
        state = read_json(path / STATE_FILE)
        return Checkpoint(path, int(state["step"]), path.parent.name, state, tuple(files))
    except FileNotFoundError as error:
        name = Path(error.filename).name
        raise DamagedCheckpointError(f"{path} is damaged: {name} is missing") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(f"{path} is damaged: unreadable {MANIFEST_FILE}") from error
    except DamagedCheckpointError:
        raise
    except UserError as error:  # not JSON
        raise DamagedCheckpointError(f"{path} is damaged: {error}") from error


def newest_checkpoint(run_dir: Path, *, weights_only: bool = False) -> Checkpoint | None:
    """The newest sound checkpoint of a run, None if it has none yet.

    Damaged ones are reported and passed over; UserError when all are damaged.
    """
    damage: list[str] = []
    for path in reversed(step_folders(run_dir)):
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
    stage: str | None,
    tag: str | None = None,
    step: int | None = None,
    *,
    weights_only: bool = False,
) -> Checkpoint:
    """The newest sound checkpoint of a stage, or the one asked for.

    stage: None picks the best to talk to that has one, and says so when it is not sft.
    tag: the run's folder name; None picks the run written to last, and logs the choice.
    step: None picks the newest sound one; a damaged step that was asked for is an error.
    Raises UserError that names the command which makes the missing thing.
    """
    if stage is None:
        return _find_best_to_talk_to(tag, step, weights_only=weights_only)
    folder = checkpoints_dir(stage)
    runs = _runs(stage)
    if not runs:
        others = [f"{s} ({', '.join(r.name for r in _runs(s))})" for s in STAGES if _runs(s)]
        raise UserError(
            f"no {stage} checkpoint in {folder}; make one with `{_COMMANDS[stage]}`"
            + _set_aside(stage, tag)
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
            raise UserError(
                f"no {stage} model {tag!r} in {folder}; there is {names}{_set_aside(stage, tag)}"
            )
    if step is None:
        checkpoint = newest_checkpoint(run_dir, weights_only=weights_only)
        assert checkpoint is not None  # a run has at least one step folder
        for later in rejected_steps(run_dir):
            if later > checkpoint.step:
                path = rejected_folder(run_dir, later)
                logger.warning("%s was found unsound; taking step %d", path, checkpoint.step)
        return checkpoint
    return open_step(run_dir, step, weights_only=weights_only)


def open_step(run_dir: Path, step: int, *, weights_only: bool = False) -> Checkpoint:
    """A step of a run, verified; UserError that names the others when it is not there."""
    path = run_dir / step_name(step)
    if not path.is_dir():
        steps = ", ".join(map(str, saved_steps(run_dir))) or "none"
        raise UserError(f"no step {step} in {run_dir}; there is {steps}")
    return open_checkpoint(path, weights_only=weights_only)


def _find_best_to_talk_to(tag: str | None, step: int | None, *, weights_only: bool) -> Checkpoint:
    """`find_checkpoint` in the first stage that has such a run with a sound checkpoint."""
    first, found = _CHAT_PREFERENCE[0], None
    damage: list[DamagedCheckpointError] = []
    for stage in _CHAT_PREFERENCE:
        runs = _runs(stage)
        if not (runs if tag is None else checkpoints_dir(stage) / tag in runs):
            continue
        try:
            found = find_checkpoint(stage, tag, step, weights_only=weights_only)
            break
        except DamagedCheckpointError as error:
            if step is not None:  # another stage's step of that number is another model
                raise
            damage.append(error)
    if found is None:
        if damage:
            raise damage[0]
        # The error says how to make one, and what there is.
        return find_checkpoint(first, tag, step, weights_only=weights_only)
    if found.stage != first:
        name = "model" if tag is None else f"model {tag!r}"
        aside = _set_aside(first, tag)
        missing = f"no {first} {name} yet ({_COMMANDS[first]} makes one{aside})"
        reason = "; ".join(map(str, damage)) or missing
        logger.warning("%s; taking %s instead", reason, found.stage)
    return found


def load_model(
    stage: str | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    tag: str | None = None,
    step: int | None = None,
) -> tuple[GPT, Tokenizer, Checkpoint]:
    """A model for inference: matrices cast to `dtype` once, embedding in fp32, no gradients.

    stage, tag and step choose its checkpoint as in `find_checkpoint`.
    """
    checkpoint = find_checkpoint(stage, tag, step, weights_only=True)
    return *model_of(checkpoint, device=device, dtype=dtype), checkpoint


def model_of(
    checkpoint: Checkpoint, *, device: torch.device, dtype: torch.dtype
) -> tuple[GPT, Tokenizer]:
    """The model of a checkpoint for inference, as `load_model` gives it."""
    tokenizer = Tokenizer.from_directory(checkpoint.path)
    model = GPT(GPTConfig.from_json(checkpoint.state["model_config"]))
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"{checkpoint.path}: the tokenizer has {tokenizer.vocab_size:,} tokens, the model "
            f"{model.config.vocab_size:,}; use a checkpoint whose files belong together"
        )
    model.load_state_dict(checkpoint.load_model())
    model.to(device).cast_matrices(dtype).requires_grad_(False).eval()
    logger.info("loaded %s model %s, step %d", checkpoint.stage, checkpoint.tag, checkpoint.step)
    return model, tokenizer


def list_checkpoints(stage: str) -> list[Path]:
    """Every step folder of a stage, run by run (the run written last at the end), by step."""
    return [path for run in _runs(stage) for path in step_folders(run)]


def saved_steps(run_dir: Path) -> list[int]:
    """Steps of which there is a folder, oldest first; nothing is verified."""
    return [step_of(path) for path in step_folders(run_dir)]


# ---- folders and files ------------------------------------------------------------------------


def _set_aside(stage: str, tag: str | None) -> str:
    """Where a run lies that is no checkpoint of the stage any more; "" for none.

    It was started over by one which came to no checkpoint, or its model was rejected.
    """
    folder = checkpoints_dir(stage)
    for run_dir in sorted(folder.glob("*")) if tag is None else [folder / tag]:
        if step_folders(run_dir):
            continue
        for step in rejected_steps(run_dir):
            return f"; {rejected_folder(run_dir, step)} was found unsound when it was validated"
        previous = run_dir / PREVIOUS
        if step_folders(previous):
            return (
                f"; an earlier run is in {previous}, put it back with `mv {previous}/* {run_dir}/`"
            )
    return ""


def _runs(stage: str) -> list[Path]:
    """Folders of a stage that hold a checkpoint; the one written to last at the end."""
    folder = checkpoints_dir(stage)
    if not folder.is_dir():
        return []
    candidates = [run for run in sorted(folder.iterdir()) if not run.is_symlink()]
    runs = {run: step_folders(run) for run in candidates}
    written = {
        run: max(p.stat().st_mtime_ns for p in steps) for run, steps in runs.items() if steps
    }
    return sorted(written, key=lambda run: written[run])


def _from_tensor(tensor: Tensor, kind: str) -> Extra:
    if kind == "tensor":
        return tensor
    return tensor.numpy() if kind == "array" else tensor.item()
