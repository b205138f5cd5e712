"""What a model's tokens mean outside the model: the ids that steer an answer, and its text.

No torch. Generation puts calls and endings together from these ids, chat shows the text as it
grows, tasks judge it as a whole.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass

from nanochat.conversation import Message, Part, PartType
from nanochat.tokenizer import Tokenizer

# Control characters as they are shown: a terminal would obey them, and move the cursor, rename its
# window or worse.
_ESCAPES = {
    code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"
}


def terminal_text(text: str) -> str:
    r"""What a model wrote as a terminal may show it: control characters as `\x1b`."""
    return text.translate(_ESCAPES)


@dataclass(frozen=True)
class ControlIds:
    """Ids of the tokens that steer an answer."""

    python_start: int
    python_end: int
    output_start: int
    output_end: int
    terminal: frozenset[int]
    """An answer ends with one of these."""

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> ControlIds:
        """Look the ids up in a tokenizer."""
        ids = {
            name: tokenizer.encode_special(f"<|{name}|>")
            for name in ("python_start", "python_end", "output_start", "output_end")
        }
        end = tokenizer.encode_special("<|assistant_end|>")
        return cls(**ids, terminal=frozenset({end, tokenizer.bos_id}))


class CallBrackets:
    """Follows a stream of tokens through calls of the tool, which read as `[12 * 3 = 36]`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._special = ControlIds.of(tokenizer)
        self._hidden = special_ids(tokenizer)
        # Where the stream stands in a call: "" outside, "expression", "called", "output".
        self._place = ""

    @property
    def kind(self) -> PartType:
        """The kind of part the stream is in."""
        kinds: dict[str, PartType] = {"": "text", "output": "python_output"}
        return kinds.get(self._place, "python")

    def around(self, token: int) -> tuple[str, str]:
        """What is to be shown before and after the text of `token`."""
        if token not in self._hidden:
            return self._leave_call(), ""
        return "", self._steer(token)

    def finish(self) -> str:
        """What is still to be shown when the stream has ended: an open bracket's other half."""
        is_open, self._place = self._place != "", ""
        return "]" if is_open else ""

    def _leave_call(self) -> str:
        """Close a call whose expression had no value."""
        if self._place != "called":
            return ""
        self._place = ""
        return "]"

    def _steer(self, token: int) -> str:
        if token == self._special.python_start:
            closing = "]" if self._place else ""
            self._place = "expression"
            return closing + "["
        if token == self._special.python_end and self._place == "expression":
            self._place = "called"
            return ""
        if token == self._special.output_start and self._place == "called":
            self._place = "output"
            return " = "
        if token == self._special.output_end and self._place == "output":
            self._place = ""
            return "]"
        return self._leave_call()


class AnswerText:
    """Turns a stream of tokens into text by whole characters, for a person to watch.

    Special tokens never show. A tool call reads as `[12 * 3 = 36]`.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._hidden = special_ids(tokenizer)
        self._brackets = CallBrackets(tokenizer)
        self._held = b""

    def feed(self, token: int) -> str:
        """The text that `token` completes; "" while a character is still in pieces."""
        before, after = self._brackets.around(token)
        if token in self._hidden:
            return self._rest() + after
        data = self._held + self._tokenizer.decode_bytes((token,))
        text, length = codecs.utf_8_decode(data, "replace", False)
        self._held = data[length:]
        return before + text

    def finish(self) -> str:
        """What is left when the stream has ended: the rest of a character, an open bracket."""
        return self._rest() + self._brackets.finish()

    def _rest(self) -> str:
        held, self._held = self._held, b""
        return held.decode("utf-8", "replace")


def special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Ids of all special tokens."""
    return frozenset(map(tokenizer.encode_special, tokenizer.get_special_tokens()))


def plain_text(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    """The text of an answer as tasks judge it: special tokens dropped, calls and outputs kept."""
    hidden = special_ids(tokenizer)
    return tokenizer.decode([token for token in tokens if token not in hidden])


def shown_text(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    """The text of an answer as a person reads it, with calls as `[12 * 3 = 36]`."""
    text = AnswerText(tokenizer)
    return "".join([text.feed(token) for token in tokens]) + text.finish()


def answer_message(tokenizer: Tokenizer, tokens: Sequence[int]) -> Message:
    """An answer as a turn of a conversation: its text, and each call and output as a part."""
    brackets, hidden = CallBrackets(tokenizer), special_ids(tokenizer)
    pieces: list[tuple[PartType, list[int]]] = []
    for token in tokens:
        brackets.around(token)
        if not pieces or pieces[-1][0] != brackets.kind or token in hidden:
            pieces.append((brackets.kind, []))
        if token not in hidden:
            pieces[-1][1].append(token)
    parts = tuple(Part(kind, tokenizer.decode(ids)) for kind, ids in pieces if ids)
    if all(part.type == "text" for part in parts):
        return Message("assistant", "".join(part.text for part in parts))
    return Message("assistant", parts)
