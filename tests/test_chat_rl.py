"""The command of reinforcement learning: it learns, resumes exactly, and later commands know it."""

from __future__ import annotations

import logging
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from public_data import place_file
from scripted_model import byte_tokenizer, save, scripted_model, tokens_of

from nanochat import checkpoint_manager, configurator, resuming
from nanochat.common import UserError, checkpoints_dir
from nanochat.conversation import Conversation, chat
from nanochat.gpt import GPT, GPTConfig
from nanochat.runtime import World
from nanochat.tracking import read_metrics
from scripts import chat_cli, chat_eval, chat_rl
from tasks import mixtures, public
from tasks.common import Task
from tasks.words import WORD_LIST


class SmallLetters(Task):
    """An answer is right when it begins with a small letter, which one in ten does at first."""

    name = "SmallLetters"
    eval_type = "generative"

    def num_rows(self) -> int:
        return 40

    def row(self, index: int) -> Conversation:
        return chat(f"question {index}", "a")

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        return completion[:1].islower()


class Letters(SmallLetters):
    eval_type = "categorical"


@pytest.fixture
def sft_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base folder with a random sft model, and a task that it can learn in seconds."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    pair = SmallLetters(), SmallLetters()
    monkeypatch.setattr(
        chat_rl.mixtures,
        "rl_tasks",
        lambda tasks: {"SmallLetters": pair, "Letters": (Letters(), Letters())},
    )
    save("sft", tiny_model())
    return tmp_path


def tiny_model(sequence_len: int = 64) -> GPT:
    model = GPT(
        GPTConfig(
            sequence_len=sequence_len,
            vocab_size=byte_tokenizer().vocab_size,
            n_layer=1,
            n_head=2,
            n_embd=32,
        )
    )
    model.init_weights(torch.Generator().manual_seed(1))
    return model


class Calls(SmallLetters):
    """An answer is right when the tool was called and its output is there."""

    name = "Calls"

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        return "1+23" in completion


@pytest.fixture
def calling_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base folder with an sft model that mostly answers by a call of the tool and a full stop."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(chat_rl.mixtures, "rl_tasks", lambda tasks: {"Calls": (Calls(), Calls())})
    call = tokens_of("<|assistant_start|>", "<|python_start|>", "1+2", "<|python_end|>")
    model = scripted_model([*call, *tokens_of("<|output_end|>", ".", "<|assistant_end|>")])
    with torch.no_grad():
        # About 9 in 10 at each token: more than half of the answers stay on this way.
        model.lm_head.weight.mul_(9 / (3 * 320**0.5))
    save("sft", model)
    return tmp_path


def run(*flags: str, **settings: Any) -> int:
    """`chat_rl` in small."""
    sizes = {
        "num_iterations": 4,
        "examples_per_step": 2,
        "num_samples": 8,
        "max_new_tokens": 1,
        "top_k": 0,
        "device_batch_size": 16,
        "eval_examples": 40,
        "eval_samples": 2,
        "eval_every": 2,
        "save_every": 2,
        "keep_last": 5,
        "dtype": "float32",
        "device_type": "cpu",
    }
    arguments = [f"--{name}={value}" for name, value in {**sizes, **settings}.items()]
    return chat_rl.main(configurator.parse(chat_rl.Config, [*arguments, *flags]))


def metrics(folder: Path) -> list[dict[str, Any]]:
    return read_metrics(folder / "chatrl_checkpoints/d1/metrics.jsonl")


def test_reward_rises_and_the_report_tells(sft_model: Path) -> None:
    assert run(num_iterations=40, examples_per_step=6, init_lr_frac=0.5, eval_every=20) == 0
    rewards = [row["reward"] for row in metrics(sft_model) if "reward" in row]
    assert len(rewards) == 40
    assert sum(rewards[:5]) / 5 < 0.3
    assert sum(rewards[-5:]) / 5 > 0.6
    passes = [row for row in metrics(sft_model) if "pass_at_1" in row]
    assert [row["step"] for row in passes] == [0, 20, 40]
    assert passes[0]["pass_at_1"] < passes[0]["pass_at_2"]
    assert passes[-1]["pass_at_1"] > passes[0]["pass_at_1"] + 0.3
    assert '"Final pass at 1"' in (sft_model / "report/chat-rl.json").read_text()


def test_the_console_counts_answers_and_not_tokens_nobody_has_written(
    sft_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    run("--dry_run")
    assert "4 steps x 16 answers, " in caplog.text
    assert " tokens = " not in caplog.text


@pytest.mark.parametrize("flag", ["--init_lr_frac=-1", "--kl_weight=inf", "--warmdown_ratio=2"])
def test_a_refused_number_leaves_the_earlier_run_where_it_is(sft_model: Path, flag: str) -> None:
    run(num_iterations=2)
    with pytest.raises(UserError, match=r"^--[a-z-]+ is \S+; give "):
        run(flag, num_iterations=2)
    assert checkpoint_manager.saved_steps(checkpoints_dir("rl") / "d1") == [2]


@pytest.mark.parametrize("num_held_out", [0, 1])
def test_a_question_too_long_for_the_context_is_refused_before_anything_is_moved(
    sft_model: Path, monkeypatch: pytest.MonkeyPatch, num_held_out: int
) -> None:
    class Long(SmallLetters):
        def row(self, index: int) -> Conversation:
            return chat("q" * 70, "a")

    run(num_iterations=2)
    pair = (SmallLetters(), Long()) if num_held_out else (Long(), SmallLetters())
    monkeypatch.setattr(chat_rl.mixtures, "rl_tasks", lambda tasks: {"Mixed": pair})
    with pytest.raises(UserError, match="context is 64 tokens; practise with a model of a longer"):
        run(num_iterations=2)
    assert checkpoint_manager.saved_steps(checkpoints_dir("rl") / "d1") == [2]


def test_a_run_without_a_checkpoint_tells_how_to_put_back_the_one_before(
    sft_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(num_iterations=2)
    run_dir = checkpoints_dir("rl") / "d1"
    assert resuming.previous_run(run_dir, {}, resume=False, world=World()) is None
    (run_dir / "metrics.jsonl").write_text("")  # it began, and died
    command = f"mv {run_dir}/previous/* {run_dir}/"
    advice = re.escape(f"an earlier run is in {run_dir}/previous, put it back with `{command}`")
    for tag in (None, "d1"):
        with pytest.raises(UserError, match=f"no rl checkpoint in .*{advice}"):
            checkpoint_manager.find_checkpoint("rl", tag)
    save("rl", tiny_model(), tag="d2")
    with pytest.raises(UserError, match=f"no rl model 'd1' in .*; there is d2; {advice}"):
        checkpoint_manager.find_checkpoint("rl", "d1")
    subprocess.run(command, shell=True, check=True)
    assert checkpoint_manager.find_checkpoint("rl", "d1").step == 2


def test_resumed_run_equals_undisturbed_run_bit_for_bit(calling_model: Path) -> None:
    run(max_new_tokens=12)
    folder = checkpoints_dir("rl") / "d1"
    whole = checkpoint_manager.newest_checkpoint(folder)
    assert whole is not None
    assert whole.step == 4
    start = checkpoint_manager.find_checkpoint("sft", None, None)
    assert whole.weights_hash != start.weights_hash
    rows = [row for row in metrics(calling_model) if "reward" in row or "pass_at_1" in row]
    steps = [row for row in rows if "reward" in row]
    assert len(steps) == 4
    # Answers with a call of the tool and without, shorter than the limit and cut off by it.
    assert all(0 < row["reward"] < 1 and 0 < row["cut_off"] < 1 for row in steps)
    assert all(5 < row["answer_tokens"] < 12 for row in steps)
    hash_of_whole = whole.weights_hash
    shutil.rmtree(folder / "step_000004")

    run("--resume", max_new_tokens=12)

    resumed = checkpoint_manager.newest_checkpoint(folder)
    assert resumed is not None
    assert resumed.step == 4
    assert resumed.weights_hash == hash_of_whole
    again = [row for row in metrics(calling_model) if "reward" in row or "pass_at_1" in row]
    assert again == rows


def test_rl_model_can_be_evaluated_and_talked_to(
    sft_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(num_iterations=1)
    monkeypatch.setattr(
        chat_eval.mixtures, "evaluation_tasks", lambda tasks, **settings: [SmallLetters()]
    )
    chat_eval.main(
        configurator.parse(chat_eval.Config, ["-i", "rl", "-m", "2", "--device-type=cpu"])
    )
    assert "SmallLetters" in capsys.readouterr().out
    chat_cli.main(
        configurator.parse(
            chat_cli.Config, ["-i", "rl", "-p", "hello", "-t", "0", "--max-new-tokens=2"]
        )
    )
    state = checkpoint_manager.find_checkpoint("rl", None, None).state
    assert state["parent"]["stage"] == "sft"
    assert state["task"] == "SmallLetters"


def test_spelling_bee_of_the_public_tasks_can_be_practised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It needs the word list; GSM8K is not here."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    place_file(WORD_LIST, b"strawberry\nzebra\n")
    save("sft", tiny_model(sequence_len=256), tasks="public")
    assert run("--task=spellingbee", num_iterations=2, max_new_tokens=8, eval_examples=4) == 0
    assert checkpoint_manager.find_checkpoint("rl").state["task"] == "SpellingBee"
    with pytest.raises(UserError, match=r"openai/gsm8k.*prefetch --stage rl"):
        run()


def test_the_public_tasks_to_practise_ask_what_midtraining_has_not_shown() -> None:
    pairs = mixtures.rl_tasks("public")
    assert list(pairs) == ["GSM8K", "SpellingBee"]
    shown = [task for task in public.training_tasks("mid") if task.name == "SpellingBee"]
    practice, held_out = pairs["SpellingBee"]
    assert practice.start == len(shown[0]) == 80_000
    assert len(practice) == 50_000
    assert len(held_out) == 256


def test_tasks_that_cannot_be_practised_are_named(sft_model: Path) -> None:
    with pytest.raises(UserError, match="Letters is categorical"):
        run("--task=Letters")
    with pytest.raises(UserError, match="did you mean SmallLetters"):
        run("--task=smalleters")
    with pytest.raises(UserError, match=r"no task to practise 'Nope'; there are SmallL.*--tasks"):
        run("--task=Nope")


def raises_key_error(*_: Any) -> Any:
    raise KeyError("answer")


@pytest.mark.parametrize(
    ("method", "does", "named"),
    [
        ("row", lambda task, index: chat("Sort"), "problem 0: it has no answer"),
        ("row", lambda task, index: chat("Sort", ""), "problem 0: its answer is empty"),
        ("row", raises_key_error, "problem 0: KeyError 'answer'"),
        ("evaluate", raises_key_error, "problem 0: KeyError 'answer'"),
        ("evaluate", lambda *_: None, "problem 0: evaluate returned None"),
        ("reward", raises_key_error, r"problem \d+: KeyError 'answer'"),
        ("reward", lambda *_: "1", r"problem \d+: reward returned '1'; it must return a finite"),
        ("reward", lambda *_: float("nan"), r"problem \d+: reward returned nan"),
    ],
)
def test_what_a_task_does_wrong_is_one_sentence_with_its_name(
    method: str, does: Any, named: str, sft_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SmallLetters, method, does)
    with pytest.raises(UserError, match=f"task SmallLetters, {named}"):
        run(num_iterations=1)


def test_a_verdict_that_is_none_earns_nothing(
    sft_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SmallLetters, "evaluate", lambda *_: None)
    with pytest.raises(UserError, match=r"problem \d+: evaluate returned None"):
        run(num_iterations=1, eval_every=-1)


def test_sharded_weights_are_refused(sft_model: Path) -> None:
    with pytest.raises(UserError, match="--shard=full: answers are written with whole weights"):
        run(shard="full")


@pytest.mark.parametrize("flag", ["eval_samples", "eval_examples", "num_epochs", "num_iterations"])
def test_counts_below_one_are_refused(sft_model: Path, flag: str) -> None:
    with pytest.raises(UserError, match=f"--{flag.replace('_', '-')} is 0"):
        run(**{flag: 0})


def test_kl_term_needs_no_more_than_its_flag(sft_model: Path) -> None:
    assert run("--kl-weight=0.1", num_iterations=2) == 0
    rows = [row for row in metrics(sft_model) if "kl" in row]
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[0]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert rows[1]["kl"] > rows[0]["kl"]
