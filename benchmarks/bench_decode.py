"""Write answers on a CPU, beside karpathy/nanochat's engine and transformers' NanoChat.

    python -m benchmarks.bench_decode --peer=CHECKOUT

Prompt of 64 tokens, 128 new ones, greedy, vocabulary 8,192, random weights; depth 4 and 12, 1 and
16 answers to one prompt. Each side lives in a process of its own; they take turns, one answer each,
so that a busy machine hurts all alike. Times are of the whole call: the prompt is read, nothing is
kept from one call to the next. Prints one JSON line: tokens a second of each side (median), and by
how much ours surpasses each peer (median over the turns, in which both met the same load).
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nanochat import configurator
from nanochat.common import UserError

PROMPT, NEW, VOCABULARY = 64, 128, 8192
OURS = ("bfloat16", "int8", "float32")


@dataclass(frozen=True)
class Config:
    """Flags of bench_decode."""

    peer: str | None = None
    """Checkout of karpathy/nanochat."""
    transformers: bool = True
    """Whether to measure transformers as well."""
    repeats: int = 5
    """Turns of each side."""
    threads: int = 2
    """Cores for each side."""
    clock: Literal["wall", "cpu"] = "wall"
    """cpu counts the processor's time alone: for a busy machine, with --threads=1."""
    shapes: str = "4x1,4x16,12x1,12x16"
    """Depth x answers of each measurement."""
    side: str = ""
    """Internal: which side this process measures."""


class StubTokenizer:
    """Special tokens that no model writes, so that no answer ends early."""

    vocab_size = VOCABULARY
    bos_id = VOCABULARY + 8

    def encode_special(self, name: str) -> int:
        """An id of its own for each name, beyond the vocabulary."""
        return VOCABULARY + len(name)

    def get_bos_token_id(self) -> int:
        """As `bos_id`."""
        return self.bos_id

    def get_special_tokens(self) -> set[str]:
        """None that would be looked for."""
        return set()

    def decode_bytes(self, ids: list[int]) -> bytes:
        """A letter for each token."""
        return b"a" * len(ids)


Answer = Callable[[list[int], int], int]  # prompt, rows -> number of new tokens


def main(config: Config) -> int:
    """Let the sides take turns, or be one of them."""
    if config.side:
        _serve(config)
        return 0
    sides = [*OURS]
    if config.peer is not None:
        sides.append("peer")
    if config.transformers:
        sides.append("transformers")
    results = {}
    for shape in config.shapes.split(","):
        depth, rows = map(int, shape.split("x"))
        results[f"d{depth} x{rows}"] = _compare(config, sides, depth, rows)
    document = {"benchmark": "decode", "threads": config.threads, "clock": config.clock}
    print(json.dumps(document | {"shapes": results}))
    return 0


def _compare(config: Config, sides: list[str], depth: int, rows: int) -> dict[str, Any]:
    processes = {side: _start(config, side) for side in sides}
    rates: dict[str, list[float]] = {side: [] for side in sides}
    try:
        for repeat in range(config.repeats + 1):
            for side, process in processes.items():
                rate = _ask(process, {"depth": depth, "rows": rows, "seed": repeat})
                if repeat:  # the first builds the model and warms up
                    rates[side].append(rate)
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    result: dict[str, Any] = {
        side: round(statistics.median(values), 1) for side, values in rates.items()
    }
    for peer in set(sides) - set(OURS):
        for ours in OURS:
            turns = zip(rates[ours], rates[peer], strict=True)
            ratio = statistics.median(mine / theirs for mine, theirs in turns)
            result[f"{ours} / {peer}"] = round(ratio, 2)
    print(f"d{depth} x{rows}: {result}", file=sys.stderr, flush=True)
    return result


def _start(config: Config, side: str) -> subprocess.Popen[str]:
    root = str(Path(__file__).absolute().parents[1])
    environment = os.environ | {
        "NANOCHAT_DTYPE": "bfloat16",
        "OMP_NUM_THREADS": str(config.threads),
        "PYTHONPATH": root,
    }
    flags = [f"--side={side}", f"--threads={config.threads}", f"--clock={config.clock}"]
    if config.peer is not None:
        flags.append(f"--peer={config.peer}")
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).absolute()), *flags],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    )


def _ask(process: subprocess.Popen[str], task: dict[str, int]) -> float:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(task) + "\n")
    process.stdin.flush()
    for line in process.stdout:
        if line.startswith("{"):
            return float(json.loads(line)["tokens_per_second"])
    raise UserError(f"a side ended with {process.wait()}; run it alone with --side to see why")


def _serve(config: Config) -> None:
    """Answer tasks from standard input, one JSON line each."""
    import torch

    torch.set_num_threads(config.threads)
    now = time.perf_counter if config.clock == "wall" else time.process_time
    answer: Answer | None = None
    for line in sys.stdin:
        task = json.loads(line)
        generator = torch.Generator().manual_seed(task["seed"])
        prompt = torch.randint(0, VOCABULARY, (PROMPT,), generator=generator).tolist()
        if answer is None:
            answer = _build(config, task["depth"])
            answer(prompt[::-1], task["rows"])
        started = now()
        count = answer(prompt, task["rows"])
        seconds = now() - started
        assert count == NEW * task["rows"]
        print(json.dumps({"tokens_per_second": count / seconds}), flush=True)


def _build(config: Config, depth: int) -> Answer:
    if config.side == "peer":
        return _peer(str(config.peer), depth)
    if config.side == "transformers":
        return _transformers(depth)
    return _ours(config.side, depth)


def _randomize(model: Any) -> None:
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            values = torch.empty(parameter.shape)
            values.normal_(std=0.05, generator=generator)
            parameter.copy_(values)


def _ours(weights: str, depth: int) -> Answer:
    import torch

    from nanochat.decoders import make_decoder
    from nanochat.engine import Engine
    from nanochat.gpt import GPT, GPTConfig

    model = GPT(GPTConfig(512, VOCABULARY, depth, depth // 2, None, 64 * depth))
    _randomize(model)
    model.requires_grad_(False)
    if weights == "bfloat16":
        model.cast_matrices(torch.bfloat16)
    decoder = make_decoder(model, int8=weights == "int8")
    tokenizer: Any = StubTokenizer()
    engine = Engine(model, tokenizer, decoder=decoder)

    def answer(prompt: list[int], rows: int) -> int:
        columns = engine.generate(prompt, rows, max_tokens=NEW, temperature=0.0)
        return sum(len(tokens) for tokens, _ in columns)

    return answer


def _peer(checkout: str, depth: int) -> Answer:
    for name in [n for n in sys.modules if n.partition(".")[0] == "nanochat"]:
        del sys.modules[name]
    sys.path.insert(0, checkout)
    import torch

    from nanochat.engine import Engine
    from nanochat.gpt import GPT, GPTConfig

    with torch.device("meta"):
        model = GPT(
            GPTConfig(
                sequence_len=512,
                vocab_size=VOCABULARY,
                n_layer=depth,
                n_head=depth // 2,
                n_kv_head=depth // 2,
                n_embd=64 * depth,
                window_pattern="L",
            )
        )
    model.to_empty(device="cpu")
    model.init_weights()
    _randomize(model)
    engine = Engine(model, StubTokenizer())

    def answer(prompt: list[int], rows: int) -> int:
        columns = engine.generate(prompt, num_samples=rows, max_tokens=NEW, temperature=0.0)
        return sum(len(tokens) for tokens, _ in columns)

    return answer


def _transformers(depth: int) -> Answer:
    import torch
    from transformers import NanoChatConfig, NanoChatForCausalLM

    model = NanoChatForCausalLM(
        NanoChatConfig(
            vocab_size=VOCABULARY,
            hidden_size=64 * depth,
            intermediate_size=256 * depth,
            num_hidden_layers=depth,
            num_attention_heads=depth // 2,
            num_key_value_heads=depth // 2,
            max_position_embeddings=512,
            eos_token_id=None,
            pad_token_id=0,
        )
    )
    _randomize(model)
    model = model.to(torch.bfloat16).eval()

    def answer(prompt: list[int], rows: int) -> int:
        ids = torch.tensor([prompt] * rows)
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW
            )
        return (out.size(1) - PROMPT) * rows

    return answer


if __name__ == "__main__":
    configurator.run(main, Config)
