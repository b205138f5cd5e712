"""Train on real text for equal time, beside karpathy/nanochat's model and optimizer.

    python -m benchmarks.bench_train --data=FOLDER --peer=CHECKOUT --seconds=165 --seeds=1,2,3
    python -m benchmarks.bench_train --data=FOLDER --ours="--preset=modern; --matrix_lr=0.03"
    python -m benchmarks.bench_train --data=FOLDER --peer=CHECKOUT --device=cuda --depth=12 \
        --seconds=300

Each run is a process of its own, and the sides take turns: with every seed all of them train once.
A side sees rows of the same tokenizer (16 x 512 tokens a step, vocabulary 8,192, depth 4, if
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

With `--device=cuda` both sides train on one NVIDIA GPU: ours with `--compile=auto`, which compiles
there. The clock waits for the GPU before and after each step. The peer's rows are made while it
trains, by a process of our loader; on a CPU they are laid out before. Lines say the utilisation,
too: the model's FLOPs over those of the best matmul that the same process made in the same dtype.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import numpy as np

from benchmarks import devices, peer
from benchmarks.devices import DeviceName
from nanochat import configurator
from nanochat.common import UserError

ROWS, LENGTH, EVAL_TOKENS = 16, 512, 131_072
PEER_STEPS = 1200  # of rows laid out for the peer, which must see none twice while ours does not
WARM_UP_PASSES = 2  # before the clock starts: they compile
ENDLESS = 1_000_000_000  # steps, of a horizon that no speed is known for yet
SEPARATOR = ";"  # between variants
PEER = "peer"
FEED = "rows"  # what a process is for that makes the peer's rows while it trains
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
    device: DeviceName = "cpu"
    """What both sides train on: cpu, or cuda for one NVIDIA GPU."""
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
    rows: int = ROWS
    """Rows of a step of both sides."""
    length: int = LENGTH
    """Context of both sides, in tokens."""
    vocab_size: int = 8192
    """Vocabulary of both sides."""
    threads: int = 0
    """Threads of each run; 0 = one for each core."""
    clock: Literal["wall", "cpu"] = "wall"
    """What `--seconds` counts; cpu: of all threads together."""
    average: float = 0.0
    """Judge our side by a running average of weights that keeps this share a step; 0 = off."""
    dropout: float = 0.0
    """Share of what attention and MLPs add that our side drops while it trains; 0 = off."""
    work: str = "bench_train"
    """Folder for tokens, tokenizer and checkpoints."""
    side: str = ""
    """Internal: what this process measures, our flags or the peer's dtype and packing."""


def main(config: Config) -> int:
    """Prepare the data once, then let the sides take turns."""
    _check(config)
    work = Path(config.work).absolute() / f"vocabulary_{config.vocab_size}"
    work.mkdir(parents=True, exist_ok=True)
    if config.side:
        measures = {PEER: _measure_peer, FEED: _feed}
        measures.get(config.side.split()[0], _measure_ours)(config, work)
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


def _check(config: Config) -> None:
    """UserError for what cannot be measured, or not equally for both sides."""
    devices.check(config.device)
    if config.device == "cuda" and config.clock == "cpu":
        raise UserError("--clock=cpu does not see what a GPU does; use --clock=wall")
    if config.peer is None:
        return
    if config.device == "cpu" and config.steps > PEER_STEPS:
        raise UserError(
            f"--steps is {config.steps}, and the peer has rows for {PEER_STEPS}; raise PEER_STEPS"
        )
    if EVAL_TOKENS % config.length:
        raise UserError(
            f"--length is {config.length}; the peer is judged on whole rows, so it must divide "
            f"{EVAL_TOKENS:,}"
        )


# ---- running ----------------------------------------------------------------------------------


def prepare(config: Config, work: Path) -> None:
    """Train the tokenizer and lay out validation tokens and, on a CPU, the peer's rows, once.

    All of it again where an earlier run has laid out fewer rows, others, or not of every packing.
    """
    packings = config.peer_packings.split(",")
    for packing in packings:
        if packing not in PACKINGS:
            raise UserError(f"--peer_packings names {packing!r}; there are {', '.join(PACKINGS)}")
    files = {_rows_file(work, p): p for p in packings} if config.device == "cpu" else {}
    if (work / "val.npy").exists() and all(_are_enough(file, config) for file in files):
        return
    environment = os.environ | {"NANOCHAT_BASE_DIR": str(work / "base")}
    flags = [f"--data={config.data}", f"--vocab_size={config.vocab_size}"]
    _run([sys.executable, "-m", "scripts.tok_train", *flags], environment)
    from nanochat.dataset import open_source
    from nanochat.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_directory(work / "base" / "tokenizer")
    np.save(work / "token_bytes.npy", tokenizer.token_bytes)
    documents = open_source(config.data).documents("val", endless=False)
    parts = [tokenizer.encode_batch(texts, prepend=tokenizer.bos_id)[0] for texts, _ in documents]
    np.save(work / "val.npy", np.concatenate(parts))
    for file, packing in files.items():
        with contextlib.closing(_steps_of_rows(config, work, packing)) as steps:
            np.save(file, np.concatenate(list(itertools.islice(steps, PEER_STEPS))))


def _rows_file(work: Path, packing: str) -> Path:
    return work / f"train_rows_{packing}.npy"


def _are_enough(file: Path, config: Config) -> bool:
    """Whether all rows that the peer may ask for are there, of its length."""
    if not file.exists():
        return False
    num_rows, width = np.load(file, mmap_mode="r").shape
    return bool(num_rows >= PEER_STEPS * config.rows and width == config.length + 1)


def _steps_of_rows(
    config: Config, work: Path, packing: str
) -> Generator[np.ndarray[Any, Any], None, None]:
    """What our loader makes of the training text for the peer: (rows, length + 1) uint16 a step."""
    from nanochat.dataloader import DocumentLoader
    from nanochat.dataset import open_source
    from nanochat.runtime import World
    from nanochat.tokenizer import Tokenizer

    loader = DocumentLoader(
        open_source(config.data),
        Tokenizer.from_directory(work / "base" / "tokenizer"),
        rows_per_step=config.rows,
        sequence_len=config.length,
        world=World(),
        packing=packing,  # type: ignore[arg-type]
    )
    try:
        for batch in loader:
            last = batch.targets[:, -1:]
            yield np.concatenate([batch.inputs, last], axis=1).astype(np.uint16)
    finally:
        loader.close()


def measured(config: Config, side: str, seed: int) -> dict[str, Any]:
    """Train one side once, in a process of its own; its JSON line."""
    work = Path(config.work).absolute() / f"vocabulary_{config.vocab_size}"
    root = str(Path(__file__).absolute().parents[1])
    environment = os.environ | devices.environment(config.device)
    environment |= {"PYTHONPATH": root, "NANOCHAT_BASE_DIR": str(work / "base")}
    if config.threads:
        environment["OMP_NUM_THREADS"] = str(config.threads)
    if side.startswith(PEER):
        environment["NANOCHAT_DTYPE"] = side.split()[1]
    output = _run(_command(config, side, seed), environment)
    row: dict[str, Any] = json.loads(output.splitlines()[-1])
    return row


def _command(config: Config, side: str, seed: int) -> list[str]:
    """What a process of one side is started with."""
    own = dataclasses.replace(config, side=side, seeds=str(seed), ours="")
    flags = [f"--{name}={value}" for name, value in vars(own).items() if value not in (None, "")]
    return [sys.executable, str(Path(__file__).absolute()), *flags]


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

    def __init__(
        self,
        seconds: float,
        steps: int,
        kind: Literal["wall", "cpu"] = "wall",
        device: DeviceName = "cpu",
    ) -> None:
        """Stop after `steps`, or if that is 0 when `seconds` of stepping are over."""
        self._budget, self._steps = seconds, steps
        self._now = partial(devices.now, device, kind)
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


def _tell(
    config: Config, clock: Clock, tokens: int, bpb: float, *, flops: float, dtype: Any, **facts: str
) -> None:
    """Print the line of a run.

    flops: of a token; dtype: of the matmuls; facts: what else the line says.
    """
    is_gpu = config.device == "cuda"
    # Rounded as in all records of CPUs: there a MB is 1,000 KiB.
    memory = devices.peak_memory(config.device) / (1e6 if is_gpu else 1.024e6)
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
        "peak_mb": round(memory),
        "device": devices.name(config.device),
        **facts,
    }
    if is_gpu:  # a CPU may be shared with other runs of `ablate`, beside which no peak is reached
        peak = devices.matmul_peak(config.device, dtype)
        values["mfu"] = round(tokens / clock.seconds * flops / peak, 3)
        values["peak_gflops"] = round(peak / 1e9)
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
        f"--device_type={config.device}",
        f"--max_seq_len={config.length}",
        f"--device_batch_size={config.rows}",
        f"--total_batch_size={config.rows * config.length}",
        f"--eval_tokens={EVAL_TOKENS}",
        "--eval_every=-1",
        "--core_metric_every=-1",
        "--sample_every=-1",
        f"--compile={'off' if config.device == 'cpu' else 'auto'}",
        "--log_every=50",
        f"--seed={config.seeds}",
        *shlex.split(config.side.removeprefix("ours")),
        f"--model_tag={tag}",
        f"--num_iterations={config.steps or ENDLESS}",
    ]

    class Timed(Trainer):
        """Follows the clock, and looks at the validation text once, at its end."""

        def run(self) -> Any:
            if config.device == "cpu":
                keep_freed_memory()
            position = self.loader.state_dict()
            _drop(self.model, config.dropout)  # compiled passes never see later hooks
            for _ in range(WARM_UP_PASSES):
                self.accumulate_gradients()
                self.optimizer.zero_grad()
            self.loader.load_state_dict(position)
            devices.spare_the_collector(config.device)
            clock = Clock(config.seconds, config.steps, config.clock, config.device)
            schedule = self.plan.schedule
            average = _Average(self.model, config.average)
            while not clock.is_over:
                now = dataclasses.replace(schedule, num_iterations=clock.horizon)
                self.plan = dataclasses.replace(self.plan, schedule=now, write=False)
                clock.time(self._step)
                average.update()
            average.put_in_place()
            (validation,) = [hook for hook in self.hooks if hook.name == "validation"]
            bpb = validation.action(self)["val_bpb"]
            _tell(
                config,
                clock,
                self.state.tokens,
                bpb,
                flops=self.model.estimate_flops(),
                dtype=self.runtime.compute_dtype,
            )
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


def _drop(model: Any, share: float) -> None:
    """Dropout behind the attention and MLP of every block (arXiv:1706.03762, section 5.4)."""
    from torch.nn.functional import dropout

    for part in (part for block in model.blocks for part in (block.attn, block.mlp) if share):
        part.register_forward_hook(lambda part, _, out: dropout(out, share, part.training))


# ---- the peer ---------------------------------------------------------------------------------


def _measure_peer(config: Config, work: Path) -> None:
    """The peer's model, optimizer and schedules of its base_train, learning rates unscaled."""
    assert config.peer is not None
    import torch

    model = peer.build(
        config.peer,
        config.device,
        depth=config.depth,
        length=config.length,
        vocab_size=config.vocab_size,
    )
    torch.manual_seed(int(config.seeds))
    model.init_weights()
    optimizer = model.setup_optimizer(
        unembedding_lr=0.008, embedding_lr=0.3, scalar_lr=0.5, matrix_lr=0.02, weight_decay=0.28
    )
    compiled: Any = torch.compile(model, dynamic=False)
    _, dtype, packing = config.side.split()
    if config.device == "cpu":
        rows = peer.packed(np.load(_rows_file(work, packing)), config.rows)
    else:
        feed = _command(config, f"{FEED} {packing}", int(config.seeds))
        rows = peer.streamed(feed, config.rows, config.length)
    clock = Clock(config.seconds, config.steps, config.clock, config.device)

    def step() -> None:
        index, steps = clock.step, clock.horizon
        inputs, targets = (part.to(config.device) for part in rows(index))
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
                group["momentum"] = peer.momentum(index, steps, warmdown)
                group["weight_decay"] = 0.28 * 0.5 * (1 + np.cos(np.pi * index / steps))
        optimizer.step()
        model.zero_grad(set_to_none=True)

    for _ in range(WARM_UP_PASSES):
        step()
    torch.manual_seed(int(config.seeds))
    model.init_weights()
    optimizer.state.clear()
    devices.spare_the_collector(config.device)
    while not clock.is_over:
        clock.time(step)
    bpb = peer.bits_per_byte(
        compiled,
        np.load(work / "val.npy")[: EVAL_TOKENS + 1],
        np.load(work / "token_bytes.npy"),
        config.device,
        num_rows=config.rows,
        length=config.length,
    )
    _tell(
        config,
        clock,
        clock.step * config.rows * config.length,
        bpb,
        flops=model.estimate_flops(),
        dtype=getattr(torch, dtype),
        **peer.facts(config.device),
    )


def _feed(config: Config, work: Path) -> None:
    """Write the peer's rows to standard output for as long as someone reads them."""
    for rows in _steps_of_rows(config, work, config.side.split()[1]):
        sys.stdout.buffer.write(rows.tobytes())


if __name__ == "__main__":
    configurator.run(main, Config)
