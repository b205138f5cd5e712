"""MMLU: multiple choice questions of 57 subjects (arXiv:2009.03300)."""

from collections.abc import Mapping
from typing import Any, ClassVar

from nanochat.common import UserError
from nanochat.conversation import Conversation
from tasks.common import LETTERS, EvalType, chosen, list_of_texts, multiple_choice
from tasks.hub import HubTask, text_of


class MMLU(HubTask):
    """Multiple choice with the letters A to D.

    Splits: test, validation, dev, and auxiliary_train, which is other exams' questions.
    """

    name = "MMLU"
    eval_type: ClassVar[EvalType] = "categorical"
    chance = 0.25

    def __init__(self, split: str = "auxiliary_train", **slicing: Any) -> None:
        super().__init__("cais/mmlu", "all", split, license_name="MIT", **slicing)

    def conversation(self, row: Mapping[str, Any]) -> Conversation:
        """Return the question with its choices, and the letter of the right one."""
        choices = list_of_texts("choices", row["choices"])
        if len(choices) != len(LETTERS):
            raise UserError(f"it has {len(choices)} choices, not {len(LETTERS)}")
        return multiple_choice(text_of(row, "question"), choices, row["answer"])

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Say whether the chosen letter is the right one."""
        return chosen(conversation, completion)
