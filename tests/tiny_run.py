"""A trainer of a tiny model on seeded rows, for tests of the loop."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanochat.checkpoint_manager import Checkpoint, newest_checkpoint
from nanochat.dataloader import Batch
from nanochat.gpt import GPT, GPTConfig
from nanochat.optimizers import OptimizerConfig
from nanochat.plan import Plan
from nanochat.runtime import Runtime, World
from nanochat.schedule import Schedule
from nanochat.stopping import StopRequest
from nanochat.tracking import MetricWriter, read_metrics
from nanochat.training import Hook, Trainer

SIZES = GPTConfig(sequence_len=32, vocab_size=50, n_layer=2, n_head=2, n_embd=32)
ROWS = 4


class SeededLoader:
    """Rows that depend on the step alone; every third target of odd rows is ignored."""

    def __init__(self, world: World) -> None:
        self.world, self.position = world, 0

    def next_step(self) -> Batch:
        rng = np.random.default_rng(self.position)
        rows = rng.integers(0, SIZES.vocab_size, (ROWS, SIZES.sequence_len + 1))
        targets = rows[:, 1:].copy()
        targets[1::2, ::3] = -1
        self.position += 1
        own = slice(self.world.rank, None, self.world.size)
        return Batch(
            torch.from_numpy(rows[own, :-1]).contiguous(),
            torch.from_numpy(targets[own]).contiguous(),
            int((targets >= 0).sum()),
        )

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "buffer": np.arange(self.position)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        assert len(state["buffer"]) == state["position"]
        self.position = int(state["position"])

    @property
    def progress(self) -> float:
        return self.position / 100


def make_trainer(
    folder: Path,
    runtime: Runtime,
    *,
    steps: int = 6,
    micro_batch_rows: int = ROWS,
    hooks: list[Hook] | None = None,
    save_every: int = 0,
    stop: StopRequest | None = None,
    **plan: Any,
) -> Trainer:
    """A tiny model, always from the same seed. plan: what `Plan` has besides."""
    model = GPT(SIZES)
    model.init_weights(torch.Generator().manual_seed(5))
    tokenizer_dir = folder / "tokenizer"
    tokenizer_dir.mkdir(parents=True, exist_ok=True)
    (tokenizer_dir / "tokenizer.json").write_text("{}")
    (tokenizer_dir / "token_bytes.npy").write_bytes(b"")
    return Trainer(
        model,
        SeededLoader(runtime.world),
        plan=Plan(
            Schedule(steps, warmdown_ratio=0.5),
            micro_batch_rows=micro_batch_rows,
            grad_clip=1.0,
            save_every=save_every,
            **{"keep_last": 2, "log_every": 2} | plan,
        ),
        optimizer=OptimizerConfig(embedding_lr=0.02, matrix_lr=0.01),
        runtime=runtime,
        run_dir=folder / "run",
        tokenizer_dir=tokenizer_dir,
        facts={"stage": "base"},
        metrics=MetricWriter(folder / "run" / "metrics.jsonl") if runtime.world.is_main else None,
        hooks=hooks or [],
        stop=stop,
    )


def newest(folder: Path) -> Checkpoint:
    """The newest checkpoint of a trainer made in `folder`."""
    checkpoint = newest_checkpoint(folder / "run")
    assert checkpoint is not None
    return checkpoint


def losses(folder: Path) -> dict[int, float]:
    """The loss of each step of a trainer made in `folder`."""
    rows = read_metrics(folder / "run" / "metrics.jsonl")
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def go_on(folder: Path, runtime: Runtime, **changes: Any) -> Trainer:
    """A trainer that goes on from the newest checkpoint."""
    trainer = make_trainer(folder, runtime, **changes)
    trainer.resume(newest(folder))
    return trainer
