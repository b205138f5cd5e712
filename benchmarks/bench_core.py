"""Time CORE beside the plain implementation that scores one sequence at a time.

    python -m benchmarks.bench_core --bundle=FOLDER

Both sides decide the same items, drawn at random from the whole of every task, with the newest base
checkpoint of $NANOCHAT_BASE_DIR; the sides take turns, task by task. Time is the process's own (CPU
seconds of all threads), so that a busy machine can be used; set OMP_NUM_THREADS=1 there. What the
whole bundle takes is each task's time an item times its number of items, and the tokens are counted
in the same way: those the plain side reads, and those that are left when what the options of an
item share is read once. The plain side computes in float32, the fast one in `--dtype`, with float32
for what that leaves open. Prints one JSON line: the speed-up, the decisions that differ (none may),
and those that `--dtype` alone would have changed. Exit code 1 if any differs.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanochat import checkpoint_manager, configurator
from nanochat.core_bundle import CoreTask, Item, load_bundle
from nanochat.core_scoring import GptModel, count_tokens, decide

REFERENCE = Path(__file__).parents[1] / "tests"


@dataclass(frozen=True)
class Config:
    """Flags of bench_core."""

    bundle: str
    """Folder with core.yaml."""
    max_per_task: int = 40
    """Items of each task that both sides decide."""
    tasks: str = ""
    """Labels joined with commas; default: all."""
    dtype: str = "bfloat16"
    """Compute dtype of the fast side: bfloat16 or float32."""
    untrained: bool = False
    """Random weights in the shape of the checkpoint."""
    seed: int = 0
    """Which items are drawn."""


def main(config: Config) -> int:
    sys.path.insert(0, str(REFERENCE))
    from reference import core_eval as reference

    model, tokenizer, checkpoint = _load("float32", config.untrained)
    evaluated, alone = GptModel(model), None
    if config.dtype != "float32":
        alone = GptModel(_load(config.dtype, config.untrained)[0])
        evaluated = GptModel(alone.model, exact=evaluated)
    bundle = Path(config.bundle)
    described = reference.read_tasks(bundle)
    wanted = config.tasks.split(",") if config.tasks else list(described)
    rows: dict[str, dict[str, Any]] = {}
    for task in load_bundle(bundle):
        if not task.path.exists() or task.label not in wanted:
            continue
        items = task.items()
        drawn = random.Random(config.seed).sample(range(len(items)), len(items))
        indices = sorted(drawn[: config.max_per_task])
        decide(evaluated, tokenizer, task, items, indices[:1])  # warm up
        started = time.process_time()
        fast = decide(evaluated, tokenizer, task, items, indices)
        middle = time.process_time()
        plain = [
            reference.is_right(
                model, tokenizer, described[task.label], items, index, model.cos.size(0)
            )
            for index in indices
        ]
        ended = time.process_time()
        row: dict[str, Any] = _counts(evaluated, tokenizer, task, items, indices) | {
            "plain_seconds": round(ended - middle, 3),
            "fast_seconds": round(middle - started, 3),
            "speedup": round((ended - middle) / (middle - started), 2),
            "right": sum(fast),
            "different": sum(a != b for a, b in zip(fast, plain, strict=True)),
        }
        if alone is not None:
            changed = decide(alone, tokenizer, task, items, indices)
            row["changed"] = sum(a != b for a, b in zip(fast, changed, strict=True))
        rows[task.label] = row
        print(task.label, row, file=sys.stderr, flush=True)
    total = {
        "benchmark": "core",
        "model": f"{checkpoint.tag}, step {checkpoint.step}{', untrained' * config.untrained}",
        "dtype": config.dtype,
        "threads": torch.get_num_threads(),
        **_whole_bundle(rows),
        "decisions": sum(row["items"] for row in rows.values()),
        "different": sum(row["different"] for row in rows.values()),
    }
    if alone is not None:
        total[f"changed_by_{config.dtype}_alone"] = sum(row["changed"] for row in rows.values())
    print(json.dumps(total | {"tasks": rows}))
    return int(total["different"] > 0)


def _whole_bundle(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Every task's numbers times its items a drawn item."""

    def whole(name: str) -> float:
        return sum(float(row[name]) * int(row["of"]) / int(row["items"]) for row in rows.values())

    return {
        "whole_bundle_hours": {
            "plain": round(whole("plain_seconds") / 3600, 3),
            "fast": round(whole("fast_seconds") / 3600, 3),
        },
        "whole_bundle_million_tokens": {
            "plain": round(whole("plain_tokens") / 1e6, 1),
            "fast": round(whole("fast_tokens") / 1e6, 1),
        },
        "fewer_tokens": round(whole("plain_tokens") / whole("fast_tokens"), 2),
        "speedup": round(whole("plain_seconds") / whole("fast_seconds"), 2),
    }


def _counts(
    model: GptModel, tokenizer: Any, task: CoreTask, items: Sequence[Item], indices: Sequence[int]
) -> dict[str, int]:
    plain, fast = count_tokens(model, tokenizer, task, items, indices)
    return {
        "items": len(indices),
        "of": len(items),
        "plain_tokens": plain,
        "fast_tokens": fast,
    }


def _load(dtype: str, untrained: bool) -> tuple[Any, Any, Any]:
    model, tokenizer, checkpoint = checkpoint_manager.load_model(
        "base", device=torch.device("cpu"), dtype=getattr(torch, dtype)
    )
    if untrained:
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.05, generator=generator)
    return model, tokenizer, checkpoint


if __name__ == "__main__":
    configurator.run(main, Config)
