"""uvicorn's HTTP protocol with a patience of our own: heads, slow readers, kept connections."""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

# Browsers and clients send a request's head in one go; a person with telnet has this long.
HEAD_SECONDS = 10.0
# A reader that takes nothing of what waits for it for so long has gone.
WRITE_SECONDS = 30.0
# A kept connection must be given up by its client first. Who sends a request into one that the
# server is closing gets a reset instead of an answer, and clients keep theirs as long as uvicorn
# does by itself (5 s: httpx and what is built on it), a reverse proxy mostly 60 s.
IDLE_SECONDS = 75
# When more than half of all connections that may be are taken, the idle ones must go.
CROWDED_IDLE_SECONDS = 5


class PatientProtocol(H11Protocol):
    """Closes a connection whose request head does not come, or whose client does not read.

    uvicorn itself limits only the idle time between two requests, which depends on the crowd here.
    """

    _head_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Expect a request from the start."""
        super().connection_made(transport)
        # asyncio does so only for listeners of its own making. Without it a response in two parts
        # waits 40 ms for the client to confirm the first.
        connection = transport.get_extra_info("socket")
        if connection.family in (socket.AF_INET, socket.AF_INET6):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Whatever the system does not take at once waits for the reader, and is waited for.
        transport.set_write_buffer_limits(high=0)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the timers."""
        super().connection_lost(exc)
        self._stop_head_timer()
        self._stop_write_timer()

    def data_received(self, data: bytes) -> None:
        """Begin, or end, to wait for the rest of a head."""
        super().data_received(data)
        self._expect_head()

    def on_response_complete(self) -> None:
        """Keep the connection for the client's next request, for a while."""
        is_crowded = 2 * len(self.connections) > (self.limit_concurrency or float("inf"))
        self.timeout_keep_alive = CROWDED_IDLE_SECONDS if is_crowded else IDLE_SECONDS
        super().on_response_complete()

    def _expect_head(self) -> None:
        if self.conn.their_state is not h11.IDLE or self.transport.is_closing():
            self._stop_head_timer()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_SECONDS, self._head_is_late)

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self.transport.write(
                b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
            )
            self.transport.close()

    def pause_writing(self) -> None:
        """The client has stopped reading; wait for it, but not for ever."""
        super().pause_writing()
        self._write_timer = self.loop.call_later(WRITE_SECONDS, self._reader_is_gone)

    def _reader_is_gone(self) -> None:
        # Reset, not closed: the kernel would keep what it has for this client, and go on trying.
        linger = struct.pack("ii", 1, 0)
        self.transport.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, linger
        )
        self.transport.abort()

    def resume_writing(self) -> None:
        """The client reads again."""
        super().resume_writing()
        self._stop_write_timer()

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
