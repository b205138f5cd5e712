"""Compare how far the tokenizer compresses with the vocabularies of GPT-2 and GPT-4.

python -m scripts.tok_eval

Nothing is fetched: a vocabulary that `python -m scripts.assets prefetch vocabulary` has not brought
is left out, and the report says so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rustbpe
from nanochat import configurator, report
from nanochat.common import UserError
from nanochat.dataset import open_source
from nanochat.tokenizer import Tokenizer, get_tokenizer
from nanochat.vocabularies import BASELINES, Vocabulary

logger = logging.getLogger(__name__)

COLUMNS = ("text", "bytes", "tokens", "ratio", "our tokens", "our ratio", "difference")

# One paragraph per kind of text, written for this file.
NEWS = (
    "The city council voted late on Tuesday to rebuild the old harbour bridge, ending a dispute "
    "that had divided residents for more than three years. Work is expected to begin in March "
    'and to cost about 48 million, two thirds of it paid by the region. "We waited for this for '
    'a long time," said the mayor, who had made the bridge the centre of her campaign. '
)
KOREAN = (
    "\uc624\ub298 \uc544\uce68\uc5d0 \ube44\uac00 \ub9ce\uc774 \uc640\uc11c \ubc84\uc2a4\uac00 "
    "\ub2a6\uac8c \uc654\ub2e4. \uc6b0\ub9ac\ub294 \ud559\uad50 \uc55e\uc5d0\uc11c "
    "\uce5c\uad6c\ub97c \uae30\ub2e4\ub838\uace0, \uc810\uc2ec\uc5d0\ub294 \ub530\ub73b\ud55c "
    "\uad6d\uc218\ub97c \uba39\uc5c8\ub2e4. "
)
CODE = '''
class Stack:
    """Last in, first out."""

    def __init__(self, items=()):
        self._items = list(items)

    def push(self, item):
        self._items.append(item)

    def pop(self):
        if not self._items:
            raise IndexError("pop from an empty stack")
        return self._items.pop()
'''
MATH = r"""
\begin{theorem} For every $n \ge 1$, $\sum_{k=1}^{n} k^3 = \left(\frac{n(n+1)}{2}\right)^2$.
\end{theorem}
\begin{proof} The case $n = 1$ is clear. If it holds for $n$, adding $(n+1)^3$ to both sides gives
$\frac{(n+1)^2 (n^2 + 4n + 4)}{4} = \left(\frac{(n+1)(n+2)}{2}\right)^2$. \end{proof}
"""
SCIENCE = (
    "In the light reactions of photosynthesis, energy absorbed by chlorophyll moves electrons "
    "along a chain of carriers in the thylakoid membrane, and the protons pumped across it drive "
    "the synthesis of ATP. The Calvin cycle then spends ATP and NADPH to fix carbon dioxide into "
    "three-carbon sugars, six turns of the cycle for every molecule of glucose. "
)


@dataclass(frozen=True)
class Config:
    """Measure compression on several kinds of text."""


@dataclass(frozen=True)
class Row:
    """Compression of one text by a baseline and by us."""

    text: str
    num_bytes: int
    tokens: int
    our_tokens: int

    def cells(self) -> tuple[str, ...]:
        """Return what the columns show; the difference is the share of tokens we save."""
        saved = (self.tokens - self.our_tokens) / self.tokens * 100
        ratio, our_ratio = self.num_bytes / self.tokens, self.num_bytes / self.our_tokens
        numbers = (f"{self.num_bytes:,}", f"{self.tokens:,}", f"{ratio:.2f}")
        return (self.text, *numbers, f"{self.our_tokens:,}", f"{our_ratio:.2f}", f"{saved:+.1f} %")


def load_baseline(vocabulary: Vocabulary) -> rustbpe.Tokenizer | None:
    """Return the tokenizer of a vocabulary, or None with a warning where it cannot be had."""
    try:
        return vocabulary.load()
    except (UserError, ValueError) as error:
        logger.warning("%s is left out: %s", vocabulary.title, error)
    return None


def texts_to_compare(tokenizer: Tokenizer) -> dict[str, str]:
    """Return the texts by name: written ones, and the first documents of the training data."""
    texts = {"news": NEWS, "korean": KOREAN, "code": CODE, "math": MATH, "science": SCIENCE}
    data = tokenizer.trained_on
    try:
        source = open_source(data) if data else None
    except UserError as error:
        logger.warning("skipping the rows of the training data: %s", error)
        source = None
    if source is not None:
        label = "fwe" if data == "fineweb-edu" else Path(source.name).name
        for split in ("train", "val"):
            documents, _ = next(iter(source.documents(split, endless=False)))
            texts[f"{label}-{split}"] = "\n".join(documents)
    return texts


def count_tokens(texts: Mapping[str, str], encode: Callable[[str], list[int]]) -> dict[str, int]:
    """Return the number of tokens of every text."""
    return {name: len(encode(text)) for name, text in texts.items()}


def compare(
    texts: Mapping[str, str], theirs: Mapping[str, int], ours: Mapping[str, int]
) -> list[Row]:
    """Return one row per text."""
    return [Row(name, len(texts[name].encode()), theirs[name], ours[name]) for name in texts]


def to_markdown(title: str, rows: Sequence[Row]) -> str:
    """Return a table with a heading."""
    lines = [f"### Comparison with {title}", "", "| " + " | ".join(COLUMNS) + " |"]
    lines.append("| --- |" + " ---: |" * (len(COLUMNS) - 1))
    lines += ["| " + " | ".join(row.cells()) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def to_console(title: str, rows: Sequence[Row]) -> str:
    """Return the table for a terminal: green where we need fewer tokens, red where more."""
    table = [COLUMNS, *(row.cells() for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(COLUMNS))]
    lines = [f"Comparison with {title}"]
    for index, cells in enumerate(table):
        line = "  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        if index > 0:
            better = rows[index - 1].our_tokens <= rows[index - 1].tokens
            line = f"\033[{92 if better else 91}m{line}\033[0m"
        lines.append(line)
    return "\n".join(lines)


def main(config: Config) -> None:
    tokenizer = get_tokenizer()
    texts = texts_to_compare(tokenizer)
    for name, text in texts.items():
        assert tokenizer.decode(tokenizer.encode(text)) == text, f"round trip of {name} failed"
    ours = count_tokens(texts, tokenizer.encode)
    parts: list[str | dict[str, Any]] = []
    for vocabulary in BASELINES:
        baseline = load_baseline(vocabulary)
        if baseline is None:
            parts.append(f"{vocabulary.title} is left out: its vocabulary is not here.\n")
            continue
        rows = compare(texts, count_tokens(texts, baseline.encode), ours)
        size = baseline.vocab_size + vocabulary.num_special
        title = f"{vocabulary.title} ({size:,} tokens)"
        print(to_console(title, rows))
        parts.append(to_markdown(title, rows))
    own = [Row(name, len(text.encode()), ours[name], ours[name]) for name, text in texts.items()]
    lines = ["| text | bytes | tokens | bytes per token |", "| --- | ---: | ---: | ---: |"]
    lines += ["| " + " | ".join(row.cells()[:4]) + " |" for row in own]
    print("\n".join(lines))
    parts.insert(0, "\n".join(lines) + "\n")
    report.append("Tokenizer evaluation", parts)


if __name__ == "__main__":
    configurator.run(main, Config)
