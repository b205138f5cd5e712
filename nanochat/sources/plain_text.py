"""Documents in JSONL and plain text files, read in pieces that several processes can share."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

LINE_KINDS = (".jsonl", ".txt", ".md", ".gz")
UNIT_BYTES = 64_000_000  # what one process reads at a time
# A text file is cut at the ends of paragraphs into documents of about this many characters: a
# book as one document would fill many batches in a row.
DOCUMENT_CHARACTERS = 10_000
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_UTF8_MARK = b"\xef\xbb\xbf"

Unit = tuple[Path, int, int]


@dataclass(frozen=True)
class Skipped:
    """Something that is no document."""

    reason: str
    offset: int | None = None
    """Of the line in the file's text, in bytes; None for a whole file."""


def work_units(files: Sequence[Path]) -> list[Unit]:
    """Cut files into pieces: file, first byte, last byte + 1.

    A line belongs to the piece in which it begins. A compressed file is one piece.
    """
    units: list[Unit] = []
    for path in files:
        size = path.stat().st_size
        step = size if path.suffix == ".gz" else UNIT_BYTES
        units += [(path, start, min(start + step, size)) for start in range(0, size, step or 1)]
    return units


def read_documents(path: Path, start: int, stop: int) -> Iterator[str | Skipped]:
    """Yield the documents of a piece, and what was skipped."""
    kind = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if kind not in (".jsonl", ".txt", ".md"):
        yield Skipped("neither .jsonl nor .txt inside the .gz")
        return
    lines = _lines(path, start, stop)
    try:
        yield from _json_documents(lines) if kind == ".jsonl" else _texts(lines)
    except UnicodeError as error:
        yield Skipped(str(error))
    except (gzip.BadGzipFile, zlib.error, EOFError):
        yield Skipped("a damaged .gz, from there on")


def line_number(path: Path, offset: int) -> int:
    """The number, from 1, of the line that begins at a byte of a file's text."""
    lines, left = 1, offset
    with _open(path) as file:
        while left > 0 and (chunk := file.read(min(left, 1 << 20))):
            lines += chunk.count(b"\n")
            left -= len(chunk)
    return lines


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path) if path.suffix == ".gz" else path.open("rb"))


def _lines(path: Path, start: int, stop: int) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, line) of the lines that begin in the piece."""
    with _open(path) as file:
        offset = start
        if start > 0:
            # Where the piece begins inside a line, that line is the piece's before.
            file.seek(start - 1)
            offset = start - 1 + len(file.readline())
        for line in file:
            if offset >= stop and path.suffix != ".gz":
                return
            if offset == 0 and line.startswith(_UTF16):
                raise UnicodeError("a file in UTF-16; save it as UTF-8")
            yield offset, line.removeprefix(_UTF8_MARK) if offset == 0 else line
            offset += len(line)


def _json_documents(lines: Iterator[tuple[int, bytes]]) -> Iterator[str | Skipped]:
    for offset, line in lines:
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError:  # not JSON, or not UTF-8
            yield Skipped("a line that is not JSON in UTF-8", offset)
            continue
        text = value.get("text") if isinstance(value, dict) else value
        if not isinstance(text, str):
            yield Skipped("a line without a field 'text'", offset)
        elif not text.strip():
            yield Skipped("an empty text", offset)
        elif not _is_text(text):
            yield Skipped("a text with half a surrogate pair", offset)
        else:
            yield text


def _texts(lines: Iterator[tuple[int, bytes]]) -> Iterator[str | Skipped]:
    """Cut a text file into documents: at a blank line when there is enough, at any if too much."""
    document = ""
    for offset, line in lines:
        try:
            text = line.decode("utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError:
            yield Skipped("a line that is not UTF-8", offset)
            continue
        enough = DOCUMENT_CHARACTERS if not text.strip() else 2 * DOCUMENT_CHARACTERS
        if len(document) >= enough:
            yield document.strip()
            document = ""
        document += text if text.strip() or document else ""
        while len(document) > 3 * DOCUMENT_CHARACTERS:  # a line without an end
            yield document[: 2 * DOCUMENT_CHARACTERS]
            document = document[2 * DOCUMENT_CHARACTERS :]
    if document.strip():
        yield document.strip()


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
