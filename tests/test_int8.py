"""Products in 8-bit integers: the kernels against the formula, conversion, training, refusals."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nanochat import fused_native, int8, kernels
from nanochat.common import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.kernels import training
from nanochat.presets import MODELS
from nanochat.runtime import Runtime, World
from nanochat.scaling import model_config
from nanochat.stopping import StoppedError, StopRequest
from nanochat.training import Hook, Trainer
from tests import tiny_run
from tests.kernel_checks import ROUNDING, assert_near, gradients, numbers

needs_kernels = pytest.mark.skipif(
    training.load() is None, reason="no AMX and no AVX-512 BF16, or no kernels"
)
GROUP = 256  # rows of a weight gradient, and tokens of the head, that have scales of their own
PRODUCTS = (
    *("nck_linear", "nck_linear_input_gradient", "nck_linear_weight_gradient"),
    "nck_head_loss",
)
SIZES = GPTConfig(sequence_len=32, vocab_size=50, n_layer=2, n_head=2, n_embd=64)


def rounded(x: Tensor, dim: int, limit: int = 127) -> Tensor:
    """x in whole multiples of its largest number along `dim` over `limit`: fp32."""
    largest = x.float().abs().amax(dim, keepdim=True)
    # In the order of the kernels: bf16 numbers often lie half-way between two multiples.
    factor = torch.full_like(largest, limit) / largest  # a number / x is a number * (1 / x)
    return (x.float() * factor).round().nan_to_num() * (largest / limit)


def assert_each_near(found: Tensor, expected: Tensor) -> None:
    """`assert_near` of all rows, and of all columns, as if they were of one size."""
    for dim in (0, 1):
        size = expected.norm(dim=dim, keepdim=True).clamp_min(1e-30)
        assert_near(found / size, expected / size, relative=ROUNDING)


def uneven(rows: int, columns: int, *, seed: int, dim: int = 0) -> Tensor:
    """Rows (dim 0) or columns of very different size, one of them zero."""
    x = numbers(rows, columns, seed=seed).float().movedim(dim, 0)
    x *= torch.logspace(-3, 3, len(x))[:, None]
    x[len(x) // 2] = 0
    return x.movedim(0, dim).to(torch.bfloat16).contiguous()


@needs_kernels
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"),
    [(1, 32, 1), (31, 64, 40), (129, 96, 256), (512, 256, 768), (1000, 288, 70)],
)
def test_linear(rows: int, inputs: int, outputs: int) -> None:
    x, weight = uneven(rows, inputs, seed=0), uneven(outputs, inputs, seed=1)
    expected = rounded(x, 1) @ rounded(weight, 1).t()
    found = training.linear(x, weight, int8=True)
    assert_each_near(found, expected)
    squared = training.linear(x, weight, relu2=True, int8=True)
    assert_each_near(squared, expected.relu().square())


@needs_kernels
@pytest.mark.parametrize(("rows", "inputs"), [(1, 16), (33, 70), (300, 256), (257, 1024)])
@pytest.mark.parametrize("outputs", [(32,), (96, 256), (256, 128, 128)])
def test_input_gradient(rows: int, inputs: int, outputs: tuple[int, ...]) -> None:
    gradients = [uneven(rows, n, seed=n) for n in outputs]
    weights = [uneven(n, inputs, seed=n + 1, dim=1) for n in outputs]
    h = numbers(rows, inputs, seed=5).relu().square()
    expected = torch.zeros(rows, inputs)
    for gradient, weight in zip(gradients, weights, strict=True):
        expected += rounded(gradient, 1) @ rounded(weight, 0)
    found = training.linear_input_gradient(gradients, weights, int8=True)
    assert_each_near(found, expected)
    behind = training.linear_input_gradient(gradients, weights, h, int8=True)
    assert_each_near(behind, expected * 2 * h.float().sqrt())


@needs_kernels
@pytest.mark.parametrize("rows", [1, 31, 32, 300, 1056])
@pytest.mark.parametrize(("outputs", "inputs"), [(16, 32), (70, 300), (256, 1024), (768, 256)])
def test_weight_gradient(rows: int, outputs: int, inputs: int) -> None:
    gradient, x = uneven(rows, outputs, seed=0, dim=1), uneven(rows, inputs, seed=1, dim=1)
    gradient[rows // 2] *= 100
    parts = zip(gradient.split(GROUP), x.split(GROUP), strict=True)
    expected = torch.zeros(outputs, inputs)
    for dy, part in parts:
        expected += rounded(dy, 0).t() @ rounded(part, 0)
    assert_each_near(training.linear_weight_gradient(gradient, x, int8=True), expected)


@needs_kernels
@pytest.mark.parametrize(("rows", "width"), [(1, 32), (33, 96), (700, 256)])
@pytest.mark.parametrize(("vocabulary", "used"), [(40, 40), (320, 300), (1024, 1000)])
def test_head_loss(rows: int, width: int, vocabulary: int, used: int) -> None:
    hidden, weight = numbers(rows, width), numbers(vocabulary, width, seed=1, scale=0.3)
    generator = torch.Generator().manual_seed(2)
    targets = torch.randint(0, used, (rows,), generator=generator)
    factors = torch.rand(rows, 1, generator=generator)
    tanh = ((rounded(hidden, 1) @ rounded(weight, 1).t())[:, :used] / 15.0).tanh()
    powers, slopes = (15.0 * tanh).exp(), 1 - tanh.square()
    total = powers.sum(1, keepdim=True)
    losses = -(powers / total).gather(1, targets[:, None]).log() * factors
    pull = factors * slopes.gather(1, targets[:, None])

    groups = -(-vocabulary // GROUP)
    u = torch.zeros(rows, groups * GROUP)
    u[:, :used] = (powers * slopes).to(torch.bfloat16)
    padded = torch.zeros(groups * GROUP, width)
    padded[:vocabulary] = weight
    others = u.scatter(1, targets[:, None], 0.0)
    by_group = rounded(others.view(rows, groups, GROUP), 2, 255).view_as(u)
    weights = torch.cat([rounded(part, 0) for part in padded.split(GROUP)])
    missing = 1 - powers.gather(1, targets[:, None]) / total
    dhidden = factors / total * (by_group @ weights) - missing * pull * weight[targets].float()
    dweight = u.t() @ (factors / total * hidden.float())
    dweight.index_add_(0, targets, -pull * hidden.float())

    loss, *found = training.head_loss(
        hidden, weight, targets, factors[:, 0].clone(), cap=15.0, vocab_size=used, int8=True
    )
    assert loss == pytest.approx(float(losses.sum()), rel=1e-4)
    assert_near(found[0], dhidden)
    assert_near(found[1], dweight[:vocabulary])


@needs_kernels
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_a_number_stays_visible(bad: float) -> None:
    x, weight = numbers(40, 64), numbers(70, 64, seed=1)
    x[7, 5] = bad
    found = training.linear(x, weight, int8=True)
    assert (~found.isfinite()).nonzero()[:, 0].unique().tolist() == [7]
    assert not found[7].isfinite().any()
    gradient, weight = numbers(40, 32), numbers(32, 70)
    weight[3, 9] = bad
    found = training.linear_input_gradient([gradient], [weight], int8=True)
    assert (~found.isfinite()).nonzero()[:, 1].unique().tolist() == [9]
    found = training.linear_weight_gradient(gradient, x, int8=True)
    assert (~found.isfinite()).nonzero()[:, 1].unique().tolist() == [5]
    for hidden, head in ((x, numbers(90, 64)), (numbers(40, 64), x.repeat(3, 1))):
        loss, *_ = training.head_loss(
            hidden, head, torch.ones(40).long(), None, cap=15.0, vocab_size=90, int8=True
        )
        assert math.isnan(loss)


@needs_kernels
def test_sums_that_would_not_fit_are_refused() -> None:
    width = 2**16 + 32
    x = torch.ones(1, width, dtype=torch.bfloat16)
    with pytest.raises(training.kernels.KernelError, match="do not sum up in 32 bits"):
        training.linear(x, x, int8=True)
    largest = torch.ones(1, 2**16, dtype=torch.bfloat16)
    assert float(training.linear(largest, largest, int8=True)) == 2**16
    assert float(training.linear(largest, -largest, int8=True)) == -(2**16)


# ---- a model ------------------------------------------------------------------------------------


def test_all_matrices_are_converted_and_keep_their_names_and_weights() -> None:
    model = GPT(SIZES)
    names, weights = list(model.state_dict()), model.transformer.h[0].attn.c_q.weight
    assert int8.convert(model) == 2 * 6 + 1
    assert list(model.state_dict()) == names
    assert model.transformer.h[0].attn.c_q.weight is weights
    assert model.transformer.h[0].mlp.c_fc.out_features == 4 * 64
    assert fused_native.in_int8(model.lm_head)


def test_what_the_kernels_do_not_take_is_not_converted() -> None:
    gated = GPT(dataclasses.replace(SIZES, value_embeddings=True, logit_softcap=0.0))
    assert int8.convert(gated) == 2 * 6
    assert not fused_native.in_int8(gated.lm_head)
    assert type(gated.transformer.h[1].attn.ve_gate) is nn.Linear


@needs_kernels
@pytest.mark.parametrize("num_kv_heads", [2, 1])
@pytest.mark.parametrize("preset", MODELS)
def test_a_model_has_nearly_the_gradients_it_has_in_bf16(preset: Any, num_kv_heads: int) -> None:
    config = model_config(
        3, vocab_size=301, sequence_len=128, model_dim=128, head_dim=64, preset=preset
    )
    config = dataclasses.replace(config, n_kv_head=num_kv_heads)
    exact_loss, exact = gradients(config, torch.float32)
    _, in_bf16 = gradients(config, torch.bfloat16)
    loss, found = gradients(config, torch.bfloat16, in_int8=True)
    assert loss == pytest.approx(exact_loss, rel=0.01)
    assert found.keys() == exact.keys()
    for name, expected in exact.items():
        if expected.numel() > 100:
            ours, theirs = ((x[name] - expected).norm() for x in (found, in_bf16))
            assert ours <= 0.15 * expected.norm(), name
            assert ours > theirs or expected.norm() == 0, name
    _, again = gradients(config, torch.bfloat16, in_int8=True)
    assert all(torch.equal(found[name], again[name]) for name in found)


@pytest.fixture
def in_bf16(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    """A runtime in bf16, and a model that the kernels take."""
    monkeypatch.setattr(tiny_run, "SIZES", SIZES)
    return Runtime(torch.device("cpu"), torch.bfloat16, World(), 0)


@needs_kernels
def test_training_multiplies_in_int8_and_evaluates_without(
    tmp_path: Path, in_bf16: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[tuple[str, bool]] = []
    plain_call = training._call

    def noted(name: str, *arguments: Any) -> None:
        flag = arguments[9] if name == "nck_head_loss" else arguments[-1]
        called.append((name, bool(flag)))
        plain_call(name, *arguments)

    def look(trainer: Trainer) -> dict[str, float]:
        before = len(called)
        with torch.no_grad():
            trainer.model(torch.arange(32)[None])
        assert len(called) == before
        return {}

    monkeypatch.setattr(training, "_call", noted)
    losses = []
    for is_int8 in (True, False):
        hooks = [Hook("look", 1, look)]
        trainer = tiny_run.make_trainer(
            tmp_path / str(is_int8), in_bf16, steps=3, hooks=hooks, int8=is_int8
        )
        called.clear()
        losses.append(trainer.run().smooth_loss)
        products = {(name, flag) for name, flag in called if name in PRODUCTS}
        assert products == {(name, is_int8) for name in PRODUCTS}
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
    assert losses[0] != losses[1]


@needs_kernels
def test_a_resumed_run_ends_in_the_same_bits(tmp_path: Path, in_bf16: Runtime) -> None:
    whole = tiny_run.make_trainer(tmp_path / "whole", in_bf16, int8=True)
    whole.run()
    request = StopRequest()

    def ask(trainer: Trainer) -> dict[str, float]:
        if trainer.state.step == 3:
            request.received.append(15)
        return {}

    part = tiny_run.make_trainer(
        tmp_path / "cut", in_bf16, int8=True, hooks=[Hook("ask", 1, ask)], stop=request
    )
    with pytest.raises(StoppedError):
        part.run()
    rest = tiny_run.go_on(tmp_path / "cut", in_bf16, int8=True)
    assert 0 < rest.state.step < 6
    rest.run()
    for name, weight in whole.weights.state_dict().items():
        assert torch.equal(weight, rest.weights.state_dict()[name]), name


@needs_kernels
@pytest.mark.parametrize(
    ("changes", "device", "dtype", "lacking"),
    [
        ({}, "cuda", torch.bfloat16, "a CPU, not cuda"),
        ({}, "cpu", torch.float32, "bf16 training, not float32"),
        ({"n_embd": 40}, "cpu", torch.bfloat16, "and these are 40, 160 and 20"),
        ({"n_head": 4}, "cpu", torch.bfloat16, "and these are 64, 256 and 16"),
    ],
)
def test_what_cannot_train_in_int8_is_refused(
    changes: dict[str, int], device: str, dtype: torch.dtype, lacking: str
) -> None:
    sizes = dataclasses.replace(SIZES, **changes)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=f"--int8 needs .*{lacking}; leave it out here"):
        int8.check_possible(sizes, torch.device(device), dtype)


def test_a_machine_is_told_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime(torch.device("cpu"), torch.bfloat16, World(), 0)
    monkeypatch.setattr(training, "load", lambda: None)
    for library, lacking in (
        (object(), "a CPU with AMX or AVX-512 BF16"),
        (None, "the compiled kernels, which are not built here"),
    ):
        monkeypatch.setattr(kernels, "load", lambda library=library: library)
        with pytest.raises(UserError, match=f"--int8 needs {lacking}"):
            tiny_run.make_trainer(tmp_path, runtime, steps=1, int8=True)
