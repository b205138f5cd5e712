"""From documents to a chat model on the real data sets, at depth 4 and in few steps.

Scores are near chance here. What is tested is that every stage runs on the public tasks, that
counts are the documented ones, and that masks, truncation and letters are right.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from public_data import REASON, SHARED, place_shared, unpack_shared

from nanochat import checkpoint_manager, report
from nanochat.common import report_dir
from nanochat.configurator import parse
from nanochat.execution import sandbox_problem
from nanochat.packing import ConversationFeed
from nanochat.sources import START
from nanochat.tokenizer import Tokenizer, get_tokenizer
from scripts import base_train, chat_eval, chat_rl, chat_sft, mid_train, tok_train
from tasks import mixtures
from tasks.arc import ARC
from tasks.gsm8k import GSM8K
from tasks.mmlu import MMLU

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not SHARED.is_dir(), reason=REASON)]

CHATS = ("sgd_dialogues_train", "gpteacher_roleplay", "self_instruct_human", "glaive_chat_demo")
# Of the 8,000 + 3,146 + 427 + 147 conversations, every twentieth is for validation.
NUM_CHATS, NUM_HELD_OUT = 7_600 + 2_988 + 405 + 139, 400 + 158 + 22 + 8
CONTEXT = 1024
CPU = ("--device-type=cpu", "--dtype=float32")
SMALL = (*CPU, "--device_batch_size=2", "--eval_tokens=2048", "--compile=off")


def run(script: Any, *arguments: str) -> None:
    assert not script.main(parse(script.Config, list(arguments)))


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    folder = tmp_path_factory.mktemp("chats")
    return tuple(str(unpack_shared(f"chat/{name}", folder)) for name in CHATS)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, chats: tuple[str, ...]) -> Iterator[Path]:
    """A base folder in which all stages have run."""
    folder = tmp_path_factory.mktemp("pipeline")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder))
        place_shared()
        text = f"--data={SHARED / 'text'}"
        run(tok_train, text, "--max_chars=2000000", "--vocab_size=4096")
        run(
            base_train,
            *(text, *SMALL, "--depth=4", f"--max_seq_len={CONTEXT}", "--total_batch_size=2048"),
            *("--num_iterations=2", "--core_metric_every=-1", "--sample_every=-1"),
        )
        own = f"--chats={','.join(chats)}"
        run(mid_train, own, *SMALL, "--total_batch_size=2048", "--num_iterations=2")
        run(chat_eval, "-i", "mid", *CPU, "-a", "ARC-Easy|GSM8K", "-x", "8", "-m", "8")
        run(
            chat_sft,
            *(own, *SMALL, "--target_examples_per_step=2", "--num_iterations=2"),
            *("--eval_metrics_every=2", "--eval_metrics_max_problems=8"),
        )
        run(
            chat_eval,
            *("-i", "sft", *CPU, "-x", "12", "-m", "16", "--contamination"),
            f"--save={folder / 'answers.jsonl'}",
        )
        run(
            chat_rl,
            *(*SMALL, "--num_iterations=1", "--examples_per_step=2", "--num_samples=2"),
            *("--max_new_tokens=8", "--eval_examples=2"),
        )
        run(chat_eval, "-i", "rl", *CPU, "-a", "GSM8K", "-x", "4", "-m", "8", "--contamination")
        yield folder


@pytest.fixture(autouse=True)
def base_dir(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))


@pytest.fixture(scope="module")
def tokenizer(base: Path) -> Tokenizer:
    return get_tokenizer()


def section(stage: str) -> dict[str, Any]:
    path = report_dir() / f"{report.slug(f'Chat evaluation {stage}')}.json"
    return {k: v for item in json.loads(path.read_text())["data"] for k, v in item.items()}


def test_every_stage_leaves_a_checkpoint_that_says_which_tasks_it_read() -> None:
    for stage in ("mid", "sft", "rl"):
        assert checkpoint_manager.find_checkpoint(stage).state["tasks"] == "public"


def test_all_six_tasks_are_scored_and_chat_core_is_their_mean() -> None:
    result = section("sft")
    rows = {row["task"]: row for row in result["accuracies"]}
    scored = ["ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval", "SpellingBee"]
    if sandbox_problem() is not None:
        scored.remove("HumanEval")
    assert list(rows) == scored
    assert {row["problems"] for row in rows.values()} == {12}
    assert ("ChatCORE metric" in result) == (sandbox_problem() is None)
    # The books and manuals of the training documents hold no grade school problems.
    assert rows["GSM8K"]["in training"] == "0 of 12"


def test_the_rl_model_is_compared_with_what_its_stages_read(chats: tuple[str, ...]) -> None:
    """SmolTalk, which none of them read, is not here."""
    assert section("rl")["accuracies"][0]["in training"] == "0 of 4"
    own = {"tasks": "public", "chats": list(chats)}
    assert checkpoint_manager.find_checkpoint("rl").state["lineage"][1:] == [
        {"stage": "mid", **own},
        {"stage": "sft", **own},
        {"stage": "rl", "tasks": "public", "task": "GSM8K"},
    ]


def test_the_measured_tasks_of_finetuning_are_mmlu_and_arc_easy() -> None:
    evaluations = checkpoint_manager.find_checkpoint("sft").state["loop"]["evaluations"]
    assert {"MMLU_accuracy", "ARC-Easy_accuracy"} <= set(evaluations)


def test_mixtures_have_the_documented_counts(chats: tuple[str, ...]) -> None:
    # The rows of MMLU's auxiliary_train stand in for others, but are as many.
    mid = mixtures.training_mixture("mid", "public", chats)
    assert len(mid) == NUM_CHATS + 99_842 + 7_473 + 2 * 1_000 + 200_000 + 80_000
    sft = mixtures.training_mixture("sft", "public", chats)
    assert len(sft) == 2_251 + 1_119 + 7_473 + 10_000 + 1_000 + 300 + 300
    assert len(mixtures.validation_mixture("mid", "public", chats)) == NUM_HELD_OUT + 5_200 + 420


def test_answers_were_saved_with_prompt_completion_and_verdict(base: Path) -> None:
    records = [json.loads(line) for line in (base / "answers.jsonl").read_text().splitlines()]
    scored = {row["task"]: row["passed"] for row in section("sft")["accuracies"]}
    assert len(records) == 12 * len(scored)
    for task, passed in scored.items():
        own = [record for record in records if record["task"] == task]
        assert sum(any(record["correct"]) for record in own) == passed
    letters = [r["completions"][0] for r in records if r["task"] == "ARC-Challenge"]
    assert set(letters) <= set("ABCDE1234")


def test_letters_are_one_token_and_the_same_in_question_and_answer(tokenizer: Tokenizer) -> None:
    for task in (ARC("ARC-Easy", "test"), ARC("ARC-Challenge", "test"), MMLU("test", step=10)):
        for conversation in task:
            prompt = tokenizer.render_for_completion(conversation)
            for letter in conversation.letters:
                (token,) = tokenizer.encode(letter)
                assert token in prompt
            ids, mask = tokenizer.render_conversation(conversation, max_tokens=CONTEXT * 4)
            answer = [i for i, supervised in zip(ids, mask, strict=True) if supervised]
            assert answer == [
                *tokenizer.encode(conversation.messages[-1].text),
                tokenizer.encode_special("<|assistant_end|>"),
            ]
            assert ids[: len(prompt)] == prompt


def test_calls_of_the_tool_are_learned_and_its_outputs_are_not(tokenizer: Tokenizer) -> None:
    special = tokenizer.encode_special
    for conversation in GSM8K("train", step=100):
        ids, mask = tokenizer.render_conversation(conversation, max_tokens=CONTEXT)
        start = ids.index(special("<|assistant_start|>"))
        assert not any(mask[: start + 1])
        inside_output = False
        for token, supervised in zip(ids[start + 1 :], mask[start + 1 :], strict=True):
            inside_output |= token == special("<|output_start|>")
            assert supervised == (not inside_output)
            inside_output &= token != special("<|output_end|>")
        assert (ids[-1], mask[-1]) == (special("<|assistant_end|>"), 1)


def test_rows_are_cut_at_the_context(tokenizer: Tokenizer, chats: tuple[str, ...]) -> None:
    mixture = mixtures.training_mixture("sft", "public", chats)
    feed = ConversationFeed(mixture, tokenizer, masked=True, max_tokens=256)
    chunks = itertools.islice(feed.chunks(START, endless=False), 4)
    lengths = [len(chunk.document(number)) for chunk in chunks for number in range(len(chunk))]
    assert max(lengths) == 256
    assert min(lengths) < 256
