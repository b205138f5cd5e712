"""Time one training step and its parts, beside karpathy/nanochat's step, in one run.

    python -m benchmarks.bench_train_step --data=FOLDER --peer=CHECKOUT

Two shapes: depth 4, vocabulary 8,192, 16 x 512 tokens a step; and the seed documents' vocabulary
65,536, 1 x 1,024. Each side is a process of its own, and they take turns: a few steps of one, then
of the next, so that whatever else the machine does meets all alike. Ours reads text through its
real loader, the peer gets rows that are tokenized already. Prints one JSON line a side and shape:
tokens a second (median of the turns), utilisation of a matmul's peak measured between the turns,
peak memory, seconds of the first step with nothing compiled yet, and of each part.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from nanochat import configurator
from nanochat.common import UserError

DEPTH, WIDTH = 4, 256
SHAPES = {"16x512": (8192, 16, 512), "1x1024": (65_536, 1, 1024)}  # vocabulary, rows, length
PARTS = ("loader", "forward", "head+loss", "backward", "optimizer")
PEAK_SIZE = 2048  # of the square matmul that gives the peak


@dataclass(frozen=True)
class Config:
    """Flags of bench_train_step."""

    data: str
    """Folder of parquet shards, JSONL or text."""
    peer: str | None = None
    """Checkout of karpathy/nanochat; leave out to measure this project alone."""
    shapes: str = ",".join(SHAPES)
    """Which shapes, joined with commas."""
    sides: str = "ours,ours compiled,peer float32,peer bfloat16"
    """Who takes part, joined with commas."""
    preset: str = "classic"
    """Our model: classic, modern or portable."""
    turns: int = 5
    """Turns of each side."""
    steps: int = 5
    """Steps of a turn."""
    work: str = "bench_train_step"
    """Folder for tokenizers and tokens."""
    side: str = ""
    """Internal: which side this process is, as "side:shape"."""


def main(config: Config) -> None:
    """Prepare the data, then let the sides take turns, one shape after the other."""
    work = Path(config.work).absolute()
    work.mkdir(parents=True, exist_ok=True)
    if config.side:
        side, shape = config.side.split(":")
        serve = _serve_ours if side.startswith("ours") else _serve_peer
        serve(config, side, shape, work)
        return
    sides = [s for s in config.sides.split(",") if config.peer or not s.startswith("peer")]
    for shape in config.shapes.split(","):
        if shape not in SHAPES:
            raise UserError(f"--shapes names {shape!r}; there are {', '.join(SHAPES)}")
        _prepare(config, work, SHAPES[shape][0])
        _compare(config, sides, shape, work)


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

    def __init__(self, config: Config, name: str, shape: str, work: Path) -> None:
        self.name = name
        root = str(Path(__file__).absolute().parents[1])
        environment = os.environ | {
            "PYTHONPATH": root,
            "NANOCHAT_BASE_DIR": str(_base(work, SHAPES[shape][0])),
            "BENCH_PEER_CHECKOUT": config.peer or "",
            # An empty cache of its own: the first step is a cold one.
            "TORCHINDUCTOR_CACHE_DIR": tempfile.mkdtemp(prefix="bench_", dir=work),
        }
        if name.startswith("peer"):
            environment["NANOCHAT_DTYPE"] = name.split()[1]
        arguments = [f"--data={config.data}", f"--preset={config.preset}"]
        arguments += [f"--work={config.work}", f"--side={name}:{shape}"]
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


def _compare(config: Config, names: list[str], shape: str, work: Path) -> None:
    _, rows, length = SHAPES[shape]
    load = os.getloadavg()[0]
    sides = [_Side(config, name, shape, work) for name in names]
    first = {side.name: side.ask(1)["seconds"] for side in sides}
    speeds: dict[str, list[float]] = {name: [] for name in names}
    parts: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    peaks, last = [], {}
    for _ in range(config.turns):
        for side in sides:
            answer = side.ask(config.steps)
            speeds[side.name].append(config.steps * rows * length / answer["seconds"])
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
            "shape": shape,
            "tokens_per_second": round(speed),
            "turns": [round(value) for value in speeds[name]],
            "mfu": round(speed * flops / max(peaks), 3),
            "peak_gflops": round(max(peaks) / 1e9),
            "memory_gb": round(last[name]["memory"] / 1e9, 2),
            "first_step_seconds": round(first[name], 1),
            "part_ms": {p: round(1e3 * statistics.median(s), 1) for p, s in parts[name].items()},
            "load": [round(load, 1), round(os.getloadavg()[0], 1)],
        }
        for other in names:
            if other.startswith("peer") and not name.startswith("peer"):
                ratios = [a / b for a, b in zip(speeds[name], speeds[other], strict=True)]
                row[f"times {other}"] = round(statistics.median(ratios), 2)
        print(json.dumps(row), flush=True)


def _answer(step: Any, flops: float, dtype: Any) -> None:
    """Do what is asked on standard input until it ends."""
    output: IO[str] = sys.stdout
    for line in sys.stdin:
        asked, parts = int(line), dict.fromkeys(PARTS, 0.0)
        started = time.perf_counter()
        for _ in range(asked):
            step(parts)
        seconds = time.perf_counter() - started
        row: dict[str, Any] = {"seconds": seconds, "flops": flops}
        row["parts"] = {part: value for part, value in parts.items() if value}
        row["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if not asked:
            row["peak"] = _peak(dtype)
        print(json.dumps(row), file=output, flush=True)


def _peak(dtype: Any) -> float:
    """FLOP/s of the best of a few square matmuls."""
    import torch

    a = torch.ones(PEAK_SIZE, PEAK_SIZE, dtype=dtype)
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - started)
    return 2.0 * PEAK_SIZE**3 / best


class _Clock:
    """Adds the time since the last mark to a part."""

    def __init__(self, parts: dict[str, float]) -> None:
        self._parts, self._last = parts, time.perf_counter()

    def mark(self, part: str) -> None:
        now = time.perf_counter()
        self._parts[part] += now - self._last
        self._last = now


def _serve_ours(config: Config, side: str, shape: str, work: Path) -> None:
    """The step of `training.Trainer`, taken apart."""
    import torch

    from nanochat import runtime, scaling
    from nanochat.dataloader import DocumentLoader
    from nanochat.dataset import open_source
    from nanochat.gpt import GPT
    from nanochat.objectives import next_token_loss_sum
    from nanochat.optimizers import OptimizerConfig, build_optimizer
    from nanochat.precision import MasterWeights
    from nanochat.tokenizer import get_tokenizer

    vocabulary, rows, length = SHAPES[shape]
    with runtime.start("cpu") as rt:
        runtime.keep_freed_memory()  # as `Trainer.run` does
        sizes = scaling.model_config(
            DEPTH,
            vocab_size=vocabulary,
            sequence_len=length,
            preset=config.preset,  # type: ignore[arg-type]
        )
        model = GPT(sizes)
        model.init_weights(torch.Generator().manual_seed(42))
        weights = MasterWeights(model, rt.compute_dtype)
        optimizer = build_optimizer(
            weights.named_parameters(),
            OptimizerConfig(is_refined=config.preset == "modern"),
            model_dim=sizes.n_embd,
            world=rt.world,
        )
        source, tokenizer = open_source(config.data), get_tokenizer()
        loader = DocumentLoader(
            source, tokenizer, rows_per_step=rows, sequence_len=length, world=rt.world
        )
        compiled = side.endswith("compiled")
        hidden = torch.compile(model.hidden, dynamic=False) if compiled else model.hidden

        def step(parts: dict[str, float]) -> None:
            clock = _Clock(parts)
            batch = loader.next_step()
            clock.mark("loader")
            states = hidden(batch.inputs)
            clock.mark("forward")
            loss = next_token_loss_sum(
                states,
                model.lm_head.weight,
                batch.targets,
                cap=sizes.logit_softcap,
                vocab_size=vocabulary,
                compiled=compiled,
            )
            clock.mark("head+loss")
            loss.backward()  # type: ignore[no-untyped-call]
            clock.mark("backward")
            scale = 1.0 / batch.num_targets
            optimizer.step(grad_scale=scale, lr_multiplier=1.0, muon_momentum=0.95, grad_clip=1.0)
            weights.publish()
            optimizer.zero_grad()
            clock.mark("optimizer")

        _answer(step, model.estimate_flops(), rt.compute_dtype)


def _serve_peer(config: Config, side: str, shape: str, work: Path) -> None:
    """The peer's model and optimizer, compiled as its base_train does."""
    sys.path.insert(0, os.environ["BENCH_PEER_CHECKOUT"])
    for name in [n for n in sys.modules if n == "nanochat" or n.startswith("nanochat.")]:
        del sys.modules[name]
    import torch

    from nanochat.gpt import GPT, GPTConfig

    vocabulary, rows, length = SHAPES[shape]
    sizes: dict[str, Any] = {"sequence_len": length, "vocab_size": vocabulary, "n_layer": DEPTH}
    sizes |= {"n_head": 2, "n_kv_head": 2, "n_embd": WIDTH, "window_pattern": "L"}
    with torch.device("meta"):
        model = GPT(GPTConfig(**sizes))
    model.to_empty(device="cpu")
    model.init_weights()
    optimizer = model.setup_optimizer()  # type: ignore[operator]
    compiled = torch.compile(model, dynamic=False)
    tokens = np.load(_base(work, vocabulary) / "tokens.npy")
    count, index = rows * length, 0

    def step(parts: dict[str, float]) -> None:
        nonlocal index
        clock = _Clock(parts)
        start = index * count % (len(tokens) - count - 1)
        index += 1
        part = torch.from_numpy(tokens[start : start + count + 1].astype(np.int64))
        clock.mark("loader")
        loss = compiled(part[:-1].view(rows, length), part[1:].view(rows, length))
        clock.mark("forward")
        loss.backward()
        clock.mark("backward")
        optimizer.step()
        model.zero_grad(set_to_none=True)
        clock.mark("optimizer")

    dtype = getattr(torch, side.split()[1])
    _answer(step, 0.0, dtype)


if __name__ == "__main__":
    configurator.run(main, Config)
