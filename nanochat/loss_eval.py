"""Bits per byte: how well a model predicts text, whatever its tokenizer.

Loss per token flatters large vocabularies, whose tokens cover more text. Bits per byte divides
the information of all predicted tokens by the UTF-8 bytes they stand for.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nanochat.common import UserError
from nanochat.dataloader import evaluation_batches
from nanochat.dataset import DocumentSource, Split
from nanochat.gpt import GPT
from nanochat.objectives import IGNORED, token_losses_in_passes
from nanochat.runtime import World
from nanochat.tokenizer import Tokenizer


class TargetBatch(Protocol):
    """Rows to predict; `nanochat.dataloader.Batch` is one."""

    inputs: Tensor
    """(B, T) int64."""
    targets: Tensor
    """(B, T) int64, -1 where there is nothing to predict."""


@dataclass(frozen=True)
class LossTotals:
    """Sums over all tokens that stand for bytes, over all batches and ranks."""

    nats: float
    num_bytes: int
    num_tokens: int

    @property
    def bits_per_byte(self) -> float:
        """Nats / (ln 2 x bytes); infinite when there was no byte to predict."""
        if self.num_bytes == 0:
            return math.inf
        return self.nats / (math.log(2) * self.num_bytes)

    def bits_per_byte_of_guessing(self, vocab_size: int) -> float:
        """What a model would have for which all tokens are alike; infinite without any byte."""
        if self.num_bytes == 0:
            return math.inf
        return math.log2(vocab_size) * self.num_tokens / self.num_bytes

    @property
    def perplexity(self) -> float:
        """Of one token: depends on the tokenizer, unlike bits per byte."""
        if self.num_tokens == 0:
            return math.inf
        # A bound rather than an OverflowError: far above any vocabulary.
        return math.exp(min(self.nats / self.num_tokens, 700.0))


@torch.inference_mode()
def sum_losses(
    model: GPT, batches: Iterable[TargetBatch], token_bytes: Tensor, world: World
) -> LossTotals:
    """Add up the losses of the targets that stand for bytes.

    token_bytes: (V,) bytes of each token, 0 for special tokens, which count neither as loss nor
    as bytes. Each rank brings its own batches, which may be of different number; all ranks get
    the same totals.
    """
    token_bytes = token_bytes.to(model.device)
    was_training = model.training
    model.eval()  # no module of ours minds; dropout, of a benchmark or a fork, does
    nats, num_bytes, num_tokens = 0.0, 0, 0
    rows = sys.maxsize  # of a pass
    for batch in batches:
        targets = batch.targets.to(model.device)
        bytes_of = torch.where(targets >= 0, token_bytes[targets.clamp_min(0)], 0)
        counted = torch.where(bytes_of > 0, targets, IGNORED)
        losses, rows = token_losses_in_passes(
            model, batch.inputs.to(model.device), counted, rows=rows, rank=world.rank
        )
        # Sums of one batch are small enough for fp32; Python's floats add them up in double.
        nats += float(losses.sum())
        num_bytes += int(bytes_of.sum())
        num_tokens += int((bytes_of > 0).sum())
    model.train(was_training)
    return LossTotals(
        nats=world.sum(nats),
        num_bytes=int(world.sum(num_bytes)),
        num_tokens=int(world.sum(num_tokens)),
    )


def evaluate_split(
    model: GPT,
    tokenizer: Tokenizer,
    source: DocumentSource,
    split: Split,
    *,
    num_tokens: int,
    batch_size: int,
    world: World,
) -> LossTotals:
    """Losses over the first `num_tokens` tokens of a split, in rows of the model's context."""
    if num_tokens < 1 or batch_size < 1:
        raise UserError(
            f"{num_tokens} tokens in batches of {batch_size} rows leave nothing to evaluate; "
            "give positive --split-tokens and --device-batch-size"
        )
    batches = evaluation_batches(
        source,
        tokenizer,
        num_tokens=num_tokens,
        batch_size=batch_size,
        sequence_len=model.config.sequence_len,
        world=world,
        split=split,
    )
    return sum_losses(model, batches, torch.from_numpy(tokenizer.token_bytes), world)
