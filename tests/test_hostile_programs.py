"""Over a hundred programs that try to get out of the sandbox or to forge a pass: none does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hostile_programs import DEEDS, FORGERIES, source

from nanochat import execution
from nanochat.execution import ExecutionResult
from nanochat.sandbox import supervisor

REPOSITORY = Path(__file__).parents[1]
SYSTEM_PYTHON = Path("/usr/bin/python3")
MEMORY = 256 << 20
pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="the sandbox is made of Linux system calls"
)
SECRET = "the-users-secret-0451"


class Host:
    """A machine with something to lose."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.chmod(0o755)
        self.secret = folder / "secret.txt"
        self.secret.write_text(SECRET)
        self.status = self.secret.stat()
        self.victim = subprocess.Popen(["sleep", "3600"])

    def source(self, body: str) -> str:
        text = source(body).replace("SECRET_FILE", str(self.secret))
        text = text.replace('"HOME"', repr(str(Path.home()))).replace("HOME/", f"{Path.home()}/")
        return text.replace("OUTSIDE", str(self.folder)).replace("VICTIM", str(self.victim.pid))

    def run(self, body: str, without: tuple[str, ...] = ()) -> ExecutionResult:
        request = {
            "program": self.source(body),
            "tests": "assert answer(3) == 9",
            "prelude": "",
            "functions": ["answer"],
        }
        return execution._execute(request, 1.0, MEMORY, unsafe=False, without=without)

    def check(self, name: str, result: ExecutionResult) -> None:
        assert not result.skipped, result.error
        assert not result.success, name
        assert result.error
        for text in (result.stdout, result.stderr, result.error):
            assert "ESCAPED" not in text.replace('print("ESCAPED', ""), (name, text[:2000])
            assert SECRET not in text, name
            assert "secret-of-the-environment" not in text, name
        assert len(result.stdout) <= supervisor.OUTPUT_BYTES
        assert result.seconds < 30  # one second of its own, and a busy machine

    def check_untouched(self) -> None:
        assert self.victim.poll() is None
        assert os.getpriority(os.PRIO_PROCESS, self.victim.pid) == os.getpriority(
            os.PRIO_PROCESS, 0
        )
        assert [path.name for path in self.folder.iterdir()] == ["secret.txt"]
        status = self.secret.stat()
        assert (status.st_mode, status.st_mtime) == (self.status.st_mode, self.status.st_mtime)
        assert os.listxattr(self.secret) == []
        assert self.secret.read_text() == SECRET
        assert not Path("/tmp/nanochat_planted").exists()


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Host]:
    monkeypatch.setenv("NANOCHAT_TEST_SECRET", "secret-of-the-environment")
    folder = tmp_path / "host"
    folder.mkdir()
    host = Host(folder)
    yield host
    host.victim.kill()
    host.victim.wait()


def test_the_suite_is_as_large_as_promised() -> None:
    assert len(DEEDS) + len(FORGERIES) >= 60


def run_all(
    host: Host, programs: dict[str, str], without: tuple[str, ...], skip: Sequence[str]
) -> None:
    names = [name for name in programs if name not in skip]
    assert len(names) >= len(programs) - len(skip)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda name: host.run(programs[name], without), names))
    for name, result in zip(names, results, strict=True):
        host.check(name, result)
    host.check_untouched()


@pytest.mark.parametrize("programs", [DEEDS, FORGERIES], ids=["deeds", "forgeries"])
def test_hostile_programs_are_contained(host: Host, programs: dict[str, str]) -> None:
    run_all(host, programs, (), [])


# Allowed where only namespaces protect, and of no use there: processes that end with their pid
# namespace, sockets without a network, names and keys that nobody else sees.
HARMLESS_IN_NAMESPACES = """
    fork clone_by_ctypes clone3_by_ctypes multiprocessing daemon own_process_group
    shared_memory_by_name socket_by_ctypes netlink unix_socket keys file_handle
""".split()
# What a filter of system calls cannot tell apart: reading one file from reading another. Where
# neither Landlock nor a private root exists, secrets are safe only in that there is no way out.
READABLE_WITHOUT_BOTH = """
    read_the_home_folder read_a_secret read_accounts list_processes
    through_the_root_of_a_process
""".split()
WITHOUT: dict[tuple[str, ...], list[str]] = {
    ("pid namespace",): [],  # a machine that forbids user namespaces
    ("private root",): [],
    ("landlock",): [],
    ("seccomp",): HARMLESS_IN_NAMESPACES,
    ("landlock", "seccomp"): HARMLESS_IN_NAMESPACES,
    ("pid namespace", "landlock"): READABLE_WITHOUT_BOTH,
}


@pytest.mark.slow
@pytest.mark.parametrize("without", WITHOUT, ids=" and ".join)
def test_hostile_programs_are_contained_without(host: Host, without: tuple[str, ...]) -> None:
    run_all(host, DEEDS | FORGERIES, without, WITHOUT[without])


AS_NOBODY = """
import dataclasses, json, sys
from concurrent.futures import ThreadPoolExecutor
from nanochat import execution
programs, without = json.load(sys.stdin)
def run(program):
    request = {"program": program, "tests": "assert answer(3) == 9", "prelude": "",
               "functions": ["answer"]}
    return execution._execute(request, 1.0, 256 << 20, unsafe=False, without=without)
with ThreadPoolExecutor(4) as pool:
    for result in pool.map(run, programs):
        print(json.dumps(dataclasses.asdict(result)))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0 or not SYSTEM_PYTHON.exists(),
    reason="needs root, to become nobody, and a python that nobody may run",
)
@pytest.mark.parametrize("without", [(), ("pid namespace",)], ids=["all", "no namespaces"])
def test_hostile_programs_are_contained_as_an_ordinary_user(
    host: Host, without: tuple[str, ...]
) -> None:
    programs = DEEDS | FORGERIES
    for path in (host.folder, host.secret):
        os.chown(path, 65534, 65534)
    done = subprocess.run(
        [str(SYSTEM_PYTHON), "-B", "-c", AS_NOBODY],
        input=json.dumps([[host.source(body) for body in programs.values()], without]),
        env={"PYTHONPATH": str(REPOSITORY), "NANOCHAT_TEST_SECRET": "secret-of-the-environment"},
        capture_output=True,
        text=True,
        user=65534,
        group=65534,
        extra_groups=[],
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    results = [ExecutionResult(**json.loads(line)) for line in done.stdout.splitlines()]
    for name, result in zip(programs, results, strict=True):
        host.check(name, result)
    host.check_untouched()
