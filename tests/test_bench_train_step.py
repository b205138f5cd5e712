"""What the benchmark of one training step prints, and what it times on a GPU."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scripted_model import byte_tokenizer

from benchmarks import bench_train_step, devices
from nanochat import configurator
from nanochat.common import UserError


def run(*flags: str) -> None:
    bench_train_step.main(configurator.parse(bench_train_step.Config, list(flags)))


def test_a_line_says_speed_memory_and_parts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "work/vocabulary_265"
    byte_tokenizer().save(base / "tokenizer")
    np.save(base / "tokens.npy", np.arange(9))  # of the peer: what is there is not made again
    for number in range(2):
        texts = [f"Document {number} {i} tells of birds and trees. " for i in range(9)]
        pq.write_table(pa.table({"text": texts}), tmp_path / f"shard_{number:05d}.parquet")
    sizes = ("--depth=1", "--rows=2", "--length=16", "--vocab_size=265", "--turns=2", "--steps=1")
    run(f"--data={tmp_path}", f"--work={tmp_path / 'work'}", *sizes, "--sides=ours")
    row = json.loads(capsys.readouterr().out)
    assert (row["side"], row["shape"], row["device"]) == ("ours classic", "2x16", "cpu")
    assert (row["depth"], row["vocab_size"], len(row["turns"])) == (1, 265, 2)
    assert row["tokens_per_second"] > 0
    assert 0.0 <= row["mfu"] < 1.0
    assert row["memory_gb"] > 0.05
    assert tuple(row["part_ms"]) == bench_train_step.PARTS


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--device=cuda", "--device=cuda, and PyTorch .* sees no NVIDIA GPU here"),
        ("--rows=16", "--rows is 16 and --length 0; give both"),
        ("--shapes=2x2", "--shapes names '2x2'; there are 16x512, 1x1024"),
        ("--sides=ours,ours int-8", "--sides names 'ours int-8'; there are ours, ours compiled"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str, said: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=said):
        run("--data=nowhere", f"--work={tmp_path}", flag)


def test_a_gpu_is_waited_for_around_steps_and_apart_from_them_around_parts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    events: list[str] = []
    monkeypatch.setattr(sys, "stdin", io.StringIO("2\n"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("wait"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3_000_000_000)
    monkeypatch.setattr(devices, "spare_the_collector", lambda device: None)

    def step(clock: bench_train_step._Clock) -> None:
        events.append("forward")
        clock.mark("forward")
        events.append("backward")
        clock.mark("backward")

    config = bench_train_step.Config(data="", device="cuda")
    bench_train_step._answer(config, step, flops=1.0, dtype=torch.bfloat16, attention="PyTorch")
    whole = ["wait", *["forward", "backward"] * 2, "wait"]
    in_parts = ["wait", *["wait", "forward", "wait", "backward", "wait"] * 2, "wait"]
    assert events == whole + in_parts
    row = json.loads(capsys.readouterr().out)
    assert row["facts"] == {"device": "NVIDIA H200", "attention": "PyTorch"}
    assert row["memory"] == 3_000_000_000
    assert list(row["parts"]) == ["forward", "backward"]
