"""Every command line of the documents a user may hold in hand does what it says, or no harm.

The lines run as they stand, in a clone whose programs are stand-ins (tests/stub_commands.py); the
flags that reach a module are then parsed by the real one. That the modules work is tested
elsewhere.
"""

import importlib
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import stub_commands

from nanochat import configurator

REPOSITORY = Path(__file__).parents[1]
SECONDS = 300
TORCHRUN = "torchrun --standalone --nproc_per_node=8 -m"
WRITTEN_ABOUT = """
README.md LOCAL_CPU_TRAINING.md LOCAL_CPU_QUICKSTART.md PTOLEMY_SETUP.md CHANGELOG.md
scripts/local_cpu_train.sh scripts/tok_train.py scripts/tok_eval.py scripts/base_train.py
scripts/mid_train.py scripts/chat_sft.py scripts/base_eval.py scripts/chat_eval.py
scripts/base_loss.py scripts/chat_cli.py scripts/chat_web.py nanochat/tokenizer.py nanochat/gpt.py
nanochat/dataloader.py nanochat/adamw.py nanochat/muon.py nanochat/core_eval.py
nanochat/loss_eval.py nanochat/engine.py nanochat/report.py nanochat/ui.html rustbpe/src/lib.rs
tasks/smoltalk.py tasks/customjson.py tasks/common.py tasks/arc.py tasks/gsm8k.py
tasks/humaneval.py tasks/mmlu.py
""".split()
# The line, and the modules that it ends up running (None: as many as the whole job has).
LINES: list[tuple[str, int | None]] = [
    *((f"cat {name}", 0) for name in WRITTEN_ABOUT),
    ('grep -r "report.append" scripts/', 0),
    ('export PATH="$HOME/.local/bin:$PATH"', 0),
    ("bash scripts/local_cpu_train.sh </dev/null", None),
    ("bash speedrun.sh", None),
    ("bash run1000.sh", None),
    ("bash dev/runcpu.sh", None),
    ("screen -S training bash speedrun.sh", None),
    ("WANDB_RUN=your_name bash speedrun.sh", None),
    (f"{TORCHRUN} scripts.base_train", 1),
    ("python -m scripts.chat_cli", 1),
    ('python -m scripts.chat_cli -p "Tell me a joke"', 1),
    ('python -m scripts.chat_cli -p "What is 15 + 27?" --temperature 0.5', 1),
    ('python -m scripts.chat_cli -p "Write a haiku" --max-new-tokens 256', 1),
    ("python -m scripts.chat_web", 1),
    ("uv run -m nanochat.dataset -n 8", 1),
    ("uv run -m scripts.tok_train --max_chars=2000000000", 1),
    ("uv run -m scripts.tok_eval", 1),
    ("uv run -m scripts.base_train --depth=20", 1),
    (f"uv run {TORCHRUN} scripts.base_train -- --depth=20", 1),
    (f"uv run {TORCHRUN} scripts.base_eval", 1),
    (f"uv run {TORCHRUN} scripts.mid_train", 1),
    (f"uv run {TORCHRUN} scripts.chat_eval -- -i mid", 1),
    (f"uv run {TORCHRUN} scripts.chat_sft", 1),
    (f"uv run {TORCHRUN} scripts.chat_eval -- -i sft", 1),
    ("uv run -m scripts.chat_cli", 1),
    ("uv run -m scripts.chat_web", 1),
    ("cp .env.local.example .env.local", 0),
    ("bash scripts/setup_environment.sh && pip install uv && uv sync --extra gpu", 0),
    ("bash scripts/download_data.sh", 7),
    ("mkdir -p logs && sbatch scripts/speedrun.slurm", None),
    ("squeue -u $USER", 0),
    ("srun --account=class-cse8990 --partition=gpu-a100 --gres=gpu:1 --mem=32G --time=1:00:00 "
     "--pty bash", 0),
    ('python -m scripts.chat_cli -p "Explain how transformers work"', 1),
    ("python scripts/test_gpu.py", 0),
]  # fmt: skip
PROGRAMS = {
    "uv": '[ "$1" = run ] || exit 0; shift; [ "$1" != -m ] || exec python "$@"; exec "$@"',
    "screen": 'shift 2; exec "$@"',
    "sbatch": 'LAUNCHER=srun DRY_RUN=1 bash "$1" --dry-run',  # a job, seen from outside
    "srun": 'while [[ "$1" = -* ]]; do shift; done; exec "$@"',
    "squeue": "echo JOBID",
    "pip": "exit 0",
}

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scratch") / "nanochat"
    names = subprocess.run(
        ["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    ).stdout.split()
    if not names:
        pytest.skip("not a git clone")
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if (REPOSITORY / name).is_file():
            (root / name).symlink_to(REPOSITORY / name)
    # Scripts look for their folder by their own path, which must not lead out of the clone.
    for name in ("speedrun.sh", "run1000.sh", "dev/runcpu.sh"):
        (root / name).unlink()
        shutil.copy(REPOSITORY / name, root / name)
    shutil.rmtree(root / "scripts")
    shutil.copytree(REPOSITORY / "scripts", root / "scripts")
    return root


def run(
    line: str, clone: Path, folder: Path
) -> tuple["subprocess.CompletedProcess[str]", list[list[str]]]:
    """What came of a line, and the modules with their flags that it ran or would run."""
    stubs = stub_commands.install(folder / "bin")
    for name, body in PROGRAMS.items():
        (stubs / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (stubs / name).chmod(0o755)
    (folder / "home").mkdir()
    variables = {"HOME": str(folder / "home"), "USER": "someone", "STUB_STEPS": "0"}
    variables |= {"PATH": f"{stubs}:/usr/bin:/bin", "STUB_LOG": str(folder / "log")}
    variables |= {"SKIP_SETUP": "1", "SCRATCH": str(folder)} | (
        {} if "download" in line else {"DRY_RUN": "1"}
    )
    result = subprocess.run(
        ["bash", "-c", line],
        cwd=clone,
        env=variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    log = folder / "log"
    ran = log.read_text().splitlines() if log.exists() else []
    # What a dry run prints counts as run; a page that is shown may contain anything.
    launchers = ("python -m ", "torchrun ", "srun ")
    shown = [] if line.startswith("cat ") else result.stdout.splitlines()
    commands = ran + [text for text in shown if text.startswith(launchers)]
    split = [shlex.split(command) for command in commands]
    return result, [words[_module_at(words) :] for words in split]


def _module_at(words: list[str]) -> int:
    return next(i for i, w in enumerate(words) if w.startswith(("scripts.", "nanochat.")))


@pytest.mark.parametrize(("line", "count"), LINES)
def test_line_does_what_it_says(line: str, count: int | None, clone: Path, tmp_path: Path) -> None:
    result, modules = run(line, clone, tmp_path)
    assert result.returncode == 0, result.stderr
    assert len(modules) == (14 if count is None else count), result.stdout
    for module, *flags in modules:
        # torchrun takes the bare -- away; this stand-in, like uv's, leaves it where it is.
        assert configurator.parse(importlib.import_module(module).Config, flags) is not None


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("scripts/local_cpu_train.sh", "speedrun.sh"),
        ("scripts/local_cpu_train.sh", "dev/runcpu.sh"),
        ("scripts/mid_train.py", "scripts/chat_sft.py"),
    ],
)
def test_files_that_are_to_be_compared_differ(left: str, right: str) -> None:
    result = subprocess.run(
        ["diff", left, right], cwd=REPOSITORY, capture_output=True, text=True, timeout=SECONDS
    )
    assert result.returncode == 1
    assert len(result.stdout.splitlines()) < 250
