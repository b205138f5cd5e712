"""The real job scripts on a SLURM cluster of two nodes: interrupted in every way, and failing.

The cluster is started here (tests/slurm_cluster.py). In the first test everything is real but the
GPUs; in the others the stages are stand-ins, because what is tested is what surrounds them.
"""

import getpass
import os
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import stub_commands
from slurm_cluster import SlurmCluster, missing_requirement

from nanochat.common import sha256_file

REPOSITORY = Path(__file__).parents[1]
SECONDS = 900  # for anything to happen on a loaded machine; minutes on an idle one
TINY = [
    *("--data=embedded", "--num_shards=1", "--max_chars=100000", "--vocab_size=1024"),
    *("--depth=2", "--max_seq_len=192", "--device_batch_size=2", "--total_batch_size=768"),
    *("--num_iterations=60", "--mid_iterations=60", "--sft_iterations=60", "--save_every=20"),
    *("--sft_device_batch_size=2", "--sft_examples_per_step=4", "--eval_every=1000"),
    *("--eval_tokens=768", "--core_max_per_task=8", "--max_problems=2", "--max_new_tokens=4"),
    *("--core_every=-1", "--sample_every=-1", "--bpb_limit=0"),
]
TRAINING = {
    "base_train": "base_checkpoints",
    "mid_train": "mid_checkpoints",
    "chat_sft": "chatsft_checkpoints",
}
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(missing_requirement() is not None, reason=f"SLURM {missing_requirement()}"),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    # pytest's folders are private to their owner; SLURM insists that the socket can be reached.
    with SlurmCluster(tmp_path_factory.mktemp("slurm") / "c") as cluster:
        yield cluster


class Clone:
    """A clone of the repository on a cluster's scratch file system, and a user's home."""

    def __init__(self, folder: Path, cluster: SlurmCluster) -> None:
        self.cluster, self.scratch = cluster, folder
        self.root, self.home, self.log = folder / "nanochat", folder / "home", folder / "stages"
        self.home.mkdir()
        ignored = shutil.ignore_patterns(
            ".git", "target", "__pycache__", "logs", ".venv", ".*_cache"
        )
        shutil.copytree(REPOSITORY, self.root, ignore=ignored, symlinks=True)
        (self.root / "logs").mkdir()
        self.variables = {
            "HOME": str(self.home),
            "SKIP_SETUP": "1",
            "STUB_LOG": str(self.log),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "NANOCHAT_BASE_DIR": "",
            "WANDB_RUN": "",
            "EMAIL": "",
            "SCRATCH": "",
        }

    @property
    def base(self) -> Path:
        return self.scratch / "nanochat-cache"

    def pretend_stages(self) -> None:
        stubs = stub_commands.install(self.scratch / "bin")
        self.variables["PATH"] = f"{stubs}:{self.variables['PATH']}"

    def submit(
        self, *options: str, job: str = "scripts/speedrun.slurm", flags: list[str] | None = None
    ) -> str:
        return self.cluster.run(
            *("sbatch", "--parsable", "--gres=gpu:a100:1", *options, job, *(flags or [])),
            variables=self.variables,
            cwd=self.root,
        )

    def output(self, job: str, ending: str = "out", name: str = "speedrun") -> str:
        path = self.root / "logs" / f"nanochat_{name}_{job}.{ending}"
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def wait_for(self, job: str, text: str, count: int = 1) -> None:
        """Until the job has printed `text` `count` times; fails when it ends before."""

        def is_there() -> bool:
            if self.output(job).count(text) >= count:
                return True
            assert self.state(job) not in ENDED, self.output(job)[-3000:] + self.output(job, "err")
            return False

        self.cluster.until(is_there, f"{count} x {text!r} of job {job}", SECONDS)

    def wait_for_state(self, job: str, *states: str) -> None:
        self.cluster.until(lambda: self.state(job) in states, f"{states} of {job}", SECONDS)

    def state(self, job: str) -> str:
        return self.cluster.field(job, "JobState")

    def finish(self, job: str) -> str:
        """The exit code with which a job ends."""
        self.wait_for_state(job, *ENDED)
        return self.cluster.field(job, "ExitCode").partition(":")[0]

    def stages_run(self) -> list[str]:
        """Modules and flags that rank 0 was given, in order."""
        lines = self.log.read_text(encoding="utf-8").splitlines()
        return [line.partition(" ")[2] for line in lines if line.startswith("0/")]

    def final_weights(self) -> dict[str, str]:
        return {
            stage: sha256_file(max((self.base / folder).glob("d2/step_*")) / "model.safetensors")
            for stage, folder in TRAINING.items()
        }


@pytest.fixture
def clone(tmp_path: Path, cluster: SlurmCluster) -> Clone:
    return Clone(tmp_path, cluster)


@pytest.fixture
def stubbed(clone: Clone) -> Clone:
    clone.pretend_stages()
    return clone


def preempt(cluster: SlurmCluster) -> None:
    """Give both nodes, for a moment, to a job that goes first."""
    whole = ("-p", "urgent", "-N2", "--exclusive", "-o", "/dev/null")
    cluster.run("sbatch", *whole, "--wrap", "true")


def test_disturbed_in_every_way_a_job_ends_with_the_same_weights(
    tmp_path: Path, cluster: SlurmCluster
) -> None:
    """Two nodes, no network; every kind of interruption, each in the middle of training."""
    for name in ("left_alone", "disturbed"):
        (tmp_path / name).mkdir()
    alone = Clone(tmp_path / "left_alone", cluster)
    other = Clone(tmp_path / "disturbed", cluster)
    for one in (alone, other):
        one.variables["WANDB_RUN"] = "dummy"  # importing wandb costs as much as a stage

    started = time.monotonic()
    first = alone.submit("--nodes=2", flags=TINY)
    assert alone.finish(first) == "0", alone.output(first)[-3000:] + alone.output(first, "err")
    assert "all 14 stages are done" in alone.output(first)
    assert (alone.base / "report" / "report.md").is_file()
    print(f"undisturbed: {time.monotonic() - started:.0f} s, offline: {cluster.is_isolated}")

    job = other.submit("--nodes=2", flags=TINY)

    def at_work(stage: str, times: int) -> None:
        """Until the `times`-th start of a stage has done its first steps."""
        other.wait_for(job, f"== {stage}: srun", times)
        before = other.output(job).rpartition(f"== {stage}: srun")[0]
        steps = before.count(" step ")
        other.wait_for(job, " step ", steps + 1)

    at_work("base_train", 1)
    cluster.run("scontrol", "requeue", job)
    other.wait_for_state(job, "PENDING")
    at_work("base_train", 2)
    cluster.run("scancel", "--batch", "--signal=USR1", job)  # as before the time limit
    other.wait_for_state(job, "PENDING")
    cluster.run("scontrol", "update", f"JobId={job}", "Partition=graceful")
    at_work("mid_train", 1)
    preempt(cluster)  # with grace: only the ranks are told
    other.wait_for_state(job, "PENDING")
    cluster.run("scontrol", "update", f"JobId={job}", "Partition=gpu-a100")
    at_work("mid_train", 2)
    preempt(cluster)  # without: everybody is told, and killed soon after
    other.wait_for_state(job, "PENDING")
    at_work("chat_sft", 1)
    cluster.kill_node("n2")
    other.wait_for_state(job, "PENDING")
    cluster.start_node("n2")
    assert other.finish(job) == "0", other.output(job)[-3000:] + other.output(job, "err")

    # The first start and five after it; one more where the job was back before the one that took
    # its place had begun, and was taken out again.
    assert other.output(job).count("restart ") in (6, 7)
    assert other.output(job).count("resumed from step") >= 3
    # After USR1, and after the preemption with grace: what SLURM would not have done.
    assert other.output(job).count("goes back to the queue") in (2, 3)
    assert "all 14 stages are done" in other.output(job)
    assert other.final_weights() == alone.final_weights()
    assert list(other.home.rglob("*")) == []
    print(f"both: {time.monotonic() - started:.0f} s")


def test_a_job_with_eight_gpus_and_an_address(stubbed: Clone) -> None:
    """Neither a run name nor a folder for the logs is needed."""
    (stubbed.root / ".env.local").write_text("EMAIL = 'someone@example.edu'\n")
    (stubbed.root / "logs").rmdir()
    told = stubbed.cluster.run(
        "bash", "scripts/submit.sh", variables=stubbed.variables, cwd=stubbed.root
    )
    job = told.partition("submitted as job ")[2].split()[0]
    assert stubbed.finish(job) == "0", stubbed.output(job, "err")
    output = stubbed.output(job)
    assert "all 14 stages are done" in output
    assert stubbed.output(job, "err") == ""
    base_train = next(
        line for line in stubbed.stages_run() if line.startswith("scripts.base_train")
    )
    assert f"--run=slurm-{job}" in base_train.split()
    lines = stubbed.log.read_text(encoding="utf-8").splitlines()
    ranks = sorted(line.split()[0] for line in lines if " scripts.base_train " in line)
    assert ranks == [f"{rank}/8" for rank in range(8)]
    mails = stubbed.cluster.folder / "mails"
    stubbed.cluster.until(lambda: "Ended" in mails.read_text(), "the mail at the end", SECONDS)
    ours = [line for line in mails.read_text().splitlines() if f"Job_id={job} " in line]
    assert any("Began" in line for line in ours)
    assert all(line.endswith("someone@example.edu") for line in ours)
    assert list(stubbed.home.rglob("*")) == []


@pytest.mark.parametrize("name", ["dummy", "12"])
def test_a_run_name_changes_nothing_but_the_name(stubbed: Clone, name: str) -> None:
    """One GPU, no address, plain sbatch."""
    stubbed.variables["WANDB_RUN"] = name
    job = stubbed.submit()
    assert stubbed.finish(job) == "0", stubbed.output(job, "err")
    assert "all 14 stages are done" in stubbed.output(job)
    base_train = next(
        line for line in stubbed.stages_run() if line.startswith("scripts.base_train")
    )
    assert f"--run={name}" in base_train.split()
    assert "--total_batch_size=524288" in base_train.split()
    assert "no email in .env.local" in stubbed.output(job, "err")
    mails = stubbed.cluster.folder / "mails"
    assert not mails.exists() or f"Job_id={job} " not in mails.read_text()


def test_a_missing_asset_ends_the_job_before_any_stage(stubbed: Clone) -> None:
    stubbed.variables["STUB_REAL"] = "scripts.assets"
    job = stubbed.submit()
    assert stubbed.finish(job) == "1"
    assert "python -m scripts.assets prefetch" in stubbed.output(job, "err")
    assert "bash scripts/download_data.sh" in stubbed.output(job, "err")
    assert not stubbed.log.exists()
    assert "done" not in stubbed.output(job)


def test_a_failing_stage_is_the_end_of_the_job(stubbed: Clone) -> None:
    stubbed.variables |= {"STUB_FAIL": "mid_train", "STUB_CODE": "9"}
    job = stubbed.submit("--nodes=2")
    assert stubbed.finish(job) == "9"
    errors = stubbed.output(job, "err")
    shown = errors.partition("the last 30 lines of")[2].splitlines()[1:31]
    assert "line 40 of the error" in shown
    assert "line 1 of the error" not in shown
    assert "stage mid_train ended with exit code 9" in errors
    assert "stages are done" not in stubbed.output(job)
    assert stubbed.cluster.field(job, "Restarts") == "0"

    # Mended, it goes on at midtraining, with the job that begins there.
    del stubbed.variables["STUB_FAIL"]
    stubbed.log.unlink()
    job = stubbed.submit(job="scripts/resume_mid_sft.slurm")
    assert stubbed.finish(job) == "0", stubbed.output(job, "err", "resume_mid_sft")
    assert stubbed.stages_run()[1].startswith("scripts.mid_train ")  # 0 is the check
    assert "all 5 stages are done" in stubbed.output(job, name="resume_mid_sft")


def test_near_its_time_limit_a_job_saves_and_goes_on(stubbed: Clone) -> None:
    """SLURM sends USR1 between 60 and 97 seconds before the end: it looks every half minute."""
    stubbed.variables["STUB_STEPS"] = "700"
    limit = ("--time=2", "--signal=B:USR1@60")
    job = stubbed.submit(*limit, flags=["--until", "base_train"])
    assert stubbed.finish(job) == "0", stubbed.output(job, "err")
    output = stubbed.output(job)
    assert output.count("USR1: the time limit is near") >= 1
    assert output.count("saved at") >= 1
    assert "restart 1" in output
    assert stubbed.stages_run()[-1].endswith("--resume")


def test_a_cancelled_job_does_not_come_back(stubbed: Clone) -> None:
    stubbed.variables["STUB_STEPS"] = "1000"
    job = stubbed.submit()
    stubbed.wait_for(job, "== base_train")
    stubbed.cluster.run("scancel", job)
    stubbed.wait_for_state(job, "CANCELLED")
    stubbed.cluster.until(
        lambda: "was stopped" in stubbed.output(job, "err"), "its last words", SECONDS
    )
    assert stubbed.state(job) == "CANCELLED"
    assert "goes back to the queue" not in stubbed.output(job)


def test_an_evaluation_that_is_preempted_runs_again(stubbed: Clone) -> None:
    """It cannot save; SLURM tells only the ranks, and nobody would requeue the job but itself."""
    stubbed.variables["STUB_SLEEP"] = "10"
    job = stubbed.submit("--partition=graceful", flags=["--until", "chat_eval_base"])
    stubbed.wait_for(job, "== chat_eval_base")
    stubbed.cluster.until(
        lambda: "chat_eval" in stubbed.stages_run()[-1], "the evaluation to run", SECONDS
    )
    preempt(stubbed.cluster)
    stubbed.wait_for(job, "goes back to the queue")
    stubbed.wait_for(job, "restart 1")
    assert stubbed.finish(job) == "0", stubbed.output(job, "err")
    assert sum("--source=base" in line for line in stubbed.stages_run()) == 2


def test_a_chat_in_a_job(stubbed: Clone) -> None:
    """From the login node one answer; as a job the page, and how to reach it."""
    talk = ("bash", "scripts/chat.slurm", "-p", "Why is the sky blue?")
    stubbed.cluster.run(*talk, variables=stubbed.variables, cwd=stubbed.root)
    assert shlex.split(stubbed.stages_run()[0]) == ["scripts.chat_cli", *talk[2:]]
    job = stubbed.submit(job="scripts/chat.slurm")
    assert stubbed.finish(job) == "0"
    port, me = 8000 + int(job) % 1000, f"{getpass.getuser()}@{socket.gethostname()}"
    line = f"  ssh -L 8000:localhost:{port} -J {me} {me}"
    assert line in stubbed.output(job, name="chat").splitlines()
    assert stubbed.stages_run()[1].startswith("scripts.chat_web --port=80")
