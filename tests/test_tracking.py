"""Metrics survive kills and repeats; wandb can be absent, keyless or broken without harm."""

import json
import types
from pathlib import Path
from typing import Any

import pytest

from nanochat import tracking
from nanochat.tracking import (
    MetricWriter,
    open_mirrors,
    read_metrics,
    start_tensorboard,
    start_wandb,
    wandb_project,
)


def test_rows_are_in_the_file_as_soon_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    writer = MetricWriter(path)
    writer.write(1, loss=2.5, lr=1.0)
    writer.write(1, val_bpb=1.25)
    assert read_metrics(path) == [
        {"step": 1, "loss": 2.5, "lr": 1.0},
        {"step": 1, "val_bpb": 1.25},
    ]


def test_every_line_is_json_even_for_a_loss_that_is_no_number(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricWriter(path).write(1, loss=float("nan"), grad_norm=float("inf"))
    assert json.loads(path.read_text()) == {"step": 1, "loss": None, "grad_norm": None}


def test_truncating_drops_later_rows_and_writing_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = MetricWriter(path)
    for step in range(5):
        writer.write(step, loss=float(step))
    writer.truncate(2)
    writer.write(3, loss=30.0)
    assert [row["loss"] for row in read_metrics(path)] == [0.0, 1.0, 2.0, 30.0]


def test_a_repeated_evaluation_takes_the_place_of_its_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = MetricWriter(path)
    writer.write(1, val_bpb=2.0)
    writer.write(2, loss=3.0)
    writer.write(2, val_bpb=1.5, core=0.1)
    writer.drop(2, {"val_bpb"})
    writer.write(2, val_bpb=1.25)
    assert read_metrics(path) == [
        {"step": 1, "val_bpb": 2.0},
        {"step": 2, "loss": 3.0},
        {"step": 2, "val_bpb": 1.25},
    ]


def test_truncating_a_file_that_is_not_there_does_nothing(tmp_path: Path) -> None:
    MetricWriter(tmp_path / "metrics.jsonl").truncate(3)
    assert list(tmp_path.iterdir()) == []


def test_a_row_cut_off_by_a_kill_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "lo')
    MetricWriter(path).write(3, loss=1.0)
    assert [row["step"] for row in read_metrics(path)] == [1, 3]


def test_when_a_run_starts_over_its_later_rows_count(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first, second = MetricWriter(path), MetricWriter(path)
    for step in (1, 2, 3):
        first.write(step, loss=9.0)
    for step in (1, 2):
        second.write(step, loss=1.0)
    assert [(row["step"], row["loss"]) for row in read_metrics(path)] == [(1, 1.0), (2, 1.0)]


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full on this system")
    link = tmp_path / "metrics.jsonl"
    link.symlink_to(full)
    with pytest.raises(tracking.UserError, match=r"cannot write .*No space left"):
        MetricWriter(link).write(1, loss=1.0)


class FakeWandb:
    """Stands in for the package; `broken` names what fails."""

    def __init__(self, broken: tuple[str, ...] = ()) -> None:
        self.broken = broken
        self.started: list[str] = []
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.finished = False

    def Settings(self, **_: Any) -> None:  # noqa: N802  (the package's name)
        return None

    def init(self, *, mode: str, **_: Any) -> Any:
        self.started.append(mode)
        if mode in self.broken:
            raise RuntimeError("no answer\nfrom the server")
        return types.SimpleNamespace(log=self._log, finish=self._finish)

    def _log(self, values: dict[str, float], step: int) -> None:
        if "log" in self.broken:
            raise RuntimeError("gone")
        self.rows.append((step, values))

    def _finish(self) -> None:
        self.finished = True


@pytest.fixture
def no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))


def install(fake: FakeWandb | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def find(name: str) -> FakeWandb:
        if fake is None:
            raise ImportError(name)
        return fake

    monkeypatch.setattr(tracking.importlib, "import_module", find)


def start(run: str) -> tracking.Mirror | None:
    return start_wandb(run, project="nanochat", config={"depth": 4})


@pytest.mark.parametrize("run", ["dummy", ""])
def test_dummy_starts_nothing(run: str, no_key: None, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    install(fake, monkeypatch)
    assert start(run) is None
    assert fake.started == []


def test_a_missing_package_is_one_notice(
    no_key: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    install(None, monkeypatch)
    assert start("night") is None
    assert len(caplog.records) == 1
    assert "wandb is not installed" in caplog.text


def test_a_package_that_cannot_be_imported_is_one_notice(
    no_key: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(name: str) -> None:
        raise TypeError("Descriptors cannot be created directly.\nRegenerate")

    monkeypatch.setattr(tracking.importlib, "import_module", fail)
    assert start("night") is None
    assert len(caplog.records) == 1
    assert "could not be imported: Descriptors cannot be created directly. Reg" in caplog.text


def test_a_folder_that_cannot_be_made_is_one_notice(
    no_key: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "file" / "wandb"))
    install(FakeWandb(), monkeypatch)
    assert start("night") is None
    assert len(caplog.records) == 1
    assert "wandb could not start: [Errno 20]" in caplog.text


def test_without_a_key_the_run_is_kept_offline_under_the_base_folder(
    no_key: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake = FakeWandb()
    install(fake, monkeypatch)
    mirrors = open_mirrors("night", project="nanochat", config={})
    writer = MetricWriter(tmp_path / "metrics.jsonl", mirrors=mirrors)
    writer.write(7, loss=1.5)
    writer.close()
    assert fake.started == ["offline"]
    assert fake.rows == [(7, {"loss": 1.5})]
    assert fake.finished
    assert (tmp_path / "base" / "wandb").is_dir()


def test_with_a_key_but_no_network_it_falls_back_to_offline(
    no_key: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "key")
    fake = FakeWandb(broken=("online",))
    install(fake, monkeypatch)
    assert start("night") is not None
    assert fake.started == ["online", "offline"]
    assert "no answer from the server" in caplog.text


def test_a_key_in_netrc_counts(
    no_key: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine api.wandb.ai login user password key\n")
    netrc.chmod(0o600)
    fake = FakeWandb()
    install(fake, monkeypatch)
    start("night")
    assert fake.started == ["online"]


def test_a_wandb_that_never_starts_leaves_the_metrics_alone(
    no_key: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install(FakeWandb(broken=("offline",)), monkeypatch)
    path = tmp_path / "metrics.jsonl"
    mirrors = open_mirrors("night", project="nanochat", config={})
    MetricWriter(path, mirrors=mirrors).write(1, loss=1.0)
    assert read_metrics(path) == [{"step": 1, "loss": 1.0}]


def test_a_wandb_that_breaks_later_is_given_up_with_one_notice(
    no_key: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    install(FakeWandb(broken=("log",)), monkeypatch)
    path = tmp_path / "metrics.jsonl"
    writer = MetricWriter(path, mirrors=open_mirrors("night", project="nanochat", config={}))
    for step in (1, 2, 3):
        writer.write(step, loss=1.0)
    writer.close()
    assert len(read_metrics(path)) == 3
    assert caplog.text.count("gets no more metrics") == 1


# ---- TensorBoard ------------------------------------------------------------------------------


def test_tensorboard_gets_every_number_at_its_step(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    mirrors = open_mirrors(
        "dummy", project="nanochat", config={}, tensorboard_dir=tmp_path / "tensorboard"
    )
    writer = MetricWriter(tmp_path / "metrics.jsonl", mirrors=mirrors)
    for step, loss in ((1, 3.0), (2, 2.5)):
        writer.write(step, loss=loss)
    writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in events] == [(1, 3.0), (2, 2.5)]


def test_what_lies_behind_the_step_that_is_resumed_is_gone_from_tensorboard(
    tmp_path: Path,
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, losses in ((0, (4.0, 3.0, 2.0, 1.0)), (2, (20.0,))):
        mirrors = open_mirrors(
            "dummy",
            project="nanochat",
            config={},
            tensorboard_dir=tmp_path / "tensorboard",
            first_step=first,
        )
        writer = MetricWriter(tmp_path / "metrics.jsonl", mirrors=mirrors)
        for step, loss in enumerate(losses, first):
            writer.write(step, loss=loss)
        writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in events] == [(0, 4.0), (1, 3.0), (2, 20.0)]


def test_a_missing_tensorboard_is_one_notice(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    install(None, monkeypatch)
    assert start_tensorboard(tmp_path) is None
    (record,) = caplog.records
    assert "tensorboard is not installed" in record.getMessage()


def test_a_tensorboard_that_breaks_is_given_up_with_one_notice(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class BrokenWriter:
        def __init__(self, folder: str, purge_step: int) -> None:
            self.folder = folder

        def add_scalar(self, name: str, value: float, step: int) -> None:
            raise OSError("disk full")

    monkeypatch.setattr(
        tracking.importlib,
        "import_module",
        lambda name: types.SimpleNamespace(SummaryWriter=BrokenWriter),
    )
    mirrors = open_mirrors("dummy", project="nanochat", config={}, tensorboard_dir=tmp_path)
    writer = MetricWriter(tmp_path / "metrics.jsonl", mirrors=mirrors)
    for step in (1, 2, 3):
        writer.write(step, loss=1.0)
    writer.close()
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3
    assert caplog.text.count("tensorboard failed and gets no more metrics: disk full") == 1


def test_each_stage_has_the_project_of_the_2025_nanochat() -> None:
    names = [wandb_project(stage) for stage in ("base", "mid", "sft", "rl")]
    assert names == ["nanochat", "nanochat-mid", "nanochat-sft", "nanochat-rl"]
