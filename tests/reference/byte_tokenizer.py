"""A tokenizer without merges: ids 0..255 are bytes, then the nine special tokens.

It has the part of `nanochat.tokenizer.Tokenizer` that generation and evaluation use, and nothing
to train, so that their tests depend on neither a vocabulary nor the Rust core.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from nanochat.conversation import Conversation, Message

SPECIAL = (
    "bos",
    "user_start",
    "user_end",
    "assistant_start",
    "assistant_end",
    "python_start",
    "python_end",
    "output_start",
    "output_end",
)
NAMES = tuple(f"<|{name}|>" for name in SPECIAL)


class ByteTokenizer:
    vocab_size = 256 + len(NAMES)
    bos_id = 256

    @property
    def token_bytes(self) -> np.ndarray:
        return np.array([1] * 256 + [0] * len(NAMES), np.int32)

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str], *, prepend: int | None = None):
        ids = [([] if prepend is None else [prepend]) + self.encode(text) for text in texts]
        offsets = np.cumsum([0, *map(len, ids)], dtype=np.int64)
        return np.array([token for row in ids for token in row], np.int32), offsets

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(bytes([i]) if i < 256 else NAMES[i - 256].encode() for i in ids)

    def encode_special(self, name: str) -> int:
        return 256 + NAMES.index(name)

    def get_special_tokens(self) -> set[str]:
        return set(NAMES)

    def render_for_completion(self, conversation: Conversation) -> list[int]:
        ids = [self.bos_id]
        for message in conversation.messages[:-1]:
            ids += self._turn(message)
        return [*ids, self.encode_special("<|assistant_start|>")]

    def _turn(self, message: Message) -> list[int]:
        start, end = (f"<|{message.role}_{edge}|>" for edge in ("start", "end"))
        return [self.encode_special(start), *self.encode(message.text), self.encode_special(end)]
