"""The pipeline runner: what is skipped, what runs again, what a failure and a signal do."""

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

REPOSITORY = Path(__file__).parents[1]
STAGES = REPOSITORY / "scripts" / "stages.sh"

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")

SECONDS = 240  # for one run; what takes two on an idle machine

# Each stage appends its name to a log and leaves a file, as the real ones leave checkpoints.
PIPELINE = """
set -euo pipefail
source {stages}
be_told() {{ # to stop, at the command with the number AT, in whichever shell runs it
    COMMANDS=0
    trap '(( ++COMMANDS != AT )) || ! mkdir "$LOG.told" 2>/dev/null || kill -TERM $$' DEBUG
    set -T
}}
pipeline() {{
    [ -z "${{AT:-}}" ] || [ "$PIPELINE_MODE" = learn ] || be_told
    stage data data.txt bash "$STUB" data
    [ -z "${{AHEAD:-}}" ] || ahead tune bash "$STUB" tune
    training train train.txt bash "$STUB" train "${{SIZE:-1}}" ${{FREE:-}}
    evaluation eval eval.txt bash "$STUB" eval "${{LIMIT:-10}}"
    training tune tune.txt bash "$STUB" tune
    report report report.txt bash "$STUB" report
}}
run_pipeline pipeline
[ "${{DRY_RUN:-0}}${{LIST:-0}}" != 00 ] || echo "all stages done"
"""
STUB = """
echo "$*" >>"$LOG"
[ "$1" != "${FAIL:-}" ] || exit 7
[ "$1" != "${FAIL_ONCE:-}" ] || ! mkdir "$NANOCHAT_BASE_DIR/failed" 2>/dev/null || exit 9
[ "$1" != "${AHEAD:-}" ] || until grep -q "^${UNTIL_RAN:-data}" "$LOG"; do sleep 0.02; done
[ "$1" != "${HANG:-}" ] || { echo $$ >"$NANOCHAT_BASE_DIR/hanging"; exec sleep 600; }
[ "$1" = "${FORGET:-}" ] || touch "$NANOCHAT_BASE_DIR/$1.txt"
"""


class Pipeline:
    """A pipeline of stubs in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.base = folder / "base"
        self.log = folder / "log"
        self.script = folder / "pipeline.sh"
        self.script.write_text(PIPELINE.format(stages=STAGES))
        (folder / "stub.sh").write_text(STUB)
        self.environment = {
            **os.environ,
            "NANOCHAT_BASE_DIR": str(self.base),
            "LOG": str(self.log),
            "STUB": str(folder / "stub.sh"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }

    def start(self, **settings: str) -> "subprocess.Popen[str]":
        self.log.write_text("")
        return subprocess.Popen(
            ["bash", str(self.script)],
            cwd=REPOSITORY,
            env={**self.environment, **settings},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # so that a test can clear up after a killed shell
        )

    def run(self, **settings: str) -> "subprocess.CompletedProcess[str]":
        process = self.start(**settings)
        output, errors = process.communicate(timeout=SECONDS)
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)

    @property
    def ran(self) -> list[str]:
        """The stages that ran in the last run."""
        return [line.split()[0] for line in self.log.read_text().splitlines()]


@pytest.fixture
def pipeline(tmp_path: Path) -> Pipeline:
    return Pipeline(tmp_path)


@pytest.fixture
def finished(pipeline: Pipeline) -> Pipeline:
    result = pipeline.run()
    assert result.returncode == 0, result.stderr
    assert pipeline.ran == ["data", "train", "eval", "tune", "report"]
    return pipeline


def test_second_run_skips_everything(finished: Pipeline) -> None:
    result = finished.run()
    assert result.returncode == 0
    assert finished.ran == []
    assert "all stages done" in result.stdout


def test_changed_command_runs_it_and_what_builds_on_it(finished: Pipeline) -> None:
    assert finished.run(SIZE="2").returncode == 0
    assert finished.ran == ["train", "eval", "tune", "report"]


def test_flags_of_how_a_run_is_carried_out_train_nothing_again(finished: Pipeline) -> None:
    free = "--keep_last=2 --max_minutes=9 --background_save=0 --log_every=5 --spike_limit=0"
    assert finished.run(FREE=free).returncode == 0
    assert finished.ran == []
    assert finished.run(FREE="--compile=1").returncode == 0
    assert finished.ran[0] == "train"  # other kernels, other bits


def test_changed_evaluation_does_not_train_again(finished: Pipeline) -> None:
    assert finished.run(LIMIT="20").returncode == 0
    assert finished.ran == ["eval", "report"]


def test_removed_artifact_runs_its_stage_again(finished: Pipeline) -> None:
    (finished.base / "tune.txt").unlink()
    assert finished.run().returncode == 0
    assert finished.ran == ["tune", "report"]


def test_failure_ends_with_its_exit_code_and_no_success(pipeline: Pipeline) -> None:
    result = pipeline.run(FAIL="train")
    assert result.returncode == 7
    assert pipeline.ran == ["data", "train"]
    assert "all stages done" not in result.stdout
    assert "stage train ended with exit code 7" in result.stderr


def test_failed_evaluation_is_a_failure_too(pipeline: Pipeline) -> None:
    assert pipeline.run(FAIL="eval").returncode == 7
    assert pipeline.ran == ["data", "train", "eval"]


def test_run_after_failure_resumes_training_and_skips_the_rest(pipeline: Pipeline) -> None:
    pipeline.run(FAIL="train")
    assert pipeline.run().returncode == 0
    assert pipeline.ran == ["train", "eval", "tune", "report"]
    assert pipeline.log.read_text().splitlines()[0] == "train 1 --resume"


def test_fresh_training_is_not_resumed(finished: Pipeline) -> None:
    """A run of a changed command must not continue from the checkpoints of the old one."""
    finished.run(SIZE="2")
    assert "--resume" not in finished.log.read_text()


def test_interrupted_rerun_does_not_trust_records_of_the_run_before(finished: Pipeline) -> None:
    """train runs again and dies: what was built on the old train is no longer done."""
    finished.run(SIZE="2", FAIL="train")
    assert finished.run(SIZE="2").returncode == 0
    assert finished.ran == ["train", "eval", "tune", "report"]


def test_a_mistyped_command_that_changed_no_file_costs_nothing(finished: Pipeline) -> None:
    assert finished.run(SIZE="wrong", FAIL="train").returncode == 7
    assert finished.run().returncode == 0
    assert finished.ran == []


def test_a_failure_that_changed_files_is_not_undone(finished: Pipeline) -> None:
    assert finished.run(SIZE="2", FAIL="train").returncode == 7
    (finished.base / "train.txt").write_text("half of another model")
    assert finished.run().returncode == 0
    assert finished.ran == ["train", "eval", "tune", "report"]


def test_a_mistyped_command_that_was_killed_costs_nothing(finished: Pipeline) -> None:
    process = finished.start(SIZE="wrong", HANG="train")
    wait_for(finished.base / "hanging")
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert finished.run().returncode == 0
    assert finished.ran == []


def test_command_that_leaves_no_artifact_fails(pipeline: Pipeline) -> None:
    result = pipeline.run(FORGET="train")
    assert result.returncode == 1
    assert "train.txt" in result.stderr
    assert pipeline.run(FORGET="nothing").returncode == 0


def test_only_runs_one_stage_even_when_done(finished: Pipeline) -> None:
    assert finished.run(ONLY="eval").returncode == 0
    assert finished.ran == ["eval"]


def test_from_leaves_earlier_stages_alone(finished: Pipeline) -> None:
    assert finished.run(FROM="tune").returncode == 0
    assert finished.ran == ["tune", "report"]


def test_unknown_stage_is_refused_with_the_names(pipeline: Pipeline) -> None:
    result = pipeline.run(ONLY="trian")
    assert result.returncode == 2
    assert "data train eval tune report" in result.stderr
    assert pipeline.ran == []


def test_dry_run_prints_commands_and_runs_none(pipeline: Pipeline) -> None:
    result = pipeline.run(DRY_RUN="1")
    assert result.returncode == 0
    assert len(result.stdout.splitlines()) == 5
    assert pipeline.ran == []
    assert not (pipeline.base / "run_state.json").exists()


def test_list_prints_the_names(pipeline: Pipeline) -> None:
    assert pipeline.run(LIST="1").stdout.split() == ["data", "train", "eval", "tune", "report"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_killed_run_continues(pipeline: Pipeline, number: int, code: int) -> None:
    process = pipeline.start(HANG="train")
    flag = pipeline.base / "hanging"
    deadline = time.monotonic() + SECONDS
    while not flag.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(timeout=SECONDS) == code
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)

    state = json.loads((pipeline.base / "run_state.json").read_text())["stages"]
    assert state["train"]["exit_code"] in (None, 143)
    assert pipeline.run().returncode == 0
    assert pipeline.log.read_text().splitlines()[0] == "train 1 --resume"


# ---- a stage that is begun before its turn ------------------------------------------------------


def test_a_stage_begun_ahead_runs_beside_the_others_and_once_more_in_its_turn(
    pipeline: Pipeline,
) -> None:
    """The early one ends only when the evaluation, which comes between, has run."""
    result = pipeline.run(AHEAD="tune", UNTIL_RAN="eval")
    assert result.returncode == 0, result.stderr
    assert sorted(pipeline.ran) == sorted(["data", "train", "eval", "tune", "tune", "report"])
    assert pipeline.ran[-2:] == ["tune", "report"]
    assert pipeline.ran.index("tune") < pipeline.ran.index("eval")
    again = pipeline.run(AHEAD="tune")
    assert pipeline.ran == []
    assert again.stdout.count("skipped") == 5


def test_what_failed_ahead_is_tried_again_and_decides_then(pipeline: Pipeline) -> None:
    once = pipeline.run(AHEAD="tune", FAIL_ONCE="tune")
    assert once.returncode == 0, once.stderr
    assert "tune: what was begun before has failed (exit code 9" in once.stdout
    always = pipeline.run(AHEAD="tune", FAIL="tune", SIZE="2")
    assert always.returncode == 7
    assert "stage tune ended with exit code 7" in always.stderr
    assert "all stages done" not in always.stdout


def test_what_a_stage_leaves_running_takes_no_line_of_the_next_log(pipeline: Pipeline) -> None:
    logs = pipeline.base / "logs"
    left = "bash -c 'sleep 9 & touch $NANOCHAT_BASE_DIR/data.txt'"
    count = "for ((i = 1; i <= 40; i++)); do echo $i; done"
    loud = f"bash -c '{count}; touch $NANOCHAT_BASE_DIR/train.txt'"
    script = pipeline.script.read_text()
    script = script.replace('bash "$STUB" data\n', f"{left}\n")
    script = script.replace('bash "$STUB" train "${SIZE:-1}" ${FREE:-}', loud)
    pipeline.script.write_text(script)
    result = pipeline.run(STAGE_LOGS=str(logs))
    assert result.returncode == 0, result.stderr
    lines = (logs / "train.log").read_text().splitlines()
    assert lines[1:] == [str(number) for number in range(1, 41)]


def is_alive(pipeline: Pipeline) -> bool:
    pid = int((pipeline.base / "hanging").read_text())
    return (
        Path(f"/proc/{pid}/cmdline").exists()
        and b"sleep" in Path(f"/proc/{pid}/cmdline").read_bytes()
    )


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_nothing_that_was_begun_ahead_outlives_the_run(pipeline: Pipeline) -> None:
    failed = pipeline.run(AHEAD="tune", HANG="tune", FAIL="report", FROM="eval", UNTIL="train")
    assert failed.returncode == 2  # FROM comes after UNTIL: nothing was begun
    process = pipeline.start(AHEAD="tune", HANG="tune")
    wait_for(pipeline.base / "hanging")
    assert is_alive(pipeline)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=SECONDS)
    assert process.returncode == 143
    assert not is_alive(pipeline)


@pytest.mark.parametrize("step", [32, pytest.param(7, marks=pytest.mark.slow)])
def test_told_to_stop_at_any_moment_it_stops_and_goes_on(tmp_path: Path, step: int) -> None:
    for at in range(1, 10_000, step):
        pipeline = Pipeline(tmp_path / str(at))
        logs = str(tmp_path / "logs") if at % 2 else ""
        process = pipeline.start(AT=str(at), AHEAD="tune", HANG="train", STAGE_LOGS=logs)
        told = Path(f"{pipeline.log}.told")
        hanging = pipeline.base / "hanging"
        while process.poll() is None and not (hanging.exists() and not told.exists()):
            time.sleep(0.01)
        if process.poll() is None:  # it came to where it hangs without being told before
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            assert at > 100
            return
        _, errors = process.communicate(timeout=SECONDS)
        assert process.returncode == 143, (at, errors)
        begun = "train" in pipeline.ran
        again = pipeline.run(AHEAD="tune", UNTIL_RAN="train")
        assert again.returncode == 0, (at, again.stderr)
        lines = pipeline.log.read_text().splitlines()
        assert "train 1 --resume" in lines or not begun, (at, lines)


@pytest.mark.parametrize(
    ("settings", "times"),
    [({"UNTIL": "train"}, 0), ({"ONLY": "tune"}, 1), ({"FROM": "tune"}, 1), ({"FROM": "eval"}, 2)],
)
def test_a_stage_is_begun_ahead_only_when_it_will_run(
    pipeline: Pipeline, settings: dict[str, str], times: int
) -> None:
    result = pipeline.run(AHEAD="tune", UNTIL_RAN="tune", **settings)
    assert result.returncode == 0, result.stderr
    assert pipeline.ran.count("tune") == times


def test_damaged_record_is_named(pipeline: Pipeline) -> None:
    pipeline.base.mkdir()
    (pipeline.base / "run_state.json").write_text("{not json")
    result = pipeline.run()
    assert result.returncode != 0
    assert "run_state.json is not valid JSON" in result.stderr
    assert pipeline.ran == []
