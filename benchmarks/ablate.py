"""What each choice of a training run is worth: equal time, several seeds, one table.

    python -m benchmarks.ablate --data=FOLDER --seconds=165 --seeds=1,2,3
    python -m benchmarks.ablate --data=FOLDER --depths=6 --only=presets,batch

Runs `bench_train` for every variant of VARIANTS at every depth: the first one is what the others
are compared with. `--jobs` runs go on at once, each with `--threads`; on a machine with two cores
two single threads share the memory bus, and so does what they are compared with. Prints a JSON
line a run, and a table a depth.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import bench_train
from nanochat import configurator
from nanochat.common import UserError

BASELINE = "baseline"
# Modern without its scaling of learning rates, which is made for far larger batches.
_MODERN = "--preset=modern --embedding_lr=0.3 --unembedding_lr=0.008 --matrix_lr=0.02"
_MODERN += " --scalar_lr=0.5 --warmup_steps=10"
_COMMON = "--warmdown_ratio=0.5"

# Group -> name -> flags of base_train, behind those that all variants have.
VARIANTS: dict[str, dict[str, str]] = {
    BASELINE: {"classic": ""},
    "presets": {"modern": _MODERN, "portable": "--preset=portable"},
    "packing": {"best-fit": "--packing=best-fit"},
    "rates": {
        "matrices x0.5": "--matrix_lr=0.01",
        "matrices x2": "--matrix_lr=0.04",
        "tables x0.5": "--embedding_lr=0.1 --unembedding_lr=0.002",
        "tables x2": "--embedding_lr=0.4 --unembedding_lr=0.008",
    },
    "batch": {
        "4,096 tokens": "--total_batch_size=4096 --device_batch_size=8",
        "16,384 tokens": "--total_batch_size=16384",
    },
    "window": {"SSSL": "--window_pattern=SSSL"},
    "shift": {"token shift 0.5": "--token_shift=0.5"},
    "values": {"value embeddings": "--value_embeddings"},
    "vocabulary": {"4,096 ids": "", "16,384 ids": ""},
}
_VOCABULARIES = {"4,096 ids": 4096, "16,384 ids": 16_384}


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
    work: str = "bench_train"
    """Folder for tokens, tokenizers and checkpoints."""


@dataclass(frozen=True)
class Variant:
    """One line of the table."""

    name: str
    flags: str
    vocab_size: int


def main(config: Config) -> int:
    """Run all variants of a seed before the next one, so that no variant has the best hour."""
    variants = chosen(config.only)
    common = {
        name: getattr(config, name) for name in ("data", "seconds", "steps", "threads", "work")
    }
    for depth in (int(depth) for depth in config.depths.split(",")):
        benches = {
            variant: bench_train.Config(**common, depth=depth, vocab_size=variant.vocab_size)
            for variant in variants
        }
        for bench in benches.values():
            work = Path(bench.work).absolute() / f"vocabulary_{bench.vocab_size}"
            work.mkdir(parents=True, exist_ok=True)
            bench_train.prepare(bench, work)
        runs = [(variant, int(seed)) for seed in config.seeds.split(",") for variant in variants]

        def run(item: tuple[Variant, int], benches: Any = benches) -> dict[str, Any]:
            variant, seed = item
            row = bench_train.measured(benches[variant], f"ours {_COMMON} {variant.flags}", seed)
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
        Variant(name, flags, _VOCABULARIES.get(name, bench_train.Config.vocab_size))
        for group in dict.fromkeys([BASELINE, *groups])
        for name, flags in VARIANTS[group].items()
    ]


if __name__ == "__main__":
    configurator.run(main, Config)
