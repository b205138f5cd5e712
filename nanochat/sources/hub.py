"""Pretraining text from the Hugging Face hub: FineWeb-Edu and ClimbMix, already shuffled."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from nanochat.common import UserError, shards_dir
from nanochat.sources.parquet import ParquetSource, looks_complete, shard_name

logger = logging.getLogger(__name__)

# On top of the client's own: it repeats what finds no connection five times in 25 s, but not a
# transfer that is cut.
ATTEMPTS = 3


@dataclass(frozen=True)
class HubDataset:
    """A data set whose files are `shard_00000.parquet` and on, about 100 MB each."""

    name: str
    repository: str
    num_shards: int

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


HUB_DATASETS = {
    dataset.name: dataset
    for dataset in (
        HubDataset("fineweb-edu", "karpathy/fineweb-edu-100b-shuffle", num_shards=1823),
        HubDataset("climbmix", "karpathy/climbmix-400b-shuffle", num_shards=6543),
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


def download(dataset: HubDataset, shards: Sequence[int], *, num_workers: int) -> list[int]:
    """Fetch the shards that are not there yet; returns the ids that could not be had."""
    dataset.folder.mkdir(parents=True, exist_ok=True)
    unreachable = threading.Event()
    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        fetched = list(pool.map(lambda shard: _fetch(dataset, shard, unreachable), shards))
    return [shard for shard, ok in zip(shards, fetched, strict=True) if not ok]


def _fetch(dataset: HubDataset, shard: int, unreachable: threading.Event) -> bool:
    """Whether the shard is there now. Sets `unreachable` for the others when there is no hub."""
    path = dataset.path(shard)
    if looks_complete(path):
        logger.info("%s is already there", path.name)
        return True
    if unreachable.is_set():
        return False
    if path.exists():
        logger.warning("%s is incomplete and is fetched again", path)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            _hub_download()(
                dataset.repository,
                path.name,
                repo_type="dataset",
                local_dir=dataset.folder,
                force_download=path.exists(),
            )
        except Exception as error:
            # Whatever went wrong with one shard, the others are still worth fetching.
            reason = " ".join(str(error).split()) or type(error).__name__
            if attempt == ATTEMPTS or not _worth_retrying(error):
                logger.error("%s could not be fetched: %s", path.name, reason)
                if _is_unreachable(error):
                    unreachable.set()
                return False
            wait = 2**attempt
            logger.warning("%s: %s; trying again in %d s", path.name, reason, wait)
            time.sleep(wait)
        else:
            break
    if not looks_complete(path):
        logger.error("%s arrived incomplete", path.name)
        return False
    logger.info("%s fetched", path.name)
    return True


def _hub_download() -> Callable[..., str]:
    # Imported on first use: it takes half a second that reading local shards need not wait for.
    from huggingface_hub import hf_hub_download

    # What the client says about its requests is said here once, in one line a shard.
    for name in ("httpx", "httpx2", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return hf_hub_download


def _is_unreachable(error: Exception) -> bool:
    """Whether the hub can not be asked at all: no connection, or none is allowed."""
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    return isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled)


def _worth_retrying(error: Exception) -> bool:
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

    # LocalEntryNotFoundError, which is no connection, is an EntryNotFoundError as well.
    return not isinstance(error, EntryNotFoundError | RepositoryNotFoundError)
