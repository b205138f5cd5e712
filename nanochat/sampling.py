"""From logits to the next token: temperature, top-k, top-p. Pure tensors.

Legend: B = sequences, V = vocabulary, K = candidates left after top-k.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanochat.common import UserError


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
    choice = _invert(probabilities.cumsum(dim=-1), uniforms)
    return choice if tokens is None else tokens.gather(-1, choice)


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
