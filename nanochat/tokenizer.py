"""Text and conversations to token ids and back. No torch.

The vocabulary is a byte level BPE (`rustbpe`) plus nine special tokens with the ids after it.
Special tokens are never recognised in text: they only come from rendering a conversation.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import rustbpe
from nanochat.common import (
    UserError,
    atomic_write_bytes,
    atomic_write_text,
    read_json,
    tokenizer_dir,
)
from nanochat.conversation import Conversation, Message
from rustbpe.reference import PATTERNS, pattern_name

logger = logging.getLogger(__name__)

SPECIAL_TOKENS = (
    "<|bos|>",  # begins every document and conversation
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",  # the assistant calls the calculator
    "<|python_end|>",
    "<|output_start|>",  # what the calculator answered
    "<|output_end|>",
)
SPLIT_PATTERN = "nanochat"
FORMAT = "nanochat-tokenizer-1"
NUM_BYTES = 256
Piece = tuple[str | int, int]  # text or the id of a special token, and its mask


class Tokenizer:
    """A vocabulary with special tokens.

    vocabulary: the mergeable tokens, ids 0...; special_tokens: name -> id, ids after those.
    """

    def __init__(
        self,
        vocabulary: rustbpe.Tokenizer,
        special_tokens: Mapping[str, int] | None = None,
        *,
        bos: str = SPECIAL_TOKENS[0],
        trained_on: str = "",
    ) -> None:
        first = vocabulary.vocab_size
        if special_tokens is None:
            special_tokens = {name: first + i for i, name in enumerate(SPECIAL_TOKENS)}
        if any(token_id < first for token_id in special_tokens.values()):
            raise UserError(f"a special token has an id below the {first} mergeable tokens")
        self.vocabulary = vocabulary
        self.trained_on = trained_on
        self._specials = dict(special_tokens)
        self._special_names = {token_id: name for name, token_id in self._specials.items()}
        self._bos = bos
        self.bos_id = self.encode_special(bos)

    # ---- making one ---------------------------------------------------------------------------

    @classmethod
    def train_from_iterator(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        *,
        trained_on: str = "",
        num_threads: int | None = None,
    ) -> Tokenizer:
        """Learn a vocabulary of `vocab_size` tokens, the nine special ones included.

        Fewer when the texts have nothing left to merge. UserError below 256 + 9.
        """
        num_mergeable = vocab_size - len(SPECIAL_TOKENS)
        if num_mergeable < NUM_BYTES:
            raise UserError(
                f"a vocabulary of {vocab_size} tokens is too small: the {NUM_BYTES} bytes and "
                f"{len(SPECIAL_TOKENS)} special tokens need {NUM_BYTES + len(SPECIAL_TOKENS)}; "
                "raise --vocab-size"
            )
        if vocab_size > rustbpe.MAX_VOCAB_SIZE:
            raise UserError(
                f"a vocabulary of {vocab_size:,} tokens was asked for; at most "
                f"{rustbpe.MAX_VOCAB_SIZE:,} are possible: lower --vocab-size"
            )
        vocabulary = rustbpe.Tokenizer()
        vocabulary.train_from_iterator(
            texts, num_mergeable, pattern=SPLIT_PATTERN, num_threads=num_threads
        )
        if vocabulary.vocab_size < num_mergeable:
            logger.warning(
                "the text allows only %s of %s merges; the vocabulary has %s tokens",
                f"{vocabulary.vocab_size - NUM_BYTES:,}",
                f"{num_mergeable - NUM_BYTES:,}",
                f"{vocabulary.vocab_size + len(SPECIAL_TOKENS):,}",
            )
        return cls(vocabulary, trained_on=trained_on)

    @classmethod
    def from_directory(cls, directory: str | Path) -> Tokenizer:
        """Read `tokenizer.json` of a folder. UserError when it is missing or not ours."""
        path = Path(directory) / "tokenizer.json"
        try:
            value = read_json(path)
        except FileNotFoundError:
            raise UserError(
                f"no tokenizer at {path}; train one with python -m scripts.tok_train"
            ) from None
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise UserError(f"{path} is not a {FORMAT} file; train again with scripts.tok_train")
        try:
            return cls._from_json(value)
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise UserError(f"{path} is damaged ({error}); train again or restore it") from error

    @classmethod
    def _from_json(cls, value: dict[str, Any]) -> Tokenizer:
        pattern = value["pattern"]
        name = pattern_name(pattern) or pattern
        if value["merges"] is not None:
            pairs = [pair.split(" ") for pair in value["merges"]]
            merges = [(int(left), int(right)) for left, right in pairs]
            vocabulary = rustbpe.Tokenizer.from_merges(merges, name)
        else:
            tokens = [bytes.fromhex(token) for token in value["tokens"]]
            vocabulary = rustbpe.Tokenizer.from_tokens(tokens, name)
        specials = {str(name): int(i) for name, i in value["special_tokens"].items()}
        ids = set(specials.values())
        if len(ids) < len(specials) or max(ids) > rustbpe.MAX_VOCAB_SIZE:
            raise ValueError(f"the ids of its special tokens are {sorted(specials.values())}")
        if not isinstance(pattern, str) or not isinstance(value["trained_on"], str):
            raise TypeError("pattern and trained_on must be text")
        vocabulary.encode("a")  # a pattern that is no pattern shows here
        return cls(vocabulary, specials, bos=value["bos"], trained_on=value["trained_on"])

    def save(self, directory: str | Path) -> None:
        """Write `tokenizer.json` and `token_bytes.npy` into a folder, each atomically."""
        folder = Path(directory)
        content = {**self._identity(), "trained_on": self.trained_on}
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        atomic_write_text(folder / "tokenizer.json", text)
        buffer = io.BytesIO()
        np.save(buffer, self.token_bytes)
        atomic_write_bytes(folder / "token_bytes.npy", buffer.getvalue())

    def _identity(self) -> dict[str, Any]:
        """What decides how text becomes ids, as plain JSON."""
        merges = self.vocabulary.merges
        pattern = self.vocabulary.get_pattern()
        content: dict[str, Any] = {
            "format": FORMAT,
            "pattern": PATTERNS.get(pattern, pattern),
            "bos": self._bos,
            "special_tokens": self._specials,
            "merges": None if merges is None else [f"{left} {right}" for left, right in merges],
        }
        if merges is None:
            content["tokens"] = [token.hex() for token in self.vocabulary.tokens]
        return content

    @cached_property
    def hash(self) -> str:
        """SHA-256 of everything that decides how text becomes ids (not of `trained_on`)."""
        canonical = json.dumps(self._identity(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    # ---- the vocabulary -----------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return max(self.vocabulary.vocab_size, max(self._special_names, default=-1) + 1)

    def get_vocab_size(self) -> int:
        """As `vocab_size`."""
        return self.vocab_size

    def get_bos_token_id(self) -> int:
        """As `bos_id`."""
        return self.bos_id

    def get_special_tokens(self) -> set[str]:
        """Return the names of the special tokens."""
        return set(self._specials)

    def encode_special(self, name: str) -> int:
        """Return the id of a special token. UserError for another name."""
        if name not in self._specials:
            raise UserError(f"{name!r} is not a special token; use {', '.join(self._specials)}")
        return self._specials[name]

    def id_to_token(self, token_id: int) -> str:
        """Return a special token's name or the text of any other id (U+FFFD for part bytes)."""
        return self.decode([token_id])

    @cached_property
    def token_bytes(self) -> NDArray[np.int32]:
        """Length in bytes of every id, 0 for special tokens: int32, (vocab,)."""
        lengths = np.zeros(self.vocab_size, dtype=np.int32)
        tokens = self.vocabulary.tokens
        lengths[: len(tokens)] = [len(token) for token in tokens]
        return lengths

    # ---- text ---------------------------------------------------------------------------------

    def encode(
        self,
        text: str | list[str],
        prepend: int | str | None = None,
        append: int | str | None = None,
        num_threads: int | None = None,
    ) -> Any:
        """Return the ids of a text, or a list of them for a list of texts.

        prepend, append: an id or the name of a special token, put around every text.
        """
        texts = [text] if isinstance(text, str) else text
        ids, offsets = self.vocabulary.encode_to_array(
            texts,
            prepend=self._id_of(prepend),
            append=self._id_of(append),
            num_threads=num_threads,
        )
        if isinstance(text, str):
            return ids.tolist()
        flat, ends = ids.tolist(), offsets.tolist()
        return [flat[start:end] for start, end in itertools.pairwise(ends)]

    __call__ = encode

    def encode_batch(
        self,
        texts: Sequence[str],
        *,
        prepend: int | None = None,
        num_threads: int | None = None,
    ) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Return the ids of all texts in a row, int32, and their offsets, int64 (texts + 1,)."""
        return self.vocabulary.encode_to_array(texts, prepend=prepend, num_threads=num_threads)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of some ids; a special token is its name. UserError out of range."""
        tokens, names = self.vocabulary.tokens, self._special_names
        parts = []
        for token_id in ids:
            if 0 <= token_id < len(tokens):
                parts.append(tokens[token_id])
            elif token_id in names:
                parts.append(names[token_id].encode())
            else:
                raise UserError(f"{token_id} is not a token id (vocabulary: {self.vocab_size})")
        return b"".join(parts)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of some ids; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def _id_of(self, token: int | str | None) -> int | None:
        if isinstance(token, str):
            return self.encode_special(token)
        if token is not None and not 0 <= token < self.vocab_size:
            raise ValueError(f"the id {token} is not below the vocabulary size {self.vocab_size}")
        return token

    # ---- conversations ------------------------------------------------------------------------

    def render_conversation(
        self, conversation: Conversation, max_tokens: int = 2048
    ) -> tuple[list[int], list[int]]:
        """Return ids and mask of a conversation, cut to `max_tokens`.

        The mask is 1 where the assistant speaks: its text, its tool calls and the token that
        ends its turn; 0 for everything it only reads.
        """
        ids, mask = self._assemble([(self.bos_id, 0), *self._turns(_merge_system(conversation))])
        return ids[:max_tokens], mask[:max_tokens]

    def render_for_completion(self, conversation: Conversation) -> list[int]:
        """Return the prompt for the last assistant message: all before it, then its opening.

        UserError when the last message is not the assistant's.
        """
        messages = _merge_system(conversation)
        if messages[-1].role != "assistant":
            raise UserError(
                "completion needs a conversation that ends with an assistant message, "
                f"this one ends with {messages[-1].role}"
            )
        opening = (self.encode_special("<|assistant_start|>"), 0)
        return self._assemble([(self.bos_id, 0), *self._turns(messages[:-1]), opening])[0]

    def turn_lengths(self, messages: Sequence[Message]) -> list[int]:
        """Return how many ids each message of a user or assistant adds to a conversation.

        A leading system text changes the first user's message, which is not counted in here.
        """
        turns = [self._turns([message]) for message in messages]
        texts = [piece for turn in turns for piece, _ in turn if isinstance(piece, str)]
        lengths = map(len, self.encode(texts, num_threads=1))
        return [
            sum(1 if isinstance(piece, int) else next(lengths) for piece, _ in turn)
            for turn in turns
        ]

    def visualize_tokenization(self, ids: Sequence[int], mask: Sequence[int]) -> str:
        """Return the tokens between bars for a terminal: green where the mask is 1, else red."""
        colours = ("\033[91m", "\033[92m")
        names = (self.id_to_token(token_id) for token_id in ids)
        shown = zip(names, mask, strict=True)
        return "|".join(f"{colours[supervised]}{name}\033[0m" for name, supervised in shown)

    def _turns(self, messages: Sequence[Message]) -> list[Piece]:
        pieces: list[Piece] = []
        for message in messages:
            if message.role == "user":
                pieces += self._enclosed("user", message.text, (0, 0, 0))
                continue
            pieces.append((self.encode_special("<|assistant_start|>"), 0))
            if isinstance(message.content, str):
                pieces.append((message.content, 1))
            else:
                for part in message.content:
                    if part.type == "python":
                        pieces += self._enclosed("python", part.text, (1, 1, 1))
                    elif part.type == "python_output":
                        pieces += self._enclosed("output", part.text, (0, 0, 0))
                    else:
                        pieces.append((part.text, 1))
            pieces.append((self.encode_special("<|assistant_end|>"), 1))
        return pieces

    def _enclosed(self, name: str, text: str, mask: tuple[int, int, int]) -> list[Piece]:
        start, end = (
            self.encode_special(f"<|{name}_start|>"),
            self.encode_special(f"<|{name}_end|>"),
        )
        return [(start, mask[0]), (text, mask[1]), (end, mask[2])]

    def _assemble(self, pieces: Sequence[Piece]) -> tuple[list[int], list[int]]:
        """Encode all texts of a conversation in one call and put the pieces in a row."""
        texts = [piece for piece, _ in pieces if isinstance(piece, str)]
        encoded = iter(self.encode(texts, num_threads=1))
        ids: list[int] = []
        mask: list[int] = []
        for piece, supervised in pieces:
            part = [piece] if isinstance(piece, int) else next(encoded)
            ids += part
            mask += [supervised] * len(part)
        return ids, mask


def _merge_system(conversation: Conversation) -> tuple[Message, ...]:
    """Put a leading system message in front of the first user message, a blank line between."""
    messages = conversation.messages
    if messages[0].role != "system":
        return messages
    merged = Message("user", f"{messages[0].text}\n\n{messages[1].text}")
    return (merged, *messages[2:])


def get_tokenizer() -> Tokenizer:
    """Return the tokenizer of the base folder. UserError with the command when there is none."""
    return Tokenizer.from_directory(tokenizer_dir())
