"""A checkpoint as a folder that other engines load: transformers, and what reads its files.

`portable` models become Qwen3, which most engines know natively; `classic` ones become NanoChat,
which the transformers library knows. Nothing is approximated: logits are equal. What another
architecture computes differently is moved into the weights.

Legend: V = vocabulary, C = model width, D = head size.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from nanochat.blocks import NORM_EPS, rms_norm
from nanochat.common import UserError
from nanochat.gpt import GPT
from nanochat.gpt_config import GPTConfig
from nanochat.tokenizer import Tokenizer
from nanochat.tokenizer_files import save_huggingface

# What each target computes as we do; every other option must have its default.
_SIZES = {"sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "init"}
_SIZES |= {"rope_base", "vocab_multiple"}


def export(model: GPT, tokenizer: Tokenizer, folder: Path) -> str:
    """Write configuration, weights and tokenizer files; returns the architecture's name.

    Raises UserError for a model that no target computes.
    """
    settings = hf_config(model.config, bos_id=tokenizer.bos_id)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(settings, indent=1) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    save_file(hf_weights(model), folder / "model.safetensors", metadata={"format": "pt"})
    save_huggingface(tokenizer, folder)
    return str(settings["architectures"][0])


def hf_config(config: GPTConfig, *, bos_id: int) -> dict[str, Any]:
    """The target's config.json; UserError for options that no target has."""
    target = _target(config)
    common = {
        "vocab_size": config.padded_vocab_size,
        "hidden_size": config.n_embd,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.sequence_len,
        "rms_norm_eps": float(NORM_EPS),
        "rope_theta": config.rope_base,
        "rope_parameters": {"rope_theta": config.rope_base, "rope_type": "default"},
        "tie_word_embeddings": False,
        "attention_bias": False,
        "bos_token_id": bos_id,
        "eos_token_id": bos_id,
        "dtype": "float32",
        "torch_dtype": "float32",
    }
    if target == "qwen3":
        return common | {
            "model_type": "qwen3",
            "architectures": ["Qwen3ForCausalLM"],
            "hidden_act": "silu",
            "use_sliding_window": False,
        }
    return common | {
        "model_type": "nanochat",
        "architectures": ["NanoChatForCausalLM"],
        "hidden_act": "relu2",
        "final_logit_softcapping": config.logit_softcap,
        "pad_token_id": bos_id,
    }


def hf_weights(model: GPT) -> dict[str, Tensor]:
    """The target's tensors by name, fp32."""
    config, is_qwen = model.config, _target(model.config) == "qwen3"
    table = model.transformer.wte.weight.detach().float()
    # Qwen3 does not norm its embeddings: ours are normed once and for all.
    weights = {
        "model.embed_tokens.weight": rms_norm(table) if is_qwen else table,
        "lm_head.weight": model.lm_head.weight.detach().float(),
    }
    mlp_names = {"c_fc": "fc1", "c_proj": "fc2"}
    if is_qwen:
        mlp_names = {"c_gate": "gate_proj", "c_fc": "up_proj", "c_proj": "down_proj"}
        weights["model.norm.weight"] = torch.ones(config.n_embd)
    for layer, block in enumerate(model.transformer.h):
        here, parts = f"model.layers.{layer}.", dict(block.named_parameters())
        for ours, theirs in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("proj", "o_proj")):
            matrix = parts[f"attn.c_{ours}.weight"].detach().float()
            if is_qwen and ours in "qk":
                matrix = _turned_back(matrix, config.head_dim)
            weights[f"{here}self_attn.{theirs}.weight"] = matrix
        for ours, theirs in mlp_names.items():
            weights[f"{here}mlp.{theirs}.weight"] = parts[f"mlp.{ours}.weight"].detach().float()
        if is_qwen:
            for norm, size in (
                ("input_layernorm", config.n_embd),
                ("post_attention_layernorm", config.n_embd),
                ("self_attn.q_norm", config.head_dim),
                ("self_attn.k_norm", config.head_dim),
            ):
                weights[f"{here}{norm}.weight"] = torch.ones(size)
    return {name: tensor.contiguous() for name, tensor in weights.items()}


def _turned_back(matrix: Tensor, head_dim: int) -> Tensor:
    """A query or key matrix (heads * D, C) for rotations by plus the angle instead of minus.

    Turning (a, b) by minus an angle is turning (b, a) by plus the angle, with the result's halves
    swapped as well; queries and keys are swapped alike, so their products stay. Norms of whole
    heads come before the rotation there and behind it here, which is the same.
    """
    heads = matrix.view(-1, 2, head_dim // 2, matrix.size(1))
    return heads.flip(1).reshape(matrix.shape)


def is_known_elsewhere(config: GPTConfig) -> bool:
    """Whether there is an architecture that computes what this model computes."""
    try:
        _target(config)
    except UserError:
        return False
    return True


def _target(config: GPTConfig) -> str:
    """Which architecture computes what this model computes: qwen3 or nanochat."""
    is_portable = config.mlp == "swiglu" and config.logit_softcap == 0
    plain = {"mlp", "logit_softcap"} if is_portable else {"logit_softcap"}
    classic = GPTConfig(**{name: getattr(config, name) for name in _SIZES | plain})
    if classic != config or (config.mlp == "relu2" and config.logit_softcap == 0):
        raise UserError(
            "other engines do not know all options of this model; they load models of "
            "--preset=portable (as Qwen3) and --preset=classic (as NanoChat)"
        )
    return "qwen3" if is_portable else "nanochat"
