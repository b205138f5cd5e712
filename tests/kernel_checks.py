"""Numbers and comparisons for tests of the training kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from nanochat import fused_native, int8
from nanochat.gpt import GPT, GPTConfig
from nanochat.objectives import next_token_loss_sum
from nanochat.precision import MasterWeights

ROUNDING = 2**-8  # of a bf16 number, relative: what inputs, outputs and weights are rounded to


def numbers(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal numbers in bf16."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(torch.bfloat16)


def assert_near(found: Tensor, expected: Tensor, *, relative: float = 2 * ROUNDING) -> None:
    """Root mean square of the differences, beside that of what is expected."""
    assert found.shape == expected.shape
    assert torch.isfinite(found).all()
    error = (found.float() - expected.float()).square().mean().sqrt()
    assert error <= relative * expected.float().square().mean().sqrt() + 1e-7


def gradients(
    config: GPTConfig, dtype: torch.dtype, *, in_int8: bool = False
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of a model whose blocks have something to say, on odd rows."""
    model, generator = GPT(config), torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=parameter.size(-1) ** -0.5, generator=generator)
    if in_int8:
        int8.convert(model)
    weights = MasterWeights(model, dtype)
    tokens = torch.randint(0, config.vocab_size, (3, 71), generator=generator)
    targets = tokens.roll(-1, dims=1).masked_fill(tokens % 5 == 0, -1)
    loss = next_token_loss_sum(
        model.hidden(tokens),
        model.lm_head.weight,
        targets,
        cap=config.logit_softcap,
        vocab_size=config.vocab_size,
        int8=fused_native.in_int8(model.lm_head),
    )
    loss.backward()  # type: ignore[no-untyped-call]
    found = {name: p.grad for name, p in weights.named_parameters() if p.grad is not None}
    return float(loss.detach()), found
