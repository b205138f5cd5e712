"""Accuracy of a chat model on tasks: choosing a letter, or writing an answer that is judged.

Legend: B = problems of a batch, T = positions of the longest prompt, V = vocabulary.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from nanochat.answers import plain_text, shown_text
from nanochat.common import NotScoredError, ShortMemoryError, UserError, no_numbers
from nanochat.conversation import Conversation
from nanochat.engine import Engine, NanLogitsError
from nanochat.gpt import GPT
from nanochat.hardware import usable_cpus
from nanochat.problems import judged, num_problems, problem
from nanochat.runtime import World, first_line, halve_answers
from nanochat.sampling import SamplingSettings
from nanochat.scheduler import MAX_ROWS
from nanochat.task_results import Record, TaskResult
from nanochat.tokenizer import Tokenizer

MAX_JUDGES = 8  # threads; a judge that runs programs mostly waits for them
# Far more than pass@k of the papers needs (arXiv:2107.03374 samples 200); a mistyped number of
# answers would take memory without end.
MAX_SAMPLES = 10_000
CHOICES_PER_PASS = 8  # problems of multiple choice, as in the 2025 nanochat

T = TypeVar("T")


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

    def reason_to_skip(self) -> str | None:
        """Why this machine cannot judge the task; None when it can."""
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
        if self.num_samples > MAX_SAMPLES:
            raise UserError(
                f"{self.num_samples} samples asked for; ask for at most {MAX_SAMPLES:,}"
            )
        # Refuses what means nothing now, and not when the first answer is to be written.
        SamplingSettings(
            temperature=self.temperature, top_k=self.top_k, max_tokens=self.max_new_tokens
        )


def run_task(
    task: Task,
    tokenizer: Tokenizer,
    model: GPT,
    *,
    sampling: Sampling | None = None,
    max_problems: int | None = None,
    batch_size: int | None = None,
    world: World | None = None,
) -> TaskResult:
    """Evaluate a task in the way that its `eval_type` names.

    batch_size: None = what is usual for that way. NotScoredError when it cannot be scored: it
    cannot be judged on this machine, it has no problems, a row has no answer, its code fails, a
    letter is not one token, a prompt is longer than the model's context, the logits are no numbers,
    the device of a rank has no memory even for one problem.
    """
    world = world or World()
    reasons = [other for other in world.gather_objects(task.reason_to_skip()) if other is not None]
    if reasons:
        raise NotScoredError(reasons[0])
    scope: dict[str, Any] = {"max_problems": max_problems, "world": world}
    if batch_size is not None:
        scope["batch_size"] = batch_size
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
    batch_size: int = CHOICES_PER_PASS,
    world: World | None = None,
) -> TaskResult:
    """Let the model choose among the letters of each problem, by their logits after the prompt.

    Nothing is sampled: the likeliest letter counts even where another token is likelier. All
    ranks take part. NotScoredError as in `run_task`.
    """
    world = world or World()
    started = time.perf_counter()
    problems = world.together(lambda: _prepare(task, tokenizer, model, max_problems, world))
    was_training = model.training
    model.eval()
    try:
        chosen = world.together(
            lambda: _within_memory(
                task, lambda: _choose(task, problems, model, batch_size, tokenizer.bos_id)
            )
        )
    finally:
        model.train(was_training)
    records = world.together(lambda: _judge(task, problems.conversations, chosen, num_threads=1))
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
    follow from seed, problem and sample alone. All ranks take part. NotScoredError as in
    `run_task`.
    """
    world, sampling = world or World(), sampling or Sampling()
    started = time.perf_counter()
    count = sampling.num_samples
    problems = world.together(lambda: _prepare(task, tokenizer, model, max_problems, world))
    answers = world.together(
        lambda: _within_memory(
            task, lambda: _write(task, problems, model, tokenizer, sampling, batch_size)
        )
    )
    texts = [plain_text(tokenizer, answer) for answer in answers]
    places = {
        index: slice(place * count, (place + 1) * count)
        for place, index in enumerate(problems.prompts)
    }
    completions = {index: tuple(texts[place]) for index, place in places.items()}
    threads = _num_judges(world)
    records = world.together(lambda: _judge(task, problems.conversations, completions, threads))
    shown = [shown_text(tokenizer, answer) for answer in answers]
    records = tuple(replace(record, shown=tuple(shown[places[record.index]])) for record in records)
    return _result(task, records, max_problems, world, started)


def check_task(
    task: Task, tokenizer: Tokenizer, *, context: int, max_problems: int | None = None
) -> None:
    """Raise NotScoredError unless a model with that context can be asked all the problems."""
    _read_problems(task, tokenizer, context, _own_problems(task, max_problems, World()))


@dataclass(frozen=True)
class _Problems:
    """The problems of this rank, by index."""

    conversations: dict[int, Conversation]
    prompts: dict[int, list[int]]
    letters: dict[str, int]
    """Token of every letter that occurs."""


def _prepare(
    task: Task, tokenizer: Tokenizer, model: GPT, max_problems: int | None, world: World
) -> _Problems:
    own = _own_problems(task, max_problems, world)
    return _read_problems(task, tokenizer, model.config.sequence_len, own)


def _read_problems(task: Task, tokenizer: Tokenizer, context: int, indices: range) -> _Problems:
    conversations = {index: problem(task, index) for index in indices}
    letters = {}
    if task.eval_type == "categorical":
        letters = _letter_ids(task, tokenizer, conversations)
    return _Problems(conversations, _prompts(task, tokenizer, conversations, context), letters)


def _num_problems(task: Task, max_problems: int | None) -> int:
    total = num_problems(task)
    return total if max_problems is None or max_problems < 0 else min(total, max_problems)


def _own_problems(task: Task, max_problems: int | None, world: World) -> range:
    """Indices of the problems of this rank."""
    total = _num_problems(task, max_problems)
    if total == 0:
        raise NotScoredError(f"task {task.name} has no problems to evaluate")
    return range(world.rank, total, world.size)


def _prompts(
    task: Task, tokenizer: Tokenizer, conversations: dict[int, Conversation], context: int
) -> dict[int, list[int]]:
    """The tokens before each answer; all must leave room for one more in the context."""
    prompts = {
        index: tokenizer.render_for_completion(conversation)
        for index, conversation in conversations.items()
    }
    too_long = [index for index, prompt in prompts.items() if len(prompt) >= context]
    if too_long:
        worst = max(too_long, key=lambda index: len(prompts[index]))
        raise NotScoredError(
            f"{len(too_long)} of {len(prompts)} prompts of {task.name} do not fit the model's "
            f"context of {context}: problem {worst} has {len(prompts[worst])} tokens; evaluate a "
            "model with a longer context"
        )
    return prompts


def _letter_ids(
    task: Task, tokenizer: Tokenizer, conversations: dict[int, Conversation]
) -> dict[str, int]:
    """The token of every letter that occurs."""
    letters: dict[str, int] = {}
    for index, conversation in conversations.items():
        if not conversation.letters:
            raise NotScoredError(f"problem {index} of {task.name} has no letters to choose from")
        for letter in conversation.letters:
            if letter in letters:
                continue
            ids = tokenizer.encode(letter)
            if len(ids) != 1:
                raise NotScoredError(
                    f"the letter {letter!r} of problem {index} of {task.name} is {len(ids)} "
                    "tokens; a choice must be a single token of the vocabulary"
                )
            letters[letter] = ids[0]
    return letters


def _within_memory(task: Task, work: Callable[[], T]) -> T:
    """What `work` returns; NotScoredError where the device has no memory for it."""
    try:
        return work()
    except (torch.OutOfMemoryError, ShortMemoryError) as error:
        reason = first_line(error)
    # Outside of the handler, for the error holds on to what has filled the device.
    torch.cuda.empty_cache()
    raise NotScoredError(f"task {task.name}: {reason}")


def _choose(
    task: Task, problems: _Problems, model: GPT, batch_size: int, padding: int
) -> dict[int, tuple[str, ...]]:
    """The likeliest letter of each problem, by index; in smaller batches where memory is short."""
    chosen: dict[int, tuple[str, ...]] = {}
    waiting = sorted(problems.prompts, key=lambda i: len(problems.prompts[i]), reverse=True)
    while waiting:
        batch = waiting[:batch_size]
        try:
            logits = _last_logits(model, [problems.prompts[i] for i in batch], padding)
            reason = ""
        except torch.OutOfMemoryError as error:
            reason = first_line(error)
        if reason:
            batch_size = halve_answers(len(batch), reason)
            continue
        del waiting[: len(batch)]
        for index, row in zip(batch, logits, strict=True):
            options = problems.conversations[index].letters
            scores = row[[problems.letters[letter] for letter in options]]
            if scores.isnan().any():  # argmax would take the first of them
                raise no_numbers(f"problem {index} of {task.name}")
            chosen[index] = (options[int(scores.argmax())],)
    return chosen


@torch.inference_mode()
def _last_logits(model: GPT, prompts: list[list[int]], padding: int) -> Tensor:
    """Logits (B, V) after each prompt, on the CPU; one forward pass, padded on the right."""
    longest = max(map(len, prompts))
    rows = [prompt + [padding] * (longest - len(prompt)) for prompt in prompts]
    states = model.hidden(torch.tensor(rows, device=model.device))
    ends = torch.tensor([len(prompt) - 1 for prompt in prompts], device=model.device)
    last = states[torch.arange(len(prompts), device=model.device), ends]
    return model.logits(last).cpu()


def _write(
    task: Task,
    problems: _Problems,
    model: GPT,
    tokenizer: Tokenizer,
    sampling: Sampling,
    batch_size: int,
) -> list[list[int]]:
    """The answers to each problem, one problem after the other."""
    count = sampling.num_samples
    try:
        return Engine(model, tokenizer).complete(
            [prompt for prompt in problems.prompts.values() for _ in range(count)],
            max_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            seeds=[sampling.seed + i * count + k for i in problems.prompts for k in range(count)],
            batch_size=batch_size,
            refuses_nan=True,
        )
    except NanLogitsError as error:
        index = list(problems.prompts)[error.place // count]
        raise no_numbers(f"problem {index} of {task.name}") from error


def _num_judges(world: World) -> int:
    """Threads of this rank: the ranks of a machine share its processors."""
    here = platform.node()
    return max(1, min(MAX_JUDGES, usable_cpus() // world.gather_objects(here).count(here)))


def _judge(
    task: Task,
    conversations: dict[int, Conversation],
    completions: dict[int, tuple[str, ...]],
    num_threads: int,
) -> tuple[Record, ...]:
    def judge(index: int) -> Record:
        conversation, texts = conversations[index], completions[index]
        verdicts = tuple(judged(task, index, conversation, text) for text in texts)
        return Record(index, conversation, texts, verdicts)

    if num_threads == 1:
        return tuple(map(judge, conversations))
    with ThreadPoolExecutor(num_threads) as judges:
        return tuple(judges.map(judge, conversations))


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
