"""SmolTalk: conversations between a person and a larger model, made to finetune small ones."""

from collections.abc import Mapping
from typing import Any

from nanochat.conversation import Conversation
from tasks.hub import HubTask


class SmolTalk(HubTask):
    """Training only: an optional system message, then user and assistant by turns."""

    name = "SmolTalk"

    def __init__(self, split: str = "train", **slicing: Any) -> None:
        super().__init__(
            "HuggingFaceTB/smol-smoltalk", "default", split, license_name="Apache-2.0", **slicing
        )

    def conversation(self, row: Mapping[str, Any]) -> Conversation:
        """Return the messages of a row; UserError for one that the user does not begin."""
        return Conversation.from_json(row["messages"])
