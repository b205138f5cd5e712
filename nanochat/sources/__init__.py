"""Where pretraining documents come from: what every source offers, and a place in its stream."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

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

    def fingerprint(self) -> dict[str, list[str]]:
        """A few digits for each shard of a split, by which to recognise its documents."""
        ...

    def documents(
        self, split: Split, position: Position = START, *, endless: bool = True
    ) -> Iterator[tuple[list[str], Position]]:
        """Yield small non-empty lists of texts, each with the position after it.

        Endless streams begin again at the first shard with the epoch counted up.
        """
        ...


def changed_data(before: dict[str, list[str]], now: dict[str, list[str]]) -> str | None:
    """Say in what documents differ from those an earlier fingerprint is of, None if in nothing.

    Training shards that were added behind the others change nothing that was read before.
    """
    for split, known in before.items():
        found = now.get(split, [])
        if len(found) < len(known):
            return f"{len(found)} {split} shards, which were {len(known)}"
        for number, (old, new) in enumerate(zip(known, found, strict=False)):
            if old != new:
                return f"{split} shard {number} with fingerprint {new}, which was {old}"
    return None
