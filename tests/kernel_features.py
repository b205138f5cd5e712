"""What the kernel itself says that it can do, whatever our sandbox makes of it."""

from __future__ import annotations

import ctypes


def landlock_version() -> int:
    """Of Landlock (landlock_create_ruleset(2)); below 1 where there is none."""
    create_ruleset, ask_version = 444, 1  # the number is the same on all machines
    syscall = ctypes.CDLL(None, use_errno=True).syscall
    return int(syscall(*(ctypes.c_long(number) for number in (create_ruleset, 0, 0, ask_version))))
