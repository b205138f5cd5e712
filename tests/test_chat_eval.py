"""chat_eval on the public tasks: what has no score, what was seen in training, saved answers."""

from __future__ import annotations

import errno
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from public_data import ARC_ROW, GSM8K_ROW, HUMANEVAL_ROW, MMLU_ROW, place, place_file
from scripted_model import byte_tokenizer, save

from nanochat import report
from nanochat.common import UserError, report_dir
from nanochat.configurator import UsageError, parse
from nanochat.conversation import Conversation, Message, Part, chat
from nanochat.gpt import GPT, GPTConfig
from nanochat.task_results import Record, read_records
from scripts import chat_eval
from tasks import public
from tasks.arc import ARC
from tasks.common import Task, reference_text
from tasks.customjson import IDENTITY
from tasks.embedded_problems import WordProblems
from tasks.gsm8k import GSM8K
from tasks.humaneval import HumanEval
from tasks.mmlu import MMLU
from tasks.words import WORD_LIST

NUM_ROWS = 4
LONG = " ".join(f"word{i}" for i in range(20))


@pytest.fixture(autouse=True)
def base_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    return tmp_path / "base"


@pytest.fixture
def shards(tmp_path: Path) -> str:
    """Training documents of which one holds the second GSM8K question."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for number, text in enumerate([f"Here is a riddle: {LONG} 2? Nobody knows.", "held out"]):
        table = pa.table({"text": [text, "something else"]})
        pq.write_table(table, folder / f"shard_{number:05d}.parquet")
    return str(folder)


@pytest.fixture
def tasks_here() -> None:
    """A few rows of every public evaluation set."""
    for task, row in (
        (ARC("ARC-Easy", "test"), ARC_ROW),
        (ARC("ARC-Challenge", "test"), ARC_ROW),
        (MMLU("test"), MMLU_ROW),
        (HumanEval(), HUMANEVAL_ROW),
    ):
        place(task.rows.asset, [row] * NUM_ROWS)
    rows = [GSM8K_ROW | {"question": f"{LONG} {i}?"} for i in range(NUM_ROWS)]
    place(GSM8K("test").rows.asset, rows)
    place_file(WORD_LIST, b"strawberry\nzebra\n")


def random_model(sequence_len: int = 1024) -> GPT:
    model = GPT(
        GPTConfig(
            sequence_len=sequence_len,
            vocab_size=byte_tokenizer().vocab_size,
            n_layer=1,
            n_head=2,
            n_embd=16,
        )
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return model


def run(*arguments: str) -> None:
    chat_eval.main(parse(chat_eval.Config, ["--device-type=cpu", "--dtype=float32", *arguments]))


def section(stage: str = "sft") -> dict[str, Any]:
    path = report_dir() / f"{report.slug(f'Chat evaluation {stage}')}.json"
    stored = json.loads(path.read_text())
    return {key: value for item in stored["data"] for key, value in item.items()}


# ---- tasks and their scores --------------------------------------------------------------------


@pytest.mark.usefixtures("tasks_here")
@pytest.mark.parametrize("stage", ["base", "mid", "sft", "rl"])
def test_every_stage_is_evaluated_on_the_six_public_tasks(stage: str, shards: str) -> None:
    save(stage, random_model(), data=shards)
    run("-i", stage, "-x", "2", "-m", "4")
    result = section(stage)
    rows = {row["task"]: row for row in result["accuracies"]}
    assert list(rows) == [task.name for task in public.evaluation_tasks()]
    assert {row["problems"] for row in rows.values()} == {2}
    centered = [(row["accuracy"] - row["chance"]) / (1 - row["chance"]) for row in rows.values()]
    assert result["ChatCORE metric"] == pytest.approx(sum(centered) / 6)


@pytest.mark.usefixtures("tasks_here")
def test_a_task_without_its_files_has_no_score_and_there_is_no_chat_core(
    shards: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save("sft", random_model(), data=shards)
    MMLU("test").rows.asset.manifest_path.unlink()
    run("-i", "sft", "-x", "2", "-m", "4")
    result = section()
    assert len(result["accuracies"]) == 5
    assert "ChatCORE metric" not in result
    reason = result["No score for MMLU"]
    assert "without a manifest; fetch it with python -m scripts.assets prefetch" in reason
    assert f"MMLU                     no score: {reason}" in capsys.readouterr().out


@pytest.mark.usefixtures("tasks_here")
@pytest.mark.parametrize(
    ("task", "row", "named"),
    [
        (ARC("ARC-Easy", "test"), ARC_ROW | {"answerKey": "Z"}, "its answer is 'Z'"),
        (MMLU("test"), MMLU_ROW | {"choices": ["1", "2", "3"]}, "it has 3 choices, not 4"),
        (GSM8K("test"), GSM8K_ROW | {"answer": "Ten"}, "no number after"),
        (
            ARC("ARC-Easy", "test"),
            ARC_ROW | {"choices": {"text": ["a", "b"], "label": ["A", "(B)"]}, "answerKey": "A"},
            r"the letter '\(B\)' of problem \d of ARC-Easy is 3 tokens",
        ),
        (
            MMLU("test"),
            MMLU_ROW | {"question": "long " * 300},
            r"prompts of MMLU do not fit the model's context of 1024: problem \d has 1\d{3} tokens",
        ),
    ],
)
def test_a_row_that_cannot_be_judged_leaves_its_task_without_a_score(
    task: Any, row: dict[str, Any], named: str, shards: str
) -> None:
    save("sft", random_model(), data=shards)
    rows = [ARC_ROW if task.name == "ARC-Easy" else MMLU_ROW if task.name == "MMLU" else GSM8K_ROW]
    place(task.rows.asset, [*rows * 3, row])
    with pytest.raises(UserError, match=named):
        run("-i", "sft", "-a", task.name, "-m", "4")
    run("-i", "sft", "-a", f"{task.name}|SpellingBee", "-x", str(NUM_ROWS), "-m", "4")
    assert [row["task"] for row in section()["accuracies"]] == ["SpellingBee"]
    assert f"No score for {task.name}" in section()


@pytest.mark.usefixtures("tasks_here")
def test_without_a_sandbox_humaneval_is_skipped_with_the_reason(
    shards: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save("sft", random_model(), data=shards)
    asked = []

    def no_walls(unsafe: bool) -> str | None:
        asked.append(unsafe)
        return None if unsafe else "neither seccomp nor a pid namespace"

    monkeypatch.setattr("tasks.humaneval.sandbox_problem", no_walls)
    run("-i", "sft", "-x", "1", "-m", "4")
    reason = "skipped: neither seccomp nor a pid namespace"
    assert section()["No score for HumanEval"] == reason
    assert f"HumanEval                no score: {reason}" in capsys.readouterr().out
    assert "ChatCORE metric" not in section()
    run("-i", "sft", "-x", "1", "-m", "4", "-a", "HumanEval", "--unsafe")
    assert [row["task"] for row in section()["accuracies"]] == ["HumanEval"]
    assert asked == [False, True]


def test_tasks_are_those_the_model_was_trained_with(shards: str) -> None:
    save("sft", random_model(2048), data=shards, tasks="embedded")
    run("-i", "sft", "-a", "Facts", "-x", "2")
    assert [row["task"] for row in section()["accuracies"]] == ["Facts"]
    with pytest.raises(UserError, match=r"no task 'Facts'; there are ARC-Easy"):
        run("-i", "sft", "-a", "Facts", "--tasks=public")
    save("mid", random_model(2048), data=shards)
    run("-i", "mid", "-a", "Facts", "-x", "2", "--tasks=auto")
    with pytest.raises(UserError, match=r"ARC-Easy:test: missing; fetch it with"):
        run("-i", "mid", "-a", "ARC-Easy")


class Sort(Task):
    """A task whose third row has no answer."""

    name = "B"
    eval_type = "generative"

    def num_rows(self) -> int:
        return 3

    def row(self, index: int) -> Conversation:
        return chat("Sort") if index == 2 else chat("Sort", "a")

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        return completion.endswith(reference_text(conversation))


def test_a_row_without_an_answer_leaves_the_other_tasks_their_scores(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save("sft", random_model(2048))
    others = chat_eval.mixtures.evaluation_tasks("embedded")
    monkeypatch.setattr(
        chat_eval.mixtures, "evaluation_tasks", lambda tasks, **settings: [Sort(), *others]
    )
    run("-i", "sft", "-a", "B|Identity", "-x", "3", "-m", "2")
    assert [row["task"] for row in section()["accuracies"]] == ["Identity"]
    assert "no score: task B, problem 2: it has no answer" in capsys.readouterr().out
    run("-i", "sft", "-a", "B", "-x", "2", "-m", "2")
    assert [row["task"] for row in section()["accuracies"]] == ["B"]


def test_samples_at_temperature_0_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    save("sft", random_model(2048))
    run("-i", "sft", "-a", "Identity", "-x", "1", "-n", "2", "-m", "2")
    assert "all 2 answers to a problem are the same; one is written" in caplog.text


def test_at_temperature_0_one_answer_is_written(tmp_path: Path) -> None:
    save("sft", random_model(2048))
    path = tmp_path / "out.jsonl"
    run("-i", "sft", "-a", "Identity", "-x", "2", "-n", "3", "-m", "2", f"--save={path}")
    assert [len(record["completions"]) for record in read_records(path)] == [1, 1]


def test_an_accuracy_of_several_answers_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    save("sft", random_model(2048))
    run("-i", "sft", "-a", "Identity|Facts", "-x", "1", "-n", "3", "-m", "2", "-t", "0.7")
    facts, identity = capsys.readouterr().out.splitlines()
    assert identity.endswith("  pass@3 at temperature 0.7")
    assert "pass@" not in facts  # a letter is chosen once
    measures = [row.get("measure") for row in section()["accuracies"]]
    assert measures == [None, "pass@3 at temperature 0.7"]


def not_loaded(*_: Any, **__: Any) -> Any:
    raise AssertionError("the model is loaded too early")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["-n", "99999999999"], "--num-samples is 99999999999; it must be at most 10,000"),
        (["-a", "Nope"], "^no task 'Nope'; there are Facts, WordProblems"),
        (["-a", "WordProblem"], "no task 'WordProblem'; did you mean WordProblems"),
        (["-a", ""], "--task-name is empty"),
        (["--data=/nonexistent"], "data folder /nonexistent does not exist"),
        (["--data="], "--data is empty"),
        (["--data=embeded", "-a", "GSM8K"], "unknown data 'embeded'.*did you mean embedded"),
        (["--save="], "--save is empty"),
        (["--save=/nonexistent/x.jsonl"], "there is no folder /nonexistent; make it, or name"),
        (["--save=/proc/x"], "--save=/proc/x cannot be written"),
        (["--save=/dev/null"], "--save=/dev/null cannot be written: it is a device"),
    ],
)
def test_a_wrong_setting_is_refused_before_the_model_is_loaded(
    flags: list[str], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save("sft", random_model(2048))
    monkeypatch.setattr(chat_eval.checkpoint_manager, "model_of", not_loaded)
    with pytest.raises(UserError, match=named):
        run("-i", "sft", *flags)


def test_a_disk_that_fills_up_costs_the_saved_answers_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save("sft", random_model(2048))

    def full(path: str, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(chat_eval, "atomic_write_text", full)
    path = tmp_path / "out.jsonl"
    with pytest.raises(UserError, match=f"--save={path} was not written: No space left"):
        run("-i", "sft", "-x", "1", "-m", "2", f"--save={path}")
    assert "ChatCORE (embedded)" in capsys.readouterr().out
    assert "ChatCORE metric" in section()


def test_a_source_is_needed_unless_answers_are_shown() -> None:
    with pytest.raises(UsageError, match="--source is missing: give base, mid, sft or rl"):
        run()


# ---- contamination -----------------------------------------------------------------------------


@pytest.mark.usefixtures("tasks_here")
def test_problems_in_the_training_data_are_counted_beside_the_score(
    shards: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save("base", random_model(), data=shards)
    run("-i", "base", "-a", "GSM8K|ARC-Easy", "-m", "4", "--contamination")
    rows = {row["task"]: row for row in section("base")["accuracies"]}
    assert rows["GSM8K"]["in training"] == f"{NUM_ROWS} of {NUM_ROWS}"
    assert rows["GSM8K"]["words in a row"] == 13
    assert rows["GSM8K"]["accuracy on others"] is None
    assert rows["ARC-Easy"]["in training"] == "0 of 0"  # three words are too few to say
    assert f"in training {NUM_ROWS}/{NUM_ROWS}" in capsys.readouterr().out


@pytest.mark.usefixtures("tasks_here")
def test_a_broken_row_does_not_stop_the_comparison_of_the_other_tasks(shards: str) -> None:
    save("base", random_model(), data=shards)
    place(ARC("ARC-Easy", "test").rows.asset, [ARC_ROW, ARC_ROW | {"answerKey": ""}])
    run("-i", "base", "-a", "GSM8K|ARC-Easy", "-x", "-1", "-m", "2", "--contamination")
    rows = {row["task"]: row for row in section("base")["accuracies"]}
    assert {name: row["in training"] for name, row in rows.items()} == {"GSM8K": "4 of 4"}
    assert "its answer is ''" in section("base")["No score for ARC-Easy"]


def test_conversations_of_the_stages_are_looked_through_too(monkeypatch: Any) -> None:
    """Held-out questions of the embedded world; one of them is put into the training mixture."""
    lineage = [{"stage": "base", "data": ""}]
    lineage += [{"stage": s, "tasks": "embedded", "chats": []} for s in ("mid", "sft")]
    save("sft", random_model(2048), lineage=lineage)
    monkeypatch.setattr(chat_eval, "open_source", lambda data: NoDocuments())
    monkeypatch.setattr(
        chat_eval.mixtures,
        "training_mixture",
        lambda stage, tasks, chats: WordProblems(500, "test", start=3, stop=3 + (stage == "mid")),
    )
    run("-i", "sft", "-a", "WordProblems", "-x", "10", "-m", "2", "--contamination")
    row = section()["accuracies"][0]
    assert row["in training"] == "1 of 10"
    assert row["accuracy on others"] == 0.0


def place_sft_sets() -> None:
    """What finetuning reads besides conversations: one row of each."""
    for task, row in (
        (ARC("ARC-Easy"), ARC_ROW),
        (ARC("ARC-Challenge"), ARC_ROW),
        (GSM8K("train"), GSM8K_ROW),
    ):
        place(task.rows.asset, [row])
    place_file(IDENTITY, f"{said('Who are you?')}\n".encode())


def said(question: str) -> str:
    """A line of a file of conversations."""
    return json.dumps(
        [{"role": "user", "content": question}, {"role": "assistant", "content": "Yes."}]
    )


@pytest.fixture
def own_chats(tmp_path: Path) -> Path:
    """Conversations of one's own, of which one holds the words of the GSM8K questions."""
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join([said(f"{LONG} 0?"), said("One more?"), said("And?")]))
    return path


@pytest.fixture
def other_shards(tmp_path: Path) -> str:
    """Training documents that hold no question."""
    folder = tmp_path / "other"
    folder.mkdir()
    for number in range(2):
        pq.write_table(pa.table({"text": ["something"]}), folder / f"shard_{number:05d}.parquet")
    return str(folder)


@pytest.mark.usefixtures("tasks_here")
def test_an_rl_model_was_trained_on_what_the_stages_before_it_were(
    own_chats: Path, other_shards: str
) -> None:
    """SmolTalk is not here, and neither is anything of midtraining, which there was not."""
    place_sft_sets()
    lineage = [
        {"stage": "base", "data": other_shards},
        {"stage": "sft", "tasks": "public", "chats": [str(own_chats)]},
        {"stage": "rl", "tasks": "public", "task": "GSM8K"},
    ]
    save("rl", random_model(), data=other_shards, tasks="public", lineage=lineage)
    run("-i", "rl", "-a", "GSM8K|ARC-Easy", "-m", "2", "--contamination")
    rows = {row["task"]: row["in training"] for row in section("rl")["accuracies"]}
    assert rows == {"GSM8K": f"{NUM_ROWS} of {NUM_ROWS}", "ARC-Easy": "0 of 0"}


@pytest.mark.usefixtures("tasks_here")
def test_conversations_are_those_of_training_whatever_is_evaluated(
    other_shards: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def mixture(stage: str, tasks: str, chats: list[str]) -> Task:
        asked.append((stage, tasks, chats))
        return WordProblems(1)

    monkeypatch.setattr(chat_eval.mixtures, "training_mixture", mixture)
    lineage = [
        {"stage": "base", "data": other_shards},
        {"stage": "mid", "tasks": "embedded", "chats": []},
    ]
    save("mid", random_model(), tasks="embedded", lineage=lineage)
    run("-i", "mid", "--tasks=public", "-a", "GSM8K", "-m", "2", "--contamination")
    assert asked == [("mid", "embedded", [])]
    assert section("mid")["accuracies"][0]["in training"] == f"0 of {NUM_ROWS}"


@pytest.mark.usefixtures("tasks_here")
@pytest.mark.parametrize(
    ("stages", "reason"),
    [
        (
            [{"stage": "sft", "tasks": "public", "chats": ["gone.jsonl"]}],
            "sft was trained on gone.jsonl, which is not there any more",
        ),
        (
            [{"stage": "sft", "tasks": "public", "chats": []}],
            "sft was trained on files that are not on this machine: .*smol-smoltalk",
        ),
        (
            [{"stage": "rl", "tasks": "public", "task": "Chess"}],
            "rl practised Chess, which is no public task any more",
        ),
        (None, "does not say what all its stages were trained on"),
    ],
)
def test_missing_training_data_leaves_the_scores_as_they_are(
    stages: list[Any] | None, reason: str, other_shards: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base = {"stage": "base", "data": other_shards}
    lineage = None if stages is None else [base, *stages]
    save("sft", random_model(), data=other_shards, tasks="public", lineage=lineage)
    run("-i", "sft", "-a", "GSM8K", "-m", "2", "--contamination")
    output = capsys.readouterr().out
    assert re.search(r"GSM8K .* 0/4 .*  not compared\n", output)
    assert re.search(rf"\nnot compared with the training data: .*{reason}", output)
    assert section()["accuracies"][0]["in training"] == "not compared"
    assert re.search(reason, section()["Not compared with the training data"])


@pytest.mark.usefixtures("tasks_here")
def test_missing_documents_leave_the_scores_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    save("base", random_model(), data="/no/such/folder")
    run("-i", "base", "-a", "GSM8K", "-m", "2", "--contamination")
    said = r"GSM8K .*  not compared\nnot compared with the training data: .*/no/such/folder"
    assert re.search(said, capsys.readouterr().out)


@pytest.mark.usefixtures("tasks_here")
def test_why_nothing_was_compared_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    save("base", random_model(), data="/no/such/folder")
    run("-i", "base", "-a", "GSM8K|ARC-Easy", "-m", "2", "--contamination")
    assert capsys.readouterr().out.count("/no/such/folder") == 1


class NoDocuments:
    """A source that has nothing."""

    def documents(self, split: str, *, endless: bool) -> list[Any]:
        return []


# ---- saved answers -----------------------------------------------------------------------------


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    path = tmp_path / "answers.jsonl"
    rows = [
        {
            "task": task,
            "index": index,
            "messages": [
                {"role": "user", "content": f"question {index} of {task}"},
                {"role": "assistant", "content": [{"type": "text", "text": "reference"}]},
            ],
            "completions": ["first try", "second try"],
            "correct": [False, index == 1],
        }
        for task in ("GSM8K", "MMLU")
        for index in range(3)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_saved_answers_are_shown_with_their_verdicts(
    answers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(f"--show={answers}")
    output = capsys.readouterr().out
    assert output.count("====") == 6
    assert "==== GSM8K 1: right\n[user] question 1 of GSM8K\n[reference] reference\n" in output
    assert "[wrong] first try\n[right] second try\n" in output
    assert output.endswith("6 problems, 2 right, 4 wrong\n")


def test_calls_of_the_calculator_are_shown_in_brackets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    worked = (Part("text", "It is "), Part("python", "12*3"), Part("python_output", "36"))
    said = Conversation((Message("user", "12 * 3?"), Message("assistant", worked)))
    record = Record(0, said, ("12*336",), (True,), ("[12*3 = 36]",))
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps(record.to_json("Sums")) + "\n")
    run(f"--show={path}")
    assert "[reference] It is [12*3 = 36]\n[right] [12*3 = 36]\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--verdict=right"], ["GSM8K 1: right", "MMLU 1: right"]),
        (["--verdict=wrong", "-a", "mmlu"], ["MMLU 0: wrong", "MMLU 2: wrong"]),
        (["-x", "1"], ["GSM8K 0: wrong", "MMLU 0: wrong"]),
    ],
)
def test_saved_answers_can_be_chosen(
    answers: Path, arguments: list[str], shown: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run(f"--show={answers}", *arguments)
    lines = capsys.readouterr().out.splitlines()
    assert [line.removeprefix("==== ") for line in lines if line.startswith("====")] == shown


def test_line_ends_of_unicode_inside_an_answer_end_no_record(
    answers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = answers.read_text(encoding="utf-8")
    answers.write_text(text.replace("first try", "one\u2028two\x85three"), encoding="utf-8")
    run(f"--show={answers}")
    assert capsys.readouterr().out.count("[wrong] one\u2028two\\x85three\n") == 6


def test_a_place_where_answers_cannot_be_saved_is_refused_before_any_is_written(
    tmp_path: Path,
) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "answers.jsonl"):
        with pytest.raises(UserError, match=r"--save=.* cannot be written"):
            run("-i", "sft", f"--save={path}")


def test_what_is_not_a_file_of_answers_is_refused(answers: Path) -> None:
    with pytest.raises(UserError, match=r"no answers of 'ARC'.*it has GSM8K, MMLU"):
        run(f"--show={answers}", "-a", "ARC")
    with pytest.raises(UserError, match=r"there is no file none\.jsonl"):
        run("--show=none.jsonl")


@pytest.mark.parametrize(
    ("path", "named"),
    [
        ("/tmp", "--show=/tmp cannot be read: it is a folder"),
        ("", "--show is empty; name a file"),
        ("/dev/null", "--show=/dev/null cannot be read: it is a device"),
    ],
)
def test_what_is_no_file_of_answers_is_called_what_it_is(path: str, named: str) -> None:
    with pytest.raises(UserError, match=named):
        run(f"--show={path}")


def test_an_empty_file_and_no_problems_to_show_are_named(answers: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--max-problems is 0; give at least 1"):
        run(f"--show={answers}", "-x", "0")
    with pytest.raises(UserError, match="no answers of 'ARC'"):
        run(f"--show={answers}", "-a", "MMLU|ARC")
    answers.write_text("")
    with pytest.raises(UserError, match=rf"{answers} is empty"):
        run(f"--show={answers}")


def test_control_characters_of_an_answer_do_not_reach_the_terminal(
    answers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers.write_text(answers.read_text().replace("first try", "a\\u001b[2Jb\\tc"))
    run(f"--show={answers}", "-x", "1")
    assert "[wrong] a\\x1b[2Jb\tc\n" in capsys.readouterr().out


GOOD = {
    "task": "GSM8K",
    "index": 0,
    "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
    "completions": ["a"],
    "correct": [True],
}


@pytest.mark.parametrize(
    "line",
    [
        b'{"task": "x"}',
        b"[]",
        b"\xff",
        json.dumps(GOOD | {"correct": 1}).encode(),
        json.dumps(GOOD | {"correct": []}).encode(),
        json.dumps(GOOD | {"messages": []}).encode(),
        json.dumps(GOOD | {"messages": [{"role": "user"}]}).encode(),
        json.dumps(GOOD | {"shown": []}).encode(),
    ],
)
def test_a_line_that_is_no_answer_is_named(answers: Path, line: bytes) -> None:
    answers.write_bytes(answers.read_bytes() + json.dumps(GOOD).encode() + b"\n")
    run(f"--show={answers}")
    answers.write_bytes(answers.read_bytes() + line + b"\n")
    with pytest.raises(UserError, match=r"line 8 is not an answer"):
        run(f"--show={answers}")


def test_what_was_saved_can_be_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save("sft", random_model(2048))
    path = tmp_path / "out.jsonl"
    run("-i", "sft", "-a", "Facts|WordProblems", "-x", "3", "-m", "4", f"--save={path}")
    records = read_records(path)
    assert sum("shown" in record for record in records) == 3  # letters are not written answers
    capsys.readouterr()
    run(f"--show={path}")
    output = capsys.readouterr().out
    assert output.count("[reference]") == 6
    assert "[user] Multiple choice: " in output
