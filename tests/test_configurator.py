"""The command line: what is forgiven, what is refused and how."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest
import tyro

from nanochat import configurator
from nanochat.common import UserError
from nanochat.configurator import UsageError, parse
from tests import small_disks


@dataclass(frozen=True)
class Nested:
    """Flags that several commands share."""

    matrix_lr: float = 0.02
    """Learning rate of matrices."""


@dataclass(frozen=True)
class Config:
    """Flags of a command."""

    run: str = "dummy"
    """Run name."""
    num_iterations: int = -1
    """Steps."""
    model_tag: str | None = None
    """Tag."""
    step: int | None = None
    """Step."""
    weight_decay: float = 0.1
    """Decay."""
    resume: bool = False
    """Continue."""
    masked: bool = True
    """Mask."""
    packing: Literal["stream", "best-fit"] = "stream"
    """Packing."""
    source: Annotated[str, tyro.conf.arg(aliases=["-i"])] = "sft"
    """Source."""
    sizes: tuple[int, ...] = (1, 8)
    """Batch sizes."""
    optimizer: Nested = field(default_factory=Nested)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--num_iterations=50"],
        ["--num-iterations=50"],
        ["--num_iterations", "50"],
        ["--num-iterations", "50"],
        ["--", "--num-iterations=50"],
        ["--num_iterations=5e1"],
        ["--num_iterations=50.0"],
        ["--num_iterations=7", "--num-iterations=50"],
    ],
)
def test_spellings_of_one_flag_mean_the_same(arguments: list[str]) -> None:
    assert parse(Config, arguments) == Config(num_iterations=50)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], Config()),
        (["--weight-decay=1"], Config(weight_decay=1.0)),
        (["--weight-decay", "1e-3"], Config(weight_decay=0.001)),
        (["--num-iterations", "-1"], Config(num_iterations=-1)),
        (["--run=12"], Config(run="12")),
        (["--run", "1e3"], Config(run="1e3")),
        (["--run=a=b"], Config(run="a=b")),
        (["--run=--odd"], Config(run="--odd")),
        (["--run="], Config(run="")),
        (["--run", "-5 + 3"], Config(run="-5 + 3")),
        (["--model-tag=None"], Config(model_tag=None)),
        (["--model_tag", "d20"], Config(model_tag="d20")),
        (["--step=100"], Config(step=100)),
        (["-i", "mid"], Config(source="mid")),
        (["-i=mid"], Config(source="mid")),
        (["--packing", "best-fit"], Config(packing="best-fit")),
        (["--sizes", "2", "4", "--run", "x"], Config(sizes=(2, 4), run="x")),
        (["--matrix_lr=1"], Config(optimizer=Nested(matrix_lr=1.0))),
    ],
)
def test_values(arguments: list[str], expected: Config) -> None:
    assert parse(Config, arguments) == expected


def test_none_is_a_name_where_none_is_not_possible() -> None:
    assert parse(Config, ["--run=None"]).run == "None"


@pytest.mark.parametrize(
    ("arguments", "resume", "masked"),
    [
        (["--resume"], True, True),
        (["--resume=1", "--masked=0"], True, False),
        (["--resume=True", "--masked=False"], True, False),
        (["--resume", "true", "--masked", "false"], True, False),
        (["--no-masked"], False, False),
        (["--no_masked"], False, False),
        (["--resume", "--no-resume"], False, True),
        (["--resume", "--run", "x"], True, True),
    ],
)
def test_booleans(arguments: list[str], resume: bool, masked: bool) -> None:
    config = parse(Config, arguments)
    assert (config.resume, config.masked) == (resume, masked)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_iteration=5"], "unknown flag --num_iteration; did you mean --num-iterations?"),
        (["--zzz"], "unknown flag --zzz; none has a similar name"),
        (["-q"], "unknown flag -q"),
        (["--no-run"], "unknown flag --no-run"),
        (["--num-iterations=1.5"], "--num-iterations needs a whole number, got '1.5'"),
        (["--num-iterations=inf"], "--num-iterations needs a whole number, got 'inf'"),
        (["--step=many"], "--step needs a whole number, got 'many'"),
        (["--weight-decay=x"], "--weight-decay needs a number, got 'x'"),
        (["--resume=maybe"], "--resume is on or off, got 'maybe'"),
        (["--packing=tight"], "--packing is one of stream, best-fit, got 'tight'"),
        (["--run"], "--run needs a value"),
        (["--run", "--resume"], "--run needs a value"),
        (["--run", "--resmue"], "--run needs a value"),
        (["missing.py"], "'missing.py' is neither a flag nor a config file"),
    ],
)
def test_wrong_lines_are_refused_in_one_sentence(arguments: list[str], message: str) -> None:
    with pytest.raises(UsageError) as raised:
        parse(Config, arguments)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_config_file_comes_before_the_flags(tmp_path: Path) -> None:
    path = tmp_path / "small.py"
    path.write_text(
        "# a comment\n"
        "num_iterations = 20\nrun = 'file'\nresume = True\nmatrix_lr = 1\nstep = None\n"
    )
    config = parse(Config, ["--run=flag", str(path)])
    assert config == Config(
        num_iterations=20, run="flag", resume=True, optimizer=Nested(matrix_lr=1.0)
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_iteration = 1", "line 1: unknown flag --num_iteration; did you mean"),
        ("import os", "only `key = literal` lines"),
        ("run = open('x').read()", "the value of run is not a literal"),
        ("run =", "cannot be read"),
    ],
)
def test_config_file_is_read_not_executed(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.py"
    path.write_text(text + "\n")
    with pytest.raises(UsageError, match=message):
        parse(Config, [str(path)])


@dataclass(frozen=True)
class WithPreset(Config):
    """Flags of a command with a flag that stands for others."""

    PRESETS: ClassVar[configurator.Presets] = {
        "size": {"large": {"num_iterations": 9, "resume": True, "model_tag": "big"}}
    }

    size: Literal["small", "large"] = "small"
    """Size."""


def test_a_preset_comes_before_the_file_and_the_flags(tmp_path: Path) -> None:
    (tmp_path / "config.py").write_text('size = "large"\nmodel_tag = "mine"\n')
    config = parse(WithPreset, [str(tmp_path / "config.py"), "--no-resume"])
    assert (config.num_iterations, config.model_tag, config.resume) == (9, "mine", False)
    assert parse(WithPreset, ["--size=small"]) == WithPreset()
    assert parse(WithPreset, ["--size", "large"]).resume


def test_positional_fields_are_not_taken_for_config_files() -> None:
    # Names of its own: typing keeps one order for equal literals, whoever made the first.
    @dataclass(frozen=True)
    class Action:
        action: tyro.conf.Positional[Literal["open", "shut"]] = "shut"
        """What to do."""
        force: bool = False
        """Do not ask."""

    assert parse(Action, []).action == "shut"
    assert parse(Action, ["open", "--force"]) == Action("open", force=True)
    with pytest.raises(UsageError, match=r"^action is one of open, shut, got 'rest'$"):
        parse(Action, ["rest"])


def test_help_shows_the_docstrings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        parse(Config, ["--help"])
    assert raised.value.code == 0
    output = capsys.readouterr().out
    assert "Run name." in output
    assert "--num-iterations" in output


SCRIPT = """
import errno
import sys
from dataclasses import dataclass
from nanochat import configurator
from nanochat.common import UserError

@dataclass(frozen=True)
class Config:
    what: str = ""
    "What to do."

def main(config):
    if config.what == "user":
        raise UserError("the value 3 is odd; use an even one")
    if config.what == "disk":
        raise OSError(errno.ENOSPC, "No space left on device", "model.safetensors")
    if config.what == "defect":
        raise KeyError("lost")
    if config.what == "code":
        return 85
    if config.what == "read" and not sys.stdin.read():
        raise UserError("nothing was read")
    if config.what == "interrupt":
        raise KeyboardInterrupt
    if config.what in ("much", "little"):
        print("line\\n" * (100_000 if config.what == "much" else 1))
    if config.what == "other disk":
        print("said")
        raise OSError(errno.ENOSPC, "No space left on device")
    if config.what == "other pipe":
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

configurator.run(main, Config)
"""


def run_script(
    folder: Path, *arguments: str, stdout: Any = subprocess.PIPE, **environment: str
) -> "subprocess.CompletedProcess[str]":
    path = folder / "script.py"
    path.write_text(SCRIPT)
    return subprocess.run(
        [sys.executable, str(path), *arguments],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        env={"PYTHONPATH": str(Path(configurator.__file__).parents[1]), **environment},
    )


@pytest.mark.parametrize(
    ("arguments", "code", "errors"),
    [
        ([], 0, ""),
        (["--what=code"], 85, ""),
        (["--what=user"], 1, "error: the value 3 is odd; use an even one\n"),
        (["--what=interrupt"], 130, "interrupted\n"),
        (
            ["--waht=x"],
            2,
            "error: unknown flag --waht; did you mean --what? (see script.py --help)\n",
        ),
    ],
)
def test_exit_codes_and_messages(
    tmp_path: Path, arguments: list[str], code: int, errors: str
) -> None:
    result = run_script(tmp_path, *arguments)
    assert (result.returncode, result.stderr) == (code, errors)


def test_full_disk_is_one_line_that_names_the_file(tmp_path: Path) -> None:
    result = run_script(tmp_path, "--what=disk")
    assert result.returncode == 1
    assert result.stderr.startswith(
        "error: No space left on device while writing model.safetensors"
    )
    assert len(result.stderr.splitlines()) == 1


def test_ctrl_c_while_a_command_is_imported_is_one_line(tmp_path: Path) -> None:
    # Stands for the seconds that the real one takes.
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    repository = Path(configurator.__file__).parents[1]
    command = [sys.executable, "-m", "scripts.chat_cli"]

    def run(ignores: bool) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            command,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            env={"PYTHONPATH": f"{tmp_path}:{repository}"},
            preexec_fn=lambda: signal.signal(
                signal.SIGINT, signal.SIG_IGN if ignores else signal.default_int_handler
            ),
        )

    result = run(ignores=False)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "interrupted\n")
    assert "interrupted" not in run(ignores=True).stderr


def test_ctrl_c_of_a_running_command_is_its_own_affair() -> None:
    program = """
import signal, sys
sys.argv[:] = ["-m"]
import scripts
from dataclasses import make_dataclass
from nanochat import configurator

def main(config):
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        return 7

sys.argv[:] = ["x"]
configurator.run(main, make_dataclass("Config", []))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (7, "")


@pytest.mark.parametrize("amount", ["much", "little"])
def test_a_reader_that_has_gone_ends_the_command_quietly(tmp_path: Path, amount: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as stdout:
        result = run_script(tmp_path, f"--what={amount}", stdout=stdout)
    assert (result.returncode, result.stderr) == (141, "")


@pytest.mark.parametrize("amount", ["much", "little"])
@pytest.mark.parametrize("environment", [{}, {"PYTHONUNBUFFERED": "1"}])
def test_output_that_cannot_be_written_is_named(
    tmp_path: Path, amount: str, environment: dict[str, str]
) -> None:
    with open("/dev/full", "wb") as stdout:
        result = run_script(tmp_path, f"--what={amount}", stdout=stdout, **environment)
    assert (result.returncode, result.stderr) == (
        1,
        "error: standard output cannot be written (No space left on device); "
        "send it somewhere else\n",
    )


@pytest.mark.parametrize("amount", ["much", "little"])
def test_a_full_disk_below_the_output_is_named(tmp_path: Path, amount: str) -> None:
    with small_disks.small_disk(tmp_path / "small", "64k") as folder:
        with suppress(OSError), (folder / "filler").open("wb", buffering=0) as filler:
            filler.write(bytes((32 if amount == "much" else 64) << 10))
        with (folder / "output").open("wb") as stdout:
            result = run_script(tmp_path, f"--what={amount}", stdout=stdout)
    assert (result.returncode, result.stderr) == (
        1,
        "error: standard output cannot be written (No space left on device); "
        "send it somewhere else\n",
    )


def test_nothing_is_printed_to_find_out_whose_error_it_is(tmp_path: Path) -> None:
    result = run_script(tmp_path, "--what=other disk")
    assert (result.returncode, result.stdout) == (1, "said\n")
    assert result.stderr.startswith("error: No space left on device; free space")


@pytest.mark.parametrize(
    ("closed", "what", "code", "errors"),
    [
        (">&-", "little", 1, "error: standard output cannot be written"),
        (">&-", "code", 85, ""),
        ("<&-", "read", 1, "error: nothing was read"),
        ("2>&-", "user", 1, ""),
        ("<&- >&- 2>&-", "little", 1, ""),
    ],
)
def test_standard_streams_may_be_closed(
    tmp_path: Path, closed: str, what: str, code: int, errors: str
) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    command = f"exec {sys.executable} {tmp_path}/script.py --what={what} {closed}"
    result = subprocess.run(
        ["sh", "-c", command],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PYTHONPATH": str(Path(configurator.__file__).parents[1])},
    )
    assert (result.returncode, result.stdout) == (code, "")
    assert result.stderr.startswith(errors)
    assert result.stderr.count("\n") == bool(errors)


def test_a_pipe_that_is_not_the_output_keeps_its_traceback(tmp_path: Path) -> None:
    result = run_script(tmp_path, "--what=other pipe")
    assert result.returncode == 1
    assert "BrokenPipeError" in result.stderr


def test_defect_keeps_its_traceback(tmp_path: Path) -> None:
    result = run_script(tmp_path, "--what=defect")
    assert result.returncode == 1
    assert "Traceback" in result.stderr


def test_usage_error_is_a_user_error() -> None:
    assert issubclass(UsageError, UserError)


def test_what_follows_a_bare_double_dash_is_kept_for_another_command() -> None:
    @dataclass(frozen=True)
    class Starter:
        """A command that starts others."""

        name: str = "first"
        """Name."""
        others: configurator.Rest = ()

    config = parse(Starter, ["--name=second", "--", "--name=third", "-x", "--", "--help"])
    assert config == Starter("second", ("--name=third", "-x", "--", "--help"))
    assert parse(Starter, ["--name=second", "--"]) == parse(Starter, ["--name=second"])
    with pytest.raises(UsageError, match="unknown flag --others"):
        parse(Starter, ["--others=x"])
