"""What a model was trained on, stage by stage: written into its checkpoint, read back from it.

An entry is {"stage": "base", "data": ...}, {"stage": "mid" or "sft", "tasks": ..., "chats": [...]}
or {"stage": "rl", "tasks": ..., "task": ...}; the oldest comes first. Finetuning by the merged
recipe adds "recipe", "mmlu_epochs", "gsm8k_epochs" and "mixture": {name of a task: conversations}.
`tasks.task_sets.trained_on` gives the conversations of an entry.
"""

from __future__ import annotations

from typing import Any

from nanochat.checkpoint_manager import Checkpoint

LINEAGE = "lineage"  # key of a checkpoint's state

Entry = dict[str, Any]


def lineage_of(checkpoint: Checkpoint) -> list[Entry] | None:
    """All that a model was trained on; None of a checkpoint older than this record."""
    state = checkpoint.state
    if state.get("stage") == "base":
        return [{"stage": "base", "data": state["data"]}]
    entries: list[Entry] | None = state.get(LINEAGE)
    return entries


def lineage(parent: Checkpoint, **entry: Any) -> list[Entry] | None:
    """What a child of `parent` has been trained on: what parent was, and its own entry.

    None where that of parent is not known.
    """
    before = lineage_of(parent)
    return None if before is None else [*before, entry]
