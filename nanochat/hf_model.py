"""A model of the transformers library as CORE sees it; needs `pip install nanochat[hf]`.

Nothing is downloaded: the model must lie in a folder, or in the library's cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nanochat.branches import Branches
from nanochat.common import UserError
from nanochat.core_scoring import Place

_WANTED = "give a folder with config.json, weights and tokenizer (nothing is downloaded)"
ROWS_PER_CHUNK = 512  # positions whose logits are handed on at once


class HfTokenizer:
    """A tokenizer of the transformers library."""

    def __init__(self, tokenizer: Any, path: str) -> None:
        self._tokenizer = tokenizer
        bos = tokenizer.bos_token_id
        # GPT-2 and its like separate documents by the end token alone.
        chosen = tokenizer.eos_token_id if bos is None else bos
        if chosen is None:
            raise UserError(f"the tokenizer of {path} has neither a begin nor an end token")
        self.bos_id: int = chosen

    def encode_batch(
        self, texts: Sequence[str], *, prepend: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Ids of all texts in one array, each after `prepend`, and the texts' offsets (n + 1,)."""
        # A warning about long texts is not meant for us: they are cut later.
        encoded = self._tokenizer(list(texts), add_special_tokens=False, verbose=False)
        rows = [[prepend, *ids] for ids in encoded["input_ids"]]
        offsets = np.cumsum([0, *map(len, rows)])
        return np.fromiter((token for row in rows for token in row), dtype=np.int64), offsets


class HfModel:
    """A causal language model of the transformers library."""

    can_branch = False
    exact = None

    def __init__(self, model: Any) -> None:
        self.model = model
        self.device: torch.device = model.device
        config = model.config
        # Models without position table (such as Mamba) have no such field, and no limit.
        self.max_length: int = getattr(config, "max_position_embeddings", None) or 1 << 20

    def plain_logits(self, ids: Tensor) -> Tensor:
        """Logits (T, V) of one sequence (T,)."""
        logits: Tensor = self.model(ids[None].to(self.device)).logits
        return logits[0].float()

    def logits(self, ids: Tensor, rows: Tensor, positions: Tensor) -> Iterator[Tensor]:
        """Logits at (rows, positions) of ids (N, T); what pads a row stands after its places."""
        chosen = self.model(ids.to(self.device)).logits[rows, positions]
        for part in torch.split(chosen, ROWS_PER_CHUNK):
            yield part.float()

    def branch_logits(self, branches: Branches, places: Sequence[Place]) -> Iterator[Tensor]:
        """Not offered: each architecture keeps its past in its own way."""
        raise NotImplementedError("can_branch is False")


def load_hf_model(
    path: str, *, device: torch.device, dtype: torch.dtype
) -> tuple[HfModel, HfTokenizer]:
    """Model and tokenizer from a folder, or by name from the library's cache."""
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            "--hf-path needs the transformers library: pip install 'nanochat[hf]'"
        ) from error
    _check_folder(path)
    options = {"local_files_only": True}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, **options)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **options)
    except (OSError, ValueError) as error:
        if not Path(path).is_dir():
            raise UserError(
                f"{path} is neither a folder nor a model in the transformers cache; {_WANTED}"
            ) from error
        first = str(error).strip().splitlines()[0]
        raise UserError(f"the model in {path} cannot be read: {first}; {_WANTED}") from error
    return HfModel(model.to(device).eval()), HfTokenizer(tokenizer, path)


def _check_folder(path: str) -> None:
    """UserError for a path, told from a name by how it begins, that holds no model."""
    folder = Path(path)
    if path.startswith(("/", ".", "~")) and not folder.is_dir():
        raise UserError(f"there is no folder {path}; {_WANTED}")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(f"no transformers model in {path}: config.json is missing; {_WANTED}")
