"""The doctor's checks: each finds its trouble and says what to do."""

import os
import shutil
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from nanochat import doctor
from nanochat.doctor import Finding, Recipe
from scripts import assets as command
from scripts.assets import Config

D20 = Recipe(depth=20, device_batch_size=32)


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    return tmp_path / "base"


def tool(folder: Path, name: str, output: str) -> None:
    """A command that prints something, in the place of the cluster's."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n/bin/cat <<'END'\n{output}\nEND\n")
    path.chmod(0o755)


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def fails(finding: Finding, detail: str, advice: str) -> None:
    assert finding.state == "FAIL"
    assert detail in finding.detail
    assert advice in finding.advice


# ---- software ---------------------------------------------------------------------------------


def test_an_old_python_is_named_with_the_way_out() -> None:
    fails(doctor.check_python((3, 9, 14)), "3.9.14 is too old", "setup_environment.sh")
    assert doctor.check_python().state == "ok"


def test_every_declared_package_can_be_imported() -> None:
    assert {"torch", "pyarrow", "PyYAML", "requests"} <= set(doctor.declared_packages())
    finding = doctor.check_packages()
    assert finding.state == "ok", finding.detail


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "declared_packages", lambda: ["numpy", "not-a-package"])
    fails(doctor.check_packages(), "not-a-package (No module named", "pip install -e .")


def test_without_the_compiled_core_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.check_core().detail in ("compiled", "not compiled, the slow one is used")
    monkeypatch.setattr("rustbpe.has_core", lambda: False)
    assert doctor.check_core().state == "note"


def test_a_torch_without_cuda_beside_a_driver_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    fails(doctor.check_torch(has_driver=True), "without CUDA", "setup_environment.sh")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    fails(doctor.check_torch(has_driver=True), "finds no GPU", "srun --gres=gpu:1")
    assert doctor.check_torch(has_driver=False).state == "note"


def test_the_compute_dtype_is_named() -> None:
    assert doctor.check_dtype().detail.split()[0] in ("bfloat16", "float32")


@pytest.mark.parametrize(
    ("gigabytes", "state", "advice"),
    [(400, "ok", ""), (40, "FAIL", "--device-batch-size="), (2, "FAIL", "smaller --depth")],
)
def test_memory_is_compared_with_the_recipe(
    monkeypatch: pytest.MonkeyPatch, gigabytes: int, state: str, advice: str
) -> None:
    import torch

    device = types.SimpleNamespace(total_memory=gigabytes * 10**9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    finding = doctor.check_gpu_memory(D20)
    assert finding.state == state
    assert advice in finding.advice


# ---- places -----------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_written_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(122, "Disk quota exceeded")

    assert doctor.check_folders().state == "ok"
    monkeypatch.setattr(os, "fsync", full)
    fails(doctor.check_folders(), "Disk quota exceeded", "NANOCHAT_BASE_DIR")


def test_a_base_folder_that_cannot_be_made_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "file/base"))
    fails(doctor.check_folders(), "cannot create the base folder", "NANOCHAT_BASE_DIR")


@pytest.mark.parametrize(("gigabytes", "state"), [(500, "ok"), (20, "note"), (3, "FAIL")])
def test_free_space_is_compared_with_what_a_run_writes(
    monkeypatch: pytest.MonkeyPatch, tools: Path, gigabytes: int, state: str
) -> None:
    usage = shutil.disk_usage("/")._replace(free=gigabytes * 10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert doctor.check_disk().state == state


def test_an_exceeded_quota_fails(tools: Path) -> None:
    tool(tools, "quota", "Filesystem  space  quota\n/home  50G*  50G")
    fails(doctor.check_disk(), "quota is exceeded", "quota -s")


def test_caches_in_a_small_home_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(total=20 * 10**9, free=4 * 10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    finding = doctor.check_caches({}, tmp_path / "home")
    fails(finding, "HF_HOME", "scratch_root in .env.local")
    elsewhere = dict.fromkeys(doctor.CACHES, "/scratch/cache")
    assert doctor.check_caches(elsewhere, tmp_path / "home").state == "ok"


# ---- the cluster ------------------------------------------------------------------------------


def test_a_partition_that_does_not_exist_fails(tools: Path) -> None:
    tool(tools, "sinfo", "cpu 1-00:00:00\ngpu-a100 12:00:00")
    fails(doctor.check_slurm({"partition": "gpu-h100"}), "gpu-h100", "cpu, gpu-a100")
    assert doctor.check_slurm({"partition": "gpu-a100"}).state == "ok"


def test_a_missing_address_is_told_where_there_is_slurm(tools: Path) -> None:
    assert doctor.check_email({}).detail == "no SLURM here"
    tool(tools, "sbatch", "")
    assert "set email" in doctor.check_email({}).advice
    assert doctor.check_email({"mail": "me@example.com"}).state == "ok"


@pytest.mark.parametrize(
    ("text", "hours"),
    [
        ("90", 1.5),
        ("90:00", 1.5),
        ("12:00:00", 12.0),
        ("1-12", 36.0),
        ("1-12:30", 36.5),
        ("2-00:00:00", 48.0),
        ("UNLIMITED", None),
        ("", None),
    ],
)
def test_limits_are_read_as_slurm_writes_them(text: str, hours: float | None) -> None:
    assert doctor.parse_time(text) == hours


@pytest.mark.parametrize(("limit", "state"), [("12:00:00", "ok"), ("1:00:00", "note")])
def test_the_limit_is_compared_with_an_estimate(
    monkeypatch: pytest.MonkeyPatch, limit: str, state: str
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H100 80GB HBM3")
    hours = doctor.estimated_hours(D20)
    assert hours is not None
    assert 2 < hours < 8  # the 2025 nanochat took 4 hours for all stages
    assert doctor.check_time(D20, {"time": limit}).state == state


def test_settings_are_those_that_the_job_scripts_read(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    reader = doctor.REPOSITORY / "scripts/cluster.sh"
    (tmp_path / "scripts/cluster.sh").write_bytes(reader.read_bytes())
    (tmp_path / ".env.local").write_text("export EMAIL='me@example.com'\nPartition=long\n")
    settings = doctor.read_settings(tmp_path)
    assert settings["partition"] == "long"
    assert settings["mail"] == "me@example.com"
    assert doctor.read_settings(tmp_path / "scripts") == {}


# ---- all together -----------------------------------------------------------------------------


def test_the_command_prints_one_line_a_check_and_fails_when_one_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = command.main(Config("doctor", data="embedded", depth=4))
    lines = capsys.readouterr().out.splitlines()
    names = {line[6:22].strip() for line in lines[:-1]}
    assert {"python", "packages", "torch", "disk", "slurm", "time limit", "assets"} <= names
    assert code == (1 if any(line.startswith("FAIL") for line in lines) else 0)
    bad: Callable[[], Finding] = lambda: Finding("bad", "FAIL", "it is", "do this")  # noqa: E731
    assert doctor.examine(D20, extra=[bad]) == 1
    assert "FAIL  bad               it is; do this" in capsys.readouterr().out
