"""Texts and vocabularies for the tests of the BPE core."""

import functools
import random
from typing import Any

import pytest

import rustbpe

# Pieces from which every rule of every pattern, and every way out of the fast scanner, is reached.
PIECES = [
    *("the", "Hello", "a", "Z", "x1y2", "don't", "I'LL", "we'Ve", "'s", "'", "''s", "'\u017f"),
    *(" ", "  ", "   ", "\n", "\r\n", "\n\n", "\t", " \n ", "\u00a0", "\u3000", "\x85", "\x1c"),
    *(
        ".",
        "...",
        ", ",
        "! ",
        "-",
        "_",
        "(x)",
        "#!/",
        "1",
        "12",
        "123",
        "12345",
        "\u0663",
        "\u2167",
    ),
    *("\u00e9", "na\u00efve", "\u4f60\u597d", "\u2019", "\u201c", "e\u0301", "\u200d", "\0"),
    *(
        "\U0001f469\u200d\U0001f680",
        "\U0001f1e9\U0001f1ea",
        "\u1c89",
        "\ud55c\uad6d",
        "\u0905\u093f",
    ),
]


def corpus(seed: int, num_pieces: int) -> str:
    """Pieces in random order, the same for the same seed."""
    rng = random.Random(seed)
    return "".join(rng.choice(PIECES) + rng.choice(("", "", " ")) for _ in range(num_pieces))


@functools.cache
def trained_tokenizer() -> rustbpe.Tokenizer:
    """A small vocabulary learned from such texts."""
    tokenizer = rustbpe.Tokenizer()
    texts = [corpus(seed, 400) for seed in range(40)]
    tokenizer.train_from_iterator(texts, 700, pattern="nanochat")
    return tokenizer


def tiktoken_of(tokenizer: rustbpe.Tokenizer, pattern: str) -> Any:
    """tiktoken with the same ranks, without special tokens."""
    tiktoken = pytest.importorskip("tiktoken")
    ranks = dict(tokenizer.get_mergeable_ranks())
    return tiktoken.Encoding("t", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
