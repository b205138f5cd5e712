"""From logits to the next token: penalty, temperature, top-k, top-p, min-p. Pure tensors.

Legend: B = sequences, V = vocabulary, K = candidates left after top-k.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanochat.common import UserError

MAX_STOP_STRINGS = 16  # each is compared with the text of every token
MAX_LOGPROBS = 20  # as many alternatives as the common API offers


@dataclass(frozen=True)
class SamplingSettings:
    """How one answer is written. UserError names a value that means nothing."""

    temperature: float = 1.0
    """0 = always the likeliest token."""
    top_k: int | None = None
    """Only the k likeliest tokens; None or 0 = all."""
    top_p: float | None = None
    """Only the fewest tokens that reach this probability together; None = all."""
    min_p: float | None = None
    """Only tokens at least this likely, as a share of the likeliest; None = all."""
    repetition_penalty: float = 1.0
    """Logits of tokens that occurred are divided by it where positive, else multiplied; 1 = off."""
    max_tokens: int | None = None
    """Longest answer; None = to the end of the context."""
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these texts."""
    ignore_end: bool = False
    """Whether a terminal token is one like any other, so that every answer has max_tokens."""
    seed: int = 42
    logprobs: int | None = None
    """None = not reported; k = of the chosen token and of the k likeliest ones."""

    def __post_init__(self) -> None:
        check_settings(self.temperature, self.top_k, self.top_p)
        if self.min_p is not None and not 0.0 <= self.min_p <= 1.0:
            raise UserError(f"min-p is {self.min_p}; use a number from 0 (off) to 1")
        # CTRL, arXiv:1909.05858, section 4.1, divides by a number around 1.2.
        if not 0.0 < self.repetition_penalty < float("inf"):
            raise UserError(
                f"repetition penalty is {self.repetition_penalty}; use a positive number (1 is off)"
            )
        if self.max_tokens is not None and self.max_tokens < 1:
            raise UserError(f"max tokens is {self.max_tokens}; use a positive number")
        if len(self.stop) > MAX_STOP_STRINGS or not all(self.stop):
            raise UserError(
                f"stop has {len(self.stop)} strings, {self.stop.count('')} of them empty; "
                f"use at most {MAX_STOP_STRINGS}, none empty"
            )
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise UserError(f"logprobs is {self.logprobs}; use a number from 0 to {MAX_LOGPROBS}")

    @functools.cached_property
    def numbers(self) -> tuple[float, float, float, float]:
        """Temperature, top-k (0 = all), top-p (1 = off), min-p (0 = off)."""
        top_p = 1.0 if self.top_p is None else self.top_p
        return self.temperature, float(self.top_k or 0), top_p, self.min_p or 0.0


def check_settings(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Refuse settings that mean nothing. top_k 0 or None and top_p None are off."""
    if not 0.0 <= temperature < float("inf"):
        raise UserError(f"temperature is {temperature}; use 0 (greedy) or a positive number")
    if top_k is not None and top_k < 0:
        raise UserError(f"top-k is {top_k}; use a positive number, or 0 for off")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise UserError(f"top-p is {top_p}; use a number above 0 and at most 1 (1 is off)")


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token for each row of logits (B, V): (B, 1) int64.

    Temperature 0 takes the most likely token and needs no generator.
    """
    uniforms = None
    if temperature > 0:
        uniforms = torch.rand(logits.size(0), generator=generator).to(logits.device)
    return sample_at(logits, uniforms, temperature=temperature, top_k=top_k, top_p=top_p)


def sample_at(
    logits: Tensor,
    uniforms: Tensor | None,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Tensor:
    """The token of each row at which the cumulative probability passes the row's uniform number.

    logits: (B, V); uniforms: (B,) in [0, 1), None only at temperature 0. Returns (B, 1) int64.
    A row's token depends on its own logits and number alone, so that a seeded sequence comes out
    the same in any company (`torch.multinomial` draws for the whole batch at once).
    """
    check_settings(temperature, top_k, top_p)
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    assert uniforms is not None
    candidates, tokens = _most_likely(logits, top_k, ordered=top_p is not None)
    # Shifted first: a very low temperature must not overflow.
    shifted = candidates.float() - candidates.float().amax(dim=-1, keepdim=True)
    probabilities = (shifted / temperature).softmax(dim=-1)
    if top_p is not None:
        probabilities = nucleus(probabilities, top_p)
    if min_p:
        floor = min_p * probabilities.amax(dim=-1, keepdim=True)
        probabilities = probabilities * (probabilities >= floor)
    choice = _invert(probabilities.cumsum(dim=-1), uniforms)
    return choice if tokens is None else tokens.gather(-1, choice)


def choose(
    logits: Tensor,
    settings: Sequence[SamplingSettings],
    uniforms: Sequence[float],
    seen: Mapping[int, Collection[int]],
) -> list[int]:
    """The next token of each row of logits (B, V), by its own settings and uniform number.

    seen: the tokens that occurred, of each row with a penalty.
    """
    apply_penalties(logits, settings, seen)
    groups: dict[tuple[float, int | None, float | None, float | None], list[int]] = {}
    for row, setting in enumerate(settings):
        key = (setting.temperature, setting.top_k, setting.top_p, setting.min_p)
        groups.setdefault(key, []).append(row)
    tokens = [0] * len(settings)
    for (temperature, top_k, top_p, min_p), rows in groups.items():
        chosen = sample_at(
            logits if len(groups) == 1 else logits[rows],
            torch.tensor([uniforms[row] for row in rows], device=logits.device),
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
        )
        for row, token in zip(rows, chosen.squeeze(1).tolist(), strict=True):
            tokens[row] = token
    return tokens


def apply_penalties(
    logits: Tensor, settings: Sequence[SamplingSettings], seen: Mapping[int, Collection[int]]
) -> None:
    """Lower the logits (B, V), in place, of the tokens that each row with a penalty has seen."""
    for row, occurred in seen.items():
        logits[row] = penalized(logits[row], occurred, settings[row].repetition_penalty)


def penalized(logits: Tensor, seen: Collection[int], penalty: float) -> Tensor:
    """Logits (V,) with those of `seen` tokens made less likely (arXiv:1909.05858, section 4.1)."""
    tokens = torch.tensor(sorted(seen), dtype=torch.int64, device=logits.device)
    values = logits[tokens]
    lowered = torch.where(values > 0, values / penalty, values * penalty)
    return logits.index_copy(0, tokens, lowered)


def log_probabilities(
    logits: Tensor, token: int, num_alternatives: int
) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Log-probability of `token` by the model itself, and the likeliest tokens with theirs.

    logits: (V,), before temperature, penalty and cuts.
    """
    logprobs = logits.float().log_softmax(dim=-1)
    alternatives: tuple[tuple[int, float], ...] = ()
    if num_alternatives:
        values, tokens = logprobs.topk(min(num_alternatives, logprobs.numel()))
        alternatives = tuple(zip(tokens.tolist(), values.tolist(), strict=True))
    return float(logprobs[token]), alternatives


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Zero all but the fewest leading candidates that reach top_p (arXiv:1904.09751, section 3.1).

    probabilities: (B, K), each row in descending order. The first candidate always stays.
    Returns (B, K), not renormalised.
    """
    mass_before = probabilities.cumsum(dim=-1) - probabilities
    kept = mass_before < top_p
    kept[:, 0] = True
    return probabilities * kept


def _most_likely(
    logits: Tensor, top_k: int | None, *, ordered: bool
) -> tuple[Tensor, Tensor | None]:
    """Logits (B, K) of the candidates and their tokens (B, K); None when the tokens are 0..V-1."""
    if top_k and top_k < logits.size(-1):
        values, tokens = logits.topk(top_k, dim=-1)
        return values, tokens
    if ordered:
        values, tokens = logits.sort(dim=-1, descending=True)
        return values, tokens
    return logits, None


def _invert(cumulative: Tensor, uniforms: Tensor) -> Tensor:
    """First index whose cumulative mass exceeds uniform x total: (B, K), (B,) -> (B, 1) int64."""
    total = cumulative[:, -1:].contiguous()
    found = torch.searchsorted(cumulative, uniforms.unsqueeze(-1) * total, right=True)
    # Rounding may lift the product to the total itself; the last candidate with mass is meant then.
    last = torch.searchsorted(cumulative, total, right=False)
    return torch.minimum(found, last)
