"""Products in fp8: values, gradients, what is converted, and evaluation without them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nanochat import fp8
from nanochat.common import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.runtime import Runtime, World
from nanochat.training import Hook
from tests.tiny_run import make_trainer

SIZES = GPTConfig(sequence_len=32, vocab_size=50, n_layer=2, n_head=2, n_embd=128)


def small_model() -> GPT:
    model = GPT(SIZES)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return model


@pytest.mark.parametrize(("dtype", "error"), [(fp8.FORWARD, 2**-4), (fp8.GRADIENT, 2**-3)])
def test_a_quantised_tensor_is_within_half_a_step(dtype: torch.dtype, error: float) -> None:
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(1)) * 1e-3
    small, factor = fp8.quantize(x, dtype)
    assert small.dtype == dtype
    back = small.float() * factor
    assert back.abs().max() == pytest.approx(float(x.abs().max()), rel=1e-6)
    large = x.abs() > 0.01 * x.abs().max()
    assert ((back - x).abs() / x.abs())[large].max() <= error
    zero, factor = fp8.quantize(torch.zeros(3, 3), dtype)
    assert torch.isfinite(factor)
    assert zero.float().abs().max() == 0


@pytest.mark.parametrize("tokens", [48, 51])
def test_product_and_gradients_are_near_those_of_the_plain_one(
    tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a number of tokens that the kernel does not take (its inner size: 16, 32, ...)."""
    inner: list[int] = []
    quantize = fp8.quantize

    def noted(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        inner.append(x.size(1))
        return quantize(x, dtype)

    monkeypatch.setattr(fp8, "quantize", noted)
    generator = torch.Generator().manual_seed(2)
    plain = torch.nn.Linear(128, 160, bias=False)
    torch.nn.init.normal_(plain.weight, std=0.1, generator=generator)
    holder = torch.nn.Sequential(torch.nn.Linear(128, 160, bias=False))
    holder[0].weight.data.copy_(plain.weight.data)
    assert fp8.convert(holder) == 1
    x = torch.randn(1, tokens, 128, generator=generator)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [module(value) for module, value in zip((plain, holder), inputs, strict=True)]
    gradient = torch.randn(1, tokens, 160, generator=generator)
    for out in outputs:
        out.backward(gradient)
    assert len(inner) == 6
    assert all(size % 16 == 0 for size in inner)
    pairs = [outputs, [value.grad for value in inputs], [plain.weight.grad, holder[0].weight.grad]]
    for exact, rounded in pairs:
        assert exact.shape == rounded.shape
        difference = (exact - rounded).norm() / exact.norm()
        # Steps of 1/4 (2 bits of mantissa): 1/4 / sqrt(12) = 0.072 of numbers near 1, less near 2.
        assert 1e-3 < difference < 0.07


def test_only_large_matrices_are_converted_and_keep_their_names_and_weights() -> None:
    model = small_model()
    names, weights = list(model.state_dict()), model.transformer.h[0].attn.c_q.weight
    assert fp8.convert(model) == 2 * 6
    assert list(model.state_dict()) == names
    assert model.transformer.h[0].attn.c_q.weight is weights
    assert type(model.lm_head) is torch.nn.Linear
    odd = torch.nn.ModuleDict(
        {"a": torch.nn.Linear(64, 256, bias=False), "b": torch.nn.Linear(136, 136, bias=False)}
    )
    assert fp8.convert(odd) == 0


def test_paused_the_model_computes_as_if_never_converted() -> None:
    model, ids = small_model(), torch.arange(20)[None]
    with torch.no_grad():
        before = model(ids)
        fp8.convert(model)
        assert not torch.equal(model(ids), before)
        with fp8.paused(model):
            assert torch.equal(model(ids), before)
        assert not torch.equal(model(ids), before)


def test_a_cpu_is_refused() -> None:
    with pytest.raises(UserError, match="--fp8 needs an NVIDIA GPU"):
        fp8.check_device(torch.device("cpu"))


def test_training_runs_in_fp8_and_evaluates_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fp8, "check_device", lambda device: None)
    monkeypatch.setattr(fp8, "_LEAST_SIZE", 32)
    seen = []

    def look(trainer: object) -> dict[str, float]:
        seen.append(trainer.model.transformer.h[0].attn.c_q.is_on)
        return {}

    runtime = Runtime(torch.device("cpu"), torch.bfloat16, World(), 0)
    trainer = make_trainer(tmp_path, runtime, steps=3, hooks=[Hook("look", 1, look)], fp8=True)
    loss = trainer.run().smooth_loss
    assert seen == [False] * 4
    assert trainer.model.transformer.h[0].attn.c_q.is_on
    assert 0 < loss < 5
