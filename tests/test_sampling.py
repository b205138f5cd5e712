"""Sampling: settings, distributions, independence of rows."""

import pytest
import torch
from torch import Tensor

from nanochat.common import UserError
from nanochat.sampling import nucleus, sample, sample_at

NUM_DRAWS = 20_000
# Four standard deviations of a frequency near 1/2 estimated from NUM_DRAWS draws.
TOLERANCE = 0.015


def frequencies(logits: Tensor, **settings: float | None) -> Tensor:
    """How often each token of one row (V,) is drawn."""
    rows = logits.expand(NUM_DRAWS, -1)
    tokens = sample(rows, generator=torch.Generator().manual_seed(0), **settings)
    return torch.bincount(tokens.flatten(), minlength=logits.numel()) / NUM_DRAWS


def test_temperature_zero_takes_the_most_likely_token() -> None:
    logits = torch.randn(5, 33, generator=torch.Generator().manual_seed(1))
    assert torch.equal(sample(logits, temperature=0.0), logits.argmax(-1, keepdim=True))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature: float) -> None:
    logits = torch.tensor([2.0, 0.0, 1.0, -1.0, 1.5])
    expected = (logits / temperature).softmax(-1)
    observed = frequencies(logits, temperature=temperature)
    torch.testing.assert_close(observed, expected, rtol=0, atol=TOLERANCE)


def test_top_k_keeps_the_k_most_likely_in_proportion() -> None:
    logits = torch.tensor([2.0, 0.0, 1.0, -1.0, 1.5])
    expected = torch.zeros(5)
    expected[[0, 2, 4]] = logits[[0, 2, 4]].softmax(-1)
    torch.testing.assert_close(frequencies(logits, top_k=3), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("top_k", [None, 0, 5, 50])
def test_top_k_off_or_large_changes_nothing(top_k: int | None) -> None:
    logits = torch.tensor([2.0, 0.0, 1.0, -1.0, 1.5])
    torch.testing.assert_close(
        frequencies(logits, top_k=top_k), logits.softmax(-1), rtol=0, atol=TOLERANCE
    )


def test_top_p_keeps_the_fewest_tokens_that_reach_p() -> None:
    probabilities = torch.tensor([0.1, 0.4, 0.2, 0.3])
    expected = torch.tensor([0.0, 4 / 7, 0.0, 3 / 7])
    observed = frequencies(probabilities.log(), top_p=0.6)
    torch.testing.assert_close(observed, expected, rtol=0, atol=TOLERANCE)


def test_top_p_is_taken_after_top_k() -> None:
    probabilities = torch.tensor([0.1, 0.4, 0.2, 0.3])
    # Of the two left, 4/7 alone reaches 0.5.
    observed = frequencies(probabilities.log(), top_k=2, top_p=0.5)
    assert observed.tolist() == [0.0, 1.0, 0.0, 0.0]


def test_nucleus_always_keeps_the_first() -> None:
    probabilities = torch.tensor([[0.9, 0.1], [0.6, 0.4]])
    expected = torch.tensor([[0.9, 0.0], [0.6, 0.0]])
    assert torch.equal(nucleus(probabilities, 1e-6), expected)


def test_impossible_tokens_are_never_drawn_even_at_the_edges() -> None:
    logits = torch.tensor([[float("-inf"), 0.0, 0.0, float("-inf")]]).expand(2, -1)
    edges = torch.tensor([0.0, 1.0])
    assert sample_at(logits, edges).flatten().tolist() == [1, 2]


def test_a_row_does_not_depend_on_its_company() -> None:
    logits = torch.randn(16, 300, generator=torch.Generator().manual_seed(2))
    uniforms = torch.rand(16, generator=torch.Generator().manual_seed(3))
    together = sample_at(logits, uniforms, top_k=40, top_p=0.9)
    alone = [
        sample_at(logits[i : i + 1], uniforms[i : i + 1], top_k=40, top_p=0.9) for i in range(16)
    ]
    assert torch.equal(together, torch.cat(alone))


def test_very_low_temperatures_neither_overflow_nor_stray() -> None:
    logits = torch.tensor([[1e4, 1e4 - 1, 0.0]])
    tokens = sample(logits.expand(100, -1), temperature=1e-30)
    assert tokens.unique().tolist() == [0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_seed_draws_the_same_tokens(dtype: torch.dtype) -> None:
    logits = torch.randn(8, 100, generator=torch.Generator().manual_seed(4)).to(dtype)
    draws = [sample(logits, generator=torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(*draws)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_k": -1}, "top-k is -1"),
        ({"top_p": 0.0}, "top-p is 0.0"),
        ({"top_p": 1.5}, "top-p is 1.5"),
    ],
)
def test_meaningless_settings_are_refused_by_value(settings: dict, named: str) -> None:
    with pytest.raises(UserError, match=named):
        sample(torch.zeros(1, 4), **settings)
