"""Pretraining data by name or folder, and the command that fetches or generates it.

python -m nanochat.dataset -n 8                      FineWeb-Edu: 8 training shards + validation
python -m nanochat.dataset -n 8 --data=climbmix      the same of ClimbMix
python -m nanochat.dataset -n 8 --data=embedded      generated here, without a network
"""

from __future__ import annotations

import difflib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from nanochat import configurator
from nanochat.common import UserError
from nanochat.sources import DocumentSource, Position, Split
from nanochat.sources.hub import HUB_DATASETS, download, open_hub, wanted_shards
from nanochat.sources.parquet import ParquetSource

__all__ = ["SOURCES", "DocumentSource", "Position", "Split", "open_source"]

logger = logging.getLogger(__name__)

EMBEDDED = "embedded"
SOURCES = (EMBEDDED, *HUB_DATASETS)


def open_source(data: str) -> DocumentSource:
    """The documents of a named source, or of a folder of parquet shards.

    The embedded source writes its shards when they are missing; hub data sets must have been
    fetched before. UserError when there is nothing usable.
    """
    if data == EMBEDDED:
        # Here, because the tables of the embedded world are of no use to other sources.
        from nanochat.sources import generated

        return generated.open_embedded()
    if data in HUB_DATASETS:
        return open_hub(HUB_DATASETS[data])
    folder = Path(data).expanduser()
    if not folder.exists() and "/" not in data:
        close = difflib.get_close_matches(data, SOURCES, n=1)
        meant = f"; did you mean {close[0]}?" if close else ""
        raise UserError(
            f"unknown data {data!r}: neither one of {', '.join(SOURCES)} nor a folder{meant}"
        )
    return ParquetSource.from_folder(folder)


@dataclass(frozen=True)
class Config:
    """Fetch or generate pretraining shards."""

    num_files: Annotated[int, tyro.conf.arg(aliases=["-n"])] = -1
    """Training shards to have, counted from the first (-1: all); the validation shard is extra."""
    num_workers: Annotated[int, tyro.conf.arg(aliases=["-w"])] = 4
    """Downloads or generating processes at the same time."""
    data: str = "fineweb-edu"
    """fineweb-edu, climbmix, embedded, or a folder, which is only checked."""


def main(config: Config) -> int:
    """Fetch, generate or check; 1 when a shard that was asked for is missing."""
    if config.num_workers < 1:
        raise UserError(f"-w is {config.num_workers}; give at least 1 worker")
    if config.data == EMBEDDED:
        from nanochat.sources import generated

        generated.generate(config.num_files, num_workers=config.num_workers)
    elif config.data in HUB_DATASETS:
        dataset = HUB_DATASETS[config.data]
        shards = wanted_shards(dataset, config.num_files)
        missing = download(dataset, shards, num_workers=config.num_workers)
        print(f"Downloaded: {len(shards) - len(missing)}/{len(shards)} to {dataset.folder}")
        if missing:
            named = ", ".join(map(str, missing[:10]))
            more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
            logger.error("missing shards: %s%s; run the same command again", named, more)
            return 1
        if config.num_files == 0:
            return 0
    source = open_source(config.data)
    num_train, num_val = len(source.shards("train")), len(source.shards("val"))
    print(f"{source.name}: {num_train} training shards, {num_val} validation shard")
    return 0


if __name__ == "__main__":
    configurator.run(main, Config)
