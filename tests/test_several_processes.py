"""torchrun with two ranks: what a lost rank does, and two hosts that share nothing but a cable."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from scripted_model import byte_tokenizer, save

from nanochat.gpt import GPT, GPTConfig
from nanochat.tracking import read_metrics
from tests.distributed import free_port
from tests.stage_processes import BASE, copy_of, prepare, run, run_dir

REPOSITORY = Path(__file__).parents[1]
SECONDS_OF_ONE_RUN = 240
# From the death of a rank to the end of the job. The agent looks every 0.1 s, gloo notices a closed
# socket at once; the rest is a slow machine.
SECONDS_TO_END = 30
FLAGS = (*BASE.flags, "--device_batch_size=1")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("ranks") / "prepared"
    prepare(base)
    return base


def torchrun(base: Path, *arguments: str, inside: tuple[str, ...] = (), **variables: str) -> list:
    """Command and environment of torchrun, optionally inside a network namespace."""
    command = [*inside, sys.executable, "-m", "torch.distributed.run", *arguments]
    environment = os.environ | {
        "NANOCHAT_BASE_DIR": str(base),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(REPOSITORY),
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # restarted gloo workers meet stale keys
        **variables,
    }
    return [command, environment]


def start(base: Path, *arguments: str) -> subprocess.Popen[str]:
    command, environment = torchrun(base, *arguments)
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def ranks(number: int = 2) -> tuple[str, ...]:
    """Flags of torchrun for ranks of this machine."""
    place = "--master-addr=127.0.0.1", f"--master-port={free_port()}"
    return f"--nproc-per-node={number}", *place


def losses(base: Path) -> dict[int, float]:
    rows = read_metrics(run_dir(base, BASE) / "metrics.jsonl")
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def ranks_of(job: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    """The worker processes by rank."""
    workers = {}
    for child in psutil.Process(job.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            rank = child.environ().get("RANK")
            if rank is not None:
                workers[int(rank)] = child
    return workers


def test_a_lost_rank_ends_the_job_in_seconds_and_one_process_goes_on(prepared: Path) -> None:
    alone = copy_of(prepared, prepared.with_name("alone"))
    run(alone, BASE.module, *FLAGS)
    base = copy_of(prepared, prepared.with_name("lost"))
    job = start(base, *ranks(), "-m", BASE.module, "--", *FLAGS)
    try:
        deadline = time.monotonic() + SECONDS_OF_ONE_RUN
        while job.poll() is None and not list(run_dir(base, BASE).glob("step_*")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        workers = ranks_of(job)
        assert set(workers) == {0, 1}
        died = time.monotonic()
        workers[1].send_signal(signal.SIGKILL)
        said, _ = job.communicate(timeout=SECONDS_OF_ONE_RUN)
        seconds = time.monotonic() - died
    finally:
        job.kill()
    assert job.returncode == 1
    assert seconds < SECONDS_TO_END, said[-3000:]
    # The survivor says what it met, or the agent, which was quicker to end it, which rank it was.
    assert re.search(r"rank 0 of 2 lost another rank|local_rank: 1", said), said[-3000:]
    assert not any(worker.is_running() for worker in workers.values())

    run(base, BASE.module, *FLAGS, "--resume")
    together, one = losses(base), losses(alone)
    assert list(together) == list(one) == list(range(1, 41))
    for step, loss in one.items():
        # The same rows in the same order; sums over ranks are rounded in another order.
        assert together[step] == pytest.approx(loss, abs=0.05), step


@pytest.mark.parametrize(
    ("module", "flags", "written"),
    [
        (
            "scripts.base_eval",
            ("--eval=core", "--max-per-task=30"),
            "base_eval/base_model_000007.csv",
        ),
        (
            "scripts.chat_eval",
            ("-i", "mid", "-x", "7", "-m", "8", "-n", "2", "-t", "1"),
            "answers.jsonl",
        ),
    ],
)
def test_two_ranks_evaluate_as_one(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: str,
    flags: tuple[str, ...],
    written: str,
) -> None:
    base = tmp_path / "base"
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    sizes = GPTConfig(2048, byte_tokenizer().vocab_size, n_layer=2, n_head=2, n_embd=32)
    model = GPT(sizes)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(0))
    for stage in ("base", "mid"):
        save(stage, model)
    if module == "scripts.chat_eval":
        flags = (*flags, f"--save={base / written}")
    texts = []
    for number in (1, 2):
        where = "--device-type=cpu", "--dtype=float32"
        job = start(base, *ranks(number), "-m", module, "--", *where, *flags)
        said, _ = job.communicate(timeout=SECONDS_OF_ONE_RUN)
        assert job.returncode == 0, said[-3000:]
        texts.append((base / written).read_text(encoding="utf-8"))
        (base / written).unlink()
    assert texts[0] == texts[1]
    assert len(texts[0].splitlines()) > 3


@pytest.fixture
def two_hosts() -> Iterator[tuple[str, str]]:
    """Two network namespaces and a cable between them."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and the ip command")
    hosts = f"nanochat{os.getpid()}a", f"nanochat{os.getpid()}b"
    cables = "ncveth1", "ncveth2"
    try:
        for host in hosts:
            made = subprocess.run(["ip", "netns", "add", host], capture_output=True)
            if made.returncode:
                why = made.stderr.decode().strip()
                pytest.skip(f"this machine does not allow network namespaces: {why}")
        link = "ip link add {0} netns {2} type veth peer name {1} netns {3}"
        subprocess.run(link.format(*cables, *hosts).split(), check=True)
        for index, (host, cable) in enumerate(zip(hosts, cables, strict=True), 1):
            for command in (
                f"addr add 10.77.0.{index}/24 dev {cable}",
                "link set lo up",
                f"link set {cable} up",
            ):
                subprocess.run(["ip", "-n", host, *command.split()], check=True)
        yield hosts
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "del", host], capture_output=True)


def test_two_hosts_train_one_model(prepared: Path, two_hosts: tuple[str, str]) -> None:
    base = copy_of(prepared, prepared.with_name("hosts"))
    jobs = []
    flags = [flag for flag in FLAGS if not flag.startswith("--num_iterations")]
    for index, host in enumerate(two_hosts, 1):
        command, environment = torchrun(
            base,
            "--nnodes=2",
            "--nproc-per-node=1",
            "--rdzv-backend=c10d",
            "--rdzv-endpoint=10.77.0.1:29511",
            "--rdzv-id=two-hosts",
            f"--rdzv-conf=is_host={'true' if index == 1 else 'false'}",
            f"--local-addr=10.77.0.{index}",
            "-m",
            BASE.module,
            "--",
            *flags,
            "--num_iterations=5",
            inside=("ip", "netns", "exec", host),
            GLOO_SOCKET_IFNAME=f"ncveth{index}",
        )
        jobs.append(
            subprocess.Popen(
                command,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        said = [job.communicate(timeout=SECONDS_OF_ONE_RUN)[0] for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    assert [job.returncode for job in jobs] == [0, 0], said[0][-3000:] + said[1][-3000:]
    newest = max(run_dir(base, BASE).glob("step_*"))
    assert newest.name == "step_000005"
    assert len(list(newest.glob("optimizer_rank*_of02.safetensors"))) == 2
    assert list(losses(base)) == [1, 2, 3, 4, 5]
