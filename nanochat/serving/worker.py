"""An engine as the event loop sees it, and the answers it is asked for."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence

from nanochat.sampling import SamplingSettings
from nanochat.scheduler import QueueFullError
from nanochat.serving.links import Delivery, Failure, Link, Token

logger = logging.getLogger(__name__)

# Each event costs the server and its client about as much as a row of a step: with many streams,
# tokens travel together, so that all streams of an engine have 500 events a second between them.
SECONDS_PER_STREAM = 0.002
# An engine that has died so often within so long would only die again.
MAX_DEATHS, DEATHS_SECONDS = 3, 300
# Before each new try to load a model. What was short, memory or processes, may be there by then.
LOAD_PAUSES = (1.0, 5.0, 25.0)


class AnswerError(Exception):
    """A request ended without (the rest of) its answer. `failure` says why."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


class Answer:
    """An answer as it grows. Iterate over it for lists of the tokens that came meanwhile."""

    def __init__(self, worker: Worker, number: int) -> None:
        self.worker, self.number = worker, number
        self.is_open = True
        self._arrived: list[Token] = []
        self._failure: Failure | None = None
        self._news = asyncio.Event()
        self._told = float("-inf")  # when tokens were last handed on, by the loop's clock

    def take(self, item: Token | Failure) -> None:
        """Called by the worker, on the event loop."""
        if isinstance(item, Failure):
            self._failure = item
            self.is_open = False
        else:
            self._arrived.append(item)
            self.is_open = item.finish is None
        self._news.set()

    def __aiter__(self) -> Answer:
        return self

    async def __anext__(self) -> list[Token]:
        """Wait for at least one token. AnswerError when the engine gave up."""
        while not self._arrived:
            if self._failure is not None:
                raise AnswerError(self._failure)
            if not self.is_open:
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        clock = asyncio.get_running_loop().time
        pause = self._told + SECONDS_PER_STREAM * self.worker.num_open - clock()
        if pause > 0 and self.is_open:
            await asyncio.sleep(pause)
        self._told = clock()
        arrived, self._arrived = self._arrived, []
        return arrived

    @property
    def has_news(self) -> bool:
        """Whether the next `__anext__` has something to tell already."""
        return bool(self._arrived) or self._failure is not None

    def close(self) -> None:
        """Give the slot back if the answer is not finished. May be called twice."""
        if self.is_open:
            self.is_open = False
            self.worker.cancel(self)


class Worker:
    """An engine as the event loop sees it. All methods belong to the loop's thread.

    An engine that dies is started again, unless it dies too often, or cannot be started:
    `is_given_up` then.
    """

    def __init__(self, link: Link, *, gpu_id: int, device: str, max_rows: int, max_waiting: int):
        self.gpu_id, self.device = gpu_id, device
        self.max_rows, self.max_waiting = max_rows, max_waiting
        self.is_alive = False
        self.is_given_up = False
        self.given_up: Callable[[], None] = lambda: None
        """Called when the engine is not started again."""
        self.num_answered = 0
        self.num_tokens = 0
        self.num_deaths = 0
        self._link = link
        self._is_stopped = False
        self._deaths: deque[float] = deque(maxlen=MAX_DEATHS)
        self._revival: asyncio.Future[None] | None = None
        self._numbers = itertools.count()
        self._answers: dict[int, Answer] = {}

    def start(self) -> None:
        """Start the engine. Must run on the event loop; blocks until it has its model."""
        self._link.start(*self._callbacks())
        self.is_alive = True

    def _callbacks(self) -> tuple[Callable[[Delivery], None], Callable[[str], None]]:
        """What the engine's threads call; both only leave a note for the event loop."""
        loop = asyncio.get_running_loop()

        def deliver(delivery: Delivery) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._deliver, delivery)

        def lost(how: str) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._lost, how)

        return deliver, lost

    def stop(self) -> None:
        """End the engine; what is open is cut off."""
        self._is_stopped = True
        self.is_alive = False
        self._link.stop()

    @property
    def num_open(self) -> int:
        """Requests that are being answered or wait."""
        return len(self._answers)

    @property
    def is_free(self) -> bool:
        """Whether a request would be answered without waiting for another to end."""
        return self.is_alive and self.num_open < self.max_rows

    def open(self, prompt: Sequence[int], settings: SamplingSettings, sample: int = 0) -> Answer:
        """Ask for an answer, one of several with one seed. QueueFullError when too many wait."""
        if self.num_open >= self.max_rows + self.max_waiting:
            raise QueueFullError(
                f"{self.max_rows} answers are being written and {self.max_waiting} requests "
                "wait; try again later"
            )
        number = next(self._numbers)
        answer = Answer(self, number)
        self._answers[number] = answer
        self._link.send(("submit", number, prompt, settings, sample))
        return answer

    def cancel(self, answer: Answer) -> None:
        """Free the answer's slot before the next step."""
        if self._answers.pop(answer.number, None) is not None:
            self._link.send(("cancel", answer.number, (), None, 0))

    def _deliver(self, delivery: Delivery) -> None:
        for number, item in delivery:
            answer = self._answers.get(number)
            if answer is None:  # cancelled while the step ran
                continue
            answer.take(item)
            self.num_tokens += isinstance(item, Token)
            if not answer.is_open:
                self.num_answered += 1
                del self._answers[number]

    def _lost(self, how: str) -> None:
        """End what was open, and start the engine again if that has a point."""
        if self._is_stopped:
            return
        self.is_alive = False
        self.num_deaths += 1
        failure = Failure("broken", "the engine has died while it answered; try again")
        for answer in self._answers.values():
            answer.take(failure)
        self._answers.clear()
        now = time.monotonic()
        self._deaths.append(now)
        if len(self._deaths) == MAX_DEATHS and now - self._deaths[0] < DEATHS_SECONDS:
            logger.error(
                "the engine on %s has died (%s) for the %dth time within %d seconds; it is not "
                "started again",
                *(self.device, how, MAX_DEATHS, DEATHS_SECONDS),
            )
            self._give_up()
            return
        logger.error("the engine on %s has died (%s); it is started again", self.device, how)
        self._revival = asyncio.ensure_future(self._revive())

    def _give_up(self) -> None:
        self.is_given_up = True
        self.given_up()

    async def _revive(self) -> None:
        began, num_deaths = time.monotonic(), self.num_deaths
        for pause in (*LOAD_PAUSES, None):
            try:
                # In a thread, as it takes seconds; requests are refused with 503 meanwhile.
                await asyncio.to_thread(self._link.start, *self._callbacks())
                break
            except Exception as error:  # no memory, no process, no checkpoint: all may pass
                if pause is None:
                    logger.error(
                        "the engine on %s could not be started %d times (%s: %s); it is not "
                        "started again",
                        *(self.device, len(LOAD_PAUSES) + 1, type(error).__name__, error),
                    )
                    self._give_up()
                    return
                logger.error(
                    "the engine on %s could not be started (%s: %s); next try in %g seconds",
                    *(self.device, type(error).__name__, error, pause),
                )
                await asyncio.sleep(pause)
            if self._is_stopped:
                return
        # One that has died already is being started again by another revival.
        if not self._is_stopped and self.num_deaths == num_deaths:
            self.is_alive = True
            seconds = time.monotonic() - began
            logger.warning("the engine on %s is back after %.1f seconds", self.device, seconds)
