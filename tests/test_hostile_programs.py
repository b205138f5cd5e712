"""Over a hundred programs that try to get out of the sandbox or to forge a pass: none does."""

from __future__ import annotations

import ctypes
import json
import os
import select
import socket
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


def libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


class Host:
    """A machine with something to lose."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        folder.chmod(0o755)
        self.secret = folder / "secret.txt"
        self.secret.write_text(SECRET)
        self.status = self.secret.stat()
        self.victim = subprocess.Popen(
            ["sh", "-c", "echo ready; read forever"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self.victim.stdout
        self.victim.stdout.readline()  # from here on its memory stays where it is
        self.tcp = socket.create_server(("127.0.0.1", 0))
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.udp.bind(("127.0.0.1", 0))
        self.abstract_name = f"nanochat-test-{os.getpid()}-{self.victim.pid}"
        self.abstract = socket.socket(socket.AF_UNIX)
        self.abstract.bind(f"\0{self.abstract_name}")
        self.abstract.listen()
        self.terminal = os.openpty()
        # What a careless start of a program would hand on.
        self.descriptor = os.open(folder, os.O_RDONLY)
        os.set_inheritable(self.descriptor, True)
        self.shared_memory = libc().shmget(0, 4096, 0o1666)  # IPC_PRIVATE, IPC_CREAT

    def close(self) -> None:
        self.victim.kill()
        self.victim.communicate()
        for listener in (self.tcp, self.udp, self.abstract):
            listener.close()
        for descriptor in (*self.terminal, self.descriptor):
            os.close(descriptor)
        libc().shmctl(self.shared_memory, 0, None)  # IPC_RMID; gone, if a program got that far

    def source(self, body: str) -> str:
        maps = Path(f"/proc/{self.victim.pid}/maps").read_text()
        writable = next(line for line in maps.splitlines() if " rw-p " in line)
        words = {
            "SECRET_FILE": self.secret,
            '"HOME"': repr(str(Path.home())),
            "HOME/": f"{Path.home()}/",
            "OUTSIDE": self.folder,
            "VICTIM": self.victim.pid,
            "ADDRESS": int(writable.partition("-")[0], 16),
            "TCP_PORT": self.tcp.getsockname()[1],
            "UDP_PORT": self.udp.getsockname()[1],
            "ABSTRACT_SOCKET": self.abstract_name,
            "TERMINAL": os.ttyname(self.terminal[1]),
            "SHARED_MEMORY": self.shared_memory,
        }
        text = source(body)
        for word, value in words.items():
            text = text.replace(word, str(value))
        return text

    def run(
        self,
        body: str,
        without: tuple[str, ...] = (),
        *,
        timeout: float = 1.0,
        unsafe: bool = False,
    ) -> ExecutionResult:
        request = {
            "program": self.source(body),
            "tests": "assert answer(3) == 9",
            "prelude": "",
            "functions": ["answer"],
        }
        return execution._execute(request, timeout, MEMORY, unsafe=unsafe, without=without)

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
        listeners = [listener.fileno() for listener in (self.tcp, self.udp, self.abstract)]
        listeners.append(self.terminal[0])
        assert select.select(listeners, [], [], 0)[0] == []


@pytest.fixture
def secret_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_TEST_SECRET", "secret-of-the-environment")


@pytest.fixture
def host(secret_environment: None, tmp_path: Path) -> Iterator[Host]:
    host = Host(tmp_path / "host")
    yield host
    host.close()


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


# What a deed that fails is worth, its success without walls says: these succeed for every user.
SUCCEED_WITHOUT_WALLS = """
    fork subprocess os_system exec exec_of_memory exec_of_a_descriptor posix_spawn multiprocessing
    daemon daemon_of_a_daemon own_process_group clone_by_ctypes clone3_by_ctypes
    kill_a_bystander kill_by_ctypes tgkill_by_ctypes queue_a_signal signal_through_a_pidfd
    signal_through_a_file_owner renice_the_user limit_a_bystander pin_a_bystander limit_the_parent
    outlive_the_parent be_readable_for_others read_the_parents_memory descriptors_of_the_parent
    shared_memory_by_name delete_shared_memory_of_the_user
    a_gigabyte growing_list memory_map memory_in_memfds memory_in_shared_pages memory_in_a_device
    memory_in_huge_pages memory_in_pipes long_pipes many_timers
    unlinked_open_files unlinked_mapped_files replaced_open_files nameless_files sparse_file
    files_in_a_folder_that_cannot_be_listed
    one_big_file many_files many_names many_pipes many_descriptors flush_all_disks
    tcp udp socket_by_ctypes unix_socket abstract_unix_socket netlink asynchronous_io
    read_the_environment read_the_environment_of_libc read_the_first_environment
    read_the_home_folder read_a_secret read_a_secret_by_openat2 read_accounts list_processes
    size_of_a_secret watch_a_folder_of_the_user compile_outside
    write_outside touch_a_secret mark_a_secret truncate_a_secret truncate_a_secret_by_reading
    open_a_secret_for_all create_in_a_folder_of_the_user write_below_with_dots
    symlink_out symlink_to_a_folder hard_link_out delete_outside rename_outside
    through_the_root_of_a_process through_the_working_folder_of_a_process through_descriptors
    file_handle terminal keys setuid_program wait_for_input
""".split()
# These need root with rights that a container may take from it.
SUCCEED_FOR_ROOT = """
    ptrace ptrace_the_parent read_a_process_by_vm_readv write_to_a_process_by_vm_writev
    read_the_memory_file_of_a_process steal_a_descriptor
    new_namespaces join_a_namespace out_of_the_root device_node become_root bpf raise_the_limits
    performance_events page_faults
""".split()
# CAP_SETUID, CAP_SYS_CHROOT, CAP_SYS_PTRACE, CAP_SYS_ADMIN, CAP_MKNOD of capabilities(7)
NEEDED_CAPABILITIES = (7, 18, 19, 21, 27)
# Of these a failure says nothing of the wall, as nobody has seen them succeed.
NOT_SHOWN_TO_SUCCEED = {
    "succeeding, it would harm this machine": "mount unmount host_name write_to_tmp "
    "write_into_the_library change_the_mode_of_the_library",
    "not every machine has it": "name_service io_uring kernel_memory vfork_by_ctypes "
    "the_32_bit_table type_into_the_terminal",
    "it takes too long": "big_integer deep_folders",
}


def succeeds(name: str, folder: Path) -> bool:
    """Run a deed as a plain program; a shell is its parent, which some of them harm."""
    host, scratch = Host(folder / "host"), folder / "scratch"
    scratch.mkdir()
    command = ["sh", "-c", '"$0" -c "$1"; exit 0', sys.executable, host.source(DEEDS[name])]
    try:
        with (folder / "output").open("w") as output:
            subprocess.run(
                command,
                input="hello",
                text=True,
                stdout=output,
                stderr=subprocess.DEVNULL,
                cwd=scratch,
                close_fds=False,
                start_new_session=True,
                timeout=60,
            )
        said = (folder / "output").read_text()
        return "ESCAPED" in said or host.victim.poll() is not None
    finally:
        host.close()
        supervisor.remove(scratch)


def failures(names: Sequence[str], tmp_path: Path) -> list[str]:
    folders = [tmp_path / name for name in names]
    for folder in folders:
        folder.mkdir()
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(succeeds, names, folders)
        return [name for name, success in zip(names, found, strict=True) if not success]


@pytest.mark.usefixtures("secret_environment")
def test_the_deeds_succeed_without_walls(tmp_path: Path) -> None:
    assert failures(SUCCEED_WITHOUT_WALLS, tmp_path) == []


@pytest.mark.usefixtures("secret_environment")
def test_the_deeds_of_root_succeed_without_walls(tmp_path: Path) -> None:
    status = Path("/proc/self/status").read_text()
    rights = int(status.partition("CapEff:")[2].split()[0], 16)
    needed = sum(1 << capability for capability in NEEDED_CAPABILITIES)
    if rights & needed != needed:
        pytest.skip("needs root with its rights")
    assert failures(SUCCEED_FOR_ROOT, tmp_path) == []


def test_it_is_known_of_every_deed_whether_it_can_succeed() -> None:
    listed = [*SUCCEED_WITHOUT_WALLS, *SUCCEED_FOR_ROOT]
    listed += " ".join(NOT_SHOWN_TO_SUCCEED.values()).split()
    victims = {name for name, body in DEEDS.items() if "VICTIM" in body}
    claims = {name for name, body in DEEDS.items() if "ESCAPED" in body}
    assert sorted(listed) == sorted(victims | claims)


# Allowed where only namespaces protect, and of no use there: processes that end with their pid
# namespace, sockets without a network, names and keys that nobody else sees.
HARMLESS_IN_NAMESPACES = """
    fork vfork_by_ctypes clone_by_ctypes clone3_by_ctypes multiprocessing daemon own_process_group
    shared_memory_by_name socket_by_ctypes netlink unix_socket keys file_handle daemon_of_a_daemon
    asynchronous_io performance_events page_faults outlive_the_parent be_readable_for_others
    limit_the_parent
""".split()
# Memory that only seccomp keeps a program from.
UNLIMITED_WITHOUT_SECCOMP = """
    memory_in_memfds memory_in_shared_pages memory_in_huge_pages memory_in_pipes long_pipes
    many_timers flush_all_disks
""".split()
# What a path leads to cannot be read there, but that it leads to something can be seen.
SEEN_WITHOUT_PRIVATE_ROOT = ["size_of_a_secret"]
# What a filter of system calls cannot tell apart: reading one file from reading another. Where
# neither Landlock nor a private root exists, secrets are safe only in that there is no way out.
READABLE_WITHOUT_BOTH = """
    read_the_home_folder read_a_secret read_accounts list_processes
    through_the_root_of_a_process
""".split()
WITHOUT: dict[tuple[str, ...], list[str]] = {
    ("pid namespace",): SEEN_WITHOUT_PRIVATE_ROOT,  # a machine that forbids user namespaces
    ("private root",): SEEN_WITHOUT_PRIVATE_ROOT,
    ("landlock",): [],
    ("seccomp",): HARMLESS_IN_NAMESPACES + UNLIMITED_WITHOUT_SECCOMP,
    ("landlock", "seccomp"): HARMLESS_IN_NAMESPACES + UNLIMITED_WITHOUT_SECCOMP,
    ("pid namespace", "landlock"): READABLE_WITHOUT_BOTH + SEEN_WITHOUT_PRIVATE_ROOT,
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
    if without:
        programs = {k: v for k, v in programs.items() if k not in SEEN_WITHOUT_PRIVATE_ROOT}
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
