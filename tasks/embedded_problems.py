"""Word problems solved with the calculator, in the form of GSM8K."""

import random
from typing import ClassVar

from nanochat.conversation import Conversation, Message, Part
from nanochat.sources.world.problems import Problem, make_problem
from nanochat.tools import calculate
from tasks.common import EvalType, same_final_answer
from tasks.embedded_facts import GeneratedTask


def solve(problem: Problem) -> Conversation:
    """Return the problem as a chat: the operation in words, the call, its result, the answer."""
    output = calculate(problem.expression)
    if output != str(problem.value):
        raise ValueError(f"{problem.expression} gives {output}, not {problem.value}")
    answer = (
        Part("text", problem.operation),
        Part("python", problem.expression),
        Part("python_output", output),
        Part("text", f"The answer is {output} {problem.unit}.\n#### {output}"),
    )
    return Conversation((Message("user", problem.question), Message("assistant", answer)))


class WordProblems(GeneratedTask):
    """Problems of one or two steps; right is the number after "#### ".

    Split "train" and split "test" share neither texts nor numbers. Split "practice" has texts of
    its own and the numbers of "train"; split "practised" the same texts and the numbers of "test".
    """

    name = "WordProblems"
    eval_type: ClassVar[EvalType] = "generative"

    def make(self, rng: random.Random, index: int) -> Conversation:
        """Make one problem of this split."""
        return solve(
            make_problem(
                rng,
                held_out=self.split in ("test", "practised"),
                practice=self.split in ("practice", "practised"),
            )
        )

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Say whether the completion ends in the same number as the reference."""
        return same_final_answer(conversation, completion)
