"""Measure how fast a model answers: time to the first token, time per token, throughput, memory.

python -m scripts.infer_bench
python -m scripts.infer_bench -i sft --prompt-tokens=64 --decode-tokens=128 --batch-sizes=1,16

The last line on stdout is one JSON document with everything; null = not known here.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

import psutil
import torch
import tyro
from torch import nn

from nanochat import checkpoint_manager, configurator, hardware, runtime
from nanochat.common import UserError
from nanochat.compiled_decoder import CompiledDecoder
from nanochat.decoder import Decoder
from nanochat.decoders import make_decoder
from nanochat.gpt import GPT
from nanochat.request import Request
from nanochat.sampling import SamplingSettings
from nanochat.scheduler import PREFILL_TOKENS, Scheduler, affordable_tokens
from nanochat.tokenizer import Tokenizer

COLUMNS = (
    *("batch", "pre tok/s", "pre mfu", "ttft ms", "tpot ms"),
    *("tok/s", "GB/s", "mbu", "mfu", "memory GB"),
)
# Larger than the caches of all but a few servers, so that memory is what is measured.
BANDWIDTH_BYTES = 512 << 20
BANDWIDTH_REPEATS = 8


@dataclass(frozen=True)
class Config:
    """Flags of infer_bench."""

    source: Annotated[Literal["base", "mid", "sft", "rl"], tyro.conf.arg(aliases=["-i"])] = "base"
    """Stage of the model."""
    model_tag: Annotated[str | None, tyro.conf.arg(aliases=["-g"])] = None
    """Folder name of the run; default: the one written last."""
    step: Annotated[int | None, tyro.conf.arg(aliases=["-s"])] = None
    """Step of the checkpoint; default: the newest."""
    prompt_tokens: int = 2048
    """Length of each prompt; shortened, with a notice, to what the context leaves."""
    decode_tokens: int = 256
    """Tokens of each answer."""
    batch_sizes: str = "1,8,32,128"
    """Numbers of requests answered together, with commas."""
    temperature: Annotated[float, tyro.conf.arg(aliases=["-t"])] = 0.0
    """0 = always the likeliest token."""
    device_type: str = ""
    """cuda, cpu or mps; default: the best there is."""
    dtype: Annotated[str, tyro.conf.arg(aliases=["-d"])] = ""
    """bfloat16, float16, float32, or int8 weights on a CPU; default: bfloat16 where it is fast."""


@dataclass(frozen=True)
class Machine:
    """What a measurement is compared with."""

    name: str
    peak_flops: float | None
    memory_bandwidth: float | None
    """Bytes a second."""
    bandwidth_source: str | None
    """Where that is from."""


@dataclass(frozen=True)
class Measurement:
    """One batch size."""

    batch_size: int
    prompt_tokens: int
    decode_tokens: int
    ttft_seconds: float
    """Until the last request had its first token."""
    tpot_seconds: float | None
    """Median time of a step in which every request got a token."""
    prefill_tokens_per_second: float
    decode_tokens_per_second: float | None
    bytes_per_second: float | None
    """Weights, keys and values that a step has to read, over its time."""
    mbu: float | None
    """Share of the memory's bandwidth."""
    mfu: float | None
    """Share of the device's arithmetic while decoding."""
    prefill_mfu: float | None
    cache_bytes: int
    memory_bytes: int
    """Peak of the device's memory; on a CPU, of what the process holds."""


def main(config: Config) -> None:
    """Measure each batch size and print a table and the document."""
    sizes = _batch_sizes(config.batch_sizes)
    if config.prompt_tokens < 1 or config.decode_tokens < 1:
        raise UserError(
            f"--prompt-tokens is {config.prompt_tokens} and --decode-tokens is "
            f"{config.decode_tokens}; both must be at least 1"
        )
    is_int8 = config.dtype == "int8"
    with runtime.start(config.device_type, dtype=config.dtype, takes_int8=True) as rt:
        if rt.world.size > 1:
            raise UserError("infer_bench measures one device; start it without torchrun")
        model, tokenizer, checkpoint = checkpoint_manager.load_model(
            config.source,
            device=rt.device,
            dtype=rt.compute_dtype,
            tag=config.model_tag,
            step=config.step,
        )
        decoder = make_decoder(model, int8=is_int8)
        machine = _machine(rt.device)
        prompt_tokens, decode_tokens = _lengths(config, decoder.context)
        for size in sizes:
            _check_memory(decoder, size, prompt_tokens + decode_tokens)
        weight_bytes = _weight_bytes(model, decoder)
        bandwidth = machine.memory_bandwidth
        ceiling = bandwidth / weight_bytes if bandwidth else None
        print(f"weights: {weight_bytes:,} bytes; ", end="")
        print(f"keys and values: {decoder.bytes_per_token:,} bytes a token")
        print(f"ceiling of one answer: {_ceiling_line(ceiling, machine)}")
        print("  ".join(f"{column:>9}" for column in COLUMNS))
        measurements = []
        for size in sizes:
            measured = measure(
                model,
                tokenizer,
                decoder,
                machine,
                batch_size=size,
                prompt_tokens=prompt_tokens,
                decode_tokens=decode_tokens,
                temperature=config.temperature,
            )
            measurements.append(measured)
            print(_line(measured), flush=True)
        document = {
            "model": {
                "stage": config.source,
                "tag": checkpoint.tag,
                "step": checkpoint.step,
                "parameters": model.count_parameters()["total"],
            },
            "device": asdict(machine),
            "dtype": config.dtype or str(rt.compute_dtype).removeprefix("torch."),
            "decoder": type(decoder).__name__,
            "threads": torch.get_num_threads() if rt.device.type == "cpu" else None,
            "weight_bytes": weight_bytes,
            "cache_bytes_per_token": decoder.bytes_per_token,
            "ceiling_tokens_per_second": ceiling,
            "batches": [asdict(measured) for measured in measurements],
        }
        print(json.dumps(document, allow_nan=False))


def measure(
    model: GPT,
    tokenizer: Tokenizer,
    decoder: Decoder,
    machine: Machine,
    *,
    batch_size: int,
    prompt_tokens: int,
    decode_tokens: int,
    temperature: float,
) -> Measurement:
    """Answer `batch_size` random prompts together, once to warm up and once for the clock.

    UserError when the cache memory does not hold them all.
    """
    device = decoder.device
    settings = SamplingSettings(temperature, max_tokens=decode_tokens, ignore_end=True)
    # Half of the first answer is still to come when the last prompt has been read: the steps
    # that are timed are those in which every request gets a token.
    prefill_tokens = max(PREFILL_TOKENS, -(-2 * batch_size * prompt_tokens // decode_tokens))
    for is_timed in (False, True):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        scheduler = Scheduler(
            *(model, tokenizer),
            max_rows=batch_size,
            prefill_tokens=prefill_tokens,
            decoder=decoder,
        )
        generator = torch.Generator().manual_seed(int(is_timed))
        shape = (batch_size, prompt_tokens)
        prompts = torch.randint(0, decoder.vocab_size, shape, generator=generator).tolist()
        started = time.perf_counter()
        requests = [scheduler.submit(prompt, settings) for prompt in prompts]
        first, steps = _run(scheduler, requests)
        scheduler.forget_all()
        ttft = first - started
    tpot = statistics.median(steps) if steps else None
    # Half of the answer is there on average.
    remembered = batch_size * (prompt_tokens + decode_tokens // 2) * decoder.bytes_per_token
    read = (_weight_bytes(model, decoder) + remembered) / tpot if tpot else None
    rate = batch_size / tpot if tpot else None
    # Forward only: a third of training's.
    flops = model.estimate_flops() / 3
    peak, prefill_rate = machine.peak_flops, batch_size * prompt_tokens / ttft
    return Measurement(
        batch_size=batch_size,
        prompt_tokens=prompt_tokens,
        decode_tokens=decode_tokens,
        ttft_seconds=ttft,
        tpot_seconds=tpot,
        prefill_tokens_per_second=prefill_rate,
        decode_tokens_per_second=rate,
        bytes_per_second=read,
        mbu=read / machine.memory_bandwidth if read and machine.memory_bandwidth else None,
        mfu=rate * flops / peak if rate and peak else None,
        prefill_mfu=prefill_rate * flops / peak if peak else None,
        cache_bytes=batch_size * (prompt_tokens + decode_tokens) * decoder.bytes_per_token,
        memory_bytes=torch.cuda.max_memory_allocated(device)
        if device.type == "cuda"
        else psutil.Process().memory_info().rss,
    )


def _run(scheduler: Scheduler, requests: list[Request]) -> tuple[float, list[float]]:
    """When all had their first token, and seconds of each later step in which all got one.

    UserError when they do not all have memory at once.
    """
    first, steps = 0.0, []
    while not scheduler.is_idle:
        started = time.perf_counter()
        events = scheduler.step()
        if scheduler.decoder.device.type == "cuda":
            torch.cuda.synchronize(scheduler.decoder.device)
        ended = time.perf_counter()
        if scheduler.num_waiting:  # there are rows for all, so it is the memory that is short
            raise UserError(
                f"a batch of {len(requests)} needs more cache memory than the "
                f"{scheduler.max_cache_tokens:,} tokens that half of the free memory holds; "
                "leave it out of --batch-sizes"
            )
        if first and len(events) == len(requests):
            steps.append(ended - started)
        if not first and all(request.tokens or request.is_finished for request in requests):
            first = ended
    return first, steps


def _lengths(config: Config, context: int) -> tuple[int, int]:
    """Prompt and answer lengths that fit the context."""
    decode = min(config.decode_tokens, context - 1)
    prompt = min(config.prompt_tokens, context - decode)
    if (prompt, decode) != (config.prompt_tokens, config.decode_tokens):
        print(
            f"the model's context is {context} tokens: "
            f"measuring prompts of {prompt} and answers of {decode}"
        )
    return prompt, decode


def _check_memory(decoder: Decoder, batch_size: int, num_tokens: int) -> None:
    """UserError when the free memory does not hold so many answers of `num_tokens` at once.

    Before any is measured: to make the prompts alone may take minutes and all of the memory.
    """
    needed = batch_size * num_tokens
    there = affordable_tokens(decoder, batch_size)
    if needed > there:
        gigabytes = [tokens * decoder.bytes_per_token / 1e9 for tokens in (needed, there)]
        raise UserError(
            f"a batch of {batch_size} needs more cache memory ({needed:,} tokens, "
            f"{gigabytes[0]:,.1f} GB) than the {there:,} tokens ({gigabytes[1]:,.1f} GB) that half "
            "of the free memory holds; leave it out of --batch-sizes"
        )


def _batch_sizes(text: str) -> list[int]:
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise UserError(f"--batch-sizes is {text!r}; use positive numbers with commas, as 1,8,32")
    return sizes


def _machine(device: torch.device) -> Machine:
    if device.type == "cpu":
        return Machine(hardware.cpu_name(), None, read_bandwidth(), "measured")
    if device.type != "cuda":
        return Machine(device.type, None, None, None)
    name = torch.cuda.get_device_name(device)
    known = hardware.find_device(name)
    if known is None:
        return Machine(name, None, None, None)
    return Machine(name, known.peak_flops, known.memory_bandwidth, known.source)


def read_bandwidth() -> float:
    """Bytes a second that torch's threads read from this machine's memory, at best."""
    # A product with a vector, as in decoding: every number is read once, by all threads. A sum of
    # the same numbers is slower than the memory allows.
    matrix = torch.ones(BANDWIDTH_BYTES // 4).view(1024, -1)
    vector = torch.ones(matrix.size(1))
    seconds = []
    for _ in range(BANDWIDTH_REPEATS):
        started = time.perf_counter()
        torch.mv(matrix, vector)
        seconds.append(time.perf_counter() - started)
    return matrix.nbytes / min(seconds)


def _ceiling_line(ceiling: float | None, machine: Machine) -> str:
    if ceiling is None or machine.memory_bandwidth is None:
        return "not known, as the memory's bandwidth is not"
    return (
        f"{ceiling:,.0f} tok/s, which read the weights at "
        f"{machine.memory_bandwidth / 1e9:,.1f} GB/s ({machine.bandwidth_source})"
    )


def _weight_bytes(model: GPT, decoder: Decoder) -> int:
    """Bytes of all matrices, which a step reads once."""
    if isinstance(decoder, CompiledDecoder):
        return decoder.num_weight_bytes
    matrices = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    return sum(matrix.numel() * matrix.element_size() for matrix in matrices)


def _line(m: Measurement) -> str:
    def shown(value: float | None, scale: float = 1.0) -> str:
        return "-" if value is None else f"{value * scale:.2f}"

    values = (
        str(m.batch_size),
        shown(m.prefill_tokens_per_second),
        shown(m.prefill_mfu),
        shown(m.ttft_seconds, 1e3),
        shown(m.tpot_seconds, 1e3),
        shown(m.decode_tokens_per_second),
        shown(m.bytes_per_second, 1e-9),
        shown(m.mbu),
        shown(m.mfu),
        shown(m.memory_bytes, 1e-9),
    )
    return "  ".join(f"{value:>9}" for value in values)


if __name__ == "__main__":
    configurator.run(main, Config)
