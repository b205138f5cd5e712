"""Write a model as a folder that transformers and other engines load.

python -m scripts.export_hf --output=exported
python -m scripts.export_hf --source=base --model_tag=d4 --output=exported
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from nanochat import checkpoint_manager, configurator
from nanochat.common import UserError
from nanochat.hf_export import export


@dataclass(frozen=True)
class Config:
    """Flags of export_hf."""

    output: str
    """Folder to write; it must be empty or not exist."""
    source: Literal["base", "mid", "sft", "rl"] | None = None
    """Stage of the model; default: the one to talk to."""
    model_tag: str | None = None
    """Folder name of the run; default: the one written last."""
    step: int | None = None
    """Checkpoint to take; default: the newest."""


def main(config: Config) -> None:
    """Load, convert, write."""
    folder = Path(config.output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--output={folder} is not an empty folder; choose another one")
    model, tokenizer, checkpoint = checkpoint_manager.load_model(
        config.source,
        device=torch.device("cpu"),
        dtype=torch.float32,
        tag=config.model_tag,
        step=config.step,
    )
    name = export(model, tokenizer, folder)
    print(f"{checkpoint.path} is now a {name} in {folder}")


if __name__ == "__main__":
    configurator.run(main, Config)
