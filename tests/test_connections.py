"""As many connections as the engines take on requests, and some more."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
from fastapi import FastAPI
from web_server import ScriptedScheduler, always, service_of

from nanochat import server
from nanochat.serving.pool import Pool
from nanochat.serving.service import Service


def hey(*, max_waiting: int = 256) -> Service:
    return service_of(lambda: ScriptedScheduler(always("Hey")), max_waiting=max_waiting)


def test_engines_are_full_before_connections_are_turned_away() -> None:
    small, large = hey(), hey(max_waiting=5000)
    pool = Pool([*small.pool.workers, *hey().pool.workers, *large.pool.workers])
    assert pool.capacity == 64 + 256 + 64 + 256 + 64 + 5000
    settings = server.settings_of(FastAPI(), server.max_connections(pool))
    assert settings.limit_concurrency is not None
    assert settings.limit_concurrency > pool.capacity
    assert server.max_connections(small.pool) == 512  # as the documents say


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], list[tuple[int, int]]]:
    """Pretends that the system's limits on open files are these; returns what is asked of it."""
    resource = pytest.importorskip("resource")

    def pretend(soft: int, hard: int) -> list[tuple[int, int]]:
        asked: list[tuple[int, int]] = []
        monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
        monkeypatch.setattr(resource, "setrlimit", lambda _, both: asked.append(both))
        return asked

    return pretend


@pytest.mark.skipif(sys.platform == "win32", reason="has no limit on open files")
@pytest.mark.parametrize(
    ("soft", "hard", "asked", "allowed"),
    [
        (4096, 4096, [], 1000),
        (-1, -1, [], 1000),
        (256, 4096, [(1128, 4096)], 1000),
        (256, -1, [(1128, -1)], 1000),
        (256, 628, [(628, 628)], 500),
    ],
)
def test_open_files_are_asked_for_and_what_is_missing_is_said(
    limits: Callable[[int, int], list[tuple[int, int]]],
    caplog: pytest.LogCaptureFixture,
    soft: int,
    hard: int,
    asked: list[tuple[int, int]],
    allowed: int,
) -> None:
    told = limits(soft, hard)
    assert server.allow_connections(1000) == allowed
    assert told == asked
    assert ("at most 500 connections are kept, not 1000" in caplog.text) == (allowed == 500)
