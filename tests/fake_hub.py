"""A hub on this machine, with servers' bad habits on demand.

Files lie at `<root>/<owner>/<name>/<path>`; anything else below the root is served by its path.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "a" * 40


@dataclass(frozen=True)
class Fault:
    """What happens once instead of a good answer to a GET."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None
    """Bytes of the body after which the connection is closed."""
    stall_after: int | None = None
    """Bytes of the body after which nothing comes any more, until the client gives up."""
    body: bytes | None = None
    """Sent instead of the file."""
    redirect_to: str | None = None


@dataclass(frozen=True)
class Request:
    """What a client asked for."""

    path: str
    range: str | None
    if_range: str | None
    authorization: str | None


class FakeHub:
    """The server's files, its faults by path, and the requests it saw."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.faults: dict[str, list[Fault]] = defaultdict(list)
        self.requests: list[Request] = []
        self.gated: set[str] = set()
        self.linked = True
        """Whether size and hash of a file are told as the hub does of large files."""
        self.gone = threading.Event()
        """Set when the server ends, so that stalled answers end too."""
        self.url = ""

    def add(self, path: str, content: bytes) -> bytes:
        """Put a file below the root."""
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        return content

    def asked(self, path: str) -> list[Request]:
        """The requests for a path."""
        return [request for request in self.requests if request.path == path]

    def fail(self, path: str, *faults: Fault) -> None:
        """Let the next requests of a path go wrong, one fault each."""
        self.faults[path] += faults


@contextmanager
def running(hub: FakeHub) -> Iterator[FakeHub]:
    """Serve on a free port of this machine."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        hub.gone.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        """Keep quiet."""

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        ask = self.headers.get
        self.hub.requests.append(Request(path, ask("Range"), ask("If-Range"), ask("Authorization")))
        faults = self.hub.faults[path]
        fault = faults.pop(0) if faults else Fault()
        parts = path.strip("/").split("/")
        if fault.redirect_to is not None:
            self._send(302, {"Location": fault.redirect_to}, b"")
        elif fault.status != 200:
            self._send(fault.status, fault.headers, b"sorry")
        elif parts[:2] == ["api", "datasets"]:
            self._api(parts[2:])
        elif parts[:1] != ["datasets"] or parts[3:4] != ["resolve"]:
            self._file("/".join(parts), fault)
        elif "/".join(parts[1:3]) in self.hub.gated:
            self._send(403, {"X-Error-Code": "GatedRepo"}, b"")
        else:
            self._file("/".join([*parts[1:3], *parts[5:]]), fault)

    def _api(self, parts: list[str]) -> None:
        repository = self.hub.root / "/".join(parts[:2])
        if not repository.is_dir():
            self._send(404, {"X-Error-Code": "RepoNotFound"}, b"")
            return
        value: object = {"sha": COMMIT}
        if parts[2] == "tree":
            value = [
                {"type": "file", "path": p.relative_to(repository).as_posix(), **_sizes(p)}
                for p in sorted(repository.rglob("*"))
                if p.is_file()
            ]
        self._send(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def _file(self, path: str, fault: Fault) -> None:
        target = self.hub.root / path
        if not target.is_file():
            self._send(404, {"X-Error-Code": "EntryNotFound"}, b"")
            return
        content = target.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        headers = {"ETag": f'"{digest}"', **fault.headers}
        if self.hub.linked:
            headers |= {"X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{digest}"'}
        body, status, start = fault.body if fault.body is not None else content, 200, 0
        wanted = self.headers.get("Range")
        if wanted and self.headers.get("If-Range") == f'"{digest}"' and fault.body is None:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                self._send(416, {"Content-Range": f"bytes */{len(content)}"}, b"")
                return
            status = 206
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._send(status, headers, body[start:], fault)

    def _send(
        self, status: int, headers: dict[str, str], body: bytes, fault: Fault | None = None
    ) -> None:
        fault = fault or Fault()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        cut = fault.cut_after if fault.cut_after is not None else fault.stall_after
        self.wfile.write(body if cut is None else body[:cut])
        if cut is not None:
            self.wfile.flush()
            if fault.stall_after is not None:
                self.hub.gone.wait()
            self.close_connection = True


def _sizes(path: Path) -> dict[str, object]:
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    return {"size": len(content), "lfs": {"oid": digest, "size": len(content)}}
