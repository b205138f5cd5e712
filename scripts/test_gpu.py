"""Check GPUs and packages on this machine: python scripts/test_gpu.py.

Four checks; on a machine without a GPU those that need one are skipped. The exit code is 0 unless
one fails.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
MATRIX_SIZE = 1000
MULTIPLICATIONS = 100
GPUS_OF_THE_SPEEDRUN = 8
HINTS = """To mend it:
  1. run it on a GPU node: srun --gres=gpu:1 --pty python scripts/test_gpu.py
  2. install into the active environment: bash scripts/setup_environment.sh
  3. compare the CUDA version of torch with the driver that nvidia-smi names"""


class Skipped(Exception):  # noqa: N818  not an error
    """There is nothing to check here; the message says why."""


def check_inventory() -> str:
    """Name, memory and capability of every GPU."""
    torch = _torch_with_cuda()
    lines = [f"torch {torch.__version__}, CUDA {torch.version.cuda}"]
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        gigabytes = gpu.total_memory / 1e9
        lines.append(f"GPU {index}: {gpu.name}, {gigabytes:.1f} GB, SM {gpu.major}.{gpu.minor}")
    return "\n".join(lines)


def check_multiplication() -> str:
    """Time of a matrix product on the first GPU; ValueError when its result is not right."""
    torch = _torch_with_cuda()
    left = torch.randn(MATRIX_SIZE, MATRIX_SIZE, device="cuda")
    right = torch.randn(MATRIX_SIZE, MATRIX_SIZE, device="cuda")
    expected = left[0].cpu().double() @ right.cpu().double()
    # TF32 keeps 10 bits of each factor: errors of 2^-11 on sums of 1,000 products of size 1.
    if not torch.allclose((left @ right)[0].cpu().double(), expected, atol=0.1, rtol=0.01):
        raise ValueError("the product on cuda:0 differs from that on the CPU")
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(MULTIPLICATIONS):
        left @ right
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - started) / MULTIPLICATIONS
    return f"{MATRIX_SIZE} x {MATRIX_SIZE} in {1000 * seconds:.3f} ms"


def check_count() -> str:
    """How many GPUs there are, against what the speedrun is made for."""
    count: int = _torch_with_cuda().cuda.device_count()
    if count == 1:
        return f"1 GPU: everything works, about {GPUS_OF_THE_SPEEDRUN} times longer than on eight"
    return f"{count} GPUs"


def check_packages() -> str:
    """Versions of all packages that nanochat declares; ModuleNotFoundError for missing ones."""
    declaration = PYPROJECT.read_text(encoding="utf-8").partition("\ndependencies = [")[2]
    names = re.findall(r'"([\w.-]+)', declaration.partition("\n]")[0])
    found, missing = [], []
    for name in names:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        raise ModuleNotFoundError(f"not installed: {', '.join(missing)}")
    return ", ".join(found)


CHECKS: dict[str, Callable[[], str]] = {
    "GPU inventory": check_inventory,
    "GPU arithmetic": check_multiplication,
    "GPU count": check_count,
    "packages": check_packages,
}


def main() -> int:
    """Run all checks, print what they found and a summary."""
    outcomes = {}
    for name, check in CHECKS.items():
        print(f"== {name}")
        try:
            print(check())
            outcomes[name] = "passed"
        except Skipped as reason:
            print(f"skipped: {reason}")
            outcomes[name] = "skipped"
        # Whatever a broken driver or package raises is what this command is there to show.
        except Exception as error:
            print(f"FAILED: {type(error).__name__}: {error}")
            outcomes[name] = "FAILED"
    print("\n== summary")
    for name, outcome in outcomes.items():
        print(f"{name:<16} {outcome}")
    if "FAILED" in outcomes.values():
        print(HINTS)
        return 1
    return 0


def _torch_with_cuda() -> Any:
    """The module torch; Skipped when it has no GPU to work on."""
    import torch

    if not torch.cuda.is_available():
        raise Skipped("torch sees no CUDA device")
    return torch


if __name__ == "__main__":
    sys.exit(main())
