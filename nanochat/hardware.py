"""What a device can do at best and costs, and what this machine is. No torch.

Peak rates are dense (no sparsity), 16-bit inputs with fp32 accumulation, per device. A device
that is not in the table has no peak: callers then show no utilisation instead of a wrong one.
"""

import os
import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil

GIB = 1 << 30
_CPUINFO = Path("/proc/cpuinfo")
_BF16_FEATURES = frozenset({"amx_bf16", "avx512_bf16"})
_NVIDIA_SMI_SECONDS = 10  # a healthy driver answers in well under one


@dataclass(frozen=True)
class Device:
    """One kind of accelerator.

    peak_flops: FLOP/s; memory_bandwidth: bytes/s; dollars_per_hour: a usual cloud price for
    one device, None where we have no figure; source: where the rates are published.
    """

    peak_flops: float
    memory_bandwidth: float
    source: str
    dollars_per_hour: float | None = None


# Prices: the per-device cloud prices that the project's documents calculate with.
_H100_PRICE = 3.00
_A100_PRICE = 1.79
_V100_PRICE = 0.55

# Every word of the left side occurs in the device's name; the first row that fits is taken, so
# the narrower rows stand first.
_DEVICES: tuple[tuple[str, Device], ...] = (
    ("gb200", Device(2.5e15, 8.0e12, "NVIDIA GB200 NVL72 data sheet")),
    ("b200", Device(2.25e15, 7.7e12, "NVIDIA HGX B200 data sheet")),
    ("gh200", Device(989e12, 4.0e12, "NVIDIA GH200 data sheet")),
    ("h200 nvl", Device(835.5e12, 4.8e12, "NVIDIA H200 data sheet")),
    ("h200", Device(989e12, 4.8e12, "NVIDIA H200 data sheet")),
    ("h100 nvl", Device(835.5e12, 3.9e12, "NVIDIA H100 data sheet", _H100_PRICE)),
    ("h100 pcie", Device(756e12, 2.0e12, "NVIDIA H100 data sheet", _H100_PRICE)),
    ("h100", Device(989e12, 3.35e12, "NVIDIA H100 data sheet", _H100_PRICE)),
    ("a100 pcie 40gb", Device(312e12, 1.555e12, "NVIDIA A100 data sheet", _A100_PRICE)),
    ("a100 sxm4 40gb", Device(312e12, 1.555e12, "NVIDIA A100 data sheet", _A100_PRICE)),
    ("a100 pcie", Device(312e12, 1.935e12, "NVIDIA A100 data sheet", _A100_PRICE)),
    ("a100", Device(312e12, 2.039e12, "NVIDIA A100 data sheet", _A100_PRICE)),
    ("v100", Device(125e12, 0.9e12, "NVIDIA V100 data sheet (fp16)", _V100_PRICE)),
    ("l40s", Device(362e12, 0.864e12, "NVIDIA L40S data sheet")),
    ("l4", Device(121e12, 0.3e12, "NVIDIA L4 data sheet")),
    ("a10", Device(125e12, 0.6e12, "NVIDIA A10 data sheet")),
    ("t4", Device(65e12, 0.3e12, "NVIDIA T4 data sheet (fp16)")),
    ("rtx 4090", Device(165.2e12, 1.008e12, "NVIDIA Ada architecture white paper")),
    ("rtx 3090", Device(71e12, 0.936e12, "NVIDIA GA102 architecture white paper")),
)


def find_device(name: str) -> Device | None:
    """The table row of a device name as the driver reports it; None when it is not known."""
    words = set(re.findall(r"[a-z0-9]+", name.lower()))
    for required, device in _DEVICES:
        if set(required.split()) <= words:
            return device
    return None


def cpu_features(cpuinfo: Path = _CPUINFO) -> frozenset[str]:
    """Instruction set features of the first processor; empty where /proc/cpuinfo is not."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    match = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", text, flags=re.MULTILINE)
    return frozenset(match.group(1).split()) if match else frozenset()


def cpu_has_bf16(cpuinfo: Path = _CPUINFO) -> bool:
    """Whether the processor multiplies bf16 matrices in hardware (AMX or AVX-512 BF16)."""
    return bool(cpu_features(cpuinfo) & _BF16_FEATURES)


def cpu_name(cpuinfo: Path = _CPUINFO) -> str:
    """The processor's model name, or its architecture where the system does not tell."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    match = re.search(r"^model name\s*:\s*(.*)$", text, flags=re.MULTILINE)
    return match.group(1).strip() if match else platform.processor() or platform.machine()


def usable_cpus() -> int:
    """How many logical processors this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(frozen=True)
class Gpu:
    """One GPU as the driver lists it. memory_gib: total, in GiB."""

    name: str
    memory_gib: float


def list_gpus() -> list[Gpu]:
    """The NVIDIA GPUs of this machine, asked of `nvidia-smi`; empty without the tool."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=_NVIDIA_SMI_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    gpus = []
    for line in answer.stdout.splitlines():
        name, _, mebibytes = line.rpartition(",")
        if name and mebibytes.strip().isdigit():
            gpus.append(Gpu(name.strip(), int(mebibytes) / 1024))
    return gpus


def dollars_per_hour(gpus: list[Gpu]) -> float | None:
    """What these GPUs cost together; None when there is none or one has no known price."""
    devices = [find_device(gpu.name) for gpu in gpus]
    prices = [device.dollars_per_hour if device else None for device in devices]
    known = [price for price in prices if price is not None]
    return sum(known) if known and len(known) == len(prices) else None


def describe_machine() -> dict[str, str]:
    """The machine in words, for the report: label -> value, in reading order."""
    physical = psutil.cpu_count(logical=False)
    features = sorted(cpu_features() & _BF16_FEATURES)
    gpus = list_gpus()
    price = dollars_per_hour(gpus)
    described = {
        "Platform": platform.platform(),
        "Processor": cpu_name(),
        "Cores": f"{physical or 'unknown'} physical, {os.cpu_count()} logical, "
        f"{usable_cpus()} usable",
        "bf16 instructions": ", ".join(features) or "none",
        "Memory": f"{psutil.virtual_memory().total / GIB:.1f} GiB",
        "GPUs": ", ".join(f"{gpu.name} ({gpu.memory_gib:.0f} GiB)" for gpu in gpus) or "none",
        "Python": platform.python_version(),
    }
    if price is not None:
        described["Price"] = f"${price:.2f} an hour"
    return described
