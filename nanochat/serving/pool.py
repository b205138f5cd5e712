"""Several engines behind one port: each request goes to the one with the fewest."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from nanochat.sampling import SamplingSettings
from nanochat.serving.links import Failure
from nanochat.serving.worker import Answer, AnswerError, Worker


class Pool:
    """Workers that hold the same model."""

    def __init__(self, workers: Sequence[Worker]) -> None:
        self.workers = tuple(workers)
        self.hopeless: Callable[[], None] = lambda: None
        """Called when no engine is left that could answer, now or later."""
        for worker in self.workers:
            worker.given_up = self._given_up

    def start(self) -> None:
        """Start all engines. Must run on the event loop."""
        for worker in self.workers:
            worker.start()

    def stop(self) -> None:
        """End all engines."""
        for worker in self.workers:
            worker.stop()

    @property
    def is_hopeless(self) -> bool:
        """Whether every engine has died too often."""
        return all(worker.is_given_up for worker in self.workers)

    def _given_up(self) -> None:
        if self.is_hopeless:
            self.hopeless()

    @property
    def capacity(self) -> int:
        """Requests that may be answered, or wait, at once."""
        return sum(worker.max_rows + worker.max_waiting for worker in self.workers)

    @property
    def num_alive(self) -> int:
        """Workers whose engine runs."""
        return sum(worker.is_alive for worker in self.workers)

    @property
    def num_free(self) -> int:
        """Workers that would answer at once."""
        return sum(worker.is_free for worker in self.workers)

    def open(
        self, prompt: Sequence[int], settings: SamplingSettings, num_samples: int
    ) -> list[Answer]:
        """Ask one worker for several answers, which thus share the prompt.

        QueueFullError when it cannot take all; AnswerError when no engine is alive.
        """
        alive = [worker for worker in self.workers if worker.is_alive]
        if not alive:
            raise AnswerError(
                Failure("broken", "the engine is being started again; try again soon")
            )
        worker = min(alive, key=lambda worker: worker.num_open)
        answers: list[Answer] = []
        try:
            for sample in range(num_samples):
                answers.append(worker.open(prompt, settings, sample))
        except BaseException:
            for answer in answers:
                answer.close()
            raise
        return answers
