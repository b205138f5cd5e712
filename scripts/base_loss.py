"""Measure a base model on text: bits per byte, perplexity, and how it continues seven prompts.

python -m scripts.base_loss --device_batch_size=1 --split_tokens=4096
torchrun --standalone --nproc_per_node=8 -m scripts.base_loss
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from nanochat import checkpoint_manager, configurator, report, runtime
from nanochat.dataset import open_source
from nanochat.engine import sample_prompts
from nanochat.loss_eval import LossTotals, evaluate_split


@dataclass(frozen=True)
class Config:
    """Flags of base_loss."""

    device_batch_size: int = 32
    """Rows of one forward pass on each device."""
    split_tokens: int | None = None
    """Tokens of each split; default: as many as the training run validated on."""
    model_tag: str | None = None
    """Folder name of the run; default: the one written last."""
    model_step: int | None = None
    """Step of the checkpoint; default: the newest."""
    data: str | None = None
    """embedded, fineweb-edu, climbmix or a folder of shards; default: what it was trained on."""
    device_type: str = ""
    """cuda, cpu or mps; default: the best there is."""
    dtype: str = ""
    """Compute dtype: bfloat16 or float32; default: bfloat16 where the hardware is fast at it."""


def main(config: Config) -> None:
    """Measure both splits, print and report."""
    with runtime.start(config.device_type, dtype=config.dtype) as rt:
        model, tokenizer, checkpoint = checkpoint_manager.load_model(
            "base",
            device=rt.device,
            dtype=rt.compute_dtype,
            tag=config.model_tag,
            step=config.model_step,
        )
        source = open_source(config.data or checkpoint.state["data"])
        num_tokens = config.split_tokens
        if num_tokens is None:
            num_tokens = checkpoint.state["config"]["eval_tokens"]
        totals: dict[str, LossTotals] = {
            split: evaluate_split(
                model,
                tokenizer,
                source,
                split,
                num_tokens=num_tokens,
                batch_size=config.device_batch_size,
                world=rt.world,
            )
            for split in ("train", "val")
        }
        if not rt.world.is_main:
            return
        results = {f"{split} bpb": total.bits_per_byte for split, total in totals.items()}
        results |= {f"{split} perplexity": total.perplexity for split, total in totals.items()}
        samples = {f"sample {i}": text for i, text in enumerate(sample_prompts(model, tokenizer))}
        for name, value in results.items():
            print(f"{name:<16} {value:.4f}")
        for text in samples.values():
            print(f"sample: {text}")
        facts = {"Model": f"{checkpoint.tag}, step {checkpoint.step}"}
        report.append("Base model loss", [asdict(config), facts, results, samples])


if __name__ == "__main__":
    configurator.run(main, Config)
