"""Answers as a library call: one prompt many times, or many prompts at once.

The work is done by `scheduler.Scheduler`, which the terminal chat and the server share. A row ends
with <|assistant_end|> or <|bos|>, at its token limit, or where the model's context ends. Rows do
not notice each other: each has its own length, random numbers and tool call.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice

import torch

from nanochat.answers import plain_text
from nanochat.common import UserError
from nanochat.decoder import Decoder
from nanochat.gpt import GPT
from nanochat.request import Request, TokenEvent
from nanochat.runtime import first_line, halve_answers
from nanochat.sampling import SamplingSettings
from nanochat.scheduler import MAX_ROWS, Scheduler, answer_room
from nanochat.tokenizer import Tokenizer

# What a model that has only read text should know how to continue, greedily, after training.
SAMPLE_PROMPTS = (
    "The capital of France is",
    "The chemical symbol of gold is",
    "If yesterday was Friday, then tomorrow is",
    "The opposite of hot is",
    "The planets of the solar system are",
    "My favorite color is",
    "If 5 * x + 3 = 13, then x is",
)
SAMPLE_TOKENS = 16


class NanLogitsError(Exception):
    """Logits of an answer are NaN, so that its tokens say nothing about the model."""

    def __init__(self, place: int) -> None:
        super().__init__(f"the logits of prompt {place} are not numbers")
        self.place = place
        """Of the prompt, among those of the call."""


class Engine:
    """Answers prompts with a model. Remembers prompts, so that one that goes on is read once."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, *, decoder: Decoder | None = None) -> None:
        """The model's weights are read now: after training on, make a new engine."""
        self.model, self.tokenizer = model, tokenizer
        self.scheduler = Scheduler(model, tokenizer, decoder=decoder)
        self._inbox: dict[Request, deque[TokenEvent]] = {}

    @property
    def context(self) -> int:
        """Tokens of prompt and answer together that the model was trained to see."""
        return self.scheduler.decoder.context

    def generate(
        self,
        tokens: Sequence[int],
        num_samples: int = 1,
        max_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 42,
    ) -> Iterator[tuple[list[int], list[int]]]:
        """Continue one prompt `num_samples` times; yields (token column, mask column) each step.

        Both columns have one entry a sample; the mask is 1 where the model chose the token, 0
        where the tool forced it or the sample has ended (then the token is its last one again).
        max_tokens None goes on to the end of the context. Raises UserError for a prompt that is
        empty or leaves no room, and for meaningless settings.
        """
        settings = SamplingSettings(
            temperature, top_k, top_p, max_tokens=max_tokens or None, seed=seed
        )
        limit = answer_room(tokens, self.context, max_tokens)
        if num_samples < 1:
            raise UserError(f"{num_samples} samples asked for; ask for at least 1")
        if limit == 0:
            return iter(())
        return self._columns(list(tokens), num_samples, settings)

    def generate_batch(
        self,
        tokens: Sequence[int],
        num_samples: int = 1,
        max_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 42,
    ) -> tuple[list[list[int]], list[list[int]]]:
        """`generate` to the end: (sequences, masks), each the prompt and one sample's answer.

        The terminal token is left out; the mask is 0 for the prompt and for forced tokens.
        """
        settings = SamplingSettings(
            temperature, top_k, top_p, max_tokens=max_tokens or None, seed=seed
        )
        if answer_room(tokens, self.context, max_tokens) == 0:
            return [list(tokens)] * num_samples, [[0] * len(tokens)] * num_samples
        requests = [
            self.scheduler.submit(tokens, settings, sample=sample) for sample in range(num_samples)
        ]
        self._finish(requests)
        sequences = [[*tokens, *request.tokens] for request in requests]
        masks = [[0] * len(tokens) + request.mask for request in requests]
        return sequences, masks

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 42,
        seeds: Sequence[int] | None = None,
        batch_size: int = MAX_ROWS,
        refuses_nan: bool = False,
    ) -> list[list[int]]:
        """Answer many different prompts, up to `batch_size` of them a step.

        Returns each prompt's answer, in order, without prompt and terminal token. Prompt i is
        answered as `generate(prompt, seed=seeds[i])` would; without `seeds`, as seed + i.
        Raises UserError for a batch size below 1, and as `generate` does. refuses_nan: whether
        an answer whose logits are NaN raises NanLogitsError. Where the device has no memory for
        so many, unfinished answers begin again, half as many at once.
        """
        if batch_size < 1:
            raise UserError(f"batch size is {batch_size}; use a positive number")
        row_seeds = [seed + i for i in range(len(prompts))] if seeds is None else seeds
        settings = SamplingSettings(temperature, top_k, top_p, max_tokens=max_tokens or None)
        limits = [answer_room(prompt, self.context, max_tokens) for prompt in prompts]
        if max_tokens == 0:
            return [[] for _ in limits]
        assert len(row_seeds) == len(prompts)
        places: Iterator[int] = iter(range(len(prompts)))
        answers: list[list[int]] = [[] for _ in limits]
        running: dict[Request, int] = {}
        max_rows, self.scheduler.max_rows = self.scheduler.max_rows, batch_size
        try:
            while True:
                # Enough for every row that the next step frees; there may be millions in all.
                for place in islice(places, 2 * batch_size - len(running)):
                    own = replace(settings, seed=row_seeds[place])
                    running[self.scheduler.submit(prompts[place], own)] = place
                if not running:
                    return answers
                try:
                    self._step()
                    reason = ""
                except torch.OutOfMemoryError as error:
                    reason = first_line(error)
                if reason:
                    batch_size = self._with_fewer_rows(running, batch_size, reason)
                    places, running = chain(list(running.values()), places), {}
                    continue
                if refuses_nan:
                    _check_logits(running)
                for request in [request for request in running if request.is_finished]:
                    answers[running.pop(request)] = request.tokens
        finally:
            self.scheduler.max_rows = max_rows
            for request in running:
                self.scheduler.cancel(request)

    def _with_fewer_rows(self, running: Mapping[Request, int], rows: int, reason: str) -> int:
        """Give up these requests and what is remembered; returns how many to answer at once."""
        rows = max(min(rows, self.scheduler.num_active), 1)
        for request in running:
            self.scheduler.cancel(request)
        self.scheduler.forget_all()
        self.scheduler.max_rows = halve_answers(rows, reason)
        return self.scheduler.max_rows

    def _finish(self, requests: Sequence[Request]) -> None:
        """Step until all of them have ended; what an interruption leaves is cancelled."""
        try:
            while not all(request.is_finished for request in requests):
                self._step()
        finally:
            for request in requests:
                self.scheduler.cancel(request)

    def _step(self) -> None:
        """One step for everybody; other iterators find their tokens in their inboxes."""
        for event in self.scheduler.step():
            if event.request in self._inbox:
                self._inbox[event.request].append(event)

    def _columns(
        self, prompt: list[int], num_samples: int, settings: SamplingSettings
    ) -> Iterator[tuple[list[int], list[int]]]:
        """The samples' tokens side by side, whatever steps they were made in."""
        requests = [
            self.scheduler.submit(prompt, settings, sample=sample) for sample in range(num_samples)
        ]
        inboxes = [self._inbox.setdefault(request, deque()) for request in requests]
        last = [0] * num_samples
        try:
            while True:
                while not all(
                    inbox or request.is_finished
                    for inbox, request in zip(inboxes, requests, strict=True)
                ):
                    self._step()
                if not any(inboxes):
                    return
                mask = [0] * num_samples
                for sample, inbox in enumerate(inboxes):
                    if inbox:
                        event = inbox.popleft()
                        last[sample], mask[sample] = event.token, int(not event.is_forced)
                yield list(last), mask
        finally:
            for request in requests:
                self.scheduler.cancel(request)
                del self._inbox[request]


def _check_logits(running: Mapping[Request, int]) -> None:
    """NanLogitsError for the first place among them whose logits were NaN."""
    places = [place for request, place in running.items() if request.has_nan_logits]
    if places:
        raise NanLogitsError(min(places))


def sample_prompts(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[str] = SAMPLE_PROMPTS,
    *,
    max_tokens: int = SAMPLE_TOKENS,
) -> list[str]:
    """Continue each text greedily, as a model that has only read text; returns text + answer."""
    ids = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in prompts]
    answers = Engine(model, tokenizer).complete(ids, max_tokens=max_tokens, temperature=0.0)
    return [
        text + plain_text(tokenizer, answer) for text, answer in zip(prompts, answers, strict=True)
    ]
