"""Paths, atomic writes, JSON, hashes and logging."""

import hashlib
import logging
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanochat import common
from nanochat.common import UserError


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    return tmp_path / "base"


def test_base_dir_is_created_and_read_at_each_call(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert common.base_dir() == base
    assert base.is_dir()
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "other"))
    assert common.base_dir() == tmp_path / "other"


def test_base_dir_expands_home_and_has_a_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NANOCHAT_BASE_DIR", "~/x")
    assert common.base_dir() == tmp_path / "x"
    monkeypatch.delenv("NANOCHAT_BASE_DIR")
    assert common.base_dir() == tmp_path / ".cache" / "nanochat"


def test_relative_base_dir_does_not_move_with_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", "here")
    assert common.base_dir() == tmp_path / "here"


def test_base_dir_that_cannot_be_made_names_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "file" / "base"))
    with pytest.raises(UserError, match="NANOCHAT_BASE_DIR"):
        common.base_dir()


def test_documented_folders(base: Path) -> None:
    assert common.tokenizer_dir() == base / "tokenizer"
    assert common.shards_dir("fineweb-edu") == base / "base_data"
    assert common.shards_dir("climbmix") == base / "base_data_climbmix"
    assert common.shards_dir("embedded") == base / "base_data_embedded"
    assert common.eval_bundle_dir("embedded") == base / "eval_bundle_embedded"
    assert common.eval_bundle_dir("fineweb-edu") == base / "eval_bundle"
    assert common.report_dir() == base / "report"
    assert [common.checkpoints_dir(stage).name for stage in common.STAGES] == [
        "base_checkpoints",
        "mid_checkpoints",
        "chatsft_checkpoints",
        "chatrl_checkpoints",
    ]


def test_unknown_names_are_refused_with_the_known_ones(base: Path) -> None:
    with pytest.raises(UserError, match=r"unknown stage 'pre'.*base, mid, sft, rl"):
        common.checkpoints_dir("pre")
    with pytest.raises(UserError, match=r"unknown data source 'c4'.*fineweb-edu"):
        common.shards_dir("c4")


def test_atomic_write_replaces_the_content_and_makes_folders(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.txt"
    common.atomic_write_text(path, "old")
    common.atomic_write_text(path, "new\r\n\u00e9")
    assert path.read_bytes() == "new\r\n\u00e9".encode()
    assert list(path.parent.iterdir()) == [path]


def test_failed_atomic_write_leaves_the_old_content_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.json"
    common.write_json(path, {"step": 1})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        common.write_json(path, {"step": 2})
    assert common.read_json(path) == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_write_respects_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        common.atomic_write_text(tmp_path / "x", "")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640


def test_json_keeps_key_order_and_text(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    common.write_json(path, {"z": 1, "a": "\u4f60"})
    assert path.read_text(encoding="utf-8") == '{\n  "z": 1,\n  "a": "\u4f60"\n}\n'
    assert list(common.read_json(path)) == ["z", "a"]


def test_damaged_json_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"a":')
    with pytest.raises(UserError, match=r"x\.json is not valid JSON"):
        common.read_json(path)


def test_sha256_of_a_file_larger_than_one_chunk(tmp_path: Path) -> None:
    data = bytes(range(256)) * 10_000
    (tmp_path / "x").write_bytes(data)
    assert common.sha256_file(tmp_path / "x") == hashlib.sha256(data).hexdigest()


@pytest.fixture
def restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.mark.usefixtures("restored_logging")
def test_log_lines_are_clock_and_message_once(capsys: pytest.CaptureFixture[str]) -> None:
    common.setup_logging()
    common.setup_logging()
    logging.getLogger("nanochat.x").info("step %d", 3)
    logging.getLogger("nanochat.x").warning("low disk")
    first, second = capsys.readouterr().err.splitlines()
    assert first[2] == first[5] == ":"
    assert first[8:] == " step 3"
    assert second[8:] == " warning: low disk"


@pytest.mark.usefixtures("restored_logging")
def test_other_ranks_only_log_errors(capsys: pytest.CaptureFixture[str]) -> None:
    common.setup_logging(is_main=False)
    logging.getLogger("nanochat.x").warning("said once, by rank 0")
    logging.getLogger("nanochat.x").error("only I know")
    assert capsys.readouterr().err.endswith("error: only I know\n")


def test_no_torch_is_imported_by_the_standard_library_layer() -> None:
    import subprocess

    code = (
        "import sys, nanochat.common, nanochat.conversation, nanochat.configurator,"
        " nanochat.hardware; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


# ---- aliases ----------------------------------------------------------------------------------


def test_documented_names_lead_to_the_real_places(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    common.refresh_aliases()
    assert list(tmp_path.iterdir()) == []
    common.shards_dir("fineweb-edu").mkdir()
    common.tokenizer_dir().mkdir()
    (common.tokenizer_dir() / "tokenizer.json").write_text("{}")
    for _ in range(2):
        common.refresh_aliases()
        assert (tmp_path / "data_shards").resolve() == tmp_path / "base_data"
        assert (tmp_path / "tokenizer.model").read_text() == "{}"


def test_what_a_user_put_under_a_documented_name_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    common.shards_dir("fineweb-edu").mkdir()
    (tmp_path / "data_shards").mkdir()
    common.refresh_aliases()
    assert not (tmp_path / "data_shards").is_symlink()
