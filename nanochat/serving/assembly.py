"""From a checkpoint to a service: the model on its devices, an engine for each."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from nanochat import checkpoint_manager, runtime
from nanochat.checkpoint_manager import Checkpoint
from nanochat.common import UserError
from nanochat.decoders import make_decoder
from nanochat.gpt import GPT, GPTConfig
from nanochat.scheduler import MAX_ROWS, Scheduler
from nanochat.serving.links import ProcessLink
from nanochat.serving.pool import Pool
from nanochat.serving.responses import ModelInfo, ServerDefaults
from nanochat.serving.service import Service
from nanochat.serving.worker import Worker
from nanochat.tokenizer import Tokenizer

# A step is hundreds of times as long as the event loop's turn, so the loop, which has to tell that
# the server is well, goes first; alone, the engine has the whole processor all the same.
ENGINE_NICENESS = 5


@dataclass(frozen=True)
class Capacity:
    """How much an engine takes on."""

    max_rows: int = MAX_ROWS
    """Answers written at once."""
    max_waiting: int = 256
    """Requests that may wait beyond those."""


def load_service(
    stage: str | None,
    *,
    tag: str | None,
    step: int | None,
    device_type: str,
    dtype: str,
    num_gpus: int,
    defaults: ServerDefaults,
    capacity: Capacity | None = None,
    log_conversations: bool = False,
) -> Service:
    """Load a model for serving, in a process for each device. UserError when it cannot be.

    stage, tag and step choose its checkpoint as in `find_checkpoint`.
    """
    capacity = capacity or Capacity()
    checkpoint = checkpoint_manager.find_checkpoint(stage, tag, step, weights_only=True)
    is_int8 = dtype == "int8"
    with runtime.start(device_type, dtype=dtype, takes_int8=True) as chosen:
        device, compute_dtype = chosen.device, chosen.compute_dtype
    devices = _devices(device, num_gpus)
    links: list[ProcessLink] = []
    workers = []
    for gpu_id, name in enumerate(devices):
        # By tag and step, so that all have the same, whatever training writes meanwhile.
        recipe = Recipe(
            checkpoint.stage,
            checkpoint.tag,
            checkpoint.step,
            name,
            compute_dtype,
            capacity.max_rows,
            is_int8=is_int8,
        )
        links.append(ProcessLink(recipe))
        workers.append(
            Worker(
                links[-1],
                gpu_id=gpu_id,
                device=name,
                max_rows=capacity.max_rows,
                max_waiting=capacity.max_waiting,
            )
        )
    for link in links:  # all load at once; what is not possible is said before anything is served
        link.wait()
    return Service(
        Tokenizer.from_directory(checkpoint.path),
        Pool(workers),
        model=_info(checkpoint, "int8" if is_int8 else str(compute_dtype)),
        defaults=defaults,
        created=int(time.time()),
        log_conversations=log_conversations,
    )


@dataclass(frozen=True)
class Recipe:
    """What an engine's process needs to know to load its model."""

    stage: str
    tag: str
    step: int
    device: str
    dtype: torch.dtype
    max_rows: int
    is_int8: bool = False

    def load(self) -> Callable[[], Scheduler]:
        """Load the model; the result makes schedulers that share it."""
        device = torch.device(self.device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        model, tokenizer, _ = checkpoint_manager.load_model(
            self.stage, device=device, dtype=self.dtype, tag=self.tag, step=self.step
        )

        # Now, so that what is not possible is said before anything is served.
        ready = [make_decoder(model, int8=self.is_int8)]

        def make_scheduler() -> Scheduler:
            decoder = ready.pop() if ready else make_decoder(model, int8=self.is_int8)
            return Scheduler(model, tokenizer, max_rows=self.max_rows, decoder=decoder)

        return make_scheduler

    def settle(self) -> None:
        """Let the event loop go first where both want the same processor."""
        if self.device == "cpu" and hasattr(os, "nice"):
            os.nice(ENGINE_NICENESS)


def _devices(device: torch.device, num_gpus: int) -> list[str]:
    """Names of the devices to serve on. UserError when there are not so many."""
    if num_gpus < 1:
        raise UserError(f"--num-gpus is {num_gpus}; use at least 1")
    if num_gpus == 1:
        return [str(device)]
    if device.type != "cuda":
        raise UserError(
            f"--num-gpus={num_gpus} needs CUDA, but the device is {device.type}; one engine "
            "already uses all cores of a CPU: leave the flag out"
        )
    if num_gpus > torch.cuda.device_count():
        raise UserError(
            f"--num-gpus is {num_gpus}, but this machine has {torch.cuda.device_count()} GPUs"
        )
    return [f"cuda:{number}" for number in range(num_gpus)]


def _info(checkpoint: Checkpoint, dtype: str) -> ModelInfo:
    config = GPTConfig.from_json(checkpoint.state["model_config"])
    with torch.device("meta"):
        num_parameters = sum(parameter.numel() for parameter in GPT(config).parameters())
    return ModelInfo(
        id=f"nanochat-{checkpoint.tag}-{checkpoint.stage}",
        stage=checkpoint.stage,
        tag=checkpoint.tag,
        step=checkpoint.step,
        num_parameters=num_parameters,
        context=config.sequence_len,
        vocab_size=config.vocab_size,
        dtype=dtype.removeprefix("torch."),
    )
