"""The text plot of a run: found by name, drawn while it runs and after it has ended."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import psutil
import pytest

from nanochat.common import UserError
from nanochat.tracking import MetricWriter
from scripts import watch


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Fifty steps of a run of a hundred."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    folder = tmp_path / "base_checkpoints" / "d4"
    writer = MetricWriter(folder / "metrics.jsonl")
    writer.write(0, val_bpb=3.5)
    for step in range(1, 51):
        writer.write(step, loss=4.0 if step == 50 else 8.0 - step / 10)
    writer.write(50, val_bpb=1.5, tokens_per_second=8000.0)
    writer.close()
    (folder / "step_000040").mkdir()
    (folder / "step_000040" / "state.json").write_text(json.dumps({"num_iterations": 100}))
    return folder


def lock(run: Path, process: int, host: str) -> None:
    (run / ".lock").write_text(f"{process} on {host}\n")


def test_a_run_is_found_by_stage_by_tag_by_folder_and_by_time(run: Path) -> None:
    older = run.parents[1] / "mid_checkpoints" / "d2"
    MetricWriter(older / "metrics.jsonl").write(1, loss=1.0)
    os.utime(older / "metrics.jsonl", (1e9, 1e9))
    for name in ("", "base", "base/d4", str(run)):
        assert watch.find_run(name) == run
    assert watch.find_run("mid") == older
    with pytest.raises(UserError, match=r"no run 'base/d9' has metrics; there is base/d4, mid/d2"):
        watch.find_run("base/d9")


def test_the_picture_shows_the_numbers_and_fits(run: Path) -> None:
    picture = watch.draw(run, ["loss", "val_bpb"], is_running=True, width=80, height=30)
    lines = picture.splitlines()
    assert lines[0] == "base d4  step 50/100  loss 4  val_bpb 1.5  8,000 tok/s  running"
    assert "loss (smoothed)" in picture
    assert sum("val_bpb" in line for line in lines) == 2
    assert len(lines) <= 30
    assert max(len(line) for line in lines) <= 80
    assert "\x1b" not in picture
    assert len(set("".join(lines[2:14])) - set(" 0123456789.┌┐└┘─│┤┬")) >= 2  # points of a curve


def test_a_partial_core_is_told_under_its_name(run: Path) -> None:
    MetricWriter(run / "metrics.jsonl").write(50, core_partial=0.25)
    headline = watch.draw(run, ["loss"], is_running=True, width=80, height=30).splitlines()[0]
    assert "val_bpb 1.5  core_partial 0.25" in headline


def test_a_metric_that_is_not_there_is_named_with_those_that_are(run: Path) -> None:
    picture = watch.draw(run, ["loss", "core"], is_running=False, width=80, height=24)
    assert "no core yet; there is loss, tokens_per_second, val_bpb" in picture
    assert "not running" in picture


def test_a_metric_of_one_point_is_told_and_not_plotted(run: Path) -> None:
    picture = watch.draw(run, ["loss", "tokens_per_second"], is_running=False, width=80, height=24)
    assert "tokens_per_second 8000 at step 50" in picture
    assert picture.count("┌") == 1


def test_a_run_without_a_row_is_no_error(run: Path) -> None:
    (run / "metrics.jsonl").write_text("")
    assert "step 0" in watch.draw(run, ["loss"], is_running=True, width=80, height=24)


def test_one_row_and_a_tiny_terminal_are_enough(run: Path) -> None:
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": null}\n')
    assert "loss 3 at step 1" in watch.draw(run, ["loss"], is_running=True, width=1, height=1)


def test_a_run_is_running_while_its_process_is(run: Path) -> None:
    assert not watch.has_writer(run)
    lock(run, os.getpid(), socket.gethostname())
    assert watch.has_writer(run)
    lock(run, 2**22 + 1, socket.gethostname())  # above the largest process id of Linux
    assert not watch.has_writer(run)
    lock(run, os.getpid(), socket.gethostname())
    before = psutil.Process().create_time() - 60  # of a run that had this number before us
    os.utime(run / ".lock", (before, before))
    assert not watch.has_writer(run)
    lock(run, 1, "another-host")
    assert watch.has_writer(run)
    os.utime(run / "metrics.jsonl", (1e9, 1e9))
    assert not watch.has_writer(run)


def test_without_a_terminal_it_prints_once_and_ends(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lock(run, os.getpid(), socket.gethostname())
    assert watch.main(watch.Config(run="base")) == 0
    assert capsys.readouterr().out.count("base d4") == 1


def test_on_a_terminal_it_draws_again_until_the_run_has_ended(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = iter([True, True, False])
    monkeypatch.setattr(watch, "has_writer", lambda folder: next(answers))
    monkeypatch.setattr(watch.sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(watch.time, "sleep", lambda seconds: None)
    assert watch.main(watch.Config(run="base")) == 0
    assert capsys.readouterr().out.count("base d4") == 3
