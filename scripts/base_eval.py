"""Evaluate a base model: CORE, bits per byte, and samples.

python -m scripts.base_eval --max-per-task=16
python -m scripts.base_eval --eval=core
python -m scripts.base_eval --hf-path=models/gpt2
torchrun --standalone --nproc_per_node=8 -m scripts.base_eval
"""

from __future__ import annotations

import datetime
import difflib
import hashlib
import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from nanochat import checkpoint_manager, configurator, report, runtime
from nanochat.answers import plain_text
from nanochat.common import UserError, atomic_write_text, base_dir, eval_bundle_name
from nanochat.core_bundle import bundle_digest, files_digest
from nanochat.core_eval import CoreResult, check_max_per_task, evaluate_core
from nanochat.core_scoring import GptModel, LanguageModel
from nanochat.core_tokens import Tokenizer as CoreTokenizer
from nanochat.dataset import open_source
from nanochat.engine import Engine, sample_prompts
from nanochat.gpt import GPT
from nanochat.hf_model import load_hf_model
from nanochat.loss_eval import evaluate_split
from nanochat.runtime import Runtime
from nanochat.stage import check_count, check_positive
from nanochat.tokenizer import Tokenizer
from tasks import mixtures

logger = logging.getLogger(__name__)

PARTS = ("core", "bpb", "sample")
SECTION = "Base model evaluation"
MEASURED = "measured"  # "<part> measured" in the report: when, followed by what
_KEPT = "; not measured again since"
FREE_SAMPLES, FREE_SAMPLE_TOKENS = 8, 128


@dataclass(frozen=True)
class Config:
    """Flags of base_eval."""

    eval: str = ",".join(PARTS)
    """What to do: core, bpb and sample, joined with commas."""
    max_per_task: int = -1
    """Items of each CORE task, more than its solved examples (5 to 10); -1 = all."""
    model_tag: str | None = None
    """Folder name of the run; default: the one written last."""
    step: int | None = None
    """Step of the checkpoint; default: the newest."""
    hf_path: str | None = None
    """Score a model of the transformers library instead: its folder. CORE only."""
    device_batch_size: int = 32
    """Rows of one forward pass on each device, for bpb."""
    split_tokens: int | None = None
    """Tokens of each split for bpb; default: as many as the training run validated on."""
    data: str | None = None
    """embedded, fineweb-edu, climbmix or a folder of shards; default: what it was trained on."""
    device_type: str = ""
    """cuda, cpu or mps; default: the best there is."""
    dtype: str = ""
    """Compute dtype: bfloat16 or float32; default: bfloat16 where the hardware is fast at it."""


def main(config: Config) -> None:
    """Do the parts that were asked for, print and report."""
    parts = parse_parts(config.eval)
    check_count(config, "max_per_task", "all items")
    check_positive(config, "device_batch_size")
    if config.split_tokens is not None:
        check_positive(config, "split_tokens")
    with runtime.start(config.device_type, dtype=config.dtype) as rt:
        if config.hf_path:
            evaluate_hf_model(config, parts, rt)
        else:
            evaluate_checkpoint(config, parts, rt)


def evaluate_checkpoint(config: Config, parts: list[str], rt: Runtime) -> None:
    """A base model of ours."""
    checkpoint = checkpoint_manager.find_checkpoint(
        "base", config.model_tag, config.step, weights_only=True
    )
    data = config.data or checkpoint.state["data"]
    if "core" in parts:  # before the model is loaded, which may take minutes
        check_bundle(config, data, rt)
    model, tokenizer = checkpoint_manager.model_of(
        checkpoint, device=rt.device, dtype=rt.compute_dtype
    )
    measured: dict[str, list[dict[str, Any]]] = {}
    if "core" in parts:
        name = f"base_model_{checkpoint.step:06d}"
        weights = f"{checkpoint.tag} {checkpoint.weights_hash}"
        core_model = as_core_model(model, checkpoint, rt)
        measured["core"] = run_core(core_model, tokenizer, config, data, rt, name, weights)
    if "bpb" in parts:
        num_tokens = config.split_tokens
        if num_tokens is None:
            num_tokens = checkpoint.state["config"]["eval_tokens"]
        values = measure_bpb(model, tokenizer, data, num_tokens, config.device_batch_size, rt)
        if rt.world.is_main:
            print("\n".join(f"{name:<10} {value:.4f}" for name, value in values.items()))
        measured["bpb"] = [values]
    if "sample" in parts and rt.world.is_main:
        samples = draw_samples(model, tokenizer)
        print("\n".join(f"{name}: {text}" for name, text in samples.items()))
        measured["sample"] = [samples]
    if rt.world.is_main:
        told = {
            "Model": f"{checkpoint.tag}, step {checkpoint.step}",
            "Weights": checkpoint.weights_hash[:16],
        }
        report_parts(config, told, measured)


def report_parts(
    config: Config, model: Mapping[str, str], measured: Mapping[str, list[dict[str, Any]]]
) -> None:
    """Write the section: what was measured now, and what else is known of the same weights."""
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
    parts = {name: [{f"{name} {MEASURED}": now}, *rows] for name, rows in measured.items()}
    kept = {name: rows for name, rows in earlier_parts(model).items() if name not in parts}
    data = [row for name in PARTS for row in (parts | kept).get(name, [])]
    report.append(SECTION, [asdict(config), model, *data], is_update=bool(kept))
    if kept:
        logger.info(
            "the report keeps what was measured earlier of the same weights: %s", ", ".join(kept)
        )


def earlier_parts(model: Mapping[str, str]) -> dict[str, list[dict[str, Any]]]:
    """The parts that the report has of these weights, each marked as an earlier one."""
    rows = report.stored(SECTION)
    if dict(model) not in rows:
        return {}
    parts: dict[str, list[dict[str, Any]]] = {}
    name = ""
    for row in rows[rows.index(dict(model)) + 1 :]:
        begun = [part for part in PARTS if f"{part} {MEASURED}" in row]
        if begun:
            name = begun[0]
            when = row[f"{name} {MEASURED}"].removesuffix(_KEPT)
            parts[name] = [{f"{name} {MEASURED}": when + _KEPT}]
        elif name:
            parts[name].append(row)
    return parts


def check_bundle(config: Config, data: str, rt: Runtime) -> None:
    """UserError, on all ranks, for a bundle that is not there or needs more items a task."""
    bundle = mixtures.core_bundle(data, rt.world)
    rt.world.together(lambda: check_max_per_task(bundle, config.max_per_task))


def evaluate_hf_model(config: Config, parts: list[str], rt: Runtime) -> None:
    """A model of the transformers library; on the 22 tasks unless --data says otherwise."""
    path = str(config.hf_path)
    if "core" not in parts:
        raise UserError(f"--hf-path is scored by CORE only; --eval={config.eval} leaves nothing")
    if len(parts) > 1:
        logger.info(
            "%s is scored by CORE only, not by %s", path, " and ".join(set(parts) - {"core"})
        )
    data = config.data or "fineweb-edu"
    check_bundle(config, data, rt)
    model, tokenizer = load_hf_model(path, device=rt.device, dtype=rt.compute_dtype)
    name = table_name(path)
    weights = None
    if Path(path).is_dir():
        weights = files_digest(Path(path), [p for p in Path(path).rglob("*") if p.is_file()])
    sections = run_core(model, tokenizer, config, data, rt, name, weights)
    if rt.world.is_main:
        report.append(SECTION, [asdict(config), {"Model": path}, *sections])


def table_name(hf_path: str) -> str:
    """The name of the table of a model: its path with dashes, never that of a hidden file."""
    parts = [part for part in Path(hf_path).parts if part not in ("/", "..")]
    return "-".join(parts).lstrip(".-") or Path(hf_path).resolve().name


def as_core_model(model: GPT, checkpoint: checkpoint_manager.Checkpoint, rt: Runtime) -> GptModel:
    """The model, with its float32 original for decisions that a lower precision leaves open."""
    if rt.compute_dtype == torch.float32:
        return GptModel(model)
    exact = GPT(model.config)
    exact.load_state_dict(checkpoint.load_model())
    return GptModel(model, GptModel(exact.to(rt.device).requires_grad_(False).eval()))


def run_core(
    model: LanguageModel,
    tokenizer: CoreTokenizer,
    config: Config,
    data: str,
    rt: Runtime,
    name: str,
    weights: str | None,
) -> list[dict[str, Any]]:
    """CORE, its table in base_eval/<name>.csv; what the report says.

    weights: what tells these weights from all others; without it a killed run starts again.
    """
    folder, bundle = base_dir() / "base_eval", mixtures.core_bundle(data, rt.world)
    progress_dir = None
    if weights is not None:
        # Rank 0's: the clocks of two machines may tell a file's time differently.
        digest = rt.world.gather_objects(bundle_digest(bundle))[0]
        same_model = f"unfinished_{name}_{_digest(f'{weights} {digest}')}_"
        progress_dir = folder / (same_model + _digest(f"{rt.compute_dtype} {config.max_per_task}"))
    core = evaluate_core(
        model,
        tokenizer,
        bundle,
        config.max_per_task,
        rt,
        progress_dir=progress_dir,
        bundle_name=eval_bundle_name(data),
    )
    if rt.world.is_main:
        path = table_path(folder, name, core)
        atomic_write_text(path, core.to_csv())
        print(core.to_text(), end="")
        logger.info("wrote %s", path)
        if progress_dir is not None and not core.items_a_task:
            forget_unfinished(folder, same_model)
    return core_sections(core)


def forget_unfinished(folder: Path, prefix: str) -> None:
    """Remove what evaluations of these weights have left that nobody need finish any more."""
    for path in folder.iterdir():
        if path.name.startswith(prefix):
            logger.info("removing %s: the same model has its score now", path)
            shutil.rmtree(path, ignore_errors=True)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def table_path(folder: Path, name: str, core: CoreResult) -> Path:
    """Where a table goes. One of fewer items a task never replaces one of all items."""
    path = folder / f"{name}.csv"
    if core.items_a_task and path.exists():
        last_row = path.read_text(encoding="utf-8").splitlines()[-1:]
        if not any(" a task)" in row for row in last_row):
            return folder / f"{name}_{core.items_a_task}_a_task.csv"
    return path


def parse_parts(text: str) -> list[str]:
    """The parts of `--eval`, each known."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    for part in parts:
        if part not in PARTS:
            nearest = difflib.get_close_matches(part, PARTS, n=1, cutoff=0.0)[0]
            raise UserError(f"--eval has no part {part!r}; did you mean {nearest!r}?")
    if not parts:
        raise UserError(f"--eval is empty; give one or more of {', '.join(PARTS)}")
    return parts


def core_sections(core: CoreResult) -> list[dict[str, Any]]:
    """What the report says about CORE; a partial score does not go by its name.

    The report itself keeps those over the embedded tasks or fewer items a task apart.
    """
    name = "CORE metric" if not core.is_partial else core.label
    rows = [
        {
            "task": task.label,
            "accuracy": task.accuracy,
            "centered": task.centered,
            "items": task.num_items,
        }
        for task in core.tasks
    ]
    score: dict[str, Any] = {name: core.core}
    if core.bundle_name:
        score[report.TASK_SET] = core.bundle_name
    if core.items_a_task:
        score[report.ITEMS_A_TASK] = core.items_a_task
    sections: list[dict[str, Any]] = [score, {"CORE tasks": rows}]
    if core.is_partial:
        sections.append({"Missing tasks": ", ".join(core.missing)})
    return sections


def measure_bpb(
    model: GPT, tokenizer: Tokenizer, data: str, num_tokens: int, batch_size: int, rt: Runtime
) -> dict[str, float]:
    """Bits per byte of both splits."""
    source = open_source(data)
    return {
        f"{split} bpb": evaluate_split(
            model,
            tokenizer,
            source,
            split,
            num_tokens=num_tokens,
            batch_size=batch_size,
            world=rt.world,
        ).bits_per_byte
        for split in ("train", "val")
    }


def draw_samples(model: GPT, tokenizer: Tokenizer) -> dict[str, str]:
    """The seven prompts continued greedily, and texts drawn from nothing at temperature 1."""
    texts = sample_prompts(model, tokenizer)
    sequences, _ = Engine(model, tokenizer).generate_batch(
        [tokenizer.bos_id], FREE_SAMPLES, max_tokens=FREE_SAMPLE_TOKENS, temperature=1.0
    )
    free = [plain_text(tokenizer, sequence) for sequence in sequences]
    return {f"sample {i}": text for i, text in enumerate(texts)} | {
        f"sample from nothing {i}": text for i, text in enumerate(free)
    }


if __name__ == "__main__":
    configurator.run(main, Config)
