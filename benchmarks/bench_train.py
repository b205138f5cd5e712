"""Train on real text for equal time, beside karpathy/nanochat's model and optimizer.

    python -m benchmarks.bench_train --data=FOLDER --peer=CHECKOUT --seconds=165 --seeds=1,2,3
    python -m benchmarks.bench_train --data=FOLDER --ours="--preset=modern; --matrix_lr=0.03"

Each run is a process of its own, and the sides take turns: with every seed all of them train once.
A side sees rows of the same tokenizer (16 x 512 tokens a step, vocabulary 8,192, depth 4, if its
flags say nothing else) and is judged by bits per byte on the first 131,072 tokens of the
validation shard. The peer is a checkout of its repository outside this one, compiled; it sees rows
that begin with documents, fitted as its own loader does (our best-fit packing), or with
`--peer_packings` others of ours as well.

All train for `--seconds` of stepping: start-up, compiling (two passes before the clock starts) and
evaluation do not count. How many steps that makes shows on the way, so schedules follow the clock:
the horizon of a step is the number of steps that the run will have made at the speed so far.
`--steps` fixes their number instead, which makes runs repeatable to the bit. `--clock=cpu` counts
the processor time of the process, which other processes hardly change: for runs of one thread that
go on beside others. Prints one JSON line a run, and a table at the end.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import numpy as np

from nanochat import configurator
from nanochat.common import UserError

ROWS, LENGTH, EVAL_TOKENS = 16, 512, 131_072
PEER_STEPS = 1200  # of rows laid out for the peer, which must see none twice while ours does not
WARM_UP_PASSES = 2  # before the clock starts: they compile
ENDLESS = 1_000_000_000  # steps, of a horizon that no speed is known for yet
SEPARATOR = ";"  # between variants
PEER = "peer"
PACKINGS = ("stream", "shuffled", "best-fit")  # of pretraining's rows


@dataclass(frozen=True)
class Config:
    """Flags of bench_train."""

    data: str
    """Folder of parquet shards, the last one for validation."""
    ours: str = ""
    """Flags of base_train for our side; several variants are joined with semicolons."""
    peer: str | None = None
    """Checkout of karpathy/nanochat; leave out to measure this project alone."""
    peer_dtypes: str = "bfloat16"
    """Compute dtypes of the peer, joined with commas."""
    peer_packings: str = "best-fit"
    """Packings of the peer's rows, joined with commas."""
    seconds: float = 165.0
    """Time of stepping."""
    steps: int = 0
    """Steps of every run, instead of a time."""
    seeds: str = "1"
    """Seeds, joined with commas."""
    depth: int = 4
    """Depth of both sides."""
    vocab_size: int = 8192
    """Vocabulary of both sides."""
    threads: int = 0
    """Threads of each run; 0 = one for each core."""
    clock: Literal["wall", "cpu"] = "wall"
    """What `--seconds` counts; cpu: of all threads together."""
    average: float = 0.0
    """Judge our side by a running average of weights that keeps this share a step; 0 = off."""
    work: str = "bench_train"
    """Folder for tokens, tokenizer and checkpoints."""
    side: str = ""
    """Internal: what this process measures, our flags or the peer's dtype and packing."""


def main(config: Config) -> int:
    """Prepare the data once, then let the sides take turns."""
    if config.peer is not None and config.steps > PEER_STEPS:
        raise UserError(
            f"--steps is {config.steps}, and the peer has rows for {PEER_STEPS}; raise PEER_STEPS"
        )
    work = Path(config.work).absolute() / f"vocabulary_{config.vocab_size}"
    work.mkdir(parents=True, exist_ok=True)
    if config.side:
        measure = _measure_peer if config.side.startswith(PEER) else _measure_ours
        measure(config, work)
        return 0
    prepare(config, work)
    sides = [f"ours {flags.strip()}" for flags in config.ours.split(SEPARATOR)]
    if config.peer is not None:
        sides += [
            f"{PEER} {dtype} {packing}"
            for dtype in config.peer_dtypes.split(",")
            for packing in config.peer_packings.split(",")
        ]
    rows = []
    for turn, seed in enumerate(config.seeds.split(",")):
        # Every other turn backwards, so that a machine that slows down treats all alike.
        for side in sides if turn % 2 == 0 else sides[::-1]:
            row = measured(config, side, int(seed))
            print(json.dumps(row), flush=True)
            rows.append(row)
    print(table(rows), flush=True)
    return 0


# ---- running ----------------------------------------------------------------------------------


def prepare(config: Config, work: Path) -> None:
    """Train the tokenizer and lay out the peer's rows and validation tokens, once.

    All of it again where an earlier PEER_STEPS has laid out fewer rows, or not of every packing.
    """
    packings = config.peer_packings.split(",")
    for packing in packings:
        if packing not in PACKINGS:
            raise UserError(f"--peer_packings names {packing!r}; there are {', '.join(PACKINGS)}")
    if all(_are_enough(_rows_file(work, packing)) for packing in packings):
        return
    environment = os.environ | {"NANOCHAT_BASE_DIR": str(work / "base")}
    flags = [f"--data={config.data}", f"--vocab_size={config.vocab_size}"]
    _run([sys.executable, "-m", "scripts.tok_train", *flags], environment)
    from nanochat.dataloader import DocumentLoader
    from nanochat.dataset import open_source
    from nanochat.runtime import World
    from nanochat.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_directory(work / "base" / "tokenizer")
    source = open_source(config.data)
    np.save(work / "token_bytes.npy", tokenizer.token_bytes)
    documents = source.documents("val", endless=False)
    parts = [tokenizer.encode_batch(texts, prepend=tokenizer.bos_id)[0] for texts, _ in documents]
    np.save(work / "val.npy", np.concatenate(parts))
    for packing in packings:
        loader = DocumentLoader(
            source,
            tokenizer,
            rows_per_step=ROWS,
            sequence_len=LENGTH,
            world=World(),
            packing=packing,  # type: ignore[arg-type]
        )
        steps = []
        for _ in range(PEER_STEPS):
            batch = loader.next_step()
            last = batch.targets[:, -1:]
            steps.append(np.concatenate([batch.inputs, last], axis=1).astype(np.uint16))
        loader.close()
        np.save(_rows_file(work, packing), np.concatenate(steps))


def _rows_file(work: Path, packing: str) -> Path:
    return work / f"train_rows_{packing}.npy"


def _are_enough(rows: Path) -> bool:
    return rows.exists() and len(np.load(rows, mmap_mode="r")) >= PEER_STEPS * ROWS


def measured(config: Config, side: str, seed: int) -> dict[str, Any]:
    """Train one side once, in a process of its own; its JSON line."""
    own = dataclasses.replace(config, side=side, seeds=str(seed), ours="")
    flags = [f"--{name}={value}" for name, value in vars(own).items() if value not in (None, "")]
    work = Path(config.work).absolute() / f"vocabulary_{config.vocab_size}"
    root = str(Path(__file__).absolute().parents[1])
    environment = os.environ | {"PYTHONPATH": root, "NANOCHAT_BASE_DIR": str(work / "base")}
    if config.threads:
        environment["OMP_NUM_THREADS"] = str(config.threads)
    if side.startswith(PEER):
        environment["NANOCHAT_DTYPE"] = side.split()[1]
    output = _run([sys.executable, str(Path(__file__).absolute()), *flags], environment)
    row: dict[str, Any] = json.loads(output.splitlines()[-1])
    return row


def _run(command: Sequence[str], environment: dict[str, str]) -> str:
    """Standard output of a command that must not fail."""
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        shown = shlex.join(command)
        raise UserError(f"{shown} ended with {result.returncode}: {result.stderr[-2000:]}")
    return result.stdout


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line for each side, mean and standard deviation over seeds, best first."""
    sides: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        sides.setdefault(row["side"], []).append(row)
    lines = [
        "| side | val bpb | +- | seeds | steps | seconds | tokens/s | memory, MB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for side, own in sorted(sides.items(), key=lambda item: _mean(item[1], "val_bpb")):
        bpb = [row["val_bpb"] for row in own]
        spread = f"{statistics.stdev(bpb):.4f}" if len(bpb) > 1 else ""
        lines.append(
            f"| {side} | {statistics.fmean(bpb):.4f} | {spread} | {len(own)} "
            f"| {_mean(own, 'steps'):,.0f} | {_mean(own, 'seconds'):.1f} "
            f"| {_mean(own, 'tokens_per_second'):,.0f} | {_mean(own, 'peak_mb'):,.0f} |"
        )
    return "\n".join(lines)


def _mean(rows: Sequence[dict[str, Any]], name: str) -> float:
    return statistics.fmean(float(row[name]) for row in rows)


class Clock:
    """Seconds of stepping, and what they say about the length of the run."""

    def __init__(self, seconds: float, steps: int, kind: str = "wall") -> None:
        """Stop after `steps`, or if that is 0 when `seconds` of stepping are over."""
        self._budget, self._steps = seconds, steps
        self._now = time.process_time if kind == "cpu" else time.perf_counter
        self.seconds, self.step = 0.0, 0

    @property
    def is_over(self) -> bool:
        """Whether the run has had its time."""
        return self.step >= self._steps if self._steps else self.seconds >= self._budget

    @property
    def horizon(self) -> int:
        """Steps of the whole run, at the average speed so far."""
        if self._steps:
            return self._steps
        if not self.step:
            return ENDLESS
        return max(self.step + 1, round(self.step * self._budget / self.seconds))

    def time(self, step: Callable[[], None]) -> None:
        """Make one step."""
        started = self._now()
        step()
        self.seconds += self._now() - started
        self.step += 1


def _tell(config: Config, clock: Clock, tokens: int, bpb: float) -> None:
    values = {
        "benchmark": "train",
        "side": config.side,
        "seed": int(config.seeds),
        "depth": config.depth,
        "vocab_size": config.vocab_size,
        "steps": clock.step,
        "tokens": tokens,
        "seconds": round(clock.seconds, 1),
        "tokens_per_second": round(tokens / clock.seconds),
        "val_bpb": round(bpb, 4),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000),
    }
    print(json.dumps(values), flush=True)


# ---- our side ---------------------------------------------------------------------------------


def _measure_ours(config: Config, work: Path) -> None:
    """The real command, whose trainer is told by a clock when to end."""
    from nanochat import stage
    from nanochat.common import setup_logging
    from nanochat.runtime import keep_freed_memory
    from nanochat.training import Trainer
    from scripts import base_train

    setup_logging()
    tag = f"bench-{os.getpid()}"
    flags = [
        f"--data={config.data}",
        f"--depth={config.depth}",
        f"--max_seq_len={LENGTH}",
        f"--device_batch_size={ROWS}",
        f"--total_batch_size={ROWS * LENGTH}",
        f"--eval_tokens={EVAL_TOKENS}",
        "--eval_every=-1",
        "--core_metric_every=-1",
        "--sample_every=-1",
        "--compile=off",
        "--log_every=50",
        f"--seed={config.seeds}",
        *shlex.split(config.side.removeprefix("ours")),
        f"--model_tag={tag}",
        f"--num_iterations={config.steps or ENDLESS}",
    ]

    class Timed(Trainer):
        """Follows the clock, and looks at the validation text once, at its end."""

        def run(self) -> Any:
            keep_freed_memory()
            position = self.loader.state_dict()
            for _ in range(WARM_UP_PASSES):
                self.accumulate_gradients()
                self.optimizer.zero_grad()
            self.loader.load_state_dict(position)
            clock, schedule = Clock(config.seconds, config.steps, config.clock), self.plan.schedule
            average = _Average(self.model, config.average)
            while not clock.is_over:
                now = dataclasses.replace(schedule, num_iterations=clock.horizon)
                self.plan = dataclasses.replace(self.plan, schedule=now, write=False)
                clock.time(self._step)
                average.update()
            average.put_in_place()
            (validation,) = [hook for hook in self.hooks if hook.name == "validation"]
            bpb = validation.action(self)["val_bpb"]
            _tell(config, clock, self.state.tokens, bpb)
            return self.state

    try:
        with mock.patch.object(stage, "Trainer", Timed):
            base_train.main(configurator.parse(base_train.Config, flags))
    finally:
        shutil.rmtree(work / "base" / "base_checkpoints" / tag, ignore_errors=True)


class _Average:
    """A running average of a model's weights, its start corrected for as in Adam."""

    def __init__(self, model: Any, share: float) -> None:
        self._weights = list(model.parameters()) if share else []
        self._sums = [weight.detach().clone().zero_() for weight in self._weights]
        self._share, self._total = share, 0.0

    def update(self) -> None:
        for own, weight in zip(self._sums, self._weights, strict=True):
            own.lerp_(weight.detach(), 1.0 - self._share)
        self._total += (1.0 - self._share) * (1.0 - self._total)

    def put_in_place(self) -> None:
        for own, weight in zip(self._sums, self._weights, strict=True):
            weight.detach().copy_(own / self._total)


# ---- the peer ---------------------------------------------------------------------------------


def _measure_peer(config: Config, work: Path) -> None:
    """The peer's model, optimizer and schedules of its base_train, learning rates unscaled."""
    assert config.peer is not None
    sys.path.insert(0, config.peer)
    for name in [n for n in sys.modules if n == "nanochat" or n.startswith("nanochat.")]:
        del sys.modules[name]
    import torch

    from nanochat.gpt import GPT, GPTConfig  # type: ignore[assignment]

    width = 64 * config.depth
    heads = -(-width // 128)
    sizes: dict[str, Any] = {"sequence_len": LENGTH, "vocab_size": config.vocab_size}
    sizes |= {"n_layer": config.depth, "n_embd": width, "window_pattern": "L"}
    with torch.device("meta"):
        model = GPT(GPTConfig(**sizes, n_head=heads, n_kv_head=heads))
    model.to_empty(device="cpu")
    torch.manual_seed(int(config.seeds))
    model.init_weights()
    optimizer = model.setup_optimizer(  # type: ignore[operator]
        unembedding_lr=0.008, embedding_lr=0.3, scalar_lr=0.5, matrix_lr=0.02, weight_decay=0.28
    )
    compiled = torch.compile(model, dynamic=False)
    rows = _packed(np.load(_rows_file(work, config.side.split()[2])))
    clock = Clock(config.seconds, config.steps, config.clock)

    def step() -> None:
        index, steps = clock.step, clock.horizon
        inputs, targets = rows(index)
        compiled(inputs, targets).backward()
        warmup, warmdown = 40, round(0.65 * steps)
        if index < warmup:
            multiplier = (index + 1) / warmup
        elif index <= steps - warmdown:
            multiplier = 1.0
        else:
            left = (steps - index) / warmdown
            multiplier = left + (1 - left) * 0.05
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * multiplier
            if group["kind"] == "muon":
                group["momentum"] = _peer_momentum(index, steps, warmdown)
                group["weight_decay"] = 0.28 * 0.5 * (1 + np.cos(np.pi * index / steps))
        optimizer.step()
        model.zero_grad(set_to_none=True)

    for _ in range(WARM_UP_PASSES):
        step()
    torch.manual_seed(int(config.seeds))
    model.init_weights()
    optimizer.state.clear()
    while not clock.is_over:
        clock.time(step)
    bpb = _peer_bits_per_byte(compiled, work)
    _tell(config, clock, clock.step * ROWS * LENGTH, bpb)


def _peer_momentum(step: int, steps: int, warmdown: int) -> float:
    """Of its base_train: a rise over 400 steps, and a fall in the warmdown."""
    begin = steps - warmdown
    if step < 400:
        return 0.85 + 0.12 * step / 400
    if step < begin:
        return 0.97
    return 0.97 - 0.07 * (step - begin) / warmdown


def _packed(rows: np.ndarray[Any, Any]) -> Any:
    """Step index -> inputs and targets of the next 16 rows of (rows, 513), none of them twice."""
    import torch

    def batch(index: int) -> tuple[torch.Tensor, torch.Tensor]:
        start = index * ROWS
        if start + ROWS > len(rows):
            raise UserError(
                f"the peer has seen all rows of {len(rows) // ROWS} steps; raise PEER_STEPS, so "
                "that it sees none twice while our side does not"
            )
        part = torch.from_numpy(rows[start : start + ROWS].astype(np.int64))
        return part[:, :-1].contiguous(), part[:, 1:].contiguous()

    return batch


def _rows(tokens: np.ndarray[Any, Any]) -> Any:
    """Step index -> inputs and targets of 16 rows cut from the stream."""
    import torch

    per_step = ROWS * LENGTH

    def batch(index: int) -> tuple[torch.Tensor, torch.Tensor]:
        start = index * per_step % (len(tokens) - per_step - 1)
        part = torch.from_numpy(tokens[start : start + per_step + 1].astype(np.int64))
        return part[:-1].view(ROWS, LENGTH), part[1:].view(ROWS, LENGTH)

    return batch


def _peer_bits_per_byte(model: Any, work: Path) -> float:
    """Nats of the first 131,072 validation targets over the bytes of those that have any."""
    import torch

    token_bytes = torch.from_numpy(np.load(work / "token_bytes.npy"))
    batch, nats, num_bytes = _rows(np.load(work / "val.npy")), 0.0, 0
    for index in range(EVAL_TOKENS // (ROWS * LENGTH)):
        inputs, targets = batch(index)
        with torch.no_grad():
            losses = model(inputs, targets, loss_reduction="none").view(-1)
        sizes = token_bytes[targets.view(-1)]
        nats += float((losses * (sizes > 0)).sum())
        num_bytes += int(sizes.sum())
    return nats / (np.log(2.0) * num_bytes)


if __name__ == "__main__":
    configurator.run(main, Config)
