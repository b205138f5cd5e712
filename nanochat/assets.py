"""What a run reads and does not make itself: where it lies, and whether it is there and whole.

An asset is declared by what reads it: a data source, a task, an evaluation. `tasks.needs` walks
these declarations, `nanochat.prefetch` fetches, this module says what is present.

Every asset has a manifest that is written last: files with size, rows and SHA-256. An asset is
present when its manifest is there and every file has the size and the footer it names.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.common import UserError, base_dir, read_json, sha256_file, write_json

logger = logging.getLogger(__name__)

MANIFEST_FORMAT = 1
PREFETCH = "python -m scripts.assets prefetch"


# ---- where an asset comes from ----------------------------------------------------------------


@dataclass(frozen=True)
class HubSplit:
    """The parquet files of one split of a data set on the Hugging Face hub."""

    dataset: str
    config: str
    split: str

    def __str__(self) -> str:
        return f"{self.dataset} ({self.config}, {self.split}) of the Hugging Face hub"


@dataclass(frozen=True)
class HubFile:
    """One file of a data set on the hub, by its path in the repository."""

    dataset: str
    file: str

    def __str__(self) -> str:
        return f"{self.file} of {self.dataset} of the Hugging Face hub"


@dataclass(frozen=True)
class Url:
    """A file at a web address; `sha256` where its content never changes."""

    url: str
    sha256: str | None = None

    def __str__(self) -> str:
        return self.url


@dataclass(frozen=True)
class ZipUrl:
    """A zip at a web address, unpacked; `folder` is the folder inside it that is wanted."""

    url: str
    folder: str

    def __str__(self) -> str:
        return self.url


@dataclass(frozen=True)
class Generated:
    """Files made on this machine, without a network."""

    make: Callable[[], object]
    """Makes what is missing of it."""
    is_current: Callable[[], bool]
    """Whether what is there was made by the program as it is now."""
    obstacle: Callable[[], str | None] = lambda: None
    """Why it cannot be made here, None when it can."""

    def __str__(self) -> str:
        return "generated here"


Source = HubSplit | HubFile | Url | ZipUrl | Generated


@dataclass(frozen=True)
class Asset:
    """A file, or a folder of files, that a run reads."""

    name: str
    """How commands call it, for example `openai/gsm8k:main:train`."""
    place: str
    """Path below the base folder."""
    source: Source
    license: str = "see its source"
    approximate_bytes: int = 0
    """For the free-disk check before the true size is known."""
    is_optional: bool = False
    """A run says what it leaves out and goes on without it."""
    is_replaceable: bool = False
    """People put files of their own in its place; one that can be read is not damaged."""

    @property
    def path(self) -> Path:
        """Where it lies on this machine, whether it is there or not."""
        return base_dir() / self.place

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder of files."""
        return isinstance(self.source, HubSplit | ZipUrl | Generated)

    @property
    def folder(self) -> Path:
        """The folder that the paths in its manifest start from."""
        return self.path if self.is_folder else self.path.parent

    @property
    def manifest_path(self) -> Path:
        """The manifest: in the folder itself, or in `.manifests` beside a single file."""
        if self.is_folder:
            return self.path / "manifest.json"
        return self.path.parent / ".manifests" / f"{self.path.name}.json"


def hub_split(dataset: str, config: str, split: str, *, license_name: str) -> Asset:
    """Declare one split of a data set of the hub."""
    return Asset(
        name=f"{dataset}:{config}:{split}",
        place=f"task_data/{dataset.replace('/', '--')}/{config}/{split}",
        source=HubSplit(dataset, config, split),
        license=license_name,
    )


# ---- what is inside a file --------------------------------------------------------------------


class DamagedError(ValueError):
    """A file that is not what its name says; the message says how it shows."""


def count_rows(path: Path) -> int | None:
    """Rows of a parquet, JSONL or text file, None for other kinds; DamagedError if unreadable.

    A web page that a proxy sent instead of the file is recognised as such.
    """
    if path.suffix == ".parquet":
        try:
            return int(pq.read_metadata(path).num_rows)
        except (pa.ArrowException, OSError) as error:
            raise DamagedError(f"its footer cannot be read ({_one_line(error)})") from error
    if path.suffix == ".jsonl":
        return _count_json_lines(path)
    if path.suffix == ".json":
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DamagedError(f"it is not JSON ({_one_line(error)})") from error
        return None
    if path.suffix == ".txt":
        with path.open("rb") as file:
            if file.read(64).lstrip().startswith(b"<"):
                raise DamagedError("it is a web page, not text")
            file.seek(0)
            return sum(1 for line in file if line.strip())
    return None


def _count_json_lines(path: Path) -> int:
    rows = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                json.loads(line)
            except ValueError as error:
                raise DamagedError(f"line {number} is not JSON ({_one_line(error)})") from error
            rows += 1
    if rows == 0:
        raise DamagedError("it is empty")
    return rows


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# ---- manifests --------------------------------------------------------------------------------


@dataclass(frozen=True)
class FileRecord:
    """What a manifest says about one file."""

    path: str
    """Relative to the asset's folder."""
    num_bytes: int
    rows: int | None
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What was there when the asset was complete."""

    files: tuple[FileRecord, ...]
    revision: str | None = None
    """Commit of the repository that the files are of."""

    @property
    def num_bytes(self) -> int:
        """Size of all files."""
        return sum(record.num_bytes for record in self.files)

    @property
    def rows(self) -> int | None:
        """Rows of all files together, None where they have no rows."""
        counts = [record.rows for record in self.files if record.rows is not None]
        return sum(counts) if counts else None


def record_file(folder: Path, path: Path) -> FileRecord:
    """Read a file once and say what a manifest has to say about it; DamagedError."""
    return FileRecord(
        path=path.relative_to(folder).as_posix(),
        num_bytes=path.stat().st_size,
        rows=count_rows(path),
        sha256=sha256_file(path),
    )


def write_manifest(asset: Asset, manifest: Manifest) -> None:
    """Declare an asset complete. Its files must be in place."""
    value = {
        "format": MANIFEST_FORMAT,
        "name": asset.name,
        "source": str(asset.source),
        "license": asset.license,
        "revision": manifest.revision,
        "bytes": manifest.num_bytes,
        "rows": manifest.rows,
        "files": [
            {"path": r.path, "bytes": r.num_bytes, "rows": r.rows, "sha256": r.sha256}
            for r in manifest.files
        ],
    }
    write_json(asset.manifest_path, value)


def read_manifest(asset: Asset) -> Manifest | None:
    """Read an asset's manifest, None when there is none or it cannot be understood."""
    try:
        value: Any = read_json(asset.manifest_path)
        if value["format"] != MANIFEST_FORMAT:
            return None
        files = tuple(
            FileRecord(str(f["path"]), int(f["bytes"]), f["rows"], str(f["sha256"]))
            for f in value["files"]
        )
        return Manifest(files, value["revision"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (UserError, KeyError, TypeError, ValueError) as error:
        logger.warning("%s is not a manifest (%s)", asset.manifest_path, _one_line(error))
        return None


# ---- is it there ------------------------------------------------------------------------------


def problem_with(asset: Asset, *, verify: bool = False) -> str | None:
    """Say why an asset cannot be used, None when it can.

    Sizes and footers are compared with the manifest, a few milliseconds a file; `verify` reads
    all bytes and compares hashes as well. What is generated can be used wherever it can be made.
    """
    if isinstance(asset.source, Generated):
        return None if asset.source.is_current() else asset.source.obstacle()
    manifest = read_manifest(asset)
    if manifest is None:
        return "there, but without a manifest" if asset.path.exists() else "missing"
    for record in manifest.files:
        reason = file_problem(asset.folder / record.path, record, verify=verify)
        if reason is not None:
            return f"{record.path} {reason}"
    return None


def file_problem(path: Path, record: FileRecord, *, verify: bool = False) -> str | None:
    """Say in what a file differs from its record, None when in nothing that was looked at."""
    try:
        size = os.stat(path).st_size
    except OSError:
        return "is missing"
    if size != record.num_bytes:
        return f"has {size:,} bytes instead of {record.num_bytes:,}"
    if path.suffix == ".parquet":
        try:
            rows = count_rows(path)
        except DamagedError as error:
            return f"is damaged: {error}"
        if rows != record.rows:
            return f"has {rows} rows instead of {record.rows}"
    if verify and sha256_file(path) != record.sha256:
        return "was altered: its SHA-256 is not that of the manifest"
    return None


def require(asset: Asset) -> Manifest:
    """Return the manifest of an asset that can be used; UserError with the command that mends it.

    A generated asset is made now if it is not there.
    """
    if isinstance(asset.source, Generated):
        if not asset.source.is_current():
            asset.source.make()
        return Manifest(())
    reason = problem_with(asset)
    manifest = None if reason else read_manifest(asset)
    if manifest is None:
        raise UserError(
            f"{asset.name} cannot be read from {asset.path}: {reason or 'its manifest is gone'}; "
            f"on a machine with internet run: {PREFETCH} {asset.name}"
        )
    return manifest


def files_of(asset: Asset) -> list[Path]:
    """Return the files of an asset that can be used, in the manifest's order; else UserError."""
    return [asset.folder / record.path for record in require(asset).files]
