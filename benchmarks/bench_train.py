"""Train on real text for a fixed time, beside karpathy/nanochat's model and optimizer.

    python -m benchmarks.bench_train --data=FOLDER --peer=CHECKOUT --seconds=165

Both sides see the same rows of the same tokenizer (16 x 512 tokens a step, vocabulary 8,192, depth
4) and are judged by bits per byte on the first 131,072 tokens of the validation shard. The peer is
a checkout of its repository outside this one; it runs compiled in bf16, in a process of its own.
Time counts steps only: not start-up, not compiling, not evaluation. Prints one JSON line a side.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nanochat import configurator
from nanochat.common import UserError

ROWS, LENGTH, DEPTH, VOCABULARY, EVAL_TOKENS = 16, 512, 4, 8192, 131_072
PROBE_STEPS = 12  # the first two are not timed


@dataclass(frozen=True)
class Config:
    """Flags of bench_train."""

    data: str
    """Folder of parquet shards, the last one for validation."""
    peer: str | None = None
    """Checkout of karpathy/nanochat; leave out to measure this project alone."""
    seconds: float = 165.0
    """Time of stepping."""
    work: str = "bench_train"
    """Folder for tokens, tokenizer and checkpoints."""
    peer_dtype: str = "bfloat16"
    """Compute dtype of the peer."""
    side: str = ""
    """Internal: which side this process measures."""


def main(config: Config) -> int:
    """Prepare the data once, then measure each side in a process of its own."""
    work = Path(config.work).absolute()
    work.mkdir(parents=True, exist_ok=True)
    if config.side == "peer":
        _measure_peer(config, work)
        return 0
    os.environ["NANOCHAT_BASE_DIR"] = str(work / "base")
    if not (work / "train.npy").exists():
        _prepare(config, work)
    _measure_ours(config, work)
    if config.peer is not None:
        arguments = [f"--data={config.data}", f"--peer={config.peer}", f"--work={work}"]
        arguments += [f"--seconds={config.seconds}", "--side=peer"]
        root = str(Path(__file__).absolute().parents[1])
        environment = os.environ | {"NANOCHAT_DTYPE": config.peer_dtype, "PYTHONPATH": root}
        code = subprocess.run(
            [sys.executable, str(Path(__file__).absolute()), *arguments],
            env=environment | {"BENCH_PEER_CHECKOUT": config.peer},
            cwd=work,
            check=False,
        ).returncode
        if code:
            raise UserError(f"the peer's process ended with {code}")
    return 0


def _prepare(config: Config, work: Path) -> None:
    """Train the tokenizer and write both splits as flat token files for the peer."""
    _run("scripts.tok_train", f"--data={config.data}", f"--vocab_size={VOCABULARY}")
    from nanochat.dataset import open_source
    from nanochat.tokenizer import get_tokenizer

    tokenizer, source = get_tokenizer(), open_source(config.data)
    np.save(work / "token_bytes.npy", tokenizer.token_bytes)
    for split in ("val", "train"):
        parts = [
            tokenizer.encode_batch(texts, prepend=tokenizer.bos_id)[0]
            for texts, _ in source.documents(split, endless=False)
        ]
        np.save(work / f"{split}.npy", np.concatenate(parts))


def _run(module: str, *flags: str) -> str:
    """Run one of this project's commands; its standard error, which holds the log."""
    result = subprocess.run(
        [sys.executable, "-m", module, *flags], capture_output=True, text=True, check=False
    )
    if result.returncode:
        raise UserError(f"{module} ended with {result.returncode}: {result.stderr[-2000:]}")
    return result.stderr


def _measure_ours(config: Config, work: Path) -> None:
    """The real command, for as many steps as a short trial says fit into the time."""
    flags = [
        f"--data={config.data}",
        f"--depth={DEPTH}",
        f"--max_seq_len={LENGTH}",
        f"--device_batch_size={ROWS}",
        f"--total_batch_size={ROWS * LENGTH}",
        f"--eval_tokens={EVAL_TOKENS}",
        "--eval_every=-1",
        "--core_metric_every=-1",
        "--sample_every=-1",
        "--warmdown_ratio=0.5",
        "--log_every=5",
        "--model_tag=bench",
    ]
    _run("scripts.base_train", *flags, "--num_iterations=20")
    steps = int(config.seconds * _metric(work, "tokens_per_second") / (ROWS * LENGTH))
    _run("scripts.base_train", *flags, f"--num_iterations={steps}")
    _tell(
        side="ours",
        steps=steps,
        seconds=round(_metric(work, "total_seconds"), 1),
        tokens_per_second=round(_metric(work, "tokens_per_second")),
        val_bpb=round(_metric(work, "val_bpb"), 4),
    )


def _metric(work: Path, name: str) -> float:
    """The last value of a metric of our run."""
    path = work / "base" / "base_checkpoints" / "bench" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return float([row[name] for row in rows if name in row][-1])


def _measure_peer(config: Config, work: Path) -> None:
    """The peer's model, optimizer and schedules of its base_train, learning rates unscaled."""
    sys.path.insert(0, os.environ["BENCH_PEER_CHECKOUT"])
    for name in [n for n in sys.modules if n == "nanochat" or n.startswith("nanochat.")]:
        del sys.modules[name]
    import torch

    from nanochat.gpt import GPT, GPTConfig  # type: ignore[assignment]

    torch.manual_seed(42)
    sizes: dict[str, Any] = {"sequence_len": LENGTH, "vocab_size": VOCABULARY, "n_layer": DEPTH}
    sizes |= {"n_head": 2, "n_kv_head": 2, "n_embd": 64 * DEPTH, "window_pattern": "L"}
    with torch.device("meta"):
        model = GPT(GPTConfig(**sizes))
    model.to_empty(device="cpu")
    model.init_weights()
    optimizer = model.setup_optimizer(  # type: ignore[operator]
        unembedding_lr=0.008, embedding_lr=0.3, scalar_lr=0.5, matrix_lr=0.02, weight_decay=0.28
    )
    compiled = torch.compile(model, dynamic=False)
    rows = _rows(np.load(work / "train.npy"))

    def step(index: int, steps: int) -> None:
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
                group["momentum"] = 0.85 + 0.12 * min(index / 400, 1.0)
                group["weight_decay"] = 0.28 * 0.5 * (1 + np.cos(np.pi * index / steps))
        optimizer.step()
        model.zero_grad(set_to_none=True)

    started = time.perf_counter()
    for index in range(PROBE_STEPS):
        if index == 2:
            started = time.perf_counter()
        step(0, 1_000_000)
    speed = (time.perf_counter() - started) / (PROBE_STEPS - 2)
    steps = max(1, int(config.seconds / speed))
    model.init_weights()
    optimizer.state.clear()
    started = time.perf_counter()
    for index in range(steps):
        step(index, steps)
    seconds = time.perf_counter() - started
    bpb = _peer_bits_per_byte(compiled, work)
    _tell(
        side=f"karpathy/nanochat {config.peer_dtype}",
        steps=steps,
        seconds=round(seconds, 1),
        tokens_per_second=round(steps * ROWS * LENGTH / seconds),
        val_bpb=round(bpb, 4),
    )


def _rows(tokens: np.ndarray[Any, Any]) -> Any:
    """Step index -> inputs and targets of 16 rows cut from the stream, as our loader cuts them."""
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


def _tell(**values: Any) -> None:
    print(json.dumps({"benchmark": "train", **values}), flush=True)


if __name__ == "__main__":
    configurator.run(main, Config)
