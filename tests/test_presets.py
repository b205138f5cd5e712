"""The three presets: what each computes, that decoding equals it, and what is refused."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scripted_model import byte_tokenizer
from torch import Tensor

from nanochat import attention, hf_export
from nanochat.attention import causal_attention
from nanochat.blocks import rms_norm, rotate
from nanochat.branches import Branches
from nanochat.common import UserError
from nanochat.decoder import Chunk, PlainDecoder
from nanochat.gpt import GPT, GPTConfig
from nanochat.objectives import next_token_loss_sum, token_losses
from nanochat.presets import MODELS
from nanochat.scaling import model_config
from scripts import base_train
from tests.stage_processes import BASE, MID, SFT, prepare, run, run_dir

SIZES: dict[str, Any] = {"sequence_len": 96, "vocab_size": 61, "n_layer": 4, "n_head": 4}
SIZES |= {"n_kv_head": 2, "n_embd": 64}
PRESETS = ["modern", "portable"]


def random_model(preset: str, seed: int = 0, **options: Any) -> GPT:
    """A small fp32 model whose every weight is random, scalars included."""
    model = GPT(GPTConfig(**SIZES | MODELS[preset] | options))
    generator = torch.Generator().manual_seed(seed)
    model.init_weights(generator)
    for name, parameter in model.named_parameters():
        if name.endswith(("gate.weight", "lambda", "lambdas")):
            parameter.data.normal_(0.3, 0.3, generator=generator)
        if name.endswith(("c_proj.weight", "lm_head.weight")):
            parameter.data.normal_(0.0, 0.3, generator=generator)
    return model.requires_grad_(True)


def random_ids(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(0, 61, shape, generator=torch.Generator().manual_seed(seed))


def shorten_windows(model: GPT, window: int) -> GPT:
    """Windows that a test's few tokens outgrow; real ones are multiples of 128."""
    for block in model.transformer.h:
        if block.attn.window is not None:
            block.attn.window = window
    return model


# ---- what is computed ----------------------------------------------------------------------------


def plain_logits(model: GPT, ids: Tensor) -> Tensor:
    """The formulas of the newest nanochat as a person writes them down, one sequence, in fp64."""
    config, weights = model.config, {n: p.detach().double() for n, p in model.named_parameters()}
    length, heads, size = len(ids), config.n_head, config.head_dim

    def norm(x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()

    def turn(x: Tensor) -> Tensor:
        angles = torch.arange(length).double()[:, None] * config.rope_base ** (
            -torch.arange(0, size, 2).double() / size
        )
        first, second = x[..., : size // 2], x[..., size // 2 :]
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        return torch.cat((first * cos + second * sin, second * cos - first * sin), -1)

    x = norm(weights["transformer.wte.weight"][ids])
    if config.smear:
        gate = torch.sigmoid(x[1:, :24] @ weights["smear_gate.weight"].T)
        x = torch.cat((x[:1], x[1:] + weights["smear_lambda"] * gate * x[:-1]))
    first, middle = x, None
    for layer, block in enumerate(model.transformer.h):
        here = {n.split(f"h.{layer}.")[1]: w for n, w in weights.items() if f".h.{layer}." in n}
        if config.residual_scalars:
            x = weights["resid_lambdas"][layer] * x + weights["x0_lambdas"][layer] * first
        h = norm(x)
        q, k, v = (
            (h @ here[f"attn.c_{c}.weight"].T).unflatten(-1, (-1, size)) for c in ("q", "k", "v")
        )
        if config.has_value_embedding(layer):
            gate = 3 * torch.sigmoid(h[:, :12] @ here["attn.ve_gate.weight"].T)
            extra = weights[f"value_embeds.{layer}.weight"][ids].unflatten(-1, (-1, size))
            v = v + gate[..., None] * extra
        q, k = config.qk_scale * norm(turn(q)), config.qk_scale * norm(turn(k))
        out = torch.zeros(length, heads, size, dtype=torch.float64)
        for head in range(heads):
            group = head // (heads // config.num_kv_heads)
            for t in range(length):
                low = 0 if block.attn.window is None else max(0, t - block.attn.window)
                scores = k[low : t + 1, group] @ q[t, head] / size**0.5
                out[t, head] = scores.softmax(0) @ v[low : t + 1, group]
        x = x + out.flatten(1) @ here["attn.c_proj.weight"].T
        h = norm(x)
        inner = h @ here["mlp.c_fc.weight"].T
        if config.mlp == "swiglu":
            inner = F.silu(h @ here["mlp.c_gate.weight"].T) * inner
        else:
            inner = inner.relu().square()
        x = x + inner @ here["mlp.c_proj.weight"].T
        if config.backout and layer == config.n_layer // 2:
            middle = x
    if middle is not None:
        x = x - weights["backout_lambda"] * middle
    raw = (norm(x) @ weights["lm_head.weight"].T)[:, : config.vocab_size]
    cap = config.logit_softcap
    return cap * torch.tanh(raw / cap) if cap else raw


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_logits_equal_the_formulas_written_down(preset: str, layers: int) -> None:
    model = shorten_windows(random_model(preset, n_layer=layers), 5)
    ids = random_ids(1, 24)
    logits = model(ids)[0].detach()
    assert logits.shape == (24, 61)
    expected = plain_logits(model, ids[0])
    assert expected.std() > 0.3
    scale = float(expected.abs().max())
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=1e-5 * scale)


def test_modern_counts_are_the_published_ones() -> None:
    expected = {12: 286_261_730, 20: 896_533_746, 24: 1_384_122_122}
    for depth, total in expected.items():
        sizes = model_config(depth, vocab_size=32_768, sequence_len=2048, preset="modern")
        with torch.device("meta"):
            counts = GPT(sizes).count_parameters()
        assert counts["total"] == total
        if depth == 12:
            assert counts["transformer_matrices"] + counts["lm_head"] == 110_100_912


def test_short_windows_are_a_quarter_context_in_whole_blocks_and_the_last_layer_sees_all() -> None:
    config = model_config(12, vocab_size=100, sequence_len=2048, preset="modern")
    assert config.windows == (512, 512, 512, None) * 3
    assert GPTConfig(sequence_len=600, n_layer=3, window_pattern="S").windows == (256, 256, None)
    assert set(GPTConfig().windows) == {None}


def test_padding_of_the_vocabulary_never_gets_probability_or_gradient() -> None:
    model = random_model("modern")
    assert model.lm_head.weight.shape == model.transformer.wte.weight.shape == (64, 64)
    ids, targets = random_ids(2, 40), random_ids(2, 40, seed=2)
    loss = next_token_loss_sum(
        model.hidden(ids), model.lm_head.weight, targets, vocab_size=61, cap=15.0
    )
    loss.backward()
    assert model.lm_head.weight.grad[:61].abs().min() > 0
    assert model.lm_head.weight.grad[61:].abs().max() == 0
    torch.testing.assert_close(loss, model(ids, targets, loss_reduction="sum"), rtol=1e-6, atol=0)


@pytest.mark.parametrize("preset", PRESETS)
def test_chunked_loss_equals_cross_entropy_with_its_gradient(preset: str) -> None:
    model = random_model(preset)
    config, ids, targets = model.config, random_ids(2, 40), random_ids(2, 40, seed=2)
    targets[:, ::3] = -1
    plain = model(ids, targets, loss_reduction="sum")
    plain.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    chunked = next_token_loss_sum(
        model.hidden(ids),
        model.lm_head.weight,
        targets,
        cap=config.logit_softcap,
        vocab_size=config.vocab_size,
    )
    chunked.backward()
    torch.testing.assert_close(chunked, plain, rtol=1e-6, atol=0)
    for name, parameter in model.named_parameters():
        scale = float(expected[name].abs().max())
        assert scale > 0, name
        torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=1e-5 * scale)
    with torch.no_grad():
        losses = token_losses(model, ids, targets).sum()
    torch.testing.assert_close(losses, plain.detach(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("preset", PRESETS)
def test_handmade_backward_passes_equal_autograd(
    preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, targets = random_ids(2, 300), random_ids(2, 300, seed=2)
    gradients = []
    for handmade in (True, False):
        if not handmade:
            monkeypatch.setattr("nanochat.fused.pays_for", lambda x: False)
        model = shorten_windows(random_model(preset, sequence_len=300), 70)
        model(ids, targets).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, expected in gradients[1].items():
        scale = float(expected.abs().max())
        assert scale > 0, name
        torch.testing.assert_close(gradients[0][name], expected, rtol=0, atol=2e-5 * scale)


# ---- attention with a window ---------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["masked", "handmade", "compiler", "flex"])
@pytest.mark.parametrize(("length", "window"), [(300, 128), (300, 70), (257, 0), (130, 200)])
def test_every_window_backend_equals_a_mask(
    backend: str, length: int, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, length, heads, 8, generator=generator) for heads in (4, 2, 2))
    if backend in ("handmade", "compiler"):
        q.requires_grad_()
    if backend == "compiler":
        monkeypatch.setattr("nanochat.fused.pays_for", lambda x: False)
    if backend == "flex":
        out = attention._flex(*(x.transpose(1, 2) for x in (q, k, v)), window).transpose(1, 2)
    else:
        out = causal_attention(q, k, v, window).detach()
    k, v = k.repeat_interleave(2, dim=2), v.repeat_interleave(2, dim=2)
    scores = torch.einsum("bthd,bshd->bhts", q.detach(), k) / 8**0.5
    t = torch.arange(length)
    distance = t[:, None] - t
    scores = scores.masked_fill((distance < 0) | (distance > window), float("-inf"))
    expected = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v)
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-6)


def test_the_compiler_can_trace_the_window_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (torch.randn(1, heads, 160, 8) for heads in (2, 2, 2))
    compiled = torch.compile(attention._flex, backend="aot_eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(q, k, v, 20), attention._flex(q, k, v, 20))


# ---- decoding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("cuts", [(1, 2, 3), (20, 21), (39,)])
def test_cached_decode_equals_full_forward(preset: str, cuts: tuple[int, ...]) -> None:
    model = shorten_windows(random_model(preset), 6)
    ids = random_ids(3, 40)
    cache = model.new_cache(3, 40)
    with torch.no_grad():
        full = model(ids)
        parts = [model(ids[:, a:b], kv_cache=cache) for a, b in pairwise((0, *cuts, 40))]
    torch.testing.assert_close(torch.cat(parts, dim=1), full, rtol=0, atol=1e-4)


def test_value_embeddings_go_with_a_token_shift_in_cached_decoding() -> None:
    model = random_model("classic", value_embeddings=True, token_shift=0.5)
    ids = random_ids(3, 40)
    cache = model.new_cache(3, 40)
    with torch.no_grad():
        parts = [model(ids[:, a:b], kv_cache=cache) for a, b in ((0, 7), (7, 8), (8, 40))]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(ids), atol=2e-5, rtol=1e-4)


def test_value_embeddings_are_a_flag_of_any_preset() -> None:
    for preset, flag, expected in (
        ("classic", True, True),
        ("classic", None, False),
        ("modern", None, True),
        ("modern", False, False),
    ):
        config = base_train.Config(preset=preset, value_embeddings=flag)  # type: ignore[arg-type]
        assert base_train.sizes_at(config, 4, 300).value_embeddings is expected


@pytest.mark.parametrize(
    ("preset", "flags", "named"),
    [
        ("classic", {}, None),
        ("portable", {}, None),
        ("modern", {"token_shift": 0.0}, None),
        ("portable", {"value_embeddings": True}, "--value-embeddings a portable"),
        (
            "portable",
            {"token_shift": 0.5, "window_pattern": "SSSL"},
            "--token-shift and --window-pattern a portable",
        ),
        ("classic", {"token_shift": 0.5}, "--token-shift a classic"),
    ],
)
def test_flags_that_cost_the_export_are_named_at_the_start(
    preset: Any, flags: dict[str, Any], named: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = base_train.sizes_at(base_train.Config(preset=preset, **flags), 4, 300)
    base_train.warn_if_not_exported(preset, sizes)
    message = f"with {named} model cannot be exported to other engines"
    assert caplog.messages == ([] if named is None else [message])


@pytest.mark.parametrize("preset", PRESETS)
def test_ragged_rows_and_copied_beginnings_decode_like_full_forwards(preset: str) -> None:
    model = shorten_windows(random_model(preset), 6).requires_grad_(False)
    ids = random_ids(2, 30)
    decoder = PlainDecoder(model)
    rows = [decoder.open(30), decoder.open(30), decoder.open(30)]
    first, second = ids[0].tolist(), ids[1].tolist()
    decoder.feed([Chunk(rows[0], 0, first[:20]), Chunk(rows[1], 0, second[:11])])
    decoder.copy(rows[0], rows[2], 9)
    other = [*first[:9], *second[9:14]]
    logits = decoder.feed(
        [
            Chunk(rows[0], 20, first[20:25]),
            Chunk(rows[1], 11, second[11:12]),
            Chunk(rows[2], 9, other[9:]),
        ]
    )
    for row, tokens in zip(logits, (first[:25], second[:12], other), strict=True):
        expected = model(torch.tensor([tokens]))[0, -1]
        torch.testing.assert_close(row, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("preset", PRESETS)
def test_some_columns_and_branches_equal_the_whole_forward(preset: str, layers: int) -> None:
    model = shorten_windows(random_model(preset, n_layer=layers), 4).requires_grad_(False)
    ids = random_ids(2, 20)
    columns = torch.tensor([[3, 19, 0], [7, 7, 18]])
    whole, some = model.hidden(ids), model.hidden(ids, columns=columns)
    torch.testing.assert_close(some[1], whole[1, columns[1]], rtol=0, atol=1e-5)
    rows = ids.tolist()
    tails = [[rows[0][12:], [1, 2, 3]], [[4], [], rows[1][9:]]]
    branches = Branches([rows[0][:12], rows[1][:9]], tails, padding=0, device=torch.device("cpu"))
    ends = model.hidden(branches.prefix_ids, branches, branches.last_columns)[:, 0]
    states = model.hidden(branches.branch_ids, branches)
    torch.testing.assert_close(ends, whole[[0, 1], [11, 8]], rtol=0, atol=1e-5)
    torch.testing.assert_close(states[0, :8], whole[0, 12:], rtol=0, atol=1e-5)
    torch.testing.assert_close(states[1, 1:12], whole[1, 9:], rtol=0, atol=1e-5)
    other = model.hidden(torch.tensor([[*rows[0][:12], 1, 2, 3]]))
    torch.testing.assert_close(states[0, 8:11], other[0, 12:], rtol=0, atol=1e-5)


# ---- configurations ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"smear": True, "token_shift": 0.5}, "smear and token_shift both add"),
        ({"mlp": "gelu"}, "mlp is 'gelu'; use relu2 or swiglu"),
        ({"init": "zero"}, "init is 'zero'"),
        ({"window_pattern": "SX"}, "window_pattern is 'SX'; it is made of the letters S and L"),
        ({"window_pattern": ""}, "window_pattern is ''"),
        ({"logit_softcap": -1.0}, "logit_softcap is -1.0"),
        ({"logit_softcap": float("nan")}, "logit_softcap is nan"),
        ({"qk_scale": 0.0}, "qk_scale is 0.0; it must be above 0"),
        ({"rope_base": 1.0}, "rope_base is 1.0; it must be above 1"),
        ({"vocab_multiple": 0}, "vocab_multiple is 0"),
        ({"smear": True, "n_embd": 16}, "smear reads 24 features; n_embd is 16"),
        ({"value_embeddings": True, "n_embd": 8}, "value_embeddings reads 12 features"),
    ],
)
def test_unknown_values_and_combinations_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        GPTConfig(**SIZES | options)


@pytest.mark.parametrize("preset", MODELS)
def test_a_config_survives_its_checkpoint(preset: str) -> None:
    config = GPTConfig(**SIZES | MODELS[preset])
    assert GPTConfig.from_json(config.to_json()) == config
    unknown = config.to_json() | {"mixture": 8}
    with pytest.raises(UserError, match=r"does not know: \['mixture'\]"):
        GPTConfig.from_json(unknown)


def test_a_classic_checkpoint_names_no_option() -> None:
    assert set(GPTConfig(**SIZES).to_json()) == set(SIZES) | {"token_shift"}


def test_rotary_base_turns_slower_pairs() -> None:
    x = torch.randn(1, 9, 1, 8)
    slow, fast = (GPT(GPTConfig(**SIZES, rope_base=base)) for base in (1e5, 1e4))
    assert torch.equal(slow.cos[:, 0], fast.cos[:, 0])
    assert slow.sin[5, -1] < fast.sin[5, -1]
    tables = slow.cos[:9, :4], slow.sin[:9, :4]
    assert rms_norm(rotate(x, *tables)).shape == x.shape


# ---- other engines -------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["portable", "classic"])
def test_an_exported_model_has_equal_logits_in_transformers(preset: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="the dev extra is not installed")
    tokenizer = byte_tokenizer()
    model = random_model(preset, vocab_size=tokenizer.vocab_size, rope_base=20_000.0)
    name = hf_export.export(model, tokenizer, tmp_path)
    assert name == {"portable": "Qwen3ForCausalLM", "classic": "NanoChatForCausalLM"}[preset]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(loaded).__name__ == name
    ids = torch.randint(0, tokenizer.vocab_size, (2, 50))
    with torch.no_grad():
        expected = model(ids)
        scale = float(expected.abs().max())
        difference = (loaded(ids).logits - expected).abs().max()
        assert difference < 1e-5 * scale
        written = loaded.generate(
            ids[:1, :20],
            attention_mask=torch.ones(1, 20),  # else a token 0 is taken for padding
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    cache, tokens = model.new_cache(1, 40), ids[:1, :20]
    new = tokens
    with torch.no_grad():
        for _ in range(12):
            new = model(new, kv_cache=cache)[:, -1:].argmax(-1)
            tokens = torch.cat((tokens, new), dim=1)
    assert torch.equal(written, tokens)


@pytest.mark.parametrize(
    "options",
    [
        MODELS["modern"],
        {"token_shift": 0.5},
        {"value_embeddings": True},
        {"mlp": "swiglu"},
        {"logit_softcap": 0.0},
    ],
)
def test_a_model_that_no_other_engine_knows_is_not_exported(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="other engines do not know all options of this model"):
        hf_export.hf_config(GPTConfig(**SIZES | options), bos_id=0)


# ---- through the stages --------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_later_stages_go_on_with_the_preset_of_the_base_model(preset: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    prepare(base)
    short = ("--num_iterations=3", "--save_every=-1", "--eval_every=-1")
    few = ("--core_metric_every=-1", "--sample_every=-1")
    run(base, BASE.module, *BASE.flags, f"--preset={preset}", *few, *short)
    run(base, MID.module, *MID.flags, *short)
    run(base, SFT.module, *SFT.flags, *short, "--eval_metrics_every=-1")
    optimizer = "modern" if preset == "modern" else "classic"
    configs = []
    for stage in (BASE, MID, SFT):
        state = json.loads((max(run_dir(base, stage).glob("step_*")) / "state.json").read_text())
        assert state["optimizer"] == state["config"]["optimizer"] == optimizer
        configs.append(GPTConfig.from_json(state["model_config"]))
    assert configs[0] == configs[1] == configs[2]
    assert {name: getattr(configs[0], name) for name in MODELS[preset]} == MODELS[preset]
    out = str(tmp_path / "exported")
    said = run(base, "scripts.export_hf", f"--output={out}", code=0 if preset == "portable" else 1)
    assert "Qwen3ForCausalLM" in said or "other engines do not know all options" in said
