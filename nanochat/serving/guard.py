"""What every request must pass before a route sees it. Plain ASGI, no framework.

Refused here: hosts that are not ours (DNS rebinding), pages of other origins, a missing key,
bodies that are not JSON, too long, or too slow. Every response gets the security headers.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import json
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from nanochat.serving.requests import MAX_BODY_BYTES

logger = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

# A body of at most half a megabyte; a phone on a bad line sends that in ten seconds.
BODY_SECONDS = 10.0
MAX_HEAD_BYTES = 16 * 1024
MAX_DISCARDED_BYTES = 8 * 1024 * 1024
PUBLIC_PATHS = frozenset({"/", "/logo.svg", "/health"})
_SECURITY_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)


@dataclass(frozen=True)
class Access:
    """Who may come in."""

    api_key: str | None = None
    """Asked for on every route but the page and /health; None = nobody is asked."""
    hosts: frozenset[str] = frozenset({"localhost"})
    """Names in the Host header that are ours, in lower case. Addresses always are."""


def error_body(
    message: str, *, kind: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """The error object of the OpenAI API, which all routes use."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def kind_of(status: int) -> str:
    """The error type that belongs to an HTTP status."""
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    return kinds.get(status, "invalid_request_error" if status < 500 else "server_error")


class Guard:
    """The outermost layer of the application."""

    def __init__(self, app: App, access: Access) -> None:
        self.app, self.access = app, access
        self._turnstile = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check, pass on, log one line."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.monotonic()
        status = 0

        async def send_guarded(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = list(message.get("headers", ()))
                present = {name for name, _ in headers}
                headers += [pair for pair in _SECURITY_HEADERS if pair[0] not in present]
                message = {**message, "headers": headers}
            await send(message)

        headers = _single_headers(scope)
        refusal = self._refusal(scope, headers)
        try:
            if refusal is not None:
                await _discard_body(receive)
                await _refuse(send_guarded, *refusal)
            else:
                await self._with_body(scope, headers, receive, send_guarded)
        finally:
            # Not the query, not the body; and no line breaks a client may have put in the path.
            path = ascii(scope["path"])[1:-1][:100]
            seconds = time.monotonic() - started
            logger.info("%s %s %s %.3f s", scope["method"], path, status or "-", seconds)

    def _refusal(self, scope: Scope, headers: dict[bytes, bytes]) -> tuple[int, str, str] | None:
        """Status, sentence and code when the request must not pass."""
        # h11 only counts what comes in several pieces.
        length = len(scope["raw_path"]) + len(scope["query_string"])
        length += sum(len(name) + len(value) for name, value in scope["headers"])
        if length > MAX_HEAD_BYTES:
            return 431, f"the headers have more than {MAX_HEAD_BYTES:,} bytes", "head_too_large"
        host = headers.get(b"host", b"").decode("latin-1")
        if not self._is_our_host(host):
            return 403, "the Host header is not a name of this server", "host_not_allowed"
        origin = headers.get(b"origin")
        if origin is not None and origin.decode("latin-1").partition("://")[2] != host:
            return 403, "requests from pages of other origins are refused", "origin_not_allowed"
        if self.access.api_key is not None and scope["path"] not in PUBLIC_PATHS:
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, b"Bearer " + self.access.api_key.encode()):
                sentence = "send the server's API key in the header `Authorization: Bearer KEY`"
                return 401, sentence, "invalid_api_key"
        return None

    def _is_our_host(self, host: str) -> bool:
        name = host.lower()
        if name.startswith("["):
            name = name[1:].partition("]")[0]
        elif name.count(":") == 1:
            name = name.partition(":")[0]
        if name in self.access.hosts:
            return True
        try:
            # An address cannot be rebound to another machine the way a name can.
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    async def _with_body(
        self, scope: Scope, headers: dict[bytes, bytes], receive: Receive, send: Send
    ) -> None:
        # Of every method: a body that nobody reads would keep its connection for as long as a byte
        # of it comes now and then.
        try:
            body = await asyncio.wait_for(_read_body(receive), BODY_SECONDS)
        except asyncio.TimeoutError:
            sentence = f"the body did not arrive within {BODY_SECONDS:g} seconds"
            await _refuse(send, 408, sentence, "timeout")
            return
        if body is None:
            await _discard_body(receive)
            sentence = f"the body has more than {MAX_BODY_BYTES:,} bytes"
            await _refuse(send, 413, sentence, "body_too_large")
            return
        is_post = scope["method"] == "POST"
        media_type = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if is_post and media_type != b"application/json":
            sentence = "send JSON, with the header `Content-Type: application/json`"
            await _refuse(send, 415, sentence, "unsupported_media_type")
            return

        # For answers that tell how long they took: the wait for others' requests is part of it.
        scope.setdefault("state", {})["arrived"] = time.monotonic()
        is_read = False

        async def receive_again() -> Message:
            nonlocal is_read
            if is_read:
                return await receive()
            is_read = True
            return {"type": "http.request", "body": body, "more_body": False}

        if is_post:
            await self._take_turns()
        await self.app(scope, receive_again, send)

    async def _take_turns(self) -> None:
        """Let one request in for each turn of the event loop.

        To read one takes a millisecond or more. When many come at once, the loop would be busy with
        all of them before it sends a token, or tells that the server is well.
        """
        async with self._turnstile:
            await asyncio.sleep(0)


def _single_headers(scope: Scope) -> dict[bytes, bytes]:
    """The headers by name; one that comes twice counts as empty, as it could mean either."""
    found: dict[bytes, bytes] = {}
    for name, value in scope["headers"]:
        found[name] = b"" if name in found else value
    return found


async def _read_body(receive: Receive) -> bytes | None:
    """The whole body, b"" when the client has gone, None when it is too long."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return b""
        body += message.get("body", b"")
        if len(body) > MAX_BODY_BYTES:
            return None
        if not message.get("more_body", False):
            return bytes(body)


async def _discard_body(receive: Receive) -> None:
    """Let a body that nobody wants arrive, within reason.

    A connection that is closed while data come is reset, and the client never sees why.
    """

    async def discard() -> None:
        length = 0
        while length < MAX_DISCARDED_BYTES:
            message = await receive()
            length += len(message.get("body", b""))
            if not message.get("more_body", False):
                return

    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(discard(), BODY_SECONDS)


async def _refuse(send: Send, status: int, message: str, code: str) -> None:
    body = json.dumps(error_body(message, kind=kind_of(status), code=code)).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        # More of a body may still be on its way; it is not read.
        (b"connection", b"close"),
    ]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
