"""The main job's command line; what its stages do is tested with the stages."""

import importlib
import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from nanochat import configurator

REPOSITORY = Path(__file__).parents[1]
SCRIPT = REPOSITORY / "scripts" / "local_cpu_train.sh"
STAGES = (
    "report_reset dataset tok_train tok_eval shards base_train base_loss base_eval chat_eval_base "
    "mid_train chat_eval_mid chat_sft chat_eval_sft report"
).split()

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def run(
    *arguments: str, script: Path = SCRIPT, cwd: Path = REPOSITORY, **variables: str
) -> "subprocess.CompletedProcess[str]":
    environment = {k: v for k, v in os.environ.items() if k != "WANDB_RUN"} | variables
    return subprocess.run(
        ["bash", str(script), *arguments],
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


def commands(*arguments: str, **options: Any) -> list[list[str]]:
    """The commands a dry run prints, as argument lists behind `python -m`."""
    result = run("--dry-run", *arguments, **options)
    assert result.returncode == 0, result.stderr
    lines = [shlex.split(line) for line in result.stdout.splitlines()]
    assert all(line[:2] == ["python", "-m"] for line in lines)
    return [line[2:] for line in lines]


def flags_of(module: str, *arguments: str) -> dict[str, str]:
    """The flags that the first command of `module` is given."""
    command = next(line for line in commands(*arguments) if line[0] == module)
    return dict(flag.removeprefix("--").split("=", 1) for flag in command[1:])


def test_stages_are_listed_in_order() -> None:
    assert run("--list").stdout.split() == STAGES


@pytest.mark.parametrize("profile", [[], ["--full"]])
@pytest.mark.parametrize("index", range(len(STAGES)), ids=STAGES)
def test_every_command_is_understood_by_its_script(index: int, profile: list[str]) -> None:
    module, *arguments = commands(*profile)[index]
    config_type = importlib.import_module(module).Config
    assert configurator.parse(config_type, arguments) is not None


def test_reinforcement_learning_is_added_when_a_flag_asks_for_it() -> None:
    added = ["chat_rl", "chat_eval_rl"]
    assert run("--list", "--rl_iterations=60").stdout.split() == [*STAGES[:-1], *added, STAGES[-1]]
    flags = flags_of("scripts.chat_rl", "--rl_iterations=60")
    assert flags["num_iterations"] == "60"
    config_type = importlib.import_module("scripts.chat_rl").Config
    arguments = [f"--{name}={value}" for name, value in flags.items()]
    assert configurator.parse(config_type, arguments) is not None


def test_all_training_multiplies_in_8_bits_when_a_flag_asks_for_it() -> None:
    trained = ("base_train", "mid_train", "chat_sft", "chat_rl")
    for flag, expected in (("--int8=1", trained), ("--int8=0", ())):
        lines = commands(flag, "--rl_iterations=60")
        found = [line for line in lines if any(part.startswith("--int8") for part in line)]
        assert tuple(line[0].removeprefix("scripts.") for line in found) == expected
    refused = run("--dry-run", "--int8=1", script=REPOSITORY / "speedrun.sh")
    assert refused.returncode == 2
    assert "--int8 is for CPUs" in refused.stderr
    for module, *arguments in commands("--int8=1"):
        config = configurator.parse(importlib.import_module(module).Config, arguments)
        assert config is not None
        assert getattr(config, "int8", True)


@pytest.mark.parametrize("profile", [[], ["--full"]])
@pytest.mark.parametrize(
    "experiment",
    [
        *("--depth=2", "--depth=4", "--depth=6"),
        *("--max_seq_len=512", "--max_seq_len=1024", "--max_seq_len=2048"),
        *("--num_iterations=20", "--num_iterations=50", "--num_iterations=100"),
        *("--total_batch_size=512", "--total_batch_size=1024", "--total_batch_size=2048"),
    ],
)
def test_documented_experiments_divide_evenly(experiment: str, profile: list[str]) -> None:
    name, value = experiment.removeprefix("--").split("=")
    flags = flags_of("scripts.base_train", *profile, experiment)
    batch, rows, length = (
        int(flags[key]) for key in ("total_batch_size", "device_batch_size", "max_seq_len")
    )
    assert batch % (rows * length) == 0
    if name != "total_batch_size":
        assert flags[name] == value
    else:
        assert int(value) <= batch < int(value) + length


def test_a_batch_that_does_not_divide_is_rounded_up_with_a_notice() -> None:
    result = run("--dry-run", "--max-seq-len=1024", "--total-batch-size=512")
    assert "a step of 512 tokens is not a whole number of passes" in result.stderr
    assert "using 1024" in result.stderr


def test_both_flag_styles_set_a_size() -> None:
    assert commands("--max-seq-len", "256") == commands("--max_seq_len=256")
    assert flags_of("scripts.base_train", "--max-seq-len", "256")["max_seq_len"] == "256"


def test_the_sizes_at_the_top_can_be_edited(tmp_path: Path) -> None:
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    for path in SCRIPT.parent.glob("*.sh"):
        shutil.copy(path, scripts)
    edited = scripts / SCRIPT.name
    text = edited.read_text()
    assert "    DEPTH=4 " in text
    edited.write_text(text.replace("    DEPTH=4 ", "    DEPTH=6 "))
    base_train = next(
        line for line in commands(script=edited, cwd=tmp_path) if line[0] == "scripts.base_train"
    )
    assert "--depth=6" in base_train


def test_data_folder_is_found_from_where_the_user_stands(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (line,) = commands("--data=texts", "--only=dataset", cwd=tmp_path)
    assert f"--data={tmp_path / 'texts'}" in line


def test_core_is_measured_where_its_tasks_are(tmp_path: Path) -> None:
    def base_eval(*arguments: str) -> list[str]:
        line, *_ = commands("--only=base_eval", *arguments, NANOCHAT_BASE_DIR=str(tmp_path))
        return line

    assert "--eval=core,sample" in base_eval()
    assert "--eval=sample" in base_eval("--data=climbmix")
    (tmp_path / "eval_bundle").mkdir()
    (tmp_path / "eval_bundle" / "core.yaml").write_text("icl_tasks: []\n")
    assert "--eval=core,sample" in base_eval("--data=climbmix")


def test_run_name_comes_from_the_environment() -> None:
    assert flags_of("scripts.base_train")["run"] == "dummy"
    line = commands("--only=base_train", WANDB_RUN="12")[0]
    assert "--run=12" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dpeth=3"], "unknown flag --dpeth"),
        (["--depth"], "--depth needs a value"),
        (["--depth="], "--depth needs a value"),
        (["--depth=x"], "--depth needs a whole number, got 'x'"),
        (["--depth=0"], "DEPTH is 0"),
        (["fast"], "unknown argument 'fast'"),
        (["--only=trian", "--dry-run"], "unknown stage 'trian'"),
        (["--from=trian", "--yes"], "unknown stage 'trian'"),
    ],
)
def test_wrong_lines_are_refused(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_help_names_the_sizes() -> None:
    result = run("--help")
    assert result.returncode == 0
    assert "max_seq_len" in result.stdout


def test_runcpu_is_the_same_job() -> None:
    assert commands(script=REPOSITORY / "dev" / "runcpu.sh") == commands()
