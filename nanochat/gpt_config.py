"""The sizes and options of a model, checked; plain values that travel in every checkpoint."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from nanochat.common import UserError

GATE_CHANNELS = 12  # features of the block's input that a value gate reads
SMEAR_CHANNELS = 24  # features of the embedding that the smear gate reads
_SIZES = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")
_ALWAYS_WRITTEN = (*_SIZES, "token_shift")
_WINDOW_STEP = 128  # short windows are whole blocks of attention's queries


@dataclass(frozen=True)
class GPTConfig:
    """Sizes and options of a GPT. Field names of the sizes are those of the GPT-2 family.

    The defaults of the options are the classic model; `presets` has the other two sets of values.
    """

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
    """Share of the previous token's embedding, halves swapped, added to each one; 0 = off."""
    mlp: str = "relu2"
    """relu2: two matrices around a squared ReLU; swiglu: three, gated (arXiv:2002.05202)."""
    rope_base: float = 10_000.0
    """Base of the rotary angles (arXiv:2104.09864, section 3.2.2)."""
    qk_scale: float = 1.0
    """Factor of normed queries and keys each: above 1, attention can look more sharply."""
    logit_softcap: float = 15.0
    """Logits stay within plus and minus this (arXiv:2408.00118, section 2); 0 = no limit."""
    window_pattern: str = "L"
    """Repeated over the layers: L = attends to all, S = to a quarter context; the last is L."""
    value_embeddings: bool = False
    """Every other layer adds a gated embedding of the token to its values (arXiv:2410.17897)."""
    residual_scalars: bool = False
    """Each block's input is a learned mix of its predecessor's output and the embedding."""
    smear: bool = False
    """A learned, gated share of the previous token's embedding is added to each one."""
    backout: bool = False
    """A learned share of the middle block's output is taken from the last one's."""
    vocab_multiple: int = 1
    """Tables and head have rows for a multiple of this; ids past vocab_size never occur."""
    init: str = "classic"
    """Which initial values: classic or modern."""

    def __post_init__(self) -> None:
        if self.n_kv_head is None:
            object.__setattr__(self, "n_kv_head", self.n_head)
        for name in (*_SIZES, "vocab_multiple"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.n_embd % self.n_head:
            raise UserError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        if self.head_dim % 2:
            raise UserError(
                f"head size {self.head_dim} (n_embd {self.n_embd} / n_head {self.n_head}) is odd; "
                "rotary embeddings turn pairs of features, so choose an even one"
            )
        if self.n_head % self.num_kv_heads:
            raise UserError(f"n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}")
        self._check_options()

    def _check_options(self) -> None:
        """UserError for a value that has no meaning, and for options that exclude one another."""
        if self.mlp not in ("relu2", "swiglu"):
            raise UserError(f"mlp is {self.mlp!r}; use relu2 or swiglu")
        if self.init not in ("classic", "modern"):
            raise UserError(f"init is {self.init!r}; use classic or modern")
        if not self.window_pattern or set(self.window_pattern) - set("SL"):
            raise UserError(
                f"window_pattern is {self.window_pattern!r}; it is made of the letters S and L"
            )
        for name, least in (("rope_base", 1.0), ("qk_scale", 0.0)):
            if not getattr(self, name) > least:
                raise UserError(f"{name} is {getattr(self, name)}; it must be above {least:g}")
        if not self.logit_softcap >= 0:
            raise UserError(f"logit_softcap is {self.logit_softcap}; use 0 for none, or more")
        if self.smear and self.token_shift:
            raise UserError(
                "smear and token_shift both add the previous token's embedding; choose one"
            )
        for name, needed in (("smear", SMEAR_CHANNELS), ("value_embeddings", GATE_CHANNELS)):
            if getattr(self, name) and self.n_embd < needed:
                raise UserError(f"{name} reads {needed} features; n_embd is {self.n_embd}")

    @property
    def num_kv_heads(self) -> int:
        """Key/value heads, resolved."""
        return self.n_kv_head or self.n_head

    @property
    def head_dim(self) -> int:
        """Features of one head."""
        return self.n_embd // self.n_head

    @property
    def mlp_width(self) -> int:
        """Features between the matrices of an MLP; both kinds have about as many weights."""
        if self.mlp == "swiglu":
            return -(-8 * self.n_embd // (3 * 64)) * 64
        return 4 * self.n_embd

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding, the value embeddings and the head."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def windows(self) -> tuple[int | None, ...]:
        """For each layer how many tokens before its own a position attends to; None = all."""
        short = -(-self.sequence_len // (4 * _WINDOW_STEP)) * _WINDOW_STEP
        pattern, last = self.window_pattern, self.n_layer - 1
        return tuple(
            short if layer < last and pattern[layer % len(pattern)] == "S" else None
            for layer in range(self.n_layer)
        )

    def has_value_embedding(self, layer: int) -> bool:
        """Whether this layer adds to its values: every other one, the last one among them."""
        return self.value_embeddings and layer % 2 == (self.n_layer - 1) % 2

    @property
    def block_size(self) -> int:
        """The training context by its GPT-2 name."""
        return self.sequence_len

    def to_json(self) -> dict[str, Any]:
        """Plain values for a checkpoint's state file: sizes, and options that are not classic."""
        defaults = {field.name: field.default for field in fields(self)}
        return {
            name: value
            for name, value in asdict(self).items()
            if name in _ALWAYS_WRITTEN or value != defaults[name]
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> GPTConfig:
        """The inverse of `to_json`; an unknown field is an error, not a guess."""
        unknown = set(values) - set(cls.__dataclass_fields__)
        if unknown:
            raise UserError(
                f"model config has fields this version does not know: {sorted(unknown)}"
            )
        return cls(**values)
