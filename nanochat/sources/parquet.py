"""Documents in a folder of parquet shards: column `text`, the last shard held out."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.common import UserError
from nanochat.sources import START, Position, Split

TEXT_COLUMN = "text"
# Small enough that tokenizing one list never makes a training step wait, large enough to keep
# the threads of the tokenizer busy. The same batch as the seed-era loader.
DOCUMENTS_PER_LIST = 128
FOOTER_THREADS = 8


class ParquetSource:
    """Train and validation shards whose footers were all read, so that damage shows at once."""

    def __init__(self, name: str, train: Sequence[Path], val: Path) -> None:
        self.name = name
        self._shards: dict[Split, list[Path]] = {"train": list(train), "val": [val]}
        with ThreadPoolExecutor(FOOTER_THREADS) as pool:
            counts = {
                split: list(pool.map(count_row_groups, paths))
                for split, paths in self._shards.items()
            }
        # The running totals turn a row group of the split into (shard, row group in it).
        self._ends = {split: list(itertools.accumulate(n)) for split, n in counts.items()}

    def fingerprint(self) -> dict[str, list[str]]:
        """Eight digits a shard, made of its footer, which holds the sizes of all its columns."""
        return {
            split: [hashlib.sha256(read_footer(path)).hexdigest()[:8] for path in paths]
            for split, paths in self._shards.items()
        }

    @classmethod
    def from_folder(cls, folder: Path) -> ParquetSource:
        """All shards of a folder by name; the last one is the validation split."""
        shards = find_shards(folder)
        return cls(str(folder), shards[:-1], shards[-1])

    def shards(self, split: Split) -> list[Path]:
        """The files of a split, in reading order."""
        return list(self._shards[split])

    def num_row_groups(self, split: Split) -> int:
        """Row groups in one epoch of a split."""
        return self._ends[split][-1]

    def documents(
        self, split: Split, position: Position = START, *, endless: bool = True
    ) -> Iterator[tuple[list[str], Position]]:
        """Yield lists of up to 128 texts, each with the position after it; nulls are skipped."""
        total = self.num_row_groups(split)
        # Fewer shards than when the position was saved: what is there was read already.
        epoch, row_group, skip = position.epoch, position.row_group, position.document
        if row_group >= total:
            epoch, row_group, skip = epoch + 1, 0, 0
        seen = skip > 0 or row_group > 0
        while endless or epoch == position.epoch:
            for index in range(row_group, total):
                for texts, next_group, next_document in self._read(split, index, skip):
                    seen = True
                    yield texts, Position(epoch, next_group, next_document)
                skip = 0
            if not seen:
                raise UserError(f"no text in any document of the {split} shards of {self.name}")
            epoch, row_group = epoch + 1, 0

    def _read(self, split: Split, index: int, skip: int) -> Iterator[tuple[list[str], int, int]]:
        """Yield (texts, row group, document in it) of a row group, the place after the texts."""
        shard = bisect.bisect_right(self._ends[split], index)
        first = self._ends[split][shard - 1] if shard else 0
        rows = read_row_group(self._shards[split][shard], index - first)
        for start in range(skip, len(rows), DOCUMENTS_PER_LIST):
            stop = min(start + DOCUMENTS_PER_LIST, len(rows))
            texts = [text for text in rows[start:stop].to_pylist() if text is not None]
            if texts:
                yield (texts, index, stop) if stop < len(rows) else (texts, index + 1, 0)


def shard_name(shard: int) -> str:
    """The file name of a shard by its id, as FineWeb-Edu numbers them."""
    return f"shard_{shard:05d}.parquet"


def find_shards(folder: Path) -> list[Path]:
    """The parquet files of a folder by name, at least two of them."""
    if not folder.is_dir():
        raise UserError(
            f"data folder {folder} does not exist; give a folder of .parquet, .jsonl or text files "
            "to --data"
        )
    # A hidden name is a download or a writer's temporary file.
    shards = sorted(p for p in folder.glob("*.parquet") if not p.name.startswith("."))
    if not shards:
        raise UserError(
            f"data folder {folder} holds no .parquet, .jsonl, .txt or .md files; "
            "give a folder with such files to --data"
        )
    if len(shards) == 1:
        raise UserError(
            f"data folder {folder} holds only {shards[0].name}: the last shard is the validation "
            "split, so at least two are needed"
        )
    return shards


def open_shard(path: Path) -> pq.ParquetFile:
    """Open a shard, or say in one sentence why it can not be used."""
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(_damaged(path, error)) from error


def count_row_groups(path: Path) -> int:
    """Row groups of a shard whose schema and size were found usable."""
    with open_shard(path) as file:
        schema = file.schema_arrow
        num_rows, num_row_groups = file.metadata.num_rows, file.num_row_groups
    if TEXT_COLUMN not in schema.names:
        columns = ", ".join(schema.names) or "none"
        raise UserError(f"shard {path} has no column '{TEXT_COLUMN}' (its columns: {columns})")
    kind = schema.field(TEXT_COLUMN).type
    if not _is_text(kind):
        raise UserError(f"column '{TEXT_COLUMN}' of shard {path} is {kind}, not a string")
    if num_rows == 0:
        raise UserError(f"shard {path} has no rows; delete it or write it again")
    return int(num_row_groups)


def read_row_group(path: Path, index: int) -> pa.ChunkedArray:
    """The texts of one row group, still in Arrow memory."""
    with open_shard(path) as file:
        try:
            return file.read_row_group(index, columns=[TEXT_COLUMN]).column(TEXT_COLUMN)
        except (pa.ArrowException, OSError) as error:
            raise UserError(_damaged(path, error)) from error


def read_footer(path: Path) -> bytes:
    """The footer of a parquet file: the schema, and size and place of all that is in it."""
    with path.open("rb") as file:
        file.seek(-8, os.SEEK_END)
        length = int.from_bytes(file.read(4), "little")
        file.seek(-8 - length, os.SEEK_END)
        return file.read(length)


def looks_complete(path: Path) -> bool:
    """Whether a file has the magic bytes at both ends that a finished parquet file has."""
    try:
        with path.open("rb") as file:
            head = file.read(4)
            file.seek(-4, os.SEEK_END)
            return head == b"PAR1" and file.read(4) == b"PAR1"
    except OSError:
        return False


def write_shard(
    path: Path,
    texts: Sequence[str],
    *,
    rows_per_group: int = 1024,
    note: dict[str, str],
) -> None:
    """Write a shard in the layout of FineWeb-Edu (zstd), whole or not at all.

    note: kept in the file's key-value metadata.
    """
    schema = pa.schema([pa.field(TEXT_COLUMN, pa.string())], metadata=note)
    # The process number keeps two writers of the same shard off each other's temporary file.
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        table = pa.table([pa.array(texts, pa.string())], schema=schema)
        pq.write_table(table, unfinished, compression="zstd", row_group_size=rows_per_group)
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_note(path: Path) -> dict[str, str]:
    """The key-value metadata `write_shard` put into a shard."""
    with open_shard(path) as file:
        metadata = file.schema_arrow.metadata or {}
    return {key.decode(): value.decode() for key, value in metadata.items()}


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _damaged(path: Path, error: Exception) -> str:
    reason = " ".join(str(error).split())
    return f"shard {path} is damaged or incomplete ({reason}); fetch or write it again"
