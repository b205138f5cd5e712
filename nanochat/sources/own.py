"""Text of your own as pretraining shards: JSONL and plain text in any language, converted once.

Every document goes to the shard that a hash of its text names. So documents of all files are
mixed, the validation shard is a fair sample, and a text that comes twice meets itself in one shard,
where the second is left out: it can never be in training and validation.
"""

from __future__ import annotations

import hashlib
import logging
import math
import multiprocessing
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from nanochat.common import UserError, base_dir, locked, read_json, write_json
from nanochat.sources.parquet import ParquetSource, shard_name, write_shard
from nanochat.sources.plain_text import (
    LINE_KINDS,
    Skipped,
    Unit,
    line_number,
    read_documents,
    work_units,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")
Place = tuple[Path, int | None]  # a file, and the byte where a line of it begins

SHARD_CHARACTERS = 64_000_000  # a worker holds one shard in memory
# A text whose hash, a number of 64 bits, is below this validates: one document in a hundred.
_VALIDATION_BELOW = 2**64 // 100
NUM_EXAMPLES = 5  # of each reason to skip something, in the report
_NOTE = "conversion.json"
_SHUFFLE_SEED = 1337
_SCHEMA = pa.schema([("text", pa.large_string())])


@dataclass
class Report:
    """What became of the files."""

    documents: int = 0
    characters: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    """Reason -> how often."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """Reason -> the first places, as `file, line 3`."""

    def add(self, other: Report) -> None:
        """Count another report's files as well."""
        self.documents += other.documents
        self.characters += other.characters
        self.skipped += other.skipped

    def to_json(self) -> dict[str, Any]:
        """The report as `last_report` reads it."""
        return vars(self) | {"skipped": dict(self.skipped)}

    def lines(self) -> list[str]:
        """The report for people."""
        lines = [f"{self.documents:,} documents, {self.characters:,} characters"]
        for reason, count in self.skipped.most_common():
            places = "; ".join(self.examples.get(reason, []))
            lines.append(f"skipped {count:,}: {reason}" + (f" ({places})" if places else ""))
        return lines


def find_inputs(folder: Path) -> list[Path]:
    """The JSONL and text files of a folder and its subfolders, or the file itself."""
    files = [folder] if folder.is_file() else sorted(p for p in folder.rglob("*") if p.is_file())
    top = folder.parent if folder.is_file() else folder
    return [
        path
        for path in files
        if path.suffix in LINE_KINDS
        and not any(part.startswith(".") for part in path.relative_to(top).parts)
    ]


def is_text(folder: Path) -> bool:
    """Whether a folder, or file, is one to convert: a note beside parquet shards makes it none."""
    return folder.exists() and not any(folder.glob("*.parquet")) and bool(find_inputs(folder))


def is_converted(folder: Path) -> bool:
    """Whether a folder can be read as it is: shards, or texts that became shards."""
    if is_text(folder):
        return _state_of(find_inputs(folder)) == _converted_state(shards_of(folder))
    return obstacle(folder) is None


def obstacle(folder: Path) -> str | None:
    """Why a folder is of no use, None when it is."""
    if is_text(folder):
        return None
    try:
        ParquetSource.from_folder(folder)
    except UserError as error:
        return str(error)
    return None


def open_own(folder: Path, *, num_workers: int = 1) -> ParquetSource:
    """The documents of a folder of JSONL or text files, converted now unless that was done."""
    inputs = find_inputs(folder)
    target = shards_of(folder)
    with locked(target):
        if _state_of(inputs) != _converted_state(target):
            for line in convert(inputs, target, num_workers=num_workers).lines():
                logger.info("%s: %s", folder, line)
    shards = sorted(target.glob("shard_*.parquet"))
    return ParquetSource(str(folder), shards[:-1], shards[-1])


def shards_of(folder: Path) -> Path:
    """Where the shards of a folder lie; two folders of one name do not meet."""
    place = folder.expanduser().resolve()
    digest = hashlib.sha256(str(place).encode()).hexdigest()[:8]
    return base_dir() / "base_data_own" / f"{place.stem}-{digest}"


def last_report(folder: Path) -> Report | None:
    """The report of a conversion that was made before."""
    try:
        saved = read_json(shards_of(folder) / _NOTE)["report"]
    except (FileNotFoundError, UserError):
        return None
    return Report(**(saved | {"skipped": Counter(saved["skipped"])}))


def convert(inputs: Sequence[Path], target: Path, *, num_workers: int = 1) -> Report:
    """Write the shards of the input files to `target`; UserError without two usable documents."""
    logger.info("converting %d files to shards in %s", len(inputs), target)
    for old in [*target.glob("shard_*.parquet"), target / _NOTE]:
        old.unlink(missing_ok=True)
    state = _state_of(inputs)
    temporary = target / ".units"
    found = _read_all(inputs, temporary, _VALIDATION_BELOW, num_workers)
    if not found.is_split and found.report.documents > 1:
        # Few documents: the one with the smallest hash validates.
        found = _read_all(inputs, temporary, found.smallest_hash + 1, num_workers)
    report = found.report
    report.examples = {
        reason: [_name(path, offset) for path, offset in places]
        for reason, places in found.places.items()
    }
    if not found.is_split:
        shutil.rmtree(temporary)
        problems = "; ".join(report.lines()[1:]) or "nothing was skipped"
        raise UserError(
            f"{report.documents} documents in {len(inputs)} files are too few to train and to "
            f"validate with ({problems}); a JSONL line is an object with a field 'text'"
        )
    wanted = [bucket for bucket, size in enumerate(found.sizes) if size]
    merge = partial(_write_one, temporary, target)
    # By number, so that the validation shard is the last and no number is left out.
    for repeated in _map(merge, list(enumerate(wanted)), num_workers):
        report.add(repeated)
    shutil.rmtree(temporary)
    write_json(target / _NOTE, {"files": state, "report": report.to_json()})
    return report


def _name(path: Path, offset: int | None) -> str:
    return path.name if offset is None else f"{path.name}, line {line_number(path, offset)}"


# ---- which files ------------------------------------------------------------------------------


def _state_of(inputs: Sequence[Path]) -> list[list[Any]]:
    """What changes when a file does."""
    return [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in inputs]


def _converted_state(target: Path) -> list[list[Any]] | None:
    try:
        files: list[list[Any]] = read_json(target / _NOTE)["files"]
    except (FileNotFoundError, UserError, KeyError, TypeError):
        return None
    return files


# ---- from files to buckets, from buckets to shards --------------------------------------------


@dataclass
class _Found:
    """What reading the files gave."""

    report: Report
    sizes: list[int]
    """Documents of each bucket; the last one validates."""
    smallest_hash: int = 2**64
    places: dict[str, list[Place]] = field(default_factory=dict)
    """Reason -> the first that was skipped for it."""

    def skip(self, reason: str, places: list[Place], count: int = 1) -> None:
        """Count something that is no document, and remember where if there is room."""
        self.report.skipped[reason] += count
        self.places[reason] = (self.places.get(reason, []) + places)[:NUM_EXAMPLES]

    @property
    def is_split(self) -> bool:
        """Whether there is something to train and something to validate with."""
        return self.sizes[-1] > 0 and any(self.sizes[:-1])


def _read_all(
    inputs: Sequence[Path], temporary: Path, validation_below: int, num_workers: int
) -> _Found:
    """Sort all documents into buckets on disk."""
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    num_train = max(1, math.ceil(sum(p.stat().st_size for p in inputs) / SHARD_CHARACTERS))
    read = partial(_read_one, temporary, num_train, validation_below)
    total = _Found(Report(), [0] * (num_train + 1))
    for found in _map(read, list(enumerate(work_units(inputs))), num_workers):
        total.report.add(found.report)
        for reason, places in found.places.items():
            total.skip(reason, places, count=0)  # the report has counted them
        total.sizes = [a + b for a, b in zip(total.sizes, found.sizes, strict=True)]
        total.smallest_hash = min(total.smallest_hash, found.smallest_hash)
    return total


def _read_one(
    temporary: Path, num_train: int, validation_below: int, numbered: tuple[int, Unit]
) -> _Found:
    """Sort the documents of one piece into files that have one batch for each bucket."""
    number, (path, start, stop) = numbered
    found = _Found(Report(), [0] * (num_train + 1))
    buckets: list[list[str]] = [[] for _ in found.sizes]
    written = characters = 0
    for text in read_documents(path, start, stop):
        if isinstance(text, Skipped):
            found.skip(text.reason, [(path, text.offset)])
            continue
        digest = hashlib.sha256(text.encode()).digest()
        first, second = (int.from_bytes(digest[i : i + 8], "big") for i in (0, 8))
        bucket = num_train if first < validation_below else second % num_train
        buckets[bucket].append(text)
        found.smallest_hash = min(found.smallest_hash, first)
        found.sizes[bucket] += 1
        characters += len(text)
        if characters >= SHARD_CHARACTERS:  # a compressed piece can be of any size
            _write_buckets(temporary / f"{number:06d}_{written:06d}.arrow", buckets)
            found.report.characters += characters
            written, characters, buckets = written + 1, 0, [[] for _ in found.sizes]
    _write_buckets(temporary / f"{number:06d}_{written:06d}.arrow", buckets)
    found.report.characters += characters
    found.report.documents = sum(found.sizes)
    return found


def _write_buckets(path: Path, buckets: Sequence[Sequence[str]]) -> None:
    with pa.ipc.new_file(path, _SCHEMA) as writer:
        for texts in buckets:
            column = pa.array(texts, pa.large_string())
            writer.write_batch(pa.record_batch([column], schema=_SCHEMA))


def _write_one(temporary: Path, target: Path, numbered: tuple[int, int]) -> Report:
    """Write the shard of one bucket in a random order, every text once."""
    number, bucket = numbered
    texts: dict[str, None] = {}
    repeated = 0
    for path in sorted(temporary.glob("*.arrow")):
        with pa.ipc.open_file(path) as reader:
            for text in reader.get_batch(bucket).column(0).to_pylist():
                repeated += text in texts
                texts[text] = None
    order = list(texts)
    random.Random(_SHUFFLE_SEED + number).shuffle(order)
    write_shard(target / shard_name(number), order, note={})
    if not repeated:
        return Report()
    return Report(documents=-repeated, skipped=Counter({"a text that came before": repeated}))


def _map(work: Callable[[T], R], items: Sequence[T], num_workers: int) -> Iterator[R]:
    if min(num_workers, len(items)) <= 1:
        yield from map(work, items)
        return
    # Spawned, not forked: the caller may hold threads of torch or of a loader.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(num_workers, len(items)), mp_context=spawn) as pool:
        yield from pool.map(work, items)
