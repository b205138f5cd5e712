"""Reinforcement learning's batches: questions, sampled answers, and what each answer is worth.

A step asks Q questions and samples S answers to each from the model as it stands. An answer's
advantage is its reward minus the mean reward of its question's answers; it weighs every token the
model chose in it. The prompt and what the tool wrote are context. A question whose answers are all
equally good teaches nothing, so its rows are left out of the batch.

Legend: B = rows (answers) of this rank, T = positions of the longest row.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from nanochat.answers import plain_text
from nanochat.common import UserError
from nanochat.conversation import Conversation
from nanochat.dataloader import Batch
from nanochat.gpt import GPT
from nanochat.objectives import IGNORED, token_losses_in_passes
from nanochat.problems import num_problems, problem, rewarded
from nanochat.request import Request
from nanochat.runtime import World, first_line, halve_answers
from nanochat.sampling import SamplingSettings
from nanochat.scheduler import Scheduler
from nanochat.tokenizer import Tokenizer

# Answers written at once. Tokens/s of one CPU core at depth 4 with 64 and 256 rows: the plain
# decoder 2,330 and 2,750, the compiled one 7,200 with both (2026-11-21). A GPU gains more.
MAX_ROWS = 256


class RewardedTask(Protocol):
    """A numbered set of questions whose answers can be judged; `tasks.common.Task` is one."""

    @property
    def name(self) -> str:
        """Shown in messages."""
        ...

    @property
    def eval_type(self) -> str:
        """Only "generative" tasks can be learned from."""
        ...

    def __len__(self) -> int:
        """Number of questions."""
        ...

    def __getitem__(self, index: int) -> Conversation:
        """A question; its last message is the reference answer."""
        ...

    def reward(self, conversation: Conversation, completion: str) -> float:
        """How good a completion is."""
        ...


@dataclass(frozen=True)
class RolloutSettings:
    """How many questions and answers, how answers are sampled, and what they cost."""

    examples_per_step: int = 16
    """Questions of one optimizer step."""
    num_samples: int = 16
    """Answers to each question."""
    max_new_tokens: int = 256
    """Longest answer; the model's context bounds it as well."""
    temperature: float = 1.0
    """Of the answers."""
    top_k: int | None = 50
    """Sample from the k likeliest tokens; 0 or None = off."""
    kl_weight: float = 0.0
    """Price, in reward, of each nat by which a token is likelier than to the reference."""
    seed: int = 42
    """Of the sampling."""

    def __post_init__(self) -> None:
        for name in ("examples_per_step", "max_new_tokens"):
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} is {getattr(self, name)}; it must be at least 1")
        if self.num_samples < 2:
            raise UserError(
                f"--num-samples is {self.num_samples}; an answer is compared with the others to "
                "its question, so use at least 2"
            )
        if self.temperature == 0:
            raise UserError(
                "--temperature is 0: all answers to a question would be the same, and nothing "
                "could be learned; use a positive number such as 1"
            )
        if not 0 < self.temperature < math.inf:
            raise UserError(f"--temperature is {self.temperature}; use a positive number such as 1")
        if not 0 <= self.kl_weight < math.inf:
            raise UserError(f"--kl-weight is {self.kl_weight}; use 0 (off) or a positive number")
        self.sampling(0)

    def sampling(self, seed: int) -> SamplingSettings:
        """The part that is about writing; UserError for meaningless settings."""
        return SamplingSettings(
            self.temperature, self.top_k, max_tokens=self.max_new_tokens, seed=seed
        )


@dataclass
class Answer:
    """One sampled answer: its tokens with the one that ends it, and which the model chose."""

    tokens: list[int] = field(default_factory=list)
    is_chosen: list[bool] = field(default_factory=list)
    is_cut_off: bool = False
    """Whether the limit ended it, and not the model."""


@dataclass(frozen=True)
class Group:
    """A question's prompt, its answers and what they earned."""

    prompt: list[int]
    answers: list[Answer]
    rewards: list[float]

    @property
    def num_chosen(self) -> int:
        """Tokens that the model chose, over all answers."""
        return sum(sum(answer.is_chosen) for answer in self.answers)


class RolloutLoader:
    """Endless steps of rollouts. Where it stands is a number of steps: the same on every rank."""

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        task: RewardedTask,
        *,
        settings: RolloutSettings,
        world: World,
        reference: GPT | None = None,
        row_length: int | None = None,
    ) -> None:
        """Sample from `model`, which the trainer changes between steps.

        reference: what --kl-weight keeps the model near to. row_length: T of every batch; None is
        the longest row of each. UserError for a task that cannot be learned from, and for
        questions that can not be dealt to the ranks equally.
        """
        check_task(task)
        if settings.examples_per_step % world.size:
            raise UserError(
                f"--examples-per-step {settings.examples_per_step} can not be dealt to "
                f"{world.size} ranks equally; use a multiple of {world.size}"
            )
        if settings.kl_weight and reference is None:
            raise ValueError("a KL term needs a reference model")
        self._model, self._tokenizer, self._task = model, tokenizer, task
        self._settings, self._world = settings, world
        self._reference, self._row_length = reference, row_length
        self._padding = tokenizer.encode_special("<|assistant_end|>")
        self._rows_per_pass = self._rows_at_once = MAX_ROWS
        self._steps, self._waited = 0, 0.0

    def next_step(self) -> Batch:
        """Ask this rank's questions of the next step; rows of the answers that teach something."""
        first = self._steps * self._settings.examples_per_step
        self._steps += 1
        own = range(self._world.rank, self._settings.examples_per_step, self._world.size)
        self._waited = 0.0
        return self._batch(self._ask([first + slot for slot in own]))

    def state_dict(self) -> dict[str, Any]:
        """Steps handed out: seeds and questions of the next one follow from it."""
        return {"steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after that step."""
        self._steps = int(state["steps"])

    @property
    def progress(self) -> float:
        """Epochs of questions asked so far."""
        return self._steps * self._settings.examples_per_step / len(self._task)

    def _ask(self, numbers: Sequence[int]) -> list[Group]:
        """Questions by their number in the run, which goes on over epochs, and their answers."""
        indices = [number % num_problems(self._task) for number in numbers]
        conversations = [problem(self._task, index) for index in indices]
        prompts = [
            render_prompt(self._tokenizer, conversation, self._model.config.sequence_len)
            for conversation in conversations
        ]
        answers, self._rows_at_once = sample_answers(
            self._model,
            self._tokenizer,
            prompts,
            settings=self._settings,
            seeds=[seed_of(self._settings.seed, number) for number in numbers],
            rows=self._rows_at_once,
        )
        return [
            Group(prompt, group, [self._reward(index, conversation, answer) for answer in group])
            for index, conversation, prompt, group in zip(
                indices, conversations, prompts, answers, strict=True
            )
        ]

    def _reward(self, index: int, conversation: Conversation, answer: Answer) -> float:
        text = plain_text(self._tokenizer, answer.tokens)
        return rewarded(self._task, index, conversation, text)

    def _batch(self, groups: Sequence[Group]) -> Batch:
        settings = self._settings
        has_price = settings.kl_weight > 0
        useful = [group for group in groups if has_price or any(advantages(group.rewards))]
        num_targets = int(self._sum(sum(group.num_chosen for group in useful)))
        rows = []
        for group in useful:
            # The trainer divides by all targets of the step. What is left then is the mean over
            # the questions of each one's mean over its tokens: long answers weigh no more.
            share = num_targets / (settings.examples_per_step * group.num_chosen)
            for answer, advantage in zip(group.answers, advantages(group.rewards), strict=True):
                rows.append((group.prompt, answer, advantage, share))
        if num_targets and not rows:
            # Other ranks have something to learn, and all ranks take part in the update.
            rows = [(groups[0].prompt, groups[0].answers[0], 0.0, 0.0)]
        inputs, targets, worth, shares = self._tensors(rows)
        measures = self._measures(groups, useful)
        if has_price:
            excess = self._excess(inputs, targets)
            worth -= settings.kl_weight * excess
            measures["kl"] = self._sum(float(excess.sum())) / num_targets
        return Batch(inputs, targets, num_targets, worth * shares, measures, self._waited)

    def _sum(self, value: float) -> float:
        """Over ranks; the time in which this rank may have waited for others is noted."""
        started = time.perf_counter()
        total = self._world.sum(value)
        self._waited += time.perf_counter() - started
        return total

    def _tensors(
        self, rows: Sequence[tuple[list[int], Answer, float, float]]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Inputs and targets int64, advantages and shares fp32; (B, T) each, padded."""
        lengths = [len(prompt) + len(answer.tokens) - 1 for prompt, answer, _, _ in rows]
        shape = len(rows), self._row_length or max(lengths, default=0)
        inputs = torch.full(shape, self._padding, dtype=torch.int64)
        targets = torch.full(shape, IGNORED, dtype=torch.int64)
        worth, shares = torch.zeros(shape), torch.zeros(shape)
        for row, (prompt, answer, advantage, share) in enumerate(rows):
            ids = torch.tensor([*prompt, *answer.tokens])
            is_target = torch.tensor([*[False] * len(prompt), *answer.is_chosen])[1:]
            span = slice(0, len(ids) - 1)
            inputs[row, span] = ids[:-1]
            targets[row, span] = torch.where(is_target, ids[1:], IGNORED)
            worth[row, span] = is_target * advantage
            shares[row, span] = is_target * share
        return inputs, targets, worth, shares

    @torch.no_grad()
    def _excess(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Nats by which each target is likelier than to the reference: (B, T) fp32, on the CPU.

        Its mean over samples is the KL divergence of the model from the reference.
        """
        assert self._reference is not None
        idx, wanted = inputs.to(self._model.device), targets.to(self._model.device)
        excess = self._losses(self._reference, idx, wanted) - self._losses(self._model, idx, wanted)
        return excess.cpu()

    def _losses(self, model: GPT, idx: Tensor, targets: Tensor) -> Tensor:
        losses, self._rows_per_pass = token_losses_in_passes(
            model, idx, targets, rows=self._rows_per_pass, rank=self._world.rank
        )
        return losses

    def _measures(self, groups: Sequence[Group], useful: Sequence[Group]) -> dict[str, float]:
        """Of all answers of the step on all ranks."""
        settings = self._settings
        num_answers = settings.examples_per_step * settings.num_samples
        answers = [answer for group in groups for answer in group.answers]
        return {
            "reward": self._sum(math.fsum(sum(group.rewards) for group in groups)) / num_answers,
            "answer_tokens": self._sum(sum(len(a.tokens) for a in answers)) / num_answers,
            "cut_off": self._sum(sum(a.is_cut_off for a in answers)) / num_answers,
            "useful_questions": self._sum(len(useful)) / settings.examples_per_step,
        }


def advantages(rewards: Sequence[float]) -> list[float]:
    """Reward minus the mean over the answers to one question; exactly 0 where all are equal.

    Not divided by the spread, which would make the questions count most that are nearly always
    answered alike (arXiv:2503.20783, section 3.1).
    """
    if min(rewards) == max(rewards):  # a mean of equal floats may differ from them in the last bit
        return [0.0] * len(rewards)
    mean = math.fsum(rewards) / len(rewards)
    return [reward - mean for reward in rewards]


def sample_answers(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    settings: RolloutSettings,
    seeds: Sequence[int],
    rows: int = MAX_ROWS,
) -> tuple[list[list[Answer]], int]:
    """Answer every prompt `num_samples` times; a prompt is read once for all its answers.

    An answer's random numbers follow from its prompt's seed and its place among the answers. Where
    the device has no memory for `rows` of them at once, all begin again with half as many; that
    number is returned, too.
    """
    rows = min(rows, len(prompts) * settings.num_samples)
    while True:
        try:
            return _sample(model, tokenizer, prompts, settings, seeds, rows), rows
        except torch.OutOfMemoryError as error:
            reason = first_line(error)
        rows = halve_answers(rows, reason)


def _sample(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    settings: RolloutSettings,
    seeds: Sequence[int],
    rows: int,
) -> list[list[Answer]]:
    # A new one each time: what an earlier state of the model remembers must not be used.
    scheduler = Scheduler(model, tokenizer, max_rows=rows)
    answers: dict[Request, Answer] = {}
    groups: list[list[Answer]] = []
    for prompt, seed in zip(prompts, seeds, strict=True):
        requests = [
            scheduler.submit(prompt, settings.sampling(seed), sample=sample)
            for sample in range(settings.num_samples)
        ]
        groups.append([answers.setdefault(request, Answer()) for request in requests])
    while not scheduler.is_idle:
        for event in scheduler.step():
            answer = answers[event.request]
            answer.tokens.append(event.token)
            answer.is_chosen.append(not event.is_forced)
            answer.is_cut_off = event.finish == "length"
    return groups


def check_prompts(task: RewardedTask, count: int, tokenizer: Tokenizer, *, context: int) -> None:
    """UserError when one of a task's first `count` questions leaves no room for an answer."""
    for index in range(min(count, num_problems(task))):
        render_prompt(tokenizer, problem(task, index), context)


def render_prompt(tokenizer: Tokenizer, conversation: Conversation, context: int) -> list[int]:
    """The prompt for the last message; UserError when it leaves no room for an answer."""
    prompt = tokenizer.render_for_completion(conversation)
    if len(prompt) >= context:
        question = conversation.messages[-2].text
        raise UserError(
            f"the question {question[:40]!r}... is a prompt of {len(prompt)} tokens, but the "
            f"model's context is {context} tokens; practise with a model of a longer context"
        )
    return prompt


def check_task(task: RewardedTask) -> None:
    """Refuse a task whose answers are not written and judged."""
    if task.eval_type != "generative":
        raise UserError(
            f"task {task.name} is {task.eval_type}: reinforcement learning needs written answers "
            "that are judged; choose a generative task"
        )
    if num_problems(task) == 0:
        raise UserError(f"task {task.name} has no questions to learn from")


def seed_of(seed: int, number: int) -> int:
    """A seed of its own for question `number`, the same on every machine and number of ranks."""
    digest = hashlib.blake2b(f"rollout {seed} {number}".encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big")


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Chance that one of k answers drawn from the samples is right (arXiv:2107.03374, eq. 1).

    An unbiased estimate of pass@k for every k from 1 to num_samples.
    """
    if not 1 <= k <= num_samples:
        raise UserError(f"pass@{k} cannot be told from {num_samples} samples; use more samples")
    return 1.0 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)
