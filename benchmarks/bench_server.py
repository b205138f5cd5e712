"""Many streaming clients at once against chat_web, beside one client alone.

    python -m benchmarks.bench_server --clients=64

Starts `scripts.chat_web` on a model with random weights, which never ends an answer early, then
measures in turn one client and many, while another asks for /health all the time. Every client
streams one answer of `--tokens` tokens, greedily from a prompt of its own, over a connection of its
own. Prints one JSON line: tokens a second, time to the first token and time between events, health
latency, and the processor's time for a token in the server, in the engine, and in the clients.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import select
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from nanochat import configurator
from nanochat.common import UserError


@dataclass(frozen=True)
class Config:
    """Flags of bench_server."""

    clients: int = 64
    """Clients at once."""
    tokens: int = 128
    """Longest answer."""
    rounds: int = 3
    """Times that one client and many are measured in turn."""
    depth: int = 4
    """Layers of the model with random weights."""
    vocab_size: int = 8192
    """Its vocabulary."""
    source: str = ""
    """Stage of a trained model of the base folder to serve instead; it may end answers early."""
    threads: int = 0
    """OMP_NUM_THREADS of the server; 0 = as it is here."""
    watch: str = ""
    """Internal: ask this address for /health until a line comes in, then print what it took."""


@dataclass
class Measured:
    """What some clients saw together."""

    began: float = 0.0
    seconds: float = 0.0
    num_tokens: int = 0
    failures: list[str] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    health: list[float] = field(default_factory=list)
    cpu: dict[str, float] = field(default_factory=dict)


def main(config: Config) -> None:
    """Start the server, measure, print."""
    if config.watch:
        _watch_health(config.watch)
        return
    with tempfile.TemporaryDirectory() as folder:
        environment = dict(os.environ)
        if config.threads:
            environment["OMP_NUM_THREADS"] = str(config.threads)
        if not config.source:
            os.environ["NANOCHAT_BASE_DIR"] = environment["NANOCHAT_BASE_DIR"] = folder
            _make_model(config)
        command = [sys.executable, "-m", "scripts.chat_web", "--port=0", "--device-type=cpu"]
        command += ["-i", config.source or "base"]
        threads = _threads(environment)
        one, many = _run(command, environment, config)
    speeds = [sum(m.num_tokens for m in ms) / sum(m.seconds for m in ms) for ms in (one, many)]
    report: dict[str, Any] = {
        "benchmark": "server",
        "clients": config.clients,
        "tokens": config.tokens,
        "rounds": config.rounds,
        "failures": [failure for measured in (*one, *many) for failure in measured.failures],
        "one_client_tokens_per_second": round(speeds[0], 1),
        "all_clients_tokens_per_second": round(speeds[1], 1),
        "ratio": round(speeds[1] / speeds[0], 2),
        "ratio_of_each_round": [
            round(m.num_tokens / m.seconds / (o.num_tokens / o.seconds), 2)
            for o, m in zip(one, many, strict=True)
        ],
        "threads": threads,
        "load_average": round(os.getloadavg()[0], 1),
        "one_client": _latencies(one),
        "all_clients": _latencies(many),
    }
    print(json.dumps(report))


def _threads(environment: dict[str, str]) -> int:
    """How many threads a model computes with in a process of this environment."""
    command = [sys.executable, "-c", "import torch; print(torch.get_num_threads())"]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout)


def _make_model(config: Config) -> None:
    """Save a model with random weights and a tokenizer of random words as the newest base model."""
    import torch

    from nanochat.checkpoint_writing import save_checkpoint
    from nanochat.common import checkpoints_dir
    from nanochat.gpt import GPT, GPTConfig
    from nanochat.runtime import World
    from nanochat.tokenizer import Tokenizer

    letters = random.Random(0)
    words = ("".join(letters.choices("etaoinshrdlu", k=7)) for _ in range(50_000))
    tokenizer = Tokenizer.train_from_iterator([" ".join(words)], config.vocab_size)
    model = GPT(
        GPTConfig(512, config.vocab_size, config.depth, config.depth // 2, None, 64 * config.depth)
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.05, generator=generator)
        for name in tokenizer.get_special_tokens():
            # Another token always has a positive logit, so none of these is ever the likeliest.
            model.lm_head.weight[tokenizer.encode_special(name)] = 0.0
    folder = checkpoints_dir("base") / f"d{config.depth}"
    with tempfile.TemporaryDirectory() as words_of:
        tokenizer.save(words_of)
        state = {"stage": "base", "model_config": model.config.to_json(), "data": "none"}
        save_checkpoint(
            folder, 0, model=model.state_dict(), optimizer=None, state=state, extra=None,
            tokenizer_dir=Path(words_of), world=World(),
        )  # fmt: skip


def _run(
    command: list[str], environment: dict[str, str], config: Config
) -> tuple[list[Measured], list[Measured]]:
    """Serve, and measure both sides in turn."""
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as server:
        try:
            address = _address(server)
            with _Watcher(address) as watcher:
                one, many = asyncio.run(_measure(address, config, _Clocks(server.pid)))
            for measured in (*one, *many):
                measured.health = watcher.during(measured)
        finally:
            server.terminate()
            server.communicate()
    return one, many


class _Clocks:
    """Processor time of the server, its engine, and the clients, which are this process."""

    def __init__(self, server: int) -> None:
        self._server, self._client = psutil.Process(server), psutil.Process()
        # The other child only keeps track of semaphores.
        children = self._server.children()
        (self._engine,) = [c for c in children if "spawn_main" in " ".join(c.cmdline())]

    def read(self) -> dict[str, float]:
        """Seconds so far."""
        processes = {"server": self._server, "engine": self._engine, "clients": self._client}
        return {name: sum(process.cpu_times()[:2]) for name, process in processes.items()}


def _address(server: subprocess.Popen[str]) -> str:
    assert server.stderr is not None
    lines = []
    for line in server.stderr:
        if "serving at " in line:
            # Nobody reads on, and a full pipe would stop the server.
            _drain(server)
            return line.split("serving at ")[1].strip()
        lines.append(line)
    raise UserError("chat_web did not start: " + "".join(lines[-3:]))


def _drain(server: subprocess.Popen[str]) -> None:
    threading.Thread(target=lambda: list(server.stderr or ()), daemon=True).start()


async def _measure(
    address: str, config: Config, clocks: _Clocks
) -> tuple[list[Measured], list[Measured]]:
    await _round(address, 2, config.tokens, clocks)  # warms up both sides
    one, many = [], []
    for _ in range(config.rounds):
        one.append(await _round(address, 1, config.tokens, clocks))
        many.append(await _round(address, config.clients, config.tokens, clocks))
    return one, many


async def _round(address: str, num_clients: int, tokens: int, clocks: _Clocks) -> Measured:
    limits = httpx.Limits(max_connections=None)
    # New connections: one that has been idle since the last round may be closed just now.
    async with httpx.AsyncClient(base_url=address, timeout=600, limits=limits) as client:
        before = clocks.read()
        measured = Measured(began=time.monotonic())
        await asyncio.gather(*(_ask(client, i, tokens, measured) for i in range(num_clients)))
        measured.seconds = time.monotonic() - measured.began
        measured.cpu = {name: end - before[name] for name, end in clocks.read().items()}
    return measured


async def _ask(client: httpx.AsyncClient, number: int, tokens: int, measured: Measured) -> None:
    body = {
        "prompt": f"{number + 1} people went to the market of the old town and",
        "max_tokens": tokens,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    began = last = time.monotonic()
    first = None
    usage = None
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                now = time.monotonic()
                usage = json.loads(line[6:])["usage"] or usage
                if first is None:
                    first = now - began
                else:
                    measured.gaps.append(now - last)
                last = now
    except httpx.HTTPError as error:
        measured.failures.append(repr(error))
        return
    if usage is None or first is None:
        measured.failures.append("the stream ended early")
        return
    measured.first.append(first)
    measured.num_tokens += usage["completion_tokens"]


class _Watcher:
    """Asks for /health from a process of its own, which the many clients do not hold up."""

    def __init__(self, address: str) -> None:
        command = [sys.executable, "-m", "benchmarks.bench_server", f"--watch={address}"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._seen: list[tuple[float, float]] = []

    def __enter__(self) -> _Watcher:
        return self

    def __exit__(self, *_: object) -> None:
        self._seen = json.loads(self._process.communicate("enough\n")[0])

    def during(self, measured: Measured) -> list[float]:
        """Seconds that the requests sent during some round took."""
        end = measured.began + measured.seconds
        return [seconds for began, seconds in self._seen if measured.began <= began < end]


def _watch_health(address: str) -> None:
    seen = []
    with httpx.Client(base_url=address, timeout=600) as client:
        while not select.select([sys.stdin], [], [], 0.01)[0]:
            began = time.monotonic()  # of the machine, not of the process
            client.get("/health")
            seen.append((began, time.monotonic() - began))
    print(json.dumps(seen))


def _latencies(measured: Sequence[Measured]) -> dict[str, Any]:
    """Milliseconds: median, 95th percentile and worst."""

    def summary(values: list[float]) -> dict[str, float]:
        ordered = sorted(values)
        worst, high = ordered[-1], ordered[math.ceil(0.95 * len(ordered)) - 1]
        found = {"median": statistics.median(ordered), "p95": high, "worst": worst}
        return {name: round(1000 * value, 1) for name, value in found.items()}

    num_tokens = sum(m.num_tokens for m in measured)
    cpu = {
        name: round(1e6 * sum(m.cpu[name] for m in measured) / num_tokens, 1)
        for name in measured[0].cpu
    }
    return {
        "cpu_us_per_token": cpu,
        "first_token_ms": summary([value for m in measured for value in m.first]),
        "between_events_ms": summary([value for m in measured for value in m.gaps]),
        "health_ms": summary([value for m in measured for value in m.health]),
    }


if __name__ == "__main__":
    configurator.run(main, Config)
