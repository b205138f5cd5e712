"""The main job itself, small: it ends well, it skips what is done, and kill -9 changes nothing."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanochat.common import sha256_file
from nanochat.sources.parquet import shard_name, write_shard
from tests.fake_hub import FakeHub, Fault, running

REPOSITORY = Path(__file__).parents[1]
SIZES = [
    "--num_shards=1",
    "--max_chars=100000",
    "--vocab_size=1024",
    "--depth=2",
    "--max_seq_len=192",
    "--device_batch_size=2",
    "--total_batch_size=384",
    "--num_iterations=40",
    "--mid_iterations=40",
    "--sft_iterations=40",
    "--sft_device_batch_size=2",
    "--sft_examples_per_step=4",
    "--save_every=4",
    "--eval_every=20",
    "--eval_tokens=512",
    "--core_max_per_task=8",
    "--max_problems=4",
    "--max_new_tokens=8",
]
# A training stage and where it keeps its checkpoints.
TRAINING = {
    "base_train": "base_checkpoints",
    "mid_train": "mid_checkpoints",
    "chat_sft": "chatsft_checkpoints",
}
SECONDS_TO_FIRST_CHECKPOINT = 240
SECONDS_OF_ONE_RUN = 900

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash"),
]


def start(base: Path) -> "subprocess.Popen[str]":
    """Start the main job in a session of its own; its output goes to a file beside the base."""
    environment = os.environ | {
        "NANOCHAT_BASE_DIR": str(base),
        "SKIP_SETUP": "1",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    with log_of(base).open("a", encoding="utf-8") as log:
        return subprocess.Popen(
            ["bash", "scripts/local_cpu_train.sh", *SIZES],
            cwd=REPOSITORY,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


def log_of(base: Path) -> Path:
    return base.with_suffix(".log")


def finish(base: Path) -> None:
    """Run the main job to its end, which must be a good one."""
    code = start(base).wait(timeout=SECONDS_OF_ONE_RUN)
    assert code == 0, log_of(base).read_text(encoding="utf-8")[-3000:]


def is_at_work_on(base: Path, stage: str) -> bool:
    """Whether a training stage runs and has written a checkpoint."""
    try:
        record = json.loads((base / "run_state.json").read_text(encoding="utf-8"))["stages"][stage]
    except (FileNotFoundError, KeyError):
        return False
    return record["exit_code"] is None and any((base / TRAINING[stage]).glob("d2/step_*"))


def kill_in(base: Path, stage: str) -> None:
    """Start the main job and end all its processes with kill -9 in the middle of a stage."""
    process = start(base)
    deadline = time.monotonic() + SECONDS_TO_FIRST_CHECKPOINT
    while not is_at_work_on(base, stage) and process.poll() is None:
        assert time.monotonic() < deadline, log_of(base).read_text(encoding="utf-8")[-3000:]
        time.sleep(0.02)
    was_running = process.poll() is None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=30)
    assert was_running, log_of(base).read_text(encoding="utf-8")[-3000:]


def final_weights(base: Path) -> dict[str, str]:
    """Hashes of the last checkpoint's weights, by stage."""
    return {
        stage: sha256_file(max((base / folder).glob("d2/step_*")) / "model.safetensors")
        for stage, folder in TRAINING.items()
    }


def test_killed_in_each_stage_it_ends_with_the_same_weights(tmp_path: Path) -> None:
    undisturbed = tmp_path / "undisturbed"
    finish(undisturbed)
    assert (undisturbed / "report" / "report.md").is_file()

    started = time.monotonic()
    finish(undisturbed)
    assert time.monotonic() - started < 30
    assert log_of(undisturbed).read_text(encoding="utf-8").count("done before, skipped") == 14

    killed = tmp_path / "killed"
    for stage in TRAINING:
        kill_in(killed, stage)
    finish(killed)
    assert log_of(killed).read_text(encoding="utf-8").count("resumed from step") == len(TRAINING)
    assert final_weights(killed) == final_weights(undisturbed)


def test_shards_that_did_not_come_beside_the_tokenizer_stop_the_run_before_training(
    tmp_path: Path,
) -> None:
    """From a hub on this machine that has lost a shard, and finds it again for the second start."""
    repository = "karpathy/climbmix-400b-shuffle"
    hub, base = FakeHub(tmp_path / "hub"), tmp_path / "base"
    (tmp_path / "hub" / repository).mkdir(parents=True)
    for shard in (0, 1, 2, 6542):  # the last one validates
        texts = [f"Text {i} of shard {shard} says this and no more." for i in range(2000)]
        write_shard(tmp_path / "hub" / repository / shard_name(shard), texts, note={})
    # Once for the process in the background, once for the stage.
    hub.fail(f"/datasets/{repository}/resolve/main/{shard_name(2)}", Fault(404), Fault(404))
    flags = ["--data=climbmix", "--tasks=embedded", "--first-shards=1", "--num-shards=3"]
    flags += ["--max-chars=50000", "--vocab-size=300", "--until=shards"]
    known = {k: v for k, v in os.environ.items() if not k.endswith("OFFLINE")}
    python = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    known |= {"NANOCHAT_BASE_DIR": str(base), "SKIP_SETUP": "1", "PATH": python}

    def run() -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            ["bash", "scripts/local_cpu_train.sh", *flags],
            cwd=REPOSITORY,
            env=known | {"HF_ENDPOINT": hub.url},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SECONDS_OF_ONE_RUN,
        )

    with running(hub):
        failed, again = run(), run()
    assert failed.returncode == 1
    assert "shards: what was begun before has failed (exit code 1" in failed.stdout
    assert "shard_00002.parquet does not exist (HTTP 404 Not Found)" in failed.stderr
    assert "stage shards ended with exit code 1" in failed.stderr
    assert again.returncode == 0, again.stderr
    assert "== tok_train: done before, skipped" in again.stdout
    assert "climbmix: 3 training shards, 1 validation shard" in again.stdout
    asked = [request.path.rpartition("/")[2] for request in hub.requests]
    assert asked.count(shard_name(2)) == 3
    assert asked.count(shard_name(0)) == asked.count(shard_name(1)) == 1
