"""Accuracy of a chat model on tasks: choosing a letter, or writing an answer that is judged.

Legend: B = problems of a batch, T = positions of the longest prompt, V = vocabulary.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from nanochat.answers import plain_text
from nanochat.common import UserError
from nanochat.conversation import Conversation
from nanochat.engine import MAX_ROWS, Engine
from nanochat.gpt import GPT, softcap
from nanochat.runtime import World
from nanochat.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

CONFIDENCE_Z = 1.959964  # normal quantile of a two-sided 95 % interval


class Task(Protocol):
    """A numbered set of conversations that can be judged; `tasks.common.Task` is one."""

    @property
    def name(self) -> str:
        """Shown in results."""
        ...

    @property
    def eval_type(self) -> str:
        """How it is evaluated: "categorical" or "generative"."""
        ...

    @property
    def chance(self) -> float:
        """Accuracy of guessing, 0 to 1."""
        ...

    def __len__(self) -> int:
        """Number of problems."""
        ...

    def __getitem__(self, index: int) -> Conversation:
        """A problem; its last message is the reference answer."""
        ...

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Whether a completion (for categorical tasks a letter) is right."""
        ...


@dataclass(frozen=True)
class Sampling:
    """How answers are written."""

    num_samples: int = 1
    """Answers to each problem."""
    max_new_tokens: int = 512
    """Longest answer; the model's context bounds it as well."""
    temperature: float = 0.0
    top_k: int | None = None
    seed: int = 42

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise UserError(f"{self.num_samples} samples asked for; ask for at least 1")


@dataclass(frozen=True)
class Record:
    """What a model did on one problem."""

    index: int
    conversation: Conversation
    completions: tuple[str, ...]
    verdicts: tuple[bool, ...]

    def to_json(self, task: str) -> dict[str, Any]:
        """Plain values, for a line of JSON."""
        return {
            "task": task,
            "index": self.index,
            "messages": self.conversation.to_json(),
            "completions": list(self.completions),
            "correct": list(self.verdicts),
        }


@dataclass(frozen=True)
class TaskResult:
    """Accuracy over all ranks; records of this rank."""

    name: str
    chance: float
    num_passed: int
    num_problems: int
    seconds: float
    records: tuple[Record, ...]

    @property
    def accuracy(self) -> float:
        """Share of problems with at least one right completion."""
        return self.num_passed / self.num_problems

    @property
    def centered(self) -> float:
        """0 at chance, 1 at perfection."""
        return (self.accuracy - self.chance) / (1.0 - self.chance)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of the accuracy."""
        return wilson_interval(self.num_passed, self.num_problems)


def wilson_interval(num_passed: int, num_total: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927, doi:10.1080/01621459.1927.10502953).

    Unlike mean +- 2 standard errors it stays within 0 and 1 and is honest at both ends.
    """
    if num_total == 0:
        return 0.0, 1.0
    share, z2 = num_passed / num_total, CONFIDENCE_Z**2
    middle = share + z2 / (2 * num_total)
    spread = CONFIDENCE_Z * math.sqrt(
        share * (1 - share) / num_total + z2 / (4 * num_total * num_total)
    )
    scale = 1 + z2 / num_total
    # Rounding may step over the ends by an ulp.
    return max((middle - spread) / scale, 0.0), min((middle + spread) / scale, 1.0)


def chat_core(results: Sequence[TaskResult], names: Sequence[str]) -> float | None:
    """ChatCORE: mean centered accuracy, or None unless exactly the tasks `names` have run."""
    if not names or sorted(result.name for result in results) != sorted(names):
        return None
    return sum(result.centered for result in results) / len(results)


def run_task(
    task: Task,
    tokenizer: Tokenizer,
    model: GPT,
    *,
    sampling: Sampling | None = None,
    max_problems: int | None = None,
    batch_size: int = MAX_ROWS,
    world: World | None = None,
) -> TaskResult:
    """Evaluate a task in the way that its `eval_type` names."""
    scope: dict[str, Any] = {
        "max_problems": max_problems,
        "batch_size": batch_size,
        "world": world,
    }
    if task.eval_type == "categorical":
        return run_categorical(task, tokenizer, model, **scope)
    if task.eval_type == "generative":
        return run_generative(task, tokenizer, model, sampling=sampling, **scope)
    raise UserError(f"task {task.name} is for training and cannot be evaluated")


def run_categorical(
    task: Task,
    tokenizer: Tokenizer,
    model: GPT,
    *,
    max_problems: int | None = None,
    batch_size: int = MAX_ROWS,
    world: World | None = None,
) -> TaskResult:
    """Let the model choose among the letters of each problem, by their logits after the prompt.

    Nothing is sampled: the likeliest letter counts even where another token is likelier. All
    ranks take part. UserError for a problem without letters, a letter that is not one token, and
    a prompt longer than the model's context.
    """
    world = world or World()
    started = time.perf_counter()
    indices = _own_problems(task, max_problems, world)
    conversations = {index: task[index] for index in indices}
    letters = _letter_ids(task, tokenizer, conversations)
    prompts = {
        index: _prompt(task, tokenizer, index, conversation, model.config.sequence_len)
        for index, conversation in conversations.items()
    }
    was_training = model.training
    model.eval()
    chosen: dict[int, str] = {}
    by_length = sorted(indices, key=lambda index: len(prompts[index]), reverse=True)
    for start in range(0, len(by_length), batch_size):
        batch = by_length[start : start + batch_size]
        logits = _last_logits(model, [prompts[index] for index in batch], tokenizer.bos_id)
        for index, row in zip(batch, logits, strict=True):
            options = conversations[index].letters
            scores = row[[letters[letter] for letter in options]]
            chosen[index] = options[int(scores.argmax())]
    model.train(was_training)
    records = tuple(
        _judge(task, index, conversation, (chosen[index],))
        for index, conversation in conversations.items()
    )
    return _result(task, records, max_problems, world, started)


def run_generative(
    task: Task,
    tokenizer: Tokenizer,
    model: GPT,
    *,
    sampling: Sampling | None = None,
    max_problems: int | None = None,
    batch_size: int = MAX_ROWS,
    world: World | None = None,
) -> TaskResult:
    """Let the model write answers to each problem; one right answer passes it.

    Problems are answered together, up to `batch_size` rows at once; a sample's random numbers
    follow from seed, problem and sample alone. All ranks take part. UserError for a prompt longer
    than the model's context.
    """
    world, sampling = world or World(), sampling or Sampling()
    started = time.perf_counter()
    num_samples = sampling.num_samples
    indices = _own_problems(task, max_problems, world)
    conversations = [task[index] for index in indices]
    prompts = [
        _prompt(task, tokenizer, index, conversation, model.config.sequence_len)
        for index, conversation in zip(indices, conversations, strict=True)
    ]
    answers = Engine(model, tokenizer).complete(
        [prompt for prompt in prompts for _ in range(num_samples)],
        max_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        seeds=[sampling.seed + i * num_samples + k for i in indices for k in range(num_samples)],
        batch_size=batch_size,
    )
    texts = [plain_text(tokenizer, answer) for answer in answers]
    records = tuple(
        _judge(task, index, conversation, tuple(texts[k * num_samples : (k + 1) * num_samples]))
        for k, (index, conversation) in enumerate(zip(indices, conversations, strict=True))
    )
    return _result(task, records, max_problems, world, started)


def _num_problems(task: Task, max_problems: int | None) -> int:
    if max_problems is None or max_problems < 0:
        return len(task)
    return min(len(task), max_problems)


def _own_problems(task: Task, max_problems: int | None, world: World) -> range:
    """Indices of the problems of this rank."""
    total = _num_problems(task, max_problems)
    if total == 0:
        raise UserError(f"task {task.name} has no problems to evaluate")
    return range(world.rank, total, world.size)


def _prompt(
    task: Task, tokenizer: Tokenizer, index: int, conversation: Conversation, context: int
) -> list[int]:
    prompt = tokenizer.render_for_completion(conversation)
    if len(prompt) >= context:
        raise UserError(
            f"problem {index} of {task.name} has a prompt of {len(prompt)} tokens, but the model's "
            f"context is {context}; evaluate a model with a longer context"
        )
    return prompt


def _letter_ids(
    task: Task, tokenizer: Tokenizer, conversations: dict[int, Conversation]
) -> dict[str, int]:
    """The token of every letter that occurs."""
    letters: dict[str, int] = {}
    for index, conversation in conversations.items():
        if not conversation.letters:
            raise UserError(f"problem {index} of {task.name} has no letters to choose from")
        for letter in conversation.letters:
            if letter in letters:
                continue
            ids = tokenizer.encode(letter)
            if len(ids) != 1:
                raise UserError(
                    f"the letter {letter!r} of problem {index} of {task.name} is {len(ids)} "
                    "tokens; a choice must be a single token of the vocabulary"
                )
            letters[letter] = ids[0]
    return letters


@torch.inference_mode()
def _last_logits(model: GPT, prompts: list[list[int]], padding: int) -> Tensor:
    """Logits (B, V) after each prompt, on the CPU; one forward pass, padded on the right."""
    longest = max(map(len, prompts))
    rows = [prompt + [padding] * (longest - len(prompt)) for prompt in prompts]
    states = model.hidden(torch.tensor(rows, device=model.device))
    ends = torch.tensor([len(prompt) - 1 for prompt in prompts], device=model.device)
    last = states[torch.arange(len(prompts), device=model.device), ends]
    return softcap(model.lm_head(last)).cpu()


def _judge(
    task: Task, index: int, conversation: Conversation, completions: tuple[str, ...]
) -> Record:
    verdicts = tuple(task.evaluate(conversation, completion) for completion in completions)
    return Record(index, conversation, completions, verdicts)


def _result(
    task: Task,
    records: tuple[Record, ...],
    max_problems: int | None,
    world: World,
    started: float,
) -> TaskResult:
    passed = world.sum(sum(any(record.verdicts) for record in records))
    return TaskResult(
        name=task.name,
        chance=task.chance,
        num_passed=int(passed),
        num_problems=_num_problems(task, max_problems),
        seconds=time.perf_counter() - started,
        records=records,
    )
