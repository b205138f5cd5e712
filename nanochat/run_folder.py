"""The folder of one run: a writer's lock, step folders, and how they appear and disappear.

Step folders are made and deleted under a temporary name, so that whoever looks sees each of
them whole or not at all.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import shutil
import socket
from collections.abc import Collection, Iterator
from pathlib import Path

from nanochat.common import UserError
from nanochat.runtime import World

logger = logging.getLogger(__name__)

TEMPORARY = "tmp."  # prefix of folders being written or removed; `step_folders` skips them
_STEP_FOLDER = re.compile(r"step_(\d{6,})")
_LOCK = ".lock"


def step_name(step: int) -> str:
    """Name of the folder of a step."""
    return f"step_{step:06d}"


def step_of(path: Path) -> int:
    """The step of a step folder."""
    match = _STEP_FOLDER.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def step_folders(run_dir: Path) -> list[Path]:
    """Step folders of a run, oldest step first."""
    if not run_dir.is_dir():
        return []
    folders = (path for path in run_dir.iterdir() if _STEP_FOLDER.fullmatch(path.name))
    return sorted(folders, key=step_of)


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
                for leftover in run_dir.glob(f"{TEMPORARY}*"):
                    logger.info("removing %s, left behind by an interrupted save", leftover)
                    remove_folder(leftover)
        problem = world.gather_objects(problem)[0]
        if problem:
            raise UserError(problem)
        yield


def prune(run_dir: Path, keep_last: int, *, keep: Collection[int] = ()) -> list[Path]:
    """Delete all but the newest `keep_last` steps and those in `keep`; returns what went."""
    if keep_last < 1:
        raise ValueError(f"keep_last is {keep_last}; a run keeps at least its newest checkpoint")
    removed = [p for p in step_folders(run_dir)[:-keep_last] if step_of(p) not in keep]
    for path in removed:
        remove_folder(path)
    return removed


def publish_folder(temporary: Path, final: Path) -> None:
    """Make a complete folder visible, replacing one of the same name."""
    old = _set_aside(final)
    os.replace(temporary, final)
    _sync_folder(final.parent)
    if old is not None:
        shutil.rmtree(old)


def remove_folder(path: Path) -> None:
    """Delete a folder, if it is there; from outside it disappears in one step."""
    old = _set_aside(path)
    if old is not None:
        shutil.rmtree(old)


def _set_aside(path: Path) -> Path | None:
    """Rename a folder so that nobody takes it for a checkpoint; None if it is not there.

    Of several processes that remove one folder, one gets it.
    """
    old = path.with_name(f"{TEMPORARY}{os.getpid()}.{path.name.removeprefix(TEMPORARY)}")
    try:
        os.replace(path, old)
    except FileNotFoundError:
        return None
    return old


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
