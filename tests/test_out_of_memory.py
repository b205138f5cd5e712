"""Memory that ends in a backward pass, when some of its gradients have already been added."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor

from nanochat.checkpoint_manager import newest_checkpoint
from nanochat.common import UserError, read_json
from nanochat.precision import MasterWeights
from nanochat.runtime import Runtime, World
from nanochat.tracking import read_metrics
from nanochat.training import Trainer
from tests.tiny_run import make_trainer


def runtime(dtype: torch.dtype = torch.float32) -> Runtime:
    """One process on the CPU."""
    return Runtime(torch.device("cpu"), dtype, World(), 42)


def run_out_of_memory(trainer: Trainer, largest_rows: int, in_pass: int = 1) -> list[int]:
    """Let passes of more rows fail on their way back between the two blocks, from `in_pass` on.

    Returns how many parameters had a gradient at each failure.
    """
    weights = trainer.weights
    assert isinstance(weights, MasterWeights)
    passes: list[int] = []
    with_gradient: list[int] = []

    def fail(gradient: Tensor) -> NoReturn:
        parameters = [parameter for _, parameter in weights.named_parameters()]
        with_gradient.append(sum(parameter.grad is not None for parameter in parameters))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def watch(block: torch.nn.Module, arguments: Any, output: Tensor) -> None:
        passes.append(output.size(0))
        if output.size(0) > largest_rows and len(passes) >= in_pass:
            output.register_hook(fail)  # type: ignore[no-untyped-call]

    trainer.model.blocks[0].register_forward_hook(watch)
    return with_gradient


def outcome(folder: Path) -> tuple[dict[str, str], list[Any]]:
    """Hashes of weights and optimizer state; loss and gradient norm of every step."""
    checkpoint = newest_checkpoint(folder / "run")
    assert checkpoint is not None
    files = read_json(checkpoint.path / "manifest.json")["files"]
    hashes = {name: files[name]["sha256"] for name in files if name.startswith(("model", "optim"))}
    assert len(hashes) == 2
    rows = read_metrics(folder / "run" / "metrics.jsonl")
    return hashes, [(r["step"], r["loss"], r.get("grad_norm")) for r in rows if "loss" in r]


# Of 14: the head and the six matrices of the block behind; or all, from the pass before.
@pytest.mark.parametrize(("in_pass", "with_gradient"), [(1, 7), (2, 14)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_out_of_memory_in_a_backward_pass_counts_no_gradient_twice(
    tmp_path: Path,
    dtype: torch.dtype,
    in_pass: int,
    with_gradient: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    make_trainer(tmp_path / "small", runtime(dtype), micro_batch_rows=1).run()
    trainer = make_trainer(tmp_path / "large", runtime(dtype), micro_batch_rows=2)
    failures = run_out_of_memory(trainer, 1, in_pass)
    trainer.run()
    assert failures == [with_gradient]
    assert outcome(tmp_path / "large") == outcome(tmp_path / "small")
    assert "out of memory with 2 rows a pass: going on with 1" in caplog.text


def test_out_of_memory_in_the_backward_pass_of_a_single_row_says_what_to_lower(
    tmp_path: Path,
) -> None:
    trainer = make_trainer(tmp_path, runtime())
    failures = run_out_of_memory(trainer, 0)
    with pytest.raises(UserError, match=r"single row \(CUDA out of memory.*lower --max-seq-len"):
        trainer.run()
    assert failures == [7, 7, 7]  # of 4, 2 and 1 rows: each try begins without gradients
