"""The sizes and options of a model, checked; plain values that travel in every checkpoint."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from nanochat.common import UserError


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a GPT. Field names are those of the GPT-2 family."""

    sequence_len: int = 1024
    """Training context in tokens."""
    vocab_size: int = 50304
    """Token ids the model knows."""
    n_layer: int = 12
    """Transformer blocks."""
    n_head: int = 6
    """Query heads of each block."""
    n_kv_head: int | None = None
    """Key/value heads of each block; a divisor of n_head, which is also the default."""
    n_embd: int = 768
    """Width of the residual stream."""
    token_shift: float = 0.0
    """Share of the previous token's embedding that is added to each one; 0 = off (classic)."""

    def __post_init__(self) -> None:
        if self.n_kv_head is None:
            object.__setattr__(self, "n_kv_head", self.n_head)
        for name, value in asdict(self).items():
            if name != "token_shift" and value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1")
        if self.n_embd % self.n_head:
            raise UserError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        if self.head_dim % 2:
            raise UserError(
                f"head size {self.head_dim} (n_embd {self.n_embd} / n_head {self.n_head}) is odd; "
                "rotary embeddings turn pairs of features, so choose an even one"
            )
        if self.n_head % self.num_kv_heads:
            raise UserError(f"n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}")

    @property
    def num_kv_heads(self) -> int:
        """Key/value heads, resolved."""
        return self.n_kv_head or self.n_head

    @property
    def head_dim(self) -> int:
        """Features of one head."""
        return self.n_embd // self.n_head

    @property
    def block_size(self) -> int:
        """The training context by its GPT-2 name."""
        return self.sequence_len

    def to_json(self) -> dict[str, Any]:
        """Plain values for a checkpoint's state file."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> GPTConfig:
        """The inverse of `to_json`; an unknown field is an error, not a guess."""
        unknown = set(values) - set(cls.__dataclass_fields__)
        if unknown:
            raise UserError(
                f"model config has fields this version does not know: {sorted(unknown)}"
            )
        return cls(**values)
