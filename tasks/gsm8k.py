"""GSM8K: word problems of grade school, solved in steps with a calculator (arXiv:2110.14168)."""

import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from nanochat.common import UserError
from nanochat.conversation import Conversation, Message, Part
from tasks.common import EvalType, final_answer, same_final_answer
from tasks.hub import HubTask, text_of

_CALL = re.compile(r"<<(.*?)>>", re.DOTALL)


class GSM8K(HubTask):
    """Right is the number after the first "#### ". In the config "socratic" steps are questions."""

    name = "GSM8K"
    eval_type: ClassVar[EvalType] = "generative"

    def __init__(
        self,
        split: str = "train",
        *,
        config: Literal["main", "socratic"] = "main",
        **slicing: Any,
    ) -> None:
        super().__init__("openai/gsm8k", config, split, license_name="MIT", **slicing)

    def conversation(self, row: Mapping[str, Any]) -> Conversation:
        """Return the question, and the solution with its calculations as calls of the tool."""
        answer = text_of(row, "answer")
        if final_answer(answer) is None:
            raise UserError(f'its answer has no number after "#### ": {answer[-40:]!r}')
        question = Message("user", text_of(row, "question"))
        return Conversation((question, Message("assistant", with_calls(answer))))

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Say whether the completion gives the same number as the reference."""
        return same_final_answer(conversation, completion)


def with_calls(answer: str) -> tuple[Part, ...]:
    """Return the parts of a solution in which calculations are written `<<expression=result>>`."""
    parts: list[Part] = []
    # A pattern with one group splits into text, calculation, text, calculation, ..., text.
    for place, piece in enumerate(_CALL.split(answer)):
        if place % 2 == 0:
            parts += [Part("text", piece)] if piece else []
            continue
        expression, equals, result = piece.rpartition("=")
        if not equals:
            raise UserError(f"its calculation <<{piece}>> has no result")
        parts += [Part("python", expression), Part("python_output", result)]
    return tuple(parts)
