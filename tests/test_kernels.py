"""The compiled decoder: equal to the model, the same bits in any company, clear refusals."""

from __future__ import annotations

import dataclasses
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat import decoders, kernels, sampling
from nanochat.common import UserError
from nanochat.compiled_decoder import CompiledDecoder, choose
from nanochat.decoder import Chunk, PlainDecoder
from nanochat.decoders import make_decoder
from nanochat.gpt import GPT, GPTConfig
from nanochat.kernels import KernelError
from nanochat.presets import MODELS
from nanochat.sampling import SamplingSettings

CRATE = Path(__file__).parents[1] / "nanochat" / "kernels"
needs_kernels = pytest.mark.skipif(kernels.load() is None, reason="no compiled decoder")
CONFIGS = (
    GPTConfig(sequence_len=64, vocab_size=300, n_layer=2, n_head=4, n_kv_head=2, n_embd=32),
    GPTConfig(sequence_len=64, vocab_size=64, n_layer=1, n_head=3, n_kv_head=1, n_embd=102),
    GPTConfig(sequence_len=64, vocab_size=129, n_layer=2, n_head=2, n_embd=256, token_shift=0.5),
    GPTConfig(sequence_len=64, vocab_size=70, n_layer=1, n_head=1, n_embd=320),
    GPTConfig(sequence_len=64, vocab_size=33, n_layer=1, n_head=1, n_embd=2),
    GPTConfig(sequence_len=64, vocab_size=99, n_layer=4, n_head=4, n_kv_head=2, n_embd=64,
              **MODELS["modern"]),
    GPTConfig(sequence_len=64, vocab_size=90, n_layer=2, n_head=2, n_embd=96,
              **MODELS["portable"]),
)  # fmt: skip
WEIGHTS = ("float32", "bfloat16", "int8")
# Largest difference of a logit from the fp32 model's, for logits of standard deviation 1: sums in
# another order; 8 bits of mantissa; 127 steps for the largest weight of a row.
TOLERANCE = {"float32": 2e-5, "bfloat16": 0.06, "int8": 0.15}


def random_model(config: GPTConfig, seed: int = 0) -> GPT:
    """Weights of such a size that every block and the head matter equally."""
    model = GPT(config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        deviation = parameter.size(-1) ** -0.5
        torch.nn.init.normal_(parameter, std=deviation, generator=generator)
    return model.eval().requires_grad_(False)


def random_tokens(config: GPTConfig, count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.vocab_size, (count,), generator=generator).tolist()


@needs_kernels
@pytest.mark.parametrize("instructions", ["best", "no-tiles", "no-bf16", "avx2"])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("config", CONFIGS)
def test_logits_are_those_of_the_model(config: GPTConfig, weights: Any, instructions: Any) -> None:
    model = random_model(config)
    tokens = random_tokens(config, 40)
    expected = model(torch.tensor([tokens]))[0, 29:]
    decoder = CompiledDecoder(model, weights=weights, instructions=instructions)
    row = decoder.open(40)
    chunks = [Chunk(row, 0, tokens[:30])]
    chunks += [Chunk(row, 30 + i, [token]) for i, token in enumerate(tokens[30:])]
    steps = [decoder.feed([chunk]).clone() for chunk in chunks]
    torch.testing.assert_close(torch.cat(steps), expected, rtol=0, atol=TOLERANCE[weights])


@needs_kernels
@pytest.mark.parametrize("instructions", ["best", "no-tiles", "no-bf16", "avx2"])
@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", CONFIGS)
def test_weights_that_are_no_numbers_give_no_numbers(
    config: GPTConfig, weights: Any, instructions: Any
) -> None:
    tokens = random_tokens(config, 20)
    hidden = []
    for name, parameter in random_model(config).named_parameters():
        model = random_model(config)
        broken = dict(model.named_parameters())[name]
        broken[(0,) * parameter.dim()] = float("nan")
        expected = model(torch.tensor([tokens]))[0, -1].isnan()
        decoder = CompiledDecoder(model, weights=weights, instructions=instructions)
        found = decoder.feed([Chunk(decoder.open(20), 0, tokens)])[0].isnan()
        if not torch.equal(found, expected):
            hidden.append(name)
    assert hidden == []


@needs_kernels
@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("weights", WEIGHTS)
@settings(max_examples=15, deadline=None)
@given(
    config=st.sampled_from(CONFIGS),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    order=st.integers(0, 2**32),
)
def test_a_row_gets_the_same_bits_in_any_company_and_any_chunks(
    weights: Any, num_threads: int, config: GPTConfig, lengths: list[int], order: int
) -> None:
    sizes = random.Random(order)
    model = random_model(config)
    decoder = CompiledDecoder(model, weights=weights, num_threads=num_threads)
    texts = [random_tokens(config, length, seed) for seed, length in enumerate(lengths)]
    alone = []
    for text in texts:
        row = decoder.open(len(text))
        alone.append(decoder.feed([Chunk(row, 0, text)]).clone())
        decoder.close(row)
    rows = [decoder.open(len(text)) for text in texts]
    fed = [0] * len(texts)
    last: dict[int, torch.Tensor] = {}
    while any(done < len(text) for done, text in zip(fed, texts, strict=True)):
        chunks, members = [], []
        for i, text in enumerate(texts):
            part = text[fed[i] : fed[i] + sizes.randrange(10)]
            if part:
                chunks.append(Chunk(rows[i], fed[i], part))
                members.append(i)
                fed[i] += len(part)
        if chunks:
            for i, logits in zip(members, decoder.feed(chunks), strict=True):
                last[i] = logits.clone()
    for i, logits in enumerate(alone):
        assert torch.equal(logits[0], last[i])


@needs_kernels
@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_window_ends_where_the_models_window_ends(weights: Any) -> None:
    config = GPTConfig(
        sequence_len=512, vocab_size=70, n_layer=2, n_head=2, n_embd=64, window_pattern="SL"
    )
    assert config.windows == (128, None)
    model = random_model(config)
    tokens = random_tokens(config, 170)
    decoder = CompiledDecoder(model, weights=weights)
    row = decoder.open(170)
    decoder.feed([Chunk(row, 0, tokens[:120])])
    steps = [decoder.feed([Chunk(row, 120 + i, [t])]).clone() for i, t in enumerate(tokens[120:])]
    expected = model(torch.tensor([tokens]))[0, 120:]
    torch.testing.assert_close(torch.cat(steps), expected, rtol=0, atol=TOLERANCE[weights])
    # The window shows: without it the last logits are others.
    everything = random_model(dataclasses.replace(config, window_pattern="L"))
    assert not torch.allclose(everything(torch.tensor([tokens]))[0, -1], expected[-1], atol=0.1)


@needs_kernels
@pytest.mark.parametrize("config", CONFIGS)
def test_products_of_bytes_are_exact_in_tiles_and_in_registers(config: GPTConfig) -> None:
    model = random_model(config)
    tokens = random_tokens(config, 40)
    found = []
    for instructions in ("best", "no-tiles"):
        decoder = CompiledDecoder(model, weights="int8", instructions=instructions)
        row = decoder.open(40)
        found.append(decoder.feed([Chunk(row, 0, tokens)]).clone())
    assert torch.equal(*found)


@needs_kernels
@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_copied_beginning_is_as_good_as_one_that_was_read(weights: Any) -> None:
    config = CONFIGS[2]
    decoder = CompiledDecoder(random_model(config), weights=weights)
    tokens = random_tokens(config, 40)
    first, second, third = (decoder.open(size) for size in (40, 50, 40))
    whole = decoder.feed([Chunk(first, 0, tokens)]).clone()
    decoder.copy(first, second, 21)
    # What the source is used for afterwards does not show in the copy.
    decoder.feed([Chunk(first, 5, tokens[::-1][:30])])
    assert torch.equal(decoder.feed([Chunk(second, 21, tokens[21:])]), whole)
    decoder.copy(second, third, 40)
    decoder.close(second)
    again = decoder.feed([Chunk(third, 39, tokens[39:])])
    assert torch.equal(again, whole)


@needs_kernels
def test_only_wanted_logits_are_returned() -> None:
    config = CONFIGS[0]
    decoder = CompiledDecoder(random_model(config))
    rows = [decoder.open(8) for _ in range(3)]
    chunks = [Chunk(row, 0, [1, row], wants_logits=row != rows[1]) for row in rows]
    logits = decoder.feed(chunks).clone()
    assert logits.shape == (2, config.vocab_size)
    everything = decoder.feed([chunk._replace(wants_logits=True) for chunk in chunks])
    assert torch.equal(logits, everything[[0, 2]])
    assert decoder.feed([Chunk(rows[0], 2, [1], wants_logits=False)]).shape[0] == 0


@needs_kernels
@pytest.mark.parametrize(
    ("chunks", "reason"),
    [
        ([Chunk(0, 0, [300])], "beyond the vocabulary"),
        ([Chunk(7, 0, [1])], "no row 7"),
        ([Chunk(0, 15, [1, 1])], "holds 16"),
        ([Chunk(0, 639, [1, 1])], "2 tokens from 639"),
        ([Chunk(0, 0, [])], "0 tokens"),
        ([Chunk(0, 0, [1]), Chunk(0, 1, [1])], "row 0 is fed twice"),
    ],
)
def test_what_would_leave_its_memory_is_refused(chunks: list[Chunk], reason: str) -> None:
    decoder = CompiledDecoder(random_model(CONFIGS[0]))
    assert decoder.open(9) == 0
    with pytest.raises(KernelError, match=reason):
        decoder.feed(chunks)
    with pytest.raises(KernelError, match="no row 3"):
        decoder.close(3)
    with pytest.raises(KernelError, match="do not fit"):
        decoder.copy(0, decoder.open(64), 20)
    assert decoder.feed([Chunk(0, 0, [1])]).shape == (1, 300)


@needs_kernels
def test_a_closed_row_is_given_out_again_and_its_memory_is_clean() -> None:
    decoder = CompiledDecoder(random_model(CONFIGS[0]))
    row = decoder.open(16)
    expected = decoder.feed([Chunk(row, 0, [5, 6])]).clone()
    decoder.feed([Chunk(row, 2, [9] * 10)])
    decoder.close(row)
    assert decoder.open(16) == row
    assert torch.equal(decoder.feed([Chunk(row, 0, [5, 6])]), expected)


# ---- sampling -----------------------------------------------------------------------------------

SAMPLING = (
    SamplingSettings(temperature=0.0),
    SamplingSettings(temperature=1.0),
    SamplingSettings(temperature=0.8, top_k=50),
    SamplingSettings(temperature=0.01, top_k=3),
    SamplingSettings(temperature=1.5, top_p=0.7),
    SamplingSettings(temperature=1.0, top_k=20, top_p=0.9, min_p=0.1),
    SamplingSettings(temperature=0.7, min_p=0.05),
    SamplingSettings(temperature=1.0, top_k=8, repetition_penalty=1.3),
)


@needs_kernels
@pytest.mark.parametrize("vocab_size", [1, 7, 50, 300, 4096, 8192])
def test_compiled_sampling_chooses_what_the_plain_one_chooses(vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    settings = [*SAMPLING] * 40
    logits = torch.randn(len(settings), vocab_size, generator=generator) * 3
    uniforms = torch.rand(len(settings), generator=generator).tolist()
    seen = {
        row: set(range(0, vocab_size, 3))
        for row, setting in enumerate(settings)
        if setting.repetition_penalty != 1.0
    }
    expected = sampling.choose(logits.clone(), settings, uniforms, seen)
    found = choose(logits.clone(), settings, uniforms, seen)
    # A number on the border between two tokens may fall to either, by the last bit of a sum.
    assert sum(a != b for a, b in zip(found, expected, strict=True)) <= 1
    for i in range(0, len(settings), len(SAMPLING)):  # those without a border
        assert found[i] == expected[i]


@needs_kernels
@pytest.mark.parametrize("setting", SAMPLING[1:7])
def test_compiled_draws_follow_the_plain_probabilities(setting: SamplingSettings) -> None:
    logits = torch.tensor([[2.0, 0.0, 1.0, -1.0, 1.5]])
    steps = [(i + 0.5) / 1000 for i in range(1000)]
    rows = logits.repeat(len(steps), 1)
    found = choose(rows.clone(), [setting] * len(steps), steps, {})
    expected = sampling.choose(rows, [setting] * len(steps), steps, {})
    for token in range(5):
        # Fewer than two of a thousand evenly spread numbers lie on a border by rounding.
        assert abs(found.count(token) - expected.count(token)) <= 1


@needs_kernels
@pytest.mark.parametrize("uniform", [0.0, 0.5, 1.0 - 2**-53])
@pytest.mark.parametrize("setting", SAMPLING)
def test_an_impossible_token_is_never_drawn(setting: SamplingSettings, uniform: float) -> None:
    logits = torch.full((1, 100), -torch.inf)
    logits[0, 41] = 0.5
    assert choose(logits, [setting], [uniform], {}) == [41]


@needs_kernels
@pytest.mark.parametrize("setting", SAMPLING)
def test_logits_that_are_no_numbers_still_give_a_token(setting: SamplingSettings) -> None:
    (token,) = choose(torch.full((1, 100), torch.nan), [setting], [0.5], {})
    assert 0 <= token < 100


# ---- which decoder -------------------------------------------------------------------------------


@needs_kernels
def test_the_compiled_decoder_takes_the_precision_of_the_model() -> None:
    model = random_model(CONFIGS[2])
    for dtype, weights in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
        decoder = make_decoder(model.cast_matrices(dtype))
        assert isinstance(decoder, CompiledDecoder)
        assert decoder.weights == weights
    int8 = make_decoder(model, int8=True)
    assert isinstance(int8, CompiledDecoder)
    assert int8.num_weight_bytes * 2 == decoder.num_weight_bytes
    assert isinstance(make_decoder(model.cast_matrices(torch.float16)), PlainDecoder)


def test_without_the_compiled_decoder_the_plain_one_is_taken_with_a_notice(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kernels, "load", lambda: None)
    model = random_model(CONFIGS[0])
    decoders._notice.cache_clear()
    assert isinstance(make_decoder(model), PlainDecoder)
    assert caplog.text.count("slower here: the compiled decoder is not built") == 1
    with pytest.raises(UserError, match="int8 weights need the compiled decoder, which is not"):
        make_decoder(model, int8=True)


@needs_kernels
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"n_head": 1, "n_embd": 1024}, "heads of 1024 features"),
    ],
)
def test_a_model_that_the_kernels_do_not_know_is_decoded_the_plain_way_with_one_notice(
    options: dict[str, Any], named: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = random_model(GPTConfig(sequence_len=64, vocab_size=40, n_layer=1, **options))
    decoders._notice.cache_clear()
    for _ in range(3):
        assert isinstance(make_decoder(model), PlainDecoder)
    assert len(caplog.records) == 1
    assert named in caplog.text
    with pytest.raises(UserError, match="int8 weights need the compiled decoder, which does not"):
        make_decoder(model, int8=True)


# ---- the crate -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cargo-clippy") is None, reason="cargo-clippy is not installed")
def test_the_crate_is_formatted_and_without_lints() -> None:
    subprocess.run(["cargo", "fmt", "--check"], cwd=CRATE, check=True)
    lint = ["cargo", "clippy", "--offline", "--all-targets", "--release", "--", "-D", "warnings"]
    subprocess.run(lint, cwd=CRATE, check=True, capture_output=True)
