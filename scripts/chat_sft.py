"""Finetune a chat model: only what the assistant says is learned.

python -m scripts.chat_sft --num_iterations=500
python -m scripts.chat_sft --recipe=merged --num_iterations=500
torchrun --standalone --nproc_per_node=8 -m scripts.chat_sft
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from nanochat import checkpoint_manager, configurator, runtime
from nanochat.checkpoint_manager import Checkpoint
from nanochat.common import UserError
from nanochat.conversation_stage import (
    ConversationStageConfig,
    check_flags,
    train_on_conversations,
)
from nanochat.dataset import check_data
from nanochat.inheritance import AS_CHECKPOINT, inherit
from nanochat.schedule import Schedule
from nanochat.stage import (
    LEARNING_RATES,
    check_count,
    check_positive,
    whole_rows,
)
from tasks import mixtures
from tasks.public import ONCE, Epochs
from tasks.task_sets import (
    choose_task_set,
    require_chatcore,
    require_files,
    require_tasks,
    split_chats,
)

EXAMPLES_PER_STEP = 32  # of the 2025 nanochat

# Finetuning in the 2026 nanochat: one stage from the base model in the place of two.
MERGED: dict[str, Any] = {
    "source": "base",
    "inherit": True,
    "load_optimizer": True,
    "device_batch_size": AS_CHECKPOINT,
    "mmlu_epochs": 3,
    "gsm8k_epochs": 4,
    "packing": "best-fit",
    "init_lr_frac": 0.8,
    "warmup_ratio": 0.0,
    "warmdown_ratio": 0.5,
    "final_lr_frac": 0.0,
    "eval_every": 200,
    "eval_tokens": 40 * 524_288,
    "eval_metrics_every": -1,  # ChatCORE says the same and more
    "chatcore_every": 200,
    "chatcore_max_cat": -1,
    "chatcore_max_sample": 24,
}


@dataclass(frozen=True)
class Config(ConversationStageConfig):
    """Flags of chat_sft."""

    PRESETS: ClassVar[configurator.Presets] = {"recipe": {"merged": MERGED}}

    recipe: Literal["classic", "merged"] = "classic"
    """classic, after midtraining; merged: instead of it, from base, with defaults of its own."""
    source: Literal["mid", "base"] = "mid"
    """Stage of the model to start from."""
    inherit: bool = False
    """Learning rates, context and tokens of a step, if not given, are those of the checkpoint."""
    target_examples_per_step: int | None = None
    """Rows of one optimizer step; default: 32, unless there is a total batch size."""
    total_batch_size: int | None = None
    """Tokens of one optimizer step, instead."""
    mmlu_epochs: int | None = None
    """Times that the merged mixture holds its multiple choice."""
    gsm8k_epochs: int | None = None
    """Times that the merged mixture holds its word problems."""
    masked: bool = True
    """Only what the assistant says is a target; otherwise every token is."""
    packing: Literal["stream", "rows", "best-fit"] = "rows"
    """How conversations fill rows: end to end, one a row, or several whole ones a row."""
    device_batch_size: int = 4
    """Rows of one forward pass on each device; -1 = as the checkpoint was trained."""
    init_lr_frac: float = 0.02
    """Multiplies all learning rates."""
    warmdown_ratio: float | None = 1.0
    """Share of the run over which learning rates fall at its end."""
    eval_every: int = 100
    """Steps between validations; 0 = only at the end, -1 = never."""
    eval_metrics_every: int = 200
    """Steps between accuracies on the multiple-choice tasks; 0 or -1 = never."""

    def schedule(self, num_iterations: int) -> Schedule:
        """As in every stage, but for the momentum of the merged recipe.

        It rises from 0.85 to 0.95 in 300 steps for the modern optimizer, too, as in the 2026
        nanochat, whose longer rise and whose fall belong to pretraining.
        """
        schedule = super().schedule(num_iterations)
        if self.recipe == "merged":
            schedule = dataclasses.replace(schedule, is_refined=False)
        return schedule


def main(config: Config) -> int:
    """Train from a mid or base checkpoint to an sft checkpoint."""
    check(config)
    if config.data is not None:
        check_data(config.data)
    with runtime.start(config.device_type, dtype=config.dtype, seed=config.seed) as rt:
        parent = checkpoint_manager.find_checkpoint(config.source, config.model_tag, config.step)
        config = settle(config, parent)
        data = config.data or parent.state["data"]
        tasks = choose_task_set(config.tasks, data=data, recorded=parent.state.get("tasks"))
        chats = split_chats(config.chats)
        is_merged = config.recipe == "merged"
        mixture, epochs = ("mid", epochs_of(config)) if is_merged else ("sft", ONCE)
        train_task = mixtures.training_mixture(mixture, tasks, chats, epochs)
        validation_task = mixtures.validation_mixture(mixture, tasks, chats)
        metric_tasks = mixtures.metric_tasks(tasks)
        chat_tasks = mixtures.evaluation_tasks(tasks)
        if is_merged:  # reads what it was told to, which may be less than midtraining does
            measured = metric_tasks if config.eval_metrics_every > 0 else []
            require_files(mixture, [train_task, validation_task, *measured])
        else:
            require_tasks(mixture, tasks, chats)
        if config.chatcore_every > 0:
            require_chatcore(chat_tasks)
        return train_on_conversations(
            config,
            stage="sft",
            title="Chat SFT",
            source=config.source,
            rows_per_step=rows_per_step(config, parent),
            task_set=tasks,
            chats=chats,
            train_task=train_task,
            validation_task=validation_task,
            metric_tasks=metric_tasks,
            chat_tasks=chat_tasks,
            parent=parent,
            runtime=rt,
            record=merged_record(epochs, mixtures.contents(train_task)) if is_merged else None,
        )


def check(config: Config) -> None:
    """Raise UserError for flags that mean nothing, alone or together."""
    check_flags(config)
    given = [
        name
        for name in ("target_examples_per_step", "total_batch_size")
        if getattr(config, name) is not None
    ]
    if len(given) == 2:
        raise UserError(
            "--target-examples-per-step and --total-batch-size both say how large a step is; "
            "give one of them"
        )
    check_positive(config, *given)
    check_count(config, "device_batch_size", "as many as the checkpoint was trained with")
    if config.recipe == "merged":
        epochs_of(config)
        return
    for name in ("mmlu_epochs", "gsm8k_epochs"):
        if getattr(config, name) is not None:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} is for the merged mixture; add --recipe=merged")


def epochs_of(config: Config) -> Epochs:
    """How often the merged mixture holds what is scarce."""
    return Epochs(
        **{
            name: MERGED[f"{name}_epochs"] if value is None else value
            for name, value in (("mmlu", config.mmlu_epochs), ("gsm8k", config.gsm8k_epochs))
        }
    )


def settle(config: Config, parent: Checkpoint) -> Config:
    """With the checkpoint's settings where they are wanted, and a size of the step."""
    names: list[str] = []
    if config.inherit:
        names += [*LEARNING_RATES, "max_seq_len"]
        if config.target_examples_per_step is None:
            names.append("total_batch_size")
    if config.device_batch_size == AS_CHECKPOINT:
        names.append("device_batch_size")
    if names:
        config = inherit(config, parent, names)
    if config.target_examples_per_step is None and config.total_batch_size is None:
        config = dataclasses.replace(config, target_examples_per_step=EXAMPLES_PER_STEP)
    return config


def rows_per_step(config: Config, parent: Checkpoint) -> int:
    """Rows of one optimizer step over all ranks."""
    if config.target_examples_per_step is not None:
        return config.target_examples_per_step
    assert config.total_batch_size is not None  # `settle` has filled one of them
    sequence_len = config.max_seq_len or parent.state["model_config"]["sequence_len"]
    return whole_rows(config.total_batch_size, sequence_len)


def merged_record(epochs: Epochs, mixture: dict[str, int]) -> dict[str, Any]:
    """What the lineage says of a model that the merged recipe has made.

    mixture: conversations of each task by its name.
    """
    return {
        "recipe": "merged",
        "mmlu_epochs": epochs.mmlu,
        "gsm8k_epochs": epochs.gsm8k,
        "mixture": mixture,
    }


if __name__ == "__main__":
    configurator.run(main, Config)
