"""The scripts around the stages: settings, places, what each prints, no failure hidden."""

import os
import pty
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import stub_commands

REPOSITORY = Path(__file__).parents[1]
PIPELINES = ("scripts/local_cpu_train.sh", "speedrun.sh", "run1000.sh")
JOBS = ("scripts/speedrun.slurm", "scripts/resume_mid_sft.slurm")
SHELL_FILES = sorted(
    str(path.relative_to(REPOSITORY))
    for pattern in ("*.sh", "scripts/*.sh", "scripts/*.slurm", "dev/*.sh", ".ci/run")
    for path in REPOSITORY.glob(pattern)
)
SECONDS = 300  # for one command on a loaded machine
# The stages and a part of the command that only they have.
STAGES = {
    "report_reset": "report reset",
    "dataset": "prefetch",
    "tok_train": "tok_train",
    "tok_eval": "tok_eval",
    "shards": "nanochat.dataset",
    "base_train": "base_train",
    "base_loss": "base_loss",
    "base_eval": "base_eval",
    "chat_eval_base": "--source=base",
    "mid_train": "mid_train",
    "chat_eval_mid": "--source=mid",
    "chat_sft": "chat_sft",
    "chat_eval_sft": "--source=sft",
    "report": "report generate",
}

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


class Place:
    """A clone on a scratch file system, the stand-ins for the stages, and an empty home."""

    def __init__(self, folder: Path) -> None:
        self.scratch, self.root, self.home = folder, folder / "nanochat", folder / "home"
        self.log = folder / "log"
        self.home.mkdir()
        self.root.mkdir()
        for name in ("scripts", "nanochat", "tasks", "rustbpe"):
            (self.root / name).symlink_to(REPOSITORY / name)
        for name in ("speedrun.sh", "run1000.sh", "pyproject.toml", ".env.local.example"):
            shutil.copy(REPOSITORY / name, self.root)
        stubs = stub_commands.install(folder / "bin")
        tools = f"{stubs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.variables = {"HOME": str(self.home), "PATH": tools, "STUB_LOG": str(self.log)}
        self.variables |= {"USER": "someone", "SKIP_SETUP": "1", "STUB_STEPS": "0"}

    @property
    def base(self) -> Path:
        return self.scratch / "nanochat-cache"

    def run(self, line: str, **variables: str) -> "subprocess.CompletedProcess[str]":
        """A line of shell in the clone, with nothing else of the caller's environment."""
        return subprocess.run(
            ["bash", "-c", line],
            cwd=self.root,
            env=self.variables | variables,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )

    def settings(self, text: str) -> None:
        (self.root / ".env.local").write_text(text)

    def setting(self, key: str) -> str:
        return self.run(f"source scripts/cluster.sh; read_settings; setting {key}").stdout


@pytest.fixture
def place(tmp_path: Path) -> Place:
    # scripts find their folder by their own path: these must not lead out of the clone.
    place = Place(tmp_path)
    (place.root / "scripts").unlink()
    shutil.copytree(REPOSITORY / "scripts", place.root / "scripts")
    return place


# ---- shell ------------------------------------------------------------------------------------


def test_there_are_shell_files() -> None:
    assert len(SHELL_FILES) >= 15


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
def test_shellcheck_finds_nothing() -> None:
    command = ["shellcheck", "--external-sources", *SHELL_FILES]
    result = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, timeout=SECONDS
    )
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("name", SHELL_FILES)
def test_every_script_is_strict_or_sourced(name: str) -> None:
    text = (REPOSITORY / name).read_text(encoding="utf-8")
    if text.startswith("#!"):
        assert "\nset -euo pipefail\n" in text
    else:
        assert "# Sourced:" in text


# ---- the same job on different machines ---------------------------------------------------------


def sizes_in(name: str) -> list[list[str]]:
    """The variables of each set of sizes of a script, in order."""
    text = (REPOSITORY / name).read_text(encoding="utf-8")
    bodies = re.findall(r"^\w+_sizes\(\) \{\n(.*?)^\}", text, flags=re.MULTILINE | re.DOTALL)
    return [re.findall(r"^ {4}(\w+)=", body, flags=re.MULTILINE) for body in bodies]


def test_scripts_set_the_same_sizes_in_the_same_order() -> None:
    """So that diff shows what a laptop and eight GPUs do differently."""
    only_local = {"BASE_MINUTES", "TOKENS_PER_SECOND"}
    found = [sizes for name in PIPELINES for sizes in sizes_in(name)]
    assert len(found) == 4
    assert len({tuple(s for s in sizes if s not in only_local) for sizes in found}) == 1


@pytest.mark.parametrize("script", PIPELINES)
def test_every_script_has_the_same_stages(script: str) -> None:
    listed = subprocess.run(
        ["bash", script, "--list"], cwd=REPOSITORY, capture_output=True, text=True, timeout=SECONDS
    )
    assert listed.stdout.split() == list(STAGES)


@pytest.mark.parametrize(("script", "depth", "rows"), [("speedrun", 20, 32), ("run1000", 32, 8)])
def test_gpu_scripts_train_the_documented_models(
    place: Place, script: str, depth: int, rows: int
) -> None:
    lines = place.run(f"bash {script}.sh --dry-run").stdout.splitlines()
    assert len(lines) == len(STAGES)
    base_train = lines[list(STAGES).index("base_train")]
    assert base_train.startswith("torchrun --standalone --nproc_per_node=8 -m scripts.base_train ")
    for flag in (f"--depth={depth}", f"--device_batch_size={rows}", "--total_batch_size=524288"):
        assert flag in base_train.split()
    assert sum(line.startswith("torchrun") for line in lines) == 8


@pytest.mark.parametrize("gpus", [1, 2, 3, 4, 6, 8, 16])
def test_batches_divide_on_any_number_of_gpus(place: Place, gpus: int) -> None:
    lines = place.run("bash speedrun.sh --dry-run", NPROC_PER_NODE=str(gpus)).stdout.splitlines()
    base = dict(re.findall(r"--(\w+)=(\d+)", lines[list(STAGES).index("base_train")]))
    rows = int(base["total_batch_size"]) / 2048
    assert 256 <= rows < 256 + 2 * gpus
    assert rows % (int(base["device_batch_size"]) * gpus) == 0
    assert int(base["device_batch_size"]) <= 32
    sft = dict(re.findall(r"--(\w+)=(\d+)", lines[list(STAGES).index("chat_sft")]))
    per_step, per_pass = int(sft["target_examples_per_step"]), int(sft["device_batch_size"])
    assert per_step % (per_pass * gpus) == 0


def test_small_gpus_get_fewer_rows_and_more_passes(place: Place) -> None:
    line = "bash speedrun.sh --dry-run --only base_train"
    assert "--device_batch_size=16 " in place.run(line, STUB_GPU_MIB="40960").stdout
    assert "--device_batch_size=32 " in place.run(line, STUB_GPU_MIB="81559").stdout
    asked = f"{line} --device-batch-size=4"
    assert "--device_batch_size=4 " in place.run(asked, STUB_GPU_MIB="40960").stdout


def test_without_a_gpu_the_speedrun_says_so(place: Place) -> None:
    result = place.run("bash speedrun.sh --yes", STUB_GPUS="0")
    assert result.returncode == 1
    assert "nvidia-smi finds none here" in result.stderr


# ---- no failure is hidden -----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_failure_in_any_stage_is_the_exit_code(place: Place, stage: str) -> None:
    line = f"bash speedrun.sh --yes --from {stage}"
    result = place.run(line, STUB_FAIL=STAGES[stage], STUB_CODE="9")
    assert result.returncode == 9
    assert f"stage {stage} ended with exit code 9" in result.stderr
    assert "done; in" not in result.stdout


@pytest.mark.slow
def test_a_whole_run_ends_with_what_it_left(place: Place) -> None:
    result = place.run("bash speedrun.sh --yes")
    assert result.returncode == 0, result.stderr
    assert "all 14 stages are done; in" in result.stdout
    assert "chat_sft: chatsft_checkpoints/d20/step_000001/manifest.json" in result.stdout

    again = place.run("bash speedrun.sh --yes", WANDB_RUN="12", NPROC_PER_NODE="4")
    assert again.stdout.count("done before, skipped") == 14  # neither name nor number matters
    # Shards may have been removed meanwhile: they are looked at each time.
    lost = place.run("bash speedrun.sh --yes", STUB_FAIL="nanochat.dataset")
    assert lost.returncode == 7
    assert "stage shards ended with exit code 7" in lost.stderr
    assert place.run("bash speedrun.sh --yes").stdout.count("done before, skipped") == 13

    (place.home / ".cache/nanochat/base_checkpoints/d20/step_000001/manifest.json").unlink()
    only = place.run("bash speedrun.sh --yes --only chat_eval_sft")
    assert only.returncode == 0
    assert "1 stage is done" in only.stdout
    assert place.run("bash speedrun.sh --yes --until base_train").returncode == 0
    last = place.log.read_text(encoding="utf-8").splitlines()[-1]
    assert " scripts.base_train " in last


@pytest.mark.slow
@pytest.mark.parametrize(("line", "is_served"), [("run1000.sh", True), ("speedrun.sh", False)])
def test_the_large_run_ends_with_the_page_where_somebody_is_there(
    place: Place, line: str, is_served: bool
) -> None:
    """At a terminal, which presses Enter; without one only the command is printed."""
    depth = "--depth=20"  # the stand-ins' checkpoints are called so
    ours, theirs = pty.openpty()
    os.write(ours, b"\n")
    process = subprocess.run(
        ["bash", line, depth],
        cwd=place.root,
        env=place.variables,
        stdin=theirs,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert process.returncode == 0, process.stderr
    assert "python -m scripts.chat_web" in process.stdout
    assert ("scripts.chat_web" in place.log.read_text()) == is_served
    place.log.write_text("")
    assert place.run(f"bash {line} {depth}").returncode == 0
    assert "scripts.chat_web" not in place.log.read_text()


# ---- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "email=a@b.edu",
        "EMAIL=a@b.edu",
        'Email = "a@b.edu"',
        "export email='a@b.edu'",
        "email=a@b.edu  # mine",
        "email=a@b.edu\r",
    ],
)
def test_address_is_understood_in_any_spelling(place: Place, line: str) -> None:
    place.settings(f"# settings\n\n{line}\n")
    result = place.run("bash scripts/submit.sh --dry-run")
    assert "--mail-user=a@b.edu --mail-type=BEGIN,END,FAIL" in result.stdout
    assert result.stderr == ""


def test_settings_are_read_and_not_executed(place: Place) -> None:
    place.settings("scratch_root=/x/$USER/y\nmodules='a $USER'\nqos=$(touch harm)\naccount=a=b\n")
    assert place.setting("scratch_root") == "/x/someone/y"
    assert place.setting("modules") == "a $USER"
    assert place.setting("qos") == "$(touch harm)"
    assert place.setting("account") == "a=b"
    assert not (place.root / "harm").exists()


def test_misspelt_setting_is_named(place: Place) -> None:
    place.settings("partion=gpu\nnonsense\n")
    result = place.run("bash scripts/submit.sh --dry-run")
    assert "line 1: unknown setting 'partion'" in result.stderr
    assert "line 2 is not key=value" in result.stderr


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("nodes=two", "nodes is 'two'; it must be a number such as 2"),
        ("nodes=0", "nodes is '0'"),
        ("cpus_per_task=16 cores", "cpus_per_task is '16 cores'"),
        ("time=half a day", "it must be a time such as 12:00:00"),
        ("mem=lots", "it must be a size such as 256G"),
        ("email=me or you", "it must be one word"),
        ("gres=gpu: 8", "it must be one word"),
        ("scratch_root=scratch/me", "it must be a path that begins with /"),
    ],
)
def test_a_value_that_cannot_be_is_refused_with_its_line(
    place: Place, line: str, told: str
) -> None:
    place.settings(f"# mine\n{line}\nmem=none\n")
    for command in ("submit.sh --dry-run", "setup_environment.sh", "download_data.sh"):
        result = place.run(f"bash scripts/{command}")
        assert result.returncode == 1
        assert "error: .env.local, line 2: " in result.stderr
        assert told in result.stderr
        assert "line 3: mem is 'none'" in result.stderr  # all are named at once
    assert not place.log.exists()


def test_every_spelling_that_slurm_knows_is_taken(place: Place) -> None:
    known = "nodes=1-4\nmem=0\ncpus_per_task=\ngres=gpu:a100:8,tmpdisk:10\nemail=user\n"
    for time in ("90", "90:00", "12:00:00", "1-12", "1-12:30", "2-00:00:00", "UNLIMITED"):
        place.settings(f"{known}time={time}\n")
        result = place.run("bash scripts/submit.sh --dry-run")
        assert result.stderr == ""
        assert f"--time={time}" in result.stdout.split()


def test_every_setting_of_the_example_is_known(place: Place) -> None:
    text = (REPOSITORY / ".env.local.example").read_text(encoding="utf-8")
    place.settings(re.sub(r"^#(\w+=)", r"\1", text, flags=re.MULTILINE))
    result = place.run("bash scripts/submit.sh --dry-run")
    assert "--account=class-cse8990 --partition=gpu-a100 --qos=normal" in result.stdout
    assert result.stderr.splitlines() == [
        "note: no email in .env.local, so nobody is told when the job ends"  # still the example's
    ]


def test_submit_puts_options_before_the_job_and_flags_behind(place: Place) -> None:
    place.settings("partition=long\ngres=gpu:4\ntime=1:00:00\n")
    line = "bash scripts/submit.sh --dry-run --time=2:00:00 scripts/speedrun.slurm --from mid_train"
    assert place.run(line).stdout.split() == [
        *("sbatch", "--parsable", "--partition=long", "--gres=gpu:4", "--time=1:00:00"),
        *("--time=2:00:00", "scripts/speedrun.slurm", "--from", "mid_train"),
    ]
    chat = place.run("bash scripts/submit.sh --dry-run scripts/chat.slurm").stdout
    assert "--gres" not in chat


def test_submit_makes_the_folder_of_the_logs(place: Place) -> None:
    sbatch = place.scratch / "bin" / "sbatch"
    sbatch.write_text('#!/bin/sh\n[ -d logs ] && echo "42;cluster"\n')
    sbatch.chmod(0o755)
    result = place.run("bash scripts/submit.sh")
    assert "submitted as job 42" in result.stdout
    assert "tail -F logs/nanochat_speedrun_42.out" in result.stdout


def test_nothing_is_submitted_that_cannot_run(place: Place) -> None:
    sbatch = place.scratch / "bin" / "sbatch"
    sbatch.write_text("#!/bin/sh\necho 42 | tee -a submitted\n")
    sbatch.chmod(0o755)
    missing = place.run("bash scripts/submit.sh", STUB_REAL="scripts.assets")
    assert missing.returncode == 1
    assert "on a machine with internet run: python -m scripts.assets prefetch" in missing.stderr
    assert "not submitted" in missing.stderr
    job = "bash scripts/submit.sh scripts/resume_mid_sft.slurm"
    without_base = place.run(job)
    assert without_base.returncode == 1
    assert "stage tok_train, which comes before mid_train, has left no" in without_base.stderr
    assert not (place.root / "submitted").exists()
    for name in ("tokenizer/tokenizer.json", "base_checkpoints/d20/step_000001/manifest.json"):
        (place.base / name).parent.mkdir(parents=True)
        (place.base / name).write_text("{}")
    assert place.run(job).returncode == 0
    assert place.run(f"{job} --depth=12").returncode == 1  # there is no such base model
    assert (
        place.run("bash scripts/submit.sh --no-check", STUB_REAL="scripts.assets").returncode == 0
    )
    assert place.run("bash scripts/submit.sh scripts/chat.slurm").returncode == 0
    assert (place.root / "submitted").read_text().split() == ["42"] * 3


# ---- places -------------------------------------------------------------------------------------


def test_all_caches_lie_below_the_scratch_root(place: Place) -> None:
    place.settings(f"scratch_root={place.scratch}/big disk\n")
    line = "source scripts/cluster.sh; read_settings; settle_on_scratch; env"
    variables = dict(v.split("=", 1) for v in place.run(line).stdout.splitlines() if "=" in v)
    root = f"{place.scratch}/big disk"
    names = (
        "NANOCHAT_BASE_DIR NANOCHAT_VENV HF_HOME TORCH_HOME TRITON_CACHE_DIR PIP_CACHE_DIR "
        "TORCHINDUCTOR_CACHE_DIR UV_CACHE_DIR WANDB_DIR TIKTOKEN_CACHE_DIR TMPDIR XDG_CACHE_HOME "
        "CARGO_HOME RUSTUP_HOME CUDA_CACHE_PATH MPLCONFIGDIR UV_PROJECT_ENVIRONMENT"
    )
    assert [n for n in names.split() if not variables[n].startswith(root)] == []
    assert list(place.home.iterdir()) == []


def test_scratch_root_is_the_folder_beside_the_clone_unless_set(place: Place) -> None:
    line = "source scripts/cluster.sh; read_settings; settle_on_scratch; echo $NANOCHAT_BASE_DIR"
    assert place.run(line).stdout.strip() == f"{place.scratch}/nanochat-cache"
    chosen = place.run(line, SCRATCH=f"{place.scratch}/s").stdout.strip()
    assert chosen == f"{place.scratch}/s/nanochat-cache"
    home = place.run(line, SCRATCH=f"{place.home}/x")
    assert "in your home; set scratch_root" in home.stderr


def test_missing_modules_are_named_and_left_out(place: Place) -> None:
    place.settings("modules=there missing\n")
    function = 'module() { echo "$*" >>calls; [ "$*" != "load missing" ]; }; export -f module; '
    result = place.run(f"set -euo pipefail; {function} source scripts/cluster.sh; read_settings; "
                       "load_modules; echo on")  # fmt: skip
    assert result.stdout == "on\n"
    assert "module missing is not on this node" in result.stderr
    assert "load there" in (place.root / "calls").read_text()


def test_setup_works_executed_and_sourced(place: Place) -> None:
    for line in ("bash scripts/setup_environment.sh", "source scripts/setup_environment.sh"):
        result = place.run(f"{line}; echo code $? in $NANOCHAT_BASE_DIR")
        assert "next:           bash scripts/download_data.sh" in result.stdout, result.stderr
        told = result.stdout.splitlines()[-1]
        assert told.split() == ["code", "0", "in", *([str(place.base)] if "source" in line else [])]
    assert list(place.home.iterdir()) == []


def test_one_environment_for_every_way_to_install(place: Place) -> None:
    line = (
        "source scripts/cluster.sh; read_settings; settle_on_scratch; link_environment; "
        "readlink .venv; echo $UV_PROJECT_ENVIRONMENT"
    )
    assert set(place.run(line).stdout.split()) == {f"{place.scratch}/nanochat-venv"}


def test_environment_is_made_on_scratch_and_linked(place: Place) -> None:
    """venv refuses a folder that is a link, so it must be given the one that the link means."""
    making = place.scratch / "bin" / "some-python"
    making.write_text(
        '#!/bin/sh\n[ "$2" = venv ] || exit 0\n'
        'case "$(readlink "$3")" in ?*) exit 1 ;; esac\n'
        'mkdir -p "$3/bin"; touch "$3/bin/python" "$3/bin/activate"; chmod +x "$3/bin/python"\n'
    )
    making.chmod(0o755)
    line = (
        "set -euo pipefail; source scripts/cluster.sh; source scripts/venv.sh; "
        "is_installed() { true; }; command() { [ $2 != uv ] && builtin command $@; }; "
        "read_settings; settle_on_scratch; link_environment; ensure_venv gpu; readlink .venv"
    )
    result = place.run(line, PYTHON="some-python", SKIP_SETUP="0")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == f"{place.scratch}/nanochat-venv"
    assert (place.scratch / "nanochat-venv" / "bin" / "activate").exists()


def test_download_leaves_a_job_nothing_to_fetch(place: Place) -> None:
    result = place.run("bash scripts/download_data.sh")
    assert result.returncode == 0, result.stderr
    ran = [line.partition(" ")[2] for line in place.log.read_text().splitlines()]
    shards = "nanochat.dataset --data=fineweb-edu -n 240"
    assert ran.count(shards) == 2  # once beside the tokenizer's training, once to be sure
    assert [line for line in ran[:-2] if line != shards] == [
        "nanochat.report reset",
        "scripts.assets prefetch --all --data=fineweb-edu -n 8",
        "scripts.tok_train --data=fineweb-edu --max_chars=2000000000 --vocab_size=65536 "
        "--num_files=8",
        "scripts.tok_eval",
    ]
    check = "scripts.assets check --offline --all --data=fineweb-edu --tasks=public -n 240"
    assert ran[-2:] == [shards, check]
    failed = place.run("bash scripts/download_data.sh", STUB_FAIL="assets check")
    assert failed.returncode == 1
    assert "next:" not in failed.stdout


def test_shards_beyond_those_of_the_tokenizer_come_beside_its_training(place: Place) -> None:
    """Named data sets only: what is made here is made at once."""
    (place.root / "texts").mkdir()
    shards = list(STAGES).index("shards")

    def planned(line: str) -> tuple[str, str, str]:
        lines = place.run(f"bash {line} --dry-run").stdout.splitlines()
        dataset, tok_train = lines[1], lines[2]
        limit = re.findall(r"--num_files=(\d+)", tok_train)
        return dataset.split()[-1], "".join(limit), lines[shards].split()[-1]

    assert planned("speedrun.sh") == ("8", "8", "240")
    assert planned("speedrun.sh --num-shards=-1") == ("8", "8", "-1")
    assert planned("run1000.sh") == ("16", "16", "800")
    assert planned("speedrun.sh --num-shards=3") == ("3", "", "3")
    assert planned("speedrun.sh --data=texts") == ("240", "", "240")
    assert planned("speedrun.sh --data=embedded") == ("240", "", "240")


def test_training_waits_for_the_shards_and_fails_without_them(place: Place) -> None:
    shards = "nanochat.dataset --data=fineweb-edu -n 240"
    failed = place.run("bash speedrun.sh --yes --until base_train", STUB_FAIL=shards)
    assert failed.returncode == 7
    assert "shards: what was begun before has failed (exit code 7" in failed.stdout
    assert "line 40 of the error" in failed.stdout
    assert "stage shards ended with exit code 7" in failed.stderr
    assert "scripts.base_train" not in place.log.read_text()
    mended = place.run("bash speedrun.sh --yes --until base_train")
    assert mended.returncode == 0, mended.stderr
    # What was done before the failure is not done again.
    ran = [line.split()[1] for line in place.log.read_text().splitlines()]
    assert ran.count("scripts.tok_train") == 1
    assert ran[-2:] == ["nanochat.dataset", "scripts.base_train"]


@pytest.mark.parametrize(
    ("tasks", "optional"), [("auto", True), ("embedded", True), ("public", False)]
)
def test_the_check_asks_for_what_the_stages_will_read(
    place: Place, tasks: str, optional: bool
) -> None:
    (place.root / "texts").mkdir()
    flags = f"--data=texts --tasks={tasks}"
    checked = place.run(f"bash speedrun.sh --check {flags}")
    assert checked.returncode == 0, checked.stderr
    asked = place.log.read_text().splitlines()[-1].split()
    assert f"--tasks={tasks}" in asked
    assert ("--allow-missing=eval-bundle" in asked) == optional
    planned = place.run(f"bash speedrun.sh --dry-run --only base_eval {flags}").stdout.split()
    assert ("--eval=sample" in planned) == optional
    training = place.run(f"bash speedrun.sh --dry-run --only base_train {flags}").stdout.split()
    assert ("--core_metric_every=-1" in training) == optional


@pytest.mark.parametrize("flag", ["--sft-examples-per-step=0", "--sft-device-batch-size=0"])
def test_a_size_of_nothing_is_refused_in_one_line(place: Place, flag: str) -> None:
    result = place.run(f"bash speedrun.sh --dry-run {flag}")
    assert result.returncode == 2
    assert "it must be at least 1" in result.stderr


def test_stages_in_the_wrong_order_are_refused(place: Place) -> None:
    result = place.run("bash speedrun.sh --dry-run --from mid_train --until tok_train")
    assert result.returncode == 2
    assert "--from mid_train comes after --until tok_train" in result.stderr


@pytest.mark.parametrize("flag", ["--tasks=pubic", "--sft-packing=tight"])
def test_a_misspelt_choice_is_refused_before_anything_runs(place: Place, flag: str) -> None:
    result = place.run(f"bash speedrun.sh --dry-run {flag}")
    assert result.returncode == 2
    assert flag.partition("=")[2] in result.stderr


def test_a_rise_of_the_loss_can_be_let_pass_by_the_main_job(place: Place) -> None:
    lines = place.run("bash speedrun.sh --dry-run --spike-limit=0").stdout.splitlines()
    told = [name for name, line in zip(STAGES, lines, strict=True) if "--spike_limit=0" in line]
    assert told == ["base_train", "mid_train", "chat_sft"]


# ---- jobs ---------------------------------------------------------------------------------------


def test_the_page_of_a_job_is_reached_through_the_login_node(place: Place) -> None:
    variables = {"SLURM_JOB_ID": "1042", "SLURM_SUBMIT_HOST": "login2"}
    result = place.run("bash scripts/chat.slurm", **variables)
    assert result.returncode == 0, result.stderr
    line = f"  ssh -L 8000:localhost:8042 -J someone@login2 someone@{socket.gethostname()}"
    assert line in result.stdout.splitlines()
    assert place.log.read_text().splitlines()[-1].endswith("scripts.chat_web --port=8042")


@pytest.mark.parametrize(
    ("flags", "port"),
    [
        ("--port=8123", 8123),
        ("--port 8123", 8123),
        ("-p 8123 --temperature 0.5", 8123),
        ("-p=8123", 8123),
        ("--port=1 --port 8123", 8123),
        ("--temperature 0.5", 8042),
    ],
)
def test_the_tunnel_of_a_page_ends_at_the_port_that_was_asked_for(
    place: Place, flags: str, port: int
) -> None:
    variables = {"SLURM_JOB_ID": "1042", "SLURM_SUBMIT_HOST": "login2"}
    result = place.run(f"bash scripts/chat.slurm {flags}", **variables)
    assert result.returncode == 0, result.stderr
    assert f"  ssh -L 8000:localhost:{port} -J " in result.stdout
    command = place.log.read_text().splitlines()[-1]
    assert command.endswith(f"scripts.chat_web --port={port} {flags}")


@pytest.mark.parametrize("script", [*JOBS, "scripts/chat.slurm"])
def test_job_headers(script: str) -> None:
    text = (REPOSITORY / script).read_text(encoding="utf-8")
    options = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2]
        for line in text.splitlines()
        if line.startswith("#SBATCH --")
    )
    assert options["output"].startswith("logs/nanochat_")
    assert options["output"].endswith("_%j.out")
    assert "mail-user" not in options
    if script in JOBS:
        assert options["signal"] == "B:USR1@300"
        assert options["open-mode"] == "append"
        assert "requeue" in options


@pytest.mark.parametrize("script", JOBS)
def test_jobs_can_be_looked_at_without_slurm(place: Place, script: str) -> None:
    lines = place.run(f"bash {script} --dry-run").stdout.splitlines()
    base = [line for line in lines if "mid_train" in line]
    assert len(base) == 1
    assert base[0].startswith("srun --nodes=1 --ntasks=8 --ntasks-per-node=8 --cpus-per-task=2 ")
    refused = place.run(f"bash {script}")
    assert refused.returncode == 2
    assert "submit it: bash scripts/submit.sh" in refused.stderr
    assert place.run(f"bash {script} --list").stdout.split() == list(STAGES)


def test_gpu_check_passes_where_there_is_none() -> None:
    command = [sys.executable, "scripts/test_gpu.py"]
    result = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, timeout=SECONDS
    )
    assert result.returncode == 0, result.stdout
    assert len(re.findall(r"(skipped|passed)$", result.stdout, flags=re.MULTILINE)) == 4
