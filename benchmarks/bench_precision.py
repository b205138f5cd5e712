"""What bf16 and int8 weights cost in bits per byte, with the decoder that chats.

    python -m benchmarks.bench_precision --source=base

Reads validation text token by token, many rows a step, and judges each next token. Prints one JSON
line.
"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass
from typing import Literal

import torch

from nanochat import checkpoint_manager, configurator, kernels
from nanochat.common import UserError
from nanochat.compiled_decoder import CompiledDecoder
from nanochat.dataset import open_source
from nanochat.decoder import Chunk


@dataclass(frozen=True)
class Config:
    """Flags of bench_precision."""

    source: Literal["base", "mid", "sft", "rl"] = "base"
    """Stage of the model."""
    rows: int = 64
    """Documents."""
    length: int = 256
    """Most tokens of each."""


def main(config: Config) -> int:
    """Measure each precision on the same text."""
    if kernels.load() is None:
        raise UserError("no compiled decoder here; see nanochat/kernels/README.md")
    device = torch.device("cpu")
    model, tokenizer, checkpoint = checkpoint_manager.load_model(
        config.source, device=device, dtype=torch.float32
    )
    documents = itertools.chain.from_iterable(
        texts for texts, _ in open_source(checkpoint.state["data"]).documents("val", endless=False)
    )
    length = min(config.length, model.config.sequence_len)
    rows = [
        tokenizer.encode(text, prepend=tokenizer.bos_id)[:length]
        for text in itertools.islice(documents, config.rows)
    ]
    num_bytes = sum(int(tokenizer.token_bytes[token]) for row in rows for token in row[1:])
    result: dict[str, object] = {"benchmark": "precision", "stage": config.source}
    result |= {"tokens": sum(map(len, rows)), "bytes": num_bytes}
    for weights in ("float32", "bfloat16", "int8"):
        decoder = CompiledDecoder(model, weights=weights)
        result[f"{weights}_bpb"] = round(_nats(decoder, rows) / math.log(2) / num_bytes, 5)
        result[f"{weights}_bytes"] = decoder.num_weight_bytes
    print(json.dumps(result))
    return 0


def _nats(decoder: CompiledDecoder, rows: list[list[int]]) -> float:
    """Summed loss of every token after the first of each row."""
    places = [decoder.open(len(row)) for row in rows]
    total = 0.0
    for position in range(max(map(len, rows)) - 1):
        live = [i for i, row in enumerate(rows) if len(row) > position + 1]
        logits = decoder.feed([Chunk(places[i], position, [rows[i][position]]) for i in live])
        targets = torch.tensor([rows[i][position + 1] for i in live])
        total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
    for place in places:
        decoder.close(place)
    return total


if __name__ == "__main__":
    configurator.run(main, Config)
