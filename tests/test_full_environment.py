"""What can be built here is there, so that the tests skipped without it hide no defect of ours."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path

import pytest

import rustbpe
from nanochat import kernels
from nanochat.execution import sandbox_problem
from nanochat.kernels import training
from tests.kernel_features import landlock_version

CPU_INFO = Path("/proc/cpuinfo")


def processor_flags() -> set[str]:
    """What Linux says that an x86 processor can do; {} elsewhere."""
    if platform.machine() != "x86_64" or not CPU_INFO.exists():
        return set()
    lines = CPU_INFO.read_text(encoding="utf-8").splitlines()
    flags = [line.partition(":")[2].split() for line in lines if line.startswith("flags")]
    return set(flags[0]) if flags else set()


needs_cargo = pytest.mark.skipif(shutil.which("cargo") is None, reason="cargo is not installed")


@needs_cargo
def test_the_tokenizer_core_is_built() -> None:
    assert rustbpe.has_core(), "install again and look at what cargo says"


@needs_cargo
@pytest.mark.skipif(
    not {"avx2", "fma"} <= processor_flags(), reason="the processor has no AVX2 and FMA"
)
def test_the_compiled_decoder_is_built() -> None:
    assert kernels.load() is not None, "install again and look at what cargo says"


@needs_cargo
@pytest.mark.skipif(
    not {"amx_bf16", "avx512_bf16"} & processor_flags(),
    reason="the processor has neither AMX nor AVX-512 BF16",
)
def test_the_training_kernels_are_built() -> None:
    assert training.load() is not None


@pytest.mark.skipif(landlock_version() < 1, reason="the kernel has no Landlock")
def test_programs_of_models_can_be_run() -> None:
    assert sandbox_problem() is None
