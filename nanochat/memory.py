"""How much memory a training step takes on one device, estimated from sizes alone."""

from __future__ import annotations

import torch

from nanochat import fused_native
from nanochat.gpt import GPT
from nanochat.objectives import CHUNK_ROWS

# Numbers that a layer saves for its backward pass, per token and per feature of the width: counted
# with torch.autograd.graph.saved_tensors_hooks, 19 at 128 positions and 22 at 512.
SAVED_PER_LAYER = 22
SAVED_BY_KERNELS = 10  # the same where the compiled kernels train
SAVED_FOR_MIXES = 4  # by the mixes and value embeddings of `modern` beside them
SAVED_FOR_GATES = 8  # by a gated MLP
SAVED_OUTSIDE = 4  # the embedding, its norm, the final norm, and the gradient of the final states
COPIES_OF_A_CHUNK = 3  # of fp32 logits alive at once in the loss
_FP32_BYTES = 4


def estimate_memory(
    model: GPT,
    *,
    rows: int,
    compute_dtype: torch.dtype,
    world_size: int,
    shard: str = "optimizer",
    background_save: bool = False,
) -> dict[str, int]:
    """Bytes on each device by purpose. rows: of one forward and backward pass.

    shard: what ranks share out, as in `plan.Plan`. background_save: whether a copy of weights and
    states waits in memory until it is written; on a GPU it waits in that of the host.
    A tenth or two more is in use in practice: allocators round, kernels want scratch space.
    """
    counts, config = model.count_parameters(), model.config
    total, size = counts["total"], compute_dtype.itemsize
    is_full = shard == "full"
    weights = _FP32_BYTES * (-(-total // world_size) if is_full else total)
    optimizer = _FP32_BYTES * -(-_optimizer_states(model) // world_size)
    tokens = rows * config.sequence_len
    is_native = model.device.type == "cpu" and fused_native.trains(config, compute_dtype)
    per_layer = SAVED_PER_LAYER
    if is_native:
        per_layer = SAVED_BY_KERNELS + SAVED_FOR_MIXES * config.residual_scalars
        per_layer += SAVED_FOR_GATES * (config.mlp == "swiglu")
    saved = (per_layer * config.n_layer + SAVED_OUTSIDE) * config.n_embd * tokens * size
    # The embedding is not copied, being only looked up.
    copies = size * (counts["transformer_matrices"] + counts["lm_head"])
    if is_full:
        copies = size * total  # gathered for an evaluation; a step gathers block after block
    elif compute_dtype == torch.float32:
        copies = 0
    parts = {
        "weights": weights,
        "copies": copies,
        "gradients": weights,
        "optimizer": optimizer,
        "activations": saved,
        "loss": COPIES_OF_A_CHUNK * CHUNK_ROWS * config.vocab_size * _FP32_BYTES,
    }
    if background_save and not is_full and model.device.type == "cpu":
        parts["snapshot"] = weights + optimizer
    return parts


def checkpoint_bytes(model: GPT, *, shard: str) -> int:
    """Bytes of one checkpoint: weights and states, and with full shards the weights once more."""
    total = model.count_parameters()["total"]
    return _FP32_BYTES * ((2 if shard == "full" else 1) * total + _optimizer_states(model))


def _optimizer_states(model: GPT) -> int:
    """Numbers that all ranks keep together: AdamW two for each parameter, Muon one."""
    counts = model.count_parameters()
    return 2 * counts["total"] - counts["transformer_matrices"]


def format_bytes(size: int) -> str:
    """`12.3 MB` or `1.2 GB`, decimal."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
