"""base_loss, base_eval and chat_eval end to end on tiny models, and what they refuse."""

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

from nanochat import checkpoint_manager, report
from nanochat.common import UserError, report_dir
from nanochat.configurator import UsageError, parse
from nanochat.gpt import GPT, GPTConfig
from scripts import base_eval, base_loss, chat_eval
from tasks.mixtures import evaluation_tasks

TEXTS = [
    f"Document {i} tells of {i * 7 % 13} birds and {i * 5 % 11} trees. " * 3 for i in range(40)
]


@pytest.fixture(autouse=True)
def base_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.chdir(tmp_path)  # where report.md is copied to
    return tmp_path / "base"


@pytest.fixture
def shards(tmp_path: Path) -> str:
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(2):
        table = pa.table({"text": TEXTS[number * 20 : number * 20 + 20]})
        pq.write_table(table, folder / f"shard_{number:05d}.parquet", row_group_size=8)
    return str(folder)


def random_model(sequence_len: int = 1024) -> GPT:
    config = GPTConfig(
        sequence_len=sequence_len,
        vocab_size=byte_tokenizer().vocab_size,
        n_layer=1,
        n_head=2,
        n_embd=16,
    )
    model = GPT(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return model


def section(title: str) -> dict[str, Any]:
    """All entries of a report section."""
    stored = json.loads((report_dir() / f"{report.slug(title)}.json").read_text())
    return {key: value for item in stored["data"] for key, value in item.items()}


def run(script: Any, *arguments: str) -> None:
    script.main(parse(script.Config, ["--device-type=cpu", "--dtype=float32", *arguments]))


# ---- base_loss -----------------------------------------------------------------------------------


def test_base_loss_reports_both_splits_perplexity_and_seven_samples(
    shards: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save("base", random_model(64), data=shards)
    run(base_loss, "--device_batch_size=2", "--split_tokens=512")
    result = section("Base model loss")
    # Uniform guessing over 265 tokens of one byte each costs 8.05 bits; this model is near it.
    for split in ("train", "val"):
        assert 7.5 < result[f"{split} bpb"] < 9.5
        assert result[f"{split} perplexity"] == pytest.approx(2 ** result[f"{split} bpb"], rel=1e-6)
    assert [key for key in result if key.startswith("sample")] == [f"sample {i}" for i in range(7)]
    assert result["sample 0"].startswith("The capital of France is")
    assert f"val bpb          {result['val bpb']:.4f}" in capsys.readouterr().out


def test_base_loss_takes_the_tokens_of_the_training_run_by_default(shards: str) -> None:
    save("base", random_model(64), data=shards)
    run(base_loss)
    by_default = section("Base model loss")["val bpb"]
    run(base_loss, "--split-tokens=256")
    assert section("Base model loss")["val bpb"] == by_default


@pytest.mark.parametrize("flag", ["--split_tokens=0", "--device_batch_size=0"])
def test_base_loss_refuses_to_evaluate_nothing(shards: str, flag: str) -> None:
    save("base", random_model(64), data=shards)
    with pytest.raises(UserError, match="nothing to evaluate"):
        run(base_loss, flag)


# ---- base_eval -----------------------------------------------------------------------------------


def test_base_eval_does_all_parts_and_writes_the_table(
    shards: str, base_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save("base", random_model(), data=shards)
    write_two_tasks(base_dir / "eval_bundle")
    run(base_eval, "--max-per-task=6", "--split-tokens=512", "--device-batch-size=2")
    result = section("Base model evaluation")
    rows = (base_dir / "base_eval/base_model_000007.csv").read_text().splitlines()
    assert [row.split(",")[0].strip() for row in rows] == [
        *("Task", "birds", "trees", "CORE (6 a task)")
    ]
    assert float(rows[-1].split(",")[-1]) == pytest.approx(result["CORE metric"], abs=1e-6)
    assert [row["items"] for row in result["CORE tasks"]] == [6, 6]
    assert {"train bpb", "val bpb", "sample 6", "sample from nothing 7"} <= set(result)
    assert rows[-1] in capsys.readouterr().out


def test_a_partial_core_does_not_go_by_the_name_of_core(shards: str, base_dir: Path) -> None:
    save("base", random_model(), data=shards)
    write_two_tasks(base_dir / "eval_bundle")
    (base_dir / "eval_bundle/eval_data/trees.jsonl").unlink()
    run(base_eval, "--eval=core")
    result = section("Base model evaluation")
    assert "CORE metric" not in result
    assert "CORE (partial, 1 of 2 tasks)" in result
    assert result["Missing tasks"] == "trees"


def test_the_embedded_bundle_is_made_on_demand(base_dir: Path) -> None:
    save("base", random_model(2048))
    run(base_eval, "--eval=core", "--max-per-task=8")
    assert -1 < section("Base model evaluation")["CORE metric"] < 1
    table = (base_dir / "base_eval/base_model_000007.csv").read_text()
    assert table.splitlines()[-1].startswith("CORE (embedded 8 a task)  ")
    text = report.generate().read_text()
    assert "\n- CORE metric (embedded, 8 a task): " in text
    assert "\n| CORE (embedded, 8 a task) | " in text
    assert "CORE metric:" not in text


def test_a_sample_of_the_items_does_not_pass_for_all_of_them(
    shards: str, base_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save("base", random_model(), data=shards)
    write_two_tasks(base_dir / "eval_bundle")
    run(base_eval, "--eval=core", "--max-per-task=6")
    complete, beside = (
        base_dir / "base_eval" / name
        for name in ("base_model_000007.csv", "base_model_000007_6_a_task.csv")
    )
    assert not beside.exists()  # there was nothing to spare
    run(base_eval, "--eval=core")
    table = complete.read_text()
    assert table.splitlines()[-1].startswith("CORE  ")
    assert "| CORE | " in report.generate().read_text()
    capsys.readouterr()
    run(base_eval, "--eval=core", "--max-per-task=6")
    assert complete.read_text() == table
    assert beside.read_text().splitlines()[-1].startswith("CORE (6 a task)  ")
    assert "CORE (6 a task)  " in capsys.readouterr().out
    assert section("Base model evaluation")["Items a task"] == 6
    assert "| CORE (6 a task) | " in report.generate().read_text()


@pytest.mark.parametrize(
    ("finished", "num_left"),
    [(["--max-per-task=8"], 1), (["--dtype=bfloat16"], 0)],
)
def test_what_an_interrupted_core_left_goes_when_the_model_has_its_score(
    finished: list[str],
    num_left: int,
    shards: str,
    base_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save("base", random_model(), data=shards)
    write_two_tasks(base_dir / "eval_bundle")

    def until_killed(*_: Any) -> list[bool]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("nanochat.core_eval.decide", until_killed)
        with pytest.raises(KeyboardInterrupt):
            run(base_eval, "--eval=core")
    other = base_dir / "base_eval/unfinished_base_model_000007_of-other-weights_0"
    other.mkdir()
    run(base_eval, "--eval=core", *finished)
    left = set((base_dir / "base_eval").glob("unfinished_*")) - {other}
    assert len(left) == num_left
    assert other.is_dir()


def test_too_few_items_are_refused_before_the_model_is_loaded(
    shards: str, base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save("base", random_model(), data=shards)
    write_two_tasks(base_dir / "eval_bundle")
    monkeypatch.setattr(checkpoint_manager, "model_of", None)  # what loads it
    with pytest.raises(UserError, match=r"birds shows 1 .* --max-per-task .* at least 2, or -1"):
        run(base_eval, "--max-per-task=1")


def test_parts_that_were_not_measured_again_stay_in_the_report(shards: str, base_dir: Path) -> None:
    save("base", random_model(), data=shards)
    write_two_tasks(base_dir / "eval_bundle")
    run(base_eval, "--eval=core")
    score = section("Base model evaluation")["CORE metric"]
    for part in ("bpb", "sample"):
        run(base_eval, f"--eval={part}", "--split-tokens=512", "--device-batch-size=2")
    result = section("Base model evaluation")
    assert result["CORE metric"] == score
    assert {"val bpb", "sample 0", "CORE tasks"} <= set(result)
    for part in ("core", "bpb"):
        assert result[f"{part} measured"].endswith(" UTC; not measured again since")
    assert result["sample measured"].endswith(" UTC")
    assert "\n| CORE | " in report.generate().read_text()
    run(base_eval, "--eval=core")
    assert section("Base model evaluation")["core measured"].endswith(" UTC")


def test_what_other_weights_scored_leaves_the_report(shards: str, base_dir: Path) -> None:
    model = random_model()
    save("base", model, data=shards)
    write_two_tasks(base_dir / "eval_bundle")
    run(base_eval, "--eval=core")
    torch.nn.init.zeros_(model.lm_head.weight)
    save("base", model, data=shards)  # the same name and step
    run(base_eval, "--eval=sample")
    assert "CORE metric" not in section("Base model evaluation")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("./models/gpt2", "models-gpt2"),
        ("../models/gpt2/", "models-gpt2"),
        ("/data/models/gpt2", "data-models-gpt2"),
        (".cache/gpt2", "cache-gpt2"),
        ("openai-community/gpt2", "openai-community-gpt2"),
    ],
)
def test_the_table_of_a_transformers_model_is_no_hidden_file(path: str, name: str) -> None:
    assert base_eval.table_name(path) == name


def test_the_table_of_the_folder_one_is_in_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gpt2").mkdir()
    monkeypatch.chdir(tmp_path / "gpt2")
    assert base_eval.table_name(".") == "gpt2"


def test_base_eval_takes_the_tokens_of_the_training_run_by_default(shards: str) -> None:
    save("base", random_model(64), data=shards)
    run(base_eval, "--eval=bpb")
    by_default = section("Base model evaluation")["val bpb"]
    run(base_eval, "--eval=bpb", "--split-tokens=256")
    assert section("Base model evaluation")["val bpb"] == by_default


@pytest.mark.parametrize("flag", ["--split-tokens=0", "--device-batch-size=0"])
def test_base_eval_refuses_to_evaluate_nothing(flag: str) -> None:
    with pytest.raises(UserError, match=f"{flag.partition('=')[0]} is 0; it must be at least 1"):
        run(base_eval, flag)


def test_a_missing_bundle_is_named(shards: str) -> None:
    save("base", random_model(), data=shards)
    with pytest.raises(UserError, match=r"no CORE bundle in .*eval_bundle"):
        run(base_eval, "--eval=core")


@pytest.mark.parametrize(
    ("text", "named"), [("core,sampel", "did you mean 'sample'"), (" , ", "--eval is empty")]
)
def test_unknown_parts_are_refused(text: str, named: str) -> None:
    with pytest.raises(UserError, match=named):
        run(base_eval, f"--eval={text}")


# ---- chat_eval -----------------------------------------------------------------------------------


def test_chat_eval_runs_all_embedded_tasks_and_reports_chat_core(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    save("mid", random_model(2048))
    saved = tmp_path / "answers.jsonl"
    with caplog.at_level(logging.INFO):
        run(chat_eval, "-i", "mid", "-x", "3", "-m", "8", f"--save={saved}")
    result = section("Chat evaluation mid")
    rows = result["accuracies"]
    centered = [(row["accuracy"] - row["chance"]) / (1 - row["chance"]) for row in rows]
    assert result["ChatCORE metric"] == pytest.approx(sum(centered) / len(rows))
    assert all(row["95 % low"] <= row["accuracy"] <= row["95 % high"] for row in rows)
    records = [json.loads(line) for line in saved.read_text().splitlines()]
    assert [(r["task"], r["index"]) for r in records] == [
        (row["task"], index) for row in rows for index in range(3)
    ]
    for row in rows:
        verdicts = [any(r["correct"]) for r in records if r["task"] == row["task"]]
        assert sum(verdicts) == row["passed"]
    output = capsys.readouterr().out
    assert all(row["task"] in output for row in rows)
    assert "ChatCORE (embedded) " in output
    assert result["Task set"] == "embedded"
    text = report.generate().read_text()
    assert "\n- ChatCORE metric (embedded): " in text
    assert "\n| ChatCORE (embedded) | " in text


def test_settings_of_written_answers_are_refused_before_the_model_is_loaded() -> None:
    """There is no model, and the first tasks of the set write no answers."""
    for flag, named in (("-t", "temperature is -1"), ("-k", "top-k is -1")):
        with pytest.raises(UserError, match=named):
            run(chat_eval, "-i", "sft", flag, "-1")


def test_chat_core_is_not_given_for_a_part_of_the_tasks() -> None:
    save("sft", random_model(2048))
    names = [task.name for task in evaluation_tasks("embedded")]
    run(chat_eval, "--source=sft", "-a", f"{names[1].lower()}|{names[0]}", "-x", "2", "-m", "4")
    result = section("Chat evaluation sft")
    assert [row["task"] for row in result["accuracies"]] == names[:2]
    assert "ChatCORE metric" not in result


def test_an_unknown_task_is_answered_with_the_nearest() -> None:
    save("sft", random_model(2048))
    names = [task.name for task in evaluation_tasks("embedded")]
    with pytest.raises(UserError, match=f"did you mean {names[0]}"):
        run(chat_eval, "-i", "sft", "-a", names[0][:-1])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["-b", "0"], "--batch-size is 0"),
        (["-n", "0"], "--num-samples is 0"),
        (["-a", "|"], "--task-name is empty"),
        (["-m", "0"], "--max-new-tokens is 0"),
        (["-x", "0"], "--max-problems is 0; give at least 1, or -1 for all problems"),
        (["-t", "-1", "-a", "WordProblems", "-x", "1"], "temperature is -1.0"),
    ],
)
def test_chat_eval_refuses_bad_settings(arguments: list[str], named: str) -> None:
    save("sft", random_model(2048))
    with pytest.raises(UserError, match=named):
        run(chat_eval, "-i", "sft", *arguments)


@pytest.mark.parametrize("value", ["0", "-2"])
def test_base_eval_refuses_to_score_no_items(value: str) -> None:
    with pytest.raises(UserError, match=f"--max-per-task is {value}; .* or -1 for all items"):
        run(base_eval, f"--max-per-task={value}")


def test_chat_eval_needs_a_known_source() -> None:
    # In which order depends on which module first wrote such a Literal: typing keeps one for all.
    with pytest.raises(UsageError, match=r"--source is one of (base|mid|sft|rl), .*, got 'stf'"):
        parse(chat_eval.Config, ["-i", "stf"])


@pytest.mark.parametrize(
    ("script", "arguments", "command"),
    [
        (base_loss, [], "base_train"),
        (base_eval, [], "base_train"),
        (chat_eval, ["-i", "mid"], "mid_train"),
    ],
)
def test_a_missing_checkpoint_names_the_command_that_makes_it(
    script: Any, arguments: list[str], command: str
) -> None:
    with pytest.raises(UserError, match=f"python -m scripts.{command}"):
        run(script, *arguments)


def test_a_prompt_longer_than_the_context_ends_the_evaluation() -> None:
    save("sft", random_model(16))
    with pytest.raises(
        UserError, match=r"context of 16: .*; evaluate a model with a longer context"
    ):
        run(chat_eval, "-i", "sft", "-x", "2")
