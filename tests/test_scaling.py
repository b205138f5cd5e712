"""Sizes, batches and horizons from the documented tables."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from nanochat import configurator
from nanochat.common import UserError
from nanochat.gpt import GPT
from nanochat.scaling import (
    Automatic,
    automatic,
    gradient_accumulation,
    model_config,
    scaling_parameters,
    training_horizon,
)
from scripts import base_train


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


@pytest.mark.parametrize(
    ("depths", "exponent"),
    [((8,), 18), ((10, 12, 14, 16), 19), ((18, 20, 22, 24, 26), 20), ((32, 40, 50), 21)],
)
def test_the_best_batch_grows_with_depth_as_documented(
    depths: tuple[int, ...], exponent: int
) -> None:
    reference = modern_parameters(12)
    assert reference == 110_100_912
    for depth in depths:
        chosen = automatic(modern_parameters(depth), reference)
        assert chosen.total_batch_size == 2**exponent
        assert chosen.learning_rates == pytest.approx(2 ** ((exponent - 19) / 2))
        tokens = modern_parameters(depth) / reference
        assert chosen.weight_decay == pytest.approx(chosen.learning_rates / tokens)


def test_a_batch_given_outright_scales_the_rates_alone() -> None:
    chosen = automatic(100, 400, 8192)
    assert chosen == Automatic(8192, learning_rates=0.125, weight_decay=0.5)
    assert automatic(400, 400) == Automatic(2**19, learning_rates=1.0, weight_decay=1.0)


def modern_parameters(depth: int) -> int:
    sizes = model_config(depth, vocab_size=32_768, sequence_len=2048, preset="modern")
    with torch.device("meta"):
        return scaling_parameters(GPT(sizes).count_parameters())


def settled(*flags: str, depth: int = 4) -> base_train.Config:
    """What base_train makes of its flags, at vocabulary 8,192 and 512 tokens of context."""
    config = configurator.parse(
        base_train.Config, [f"--depth={depth}", "--max_seq_len=512", *flags]
    )
    with torch.device("meta"):
        return base_train.settle(config, GPT(base_train.sizes_at(config, depth, 8192)))


def test_presets_without_flags_keep_their_documented_settings() -> None:
    classic, modern = settled(), settled("--preset=modern", depth=12)
    assert settled("--preset=portable") == dataclasses.replace(classic, preset="portable")
    assert (classic.optimizer, classic.total_batch_size) == ("classic", 524_288)
    assert (classic.embedding_lr, classic.unembedding_lr, classic.matrix_lr) == (0.2, 0.004, 0.02)
    assert (classic.grad_clip, classic.warmdown_ratio, classic.final_lr_frac) == (1.0, 0.2, 0.0)
    assert classic.target_param_data_ratio == 20.0
    assert (modern.optimizer, modern.total_batch_size) == ("modern", 2**19)
    assert (modern.embedding_lr, modern.unembedding_lr, modern.matrix_lr) == (0.3, 0.008, 0.02)
    assert (modern.scalar_lr, modern.weight_decay, modern.grad_clip) == (0.5, 0.28, 0.0)
    assert (modern.warmup_steps, modern.warmdown_ratio, modern.final_lr_frac) == (40, 0.65, 0.05)
    assert modern.target_param_data_ratio == 12.0


def test_flags_come_before_what_the_preset_would_choose() -> None:
    config = settled("--preset=modern", "--total_batch_size=8192", "--matrix_lr=0.02")
    assert (config.total_batch_size, config.matrix_lr) == (8192, 0.02)
    assert config.embedding_lr == pytest.approx(0.3 * 0.125)
    assert settled("--preset=modern", "--weight_decay=0").weight_decay == 0.0
    assert settled("--preset=modern", "--warmup_ratio=0.1").schedule(200).warmup_steps == 20
    both = settled("--preset=modern", "--warmup_ratio=0.1", "--warmup_steps=7")
    assert both.schedule(200).warmup_steps == 7
    assert settled("--preset=modern", "--optimizer=classic").embedding_lr == 0.2
    assert settled("--total_batch_size=-1", depth=20).total_batch_size == 2**20
    with pytest.raises(UserError, match="--total-batch-size is 0; use at least 1, or -1"):
        settled("--total_batch_size=0")


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
