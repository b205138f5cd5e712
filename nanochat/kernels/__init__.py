"""The compiled kernels: finding the library, and calling it (see README.md).

`nanochat.compiled_decoder` makes answers with it, `nanochat.fused` trains with it.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_size_t, c_uint64, c_void_p
from functools import lru_cache
from pathlib import Path
from typing import Any

from rustbpe.libraries import declare, fitting_libraries

ABI_VERSION = 7


class KernelError(RuntimeError):
    """A kernel refused or panicked: a defect in it or its caller."""


_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "nck_model_new": (c_void_p, POINTER(c_void_p), POINTER(c_void_p), POINTER(c_void_p)),
    "nck_model_free": (c_void_p,),
    "nck_open": (c_void_p, c_uint64, POINTER(c_uint64)),
    "nck_close": (c_void_p, c_uint64),
    "nck_copy": (c_void_p, c_uint64, c_uint64, c_uint64),
    "nck_feed": (c_void_p, c_uint64, c_void_p, c_void_p, c_void_p, c_uint64),
    "nck_choose": (c_uint64, c_uint64, c_void_p, c_void_p, c_void_p),
}


@lru_cache(maxsize=1)
def load() -> ctypes.CDLL | None:
    """The library, or None where there is none that fits this version and this processor."""
    folder = Path(__file__).parent
    for library in fitting_libraries(
        folder, "nanochat_kernels", version_function="nck_abi_version", version=ABI_VERSION
    ):
        declare(library, _SIGNATURES)
        declare(library, {"nck_model_bytes": (c_void_p,)}, c_uint64)
        declare(
            library, dict.fromkeys(("nck_isa", "nck_last_error"), (c_void_p, c_size_t)), c_size_t
        )
        if instruction_set(library):
            return library
    return None


def instruction_set(library: ctypes.CDLL) -> str:
    """Name of the instructions that would be used; "" when the processor has none that fit."""
    buffer = ctypes.create_string_buffer(32)
    size = library.nck_isa(buffer, len(buffer))
    return buffer.raw[:size].decode()


def call(library: ctypes.CDLL, name: str, *arguments: Any) -> None:
    """Call one of the library's functions; KernelError with its message when it fails."""
    if getattr(library, name)(*arguments) == 0:
        return
    buffer = ctypes.create_string_buffer(1024)
    size = library.nck_last_error(buffer, len(buffer))
    raise KernelError(f"{name}: {buffer.raw[:size].decode('utf-8', 'replace')}")
