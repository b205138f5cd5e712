"""Pretraining data by name or folder, and the command that fetches, generates or converts it.

python -m nanochat.dataset -n 8                      FineWeb-Edu: 8 training shards + validation
python -m nanochat.dataset -n 8 --data=climbmix      the same of ClimbMix
python -m nanochat.dataset -n 8 --data=embedded      generated here, without a network
python -m nanochat.dataset -w 4 --data=my_texts      your own JSONL or text files, to shards
"""

from __future__ import annotations

import difflib
import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro

from nanochat import configurator
from nanochat.assets import Asset, Generated
from nanochat.common import UserError, refresh_aliases
from nanochat.prefetch import prefetch
from nanochat.sources import DocumentSource, Position, Split
from nanochat.sources.hub import HUB_DATASETS, HubDataset, open_hub
from nanochat.sources.parquet import ParquetSource, find_shards

__all__ = ["SOURCES", "DocumentSource", "Position", "Split", "open_source"]

logger = logging.getLogger(__name__)

EMBEDDED = "embedded"
SOURCES = (EMBEDDED, *HUB_DATASETS)


def open_source(data: str) -> DocumentSource:
    """The documents of a named source, or of a folder of parquet, JSONL or text files.

    The embedded source writes its shards when they are missing, and text files are converted to
    shards once; hub data sets must have been fetched before. UserError when nothing is usable.
    """
    if data == EMBEDDED:
        # Here, because the tables of the embedded world are of no use to other sources.
        from nanochat.sources import generated

        return generated.open_embedded()
    if data in HUB_DATASETS:
        return open_hub(HUB_DATASETS[data])
    return _open_folder(data, num_workers=1)


def check_data(data: str) -> None:
    """UserError unless that is a named source, or a folder that can be one; reads no documents."""
    if data in SOURCES:
        return
    from nanochat.sources import own

    if not own.is_text(_known_folder(data)):
        find_shards(_known_folder(data))


def assets_of(data: str, num_train: int) -> list[Asset]:
    """What a run on `data` reads: shards of a hub data set, or what is made on this machine.

    num_train: training shards of a hub data set (-1: all); the validation shard is extra.
    """
    if data in HUB_DATASETS:
        return HUB_DATASETS[data].assets(num_train)
    from nanochat.sources import generated, own

    if data == EMBEDDED:
        return [generated.asset()]
    folder = _folder(data).absolute()
    source = Generated(
        make=partial(open_source, data),
        is_current=partial(own.is_converted, folder),
        obstacle=partial(own.obstacle, folder),
    )
    return [Asset(data, str(folder), source, license="your own")]


def _folder(data: str) -> Path:
    if not data:
        raise UserError(f"--data is empty; give one of {', '.join(SOURCES)} or a folder")
    return Path(data).expanduser()


def _known_folder(data: str) -> Path:
    """The folder; UserError for what looks like a mistyped name of a source."""
    folder = _folder(data)
    if not folder.exists() and "/" not in data:
        close = difflib.get_close_matches(data, SOURCES, n=1)
        meant = f"; did you mean {close[0]}?" if close else ""
        raise UserError(
            f"unknown data {data!r}: neither one of {', '.join(SOURCES)} nor a folder{meant}"
        )
    return folder


def _open_folder(data: str, *, num_workers: int) -> ParquetSource:
    from nanochat.sources import own

    folder = _known_folder(data)
    if own.is_text(folder):
        return own.open_own(folder, num_workers=num_workers)
    return ParquetSource.from_folder(folder)


@dataclass(frozen=True)
class Config:
    """Fetch or generate pretraining shards."""

    num_files: Annotated[int, tyro.conf.arg(aliases=["-n"])] = -1
    """Training shards to have, counted from the first (-1: all); the validation shard is extra."""
    num_workers: Annotated[int, tyro.conf.arg(aliases=["-w"])] = 4
    """Downloads or processes at the same time."""
    data: str = "fineweb-edu"
    """fineweb-edu, climbmix, embedded, or a folder of parquet, JSONL or text files."""
    verify: bool = False
    """Compare the SHA-256 of shards that are already there, not only size and footer."""


def main(config: Config) -> int:
    """Fetch, generate or check; 1 when a shard that was asked for is missing."""
    if config.num_workers < 1:
        raise UserError(f"-w is {config.num_workers}; give at least 1 worker")
    if config.data == EMBEDDED:
        from nanochat.sources import generated

        generated.generate(config.num_files, num_workers=config.num_workers)
    elif config.data in HUB_DATASETS:
        if not _fetch(HUB_DATASETS[config.data], config):
            return 1
        if config.num_files == 0:
            return 0
    else:
        _open_folder(config.data, num_workers=config.num_workers)
        _print_report(Path(config.data))
    refresh_aliases()
    source = open_source(config.data)
    num_train, num_val = len(source.shards("train")), len(source.shards("val"))
    print(f"{source.name}: {num_train} training shards, {num_val} validation shard")
    return 0


def _fetch(dataset: HubDataset, config: Config) -> bool:
    """Fetch shards and say how many; whether all are there."""
    outcomes = prefetch(
        dataset.assets(config.num_files), num_workers=config.num_workers, verify=config.verify
    )
    missing = [outcome for outcome in outcomes if outcome.problem is not None]
    print(f"Downloaded: {len(outcomes) - len(missing)}/{len(outcomes)} to {dataset.folder}")
    if missing:
        named = ", ".join(outcome.asset.name.rpartition("/")[2] for outcome in missing[:10])
        more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
        logger.error("missing shards: %s%s; run the same command again", named, more)
    return not missing


def _print_report(folder: Path) -> None:
    from nanochat.sources import own

    report = own.last_report(folder)
    for line in report.lines() if report else ():
        print(line)


if __name__ == "__main__":
    configurator.run(main, Config)
