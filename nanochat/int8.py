"""Matrix products in 8-bit integers, for CPUs, which multiply them twice as fast as bf16.

Operands are rounded to multiples of a scale: what a layer computes, and the gradient of its input,
with one for each row and each output, as in SwitchBack (arXiv:2304.13013); the gradient of its
weights with one for each row and column of every 256 tokens, whose sums are added in fp32 (scales
of blocks are those of Jetfire, arXiv:2403.12422). What the head's weights get, attention and all
that has no matrix stay in bf16. The products are those of the training kernels
(`kernels.training`); evaluations run without.
"""

from __future__ import annotations

import torch
from torch import nn

from nanochat import fused_native
from nanochat.common import UserError
from nanochat.gpt_config import GPTConfig
from nanochat.kernels import training


def check_possible(config: GPTConfig, device: torch.device, dtype: torch.dtype) -> None:
    """UserError unless this model can train in this dtype through the kernels."""
    if device.type != "cpu" or not fused_native.trains(config, dtype):
        raise UserError(
            "--int8 needs bf16 training on a CPU with AMX or AVX-512 BF16 (Intel since Sapphire "
            "Rapids, AMD since Zen 4), the compiled kernels, and a model whose widths are "
            "multiples of 32; leave it out here"
        )


def convert(model: nn.Module) -> int:
    """Let the model's matrices multiply in 8 bits while training, in place; returns how many."""
    chosen = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and all(n % training.WIDTH == 0 for n in child.weight.shape)
    ]
    for parent, name, child in chosen:
        converted = fused_native.Int8Linear(1, 1, bias=False, device="meta")
        converted.in_features, converted.out_features = child.in_features, child.out_features
        converted.weight = child.weight
        setattr(parent, name, converted)
    return len(chosen)
