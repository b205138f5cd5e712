"""Is there a way to what has still to be fetched: the hosts are asked, not the node's name."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

from nanochat import hub
from nanochat.assets import Asset, HubFile, HubSplit, Url, ZipUrl
from nanochat.doctor.finding import Finding
from nanochat.prefetch import mirrored
from nanochat.transfer import TransferError, check_network_allowed, why_silent


def check_network(missing: Sequence[Asset]) -> Finding:
    """Do the hosts answer that the missing assets come from."""
    addresses = addresses_of(missing)
    if not addresses:
        return Finding("network", "ok", "not needed: nothing has to be fetched")
    try:
        check_network_allowed(of_hub=any(isinstance(a.source, HubSplit | HubFile) for a in missing))
    except TransferError as error:
        return Finding("network", "note", str(error))
    with ThreadPoolExecutor(len(addresses)) as pool:
        silent = [reason for reason in pool.map(why_silent, addresses.values()) if reason]
    hosts = ", ".join(addresses)
    mirrors = "name mirrors in HF_ENDPOINT and NANOCHAT_ASSETS_MIRROR, or a proxy in HTTPS_PROXY"
    if not silent:
        return Finding("network", "ok", f"{hosts} can be reached")
    if len(silent) == len(addresses):
        return Finding(
            "network",
            "FAIL",
            f"this node has no way to any of {hosts}: {silent[0]}",
            f"fetch on a node that has internet (bash scripts/download_data.sh), or {mirrors}",
        )
    return Finding("network", "FAIL", "; ".join(silent), f"have them allowed here, or {mirrors}")


def addresses_of(assets: Sequence[Asset]) -> dict[str, str]:
    """One address for each host that the assets come from, by host.

    Of the hub a file if there is one: its answer leads to the host that really keeps the bytes.
    """
    found: dict[str, str] = {}
    for asset in sorted(assets, key=lambda asset: not isinstance(asset.source, HubFile)):
        source = asset.source
        if isinstance(source, HubFile):
            url = hub.file_url(source.dataset, source.file)
        elif isinstance(source, HubSplit):
            url = f"{hub.endpoint()}/api/datasets/{source.dataset}/revision/{hub.REVISION}"
        elif isinstance(source, Url | ZipUrl):
            url = mirrored(source.url)
        else:
            continue
        found.setdefault(urlsplit(url).netloc, url)
    return found
