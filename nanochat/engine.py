"""Generation with a key-value cache: prefill once, decode many rows a step, call the calculator.

Legend: B = rows of a batch, T = positions of the longest prompt, V = vocabulary.

A row ends with <|assistant_end|> or <|bos|>, at its token limit, or where the model's context
ends. Between <|python_start|> and <|python_end|> a row writes an expression; when the calculator
knows its value, the row is made to continue with <|output_start|> value <|output_end|>, whatever
it samples. Rows do not notice each other: each has its own length, random numbers and tool call.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanochat.answers import ControlIds, plain_text
from nanochat.attention import KVCache
from nanochat.common import UserError
from nanochat.gpt import GPT, softcap
from nanochat.sampling import check_settings, sample_at
from nanochat.tokenizer import Tokenizer
from nanochat.tools import calculate

# Tokens/s of one CPU core at depth 4, 128 new tokens: 1 row 218, 16 rows 1,226, 64 rows 2,052,
# 128 rows 2,148 (2026-11-21). More rows than 64 cost memory and gain nothing.
MAX_ROWS = 64

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


@dataclass(frozen=True)
class _Sampling:
    """Settings shared by the rows of one call."""

    temperature: float
    top_k: int | None
    top_p: float | None

    def __post_init__(self) -> None:
        check_settings(self.temperature, self.top_k, self.top_p)


class _Row:
    """One answer in the making.

    `tokens` grows by one a step; `mask` is 1 where the model chose the token and 0 where the
    tool forced it.
    """

    def __init__(
        self, tokenizer: Tokenizer, special: ControlIds, *, seed: str, max_tokens: int
    ) -> None:
        self.tokens: list[int] = []
        self.mask: list[int] = []
        self.is_finished = max_tokens == 0
        self._tokenizer, self._special = tokenizer, special
        self._max_tokens = max_tokens
        self._random = random.Random(seed)
        self._forced: deque[int] = deque()
        self._expression: list[int] | None = None

    def uniform(self) -> float:
        """The row's next random number in [0, 1)."""
        return self._random.random()

    def accept(self, sampled: int) -> None:
        """Take the sampled token, or the forced one whose turn it is. No-op once finished."""
        if self.is_finished:
            return
        is_forced = bool(self._forced)
        token = self._forced.popleft() if is_forced else sampled
        self.tokens.append(token)
        self.mask.append(0 if is_forced else 1)
        if token == self._special.python_start:
            self._expression = []
        elif token == self._special.python_end:
            self._call_tool()
        elif self._expression is not None:
            self._expression.append(token)
        ended = token in self._special.terminal
        self.is_finished = ended or len(self.tokens) == self._max_tokens

    @property
    def answer_length(self) -> int:
        """Number of tokens without the terminal one."""
        ended = bool(self.tokens) and self.tokens[-1] in self._special.terminal
        return len(self.tokens) - ended

    def _call_tool(self) -> None:
        expression, self._expression = self._expression, None
        result = calculate(self._tokenizer.decode(expression)) if expression else None
        if result is not None:
            self._forced.append(self._special.output_start)
            self._forced.extend(self._tokenizer.encode(result))
            self._forced.append(self._special.output_end)


class Engine:
    """Answers prompts with a model. Keeps no state between calls."""

    def __init__(self, model: GPT, tokenizer: Tokenizer) -> None:
        """The model stays where it is, in the dtype it has."""
        self.model, self.tokenizer = model, tokenizer
        self._special = ControlIds.of(tokenizer)

    @property
    def context(self) -> int:
        """Tokens of prompt and answer together that the model was trained to see."""
        return self.model.config.sequence_len

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
        sampling = _Sampling(temperature, top_k, top_p)
        limit = self._token_limit(tokens, max_tokens)
        if num_samples < 1:
            raise UserError(f"{num_samples} samples asked for; ask for at least 1")
        rows = [self._row(f"{seed}/{sample}", limit) for sample in range(num_samples)]
        return self._columns(tokens, rows, limit, sampling)

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
        sampling = _Sampling(temperature, top_k, top_p)
        limit = self._token_limit(tokens, max_tokens)
        rows = [self._row(f"{seed}/{sample}", limit) for sample in range(num_samples)]
        for _ in self._columns(tokens, rows, limit, sampling):
            pass
        sequences = [[*tokens, *row.tokens[: row.answer_length]] for row in rows]
        masks = [[0] * len(tokens) + row.mask[: row.answer_length] for row in rows]
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
    ) -> list[list[int]]:
        """Answer many different prompts, up to `batch_size` of them a step.

        Returns each prompt's answer, in order, without prompt and terminal token. Prompt i is
        answered as `generate(prompt, seed=seeds[i])` would; without `seeds`, as seed + i.
        """
        sampling = _Sampling(temperature, top_k, top_p)
        row_seeds = [seed + i for i in range(len(prompts))] if seeds is None else seeds
        rows = [
            self._row(f"{row_seed}/0", self._token_limit(prompt, max_tokens))
            for prompt, row_seed in zip(prompts, row_seeds, strict=True)
        ]
        # Neighbours in length share a batch, so that little of it is padding.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = [rows[i] for i in chosen]
            cache, logits = self._prefill([prompts[i] for i in chosen], max_tokens)
            for _ in self._decode(batch, cache, logits, sampling):
                pass
        return [row.tokens[: row.answer_length] for row in rows]

    def _row(self, seed: str, max_tokens: int) -> _Row:
        return _Row(self.tokenizer, self._special, seed=seed, max_tokens=max_tokens)

    def _token_limit(self, prompt: Sequence[int], max_tokens: int | None) -> int:
        """Tokens that may be generated after `prompt`; UserError when it leaves no room."""
        if not prompt:
            raise UserError("the prompt has no tokens; begin it with <|bos|>")
        if max_tokens is not None and max_tokens < 0:
            raise UserError(f"max tokens is {max_tokens}; use a positive number")
        room = self.context - len(prompt)
        if room <= 0:
            raise UserError(
                f"the prompt has {len(prompt)} tokens, but the model's context is "
                f"{self.context} tokens and the answer needs some; shorten the prompt"
            )
        return room if max_tokens is None else min(room, max_tokens)

    def _columns(
        self, prompt: Sequence[int], rows: list[_Row], limit: int, sampling: _Sampling
    ) -> Iterator[tuple[list[int], list[int]]]:
        """Decode `rows`, all of one prompt, which is read once and then copied."""
        if limit == 0:
            return
        cache, logits = self._prefill([prompt], limit)
        with torch.inference_mode():
            copies = torch.zeros(len(rows), dtype=torch.int64, device=self.model.device)
            cache, logits = cache.select(copies), logits[copies]
        for step, _ in enumerate(self._decode(rows, cache, logits, sampling)):
            masks = [row.mask[step] if step < len(row.mask) else 0 for row in rows]
            yield [row.tokens[-1] for row in rows], masks

    def _decode(
        self, rows: list[_Row], cache: KVCache, logits: Tensor, sampling: _Sampling
    ) -> Iterator[None]:
        """Advance all rows token by token until each is finished; logits (B, V) of the next one.

        Finished rows stay in the batch until half of it is finished: then the rest moves to a
        smaller cache, which in all costs less than the rows moved have already earned.
        """
        while not all(row.is_finished for row in rows):
            for row, token in zip(rows, self._sample(rows, logits, sampling), strict=True):
                row.accept(token)
            yield
            unfinished = [i for i, row in enumerate(rows) if not row.is_finished]
            if not unfinished:
                return
            if 2 * len(unfinished) <= len(rows):
                rows = [rows[i] for i in unfinished]
                cache = self._kept(cache, unfinished)
            logits = self._step(cache, [row.tokens[-1] for row in rows])

    @torch.inference_mode()
    def _prefill(
        self, prompts: Sequence[Sequence[int]], max_tokens: int | None
    ) -> tuple[KVCache, Tensor]:
        """Read the prompts, padded on the right: a cache that has room, and logits (B, V)."""
        lengths = [len(prompt) for prompt in prompts]
        longest = max(lengths)
        # The cache counts from the longest prompt, and a short one may still have all its room.
        room = self.context - min(lengths)
        limit = room if max_tokens is None else min(room, max_tokens)
        padding = self.tokenizer.bos_id
        ids = torch.tensor(
            [[*prompt, *[padding] * (longest - len(prompt))] for prompt in prompts],
            device=self.model.device,
        )
        cache = self.model.new_cache(len(prompts), longest + limit)
        hidden = self.model.hidden(ids, cache)
        ends = torch.tensor(lengths, device=self.model.device)
        cache.set_lengths(ends)
        last = hidden[torch.arange(len(prompts), device=self.model.device), ends - 1]
        return cache, softcap(self.model.lm_head(last))

    @torch.inference_mode()
    def _step(self, cache: KVCache, tokens: list[int]) -> Tensor:
        """Logits (B, V) after one more token in each row."""
        ids = torch.tensor(tokens, device=self.model.device).unsqueeze(1)
        hidden = self.model.hidden(ids, cache)[:, 0]
        return softcap(self.model.lm_head(hidden))

    @torch.inference_mode()
    def _kept(self, cache: KVCache, rows: list[int]) -> KVCache:
        kept = cache.select(torch.tensor(rows, device=self.model.device))
        # The longest row may have gone.
        kept.set_lengths(kept.lengths.clone())
        return kept

    @torch.inference_mode()
    def _sample(self, rows: list[_Row], logits: Tensor, sampling: _Sampling) -> list[int]:
        uniforms = None
        if sampling.temperature > 0:
            numbers = [row.uniform() for row in rows]
            uniforms = torch.tensor(numbers, dtype=torch.float32, device=logits.device)
        tokens = sample_at(
            logits,
            uniforms,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
        )
        chosen: list[int] = tokens.squeeze(1).tolist()
        return chosen


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
