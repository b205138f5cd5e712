"""The base folder and every path below it, logging set-up, atomic writes, hashes.

Standard library only: every command imports this, and some of them must start at once.
Nothing here reads RANK or friends; `runtime` does and passes on what it found.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

STAGES = ("base", "mid", "sft", "rl")

_CHECKPOINT_FOLDERS = {
    "base": "base_checkpoints",
    "mid": "mid_checkpoints",
    "sft": "chatsft_checkpoints",
    "rl": "chatrl_checkpoints",
}
_SHARD_FOLDERS = {
    "fineweb-edu": "base_data",
    "climbmix": "base_data_climbmix",
    "embedded": "base_data_embedded",
}
DEFAULT_BASE_DIR = "~/.cache/nanochat"
# Names that documents use for something that lies elsewhere below the base folder.
_ALIASES = {"data_shards": "base_data", "tokenizer.model": "tokenizer/tokenizer.json"}
_HASH_CHUNK_BYTES = 1 << 20
_CHATTY_LIBRARIES = ("filelock", "fsspec", "httpcore", "httpx", "huggingface_hub", "urllib3")


class UserError(ValueError):
    """Something the user did or can mend; the entry point prints it as one line, exit 1."""


class ShortMemoryError(UserError):
    """The device has no memory for the least that can be asked of it."""


class NotScoredError(UserError):
    """A task has no score, whatever the model answers: better none than a wrong one."""


def no_numbers(where: str) -> NotScoredError:
    """What is said of a model whose logits are NaN: comparing them says nothing about it."""
    return NotScoredError(
        f"{where}: the model's logits are not numbers (NaN); if they are with --dtype=float32, "
        "too, its weights are broken: take another checkpoint (--step)"
    )


# ---- paths ------------------------------------------------------------------------------------


def base_dir() -> Path:
    """The folder of everything this project writes, created on demand.

    $NANOCHAT_BASE_DIR, read at each call, or ~/.cache/nanochat. Always absolute, so that a
    later change of the working directory cannot move it.
    """
    configured = os.environ.get("NANOCHAT_BASE_DIR") or DEFAULT_BASE_DIR
    path = Path(configured).expanduser().absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot create the base folder {path} ({error.strerror}); "
            "set NANOCHAT_BASE_DIR to a folder you can write to"
        ) from error
    return path


def tokenizer_dir() -> Path:
    """Where the tokenizer's files lie."""
    return base_dir() / "tokenizer"


def shards_dir(source: str) -> Path:
    """Where the parquet shards of a named source lie (a folder is its own place)."""
    return base_dir() / _lookup(_SHARD_FOLDERS, source, "data source")


def eval_bundle_dir(data: str) -> Path:
    """Where the CORE tasks that belong to a run on `data` lie."""
    return base_dir() / ("eval_bundle_embedded" if data == "embedded" else "eval_bundle")


def eval_bundle_name(data: str) -> str:
    """The word that keeps a CORE over the tasks of a run on `data` apart from published ones."""
    return "embedded" if data == "embedded" else ""


def checkpoints_dir(stage: str) -> Path:
    """Where a stage keeps its checkpoints, one folder per model tag."""
    return base_dir() / _lookup(_CHECKPOINT_FOLDERS, stage, "stage")


def report_dir() -> Path:
    """Where report sections and the finished report lie."""
    return base_dir() / "report"


def refresh_aliases() -> None:
    """Link the names that documents use to what is there; whatever else has one of them stays."""
    for name, place in _ALIASES.items():
        link, target = base_dir() / name, base_dir() / place
        if not target.exists() or (link.exists() and not link.is_symlink()):
            continue
        try:
            point_link(link, target)
        except OSError as error:  # a convenience: everything works without it
            logger.warning("cannot link %s to %s (%s)", link, target, error.strerror)


def point_link(link: Path, target: Path) -> None:
    """Make a relative symbolic link, or turn one that exists, in one step."""
    link.parent.mkdir(exist_ok=True)
    temporary = link.with_name(f".{link.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(os.path.relpath(target, link.parent))
    os.replace(temporary, link)


def _lookup(table: dict[str, str], key: str, what: str) -> str:
    if key not in table:
        raise UserError(f"unknown {what} {key!r}; use one of {', '.join(table)}")
    return table[key]


# ---- logging ----------------------------------------------------------------------------------


class _LineFormatter(logging.Formatter):
    """One line "HH:MM:SS message"; from WARNING up the level is named as well."""

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        if record.levelno < logging.WARNING:
            return line
        clock, _, rest = line.partition(" ")
        return f"{clock} {record.levelname.lower()}: {rest}"


class _OurHandler(logging.StreamHandler[Any]):
    """A type of our own, so that a second set-up replaces the first and nothing else."""


def setup_logging(is_main: bool = True, level: str = "INFO") -> None:
    """Send log lines to stderr: everything from the main process, only errors from others.

    May be called again, as `runtime.start` does once the rank is known; the last call counts.
    """
    handler = _OurHandler(sys.stderr)
    handler.setFormatter(_LineFormatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    root = logging.getLogger()
    for old in [h for h in root.handlers if isinstance(h, _OurHandler)]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper() if is_main else logging.ERROR)
    for name in _CHATTY_LIBRARIES:
        logging.getLogger(name).setLevel(logging.WARNING)


# ---- files ------------------------------------------------------------------------------------


def atomic_write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` so that `path` is seen either as it was or complete, even after a crash.

    The folder is created on demand. Temporary file beside the target, fsync, rename, fsync of
    the folder.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp creates private files; the result should be as readable as any other file.
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _fsync_folder(target.parent)


def atomic_write_text(path: str | os.PathLike[str], text: str) -> None:
    """`atomic_write_bytes` of `text` in UTF-8, line ends kept."""
    atomic_write_bytes(path, text.encode("utf-8"))


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as JSON, indented by 2, in its own key order; atomic."""
    atomic_write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file. FileNotFoundError when absent, UserError when it is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} is not valid JSON ({error}); delete it or put back a good copy"
        ) from error


def sha256_file(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder's lock, so that two processes do not write the same files at once.

    Waits for the other one, and says so. The lock ends with the process, however it ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("waiting for another command that writes to %s", folder)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            # Some cluster file systems have no locks; without one a single command is still right.
            logger.warning("%s cannot be locked (%s); run one command at a time", folder, error)
        yield


def _umask() -> int:
    # The only portable way to read the mask is to set it.
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
