"""When a run has to stop: a signal came, or its time is nearly over. Standard library and psutil.

Neither stops anything by itself. The loop asks at every step boundary, all ranks agree, and the
run saves and ends with exit code 85.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import psutil

from nanochat.common import UserError

logger = logging.getLogger(__name__)

STDERR = 2  # its descriptor
EXIT_STOPPED = 85  # "stopped, resume me": no other program we know exits with it
# The last save and the last stretch before it may be slower than any seen so far.
RESERVE_FACTOR = 1.5
# What a save may take before one has been seen: half a minute, or this share of a short limit.
UNSEEN_SAVE_SECONDS, UNSEEN_SAVE_SHARE = 30.0, 0.1


class StoppedError(Exception):
    """A stop was asked for; everything is saved and the run can be resumed."""


class StopRequest:
    """Whether a signal or the clock asks this process to stop."""

    def __init__(
        self, max_minutes: float = 0.0, *, seconds_since_start: Callable[[], float] | None = None
    ) -> None:
        """Without a limit if `max_minutes` is 0. The clock runs since the process was started."""
        if max_minutes < 0:
            raise UserError(f"--max-minutes is {max_minutes}; give minutes, or 0 for no limit")
        self.received: list[int] = []
        self._max_minutes = max_minutes
        self._seconds = seconds_since_start or _process_seconds

    @property
    def has_limit(self) -> bool:
        """Whether the clock may ask."""
        return self._max_minutes > 0

    def reason(self, *, longest_stretch: float = 0.0, longest_save: float | None = None) -> str:
        """Why to stop now; "" to go on.

        longest_stretch: seconds from one question to the next, so far. longest_save: seconds of
        a whole save so far, None if there was none yet.
        """
        if self.received:
            return signal.Signals(self.received[0]).name
        if not self._max_minutes:
            return ""
        limit = 60.0 * self._max_minutes
        if longest_save is None:
            longest_save = min(UNSEEN_SAVE_SECONDS, UNSEEN_SAVE_SHARE * limit)
        left = limit - self._seconds()
        if left > RESERVE_FACTOR * (longest_stretch + longest_save):
            return ""
        return f"--max-minutes={self._max_minutes:g} with {max(left, 0.0):.0f} s left"


def _process_seconds() -> float:
    # Not counted from here: importing and loading have taken their part of the limit already.
    return time.time() - psutil.Process().create_time()


def _tell(message: str) -> None:
    """A warning at once, from inside a signal handler.

    The signal may have come in the middle of a log line, whose stream cannot be written again
    before that is done; its descriptor can.
    """
    if not logger.isEnabledFor(logging.WARNING):
        return
    with suppress(OSError):  # such as a terminal that has gone, which sends the signal itself
        os.write(STDERR, f"{time.strftime('%H:%M:%S')} warning: {message}\n".encode())


@contextmanager
def catch_signals(request: StopRequest) -> Iterator[None]:
    """Note signals in `request` instead of ending the process.

    SIGTERM, SIGUSR1, the first Ctrl-C, and SIGHUP: a terminal that has gone, as when a connection
    breaks. Under nohup, which ignores it, the run goes on.
    """
    previous: dict[int, Any] = {}

    def note(number: int, frame: FrameType | None) -> None:
        request.received.append(number)
        _tell(f"{signal.Signals(number).name}: saving at the next step")
        if number == signal.SIGINT:  # a second Ctrl-C stops at once
            signal.signal(signal.SIGINT, signal.default_int_handler)

    for caught in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
        if caught == signal.SIGHUP and signal.getsignal(caught) is signal.SIG_IGN:
            continue
        previous[caught] = signal.signal(caught, note)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
