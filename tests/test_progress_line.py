"""The console line of training: every field of it, as the real loop writes it."""

from __future__ import annotations

import logging
import re
import signal
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from nanochat import progress
from nanochat.hardware import Device
from nanochat.progress import duration
from nanochat.runtime import Runtime
from nanochat.stopping import StoppedError
from nanochat.tracking import read_metrics
from nanochat.train_state import TrainState
from nanochat.training import Hook, Trainer
from tests.tiny_run import ROWS, SIZES, make_trainer

LINE = re.compile(
    r"step (?P<step>\d+)/(?P<steps>\d+)"
    r"  loss (?P<loss>\d+\.\d{3})"
    r"(?:  useful questions (?P<useful>\d\.\d+))?"  # what a stage measures besides
    r"  lr x(?P<lr>\d+\.\d{2})"
    r"  (?P<speed>\d{1,3}(?:,\d{3})*) tok/s"
    r"(?:  mfu (?P<mfu>\d+\.\d)%)?"  # where the device's peak is known, which no CPU's is
    r"  eta (?P<eta>\d+ s|\d+ min|\d+\.\d h)"
    r"  epoch (?P<epoch>\d+\.\d{2})"
)
# A run of hours, of which some are over, so that the time left is a number to compare.
STEPS, STEPS_BEFORE, STEPS_SEEN = 500_000, 240_000, 24
TOKENS_PER_STEP = ROWS * SIZES.sequence_len


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "nanochat.progress")
    return caplog


def fields(lines: pytest.LogCaptureFixture) -> Mapping[str, str | None]:
    """Of the last line."""
    found = LINE.fullmatch(lines.messages[-1])
    assert found, lines.messages[-1]
    return found.groupdict()


def train_in_the_middle(folder: Path, runtime: Runtime) -> tuple[Trainer, float]:
    """A piece of a long run, and its speed at the last line according to its metrics."""

    def stop(trainer: Trainer) -> dict[str, float]:
        trainer.stop.received.append(signal.SIGTERM)
        return {}

    hooks = [Hook("stop", STEPS_BEFORE + STEPS_SEEN, stop)]
    trainer = make_trainer(folder, runtime, steps=STEPS, hooks=hooks, log_every=12)
    trainer.state = TrainState(step=STEPS_BEFORE, tokens=STEPS_BEFORE * TOKENS_PER_STEP)
    with pytest.raises(StoppedError):
        trainer.run()
    rows = read_metrics(folder / "run" / "metrics.jsonl")
    return trainer, [r["tokens_per_second"] for r in rows if "tokens_per_second" in r][-1]


def test_the_line_has_step_loss_learning_rate_and_epoch(
    runtime: Runtime, tmp_path: Path, lines: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(tmp_path, runtime, steps=24, log_every=4)
    next_step = trainer.loader.next_step

    def measured() -> object:
        batch = next_step()
        batch.measures = {"useful_questions": 0.25}
        return batch

    trainer.loader.next_step = measured  # type: ignore[method-assign, assignment]
    state = trainer.run()
    said = fields(lines)
    assert (said["step"], said["steps"]) == ("24", "24")
    assert said["loss"] == f"{state.smooth_loss:.3f}"
    assert said["useful"] == "0.25"
    assert said["lr"] == "0.08"  # the last of 12 steps of a fall to 0
    assert said["epoch"] == "0.24"
    assert len(lines.messages) == 7  # the first step, and every fourth


def test_before_the_run_is_warm_the_line_tells_no_speed(
    runtime: Runtime, tmp_path: Path, lines: pytest.LogCaptureFixture
) -> None:
    make_trainer(tmp_path, runtime, steps=24).run()
    assert re.fullmatch(r"step 1/24  loss 3\.9\d\d  lr x1\.00  epoch 0\.01", lines.messages[0])


def test_on_a_cpu_the_line_has_speed_and_time_left_but_no_utilisation(
    runtime: Runtime, tmp_path: Path, lines: pytest.LogCaptureFixture
) -> None:
    _, speed = train_in_the_middle(tmp_path, runtime)
    said = fields(lines)
    assert said["speed"] == f"{speed:,.0f}"
    steps_left = STEPS - STEPS_BEFORE - STEPS_SEEN
    assert said["eta"] == duration(steps_left * TOKENS_PER_STEP / speed)
    assert said["mfu"] is None


def test_where_the_peak_is_known_the_line_has_the_utilisation(
    runtime: Runtime,
    tmp_path: Path,
    lines: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    peak, utilisation = 2e10, progress.utilisation
    monkeypatch.setattr(
        progress, "utilisation", lambda _, *numbers: utilisation(torch.device("cuda"), *numbers)
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(
        progress, "find_device", {"a GPU": Device(peak, 1e9, "this test")}.__getitem__
    )
    trainer, speed = train_in_the_middle(tmp_path, runtime)
    said = fields(lines)
    assert said["mfu"] == f"{100 * speed * trainer.model.estimate_flops() / peak:.1f}"
    assert said["mfu"] != "0.0"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.4, "0 s"),
        (45, "45 s"),
        (119, "119 s"),
        (120, "2 min"),
        (38 * 60, "38 min"),
        (7140, "119 min"),
        (7200, "2.0 h"),
        (90 * 3600, "90.0 h"),
    ],
)
def test_a_duration_has_the_unit_that_suits_it(seconds: float, words: str) -> None:
    assert duration(seconds) == words
