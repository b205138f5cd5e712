"""ARC: science questions of school exams, easy and challenging (arXiv:1803.05457)."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, get_args

from nanochat.common import UserError
from nanochat.conversation import Conversation
from tasks.common import EvalType, chosen, list_of_texts, multiple_choice
from tasks.hub import HubTask, text_of

Subset = Literal["ARC-Easy", "ARC-Challenge"]


class ARC(HubTask):
    """Multiple choice with the letters of the row: mostly A to D, now and then A to E or 1 to 4."""

    eval_type: ClassVar[EvalType] = "categorical"
    chance = 0.25

    def __init__(self, subset: Subset, split: str = "train", **slicing: Any) -> None:
        if subset not in get_args(Subset):
            raise UserError(f"ARC has no subset {subset!r}; use {' or '.join(get_args(Subset))}")
        super().__init__("allenai/ai2_arc", subset, split, license_name="CC BY-SA 4.0", **slicing)
        self.name = subset

    def conversation(self, row: Mapping[str, Any]) -> Conversation:
        """Return the question with its choices, and the letter of the right one."""
        choices = row["choices"]
        if not isinstance(choices, Mapping):
            raise UserError(f"its choices are {choices!r}, not texts with letters")
        texts = list_of_texts("choices", choices["text"])
        letters = list_of_texts("letters", choices["label"])
        if len(texts) != len(letters):
            raise UserError(f"it has {len(texts)} choices and {len(letters)} letters")
        answer = row["answerKey"]
        if answer not in letters:
            raise UserError(f"its answer is {answer!r}, none of {', '.join(letters)}")
        gold = letters.index(answer)
        return multiple_choice(text_of(row, "question"), texts, gold, letters=letters)

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Say whether the chosen letter is the right one."""
        return chosen(conversation, completion)
