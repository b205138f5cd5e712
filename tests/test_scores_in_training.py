"""Scores while a model is trained: checked before the first step, and no reason to end it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from core_bundles import write_two_tasks
from scripted_model import byte_tokenizer, save

from nanochat import conversation_stage, core_eval, report, task_eval
from nanochat.common import NotScoredError, UserError, report_dir, tokenizer_dir
from nanochat.configurator import parse
from nanochat.gpt import GPT, GPTConfig
from nanochat.tracking import read_metrics
from scripts import base_train, chat_sft
from tests import short_memory

FACTS = "Facts_accuracy"  # in metrics.jsonl
FLAGS = (
    *("--device-type=cpu", "--dtype=float32", "--compile=off", "--depth=1", "--max_seq_len=64"),
    *("--device_batch_size=2", "--total_batch_size=128", "--num_iterations=4"),
    *("--eval_tokens=256", "--bpb_limit=99", "--sample_every=-1"),
    *("--core_metric_every=2", "--core_metric_max_per_task=8"),
)


@pytest.fixture(autouse=True)
def base_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base folder with a tokenizer."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    byte_tokenizer().save(tokenizer_dir())
    return tmp_path / "base"


@pytest.fixture
def data(tmp_path: Path) -> str:
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(2):
        texts = [f"Document {number} {i} tells of birds and trees. " * 3 for i in range(20)]
        pq.write_table(pa.table({"text": texts}), folder / f"shard_{number:05d}.parquet")
    return f"--data={folder}"


@pytest.fixture
def bundle(base_dir: Path) -> Path:
    return write_two_tasks(base_dir / "eval_bundle")


def train(*flags: str) -> int:
    return base_train.main(parse(base_train.Config, [*FLAGS, *flags]))


def scores(base_dir: Path) -> list[tuple[str, int]]:
    """Name and step of every CORE in metrics.jsonl."""
    rows = read_metrics(base_dir / "base_checkpoints/d1/metrics.jsonl")
    return [(name, row["step"]) for row in rows for name in row if name.startswith("core")]


def last_evaluations(base_dir: Path) -> dict[str, Any]:
    state = json.loads((base_dir / "base_checkpoints/d1/step_000004/state.json").read_text())
    evaluations: dict[str, Any] = state["loop"]["evaluations"]
    return evaluations


def reported() -> dict[str, Any]:
    path = report_dir() / f"{report.slug('Base model training')}.json"
    data = json.loads(path.read_text())["data"]
    return {key: value for item in data for key, value in item.items()}


@pytest.mark.usefixtures("bundle")
def test_a_complete_core_is_kept_under_its_name(base_dir: Path, data: str) -> None:
    assert train(data) == 0
    assert scores(base_dir) == [("core", 2), ("core", 4)]
    assert reported()["Final core"] == last_evaluations(base_dir)["core"]


def test_a_partial_core_is_kept_under_another_name(
    base_dir: Path, data: str, bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (bundle / "eval_data/trees.jsonl").unlink()
    caplog.set_level(logging.INFO)
    assert train(data) == 0
    assert scores(base_dir) == [("core_partial", 2), ("core_partial", 4)]
    assert "core" not in last_evaluations(base_dir)
    assert "Final core" not in reported()
    assert "Final core partial" in reported()
    assert "CORE is partial: no items for trees" in caplog.text
    assert "step 4  CORE (partial, 1 of 2 tasks, 8 a task)" in caplog.text


def break_line(bundle: Path) -> None:
    (bundle / "eval_data/trees.jsonl").write_text('{"query": \n')


def ask_too_many_shots(bundle: Path) -> None:
    text = (bundle / "core.yaml").read_text()
    (bundle / "core.yaml").write_text(text.replace('"num_fewshot": [1]', '"num_fewshot": [9]'))


def lengthen_an_answer(bundle: Path) -> None:
    item = {"query": "q", "choices": ["b" * 10 * 64, "a"], "gold": 0}
    (bundle / "eval_data/trees.jsonl").write_text((json.dumps(item) + "\n") * 8)


def remove_all(bundle: Path) -> None:
    bundle.rename(bundle.with_name("elsewhere"))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (break_line, r"trees\.jsonl, line 1: not valid JSON"),
        (ask_too_many_shots, "birds shows 9 solved examples"),
        (lengthen_an_answer, "trees, item 0 .* nothing is left to score"),
        (remove_all, "no CORE bundle in .*scripts.assets prefetch eval-bundle"),
    ],
)
def test_a_bundle_that_cannot_be_scored_ends_the_run_before_its_first_step(
    base_dir: Path, data: str, bundle: Path, damage: Any, named: str
) -> None:
    damage(bundle)
    with pytest.raises(UserError, match=rf"{named}.*; --core-metric-every=-1 trains without CORE"):
        train(data)
    assert not (base_dir / "base_checkpoints").exists()
    assert train(data, "--core_metric_every=-1") == 0


@pytest.mark.usefixtures("bundle")
def test_a_score_that_fails_costs_neither_the_run_nor_its_checkpoint(
    base_dir: Path, data: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    evaluate, calls = core_eval.evaluate_core, []

    def fail_at_the_end(*arguments: Any, **options: Any) -> core_eval.CoreResult:
        calls.append(len(calls))
        if len(calls) == 2:
            raise UserError("trees.jsonl has gone")
        return evaluate(*arguments, **options)

    monkeypatch.setattr(core_eval, "evaluate_core", fail_at_the_end)
    assert train(data) == 0
    assert "step 4 has no CORE: trees.jsonl has gone" in caplog.text
    assert scores(base_dir) == [("core", 2)]
    # What is left of step 2 is not the score of the model that was saved.
    assert set(last_evaluations(base_dir)) == {"val_bpb"}
    assert "Final core" not in reported()


def test_a_dry_run_needs_no_bundle_and_writes_none(base_dir: Path, data: str) -> None:
    assert train(data, "--dry_run") == 0
    assert [path.name for path in base_dir.iterdir()] == ["tokenizer"]


SFT_FLAGS = (
    *("--device-type=cpu", "--dtype=float32", "--compile=off", "--num_iterations=2"),
    *("--device_batch_size=2", "--target_examples_per_step=2", "--eval_steps=1"),
    *("--eval_metrics_every=1", "--eval_metrics_max_problems=2", "--bpb_limit=99"),
)


@pytest.fixture
def mid_model() -> None:
    sizes = GPTConfig(1024, byte_tokenizer().vocab_size, n_layer=1, n_head=2, n_embd=16)
    model = GPT(sizes)
    model.init_weights(torch.Generator().manual_seed(0))
    save("mid", model)


@pytest.mark.usefixtures("mid_model")
def test_an_accuracy_that_cannot_be_measured_does_not_end_finetuning(
    base_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run, steps = task_eval.run_categorical, iter((1, 2))

    def fail_at_the_end(*arguments: Any, **options: Any) -> task_eval.TaskResult:
        if next(steps) == 2:
            raise NotScoredError("the logits are not numbers")
        return run(*arguments, **options)

    monkeypatch.setattr(task_eval, "run_categorical", fail_at_the_end)
    assert chat_sft.main(parse(chat_sft.Config, [*SFT_FLAGS])) == 0
    assert "step 2 has no Facts: the logits are not numbers" in caplog.text
    folder = base_dir / "chatsft_checkpoints/d1"
    assert [row["step"] for row in read_metrics(folder / "metrics.jsonl") if FACTS in row] == [1]
    # What is left of step 1 is not the accuracy of the model that was saved.
    state = json.loads((folder / "step_000002/state.json").read_text())
    assert set(state["loop"]["evaluations"]) == {"val_bpb"}


@pytest.mark.usefixtures("mid_model")
def test_tasks_that_the_device_has_no_memory_for_do_not_end_finetuning(
    base_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError(short_memory.REASON)

    monkeypatch.setattr(task_eval, "_last_logits", fail)
    short_memory.allow_rows(monkeypatch, 0)
    monkeypatch.setattr(conversation_stage, "sample_answers", lambda *arguments: [])
    scores = ("--chatcore_every=2", "--chatcore_max_cat=2", "--chatcore_max_sample=1")
    assert chat_sft.main(parse(chat_sft.Config, [*SFT_FLAGS, *scores])) == 0
    reason = f"out of memory with a single answer ({short_memory.REASON})"
    assert f"step 1 has no Facts: task Facts: {reason}" in caplog.text
    assert f"step 2 has no SpellingBee: task SpellingBee: {reason}" in caplog.text
    assert "step 2 has no ChatCORE: it needs a score of" in caplog.text
    assert (base_dir / "chatsft_checkpoints/d1/step_000002").is_dir()
