"""Three models for one dial: `classic`, `modern`, `portable`.

They are values of one `GPTConfig`, not three models. A preset also names the optimizer and the
training settings that its model was tuned with; whatever is given as a flag comes first.
"""

from __future__ import annotations

from typing import Any, Literal

PresetName = Literal["classic", "modern", "portable"]
OptimizerName = Literal["classic", "modern"]

# Options of `GPTConfig`. `classic` is what the seed documents describe, and the transformers
# library knows it as NanoChat. `modern` is karpathy/nanochat in 2026. `portable` computes what
# Qwen3 computes, so that other engines load it (`hf_export`).
MODELS: dict[PresetName, dict[str, Any]] = {
    "classic": {},
    "modern": {
        "rope_base": 100_000.0,
        "qk_scale": 1.2,
        "window_pattern": "SSSL",
        "value_embeddings": True,
        "residual_scalars": True,
        "smear": True,
        "backout": True,
        "vocab_multiple": 64,
        "init": "modern",
    },
    "portable": {"mlp": "swiglu", "logit_softcap": 0.0},
}

OPTIMIZERS: dict[PresetName, OptimizerName] = {
    "classic": "classic",
    "modern": "modern",
    "portable": "classic",
}

# Settings of a stage that are left to the optimizer: flags of `stage.StageConfig`.
TRAINING: dict[OptimizerName, dict[str, float]] = {
    "classic": {
        "embedding_lr": 0.2,
        "unembedding_lr": 0.004,
        "matrix_lr": 0.02,
        "scalar_lr": 0.5,
        "weight_decay": 0.0,
        "warmup_steps": 0,
        "warmdown_ratio": 0.2,
        "final_lr_frac": 0.0,
        "grad_clip": 0.0,
    },
    "modern": {
        "embedding_lr": 0.3,
        "unembedding_lr": 0.008,
        "matrix_lr": 0.02,
        "scalar_lr": 0.5,
        "weight_decay": 0.0,
        "warmup_steps": 0,
        "warmdown_ratio": 0.2,
        "final_lr_frac": 0.0,
        "grad_clip": 0.0,
    },
}

# And of pretraining, where they differ from those.
PRETRAINING: dict[OptimizerName, dict[str, float]] = {
    "classic": {"grad_clip": 1.0},
    "modern": {
        "weight_decay": 0.28,
        "warmup_steps": 40,
        "warmdown_ratio": 0.65,
        "final_lr_frac": 0.05,
        "grad_clip": 0.0,
    },
}

# Of a training horizon; modern counts the parameters of blocks and head alone.
TOKENS_PER_PARAMETER: dict[OptimizerName, float] = {"classic": 20.0, "modern": 12.0}
