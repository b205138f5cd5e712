"""A device that has no memory for many rows at once, as a graphics card may be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from nanochat.decoder import Chunk, Decoder
from nanochat.decoders import make_decoder
from nanochat.gpt import GPT

REASON = "CUDA out of memory. Tried to allocate 2.00 GiB"


class SmallDevice:
    """A decoder whose memory is enough for so many rows a step, and not for more."""

    def __init__(self, decoder: Decoder, most: int) -> None:
        self._decoder, self._most = decoder, most

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)

    def feed(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        if len(chunks) > self._most:
            raise torch.OutOfMemoryError(f"{REASON}\nmore")
        return self._decoder.feed(chunks)


def allow_rows(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Let every scheduler that is made from now on run on such a device."""
    monkeypatch.setattr(
        "nanochat.scheduler.make_decoder", lambda model: SmallDevice(make_decoder(model), most)
    )


def allow_prompts(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Let every model take so many prompts a pass, and not more, while it is evaluated."""
    hidden = GPT.hidden

    def limited(model: GPT, idx: torch.Tensor) -> torch.Tensor:
        if len(idx) > most and not model.training:
            raise torch.OutOfMemoryError(f"{REASON}\nmore")
        return hidden(model, idx)

    monkeypatch.setattr(GPT, "hidden", limited)
