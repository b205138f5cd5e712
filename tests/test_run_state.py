"""What `run_state list` tells a person."""

from pathlib import Path

import pytest

from scripts import run_state


def test_nothing_run_yet_is_said_with_the_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    assert run_state.main(run_state.Config(action="list")) == 0
    assert capsys.readouterr().out == f"no stage has been run in {tmp_path}\n"
