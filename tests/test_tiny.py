"""The walking skeleton: every stage at depth 2 for 20 steps, by the documented commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SIZES = ("--device_batch_size=8", "--num_iterations=20", "--eval_tokens=4096", "--save_every=10")


def command(base_dir: Path, module: str, *flags: str, code: int = 0) -> str:
    """Run one documented command on an otherwise empty base folder; its standard output."""
    environment = os.environ | {
        "NANOCHAT_BASE_DIR": str(base_dir),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    result = subprocess.run(
        [sys.executable, "-m", module, *flags],
        cwd=base_dir.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == code, f"{module} {flags}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base folder in which every stage has run once."""
    base = tmp_path_factory.mktemp("tiny") / "base"
    command(base, "nanochat.report", "reset")
    command(base, "nanochat.dataset", "--data=embedded", "-n", "1")
    command(base, "scripts.tok_train", "--data=embedded", "--max_chars=500000", "--vocab_size=600")
    command(base, "scripts.tok_eval")
    command(
        base,
        "scripts.base_train",
        "--depth=2",
        "--max_seq_len=256",
        "--total_batch_size=2048",
        "--core_metric_max_per_task=8",
        "--core_metric_every=20",
        *SIZES,
    )
    command(base, "scripts.base_loss", "--device_batch_size=8", "--split_tokens=4096")
    command(base, "scripts.base_eval", "--max-per-task=8")
    command(base, "scripts.mid_train", "--total_batch_size=2048", *SIZES)
    command(base, "scripts.chat_eval", "-i", "mid", "-x", "4", "-m", "16")
    command(base, "scripts.chat_sft", "--target_examples_per_step=8", *SIZES)
    command(base, "scripts.chat_eval", "-i", "sft", "-x", "4", "-m", "16")
    command(base, "nanochat.report", "generate")
    return base


@pytest.mark.parametrize("folder", ["base", "mid", "chatsft"])
def test_every_stage_leaves_a_checkpoint_and_its_metrics(trained: Path, folder: str) -> None:
    run = trained / f"{folder}_checkpoints" / "d2"
    state = json.loads((run / "step_000020" / "state.json").read_text())
    assert state["step"] == 20
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 21))
    assert any("val_bpb" in row and row["step"] == 20 for row in rows)


def test_report_shows_every_stage_and_its_plots(trained: Path) -> None:
    report = (trained / "report" / "report.md").read_text()
    for heading in (
        "Tokenizer training",
        "Base model training",
        "Base model loss",
        "Base model evaluation",
        "Midtraining",
        "Chat evaluation mid",
        "Chat SFT",
        "Chat evaluation sft",
        "Summary",
    ):
        assert f"## {heading}" in report
    assert (trained.parent / "report.md").is_file()
    assert list((trained / "report").rglob("*.svg"))


def test_chat_cli_answers_on_standard_output_alone(trained: Path) -> None:
    answer = command(
        trained, "scripts.chat_cli", "-p", "What is the capital of France?", "--max-new-tokens=8"
    )
    assert answer.strip()
    assert "<|" not in answer


def test_dry_run_trains_nothing(trained: Path) -> None:
    before = sorted(path.name for path in (trained / "base_checkpoints").iterdir())
    command(trained, "scripts.base_train", "--depth=3", "--dry_run", *SIZES[:2])
    assert sorted(path.name for path in (trained / "base_checkpoints").iterdir()) == before


def test_second_run_with_resume_has_nothing_left_to_do(trained: Path) -> None:
    weights = trained / "chatsft_checkpoints" / "d2" / "step_000020" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    command(trained, "scripts.chat_sft", "--target_examples_per_step=8", "--resume", *SIZES)
    assert weights.stat().st_mtime_ns == before
