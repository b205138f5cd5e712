"""AdamW and Muon against independent references, alone and sharded over ranks."""

from __future__ import annotations

import math

import pytest
import torch

from nanochat import muon as muon_module
from nanochat.adamw import AdamW, AdamWSettings
from nanochat.common import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.muon import Muon, MuonSettings, orthogonalize
from nanochat.optimizers import OptimizerConfig, build_optimizer, settings_by_name
from nanochat.runtime import World
from nanochat.scaling import model_config
from nanochat.schedule import Schedule
from tests.distributed import run_ranks

# Odd sizes on purpose: 7 rows and 5 matrices are not divisible by 2 ranks.
SHAPES = {
    "transformer.wte.weight": (7, 6),
    "lm_head.weight": (8, 6),
    "transformer.h.0.attn.c_q.weight": (6, 6),
    "transformer.h.0.attn.c_k.weight": (6, 6),
    "transformer.h.0.attn.c_proj.weight": (6, 6),
    "transformer.h.1.attn.c_q.weight": (6, 6),
    "transformer.h.1.attn.c_proj.weight": (6, 6),
    "transformer.h.0.mlp.c_fc.weight": (12, 6),
    "transformer.h.0.mlp.c_proj.weight": (6, 12),
}
STEPS = 4


def parameters(shapes=SHAPES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (name, torch.nn.Parameter(torch.randn(shape, generator=generator)))
        for name, shape in shapes.items()
    ]


def gradients(step, shapes=SHAPES):
    generator = torch.Generator().manual_seed(1000 + step)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def optimizer_of(named, world=None, **options):
    config = OptimizerConfig(weight_decay=0.1, matrix_weight_decay=0.2, **options)
    return build_optimizer(named, config, model_dim=6, world=world or World())


def take_steps(optimizer, named, steps, *, world=None, **options):
    """Steps whose gradients over all ranks sum up to 16 x `gradients`; returns the norms."""
    world = world or World()
    # Shares and scale are powers of two: the sum over ranks is exact in any order.
    share = {1: [16.0], 2: [4.0, 12.0]}[world.size][world.rank]
    norms = []
    for step in steps:
        for name, parameter in named:
            parameter.grad = gradients(step)[name] * share
        settings = {"lr_multiplier": 0.5, "muon_momentum": 0.9, "grad_clip": 0.0} | options
        norms.append(optimizer.step(grad_scale=1 / 16, **settings))
        optimizer.zero_grad()
    return norms


# ---- AdamW ------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_adamw_equals_torch_optim_adamw(weight_decay):
    shapes = {"a": (5, 3), "b": (4,), "c": ()}
    ours, theirs = parameters(shapes), parameters(shapes)
    settings = AdamWSettings(learning_rate=0.02, weight_decay=weight_decay)
    adamw = AdamW(ours, settings, world=World())
    reference = torch.optim.AdamW(
        [parameter for _, parameter in theirs],
        lr=0.02 * 0.7,
        betas=(0.8, 0.95),
        eps=1e-10,
        weight_decay=weight_decay,
        foreach=False,
        fused=False,
    )
    for step in range(1, 8):
        for (name, mine), (_, other) in zip(ours, theirs, strict=True):
            other.grad = gradients(step, shapes)[name]
            mine.grad = other.grad * 32
        adamw.reduce()
        adamw.squared_norm()
        adamw.update(scale=torch.tensor(1 / 32), lr_multiplier=0.7, step=step)
        adamw.finish()
        reference.step()
    for (_, mine), (_, other) in zip(ours, theirs, strict=True):
        # fp32 rounding of a few operations in another order
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)


def test_adamw_first_step_by_hand():
    # After bias correction the first step is lr * g / (|g| + eps), whatever the betas.
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    parameter.grad = torch.tensor([0.5, -4.0])
    adamw = AdamW([("p", parameter)], AdamWSettings(0.1, weight_decay=0.5), world=World())
    adamw.reduce()
    assert adamw.squared_norm() == 16.25
    adamw.update(scale=torch.tensor(1.0), lr_multiplier=1.0, step=1)
    adamw.finish()
    expected = torch.tensor([1.0, -2.0]) * (1 - 0.1 * 0.5) - 0.1 * torch.tensor([1.0, -1.0])
    torch.testing.assert_close(parameter.detach(), expected, rtol=0, atol=1e-6)


# ---- Muon -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 64, 64), (2, 96, 32), (2, 33, 129), (1, 5, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonalised_singular_values_lie_in_the_known_band(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(shape, generator=generator)
    result = orthogonalize(matrices, dtype=dtype).float()
    values = torch.linalg.svdvals(result)
    spread = torch.linalg.svdvals(matrices)
    # Inputs below about 1/100 of the norm do not arrive within 5 iterations; a square Gaussian
    # matrix has a few of them.
    arrives = spread > 0.02 * torch.linalg.vector_norm(spread, dim=-1, keepdim=True)
    assert arrives.any()
    assert values.max() < 1.25
    assert values[arrives].min() > 0.6


@pytest.mark.parametrize("shape", [(2, 24, 24), (2, 48, 16), (2, 16, 48)])
def test_orthogonalise_acts_on_singular_values_alone(shape):
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(shape, generator=generator, dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    values = values / torch.linalg.vector_norm(values, dim=-1, keepdim=True)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    expected = left @ torch.diag_embed(values) @ right
    result = orthogonalize(matrices, dtype=torch.float64)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)  # 1e-7 guards the norm


def test_orthogonalise_leaves_zero_and_scale_alone():
    zero = torch.zeros(2, 4, 6)
    assert torch.equal(orthogonalize(zero, dtype=torch.float32), zero)
    matrices = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        orthogonalize(matrices * 2.0**10, dtype=torch.float32),
        orthogonalize(matrices, dtype=torch.float32),
        rtol=0,
        atol=1e-5,
    )


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_muon_equals_torch_optim_muon_but_for_the_scale_of_its_momentum(weight_decay):
    # torch accumulates mu * buf + g, the seed lerp(buf, g, 1 - mu) = (1 - mu) times that; the
    # Nesterov mixtures differ by the same factor, which the normalisation removes.
    shapes = {name: shape for name, shape in SHAPES.items() if ".h." in name}
    ours, theirs = parameters(shapes), parameters(shapes)
    settings = MuonSettings(0.02, weight_decay=weight_decay, dtype=torch.bfloat16)
    muon = Muon(ours, settings, world=World())
    reference = torch.optim.Muon(
        [parameter for _, parameter in theirs], lr=0.02, weight_decay=weight_decay, momentum=0.95
    )
    for step in range(STEPS):
        for (name, mine), (_, other) in zip(ours, theirs, strict=True):
            other.grad = gradients(step, shapes)[name]
            mine.grad = other.grad.clone()
        muon.reduce()
        muon.squared_norm()
        muon.update(scale=torch.tensor(1.0), lr_multiplier=1.0, momentum=0.95)
        muon.finish()
        reference.step()
    for (name, mine), (_, other) in zip(ours, theirs, strict=True):
        # bf16 rounding at different places: 2^-8 of steps of 0.02, amplified 3.4-fold a few times
        assert_close_named(name, mine, other, atol=STEPS * 0.02 * 0.03)


def assert_close_named(name, first, second, *, atol):
    torch.testing.assert_close(
        first, second, rtol=0, atol=atol, msg=lambda message: f"{name}: {message}"
    )


def test_muon_step_is_momentum_nesterov_and_shape_factor():
    parameter = torch.nn.Parameter(torch.zeros(12, 3))
    muon = Muon([("p", parameter)], MuonSettings(0.1, dtype=torch.float32), world=World())
    buffer, expected = torch.zeros(12, 3), torch.zeros(12, 3)
    for step in range(STEPS):
        gradient = torch.randn(12, 3, generator=torch.Generator().manual_seed(step))
        buffer = 0.9 * buffer + 0.1 * gradient * 0.5
        nesterov = 0.1 * gradient * 0.5 + 0.9 * buffer
        direction = orthogonalize(nesterov[None], dtype=torch.float32)[0]
        expected -= 0.1 * 0.25 * math.sqrt(12 / 3) * direction
        parameter.grad = gradient
        muon.reduce()
        muon.squared_norm()
        muon.update(scale=torch.tensor(0.5), lr_multiplier=0.25, momentum=0.9)
        muon.finish()
    torch.testing.assert_close(parameter.detach(), expected, rtol=0, atol=1e-6)


# ---- groups -----------------------------------------------------------------------------------


def test_every_parameter_of_a_model_has_exactly_one_state():
    model = GPT(GPTConfig(sequence_len=8, vocab_size=32, n_layer=2, n_head=2, n_embd=16))
    named = list(model.named_parameters())
    optimizer = build_optimizer(named, OptimizerConfig(), model_dim=16, world=World())
    state = optimizer.state_dict()
    adamw = {"transformer.wte.weight", "lm_head.weight"}
    expected = {"step"}
    expected |= {f"{name}.{key}" for name in adamw for key in ("exp_avg", "exp_avg_sq")}
    expected |= {f"{name}.momentum" for name, _ in named if name not in adamw}
    assert set(state) == expected
    assert all(tensor.dtype == torch.float32 for name, tensor in state.items() if name != "step")


def test_learning_rates_of_adamw_follow_width_and_those_of_muon_do_not():
    moved = {}
    for dim in (192, 768):
        named = parameters()
        before = {name: parameter.detach().clone() for name, parameter in named}
        optimizer = build_optimizer(named, OptimizerConfig(), model_dim=dim, world=World())
        take_steps(optimizer, named, [0], lr_multiplier=1.0)
        moved[dim] = {n: (p.detach() - before[n]).abs().max().item() for n, p in named}
    # The first AdamW step moves by its learning rate.
    assert moved[768]["transformer.wte.weight"] == pytest.approx(0.2, rel=1e-4)
    assert moved[768]["lm_head.weight"] == pytest.approx(0.004, rel=1e-3)
    assert moved[192]["transformer.wte.weight"] == pytest.approx(0.4, rel=1e-4)
    assert moved[192]["lm_head.weight"] == pytest.approx(0.008, rel=1e-3)
    name = "transformer.h.0.mlp.c_fc.weight"
    assert moved[192][name] == moved[768][name]


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ([("transformer.stranger", torch.nn.Parameter(torch.zeros(2)))], "belongs to 0 optimizer"),
        ([("lm_head.weight", torch.nn.Parameter(torch.zeros(2, 2).bfloat16()))], "float32"),
        ([("transformer.h.0.bias.weight", torch.nn.Parameter(torch.zeros(2)))], "takes matrices"),
        ([("lm_head.weight", p := torch.nn.Parameter(torch.zeros(2, 2))), ("x", p)], "twice"),
    ],
)
def test_parameters_that_fit_no_group_are_refused(named, message):
    with pytest.raises(ValueError, match=message):
        build_optimizer(named, OptimizerConfig(), model_dim=2, world=World())


def test_a_parameter_without_gradient_is_named():
    named = parameters()
    optimizer = optimizer_of(named)
    with pytest.raises(ValueError, match=r"transformer\.wte\.weight has no gradient"):
        optimizer.step(grad_scale=1.0, lr_multiplier=1.0, muon_momentum=0.9)


# ---- norm and clipping ------------------------------------------------------------------------


def test_returned_norm_is_that_of_the_scaled_gradient_of_all_parameters():
    named = parameters()
    (norm,) = take_steps(optimizer_of(named), named, [0])
    flat = torch.cat([gradient.flatten() for gradient in gradients(0).values()])
    assert norm.ndim == 0
    torch.testing.assert_close(norm, flat.norm())


def test_clipping_equals_a_smaller_scale_and_spares_small_gradients():
    flat = torch.cat([gradient.flatten() for gradient in gradients(0).values()])
    results = []
    for clip, share in ((float(flat.norm()) / 4, 1.0), (0.0, 0.25), (1e9, 0.25)):
        named = parameters()
        optimizer = optimizer_of(named)
        for name, parameter in named:
            parameter.grad = gradients(0)[name] * share
        optimizer.step(grad_scale=1.0, lr_multiplier=1.0, muon_momentum=0.9, grad_clip=clip)
        results.append(optimizer.state_dict())
    for name, clipped in results[0].items():
        torch.testing.assert_close(clipped, results[1][name], rtol=1e-5, atol=1e-7)
        assert torch.equal(results[1][name], results[2][name])


# ---- state and ranks --------------------------------------------------------------------------


def test_restored_state_continues_bit_for_bit():
    straight = parameters()
    take_steps(optimizer_of(straight), straight, range(STEPS))
    named = parameters()
    first = optimizer_of(named)
    take_steps(first, named, range(2))
    saved = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    second = optimizer_of(named)
    second.load_state_dict(saved)
    take_steps(second, named, range(2, STEPS))
    for (name, mine), (_, other) in zip(named, straight, strict=True):
        assert torch.equal(mine, other), name


def test_state_of_another_model_is_refused():
    named = parameters()
    optimizer = optimizer_of(named)
    state = optimizer.state_dict()
    wrong_width = state | {"lm_head.weight.exp_avg": torch.zeros(8, 5)}
    with pytest.raises(UserError, match=r"lm_head\.weight\.exp_avg.*\(8, 5\)"):
        optimizer.load_state_dict(wrong_width)
    del state["lm_head.weight.exp_avg"]
    with pytest.raises(UserError, match=r"lacks 'lm_head\.weight\.exp_avg'"):
        optimizer.load_state_dict(state)


def train_on_rank(found, state, values, steps, is_refined=False):
    """Continue from whole tensors; returns weights, this rank's state and the norms."""
    # Muon as in the run of one process: fp32, or bf16 rounding would hide everything else.
    named = parameters()
    with torch.no_grad():
        for name, parameter in named:
            parameter.copy_(values.get(name, parameter))
    optimizer = optimizer_of(named, found.world, is_refined=is_refined)
    if state is not None:
        optimizer.load_state_dict(state)
    norms = take_steps(optimizer, named, steps, world=found.world, grad_clip=2.0)
    weights = {name: parameter.detach().clone() for name, parameter in named}
    return weights, optimizer.state_dict(), norms


def whole(shards):
    """What checkpoint_manager puts together from the ranks' files."""
    names = dict.fromkeys(name for shard in shards for name in shard)
    parts = {name: [shard[name] for shard in shards if name in shard] for name in names}
    return {n: p[0] if p[0].ndim == 0 else torch.cat(p) for n, p in parts.items()}


@pytest.fixture
def fp32_muon(monkeypatch):
    monkeypatch.setattr("nanochat.runtime._cpu_flags", frozenset)


@pytest.mark.parametrize("refined", [False, True])
def test_two_ranks_equal_one_process_and_state_goes_from_two_to_one_and_back(fp32_muon, refined):
    named = parameters()
    straight = optimizer_of(named, is_refined=refined)
    norms = take_steps(straight, named, range(3 * STEPS), grad_clip=2.0)

    first = run_ranks(train_on_two_without_bf16, 2, None, {}, range(STEPS), refined)
    weights = first[0][0]
    assert all(torch.equal(weights[name], first[1][0][name]) for name in weights)
    alone = parameters()
    with torch.no_grad():
        for name, parameter in alone:
            parameter.copy_(weights[name])
    one = optimizer_of(alone, is_refined=refined)
    one.load_state_dict(whole([shard for _, shard, _ in first]))
    take_steps(one, alone, range(STEPS, 2 * STEPS), grad_clip=2.0)
    last = run_ranks(
        train_on_two_without_bf16,
        2,
        {name: tensor.clone() for name, tensor in one.state_dict().items()},
        {name: parameter.detach() for name, parameter in alone},
        range(2 * STEPS, 3 * STEPS),
        refined,
    )

    for name, parameter in named:
        assert_close_named(
            name, last[0][0][name], parameter.detach(), atol=1e-5 if refined else 1e-6
        )
        assert torch.equal(last[0][0][name], last[1][0][name])
    final = whole([shard for _, shard, _ in last])
    assert final.keys() == straight.state_dict().keys()
    for name, tensor in straight.state_dict().items():
        assert_close_named(name, final[name], tensor, atol=1e-5 if refined else 1e-6)
    torch.testing.assert_close(torch.stack(first[1][2]), torch.stack(norms[:STEPS]))


def train_on_two_without_bf16(found, *arguments):
    # A rank is a process of its own, where the fixture's patch does not reach.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nanochat.runtime._cpu_flags", frozenset)
        return train_on_rank(found, *arguments)


def test_each_rank_keeps_only_its_share_of_the_state():
    shards = [optimizer_of(parameters(), World(rank, 2, rank)).state_dict() for rank in range(2)]
    assert [len(shard["transformer.wte.weight.exp_avg"]) for shard in shards] == [4, 3]
    matrices = [{name for name in shard if name.endswith(".momentum")} for shard in shards]
    assert not matrices[0] & matrices[1]
    assert {name.removesuffix(".momentum") for name in matrices[0] | matrices[1]} == {
        name for name in SHAPES if ".h." in name
    }


# ---- refined ----------------------------------------------------------------------------------


def refined_reference(weights, gradients, *, steps, lr, momentum, decay, beta2=0.9):
    """One matrix, step by step, in fp64, as the papers write it."""
    p, buffer = weights.double(), torch.zeros_like(weights, dtype=torch.float64)
    rows, columns = p.shape
    variance = torch.zeros(rows if rows >= columns else columns, dtype=torch.float64)
    for step in range(steps):
        g = gradients[step].double()
        buffer = momentum * buffer + (1 - momentum) * g
        g = (1 - momentum) * g + momentum * buffer
        lengths = g.norm(dim=1)
        g = g * (lengths.square().mean().sqrt() / lengths)[:, None]
        u, s, vh = torch.linalg.svd(g / (g.norm() * 1.01 + 1e-6), full_matrices=False)
        for a, b, c in muon_module.POLAR_EXPRESS:
            s = a * s + b * s**3 + c * s**5
        g = u @ torch.diag(s) @ vh
        g = g * (min(rows, columns) ** 0.5 / g.norm())
        means = g.square().mean(dim=1 if rows >= columns else 0)
        variance = beta2 * variance + (1 - beta2) * means
        factor = variance.rsqrt()
        even = g * (factor[:, None] if rows >= columns else factor[None, :])
        g = even * (g.norm() / even.norm())
        change = lr * max(1.0, rows / columns) ** 0.5
        shrinks = (g * p >= 0).double()
        p = p - change * (g + decay * p * shrinks)
    return p


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (8, 8)])
def test_refined_muon_equals_the_papers_written_down(shape):
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(2, *shape, generator=generator)
    moves = [torch.randn(2, *shape, generator=generator) for _ in range(4)]
    named = [(f"p{i}", torch.nn.Parameter(start[i].clone())) for i in range(2)]
    settings = MuonSettings(0.1, weight_decay=0.4, dtype=torch.float32, is_refined=True)
    muon = Muon(named, settings, world=World())
    for gradients_now in moves:
        for index, (_, parameter) in enumerate(named):
            parameter.grad = gradients_now[index].clone()
        muon.reduce()
        muon.squared_norm()
        muon.update(scale=torch.tensor(1.0), lr_multiplier=0.5, momentum=0.9, decay_multiplier=0.75)
        muon.finish()
    for index, (_, parameter) in enumerate(named):
        expected = refined_reference(
            start[index],
            [step[index] for step in moves],
            steps=4,
            lr=0.05,
            momentum=0.9,
            decay=0.3,
        )
        torch.testing.assert_close(parameter.detach().double(), expected, rtol=0, atol=2e-5)


def test_polar_express_brings_singular_values_nearer_to_one_than_newton_schulz():
    matrices = torch.randn(4, 48, 64, generator=torch.Generator().manual_seed(0))
    worst = []
    for coefficients in (muon_module.POLAR_EXPRESS, muon_module.NEWTON_SCHULZ):
        result = orthogonalize(matrices, coefficients=coefficients, dtype=torch.float32)
        worst.append(float((torch.linalg.svdvals(result) - 1).abs().max()))
    assert worst[0] < 0.5 * worst[1]


def test_weights_that_the_update_would_grow_do_not_decay():
    update, weights = torch.tensor([1.0, 1.0]), torch.tensor([2.0, -2.0])
    moved = muon_module.with_cautious_decay(update, weights, 0.5)
    assert moved.tolist() == [2.0, 1.0]


def test_groups_of_the_modern_model_have_their_documented_settings():
    sizes = model_config(4, vocab_size=100, sequence_len=64, model_dim=192, preset="modern")
    names = [name for name, _ in GPT(sizes).named_parameters()]
    config = OptimizerConfig(
        embedding_lr=0.3,
        unembedding_lr=0.008,
        scalar_lr=0.5,
        matrix_weight_decay=0.28,
        is_refined=True,
    )
    chosen = settings_by_name(names, config, model_dim=192, device=torch.device("cpu"))
    found = {
        name: (s.learning_rate, s.beta1, s.beta2, s.weight_decay)
        for name, s in chosen.items()
        if isinstance(s, AdamWSettings)
    }
    assert found == {
        "transformer.wte.weight": (0.6, 0.8, 0.995, 0.001),
        "lm_head.weight": (0.016, 0.8, 0.96, 0.01),
        "value_embeds.1.weight": (0.3, 0.8, 0.995, 0.01),
        "value_embeds.3.weight": (0.3, 0.8, 0.995, 0.01),
        "resid_lambdas": (0.005, 0.8, 0.95, 0.05),
        "x0_lambdas": (0.5, 0.96, 0.95, 0.0),
        "smear_gate.weight": (0.2, 0.8, 0.95, 0.0),
        "smear_lambda": (0.2, 0.8, 0.95, 0.0),
        "backout_lambda": (0.2, 0.8, 0.95, 0.0),
    }
    muon = chosen["transformer.h.3.attn.ve_gate.weight"]
    assert muon == MuonSettings(0.02, 0.28, dtype=muon.dtype, is_refined=True)
    assert len(chosen) == len(names)


def test_refined_state_continues_bit_for_bit():
    named = parameters()
    optimizer = optimizer_of(named, is_refined=True)
    take_steps(optimizer, named, range(3))
    saved = {name: tensor.clone() for name, tensor in optimizer.state_dict().items()}
    assert any(name.endswith(".variance") for name in saved)
    weights = [(name, torch.nn.Parameter(p.detach().clone())) for name, p in named]
    take_steps(optimizer, named, range(3, 5))
    other = optimizer_of(weights, is_refined=True)
    other.load_state_dict(saved)
    take_steps(other, weights, range(3, 5))
    for (_, one), (_, two) in zip(named, weights, strict=True):
        assert torch.equal(one, two)


def test_schedules_of_the_modern_optimizer():
    schedule = Schedule(1000, warmdown_ratio=0.4, is_refined=True)
    momenta = [schedule.momentum(step) for step in (0, 200, 400, 599, 600, 800, 1000)]
    assert momenta == pytest.approx([0.85, 0.91, 0.97, 0.97, 0.97, 0.935, 0.90])
    decays = [schedule.decay(step) for step in (0, 500, 1000)]
    assert decays == pytest.approx([1.0, 0.5, 0.0])
    classic = Schedule(1000)
    assert [classic.momentum(step) for step in (0, 150, 900)] == pytest.approx([0.85, 0.9, 0.95])
    assert classic.decay(900) == 1.0
