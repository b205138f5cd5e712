"""Rows of a data set that was fetched from the hub, read from this machine only."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from nanochat.assets import Asset, files_of, hub_split, require
from nanochat.common import UserError

SHUFFLE_SEED = 42  # of the 2025 nanochat, so that row i is the same question there and here


class HubRows:
    """One split of a data set: declared when made, read when first used.

    Rows come in the order of `numpy.random.default_rng(42).permutation`, which is that of
    `datasets.Dataset.shuffle(seed=42)`; `shuffled=False` keeps the order of the files.
    """

    def __init__(
        self,
        dataset: str,
        config: str,
        split: str,
        *,
        license_name: str,
        shuffled: bool = True,
    ) -> None:
        self.asset: Asset = hub_split(dataset, config, split, license_name=license_name)
        self.shuffled = shuffled

    def __len__(self) -> int:
        """Rows, from the manifest alone; UserError naming the prefetch command when missing."""
        return self._num_rows

    @cached_property
    def _num_rows(self) -> int:
        rows = require(self.asset).rows
        if rows is None:
            raise UserError(f"{self.asset.manifest_path} names no rows; fetch {self.asset.name}")
        return rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return row `index` of the shuffled order as column name -> value."""
        if not 0 <= index < len(self._order):
            raise IndexError(f"row {index} of {self.asset.name}, which has {len(self._order)}")
        row = int(self._order[index])
        batch = bisect_right(self._ends, row)
        first = self._ends[batch - 1] if batch else 0
        found: list[dict[str, Any]] = self._batches[batch].slice(row - first, 1).to_pylist()
        return found[0]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self._order)))

    @cached_property
    def _batches(self) -> list[pa.RecordBatch]:
        """All rows in Arrow memory: about as large as the texts, 1 GB for all of SmolTalk."""
        batches: list[pa.RecordBatch] = []
        for path in files_of(self.asset):
            batches += [batch for batch in pq.read_table(path).to_batches() if batch.num_rows]
        return batches

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(batch.num_rows for batch in self._batches))

    @cached_property
    def _order(self) -> NDArray[np.int64]:
        count = self._ends[-1] if self._ends else 0
        if not self.shuffled:
            return np.arange(count)
        return np.random.default_rng(SHUFFLE_SEED).permutation(count)
