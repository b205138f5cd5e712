"""What a CORE evaluation has decided so far, on disk, so that a killed one can go on.

One file of lines a rank in a folder named by what is evaluated. Any number of ranks may take
over from any other number.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from nanochat.runtime import World

logger = logging.getLogger(__name__)

Decisions = dict[str, dict[int, bool]]  # label -> index of the item -> whether right


class CoreProgress:
    """The decisions of one evaluation. folder None: nothing is kept."""

    def __init__(self, folder: Path | None, world: World) -> None:
        self.world = world
        self._folder = folder
        self._file = None
        self.done: Decisions = {}
        if folder is None:
            return
        for path in sorted(folder.glob("rank_*.jsonl")):
            self._read(path)
        count = sum(len(decisions) for decisions in self.done.values())
        if count:
            logger.info("continuing: %d items were decided before", count)
        # Nobody writes before everybody has read: all ranks must deal the same items.
        world.barrier()
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / f"rank_{world.rank:05d}.jsonl").open("a", encoding="utf-8")

    def _read(self, path: Path) -> None:
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                label, indices, right = json.loads(line)
            except (json.JSONDecodeError, ValueError):
                continue  # the line that was being written when the job was killed
            self.done.setdefault(label, {}).update(zip(indices, map(bool, right), strict=True))

    def remaining(self, label: str, num_items: int) -> list[int]:
        """The items of a task that this rank has to decide."""
        done = self.done.get(label, {})
        left = [index for index in range(num_items) if index not in done]
        return left[self.world.rank :: self.world.size]

    def add(self, label: str, indices: Sequence[int], decisions: Sequence[bool]) -> None:
        """Keep what this rank has decided."""
        if self._file is not None:
            line = [label, list(indices), [int(decision) for decision in decisions]]
            # In front too: a killed job may have left half a line.
            self._file.write("\n" + json.dumps(line) + "\n")
            self._file.flush()

    def gathered(self, label: str, own: Mapping[int, bool]) -> dict[int, bool]:
        """All decisions of a task, of all ranks and of before, by index."""
        together = dict(self.done.get(label, {}))
        for of_rank in self.world.gather_objects(dict(own)):
            together.update(of_rank)
        return dict(sorted(together.items()))

    def finish(self) -> None:
        """Forget everything: the evaluation is complete."""
        if self._file is not None:
            self._file.close()
            self.world.barrier()
        if self._folder is not None and self.world.is_main:
            shutil.rmtree(self._folder)
