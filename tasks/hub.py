"""Tasks whose items are the rows of a data set on the hub."""

from collections.abc import Mapping
from typing import Any

from nanochat.assets import Asset
from nanochat.common import UserError
from nanochat.conversation import Conversation
from nanochat.sources.hub_rows import HubRows
from tasks.common import Task


class HubTask(Task):
    """One split of a data set, shuffled once; a subclass turns a row into a conversation.

    Nothing is read before the length or an item is asked for.
    """

    def __init__(
        self, dataset: str, config: str, split: str, *, license_name: str, **slicing: Any
    ) -> None:
        super().__init__(**slicing)
        self.rows = HubRows(dataset, config, split, license_name=license_name)

    def assets(self) -> tuple[Asset, ...]:
        """Return the split itself."""
        return (self.rows.asset,)

    def num_rows(self) -> int:
        """Return the rows of the split."""
        return len(self.rows)

    def row(self, index: int) -> Conversation:
        """Return a row as a conversation; UserError naming a row that cannot be one."""
        try:
            return self.conversation(self.rows[index])
        except KeyError as error:
            reason = f"it has no column {error}"
        except UserError as error:
            reason = str(error)
        raise UserError(f"row {index} of {self.rows.asset.name} cannot be used: {reason}")

    def conversation(self, row: Mapping[str, Any]) -> Conversation:
        """Return the conversation of a row; UserError when something in it is missing."""
        raise NotImplementedError


def text_of(row: Mapping[str, Any], column: str) -> str:
    """Return a column that must be text."""
    value = row[column]
    if not isinstance(value, str):
        raise UserError(f"its {column} is {value!r}, not text")
    return value
