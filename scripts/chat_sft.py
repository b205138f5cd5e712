"""Finetune a chat model: only what the assistant says is learned.

python -m scripts.chat_sft --num_iterations=500
torchrun --standalone --nproc_per_node=8 -m scripts.chat_sft
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nanochat import checkpoint_manager, configurator, runtime
from nanochat.conversation_stage import ConversationStageConfig, train_on_conversations
from nanochat.dataset import check_data
from nanochat.stage import check_count, check_numbers, check_positive
from tasks import mixtures
from tasks.task_sets import choose_task_set, require_tasks, split_chats


@dataclass(frozen=True)
class Config(ConversationStageConfig):
    """Flags of chat_sft."""

    source: Literal["mid", "base"] = "mid"
    """Stage of the model to start from."""
    target_examples_per_step: int = 32
    """Rows of one optimizer step."""
    masked: bool = True
    """Only what the assistant says is a target; otherwise every token is."""
    packing: Literal["stream", "rows", "best-fit"] = "rows"
    """How conversations fill rows: end to end, one a row, or several whole ones a row."""
    device_batch_size: int = 4
    """Rows of one forward pass on each device."""
    init_lr_frac: float = 0.02
    """Multiplies all learning rates."""
    warmdown_ratio: float | None = 1.0
    """Share of the run over which learning rates fall at its end."""
    eval_every: int = 100
    """Steps between validations; 0 = only at the end, -1 = never."""
    eval_metrics_every: int = 200
    """Steps between accuracies on the multiple-choice tasks; 0 or -1 = never."""


def main(config: Config) -> int:
    """Train from a mid checkpoint to an sft checkpoint."""
    check_numbers(config)
    check_positive(config, "device_batch_size", "target_examples_per_step", "num_epochs")
    check_count(config, "num_iterations", "--num-epochs passes over the conversations")
    if config.data is not None:
        check_data(config.data)
    with runtime.start(config.device_type, dtype=config.dtype, seed=config.seed) as rt:
        parent = checkpoint_manager.find_checkpoint(config.source, config.model_tag, config.step)
        data = config.data or parent.state["data"]
        tasks = choose_task_set(config.tasks, data=data, recorded=parent.state.get("tasks"))
        chats = split_chats(config.chats)
        require_tasks("sft", tasks, chats)
        return train_on_conversations(
            config,
            stage="sft",
            title="Chat SFT",
            source=config.source,
            rows_per_step=config.target_examples_per_step,
            task_set=tasks,
            chats=chats,
            train_task=mixtures.training_mixture("sft", tasks, chats),
            validation_task=mixtures.validation_mixture("sft", tasks, chats),
            metric_tasks=mixtures.metric_tasks(tasks),
            parent=parent,
            runtime=rt,
        )


if __name__ == "__main__":
    configurator.run(main, Config)
