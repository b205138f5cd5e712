"""The training kernels against the plain formulas in fp32, odd sizes included."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from nanochat import fused_native
from nanochat.attention import causal_attention
from nanochat.blocks import NORM_EPS, rms_norm, rotary_tables, rotate
from nanochat.gpt import GPT, GPTConfig, softcap
from nanochat.kernels import training
from nanochat.muon import NEWTON_SCHULZ, POLAR_EXPRESS, orthogonalize
from nanochat.objectives import next_token_loss_sum
from nanochat.presets import MODELS
from nanochat.scaling import model_config
from tests.kernel_checks import ROUNDING, assert_near, gradients, numbers

pytestmark = pytest.mark.skipif(
    training.load() is None, reason="no AMX and no AVX-512 BF16, or no kernels"
)


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"),
    [(1, 32, 1), (31, 64, 40), (129, 96, 256), (512, 256, 768), (1000, 288, 70)],
)
@pytest.mark.parametrize("relu2", [False, True])
def test_linear(rows: int, inputs: int, outputs: int, relu2: bool) -> None:
    x, weight = numbers(rows, inputs), numbers(outputs, inputs, seed=1, scale=inputs**-0.5)
    expected = x.float() @ weight.float().t()
    if relu2:
        expected = expected.relu().square()
    assert_near(training.linear(x, weight, relu2=relu2), expected, relative=ROUNDING)


@pytest.mark.parametrize(("rows", "inputs"), [(1, 16), (33, 70), (300, 256), (257, 1024)])
@pytest.mark.parametrize("outputs", [(32,), (64, 256), (256, 128, 128)])
def test_input_gradient(rows: int, inputs: int, outputs: tuple[int, ...]) -> None:
    gradients = [numbers(rows, n, seed=n) for n in outputs]
    weights = [numbers(n, inputs, seed=n + 1) for n in outputs]
    h = numbers(rows, inputs, seed=5).relu().square()
    pairs = zip(gradients, weights, strict=True)
    expected = sum((g.float() @ w.float() for g, w in pairs), torch.zeros(()))
    found = training.linear_input_gradient(gradients, weights)
    assert_near(found, expected, relative=ROUNDING)
    behind = training.linear_input_gradient(gradients, weights, h)
    assert_near(behind, expected * 2 * h.float().sqrt(), relative=ROUNDING)


@pytest.mark.parametrize("rows", [1, 31, 32, 1000, 1056])
@pytest.mark.parametrize(("outputs", "inputs"), [(16, 32), (70, 300), (256, 1024), (768, 256)])
def test_weight_gradient(rows: int, outputs: int, inputs: int) -> None:
    gradient, x = numbers(rows, outputs), numbers(rows, inputs, seed=1)
    expected = gradient.float().t() @ x.float()
    assert_near(training.linear_weight_gradient(gradient, x), expected, relative=ROUNDING)


@pytest.mark.parametrize("shape", [(1, 32), (3, 70, 256), (300, 1024)])
def test_rms_norm(shape: tuple[int, ...]) -> None:
    x, gradient = numbers(*shape, scale=3.0), numbers(*shape, seed=1)
    leaf = x.float().requires_grad_()
    expected = rms_norm(leaf)
    expected.backward(gradient.float())
    found, inverse = training.rms_norm(x, NORM_EPS)
    assert_near(found, expected, relative=ROUNDING)
    behind = training.rms_norm_gradient(gradient, found, inverse)
    assert leaf.grad is not None
    assert_near(behind, leaf.grad)


@pytest.mark.parametrize("shape", [(1, 1, 1, 64), (3, 50, 2, 128), (2, 300, 3, 64)])
def test_rotate_and_norm(shape: tuple[int, ...]) -> None:
    x, gradient = numbers(*shape), numbers(*shape, seed=1)
    cos, sin = rotary_tables(shape[1], shape[3], None, base=10_000)
    leaf = x.float().requires_grad_()
    expected = rms_norm(rotate(leaf, cos, sin))
    expected.backward(gradient.float())
    found, inverse = training.rotate_and_norm(x, cos, sin, NORM_EPS)
    assert_near(found, expected, relative=ROUNDING)
    behind = training.rotate_and_norm_gradient(gradient, found, inverse, cos, sin)
    assert leaf.grad is not None
    assert_near(behind, leaf.grad)


@pytest.mark.parametrize("length", [1, 32, 45, 300, 512])
@pytest.mark.parametrize(("heads", "size"), [(1, 32), (3, 128)])
@pytest.mark.parametrize("window", [None, 0, 40, 128])
def test_attention(length: int, heads: int, size: int, window: int | None) -> None:
    q, k, v = (numbers(2, length, heads, size, seed=i) for i in range(3))
    gradient = numbers(2, length, heads, size, seed=3)
    leaves = [x.float().requires_grad_() for x in (q, k, v)]
    expected = causal_attention(*leaves, window)
    expected.backward(gradient.float())
    out, lse = training.attention(q, k, v, window)
    assert_near(out, expected)
    found = training.attention_gradient(q, k, v, out, lse, gradient, window)
    for behind, leaf in zip(found, leaves, strict=True):
        assert leaf.grad is not None
        assert_near(behind, leaf.grad, relative=4 * ROUNDING)


def test_attention_never_sees_the_future() -> None:
    q, k, v = (numbers(1, 100, 1, 32, seed=i) for i in range(3))
    before, _ = training.attention(q, k, v, None)
    k[:, 60:], v[:, 60:] = 1e4, 1e30
    after, _ = training.attention(q, k, v, None)
    assert torch.equal(before[:, :60], after[:, :60])


@pytest.mark.parametrize(("rows", "width"), [(1, 32), (33, 64), (700, 256)])
@pytest.mark.parametrize(("vocabulary", "used"), [(40, 40), (320, 300), (1024, 1000)])
@pytest.mark.parametrize("weighted", [False, True])
def test_head_loss(rows: int, width: int, vocabulary: int, used: int, weighted: bool) -> None:
    hidden, weight = numbers(rows, width), numbers(vocabulary, width, seed=1, scale=0.3)
    generator = torch.Generator().manual_seed(2)
    targets = torch.randint(0, used, (rows,), generator=generator)
    factors = torch.randn(rows, generator=generator) if weighted else None
    leaves = [x.float().requires_grad_() for x in (hidden, weight)]
    logits = softcap((leaves[0] @ leaves[1].t())[:, :used], 15.0)
    losses = F.cross_entropy(logits, targets, reduction="none")
    expected = (losses * (1.0 if factors is None else factors)).sum()
    expected.backward()
    loss, *gradients = training.head_loss(
        hidden, weight, targets, factors, cap=15.0, vocab_size=used
    )
    assert abs(loss - float(expected.detach())) <= 1e-5 * float(losses.detach().abs().sum())
    for found, leaf in zip(gradients, leaves, strict=True):
        assert leaf.grad is not None
        assert_near(found, leaf.grad)


@pytest.mark.parametrize("spread", [1.0, 1.5, 2.0])
def test_head_loss_of_tokens_that_are_nearly_certain(spread: float) -> None:
    """Of a probability near 1 the difference from 1 must not be what rounding leaves."""
    weight, targets = numbers(512, 128), torch.arange(256)
    noise = numbers(256, 128, seed=1, scale=0.3).float()
    hidden = (spread * weight[targets].float() + noise).to(torch.bfloat16) * 0.15
    leaves = [x.float().requires_grad_() for x in (hidden, weight)]
    expected = F.cross_entropy(softcap(leaves[0] @ leaves[1].t(), 15.0), targets, reduction="sum")
    expected.backward()  # type: ignore[no-untyped-call]
    loss, *found = training.head_loss(hidden, weight, targets, None, cap=15.0, vocab_size=512)
    assert float(expected.detach()) / 256 < 0.1
    assert loss == pytest.approx(float(expected.detach()), rel=1e-3)
    for gradient, leaf in zip(found, leaves, strict=True):
        assert leaf.grad is not None
        assert_near(gradient, leaf.grad)


@pytest.mark.parametrize("coefficients", [NEWTON_SCHULZ, POLAR_EXPRESS])
@pytest.mark.parametrize("shape", [(1, 32, 32), (3, 32, 160), (2, 96, 96), (5, 64, 256)])
def test_newton_schulz(
    shape: tuple[int, int, int], coefficients: Sequence[tuple[float, float, float]]
) -> None:
    stack = numbers(*shape)
    stack /= stack.float().norm(dim=(1, 2), keepdim=True).mul(1.01).to(torch.bfloat16)
    expected, rounded = stack.float(), stack.clone()
    for a, b, c in coefficients:
        expected, rounded = (
            a * x + (b * (x @ x.mT) + c * (x @ x.mT) @ (x @ x.mT)) @ x for x in (expected, rounded)
        )
    found = training.newton_schulz_(stack, coefficients)
    assert found is stack
    # Rounding every product, as it is done without a kernel, is what it may differ by.
    error = (rounded.float() - expected).norm() / expected.norm()
    assert_near(found, expected, relative=1.5 * float(error))


@pytest.mark.parametrize("shape", [(64, 32), (48, 64), (32, 40)])
def test_matrices_that_newton_schulz_would_misread_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(training.kernels.KernelError, match=r"taller than wide|no multiple of 32"):
        training.newton_schulz_(numbers(2, *shape), NEWTON_SCHULZ)


@pytest.mark.parametrize("shape", [(4, 64, 96), (4, 96, 64), (4, 60, 64), (4, 64, 12)])
def test_muon_orthogonalises_alike_with_and_without_the_kernels(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int]
) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    before, seen = matrices.clone(), []
    kernel = training.newton_schulz_
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with monkeypatch.context() as patch:
        patch.setattr(
            training, "newton_schulz_", lambda *given: seen.append(given) or kernel(*given)
        )
        found = orthogonalize(matrices)
    assert len(seen) == all(size % 32 == 0 for size in shape[1:])
    with monkeypatch.context() as patch:
        patch.setattr(training, "load", lambda: None)
        expected = orthogonalize(matrices)
    assert found.shape == expected.shape == shape
    assert_near(found, expected, relative=0.03)
    assert torch.equal(matrices, before)


@pytest.mark.parametrize("where", ["hidden", "weight"])
def test_a_loss_of_what_is_not_a_number_is_none_either(where: str) -> None:
    operands = {"hidden": numbers(40, 64), "weight": numbers(300, 64, seed=1)}
    operands[where][7, 5] = torch.nan
    targets = torch.zeros(40, dtype=torch.int64)
    loss, dhidden, dweight = training.head_loss(
        operands["hidden"], operands["weight"], targets, None, cap=15.0, vocab_size=300
    )
    assert math.isnan(loss)
    assert dhidden[7].isnan().all()
    assert dweight.isnan().any()


def test_what_is_not_a_number_stays_visible_in_the_mlp_and_in_attention() -> None:
    x, weight = numbers(40, 64), numbers(70, 64, seed=1)
    x[7, 5] = torch.nan
    hidden = training.linear(x, weight, relu2=True)
    assert hidden.isnan().nonzero()[:, 0].unique().tolist() == [7]
    assert hidden[7].isnan().all()
    gradient = training.linear_input_gradient([numbers(40, 32)], [numbers(32, 70)], hidden)
    assert gradient.isnan().nonzero()[:, 0].unique().tolist() == [7]
    hidden = torch.full((1, 32), torch.inf, dtype=torch.bfloat16)
    weight = torch.eye(32, dtype=torch.bfloat16).abs() + 1
    gradient = training.linear_input_gradient([torch.ones_like(hidden)], [weight], hidden)
    assert gradient.isposinf().all()

    q, k, v = (numbers(1, 100, 1, 32, seed=i) for i in range(3))
    q[0, 60, 0, 5] = torch.nan
    out, lse = training.attention(q, k, v, None)
    assert out.isnan().nonzero()[:, 1].unique().tolist() == [60]
    dq, dk, dv = training.attention_gradient(q, k, v, out, lse, numbers(1, 100, 1, 32), None)
    assert dq[0, 60].isnan().all()
    for gradient in (dk, dv):  # of all that position 60 attends to
        assert gradient[0, :61].isnan().all()


def test_a_target_beyond_the_vocabulary_is_refused() -> None:
    hidden, weight = numbers(2, 32), numbers(40, 32)
    targets = torch.tensor([1, 40])
    with pytest.raises(training.kernels.KernelError, match="target 40 of a vocabulary of 40"):
        training.head_loss(hidden, weight, targets, None, cap=15.0, vocab_size=40)


def test_what_has_gaps_is_refused() -> None:
    with pytest.raises(training.kernels.KernelError, match="has gaps"):
        training.linear(numbers(64, 64).t()[:32], numbers(32, 64))


HEADS = numbers(1, 8, 2, 64)
TABLES = rotary_tables(8, 64, None)
FACTORS = torch.ones(1, 8, 2)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: training.linear(numbers(4, 64).float(), numbers(32, 64)),
        lambda: training.linear(numbers(4, 64), numbers(32, 96)),
        lambda: training.linear(numbers(4, 48), numbers(32, 48)),
        lambda: training.linear_input_gradient([numbers(4, 32)], [numbers(64, 32)]),
        lambda: training.linear_input_gradient(
            [numbers(4, 32), numbers(5, 32)], [numbers(32, 8), numbers(32, 8)]
        ),
        lambda: training.linear_input_gradient([numbers(4, 32)], [numbers(32, 8)], numbers(4, 9)),
        lambda: training.linear_weight_gradient(numbers(4, 32), numbers(5, 32)),
        lambda: training.rms_norm_gradient(numbers(4, 32), numbers(4, 32), torch.ones(3)),
        lambda: training.rms_norm_gradient(
            numbers(4, 32), numbers(4, 32), torch.ones(4, dtype=torch.bfloat16)
        ),
        lambda: training.rotate_and_norm(HEADS, *(t.bfloat16() for t in TABLES), NORM_EPS),
        lambda: training.rotate_and_norm(HEADS, *(t[:7] for t in TABLES), NORM_EPS),
        lambda: training.rotate_and_norm(HEADS[..., :32].clone(), *TABLES, NORM_EPS),
        lambda: training.rotate_and_norm_gradient(HEADS, HEADS, FACTORS[:, :7], *TABLES),
        lambda: training.attention(HEADS, HEADS[:, :7].clone(), HEADS, None),
        lambda: training.attention(HEADS, HEADS, HEADS[..., :32].clone(), None),
        lambda: training.head_loss(
            numbers(2, 32), numbers(9, 32), torch.ones(2).int(), None, cap=15.0, vocab_size=9
        ),
        lambda: training.head_loss(
            numbers(2, 32), numbers(9, 32), torch.ones(3).long(), None, cap=15.0, vocab_size=9
        ),
        lambda: training.head_loss(
            numbers(2, 32), numbers(9, 32), torch.ones(2).long(), None, cap=15.0, vocab_size=10
        ),
        lambda: training.head_loss(
            *(numbers(2, 32), numbers(9, 32), torch.ones(2).long(), torch.ones(2).double()),
            cap=15.0,
            vocab_size=9,
        ),
    ],
)
def test_what_a_kernel_would_misread_is_refused(wrong: Callable[[], Any]) -> None:
    with pytest.raises(training.kernels.KernelError, match=r"are needed on|no multiple|10 tokens"):
        wrong()


# ---- a whole model -------------------------------------------------------------------------------


@pytest.mark.parametrize("num_kv_heads", [2, 1])
@pytest.mark.parametrize("preset", MODELS)
def test_a_model_trains_alike_with_and_without_the_kernels(
    preset: Any, num_kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = model_config(
        3, vocab_size=301, sequence_len=128, model_dim=128, head_dim=64, preset=preset
    )
    config = dataclasses.replace(config, n_kv_head=num_kv_heads)
    called = set()
    plain_call = training._call

    def noted(name: str, *arguments: Any) -> None:
        called.add(name)
        plain_call(name, *arguments)

    monkeypatch.setattr(training, "_call", noted)
    loss, found = gradients(config, torch.bfloat16)
    assert {"nck_linear", "nck_attention_gradient", "nck_rotate_and_norm"} <= called
    assert ("nck_head_loss" in called) == bool(config.logit_softcap)
    exact_loss, exact = gradients(config, torch.float32)
    monkeypatch.setattr(training, "load", lambda: None)
    plain_loss, plain = gradients(config, torch.bfloat16)
    assert found.keys() == plain.keys() == exact.keys()
    assert abs(loss - exact_loss) <= 2 * abs(plain_loss - exact_loss) + 2e-3 * exact_loss
    # Rounding to bf16 on the way is what separates both from fp32; ours no more than theirs. The
    # gradients of scalars are sums over all that was rounded, near by luck alone.
    for name, expected in exact.items():
        if expected.numel() > 100:
            ours, theirs = ((x[name] - expected).norm() for x in (found, plain))
            assert ours <= 1.5 * theirs + 0.01 * expected.norm(), name


def test_the_same_bits_every_time() -> None:
    config = model_config(2, vocab_size=301, sequence_len=128, model_dim=128, head_dim=64)
    (_, first), (_, second) = (gradients(config, torch.bfloat16) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_model_that_was_cast_as_a_whole_trains_like_the_plain_path(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = model_config(2, vocab_size=301, sequence_len=128, model_dim=128, head_dim=64)
    tokens = torch.randint(0, 301, (2, 71), generator=torch.Generator().manual_seed(3))
    found = []
    for is_native in (True, False):
        if not is_native:
            monkeypatch.setattr(training, "load", lambda: None)
        model, generator = GPT(config), torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=parameter.size(-1) ** -0.5, generator=generator)
        model.to(torch.bfloat16)  # rotary tables, too
        loss = next_token_loss_sum(model.hidden(tokens), model.lm_head.weight, tokens.roll(-1, 1))
        loss.backward()  # type: ignore[no-untyped-call]
        queries: Any = model.transformer.h[0].attn
        found.append((float(loss.detach()), queries.c_q.weight.grad))
    (loss_here, ours), (loss_there, theirs) = found
    assert loss_here == pytest.approx(loss_there, rel=2e-3)
    assert_near(ours, theirs, relative=0.1)  # both are rounded on the way, each in its own places


def test_frozen_matrices_get_no_gradient_and_the_others_theirs() -> None:
    config = model_config(1, vocab_size=64, sequence_len=64, model_dim=64, head_dim=64)
    model, generator = GPT(config), torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    model.cast_matrices(torch.bfloat16)
    tokens = torch.arange(64)[None]

    def found() -> dict[str, Tensor | None]:
        model.zero_grad()
        loss = next_token_loss_sum(model.hidden(tokens), model.lm_head.weight, tokens)
        loss.backward()  # type: ignore[no-untyped-call]
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    whole = found()
    frozen = [f"transformer.h.0.{name}.weight" for name in ("attn.c_k", "mlp.c_fc", "mlp.c_proj")]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    for name, gradient in found().items():
        if name in frozen:
            assert gradient is None
        else:
            assert_close(gradient, whole[name], rtol=0, atol=0)


TWICE = "differentiate twice"


def layer(*, seed: int) -> torch.nn.Linear:
    made = torch.nn.Linear(64, 64, bias=False)
    made.weight = torch.nn.Parameter(numbers(64, 64, seed=seed))
    return made


@pytest.mark.parametrize(
    "function",
    [
        lambda x: fused_native.linears(x, [layer(seed=1)])[0],
        lambda x: fused_native.relu_squared_mlp(x, layer(seed=1), layer(seed=0)),
        lambda x: fused_native.rms_norm(x, NORM_EPS),
        lambda x: fused_native.rotate_and_norm(x.view(1, 8, 2, 64), *TABLES, NORM_EPS),
        lambda x: fused_native.causal_attention(*[x.view(1, 8, 2, 64)] * 3, None),
        lambda x: fused_native.head_loss_sum(
            x, numbers(64, 64, seed=1), torch.arange(16), None, 15.0, 64, False
        ),
    ],
)
def test_there_is_no_second_derivative_and_it_is_not_made_up(
    function: Callable[[Tensor], Tensor],
) -> None:
    x = numbers(16, 64).requires_grad_()
    out = function(x).float().square().sum()
    (gradient,) = torch.autograd.grad(out, x, create_graph=True)
    with pytest.raises(RuntimeError, match=TWICE):
        gradient.sum().backward()


@pytest.mark.parametrize("cap", [60.0, 61.0, 100.0])
def test_a_large_softcap_does_not_overflow(cap: float) -> None:
    hidden, weight = numbers(40, 64, scale=8.0), numbers(1000, 64, seed=1, scale=8.0)
    targets = torch.arange(40)
    leaves = [x.float().requires_grad_() for x in (hidden, weight)]
    logits = softcap(leaves[0] @ leaves[1].t(), cap)
    expected = F.cross_entropy(logits, targets, reduction="sum")
    expected.backward()  # type: ignore[no-untyped-call]
    ours = [x.clone().requires_grad_() for x in (hidden, weight)]
    loss = next_token_loss_sum(*ours, targets, cap=cap)
    loss.backward()  # type: ignore[no-untyped-call]
    # Logits of some tens: fp32 sums here, bf16 products on the plain path.
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-2)
    for mine, leaf in zip(ours, leaves, strict=True):
        assert leaf.grad is not None
        assert mine.grad is not None
        assert_near(mine.grad, leaf.grad, relative=0.05)


@pytest.mark.parametrize(
    ("sizes", "left"),
    [
        ({}, []),
        ({"logit_softcap": 0.0}, ["head"]),
        ({"logit_softcap": 80.0}, ["head"]),
        ({"mlp": "swiglu"}, []),
        ({"n_embd": 96, "n_head": 1}, ["rotations"]),
        ({"n_embd": 96, "n_head": 2}, ["attention", "rotations"]),
        ({"n_embd": 200, "n_head": 2}, ["matrices", "attention", "rotations", "head"]),
    ],
)
def test_what_the_kernels_leave_to_pytorch_is_known_beforehand(
    sizes: dict[str, Any], left: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"sequence_len": 64, "vocab_size": 70, "n_layer": 1, "n_embd": 128, "n_head": 2}
    config = GPTConfig(**small | sizes)
    assert fused_native.left_to_pytorch(config) == left
    called = set()
    plain_call = training._call

    def noted(name: str, *arguments: Any) -> None:
        called.add(name)
        plain_call(name, *arguments)

    monkeypatch.setattr(training, "_call", noted)
    gradients(config, torch.bfloat16)
    kernel = {
        "matrices": "nck_linear",
        "attention": "nck_attention",
        "rotations": "nck_rotate_and_norm",
        "head": "nck_head_loss",
    }
    assert {part for part, name in kernel.items() if name not in called} == set(left)
    is_trained = not {"matrices", "attention"} & set(left)
    assert fused_native.trains(config, torch.bfloat16) == is_trained
    assert not fused_native.trains(config, torch.float32)


@pytest.mark.parametrize(
    "register",
    [
        lambda layer, seen: layer.register_full_backward_hook(lambda *found: seen.append(1)),
        lambda layer, seen: layer.register_full_backward_pre_hook(lambda *found: seen.append(1)),
        lambda layer, seen: layer.register_forward_pre_hook(lambda *found: seen.append(1)),
    ],
)
@pytest.mark.parametrize("name", ["mlp.c_fc", "attn.c_k"])
def test_every_kind_of_hook_is_called(register: Callable[..., Any], name: str) -> None:
    config = model_config(1, vocab_size=64, sequence_len=64, model_dim=64, head_dim=64)
    model, seen = GPT(config), list[int]()
    model.cast_matrices(torch.bfloat16)
    register(model.transformer.h[0].get_submodule(name), seen)  # type: ignore[operator]
    model.hidden(torch.zeros(1, 64, dtype=torch.int64)).sum().backward()  # type: ignore[no-untyped-call]
    assert seen == [1]


def test_a_bias_is_added() -> None:
    config = model_config(1, vocab_size=64, sequence_len=64, model_dim=64, head_dim=64)
    model = GPT(config).cast_matrices(torch.bfloat16)
    mlp: Any = model.transformer.h[0].mlp
    mlp.c_proj.bias = torch.nn.Parameter(torch.full((64,), 3.0, dtype=torch.bfloat16))
    torch.nn.init.zeros_(mlp.c_proj.weight)
    out = mlp(numbers(1, 8, 64).requires_grad_())
    assert torch.equal(out, torch.full_like(out, 3.0))


def test_a_layer_with_a_hook_is_called_itself() -> None:
    config = model_config(1, vocab_size=64, sequence_len=64, model_dim=64, head_dim=64)
    model, seen = GPT(config), []
    model.cast_matrices(torch.bfloat16)
    hook = model.transformer.h[0].mlp.c_fc.register_forward_hook(  # type: ignore[union-attr]
        lambda module, inputs, output: seen.append(output.shape)
    )
    tokens = torch.zeros(1, 64, dtype=torch.int64)
    model.hidden(tokens)
    assert seen == [(1, 64, 256)]
    hook.remove()
