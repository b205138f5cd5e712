"""Bits per byte against a count by hand."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from nanochat.common import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.loss_eval import LossTotals, sum_losses
from nanochat.runtime import World

VOCAB = 12
# Tokens 0..9 stand for 1, 2 or 3 bytes, 10 and 11 are special.
TOKEN_BYTES = torch.tensor([1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 0, 0], dtype=torch.int32)


class Batch(NamedTuple):
    inputs: Tensor
    targets: Tensor


@pytest.fixture
def model() -> GPT:
    model = GPT(GPTConfig(sequence_len=8, vocab_size=VOCAB, n_layer=1, n_head=2, n_embd=16))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    return model


def random_batch(seed: int, rows: int = 3) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (rows, 8), generator=generator)
    targets = torch.randint(-1, VOCAB, (rows, 8), generator=generator)
    return Batch(ids, targets)


def test_equals_a_count_by_hand(model: GPT) -> None:
    batches = [random_batch(1), random_batch(2, rows=1)]
    nats, num_bytes, num_tokens = 0.0, 0, 0
    for inputs, targets in batches:
        log_probabilities = model(inputs).detach().log_softmax(-1).double()
        for row in range(inputs.size(0)):
            for position in range(8):
                target = int(targets[row, position])
                if target in (-1, 10, 11):
                    continue
                nats -= float(log_probabilities[row, position, target])
                num_bytes += int(TOKEN_BYTES[target])
                num_tokens += 1
    totals = sum_losses(model, batches, TOKEN_BYTES, World())
    assert (totals.num_bytes, totals.num_tokens) == (num_bytes, num_tokens)
    # 32 fp32 losses of about 3 nats: each is rounded at 2**-22.
    assert totals.nats == pytest.approx(nats, abs=1e-4)
    assert totals.bits_per_byte == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)
    assert totals.perplexity == pytest.approx(math.exp(nats / num_tokens), rel=1e-5)


def test_a_model_that_knows_nothing_needs_log2_of_the_vocabulary() -> None:
    model = GPT(GPTConfig(sequence_len=8, vocab_size=VOCAB, n_layer=1, n_head=2, n_embd=16))
    model.init_weights(torch.Generator().manual_seed(0))
    one_byte_targets = torch.zeros(2, 8, dtype=torch.int64)
    value = sum_losses(
        model, [Batch(one_byte_targets, one_byte_targets)], TOKEN_BYTES, World()
    ).bits_per_byte
    assert value == pytest.approx(math.log2(VOCAB), rel=1e-6)


def test_does_not_depend_on_the_batches(model: GPT) -> None:
    whole = random_batch(3, rows=6)
    parts = [Batch(whole.inputs[i : i + 2], whole.targets[i : i + 2]) for i in (0, 2, 4)]
    together = sum_losses(model, [whole], TOKEN_BYTES, World())
    apart = sum_losses(model, parts, TOKEN_BYTES, World())
    assert apart.nats == pytest.approx(together.nats, rel=1e-6)
    assert apart.num_bytes == together.num_bytes


def test_a_batch_the_device_has_no_room_for_is_taken_in_smaller_parts(
    model: GPT, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    batches = [random_batch(1, rows=5), random_batch(2, rows=5), random_batch(3, rows=1)]
    expected = sum_losses(model, batches, TOKEN_BYTES, World())
    hidden, rows = model.hidden, list[int]()

    def limited(tokens: Tensor) -> Tensor:
        rows.append(len(tokens))
        if len(tokens) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return hidden(tokens)

    monkeypatch.setattr(model, "hidden", limited)
    found = sum_losses(model, batches, TOKEN_BYTES, World())
    assert found.nats == pytest.approx(expected.nats, rel=1e-6)
    assert (found.num_bytes, found.num_tokens) == (expected.num_bytes, expected.num_tokens)
    assert rows == [5, 3, 2, 2, 1, 2, 2, 1, 1]  # found once, remembered for the next batch
    assert "out of memory with 5 rows a pass: going on with 3" in caplog.text
    assert caplog.text.count("out of memory with") == 2


def test_a_single_row_that_does_not_fit_says_what_to_lower(
    model: GPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tokens: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(model, "hidden", full)
    with pytest.raises(UserError, match=r"single row \(CUDA out of memory.*lower --max-seq-len"):
        sum_losses(model, [random_batch(1, rows=4)], TOKEN_BYTES, World())


@pytest.mark.parametrize("target", [-1, 10])
def test_nothing_to_predict_is_infinite(model: GPT, target: int) -> None:
    targets = torch.full((1, 8), target)
    totals = sum_losses(model, [Batch(targets.clamp_min(0), targets)], TOKEN_BYTES, World())
    assert totals == LossTotals(0.0, 0, 0)
    assert totals.bits_per_byte == totals.perplexity == math.inf


def test_leaves_the_model_in_its_mode(model: GPT) -> None:
    model.train()
    sum_losses(model, [random_batch(4)], TOKEN_BYTES, World())
    assert model.training
