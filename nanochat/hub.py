"""What the Hugging Face hub, or a mirror of it, holds: addresses, the files of a split, a token."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

from nanochat.assets import HubSplit
from nanochat.transfer import Transfer, TransferError

DEFAULT_ENDPOINT = "https://huggingface.co"
REVISION = "main"


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository as the hub lists it."""

    path: str
    num_bytes: int
    sha256: str | None
    """Known for large files only."""


def endpoint() -> str:
    """The hub's address, or the mirror in HF_ENDPOINT."""
    return (os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")


def headers() -> dict[str, str]:
    """What every request to the hub says: who asks, and the token if there is one."""
    # Imported on first use: half a second that commands without a hub need not wait for.
    from huggingface_hub import get_token

    token = get_token()
    return {"User-Agent": "nanochat"} | ({"Authorization": f"Bearer {token}"} if token else {})


def file_url(dataset: str, path: str, revision: str = REVISION) -> str:
    """The address of one file of a data set."""
    from huggingface_hub import hf_hub_url

    return str(
        hf_hub_url(dataset, path, repo_type="dataset", revision=revision, endpoint=endpoint())
    )


def list_split(source: HubSplit, transfer: Transfer) -> tuple[str, list[RemoteFile]]:
    """The commit a split is of now, and its parquet files in order; TransferError if none."""
    api = f"{endpoint()}/api/datasets/{source.dataset}"
    info, _ = transfer.get_json(f"{api}/revision/{REVISION}", headers())
    commit = str(_field(info, "sha", api))
    files: list[RemoteFile] = []
    page: str | None = f"{api}/tree/{commit}?recursive=true&expand=false"
    while page is not None:
        entries, page = transfer.get_json(page, headers())
        files += [_remote_file(entry, api) for entry in entries if entry.get("type") == "file"]
    found = select_split([file.path for file in files], source.config, source.split)
    if not found:
        parquet = sorted(file.path for file in files if file.path.endswith(".parquet"))
        raise TransferError(
            f"{source.dataset} has no parquet files of configuration {source.config!r}, split "
            f"{source.split!r}; it has {', '.join(parquet[:8]) or 'none at all'}"
        )
    by_path = {file.path: file for file in files}
    return commit, [by_path[path] for path in found]


def select_split(paths: list[str], config: str, split: str) -> list[str]:
    """The parquet files of a split by the hub's naming rules, sorted.

    They are `config/split-00000-of-00002.parquet`, or below `data/` where there is only one
    configuration; an export of the hub writes `config/split/0000.parquet`.
    """
    number = r"-\d+-of-\d+(-[0-9a-f]+)?\.parquet"
    for folder in (config, "data"):
        start = f"{re.escape(folder)}/{re.escape(split)}"
        pattern = re.compile(rf"{start}({number}|/\d+\.parquet|\.parquet)")
        if found := sorted(path for path in paths if pattern.fullmatch(path)):
            return found
    return []


def _remote_file(entry: dict[str, Any], api: str) -> RemoteFile:
    large = entry.get("lfs") or {}
    size = large.get("size", entry.get("size", 0))
    return RemoteFile(str(_field(entry, "path", api)), int(size), large.get("oid"))


def _field(value: Any, name: str, api: str) -> Any:
    try:
        return value[name]
    except (KeyError, TypeError) as error:
        raise TransferError(
            f"{api} answered without {name!r}; is it a mirror of the hub?"
        ) from error
