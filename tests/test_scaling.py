"""Sizes, batches and horizons from the documented tables."""

from __future__ import annotations

import pytest

from nanochat.common import UserError
from nanochat.scaling import gradient_accumulation, model_config, training_horizon


@pytest.mark.parametrize(
    ("depth", "width", "heads"),
    [(4, 256, 2), (6, 384, 3), (12, 768, 6), (20, 1280, 10), (26, 1664, 13), (32, 2048, 16)],
)
def test_width_and_heads_follow_from_depth(depth: int, width: int, heads: int) -> None:
    config = model_config(depth, vocab_size=65_536, sequence_len=2048)
    assert (config.n_embd, config.n_head, config.num_kv_heads) == (width, heads, heads)


def test_width_can_be_given_outright() -> None:
    config = model_config(4, vocab_size=100, sequence_len=64, model_dim=192, head_dim=64)
    assert (config.n_embd, config.n_head) == (192, 3)


def test_depth_without_layers_is_refused() -> None:
    with pytest.raises(UserError, match="--depth is 0"):
        model_config(0, vocab_size=100, sequence_len=64)


def test_batch_is_split_into_whole_passes() -> None:
    assert gradient_accumulation(524_288, 32, 2048, 8) == 1
    assert gradient_accumulation(524_288, 8, 2048, 4) == 8


def test_indivisible_batch_is_refused_with_a_valid_one() -> None:
    with pytest.raises(UserError, match=r"1,024 tokens .* 2,048 .* --total-batch-size=2048"):
        gradient_accumulation(1024, 1, 2048, 1)


@pytest.mark.parametrize(
    ("iterations", "flops", "ratio", "expected"),
    [(50, 1e30, 20.0, 50), (-1, 2e12, 20.0, 20), (-1, -1.0, 20.0, 21_400)],
)
def test_horizon_precedence_is_steps_then_flops_then_ratio(
    iterations: int, flops: float, ratio: float, expected: int
) -> None:
    steps = training_horizon(
        num_iterations=iterations,
        target_flops=flops,
        target_param_data_ratio=ratio,
        num_parameters=560_988_160,
        flops_per_token=1e5 if flops == 2e12 else 3.5e9,
        total_batch_size=1_000_000 if flops == 2e12 else 524_288,
    )
    assert steps == expected


def test_horizon_of_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="no training horizon"):
        training_horizon(
            num_iterations=-1,
            target_flops=-1,
            target_param_data_ratio=0,
            num_parameters=10,
            flops_per_token=60.0,
            total_batch_size=8,
        )
