"""Training in fp16: gradients are scaled into its range; a step that overflows changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nanochat import checkpoint_manager
from nanochat.common import UserError
from nanochat.runtime import Runtime, World
from nanochat.tracking import read_metrics
from nanochat.train_state import FIRST_LOSS_SCALE, LOSS_SCALE_STEPS, TrainState
from nanochat.training import Trainer
from tests.distributed import run_ranks
from tests.tiny_run import SIZES, make_trainer


def runtime(dtype: torch.dtype = torch.float16) -> Runtime:
    """One process on the CPU."""
    return Runtime(torch.device("cpu"), dtype, World(), 42)


def everything(trainer: Trainer) -> dict[str, Tensor]:
    """Copies of weights and optimizer state."""
    parts = trainer.weights.state_dict() | trainer.optimizer.state_dict()
    return {name: value.clone() for name, value in parts.items()}


def test_the_scale_is_the_largest_that_works() -> None:
    state = TrainState()
    state.note_gradient(is_finite=False)
    assert (state.loss_scale, state.skipped_steps) == (FIRST_LOSS_SCALE / 2, 1)
    for _ in range(LOSS_SCALE_STEPS - 1):
        state.note_gradient(is_finite=True)
    state.note_gradient(is_finite=False)  # one short of a try at more: the count begins anew
    for _ in range(LOSS_SCALE_STEPS):
        assert state.loss_scale == FIRST_LOSS_SCALE / 4
        state.note_gradient(is_finite=True)
    assert (state.loss_scale, state.skipped_steps) == (FIRST_LOSS_SCALE / 2, 2)


def test_a_gradient_that_no_scale_helps_ends_the_run() -> None:
    state = TrainState(step=9, loss_scale=2.0)
    state.note_gradient(is_finite=False)
    with pytest.raises(UserError, match=r"overflows fp16 at step 9 .* scale of 1, after 2 skipped"):
        state.note_gradient(is_finite=False)


def test_gradients_are_those_of_fp32_times_the_scale(tmp_path: Path) -> None:
    gradients = {}
    for dtype in (torch.float32, torch.float16):
        trainer = make_trainer(tmp_path / str(dtype), runtime(dtype))
        generator = torch.Generator().manual_seed(3)
        for weight in trainer.weights.state_dict().values():  # away from the silent start
            weight.normal_(0.0, 0.2, generator=generator)
        trainer.weights.publish()
        batch, loss_sum = trainer.accumulate_gradients()
        unit = batch.num_targets if dtype == torch.float32 else FIRST_LOSS_SCALE
        gradients[dtype] = {"loss": loss_sum / batch.num_targets} | {
            name: parameter.grad / unit
            for name, parameter in trainer.weights.named_parameters()
            if parameter.grad is not None
        }
    exact, scaled = gradients.values()
    assert exact.keys() == scaled.keys()
    assert len(exact) == 15
    for name, value in exact.items():
        assert torch.linalg.vector_norm(scaled[name] - value) < 0.02 * value.norm(), name


def test_gradients_below_the_range_of_fp16_are_not_lost(tmp_path: Path) -> None:
    """Advantages of 1e-8: unscaled, every gradient would be 0."""
    trainer = make_trainer(tmp_path, runtime())
    trainer.model.lm_head.weight.data.normal_(generator=torch.Generator().manual_seed(3))
    batch = trainer.loader.next_step()
    batch.weights = torch.full(batch.targets.shape, 1e-8)
    trainer.loader.next_step = lambda: batch  # type: ignore[method-assign]
    trainer._step()
    trainer._flush()
    (row,) = read_metrics(tmp_path / "run/metrics.jsonl")
    assert row["grad_norm"] > 1e-10


def test_it_learns(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, runtime(), steps=60)
    batch = trainer.loader.next_step()
    trainer.loader.next_step = lambda: batch  # type: ignore[method-assign]
    trainer.run()
    losses = [row["loss"] for row in read_metrics(tmp_path / "run/metrics.jsonl") if "loss" in row]
    assert losses[0] == pytest.approx(np.log(SIZES.vocab_size), abs=1e-2)
    assert losses[-1] < 0.3 * losses[0]


def test_a_step_that_overflows_is_skipped_and_counted(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, runtime())
    trainer._step()
    before = everything(trainer)
    trainer.state.loss_scale = 2.0**40
    trainer._step()
    after = everything(trainer)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert (trainer.state.step, trainer.state.skipped_steps) == (2, 1)
    assert trainer.state.loss_scale == 2.0**39
    trainer.state.loss_scale = FIRST_LOSS_SCALE
    trainer._step()
    trainer._flush()
    first, skipped, third = read_metrics(tmp_path / "run/metrics.jsonl")
    assert "grad_norm" in first
    assert "grad_norm" not in skipped
    assert (skipped["skipped"], skipped["loss_scale"]) == (1, 2.0**39)
    assert third["grad_norm"] > 0
    assert not torch.equal(everything(trainer)["lm_head.weight"], before["lm_head.weight"])


def test_the_scale_is_resumed_bit_for_bit(tmp_path: Path) -> None:
    hashes, states = [], []
    for name, interrupted_at in (("whole", 10), ("parts", 2)):
        trainer = make_trainer(tmp_path / name, runtime(), steps=10, save_every=1)
        trainer.state.loss_scale = 2.0**25  # the first steps overflow
        if interrupted_at < 10:
            for _ in range(interrupted_at):
                trainer._boundary(is_last=False)
                trainer._step()
            trainer.save()
            trainer.saver.wait()
            checkpoint = checkpoint_manager.newest_checkpoint(tmp_path / name / "run")
            assert checkpoint is not None
            assert checkpoint.state["loop"]["skipped_steps"] == 2
            trainer = make_trainer(tmp_path / name, runtime(), steps=10, save_every=1)
            trainer.resume(checkpoint)
        trainer.run()
        last = checkpoint_manager.newest_checkpoint(tmp_path / name / "run")
        assert last is not None
        hashes.append(last.weights_hash)
        loop = last.state["loop"]
        states.append((loop["loss_scale"], loop["skipped_steps"], loop["steps_at_scale"]))
    assert hashes[0] == hashes[1]
    assert states[0] == states[1]
    assert 2 < states[0][1] < 10


def skipped_on_two_ranks(runtime: Runtime, folder: Path, shard: str) -> dict[str, Any]:
    """Train where one rank's gradient alone overflows; what came of it."""
    half = Runtime(runtime.device, torch.float16, runtime.world, 42)
    trainer = make_trainer(folder, half, shard=shard)
    before = everything(trainer)
    batch = trainer.loader.next_step()
    if runtime.world.rank == 1:
        batch.weights = torch.full(batch.targets.shape, 1e30)
    trainer.loader.next_step = lambda: batch  # type: ignore[method-assign]
    trainer._step()
    same = all(torch.equal(value, before[name]) for name, value in everything(trainer).items())
    return {"skipped": trainer.state.skipped_steps, "same": same}


@pytest.mark.parametrize("shard", ["optimizer", "full"])
def test_ranks_skip_together(tmp_path: Path, shard: str) -> None:
    results = run_ranks(skipped_on_two_ranks, 2, tmp_path, shard, timeout_seconds=300)
    assert results == [{"skipped": 1, "same": True}] * 2
