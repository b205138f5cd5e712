"""Training stages under every violence a cluster can do to them: the result is the undisturbed one.

Each attempt is a process of its own that runs the real command; signals reach it at random places:
while it starts, resumes, trains, evaluates, or writes a checkpoint.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from nanochat.stopping import EXIT_STOPPED
from nanochat.tracking import read_metrics
from tests import small_disks
from tests.stage_processes import (
    BASE,
    MID,
    RL,
    SFT,
    Stage,
    copy_of,
    finish,
    log_of,
    outcome,
    prepare,
    run,
    run_dir,
    start,
)

pytestmark = pytest.mark.slow

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1)
STAGES = (BASE, MID, SFT, RL)
BLOWS_A_STAGE = 10
STEPS = 40


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base folder with text and tokenizer, and no model."""
    base = tmp_path_factory.mktemp("torture") / "prepared"
    prepare(base)
    return base


@pytest.fixture(scope="module")
def undisturbed(prepared: Path) -> tuple[Path, dict[Stage, float]]:
    """A base folder in which every stage has run in peace, and the seconds each took."""
    base = copy_of(prepared, prepared.with_name("undisturbed"))
    seconds = {}
    for stage in STAGES:
        started = time.monotonic()
        run(base, stage.module, *stage.flags)
        seconds[stage] = time.monotonic() - started
    return base, seconds


def lines(path: Path) -> int:
    try:
        return path.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def strike(process: BaseProcess, metrics: Path, rng: random.Random, seconds: float) -> int | None:
    """Send a signal somewhere in the first few steps; the exit code, None if it came too late."""
    rows, blow = rng.randrange(4), rng.choice(SIGNALS)
    # Somewhere in the start, or in a step, with its evaluation and its save.
    delay = rng.random() * (seconds / 4 if rows == 0 else 2 * seconds / STEPS)
    began = lines(metrics)
    while process.is_alive() and lines(metrics) < began + 3 * rows:  # about three rows a step
        time.sleep(0.002)
    time.sleep(delay)
    was_alive = process.is_alive()
    if was_alive:
        assert process.pid is not None
        os.kill(process.pid, blow)
    process.join(120)
    assert was_alive or process.exitcode == 0
    return process.exitcode if was_alive else None


def test_forty_signals_change_nothing(
    undisturbed: tuple[Path, dict[Stage, float]], prepared: Path
) -> None:
    peaceful, seconds = undisturbed
    base = copy_of(prepared, prepared.with_name("tormented"))
    rng = random.Random(20261121)
    codes: list[int | None] = []
    for stage in STAGES:
        blows = 0
        metrics = run_dir(base, stage) / "metrics.jsonl"
        while blows < BLOWS_A_STAGE:
            process = start(base, stage.module, *stage.flags, "--resume")
            code = strike(process, metrics, rng, seconds[stage])
            # Killed; or stopped with everything saved; or by a signal before there was a run.
            assert code in (None, 0, EXIT_STOPPED, -9, -15, -10), log_of(base).read_text()[-3000:]
            codes.append(code)
            blows += code is not None
            if code in (None, 0):  # it has arrived (on a busy machine blows come late): once more
                shutil.rmtree(run_dir(base, stage))
            assert len(codes) < 120, "nearly all blows came too late"
        run(base, stage.module, *stage.flags, "--resume")
    for stage in STAGES:
        assert outcome(base, stage) == outcome(peaceful, stage)
    assert len([code for code in codes if code is not None]) == len(STAGES) * BLOWS_A_STAGE
    assert codes.count(-9) >= 5
    assert codes.count(EXIT_STOPPED) >= 5
    said = log_of(base).read_text()
    assert said.count("resumed from step") >= 10
    assert "Traceback" not in said


def test_answers_of_the_undisturbed_run_earn_different_rewards(
    undisturbed: tuple[Path, dict[Stage, float]],
) -> None:
    """Else nothing would be learned in reinforcement, and the test above would prove little."""
    base, _ = undisturbed
    rows = read_metrics(run_dir(base, RL) / "metrics.jsonl")
    rewards = {row["reward"] for row in rows if "reward" in row}
    useful = [row["useful_questions"] for row in rows if "useful_questions" in row]
    assert len(rewards) > 3
    assert len(useful) == STEPS
    assert sum(share > 0 for share in useful) > STEPS / 2


def test_a_flipped_byte_costs_one_step(undisturbed: tuple[Path, object], prepared: Path) -> None:
    """Found by its hash, said, and the checkpoint before used; a leftover is removed."""
    peaceful, _ = undisturbed
    base = copy_of(prepared, prepared.with_name("flipped"))
    process = start(base, BASE.module, *BASE.flags)
    folder = run_dir(base, BASE)
    while process.is_alive() and len(list(folder.glob("step_*"))) < 2:
        time.sleep(0.002)
    process.kill()
    process.join(60)
    before, damaged = sorted(folder.glob("step_*"))[-2:]
    weights = bytearray((damaged / "model.safetensors").read_bytes())
    weights[-7] ^= 16
    (damaged / "model.safetensors").write_bytes(weights)
    shutil.copytree(before, folder / "tmp.step_000039")
    said = run(base, BASE.module, *BASE.flags, "--resume")
    assert f"{damaged} is damaged: model.safetensors has another SHA-256; using step " in said
    assert "tmp.step_000039, left behind by an interrupted save" in said
    assert outcome(base, BASE) == outcome(peaceful, BASE)
    assert not list(folder.glob("tmp.*"))


def test_a_second_process_on_one_run_refuses(prepared: Path) -> None:
    base = copy_of(prepared, prepared.with_name("twice"))
    first = start(base, BASE.module, *BASE.flags)
    while first.is_alive() and not (run_dir(base, BASE) / "metrics.jsonl").exists():
        time.sleep(0.002)
    assert first.pid is not None
    os.kill(first.pid, signal.SIGSTOP)  # so that it cannot end before the other has looked
    try:
        said = run(base, BASE.module, *BASE.flags, "--resume", code=1)
    finally:
        os.kill(first.pid, signal.SIGCONT)
    assert f"is in use by process {first.pid} on" in said
    finish(first, base)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with small_disks.small_disk(tmp_path / "small", "24m") as folder:
        yield folder


def test_a_disk_that_fills_ends_the_run_and_with_room_it_goes_on(
    undisturbed: tuple[Path, object], prepared: Path, small_disk: Path
) -> None:
    peaceful, _ = undisturbed
    base = copy_of(prepared, small_disk / "base")
    process = start(base, BASE.module, *BASE.flags)
    folder = run_dir(base, BASE)
    while process.is_alive() and not list(folder.glob("step_*")):
        time.sleep(0.002)
    filler = small_disk / "filler"
    with filler.open("wb") as file:
        file.truncate(0)
        try:
            while True:
                file.write(bytes(1 << 16))
                file.flush()
        except OSError:
            pass
    said = finish(process, base, code=1)
    last = said.strip().splitlines()[-1]
    assert "no space to save step" in last or "No space left on device" in last
    assert list(folder.glob("step_*"))
    filler.unlink()
    run(base, BASE.module, *BASE.flags, "--resume")
    assert outcome(base, BASE) == outcome(peaceful, BASE)
