"""A model at work away from the event loop: one thread or process owns a Scheduler.

    event loop --commands--> run_engine (thread, or main thread of a process) --tokens--> event loop

Commands are small tuples; tokens come back in one delivery a step, for all requests together.
Nothing but this file crosses the border, so what is on either side needs no locks.
"""

from __future__ import annotations

import atexit
import gc
import json
import logging
import multiprocessing
import queue
import signal
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Literal, NamedTuple, Protocol

import torch

from nanochat.common import UserError, setup_logging
from nanochat.request import Request, TokenEvent
from nanochat.runtime import spare_the_collector
from nanochat.sampling import SamplingSettings
from nanochat.scheduler import QueueFullError, Scheduler

logger = logging.getLogger(__name__)

SPAWN = multiprocessing.get_context("spawn")
# A process that has not loaded its model by then (a cold network file system) never will.
START_SECONDS = 600.0
# The first word of an engine's process.
_READY, _REFUSED = "ready", "refused: "


class Token(NamedTuple):
    """One token of an answer, as the scheduler tells it (see `TokenEvent`)."""

    id: int
    text: str = ""
    is_forced: bool = False
    logprob: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()
    finish: Literal["stop", "length"] | None = None

    @classmethod
    def of(cls, event: TokenEvent) -> Token:
        """Take what the other side needs out of a scheduler's event."""
        return cls(
            event.token,
            event.text,
            event.is_forced,
            event.logprob,
            event.alternatives,
            event.finish,
        )


class Failure(NamedTuple):
    """Why a request has no answer, or no more of it."""

    kind: Literal["refused", "full", "broken"]
    message: str


# What to do, the request's number, its prompt, its settings, which sample of their seed.
Command = tuple[
    Literal["submit", "cancel", "stop"], int, Sequence[int], SamplingSettings | None, int
]
_STOP: Command = ("stop", 0, (), None, 0)
Delivery = list[tuple[int, Token | Failure]]


# ---- the side of the model ---------------------------------------------------------------------


def run_engine(
    make_scheduler: Callable[[], Scheduler],
    commands: queue.Queue[Command],
    deliver: Callable[[Delivery], None],
) -> None:
    """Obey commands and step the scheduler until the command "stop".

    A request that the scheduler refuses, and all requests when a step breaks, get a Failure; then
    a new scheduler goes on, so that one bad request, or a full memory, does not end the service.
    """
    scheduler = make_scheduler()
    numbers: dict[Request, int] = {}
    requests: dict[int, Request] = {}
    while True:
        while not commands.empty() or scheduler.is_idle:
            action, number, prompt, settings, sample = commands.get()
            if action == "stop":
                return
            if action == "cancel":
                if (request := requests.pop(number, None)) is not None:
                    del numbers[request]
                    scheduler.cancel(request)
                continue
            assert settings is not None
            try:
                requests[number] = request = scheduler.submit(prompt, settings, sample=sample)
                numbers[request] = number
            except UserError as error:
                is_full = isinstance(error, QueueFullError)
                deliver([(number, Failure("full" if is_full else "refused", str(error)))])
        events: list[TokenEvent] | None = None
        try:
            events = scheduler.step()
        except Exception as error:  # these requests end with a reason, later ones are served
            logger.exception("a step of the engine failed; its %d requests end", len(requests))
            # Whoever keeps the error would keep all that its frames hold.
            traceback.clear_frames(error.__traceback__)
        if events is None:
            broken = Failure("broken", "the engine failed while it answered; try again")
            deliver([(number, broken) for number in requests])
            numbers.clear()
            requests.clear()
            # A new one takes half of the free memory, to which the old one's cache must belong.
            del scheduler
            _free_memory()
            scheduler = make_scheduler()
            continue
        deliver([(numbers[event.request], Token.of(event)) for event in events])
        for event in events:
            if event.finish is not None:
                del requests[numbers.pop(event.request)]


def _free_memory() -> None:
    """Let nothing of what is no longer used count as used."""
    gc.collect()
    torch.cuda.empty_cache()  # does nothing in a process that uses no GPU


# ---- the side of the event loop ----------------------------------------------------------------


class Link(Protocol):
    """A way to an engine: a thread of this process, or a process of its own."""

    def start(self, deliver: Callable[[Delivery], None], lost: Callable[[str], None]) -> None:
        """Begin, or begin again after a loss; blocks until the model is there.

        `deliver` and `lost` (the engine has died; how) may be called from any thread. UserError
        when the engine cannot start.
        """

    def send(self, command: Command) -> None:
        """Hand over a command; never blocks. One that a dead engine does not get is dropped."""

    def stop(self) -> None:
        """End the engine, whatever it is doing, and wait for it."""


class Recipe(Protocol):
    """How to load a model."""

    def load(self) -> Callable[[], Scheduler]:
        """Load it; the result makes schedulers that share it. UserError when it cannot be."""

    def settle(self) -> None:
        """Find the process its place beside the server's, once the model is loaded."""


class ThreadLink:
    """The engine in a thread of this process, for a scheduler that is made elsewhere."""

    def __init__(self, make_scheduler: Callable[[], Scheduler]) -> None:
        self._make_scheduler = make_scheduler
        self._commands: queue.Queue[Command] = queue.Queue()
        self._thread: threading.Thread | None = None

    def start(self, deliver: Callable[[Delivery], None], lost: Callable[[str], None]) -> None:
        """Start the thread."""
        commands = self._commands = queue.Queue()

        def work() -> None:
            try:
                run_engine(self._make_scheduler, commands, deliver)
            except BaseException as error:
                logger.exception("the engine ended")
                lost(type(error).__name__)

        self._thread = threading.Thread(target=work, name="engine", daemon=True)
        self._thread.start()

    def send(self, command: Command) -> None:
        """Queue a command for the next step."""
        self._commands.put(command)

    def stop(self) -> None:
        """End the thread after its step."""
        self.send(_STOP)
        if self._thread is not None:
            self._thread.join()


class ProcessLink:
    """The engine in a process of its own.

    A step of the model never holds up the event loop then, and the server outlives an engine that
    is killed, by the system for its memory, say. The process begins to load at once; `wait`, or
    `start`, waits until it has its model. recipe: picklable; its `load` is called in the process.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._outgoing: queue.Queue[Command] = queue.Queue()
        self._is_ready = False
        self._spawn()

    def _spawn(self) -> None:
        ours, theirs = SPAWN.Pipe()
        process = SPAWN.Process(
            target=_engine_process, args=(self._recipe, theirs), name="engine", daemon=True
        )
        try:
            process.start()
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()  # so that the end of the process is the end of the pipe
        # Before `multiprocessing` sends SIGTERM at the exit and waits: engines do not heed it.
        atexit.register(process.kill)
        self._ours, self._process = ours, process

    def wait(self) -> None:
        """Wait until the process has its model. UserError when it never gets it."""
        if self._is_ready:
            return
        try:
            is_there = self._ours.poll(START_SECONDS)
            word = self._ours.recv_bytes().decode() if is_there else "it is too late"
        except (EOFError, OSError):
            word = f"it ended {_ending(_exit_code(self._process))}"
        if word != _READY:
            self._end()
            if word.startswith(_REFUSED):
                raise UserError(word.removeprefix(_REFUSED))
            raise UserError(f"an engine process did not start: {word}; see the log above")
        self._is_ready = True

    def start(self, deliver: Callable[[Delivery], None], lost: Callable[[str], None]) -> None:
        """Wait until the process has its model, then listen. Starts another if it has ended.

        One that had its model and ended before this call is lost as any other: it is told so.
        """
        if self._process.exitcode is not None and not self._is_ready:
            self._end()
            self._spawn()
        self.wait()
        process, pipe = self._process, self._ours
        outgoing = self._outgoing = queue.Queue()

        def listen() -> None:
            try:
                while True:
                    deliver(_unpacked(pipe.recv_bytes()))
            except (EOFError, OSError):
                outgoing.put(_STOP)
                ending = _ending(_exit_code(process))
                self._is_ready = False
                lost(ending)

        def talk() -> None:
            while True:
                command = outgoing.get()
                try:
                    pipe.send_bytes(_packed_command(command))
                except OSError:  # its end was noticed by `listen`
                    return
                if command[0] == "stop":
                    return

        for work in (listen, talk):
            threading.Thread(target=work, name="engine link", daemon=True).start()

    def send(self, command: Command) -> None:
        """Queue a command; a thread of its own writes it, as a pipe may be full."""
        self._outgoing.put(command)

    def stop(self) -> None:
        """Ask the process to end; kill it when it does not."""
        self.send(_STOP)
        self._process.join(5.0 if self._is_ready else 0.0)
        self._end()
        self._ours.close()

    def _end(self) -> None:
        """Kill the process, unless it has ended."""
        self._process.kill()
        self._process.join()
        atexit.unregister(self._process.kill)


def _exit_code(process: BaseProcess) -> int | None:
    """Wait for the end of a process of ours.

    Whoever starts a process has `multiprocessing` look after all that have ended. When it takes
    this one's code from the system at the same time, `join` ends a moment before the code is known.
    """
    process.join()
    for _ in range(100):
        if process.exitcode is not None:
            break
        time.sleep(0.01)
    return process.exitcode


def _ending(exitcode: int | None) -> str:
    """How a process has ended, in words."""
    if exitcode is not None and exitcode < 0:
        return f"by {signal.Signals(-exitcode).name}"
    return f"with exit code {exitcode}"


def _engine_process(recipe: Recipe, pipe: Connection) -> None:
    """What the process of a `ProcessLink` runs."""
    # Ctrl-C goes to the whole group; the server decides when its engines end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    setup_logging()
    commands: queue.Queue[Command] = queue.Queue()
    try:
        make_scheduler = recipe.load()
    except UserError as error:
        pipe.send_bytes(f"{_REFUSED}{error}".encode())
        return

    def listen() -> None:
        try:
            while True:
                commands.put(_unpacked_command(pipe.recv_bytes()))
        except (EOFError, OSError):
            commands.put(_STOP)

    recipe.settle()
    spare_the_collector()
    threading.Thread(target=listen, daemon=True).start()
    # So does the SIGTERM of a job's end. The server lets the answers in the making come to theirs;
    # before there can be any, an engine that still loads is better ended.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        pipe.send_bytes(_READY.encode())
        run_engine(make_scheduler, commands, lambda items: pipe.send_bytes(_packed(items)))
    except OSError:
        logger.error("the server has gone; this engine ends")


def _packed_command(command: Command) -> bytes:
    action, number, prompt, settings, sample = command
    values = None if settings is None else asdict(settings)
    return json.dumps([action, number, list(prompt), values, sample]).encode()


def _unpacked_command(data: bytes) -> Command:
    action, number, prompt, values, sample = json.loads(data)
    settings = None
    if values is not None:
        settings = SamplingSettings(**{**values, "stop": tuple(values["stop"])})
    return action, number, prompt, settings, sample


def _packed(delivery: Delivery) -> bytes:
    return json.dumps(
        [[number, isinstance(item, Failure), item] for number, item in delivery]
    ).encode()


def _unpacked(data: bytes) -> Delivery:
    delivery: Delivery = []
    for number, is_failure, values in json.loads(data):
        if is_failure:
            delivery.append((number, Failure(*values)))
        else:
            token = Token(*values)
            pairs = tuple((int(i), float(p)) for i, p in token.alternatives)
            delivery.append((number, token._replace(alternatives=pairs)))
    return delivery
