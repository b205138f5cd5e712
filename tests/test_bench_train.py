"""What the training benchmark steers and tells with: its clock, its table, its variants."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scripted_model import byte_tokenizer

from benchmarks import ablate, bench_train, devices, peer
from benchmarks.bench_train import ENDLESS, Clock
from nanochat import configurator
from nanochat.common import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.schedule import Schedule
from scripts import base_train


def test_schedules_follow_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 2 seconds in a budget of 40: the multiplier falls as if 20 had been planned."""
    ticks = itertools.count(0.0, 2.0)
    monkeypatch.setattr(devices.time, "perf_counter", lambda: next(ticks))
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
    monkeypatch.setattr(devices.time, "perf_counter", lambda: now)
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


def test_the_clock_is_read_when_the_gpu_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("synchronize"))
    monkeypatch.setattr(devices.time, "perf_counter", lambda: events.append("read") or 0.0)
    Clock(1.0, 0, "wall", "cuda").time(lambda: events.append("step"))
    assert events == ["synchronize", "read", "step", "synchronize", "read"]
    events.clear()
    Clock(1.0, 0).time(lambda: events.append("step"))
    assert events == ["read", "step", "read"]


def test_a_line_of_a_gpu_names_it_and_says_its_utilisation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3_000_000_000)
    monkeypatch.setattr(devices, "matmul_peak", lambda device, dtype: 4e12)
    config, clock = bench_train.Config(data="", device="cuda"), Clock(2.0, 0, "wall", "cuda")
    clock.step, clock.seconds = 10, 2.0
    facts = {"flops": 2e9, "dtype": torch.bfloat16, "attention": "PyTorch"}
    bench_train._tell(config, clock, 1000, 1.5, **facts)
    row = json.loads(capsys.readouterr().out)
    assert (row["device"], row["attention"]) == ("NVIDIA H200", "PyTorch")
    assert (row["tokens_per_second"], row["mfu"], row["peak_gflops"]) == (500, 0.25, 4000)
    assert row["peak_mb"] == 3000


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--device=cuda"], "--device=cuda, and PyTorch .* sees no NVIDIA GPU here"),
        (["--peer=nowhere", "--length=500"], "--length is 500; .* it must divide 131,072"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], said: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    flags = ["--data=nowhere", f"--work={tmp_path / 'work'}", *flags]
    with pytest.raises(UserError, match=said):
        bench_train.main(configurator.parse(bench_train.Config, flags))
    assert not (tmp_path / "work").exists()


def test_processor_time_is_refused_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = bench_train.Config(data="nowhere", device="cuda", clock="cpu")
    with pytest.raises(UserError, match="use --clock=wall"):
        bench_train.main(config)


def test_the_peer_sees_each_row_once() -> None:
    rows = np.arange(2 * 16 * 3).reshape(-1, 3)
    batch = peer.packed(rows, 16)
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


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of two shards; the tokenizer that is trained on them has bytes alone."""
    tokenizer = tmp_path / "base/tokenizer"
    monkeypatch.setattr(bench_train, "_run", lambda *arguments: byte_tokenizer().save(tokenizer))
    data = tmp_path / "data"
    data.mkdir()
    for number in range(2):
        texts = [f"Document {number} {i} tells of birds and trees. " for i in range(9)]
        pq.write_table(pa.table({"text": texts}), data / f"shard_{number:05d}.parquet")
    return data


def test_rows_are_laid_out_again_where_there_are_too_few(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = "train_rows_best-fit.npy"
    config = bench_train.Config(data=str(text), rows=2, length=16)
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
    bench_train.prepare(dataclasses.replace(config, length=8), tmp_path)
    assert np.load(tmp_path / target).shape == (8, 9)


def test_a_gpu_is_laid_out_no_rows_for(tmp_path: Path, text: Path) -> None:
    bench_train.prepare(bench_train.Config(data=str(text), device="cuda"), tmp_path)
    assert (tmp_path / "val.npy").exists()
    assert not list(tmp_path.glob("train_rows_*"))


def test_rows_made_beside_training_are_those_that_would_be_laid_out(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = bench_train.Config(data=str(text), rows=2, length=16, work=str(tmp_path / "work"))
    monkeypatch.setattr(bench_train, "PEER_STEPS", 3)
    bench_train.prepare(config, tmp_path)
    laid_out = peer.packed(np.load(tmp_path / "train_rows_best-fit.npy"), 2)
    (tmp_path / "work").mkdir()
    (tmp_path / "work/vocabulary_8192").symlink_to(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    streamed = peer.streamed(bench_train._command(config, "rows best-fit", 1), 2, 16)
    for step in range(3):
        for own, expected in zip(streamed(step), laid_out(step), strict=True):
            assert torch.equal(own, expected)


def test_the_end_of_the_process_that_makes_rows_is_said() -> None:
    batch = peer.streamed([sys.executable, "-c", "raise SystemExit(3)"], 2, 16)
    with pytest.raises(UserError, match="the process that makes the peer's rows ended with 3"):
        batch(0)


@pytest.mark.parametrize("num_rows", [1, 4, 6])
def test_the_peer_is_judged_on_the_same_tokens_whatever_its_batch(num_rows: int) -> None:
    """A model that loses 0.5 nats at each token of 2 bytes, and 1.0 at those without any."""

    def model(inputs: torch.Tensor, targets: torch.Tensor, loss_reduction: str) -> torch.Tensor:
        assert loss_reduction == "none"
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        return torch.where(targets == 0, 1.0, 0.5)

    tokens, sizes = np.arange(8 * 4 + 1) % 5, np.array([0, 2, 2, 2, 2])
    bpb = peer.bits_per_byte(model, tokens, sizes, "cpu", num_rows=num_rows, length=4)
    assert bpb == pytest.approx(0.25 / np.log(2.0))


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


def test_dropout_takes_a_share_of_what_blocks_add_while_training() -> None:
    model = GPT(GPTConfig(vocab_size=32, n_layer=2, n_head=2, n_embd=64, sequence_len=16))
    model.init_weights(torch.Generator().manual_seed(1))
    for block in model.blocks:
        torch.nn.init.ones_(block.mlp.c_proj.weight)  # silent blocks have nothing to drop
    tokens = torch.arange(16)[None]
    plain, added = model.hidden(tokens), []
    bench_train._drop(model, 0.0)
    assert torch.equal(model.hidden(tokens), plain)
    bench_train._drop(model, 0.25)
    model.blocks[1].mlp.register_forward_hook(lambda _, __, out: added.append(out))
    assert not torch.allclose(model.hidden(tokens), plain)
    assert 0.15 < (added.pop() == 0).float().mean() < 0.35
    assert torch.equal(model.eval().hidden(tokens), plain)


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
