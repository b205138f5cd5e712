"""Device, compute dtype and ranks, found once in `main` and passed on as one frozen value.

The only reader of RANK, LOCAL_RANK, WORLD_SIZE and NANOCHAT_DTYPE. A `World` of one process
has the same methods as a large one, so that no caller branches.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import datetime
import gc
import hashlib
import itertools
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from nanochat.common import ShortMemoryError, UserError, setup_logging

logger = logging.getLogger(__name__)

COLLECT_EVERY = 5000  # steps between garbage collections, as in the newest nanochat
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
_OPERATIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
# Flags of /proc/cpuinfo that stand for native bf16 dot products; without one of them bf16
# matmuls are emulated and slower than fp32.
_CPU_BF16_FLAGS = frozenset({"amx_bf16", "avx512_bf16"})
_CUDA_BF16_CAPABILITY = (8, 0)  # Ampere, the first generation with bf16 tensor cores
# A dead rank closes its sockets and is noticed at once. This bounds a silent one; it must
# exceed the longest work one rank does alone (hashing and writing a large checkpoint).
_TIMEOUT_SECONDS = 600.0

T = TypeVar("T")


class LostRankError(UserError):
    """A collective failed: another rank ended or fell silent.

    A `UserError`, so that a survivor prints one line and does not bury the first error, which
    the rank that ended has printed.
    """


class Pending(Protocol):
    """A collective under way, which keeps its tensors alive."""

    def wait(self) -> Tensor:
        """The result, once it can be used: blocks (gloo) or orders the current stream (nccl)."""


@dataclass(frozen=True)
class _Done:
    output: Tensor

    def wait(self) -> Tensor:
        return self.output


@dataclass(frozen=True)
class _Collective:
    """A started collective; a failure shows in `wait`, as `LostRankError`."""

    world: World
    work: Any
    output: Tensor
    input: Tensor

    def wait(self) -> Tensor:
        with self.world._watched():
            self.work.wait()
        return self.output


@dataclass(frozen=True)
class World:
    """The processes of one job. Every method is collective: all ranks call it, in one order."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    group: Any = None
    """Process group of the collectives; None = the one that `start` joined."""

    def duplicate(self) -> World:
        """The same ranks with a group of their own, on the host: for use by another thread."""
        if self.size == 1:
            return self
        timeout = datetime.timedelta(seconds=_TIMEOUT_SECONDS)
        with self._watched():
            group = dist.new_group(backend="gloo", timeout=timeout)
        return dataclasses.replace(self, group=group)

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes shared files and logs."""
        return self.rank == 0

    def all_reduce_(self, tensor: Tensor, op: Literal["sum", "max", "min"] = "sum") -> Tensor:
        """Combine `tensor` over ranks in place; returns it, equal on every rank."""
        if self.size > 1:
            with self._watched():
                dist.all_reduce(tensor, op=_OPERATIONS[op], group=self.group)
        return tensor

    def broadcast_(self, tensor: Tensor, src: int = 0) -> Tensor:
        """Overwrite `tensor` by that of rank `src`, in place; returns it."""
        if self.size > 1:
            with self._watched():
                dist.broadcast(tensor, src=src, group=self.group)
        return tensor

    def reduce_scatter(self, output: Tensor, input: Tensor) -> None:  # noqa: A002
        """Sum `input` (size * n, ...) over ranks; `output` (n, ...) gets this rank's part."""
        output.copy_(self.start_reduce_scatter(input).wait())

    def all_gather(self, output: Tensor, input: Tensor) -> None:  # noqa: A002
        """Concatenate every rank's `input` (n, ...) into `output` (size * n, ...)."""
        output.copy_(self.start_all_gather(input).wait())

    def start_reduce_scatter(self, input: Tensor) -> Pending:  # noqa: A002
        """`reduce_scatter` under way; leave `input` alone until it is over.

        With one rank the result is `input` itself.
        """
        if self.size == 1:
            return _Done(input)
        output = input.new_empty((len(input) // self.size, *input.shape[1:]))
        # torch 2.13 renamed these two, and warns about the old names.
        collective = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        with self._watched():
            work = collective(output, input, group=self.group, async_op=True)
        return _Collective(self, work, output, input)

    def start_all_gather(self, input: Tensor) -> Pending:  # noqa: A002
        """`all_gather` under way; leave `input` alone until it is over.

        With one rank the result is `input` itself.
        """
        if self.size == 1:
            return _Done(input)
        output = input.new_empty((self.size * len(input), *input.shape[1:]))
        collective = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        with self._watched():
            work = collective(output, input, group=self.group, async_op=True)
        return _Collective(self, work, output, input)

    def any(self, flag: bool) -> bool:
        """Whether any rank says so."""
        return bool(self.all_reduce_(torch.tensor([int(flag)]), "max").item())

    def sum(self, value: float) -> float:
        """The sum over ranks, in double precision."""
        return float(self.all_reduce_(torch.tensor([value], dtype=torch.float64)).item())

    def gather_objects(self, obj: object) -> list[Any]:
        """Every rank's picklable object, by rank. For small host-side values."""
        if self.size == 1:
            return [obj]
        gathered: list[Any] = [None] * self.size
        with self._watched():
            dist.all_gather_object(gathered, obj, group=self.group)
        return gathered

    def together(self, work: Callable[[], T]) -> T:
        """Do this rank's share; a UserError of one rank ends all of them, so that none waits.

        `work` itself calls no collective.
        """
        done: list[T] = []
        error: UserError | None = None
        try:
            done.append(work())
        except UserError as raised:
            error = raised
        errors = [other for other in self.gather_objects(error) if other is not None]
        if errors:
            raise errors[0]
        return done[0]

    def barrier(self) -> None:
        """Wait for every rank. On the host: does not wait for work queued on a GPU."""
        self.all_reduce_(torch.zeros(1))

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        try:
            yield
        # gloo raises RuntimeError, nccl its subclass DistBackendError. Wrong arguments raise
        # ValueError or TypeError and pass.
        except RuntimeError as error:
            raise LostRankError(
                f"rank {self.rank} of {self.size} lost another rank ({first_line(error)}); "
                "the first error is printed by the rank that ended"
            ) from error


@dataclass(frozen=True)
class Runtime:
    """Where and how this process computes."""

    device: torch.device
    compute_dtype: torch.dtype
    world: World
    seed: int = 42

    def generator(
        self, *purpose: str | int, device: torch.device | str = "cpu", shared: bool = False
    ) -> torch.Generator:
        """A random generator of its own for each (seed, rank, purpose).

        `shared=True` leaves the rank out: every rank then draws the same numbers, as the
        initial weights need.
        """
        rank = None if shared else self.world.rank
        key = repr((self.seed, rank, purpose)).encode()
        # 63 bits: manual_seed takes a signed 64-bit integer.
        seed = int.from_bytes(hashlib.sha256(key).digest()[:8], "little") >> 1
        return torch.Generator(device).manual_seed(seed)


def keep_freed_memory() -> None:
    """Have freed memory kept for the next step, on a CPU with glibc; elsewhere nothing changes.

    By default every large tensor is asked of the system anew, which clears each of its pages: a
    fifth of the time of a training step.
    """
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(top_pad, 64 * 2**20)


def spare_the_collector() -> None:
    """Take all that is there now for permanent.

    A full collection walks every object of every module, some 50 ms, in which nothing else is done.
    """
    gc.collect()
    gc.freeze()


@contextlib.contextmanager
def collecting_rarely() -> Iterator[Callable[[], None]]:
    """Yield what is to be called after each step, for a loop whose steps leave no garbage.

    The first call ends the collections of Python's garbage collector, every 5,000th makes one; all
    ranks would else stop for it, each at its own time. Afterwards all is as it was before.
    """
    was_enabled, steps = gc.isenabled(), itertools.count(1)

    def after_step() -> None:
        step = next(steps)
        if step == 1:
            spare_the_collector()
            gc.disable()
        elif step % COLLECT_EVERY == 0:
            gc.collect()

    try:
        yield after_step
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()


def first_line(error: BaseException) -> str:
    """What an error says, without what it holds on to: the tensors of its frames stay alive."""
    return str(error).strip().splitlines()[0]


def halve_pass(rows: int, reason: str, *, rank: int) -> int:
    """Rows of a pass after one of `rows` did not fit the device; said at once.

    reason: the error's text. UserError where a pass has a single row.
    """
    if rows == 1:
        raise UserError(
            f"out of memory with a single row ({reason}); lower --max-seq-len or --depth"
        )
    fewer = (rows + 1) // 2
    torch.cuda.empty_cache()
    # An error in level only, so that ranks other than the main one are heard as well.
    logger.error(
        "rank %d is out of memory with %d rows a pass: going on with %d and more passes "
        "(--device-batch-size=%d starts like this); %s",
        *(rank, rows, fewer, fewer, reason),
    )
    return fewer


def halve_answers(rows: int, reason: str) -> int:
    """Answers to work on at once after `rows` of them did not fit the device; said at once.

    reason: the error's text. ShortMemoryError for a single one.
    """
    if rows == 1:
        raise ShortMemoryError(
            f"out of memory with a single answer ({reason}); ask for shorter ones, or free memory"
        )
    fewer = (rows + 1) // 2
    torch.cuda.empty_cache()
    # An error in level only, so that ranks other than the main one are heard as well.
    logger.error("out of memory with %d answers at once: going on with %d; %s", rows, fewer, reason)
    return fewer


@contextlib.contextmanager
def start(
    device_type: str = "",
    *,
    dtype: str = "",
    takes_int8: bool = False,
    seed: int = 42,
    timeout_seconds: float = _TIMEOUT_SECONDS,
) -> Iterator[Runtime]:
    """Choose device and dtype and join the process group that torchrun or srun announced.

    device_type: "cuda", "mps", "cpu" or "" for the first of these that exists. dtype: a name
    such as "bfloat16" or ""; then $NANOCHAT_DTYPE, then bf16 where the hardware multiplies it
    fast, else fp32. takes_int8: dtype may also be "int8", for weights of 8 bits; what is not a
    weight is fp32 then. The group (nccl for CUDA tensors, gloo for CPU tensors) is left on every
    way out. Raises UserError for a setting the machine cannot honour.
    """
    world = _world_from_environment()
    device = _choose_device(device_type, world)
    if takes_int8 and dtype == "int8":
        compute_dtype = torch.float32
    else:
        name = dtype or os.environ.get("NANOCHAT_DTYPE", "")
        possible = (*_DTYPES, "int8") if takes_int8 and dtype else tuple(_DTYPES)
        compute_dtype = _choose_dtype(name, device, possible)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for what stays in fp32
    if not world.is_main:
        setup_logging(is_main=False)
    runtime = Runtime(device, compute_dtype, world, seed)
    if world.size == 1:
        yield runtime
        return
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        rank=world.rank,
        world_size=world.size,
        timeout=datetime.timedelta(seconds=timeout_seconds),
    )
    try:
        yield runtime
    finally:
        dist.destroy_process_group()


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bf16 matmuls run in hardware: CUDA from SM80 on, CPUs with AMX or AVX512 bf16."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= _CUDA_BF16_CAPABILITY
    return device.type == "cpu" and bool(_CPU_BF16_FLAGS & _cpu_flags())


def _cpu_flags() -> frozenset[str]:
    """The first core's feature flags; empty where Linux does not list them."""
    if not sys.platform.startswith("linux"):
        return frozenset()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return frozenset(line.split(":", 1)[1].split())
    return frozenset()


def _world_from_environment() -> World:
    present = {name: os.environ[name] for name in _RANK_VARIABLES if os.environ.get(name)}
    if len(present) < len(_RANK_VARIABLES):
        missing = ", ".join(name for name in _RANK_VARIABLES if name not in present)
        if present.get("WORLD_SIZE", "1") != "1":
            raise UserError(
                f"WORLD_SIZE={present['WORLD_SIZE']} is set but {missing} is not; start several "
                "processes with torchrun, or unset WORLD_SIZE"
            )
        return World()
    try:
        rank, local_rank, size = (int(present[name]) for name in _RANK_VARIABLES)
    except ValueError as error:
        raise UserError(f"{', '.join(_RANK_VARIABLES)} must be integers: {present}") from error
    if not 0 <= rank < size:
        raise UserError(f"RANK={rank} is not below WORLD_SIZE={size}; start with torchrun")
    return World(rank, size, local_rank)


def _choose_device(device_type: str, world: World) -> torch.device:
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if device_type and device_type not in available:
        raise UserError(f"unknown device type {device_type!r}; use one of {', '.join(available)}")
    chosen = device_type or next(name for name, exists in available.items() if exists)
    if not available[chosen]:
        raise UserError(f"device type {chosen!r} is not available here; use --device-type=cpu")
    if chosen == "mps" and world.size > 1:
        raise UserError(f"mps takes one process, not {world.size}; start without torchrun")
    if chosen != "cuda":
        return torch.device(chosen)
    if world.local_rank >= torch.cuda.device_count():
        raise UserError(
            f"LOCAL_RANK={world.local_rank} but this machine has {torch.cuda.device_count()} "
            "GPUs; lower --nproc-per-node"
        )
    return torch.device("cuda", world.local_rank)


def _choose_dtype(name: str, device: torch.device, possible: Sequence[str]) -> torch.dtype:
    if not name:
        return torch.bfloat16 if has_fast_bf16(device) else torch.float32
    if name not in _DTYPES:
        raise UserError(f"unknown compute dtype {name!r}; use one of {', '.join(possible)}")
    return _DTYPES[name]
