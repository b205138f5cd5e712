"""HumanEval: functions to be written from their docstring, judged by tests (arXiv:2107.03374)."""

import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

from nanochat.common import NotScoredError
from nanochat.conversation import Conversation, chat
from nanochat.execution import check_program, sandbox_problem
from tasks.common import EvalType
from tasks.hub import HubTask, text_of

# A fenced block: the rest of its first line says the language. Code on one line between fences is
# matched as well, without groups, so that its second fence begins no block.
_FENCED = re.compile(r"```[^`\n]+```|```([^`\n]*)\n(.*?)```", re.DOTALL)
_PYTHON = ("", "python", "py", "python3")  # a block that names no language is taken for Python


class HumanEval(HubTask):
    """Right is a function that passes its tests, run in the sandbox.

    unsafe: run the programs without the sandbox, with the rights of the user.
    """

    name = "HumanEval"
    eval_type: ClassVar[EvalType] = "generative"

    def __init__(self, *, unsafe: bool = False, **slicing: Any) -> None:
        super().__init__(
            "openai/openai_humaneval", "openai_humaneval", "test", license_name="MIT", **slicing
        )
        self.unsafe = unsafe

    def reason_to_skip(self) -> str | None:
        """Say why the task cannot be read, or programs cannot be run, on this machine."""
        missing = super().reason_to_skip()
        if missing is not None:
            return missing
        problem = sandbox_problem(self.unsafe)
        return None if problem is None else f"skipped: {problem}"

    def conversation(self, row: Mapping[str, Any]) -> Conversation:
        """Return the beginning of a function, and the whole of it."""
        prompt = text_of(row, "prompt")
        text_of(row, "test"), text_of(row, "entry_point")
        return chat(prompt, prompt + text_of(row, "canonical_solution"))

    @cached_property
    def _rows_by_prompt(self) -> dict[str, Mapping[str, Any]]:
        return {row["prompt"]: row for row in self.rows}

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Say whether the program in the completion passes the tests of its problem."""
        prompt = conversation.messages[0].text
        row = self._rows_by_prompt[prompt]
        result = check_program(
            imports_of(prompt) + program_in(completion),
            f"{row['test']}\ncheck({row['entry_point']})\n",
            functions=[row["entry_point"]],
            prelude=prompt,
            unsafe=self.unsafe,
        )
        if result.skipped:
            reason = f"the program of {row['task_id']} was not run: {result.error}"
            raise NotScoredError(f"skipped: {reason}")
        return result.success


def imports_of(prompt: str) -> str:
    """Return the import lines at the top of a prompt."""
    lines = []
    for line in prompt.splitlines():
        if line.startswith(("import ", "from ")):
            lines.append(f"{line}\n")
        elif line.strip() and not line.startswith("#"):
            break
    return "".join(lines)


def program_in(completion: str) -> str:
    """Return the first fenced block of Python of a completion.

    A block that names no language counts as Python. Without one of these it is the first block of
    any language, so that an unknown name of Python fails no program; without any block it is the
    whole completion.
    """
    found = [match.groups() for match in _FENCED.finditer(completion) if match.group(2) is not None]
    python = [code for info, code in found if info.strip().partition(" ")[0].lower() in _PYTHON]
    return [*python, *(code for _, code in found), completion][0]
