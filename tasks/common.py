"""What a task is, slices of it, and mixtures of several.

A task is a sequence of conversations, each made when it is asked for. Tasks that are evaluated
say how (`eval_type`) and judge a completion; tasks that only train leave `evaluate` alone.
"""

import random
import re
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from typing import ClassVar, Literal

from nanochat.assets import PREFETCH, Asset, problem_with
from nanochat.common import UserError
from nanochat.conversation import (
    CHOICE_INSTRUCTION,
    CHOICE_LEAD,
    Conversation,
    Message,
    chat,
    choice_lines,
)
from nanochat.problems import verdict

EvalType = Literal["categorical", "generative", "training"]

LETTERS = ("A", "B", "C", "D")
MIXTURE_SEED = 42  # of the 2025 nanochat

# What surrounds a question and its choices in a prompt.

_FINAL_ANSWER = re.compile(r"#### (-?[0-9.,]+)")


class Task:
    """A numbered set of conversations, or every `step`-th of them from `start` to `stop`.

    Subclasses give `num_rows` and `row`. `eval_type` is "categorical" (choose among the letters of
    the conversation), "generative" (judge what was written) or "training" (never evaluated);
    `chance` is the accuracy of guessing.
    """

    name: str = "task"
    eval_type: ClassVar[EvalType] = "training"
    chance: ClassVar[float] = 0.0

    def __init__(self, *, start: int = 0, stop: int | None = None, step: int = 1) -> None:
        if start < 0 or step < 1 or (stop is not None and stop < start):
            raise UserError(
                f"a slice from {start} to {stop} in steps of {step} has no meaning; "
                "use 0 <= start <= stop and step >= 1"
            )
        self.start, self.stop, self.step = start, stop, step

    def num_rows(self) -> int:
        """Return how many rows the whole task has, before slicing."""
        raise NotImplementedError

    def row(self, index: int) -> Conversation:
        """Return row `index` of the whole task, 0 <= index < num_rows()."""
        raise NotImplementedError

    def assets(self) -> tuple[Asset, ...]:
        """Return what must be on this machine before a row can be read; reads nothing itself."""
        return ()

    def reason_to_skip(self) -> str | None:
        """Say why the task cannot be read or judged on this machine, None when it can."""
        for asset in self.assets():
            problem = problem_with(asset)
            if problem is not None:
                return f"{asset.name}: {problem}; fetch it with {PREFETCH} {asset.name}"
        return None

    def __len__(self) -> int:
        rows = self.num_rows()
        stop = rows if self.stop is None else min(self.stop, rows)
        return max(0, -(-(stop - self.start) // self.step))

    def __getitem__(self, index: int) -> Conversation:
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of {self.name}, which has {len(self)}")
        return self.row(self.start + index * self.step)

    def __iter__(self) -> Iterator[Conversation]:
        return (self[index] for index in range(len(self)))

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Say whether `completion` answers the last user turn of `conversation`.

        `conversation` ends with the reference answer. `completion` is what the model wrote, with
        calls of the tool and their outputs as text; for categorical tasks the letter it chose.
        """
        raise UserError(f"task {self.name} is for training and cannot be evaluated")

    def reward(self, conversation: Conversation, completion: str) -> float:
        """Return 1.0 for a right completion and 0.0 for a wrong one (reinforcement learning)."""
        return float(verdict(self.evaluate(conversation, completion)))


class TaskSequence(Task):
    """Several tasks one after the other, each in its own order."""

    name = "sequence"

    def __init__(
        self, tasks: Sequence[Task], *, start: int = 0, stop: int | None = None, step: int = 1
    ) -> None:
        super().__init__(start=start, stop=stop, step=step)
        self.tasks = tuple(tasks)

    def assets(self) -> tuple[Asset, ...]:
        """Return what any of the tasks reads, each once."""
        return tuple(dict.fromkeys(asset for task in self.tasks for asset in task.assets()))

    @cached_property
    def _ends(self) -> list[int]:
        # Counted on first use: what a mixture reads can be asked before any of it was fetched.
        return list(accumulate(len(task) for task in self.tasks))

    def num_rows(self) -> int:
        """Return the rows of all tasks together."""
        return self._ends[-1] if self._ends else 0

    def row(self, index: int) -> Conversation:
        """Return row `index` counted over the tasks in their order."""
        which = bisect_right(self._ends, index)
        before = self._ends[which - 1] if which else 0
        return self.tasks[which][index - before]


class TaskMixture(TaskSequence):
    """Several tasks shuffled together once; one listed twice is seen twice as often."""

    name = "mixture"

    @cached_property
    def _order(self) -> Sequence[int]:
        order = list(range(self.num_rows()))
        random.Random(MIXTURE_SEED).shuffle(order)
        return array("l", order)

    def row(self, index: int) -> Conversation:
        """Return row `index` of the shuffled order."""
        return super().row(self._order[index])


def multiple_choice(
    question: str, choices: Sequence[str], gold: int, *, letters: Sequence[str] = LETTERS
) -> Conversation:
    """Return a multiple choice question whose answer is the bare letter of choice `gold`.

    UserError for what a row of a data set may hold instead: choices or letters that are missing
    or no texts, a letter twice, an answer that is none of the choices.
    """
    choices, letters = list_of_texts("choices", choices), list_of_texts("letters", letters)
    if len(choices) > len(letters):
        raise UserError(f"{len(choices)} choices, but only {len(letters)} letters")
    used = tuple(letters[: len(choices)])
    if len(set(used)) < len(used):
        raise UserError(f"its letters are {', '.join(used)}; each must come once")
    if not isinstance(gold, int) or not 0 <= gold < len(choices):
        raise UserError(f"its answer is {gold!r}, not a number from 0 to {len(choices) - 1}")
    prompt = "\n".join([*choice_lines(question, choices, used), "", CHOICE_INSTRUCTION])
    return Conversation(chat(prompt, used[gold]).messages, letters=used)


def list_of_texts(name: str, values: object) -> list[str]:
    """Return what must be a list of texts; UserError, with what it is called, for anything else."""
    if not isinstance(values, list | tuple) or not all(isinstance(text, str) for text in values):
        raise UserError(f"its {name} are {values!r}, not a list of texts")
    return list(values)


def chosen(conversation: Conversation, completion: str) -> bool:
    """Say whether a completion is the letter of the reference answer."""
    return completion.strip() == reference_text(conversation)


def question_of(conversation: Conversation) -> str:
    """Return what the last answer replies to, without the choices and words of a prompt."""
    text = conversation.messages[-2].text
    if not conversation.letters:
        return text
    return text.removeprefix(CHOICE_LEAD).partition("\n- ")[0]


def final_answer(text: str) -> str | None:
    """Return what stands for a number after the first "#### ", commas dropped, or None.

    Answers are compared as text, as in the 2025 nanochat: "18.0" and "18." are not "18".
    """
    found = _FINAL_ANSWER.search(text)
    return found.group(1).replace(",", "") or None if found else None


def reference_text(conversation: Conversation) -> str:
    """Return the text of the last message, which is the reference answer."""
    last: Message = conversation.messages[-1]
    if last.role != "assistant":
        raise UserError("the conversation does not end with an answer of the assistant")
    return last.text


def same_final_answer(conversation: Conversation, completion: str) -> bool:
    """Say whether reference and completion give the same number after "#### "."""
    expected = final_answer(reference_text(conversation))
    return expected is not None and final_answer(completion) == expected
