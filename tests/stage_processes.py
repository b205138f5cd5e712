"""Training stages as processes of their own, forked from a server that has imported torch."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import shutil
import sys
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from nanochat import configurator
from nanochat.tracking import read_metrics

SECONDS_OF_ONE_RUN = 300
SCRIPTS = [
    "scripts.base_train",
    "scripts.mid_train",
    "scripts.chat_sft",
    "tests.even_rl",
    "scripts.tok_train",
]
COMMON = (
    "--device_batch_size=2",
    "--num_iterations=40",
    "--save_every=1",
    "--keep_last=2",
    "--log_every=1",
    "--eval_every=5",
    "--eval_tokens=256",
)


@dataclass(frozen=True)
class Stage:
    """A training command at a tiny size."""

    module: str
    folder: str
    flags: tuple[str, ...]


BASE = Stage(
    "scripts.base_train",
    "base_checkpoints",
    (
        "--depth=2",
        "--max_seq_len=128",
        "--total_batch_size=256",
        "--core_metric_every=20",
        "--core_metric_max_per_task=8",
        "--sample_every=20",
        *COMMON,
    ),
)
MID = Stage("scripts.mid_train", "mid_checkpoints", ("--total_batch_size=256", *COMMON))
SFT = Stage(
    "scripts.chat_sft",
    "chatsft_checkpoints",
    (
        "--target_examples_per_step=4",
        "--eval_metrics_every=10",
        "--eval_metrics_max_problems=2",
        *COMMON,
    ),
)
RL = Stage(
    "tests.even_rl",
    "chatrl_checkpoints",
    (
        "--examples_per_step=2",
        "--num_samples=4",
        "--max_new_tokens=4",
        "--top_k=0",
        "--init_lr_frac=0.2",
        "--eval_examples=8",
        "--eval_samples=2",
        *(flag for flag in COMMON if not flag.startswith("--eval_tokens")),
    ),
)


def start(base: Path, module: str, *flags: str) -> BaseProcess:
    """Start a command; what it says is appended to `<base>.log`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(SCRIPTS)
    process = context.Process(target=_main, args=(base, module, flags), daemon=True)
    process.start()
    return process


def finish(process: BaseProcess, base: Path, code: int = 0) -> str:
    """Wait for a command, which must end with `code`; what all of this base folder have said."""
    process.join(SECONDS_OF_ONE_RUN)
    said = log_of(base).read_text(encoding="utf-8")
    assert process.exitcode == code, said[-3000:]
    return said


def run(base: Path, module: str, *flags: str, code: int = 0) -> str:
    """Start and finish."""
    return finish(start(base, module, *flags), base, code)


def prepare(base: Path) -> None:
    """Text and a tokenizer."""
    run(base, "nanochat.dataset", "--data=embedded", "-n", "1")
    run(base, "scripts.tok_train", "--data=embedded", "--max_chars=100000", "--vocab_size=512")


def copy_of(prepared: Path, target: Path) -> Path:
    """The same base folder at another place."""
    return Path(shutil.copytree(prepared, target, symlinks=True))


def log_of(base: Path) -> Path:
    return base.with_suffix(".log")


def run_dir(base: Path, stage: Stage) -> Path:
    return base / stage.folder / "d2"


def outcome(base: Path, stage: Stage) -> dict[str, Any]:
    """Hashes of the last checkpoint's tensors, its evaluations, and the loss of every step."""
    newest = max(run_dir(base, stage).glob("step_*"))
    files = json.loads((newest / "manifest.json").read_text())["files"]
    hashes = {name: entry["sha256"] for name, entry in files.items() if ".safetensors" in name}
    assert len(hashes) == 3  # model, optimizer, loader
    state = json.loads((newest / "state.json").read_text())
    loop = state["loop"]
    rows = read_metrics(run_dir(base, stage) / "metrics.jsonl")
    return {
        "step": loop["step"],
        "loader": state["loader"],
        "evaluations": loop["evaluations"],
        "best": loop["best"],
        "losses": [(row["step"], row["loss"], row.get("reward")) for row in rows if "loss" in row],
        **hashes,
    }


def _main(base: Path, module: str, flags: tuple[str, ...]) -> None:
    log = os.open(log_of(base), os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ["NANOCHAT_BASE_DIR"] = str(base)
    torch.set_num_threads(1)
    command = importlib.import_module(module)
    sys.argv = [module, *flags]
    configurator.run(command.main, command.Config)
