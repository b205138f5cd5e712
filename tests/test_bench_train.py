"""What the training benchmark steers and tells with: its clock, its table, its variants."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scripted_model import byte_tokenizer

from benchmarks import ablate, bench_train
from benchmarks.bench_train import ENDLESS, Clock
from nanochat import configurator
from nanochat.common import UserError
from nanochat.schedule import Schedule
from scripts import base_train


def test_schedules_follow_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 2 seconds in a budget of 40: the multiplier falls as if 20 had been planned."""
    ticks = itertools.count(0.0, 2.0)
    monkeypatch.setattr(bench_train.time, "perf_counter", lambda: next(ticks))
    clock, multipliers = Clock(40.0, 0), []
    assert clock.horizon == ENDLESS
    while not clock.is_over:
        now = Schedule(num_iterations=clock.horizon, warmdown_ratio=0.5)
        multipliers.append(now.multiplier(clock.step))
        clock.time(lambda: None)
    planned = Schedule(num_iterations=20, warmdown_ratio=0.5)
    assert (clock.step, clock.seconds) == (20, 40.0)
    assert multipliers == [planned.multiplier(step) for step in range(20)]


def test_a_slower_half_means_fewer_steps_and_still_a_whole_warmdown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr(bench_train.time, "perf_counter", lambda: now)
    clock, multipliers = Clock(40.0, 0), []

    def step() -> None:
        nonlocal now
        now += 1.0 if clock.seconds < 20 else 2.0

    while not clock.is_over:
        multipliers.append(Schedule(clock.horizon, warmdown_ratio=1.0).multiplier(clock.step))
        clock.time(step)
    assert clock.step == 30
    assert multipliers[20] == pytest.approx(0.5)
    assert multipliers[-1] == pytest.approx(2 / 40, abs=0.02)


def test_given_steps_leave_the_clock_out() -> None:
    clock = Clock(1e9, 3)
    while not clock.is_over:
        assert clock.horizon == 3
        clock.time(lambda: None)
    assert clock.step == 3


def test_the_peer_sees_each_row_once() -> None:
    rows = np.arange(2 * bench_train.ROWS * 3).reshape(-1, 3)
    batch = bench_train._packed(rows)
    inputs, targets = batch(1)
    assert inputs[0].tolist() == [48, 49]
    assert torch.equal(targets, inputs + 1)
    with pytest.raises(UserError, match="the peer has seen all rows of 2 steps; raise PEER_STEPS"):
        batch(2)


def test_more_steps_than_the_peer_has_rows_for_are_refused_at_once(tmp_path: Path) -> None:
    steps = f"--steps={bench_train.PEER_STEPS + 1}"
    flags = ["--data=nowhere", "--peer=nowhere", f"--work={tmp_path / 'work'}", steps]
    with pytest.raises(UserError, match="--steps is 1201, and the peer has rows for 1200; raise"):
        bench_train.main(configurator.parse(bench_train.Config, flags))
    assert not (tmp_path / "work").exists()


def test_rows_are_laid_out_again_where_there_are_too_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_train, "ROWS", 2)
    monkeypatch.setattr(bench_train, "LENGTH", 16)
    monkeypatch.setattr(bench_train, "_run", lambda *arguments: byte_tokenizer().save(tokenizer))
    tokenizer, data = tmp_path / "base/tokenizer", tmp_path / "data"
    target = "train_rows_best-fit.npy"
    data.mkdir()
    for number in range(2):
        texts = [f"Document {number} {i} tells of birds and trees. " for i in range(9)]
        pq.write_table(pa.table({"text": texts}), data / f"shard_{number:05d}.parquet")
    config = bench_train.Config(data=str(data))
    monkeypatch.setattr(bench_train, "PEER_STEPS", 3)
    bench_train.prepare(config, tmp_path)
    few = np.load(tmp_path / target)
    monkeypatch.setattr(bench_train, "PEER_STEPS", 5)
    bench_train.prepare(config, tmp_path)
    more = np.load(tmp_path / target)
    assert (few.shape, more.shape) == ((6, 17), (10, 17))
    assert np.array_equal(more[:6], few)
    monkeypatch.setattr(bench_train, "PEER_STEPS", 4)
    bench_train.prepare(config, tmp_path)
    assert len(np.load(tmp_path / target)) == 10


def test_an_unknown_packing_of_the_peer_is_refused(tmp_path: Path) -> None:
    config = bench_train.Config(data=str(tmp_path), peer_packings="best-fit,rows")
    with pytest.raises(UserError, match="--peer_packings names 'rows'; there are stream, shuffled"):
        bench_train.prepare(config, tmp_path)


def test_an_average_of_weights_is_that_of_its_formula() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    average = bench_train._Average(model, 0.5)
    for value in (1.0, 2.0, 4.0):
        model.weight.data.fill_(value)
        average.update()
    average.put_in_place()
    assert model.weight.item() == pytest.approx((0.25 * 1 + 0.5 * 2 + 1 * 4) / 1.75)


def test_the_table_has_a_line_a_side_best_first() -> None:
    def row(side: str, seed: int, bpb: float) -> dict[str, Any]:
        sizes = {"steps": 10, "seconds": 5.0, "tokens_per_second": 1000, "peak_mb": 700}
        return {"side": side, "seed": seed, "val_bpb": bpb, **sizes}

    lines = bench_train.table([row("a", 1, 2.0), row("b", 1, 1.5), row("a", 2, 2.2)]).splitlines()
    assert lines[2].startswith("| b | 1.5000 |  | 1 | 10 |")
    assert lines[3].startswith("| a | 2.1000 | 0.1414 | 2 | 10 | 5.0 | 1,000 | 700 |")


def test_every_variant_is_a_command_that_base_train_knows() -> None:
    variants = ablate.chosen("")
    assert variants[0].name == "recipe"
    assert len({variant.name for variant in variants}) == len(variants) > 10
    for variant in variants:
        configurator.parse(
            base_train.Config, ["--depth=4", *f"{ablate.RECIPE} {variant.flags}".split()]
        )


def test_an_unknown_group_is_named() -> None:
    with pytest.raises(UserError, match="--only names 'prests'; there are baseline, presets"):
        ablate.chosen("presets,prests")
