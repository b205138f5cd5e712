"""What a dry run says, that it is true, and that nothing is written."""

from __future__ import annotations

import dataclasses
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat import plan
from nanochat.common import UserError, base_dir
from nanochat.gpt import GPT, GPTConfig
from nanochat.kernels import training as kernels
from nanochat.memory import checkpoint_bytes, estimate_memory
from nanochat.objectives import next_token_loss_sum
from nanochat.precision import MasterWeights
from nanochat.presets import MODELS, PresetName
from nanochat.runtime import Runtime, World
from nanochat.scaling import model_config
from nanochat.stage import StageConfig, train_stage
from nanochat.tokenizer import Tokenizer
from tests.tiny_run import ROWS, SIZES, SeededLoader


def dry_run(
    runtime: Runtime, folder: Path, *, trains: bool, sizes: GPTConfig = SIZES, **changes: Any
) -> SeededLoader:
    """A dry run of a base stage; the loader says how many steps were taken."""
    Tokenizer.train_from_iterator(["one two two one"], 270).save(folder / "tokenizer")
    model = GPT(sizes)
    model.init_weights(torch.Generator().manual_seed(5))
    loader = SeededLoader(runtime.world)
    code = train_stage(
        StageConfig(
            dry_run=True,
            save_every=2,
            keep_best=True,
            device_batch_size=2,
            **{"keep_last": 3} | changes,
        ),
        stage="base",
        title="Base model training",
        runtime=runtime,
        model=model,
        tokenizer=Tokenizer.from_directory(folder / "tokenizer"),
        tokenizer_dir=folder / "tokenizer",
        loader=loader,
        rows_per_step=ROWS,
        num_iterations=5,
        hooks=[],
        facts={"data": "embedded", "parent": None},
        dry_run_trains=trains,
    )
    assert code == 0
    return loader


@pytest.mark.parametrize(("trains", "steps"), [(False, 0), (True, 5)])
def test_a_dry_run_says_what_would_be_and_writes_nothing(
    runtime: Runtime,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    trains: bool,
    steps: int,
) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    caplog.set_level(logging.INFO)
    assert dry_run(runtime, tmp_path, trains=trains).position == steps
    assert list(base_dir().iterdir()) == []
    said = caplog.text
    assert "27,776 parameters (wte 1,600, lm_head 1,600, transformer_matrices 24,576)" in said
    assert "2 layers, width 32, 2 query and 2 key heads of 16, context 32, vocabulary 50" in said
    assert "5 steps x 128 tokens = 640 tokens" in said
    assert re.search(r"\de\+\d\d FLOPs", said)
    assert re.search(r"about [\d.]+ MB of memory on each device \(weights 0\.1 MB, copies", said)
    assert (
        f"would write 3 checkpoint(s) of about 0.2 MB to {base_dir()}/base_checkpoints/d2" in said
    )


@pytest.mark.parametrize(
    ("settings", "flags"),
    [
        ({"compile": "on", "shard": "full"}, "--compile=on and --shard=full"),
        ({"fp8": True, "shard": "full"}, "--fp8 and --shard=full"),
        ({"int8": True, "shard": "full"}, "--int8 and --shard=full"),
        ({"int8": True, "compile": "on"}, "--int8 and --compile=on"),
        ({"fp8": True, "int8": True}, "--fp8 and --int8"),
    ],
)
def test_settings_that_exclude_one_another_are_refused_first(
    runtime: Runtime, tmp_path: Path, settings: dict[str, Any], flags: str
) -> None:
    with pytest.raises(UserError, match=f"{flags} do not go together; leave one of them out"):
        dry_run(runtime, tmp_path, trains=False, **settings)


def test_what_cannot_be_done_is_refused_first(runtime: Runtime, tmp_path: Path) -> None:
    for settings, flag in (({"fp8": True}, "--fp8"), ({"int8": True}, "--int8")):
        with pytest.raises(UserError, match=f"{flag} needs"):
            dry_run(runtime, tmp_path, trains=False, **settings)


def test_nothing_to_keep_is_refused_first(runtime: Runtime, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--keep-last is 0"):
        dry_run(runtime, tmp_path, trains=False, keep_last=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("layers", "width", "length"), [(4, 128, 128), (2, 128, 512)])
@pytest.mark.parametrize("preset", MODELS)
def test_the_estimate_of_activations_is_what_autograd_keeps(
    dtype: torch.dtype, layers: int, width: int, length: int, preset: PresetName
) -> None:
    sizes = model_config(
        layers, vocab_size=64, sequence_len=length, model_dim=width, head_dim=64, preset=preset
    )
    model = GPT(sizes)
    model.init_weights(torch.Generator().manual_seed(0))
    expected = estimate_memory(model, rows=2, compute_dtype=dtype, world_size=1)
    MasterWeights(model, dtype)
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    tokens = torch.randint(0, 64, (2, length), generator=torch.Generator().manual_seed(1))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        next_token_loss_sum(model.hidden(tokens), model.lm_head.weight, tokens)
    size = sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in own)
    # Depends on the length by a few percent, and on which kernels a machine has.
    assert expected["activations"] == pytest.approx(size, rel=0.3)


needs_kernels = pytest.mark.skipif(
    kernels.load() is None, reason="no AMX and no AVX-512 BF16, or no kernels"
)


@needs_kernels
@pytest.mark.parametrize(
    ("cap", "how"), [(15.0, "in 8-bit integers, "), (0.0, "in 8-bit integers (not for head), ")]
)
def test_it_says_that_products_are_made_in_8_bits(
    cap: float,
    how: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    caplog.set_level(logging.INFO)
    config = dataclasses.replace(SIZES, n_embd=128, logit_softcap=cap)
    runtime = Runtime(torch.device("cpu"), torch.bfloat16, World(), 42)
    dry_run(runtime, tmp_path, trains=False, sizes=config, int8=True)
    assert f"compiled kernels {how}" in caplog.text


@needs_kernels
@pytest.mark.parametrize(
    ("sizes", "how"),
    [
        ({"n_embd": 128}, "compiled kernels, "),
        ({"n_embd": 128, "logit_softcap": 0.0}, "compiled kernels (not for head), "),
        ({"n_embd": 96, "n_head": 1, "logit_softcap": 0.0}, "(not for rotations and head), "),
        ({"n_embd": 200}, "uncompiled, "),
    ],
)
def test_it_says_on_what_a_model_of_these_sizes_runs(
    sizes: dict[str, Any],
    how: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    caplog.set_level(logging.INFO)
    config = dataclasses.replace(SIZES, **{"n_kv_head": None} | sizes)
    runtime = Runtime(torch.device("cpu"), torch.bfloat16, World(), 42)
    dry_run(runtime, tmp_path, trains=False, sizes=config)
    assert f"FLOPs, {how}" in caplog.text or how in caplog.text
    # A long run is compiled where the kernels would not serve its matrices.
    monkeypatch.setattr(plan.shutil, "which", lambda name: name)
    flops = 2 * plan.CPU_COMPILE_FLOPS
    is_compiled = plan.wants_compile(
        "auto", config, device=runtime.device, dtype=torch.bfloat16, training_flops=flops
    )
    assert is_compiled == (how == "uncompiled, ")


def test_full_shards_and_a_waiting_copy_are_part_of_the_estimate() -> None:
    model, known = GPT(SIZES), {"rows": 1, "compute_dtype": torch.bfloat16}
    total = model.count_parameters()["total"]
    whole = estimate_memory(model, world_size=4, **known)  # type: ignore[arg-type]
    full = estimate_memory(  # type: ignore[arg-type]
        model, world_size=4, shard="full", background_save=True, **known
    )
    assert full["weights"] == full["gradients"] == whole["weights"] // 4
    assert full["optimizer"] == whole["optimizer"]
    assert full["copies"] == 2 * total  # gathered for evaluations
    assert full.keys() == whole.keys()  # shards are not saved in the background
    waiting = estimate_memory(model, world_size=4, background_save=True, **known)  # type: ignore[arg-type]
    assert waiting["snapshot"] == whole["weights"] + whole["optimizer"]
    states = 4 * whole["optimizer"]
    assert checkpoint_bytes(model, shard="optimizer") == whole["weights"] + states
    assert checkpoint_bytes(model, shard="full") == 2 * whole["weights"] + states


def test_optimizer_states_are_shared_out_over_ranks() -> None:
    model = GPT(SIZES)
    one, two = (
        estimate_memory(model, rows=1, compute_dtype=torch.bfloat16, world_size=size)
        for size in (1, 2)
    )
    assert two["optimizer"] * 2 == one["optimizer"]
    assert one["copies"] == 2 * (27_776 - 1_600)
    assert {key: value for key, value in one.items() if key != "optimizer"} == {
        key: value for key, value in two.items() if key != "optimizer"
    }
