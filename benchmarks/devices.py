"""The device that training is measured on: its clock, memory, peak and name.

torch is imported where it is used: a process that only starts others does without it.
"""

from __future__ import annotations

import gc
import os
import resource
import time
from typing import Any, Literal

from nanochat.common import UserError

DeviceName = Literal["cpu", "cuda"]
# Size of the square matmul that gives the peak. A GPU is done with 2,048 in some 20 us, about as
# long as it takes to start it.
PEAK_SIZES = {"cpu": 2048, "cuda": 8192}
PEAK_TRIES = {"cpu": 3, "cuda": 10}  # a GPU raises its clock and loads its kernel in the first ones


def check(device: DeviceName) -> None:
    """UserError where there is no such device."""
    if device == "cpu":
        return
    import torch

    if not torch.cuda.is_available():
        raise UserError(
            f"--device={device}, and PyTorch {torch.__version__} sees no NVIDIA GPU here; "
            "use --device=cpu, or install a PyTorch built for CUDA"
        )


def environment(device: DeviceName) -> dict[str, str]:
    """Variables that both projects' own commands set on this device."""
    if device == "cpu":
        return {}
    name = "PYTORCH_ALLOC_CONF"
    return {name: os.environ.get(name, "expandable_segments:True")}


def now(device: DeviceName, kind: Literal["wall", "cpu"] = "wall") -> float:
    """Seconds on a clock that is read once all that was started on the device is done."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
    return time.process_time() if kind == "cpu" else time.perf_counter()


def peak_memory(device: DeviceName) -> int:
    """Most bytes so far: of this process's tensors on a GPU, of all that it is on a CPU."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def matmul_peak(device: DeviceName, dtype: Any) -> float:
    """FLOP/s of the best of a few square matmuls. dtype: a torch.dtype."""
    import torch

    size, best = PEAK_SIZES[device], float("inf")
    # Equal numbers cost a GPU less power than those of training, and let it clock higher.
    fill = torch.randn if device == "cuda" else torch.ones
    a = fill(size, size, dtype=dtype, device=device)
    for _ in range(PEAK_TRIES[device]):
        started = now(device)
        a @ a
        best = min(best, now(device) - started)
    return 2.0 * size**3 / best


def name(device: DeviceName) -> str:
    """The GPU's name as the driver reports it, or "cpu"."""
    if device == "cpu":
        return device
    import torch

    return torch.cuda.get_device_name()


def spare_the_collector(device: DeviceName) -> None:
    """On a GPU, end Python's garbage collections, as the loops of both projects do."""
    if device == "cuda":
        gc.collect()
        gc.freeze()
        gc.disable()
