"""The system call filter: numbers of two architectures and the BPF program made of them. Pure.

A filter of refusals: what a computing program has no use for, and everything newer than the
tables, since nobody has judged it. Numbers are those of the kernel's `unistd` headers (x86-64:
arch/x86/entry/syscalls/syscall_64.tbl; aarch64: include/uapi/asm-generic/unistd.h); a test
compares them. How such a program is made: Documentation/userspace-api/seccomp_filter.rst.
"""

from __future__ import annotations

import errno
import struct
from dataclasses import dataclass

_ALLOW, _KILL = 0x7FFF0000, 0x80000000  # SECCOMP_RET_ALLOW, SECCOMP_RET_KILL_PROCESS
_ERRNO = 0x00050000  # SECCOMP_RET_ERRNO, the error in the low half
_LOAD, _JUMP_EQUAL, _JUMP_GREATER_EQUAL, _JUMP_SET, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_REFUSE = _ERRNO | errno.EPERM
_NUMBER, _ARCHITECTURE, _ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data
_CLONE_THREAD = 0x10000
_X32_BIT = 0x40000000  # the second, 32-bit table that x86-64 kernels keep under other numbers

# From here on both architectures have the same numbers.
_FIRST_SHARED = 424
# close_range, faccessat2, epoll_pwait2, futex_waitv. Not openat2: a filter cannot read its flags.
_ALLOWED_SHARED = (436, 439, 441, 449)

# name -> (x86-64, aarch64); None where the architecture has no such call. Refused with EPERM.
REFUSED: dict[str, tuple[int | None, int | None]] = {
    # the network
    "socket": (41, 198),
    "socketpair": (53, 199),
    "connect": (42, 203),
    "bind": (49, 200),
    "listen": (50, 201),
    "accept": (43, 202),
    "accept4": (288, 242),
    # other programs, other processes
    "execve": (59, 221),
    "execveat": (322, 281),
    "fork": (57, None),
    "vfork": (58, None),
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "setsid": (112, 157),
    "setpgid": (109, 154),
    "setpriority": (141, 140),
    "ioprio_set": (251, 30),
    "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119),
    "sched_setaffinity": (203, 122),
    "sched_setattr": (314, 274),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    "setrlimit": (160, 164),
    # memory, semaphores and queues shared by name or by a number that can be guessed
    "shmget": (29, 194),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "semget": (64, 190),
    "semop": (65, 193),
    "semtimedop": (220, 192),
    "semctl": (66, 191),
    "msgget": (68, 186),
    "msgsnd": (69, 189),
    "msgrcv": (70, 188),
    "msgctl": (71, 187),
    "mq_open": (240, 180),
    "mq_unlink": (241, 181),
    # memory that is no address space: the limit does not count it
    "memfd_create": (319, 279),
    "vmsplice": (278, 75),
    "splice": (275, 76),
    "tee": (276, 77),
    "timer_create": (222, 107),
    # what others do with their files and disks
    "inotify_init": (253, None),
    "inotify_init1": (294, 26),
    "sync": (162, 81),
    "syncfs": (306, 267),
    # who one is, where one is
    "setuid": (105, 146),
    "setgid": (106, 144),
    "setreuid": (113, 145),
    "setregid": (114, 143),
    "setresuid": (117, 147),
    "setresgid": (119, 149),
    "setfsuid": (122, 151),
    "setfsgid": (123, 152),
    "setgroups": (116, 159),
    "capset": (126, 91),
    "unshare": (272, 97),
    "setns": (308, 268),
    "chroot": (161, 51),
    "pivot_root": (155, 41),
    "mount": (165, 40),
    "umount2": (166, 39),
    "personality": (135, 92),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "mknod": (133, None),
    "mknodat": (259, 33),
    # what Landlock does not look at, so that files of the same user anywhere could be changed
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "chown": (92, None),
    "lchown": (94, None),
    "fchown": (93, 55),
    "fchownat": (260, 54),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "utimensat": (280, 88),
    "truncate": (76, 45),  # from version 3 on it does
    # the kernel
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "syslog": (103, 116),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "adjtimex": (159, 171),
    "clock_adjtime": (305, 266),
    "vhangup": (153, 58),
    "iopl": (172, None),
    "ioperm": (173, None),
    "modify_ldt": (154, None),
    "open_by_handle_at": (304, 265),
    "name_to_handle_at": (303, 264),
    "fanotify_init": (300, 262),
    "io_setup": (206, 0),
}

# Refused as well where no other wall keeps a program from the user's files.
CHANGING_FILES: dict[str, tuple[int | None, int | None]] = {
    "creat": (85, None),
    "unlink": (87, None),
    "unlinkat": (263, 35),
    "rename": (82, None),
    "renameat": (264, 38),
    "renameat2": (316, 276),
    "mkdir": (83, None),
    "mkdirat": (258, 34),
    "rmdir": (84, None),
    "link": (86, None),
    "linkat": (265, 37),
    "symlink": (88, None),
    "symlinkat": (266, 36),
}

# Looked at by their arguments below.
LOOKED_AT: dict[str, tuple[int | None, int | None]] = {
    "clone": (56, 220),
    "fcntl": (72, 25),
    "ioctl": (16, 29),
    "mmap": (9, 222),
    "prctl": (157, 167),
    "prlimit64": (302, 261),
    "open": (2, None),
    "openat": (257, 56),
}
_OPEN_FLAGS = {"open": 1, "openat": 2}  # which argument they are
_WRITING, _CREATING, _TRUNCATING = 0o3, 0o100, 0o1000  # O_WRONLY | O_RDWR, O_CREAT, O_TRUNC
_NAMELESS = 0o20000000  # the bit of O_TMPFILE that is not O_DIRECTORY

# fcntl: F_SETOWN, F_SETSIG, F_SETOWN_EX: they choose a process and a signal it is to get.
# F_SETLEASE, F_NOTIFY: who else opens a file. F_SETPIPE_SZ: memory that no limit counts.
_REFUSED_FCNTL = (8, 10, 15, 1024, 1026, 1031)
# prctl: PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_THP_DISABLE: what `layers` has set stays.
_REFUSED_PRCTL = (1, 4, 41)
# mmap: pages shared without a file stay when all but one of them are unmapped, and only that one
# counts as address space.
_MAP_SHARED, _MAP_ANONYMOUS = 0x1, 0x20
# ioctl: TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX: what Python does to files.
_ALLOWED_IOCTL = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)


@dataclass(frozen=True)
class Architecture:
    """A machine the filter is written for."""

    name: str
    """As `os.uname().machine` says it."""
    column: int
    """Its numbers in the tables."""
    audit: int
    """AUDIT_ARCH_* of linux/audit.h."""


ARCHITECTURES = {
    "x86_64": Architecture("x86_64", 0, 0xC000003E),
    "aarch64": Architecture("aarch64", 1, 0xC00000B7),
}


def filter_program(machine: str, *, may_write: bool) -> bytes:
    """The filter as an array of struct sock_filter. KeyError for a machine without a table.

    may_write: whether files may be opened for writing; where is left to other walls.
    """
    architecture = ARCHITECTURES[machine]
    program = [
        _instruction(_LOAD, _ARCHITECTURE),
        *_unless(_JUMP_EQUAL, architecture.audit, _KILL),
        _instruction(_LOAD, _NUMBER),
    ]
    if machine == "x86_64":
        program += _when(_JUMP_GREATER_EQUAL, _X32_BIT, _KILL)
    for number in _ALLOWED_SHARED:
        program += _when(_JUMP_EQUAL, number, _ALLOW)
    # ENOSYS, so that the C library falls back from clone3 to clone, whose flags can be read.
    program += _when(_JUMP_GREATER_EQUAL, _FIRST_SHARED, _ERRNO | errno.ENOSYS)
    refused = REFUSED if may_write else REFUSED | CHANGING_FILES
    for numbers in refused.values():
        refused_number = numbers[architecture.column]
        if refused_number is not None:
            program += _when(_JUMP_EQUAL, refused_number, _REFUSE)
    for name, (argument, rules) in _argument_rules(may_write).items():
        looked_at = LOOKED_AT[name][architecture.column]
        if looked_at is not None:
            program += _by_argument(looked_at, argument, rules)
    program.append(_instruction(_RETURN, _ALLOW))
    return b"".join(program)


def _argument_rules(may_write: bool) -> dict[str, tuple[int, list[bytes]]]:
    """For each call of LOOKED_AT the argument and the rules on it."""
    fcntl = [part for command in _REFUSED_FCNTL for part in _when(_JUMP_EQUAL, command, _REFUSE)]
    prctl = [part for option in _REFUSED_PRCTL for part in _when(_JUMP_EQUAL, option, _REFUSE)]
    ioctl = [part for what in _ALLOWED_IOCTL for part in _when(_JUMP_EQUAL, what, _ALLOW)]
    # Where /dev/zero can be opened, its shared pages are such pages as well.
    shared = [
        *(_unless(_JUMP_SET, _MAP_ANONYMOUS, _ALLOW) if may_write else []),
        *_when(_JUMP_SET, _MAP_SHARED, _REFUSE),
    ]
    if may_write:
        # Truncating what was opened for reading, which Landlock sees from version 3 on.
        opening = [
            *_when(_JUMP_SET, _NAMELESS, _REFUSE),
            *_unless(_JUMP_SET, _TRUNCATING, _ALLOW),
            *_unless(_JUMP_SET, _WRITING, _REFUSE),
        ]
    else:
        opening = _when(_JUMP_SET, _WRITING | _CREATING | _TRUNCATING, _REFUSE)
    return {
        "clone": (0, _unless(_JUMP_SET, _CLONE_THREAD, _REFUSE)),
        "fcntl": (1, fcntl),
        "ioctl": (1, [*ioctl, _instruction(_RETURN, _ERRNO | errno.ENOTTY)]),
        "mmap": (3, shared),
        "prctl": (0, prctl),
        # Limits of oneself only; others of the same user have a process number.
        "prlimit64": (0, _unless(_JUMP_EQUAL, 0, _REFUSE)),
        **{name: (argument, opening) for name, argument in _OPEN_FLAGS.items()},
    }


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def _when(test: int, value: int, result: int) -> list[bytes]:
    return [_instruction(test, value, 0, 1), _instruction(_RETURN, result)]


def _unless(test: int, value: int, result: int) -> list[bytes]:
    return [_instruction(test, value, 1, 0), _instruction(_RETURN, result)]


def _by_argument(number: int, argument: int, rules: list[bytes]) -> list[bytes]:
    """Rules on the low half of an argument of one system call; what they let pass is allowed."""
    body = [
        _instruction(_LOAD, _ARGUMENT + 8 * argument),
        *rules,
        _instruction(_RETURN, _ALLOW),
    ]
    return [_instruction(_JUMP_EQUAL, number, 0, len(body)), *body]
