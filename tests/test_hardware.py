"""What devices can do, and what this machine is."""

import subprocess
from pathlib import Path

import pytest

from nanochat import hardware


@pytest.mark.parametrize(
    ("name", "peak_flops", "bandwidth"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12, 3.35e12),
        ("NVIDIA H100 PCIe", 756e12, 2.0e12),
        ("NVIDIA H200", 989e12, 4.8e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 2.039e12),
        ("NVIDIA A100-SXM4-40GB", 312e12, 1.555e12),
        ("NVIDIA A100 80GB PCIe", 312e12, 1.935e12),
        ("NVIDIA B200", 2.25e15, 7.7e12),
        ("NVIDIA L40S", 362e12, 0.864e12),
        ("NVIDIA L4", 121e12, 0.3e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12, 1.008e12),
    ],
)
def test_names_as_the_driver_reports_them(name: str, peak_flops: float, bandwidth: float) -> None:
    device = hardware.find_device(name)
    assert device is not None
    assert (device.peak_flops, device.memory_bandwidth) == (peak_flops, bandwidth)
    assert device.source


@pytest.mark.parametrize("name", ["", "cpu", "NVIDIA GeForce GTX 1080", "Quadro A1000"])
def test_unknown_devices_have_no_peak(name: str) -> None:
    assert hardware.find_device(name) is None


def cpuinfo(folder: Path, flags: str) -> Path:
    path = folder / "cpuinfo"
    path.write_text(
        f"processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: {flags}\n\nprocessor\t: 1\n"
    )
    return path


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("fpu sse avx512f avx512_bf16", True),
        ("fpu amx_bf16 amx_tile", True),
        ("fpu sse avx2 avx512f", False),
    ],
)
def test_bf16_of_the_processor(tmp_path: Path, flags: str, expected: bool) -> None:
    assert hardware.cpu_has_bf16(cpuinfo(tmp_path, flags)) is expected


def test_a_system_without_cpuinfo_has_no_features(tmp_path: Path) -> None:
    assert hardware.cpu_features(tmp_path / "none") == frozenset()
    assert hardware.cpu_name(tmp_path / "none")


def test_gpus_are_read_from_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(command: list[str], **options: object) -> "subprocess.CompletedProcess[str]":
        return subprocess.CompletedProcess(command, 0, "NVIDIA H100 PCIe, 81920\n" * 2, "")

    monkeypatch.setattr(subprocess, "run", answer)
    gpus = hardware.list_gpus()
    assert gpus == [hardware.Gpu("NVIDIA H100 PCIe", 80.0)] * 2
    assert hardware.dollars_per_hour(gpus) == 6.0
    assert hardware.describe_machine()["Price"] == "$6.00 an hour"


def test_one_unknown_price_makes_the_sum_unknown() -> None:
    gpus = [hardware.Gpu("NVIDIA H100 PCIe", 80.0), hardware.Gpu("NVIDIA L4", 24.0)]
    assert hardware.dollars_per_hour(gpus) is None
    assert hardware.dollars_per_hour([]) is None


def test_this_machine_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_driver(*arguments: object, **options: object) -> None:
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(subprocess, "run", no_driver)
    described = hardware.describe_machine()
    assert described["GPUs"] == "none"
    assert "GiB" in described["Memory"]
    assert "Price" not in described
