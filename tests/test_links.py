"""The engine's side of the border: what happens to its memory when a step breaks."""

from __future__ import annotations

import gc
import queue
import weakref
from typing import Any

import pytest
import torch
from scripted_model import byte_tokenizer, scripted_model, tokens_of
from web_server import END, ScriptedScheduler, always

from nanochat.request import TokenEvent
from nanochat.sampling import SamplingSettings
from nanochat.scheduler import Scheduler
from nanochat.serving import links
from nanochat.serving.links import Command, Delivery, Failure, run_engine

SETTINGS = SamplingSettings(temperature=0.0, max_tokens=5)
SUBMIT: Command = ("submit", 1, tokens_of("Hey"), SETTINGS, 0)
STOP: Command = ("stop", 0, (), None, 0)


def run(make_scheduler: Any) -> list[Any]:
    """Ask once, break, ask again; what was delivered."""
    commands: queue.Queue[Command] = queue.Queue()
    commands.put(SUBMIT)
    delivered: list[Any] = []

    def deliver(delivery: Delivery) -> None:
        delivered.extend(item for _, item in delivery)
        for item in delivered[-len(delivery) :]:
            if isinstance(item, Failure):
                commands.put(SUBMIT)
            elif item.finish is not None:
                commands.put(STOP)

    run_engine(make_scheduler, commands, deliver)
    return delivered


def test_the_broken_scheduler_is_gone_when_the_new_one_counts_free_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: events.append("cache emptied"))
    troubles = iter([RuntimeError("out of memory")])

    def pace() -> None:
        if (trouble := next(troubles, None)) is not None:
            raise trouble

    def make_scheduler() -> Any:
        events.append("made")
        scheduler: Any = ScriptedScheduler(always("Hey"), pace=pace)
        scheduler.itself = scheduler  # as what only a collection frees
        weakref.finalize(scheduler, events.append, "gone")
        return scheduler

    delivered = run(make_scheduler)
    assert isinstance(delivered[0], Failure)
    assert "".join(token.text for token in delivered[1:]) == "Hey"
    assert events[:4] == ["made", "gone", "cache emptied", "made"]


class Breaking(Scheduler):
    """Its first step breaks when the decoder has its cache."""

    def step(self) -> list[TokenEvent]:
        super().step()
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_the_memory_of_a_real_decoder_is_given_back() -> None:
    model = scripted_model(tokens_of("y", "!", END))
    alive: list[weakref.ref[Any]] = []

    def make_scheduler() -> Scheduler:
        assert [ref() for ref in alive] == [None] * len(alive)
        scheduler = (Scheduler if alive else Breaking)(model, byte_tokenizer())
        links.spare_the_collector()  # an engine's process does so with its first decoder
        alive.extend([weakref.ref(scheduler), weakref.ref(scheduler.decoder)])
        return scheduler

    try:
        delivered = run(make_scheduler)
    finally:
        gc.unfreeze()
    assert isinstance(delivered[0], Failure)
    assert "".join(token.text for token in delivered[1:]) == "!"
    assert len(alive) == 4


def test_the_code_of_a_process_that_another_thread_reaps_is_waited_for() -> None:
    codes = iter([None, None, -9, -9])

    class ReapedElsewhere:
        exitcode = property(lambda self: next(codes))

        def join(self) -> None:
            """Its end is known, its code is not yet."""

    assert links._exit_code(ReapedElsewhere()) == -9  # type: ignore[arg-type]
