"""The gate at the end of a training stage: which results pass, and what a failure leaves."""

from __future__ import annotations

import math
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanochat import checkpoint_manager, checkpoint_writing, common, resuming, run_folder
from nanochat.common import UserError, sha256_file
from nanochat.gpt import GPT
from nanochat.loss_eval import LossTotals
from nanochat.runtime import Runtime, World
from nanochat.stopping import StoppedError
from nanochat.train_state import TrainState
from nanochat.training import Hook, Trainer
from nanochat.validation import Validation, unsound
from tests import scripted_model
from tests.tiny_run import SIZES, make_trainer


def totals(bpb: float) -> LossTotals:
    """Of tokens of two bytes."""
    return LossTotals(nats=bpb * math.log(2) * 200, num_bytes=200, num_tokens=100)


def judged(bpb: float, **changes: Any) -> str:
    """With 16 tokens, of which guessing needs 4 bits: 2 bits per byte."""
    known = {"vocab_size": 16, "train_loss": math.log(16), "began": None, "limit": 0.0}
    known |= {"step": 20, "is_last": False}
    return unsound(totals(bpb), **known | changes)


def test_a_model_that_has_learned_something_passes() -> None:
    assert totals(1.0).bits_per_byte_of_guessing(16) == 2.0
    assert judged(1.9) == ""
    assert judged(1.9, began=1.8, is_last=True) == ""


@pytest.mark.parametrize("bpb", [2.0, 2.5, math.inf, math.nan])
def test_guessing_does_not(bpb: float) -> None:
    assert "no better than guessing, which has 2.000" in judged(bpb)


def test_who_learns_lessons_first_may_be_worse_than_guessing_at_other_text() -> None:
    assert judged(2.5, train_loss=0.8 * math.log(16), began=2.0) == ""
    assert "no better than guessing" in judged(math.inf, train_loss=0.8 * math.log(16))


def test_nor_does_what_became_worse_than_it_was() -> None:
    assert "worse than the 1.000 that it began with" in judged(1.2, began=1.0)


def test_a_limit_of_the_users_replaces_the_bounds_and_counts_at_the_end() -> None:
    assert judged(9.0, limit=1.5, began=1.0) == ""
    assert "above --bpb-limit=1.5" in judged(1.6, limit=1.5, is_last=True)
    assert judged(1.5, limit=1.5, is_last=True) == ""
    assert judged(9.0, limit=10.0, is_last=True) == ""
    assert judged(math.nan, limit=10.0, is_last=True)


def test_the_first_steps_and_text_without_bytes_say_nothing() -> None:
    assert judged(9.0, step=19, is_last=True) == ""
    known: dict[str, Any] = {"vocab_size": 16, "train_loss": 9.0, "began": 1.0, "limit": 0.0}
    assert unsound(LossTotals(0.0, 0, 0), **known, step=99, is_last=True) == ""


def test_what_was_measured_first_is_remembered() -> None:
    state = TrainState()
    for value in (3.0, 2.0, 2.5):
        state.note_evaluation({"val_bpb": value})
    assert (state.first, state.best) == ({"val_bpb": 3.0}, {"val_bpb": 2.0})
    before = {key: value for key, value in vars(state).items() if key != "first"}
    assert TrainState(**before).first == {}  # of a checkpoint from before


def test_a_stage_that_has_failed_keeps_its_last_checkpoint_where_none_takes_it(
    tmp_path: Path,
) -> None:
    """Random rows cannot be learned. Resumed, the last step is judged again, not trained again."""
    runtime = Runtime(torch.device("cpu"), torch.float32, World(), 42)
    rows = torch.randint(0, SIZES.vocab_size, (2, SIZES.sequence_len + 1))
    batch = SimpleNamespace(inputs=rows[:, :-1], targets=rows[:, 1:])
    run_dir, facts = tmp_path / "run", {"stage": "base", "config": {"depth": 2}}

    def trainer_of(limit: float, resume: bool = False) -> Trainer:
        action = Validation(lambda: [batch], torch.ones(SIZES.vocab_size), World(), limit=limit)
        hooks = [Hook("validation", 2, action, judges=True)]
        trainer = make_trainer(tmp_path, runtime, hooks=hooks, steps=4, save_every=2, keep_last=1)
        trainer.facts = facts
        if resume:
            found = resuming.previous_run(run_dir, facts, resume=True, world=World())
            assert found is not None
            assert found.step == 4
            trainer.resume(found)
        return trainer

    rejected = r"at step 4, above --bpb-limit=0\.01.* kept as .*/rejected.step_000004"
    for resume in (False, True):
        with pytest.raises(UserError, match=rejected):
            trainer_of(0.01, resume).run()
        assert checkpoint_manager.saved_steps(run_dir) == [2]
    other = {"stage": "base", "config": {"depth": 4}}
    with pytest.raises(UserError, match="made with depth 2, not 4"):
        resuming.previous_run(run_dir, other, resume=True, world=World())
    assert checkpoint_manager.saved_steps(run_dir) == [2]
    trainer = trainer_of(99.0, resume=True)
    trainer.stop.received.append(signal.SIGTERM)  # before it is judged again
    with pytest.raises(StoppedError):
        trainer.run()
    assert checkpoint_manager.saved_steps(run_dir) == [2]
    trainer = make_trainer(tmp_path, runtime, steps=4)
    found = resuming.previous_run(run_dir, facts, resume=True, world=World())
    assert found is not None
    with pytest.raises(
        UserError, match=r"rejected.step_000004 was found unsound .* --eval-every=0"
    ):
        trainer.resume(found)
    weights = sha256_file(run_dir / "rejected.step_000004" / "model.safetensors")
    trainer_of(99.0, resume=True).run()
    assert checkpoint_manager.saved_steps(run_dir) == [4]
    assert sha256_file(run_dir / "step_000004" / "model.safetensors") == weights
    assert not [*run_dir.glob("rejected.*")]


FACTS: dict[str, Any] = {"stage": "base", "config": {}}


def rejected_run(folder: Path, runtime: Runtime) -> Path:
    """A run of four steps whose last one was rejected; there is a sound one of step 2."""
    trainer = make_trainer(folder, runtime, steps=4, save_every=2)
    trainer.facts = FACTS
    trainer.run()
    run_folder.reject_step(folder / "run", 4)
    return folder / "run"


def test_a_run_that_goes_back_before_a_rejected_step_does_not_return_to_it(
    runtime: Runtime, tmp_path: Path
) -> None:
    run_dir = rejected_run(tmp_path, runtime)
    with pytest.raises(UserError, match=r"no step 4 in .*; there is 2$"):
        resuming.previous_run(run_dir, FACTS, resume=True, world=World(), step=4)
    assert resuming.previous_run(run_dir, FACTS, resume=True, world=World(), step=2) is not None
    found = resuming.previous_run(run_dir, FACTS, resume=True, world=World())
    assert found is not None
    assert (found.step, found.is_rejected) == (2, False)
    assert (run_dir / "later.rejected.step_000004").is_dir()


def test_a_damaged_rejected_step_is_passed_over_and_a_dry_run_leaves_a_sound_one(
    runtime: Runtime, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = rejected_run(tmp_path, runtime)
    make_trainer(tmp_path, runtime, steps=1, write=False).run()
    weights = run_folder.rejected_folder(run_dir, 4) / "model.safetensors"
    with weights.open("r+b") as file:
        file.write(b"damage")
    found = resuming.previous_run(run_dir, FACTS, resume=True, world=World())
    assert found is not None
    assert found.step == 2
    assert "rejected.step_000004 is damaged" in caplog.text


def test_the_links_of_a_stage_lead_past_a_rejected_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    model = GPT(SIZES)
    first = scripted_model.save("base", model)
    run_dir, link = first.parent, tmp_path / "checkpoints" / "base"
    second = Path(shutil.copytree(first, run_dir / "step_000009"))
    common.point_link(link, second)
    checkpoint_writing.reject(run_dir, 9)
    assert link.resolve() == first.resolve()
    assert checkpoint_manager.find_checkpoint("base").step == 7
    assert "rejected.step_000009 was found unsound; taking step 7" in caplog.text
    checkpoint_writing.reject(run_dir, 7)
    assert not link.is_symlink()
    assert not (tmp_path / "models" / "base_model.safetensors").is_symlink()
    with pytest.raises(UserError, match=r"rejected.step_000007 was found unsound when it was val"):
        checkpoint_manager.find_checkpoint("base")
