"""The walls of the sandbox, each one put up by the process it confines. Linux, by system calls.

Every function raises OSError when the kernel, a container or the machine does not allow its
layer; `jail` reports that and decides what is enough. Numbers are those of the kernel's headers.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import struct
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from nanochat.sandbox.syscalls import filter_program

NOBODY = 65534
# unshare(2): mount, UTS, IPC, pid, network
_NEW_NAMESPACES = 0x20000 | 0x4000000 | 0x8000000 | 0x20000000 | 0x40000000
_NEW_USER = 0x10000000
# mount(2)
_READ_ONLY, _NO_SUID, _NO_DEVICES, _REMOUNT, _BIND = 0x1, 0x2, 0x4, 0x20, 0x1000
_RECURSIVE, _PRIVATE = 0x4000, 0x40000
_DETACH = 2  # umount2(2)
# prctl(2)
_SET_DEATH_SIGNAL, _SET_DUMPABLE, _SET_SECCOMP, _DROP_BOUND, _NO_NEW_PRIVS = 1, 4, 22, 24, 38
_NO_HUGE_PAGES = 41
_SIGKILL = 9
_SECCOMP_FILTER = 2
_CAPABILITY_VERSION_3 = 0x20080522
_NUM_CAPABILITIES = 64  # more than any kernel has; unknown ones are refused one by one
# syscall numbers: capset; Landlock's are the same on every architecture
_CAPSET = {"x86_64": 126, "aarch64": 91}
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
# Landlock rights (linux/landlock.h)
_WRITE_FILE, _READ_FILE, _READ_DIR, _TRUNCATE = 1 << 1, 1 << 2, 1 << 3, 1 << 14
_REMOVE_DIR, _REMOVE_FILE, _MAKE_DIR, _MAKE_REGULAR = 1 << 4, 1 << 5, 1 << 7, 1 << 8
_FILE_RIGHTS = _WRITE_FILE | _READ_FILE | _TRUNCATE
_SCRATCH_RIGHTS = _FILE_RIGHTS | _READ_DIR | _REMOVE_DIR | _MAKE_DIR | _MAKE_REGULAR

SCRATCH = "/scratch"  # inside the private root
MAX_FILES = 4096
_OPEN_FILES = 64
_STACK_BYTES = 16 << 20
_EXTRA_TASKS = 64  # threads a program may have; numpy starts one a core
_DEVICES = ("/dev/null", "/dev/urandom")


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    return libc


def _check(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def _prctl(option: int, first: int, second: object = 0) -> int:
    zero = ctypes.c_ulong(0)
    result: int = _libc().prctl(option, ctypes.c_ulong(first), second, zero, zero)
    return result


def die_with_parent() -> None:
    """Be killed when the process that started this one ends; must follow a change of user.

    Also no core dumps, and /proc/PID of this process only for root.
    """
    if not sys.platform.startswith("linux"):
        raise OSError(f"not on {sys.platform}")
    _check(_prctl(_SET_DEATH_SIGNAL, _SIGKILL), "death signal")
    _check(_prctl(_SET_DUMPABLE, 0), "dumpable")


# ---- namespaces ----------------------------------------------------------------------------------


def enter_namespaces() -> None:
    """New mount, UTS, IPC, pid and network namespaces; children get the pid namespace.

    Without the right to do so as oneself, inside a new user namespace, where one has it.
    """
    user, group = os.getuid(), os.getgid()
    try:
        _check(_libc().unshare(_NEW_NAMESPACES), "unshare")
    except PermissionError:
        _check(_libc().unshare(_NEW_NAMESPACES | _NEW_USER), "unshare")
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    _mount("none", "/", None, _RECURSIVE | _PRIVATE)


def _mount(source: str, target: str, kind: str | None, flags: int, data: str = "") -> None:
    libc = _libc()
    texts = [source.encode(), target.encode(), kind.encode() if kind else None]
    result = libc.mount(*texts, ctypes.c_ulong(flags), data.encode() or None)
    _check(result, f"mount {target}")


def enter_private_root(root: Path, readable: Sequence[str], scratch_bytes: int) -> None:
    """Make a small file system in memory the root: what is readable, two devices, scratch.

    root: an empty folder. Needs a mount namespace of one's own. Undone when it fails.
    """
    options = f"size={scratch_bytes},nr_inodes={MAX_FILES},mode=755"
    _mount("tmpfs", str(root), "tmpfs", _NO_SUID | _NO_DEVICES, options)
    try:
        for path in readable:
            _show(root, path)
        for path in _DEVICES:
            _bind(path, root, is_folder=False)
        scratch = root / SCRATCH[1:]
        scratch.mkdir(mode=0o700)
        if os.getuid() == 0:
            os.chown(scratch, NOBODY, NOBODY)
        os.chroot(root)
    except OSError:
        _libc().umount2(str(root).encode(), _DETACH)
        raise
    os.chdir(SCRATCH)


def _show(root: Path, path: str) -> None:
    """Bring a path into the new root, read-only; /lib is often a link into /usr."""
    target = root / path[1:]
    if target.exists():
        return  # inside a folder that is there already
    if os.path.islink(path):
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(os.readlink(path))
        return
    _bind(path, root, is_folder=os.path.isdir(path))
    # In a user namespace a remount must keep the flags the mount already has.
    kept = os.statvfs(target).f_flag & (0x2 | 0x4 | 0x8 | 0x400 | 0x800 | 0x1000)
    times = {0x400: 0x400, 0x800: 0x800, 0x1000: 1 << 21}  # statvfs to mount: the access times
    flags = kept & 0xE | sum(times[bit] for bit in times if kept & bit)
    _mount("none", str(target), None, _BIND | _REMOUNT | _READ_ONLY | _NO_SUID | flags)


def _bind(path: str, root: Path, *, is_folder: bool) -> None:
    target = root / path[1:]
    target.parent.mkdir(parents=True, exist_ok=True)
    if is_folder:
        target.mkdir()
    else:
        target.touch()
    _mount(path, str(target), None, _BIND | _RECURSIVE)


# ---- user, limits --------------------------------------------------------------------------------


def become_nobody(scratch: str, readable: Sequence[str]) -> None:
    """From root to a user who owns nothing, where that one can still read the interpreter."""
    hidden = [path for path in readable if not _is_readable_by_all(path)]
    if hidden:
        raise OSError(f"only root may read {hidden[0]}")
    os.chown(scratch, NOBODY, NOBODY)
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)


def drop_capabilities() -> None:
    """Give up every right of root, also those inside a user namespace."""
    for capability in range(_NUM_CAPABILITIES):
        _prctl(_DROP_BOUND, capability)  # needs CAP_SETPCAP; what counts is the next step
    header, nothing = struct.pack("Ii", _CAPABILITY_VERSION_3, 0), struct.pack("6I", *[0] * 6)
    number = _CAPSET.get(os.uname().machine)
    if number is None:
        raise OSError(f"no number of capset for {os.uname().machine}")
    _check(_libc().syscall(number, header, nothing), "capset")


def _is_readable_by_all(path: str) -> bool:
    real = Path(os.path.realpath(path))
    return all(folder.stat().st_mode & 0o1 for folder in [real, *real.parents] if folder.is_dir())


def count_tasks() -> int:
    """Processes and threads on this machine (proc_loadavg(5), fourth field)."""
    return int(Path("/proc/loadavg").read_text().split()[3].partition("/")[2])


def limit_resources(
    seconds: int, memory_bytes: int, file_bytes: int, num_tasks: int | None
) -> None:
    """CPU time, address space, size of one file, open files, threads, core dumps.

    num_tasks: `count_tasks()`, or None for no limit. The limit counts what the user runs anywhere
    on the machine, the trainer's threads included, so it is set a little above what there is.
    OSError names those that this system does not have or refuses; the others are set all the same.
    """
    limits = {
        "RLIMIT_CPU": seconds,
        "RLIMIT_FSIZE": file_bytes,
        "RLIMIT_NOFILE": _OPEN_FILES,
        "RLIMIT_CORE": 0,
        "RLIMIT_STACK": _STACK_BYTES,
        "RLIMIT_MEMLOCK": 0,
        "RLIMIT_AS": memory_bytes,
    }
    if num_tasks is not None:
        limits["RLIMIT_NPROC"] = num_tasks + _EXTRA_TASKS
    problems = []
    for name, value in limits.items():
        try:
            # A second more for CPU time: SIGXCPU first, which says why, then SIGKILL.
            _limit(getattr(resource, name), value, value + (name == "RLIMIT_CPU"))
        except (AttributeError, ValueError, OSError) as error:
            problems.append(f"{name} ({error})")
    if problems:
        raise OSError(f"all but {', '.join(problems)}")


def _limit(what: int, value: int, ceiling: int) -> None:
    _, hard = resource.getrlimit(what)
    if hard != resource.RLIM_INFINITY:
        value, ceiling = min(value, hard), min(ceiling, hard)
    resource.setrlimit(what, (value, ceiling))


def forbid_huge_pages() -> None:
    """Give memory in small pages only.

    Of a huge one all stays when all but a small one is unmapped, which is all that then counts.
    """
    _check(_prctl(_NO_HUGE_PAGES, 1), "huge pages")


def forbid_new_privileges() -> None:
    """No program started from here gains rights (setuid files)."""
    _check(_prctl(_NO_NEW_PRIVS, 1), "no_new_privs")


# ---- Landlock and seccomp ------------------------------------------------------------------------


def landlock(scratch: str, readable: Sequence[str], *, may_remove: bool) -> None:
    """Read only what is listed, write only below `scratch`.

    may_remove: whether files there may be removed or renamed. Where the trainer watches how much
    lies in the folder, none may: an open or mapped file without a name is not seen.

    From version 4 also no TCP, from 6 no signals to and no abstract sockets of others
    (Documentation/userspace-api/landlock.rst).
    """
    libc = _libc()
    version = _check(libc.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1), "landlock")
    handled = (1 << 13) - 1
    for since, right in ((2, 13), (3, 14), (5, 15)):
        handled |= 1 << right if version >= since else 0
    words = [handled, *([3] if version >= 4 else []), *([3] if version >= 6 else [])]
    attributes = struct.pack(f"{len(words)}Q", *words)
    size = ctypes.c_size_t(len(attributes))
    ruleset = _check(libc.syscall(_LANDLOCK_CREATE, attributes, size, 0), "landlock ruleset")
    rules = [(path, _READ_FILE | _READ_DIR) for path in readable]
    rules += [(path, _READ_FILE | _WRITE_FILE) for path in _DEVICES]
    scratch_rights = _SCRATCH_RIGHTS | (_REMOVE_FILE if may_remove else 0)
    for path, rights in [*rules, (scratch, scratch_rights)]:
        with _opened(path) as descriptor:
            if descriptor is None:
                continue
            allowed = rights & handled & (_FILE_RIGHTS if not os.path.isdir(path) else ~0)
            rule = struct.pack("=Qi", allowed, descriptor)
            _check(libc.syscall(_LANDLOCK_ADD, ruleset, 1, rule, 0), f"landlock rule for {path}")
    _check(libc.syscall(_LANDLOCK_RESTRICT, ruleset, 0), "landlock")
    os.close(ruleset)


@contextlib.contextmanager
def _opened(path: str) -> Iterator[int | None]:
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        yield None
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def filter_system_calls(*, may_write: bool) -> None:
    """The seccomp filter of `syscalls`; needs no_new_privs."""
    machine = os.uname().machine
    try:
        program = filter_program(machine, may_write=may_write)
    except KeyError as error:
        raise OSError(f"no table of system calls for {machine}") from error
    code = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(code))
    buffer = ctypes.create_string_buffer(header, len(header))
    _check(_prctl(_SET_SECCOMP, _SECCOMP_FILTER, ctypes.byref(buffer)), "seccomp")


# ---- what a program may read ---------------------------------------------------------------------


def readable_paths(library_path: str) -> list[str]:
    """The interpreter, installed packages, system libraries; parents first, all existing.

    library_path: the trainer's LD_LIBRARY_PATH, where modules of an HPC machine keep libpython.
    """
    paths = sysconfig.get_paths()
    installed = [paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    system = ["/usr", "/lib", "/lib64", "/etc/ld.so.cache"]
    home = os.path.expanduser("~") + "/"
    given = [
        path for path in library_path.split(":") if not home.startswith(path.rstrip("/") + "/")
    ]
    wanted = [path for path in [*system, *installed, *given] if path.startswith("/")]
    chosen: list[str] = []
    for path in sorted({os.path.normpath(path) for path in wanted}, key=len):
        is_inside = any(path.startswith(parent + "/") for parent in chosen)
        if not is_inside and os.path.exists(path):
            chosen.append(path)
    return chosen
