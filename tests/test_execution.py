"""The sandbox: right programs pass, wrong ones fail, hostile ones are contained."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks import bench_sandbox
from nanochat import execution
from nanochat.common import UserError
from nanochat.execution import ExecutionResult, check_program, execute_code, sandbox_problem
from nanochat.sandbox import supervisor, wire
from tests.kernel_features import landlock_version

REPOSITORY = Path(__file__).parents[1]
HUMANEVAL = REPOSITORY.parent / "shared/data/tasks/humaneval/HumanEval.jsonl.gz"
SYSTEM_PYTHON = Path("/usr/bin/python3")
pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="the sandbox is made of Linux system calls"
)
MEMORY = 256 << 20


def judge(program: str, tests: str = "assert f(3) == 9", **named: object) -> ExecutionResult:
    return check_program(program, tests, functions=["f"], **named)  # type: ignore[arg-type]


# ---- right and wrong -----------------------------------------------------------------------------


def test_a_right_program_passes_and_a_wrong_one_fails_with_the_line_that_did_not_hold() -> None:
    assert judge("def f(x): return x * x").error is None
    wrong = judge("def f(x): return x", "x = 3\nassert f(x) == 9")
    assert not wrong.success
    assert wrong.error == "AssertionError (line 2 of the tests: assert f(x) == 9)"


def test_a_program_that_ends_is_a_success_and_its_output_is_kept() -> None:
    result = execute_code("import sys; print('out'); print('err', file=sys.stderr)")
    assert (result.success, result.stdout, result.stderr) == (True, "out\n", "err\n")


@pytest.mark.parametrize(
    ("program", "error"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("raise SystemExit(0)", "SystemExit: 0"),
        ("import os; os._exit(0)", "the program ended its process with exit code 0"),
        ("import os; os._exit(3)", "the program ended its process with exit code 3"),
        ("import ctypes; ctypes.string_at(0)", "the program was killed by SIGSEGV"),
        ("def f(:", "SyntaxError: invalid syntax (<program>, line 1)"),
        ("input()", "EOFError: EOF when reading a line"),
    ],
)
def test_how_a_program_failed_is_said(program: str, error: str) -> None:
    result = execute_code(program)
    assert not result.success
    assert result.error == error


def test_time_and_memory_are_reported_as_such() -> None:
    slow = execute_code("import time; time.sleep(60)", timeout=0.3)
    assert (slow.timeout, slow.memory_exceeded, slow.success) == (True, False, False)
    large = execute_code("x = bytearray(1 << 30)")
    assert (large.timeout, large.memory_exceeded, large.success) == (False, True, False)


@pytest.mark.parametrize(
    "program",
    [
        "class OfNumpy(MemoryError): pass\nraise OfNumpy('Unable to allocate 1 GiB')",
        "class OfNumpy(MemoryError): pass\ndef f(x): raise OfNumpy('Unable to allocate 1 GiB')",
    ],
)
def test_a_subclass_of_memory_error_is_memory(program: str) -> None:
    result = judge(program)
    assert result.memory_exceeded
    assert str(result.error).startswith("MemoryError: Unable to allocate 1 GiB")


def test_what_is_only_named_like_a_memory_error_is_none() -> None:
    result = execute_code("class MemoryErrors(Exception): pass\nraise MemoryErrors('two')")
    assert (result.memory_exceeded, result.error) == (False, "MemoryErrors: two")


def test_numpys_out_of_memory_is_memory() -> None:
    result = execute_code("import numpy; numpy.ones(1 << 40, dtype='u1')", 20.0, 1 << 30)
    assert result.memory_exceeded, result.error


def test_an_error_is_short_and_can_be_printed() -> None:
    result = judge("raise ValueError('\\ud800' * 1_000_000)")
    assert str(result.error).startswith("ValueError: ???")
    assert len(str(result.error)) < 3000


def test_output_is_kept_up_to_a_limit() -> None:
    result = execute_code("print('x' * 10_000_000)")
    assert result.success
    assert result.truncated
    assert len(result.stdout) == supervisor.OUTPUT_BYTES


def test_folder_environment_and_import_path_are_the_programs_own() -> None:
    result = execute_code(
        "import os, sys; print(os.listdir('.'), sorted(os.environ), sys.argv[1:])\n"
        "open('note', 'w').write('x'); print(os.listdir('.'))\n"
        "import nanochat"
    )
    names = "['HOME', 'LANG', 'OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'PATH', 'TMPDIR']"
    assert result.stdout == f"[] {names} []\n['note']\n"


def test_a_models_own_demonstration_is_not_run_with_its_tests() -> None:
    program = "def f(x): return x * x\nif __name__ == '__main__': input()"
    assert judge(program).success
    assert not execute_code(program).success


def test_installed_packages_can_be_imported() -> None:
    result = execute_code("import numpy; print(numpy.arange(3).sum())", 20.0, 1 << 30)
    assert (result.error, result.stdout) == (None, "3\n")


def test_a_program_may_close_its_output() -> None:
    program = "import sys\nsys.stdout.close()\nsys.stderr = None\ndef f(x): return x * x"
    assert judge(program).error is None


def test_threads_work() -> None:
    program = (
        "from concurrent.futures import ThreadPoolExecutor\n"
        "with ThreadPoolExecutor(4) as pool: print(sum(pool.map(int, '1234')))"
    )
    assert execute_code(program).stdout == "10\n"


@pytest.mark.parametrize(("timeout", "memory"), [(0, MEMORY), (float("inf"), MEMORY), (5, 1000)])
def test_senseless_limits_are_refused(timeout: float, memory: int) -> None:
    with pytest.raises(UserError, match=r"timeout of|the interpreter alone needs"):
        execute_code("pass", timeout, memory)


def test_what_a_program_leaves_is_removed_however_deep_and_closed(tmp_path: Path) -> None:
    folder = tmp_path / "left"
    (folder / "closed/inside").mkdir(parents=True)
    (folder / "closed/inside").chmod(0)
    (folder / "closed").chmod(0)
    (folder / "link").symlink_to(tmp_path)
    deep = "import os\nfor _ in range(3000): os.mkdir('d'); os.chdir('d')\nopen('f', 'w')"
    subprocess.run([sys.executable, "-c", deep], cwd=folder, check=True)
    assert supervisor.is_full(folder)
    supervisor.remove(folder)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_written_to_while_it_is_removed_is_removed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "left"
    (folder / "inside").mkdir(parents=True)
    rmdir, late = os.rmdir, ["late"]

    def remove_after_a_last_write(path: str | Path, *, dir_fd: int | None = None) -> None:
        if late:
            (folder / "inside" / late.pop()).touch()
        rmdir(path, dir_fd=dir_fd)

    monkeypatch.setattr("os.rmdir", remove_after_a_last_write)
    supervisor.remove(folder)
    assert list(tmp_path.iterdir()) == []


def test_every_wall_is_reported() -> None:
    result = execute_code("pass")
    assert {"process group", "clean environment", "capped output", "resource limits"} <= set(
        result.layers
    )
    assert "seccomp" in result.layers or "pid namespace" in result.layers
    known = {wall.partition(":")[0] for wall in (*result.layers, *result.missing)}
    assert {"pid namespace", "no capabilities", "no_new_privs", "landlock", "seccomp"} <= known


def test_without_a_sandbox_nothing_runs_and_the_result_says_skipped() -> None:
    request = {"program": "print('ran')", "tests": None}
    without = ("seccomp", "pid namespace")
    result = execution._execute(request, 5.0, MEMORY, unsafe=False, without=without)
    assert (result.skipped, result.success, result.stdout) == (True, False, "")
    assert "neither of seccomp and pid namespace works here" in str(result.error)


def test_a_sandbox_that_cannot_start_is_skipped_with_its_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(supervisor, "_LAUNCH", "raise SystemExit('no such kernel')")
    result = execute_code("pass")
    assert (result.skipped, result.success) == (True, False)
    assert result.error == "the sandbox did not start: no such kernel"


@pytest.mark.parametrize(
    "name", ["subprocess.Popen", "os.pipe", "tempfile.mkdtemp", "selectors.DefaultSelector"]
)
def test_a_machine_without_room_for_a_sandbox_skips_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(name, fail)
        result = judge("def f(x): return x * x")
    assert (result.skipped, result.success) == (True, False)
    assert result.error == "the sandbox cannot run here: [Errno 28] No space left on device"
    assert list(tmp_path.iterdir()) == []


def test_without_a_private_root_what_is_in_the_folder_stays_there_to_be_counted() -> None:
    program = """
import os, tempfile
def refused(action, *arguments):
    try: action(*arguments)
    except OSError: return True
open("a", "w").close(); open("b", "w").close(); os.mkdir("c"); os.rmdir("c")
print([refused(*call) for call in ((os.unlink, "a"), (os.rename, "a", "d"), (os.replace, "a", "b"),
                                   (os.open, ".", os.O_TMPFILE | os.O_RDWR))])
"""
    if landlock_version() < 1:
        pytest.skip("the kernel has no Landlock: nothing can be written without a private root")
    request = {"program": program, "tests": None}
    result = execution._execute(request, 5.0, MEMORY, unsafe=False, without=("private root",))
    assert {"landlock", "seccomp"} <= set(result.layers)
    assert (result.error, result.stdout) == (None, "[True, True, True, True]\n")


def test_a_folder_that_cannot_be_looked_into_is_full(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def closed(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    assert not supervisor.is_full(tmp_path)
    monkeypatch.setattr("os.scandir", closed)
    assert supervisor.is_full(tmp_path)


def test_nothing_runs_where_files_can_be_changed() -> None:
    request = {"program": "print('ran')", "tests": None}
    without = ("seccomp", "private root")
    result = execution._execute(request, 5.0, MEMORY, unsafe=False, without=without)
    assert (result.skipped, result.success, result.stdout) == (True, False, "")
    if "pid namespace" in result.layers:
        assert "without seccomp or a private root files can be changed" in str(result.error)


def test_the_sandbox_ends_when_its_trainer_is_killed(tmp_path: Path) -> None:
    program = f"open({str(tmp_path / 'running')!r}, 'w').close(); import time; time.sleep(600)"
    trainer = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"from nanochat.execution import execute_code; execute_code({program!r}, 600.0,"
            " unsafe=True)",
        ],
        cwd=REPOSITORY,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    wait_until((tmp_path / "running").exists)
    processes = descendants(trainer.pid)
    assert len(processes) == 3
    trainer.kill()
    trainer.wait()
    wait_until(lambda: not any(map(is_alive, processes)))


def wait_until(holds: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def descendants(process: int) -> list[int]:
    text = Path(f"/proc/{process}/task/{process}/children").read_text()
    children = [int(number) for number in text.split()]
    return children + [below for child in children for below in descendants(child)]


def is_alive(process: int) -> bool:
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


# The libc of macOS has no prctl, its kernel sets no limit of address space, and some are unknown.
AS_ON_MACOS = """
import ctypes, resource, sys, sysconfig
sysconfig.get_config_vars()
sys.platform = "darwin"
class Libc(ctypes.CDLL):
    def __getattr__(self, name):
        if name in ("prctl", "unshare", "mount"):
            raise AttributeError(f"dlsym: symbol {{name}} not found")
        return super().__getattr__(name)
ctypes.CDLL = Libc
del resource.RLIMIT_NPROC, resource.RLIMIT_MEMLOCK
setrlimit = resource.setrlimit
def set_limit(what, limits):
    if what == resource.RLIMIT_AS:
        raise ValueError("current limit exceeds maximum limit")
    setrlimit(what, limits)
resource.setrlimit = set_limit
"""


def test_unsafe_runs_where_the_system_calls_of_linux_are_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(supervisor, "_LAUNCH", AS_ON_MACOS + supervisor._LAUNCH)
    program = (
        "import resource, sys\n"
        "print(sys.platform, resource.getrlimit(resource.RLIMIT_NOFILE))\n"
        "def f(x): return x * x"
    )
    result = judge(program, unsafe=True)
    assert (result.error, result.stdout) == (None, "darwin (64, 64)\n")
    missing = "\n".join(result.missing)
    assert "dies with its parent: not on darwin" in missing
    assert "resource limits: all but RLIMIT_MEMLOCK (" in missing
    assert "RLIMIT_AS (current limit exceeds maximum limit)" in missing
    slow = judge("while True: pass", timeout=0.5, unsafe=True)
    assert slow.timeout


def test_other_systems_than_linux_are_refused_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    result = execute_code("pass")
    assert result.skipped
    assert "made of Linux system calls and this is darwin" in str(result.error)
    assert execute_code("print(1)", unsafe=True).stdout == "1\n"


def test_unsafe_runs_without_walls_and_says_so(tmp_path: Path) -> None:
    target = tmp_path / "written"
    result = execute_code(f"open({str(target)!r}, 'w').write('x')", unsafe=True)
    assert result.success
    assert target.read_text() == "x"
    assert "seccomp" not in result.layers
    assert "--unsafe" in result.missing[0]


def test_the_probe_says_whether_programs_can_be_run() -> None:
    problem = sandbox_problem()
    assert (problem is not None) == execute_code("pass").skipped


# ---- values between program and tests ------------------------------------------------------------

VALUES = [
    "None",
    "True",
    "0",
    "-1",
    "2**63",
    "-(2**200)",
    "0.1",
    "-0.0",
    "float('inf')",
    "1 + 2j",
    "''",
    "'\\ud800'",
    "'a\\n\\u00e9'",
    "b'\\x00\\xff'",
    "bytearray(b'x')",
    "[]",
    "[1, [2.0, None]]",
    "()",
    "(1, (2,))",
    "{1, 2}",
    "frozenset({(1, 2)})",
    "{(1, 2): [3], None: {}}",
    "range(3, 9, 2)",
    "__import__('fractions').Fraction(1, 3)",
    "__import__('decimal').Decimal('0.10')",
]


def test_values_cross_with_their_type() -> None:
    tests = "".join(
        f"x = {value}\ny = f(x)\nassert y == x and type(y) is type(x), {value!r}\n"
        for value in VALUES
    )
    assert judge("def f(x): return x", tests).error is None


def test_subclasses_arrive_as_the_type_they_extend() -> None:
    program = (
        "import collections, enum\n"
        "def f(x):\n"
        "    return [collections.Counter('aab'), collections.OrderedDict(a=1),\n"
        "            collections.namedtuple('P', 'x y')(1, 2), enum.IntEnum('E', 'A').A]\n"
    )
    tests = "assert f(0) == [{'a': 2, 'b': 1}, {'a': 1}, (1, 2), 1]"
    assert judge(program, tests).error is None


def test_an_iterator_is_not_equal_to_a_list() -> None:
    program = "def f(x): return map(abs, x)"
    assert judge(program, "assert list(f([-1, 2])) == [1, 2]").success
    assert not judge(program, "assert f([-1, 2]) == [1, 2]").success


def test_keywords_and_ordinary_exceptions_cross() -> None:
    program = "def f(a, *, b=0):\n    if b: raise IndexError('far')\n    return a"
    tests = (
        "assert f(a=3) == 3\n"
        "try: f(1, b=2)\n"
        "except IndexError as error: assert str(error) == 'far'\n"
        "else: assert False\n"
        "try: f()\n"
        "except TypeError: pass\n"
        "else: assert False\n"
    )
    assert judge(program, tests).error is None


def test_tests_that_swallow_everything_do_not_pass_a_dead_program() -> None:
    program = "import os\ndef f(x): os._exit(0)"
    result = judge(program, "try: f(1)\nexcept: pass")
    assert result.error == "the program ended its process with exit code 0"


def test_what_cannot_enter_is_the_fault_of_the_tests() -> None:
    result = judge("def f(x): return x(2)", "f(lambda x: x)")
    assert "value that cannot enter the sandbox" in str(result.error)


def test_the_tests_see_their_prelude_and_not_the_programs_names() -> None:
    prelude = "def helper(x): return x * x\ndef f(x): return 'a stub'"
    program = "def helper(x): return 0\ndef f(x): return helper(x)"
    result = judge(program, "assert (f(3), helper(3)) == (0, 9)", prelude=prelude)
    assert result.error is None


def test_frames_of_any_size_cross() -> None:
    assert judge("def f(x): return x", "x = 'x' * 3_000_000\nassert f(x) == x").success


@pytest.mark.parametrize(
    "data", [["int", "x"], ["no such type"], {"a": 1}, ["set", [["list", []]]]]
)
def test_what_is_no_value_is_refused(data: object) -> None:
    with pytest.raises((ValueError, TypeError)):
        wire.decode(data)


# ---- the benchmark -------------------------------------------------------------------------------


@pytest.mark.skipif(sandbox_problem() is not None, reason=str(sandbox_problem()))
def test_the_benchmark_says_what_the_walls_cost(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_sandbox.main(bench_sandbox.Config(programs=2)) == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["benchmark"], row["programs"], row["passed"]) == ("sandbox", 2, 2)
    assert 0 < row["sandbox_median_ms"] <= row["sandbox_p95_ms"]
    assert 0 < row["bare_median_ms"] <= row["bare_p95_ms"]
    assert "resource limits" in row["layers"]


# ---- HumanEval -----------------------------------------------------------------------------------


def humaneval(bodies: dict[str, str] | None = None) -> list[ExecutionResult]:
    """Every problem with its reference solution, or with a body of ours."""
    with gzip.open(HUMANEVAL) as file:
        rows = [json.loads(line) for line in file]
    assert len(rows) == 164

    def run(row: dict[str, str]) -> ExecutionResult:
        body = row["canonical_solution"] if bodies is None else bodies["body"]
        return check_program(
            row["prompt"] + body,
            row["test"] + f"\ncheck({row['entry_point']})\n",
            functions=[row["entry_point"]],
            prelude=row["prompt"],
            timeout=60.0,
        )

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(run, rows))


@pytest.mark.slow
@pytest.mark.skipif(not HUMANEVAL.exists(), reason="shared/data is not beside the repository")
def test_all_reference_solutions_of_humaneval_pass() -> None:
    assert [result.error for result in humaneval()] == [None] * 164


@pytest.mark.slow
@pytest.mark.skipif(not HUMANEVAL.exists(), reason="shared/data is not beside the repository")
@pytest.mark.parametrize("body", ["    return None\n", "    import os; os._exit(0)\n"])
def test_all_broken_solutions_of_humaneval_fail(body: str) -> None:
    results = humaneval({"body": body})
    assert not any(result.success or result.skipped for result in results)
