"""Conversations as values: typed, validated when made, JSON in and out. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from nanochat.common import UserError

PartType = Literal["text", "python", "python_output"]
Role = Literal["system", "user", "assistant"]
CHOICE_LEAD = "Multiple choice: "
CHOICE_INSTRUCTION = "Answer with the letter only."


@dataclass(frozen=True)
class Part:
    """A piece of an assistant's turn: prose, a call of the tool, or what the tool answered."""

    type: PartType
    text: str

    def __post_init__(self) -> None:
        if self.type not in get_args(PartType):
            raise UserError(
                f"unknown part type {self.type!r}; use one of {', '.join(get_args(PartType))}"
            )
        if not isinstance(self.text, str):
            raise UserError(f"a {self.type} part holds {self.text!r}; its text must be a string")


@dataclass(frozen=True)
class Message:
    """One turn. Only an assistant's content may be a sequence of parts."""

    role: Role
    content: str | tuple[Part, ...]

    def __post_init__(self) -> None:
        if self.role not in get_args(Role):
            raise UserError(f"unknown role {self.role!r}; use one of {', '.join(get_args(Role))}")
        if isinstance(self.content, str):
            return
        if self.role != "assistant":
            raise UserError(
                f"the content of a {self.role} message is {type(self.content).__name__}; "
                "it must be a string (only an assistant may use parts)"
            )
        if not isinstance(self.content, tuple) or not all(
            isinstance(part, Part) for part in self.content
        ):
            raise UserError(
                f"the content of an assistant message is {type(self.content).__name__}; "
                "it must be a string or a list of parts"
            )

    @property
    def text(self) -> str:
        """The content as one string, the texts of its parts joined without a separator."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)

    @property
    def shown(self) -> str:
        """The content as a person reads it, with calls of the tool as `[12*3 = 36]`."""
        if isinstance(self.content, str):
            return self.content
        around = {"text": "{}", "python": "[{}", "python_output": " = {}]"}
        pieces = (around[part.type].format(part.text) for part in self.content)
        return "".join(pieces)


@dataclass(frozen=True)
class Conversation:
    """A chat: an optional leading system message, then user and assistant by turns, user first.

    `letters` are the answer letters of a multiple choice question, () for everything else.
    """

    messages: tuple[Message, ...]
    letters: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        has_system = bool(self.messages) and self.messages[0].role == "system"
        turns = self.messages[1:] if has_system else self.messages
        if not turns:
            raise UserError("a conversation needs at least one user message; this one has none")
        for turn, message in enumerate(turns):
            expected = "user" if turn % 2 == 0 else "assistant"
            if message.role != expected:
                raise UserError(
                    f"message {turn + has_system} is from {message.role}, expected {expected}; "
                    "after an optional system message, user and assistant take turns, user first"
                )

    @classmethod
    def from_json(cls, value: Any) -> "Conversation":
        """Make a conversation of a list of messages, or of an object with `messages`.

        A message is {"role": str, "content": str | list of {"type": str, "text": str}}.
        UserError names the index of the first message that is wrong.
        """
        letters: tuple[str, ...] = ()
        if isinstance(value, dict):
            letters = tuple(value.get("letters") or ())
            value = value.get("messages")
        if not isinstance(value, list | tuple):
            raise UserError(
                f"a conversation is a list of messages, or an object with the key 'messages'; "
                f"this is {type(value).__name__}"
            )
        messages = []
        for index, entry in enumerate(value):
            try:
                messages.append(_message_from_json(entry))
            except UserError as error:
                raise UserError(f"message {index}: {error}") from error
        return cls(tuple(messages), letters)

    def to_json(self) -> list[dict[str, Any]]:
        """The messages as plain lists, dictionaries and strings; `from_json` reads them back."""
        return [
            {
                "role": message.role,
                "content": message.content
                if isinstance(message.content, str)
                else [{"type": part.type, "text": part.text} for part in message.content],
            }
            for message in self.messages
        ]


def chat(*turns: str) -> Conversation:
    """A conversation of plain strings: user, assistant, user, ..."""
    roles: tuple[Role, Role] = ("user", "assistant")
    return Conversation(tuple(Message(roles[i % 2], turn) for i, turn in enumerate(turns)))


def _message_from_json(entry: Any) -> Message:
    if not isinstance(entry, dict) or "role" not in entry or "content" not in entry:
        raise UserError(f"expected an object with 'role' and 'content', got {_shortened(entry)}")
    content = entry["content"]
    if isinstance(content, list | tuple):
        content = tuple(_part_from_json(part) for part in content)
    return Message(entry["role"], content)


def _part_from_json(entry: Any) -> Part:
    if not isinstance(entry, dict) or "type" not in entry or "text" not in entry:
        raise UserError(f"expected a part with 'type' and 'text', got {_shortened(entry)}")
    return Part(entry["type"], entry["text"])


def _shortened(value: Any, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def choice_lines(question: str, choices: Sequence[str], letters: Sequence[str]) -> list[str]:
    """Return a multiple choice question as lines: the question, then a line for each choice.

    Each choice stands before its letter with "=" between them.
    """
    lines = [f"- {choice}={letter}" for choice, letter in zip(choices, letters, strict=True)]
    return [f"{CHOICE_LEAD}{question}", *lines]
