"""Files over HTTP that arrive whole or not at all: resumed, repeated, checked, renamed into place.

A file grows as `.<name>.part` beside its target. A later attempt, or a later run after a crash,
asks the server for the rest; the ETag kept beside the part makes sure that it is the rest of the
same file. Everything else here is about what a server may answer instead.
"""

from __future__ import annotations

import email.utils
import errno
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import requests

from nanochat.common import UserError, atomic_write_text, sha256_file

logger = logging.getLogger(__name__)

T = TypeVar("T")

PROBE_SECONDS = (5.0, 10.0)  # for a connection, and for the first byte of an answer
CHUNK_BYTES = 1 << 16  # at most this much is lost when a connection is cut
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}
_WORTH_REPEATING = {408, 425, 429, 500, 502, 503, 504}
_SHA256 = re.compile(r"[0-9a-f]{64}")
_TRUE = {"1", "true", "yes", "on"}


class TransferError(UserError):
    """A file that could not be had; the message says why and what can be done."""


class StoppedError(Exception):
    """Another transfer found that none can go on, or the user pressed Ctrl-C."""


class _AgainError(Exception):
    """An attempt failed in a way that the next one may not."""

    def __init__(self, reason: str, *, wait: float | None = None, wrong: bool = False) -> None:
        super().__init__(reason)
        self.wait, self.wrong = wait, wrong
        """Seconds the server asked for; whether all bytes came and were the wrong ones."""


class _NoAnswerError(_AgainError):
    """Not even a connection."""


@dataclass(frozen=True)
class Patience:
    """How long to wait and how often to try."""

    attempts: int = 5
    """In a row without a new byte; an attempt that brought some begins the count again."""
    connect_seconds: float = 10.0
    read_seconds: float = 30.0
    """Without any byte."""
    attempts_unheard: int = 3
    """Without a connection to a host that has never answered: it may be out of reach for good."""
    longest_wait: float = 300.0
    """A server that asks for more is not waited for."""
    backoff_seconds: float = 1.0
    """Wait before the second attempt; doubled each time."""


@dataclass
class Transfer:
    """Downloads that share what they learn: hosts that do not answer, a full disk, Ctrl-C."""

    patience: Patience = field(default_factory=Patience)
    on_bytes: Callable[[int], object] = lambda count: None
    """Told of every byte that arrived; a negative number when some are thrown away."""
    wait: Callable[[float], object] | None = None
    """Instead of waiting, for tests."""
    stop: threading.Event = field(default_factory=threading.Event)
    _heard: set[str] = field(default_factory=set)
    _silent_hosts: dict[str, str] = field(default_factory=dict)
    """Host -> why nothing comes from it."""

    def get_json(self, url: str, headers: Mapping[str, str]) -> tuple[Any, str | None]:
        """Return what a server says in JSON, and the address of the next page if there is one."""

        def attempt() -> tuple[Any, str | None]:
            with self._answer(url, headers) as response:
                try:
                    return response.json(), response.links.get("next", {}).get("url")
                except requests.RequestException as error:
                    raise _AgainError(f"its answer is not JSON ({error})") from error

        return self._repeat(url, attempt, progress=lambda: 0)

    def download(
        self,
        url: str,
        target: Path,
        *,
        headers: Mapping[str, str] | None = None,
        num_bytes: int | None = None,
        sha256: str | None = None,
    ) -> None:
        """Fetch `url` to `target`, which appears when it is complete and as expected.

        num_bytes, sha256: what is known about the file; the server's own word is used as well.
        TransferError when it cannot be had, StoppedError when the others have stopped.
        """
        part = part_path(target)
        target.parent.mkdir(parents=True, exist_ok=True)

        def attempt() -> None:
            try:
                self._fetch_rest(url, part, headers or {}, num_bytes, sha256)
            except OSError as error:
                if error.errno in _DISK_FULL:
                    self.stop.set()
                raise

        self._repeat(url, attempt, progress=lambda: _size(part))
        os.replace(part, target)
        _etag_path(part).unlink(missing_ok=True)

    # ---- one attempt --------------------------------------------------------------------------

    def _fetch_rest(
        self,
        url: str,
        part: Path,
        headers: Mapping[str, str],
        num_bytes: int | None,
        sha256: str | None,
    ) -> None:
        have, etag = _size(part), _read_etag(part)
        asked = dict(headers) | {"Accept-Encoding": "identity"}
        if have and etag:
            asked |= {"Range": f"bytes={have}-", "If-Range": etag}
        with self._answer(url, asked, allowed=(416,)) as response:
            if response.status_code == 416:  # nothing after what we have, so it must be another
                self._discard(part)
                raise _AgainError("it has no bytes after those that were fetched before")
            start, total = _range_of(response)
            if start not in (0, have):
                raise _AgainError(f"it sent bytes from {start} instead of {have}")
            said_bytes, said_sha256 = _announced(response)
            if start == 0:
                self._discard(part)
                if new_etag := _strong_etag(response):
                    atomic_write_text(_etag_path(part), new_etag)
            self._write(response, part, append=start > 0)
        self._check(
            part, num_bytes or said_bytes, sha256 or said_sha256, total if total >= 0 else None
        )

    def _write(self, response: requests.Response, part: Path, *, append: bool) -> None:
        with part.open("ab" if append else "wb") as file:
            try:
                for chunk in response.iter_content(CHUNK_BYTES):
                    if self.stop.is_set():
                        raise StoppedError
                    file.write(chunk)
                    self.on_bytes(len(chunk))
            except requests.RequestException as error:
                raise _AgainError(f"the connection was cut ({_reason(error)})") from error
            finally:
                file.flush()
                os.fsync(file.fileno())

    def _check(
        self, part: Path, num_bytes: int | None, sha256: str | None, sent: int | None
    ) -> None:
        size = _size(part)
        if sent is not None and size < sent:
            raise _AgainError(f"the connection was cut after {size:,} of {sent:,} bytes")
        if num_bytes is not None and size != num_bytes:
            self._discard(part)
            raise _AgainError(f"it has {size:,} bytes instead of {num_bytes:,}", wrong=True)
        if sha256 is not None and sha256_file(part) != sha256:
            self._discard(part)
            raise _AgainError("its SHA-256 is not the expected one", wrong=True)

    def _discard(self, part: Path) -> None:
        self.on_bytes(-_size(part))
        part.unlink(missing_ok=True)
        _etag_path(part).unlink(missing_ok=True)

    @contextmanager
    def _answer(
        self, url: str, headers: Mapping[str, str], *, allowed: tuple[int, ...] = ()
    ) -> Iterator[requests.Response]:
        """The server's answer with a good status, or one of the `allowed` ones."""
        if self.stop.is_set():
            raise StoppedError
        timeout = (self.patience.connect_seconds, self.patience.read_seconds)
        try:
            response = requests.get(url, headers=dict(headers), stream=True, timeout=timeout)
        except requests.exceptions.ConnectionError as error:
            raise _NoAnswerError(f"no connection ({_reason(error)})") from error
        except requests.Timeout as error:
            raise _AgainError(f"no answer within {self.patience.read_seconds:g} s") from error
        except requests.RequestException as error:
            raise TransferError(f"{url} cannot be fetched: {_reason(error)}") from error
        self._heard.add(urlsplit(url).netloc)
        with response:
            status = response.status_code
            if status in _WORTH_REPEATING:
                raise _AgainError(f"HTTP {status} {response.reason}", wait=_retry_after(response))
            if status not in (200, 206, *allowed):
                raise TransferError(_refusal(url, response))
            yield response

    # ---- again and again ----------------------------------------------------------------------

    def _repeat(self, url: str, attempt: Callable[[], T], *, progress: Callable[[], int]) -> T:
        """Call `attempt` until it succeeds or nothing moves any more."""
        host = urlsplit(url).netloc
        failures = wrong = 0
        while True:
            if host in self._silent_hosts:
                raise TransferError(self._silent_hosts[host])
            before = progress()
            try:
                return attempt()
            except _AgainError as error:
                failures = 1 if progress() > before else failures + 1
                wrong += error.wrong
                if isinstance(error, _NoAnswerError) and failures >= self._patience_with(host):
                    self._silent_hosts[host] = (
                        f"{host} cannot be reached: {error}; is there a network here? HF_ENDPOINT "
                        "and NANOCHAT_ASSETS_MIRROR name mirrors"
                    )
                    raise TransferError(self._silent_hosts[host]) from error
                if failures >= self.patience.attempts or wrong > 1:
                    raise TransferError(f"{url} cannot be fetched: {error}") from error
                self._wait(url, error, self._pause(url, error, failures))

    def _patience_with(self, host: str) -> int:
        return self.patience.attempts if host in self._heard else self.patience.attempts_unheard

    def _pause(self, url: str, error: _AgainError, failures: int) -> float:
        """Seconds until the next attempt."""
        if error.wait is None:
            return float(min(self.patience.backoff_seconds * 2 ** (failures - 1), 60.0))
        if error.wait > self.patience.longest_wait:
            raise TransferError(
                f"{url} cannot be fetched: {error}, and the server asks to wait "
                f"{error.wait:,.0f} s; try again then"
            )
        return error.wait

    def _wait(self, url: str, error: Exception, seconds: float) -> None:
        logger.info("%s: %s; trying again in %.0f s", url, error, seconds)
        if self.wait is not None:
            self.wait(seconds)
        elif self.stop.wait(seconds):
            raise StoppedError from error


# ---- what is on the disk ----------------------------------------------------------------------


def part_path(target: Path) -> Path:
    """Where a file grows until it is complete."""
    return target.with_name(f".{target.name}.part")


def _etag_path(part: Path) -> Path:
    return part.with_suffix(".etag")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _read_etag(part: Path) -> str | None:
    try:
        return _etag_path(part).read_text(encoding="utf-8").strip() or None
    except (FileNotFoundError, UnicodeDecodeError):
        return None


# ---- what servers say -------------------------------------------------------------------------


def _range_of(response: requests.Response) -> tuple[int, int]:
    """The offset of the first byte, and the size of the whole file (-1: not said)."""
    if response.status_code == 206:
        match = re.fullmatch(
            r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", "").strip()
        )
        if match is None:
            raise _AgainError("it sent a part without saying which")
        return int(match[1]), -1 if match[2] == "*" else int(match[2])
    length = response.headers.get("Content-Length", "")
    return 0, int(length) if length.isdigit() else -1


def _announced(response: requests.Response) -> tuple[int | None, str | None]:
    """Size and SHA-256 that the hub tells of a large file, in the answer that redirects to it."""
    for answer in (response, *response.history):
        size = answer.headers.get("X-Linked-Size", "")
        etag = answer.headers.get("X-Linked-ETag", "").strip('"')
        if size.isdigit():
            return int(size), etag if _SHA256.fullmatch(etag) else None
    return None, None


def _strong_etag(response: requests.Response) -> str | None:
    etag = response.headers.get("ETag", "")
    return etag if etag.startswith('"') else None  # a weak one says nothing about bytes


def _retry_after(response: requests.Response) -> float | None:
    """Seconds, from a number or a date; None when neither was sent."""
    text = response.headers.get("Retry-After", "").strip()
    if text.isdigit():
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


def _refusal(url: str, response: requests.Response) -> str:
    """Why a server does not give a file, and what the user can do."""
    status, code = response.status_code, response.headers.get("X-Error-Code", "")
    said = f"HTTP {status} {response.reason}"
    if code == "GatedRepo":
        return (
            f"{url} is gated ({said}): accept its terms on its page while logged in, then set "
            "HF_TOKEN to a token of that account"
        )
    if status == 401 or (code == "RepoNotFound" and status != 404):
        return f"{url} does not exist or needs a login ({said}): set HF_TOKEN if it is private"
    if status == 403:
        return f"{url} is refused ({said}): HF_TOKEN, if set, may lack the right to read it"
    if status in (404, 410):
        return f"{url} does not exist ({said})"
    return f"{url} cannot be fetched: {said}"


def _reason(error: Exception) -> str:
    """The innermost cause in a few words; the chain around it says the same at length."""
    cause: BaseException = error
    while (inner := cause.__cause__ or cause.__context__) is not None:
        cause = inner
    return " ".join(str(cause).split()) or type(cause).__name__


def why_silent(url: str) -> str | None:
    """Why nothing comes from an address, None when its host says anything at all; in seconds."""
    headers = {"Range": "bytes=0-0", "User-Agent": "nanochat"}
    try:
        with requests.get(url, headers=headers, stream=True, timeout=PROBE_SECONDS):
            return None
    except requests.RequestException as error:
        # After a redirect it is another host than the one that was asked.
        last = urlsplit(str(error.request.url) if error.request else url).netloc
        asked = urlsplit(url).netloc
        through = f", to which {asked} leads," if last != asked else ""
        return f"{last}{through} cannot be reached ({_reason(error)})"


# ---- whether it is allowed --------------------------------------------------------------------


def is_on(variable: str) -> bool:
    """Whether an environment variable is set to 1, true, yes or on."""
    return os.environ.get(variable, "").strip().lower() in _TRUE


def check_network_allowed(*, of_hub: bool) -> None:
    """TransferError when the environment forbids to fetch anything, or anything of the hub."""
    for variable in ("NANOCHAT_OFFLINE", *(("HF_HUB_OFFLINE",) if of_hub else ())):
        if is_on(variable):
            raise TransferError(
                f"{variable} is set, so nothing is fetched; unset it on a machine with internet"
            )
