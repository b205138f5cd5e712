"""Find and open libraries compiled from Rust: this package's core, and any other beside Python."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping
from ctypes import c_int32
from pathlib import Path
from typing import Any


def fitting_libraries(
    folder: Path, name: str, *, version_function: str, version: int
) -> Iterator[ctypes.CDLL]:
    """Yield the libraries of a crate whose version fits: installed ones, then cargo's own output.

    folder: the crate's and the package's. name: what cargo calls the library. version_function:
    its function that returns the version of its interface.
    """
    release = folder / "target" / "release"
    built = [release / f"lib{name}.so", release / f"lib{name}.dylib", release / f"{name}.dll"]
    installed = [path for end in ("so", "pyd", "dylib") for path in folder.glob(f"_core*.{end}")]
    for path in [*sorted(installed), *built]:
        try:
            library = ctypes.CDLL(str(path))
            found = getattr(library, version_function)()
        except (OSError, AttributeError):  # not there, for another machine, or another library
            continue
        if found == version:
            yield library


def declare(
    library: ctypes.CDLL, signatures: Mapping[str, tuple[Any, ...]], result: Any = c_int32
) -> None:
    """Tell ctypes the arguments of functions, and what all of them return."""
    for name, arguments in signatures.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, result
