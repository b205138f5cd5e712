"""Other people's vocabulary files: reading and writing them.

- `.tiktoken`: one token a line, base64 and rank.
- GPT-2: `vocab.json` (or `encoder.json`) and `merges.txt` (or `vocab.bpe`), bytes written as
  printable characters.
- HuggingFace `tokenizer.json`, written only.
- `tokenizer.pkl` of the original nanochat, a pickled tiktoken.Encoding, read only, and without
  running anything that the file asks for.
"""

from __future__ import annotations

import base64
import binascii
import json
import pickle
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from rustbpe.reference import PATTERNS, encode_chunk, pattern_name

# Oniguruma, the engine of `tokenizers`, reads {1,2}+ as a repetition and $ as the end of a line,
# so possessive quantifiers are left out (the classes do not overlap: nothing changes).
_ONIGURUMA = {
    "nanochat": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    "gpt4": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+\z|\s*[\r\n]|\s+(?!\S)|\s+",
    # spelled as in published files, by which other libraries recognise it
    "gpt4-2023": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
}


@lru_cache(maxsize=1)
def byte_characters() -> list[str]:
    """Return the printable character that stands for each byte in GPT-2's files."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def to_characters(token: bytes) -> str:
    """Write a token as GPT-2's files do."""
    characters = byte_characters()
    return "".join(characters[byte] for byte in token)


def from_characters(text: str) -> bytes:
    """Read a token of GPT-2's files. ValueError for a character that stands for no byte."""
    values = {character: byte for byte, character in enumerate(byte_characters())}
    try:
        return bytes(values[character] for character in text)
    except KeyError as error:
        raise ValueError(f"{text!r} holds {error.args[0]!r}, which stands for no byte") from None


def load_tiktoken(path: str | Path) -> list[bytes]:
    """Return the tokens of a `.tiktoken` file in id order. ValueError when ranks have gaps."""
    ranks: dict[int, bytes] = {}
    for number, line in enumerate(Path(path).read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            encoded, rank = line.split()
            ranks[int(rank)] = base64.b64decode(encoded, validate=True)
        except (ValueError, binascii.Error) as error:
            raise ValueError(f"{path}, line {number}: {error}; expected 'base64 rank'") from error
    return _in_order(ranks, path)


def dump_tiktoken(tokens: Sequence[bytes], path: str | Path) -> None:
    """Write the tokens as a `.tiktoken` file."""
    lines = [b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens)]
    Path(path).write_bytes(b"".join(lines))


def load_gpt2(vocab: str | Path, merges: str | Path) -> tuple[list[bytes], dict[str, int]]:
    """Return tokens in id order and special tokens of GPT-2's two files.

    A special token is an entry that is neither a byte nor the result of a merge. ValueError when
    an id does not agree with the order of the merges, on which tokenization would depend.
    """
    ids: dict[str, int] = json.loads(Path(vocab).read_text(encoding="utf-8"))
    lines = Path(merges).read_text(encoding="utf-8").split("\n")
    pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    learned = ["".join(pair) for pair in pairs]
    in_order = [ids.get(token, -1) for token in learned]
    if in_order != sorted(in_order) or -1 in in_order:
        raise ValueError(f"the ids of {vocab} do not follow the merges of {merges}")
    mergeable = {*byte_characters(), *learned}
    ranks = {ids[token]: from_characters(token) for token in mergeable if token in ids}
    specials = {token: number for token, number in ids.items() if token not in mergeable}
    return _in_order(ranks, vocab), specials


def _in_order(ranks: Mapping[int, bytes], path: str | Path) -> list[bytes]:
    if sorted(ranks) != list(range(len(ranks))):
        raise ValueError(f"the ranks of {path} are not 0 to {len(ranks) - 1} without a gap")
    return [ranks[rank] for rank in range(len(ranks))]


def merges_of(tokens: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    """Return the pair that makes each token: its encoding with only the tokens before it.

    A token that does not come from exactly two others (tiktoken matches such chunks as a whole)
    has no merge.
    """
    ranks = {token: rank for rank, token in enumerate(tokens)}
    merges = []
    for rank, token in enumerate(tokens):
        if len(token) == 1:
            continue
        lower = _Below(ranks, rank)
        parts = encode_chunk(token, lower)
        if len(parts) == 2:
            merges.append((tokens[parts[0]], tokens[parts[1]]))
    return merges


class _Below(dict[bytes, int]):
    """The ranks below a limit, without copying them."""

    def __init__(self, ranks: dict[bytes, int], limit: int) -> None:
        super().__init__()
        self._ranks, self._limit = ranks, limit

    def get(self, token: bytes, default: Any = None) -> Any:
        rank = self._ranks.get(token)
        return rank if rank is not None and rank < self._limit else default

    def __getitem__(self, token: bytes) -> int:
        return self._ranks[token]


def to_huggingface(
    tokens: Sequence[bytes],
    pattern: str,
    special_tokens: Mapping[str, int],
    merges: Sequence[tuple[int, int]] | None = None,
) -> dict[str, Any]:
    """Return the content of a `tokenizer.json` that gives identical ids.

    `merges`: pairs of ids if known; else they are worked out from the tokens.
    """
    name = pattern_name(pattern)
    regex = _ONIGURUMA[name] if name is not None else pattern
    if merges is not None:
        pairs = [(tokens[left], tokens[right]) for left, right in merges]
    else:
        pairs = merges_of(tokens)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    by_id = sorted(special_tokens.items(), key=lambda item: item[1])
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": n, **flags, "special": True} for n, i in by_id],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split, {**byte_level, "use_regex": False}],
        },
        "post_processor": None,
        "decoder": {**byte_level, "use_regex": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            # a chunk that is a token is that token, as in tiktoken
            "ignore_merges": True,
            "vocab": {to_characters(token): rank for rank, token in enumerate(tokens)},
            "merges": [[to_characters(a), to_characters(b)] for a, b in pairs],
        },
    }


class _PickledEncoding:
    """Stands in for tiktoken.Encoding: keeps the state and does nothing with it."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    """Knows one harmless class; everything else a pickle can call is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("tiktoken.core", "Encoding"):
            return _PickledEncoding
        if (module, name) == ("copyreg", "_reconstructor"):
            return lambda *_: _PickledEncoding()
        if (module, name) == ("builtins", "object"):
            return object
        raise pickle.UnpicklingError(f"it wants {module}.{name}, which is not allowed")


def load_pickled_encoding(path: str | Path) -> tuple[list[bytes], str, dict[str, int]]:
    """Return tokens, pattern and special tokens of an original nanochat `tokenizer.pkl`.

    Nothing of the file is executed. ValueError when it holds anything but a tiktoken.Encoding.
    """
    try:
        with Path(path).open("rb") as file:
            value = _Unpickler(file).load()
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(f"{path} is not a pickled tiktoken encoding: {error}") from error
    state = value.state if isinstance(value, _PickledEncoding) else None
    if not isinstance(state, dict):
        raise ValueError(f"{path} does not hold a tiktoken encoding with its ranks")
    try:
        ranks = {int(rank): bytes(token) for token, rank in state["mergeable_ranks"].items()}
        specials = {str(name): int(i) for name, i in state["special_tokens"].items()}
        pattern = str(state["pat_str"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} lacks ranks, pattern or special tokens: {error!r}") from error
    return _in_order(ranks, path), pattern, specials


def named(pattern: str) -> str:
    """Return the short name of a published pattern, or the pattern itself."""
    return pattern_name(pattern) or pattern


__all__ = [
    "PATTERNS",
    "byte_characters",
    "dump_tiktoken",
    "from_characters",
    "load_gpt2",
    "load_pickled_encoding",
    "load_tiktoken",
    "merges_of",
    "named",
    "to_characters",
    "to_huggingface",
]
