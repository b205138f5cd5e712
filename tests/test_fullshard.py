"""`--shard=full`: FSDP2 and torch.distributed.checkpoint train what the usual engine trains."""

from __future__ import annotations

import dataclasses
import errno
from pathlib import Path
from traceback import StackSummary
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from nanochat import fullshard
from nanochat.checkpoint_manager import newest_checkpoint
from nanochat.common import UserError, read_json
from nanochat.engine import sample_prompts  # noqa: F401 - proves that the engine needs no change
from nanochat.gpt import GPT, GPTConfig
from nanochat.optimizers import OptimizerConfig
from nanochat.plan import Plan
from nanochat.presets import MODELS
from nanochat.runtime import Runtime, World
from nanochat.schedule import Schedule
from nanochat.training import Hook, Trainer
from tests.distributed import run_ranks
from tests.tiny_run import ROWS, SIZES, SeededLoader, make_trainer

DEPTH_4 = GPTConfig(sequence_len=32, vocab_size=50, n_layer=4, n_head=2, n_embd=32)
STEPS = 6
# Of what weights have moved; see test_survival.
SUMMED_IN_ANOTHER_ORDER = 0.05


MODERN = dataclasses.replace(DEPTH_4, **MODELS["modern"])


def trainer_of(
    runtime: Runtime, folder: Path, shard: str, hooks: list[Hook], config: GPTConfig
) -> Trainer:
    """Depth 4; everything but the engine as in `make_trainer`."""
    is_modern = config == MODERN
    template = make_trainer(folder, Runtime(runtime.device, torch.float32, World(), 42))
    model = GPT(config)
    model.init_weights(torch.Generator().manual_seed(5))
    return Trainer(
        model,
        SeededLoader(runtime.world),
        plan=Plan(
            Schedule(STEPS, warmdown_ratio=0.5, is_refined=is_modern),
            micro_batch_rows=1,
            grad_clip=1.0,
            save_every=3,
            keep_last=9,
            log_every=1,
            shard=shard,
        ),
        optimizer=OptimizerConfig(
            embedding_lr=0.02,
            matrix_lr=0.01,
            weight_decay=0.1,
            matrix_weight_decay=0.1 if is_modern else 0.0,
            is_refined=is_modern,
        ),
        runtime=runtime,
        run_dir=folder / "run",
        tokenizer_dir=folder / "tokenizer",
        facts=template.facts,
        metrics=template.metrics if runtime.world.is_main else None,
        hooks=hooks,
    )


def train(
    runtime: Runtime,
    folder: Path,
    shard: str = "full",
    resume: bool = False,
    config: GPTConfig = DEPTH_4,
) -> dict[str, Any]:
    """Losses by step, rows of the embedding that this rank stores, and what a hook saw."""
    seen: dict[str, Any] = {"losses": {}, "logits": {}}

    def look(trainer: Trainer) -> dict[str, float]:
        # A rank alone: whatever needed the others would wait for them in vain.
        if trainer.runtime.world.rank == trainer.runtime.world.size - 1:
            with torch.inference_mode():
                logits = trainer.model(torch.arange(8)[None])
            seen["logits"][trainer.state.step] = logits.sum().item()
        return {}

    trainer = trainer_of(runtime, folder, shard, [Hook("look", 2, look)], config)
    write = trainer._write

    def note(step: int, **values: float) -> None:
        if "loss" in values:
            seen["losses"][step] = values["loss"]
        write(step, **values)

    trainer._write = note  # type: ignore[method-assign]
    if resume:
        checkpoint = newest_checkpoint(folder / "run")
        assert checkpoint is not None
        trainer.resume(checkpoint)
        seen["resumed"] = checkpoint.step
    trainer.run()
    if shard == "full":
        seen["rows"] = len(trainer.model.transformer.wte.weight.to_local())
    return seen


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """One process with whole weights: what it saw, and its final weights."""
    folder = tmp_path_factory.mktemp("whole")
    runtime = Runtime(torch.device("cpu"), torch.float32, World(), 42)
    seen = train(runtime, folder, "optimizer")
    checkpoint = newest_checkpoint(folder / "run")
    assert checkpoint is not None
    return seen, checkpoint.load_model()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Path]:
    """Two ranks with half of everything each."""
    folder = tmp_path_factory.mktemp("sharded")
    return run_ranks(train, 2, folder, timeout_seconds=300), folder


def assert_same_way(
    found: dict[str, Tensor], expected: dict[str, Tensor], start: dict[str, Tensor]
) -> None:
    """Both have moved alike from the start, up to another order of summation."""
    assert found.keys() == expected.keys()
    for name, weights in expected.items():
        assert found[name].shape == weights.shape
        moved = (weights - start[name]).norm()
        assert (found[name] - weights).norm() < SUMMED_IN_ANOTHER_ORDER * moved, name


def test_two_ranks_in_shards_learn_what_one_whole_process_learns(
    whole: tuple[dict[str, Any], dict[str, Any]],
    sharded: tuple[list[dict[str, Any]], Path],
) -> None:
    seen, weights = whole
    ranks, folder = sharded
    assert [rank["rows"] for rank in ranks] == [25, 25]  # of 50
    assert ranks[0]["losses"] == ranks[1]["losses"]
    assert list(seen["losses"]) == list(range(1, STEPS + 1))
    for step, loss in seen["losses"].items():
        # Sums over two ranks are rounded in another order; Muon works in bf16 on some machines.
        assert ranks[0]["losses"][step] == pytest.approx(loss, abs=0.01), step
    assert list(ranks[1]["logits"]) == [0, 2, 4, 6]
    checkpoint = newest_checkpoint(folder / "run")
    assert checkpoint is not None
    model = GPT(DEPTH_4)
    model.init_weights(torch.Generator().manual_seed(5))
    assert_same_way(checkpoint.load_model(), weights, model.state_dict())


def test_a_checkpoint_is_written_by_dcp_inside_the_manifest(
    sharded: tuple[list[dict[str, Any]], Path],
) -> None:
    _, folder = sharded
    checkpoint = newest_checkpoint(folder / "run")
    assert checkpoint is not None
    files = read_json(checkpoint.path / "manifest.json")["files"]
    assert {"sharded/.metadata", "sharded/__0_0.distcp", "sharded/__1_0.distcp"} <= set(files)
    assert "model.safetensors" in files
    with pytest.raises(UserError, match="saved with --shard=full; resume it with that flag"):
        checkpoint.load_optimizer(0, 1)


@pytest.mark.parametrize("ranks", [2, 4])
def test_resumed_in_shards_of_any_number_it_ends_in_the_same_place(
    sharded: tuple[list[dict[str, Any]], Path], tmp_path: Path, ranks: int
) -> None:
    undisturbed, folder = sharded
    step = tmp_path / "run" / "step_000003"
    step.parent.mkdir()
    (folder / "run" / "step_000003").rename(step) if not step.exists() else None
    try:
        resumed = run_ranks(train, ranks, tmp_path, "full", True, timeout_seconds=300)
        start = load_file(step / "model.safetensors")
    finally:
        step.rename(folder / "run" / "step_000003")
    assert resumed[0]["resumed"] == 3
    for number in (4, 5, 6):
        expected = undisturbed[0]["losses"][number]
        tolerance = 0.0 if ranks == 2 else 0.01
        assert resumed[0]["losses"][number] == pytest.approx(expected, abs=tolerance)
    ends = [newest_checkpoint(run / "run") for run in (tmp_path, folder)]
    found, whole = (end.load_model() for end in ends if end is not None)
    assert_same_way(found, whole, start)


def test_one_process_is_refused(tmp_path: Path) -> None:
    runtime = Runtime(torch.device("cpu"), torch.float32, World(), 42)
    with pytest.raises(UserError, match="--shard=full is for several processes"):
        make_trainer(tmp_path, runtime, shard="full")
    assert ROWS % 4 == 0
    assert SIZES.n_layer < DEPTH_4.n_layer


def test_the_modern_model_and_optimizer_learn_the_same_in_shards(tmp_path: Path) -> None:
    runtime = Runtime(torch.device("cpu"), torch.float32, World(), 42)
    whole = train(runtime, tmp_path / "whole", "optimizer", config=MODERN)
    ranks = run_ranks(train, 2, tmp_path / "shards", "full", False, MODERN, timeout_seconds=300)
    for seen in ranks[:1]:
        assert list(seen["losses"]) == list(range(1, STEPS + 1))
        for step, loss in whole["losses"].items():
            assert seen["losses"][step] == pytest.approx(loss, rel=1e-4)
    names = [
        set(newest_checkpoint(tmp_path / name / "run").load_model()) for name in ("whole", "shards")
    ]
    assert names[0] == names[1] >= {"resid_lambdas", "value_embeds.3.weight"}


def test_a_full_disk_is_an_error_of_the_file_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint's exception is none that `save_checkpoint` explains."""

    def run_out(tensors: dict[str, Any], checkpoint_id: Path) -> None:
        full = OSError(errno.ENOSPC, "No space left on device")
        raise CheckpointException("write", {1: (full, StackSummary())})

    monkeypatch.setattr(fullshard, "save", run_out)
    shards = object.__new__(fullshard.FullShard)
    monkeypatch.setattr(shards, "_tensors", dict, raising=False)
    with pytest.raises(OSError, match="No space left"):
        shards.save(Path("sharded"))
