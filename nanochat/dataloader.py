"""Packed batches of token ids from documents or conversations, resumable bit for bit.

Every rank reads the same stream and packs the same rows; of the rows of a step, rank r of w
keeps r, r + w, r + 2 w, ... What a model sees therefore depends neither on the number of ranks
nor on the split into micro-batches. Reading and tokenizing happen on a thread, one or two steps
ahead.

B = rows of a batch on this rank, T = positions of a row.
"""

from __future__ import annotations

import functools
import itertools
import logging
import queue
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import numpy as np
import torch

from nanochat.common import UserError
from nanochat.packing import (
    BestFitPacker,
    ConversationFeed,
    DocumentFeed,
    Feed,
    Ids,
    Packer,
    SequentialPacker,
    ShuffledPacker,
    State,
    Task,
    evaluation_rows,
    split_rows,
)
from nanochat.sources import DocumentSource, Split

if TYPE_CHECKING:
    from nanochat.runtime import World
    from nanochat.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

STEPS_AHEAD = 2
# Documents and conversations that wait for a place in best-fit packing; both are the newest
# nanochat's.
WAITING_DOCUMENTS = 1000
WAITING_CONVERSATIONS = 100
WAITING_ROWS = 1000  # that wait to be drawn in shuffled packing: together of hundreds of documents
# Steps in a row without any target after which the data, not bad luck, is to blame.
MAX_STEPS_WITHOUT_TARGET = 1000


@dataclass
class Batch:
    """Rows of this rank: inputs and targets (B, T) int64, target -1 where there is none."""

    inputs: torch.Tensor
    targets: torch.Tensor
    num_targets: int
    """Targets of the whole step on all ranks; in evaluation, those of this batch."""
    weights: torch.Tensor | None = None
    """What the loss of each target is multiplied by, (B, T) fp32; None = 1."""
    measures: dict[str, float] = field(default_factory=dict)
    """What else there is to tell about the step, equal on every rank; goes to the metrics."""
    waited_seconds: float = 0.0
    """Time in which making the batch waited for other ranks."""


class Loader:
    """Endless steps of packed rows. The same state on every rank, valid at any world size."""

    def __init__(
        self,
        packer: Packer,
        *,
        rows_per_step: int,
        world: World,
        steps_ahead: int = STEPS_AHEAD,
        pin_memory: bool = False,
    ) -> None:
        if rows_per_step < 1 or rows_per_step % world.size:
            raise UserError(
                f"{rows_per_step} rows a step can not be dealt to {world.size} ranks equally; "
                "make the total batch size a multiple of sequence length x ranks"
            )
        self._packer = packer
        self._pack = functools.partial(_pack, packer, rows_per_step, world, pin_memory)
        self._steps_ahead = steps_ahead
        self._prefetcher: _Prefetcher[_Step] | None = None
        self._snapshot, self._progress = packer.snapshot(), packer.progress

    def next_step(self) -> Batch:
        """All rows of this rank for one optimizer step."""
        if self._steps_ahead == 0:
            step = self._pack()
        else:
            if self._prefetcher is None:
                self._prefetcher = _Prefetcher(self._pack, self._steps_ahead)
            step = self._prefetcher.get()
        self._snapshot, self._progress = step.snapshot, step.progress
        return step.batch

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield self.next_step()

    @property
    def progress(self) -> float:
        """Epochs handed out so far; equal on all ranks."""
        return self._progress

    @property
    def epoch(self) -> int:
        """Complete epochs handed out so far."""
        return int(self._progress)

    def state_dict(self) -> State:
        """Where the stream stands after the last step handed out: integers and small arrays."""
        return self._snapshot()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after the step that `state_dict` was called behind."""
        self.close()
        self._packer.load_state_dict(state)
        self._snapshot, self._progress = self._packer.snapshot(), self._packer.progress

    def close(self) -> None:
        """Stop reading ahead. What was read ahead is dropped: load a state before going on."""
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None
            self._packer.load_state_dict(self._snapshot())


class DocumentLoader(Loader):
    """Pretraining: documents behind a BOS, every token a target.

    packing: "stream" wastes nothing; "shuffled" draws its rows in an order that follows from
    `seed`; "best-fit" begins every row with the beginning of a document and loses the ends of some
    (about a third of the tokens at T = 2,048).
    """

    def __init__(
        self,
        source: DocumentSource,
        tokenizer: Tokenizer,
        *,
        rows_per_step: int,
        sequence_len: int,
        world: World,
        packing: Literal["stream", "shuffled", "best-fit"] = "stream",
        seed: int = 0,
        split: Split = "train",
        steps_ahead: int = STEPS_AHEAD,
        pin_memory: bool = False,
    ) -> None:
        packer = _packer(
            DocumentFeed(source, tokenizer, split=split),
            sequence_len,
            packing=packing,
            overflow="crop",
            buffer_size=WAITING_ROWS if packing == "shuffled" else WAITING_DOCUMENTS,
            seed=seed,
        )
        super().__init__(
            packer,
            rows_per_step=rows_per_step,
            world=world,
            steps_ahead=steps_ahead,
            pin_memory=pin_memory,
        )


class ConversationLoader(Loader):
    """Midtraining and finetuning: conversations in the order of the task, epoch after epoch.

    masked: only what the assistant says is a target.
    packing: "stream" joins conversations (midtraining), "rows" gives each a row, "best-fit" fits
    several whole ones into a row; the last two pad, with no target there. Conversations longer
    than a row are cut, in a stream at `max_tokens`.
    """

    def __init__(
        self,
        task: Task,
        tokenizer: Tokenizer,
        *,
        rows_per_step: int,
        sequence_len: int,
        world: World,
        masked: bool,
        packing: Literal["stream", "rows", "best-fit"],
        max_tokens: int = 2048,
        steps_ahead: int = STEPS_AHEAD,
        pin_memory: bool = False,
    ) -> None:
        feed = _conversation_feed(
            task,
            tokenizer,
            masked=masked,
            packing=packing,
            sequence_len=sequence_len,
            max_tokens=max_tokens,
        )
        packer = _packer(
            feed,
            sequence_len,
            packing=packing,
            overflow="pad",
            buffer_size=min(WAITING_CONVERSATIONS, len(task)),
        )
        super().__init__(
            packer,
            rows_per_step=rows_per_step,
            world=world,
            steps_ahead=steps_ahead,
            pin_memory=pin_memory,
        )


def evaluation_batches(
    source: DocumentSource,
    tokenizer: Tokenizer,
    *,
    num_tokens: int,
    batch_size: int,
    sequence_len: int,
    world: World,
    split: Split = "val",
) -> Iterator[Batch]:
    """The first `num_tokens` targets of a split, in an order that no batch or world size changes.

    Each rank gets its own rows; a split that is shorter is used once and named in the log.
    """
    feed = DocumentFeed(source, tokenizer, split=split)
    rows = evaluation_rows(feed, sequence_len, one_document_a_row=False)
    what = f"the {split} split of {source.name}"
    return _deal(_limit(rows, num_tokens, what), batch_size, world)


def conversation_evaluation_batches(
    task: Task,
    tokenizer: Tokenizer,
    *,
    num_tokens: int,
    batch_size: int,
    sequence_len: int,
    world: World,
    masked: bool,
    packing: Literal["stream", "rows"],
    max_tokens: int = 2048,
) -> Iterator[Batch]:
    """The first `num_tokens` targets of a task, under the same promises."""
    feed = _conversation_feed(
        task,
        tokenizer,
        masked=masked,
        packing=packing,
        sequence_len=sequence_len,
        max_tokens=max_tokens,
    )
    rows = evaluation_rows(feed, sequence_len, one_document_a_row=packing == "rows")
    return _deal(_limit(rows, num_tokens, "the validation conversations"), batch_size, world)


@dataclass(frozen=True)
class _Step:
    batch: Batch
    snapshot: Callable[[], State]
    progress: float


def _pack(packer: Packer, rows_per_step: int, world: World, pin_memory: bool) -> _Step:
    """The next step that has a target. Not a method: the reading thread must not hold a loader."""
    for _ in range(MAX_STEPS_WITHOUT_TARGET):
        rows = packer.take(rows_per_step)
        # Counted over the rows of all ranks: the loss is a mean over all of them.
        num_targets = int(np.count_nonzero(rows[:, 1:] >= 0))
        if num_targets:
            batch = _batch(rows[world.rank :: world.size], num_targets)
            if pin_memory:
                batch.inputs = batch.inputs.pin_memory()
                batch.targets = batch.targets.pin_memory()
            return _Step(batch, packer.snapshot(), packer.progress)
        logger.info("a step without a single token to train on is left out")
    raise UserError(
        f"{MAX_STEPS_WITHOUT_TARGET} steps in a row have no token to train on; "
        "use larger steps, or conversations in which the assistant says something"
    )


def _batch(rows: Ids, num_targets: int) -> Batch:
    inputs, targets = split_rows(rows)
    return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), num_targets)


def _conversation_feed(
    task: Task,
    tokenizer: Tokenizer,
    *,
    masked: bool,
    packing: str,
    sequence_len: int,
    max_tokens: int,
) -> ConversationFeed:
    # A stream goes on in the next row; elsewhere what does not fit its row is never seen.
    limit = max_tokens if packing == "stream" else sequence_len + 1
    return ConversationFeed(task, tokenizer, masked=masked, max_tokens=limit)


def _packer(
    feed: Feed,
    sequence_len: int,
    *,
    packing: str,
    overflow: Literal["crop", "pad"],
    buffer_size: int,
    seed: int = 0,
) -> Packer:
    if packing == "best-fit":
        return BestFitPacker(feed, sequence_len, overflow=overflow, buffer_size=buffer_size)
    if packing == "shuffled":
        return ShuffledPacker(feed, sequence_len, buffer_size=buffer_size, seed=seed)
    if packing in ("stream", "rows"):
        return SequentialPacker(feed, sequence_len, one_document_a_row=packing == "rows")
    raise UserError(f"unknown packing {packing!r}; use stream, shuffled, rows or best-fit")


def _limit(rows: Iterator[Ids], num_targets: int, what: str) -> Iterator[Ids]:
    """Rows up to exactly `num_targets` targets; the ones beyond become context."""
    if num_targets < 1:
        raise UserError(f"{num_targets} tokens to evaluate on; give at least 1")
    counted = 0
    for row in rows:
        positions = np.flatnonzero(row[1:] >= 0) + 1
        excess = positions[num_targets - counted :]
        if len(excess):
            row = row.copy()
            row[excess] = ~row[excess]
        counted += len(positions) - len(excess)
        yield row
        if counted == num_targets:
            return
    logger.warning("%s ends after %d tokens (%d asked for)", what, counted, num_targets)


def _deal(rows: Iterator[Ids], batch_size: int, world: World) -> Iterator[Batch]:
    own = itertools.islice(rows, world.rank, None, world.size)
    while group := list(itertools.islice(own, batch_size)):
        stacked = np.stack(group)
        yield _batch(stacked, int(np.count_nonzero(stacked[:, 1:] >= 0)))


_Item = TypeVar("_Item")


class _Prefetcher(Generic[_Item]):
    """A thread that keeps up to `depth` results of `produce` ready, in order."""

    def __init__(self, produce: Callable[[], _Item], depth: int) -> None:
        self._ready: queue.Queue[_Item | BaseException] = queue.Queue(depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(
            target=_produce, args=(produce, self._ready, self._stopped), daemon=True
        )
        self._thread.start()
        # Also when nobody closes: a thread in the middle of a batch must not outlive Python.
        weakref.finalize(self, _stop, self._thread, self._ready, self._stopped)

    def get(self) -> _Item:
        """The next result; an error of `produce` is raised here."""
        item = self._ready.get()
        if isinstance(item, BaseException):
            self._ready.put(item)  # for whoever asks again: the thread has ended
            raise item
        return item

    def close(self) -> None:
        """Wait for the thread to end; results that nobody took are dropped."""
        _stop(self._thread, self._ready, self._stopped)


def _produce(
    produce: Callable[[], _Item],
    ready: queue.Queue[_Item | BaseException],
    stopped: threading.Event,
) -> None:
    while not stopped.is_set():
        try:
            item: _Item | BaseException = produce()
        except BaseException as error:
            item = error
        ready.put(item)
        if isinstance(item, BaseException):
            return


def _stop(thread: threading.Thread, ready: queue.Queue[Any], stopped: threading.Event) -> None:
    stopped.set()
    while thread.is_alive():
        try:
            ready.get(timeout=0.05)  # makes room for the put the thread may be waiting in
        except queue.Empty:
            continue
    thread.join()
