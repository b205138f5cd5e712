"""Time CORE beside the plain implementation that scores one sequence at a time.

    python -m benchmarks.bench_core --bundle=FOLDER

Both sides decide the same first items of every task, with the newest base checkpoint of
$NANOCHAT_BASE_DIR, alternating task by task; a task's items are as many as fill `--task-tokens`
tokens for the plain side. Time is the process's own (CPU seconds of all threads), so that a busy
machine can be used; set OMP_NUM_THREADS=1 there. The time for the whole bundle is each task's
time an item times its number of items. Prints one JSON line: the speed-up, the decisions that
differ (none may, in fp32), and the decisions that change from float32 to `--other-dtype`.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanochat import checkpoint_manager, configurator
from nanochat.core_bundle import CoreTask, load_bundle
from nanochat.core_scoring import GptModel, _sequences, decide

REFERENCE = Path(__file__).parents[1] / "tests"


@dataclass(frozen=True)
class Config:
    """Flags of bench_core."""

    bundle: str
    """Folder with core.yaml."""
    task_tokens: int = 16_000
    """Tokens that the plain side reads for each task."""
    dtype: str = "float32"
    """Compute dtype of both sides."""
    other_dtype: str = ""
    """A second dtype for the fast side; counts the decisions it changes."""
    untrained: bool = False
    """Random weights in the shape of the checkpoint."""


def main(config: Config) -> None:
    sys.path.insert(0, str(REFERENCE))
    from reference import core_eval as reference

    model, tokenizer, checkpoint = _load(config.dtype, config.untrained)
    other = _load(config.other_dtype, config.untrained)[0] if config.other_dtype else None
    bundle = Path(config.bundle)
    described = reference.read_tasks(bundle)
    rows: dict[str, dict[str, Any]] = {}
    for task in load_bundle(bundle):
        if not task.path.exists():
            continue
        items = task.items()
        indices = range(_num_items(config, tokenizer, task, items, model.cos.size(0)))
        decide(GptModel(model), tokenizer, task, items, indices[:1])  # warm up
        started = time.process_time()
        fast = decide(GptModel(model), tokenizer, task, items, indices)
        middle = time.process_time()
        plain = [
            reference.is_right(
                model, tokenizer, described[task.label], items, index, model.cos.size(0)
            )
            for index in indices
        ]
        ended = time.process_time()
        rows[task.label] = {
            "items": len(indices),
            "of": len(items),
            "plain_seconds": round(ended - middle, 3),
            "fast_seconds": round(middle - started, 3),
            "different": sum(a != b for a, b in zip(fast, plain, strict=True)),
        }
        if other is not None:
            changed = decide(GptModel(other), tokenizer, task, items, indices)
            rows[task.label]["changed"] = sum(a != b for a, b in zip(fast, changed, strict=True))
        print(task.label, rows[task.label], file=sys.stderr, flush=True)
    hours = {
        side: sum(row[f"{side}_seconds"] * row["of"] / row["items"] for row in rows.values()) / 3600
        for side in ("plain", "fast")
    }
    total = {
        "benchmark": "core",
        "model": f"{checkpoint.tag}, step {checkpoint.step}",
        "dtype": config.dtype,
        "threads": torch.get_num_threads(),
        "whole_bundle_hours": {side: round(value, 3) for side, value in hours.items()},
        "speedup": round(hours["plain"] / hours["fast"], 2),
        "decisions": sum(row["items"] for row in rows.values()),
        "different": sum(row["different"] for row in rows.values()),
        "tasks": rows,
    }
    if other is not None:
        total["changed_by_" + config.other_dtype] = sum(row["changed"] for row in rows.values())
    print(json.dumps(total))


def _load(dtype: str, untrained: bool) -> tuple[Any, Any, Any]:
    model, tokenizer, checkpoint = checkpoint_manager.load_model(
        "base", device=torch.device("cpu"), dtype=getattr(torch, dtype)
    )
    if untrained:
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.05, generator=generator)
    return model, tokenizer, checkpoint


def _num_items(
    config: Config, tokenizer: Any, task: CoreTask, items: list[Any], max_length: int
) -> int:
    probe = _sequences(tokenizer, task, items, range(3), max_length=max_length)
    tokens = sum(len(sequence.ids) for item in probe for sequence in item) / len(probe)
    return min(max(int(config.task_tokens / tokens), 2), len(items), 256)


if __name__ == "__main__":
    configurator.run(main, Config)
