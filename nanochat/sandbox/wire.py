"""Values and frames that cross between the program and its tests. Standard library only.

What comes from the program is never trusted: it is JSON, decoded into exact built-in types, so
that no `__eq__` of the program takes part in a comparison. One frame is four bytes of length and
a JSON document.
"""

from __future__ import annotations

import json
import math
import os
import struct
from typing import Any

MAX_FRAME_BYTES = 64 << 20
_SEQUENCES: dict[str, Any] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
_ITERATORS = ("generator", "map", "filter", "zip", "reversed", "enumerate")
_CHUNK_BYTES = 1 << 16


class Opaque:
    """Stands for a value of a type that cannot cross; equal to nothing but itself."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"<a {self.name}, which cannot leave the sandbox>"


class ChannelClosedError(Exception):
    """The other side is gone, or what it sent is no frame."""


# ---- values --------------------------------------------------------------------------------------


def encode(value: Any) -> Any:
    """A value as JSON types: scalars as they are, all others as [type name, content].

    Subclasses cross as the built-in they extend, scalars of array libraries as their Python
    number, iterators as an iterator over what is left of them.
    """
    if value is None or value is True or value is False:
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        number = int.__int__(value)
        return number if abs(number) < 1 << 63 else ["int", hex(number)]
    if isinstance(value, float):
        number_ = float.__float__(value)
        return number_ if math.isfinite(number_) else ["float", repr(number_)]
    if isinstance(value, complex):
        return ["complex", [encode(value.real), encode(value.imag)]]
    if isinstance(value, (bytes, bytearray)):
        name = "bytes" if isinstance(value, bytes) else "bytearray"
        return [name, value.hex()]
    if isinstance(value, range):
        return ["range", [value.start, value.stop, value.step]]
    if isinstance(value, dict):
        return ["dict", [[encode(key), encode(item)] for key, item in dict.items(value)]]
    for name, kind in _SEQUENCES.items():
        if isinstance(value, kind):
            return [name, [encode(item) for item in kind.__iter__(value)]]
    return _encode_other(value)


def _encode_other(value: Any) -> Any:
    name = type(value).__name__
    if name in _ITERATORS:
        return ["iterator", [encode(item) for item in value]]
    if name in ("dict_keys", "dict_values", "dict_items"):
        return ["opaque", name]
    if name in ("Fraction", "Decimal"):
        return [name, str(value)]
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return encode(value.item())
    return ["opaque", name]


def decode(data: Any) -> Any:
    """The inverse of `encode`. ValueError or TypeError for what is none."""
    if not isinstance(data, list):
        if data is not None and not isinstance(data, (bool, str, int, float)):
            raise ValueError("not an encoded value")
        return data
    name, content = data
    if name in _SEQUENCES:
        return _SEQUENCES[name](decode(item) for item in content)
    if name == "dict":
        return {decode(key): decode(item) for key, item in content}
    return _decode_other(name, content)


def _decode_other(name: str, content: Any) -> Any:
    if name == "int":
        return int(content, 16)
    if name == "float":
        return float(content)
    if name == "complex":
        return complex(decode(content[0]), decode(content[1]))
    if name == "bytes":
        return bytes.fromhex(content)
    if name == "bytearray":
        return bytearray.fromhex(content)
    if name == "range":
        return range(*content)
    if name == "iterator":
        return iter([decode(item) for item in content])
    if name == "Fraction":
        from fractions import Fraction

        return Fraction(content)
    if name == "Decimal":
        from decimal import Decimal

        return Decimal(content)
    return Opaque(str(content))


# ---- frames --------------------------------------------------------------------------------------


def send(descriptor: int, value: Any) -> None:
    """Write one frame. ChannelClosedError when nobody reads any more."""
    data = json.dumps(value).encode("ascii")
    view = memoryview(struct.pack(">I", len(data)) + data)
    try:
        while view:
            view = view[os.write(descriptor, view) :]
    except OSError as error:
        raise ChannelClosedError(str(error)) from error


def receive(descriptor: int) -> Any:
    """Read one frame. ChannelClosedError at the end, for an oversized frame and for no JSON."""
    (length,) = struct.unpack(">I", _read_exactly(descriptor, 4))
    if length > MAX_FRAME_BYTES:
        raise ChannelClosedError(f"a frame of {length} bytes")
    try:
        return json.loads(_read_exactly(descriptor, length))
    except (ValueError, RecursionError) as error:
        raise ChannelClosedError(f"not a frame: {error}") from error


def _read_exactly(descriptor: int, length: int) -> bytes:
    data = bytearray()
    while len(data) < length:
        chunk = os.read(descriptor, min(length - len(data), _CHUNK_BYTES))
        if not chunk:
            raise ChannelClosedError("closed")
        data += chunk
    return bytes(data)
