"""The doctor's checks: each finds its trouble and says what to do."""

import os
import shutil
import socket
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nanochat import doctor
from nanochat.assets import Asset, Generated, HubFile, HubSplit, Url
from nanochat.doctor import Finding, Recipe, cluster, places, software
from nanochat.doctor.finding import REPOSITORY
from nanochat.doctor.network import check_network
from scripts import assets as command
from scripts.assets import Config
from tests.fake_hub import FakeHub, Fault, running

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
    fails(software.check_python((3, 9, 14)), "3.9.14 is too old", "setup_environment.sh")
    assert software.check_python().state == "ok"


def test_every_declared_package_can_be_imported() -> None:
    assert {"torch", "pyarrow", "PyYAML", "requests"} <= set(software.declared_packages())
    finding = software.check_packages()
    assert finding.state == "ok", finding.detail


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "declared_packages", lambda: ["numpy", "not-a-package"])
    fails(software.check_packages(), "not-a-package (No module named", "pip install -e .")


def test_without_the_compiled_core_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert software.check_core().detail in ("compiled", "not compiled, the slow one is used")
    monkeypatch.setattr("rustbpe.has_core", lambda: False)
    assert software.check_core().state == "note"


def test_a_torch_without_cuda_beside_a_driver_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    fails(software.check_torch(has_driver=True), "without CUDA", "setup_environment.sh")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    fails(software.check_torch(has_driver=True), "finds no GPU", "srun --gres=gpu:1")
    assert software.check_torch(has_driver=False).state == "note"


def test_the_compute_dtype_is_named() -> None:
    assert software.check_dtype().detail.split()[0] in ("bfloat16", "float32")


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
    finding = software.check_gpu_memory(D20)
    assert finding.state == state
    assert advice in finding.advice


# ---- places -----------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_written_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(122, "Disk quota exceeded")

    assert places.check_folders().state == "ok"
    monkeypatch.setattr(os, "fsync", full)
    fails(places.check_folders(), "Disk quota exceeded", "NANOCHAT_BASE_DIR")


def test_a_base_folder_that_cannot_be_made_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "file/base"))
    fails(places.check_folders(), "cannot create the base folder", "NANOCHAT_BASE_DIR")


@pytest.mark.parametrize(("gigabytes", "state"), [(500, "ok"), (20, "note"), (3, "FAIL")])
def test_free_space_is_compared_with_what_a_run_writes(
    monkeypatch: pytest.MonkeyPatch, tools: Path, gigabytes: int, state: str
) -> None:
    usage = shutil.disk_usage("/")._replace(free=gigabytes * 10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert places.check_disk().state == state


def test_an_exceeded_quota_fails(tools: Path) -> None:
    tool(tools, "quota", "Filesystem  space  quota\n/home  50G*  50G")
    fails(places.check_disk(), "quota is exceeded", "quota -s")


# As Lustre's tool prints it, the numbers of a long path on a line of their own.
LUSTRE = """Disk quotas for usr ada (uid 1000):
     Filesystem  kbytes   quota   limit   grace   files   quota   limit   grace
/scratch/ptolemy/users/ada
                {}       -
"""


@pytest.mark.parametrize(
    ("numbers", "state", "room"),
    [
        ("900000000 0 1000000000 - 5 0 0", "ok", "GB free"),  # KiB: 102 GB are left
        ("970000000 0 1000000000 - 5 0 0", "note", "leaves 31 GB"),
        ("970000000 980000000 1000000000 - 5 0 0", "note", "leaves 10 GB"),
        ("999000000 0 1000000000 - 5 0 0", "FAIL", "leaves 1 GB"),
        ("1000000500* 0 1000000000 - 5 0 0", "FAIL", "leaves 0 GB"),
        ("[999000000] 0 1000000000 6d23h5m1s 5 0 0", "FAIL", "leaves 1 GB"),
        ("900 0 0 - 960000 1000000 1100000", "note", "leaves 40,000 files"),
        ("900 0 0 - 5 0 0", "ok", "GB free"),  # no limits
    ],
)
def test_a_quota_on_lustre_is_compared_with_what_a_run_writes(
    tools: Path, monkeypatch: pytest.MonkeyPatch, numbers: str, state: str, room: str
) -> None:
    usage = shutil.disk_usage("/")._replace(free=10**15)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    tool(tools, "lfs", LUSTRE.format(numbers))
    finding = places.check_disk()
    assert (finding.state, room in finding.detail) == (state, True), finding
    assert ("lfs quota" in finding.advice) == (state != "ok")


def test_the_quota_of_the_scratch_root_counts_too(tools: Path, base: Path) -> None:
    script = tools / "lfs"
    script.write_text(
        '#!/bin/sh\ncase "$4" in /scratch) echo "$4 99 0 100 - 5 0 0 -" ;; '
        '*) echo "not on Lustre" >&2; exit 25 ;; esac\n'
    )
    script.chmod(0o755)
    root = cluster.scratch_root({"scratch_root": "/scratch"})
    fails(places.check_disk(root), "your quota in /scratch leaves 0 GB", "ask for more")
    assert "your quota" not in places.check_disk().detail


def test_where_there_is_no_lustre_nothing_is_said_of_it(tools: Path) -> None:
    assert "your quota" not in places.check_disk(Path("/scratch")).detail


def test_caches_in_a_small_home_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(total=20 * 10**9, free=4 * 10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    finding = places.check_caches({}, tmp_path / "home")
    fails(finding, "HF_HOME", "scratch_root in .env.local")
    elsewhere = dict.fromkeys(places.CACHES, "/scratch/cache")
    assert places.check_caches(elsewhere, tmp_path / "home").state == "ok"


# ---- the network ------------------------------------------------------------------------------

SHARD = Asset("owner/text/0", "a.parquet", HubFile("owner/text", "a.parquet"))
SPLIT = Asset("owner/quiz:main:test", "quiz", HubSplit("owner/quiz", "main", "test"))
WORDS = Asset("words", "words.txt", Url("https://example.com/words.txt"))
MADE = Asset("made", "made", Generated(make=lambda: None, is_current=lambda: False))


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    hub = FakeHub(tmp_path / "hub")
    hub.add("owner/text/a.parquet", b"PAR1")
    hub.add("words.txt", b"apple")
    for variable in ("NANOCHAT_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    with running(hub):
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("NANOCHAT_ASSETS_MIRROR", hub.url)
        yield hub


def host(url: str) -> str:
    return url.partition("//")[2]


def nobody() -> str:
    """An address of this machine where nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def test_hosts_that_answer_are_named_and_asked_once(fake_hub: FakeHub) -> None:
    finding = check_network([SPLIT, SHARD, WORDS, MADE])
    assert (finding.state, finding.detail) == ("ok", f"{host(fake_hub.url)} can be reached")
    (request,) = fake_hub.requests
    assert request.path.endswith("a.parquet")  # what leads to the host of the bytes
    assert request.range == "bytes=0-0"


def test_an_answer_that_is_no_file_is_an_answer(fake_hub: FakeHub) -> None:
    assert check_network([SPLIT]).state == "ok"  # 404: the fake hub has no such data set


def test_without_missing_files_no_host_is_asked(fake_hub: FakeHub) -> None:
    for missing in ([], [MADE]):
        assert check_network(missing).detail == "not needed: nothing has to be fetched"
    assert fake_hub.requests == []


def test_a_node_without_any_way_is_told_so(
    fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", nobody())
    monkeypatch.setenv("NANOCHAT_ASSETS_MIRROR", nobody())
    finding = check_network([SHARD, WORDS])
    fails(finding, "this node has no way to any of 127.0.0.1:", "fetch on a node that has internet")
    assert "HTTPS_PROXY" in finding.advice


def test_one_host_behind_a_firewall_is_named_alone(
    fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = nobody()
    monkeypatch.setenv("NANOCHAT_ASSETS_MIRROR", away)
    finding = check_network([SHARD, WORDS])
    fails(finding, f"{host(away)} cannot be reached", "have them allowed here")
    assert host(fake_hub.url) not in finding.detail


def test_the_host_behind_a_redirect_counts(fake_hub: FakeHub) -> None:
    away = nobody()
    path = "/datasets/owner/text/resolve/main/a.parquet"
    fake_hub.fail(path, Fault(redirect_to=f"{away}/bytes"))
    finding = check_network([SHARD])
    fails(finding, f"{host(away)}, to which {host(fake_hub.url)} leads, cannot be reached", "fetch")


def test_where_no_network_is_allowed_none_is_used(
    fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOCHAT_OFFLINE", "1")
    finding = check_network([SHARD])
    assert finding.state == "note"
    assert "NANOCHAT_OFFLINE is set" in finding.detail
    assert fake_hub.requests == []


# ---- the cluster ------------------------------------------------------------------------------


def test_a_partition_that_does_not_exist_fails(tools: Path) -> None:
    tool(tools, "sinfo", "cpu 1-00:00:00\ngpu-a100 12:00:00")
    fails(cluster.check_slurm({"partition": "gpu-h100"}), "gpu-h100", "cpu, gpu-a100")
    assert cluster.check_slurm({"partition": "gpu-a100"}).state == "ok"


def test_a_missing_address_is_told_where_there_is_slurm(tools: Path) -> None:
    assert cluster.check_email({}).detail == "no SLURM here"
    tool(tools, "sbatch", "")
    assert "set email" in cluster.check_email({}).advice
    assert cluster.check_email({"mail": "me@example.com"}).state == "ok"


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
    assert cluster.parse_time(text) == hours


@pytest.mark.parametrize(("limit", "state"), [("12:00:00", "ok"), ("1:00:00", "note")])
def test_the_limit_is_compared_with_an_estimate(
    monkeypatch: pytest.MonkeyPatch, limit: str, state: str
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H100 80GB HBM3")
    hours = cluster.estimated_hours(D20)
    assert hours is not None
    assert 2 < hours < 8  # the 2025 nanochat took 4 hours for all stages
    assert cluster.check_time(D20, {"time": limit}).state == state


def test_settings_are_those_that_the_job_scripts_read(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    reader = REPOSITORY / "scripts/cluster.sh"
    (tmp_path / "scripts/cluster.sh").write_bytes(reader.read_bytes())
    (tmp_path / ".env.local").write_text("export EMAIL='me@example.com'\nPartition=long\n")
    settings = cluster.read_settings(tmp_path)
    assert settings["partition"] == "long"
    assert settings["mail"] == "me@example.com"
    assert cluster.read_settings(tmp_path / "scripts") == {}


@pytest.mark.parametrize(
    ("line", "state", "said"),
    [
        ("nodes=2", "ok", ".env.local"),
        ("nodess=2", "note", "line 1: unknown setting 'nodess'"),
        ("nodes=two", "FAIL", "line 1: nodes is 'two'"),
    ],
)
def test_settings_that_cannot_be_are_named(
    tmp_path: Path, line: str, state: str, said: str
) -> None:
    (tmp_path / "scripts").mkdir()
    shutil.copy(REPOSITORY / "scripts/cluster.sh", tmp_path / "scripts")
    assert cluster.check_settings(tmp_path).state == "note"
    (tmp_path / ".env.local").write_text(f"{line}\n")
    finding = cluster.check_settings(tmp_path)
    assert finding.state == state
    assert said in finding.detail


# ---- all together -----------------------------------------------------------------------------


def test_the_command_prints_one_line_a_check_and_fails_when_one_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = command.main(Config("doctor", data="embedded", depth=4))
    lines = capsys.readouterr().out.splitlines()
    names = {line[6:22].strip() for line in lines[:-1]}
    assert {
        "python",
        "packages",
        "torch",
        "disk",
        "slurm",
        "time limit",
        "network",
        "assets",
    } <= names
    assert code == (1 if any(line.startswith("FAIL") for line in lines) else 0)
    bad: Callable[[], Finding] = lambda: Finding("bad", "FAIL", "it is", "do this")  # noqa: E731
    assert doctor.examine(D20, extra=[bad]) == 1
    assert "FAIL  bad               it is; do this" in capsys.readouterr().out
