"""An answer's tokens as a reader meets them: pieces of text and of calls, log probabilities."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from nanochat.answers import CallBrackets, ControlIds, special_ids
from nanochat.conversation import PartType
from nanochat.serving.links import Token
from nanochat.tokenizer import Tokenizer


@dataclass(frozen=True)
class Piece:
    """Some text of one kind; `shown` is it with the brackets that calls have in plain text."""

    kind: PartType
    text: str
    shown: str


class Pieces:
    """Sorts one answer's tokens into pieces, as they come."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.num_tokens = 0
        self.finish: Literal["stop", "length"] | None = None
        self.terminal = ControlIds.of(tokenizer).terminal
        self._brackets = CallBrackets(tokenizer)

    def feed(self, tokens: Iterable[Token]) -> list[Piece]:
        """The pieces that `tokens` complete; neighbours of one kind are joined."""
        pieces: list[Piece] = []
        for token in tokens:
            self.num_tokens += token.id not in self.terminal
            kind, shown = self._brackets.kind, token.text
            before, after = self._brackets.around(token.id)
            if before:  # a call without a value is closed by the text behind it
                kind = "text"
            if token.finish is not None:
                self.finish = token.finish
                after += self._brackets.finish()
            text = shown.removeprefix(before).removesuffix(after)
            if not shown:
                continue
            if pieces and pieces[-1].kind == kind:
                last = pieces.pop()
                pieces.append(Piece(kind, last.text + text, last.shown + shown))
            else:
                pieces.append(Piece(kind, text, shown))
        return pieces


class TokenNames:
    """Tells tokens by their text, as a person can read them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.special = special_ids(tokenizer)

    def label(self, token: int) -> str:
        """A token's text; bytes that are no text on their own are written <F0>."""
        data = self.tokenizer.decode_bytes([token])
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "".join(f"<{byte:02X}>" for byte in data)

    def listing(self, tokens: Sequence[int]) -> bytes:
        """A JSON list of {"id", "text", "special"} for each token (`PromptToken`)."""
        # Written once for each token that occurs, and joined: an object, or a check, for each of
        # 100,000 tokens would take most of a second.
        written: dict[int, str] = {}
        for token in tokens:
            if token not in written:
                entry = {"id": token, "text": self.label(token), "special": token in self.special}
                written[token] = json.dumps(entry)
        return f"[{','.join(written[token] for token in tokens)}]".encode()

    def describe(self, token: int) -> dict[str, Any]:
        """A token as the OpenAI API writes it: text, and the bytes behind it."""
        data = self.tokenizer.decode_bytes([token])
        return {"token": data.decode("utf-8", "replace"), "bytes": list(data)}

    def chat_logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        """`logprobs` of a chat choice."""
        return {"content": [self._entry(token) for token in tokens], "refusal": None}

    def _entry(self, token: Token) -> dict[str, Any]:
        top = [
            {**self.describe(other), "logprob": logprob} for other, logprob in token.alternatives
        ]
        return {**self.describe(token.id), "logprob": token.logprob, "top_logprobs": top}

    def text_logprobs(self, tokens: Sequence[Token], offset: int) -> dict[str, Any]:
        """`logprobs` of a text choice; `offset`: characters of the text before these tokens."""
        offsets = []
        for token in tokens:
            offsets.append(offset)
            offset += len(token.text)
        return {
            "tokens": [self.describe(token.id)["token"] for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [
                {self.describe(other)["token"]: logprob for other, logprob in token.alternatives}
                for token in tokens
            ],
            "text_offset": offsets,
        }

    def look_inside(self, tokens: Sequence[Token]) -> list[dict[str, Any]]:
        """Tokens for the page: id, text, whether special or forced, and what else was likely."""
        return [
            {
                "id": token.id,
                "text": self.label(token.id),
                "special": token.id in self.special,
                "forced": token.is_forced,
                "logprob": token.logprob,
                "top": [
                    {
                        "id": other,
                        "text": self.label(other),
                        "special": other in self.special,
                        "logprob": logprob,
                    }
                    for other, logprob in token.alternatives
                ],
            }
            for token in tokens
        ]
