"""Fetching assets: what is missing is found, room is made sure of, many files come at once.

Damaged files are put aside, files that came another way are taken over, and an asset's manifest
is written when all of it is there. Whatever stops this half-way, a second run goes on from there.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import zipfile
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from nanochat import hub
from nanochat.assets import (
    Asset,
    DamagedError,
    FileRecord,
    Generated,
    HubFile,
    HubSplit,
    Manifest,
    Url,
    ZipUrl,
    file_problem,
    problem_with,
    read_manifest,
    record_file,
    write_manifest,
)
from nanochat.common import DEFAULT_BASE_DIR, UserError, base_dir, locked, sha256_file
from nanochat.transfer import (
    StoppedError,
    Transfer,
    TransferError,
    check_network_allowed,
    part_path,
)

logger = logging.getLogger(__name__)

# Kept free: a disk filled to the last byte stops everything else that writes to it.
SPARE_BYTES = 500_000_000
MIRROR_VARIABLE = "NANOCHAT_ASSETS_MIRROR"


@dataclass(frozen=True)
class Outcome:
    """What became of one asset."""

    asset: Asset
    action: str = ""
    """There already, taken over, made, or fetched."""
    problem: str | None = None
    """Why it is not there now, None when it is."""


@dataclass(frozen=True)
class _Plan:
    """What has to be fetched for an asset."""

    asset: Asset
    num_bytes: int
    revision: str | None = None
    files: tuple[hub.RemoteFile, ...] = ()


def prefetch(
    assets: Sequence[Asset],
    *,
    num_workers: int = 4,
    offline: bool = False,
    verify: bool = False,
    transfer: Transfer | None = None,
) -> list[Outcome]:
    """Make every asset present that can be; returns what became of each, in the same order.

    offline: only take over and make, fetch nothing. verify: read all bytes of what is there.
    UserError when the disk has no room for what is missing.
    """
    transfer = transfer or Transfer()
    unique = list(dict.fromkeys(assets))
    outcomes: dict[Asset, Outcome] = {}
    with ThreadPoolExecutor(num_workers) as pool, ExitStack() as locks:
        for folder in sorted({asset.path.parent for asset in unique if _is_fetched(asset)}):
            locks.enter_context(locked(folder))
        for outcome in pool.map(lambda a: _without_network(a, offline, verify), unique):
            outcomes[outcome.asset] = outcome
        missing = [o.asset for o in outcomes.values() if o.problem is not None]
        if missing and not offline:
            planned = list(pool.map(lambda asset: _plan(asset, transfer), missing))
            plans = [plan for plan in planned if isinstance(plan, _Plan)]
            impossible = [outcome for outcome in planned if isinstance(outcome, Outcome)]
            outcomes |= {outcome.asset: outcome for outcome in impossible}
            _tell_problems(impossible)
            _check_disk(plans)
            outcomes |= _fetch_all(plans, pool, transfer)
    return [outcomes[asset] for asset in assets]


def _is_fetched(asset: Asset) -> bool:
    return not isinstance(asset.source, Generated)


# ---- what needs no network --------------------------------------------------------------------


def _without_network(asset: Asset, offline: bool, verify: bool) -> Outcome:
    """Find an asset present, or make it so from what is on this machine."""
    problem = problem_with(asset, verify=verify)
    try:
        if isinstance(asset.source, Generated) and not asset.source.is_current():
            asset.source.make()
            return Outcome(asset, "made")
        if problem is None:
            return Outcome(asset, "already there")
        _set_damaged_aside(asset, verify)
        if _take_over(asset, offline):
            return Outcome(asset, "taken over")
    except UserError as error:
        return Outcome(asset, problem=str(error))
    return Outcome(asset, problem=problem)


def _set_damaged_aside(asset: Asset, verify: bool) -> None:
    """Move files that are not what the manifest says out of the way, and the manifest too."""
    manifest = read_manifest(asset)
    if manifest is None:
        return
    for record in manifest.files:
        path = asset.folder / record.path
        reason = file_problem(path, record, verify=verify)
        if reason is not None and path.exists() and not asset.is_replaceable:
            _quarantine(path, reason)
    asset.manifest_path.unlink(missing_ok=True)


def _quarantine(path: Path, reason: str) -> None:
    """Keep a damaged file for whoever wants to know, where nothing reads it."""
    aside = path.parent / ".quarantine" / path.name
    aside.parent.mkdir(exist_ok=True)
    os.replace(path, aside)
    logger.warning("%s %s; it is now %s", path, reason, aside)


def _take_over(asset: Asset, offline: bool) -> bool:
    """Write the manifest of files that came another way; whether there were any.

    A single file proves by itself that it is whole. A folder does not, and is taken over only
    where it cannot be compared with its source.
    """
    if not asset.is_folder:
        if not asset.path.is_file():
            _copy_from_default_folder(asset)
        return asset.path.is_file() and _record(asset, [asset.path])
    paths = sorted(
        path
        for path in asset.path.rglob("*")
        if path.is_file() and not any(p.startswith(".") for p in path.relative_to(asset.path).parts)
    )
    if not offline or not paths or not _record(asset, paths):
        return False
    logger.warning(
        "%s: took over %d files in %s; whether they are all of it cannot be seen without a network",
        *(asset.name, len(paths), asset.path),
    )
    return True


def _record(asset: Asset, paths: Sequence[Path]) -> bool:
    """Write a manifest of files in place unless one is damaged, which is put aside."""
    records = []
    for path in paths:
        try:
            record = record_file(asset.folder, path)
        except DamagedError as error:
            _quarantine(path, f"is damaged: {error}")
            return False
        if isinstance(asset.source, Url) and asset.source.sha256 not in (None, record.sha256):
            _quarantine(path, "is another file: its SHA-256 is not the published one")
            return False
        records.append(record)
    write_manifest(asset, Manifest(tuple(records)))
    return True


def _copy_from_default_folder(asset: Asset) -> None:
    """Documents tell people to put files into the default folder, even where ours is elsewhere."""
    elsewhere = Path(DEFAULT_BASE_DIR).expanduser() / asset.place
    if elsewhere != asset.path and elsewhere.is_file() and isinstance(asset.source, Url):
        asset.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = part_path(asset.path)
        shutil.copyfile(elsewhere, unfinished)
        os.replace(unfinished, asset.path)
        logger.info("copied %s from %s", asset.name, elsewhere)


# ---- what has to be fetched -------------------------------------------------------------------


def _plan(asset: Asset, transfer: Transfer) -> _Plan | Outcome:
    """What is to be fetched for an asset; an outcome when that cannot be known."""
    source = asset.source
    try:
        check_network_allowed(of_hub=isinstance(source, HubSplit | HubFile))
        if isinstance(source, HubSplit):
            revision, files = hub.list_split(source, transfer)
            return _Plan(asset, sum(f.num_bytes for f in files), revision, tuple(files))
        unpacked = 3 if isinstance(source, ZipUrl) else 1  # the zip and what is in it
        return _Plan(asset, asset.approximate_bytes * unpacked)
    except StoppedError:
        return Outcome(asset, problem="stopped")
    except TransferError as error:
        return Outcome(asset, problem=str(error))


def _check_disk(plans: Sequence[_Plan]) -> None:
    if not plans:
        return
    needed = sum(plan.num_bytes for plan in plans)
    free = shutil.disk_usage(base_dir()).free
    if needed + SPARE_BYTES > free:
        raise UserError(
            f"{len(plans)} assets need about {needed / 1e9:.1f} GB, but {base_dir()} has "
            f"{free / 1e9:.1f} GB free; free space, or set NANOCHAT_BASE_DIR to a folder on a "
            "larger disk"
        )


def _fetch_all(
    plans: Sequence[_Plan], pool: ThreadPoolExecutor, transfer: Transfer
) -> dict[Asset, Outcome]:
    outcomes: dict[Asset, Outcome] = {}
    # disable=None: no bar where nobody watches, only the lines below.
    with tqdm(
        total=sum(plan.num_bytes for plan in plans),
        desc=f"0/{len(plans)} assets",
        unit="B",
        unit_scale=True,
        disable=None,
    ) as bar:
        told = replace(transfer, on_bytes=bar.update)
        futures = [pool.submit(_fetch, plan, told) for plan in plans]
        reasons: set[str | None] = set()
        try:
            for future in as_completed(futures):
                outcome = future.result()
                outcomes[outcome.asset] = outcome
                if outcome.problem is None or outcome.problem not in reasons:
                    with tqdm.external_write_mode(file=sys.stderr):  # not into the bar's line
                        _tell(outcome, len(outcomes), len(plans))
                reasons.add(outcome.problem)
                bar.set_description(f"{len(outcomes)}/{len(plans)} assets")
        except BaseException:
            # Ctrl-C: the transfers end between two chunks, and their parts stay.
            transfer.stop.set()
            _cancel(futures)
            raise
        bar.total = bar.n  # sizes that were not known before were estimates
        bar.refresh()
    return outcomes


def _cancel(futures: Sequence[Future[Outcome]]) -> None:
    for future in futures:
        future.cancel()


def _tell_problems(outcomes: Sequence[Outcome]) -> None:
    """One line for each reason, however many assets have it."""
    by_reason: dict[str, list[str]] = {}
    for outcome in outcomes:
        by_reason.setdefault(str(outcome.problem), []).append(outcome.asset.name)
    for reason, names in by_reason.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        logger.error("%s%s: %s", ", ".join(names[:3]), more, reason)


def _tell(outcome: Outcome, done: int, total: int) -> None:
    if outcome.problem is None:
        logger.info("%s fetched (%d/%d)", outcome.asset.name, done, total)
    else:
        logger.error("%s: %s", outcome.asset.name, outcome.problem)


def _fetch(plan: _Plan, transfer: Transfer) -> Outcome:
    """Fetch one asset and write its manifest."""
    asset = plan.asset
    try:
        if isinstance(asset.source, HubSplit):
            paths = _fetch_split(plan, transfer)
        elif isinstance(asset.source, ZipUrl):
            paths = _fetch_zip(asset, asset.source, transfer)
        else:
            _fetch_file(asset, transfer)
            paths = [asset.path]
        records = tuple(_checked_record(asset, path) for path in paths)
        write_manifest(asset, Manifest(records, plan.revision))
    except StoppedError:
        return Outcome(asset, problem="stopped")
    except UserError as error:
        return Outcome(asset, problem=str(error))
    except OSError as error:
        transfer.stop.set()  # a disk that is full or gone is so for all
        return Outcome(asset, problem=f"{error.strerror} while writing {asset.path}")
    return Outcome(asset, "fetched")


def _checked_record(asset: Asset, path: Path) -> FileRecord:
    try:
        return record_file(asset.folder, path)
    except DamagedError as error:
        _quarantine(path, f"arrived damaged: {error}")
        raise TransferError(f"{path.name} arrived, but {error}") from error


def _fetch_split(plan: _Plan, transfer: Transfer) -> list[Path]:
    assert isinstance(plan.asset.source, HubSplit)
    paths = []
    for number, remote in enumerate(plan.files):
        path = plan.asset.path / f"{number:05d}.parquet"
        if not _is_same(path, remote):
            url = hub.file_url(plan.asset.source.dataset, remote.path, plan.revision or "main")
            transfer.download(
                url, path, headers=hub.headers(), num_bytes=remote.num_bytes, sha256=remote.sha256
            )
        paths.append(path)
    return paths


def _is_same(path: Path, remote: hub.RemoteFile) -> bool:
    """Whether a file from an earlier run is the one the hub lists."""
    if not path.is_file() or path.stat().st_size != remote.num_bytes:
        return False
    return remote.sha256 is not None and sha256_file(path) == remote.sha256


def _fetch_file(asset: Asset, transfer: Transfer) -> None:
    if isinstance(asset.source, HubFile):
        url = hub.file_url(asset.source.dataset, asset.source.file)
        transfer.download(url, asset.path, headers=hub.headers())
    elif isinstance(asset.source, Url):
        url, sha256 = mirrored(asset.source.url), asset.source.sha256
        transfer.download(url, asset.path, sha256=sha256)


def _fetch_zip(asset: Asset, source: ZipUrl, transfer: Transfer) -> list[Path]:
    """Fetch and unpack; the folder appears complete."""
    archive = asset.path.with_name(f".{asset.path.name}.zip")
    transfer.download(mirrored(source.url), archive)
    unpacked = asset.path.with_name(f".{asset.path.name}.new")
    shutil.rmtree(unpacked, ignore_errors=True)
    try:
        with zipfile.ZipFile(archive) as file:
            file.extractall(unpacked)  # which keeps every name inside the folder
    except (zipfile.BadZipFile, EOFError) as error:
        _quarantine(archive, f"is not a zip ({error})")
        raise TransferError(f"{source.url} is not a zip ({error})") from error
    inner = unpacked / source.folder
    if not inner.is_dir():
        raise TransferError(f"{source.url} has no folder {source.folder!r} in it")
    if asset.path.exists():
        _quarantine(asset.path, "is fetched again")
    os.replace(inner, asset.path)
    shutil.rmtree(unpacked, ignore_errors=True)
    archive.unlink()
    return sorted(path for path in asset.path.rglob("*") if path.is_file())


def mirrored(url: str) -> str:
    """The address in the user's mirror of what does not come from the hub, if there is one."""
    mirror = os.environ.get(MIRROR_VARIABLE)
    return f"{mirror.rstrip('/')}/{url.rpartition('/')[2]}" if mirror else url
