"""What a model was trained on is written down stage by stage, whatever way it took."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from public_data import ARC_ROW, GSM8K_ROW, MMLU_ROW, place, place_file
from scripted_model import byte_tokenizer, save

from nanochat import checkpoint_manager
from nanochat.configurator import parse
from nanochat.gpt import GPT, GPTConfig
from nanochat.lineage import lineage_of
from scripts import chat_rl, chat_sft, mid_train
from tasks.arc import ARC
from tasks.customjson import IDENTITY
from tasks.gsm8k import GSM8K
from tasks.mmlu import MMLU
from tasks.words import WORD_LIST

SMALL = (
    *("--device-type=cpu", "--dtype=float32", "--device-batch-size=2", "--num-iterations=1"),
    *("--eval-tokens=256", "--compile=off"),
)
MID = ("--total-batch-size=256", *SMALL)
SFT = ("--target-examples-per-step=2", *SMALL, "--eval-metrics-every=-1")
RL = (
    *("--device-type=cpu", "--dtype=float32", "--num-iterations=1", "--examples-per-step=2"),
    *("--num-samples=2", "--max-new-tokens=4", "--eval-examples=2", "--eval-samples=1"),
)
BASE = {"stage": "base", "data": "embedded"}


@pytest.fixture(autouse=True)
def base_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    save("base", tiny_model(), sequence_len=128)


def tiny_model() -> GPT:
    model = GPT(
        GPTConfig(
            sequence_len=128,
            vocab_size=byte_tokenizer().vocab_size,
            n_layer=1,
            n_head=2,
            n_embd=16,
        )
    )
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def run(script: Any, *arguments: str) -> None:
    assert script.main(parse(script.Config, list(arguments))) == 0


def lineage(stage: str) -> Any:
    return lineage_of(checkpoint_manager.find_checkpoint(stage))


def test_a_base_model_has_read_its_documents() -> None:
    assert lineage("base") == [BASE]


def test_each_stage_adds_itself_to_what_came_before() -> None:
    run(mid_train, *MID)
    run(chat_sft, *SFT)
    mid = {"stage": "mid", "tasks": "embedded", "chats": []}
    sft = {"stage": "sft", "tasks": "embedded", "chats": []}
    assert lineage("mid") == [BASE, mid]
    assert lineage("sft") == [BASE, mid, sft]
    run(chat_sft, "--source=base", *SFT)
    assert lineage("sft") == [BASE, sft]
    run(chat_rl, "--source=mid", "--task=SpellingBee", *RL)
    assert lineage("rl") == [BASE, mid, {"stage": "rl", "tasks": "embedded", "task": "SpellingBee"}]


def test_files_of_conversations_are_named_by_their_whole_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place(MMLU("test").rows.asset, [MMLU_ROW])
    place(GSM8K("train").rows.asset, [GSM8K_ROW])
    for subset in ("ARC-Easy", "ARC-Challenge"):
        place(ARC(subset, "train").rows.asset, [ARC_ROW])
    place(ARC("ARC-Easy", "test").rows.asset, [ARC_ROW])
    place_file(WORD_LIST, b"strawberry\nzebra\n")
    line = json.dumps([{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}])
    place_file(IDENTITY, f"{line}\n".encode())
    (tmp_path / "own.jsonl").write_text(f"{line}\n" * 3)
    monkeypatch.chdir(tmp_path)
    own = ("--tasks=public", "--chats=own.jsonl")
    run(chat_sft, "--source=base", *own, *SFT)
    entry = {"stage": "sft", "tasks": "public", "chats": [str(tmp_path / "own.jsonl")]}
    assert lineage("sft") == [BASE, entry]


def test_what_an_older_model_was_trained_on_is_not_known_of_its_children() -> None:
    save("mid", tiny_model())
    assert lineage("mid") is None
    run(chat_sft, *SFT)
    assert lineage("sft") is None
