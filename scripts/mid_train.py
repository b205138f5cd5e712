"""Midtrain a base model: conversations, tool use, multiple choice, spelling.

python -m scripts.mid_train --num_iterations=500
torchrun --standalone --nproc_per_node=8 -m scripts.mid_train
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nanochat import checkpoint_manager, configurator, runtime
from nanochat.conversation_stage import (
    ConversationStageConfig,
    check_flags,
    train_on_conversations,
)
from nanochat.dataset import check_data
from nanochat.stage import check_positive, whole_rows
from tasks import mixtures
from tasks.task_sets import choose_task_set, require_chatcore, require_tasks, split_chats


@dataclass(frozen=True)
class Config(ConversationStageConfig):
    """Flags of mid_train."""

    source: Literal["base"] = "base"
    """Stage of the model to start from."""
    total_batch_size: int = 524_288
    """Tokens of one optimizer step."""
    dry_run: bool = False
    """Train, but write neither checkpoint nor report."""


def main(config: Config) -> int:
    """Train from a base checkpoint to a mid checkpoint."""
    check_flags(config)
    check_positive(config, "device_batch_size", "total_batch_size")
    if config.data is not None:
        check_data(config.data)
    with runtime.start(config.device_type, dtype=config.dtype, seed=config.seed) as rt:
        parent = checkpoint_manager.find_checkpoint(config.source, config.model_tag, config.step)
        data = config.data or parent.state["data"]
        tasks = choose_task_set(config.tasks, data=data, recorded=parent.state.get("tasks"))
        chats = split_chats(config.chats)
        require_tasks("mid", tasks, chats)
        chat_tasks = mixtures.evaluation_tasks(tasks)
        if config.chatcore_every > 0:
            require_chatcore(chat_tasks)
        sequence_len = config.max_seq_len or parent.state["sequence_len"]
        return train_on_conversations(
            config,
            stage="mid",
            title="Midtraining",
            source=config.source,
            rows_per_step=whole_rows(config.total_batch_size, sequence_len),
            task_set=tasks,
            chats=chats,
            train_task=mixtures.training_mixture("mid", tasks, chats),
            validation_task=mixtures.validation_mixture("mid", tasks, chats),
            metric_tasks=mixtures.metric_tasks(tasks),
            chat_tasks=chat_tasks,
            parent=parent,
            runtime=rt,
        )


if __name__ == "__main__":
    configurator.run(main, Config)
