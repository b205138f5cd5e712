"""Time CORE beside the plain implementation that scores one sequence at a time.

    python -m benchmarks.bench_core --bundle=FOLDER

With the newest base checkpoint of $NANOCHAT_BASE_DIR, task by task. The fast side decides `--group`
items together, drawn at random from the whole task, as an evaluation does. The plain one would take
hours for the bundle, so it decides a sample of those: sorted by their tokens and cut into equal
parts, one item from each. What the whole bundle takes is each side's time an item times the items
of the task, and tokens are counted in the same way: those that the plain side reads, and those that
are left when what the options of an item share is read once. Time is given by the clock, for a
quiet machine, and as CPU seconds of all threads, for a busy one (set OMP_NUM_THREADS=1 there).

The plain side computes in float32, the fast one in `--dtype`, with float32 for what that leaves
open. Prints one JSON line: the speed-up, the decisions that differ (none may), and those of all
groups that `--dtype` alone would have changed. Exit code 1 if any differs.
"""

from __future__ import annotations

import itertools
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
from nanochat.core_bundle import load_bundle
from nanochat.core_eval import ITEMS_PER_GROUP
from nanochat.core_scoring import GptModel, count_tokens, decide

REFERENCE = Path(__file__).parents[1] / "tests"


@dataclass(frozen=True)
class Config:
    """Flags of bench_core."""

    bundle: str
    """Folder with core.yaml."""
    max_per_task: int = 16
    """Items of each task that the plain side decides too."""
    group: int = ITEMS_PER_GROUP
    """Items of each task that the fast side decides, together."""
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
        draw = random.Random(config.seed)
        group = sorted(draw.sample(range(len(items)), min(config.group, len(items))))
        tokens = [count_tokens(evaluated, tokenizer, task, items, [index]) for index in group]
        chosen = _sample([plain for plain, _ in tokens], config.max_per_task, draw)
        decide(evaluated, tokenizer, task, items, group[:1])  # warm up
        with _Clock() as fast_time:
            fast = decide(evaluated, tokenizer, task, items, group)
        with _Clock() as plain_time:
            plain = [
                reference.is_right(
                    model, tokenizer, described[task.label], items, group[i], model.cos.size(0)
                )
                for i in chosen
            ]
        row: dict[str, Any] = {
            "of": len(items),
            "group": len(group),
            "items": len(chosen),
            "tokens_an_item": {
                "plain": sum(plain for plain, _ in tokens) / len(group),
                "fast": sum(fast for _, fast in tokens) / len(group),
            },
            "ms_an_item": {
                "plain": plain_time.ms(len(chosen)),
                "fast": fast_time.ms(len(group)),
            },
            "right": sum(fast),
            "different": sum(fast[i] != right for i, right in zip(chosen, plain, strict=True)),
        }
        if alone is not None:
            changed = decide(alone, tokenizer, task, items, group)
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
        "decisions_of_groups": sum(row["group"] for row in rows.values()),
        "different": sum(row["different"] for row in rows.values()),
    }
    if alone is not None:
        total[f"changed_by_{config.dtype}_alone"] = sum(row["changed"] for row in rows.values())
    print(json.dumps(total | {"tasks": rows}))
    return int(total["different"] > 0)


class _Clock:
    """How long a block takes, by the clock and in CPU seconds of all threads."""

    def __enter__(self) -> _Clock:
        self._began = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *error: object) -> None:
        wall, cpu = self._began
        self.wall, self.cpu = time.perf_counter() - wall, time.process_time() - cpu

    def ms(self, num_items: int) -> dict[str, float]:
        """Milliseconds an item of so many."""
        return {
            "wall": round(1000 * self.wall / num_items, 3),
            "cpu": round(1000 * self.cpu / num_items, 3),
        }


def _sample(sizes: Sequence[int], count: int, draw: random.Random) -> list[int]:
    """Places of one thing from each of `count` equally large parts of the things by size."""
    order = sorted(range(len(sizes)), key=sizes.__getitem__)
    count = min(count, len(order))
    borders = [part * len(order) // count for part in range(count + 1)]
    return [order[draw.randrange(a, b)] for a, b in itertools.pairwise(borders)]


def _whole_bundle(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Every task's numbers an item times its items."""

    def whole(side: str, name: str, kind: str | None = None) -> float:
        each = (row[name][side] for row in rows.values())
        values = (value if kind is None else value[kind] for value in each)
        return sum(value * row["of"] for value, row in zip(values, rows.values(), strict=True))

    sides = ("plain", "fast")
    tokens = {side: whole(side, "tokens_an_item") / 1e6 for side in sides}
    hours = {
        kind: {side: whole(side, "ms_an_item", kind) / 3.6e6 for side in sides}
        for kind in ("wall", "cpu")
    }
    return {
        "whole_bundle_hours": {
            kind: {side: round(value, 3) for side, value in both.items()}
            for kind, both in hours.items()
        },
        "whole_bundle_million_tokens": {side: round(value, 1) for side, value in tokens.items()},
        "fewer_tokens": round(tokens["plain"] / tokens["fast"], 2),
        "speedup": {kind: round(both["plain"] / both["fast"], 2) for kind, both in hours.items()},
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
