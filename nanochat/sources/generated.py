"""The embedded world as parquet shards: written by worker processes, only those asked for."""

from __future__ import annotations

import functools
import hashlib
import itertools
import logging
import multiprocessing
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from nanochat.assets import Asset, Generated
from nanochat.common import UserError, locked, shards_dir
from nanochat.sources.embedded import DEFAULT_SEED, NUM_DOCUMENTS, generate_documents
from nanochat.sources.parquet import (
    ParquetSource,
    looks_complete,
    read_note,
    shard_name,
    write_shard,
)

logger = logging.getLogger(__name__)

NAME = "embedded"
DOCUMENTS_PER_SHARD = 8192
# 42 MB, above what the quick run reads, written in seconds; more with `nanochat.dataset -n`.
DEFAULT_NUM_TRAIN = 16
# How the shards know the generator that wrote them: a digest of documents spread over the world.
_SAMPLED_DOCUMENTS = 256
_NOTE_KEY = "nanochat.generator"


def num_train_shards() -> int:
    """Training shards the generator can fill without a document repeating."""
    return NUM_DOCUMENTS // DOCUMENTS_PER_SHARD - 1


def open_embedded() -> ParquetSource:
    """The embedded world, generated now as far as it is missing."""
    folder = shards_dir(NAME)
    if not _train_shards(folder) or not is_current(folder / shard_name(num_train_shards())):
        generate(min(DEFAULT_NUM_TRAIN, num_train_shards()))
    return ParquetSource(NAME, _train_shards(folder), folder / shard_name(num_train_shards()))


def asset() -> Asset:
    """The embedded world as something a run reads; it is made wherever it is missing."""
    return Asset(
        name=NAME,
        place=shards_dir(NAME).name,
        source=Generated(make=open_embedded, is_current=_is_complete),
        license="MIT",
    )


def _is_complete() -> bool:
    folder = shards_dir(NAME)
    shards = [*_train_shards(folder)[:1], folder / shard_name(num_train_shards())]
    return len(shards) == 2 and all(map(is_current, shards))


def generate(num_train: int, *, num_workers: int | None = None) -> int:
    """Write the first `num_train` training shards (-1: all) and the validation shard.

    Shards that this generator wrote before are kept. Returns how many were written.
    """
    available = num_train_shards()
    if not (num_train == -1 or 1 <= num_train <= available):
        raise UserError(
            f"the embedded world has {available} training shards, {num_train} were asked for; "
            f"give -n 1 to {available}, or -1 for all"
        )
    folder = shards_dir(NAME)
    train = range(available if num_train == -1 else num_train)
    with locked(folder):  # several ranks may start on an empty folder at once
        _remove_outdated(folder)
        missing = _missing(folder, [*train, available])
        if missing:
            logger.info("writing %d shards of the embedded world to %s", len(missing), folder)
        # The validation shard last: while it is missing, the folder is not taken for complete.
        _write(folder, _missing(folder, train), num_workers or os.cpu_count() or 1)
        _write(folder, _missing(folder, [available]), 1)
    return len(missing)


def is_current(path: Path) -> bool:
    """Whether a shard is whole and was written by the generator as it is now."""
    return looks_complete(path) and read_note(path).get(_NOTE_KEY) == fingerprint()


@functools.cache
def fingerprint() -> str:
    """A digest that changes when the generator's documents, their number or the seed change."""
    digest = hashlib.sha256(f"{DEFAULT_SEED} {NUM_DOCUMENTS} {DOCUMENTS_PER_SHARD}".encode())
    for index in range(0, NUM_DOCUMENTS, NUM_DOCUMENTS // _SAMPLED_DOCUMENTS + 1):
        for text in generate_documents(DEFAULT_SEED, index, index + 1):
            digest.update(text.encode() + b"\0")
    return digest.hexdigest()


def _train_shards(folder: Path) -> list[Path]:
    """The training shards up to the first gap: filling one must not move what lies behind it."""
    shards = (folder / shard_name(shard) for shard in range(num_train_shards()))
    return list(itertools.takewhile(Path.exists, shards))


def _missing(folder: Path, shards: Iterable[int]) -> list[int]:
    return [shard for shard in shards if not (folder / shard_name(shard)).exists()]


def _remove_outdated(folder: Path) -> None:
    outdated = [path for path in sorted(folder.glob("shard_*.parquet")) if not is_current(path)]
    for path in outdated:
        path.unlink()
    if outdated:
        logger.warning(
            "removed %d shards of an older embedded world from %s", len(outdated), folder
        )


def _write(folder: Path, shards: Sequence[int], num_workers: int) -> None:
    write = functools.partial(_write_one, folder, fingerprint())
    if min(num_workers, len(shards)) <= 1:
        for shard in shards:
            write(shard)
        return
    # Spawned, not forked: the caller may hold threads of torch or of a loader.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(num_workers, len(shards)), mp_context=spawn) as pool:
        for _ in pool.map(write, shards):
            pass


def _write_one(folder: Path, note: str, shard: int) -> None:
    start = shard * DOCUMENTS_PER_SHARD
    texts = list(generate_documents(DEFAULT_SEED, start, start + DOCUMENTS_PER_SHARD))
    write_shard(folder / shard_name(shard), texts, note={_NOTE_KEY: note})
