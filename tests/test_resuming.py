"""What becomes of an earlier run in the same folder: gone on from, refused, or moved aside."""

from __future__ import annotations

import logging
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from nanochat import checkpoint_manager, resuming
from nanochat.checkpoint_manager import saved_steps
from nanochat.common import UserError
from nanochat.runtime import Runtime, World
from nanochat.stage import StageConfig
from nanochat.stopping import StoppedError, StopRequest
from nanochat.training import Hook
from tests.tiny_run import go_on, losses, make_trainer, newest

FACTS = {"config": {"depth": 2, "matrix_lr": 0.02, "run": "dummy"}, "num_iterations": 6}


def earlier_run(folder: Path, runtime: Runtime) -> Path:
    trainer = make_trainer(folder, runtime)
    trainer.facts = FACTS
    trainer.run()
    return folder / "run"


def look(run_dir: Path, resume: bool, **config: Any) -> checkpoint_manager.Checkpoint | None:
    facts = FACTS | {"config": {**FACTS["config"], **config}}  # type: ignore[dict-item]
    return resuming.previous_run(run_dir, facts, resume=resume, world=World())


def test_another_model_is_not_resumed_and_nothing_is_touched(
    runtime: Runtime, tmp_path: Path
) -> None:
    run_dir = earlier_run(tmp_path, runtime)
    with pytest.raises(UserError, match=r"made with depth 2, not 4\. Give the same settings"):
        look(run_dir, True, depth=4)
    assert saved_steps(run_dir) == [6]


def test_a_run_goes_back_to_a_step_and_ends_where_it_ended(
    runtime: Runtime, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings: dict[str, Any] = {"save_every": 2, "keep_last": 9}
    trainer = make_trainer(tmp_path, runtime, **settings)
    trainer.facts = FACTS
    trainer.run()
    run_dir, end = tmp_path / "run", newest(tmp_path).weights_hash
    facts = FACTS | {"config": {**FACTS["config"], "resume_from_step": 2}}  # type: ignore[dict-item]
    for step in (3, 8):
        with pytest.raises(UserError, match=rf"no step {step} in .*/run; there is 2, 4, 6$"):
            resuming.previous_run(run_dir, facts, resume=True, world=World(), step=step)
    found = resuming.previous_run(run_dir, facts, resume=True, world=World(), step=2)
    assert found is not None
    assert found.step == 2
    assert saved_steps(run_dir) == [2]
    assert {path.name for path in run_dir.glob("later.*")} == {
        "later.step_000004",
        "later.step_000006",
    }
    assert "step_000004 is later and was renamed to later.step_000004" in caplog.text
    go_on(tmp_path, runtime, **settings).run()
    assert newest(tmp_path).weights_hash == end
    assert list(losses(tmp_path)) == [1, 2, 3, 4, 5, 6]


def test_a_changed_learning_rate_goes_on_and_is_named(
    runtime: Runtime, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = earlier_run(tmp_path, runtime)
    for settings in ({}, {"run": "night"}, {"a_flag_of_tomorrow": 1}):
        found = look(run_dir, True, **settings)
        assert found is not None
        assert found.step == 6
    assert caplog.text == ""
    assert look(run_dir, True, matrix_lr=0.01) is not None
    assert "matrix_lr 0.02, not 0.01" in caplog.text


def test_a_setting_newer_than_the_run_is_compared_with_its_default(
    runtime: Runtime, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = earlier_run(tmp_path, runtime)
    defaults = resuming.defaults_of(StageConfig())
    assert defaults["int8"] is False
    assert "grad_clip" not in defaults  # the optimizer's own

    def resume(**settings: Any) -> checkpoint_manager.Checkpoint | None:
        config = {**FACTS["config"], **settings}  # type: ignore[dict-item]
        facts = FACTS | {"config": config}
        return resuming.previous_run(
            run_dir, facts, resume=True, world=World(), defaults=defaults | {"twist": 0}
        )

    assert resume(int8=False, twist=0) is not None
    assert caplog.text == ""
    assert resume(int8=True) is not None
    assert "made with int8 False, not True: it ends elsewhere" in caplog.text
    with pytest.raises(UserError, match="made with twist 0, not 1"):
        resume(twist=1)


def test_another_compute_dtype_goes_on_and_is_named(
    runtime: Runtime, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(tmp_path, runtime)
    trainer.facts = FACTS | {"compute_dtype": "bfloat16"}
    trainer.run()
    facts = FACTS | {"compute_dtype": "float32"}
    assert resuming.previous_run(tmp_path / "run", facts, resume=True, world=World()) is not None
    assert "compute_dtype 'bfloat16', not 'float32'" in caplog.text


def test_data_that_changed_under_a_run_is_refused_and_named(
    runtime: Runtime, tmp_path: Path
) -> None:
    trainer = make_trainer(tmp_path, runtime)
    saved = {"train": ["aaaa", "bbbb"], "val": ["cccc"]}
    trainer.facts = FACTS | {"data": "my_texts", "data_fingerprint": saved}
    trainer.run()
    run_dir = tmp_path / "run"

    def resume(train: list[str]) -> checkpoint_manager.Checkpoint | None:
        now = {"data_fingerprint": {"train": train, "val": ["cccc"]}}
        facts = FACTS | {"data": "my_texts"} | now
        return resuming.previous_run(run_dir, facts, resume=True, world=World())

    assert resume(["aaaa", "bbbb", "added"]) is not None
    with pytest.raises(UserError, match=r"'my_texts' changed .* train shard 1 .* dddd, which was"):
        resume(["aaaa", "dddd"])
    with pytest.raises(UserError, match="1 train shards, which were 2"):
        resume(["aaaa"])
    assert saved_steps(run_dir) == [6]


def test_a_run_that_starts_over_keeps_the_one_before_until_it_has_saved_something(
    runtime: Runtime, tmp_path: Path
) -> None:
    run_dir = earlier_run(tmp_path, runtime)
    assert look(run_dir, False) is None
    (run_dir / "metrics.jsonl").write_text("{}\n")  # a start that came to no checkpoint
    assert look(run_dir, False) is None
    assert saved_steps(run_dir) == []
    assert saved_steps(run_dir / "previous") == [6]


def test_starting_over_twice_loses_neither_run(
    runtime: Runtime, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for steps in (6, 2, 4):  # a long run, and two starts that forgot --resume
        make_trainer(tmp_path, runtime, steps=steps).run()
        run_dir = tmp_path / "run"
        with caplog.at_level(logging.INFO):
            assert look(run_dir, False) is None
    found = {path.name: saved_steps(path) for path in run_dir.glob("previous*")}
    assert found == {"previous": [4], "previous.1": [6], "previous.2": [2]}
    assert "the one before it previous.2; delete what you no longer need" in caplog.text


@pytest.mark.parametrize("best", [False, True])
def test_what_a_resumed_run_saves_outlives_the_damaged_steps_it_has_passed_over(
    runtime: Runtime, tmp_path: Path, best: bool
) -> None:
    """Else retention takes the damaged one for the newest, and deletes the one just saved."""
    value = {2: 1.0, 4: 2.0, 6: 3.0}
    hooks = [Hook("look", 2, lambda t: {"val_bpb": value[t.state.step]}, at_start=False)]
    plan: dict[str, Any] = {"save_every": 1, "keep_last": 6, "hooks": hooks}
    make_trainer(tmp_path, runtime, **plan).run()
    run_dir = tmp_path / "run"
    for step in (5, 6):
        with (run_dir / f"step_{step:06d}" / "model.safetensors").open("r+b") as file:
            file.write(b"damage")
    found = look(run_dir, True)
    assert found is not None
    assert found.step == 4
    damaged = ["damaged.step_000005", "damaged.step_000006"]
    assert sorted(path.name for path in run_dir.glob("damaged.*")) == damaged
    request = StopRequest()
    plan |= {"keep_last": 1, "keep_best": best, "stop": request}
    trainer = make_trainer(tmp_path, runtime, **plan)
    trainer.resume(found)
    trainer.hooks = []
    request.received.append(signal.SIGTERM)
    trainer._step()
    with pytest.raises(StoppedError, match="step 5"):
        trainer.run()
    assert saved_steps(run_dir) == ([2, 5] if best else [5])
    assert look(run_dir, False) is None
    assert sorted(path.name for path in (run_dir / "previous").glob("damaged.*")) == damaged


def test_what_the_pipeline_calls_free_may_differ_in_a_resumed_run() -> None:
    stages = Path(__file__).parents[1] / "scripts" / "stages.sh"
    (flags,) = re.findall(r'^PIPELINE_FREE_FLAGS="([^"]+)"', stages.read_text(), flags=re.MULTILINE)
    names = {flag.removeprefix("--") for flag in flags.split()}
    assert "bpb_limit" in names
    assert names <= resuming._FREE
