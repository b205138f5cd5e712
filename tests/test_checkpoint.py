"""Checkpoints: what is kept, what is found, and every way in which saving or loading can fail."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from nanochat import checkpoint_writing, run_folder
from nanochat.checkpoint_manager import (
    Checkpoint,
    DamagedCheckpointError,
    find_checkpoint,
    list_checkpoints,
    load_model,
    newest_checkpoint,
    open_checkpoint,
)
from nanochat.checkpoint_writing import save_checkpoint
from nanochat.common import UserError, base_dir, checkpoints_dir, read_json, write_json
from nanochat.gpt import GPT, GPTConfig
from nanochat.run_folder import lock_run, prune
from nanochat.runtime import World
from nanochat.tokenizer import Tokenizer
from tests import small_disks
from tests.distributed import run_ranks

CONFIG = GPTConfig(sequence_len=8, vocab_size=280, n_layer=2, n_head=2, n_embd=16)
MODEL = {"a.weight": torch.arange(12.0).reshape(3, 4), "b.weight": torch.ones(2, 2).bfloat16()}
OPTIMIZER = {"step": torch.tensor(3), "a.weight.exp_avg": torch.arange(6.0).reshape(3, 2)}
EXTRA = {
    "tokens": np.arange(5, dtype=np.uint16),
    "generator": torch.arange(4, dtype=torch.uint8),
    "epoch": 3,
    "share": 0.25,
}
STATE = {"stage": "base", "val_bpb": 1.5, "config": {"depth": 2, "run": "dummy"}}


@pytest.fixture(autouse=True)
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    Tokenizer.train_from_iterator(["one two two one"], 270).save(tokenizer_folder())
    return tmp_path / "base"


def tokenizer_folder():
    return base_dir() / "tokenizer"


def save(step=10, tag="d2", stage="base", **changes):
    arguments = {
        "model": MODEL,
        "optimizer": OPTIMIZER,
        "state": STATE | {"stage": stage},
        "extra": EXTRA,
        "tokenizer_dir": tokenizer_folder(),
        "world": World(),
    }
    return save_checkpoint(checkpoints_dir(stage) / tag, step, **arguments | changes)


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype
        assert torch.equal(value, second[name])


def flip_byte(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def warnings(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


# ---- round trip -------------------------------------------------------------------------------


def test_everything_saved_is_loaded_in_the_types_it_had():
    path = save()
    checkpoint = find_checkpoint("base")
    assert checkpoint.path == path
    assert (checkpoint.step, checkpoint.tag) == (10, "d2")
    assert checkpoint.state == STATE | {"step": 10}
    assert_same(checkpoint.load_model(), MODEL)
    assert_same(checkpoint.load_optimizer(0, 1), OPTIMIZER)
    extra = checkpoint.load_extra(0)
    assert isinstance(extra["tokens"], np.ndarray)
    assert extra["tokens"].dtype == np.uint16
    assert extra["tokens"].tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(extra["generator"], EXTRA["generator"])
    assert (extra["epoch"], extra["share"]) == (3, 0.25)
    assert isinstance(extra["epoch"], int)


def test_a_folder_holds_the_documented_files_and_a_manifest_of_them():
    path = save()
    names = {file.name for file in path.iterdir()}
    assert names == {
        "model.safetensors",
        "optimizer_rank00_of01.safetensors",
        "extra_rank00.safetensors",
        "state.json",
        "tokenizer.json",
        "token_bytes.npy",
        "manifest.json",
    }
    files = read_json(path / "manifest.json")["files"]
    assert set(files) == names - {"manifest.json"}
    assert path.name == "step_000010"
    assert sorted(p.name for p in path.parent.iterdir()) == ["step_000010"]


def test_weights_alone_can_be_saved_and_cannot_resume_an_optimizer():
    save(optimizer=None, extra=None)
    checkpoint = find_checkpoint("base")
    assert checkpoint.load_extra(0) == {}
    with pytest.raises(UserError, match="holds weights only"):
        checkpoint.load_optimizer(0, 1)


def test_saving_a_step_again_replaces_it():
    save()
    path = save(model={"a.weight": torch.zeros(1)})
    assert_same(open_checkpoint(path).load_model(), {"a.weight": torch.zeros(1)})
    assert [p.name for p in path.parent.iterdir()] == ["step_000010"]


def test_equal_weights_have_equal_hashes():
    first, second = (open_checkpoint(save(step)) for step in (1, 2))
    other = open_checkpoint(save(3, model={"a.weight": torch.zeros(1)}))
    assert first.weights_hash == second.weights_hash != other.weights_hash


def test_views_of_one_stack_are_saved_as_themselves():
    stack = torch.arange(8.0).reshape(2, 2, 2)
    state = {"x.momentum": stack[0], "y.momentum": stack[1], "z.momentum": stack[1].T}
    path = save(optimizer={name: tensor.clone() for name, tensor in state.items()})
    assert_same(open_checkpoint(path).load_optimizer(0, 1), state)
    path = save(optimizer={"x.momentum": stack[0], "y.momentum": stack[1]})
    assert torch.equal(open_checkpoint(path).load_optimizer(0, 1)["y.momentum"], stack[1])


def test_links_lead_to_the_newest_checkpoint_and_survive_a_moved_base(base, tmp_path, monkeypatch):
    save(10)
    save(20)
    base.rename(tmp_path / "moved")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "moved"))
    newest = checkpoints_dir("base") / "d2" / "step_000020"
    model = base_dir() / "models" / "base_model.safetensors"
    assert model.is_symlink()
    assert model.resolve() == newest / "model.safetensors"
    assert (base_dir() / "checkpoints" / "base").resolve() == newest


def test_a_link_that_cannot_be_made_costs_a_warning_not_the_checkpoint(base, caplog):
    (base / "checkpoints" / "base").mkdir(parents=True)
    (base / "checkpoints" / "base" / "mine.txt").touch()
    save()
    assert find_checkpoint("base").step == 10
    assert ["cannot link" in message for message in warnings(caplog)] == [True]
    assert (base / "checkpoints" / "base" / "mine.txt").exists()


# ---- finding ----------------------------------------------------------------------------------


def test_the_newest_step_is_found_and_an_older_one_on_request():
    for step in (5, 1_000_000, 40):
        save(step)
    assert find_checkpoint("base").step == 1_000_000
    assert find_checkpoint("base", "d2", 40).step == 40
    assert [p.name for p in list_checkpoints("base")] == [
        "step_000005",
        "step_000040",
        "step_1000000",
    ]


def test_without_a_tag_the_run_written_last_is_taken_and_named(caplog):
    caplog.set_level(logging.INFO)
    for age, tag in ((20, "d20"), (10, "d4"), (30, "d6")):
        path = save(tag=tag)
        os.utime(path, (1e9 - age, 1e9 - age))
    assert find_checkpoint("base").tag == "d4"
    assert "taking base model d4, written last of d6, d20, d4" in caplog.text
    assert find_checkpoint("base", "d20").tag == "d20"


def test_a_missing_stage_names_folder_command_and_what_is_there():
    save(stage="mid", tag="d4")
    with pytest.raises(UserError) as error:
        find_checkpoint("sft")
    message = str(error.value)
    assert str(checkpoints_dir("sft")) in message
    assert "python -m scripts.chat_sft" in message
    assert "mid (d4)" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("base", "d9"), "no base model 'd9' in .*; there is d2"),
        (("base", "d2", 7), "no step 7 in .*; there is 10"),
        (("pretrain",), "unknown stage 'pretrain'"),
    ],
)
def test_what_is_not_there_is_named_with_what_is(arguments, message):
    save()
    with pytest.raises(UserError, match=message):
        find_checkpoint(*arguments)


def test_a_run_without_checkpoint_has_no_newest(tmp_path):
    assert newest_checkpoint(tmp_path / "nothing") is None


def test_pruning_keeps_the_newest_and_the_chosen():
    for step in range(1, 6):
        save(step)
    run_dir = checkpoints_dir("base") / "d2"
    removed = prune(run_dir, 2, keep={1})
    assert [p.name for p in removed] == ["step_000002", "step_000003"]
    assert sorted(p.name for p in run_dir.iterdir()) == [
        "step_000001",
        "step_000004",
        "step_000005",
    ]
    with pytest.raises(ValueError, match="keep_last is 0"):
        prune(run_dir, 0)


# ---- damage -----------------------------------------------------------------------------------


def truncate(path):
    os.truncate(path / "model.safetensors", 20)


def flip_weights(path):
    flip_byte(path / "model.safetensors")


def flip_optimizer(path):
    flip_byte(path / "optimizer_rank00_of01.safetensors")


def flip_state(path):
    flip_byte(path / "state.json")


def lose_file(path):
    (path / "state.json").unlink()


def lose_manifest(path):
    (path / "manifest.json").unlink()


def garble_manifest(path):
    (path / "manifest.json").write_text("{")


def empty_manifest(path):
    write_json(path / "manifest.json", [])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "model.safetensors has 20 bytes, not"),
        (flip_weights, "model.safetensors has another SHA-256"),
        (flip_optimizer, "optimizer_rank00_of01.safetensors has another SHA-256"),
        (flip_state, "state.json has another SHA-256"),
        (lose_file, "state.json is missing"),
        (lose_manifest, "manifest.json is missing"),
        (garble_manifest, "is not valid JSON"),
        (empty_manifest, "unreadable manifest.json"),
    ],
)
def test_damage_is_reported_in_one_line_and_the_previous_step_used(damage, message, caplog):
    save(10)
    damaged = save(20)
    damage(damaged)
    assert find_checkpoint("base").step == 10
    (line,) = warnings(caplog)
    assert str(damaged) in line
    assert message in line
    assert line.endswith("using step 10 instead")
    with pytest.raises(DamagedCheckpointError, match=message):
        find_checkpoint("base", "d2", 20)


def test_inference_does_not_read_optimizer_files():
    flip_optimizer(save())
    assert find_checkpoint("base", weights_only=True).step == 10


def test_a_run_with_only_damaged_checkpoints_is_an_error_that_lists_them():
    flip_weights(save(10))
    truncate(save(20))
    with pytest.raises(UserError, match=r"no sound checkpoint in .*step_000020.*step_000010"):
        find_checkpoint("base")


class KilledError(BaseException):
    """Stands for a SIGKILL: no handler of ours may catch it."""


@pytest.mark.parametrize("killed_in", ["_write", "publish_folder", "write_json"])
def test_a_save_killed_half_way_leaves_the_earlier_step_and_the_next_save_works(
    monkeypatch, killed_in
):
    save(10)

    def die(*arguments):
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_writing, killed_in, die)
        with pytest.raises(KilledError):
            save(20)
    run_dir = checkpoints_dir("base") / "d2"
    assert [p.name for p in run_dir.glob("tmp.*")] == ["tmp.step_000020"]
    assert find_checkpoint("base").step == 10
    assert save(20).is_dir()
    assert find_checkpoint("base").step == 20
    assert not list(run_dir.glob("tmp.*"))


def test_leftover_temporary_folders_are_removed_when_the_run_is_locked():
    path = save()
    leftover = path.with_name("tmp.step_000020")
    shutil.copytree(path, leftover)
    with lock_run(path.parent):
        assert not leftover.exists()
    assert find_checkpoint("base").step == 10


def test_a_step_killed_while_it_is_replaced_comes_back(monkeypatch, caplog):
    """Both copies are whole, and neither has the name of a step."""
    caplog.set_level(logging.INFO)
    path = save(10)
    replace = os.replace

    def die_between(source, target):
        replace(source, target)
        if source == path:
            raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die_between)
        with pytest.raises(KilledError):
            save(10, model={"weight": torch.ones(2)})
    assert not path.exists()
    with lock_run(path.parent):
        assert_same(find_checkpoint("base").load_model(), MODEL)
    assert f"{path} is back" in caplog.text
    assert [p.name for p in path.parent.iterdir() if p.is_dir()] == [path.name]


def test_what_cannot_be_deleted_yet_costs_a_warning_not_the_save(monkeypatch, caplog):
    path = save(10)

    def refuse(folder, **options):
        raise OSError(errno.EBUSY, "Device or resource busy", ".nfs01")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", refuse)
        save(10)
        save(20)
        assert [p.name for p in prune(path.parent, 1)] == ["step_000010"]
    assert find_checkpoint("base").step == 20
    assert any("not deleted yet" in line for line in warnings(caplog))
    with lock_run(path.parent):
        assert [p.name for p in path.parent.glob("*step*")] == ["step_000020"]


def test_ranks_beyond_a_hundred_have_their_own_files(tmp_path):
    """Names are sorted by number: as texts, rank 100 comes before rank 11."""
    names = [f"extra_rank{rank:02d}.safetensors" for rank in range(102)]
    for rank, name in enumerate(names):
        (tmp_path / name).write_bytes(checkpoint_writing._serialize_extra({"rank": rank}))
    checkpoint = Checkpoint(tmp_path, 1, "d2", {}, tuple(sorted(names)))
    assert [checkpoint.load_extra(rank)["rank"] for rank in (11, 99, 100, 101)] == [
        11,
        99,
        100,
        101,
    ]


# ---- one writer -------------------------------------------------------------------------------


HOLD = """
import fcntl, os, sys
file = open(sys.argv[1], "a+")
fcntl.flock(file, fcntl.LOCK_EX)
file.write(str(os.getpid()) + " on elsewhere")
file.flush()
print("locked", flush=True)
sys.stdin.read()
"""


def test_a_run_locked_by_another_process_is_refused_until_that_process_dies(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path / ".lock"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout.readline() == b"locked\n"
        with (
            pytest.raises(UserError, match=f"in use by process {other.pid} on"),
            lock_run(tmp_path),
        ):
            pass
        other.kill()
    with lock_run(tmp_path):
        assert (tmp_path / ".lock").read_text().startswith(f"{os.getpid()} on ")


def test_a_lock_ends_with_its_block(tmp_path):
    with pytest.raises(KeyError), lock_run(tmp_path / "new" / "run"):
        raise KeyError
    with lock_run(tmp_path / "new" / "run"):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_without_locks_a_run_goes_on_with_a_warning(tmp_path, monkeypatch, caplog, number):
    def refuse(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with lock_run(tmp_path):
        pass
    (line,) = warnings(caplog)
    assert f"{tmp_path} cannot be locked" in line


# ---- full disk --------------------------------------------------------------------------------


def test_a_full_disk_is_explained_and_touches_nothing_else(monkeypatch):
    save(10)
    synced = []

    def run_out(descriptor):
        synced.append(descriptor)
        if len(synced) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    run_dir = checkpoints_dir("base") / "d2"
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", run_out)
        with pytest.raises(UserError) as error:
            save(20)
    message = str(error.value)
    assert message.startswith(f"no space to save step 20 in {run_dir}: it takes 0.0 MB, ")
    assert "MB are free" in message
    assert "earlier checkpoints are untouched" in message
    assert [p.name for p in run_dir.iterdir()] == ["step_000010"]
    assert find_checkpoint("base").step == 10


def test_any_other_failed_write_says_what_failed(monkeypatch):
    (tokenizer_folder() / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"cannot save step 10 in .*tokenizer\.json"):
        save()
    assert not list(checkpoints_dir("base").rglob("*step*"))


@pytest.fixture
def small_disk(tmp_path):
    with small_disks.small_disk(tmp_path / "small", "256k") as folder:
        yield folder


def test_a_really_full_disk_keeps_the_earlier_checkpoint(small_disk):
    arguments = {
        "optimizer": None,
        "state": STATE,
        "extra": None,
        "tokenizer_dir": tokenizer_folder(),
        "world": World(),
    }
    first = save_checkpoint(small_disk, 1, model=MODEL, **arguments)
    with pytest.raises(UserError, match=r"no space to save step 2 in .*it takes 0\.4 MB, 0\.2 MB"):
        save_checkpoint(small_disk, 2, model={"a": torch.zeros(100_000)}, **arguments)
    assert [p.name for p in small_disk.iterdir()] == ["step_000001"]
    assert_same(open_checkpoint(first).load_model(), MODEL)


# ---- models -----------------------------------------------------------------------------------


def random_model(config=CONFIG):
    generator = torch.Generator().manual_seed(0)
    model = GPT(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return model


def save_model(model, **changes):
    state = STATE | {"model_config": model.config.to_json()} | changes
    return save(model=model.state_dict(), state=state, optimizer=None, extra=None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_model_is_ready_for_inference_in_the_asked_dtype(dtype):
    saved = random_model()
    path = save_model(saved)
    model, tokenizer, checkpoint = load_model("base", device=torch.device("cpu"), dtype=dtype)
    assert checkpoint.path == path
    assert tokenizer.hash == Tokenizer.from_directory(tokenizer_folder()).hash
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.transformer.wte.weight.dtype == torch.float32
    for name, parameter in model.named_parameters():
        if "wte" not in name:
            assert parameter.dtype == dtype
        assert torch.equal(parameter, saved.state_dict()[name].to(parameter.dtype))
    tokens = torch.arange(6)[None]
    if dtype == torch.float32:
        torch.testing.assert_close(model(tokens), saved.eval()(tokens).detach())


def test_the_tokenizer_of_a_model_is_the_one_saved_with_it():
    save_model(random_model())
    Tokenizer.train_from_iterator(["quite another text"], 272).save(tokenizer_folder())
    _, tokenizer, checkpoint = load_model("base", device=torch.device("cpu"), dtype=torch.float32)
    assert tokenizer.vocab_size == 270
    assert checkpoint.path.parent.name == "d2"


def test_training_on_with_another_tokenizer_is_refused():
    mine = Tokenizer.from_directory(tokenizer_folder())
    other = Tokenizer.train_from_iterator(["quite another text"], 272)
    save_model(random_model(), tokenizer_hash=mine.hash)
    checkpoint = find_checkpoint("base")
    checkpoint.check_tokenizer(mine)
    with pytest.raises(UserError, match=f"hash {mine.hash[:12]}, yours {other.hash[:12]}"):
        checkpoint.check_tokenizer(other)


def test_a_model_smaller_than_its_tokenizer_is_refused():
    config = GPTConfig(sequence_len=8, vocab_size=260, n_layer=2, n_head=2, n_embd=16)
    save_model(random_model(config))
    with pytest.raises(UserError, match="tokenizer has 270 tokens, the model 260"):
        load_model("base", device=torch.device("cpu"), dtype=torch.float32)


# ---- several ranks ----------------------------------------------------------------------------


def save_on_rank(found, base, lost_disk):
    """Rank r keeps rows [3r, 3r + 3) of one tensor and a matrix of its own."""
    os.environ["NANOCHAT_BASE_DIR"] = base
    rank = found.world.rank
    rows = torch.arange(12.0).reshape(6, 2)[3 * rank : 3 * rank + 3]
    optimizer = {"step": torch.tensor(7), "a.exp_avg": rows, f"m{rank}.momentum": rows + 1}
    with pytest.MonkeyPatch.context() as patch:
        if rank == lost_disk:
            patch.setattr(checkpoint_writing, "_write", fail_to_write)
        try:
            with lock_run(checkpoints_dir("base") / "d2", found.world):
                path = save(20, optimizer=optimizer, extra={"rank": rank}, world=found.world)
            return path.name
        except UserError as error:
            return str(error)


def fail_to_write(path, data):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_two_ranks_save_one_checkpoint_that_one_or_two_ranks_load(base):
    assert run_ranks(save_on_rank, 2, str(base), None) == ["step_000020", "step_000020"]
    checkpoint = find_checkpoint("base")
    whole = torch.arange(12.0).reshape(6, 2)
    shard = checkpoint.load_optimizer(1, 2)
    assert set(shard) == {"step", "a.exp_avg", "m1.momentum"}
    assert torch.equal(shard["a.exp_avg"], whole[3:])
    for rank, size in ((0, 1), (2, 3)):
        state = checkpoint.load_optimizer(rank, size)
        assert set(state) == {"step", "a.exp_avg", "m0.momentum", "m1.momentum"}
        assert torch.equal(state["a.exp_avg"], whole)
        assert state["step"] == 7
    assert [checkpoint.load_extra(rank)["rank"] for rank in (0, 1, 2)] == [0, 1, 0]


@pytest.mark.parametrize("lost_disk", [0, 1])
def test_a_write_that_fails_on_one_rank_is_refused_by_all(base, lost_disk):
    save(10)
    first, second = run_ranks(save_on_rank, 2, str(base), lost_disk)
    assert first.startswith("no space to save step 20")
    assert second.startswith("no space to save step 20")
    assert find_checkpoint("base").step == 10
    run_dir = checkpoints_dir("base") / "d2"
    assert sorted(p.name for p in run_dir.iterdir()) == [".lock", "step_000010"]


def lock_on_rank(found, folder):
    try:
        with lock_run(run_folder.Path(folder), found.world):
            return "locked"
    except UserError as error:
        return str(error)


def test_a_locked_run_is_refused_by_all_ranks(tmp_path):
    assert run_ranks(lock_on_rank, 2, str(tmp_path)) == ["locked", "locked"]
    with lock_run(tmp_path):
        first, second = run_ranks(lock_on_rank, 2, str(tmp_path))
    assert first == second
    assert f"in use by process {os.getpid()}" in first


@pytest.mark.parametrize("tag", ["", "*", "../d2"])
def test_a_tag_that_is_no_run_is_named(tag: str, tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    with pytest.raises(UserError, match="no base checkpoint in"):
        find_checkpoint("base", tag)
