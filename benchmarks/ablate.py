"""What each choice of a training run is worth: equal time, several seeds, a table a depth.

    python -m benchmarks.ablate --data=FOLDER --seconds=165 --seeds=1,2,3
    python -m benchmarks.ablate --data=FOLDER --depths=6 --only=presets,batch

Runs `bench_train` for every variant of VARIANTS at every depth: the first one is what the others
are compared with. `--jobs` runs go on at once, each with `--threads`; on a machine with two cores
two single threads share the memory bus, and so does what they are compared with. Time is processor
time unless `--clock=wall`, so that what else goes on there matters little. Prints a JSON line a
run, and the tables.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks import bench_train
from nanochat import configurator
from nanochat.common import UserError

BASELINE = "baseline"
# What bench_train measures against the peer: each variant changes one thing of it.
RECIPE = "--token_shift=1 --value_embeddings --total_batch_size=8192 --device_batch_size=16"
RECIPE += " --packing=shuffled --embedding_lr=0.4 --unembedding_lr=0.008"
RECIPE += " --warmdown_ratio=0.7 --final_lr_frac=0"
# Modern without its scaling of learning rates, which is made for far larger batches.
_MODERN = "--preset=modern --embedding_lr=0.3 --unembedding_lr=0.008 --matrix_lr=0.02"
_MODERN += " --scalar_lr=0.5 --warmup_steps=10"

# Group -> name -> flags of base_train, behind those of the recipe.
VARIANTS: dict[str, dict[str, str]] = {
    BASELINE: {"recipe": ""},
    "presets": {
        "classic as it is": "--token_shift=0 --no-value_embeddings",
        "modern": f"{_MODERN} --token_shift=0",
        "portable (SwiGLU)": "--preset=portable",
    },
    "packing": {
        "rows cut from the stream": "--packing=stream",
        "best-fit rows": "--packing=best-fit",
    },
    "rates": {
        "matrices x0.5": "--matrix_lr=0.01",
        "matrices x2": "--matrix_lr=0.04",
        "tables x0.5": "--embedding_lr=0.2 --unembedding_lr=0.004",
        "tables x2": "--embedding_lr=0.8 --unembedding_lr=0.016",
    },
    "batch": {
        "4,096 tokens": "--total_batch_size=4096 --device_batch_size=8",
        "16,384 tokens": "--total_batch_size=16384",
    },
    "heads": {"heads of 64": "--head_dim=64"},
    "window": {"SSSL": "--window_pattern=SSSL"},
    "shift": {"no token shift": "--token_shift=0", "token shift of 0.5": "--token_shift=0.5"},
    "values": {"no value embeddings": "--no-value_embeddings"},
    "vocabulary": {"4,096 ids": "", "16,384 ids": ""},
    "average": {"average of 0.98": ""},
    "dropout": {"dropout of 0.1": "", "dropout of 0.2": ""},
}
_VOCABULARIES = {"4,096 ids": 4096, "16,384 ids": 16_384}
_AVERAGES = {"average of 0.98": 0.98}
_DROPOUTS = {"dropout of 0.1": 0.1, "dropout of 0.2": 0.2}


@dataclass(frozen=True)
class Config:
    """Flags of ablate."""

    data: str
    """Folder of parquet shards, the last one for validation."""
    only: str = ""
    """Groups to run besides the baseline, joined with commas; default: all."""
    seconds: float = 165.0
    """Time of stepping of each run."""
    steps: int = 0
    """Steps of each run, instead of a time."""
    seeds: str = "1,2,3"
    """Seeds, joined with commas."""
    depths: str = "4,6"
    """Depths, joined with commas."""
    jobs: int = 2
    """Runs at once."""
    threads: int = 1
    """Threads of each run."""
    clock: Literal["wall", "cpu"] = "cpu"
    """What `--seconds` counts."""
    work: str = "bench_train"
    """Folder for tokens, tokenizers and checkpoints."""


@dataclass(frozen=True)
class Variant:
    """One line of the table."""

    name: str
    flags: str
    vocab_size: int
    average: float
    dropout: float


def main(config: Config) -> int:
    """Run all variants of a seed before the next one, so that no variant has the best hour."""
    variants = chosen(config.only)
    names = ("data", "seconds", "steps", "threads", "clock", "work")
    common = {name: getattr(config, name) for name in names}
    for depth in (int(depth) for depth in config.depths.split(",")):
        benches = {
            variant: bench_train.Config(
                **common,
                depth=depth,
                vocab_size=variant.vocab_size,
                average=variant.average,
                dropout=variant.dropout,
            )
            for variant in variants
        }
        for bench in benches.values():
            work = Path(bench.work).absolute() / f"vocabulary_{bench.vocab_size}"
            work.mkdir(parents=True, exist_ok=True)
            bench_train.prepare(bench, work)
        runs = [(variant, int(seed)) for seed in config.seeds.split(",") for variant in variants]

        def run(item: tuple[Variant, int], benches: Any = benches) -> dict[str, Any]:
            variant, seed = item
            row = bench_train.measured(benches[variant], f"ours {RECIPE} {variant.flags}", seed)
            row |= {"benchmark": "ablate", "flags": row["side"], "side": variant.name}
            print(json.dumps(row), flush=True)
            return row

        with ThreadPoolExecutor(config.jobs) as pool:
            rows = list(pool.map(run, runs))
        print(f"\nDepth {depth}:\n\n{bench_train.table(rows)}\n", flush=True)
    return 0


def chosen(only: str) -> list[Variant]:
    """The baseline and the variants of the named groups; UserError for an unknown one."""
    groups = only.split(",") if only else [name for name in VARIANTS if name != BASELINE]
    unknown = [name for name in groups if name not in VARIANTS]
    if unknown:
        raise UserError(f"--only names {unknown[0]!r}; there are {', '.join(VARIANTS)}")
    return [
        Variant(
            name,
            flags,
            _VOCABULARIES.get(name, bench_train.Config.vocab_size),
            _AVERAGES.get(name, 0.0),
            _DROPOUTS.get(name, 0.0),
        )
        for group in dict.fromkeys([BASELINE, *groups])
        for name, flags in VARIANTS[group].items()
    ]


if __name__ == "__main__":
    configurator.run(main, Config)
