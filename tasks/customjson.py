"""Conversations of your own: a file with one JSON array of messages a line."""

import json
import logging
from pathlib import Path

from nanochat.common import UserError
from nanochat.conversation import Conversation
from tasks.common import Task

logger = logging.getLogger(__name__)


class CustomJSON(Task):
    """Training: the conversations of a .jsonl file, checked when the task is made.

    A line is an array of {"role", "content"}: at least two messages, user and assistant by
    turns, the user first, contents plain strings. A missing file is an empty task and a warning.
    """

    name = "CustomJSON"

    def __init__(
        self, path: Path | str, *, start: int = 0, stop: int | None = None, step: int = 1
    ) -> None:
        super().__init__(start=start, stop=stop, step=step)
        self.path = Path(path)
        self.conversations: tuple[Conversation, ...] = ()
        if not self.path.exists():
            logger.warning(
                "%s is not there, so none of its conversations are used; write one JSON array "
                "of messages a line to it",
                self.path,
            )
            return
        with self.path.open(encoding="utf-8") as file:
            lines = enumerate(file, 1)
            self.conversations = tuple(
                _parse(line, f"{self.path}, line {number}")
                for number, line in lines
                if line.strip()
            )

    def num_rows(self) -> int:
        """Return the number of conversations in the file."""
        return len(self.conversations)

    def row(self, index: int) -> Conversation:
        """Return conversation `index` of the file."""
        return self.conversations[index]


def _parse(line: str, where: str) -> Conversation:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON ({error})") from error
    if not isinstance(value, list) or len(value) < 2:
        raise UserError(f"{where}: expected an array of at least two messages, got {line[:60]!r}")
    for index, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise UserError(f"{where}, message {index}: the content must be a string")
        if message.get("role") not in ("user", "assistant"):
            raise UserError(
                f"{where}, message {index}: the role is {message.get('role')!r}, "
                "expected user or assistant"
            )
    try:
        return Conversation.from_json(value)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
