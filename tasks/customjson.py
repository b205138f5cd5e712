"""Conversations of your own: a file with one JSON array of messages a line."""

import json
import logging
from functools import cached_property
from pathlib import Path

from nanochat.assets import Asset, Url, require
from nanochat.common import UserError
from nanochat.conversation import Conversation
from tasks.common import Task

logger = logging.getLogger(__name__)


# Who the assistant is: a thousand conversations made by a language model. Replace the file to
# give the model another character, and run `python -m scripts.assets prefetch identity`.
IDENTITY = Asset(
    name="identity",
    place="identity_conversations.jsonl",
    source=Url("https://karpathy-public.s3.us-west-2.amazonaws.com/identity_conversations.jsonl"),
    license="MIT",
    approximate_bytes=2_500_000,
    is_replaceable=True,
)


class CustomJSON(Task):
    """Training: the conversations of a .jsonl file.

    A line is an array of {"role", "content"}: at least two messages, user and assistant by
    turns, the user first, contents plain strings. A path is read when the task is made, and a
    missing file is an empty task and a warning. An asset is read on first use and must be there.
    """

    name = "CustomJSON"

    def __init__(
        self,
        file: Path | str | Asset,
        *,
        start: int = 0,
        stop: int | None = None,
        step: int = 1,
    ) -> None:
        super().__init__(start=start, stop=stop, step=step)
        self.asset = file if isinstance(file, Asset) else None
        self.path = file.path if isinstance(file, Asset) else Path(file)
        if self.asset is None and not self.path.exists():
            logger.warning(
                "%s is not there, so none of its conversations are used; write one JSON array "
                "of messages a line to it",
                self.path,
            )
            self.conversations = ()
        elif self.asset is None:
            self.conversations = read_conversations(self.path)

    @cached_property
    def conversations(self) -> tuple[Conversation, ...]:
        """All conversations of the file."""
        if self.asset is not None:
            require(self.asset)
        return read_conversations(self.path)

    def assets(self) -> tuple[Asset, ...]:
        """Return the asset it was made of, if it was one."""
        return () if self.asset is None else (self.asset,)

    def num_rows(self) -> int:
        """Return the number of conversations in the file."""
        return len(self.conversations)

    def row(self, index: int) -> Conversation:
        """Return conversation `index` of the file."""
        return self.conversations[index]


def read_conversations(path: Path) -> tuple[Conversation, ...]:
    """Read a file of conversations; UserError with the number of a line that is none."""
    with path.open("rb") as file:
        return tuple(
            parse_conversation(line, f"{path}, line {number}")
            for number, line in enumerate(file, 1)
            if line.strip()
        )


def parse_conversation(line: bytes, where: str) -> Conversation:
    """Read one line of such a file; UserError begins with `where` and says what is wrong."""
    try:
        value = json.loads(line)
    except ValueError as error:  # not JSON, or not UTF-8
        raise UserError(f"{where}: not valid JSON ({error})") from error
    if not isinstance(value, list) or len(value) < 2:
        start = line[:60].decode(errors="replace")
        raise UserError(f"{where}: expected an array of at least two messages, got {start!r}")
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
