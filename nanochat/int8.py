"""Matrix products in 8-bit integers, for CPUs, which multiply them twice as fast as bf16.

Operands are rounded to multiples of a scale: for what a layer computes, and the gradient of its
input, with one for each row and each output, as in SwitchBack (arXiv:2304.13013); for the gradient
of its weights with one for each row and column of every 256 tokens, whose sums are added in fp32
(scales of blocks, as in Jetfire, arXiv:2403.12422). Of the head these are the logits and the
gradient of hidden states, the latter by groups of 256 tokens of the vocabulary; its weights'
gradient, attention and all that has no matrix stay in bf16. Rounding is to nearest, so of a group
of probabilities those below a 510th of the largest are lost, which pushes down unlikely tokens a
little less. The products are those of the training kernels (`kernels.training`); evaluations run
without.
"""

from __future__ import annotations

import torch

from nanochat import fused_native, kernels
from nanochat.common import UserError
from nanochat.gpt import GPT
from nanochat.gpt_config import GPTConfig
from nanochat.kernels import training
from nanochat.precision import convert_linears


def lacking_kernels() -> str | None:
    """What a machine lacks to train in 8 bits, if anything: "--int8 needs ..."."""
    if kernels.load() is None:
        return (
            "--int8 needs the compiled kernels, which are not built here (install Rust 1.89 or "
            "later and reinstall, nanochat/kernels/README.md), or leave it out"
        )
    if training.load() is None:
        return (
            "--int8 needs a CPU with AMX or AVX-512 BF16 (Intel since Sapphire Rapids, AMD since "
            "Zen 4); leave it out here"
        )
    return None


def check_possible(config: GPTConfig, device: torch.device, dtype: torch.dtype) -> None:
    """UserError unless this model can train in this dtype through the kernels."""
    if device.type != "cpu":
        lacking = f"a CPU, not {device.type}"
    elif (missing := lacking_kernels()) is not None:
        raise UserError(missing)
    elif dtype != torch.bfloat16:
        lacking = f"bf16 training, not {str(dtype).removeprefix('torch.')}"
    elif not fused_native.trains(config, dtype):
        lacking = (
            "a width, an MLP and heads of multiples of 32, and these are "
            f"{config.n_embd}, {config.mlp_width} and {config.head_dim}"
        )
    else:
        return
    raise UserError(f"--int8 needs {lacking}; leave it out here")


def convert(model: GPT) -> int:
    """Let the model's matrices multiply in 8 bits while training, in place; returns how many."""
    takes_head = "head" not in fused_native.left_to_pytorch(model.config)
    return convert_linears(
        model,
        fused_native.Int8Linear,
        lambda name, linear: takes_head if name == "lm_head" else _fits(linear.weight.shape),
    )


def _fits(shape: torch.Size) -> bool:
    return all(size % training.WIDTH == 0 for size in shape)
