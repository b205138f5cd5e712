"""Which tasks each stage uses: the documented mixtures, own conversations, missing files."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from public_data import place_file
from scripted_model import save, scripted_model

from nanochat.common import UserError
from nanochat.configurator import parse
from nanochat.sources.hub_rows import HubRows
from scripts import chat_rl, chat_sft, mid_train
from tasks import mixtures, public
from tasks.customjson import IDENTITY
from tasks.public import Epochs
from tasks.task_sets import (
    choose_task_set,
    require_chatcore,
    require_tasks,
    split_chats,
    trained_on,
)
from tasks.words import WORD_LIST

# Rows of the splits, as the hub gives them.
ROWS = {
    "HuggingFaceTB/smol-smoltalk:default:train": 460_341,
    "HuggingFaceTB/smol-smoltalk:default:test": 24_229,
    "cais/mmlu:all:auxiliary_train": 99_842,
    "cais/mmlu:all:test": 14_042,
    "openai/gsm8k:main:train": 7_473,
    "openai/gsm8k:main:test": 1_319,
    "openai/openai_humaneval:openai_humaneval:test": 164,
    "allenai/ai2_arc:ARC-Easy:train": 2_251,
    "allenai/ai2_arc:ARC-Challenge:train": 1_119,
    "allenai/ai2_arc:ARC-Easy:test": 2_376,
    "allenai/ai2_arc:ARC-Challenge:test": 1_172,
}


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    return tmp_path / "base"


def test_nothing_is_read_before_a_row_is_asked_for() -> None:
    for stage in mixtures.STAGES:
        assert mixtures.tasks_of(stage, "public")
    with pytest.raises(UserError, match=r"python -m scripts.assets prefetch"):
        len(mixtures.training_mixture("mid", "public"))


# ---- mixtures ----------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits as long as the real ones, with nothing in them."""
    monkeypatch.setattr(HubRows, "__len__", lambda rows: ROWS[rows.asset.name])
    line = json.dumps(
        [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "nanochat"}]
    )
    place_file(IDENTITY, f"{line}\n".encode() * 1000)
    place_file(WORD_LIST, b"strawberry\n")


@pytest.mark.usefixtures("counted")
def test_mixtures_have_the_documented_parts_and_sizes() -> None:
    def sizes(tasks: list[Any]) -> list[tuple[str, int]]:
        return [(task.name, len(task)) for task in tasks]

    assert sizes(public.training_tasks("mid")) == [
        ("SmolTalk", 460_341),
        ("MMLU", 99_842),
        ("GSM8K", 7_473),
        ("CustomJSON", 1_000),
        ("CustomJSON", 1_000),
        ("SimpleSpelling", 200_000),
        ("SpellingBee", 80_000),
    ]
    assert len(mixtures.training_mixture("mid", "public")) == 849_656
    assert sizes(public.training_tasks("sft")) == [
        ("ARC-Easy", 2_251),
        ("ARC-Challenge", 1_119),
        ("GSM8K", 7_473),
        ("SmolTalk", 10_000),
        ("CustomJSON", 1_000),
        ("SimpleSpelling", 300),
        ("SpellingBee", 300),
    ]
    assert len(mixtures.training_mixture("sft", "public")) == 22_443
    assert sizes(public.validation_tasks("mid")) == [
        ("SmolTalk", 24_229),
        ("MMLU", 5_200),
        ("GSM8K", 420),
    ]
    assert sizes(public.validation_tasks("sft")) == [("SmolTalk", 24_229)]
    assert sizes(mixtures.evaluation_tasks("public")) == [
        ("ARC-Easy", 2_376),
        ("ARC-Challenge", 1_172),
        ("MMLU", 14_042),
        ("GSM8K", 1_319),
        ("HumanEval", 164),
        ("SpellingBee", 256),
    ]
    assert [task.name for task in mixtures.metric_tasks("public")] == ["MMLU", "ARC-Easy"]


@pytest.mark.usefixtures("counted")
def test_the_merged_mixture_is_that_of_midtraining_with_more_of_two_tasks() -> None:
    mixture = mixtures.training_mixture("mid", "public", epochs=Epochs(mmlu=3, gsm8k=4))
    assert mixtures.contents(mixture) == {
        "SmolTalk": 460_341,
        "MMLU": 3 * 99_842,
        "GSM8K": 4 * 7_473,
        "CustomJSON": 2_000,
        "SimpleSpelling": 200_000,
        "SpellingBee": 80_000,
    }
    assert "MMLU" not in mixtures.contents(
        mixtures.training_mixture("mid", "public", epochs=Epochs(mmlu=0))
    )
    with pytest.raises(UserError, match="belong to the mixture of mid, not of sft"):
        mixtures.training_mixture("sft", "public", epochs=Epochs(mmlu=3))


def test_what_a_recipe_shows_again_is_compared_once() -> None:
    entry = {"stage": "sft", "tasks": "embedded", "recipe": "merged"}
    task = trained_on(entry | {"mmlu_epochs": 0, "gsm8k_epochs": 4})
    kinds = mixtures.contents(mixtures.training_mixture("mid", "embedded"))
    del kinds["ChoiceQuestions"]
    assert mixtures.contents(task) == kinds


def test_problems_of_chatcore_that_are_not_here_are_named() -> None:
    with pytest.raises(UserError, match=r"ARC-Easy:test.*--stage eval; --chatcore-every=-1"):
        require_chatcore(mixtures.evaluation_tasks("public"))


def test_chance_is_a_quarter_for_the_lettered_tasks_and_nothing_for_the_others() -> None:
    chances = {task.name: task.chance for task in mixtures.evaluation_tasks("public")}
    assert {name for name, chance in chances.items() if chance == 0.25} == {
        "ARC-Easy",
        "ARC-Challenge",
        "MMLU",
    }
    assert sum(chances.values()) == 0.75


def test_own_conversations_stand_in_the_place_of_smoltalk(tmp_path: Path) -> None:
    files = []
    for name, count in (("a", 45), ("b", 3)):
        lines = [
            json.dumps(
                [{"role": "user", "content": f"{name}{i}"}, {"role": "assistant", "content": "x"}]
            )
            for i in range(count)
        ]
        files.append(tmp_path / f"{name}.jsonl")
        files[-1].write_text("\n".join(lines))
    chats = split_chats(f"{files[0]}, {files[1]}")

    def said(tasks: list[Any]) -> list[str]:
        return [
            c.messages[0].text for t in tasks if t.name == "mixture" and not t.assets() for c in t
        ]

    train, held_out = (
        said(public.training_tasks("mid", chats)),
        said(public.validation_tasks("mid", chats)),
    )
    assert sorted(held_out) == ["a42", "a43", "a44", "b2"]
    assert sorted(train + held_out) == sorted([f"a{i}" for i in range(45)] + ["b0", "b1", "b2"])
    assert not [
        a for t in mixtures.tasks_of("sft", "public", chats) for a in t.assets() if "smol" in a.name
    ]
    with pytest.raises(UserError, match="use it with --tasks=public"):
        mixtures.training_mixture("mid", "embedded", chats)
    files[1].write_text(lines[0])
    with pytest.raises(UserError, match=r"b.jsonl has 1 conversations; at least 2"):
        public.training_tasks("mid", chats)


@pytest.mark.parametrize(
    ("stage", "tasks"), [("base", "public"), ("eval", "public"), ("mid", "own")]
)
def test_an_unknown_stage_or_task_set_is_refused(stage: str, tasks: str) -> None:
    with pytest.raises(UserError, match=f"no mixture of .*{stage}|no tasks 'own'"):
        mixtures.training_mixture(stage, tasks)


# ---- which task set ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "data", "recorded", "chosen"),
    [
        (None, "embedded", None, "embedded"),
        (None, "fineweb-edu", None, "public"),
        (None, "/some/folder", None, "public"),
        (None, "/some/folder", "embedded", "embedded"),
        (None, "embedded", "public", "public"),
        ("embedded", "climbmix", None, "embedded"),
        ("public", "embedded", "embedded", "public"),
        ("auto", "embedded", None, "embedded"),
        ("auto", "climbmix", "public", "public"),
        ("auto", "climbmix", None, "embedded"),  # nothing is on this machine
    ],
)
def test_the_task_set_is_what_was_asked_for_recorded_or_fits_the_data(
    asked: str | None, data: str, recorded: str | None, chosen: str
) -> None:
    assert choose_task_set(asked, data=data, recorded=recorded) == chosen


def test_auto_says_what_is_missing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        choose_task_set("auto", data="climbmix")
    assert "public tasks are not all on this machine" in caplog.text
    assert "openai/gsm8k:main:train" in caplog.text
    assert "embedded world are used" in caplog.text


@pytest.mark.parametrize(
    ("data", "recorded"), [("embedded", None), ("embedded", "embedded"), ("folder", "embedded")]
)
def test_auto_asks_for_the_public_tasks_whatever_came_before(
    data: str,
    recorded: str | None,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert choose_task_set("auto", data=data, recorded=recorded) == "embedded"
    assert "missing: " in caplog.text
    monkeypatch.setattr("tasks.task_sets.missing_assets", lambda tasks: [])
    assert choose_task_set("auto", data=data, recorded=recorded) == "public"


def test_missing_files_are_named_with_both_ways_out() -> None:
    with pytest.raises(UserError) as error:
        require_tasks("sft", "public")
    text = str(error.value)
    assert "identity" in text
    assert "allenai/ai2_arc:ARC-Easy:train" in text
    assert "python -m scripts.assets prefetch" in text
    assert "--tasks=embedded" in text
    require_tasks("sft", "embedded")


@pytest.mark.parametrize(("script", "source"), [(mid_train, "base"), (chat_sft, "mid")])
def test_a_stage_on_a_folder_names_what_is_missing_before_it_begins(
    script: Any, source: str, tmp_path: Path
) -> None:
    save(source, scripted_model([0, 1]), data=str(tmp_path))
    with pytest.raises(UserError, match=r"files that are not on this machine: .*--tasks=embedded"):
        script.main(parse(script.Config, ["--device-type=cpu"]))
    save(source, scripted_model([0, 1]), data=str(tmp_path), tasks="embedded")
    with pytest.raises(UserError, match="use it with --tasks=public"):
        script.main(parse(script.Config, ["--device-type=cpu", "--chats=mine.jsonl"]))


@pytest.mark.parametrize("command", [mid_train, chat_sft, chat_rl])
@pytest.mark.parametrize(
    ("data", "named"),
    [
        ("/nonexistent", "data folder /nonexistent does not exist"),
        ("embeded", "unknown data 'embeded'.*did you mean embedded"),
        ("", "--data is empty"),
    ],
)
def test_data_that_is_not_there_is_refused_where_it_only_decides_about_the_tasks(
    command: Any, data: str, named: str
) -> None:
    with pytest.raises(UserError, match=named):
        command.main(parse(command.Config, [f"--data={data}", "--device-type=cpu"]))
