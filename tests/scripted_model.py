"""A real GPT that has learned one chain of tokens by heart, and a checkpoint of it.

All blocks stay silent (their output projections are zero), so the model only looks at the last
token: its embedding is a direction of its own, and the head points from there to the successor.
"""

from __future__ import annotations

import functools
import itertools
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nanochat.checkpoint_writing import save_checkpoint
from nanochat.common import checkpoints_dir
from nanochat.gpt import GPT, GPTConfig
from nanochat.runtime import World
from nanochat.tokenizer import Tokenizer


@functools.cache
def byte_tokenizer() -> Tokenizer:
    """256 bytes and the special tokens."""
    return Tokenizer.train_from_iterator(["a"], 265, trained_on="embedded")


def tokens_of(*parts: str) -> list[int]:
    """Texts as bytes, `<|names|>` as special tokens."""
    tokenizer = byte_tokenizer()
    tokens: list[int] = []
    for part in parts:
        special = part in tokenizer.get_special_tokens()
        tokens += [tokenizer.encode_special(part)] if special else tokenizer.encode(part)
    return tokens


def scripted_model(chain: Sequence[int], *, sequence_len: int = 64) -> GPT:
    """Each token of `chain` is followed by the next one; no token may come twice."""
    assert len(set(chain)) == len(chain)
    vocab_size = byte_tokenizer().vocab_size
    width = 320  # at least the vocabulary, and a multiple of 2 heads of even size
    model = GPT(
        GPTConfig(
            sequence_len=sequence_len, vocab_size=vocab_size, n_layer=1, n_head=2, n_embd=width
        )
    )
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.transformer.wte.weight.copy_(torch.eye(vocab_size, width))
        # A normed state is sqrt(width) long: about 18 times this row, before the softcap.
        for token, successor in itertools.pairwise(chain):
            model.lm_head.weight[successor, token] = 3.0
    return model.eval()


def save(
    stage: str,
    model: GPT,
    *,
    tag: str = "d1",
    data: str = "embedded",
    tasks: str | None = None,
    optimizer: Mapping[str, torch.Tensor] | None = None,
    **facts: Any,
) -> Path:
    """Write a checkpoint of `model` below NANOCHAT_BASE_DIR. facts: more entries of its state."""
    with tempfile.TemporaryDirectory() as folder:
        byte_tokenizer().save(folder)
        return save_checkpoint(
            checkpoints_dir(stage) / tag,
            7,
            model=model.state_dict(),
            optimizer=optimizer,
            state={
                "stage": stage,
                "model_config": model.config.to_json(),
                "config": {"eval_tokens": 256},
                "data": data,
                "tasks": tasks,
                **facts,
            },
            extra=None,
            tokenizer_dir=Path(folder),
            world=World(),
        )
