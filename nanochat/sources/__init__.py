"""Where pretraining documents come from: what every source offers, and a place in its stream."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

Split = Literal["train", "val"]


@dataclass(frozen=True)
class Position:
    """The next document to read, in an order that no world or batch size can change.

    Row groups are counted over all shards of the split, so shards that are added at the end do
    not move a saved position.
    """

    epoch: int = 0
    row_group: int = 0
    document: int = 0
    """Documents of that row group already read."""


START = Position()


class DocumentSource(Protocol):
    """Text in shards, with the last shard held out for validation."""

    name: str

    def shards(self, split: Split) -> list[Path]:
        """The parquet files of a split, in reading order."""
        ...

    def num_row_groups(self, split: Split) -> int:
        """Row groups in one epoch of a split."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """A few JSON values by which to recognise the documents."""
        ...

    def changes_since(self, saved: dict[str, Any]) -> str | None:
        """Say in what the documents differ from those of an earlier fingerprint, None if not."""
        ...

    def documents(
        self, split: Split, position: Position = START, *, endless: bool = True
    ) -> Iterator[tuple[list[str], Position]]:
        """Yield small non-empty lists of texts, each with the position after it.

        Endless streams begin again at the first shard with the epoch counted up.
        """
        ...
