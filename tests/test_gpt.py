"""The model against independent references, and its own promises."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat import fp8, fused
from nanochat.attention import causal_attention
from nanochat.blocks import rms_norm, rotary_tables, rotate, rotate_and_norm
from nanochat.common import UserError
from nanochat.gpt import GPT, GPTConfig, softcap
from nanochat.objectives import next_token_loss_sum, token_losses
from nanochat.scaling import model_config


def random_model(seed: int = 0, *, token_shift: float = 0.0, **sizes: int) -> GPT:
    """A small fp32 model whose every weight is random, output projections and head included."""
    config = GPTConfig(
        **{"sequence_len": 96, "vocab_size": 61, "n_layer": 3, "n_head": 4, "n_embd": 64} | sizes,
        token_shift=token_shift,
    )
    model = GPT(config)
    generator = torch.Generator().manual_seed(seed)
    model.init_weights(generator)
    for name, parameter in model.named_parameters():
        if name.endswith("c_proj.weight") or name == "lm_head.weight":
            parameter.data.normal_(0.0, 0.3, generator=generator)
    return model


def random_ids(shape: tuple[int, ...], vocab_size: int = 61, seed: int = 1) -> Tensor:
    """Token ids."""
    return torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def textbook_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One head at a time, one query at a time: softmax(q k / sqrt(D)) v over the past, in fp64."""
    q, k, v = q.double(), k.double(), v.double()
    out = torch.zeros_like(q)
    batch, length, heads, size = q.shape
    group = heads // k.size(2)
    for b in range(batch):
        for h in range(heads):
            for t in range(length):
                scores = k[b, : t + 1, h // group] @ q[b, t, h] / math.sqrt(size)
                out[b, t, h] = scores.softmax(0) @ v[b, : t + 1, h // group]
    return out


@pytest.mark.parametrize("needs_grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("length", [1, 7, 128, 131])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_equals_the_textbook(needs_grad: bool, length: int, kv_heads: int) -> None:
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(2, length, 4, 8, generator=generator).requires_grad_(needs_grad)
    k = torch.randn(2, length, kv_heads, 8, generator=generator)
    v = torch.randn(2, length, kv_heads, 8, generator=generator)
    expected = textbook_attention(q.detach(), k, v)
    # fp32 sums of up to 131 terms of size about 1
    torch.testing.assert_close(
        causal_attention(q, k, v).detach().double(), expected, rtol=0, atol=2e-6
    )


def test_rotation_equals_complex_multiplication() -> None:
    cos, sin = rotary_tables(9, 6, None)
    x = torch.randn(2, 9, 3, 6, generator=torch.Generator().manual_seed(0))
    pairs = torch.complex(x[..., :3].double(), x[..., 3:].double())
    frequencies = 10_000.0 ** (-torch.arange(3, dtype=torch.float64) / 3)
    angles = torch.arange(9, dtype=torch.float64)[:, None] * frequencies
    turned = pairs * torch.polar(torch.ones_like(angles), -angles)[None, :, None, :]
    expected = torch.cat((turned.real, turned.imag), dim=-1)
    torch.testing.assert_close(rotate(x, cos, sin).double(), expected, rtol=0, atol=1e-6)


def test_rms_norm_gives_unit_mean_square() -> None:
    x = 37.0 * torch.randn(5, 7, 64, generator=torch.Generator().manual_seed(0))
    norms = rms_norm(x).square().mean(-1)
    torch.testing.assert_close(norms, torch.ones(5, 7), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("depth", "vocab_size", "expected"),
    [(4, 65_536, 36_700_160), (20, 65_536, 560_988_160), (32, 65_536, 1_879_048_192)],
)
def test_depth_dial_gives_the_documented_sizes(depth: int, vocab_size: int, expected: int) -> None:
    with torch.device("meta"):
        model = GPT(model_config(depth, vocab_size=vocab_size, sequence_len=2048))
    assert model.count_parameters()["total"] == expected


def test_future_tokens_do_not_change_logits() -> None:
    model, ids = random_model(), random_ids((2, 40))
    changed = ids.clone()
    changed[:, 25:] = (changed[:, 25:] + 1) % 61
    with torch.no_grad():
        difference = (model(ids) - model(changed)).abs().amax(dim=(0, 2))
    assert difference[:25].max() < 1e-6
    assert difference[25:].min() > 1e-3


@pytest.mark.parametrize("token_shift", [0.0, 0.5])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("cuts", [(1, 2, 3), (20, 21), (39,)])
def test_cached_decode_equals_full_forward(
    kv_heads: int, cuts: tuple[int, ...], token_shift: float
) -> None:
    model = random_model(n_kv_head=kv_heads, token_shift=token_shift)
    ids = random_ids((3, 40))
    cache = model.new_cache(3, 40)
    edges = (0, *cuts, 40)
    with torch.no_grad():
        full = model(ids)
        parts = [model(ids[:, a:b], kv_cache=cache) for a, b in pairwise(edges)]
    torch.testing.assert_close(torch.cat(parts, dim=1), full, rtol=0, atol=1e-4)


@pytest.mark.parametrize("token_shift", [0.0, 0.5])
def test_cached_rows_of_different_lengths_do_not_touch_each_other(token_shift: float) -> None:
    model, ids = random_model(token_shift=token_shift), random_ids((2, 30))
    cache = model.new_cache(2, 30)
    with torch.no_grad():
        model(ids[:, :20], kv_cache=cache)
        cache.set_lengths(torch.tensor([20, 11]))  # row 1: nine of these were padding
        step = model(torch.stack((ids[0, 20:25], ids[1, 11:16])), kv_cache=cache)
        expected = model(ids)
    torch.testing.assert_close(step[0], expected[0, 20:25], rtol=0, atol=1e-4)
    torch.testing.assert_close(step[1], expected[1, 11:16], rtol=0, atol=1e-4)


def test_the_shift_adds_a_share_of_the_token_before_with_its_halves_swapped() -> None:
    model, ids = random_model(token_shift=0.5), random_ids((1, 6))
    embedded = rms_norm(model.transformer.wte(ids))
    before = torch.cat((embedded[:, :-1, 32:], embedded[:, :-1, :32]), dim=-1)
    expected = torch.cat((embedded[:, :1], embedded[:, 1:] + 0.5 * before), dim=1)
    torch.testing.assert_close(model._embed(ids, None), expected)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_with_a_shift_attention_begins_by_looking_what_followed_a_token(kv_heads: int) -> None:
    sizes = {"sequence_len": 32, "vocab_size": 500, "n_layer": 1, "n_head": 4, "n_embd": 512}
    model = GPT(GPTConfig(**sizes, n_kv_head=kv_heads, token_shift=0.5))
    model.init_weights(torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randperm(500, generator=generator)[:12] for _ in range(40)])
    ids[:, -1] = ids[:, 4]  # the last token came before; what followed it there is at place 5
    x = rms_norm(model._embed(ids, None))
    attn = model.transformer.h[0].attn
    rotary = model.cos[:12], model.sin[:12]
    q, k = (
        rotate_and_norm(linear(x).unflatten(-1, (-1, 128)), rotary)
        for linear in (attn.c_q, attn.c_k)
    )
    k = k.repeat_interleave(4 // kv_heads, dim=2)
    scores = torch.einsum("bhd,bshd->bhs", q[:, -1], k)[:, :: 4 // kv_heads]
    # The place just before matches as well: its own token is the one before the last.
    assert (scores[..., :10].argmax(-1) == 5).float().mean() > 0.9
    assert (scores[..., 10] > scores[..., :5].amax(-1)).float().mean() > 0.9


def test_cache_refuses_more_than_it_holds() -> None:
    model = random_model()
    cache = model.new_cache(1, 8)
    with pytest.raises(ValueError, match="8 positions is full"):
        model(random_ids((1, 9)), kv_cache=cache)


@pytest.mark.parametrize("ignored", [False, True], ids=["all targets", "some ignored"])
@pytest.mark.parametrize("rows", [5, 513])
def test_chunked_loss_equals_cross_entropy_with_its_gradient(ignored: bool, rows: int) -> None:
    model = random_model(sequence_len=rows)
    ids, targets = random_ids((1, rows)), random_ids((1, rows), seed=2)
    if ignored:
        targets[:, ::3] = -1
    plain = model(ids, targets, loss_reduction="sum")
    plain.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    chunked = next_token_loss_sum(model.hidden(ids), model.lm_head.weight, targets)
    chunked.backward()
    torch.testing.assert_close(chunked, plain, rtol=1e-6, atol=0)
    for name, parameter in model.named_parameters():
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=5e-6 * scale)
    with torch.no_grad():
        losses = token_losses(model, ids, targets)
    assert losses[targets < 0].abs().sum() == 0
    torch.testing.assert_close(losses.sum(), plain.detach(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("cap", [60.0, 100.0])
def test_chunked_loss_of_a_large_softcap_does_not_overflow(cap: float) -> None:
    generator = torch.Generator().manual_seed(3)
    hidden, head = (4.0 * torch.randn(n, 64, generator=generator) for n in (30, 900))
    plain, chunked = ([x.clone().requires_grad_() for x in (hidden, head)] for _ in range(2))
    targets = torch.arange(30)
    expected = F.cross_entropy(softcap(plain[0] @ plain[1].t(), cap), targets, reduction="sum")
    expected.backward()
    loss = next_token_loss_sum(*chunked, targets, cap=cap)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for ours, theirs in zip(chunked, plain, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("where", ["cpu", "meta"])
def test_the_loss_asks_the_device_nothing(where: str) -> None:
    # A tensor without memory cannot answer; on a GPU the host would wait for the answer.
    hidden = torch.empty(2, 30, 64, device="meta", requires_grad=True)
    head = torch.empty(61, 64, device="meta", requires_grad=True)
    targets, weights = torch.zeros(2, 30, dtype=torch.int64), torch.ones(2, 30)
    targets[:, ::3] = -1
    loss = next_token_loss_sum(hidden, head, targets.to(where), weights=weights.to(where))
    loss.backward()
    assert hidden.grad.shape == hidden.shape
    assert head.grad.shape == head.shape


@pytest.mark.parametrize(
    "function",
    [
        lambda x: fused.rms_norm(x, 1e-6),
        lambda x: fused.rotate_and_norm(x.view(2, 8, 2, 8), *rotary_tables(8, 8, None), 1e-6),
        fused.relu_squared,
        lambda x: fused.scaled_sum(x, x, torch.ones(()), torch.ones(())),
        lambda x: fused.causal_attention(*[x.view(2, 2, 8, 8)] * 3),
        lambda x: next_token_loss_sum(x.view(32, 8), torch.ones(9, 8), torch.arange(32) % 9),
        lambda x: fp8._Product.apply(x.view(32, 8), torch.ones(16, 8)),
    ],
)
def test_handmade_backward_passes_refuse_a_second_derivative(
    function: Callable[[Tensor], Tensor],
) -> None:
    x = torch.randn(256, generator=torch.Generator().manual_seed(1)).requires_grad_()
    (gradient,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


def test_bf16_matrices_keep_the_embedding_and_the_answer() -> None:
    model, ids = random_model(), random_ids((2, 40))
    with torch.no_grad():
        full = model(ids).softmax(-1)
        half = model.cast_matrices(torch.bfloat16)(ids).softmax(-1)
    assert model.transformer.wte.weight.dtype == torch.float32
    assert (full - half).abs().mean() < 2e-3  # 8 bits of mantissa through 3 layers


def test_logits_equal_transformers_nanochat() -> None:
    transformers = pytest.importorskip("transformers", reason="the dev extra is not installed")
    model = random_model(n_kv_head=2)
    config = transformers.NanoChatConfig(
        vocab_size=61,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=96,
        rms_norm_eps=float(torch.finfo(torch.float32).eps),
        rope_parameters={"rope_theta": 10_000.0, "rope_type": "default"},
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    other = transformers.NanoChatForCausalLM(config).eval()
    names = {
        "transformer.wte": "model.embed_tokens",
        "transformer.h.": "model.layers.",
        "attn.c_proj": "self_attn.o_proj",
        "attn.c_": "self_attn.",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    weights = {}
    for name, value in model.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        for letter in "qkv":
            name = name.replace(f"self_attn.{letter}.", f"self_attn.{letter}_proj.")
        weights[name] = value
    other.load_state_dict(weights, strict=True)
    ids = random_ids((2, 50))
    with torch.no_grad():
        torch.testing.assert_close(other(ids).logits, model(ids), rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"n_embd": 66, "n_head": 4}, "66 is not a multiple of n_head 4"),
        ({"n_embd": 12, "n_head": 4}, "head size 3 .* is odd"),
        ({"n_head": 4, "n_kv_head": 3}, "n_head 4 is not a multiple of n_kv_head 3"),
        ({"n_layer": 0}, "n_layer is 0"),
    ],
)
def test_impossible_sizes_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        GPTConfig(**{"sequence_len": 32, "vocab_size": 61, "n_layer": 1, "n_embd": 64} | sizes)


def test_seed_document_config_runs_and_gives_one_kv_head_per_head() -> None:
    config = GPTConfig(vocab_size=65_536, n_layer=4, n_head=12, n_embd=768)
    assert config.n_kv_head == 12


def test_initial_loss_is_that_of_uniform_guessing() -> None:
    model = GPT(GPTConfig(sequence_len=16, vocab_size=61, n_layer=2, n_head=2, n_embd=64))
    model.init_weights(torch.Generator().manual_seed(0))
    ids = random_ids((2, 16))
    loss = float(model(ids, ids).detach())
    assert loss == pytest.approx(math.log(61), abs=1e-5)
    assert F.softmax(model(ids), -1).std() < 1e-6


def test_handmade_backward_passes_equal_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, targets = random_ids((2, 150)), random_ids((2, 150), seed=2)
    gradients = []
    for handmade in (True, False):
        if not handmade:
            monkeypatch.setattr("nanochat.fused.pays_for", lambda x: False)
        model = random_model(sequence_len=150, n_kv_head=2)
        model(ids, targets).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, expected in gradients[1].items():
        assert expected.abs().max() > 0
        scale = float(expected.abs().max())
        torch.testing.assert_close(gradients[0][name], expected, rtol=0, atol=1e-5 * scale)
