"""Continuous batching: requests of different ages share every step of the model.

A request waits until a row and memory are free, first come, first served; its prompt is read in
chunks beside the decoding of the others, and its row is free for the next one when it has ended.
Rows that have ended are remembered as long as there is room: a prompt that begins like one of them,
the next turn of a chat or another sample of the same question, reads only what is new.

Single-threaded, without locks: the caller owns the thread.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import psutil
import torch
from torch import Tensor

from nanochat.common import ShortMemoryError, UserError
from nanochat.decoder import Chunk, Decoder
from nanochat.decoders import chooser_for, make_decoder
from nanochat.gpt import GPT
from nanochat.request import Request, TokenEvent
from nanochat.sampling import SamplingSettings, log_probabilities
from nanochat.tokenizer import Tokenizer

MAX_ROWS = 64
# Prompt tokens read in one step, so that a long prompt does not keep running answers waiting.
PREFILL_TOKENS = 512
MIN_SHARED = 8  # a shorter common beginning is read again: that costs less than looking after it


class QueueFullError(UserError):
    """As many requests wait as may wait; try again later."""


class _Row:
    """A row of the decoder: what it remembers, and the request it works for."""

    def __init__(self, place: int, capacity: int, request: Request) -> None:
        self.place, self.capacity = place, capacity
        self.request = request
        self.known: list[int] = []
        """Tokens whose keys and values the decoder holds."""
        self.leader: _Row | None = None
        """A row that is reading the same beginning; its copy is waited for."""

    @property
    def is_reading(self) -> bool:
        """Whether some of the prompt is unknown."""
        return len(self.known) < len(self.request.prompt)


class Scheduler:
    """Answers many requests with one model; see the module's text."""

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        *,
        max_rows: int = MAX_ROWS,
        max_waiting: int | None = None,
        max_cache_tokens: int | None = None,
        prefill_tokens: int | None = None,
        decoder: Decoder | None = None,
    ) -> None:
        """Weights are read now: after training on, make a new one.

        max_rows: requests answered at once; max_waiting: requests beyond those before
        `QueueFullError` (None = no bound); max_cache_tokens: prompt and answer tokens reserved
        together, remembered ones included (None = what half of the free memory holds);
        prefill_tokens: prompt tokens read in one step (None = PREFILL_TOKENS);
        decoder: the model as `make_decoder` prepares it (None = by itself).
        """
        if max_rows < 1:
            raise UserError(f"max rows is {max_rows}; use a positive number")
        self.tokenizer = tokenizer
        self.decoder: Decoder = decoder or make_decoder(model)
        self._choose = chooser_for(self.decoder.device)
        self.max_rows, self.max_waiting = max_rows, max_waiting
        self.max_cache_tokens = max_cache_tokens or affordable_tokens(self.decoder, max_rows)
        self.prefill_tokens = prefill_tokens or PREFILL_TOKENS
        self.num_prompt_tokens_read = 0
        """Prompt tokens that were computed, not copied."""
        self._waiting: deque[Request] = deque()
        self._active: list[_Row] = []
        self._remembered: list[_Row] = []

    @property
    def num_active(self) -> int:
        """Requests that have a row."""
        return len(self._active)

    @property
    def num_waiting(self) -> int:
        """Requests without a row."""
        return len(self._waiting)

    @property
    def num_cache_tokens(self) -> int:
        """Tokens of memory that the decoder takes, for active rows and remembered ones."""
        return self.decoder.num_reserved

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._active and not self._waiting

    def submit(
        self, prompt: Sequence[int], settings: SamplingSettings, *, sample: int = 0
    ) -> Request:
        """Queue a request; `step` works on it.

        sample: which of several answers to one prompt with one seed. UserError for a prompt that
        is empty, longer than the context or has unknown ids; ShortMemoryError where it needs more
        memory than there is; QueueFullError when too many wait.
        """
        limit = answer_room(prompt, self.decoder.context, settings.max_tokens)
        vocab_size = self.decoder.vocab_size
        unknown = next((token for token in prompt if not 0 <= token < vocab_size), None)
        if unknown is not None:
            raise UserError(
                f"{unknown} is not a token of the model (vocabulary: {vocab_size:,} tokens)"
            )
        if len(prompt) + limit > self.max_cache_tokens:
            raise ShortMemoryError(
                f"a prompt of {len(prompt)} and an answer of up to {limit} tokens need more than "
                f"the {self.max_cache_tokens:,} tokens of cache memory; ask for a shorter answer"
            )
        if self.max_waiting is not None and self._num_unplaced() >= self.max_waiting:
            raise QueueFullError(
                f"{self.num_active} requests are being answered and {self.num_waiting} wait; "
                "try again later"
            )
        request = Request(prompt, settings, tokenizer=self.tokenizer, limit=limit, sample=sample)
        self._waiting.append(request)
        return request

    def _num_unplaced(self) -> int:
        """Waiting requests beyond those that the next step gives a row."""
        return self.num_waiting - (self.max_rows - self.num_active)

    def cancel(self, request: Request) -> None:
        """Stop working on a request; its row is free for the next step. No-op when finished."""
        if request.is_finished:
            return
        request.is_cancelled = True
        if request in self._waiting:
            self._waiting.remove(request)
        self._retire_finished()

    def forget_all(self) -> None:
        """Give back the memory of everything that was remembered for later prompts."""
        for row in list(self._remembered):
            self._forget(row)

    def step(self) -> list[TokenEvent]:
        """Admit what waits, read prompts, give every row that decodes its next token."""
        self._admit()
        self._follow_leaders()
        chunks, rows = self._chunks()
        if not chunks:
            return []
        logits = self.decoder.feed(chunks)
        deciding = []
        for row, chunk in zip(rows, chunks, strict=True):
            if row.is_reading:
                self.num_prompt_tokens_read += len(chunk.tokens)
            row.known += chunk.tokens
            if chunk.wants_logits:
                deciding.append(row.request)
        events = self._decide(deciding, logits) if deciding else []
        self._retire_finished()
        return events

    # ---- admission ----------------------------------------------------------------------------

    def _admit(self) -> None:
        """Give rows to waiting requests in their order, as far as rows and memory go."""
        while self._waiting and len(self._active) < self.max_rows:
            request = self._waiting[0]
            needed = len(request.prompt) + request.limit
            source, shared = self._best_source(request.prompt)
            # A remembered row that the prompt continues is taken over instead of copied.
            is_continued = (
                (
                    source in self._remembered
                    and shared == len(source.known)
                    and needed <= source.capacity
                )
                if source
                else False
            )
            if not is_continued and not self._make_room(needed, keep=source):
                return
            self._waiting.popleft()
            if source is not None and is_continued:
                self._remembered.remove(source)
                source.request = request
                self._active.append(source)
                continue
            row = _Row(self.decoder.open(needed, self.max_cache_tokens), needed, request)
            self._active.append(row)
            row.leader = self._reader_of(row, shared)
            if row.leader is None and source is not None and source.capacity:
                self._copy(source, row, shared)

    def _make_room(self, needed: int, *, keep: _Row | None) -> bool:
        """Forget remembered rows, oldest first, until so many tokens fit; whether they do.

        None is forgotten where that would not be enough.
        """
        # `keep` is about to be copied from, so it goes last.
        remembered = sorted(self._remembered, key=lambda row: row is keep)
        places = [row.place for row in remembered]

        def fits_without(count: int) -> bool:
            gone = places[:count]
            return self.decoder.can_open(needed, self.max_cache_tokens, closing=gone)

        if not fits_without(len(places)):
            return False
        count = next(count for count in range(len(places) + 1) if fits_without(count))
        for row in remembered[:count]:
            self._forget(row)
        return True

    def _forget(self, row: _Row) -> None:
        self._remembered.remove(row)
        self.decoder.close(row.place)
        row.capacity = 0

    def _best_source(self, prompt: Sequence[int]) -> tuple[_Row | None, int]:
        """The row that knows most of the prompt's beginning, and how many tokens of it.

        The last token is always read anew: its logits are needed.
        """
        best, longest = None, MIN_SHARED - 1
        for row in (*self._remembered, *self._active):
            shared = min(common_length(row.known, prompt), len(prompt) - 1)
            if shared > longest:
                best, longest = row, shared
        return best, longest if best else 0

    def _reader_of(self, row: _Row, shared: int) -> _Row | None:
        """A row that is reading a longer beginning of the same prompt than is known by now."""
        best, longest = None, max(shared, MIN_SHARED - 1)
        for other in self._active:
            if other is row or not other.is_reading or other.leader is not None:
                continue
            common = common_length(other.request.prompt, row.request.prompt)
            common = min(common, len(row.request.prompt) - 1)
            if common > longest:
                best, longest = other, common
        return best

    def _follow_leaders(self) -> None:
        """Copy what a row has waited for, once its leader has read the prompt or has gone."""
        for row in self._active:
            if row.leader is None or (row.leader in self._active and row.leader.is_reading):
                continue
            row.leader = None
            source, shared = self._best_source(row.request.prompt)
            if source is not None:
                self._copy(source, row, shared)

    def _copy(self, source: _Row, row: _Row, shared: int) -> None:
        self.decoder.copy(source.place, row.place, shared)
        row.known = source.known[:shared]

    # ---- one step -----------------------------------------------------------------------------

    def _chunks(self) -> tuple[list[Chunk], list[_Row]]:
        """What to feed: a token for each row that decodes, and prompts as far as a step allows."""
        chunks, rows, budget = [], [], self.prefill_tokens
        for row in self._active:
            if row.leader is not None:
                continue
            prompt, num_known = row.request.prompt, len(row.known)
            is_last = True
            if num_known < len(prompt):
                if budget == 0:
                    continue
                is_last = len(prompt) - num_known <= budget
                tokens = prompt[num_known : num_known + budget]
                budget -= len(tokens)
            else:
                tokens = row.request.tokens[num_known - len(prompt) :]
            chunks.append(Chunk(row.place, num_known, tokens, is_last))
            rows.append(row)
        return chunks, rows

    def _decide(self, requests: Sequence[Request], logits: Tensor) -> list[TokenEvent]:
        """Choose each request's next token from its logits (requests, V)."""
        settings = [request.settings for request in requests]
        # A penalty writes into the logits, but the reported ones are the model's own.
        is_asked = any(setting.logprobs is not None for setting in settings)
        own = logits.clone() if is_asked else logits
        uniforms = [request.uniform() for request in requests]
        seen = {
            i: {*requests[i].prompt, *requests[i].tokens}
            for i, setting in enumerate(settings)
            if setting.repetition_penalty != 1.0
        }
        with torch.inference_mode():
            tokens = self._choose(logits, settings, uniforms, seen)
        events = []
        for i, request in enumerate(requests):
            forced = request.forced
            token = tokens[i] if forced is None else forced
            logprob: float | None = None
            alternatives: tuple[tuple[int, float], ...] = ()
            if is_asked and (num_alternatives := settings[i].logprobs) is not None:
                logprob, alternatives = log_probabilities(own[i], token, num_alternatives)
            text = request.accept(token)
            events.append(
                TokenEvent(
                    request, token, forced is not None, text, logprob, alternatives, request.finish
                )
            )
        _look_for_nan(requests, logits)
        return events

    def _retire_finished(self) -> None:
        """Take finished requests off their rows, whose tokens stay known as long as they may."""
        for row in [row for row in self._active if row.request.is_finished]:
            self._active.remove(row)
            self._remembered.append(row)
            if len(row.known) < MIN_SHARED:
                self._forget(row)
        while len(self._remembered) > self.max_rows:
            self._forget(self._remembered[0])


def _look_for_nan(requests: Sequence[Request], logits: Tensor) -> None:
    """Note which requests have NaN in their logits (requests, V).

    NaN in a hidden state is in every logit of its token, so a single one tells, at each step.
    NaN in the head's weights is in the same logits of all tokens: those of the first and of the
    last token are looked at whole.
    """
    with torch.inference_mode():
        for request, logit in zip(requests, logits[:, 0].tolist(), strict=True):
            request.has_nan_logits |= math.isnan(logit)
        rows = [
            row
            for row, request in enumerate(requests)
            if len(request.tokens) <= 1 or request.finish is not None
        ]
        if not rows:
            return
        chosen = logits if len(rows) == len(requests) else logits[rows]
        found = chosen.sum(dim=-1).isnan().tolist()  # one pass, without a mask
    for row, has_nan in zip(rows, found, strict=True):
        requests[row].has_nan_logits |= has_nan


def answer_room(prompt: Sequence[int], context: int, max_tokens: int | None) -> int:
    """Most tokens of an answer to `prompt`; UserError when the context leaves no room."""
    if not prompt:
        raise UserError("the prompt has no tokens; begin it with <|bos|>")
    if max_tokens is not None and max_tokens < 0:
        raise UserError(f"max tokens is {max_tokens}; use a positive number")
    room = context - len(prompt)
    if room <= 0:
        raise UserError(
            f"the prompt has {len(prompt)} tokens, but the model's context is "
            f"{context} tokens and the answer needs some; shorten the prompt"
        )
    return room if max_tokens is None else min(room, max_tokens)


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two sequences share at their beginning."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def affordable_tokens(decoder: Decoder, max_rows: int) -> int:
    """Tokens that half of the free memory holds, but no more than all rows could use twice."""
    if decoder.device.type == "cuda":
        free = torch.cuda.mem_get_info(decoder.device)[0]
    else:
        free = psutil.virtual_memory().available
    affordable = int(free) // 2 // decoder.bytes_per_token
    # One context more: the plain decoder moves its rows within this memory.
    return max(min(affordable, (2 * max_rows + 1) * decoder.context), 1)
