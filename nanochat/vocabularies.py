"""The vocabularies of GPT-2 and GPT-4, with which `tok_eval` compares ours."""

from __future__ import annotations

from dataclasses import dataclass

from nanochat.assets import Asset, Url, files_of
from rustbpe import Tokenizer
from rustbpe.formats import load_gpt2, load_tiktoken
from rustbpe.reference import PATTERNS

_ADDRESS = "https://openaipublic.blob.core.windows.net"


@dataclass(frozen=True)
class Vocabulary:
    """Somebody else's vocabulary: its files, as published, and the pattern that splits text."""

    title: str
    name: str
    assets: tuple[Asset, ...]
    pattern: str
    num_special: int
    """Tokens that stand for no text, for the size people know."""

    @property
    def is_present(self) -> bool:
        """Whether its files are on this machine."""
        return all(asset.path.exists() for asset in self.assets)

    def load(self) -> Tokenizer:
        """Read it; UserError with the command that fetches it."""
        paths = [path for asset in self.assets for path in files_of(asset)]
        tokens = load_gpt2(*paths)[0] if len(paths) == 2 else load_tiktoken(paths[0])
        return Tokenizer.from_tokens(tokens, PATTERNS[self.pattern])


def _file(vocabulary: str, path: str, sha256: str, num_bytes: int) -> Asset:
    file = path.rpartition("/")[2]
    return Asset(
        name=f"vocabulary/{vocabulary}/{file}",
        place=f"vocabularies/{vocabulary}/{file}",
        source=Url(f"{_ADDRESS}/{path}", sha256),
        license="MIT",
        approximate_bytes=num_bytes,
        is_optional=True,
    )


# Addresses and hashes are those of tiktoken's openai_public.py.
BASELINES = (
    Vocabulary(
        title="GPT-2",
        name="gpt2",
        assets=(
            _file(
                "gpt2",
                "gpt-2/encodings/main/encoder.json",
                "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
                1_042_301,
            ),
            _file(
                "gpt2",
                "gpt-2/encodings/main/vocab.bpe",
                "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
                456_318,
            ),
        ),
        pattern="gpt2",
        num_special=1,
    ),
    Vocabulary(
        title="GPT-4",
        name="cl100k_base",
        assets=(
            _file(
                "cl100k_base",
                "encodings/cl100k_base.tiktoken",
                "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
                1_681_126,
            ),
        ),
        pattern="gpt4",
        num_special=5,
    ),
)
