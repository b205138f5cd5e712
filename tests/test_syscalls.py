"""The filter of system calls: numbers of the kernel's headers, decisions on two machines."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest

from nanochat.sandbox import syscalls

HEADERS = {
    "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    "aarch64": Path("/usr/include/asm-generic/unistd.h"),
}
TABLES = {**syscalls.REFUSED, **syscalls.CHANGING_FILES, **syscalls.LOOKED_AT}


@pytest.mark.parametrize("machine", HEADERS)
def test_the_numbers_are_those_of_the_kernels_headers(machine: str) -> None:
    if not HEADERS[machine].exists():
        pytest.skip("the kernel's headers are not installed")
    text = HEADERS[machine].read_text()
    found = re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)\n", text)
    numbers = {name: int(number) for name, number in found}
    assert len(numbers) > 250
    column = syscalls.ARCHITECTURES[machine].column
    for name, columns in TABLES.items():
        assert columns[column] == numbers.get(name), name


def run_filter(program: bytes, machine_code: int, number: int, *arguments: int) -> int:
    """What the kernel does with a filter: the instructions it uses, executed one by one."""
    padded = [*arguments, 0, 0, 0, 0, 0, 0][:6]
    data = struct.pack("<iIQ6Q", number, machine_code, 0, *padded)
    position, accumulator = 0, 0
    while True:
        code, if_true, if_false, value = struct.unpack_from("<HBBI", program, position * 8)
        position += 1
        if code == 0x06:
            return value
        if code == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, value)
            continue
        holds = {0x15: accumulator == value, 0x35: accumulator >= value}
        position += if_true if (holds | {0x45: bool(accumulator & value)})[code] else if_false


ALLOW, KILL, EPERM, ENOSYS, ENOTTY = 0x7FFF0000, 0x80000000, 0x50001, 0x50026, 0x50019


@pytest.mark.parametrize("machine", syscalls.ARCHITECTURES)
@pytest.mark.parametrize("may_write", [True, False])
def test_the_filter_decides_as_its_tables_say(machine: str, may_write: bool) -> None:
    program = syscalls.filter_program(machine, may_write=may_write)
    architecture = syscalls.ARCHITECTURES[machine]

    def decide(name: str, *arguments: int) -> int:
        number = TABLES[name][architecture.column]
        assert number is not None
        return run_filter(program, architecture.audit, number, *arguments)

    for name, numbers in syscalls.REFUSED.items():
        if numbers[architecture.column] is not None:
            assert decide(name) == EPERM, name
    thread, process = 0x3D0F00, 17  # flags of pthread_create and of fork
    assert (decide("clone", thread), decide("clone", process)) == (ALLOW, EPERM)
    assert (decide("fcntl", 3, 1), decide("fcntl", 3, 8), decide("fcntl", 3, 10)) == (
        (ALLOW, EPERM, EPERM)
    )
    assert (decide("ioctl", 0, 0x5401), decide("ioctl", 0, 0x5412)) == (ALLOW, ENOTTY)
    assert (decide("prlimit64", 0), decide("prlimit64", 4321)) == (ALLOW, EPERM)
    private, shared, shared_memory = 0x22, 0x1, 0x21
    assert decide("mmap", 0, 4096, 3, private) == ALLOW
    assert decide("mmap", 0, 4096, 3, shared) == (ALLOW if may_write else EPERM)
    assert decide("mmap", 0, 4096, 3, shared_memory) == EPERM
    set_death_signal, set_name = 1, 15
    assert (decide("prctl", set_death_signal), decide("prctl", set_name)) == (EPERM, ALLOW)
    reading, truncating, creating = 0o2000000, 0o1000, 0o101
    nameless = 0o20200002
    assert decide("openat", 0, 0, nameless) == EPERM
    assert decide("openat", 0, 0, reading) == ALLOW
    assert decide("openat", 0, 0, truncating) == EPERM
    assert decide("openat", 0, 0, creating) == (ALLOW if may_write else EPERM)
    assert decide("unlinkat") == (ALLOW if may_write else EPERM)
    for number in (435, 437, 425, 434, 424, 600):
        assert run_filter(program, architecture.audit, number) == ENOSYS
    assert run_filter(program, architecture.audit, 436) == ALLOW
    assert run_filter(program, 0x40000003, 1) == KILL  # the table of 32-bit programs


def test_ordinary_calls_are_allowed_on_both_machines() -> None:
    # read, write, mmap, exit_group, futex, getrandom
    ordinary = {"x86_64": (0, 1, 9, 231, 202, 318), "aarch64": (63, 64, 222, 94, 98, 278)}
    for machine, numbers in ordinary.items():
        program = syscalls.filter_program(machine, may_write=True)
        audit = syscalls.ARCHITECTURES[machine].audit
        assert [run_filter(program, audit, number) for number in numbers] == [ALLOW] * 6
    x32 = run_filter(syscalls.filter_program("x86_64", may_write=True), 0xC000003E, 0x40000027)
    assert x32 == KILL
