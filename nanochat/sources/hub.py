"""Pretraining text from the Hugging Face hub: FineWeb-Edu and ClimbMix, already shuffled."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from nanochat.assets import Asset, HubFile
from nanochat.common import UserError, shards_dir
from nanochat.sources.parquet import ParquetSource, shard_name

logger = logging.getLogger(__name__)

SHARD_BYTES = 100_000_000  # of both data sets, about


@dataclass(frozen=True)
class HubDataset:
    """A data set whose files are `shard_00000.parquet` and on, about 100 MB each."""

    name: str
    repository: str
    num_shards: int
    license: str

    @property
    def folder(self) -> Path:
        """Where its shards lie on this machine."""
        return shards_dir(self.name)

    @property
    def validation_id(self) -> int:
        """Always the last id, so that it can not become training data when more is fetched."""
        return self.num_shards - 1

    def path(self, shard: int) -> Path:
        """Where one shard lies, whether it is there or not."""
        return self.folder / shard_name(shard)

    def asset(self, shard: int) -> Asset:
        """One shard as something that can be fetched."""
        return Asset(
            name=f"{self.name}/{shard:05d}",
            place=f"{self.folder.name}/{shard_name(shard)}",
            source=HubFile(self.repository, shard_name(shard)),
            license=self.license,
            approximate_bytes=SHARD_BYTES,
        )

    def assets(self, num_train: int) -> list[Asset]:
        """The validation shard and the first `num_train` training shards (-1: all)."""
        return [self.asset(shard) for shard in wanted_shards(self, num_train)]


HUB_DATASETS = {
    dataset.name: dataset
    for dataset in (
        HubDataset(
            "fineweb-edu", "karpathy/fineweb-edu-100b-shuffle", num_shards=1823, license="ODC-BY"
        ),
        HubDataset(
            "climbmix", "karpathy/climbmix-400b-shuffle", num_shards=6543, license="CC BY-NC 4.0"
        ),
    )
}


def open_hub(dataset: HubDataset) -> ParquetSource:
    """The shards of a data set that are on this machine; nothing is fetched."""
    present = sorted(dataset.folder.glob("shard_*.parquet"))
    validation = dataset.path(dataset.validation_id)
    command = f"python -m nanochat.dataset -n 8 --data={dataset.name}"
    train = [path for path in present if path != validation]
    if validation in present and train:
        return ParquetSource(dataset.name, train, validation)
    if len(train) < 2:
        raise UserError(
            f"{dataset.name} has {len(train)} training and {len(present) - len(train)} validation "
            f"shards in {dataset.folder}; fetch some with: {command}"
        )
    logger.warning(
        "%s: the validation shard %s is not there, so %s is held out instead; "
        "fetch it with: python -m nanochat.dataset -n %d --data=%s",
        *(dataset.name, validation.name, train[-1].name, len(train), dataset.name),
    )
    return ParquetSource(dataset.name, train[:-1], train[-1])


def wanted_shards(dataset: HubDataset, num_train: int) -> list[int]:
    """Ids to fetch for `num_train` training shards (-1: all), the validation shard first."""
    available = dataset.num_shards - 1
    if not -1 <= num_train <= available:
        raise UserError(
            f"{dataset.name} has {available} training shards, {num_train} were asked for; "
            f"give -n 0 to {available}, or -1 for all"
        )
    count = available if num_train == -1 else num_train
    return [dataset.validation_id, *range(count)]
