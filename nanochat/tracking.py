"""What a run measures: rows of metrics.jsonl always; W&B and TensorBoard when asked for."""

from __future__ import annotations

import errno
import importlib
import json
import logging
import math
import netrc
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

from nanochat.common import UserError, atomic_write_text, base_dir

logger = logging.getLogger(__name__)

NO_RUN = "dummy"  # the run name that stands for "no wandb" (spec 0.2)
WANDB_HOST = "api.wandb.ai"
WANDB_SECONDS = 30  # a cluster node without a network must not wait longer for an answer


class Mirror(Protocol):
    """Somewhere else the rows go; must never fail."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take one row."""
        ...

    def close(self) -> None:
        """No more rows come."""
        ...


class MetricWriter:
    """Appends one JSON object a row, in the file as soon as `write` returns."""

    def __init__(self, path: Path, *, mirrors: Sequence[Mirror] = ()) -> None:
        self._path, self._mirrors = path, mirrors
        self._file: TextIO | None = None

    def write(self, step: int, **values: float) -> None:
        """Add a row {"step": step, **values}; what is not finite becomes null."""
        row = {key: value if math.isfinite(value) else None for key, value in values.items()}
        try:
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                unfinished = _lacks_line_end(self._path)
                self._file = self._path.open("a", encoding="utf-8")
                self._file.write("\n" if unfinished else "")
            self._file.write(json.dumps({"step": step, **row}) + "\n")
            self._file.flush()
        except OSError as error:
            is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            remedy = "free some space" if is_full else "make it writable"
            raise UserError(
                f"cannot write {self._path} ({error.strerror}); {remedy} and resume"
            ) from error
        for mirror in self._mirrors:
            mirror.log(step, values)

    def truncate(self, step: int) -> None:
        """Drop the rows behind `step`: a resumed run writes them again."""
        self._keep(lambda row: row["step"] <= step)

    def drop(self, step: int, names: Collection[str]) -> None:
        """Drop the rows of `step` that have one of these values: it is about to be written again.

        A kill after an evaluation leaves a row that the checkpoint to go on from knows nothing of.
        """
        self._keep(lambda row: row["step"] != step or row.keys().isdisjoint(names))

    def _keep(self, is_kept: Callable[[dict[str, Any]], bool]) -> None:
        self._close_file()
        if self._path.exists():
            rows = filter(is_kept, read_metrics(self._path))
            atomic_write_text(self._path, "".join(json.dumps(row) + "\n" for row in rows))

    def close(self) -> None:
        """Close the file and the mirrors."""
        self._close_file()
        for mirror in self._mirrors:
            mirror.close()

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, without what a killed or repeated run left behind.

    A row cut off by a crash is skipped. When the steps start over, the later rows count.
    """
    rows: list[dict[str, Any]] = []
    with path.open(encoding="utf-8") as file:
        for line in file:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                continue
            if rows and rows[-1]["step"] > row["step"]:
                rows = [earlier for earlier in rows if earlier["step"] < row["step"]]
            rows.append(row)
    return rows


def wandb_project(stage: str) -> str:
    """Where Weights & Biases keeps the runs of a stage: under the names of the 2025 nanochat."""
    return "nanochat" if stage == "base" else f"nanochat-{stage}"


def open_mirrors(
    run: str,
    *,
    project: str,
    config: Mapping[str, Any],
    tensorboard_dir: Path | None = None,
    first_step: int = 0,
) -> list[Mirror]:
    """What --run and --tensorboard ask for, as far as it can be had; never raises for the rest.

    first_step: what TensorBoard has of it and of later steps no longer counts.
    """
    mirrors = [start_wandb(run, project=project, config=config)]
    if tensorboard_dir is not None:
        mirrors.append(start_tensorboard(tensorboard_dir, first_step))
    return [mirror for mirror in mirrors if mirror is not None]


def start_tensorboard(folder: Path, first_step: int = 0) -> Mirror | None:
    """Event files in `folder`, which `tensorboard --logdir` shows; or say once why not.

    What an earlier run wrote there from `first_step` on is shown no more.
    """
    try:
        module = importlib.import_module("torch.utils.tensorboard")
        return _TensorBoardMirror(module.SummaryWriter(str(folder), purge_step=first_step))
    except ImportError:
        logger.warning(
            "--tensorboard: tensorboard is not installed, metrics go to metrics.jsonl only "
            "(pip install 'nanochat[tensorboard]')"
        )
    except Exception as error:  # whatever its writer may raise, training does not need it
        logger.warning("tensorboard could not start: %s", _one_line(error))
    return None


def start_wandb(run: str, *, project: str, config: Mapping[str, Any]) -> Mirror | None:
    """Open a wandb run of that name, or say once why not: logging never stops a training.

    Nothing for "" and "dummy". Without a key or an answer of the server the run is kept in
    $WANDB_DIR or <base folder>/wandb, from where `wandb sync` sends it later. $WANDB_MODE wins.
    """
    if run in ("", NO_RUN):
        return None
    try:
        wandb = importlib.import_module("wandb")
    except ImportError:
        logger.warning(
            "--run=%s: wandb is not installed, metrics go to metrics.jsonl only "
            "(pip install 'nanochat[wandb]')",
            run,
        )
        return None
    except Exception as error:  # such as the TypeError of a protobuf of another version
        logger.warning("wandb could not be imported: %s", _one_line(error))
        return None
    folder = Path(os.environ.get("WANDB_DIR") or base_dir() / "wandb")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        logger.warning("wandb could not start: %s", _one_line(error))
        return None
    mode = os.environ.get("WANDB_MODE") or ("online" if _has_wandb_key() else "offline")
    if mode == "offline":
        logger.info("wandb keeps this run in %s; send it later with `wandb sync`", folder)
    for attempt in dict.fromkeys([mode, "offline"]):
        try:
            opened = wandb.init(
                project=project,
                name=run,
                config=dict(config),
                dir=str(folder),
                mode=attempt,
                settings=wandb.Settings(init_timeout=WANDB_SECONDS),
            )
            return _WandbMirror(opened)
        except Exception as error:  # the package has no common base class for its failures
            logger.warning("wandb could not start %s: %s", attempt, _one_line(error))
    return None


class _GuardedMirror:
    """A service that is given up, with one notice, at its first failure."""

    def __init__(self, name: str, service: Any) -> None:
        self._name, self._service = name, service

    def _try(self, action: Callable[[Any], object]) -> None:
        if self._service is None:
            return
        try:
            action(self._service)
        except Exception as error:
            logger.warning("%s failed and gets no more metrics: %s", self._name, _one_line(error))
            self._service = None


class _WandbMirror(_GuardedMirror):
    def __init__(self, run: Any) -> None:
        super().__init__("wandb", run)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._try(lambda run: run.log(dict(values), step=step))

    def close(self) -> None:
        self._try(lambda run: run.finish())
        self._service = None


class _TensorBoardMirror(_GuardedMirror):
    def __init__(self, writer: Any) -> None:
        super().__init__("tensorboard", writer)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        def add(writer: Any) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        self._try(add)

    def close(self) -> None:
        self._try(lambda writer: writer.close())
        self._service = None


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators(WANDB_HOST) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _lacks_line_end(path: Path) -> bool:
    if not path.exists() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
