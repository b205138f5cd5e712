"""Finetuning that takes over settings and momentum, and the merged recipe."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks
from public_data import ARC_ROW, GSM8K_ROW, HUMANEVAL_ROW, MMLU_ROW, place, place_file
from scripted_model import byte_tokenizer, save
from tiny_run import make_trainer

from nanochat import checkpoint_manager, task_eval
from nanochat.checkpoint_manager import Checkpoint, newest_checkpoint
from nanochat.common import NotScoredError, UserError, checkpoints_dir
from nanochat.configurator import parse
from nanochat.execution import sandbox_problem
from nanochat.gpt import GPT, GPTConfig
from nanochat.inheritance import inherit
from nanochat.optimizers import OptimizerConfig, build_optimizer
from nanochat.runtime import Runtime, World
from nanochat.tracking import read_metrics
from scripts import chat_sft, mid_train
from tasks.arc import ARC
from tasks.customjson import IDENTITY
from tasks.gsm8k import GSM8K
from tasks.humaneval import HumanEval
from tasks.mmlu import MMLU
from tasks.task_sets import trained_on
from tasks.words import WORD_LIST

CONTEXT = 512  # what the embedded questions fit into, in bytes
SMALL = (
    *("--device-type=cpu", "--dtype=float32", "--compile=off", "--eval-tokens=256"),
    *("--bpb-limit=99", "--num-iterations=1", "--eval-metrics-every=-1"),
)
NO_SCORES = ("--chatcore-every=-1",)
SCORES = ("--chatcore-every=1", "--chatcore-max-cat=4", "--chatcore-max-sample=1")
MERGED = ("--recipe=merged", *SMALL)
# What the base run says of itself.
RATES = {"embedding_lr": 0.11, "unembedding_lr": 0.003, "matrix_lr": 0.013, "scalar_lr": 0.4}
UPDATES = 7


@pytest.fixture(autouse=True)
def base_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    caplog.set_level(logging.INFO)
    return tmp_path / "base"


def tiny_model() -> GPT:
    model = GPT(GPTConfig(CONTEXT, byte_tokenizer().vocab_size, n_layer=1, n_head=2, n_embd=16))
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def optimizer_state(model: GPT) -> dict[str, torch.Tensor]:
    """Numbers that no run would come to, so that one sees where they end up."""
    optimizer = build_optimizer(
        list(model.named_parameters()), OptimizerConfig(), model_dim=16, world=World()
    )
    state = {name: torch.full_like(value, 0.25) for name, value in optimizer.state_dict().items()}
    return state | {"step": torch.tensor(UPDATES)}


def save_base(**facts: Any) -> dict[str, torch.Tensor]:
    """A base model with its optimizer state, which is returned."""
    model = tiny_model()
    state = optimizer_state(model)
    recorded = {"config": {**RATES, "device_batch_size": 2}, "total_batch_size": 4 * CONTEXT}
    save("base", model, **{"optimizer": state} | recorded | facts)
    return state


def finetune(*flags: str) -> Checkpoint:
    assert chat_sft.main(parse(chat_sft.Config, list(flags))) == 0
    return checkpoint_manager.find_checkpoint("sft")


# ---- the recipe --------------------------------------------------------------------------------


def test_the_merged_recipe_has_the_defaults_of_one_stage_from_base() -> None:
    config = parse(chat_sft.Config, ["--recipe=merged"])
    assert (config.source, config.inherit, config.load_optimizer) == ("base", True, True)
    assert (config.init_lr_frac, config.warmup_ratio, config.warmdown_ratio) == (0.8, 0.0, 0.5)
    assert (config.final_lr_frac, config.masked, config.packing) == (0.0, True, "best-fit")
    assert (config.eval_every, config.eval_tokens) == (200, 40 * 524_288)
    assert (config.chatcore_every, config.chatcore_max_cat, config.chatcore_max_sample) == (
        *(200, -1, 24),
    )
    assert (config.mmlu_epochs, config.gsm8k_epochs) == (3, 4)


def test_what_is_given_comes_before_the_recipe() -> None:
    flags = ["--mmlu-epochs=1", "--source=mid", "--recipe", "merged", "--load-optimizer", "0"]
    config = parse(chat_sft.Config, flags)
    assert (config.mmlu_epochs, config.gsm8k_epochs) == (1, 4)
    assert (config.source, config.load_optimizer) == ("mid", False)


def test_finetuning_is_the_classic_one_without_a_flag() -> None:
    config = parse(chat_sft.Config, [])
    assert (config.recipe, config.source, config.packing) == ("classic", "mid", "rows")
    assert (config.inherit, config.load_optimizer, config.chatcore_every) == (False, False, -1)
    assert (config.device_batch_size, config.init_lr_frac) == (4, 0.02)
    save("mid", tiny_model())
    settings = finetune(*SMALL).state["config"]
    assert settings["target_examples_per_step"] == 32
    assert settings["matrix_lr"] == 0.02


@pytest.mark.parametrize("optimizer", ["classic", "modern"])
def test_momentum_of_the_merged_recipe_rises_to_095_and_stays(optimizer: str) -> None:
    config = parse(chat_sft.Config, ["--recipe=merged", f"--optimizer={optimizer}"])
    schedule = config.settled("classic").schedule(2000)
    assert [schedule.momentum(step) for step in (0, 150, 300, 1999)] == pytest.approx(
        [0.85, 0.9, 0.95, 0.95]
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mmlu-epochs=2"], "--mmlu-epochs is for the merged mixture; add --recipe=merged"),
        (["--recipe=merged", "--gsm8k-epochs=-1"], "--gsm8k-epochs is -1; give at least 0"),
        (["--total-batch-size=8", "--target-examples-per-step=8"], "give one of them"),
        (["--total-batch-size=0"], "--total-batch-size is 0; it must be at least 1"),
        (["--device-batch-size=0"], "--device-batch-size is 0; give at least 1, or -1"),
    ],
)
def test_flags_that_mean_nothing_are_refused(flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        chat_sft.main(parse(chat_sft.Config, flags))


@pytest.mark.parametrize("script", [chat_sft, mid_train])
@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--chatcore-max-cat=0", "--chatcore-max-cat is 0; give at least 1, or -1 for all"),
        ("--chatcore-max-sample=-2", "--chatcore-max-sample is -2; give at least 1, or -1 for all"),
        ("--max-seq-len=-1", "--max-seq-len is -1; it must be at least 1"),
        ("--max-seq-len=0", "--max-seq-len is 0; it must be at least 1"),
    ],
)
def test_numbers_of_both_stages_are_refused_before_a_checkpoint_is_looked_for(
    script: Any, flag: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        script.main(parse(script.Config, [flag]))


@pytest.mark.parametrize("name", ["max-seq-len", "total-batch-size"])
def test_less_than_nothing_does_not_mean_inherited(name: str) -> None:
    with pytest.raises(UserError, match=f"--{name} is -1; it must be at least 1"):
        chat_sft.main(parse(chat_sft.Config, ["--inherit", f"--{name}=-1"]))


def test_a_learning_rate_below_0_is_not_taken_for_an_inherited_one() -> None:
    with pytest.raises(UserError, match="--matrix-lr is -1"):
        chat_sft.main(parse(chat_sft.Config, ["--inherit", "--matrix-lr=-1"]))


def test_only_rows_of_a_pass_have_a_number_that_means_inherited() -> None:
    save_base()
    checkpoint = checkpoint_manager.find_checkpoint("base")
    config = parse(chat_sft.Config, ["--max-seq-len=-1", "--device-batch-size=-1"])
    settled = inherit(config, checkpoint, ["max_seq_len", "device_batch_size"])
    assert (settled.max_seq_len, settled.device_batch_size) == (-1, 2)


# ---- what is inherited -------------------------------------------------------------------------


def test_settings_that_are_not_given_are_those_of_the_checkpoint(caplog: Any) -> None:
    save_base()
    state = finetune(*MERGED, *NO_SCORES, "--matrix-lr=0.005").state
    settings = state["config"]
    assert {name: settings[name] for name in RATES} == RATES | {"matrix_lr": 0.005}
    assert (settings["device_batch_size"], settings["max_seq_len"]) == (2, CONTEXT)
    assert state["total_batch_size"] == 4 * CONTEXT
    assert (
        "inherited from base model d1, step 7: embedding_lr 0.11, unembedding_lr 0.003, "
        f"scalar_lr 0.4, max_seq_len {CONTEXT}, total_batch_size {4 * CONTEXT}, "
        "device_batch_size 2" in caplog.text
    )
    assert "not inherited from base model d1, step 7: matrix_lr 0.005 (there 0.013)" in caplog.text


def test_a_size_of_the_step_in_rows_is_not_overruled_by_inherited_tokens() -> None:
    save_base()
    state = finetune(*MERGED, *NO_SCORES, "--target-examples-per-step=2").state
    assert state["total_batch_size"] == 2 * CONTEXT


def test_without_inherit_the_learning_rates_are_the_optimizers() -> None:
    save_base()
    flags = (*MERGED, *NO_SCORES, "--no-inherit", "--total-batch-size=1024")
    settings = finetune(*flags).state["config"]
    assert (settings["embedding_lr"], settings["matrix_lr"]) == (0.2, 0.02)
    assert settings["device_batch_size"] == 2


def test_what_a_checkpoint_does_not_record_is_said_and_has_a_usual_value(caplog: Any) -> None:
    save_base(config={}, total_batch_size=None)
    checkpoint = checkpoint_manager.find_checkpoint("base")
    config = parse(chat_sft.Config, ["--recipe=merged"])
    names = ["embedding_lr", "scalar_lr", "total_batch_size", "device_batch_size"]
    settled = inherit(config, checkpoint, names)
    assert (settled.embedding_lr, settled.scalar_lr) == (0.3, None)
    assert (settled.total_batch_size, settled.device_batch_size) == (524_288, 32)
    assert "does not record what is inherited; taking embedding_lr 0.3" in caplog.text
    assert "scalar_lr the optimizer's own" in caplog.text


def test_learning_rates_of_another_optimizer_are_not_inherited() -> None:
    save_base()
    with pytest.raises(UserError, match="--inherit and --optimizer=modern do not go together"):
        finetune(*MERGED, *NO_SCORES, "--optimizer=modern")


# ---- the optimizer state -----------------------------------------------------------------------


def saved_optimizer(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return checkpoint.load_optimizer(0, 1)


def test_a_warm_start_goes_on_with_momentum_moments_and_their_count(caplog: Any) -> None:
    before = save_base()
    # Nothing moves at a learning rate of 0: the state alone changes, by one gradient.
    after = saved_optimizer(finetune(*MERGED, *NO_SCORES, "--init-lr-frac=0"))
    assert int(after["step"]) == UPDATES + 1
    kept = {"momentum": 0.85, "exp_avg": 0.8, "exp_avg_sq": 0.95}
    cold = saved_optimizer(finetune(*MERGED, *NO_SCORES, "--init-lr-frac=0", "--no-load-optimizer"))
    assert int(cold["step"]) == 1
    for name in before.keys() - {"step"}:
        share = kept[name.rpartition(".")[2]]
        torch.testing.assert_close(after[name], share * before[name] + cold[name])
    assert (
        "warm start: Muon's momentum and AdamW's moments are those of base model d1, step 7; "
        "learning rates are this run's: embedding_lr 0.11, unembedding_lr 0.003, matrix_lr 0.013, "
        "scalar_lr 0.4, each x 0" in caplog.text
    )
    assert caplog.text.count("warm start") == 1


def train_two_steps(runtime: Runtime, folder: str) -> None:
    make_trainer(Path(folder), runtime, steps=2).run()


def load_on_each_rank(runtime: Runtime, folder: str, run: str) -> dict[str, torch.Tensor]:
    trainer = make_trainer(Path(folder) / str(runtime.world.rank), runtime)
    checkpoint = newest_checkpoint(Path(run))
    assert checkpoint is not None
    trainer.load_optimizer(checkpoint)
    return dict(trainer.optimizer.state_dict())


@pytest.mark.parametrize(("size", "other"), [(2, 1), (1, 2)])
def test_a_state_is_cut_for_another_number_of_processes(
    tmp_path: Path, size: int, other: int
) -> None:
    run_ranks(train_two_steps, size, str(tmp_path / "first"))
    run = tmp_path / "first" / "run"
    checkpoint = newest_checkpoint(run)
    assert checkpoint is not None
    whole = checkpoint.load_optimizer(0, size=99)  # of no such number of processes: all of it
    parts = run_ranks(load_on_each_rank, other, str(tmp_path / "second"), str(run))
    for name, expected in whole.items():
        found = [part[name] for part in parts if name in part]
        assert torch.equal(found[0] if expected.ndim == 0 else torch.cat(found), expected)


@pytest.mark.parametrize(
    ("facts", "flags", "message"),
    [
        ({"optimizer": None}, (), r"holds weights only, .*; start from .* or --no-load-optimizer"),
        ({}, ("--no-inherit", "--optimizer=modern"), "was trained with the classic optimizer"),
        ({}, ("--shard=full",), "was saved without --shard=full"),
    ],
)
def test_a_state_that_cannot_be_loaded_is_refused(
    base_dir: Path, facts: dict[str, Any], flags: tuple[str, ...], message: str
) -> None:
    save_base(**facts)
    size = ("--target-examples-per-step=2",)
    with pytest.raises(UserError, match=message):
        finetune(*MERGED, *NO_SCORES, *size, *flags)
    assert not checkpoints_dir("sft").exists()
    if not facts:
        return
    finetune(*MERGED, *NO_SCORES, *size, "--no-load-optimizer")


# ---- ChatCORE while training -------------------------------------------------------------------


def metrics(base_dir: Path) -> list[dict[str, Any]]:
    return read_metrics(base_dir / "chatsft_checkpoints/d1/metrics.jsonl")


def test_chatcore_is_the_mean_over_all_tasks_and_over_those_of_choice(
    base_dir: Path, caplog: Any
) -> None:
    save_base()
    finetune(*MERGED, *SCORES, "--num-iterations=2")
    rows = [row for row in metrics(base_dir) if "chatcore" in row]
    assert [row["step"] for row in rows] == [1, 2]
    chances = {"Facts": 0.25, "WordProblems": 0, "SpellingBee": 0, "Identity": 0, "TwoTurn": 0}
    for row in rows:
        centered = {
            name: (row[f"chatcore/{name}_accuracy"] - chance) / (1 - chance)
            for name, chance in chances.items()
        }
        assert row["chatcore"] == pytest.approx(sum(centered.values()) / 5)
        assert row["chatcore_cat"] == pytest.approx(centered["Facts"])
    assert "step 2  ChatCORE (embedded) " in caplog.text
    assert ", 4 problems a categorical task, 1 problems a generative task" in caplog.text


def test_accuracies_of_chatcore_and_of_the_metrics_stand_side_by_side(base_dir: Path) -> None:
    save_base()
    metric = ("--eval-metrics-every=1", "--eval-metrics-max-problems=8")
    finetune(*MERGED, *SCORES, *metric)
    (row,) = [row for row in metrics(base_dir) if "chatcore" in row]
    shares = {name: row[f"{name}Facts_accuracy"] for name in ("", "chatcore/")}
    assert (shares[""] * 8) % 1 == (shares["chatcore/"] * 4) % 1 == 0
    finetune(*MERGED, *NO_SCORES, *metric)
    (alone,) = [row for row in metrics(base_dir) if "Facts_accuracy" in row]
    assert alone["Facts_accuracy"] == shares[""]


def test_measuring_changes_no_bit_of_the_training_nor_of_its_resumption() -> None:
    save_base()
    flags = (*MERGED, "--num-iterations=4", "--save-every=2")
    plain = finetune(*flags, *NO_SCORES).weights_hash
    measured = finetune(*flags, *SCORES, "--keep-last=9")
    assert measured.weights_hash == plain
    resumed = finetune(*flags, *SCORES, "--resume-from-step=2", "--keep-last=9")
    assert resumed.weights_hash == plain
    for name, value in saved_optimizer(measured).items():
        assert torch.equal(saved_optimizer(resumed)[name], value)


def test_a_task_without_a_score_leaves_the_others_and_no_chatcore(
    base_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def fail(*arguments: Any, **options: Any) -> task_eval.TaskResult:
        raise NotScoredError("nobody can judge it")

    monkeypatch.setattr(task_eval, "run_generative", fail)
    save_base()
    finetune(*MERGED, *SCORES)
    (row,) = [row for row in metrics(base_dir) if "chatcore_cat" in row]
    assert "chatcore" not in row
    assert "step 1 has no SpellingBee: nobody can judge it" in caplog.text
    assert "step 1 has no ChatCORE: it needs a score of WordProblems, SpellingBee" in caplog.text


def test_the_lineage_names_the_tasks_of_the_mixture_with_their_repeats() -> None:
    save_base()
    entry = finetune(*MERGED, *NO_SCORES, "--gsm8k-epochs=2").state["lineage"][-1]
    assert (entry["stage"], entry["recipe"]) == ("sft", "merged")
    assert (entry["mmlu_epochs"], entry["gsm8k_epochs"]) == (3, 2)
    assert entry["mixture"]["ChoiceQuestions"] == 3 * 80_000
    assert entry["mixture"]["WordProblems"] == 2 * 50_000
    assert {"Identity", "SimpleSpelling", "SpellingBee"} <= entry["mixture"].keys()
    assert json.dumps(entry)


# ---- public tasks ------------------------------------------------------------------------------


def place_public(folder: Path) -> str:
    """What the merged recipe reads with conversations of one's own; the flag that names them."""
    for split in ("auxiliary_train", "test"):
        place(MMLU(split).rows.asset, [MMLU_ROW])
    for split in ("train", "test"):
        place(GSM8K(split).rows.asset, [GSM8K_ROW])
    place_file(WORD_LIST, b"strawberry\nzebra\n")
    line = json.dumps([{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}])
    place_file(IDENTITY, f"{line}\n".encode())
    (folder / "own.jsonl").write_text(f"{line}\n" * 3)
    return f"--chats={folder / 'own.jsonl'}"


def test_missing_public_files_are_named_before_anything_is_read(tmp_path: Path) -> None:
    save_base()
    with pytest.raises(UserError, match=r"smol-smoltalk.*cais/mmlu.*prefetch --stage mid"):
        finetune(*MERGED, "--tasks=public")
    own = place_public(tmp_path)
    with pytest.raises(UserError, match=r"ARC-Easy:test.*prefetch --stage eval"):
        finetune(*MERGED, "--tasks=public", own)
    finetune(*MERGED, *NO_SCORES, "--tasks=public", own)


def test_conversations_that_changed_under_a_run_are_refused(tmp_path: Path) -> None:
    save_base()
    own = place_public(tmp_path)
    flags = (*MERGED, *NO_SCORES, "--tasks=public", own, "--save-every=1", "--num-iterations=2")
    finetune(*flags)
    finetune(*flags, "--resume")
    path = tmp_path / "own.jsonl"
    path.write_text(path.read_text().replace("!", "#"))
    with pytest.raises(UserError, match=r"made with conversations '\w{8}', not '\w{8}'"):
        finetune(*flags, "--resume")


def test_the_merged_recipe_trains_on_public_tasks_and_conversations_of_ones_own(
    base_dir: Path, tmp_path: Path
) -> None:
    save_base()
    own = place_public(tmp_path)
    for subset in ("ARC-Easy", "ARC-Challenge"):
        place(ARC(subset, "test").rows.asset, [ARC_ROW])
    place(HumanEval().rows.asset, [HUMANEVAL_ROW])
    entry = finetune(*MERGED, *SCORES, "--tasks=public", own).state["lineage"][-1]
    assert entry["mixture"] == {
        "chats": 2,
        "MMLU": 3,
        "GSM8K": 4,
        "CustomJSON": 2,
        "SimpleSpelling": 200_000,
        "SpellingBee": 80_000,
    }
    assert len(trained_on(entry)) == 2 + 1 + 1 + 2 + 280_000
    (row,) = [row for row in metrics(base_dir) if "chatcore_cat" in row]
    assert ("chatcore" in row) == (sandbox_problem() is None)
