"""Byte pair encoding, slow and obviously right.

The specification of everything the Rust core does, the oracle of its tests, and what runs where no
compiled core exists. Nothing here is clever; read it first.
"""

from __future__ import annotations

import heapq
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

from rustbpe.unicode_ranges import LETTERS, NUMBERS, SPACES

# The published split patterns. gpt4 is cl100k_base and gpt2 is r50k_base as tiktoken ships them;
# gpt4-2023 is cl100k_base as first published, with which PyPI's rustbpe trains by default;
# nanochat is that one with digit runs of 1-2, which suits small vocabularies.
PATTERNS = {
    "nanochat": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    "gpt4": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    "gpt4-2023": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
}
# Other spellings of the same language, as found in published files.
_SPELLINGS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "gpt4-2023",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": "gpt2",
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": "gpt2",
}


def pattern_name(pattern: str) -> str | None:
    """Return the name of a published pattern given by its name or its text, else None."""
    if pattern in PATTERNS:
        return pattern
    for name, text in PATTERNS.items():
        if pattern == text:
            return name
    return _SPELLINGS.get(pattern)


def _class_text(ranges: Sequence[tuple[int, int]]) -> str:
    return "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in ranges)


@lru_cache(maxsize=16)
def splitter(pattern: str) -> Callable[[str], list[str]]:
    """Return the function that cuts a text into chunks.

    The four published patterns run on the standard library with the character classes of
    `unicode_ranges.py` written out, so that the result does not depend on the Unicode version of
    the Python at hand. Any other pattern is compiled by the package `regex` as it is.
    """
    name = pattern_name(pattern)
    if name is None:
        return _foreign_splitter(pattern)
    text = (
        PATTERNS[name].replace("++", "+").replace("?+", "?").replace("3}+", "3}").replace("*+", "*")
    )
    letters, numbers, spaces = (_class_text(ranges) for ranges in (LETTERS, NUMBERS, SPACES))
    # \S first: it must not be found inside what replaces \s
    text = text.replace(r"\S", f"[^{spaces}]")
    text = text.replace(r"[^\s\p{L}\p{N}]", f"[^{spaces}{letters}{numbers}]")
    text = text.replace(r"[^\r\n\p{L}\p{N}]", rf"[^\r\n{letters}{numbers}]")
    text = text.replace(r"\p{L}", f"[{letters}]").replace(r"\p{N}", f"[{numbers}]")
    text = text.replace(r"\s", f"[{spaces}]").replace("$", r"\Z")
    # with folding, Unicode's long s is an s; `re` agrees, and this keeps it visible
    text = text.replace("(?i:[sdmt]|ll|ve|re)", "(?:[sSdDmMtT\u017f]|[lL][lL]|[vV][eE]|[rR][eE])")
    return re.compile(text).findall


def _foreign_splitter(pattern: str) -> Callable[[str], list[str]]:
    try:
        import regex
    except ImportError as error:
        raise ValueError(
            f"the split pattern {pattern!r} is not one of {', '.join(PATTERNS)}; "
            "other patterns need `pip install regex`"
        ) from error
    try:
        compiled: Any = regex.compile(pattern)
    except regex.error as error:
        raise ValueError(f"the split pattern {pattern!r} is not valid: {error}") from error
    return lambda text: [match.group() for match in compiled.finditer(text)]


def count_chunks(texts: Iterable[str], pattern: str) -> Counter[bytes]:
    """Count the chunks of all texts."""
    split = splitter(pattern)
    counts: Counter[bytes] = Counter()
    for text in texts:
        counts.update(chunk.encode() for chunk in split(text))
    return counts


def replace_pair(ids: list[int], pair: tuple[int, int], new_id: int) -> list[int]:
    """Replace every occurrence of `pair`, from the left, by `new_id`."""
    out: list[int] = []
    at = 0
    while at < len(ids):
        if tuple(ids[at : at + 2]) == pair:
            out.append(new_id)
            at += 2
        else:
            out.append(ids[at])
            at += 1
    return out


def learn_merges(
    counts: dict[bytes, int], num_merges: int, byte_ids: Sequence[int] = range(256)
) -> list[tuple[int, int]]:
    """Merge the most frequent pair, ties to the smallest pair of ids, `num_merges` times.

    Pairs are counted per word and updated when a word changes; words are found again through
    the pairs they contain. byte_ids[b] is the id of byte b.
    """
    words = [[byte_ids[byte] for byte in chunk] for chunk in counts]
    weights = list(counts.values())
    pair_counts: Counter[tuple[int, int]] = Counter()
    where: dict[tuple[int, int], set[int]] = {}
    for index, word in enumerate(words):
        for pair in itertools.pairwise(word):
            pair_counts[pair] += weights[index]
            where.setdefault(pair, set()).add(index)
    # counts of a pair only fall once it exists, so the top of the heap is right or too high
    heap = [(-count, pair) for pair, count in pair_counts.items()]
    heapq.heapify(heap)
    merges: list[tuple[int, int]] = []
    while len(merges) < num_merges and heap:
        stored, best = heapq.heappop(heap)
        if pair_counts[best] != -stored:
            if pair_counts[best] > 0:
                heapq.heappush(heap, (-pair_counts[best], best))
            continue
        new_id = 256 + len(merges)
        merges.append(best)
        fresh: set[tuple[int, int]] = set()
        for index in where.pop(best):
            old, new = words[index], replace_pair(words[index], best, new_id)
            for pair in itertools.pairwise(old):
                pair_counts[pair] -= weights[index]
            for pair in itertools.pairwise(new):
                pair_counts[pair] += weights[index]
                where.setdefault(pair, set()).add(index)
                if new_id in pair:
                    fresh.add(pair)
            words[index] = new
        for pair in fresh:
            heapq.heappush(heap, (-pair_counts[pair], pair))
    return merges


def tokens_of(
    merges: Iterable[tuple[int, int]], byte_ids: Sequence[int] = range(256)
) -> list[bytes]:
    """Return the bytes of every token in id order."""
    tokens = [b""] * 256
    for byte, token_id in enumerate(byte_ids):
        tokens[token_id] = bytes([byte])
    for left, right in merges:
        tokens.append(tokens[left] + tokens[right])
    return tokens


def encode_chunk(chunk: bytes, ranks: dict[bytes, int]) -> list[int]:
    """Merge the neighbours whose concatenation has the lowest rank until none is a token."""
    parts = [chunk[at : at + 1] for at in range(len(chunk))]
    while len(parts) > 1:
        candidates = [(ranks.get(a + b), at) for at, (a, b) in enumerate(itertools.pairwise(parts))]
        found = [(rank, at) for rank, at in candidates if rank is not None]
        if not found:
            break
        _, at = min(found)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [ranks[part] for part in parts]


def encode(text: str, ranks: dict[bytes, int], pattern: str) -> list[int]:
    """Encode a text. A chunk that is a token as a whole is that token."""
    ids: list[int] = []
    for piece in splitter(pattern)(text):
        chunk = piece.encode()
        whole = ranks.get(chunk)
        ids += [whole] if whole is not None else encode_chunk(chunk, ranks)
    return ids
