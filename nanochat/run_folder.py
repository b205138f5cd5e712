"""The folder of one run: a writer's lock, step folders, and how they appear and disappear.

Step folders are made and deleted under a temporary name, so that whoever looks sees each of
them whole or not at all.
"""

from __future__ import annotations

import contextlib
import errno
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
REPLACED = f"{TEMPORARY}replaced."  # of a step while a newer folder takes its name
DAMAGED = "damaged."  # of steps that a run has passed over
LATER = "later."  # of sound ones, when a run goes on from an earlier step
REJECTED = "rejected."  # of one whose model is not worth building on
PREVIOUS = "previous"  # folder of the run that was started over last; earlier ones have numbers
_STEP_FOLDER = re.compile(r"step_(\d{6,})")
_LOCK = ".lock"
_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # of some cluster file systems


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

    The lock ends with the process, however it ends. Leftovers of a killed save are removed, but
    for a step whose successor of the same name did not appear: it gets its name back.
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
            except OSError as error:
                if error.errno not in _WITHOUT_LOCKS:
                    raise
                # Without a lock a single run is still right.
                logger.warning("%s cannot be locked (%s); start one run in it", run_dir, error)
            if problem is None:
                file.truncate(0)
                file.write(f"{os.getpid()} on {socket.gethostname()}\n")
                file.flush()
                _clean_up(run_dir)
        problem = world.gather_objects(problem)[0]
        if problem:
            raise UserError(problem)
        yield


def lock_holder(run_dir: Path) -> str | None:
    """Who holds a run's folder for writing, as "PROCESS on HOST"; None when nobody does."""
    try:
        file = (run_dir / _LOCK).open(encoding="utf-8")
    except FileNotFoundError:
        return None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return file.read().strip()
        except OSError as error:
            if error.errno not in _WITHOUT_LOCKS:
                raise
    return None


def _clean_up(run_dir: Path) -> None:
    """Undo or finish what a killed process was doing to step folders."""
    for replaced in run_dir.glob(f"{REPLACED}*"):
        step = replaced.with_name(replaced.name.removeprefix(REPLACED))
        if not step.exists():
            logger.info("%s is back: an interrupted save did not replace it", step)
            os.replace(replaced, step)
    for leftover in run_dir.glob(f"{TEMPORARY}*"):
        logger.info("removing %s, left behind by an interrupted save", leftover)
        remove_folder(leftover)


def pass_over(run_dir: Path, newest: int, *, prefix: str = DAMAGED) -> None:
    """Take the steps after `newest` out of the way of a run that goes on from there.

    prefix: DAMAGED or LATER. They are kept under another name, where neither retention nor a reader
    takes them for steps. Rejected ones are no longer to be judged when the run goes on before them.
    """
    paths = [path for path in step_folders(run_dir) if step_of(path) > newest]
    if prefix == LATER:
        paths += [rejected_folder(run_dir, s) for s in rejected_steps(run_dir) if s > newest]
    for path in paths:
        aside = path.with_name(f"{prefix}{path.name}")
        remove_folder(aside)
        os.replace(path, aside)
        logger.warning("%s is %s and was renamed to %s", path, prefix.removesuffix("."), aside.name)


def rejected_folder(run_dir: Path, step: int) -> Path:
    """Where a step lies that was rejected."""
    return run_dir / f"{REJECTED}{step_name(step)}"


def rejected_steps(run_dir: Path) -> list[int]:
    """Steps that were rejected, oldest first."""
    names = (path.name.removeprefix(REJECTED) for path in run_dir.glob(f"{REJECTED}*"))
    return sorted(int(match[1]) for match in map(_STEP_FOLDER.fullmatch, names) if match)


def reject_step(run_dir: Path, step: int) -> None:
    """Rename a step so that no reader takes it for a model to build on."""
    aside = rejected_folder(run_dir, step)
    remove_folder(aside)
    os.replace(run_dir / step_name(step), aside)


def remove_rejected(run_dir: Path) -> None:
    """Delete all rejected steps of a run."""
    for step in rejected_steps(run_dir):
        remove_folder(rejected_folder(run_dir, step))


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
    old = final.with_name(f"{REPLACED}{final.name}")
    remove_folder(old)
    with contextlib.suppress(FileNotFoundError):
        os.replace(final, old)
    os.replace(temporary, final)
    _sync_folder(final.parent)
    remove_folder(old)


def remove_folder(path: Path) -> None:
    """Delete a folder, if it is there; from outside it disappears in one step.

    What the system does not delete yet (a file that is open elsewhere, on NFS) costs a warning.
    """
    old = _set_aside(path)
    if old is None:
        return
    try:
        shutil.rmtree(old)
    except OSError as error:
        logger.warning("%s is not deleted yet (%s); the next run does it", old, error)


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
