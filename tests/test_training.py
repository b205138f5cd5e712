"""The loop: what it computes, and that neither splitting nor interrupting it changes that."""

from __future__ import annotations

import gc
import json
import os
import signal
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nanochat import checkpoint_manager
from nanochat.common import UserError
from nanochat.configurator import parse
from nanochat.dataloader import Batch
from nanochat.runtime import Runtime
from nanochat.schedule import Schedule, muon_momentum
from nanochat.stopping import StoppedError, catch_signals
from nanochat.tracking import read_metrics
from nanochat.training import Hook, Trainer
from scripts import base_train, chat_rl, chat_sft, mid_train
from tests.distributed import run_ranks
from tests.tiny_run import ROWS, SIZES, make_trainer


def weights_after_training(runtime: Runtime, folder: Path, micro_batch_rows: int) -> dict[str, Any]:
    """Train and hand back the fp32 weights as numpy arrays."""
    trainer = make_trainer(folder, runtime, micro_batch_rows=micro_batch_rows)
    trainer.run()
    return {name: value.numpy() for name, value in trainer.weights.state_dict().items()}


def largest_difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> float:
    """Over all weights, in absolute terms."""
    assert a.keys() == b.keys()
    return max(float(np.abs(np.asarray(a[name]) - np.asarray(b[name])).max()) for name in a)


def test_weights_do_not_depend_on_micro_batches_or_ranks(runtime: Runtime, tmp_path: Path) -> None:
    whole = weights_after_training(runtime, tmp_path / "1x1", ROWS)
    split = weights_after_training(runtime, tmp_path / "4x1", 1)
    two_ranks = run_ranks(weights_after_training, 2, tmp_path / "2x2", 1)
    start = make_trainer(tmp_path / "start", runtime).weights.state_dict()
    # Orders of summation differ in the last bit of fp32. AdamW (eps 1e-10, so that a gradient of
    # almost nothing is a full step) and the bf16 Newton-Schulz turn that into a few percent.
    for other in (split, two_ranks[0]):
        for name, value in start.items():
            moved = np.linalg.norm(whole[name] - value.numpy())
            assert np.linalg.norm(whole[name] - other[name]) < 0.05 * moved, name
    assert largest_difference(two_ranks[0], two_ranks[1]) == 0.0


def gradients(runtime: Runtime, folder: Path, micro_batch_rows: int) -> dict[str, Any]:
    """Loss and gradient sums of the first step, added over ranks, per target."""
    trainer = make_trainer(folder, runtime, micro_batch_rows=micro_batch_rows)
    for block in trainer.model.blocks:  # away from the silent start, so that all gradients exist
        block.attn.c_proj.weight.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
        block.mlp.c_proj.weight.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(2))
    trainer.model.lm_head.weight.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(3))
    batch, loss = trainer.accumulate_gradients()
    values = {"loss": loss} | {
        name: parameter.grad for name, parameter in trainer.weights.named_parameters()
    }
    return {
        name: (runtime.world.all_reduce_(value.clone()) / batch.num_targets).numpy()
        for name, value in values.items()
        if value is not None
    }


def test_loss_and_gradients_do_not_depend_on_micro_batches_or_ranks(
    runtime: Runtime, tmp_path: Path
) -> None:
    whole = gradients(runtime, tmp_path / "1x1", ROWS)
    assert len(whole) == 15  # the loss, 2 x 6 matrices, embedding and head
    assert all(np.abs(value).max() > 1e-5 for value in whole.values())
    split = gradients(runtime, tmp_path / "4x1", 1)
    two_ranks = run_ranks(gradients, 2, tmp_path / "2x2", 1)
    # fp32 sums of about 100 terms in another order
    assert largest_difference(whole, split) < 1e-6
    assert largest_difference(whole, two_ranks[0]) < 1e-6


def test_step_without_targets_leaves_the_weights_as_they_are(
    runtime: Runtime, tmp_path: Path
) -> None:
    """In reinforcement learning, when all answers are equally good. Momentum must not move them."""
    trainer = make_trainer(tmp_path, runtime)
    trainer._step()
    trained = {name: value.clone() for name, value in trainer.weights.state_dict().items()}
    nothing = torch.empty(0, 3, dtype=torch.int64)
    empty = Batch(nothing, nothing, 0, torch.empty(0, 3), {"reward": 1.0})
    trainer.loader.next_step = lambda: empty  # type: ignore[method-assign]
    trainer._step()
    trainer._flush()
    assert largest_difference(trained, trainer.weights.state_dict()) == 0
    assert trainer.state.step == 2
    row = read_metrics(tmp_path / "run/metrics.jsonl")[-1]
    assert (row["step"], row["loss"], row["grad_norm"], row["reward"]) == (2, 0.0, 0.0, 1.0)


def test_loss_falls_and_every_step_is_in_the_metrics(runtime: Runtime, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, runtime, steps=60)
    batch = trainer.loader.next_step()
    trainer.loader.next_step = lambda: batch  # type: ignore[method-assign]
    trainer.run()
    losses = [row["loss"] for row in read_metrics(tmp_path / "run/metrics.jsonl") if "loss" in row]
    assert len(losses) == 60
    assert losses[0] == pytest.approx(np.log(SIZES.vocab_size), abs=1e-3)
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("interrupted_at", [1, 3, 5])
def test_resumed_run_equals_undisturbed_run_bit_for_bit(
    runtime: Runtime, tmp_path: Path, interrupted_at: int
) -> None:
    undisturbed = make_trainer(tmp_path / "a", runtime, save_every=1)
    undisturbed.run()
    first = make_trainer(tmp_path / "b", runtime, save_every=1)
    for _ in range(interrupted_at):
        first._boundary(is_last=False)
        first._step()
    first.save()
    first.saver.wait()
    del first
    checkpoint = checkpoint_manager.newest_checkpoint(tmp_path / "b" / "run")
    assert checkpoint is not None
    assert checkpoint.step == interrupted_at
    second = make_trainer(tmp_path / "b", runtime, save_every=1)
    second.resume(checkpoint)
    second.run()
    a, b = (checkpoint_manager.newest_checkpoint(tmp_path / x / "run") for x in "ab")
    assert a is not None
    assert b is not None
    assert a.step == b.step == 6
    assert a.weights_hash == b.weights_hash
    rows = [
        [row for row in read_metrics(tmp_path / x / "run/metrics.jsonl") if "loss" in row]
        for x in "ab"
    ]
    assert [(r["step"], r["loss"]) for r in rows[0]] == [(r["step"], r["loss"]) for r in rows[1]]


def test_sigterm_saves_at_the_step_boundary_and_stops(runtime: Runtime, tmp_path: Path) -> None:
    def interrupt(trainer: Trainer) -> dict[str, float]:
        if trainer.state.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return {}

    trainer = make_trainer(tmp_path, runtime, hooks=[Hook("interrupt", 1, interrupt)])
    with catch_signals(trainer.stop), pytest.raises(StoppedError, match=r"step 4 \(SIGTERM\)"):
        trainer.run()
    checkpoint = checkpoint_manager.newest_checkpoint(tmp_path / "run")
    assert checkpoint is not None
    assert checkpoint.step == 4
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_weights_that_are_no_numbers_stop_the_run_and_keeps_the_good_checkpoint(
    runtime: Runtime, tmp_path: Path
) -> None:
    def poison(trainer: Trainer) -> dict[str, float]:
        if trainer.state.step == 4:
            trainer.model.lm_head.weight.data[0, 0] = float("nan")
        return {}

    trainer = make_trainer(tmp_path, runtime, hooks=[Hook("poison", 1, poison)], save_every=2)
    with pytest.raises(UserError, match=r"lm_head.weight; the last good checkpoint is step 2\."):
        trainer.run()
    checkpoint = checkpoint_manager.newest_checkpoint(tmp_path / "run")
    assert checkpoint is not None
    assert checkpoint.step == 2


def test_a_run_that_fails_before_its_first_checkpoint_is_not_sent_to_one(
    runtime: Runtime, tmp_path: Path
) -> None:
    def poison(trainer: Trainer) -> dict[str, float]:
        trainer.model.lm_head.weight.data[0, 0] = float("nan")
        return {}

    (tmp_path / "run/previous/step_000006").mkdir(parents=True)
    trainer = make_trainer(tmp_path, runtime, hooks=[Hook("poison", 1, poison)])
    with pytest.raises(UserError) as caught:
        trainer.run()
    said = str(caught.value)
    assert "and no good checkpoint was saved before. Lower --matrix-lr" in said
    assert "start again without --resume" in said
    assert said.endswith(f"The earlier run is in {tmp_path}/run/previous")
    assert "last good checkpoint" not in said


def test_hooks_run_at_start_every_and_end_and_their_values_are_kept(
    runtime: Runtime, tmp_path: Path
) -> None:
    seen: list[int] = []

    def watch(trainer: Trainer) -> dict[str, float]:
        seen.append(trainer.state.step)
        return {"val_bpb": 10.0 - trainer.state.step}

    trainer = make_trainer(tmp_path, runtime, steps=5, hooks=[Hook("watch", 2, watch)])
    trainer.run()
    assert seen == [0, 2, 4, 5]
    checkpoint = checkpoint_manager.newest_checkpoint(tmp_path / "run")
    assert checkpoint is not None
    assert checkpoint.state["loop"]["evaluations"] == {"val_bpb": 5.0}
    assert checkpoint.state["loop"]["best"] == {"val_bpb": 5.0}
    json.dumps(checkpoint.state)


def test_two_hooks_of_a_step_may_not_write_one_name(runtime: Runtime, tmp_path: Path) -> None:
    hooks = [
        Hook("all", 1, lambda trainer: {"share": 0.5, "val_bpb": 2.0}),
        Hook("some", 2, lambda trainer: {"share": 0.25}, at_start=False),
    ]
    trainer = make_trainer(tmp_path, runtime, hooks=hooks)
    with pytest.raises(AssertionError, match="hook some measures share, as an earlier one does"):
        trainer.run()
    assert trainer.state.step == 2


def test_the_garbage_collector_rests_while_steps_are_made(
    runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanochat.runtime.COLLECT_EVERY", 3)
    collections: list[int] = []
    seen: dict[int, tuple[bool, bool, int]] = {}

    def look(trainer: Trainer) -> dict[str, float]:
        seen[trainer.state.step] = (gc.isenabled(), gc.get_freeze_count() > 0, len(collections))
        return {}

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start" and info["generation"] == 2 and not gc.isenabled():
            collections.append(1)

    trainer = make_trainer(tmp_path, runtime, hooks=[Hook("look", 1, look)])
    gc.callbacks.append(note)
    try:
        trainer.run()
    finally:
        gc.callbacks.remove(note)
    assert seen[0][:2] == (True, False)
    assert {seen[step][:2] for step in range(1, 7)} == {(False, True)}
    # One behind every look, and one of the third step.
    assert [seen[step][2] for step in range(1, 7)] == [0, 1, 3, 4, 5, 7]
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_hook_without_a_period_runs_at_the_end_only_and_one_switched_off_never() -> None:
    last, off = Hook("last", 0, lambda trainer: {}), Hook("off", -1, lambda trainer: {})
    assert [last.is_due(step, step == 3) for step in range(4)] == [False, False, False, True]
    assert not any(off.is_due(step, step == 3) for step in range(4))


def test_schedule_is_a_trapezoid() -> None:
    schedule = Schedule(10, warmup_steps=2, warmdown_ratio=0.5, peak=2.0, final_fraction=0.1)
    values = [schedule.multiplier(step) for step in range(10)]
    assert values[:2] == [1.0, 2.0]
    assert values[2:5] == [2.0, 2.0, 2.0]
    assert values[5] == pytest.approx(2.0)
    assert values[-1] == pytest.approx(2.0 * (0.2 + 0.8 * 0.1))
    assert all(a >= b for a, b in pairwise(values[2:]))


def test_muon_momentum_rises_to_its_end() -> None:
    assert [muon_momentum(step) for step in (0, 150, 300, 900)] == pytest.approx(
        [0.85, 0.9, 0.95, 0.95]
    )


# ---- flags ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, -2])
@pytest.mark.parametrize("script", [base_train, mid_train, chat_sft, chat_rl])
def test_no_steps_at_all_are_refused_before_anything_is_read(script: Any, value: int) -> None:
    config = parse(script.Config, [f"--num_iterations={value}"])
    with pytest.raises(UserError, match=f"--num-iterations is {value}; .* at least 1, or -1 for"):
        script.main(config)


@pytest.mark.parametrize(
    ("flag", "named"),
    [
        ("--init_lr_frac=-1", "--init-lr-frac is -1.0; give at least 0"),
        ("--init_lr_frac=nan", "--init-lr-frac is nan; give a finite number"),
        ("--matrix_lr=inf", "--matrix-lr is inf; give a finite number"),
        ("--scalar_lr=-0.1", "--scalar-lr is -0.1; give at least 0"),
        ("--weight_decay=-1", "--weight-decay is -1.0; give at least 0"),
        ("--grad_clip=-1", "--grad-clip is -1.0; give at least 0"),
        ("--warmup_steps=-1", "--warmup-steps is -1; give at least 0"),
        ("--warmup_ratio=1.5", "--warmup-ratio is 1.5; give a number from 0 to 1"),
        ("--warmdown_ratio=2", "--warmdown-ratio is 2.0; give a number from 0 to 1"),
        ("--final_lr_frac=-1", "--final-lr-frac is -1.0; give a number from 0 to 1"),
        ("--spike_limit=nan", "--spike-limit is nan; give a finite number"),
        ("--max_minutes=-1", "--max-minutes is -1.0; give at least 0"),
        ("--eval_every=-2", "--eval-every is -2; give at least -1"),
        ("--save_every=-2", "--save-every is -2; give at least -1"),
    ],
)
@pytest.mark.parametrize("script", [base_train, mid_train, chat_sft, chat_rl])
def test_meaningless_numbers_are_refused_before_anything_is_read(
    script: Any, flag: str, named: str
) -> None:
    with pytest.raises(UserError, match=f"^{named}$"):
        script.main(parse(script.Config, [flag]))


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize(
    ("script", "flag"),
    [(chat_rl, "kl_weight"), (base_train, "token_shift"), (base_train, "target_flops")],
)
def test_a_stages_own_numbers_must_be_finite(script: Any, flag: str, value: str) -> None:
    named = f"--{flag.replace('_', '-')} is {value}; give a finite number"
    with pytest.raises(UserError, match=f"^{named}$"):
        script.main(parse(script.Config, [f"--{flag}={value}"]))


def test_core_during_training_needs_items() -> None:
    config = parse(base_train.Config, ["--core_metric_max_per_task=0"])
    with pytest.raises(UserError, match="--core-metric-max-per-task is 0; give at least 1"):
        base_train.main(config)
