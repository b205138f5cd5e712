"""Train the tokenizer on the documents of a data source.

python -m scripts.tok_train --data=embedded --vocab_size=4096
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from nanochat import configurator, report
from nanochat.common import UserError, refresh_aliases, tokenizer_dir
from nanochat.dataset import open_source
from nanochat.sources import DocumentSource
from nanochat.sources.parquet import ParquetSource
from nanochat.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# Each kind of chunk the split knows, an apostrophe, wide characters and one outside the BMP.
ROUND_TRIP = (
    "Hello world! It's 2026, isn't it? 12345 + 0.5\n\n\tWide: \u4f60\u597d\u4e16\u754c, "
    "accents: na\u00efve caf\u00e9, emoji: \U0001f30d\U0001f469\u200d\U0001f680   end \n"
)


@dataclass(frozen=True)
class Config:
    """Train a tokenizer; it goes to the folder `tokenizer` of the base folder."""

    data: str = "fineweb-edu"
    """fineweb-edu, climbmix, embedded, or a folder of parquet shards."""
    max_chars: int = 10_000_000_000
    """Stop once more than this many characters were read."""
    doc_cap: int = 10_000
    """Characters taken of one document at most."""
    num_files: int = -1
    """Only that many training shards, the first ones; -1 = all that are here."""
    vocab_size: int = 65_536
    """Tokens, the nine special ones included."""
    num_threads: int = 0
    """Threads for counting words (0: one per processor)."""


def documents(source: DocumentSource, *, max_chars: int, doc_cap: int) -> Iterator[str]:
    """Yield training documents cut to `doc_cap` until more than `max_chars` went out."""
    total = 0
    for texts, _ in source.documents("train", endless=False):
        for text in texts:
            capped = text[:doc_cap]
            total += len(capped)
            yield capped
            if total > max_chars:
                return


def main(config: Config) -> None:
    for name in ("max_chars", "doc_cap"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name} is {getattr(config, name)}; it must be at least 1")
    source = open_source(config.data)
    if config.num_files > 0:
        first = source.shards("train")[: config.num_files]
        source = ParquetSource(source.name, first, source.shards("val")[0])
    begin = time.perf_counter()
    tokenizer = Tokenizer.train_from_iterator(
        documents(source, max_chars=config.max_chars, doc_cap=config.doc_cap),
        config.vocab_size,
        trained_on=config.data,
        num_threads=config.num_threads or None,
    )
    seconds = time.perf_counter() - begin
    decoded = tokenizer.decode(tokenizer.encode(ROUND_TRIP))
    assert decoded == ROUND_TRIP, f"round trip failed: {decoded!r}"
    tokenizer.save(tokenizer_dir())
    refresh_aliases()
    logger.info(
        "tokenizer of %s tokens trained in %.1f s, saved in %s",
        f"{tokenizer.vocab_size:,}",
        seconds,
        tokenizer_dir(),
    )
    lengths = tokenizer.token_bytes[tokenizer.token_bytes > 0]
    statistics = {
        "train_time_seconds": round(seconds, 3),
        "vocab_size": tokenizer.vocab_size,
        "num_special_tokens": len(tokenizer.get_special_tokens()),
        "token_bytes_min": int(lengths.min()),
        "token_bytes_max": int(lengths.max()),
        "token_bytes_mean": round(float(lengths.mean()), 3),
        "token_bytes_std": round(float(lengths.std()), 3),
    }
    report.append("Tokenizer training", [asdict(config), statistics])


if __name__ == "__main__":
    configurator.run(main, Config)
