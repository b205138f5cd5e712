"""`chat_rl` with a task that a model of a few dozen steps is right about half of the time.

A module of its own, because stages in tests are processes that import their command by name.
"""

from __future__ import annotations

from unittest import mock

from nanochat.conversation import Conversation, chat
from scripts import chat_rl
from tasks.common import Task

Config = chat_rl.Config


class EvenAnswers(Task):
    """An answer is right when it has an even number of characters."""

    name = "EvenAnswers"
    eval_type = "generative"

    def num_rows(self) -> int:
        return 40

    def row(self, index: int) -> Conversation:
        return chat(f"question {index}", "an even one.")

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        return len(completion) % 2 == 0


def main(config: chat_rl.Config) -> int:
    """The command, with this task alone."""
    pairs = {"EvenAnswers": (EvenAnswers(), EvenAnswers())}
    with mock.patch.object(chat_rl.mixtures, "rl_tasks", return_value=pairs):
        return chat_rl.main(config)
