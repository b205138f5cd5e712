"""The trainer's side of the sandbox: start the launcher, serve its pipes, stop it in time."""

from __future__ import annotations

import json
import os
import selectors
import signal
import stat
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OUTPUT_BYTES = 64 << 10  # kept of stdout and of stderr; the rest is read and dropped
SCRATCH_BYTES = 16 << 20
SCRATCH_ENTRIES = 4096
# A loaded machine may need seconds to start an interpreter; the program's own time comes after.
STARTUP_SECONDS = 20.0
_TICK_SECONDS = 0.05  # between looks at the scratch folder, where its size is not limited
_REMOVE_TRIES = 20
_MAX_PATH_CHARS = 2048  # what lies deeper would soon be out of the kernel's reach, and uncounted
_CHUNK_BYTES = 1 << 16
_SOURCE = str(Path(__file__).resolve().parents[2])
_LAUNCH = (
    "import sys; sys.path.append({source!r}); "
    "from nanochat.sandbox.jail import main; main({options!r})"
)


@dataclass
class Output:
    """The first bytes of a stream."""

    limit: int
    data: bytearray = field(default_factory=bytearray)
    is_truncated: bool = False

    def add(self, chunk: bytes) -> None:
        """Keep what there is room for."""
        room = self.limit - len(self.data)
        self.is_truncated |= len(chunk) > room
        self.data += chunk[:room]

    @property
    def text(self) -> str:
        """As UTF-8, whatever is not being replaced."""
        return self.data.decode("utf-8", errors="replace")


class Run:
    """One launcher with its pipes, watched until its verdict or its deadline.

    killed: why it was stopped: "timeout", "startup", "scratch" or None.
    """

    def __init__(self, options: dict[str, Any], request: bytes) -> None:
        self.stdout, self.stderr = Output(OUTPUT_BYTES), Output(OUTPUT_BYTES)
        self.report = Output(1 << 20)
        self.killed: str | None = None
        self._unsent = memoryview(request)
        verdict, verdict_end = os.pipe()
        try:
            options = {**options, "verdict": verdict_end, "source": _SOURCE}
            options["trainer"] = os.getpid()
            launch = _LAUNCH.format(source=_SOURCE, options=json.dumps(options))
            environment = {"LANG": "C.UTF-8", "PATH": "/usr/bin:/bin"}
            if options["library_path"]:
                environment["LD_LIBRARY_PATH"] = options["library_path"]
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", "-c", launch],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=[verdict_end],
                env=environment,
                cwd="/",
                start_new_session=True,
            )
        except BaseException:
            os.close(verdict)
            raise
        finally:
            os.close(verdict_end)
        self._verdict = verdict

    @property
    def lines(self) -> list[dict[str, Any]]:
        """What the tester has said: first its walls, then its verdict."""
        complete, _, _ = self.report.data.rpartition(b"\n")
        return [json.loads(line) for line in complete.splitlines()]

    def wait(self, timeout: float, scratch: Path) -> None:
        """Serve the pipes until the verdict, the deadline or too much in `scratch`; then kill."""
        process = self._process
        assert process.stdin
        assert process.stdout
        assert process.stderr
        outputs = {process.stdout.fileno(): self.stdout, process.stderr.fileno(): self.stderr}
        outputs[self._verdict] = self.report
        try:
            with selectors.DefaultSelector() as selector:
                for descriptor in outputs:
                    os.set_blocking(descriptor, False)
                    selector.register(descriptor, selectors.EVENT_READ)
                os.set_blocking(process.stdin.fileno(), False)
                selector.register(process.stdin.fileno(), selectors.EVENT_WRITE)
                self._serve(selector, outputs, timeout, scratch)
        finally:
            self._kill()
            for descriptor, output in outputs.items():
                _drain(descriptor, output)
            for stream in (process.stdin, process.stdout, process.stderr):
                stream.close()
            os.close(self._verdict)

    def _serve(
        self,
        selector: selectors.BaseSelector,
        outputs: dict[int, Output],
        timeout: float,
        scratch: Path,
    ) -> None:
        deadline = time.monotonic() + STARTUP_SECONDS
        is_ready, next_look = False, 0.0
        while self._verdict in selector.get_map():
            now = time.monotonic()
            if now >= deadline:
                self.killed = "timeout" if is_ready else "startup"
                return
            if is_ready and now >= next_look:
                if is_full(scratch):
                    self.killed = "scratch"
                    return
                next_look = now + _TICK_SECONDS
            for key, _ in selector.select(min(deadline - now, _TICK_SECONDS)):
                if key.fd in outputs:
                    if not _read(key.fd, outputs[key.fd]):
                        selector.unregister(key.fd)
                elif self._write():
                    selector.unregister(key.fd)
            if not is_ready and self.report.data:
                is_ready, deadline = True, time.monotonic() + timeout

    def _write(self) -> bool:
        """Send more of the request; True when all is sent, or nobody wants it."""
        stdin = self._process.stdin
        assert stdin
        try:
            self._unsent = self._unsent[os.write(stdin.fileno(), self._unsent[:_CHUNK_BYTES]) :]
        except BlockingIOError:
            return False
        except BrokenPipeError:
            self._unsent = self._unsent[:0]
        if self._unsent:
            return False
        # The selector must forget a descriptor before it is closed; a closed copy ends the input.
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, stdin.fileno())
        os.close(nothing)
        return True

    def _kill(self) -> None:
        """End the whole session's group; with a pid namespace that takes everything in it along."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            self._process.kill()
        self._process.wait()


def _read(descriptor: int, output: Output) -> bool:
    """Take one chunk; False at the end of the stream."""
    try:
        chunk = os.read(descriptor, _CHUNK_BYTES)
    except BlockingIOError:
        return True
    output.add(chunk)
    return bool(chunk)


def _drain(descriptor: int, output: Output) -> None:
    """What still lies in the pipe, without waiting for more."""
    while not output.is_truncated:
        try:
            chunk = os.read(descriptor, _CHUNK_BYTES)
        except BlockingIOError:
            return
        if not chunk:
            return
        output.add(chunk)


def is_full(folder: Path) -> bool:
    """Whether a program has left too much in its folder.

    Not with a private root: that one has its own limit, and is not seen from here.
    """
    num_bytes = num_entries = 0
    pending = [str(folder)]
    while pending:
        try:
            with os.scandir(pending.pop()) as entries:
                for entry in entries:
                    status = entry.stat(follow_symlinks=False)
                    num_bytes += status.st_blocks * 512
                    num_entries += 1
                    is_deep = len(entry.path) > _MAX_PATH_CHARS
                    if num_bytes > SCRATCH_BYTES or num_entries > SCRATCH_ENTRIES or is_deep:
                        return True
                    if stat.S_ISDIR(status.st_mode):
                        pending.append(entry.path)
        except PermissionError:
            return True  # a folder closed to us, so that nobody can count what is in there
        except OSError:
            continue  # removed between two looks
    return False


def remove(folder: Path) -> None:
    """Delete what a program left, however deep its folders are and whatever they allow.

    More than once if need be: a process that was killed may still be in its last system call.
    """
    for _ in range(_REMOVE_TRIES - 1):
        try:
            _remove(folder)
        except OSError:
            time.sleep(_TICK_SECONDS)
        else:
            return
    _remove(folder)


def _remove(folder: Path) -> None:
    """Go down and up by descriptors.

    A path to the depth may be longer than the kernel takes, and the nesting deeper than Python
    recurses.
    """
    here = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    names: list[str] = []
    try:
        while True:
            child = _first_folder(here)
            if child is None and not names:
                break
            if child is not None:
                os.chmod(child, 0o700, dir_fd=here)
                names.append(child)
            step = ".." if child is None else child
            there = os.open(step, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=here)
            os.close(here)
            here = there
            if child is None:
                os.rmdir(names.pop(), dir_fd=here)
    finally:
        os.close(here)
    folder.rmdir()


def _first_folder(descriptor: int) -> str | None:
    """A folder inside an open one; files on the way to it are deleted."""
    with os.scandir(descriptor) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                return entry.name
            os.unlink(entry.name, dir_fd=descriptor)
    return None
