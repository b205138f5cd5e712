"""karpathy/nanochat beside ours: its model, what it sees and how it is judged.

After `build`, what is imported from `nanochat` is the checkout's.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.devices import DeviceName
from nanochat.common import UserError

Batches = Callable[[int], Any]  # step index -> inputs and targets, (rows, length) int64 each


def build(checkout: str, device: DeviceName, *, depth: int, length: int, vocab_size: int) -> Any:
    """Its GPT on the device, of base_train's sizes, weights not drawn yet.

    Every layer sees the whole context, as in our classic model and as base_train recommends where
    FlashAttention 3 is missing. Computes in $NANOCHAT_DTYPE.
    """
    sys.path.insert(0, checkout)
    for name in [n for n in sys.modules if n == "nanochat" or n.startswith("nanochat.")]:
        del sys.modules[name]
    import torch

    from nanochat.gpt import GPT, GPTConfig

    if device == "cuda":
        from nanochat.common import compute_init  # type: ignore[attr-defined]

        compute_init(device)  # TF32 for what stays in fp32
    width = 64 * depth
    heads = -(-width // 128)
    sizes: dict[str, Any] = {"sequence_len": length, "vocab_size": vocab_size, "n_layer": depth}
    sizes |= {"n_head": heads, "n_kv_head": heads, "n_embd": width, "window_pattern": "L"}
    with torch.device("meta"):
        model = GPT(GPTConfig(**sizes))
    return model.to_empty(device=device)


def facts(device: DeviceName) -> dict[str, str]:
    """What the speed of the built model on a GPU depends on: the attention that it has found."""
    if device == "cpu":
        return {}
    from nanochat.flash_attention import USE_FA3  # type: ignore[import-not-found]

    return {"attention": "FlashAttention 3" if USE_FA3 else "PyTorch"}


def momentum(step: int, steps: int, warmdown: int) -> float:
    """Of its base_train: a rise over 400 steps, and a fall in the warmdown."""
    begin = steps - warmdown
    if step < 400:
        return 0.85 + 0.12 * step / 400
    if step < begin:
        return 0.97
    return 0.97 - 0.07 * (step - begin) / warmdown


def packed(rows: np.ndarray[Any, Any], num_rows: int) -> Batches:
    """The next `num_rows` of rows (N, length + 1) at each step, none of them twice."""

    def batch(index: int) -> Any:
        start = index * num_rows
        if start + num_rows > len(rows):
            raise UserError(
                f"the peer has seen all rows of {len(rows) // num_rows} steps; raise PEER_STEPS, "
                "so that it sees none twice while our side does not"
            )
        return _inputs_and_targets(rows[start : start + num_rows])

    return batch


def streamed(command: Sequence[str], num_rows: int, length: int) -> Batches:
    """The next rows that a process writes as uint16, at each call: no file holds a GPU's.

    The process ends with this one, which closes its pipe.
    """
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    stream, shape = process.stdout, (num_rows, length + 1)
    assert stream is not None
    num_bytes = math.prod(shape) * np.dtype(np.uint16).itemsize

    def batch(_: int) -> Any:
        data = stream.read(num_bytes)
        if len(data) < num_bytes:
            raise UserError(f"the process that makes the peer's rows ended with {process.wait()}")
        return _inputs_and_targets(np.frombuffer(data, np.uint16).reshape(shape))

    return batch


def _inputs_and_targets(rows: np.ndarray[Any, Any]) -> Any:
    import torch

    part = torch.from_numpy(rows.astype(np.int64))
    return part[:, :-1].contiguous(), part[:, 1:].contiguous()


def bits_per_byte(
    model: Any,
    tokens: np.ndarray[Any, Any],
    token_bytes: np.ndarray[Any, Any],
    device: DeviceName,
    *,
    num_rows: int,
    length: int,
) -> float:
    """Nats of the tokens behind the first over the bytes of those that stand for any.

    As many tokens as fill rows; token_bytes: (V,); num_rows: of a pass, at most.
    """
    import torch

    num_targets, nats, num_bytes = (len(tokens) - 1) // length * length, 0.0, 0
    shape = (math.gcd(num_rows, num_targets // length), length)
    sizes = torch.from_numpy(token_bytes).to(device)
    stream = torch.from_numpy(tokens.astype(np.int64)).to(device)
    for start in range(0, num_targets, math.prod(shape)):
        part = stream[start : start + math.prod(shape) + 1]
        inputs, targets = part[:-1].view(shape), part[1:].view(shape)
        with torch.no_grad():
            losses = model(inputs, targets, loss_reduction="none").view(-1)
        counted = sizes[targets.view(-1)]
        nats += float((losses * (counted > 0)).sum())
        num_bytes += int(counted.sum())
    return nats / (math.log(2.0) * num_bytes)
