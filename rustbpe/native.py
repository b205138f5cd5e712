"""Find the compiled core and call it through ctypes.

`rustbpe/README.md` describes the C ABI. The functions here turn statuses into exceptions and give
the rest of the package numpy arrays.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from ctypes import POINTER, byref, c_int32, c_int64, c_size_t, c_uint8, c_uint32, c_uint64
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rustbpe.libraries import declare, fitting_libraries

ABI_VERSION = 3
_BYTES = ctypes.c_char_p
_U64S = POINTER(c_uint64)
_TEXTS = (_BYTES, c_size_t, _U64S, c_size_t)
_SCATTERED = (POINTER(c_size_t), POINTER(c_size_t), c_size_t)
_ENCODED = (c_int64, c_int64, c_uint32, POINTER(c_int32), c_size_t, POINTER(c_int64))
# Shorter texts than this on average are cheaper to copy than to look up one by one.
_WORTH_AN_ADDRESS = 500

_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "rbpe_split": (_BYTES, c_size_t, _BYTES, c_size_t, _U64S, c_size_t, POINTER(c_size_t)),
    "rbpe_trainer_new": (_BYTES, c_size_t, POINTER(c_uint32), c_uint32, _U64S),
    "rbpe_trainer_feed": (c_uint64, *_TEXTS),
    "rbpe_trainer_feed_scattered": (c_uint64, *_SCATTERED),
    "rbpe_trainer_start": (c_uint64, c_uint32, _U64S),
    "rbpe_trainer_step": (c_uint64, c_uint32),
    "rbpe_trainer_merges": (c_uint64, POINTER(c_uint32), c_size_t, POINTER(c_size_t)),
    "rbpe_encoder_new": (_BYTES, c_size_t, *_TEXTS, _U64S),
    "rbpe_encoder_encode": (c_uint64, *_TEXTS, *_ENCODED),
    "rbpe_encoder_encode_scattered": (c_uint64, *_SCATTERED, *_ENCODED),
    "rbpe_encoder_decode": (
        c_uint64,
        POINTER(c_int32),
        c_size_t,
        POINTER(c_uint8),
        c_size_t,
        POINTER(c_size_t),
    ),
    "rbpe_free": (c_uint64,),
    "rbpe_test_panic": (),
}


class CoreError(RuntimeError):
    """The core panicked: a defect in it, not in the input."""


@lru_cache(maxsize=1)
def load() -> ctypes.CDLL | None:
    """Return the core, or None where there is none that fits."""
    folder = Path(__file__).parent
    for core in fitting_libraries(
        folder, "rustbpe", version_function="rbpe_abi_version", version=ABI_VERSION
    ):
        declare(core, _SIGNATURES)
        declare(core, {"rbpe_last_error": (POINTER(c_uint8), c_size_t)}, c_size_t)
        return core
    return None


def library() -> ctypes.CDLL:
    """Return the core; callers have asked `load` before."""
    core = load()
    if core is None:
        raise CoreError("no compiled core; build it with cargo build --release in rustbpe/")
    return core


def call(name: str, *arguments: Any) -> int:
    """Call a function of the core; raise ValueError if it refused and CoreError if it panicked."""
    core = library()
    status = int(getattr(core, name)(*arguments))
    if status >= 0:
        return status
    size = core.rbpe_last_error(None, 0)
    buffer = (c_uint8 * max(size, 1))()
    core.rbpe_last_error(buffer, size)
    message = bytes(buffer[:size]).decode("utf-8", "replace")
    raise (ValueError if status == -1 else CoreError)(message)


def pack(pieces: Sequence[bytes]) -> tuple[bytes, NDArray[np.uint64]]:
    """Join pieces to one buffer and the offsets of their ends, (len + 1,)."""
    offsets = np.zeros(len(pieces) + 1, dtype=np.uint64)
    np.cumsum(np.fromiter(map(len, pieces), np.uint64, len(pieces)), out=offsets[1:])
    return b"".join(pieces), offsets


@dataclass(frozen=True)
class Batch:
    """Texts as the core takes them: arguments, and what must stay alive while it reads them."""

    arguments: tuple[Any, ...]
    suffix: str
    num_texts: int
    num_bytes: int
    owner: Any

    @classmethod
    def of(cls, texts: Sequence[str]) -> Batch:
        """Make a batch of texts. ValueError for lone surrogates, with their place.

        Long texts are read where they lie, in the UTF-8 form that CPython keeps of a string
        (for ASCII the string itself); short ones are copied into one buffer.
        """
        # A list of our own: the core reads the strings without the interpreter's lock, so they
        # have to outlive whatever the caller does to his, or was never going to keep.
        texts = list(texts)
        try:
            if sum(map(len, texts)) >= _WORTH_AN_ADDRESS * len(texts) and _as_utf8() is not None:
                return cls._scattered(texts)
            return cls._packed([text.encode() for text in texts])
        except UnicodeEncodeError:
            raise ValueError(_surrogate_message(texts)) from None

    @classmethod
    def _packed(cls, pieces: Sequence[bytes]) -> Batch:
        buffer, offsets = pack(pieces)
        arguments = text_arguments(buffer, offsets)
        return cls(arguments, "", len(pieces), len(buffer), (buffer, offsets))

    @classmethod
    def _scattered(cls, texts: Sequence[str]) -> Batch:
        as_utf8, size = _as_utf8(), ctypes.c_ssize_t()
        where, lengths, pointer = [], [], byref(size)
        for text in texts:
            where.append(as_utf8(text, pointer))
            lengths.append(size.value)
        count = len(where)
        addresses, sizes = (c_size_t * count)(*where), (c_size_t * count)(*lengths)
        return cls((addresses, sizes, count), "_scattered", count, sum(lengths), texts)


@lru_cache(maxsize=1)
def _as_utf8() -> Any:
    """Return CPython's function for the UTF-8 form of a string; None on other Pythons."""
    try:
        function = ctypes.pythonapi.PyUnicode_AsUTF8AndSize
    except AttributeError:
        return None
    function.argtypes = (ctypes.py_object, POINTER(ctypes.c_ssize_t))
    function.restype = c_size_t
    return function


def _surrogate_message(texts: Sequence[str]) -> str:
    for index, text in enumerate(texts):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return (
                f"text {index} holds the lone surrogate {text[error.start]!r} at character "
                f"{error.start}, which has no UTF-8 form; replace it first"
            )
    return "a text cannot be written as UTF-8"


def text_arguments(buffer: bytes, offsets: NDArray[np.uint64]) -> tuple[Any, ...]:
    """Return the four arguments of packed texts."""
    return buffer, len(buffer), offsets.ctypes.data_as(_U64S), len(offsets) - 1


class Handle:
    """An object inside the core, freed with its owner."""

    def __init__(self, constructor: str, *arguments: Any) -> None:
        number = c_uint64()
        call(constructor, *arguments, byref(number))
        self.number = number.value

    def __reduce__(self) -> str | tuple[Any, ...]:
        raise TypeError("an object of the core cannot be copied; copy its owner")

    def __del__(self) -> None:
        core = load() if load is not None else None  # None while the interpreter shuts down
        if core is not None and hasattr(self, "number"):
            core.rbpe_free(self.number)


def split(text: str, pattern: str) -> list[str]:
    """Return the chunks of one text (for tests and curiosity)."""
    data, name, count = text.encode(), pattern.encode(), c_size_t()
    ends = np.empty(len(data), dtype=np.uint64)
    pointer = ends.ctypes.data_as(_U64S)
    call("rbpe_split", name, len(name), data, len(data), pointer, len(ends), byref(count))
    starts = [0, *(int(end) for end in ends[: count.value])]
    return [data[a:b].decode() for a, b in itertools.pairwise(starts)]


class Trainer:
    """Counts chunks, then learns merges step by step."""

    def __init__(self, pattern: str, threads: int, byte_ids: Sequence[int] | None = None) -> None:
        name = pattern.encode()
        ids = (c_uint32 * 256)(*byte_ids) if byte_ids is not None else None
        self._handle = Handle("rbpe_trainer_new", name, len(name), ids, threads)

    def feed(self, texts: Sequence[str]) -> None:
        """Count the chunks of some texts; they can be forgotten afterwards."""
        batch = Batch.of(texts)
        call(f"rbpe_trainer_feed{batch.suffix}", self._handle.number, *batch.arguments)

    def start(self, num_merges: int) -> tuple[int, int, int]:
        """End the input. Returns numbers of bytes, of chunks and of distinct chunks."""
        stats = (c_uint64 * 3)()
        call("rbpe_trainer_start", self._handle.number, num_merges, stats)
        return stats[0], stats[1], stats[2]

    def step(self, most: int) -> bool:
        """Learn up to `most` merges; True while there are more."""
        return call("rbpe_trainer_step", self._handle.number, most) == 1

    def merges(self, capacity: int) -> list[tuple[int, int]]:
        """Return up to `capacity` of the merges learned so far."""
        pairs = np.empty((capacity, 2), dtype=np.uint32)
        count = c_size_t()
        pointer = pairs.ctypes.data_as(POINTER(c_uint32))
        call("rbpe_trainer_merges", self._handle.number, pointer, capacity, byref(count))
        return [(int(a), int(b)) for a, b in pairs[: count.value].tolist()]


class Encoder:
    """Encodes batches with a fixed vocabulary."""

    def __init__(self, pattern: str, tokens: Sequence[bytes]) -> None:
        name = pattern.encode()
        arguments = text_arguments(*pack(tokens))
        self._handle = Handle("rbpe_encoder_new", name, len(name), *arguments)

    def encode(
        self, texts: Sequence[str], prepend: int | None, append: int | None, threads: int
    ) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Return all ids in a row, int32, and the offsets of the texts in them, (texts + 1,)."""
        batch = Batch.of(texts)
        around = (prepend is not None) + (append is not None)
        ids = np.empty(batch.num_bytes + around * batch.num_texts, dtype=np.int32)
        id_offsets = np.zeros(batch.num_texts + 1, dtype=np.int64)
        call(
            f"rbpe_encoder_encode{batch.suffix}",
            self._handle.number,
            *batch.arguments,
            -1 if prepend is None else prepend,
            -1 if append is None else append,
            threads,
            ids.ctypes.data_as(POINTER(c_int32)),
            len(ids),
            id_offsets.ctypes.data_as(POINTER(c_int64)),
        )
        # one id per byte was the worst case: give back what was not needed
        ids.resize(int(id_offsets[-1]), refcheck=False)
        return ids, id_offsets

    def decode(self, ids: NDArray[np.int32]) -> bytes:
        """Return the bytes of some ids. ValueError for an id out of range."""
        ids = np.ascontiguousarray(ids, dtype=np.int32)
        pointer, needed = ids.ctypes.data_as(POINTER(c_int32)), c_size_t()
        arguments = (self._handle.number, pointer, len(ids))
        call("rbpe_encoder_decode", *arguments, None, 0, byref(needed))
        out = np.empty(needed.value, dtype=np.uint8)
        where = out.ctypes.data_as(POINTER(c_uint8))
        call("rbpe_encoder_decode", *arguments, where, len(out), byref(needed))
        return out.tobytes()
