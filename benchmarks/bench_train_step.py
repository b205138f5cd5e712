"""Time one training step and its parts, beside karpathy/nanochat's step, in one run.

    python -m benchmarks.bench_train_step --data=FOLDER --peer=CHECKOUT
    python -m benchmarks.bench_train_step --data=FOLDER --peer=CHECKOUT --device=cuda --depth=12 \
        --rows=16 --length=2048

Two shapes: depth 4, vocabulary 8,192, 16 x 512 tokens a step; and the seed documents' vocabulary
65,536, 1 x 1,024; or the one of `--rows`, `--length` and `--vocab_size`. Each side is a process of
its own, and they take turns: a few steps of one, then of the next, so that whatever else the
machine does meets all alike. Ours reads text through its real loader, the peer gets rows that are
tokenized already. Prints one JSON line a side and shape: tokens a second (median of the turns),
utilisation of a matmul's peak measured between the turns, peak memory, seconds of the first step
with nothing compiled yet, and of each part.

With `--device=cuda` all sides lie in the memory of one NVIDIA GPU at once. Clocks wait for it. To
time a part is to wait after it, so parts are timed in further steps, which tokens a second leave
out. The side "ours int8" multiplies in 8-bit integers (`base_train --int8`), whose peak is higher
than that of bf16, which utilisation is said of.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import devices, peer
from benchmarks.devices import DeviceName
from nanochat import configurator
from nanochat.common import UserError

SHAPES = {"16x512": (8192, 16, 512), "1x1024": (65_536, 1, 1024)}  # vocabulary, rows, length
PARTS = ("loader", "forward", "head+loss", "backward", "optimizer")
# On a GPU our Trainer compiles, and both projects compute in bfloat16.
SIDES = {
    "cpu": "ours,ours compiled,peer float32,peer bfloat16",
    "cuda": "ours compiled,peer bfloat16",
}
_OURS = ("ours", "ours compiled", "ours int8")


@dataclass(frozen=True)
class Config:
    """Flags of bench_train_step."""

    data: str
    """Folder of parquet shards, JSONL or text."""
    peer: str | None = None
    """Checkout of karpathy/nanochat; leave out to measure this project alone."""
    device: DeviceName = "cpu"
    """What all sides run on: cpu, or cuda for one NVIDIA GPU."""
    depth: int = 4
    """Depth of all sides."""
    shapes: str = ",".join(SHAPES)
    """Which shapes, joined with commas."""
    rows: int = 0
    """Rows of a step: with --length, the one shape to measure instead of --shapes."""
    length: int = 0
    """Context in tokens, with --rows."""
    vocab_size: int = 65_536
    """Vocabulary, with --rows."""
    sides: str | None = None
    """Who takes part, joined with commas; default: "ours,ours compiled,peer float32,peer bfloat16",
    on a GPU "ours compiled,peer bfloat16"."""
    preset: str = "classic"
    """Our model: classic, modern or portable."""
    turns: int = 5
    """Turns of each side."""
    steps: int = 5
    """Steps of a turn."""
    work: str = "bench_train_step"
    """Folder for tokenizers and tokens."""
    side: str = ""
    """Internal: which side this process is."""


def main(config: Config) -> None:
    """Prepare the data, then let the sides take turns, one shape after the other."""
    devices.check(config.device)
    work = Path(config.work).absolute()
    work.mkdir(parents=True, exist_ok=True)
    if config.side:
        serve = _serve_ours if config.side.startswith("ours") else _serve_peer
        serve(config, work)
        return
    chosen = (config.sides or SIDES[config.device]).split(",")
    for side in chosen:
        if side not in _OURS and not side.startswith("peer "):
            known = ", ".join((*_OURS, "peer float32", "peer bfloat16"))
            raise UserError(f"--sides names {side!r}; there are {known}")
    sides = [side for side in chosen if config.peer or not side.startswith("peer")]
    for vocabulary, rows, length in _chosen_shapes(config):
        _prepare(config, work, vocabulary)
        shaped = replace(config, vocab_size=vocabulary, rows=rows, length=length)
        _compare(shaped, sides, work)


def _chosen_shapes(config: Config) -> list[tuple[int, int, int]]:
    """Vocabulary, rows and length of each shape to measure."""
    if config.rows > 0 and config.length > 0:
        return [(config.vocab_size, config.rows, config.length)]
    if config.rows or config.length:
        raise UserError(
            f"--rows is {config.rows} and --length {config.length}; give both, or --shapes instead"
        )
    names = config.shapes.split(",")
    for name in names:
        if name not in SHAPES:
            raise UserError(f"--shapes names {name!r}; there are {', '.join(SHAPES)}")
    return [SHAPES[name] for name in names]


def _base(work: Path, vocabulary: int) -> Path:
    return work / f"vocabulary_{vocabulary}"


def _prepare(config: Config, work: Path, vocabulary: int) -> None:
    """A tokenizer of this size, and tokens for the peer."""
    base = _base(work, vocabulary)
    if (base / "tokens.npy").exists():
        return
    os.environ["NANOCHAT_BASE_DIR"] = str(base)
    command = [sys.executable, "-m", "scripts.tok_train", f"--data={config.data}"]
    subprocess.run([*command, f"--vocab_size={vocabulary}"], check=True, stdout=sys.stderr)
    from nanochat.dataset import open_source
    from nanochat.tokenizer import get_tokenizer

    tokenizer, parts, count = get_tokenizer(), [], 0
    for texts, _ in open_source(config.data).documents("train", endless=False):
        parts.append(tokenizer.encode_batch(texts, prepend=tokenizer.bos_id)[0])
        count += len(parts[-1])
        if count > 4_000_000:  # more than any number of turns reads twice
            break
    np.save(base / "tokens.npy", np.concatenate(parts))


class _Side:
    """A process that makes steps when asked."""

    def __init__(self, config: Config, name: str, work: Path) -> None:
        self.name = name
        root = str(Path(__file__).absolute().parents[1])
        environment = (
            os.environ
            | devices.environment(config.device)
            | {
                "PYTHONPATH": root,
                "NANOCHAT_BASE_DIR": str(_base(work, config.vocab_size)),
                "BENCH_PEER_CHECKOUT": config.peer or "",
                # An empty cache of its own: the first step is a cold one.
                "TORCHINDUCTOR_CACHE_DIR": tempfile.mkdtemp(prefix="bench_", dir=work),
            }
        )
        if name.startswith("peer"):
            environment["NANOCHAT_DTYPE"] = name.split()[1]
        passed = ("data", "device", "depth", "rows", "length", "vocab_size", "preset")
        arguments = [f"--{flag}={getattr(config, flag)}" for flag in passed]
        arguments += [f"--work={work}", f"--side={name}"]
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).absolute()), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            cwd=root if name.startswith("ours") else work,
            text=True,
        )

    def ask(self, steps: int) -> dict[str, Any]:
        """Make so many steps; 0 = measure the peak and the memory."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise UserError(f"{self.name} ended with {self._process.wait()}")

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def _compare(config: Config, names: list[str], work: Path) -> None:
    tokens_per_step = config.rows * config.length
    load = os.getloadavg()[0]
    sides = [_Side(config, name, work) for name in names]
    first = {side.name: side.ask(1)["seconds"] for side in sides}
    speeds: dict[str, list[float]] = {name: [] for name in names}
    parts: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    peaks, last = [], {}
    for _ in range(config.turns):
        for side in sides:
            answer = side.ask(config.steps)
            speeds[side.name].append(config.steps * tokens_per_step / answer["seconds"])
            for part, seconds in answer["parts"].items():
                parts[side.name].setdefault(part, []).append(seconds / config.steps)
            last[side.name] = side.ask(0)
            peaks.append(last[side.name]["peak"])
    for side in sides:
        side.end()
    flops = max(answer["flops"] for name, answer in last.items())  # ours; the peer has no say
    for name in names:
        speed = statistics.median(speeds[name])
        row = {
            "side": name if name.startswith("peer") else f"{name} {config.preset}",
            "shape": f"{config.rows}x{config.length}",
            "depth": config.depth,
            "vocab_size": config.vocab_size,
            "tokens_per_second": round(speed),
            "turns": [round(value) for value in speeds[name]],
            "mfu": round(speed * flops / max(peaks), 3),
            "peak_gflops": round(max(peaks) / 1e9),
            "memory_gb": round(last[name]["memory"] / 1e9, 2),
            "first_step_seconds": round(first[name], 1),
            "part_ms": {p: round(1e3 * statistics.median(s), 1) for p, s in parts[name].items()},
            "load": [round(load, 1), round(os.getloadavg()[0], 1)],
            **last[name]["facts"],
        }
        for other in names:
            if other.startswith("peer") and not name.startswith("peer"):
                ratios = [a / b for a, b in zip(speeds[name], speeds[other], strict=True)]
                row[f"times {other}"] = round(statistics.median(ratios), 2)
        print(json.dumps(row), flush=True)


def _answer(
    config: Config, step: Callable[[_Clock], None], *, flops: float, dtype: Any, **facts: str
) -> None:
    """Do what is asked on standard input until it ends.

    flops: of a token; dtype: of the matmuls; facts: what else the side's line says.
    """
    output, device = sys.stdout, config.device
    facts = {"device": devices.name(device), **facts}

    def make(steps: int, parts: dict[str, float] | None) -> float:
        started = devices.now(device)
        for _ in range(steps):
            step(_Clock(device, parts))
        return devices.now(device) - started

    for line in sys.stdin:
        asked, parts = int(line), dict.fromkeys(PARTS, 0.0)
        seconds = make(asked, parts if device == "cpu" else None)
        if device == "cuda":  # apart, for the GPU stands still after each part that is timed
            make(asked, parts)
        row: dict[str, Any] = {"seconds": seconds, "flops": flops, "facts": facts}
        row["parts"] = {part: value for part, value in parts.items() if value}
        row["memory"] = devices.peak_memory(device)
        if not asked:
            row["peak"] = devices.matmul_peak(device, dtype)
        print(json.dumps(row), file=output, flush=True)
        devices.spare_the_collector(device)


class _Clock:
    """Adds the time since the last mark to a part; without parts it does not look."""

    def __init__(self, device: DeviceName, parts: dict[str, float] | None) -> None:
        self._device, self._parts = device, parts
        if parts is not None:
            self._last = devices.now(device)

    def mark(self, part: str) -> None:
        if self._parts is None:
            return
        now = devices.now(self._device)
        self._parts[part] += now - self._last
        self._last = now


def _serve_ours(config: Config, work: Path) -> None:
    """The step of `training.Trainer`, taken apart."""
    import torch

    from nanochat import fused_native, int8, runtime, scaling
    from nanochat.dataloader import DocumentLoader
    from nanochat.dataset import open_source
    from nanochat.gpt import GPT
    from nanochat.objectives import next_token_loss_sum
    from nanochat.optimizers import OptimizerConfig, build_optimizer
    from nanochat.precision import MasterWeights
    from nanochat.tokenizer import get_tokenizer

    with runtime.start(config.device) as rt:
        if rt.device.type == "cpu":
            runtime.keep_freed_memory()  # as `Trainer.run` does
        sizes = scaling.model_config(
            config.depth,
            vocab_size=config.vocab_size,
            sequence_len=config.length,
            preset=config.preset,  # type: ignore[arg-type]
        )
        model = GPT(sizes)
        model.init_weights(torch.Generator().manual_seed(42))
        model.to(rt.device)
        if config.side.endswith("int8"):
            int8.check_possible(sizes, rt.device, rt.compute_dtype)
            int8.convert(model)
        weights = MasterWeights(model, rt.compute_dtype)
        optimizer = build_optimizer(
            weights.named_parameters(),
            OptimizerConfig(is_refined=config.preset == "modern"),
            model_dim=sizes.n_embd,
            world=rt.world,
        )
        source, tokenizer = open_source(config.data), get_tokenizer()
        loader = DocumentLoader(
            source,
            tokenizer,
            rows_per_step=config.rows,
            sequence_len=config.length,
            world=rt.world,
            pin_memory=rt.device.type == "cuda",  # as `scripts.base_train` does
        )
        compiled = config.side.endswith("compiled")
        hidden = torch.compile(model.hidden, dynamic=False) if compiled else model.hidden

        def step(clock: _Clock) -> None:
            batch = loader.next_step()
            inputs = batch.inputs.to(rt.device, non_blocking=True)
            clock.mark("loader")
            states = hidden(inputs)
            clock.mark("forward")
            loss = next_token_loss_sum(
                states,
                model.lm_head.weight,
                batch.targets,
                cap=sizes.logit_softcap,
                vocab_size=config.vocab_size,
                compiled=compiled,
                int8=fused_native.in_int8(model.lm_head),
            )
            clock.mark("head+loss")
            loss.backward()  # type: ignore[no-untyped-call]
            clock.mark("backward")
            scale = 1.0 / batch.num_targets
            optimizer.step(grad_scale=scale, lr_multiplier=1.0, muon_momentum=0.95, grad_clip=1.0)
            weights.publish()
            optimizer.zero_grad()
            clock.mark("optimizer")

        _answer(config, step, flops=model.estimate_flops(), dtype=rt.compute_dtype)


def _serve_peer(config: Config, work: Path) -> None:
    """The peer's model and optimizer, compiled as its base_train does."""
    import torch

    model = peer.build(
        os.environ["BENCH_PEER_CHECKOUT"],
        config.device,
        depth=config.depth,
        length=config.length,
        vocab_size=config.vocab_size,
    )
    model.init_weights()
    optimizer = model.setup_optimizer()
    compiled: Any = torch.compile(model, dynamic=False)
    tokens = np.load(_base(work, config.vocab_size) / "tokens.npy")
    shape, index = (config.rows, config.length), 0
    count = config.rows * config.length

    def step(clock: _Clock) -> None:
        nonlocal index
        start = index * count % (len(tokens) - count - 1)
        index += 1
        part = torch.from_numpy(tokens[start : start + count + 1].astype(np.int64))
        part = part.to(config.device)
        clock.mark("loader")
        loss = compiled(part[:-1].view(shape), part[1:].view(shape))
        clock.mark("forward")
        loss.backward()
        clock.mark("backward")
        optimizer.step()
        model.zero_grad(set_to_none=True)
        clock.mark("optimizer")

    dtype = getattr(torch, config.side.split()[1])
    _answer(config, step, flops=0.0, dtype=dtype, **peer.facts(config.device))


if __name__ == "__main__":
    configurator.run(main, Config)
