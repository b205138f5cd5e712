"""Device, dtype and ranks: what is chosen, what is refused, how a job of several ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from nanochat import runtime
from nanochat.common import UserError
from nanochat.runtime import Runtime, World
from tests.distributed import free_port, run_ranks

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "NANOCHAT_DTYPE"):
        monkeypatch.delenv(name, raising=False)


def cpu(dtype=torch.float32, *, rank=0, size=1, seed=42):
    return Runtime(torch.device("cpu"), dtype, World(rank, size, rank), seed)


# ---- one process ------------------------------------------------------------------------------


def test_without_ranks_the_world_is_one_and_no_group_is_joined():
    with runtime.start("cpu") as found:
        assert found.world == World(0, 1, 0)
        assert found.world.is_main
        assert not dist.is_initialized()


def test_a_world_of_one_leaves_every_value_as_it_is():
    world, value = World(), torch.arange(4.0)
    output = torch.zeros(4)
    world.reduce_scatter(output, value)
    assert torch.equal(output, value)
    world.all_gather(output, value + 1)
    assert torch.equal(output, value + 1)
    assert torch.equal(world.all_reduce_(value.clone(), "max"), value)
    assert torch.equal(world.broadcast_(value.clone()), value)
    assert world.any(True)
    assert not world.any(False)
    assert world.sum(0.1) == 0.1
    assert world.gather_objects("a") == ["a"]
    world.barrier()


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ({"avx2"}, torch.float32),
        ({"avx512_bf16"}, torch.bfloat16),
        ({"amx_bf16", "avx2"}, torch.bfloat16),
    ],
)
def test_compute_dtype_is_bf16_exactly_where_the_cpu_multiplies_it(monkeypatch, flags, dtype):
    monkeypatch.setattr(runtime, "_cpu_flags", lambda: frozenset(flags))
    with runtime.start("cpu") as found:
        assert found.compute_dtype == dtype


def test_environment_overrides_the_detected_dtype_and_the_argument_both(monkeypatch):
    monkeypatch.setenv("NANOCHAT_DTYPE", "float16")
    with runtime.start("cpu") as found:
        assert found.compute_dtype == torch.float16
    with runtime.start("cpu", dtype="float32") as found:
        assert found.compute_dtype == torch.float32


@pytest.mark.parametrize(
    ("environment", "arguments", "message"),
    [
        ({}, {"device_type": "tpu"}, "unknown device type 'tpu'"),
        ({}, {"dtype": "int8"}, "unknown compute dtype 'int8'"),
        ({"NANOCHAT_DTYPE": "half"}, {}, "unknown compute dtype 'half'"),
        ({"WORLD_SIZE": "4"}, {}, "WORLD_SIZE=4 is set but RANK, LOCAL_RANK is not"),
        ({"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0"}, {}, "RANK=2 is not below"),
        ({"WORLD_SIZE": "2", "RANK": "x", "LOCAL_RANK": "0"}, {}, "must be integers"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(monkeypatch, environment, arguments, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(UserError, match=message),
        runtime.start(**{"device_type": "cpu"} | arguments),
    ):
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_absent_cuda_is_refused_with_the_flag_that_helps():
    with pytest.raises(UserError, match="--device-type=cpu"), runtime.start("cuda"):
        pass


def test_generators_differ_by_purpose_rank_and_seed_and_repeat():
    def draw(found, *purpose, **options):
        return torch.rand(4, generator=found.generator(*purpose, **options)).tolist()

    base = draw(cpu(), "data", 1)
    assert draw(cpu(), "data", 1) == base
    assert draw(cpu(), "data", 2) != base
    assert draw(cpu(), "data1") != base
    assert draw(cpu(seed=43), "data", 1) != base
    assert draw(cpu(rank=1, size=2), "data", 1) != base
    shared = [draw(cpu(rank=rank, size=2), "weights", shared=True) for rank in range(2)]
    assert shared[0] == shared[1]


# ---- several processes ------------------------------------------------------------------------


def collectives(found):
    world, rank = found.world, found.world.rank
    scattered = torch.empty(2)
    world.reduce_scatter(scattered, torch.arange(4.0) + rank)
    gathered = torch.empty(4)
    world.all_gather(gathered, torch.full((2,), float(rank)))
    return {
        "world": (world.rank, world.size, world.local_rank, world.is_main),
        "sum": world.all_reduce_(torch.tensor([1.0 + rank])).tolist(),
        "max": world.all_reduce_(torch.tensor([1.0 + rank]), "max").tolist(),
        "min": world.all_reduce_(torch.tensor([1.0 + rank]), "min").tolist(),
        "broadcast": world.broadcast_(torch.tensor([7.0 + rank]), src=1).tolist(),
        "scattered": scattered.tolist(),
        "gathered": gathered.tolist(),
        "any": (world.any(rank == 1), world.any(False)),
        "total": world.sum(0.5 + rank),
        "objects": world.gather_objects({"rank": rank}),
        "barrier": world.barrier(),
    }


def test_collectives_of_two_ranks():
    first, second = run_ranks(collectives, 2)
    assert first.pop("world") == (0, 2, 0, True)
    assert second.pop("world") == (1, 2, 1, False)
    assert first.pop("scattered") == [1.0, 3.0]
    assert second.pop("scattered") == [5.0, 7.0]
    assert first == second
    assert first == {
        "sum": [3.0],
        "max": [2.0],
        "min": [1.0],
        "broadcast": [8.0],
        "gathered": [0.0, 0.0, 1.0, 1.0],
        "any": (True, False),
        "total": 2.0,
        "objects": [{"rank": 0}, {"rank": 1}],
        "barrier": None,
    }


ONE_RANK_DIES = """
import os, signal, sys
from nanochat import configurator, runtime
from dataclasses import dataclass

@dataclass(frozen=True)
class Config:
    pass

def main(config):
    with runtime.start("cpu") as found:
        found.world.barrier()
        if found.world.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        while True:
            found.world.barrier()

configurator.run(main, Config)
"""


def test_survivors_of_a_killed_rank_end_within_seconds_with_one_line():
    port = free_port()
    started = time.monotonic()
    with start_rank(ONE_RANK_DIES, 0, port) as survivor, start_rank(ONE_RANK_DIES, 1, port) as lost:
        ranks = [survivor, lost]
        try:
            _, stderr = survivor.communicate(timeout=50)
            lost.wait(timeout=10)
        finally:
            for rank in ranks:
                rank.kill()
    assert ranks[1].returncode == -signal.SIGKILL
    assert ranks[0].returncode == 1
    assert time.monotonic() - started < 45  # most of it: importing torch twice
    last = stderr.strip().splitlines()[-1]
    assert "rank 0 of 2 lost another rank" in last
    assert "Traceback" not in stderr


def start_rank(program, rank, port):
    environment = os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [sys.executable, "-c", program],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


JOIN_AND_LEAVE = """
import sys
from pathlib import Path
import torch.distributed as dist
from nanochat import runtime
for way in range(2):
    try:
        with runtime.start("cpu") as found:
            report = Path(sys.argv[1], f"rank{found.world.rank}_time{way}.txt")
            report.write_text(f"one of {int(found.world.sum(1))}")
            if way:
                raise KeyError("on purpose")
    except KeyError:
        pass
    assert not dist.is_initialized()
"""


def test_torchrun_starts_ranks_that_leave_the_group_on_every_way_out(tmp_path):
    script = tmp_path / "job.py"
    script.write_text(JOIN_AND_LEAVE)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            script,
            tmp_path,
        ],
        env=os.environ
        | {
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": "1",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # restarted gloo workers meet stale keys
        },
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    reports = {path.name: path.read_text() for path in tmp_path.glob("*.txt")}
    assert reports == {
        f"rank{rank}_time{time}.txt": "one of 2" for rank in (0, 1) for time in (0, 1)
    }
