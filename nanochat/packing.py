"""Streams of token ids cut into rows of equal length, with a state small enough to save.

A signed id says two things at once: `id >= 0` is a token that the model is trained to predict,
`~id` (negative) the same token as context only. So masks never part from their tokens.

R = rows, T = positions of a row; a row has T + 1 ids: T inputs and, shifted by one, T targets.
Everything here is a pure function of the stream: no ranks, no threads, no torch.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from nanochat.common import UserError
from nanochat.conversation import Conversation
from nanochat.sources import DocumentSource, Position, Split

if TYPE_CHECKING:
    from nanochat.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

Ids = npt.NDArray[np.int32]
State = dict[str, Any]  # name -> int or small numpy array

# Enough for the tokenizer's threads, few enough that rendering never holds up a step.
CONVERSATIONS_PER_CHUNK = 32


@dataclass(frozen=True)
class Chunk:
    """Some consecutive documents of a stream and the places before and after them."""

    ids: Ids  # signed, all documents one after the other
    offsets: npt.NDArray[np.int64]  # document i is ids[offsets[i] : offsets[i + 1]]
    start: Position
    stop: Position

    def document(self, index: int) -> Ids:
        """The signed ids of one document."""
        return self.ids[self.offsets[index] : self.offsets[index + 1]]

    def __len__(self) -> int:  # documents
        return len(self.offsets) - 1


class Feed(Protocol):
    """A stream of chunks that can begin anywhere."""

    pad: int  # signed id that fills up a row
    documents_per_epoch: int | None  # where that is known without reading them

    def chunks(self, position: Position, *, endless: bool = True) -> Iterator[Chunk]:
        """Chunks from a position on, of this epoch or for ever."""
        ...

    def progress(self, position: Position) -> float:
        """Epochs read before a position."""
        ...


class DocumentFeed:
    """Pretraining documents, each behind a BOS, every token a target."""

    def __init__(self, source: DocumentSource, tokenizer: Tokenizer, *, split: Split) -> None:
        self._source, self._tokenizer, self._split = source, tokenizer, split
        self.documents_per_epoch: int | None = None
        self.pad = ~tokenizer.bos_id

    def chunks(self, position: Position, *, endless: bool = True) -> Iterator[Chunk]:
        """Tokenize what the source reads, one chunk for each of its lists."""
        bos = self._tokenizer.bos_id
        stream = self._source.documents(self._split, position, endless=endless)
        for texts, following in stream:
            ids, offsets = self._tokenizer.encode_batch(texts, prepend=bos)
            yield Chunk(ids, offsets, position, following)
            position = following

    def progress(self, position: Position) -> float:
        """Epochs read, to the row group."""
        return position.epoch + position.row_group / self._source.num_row_groups(self._split)


class Task(Protocol):
    """A list of conversations; `tasks.common.Task` is one."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Conversation: ...


class ConversationFeed:
    """Rendered conversations in the order of their task, in every epoch the same.

    masked: only what the assistant says is a target; otherwise everything is.
    max_tokens: longer conversations are cut off there.
    Conversations in which no target is left are dropped.
    """

    def __init__(self, task: Task, tokenizer: Tokenizer, *, masked: bool, max_tokens: int) -> None:
        if len(task) == 0:
            raise UserError("there are no conversations to train or evaluate on: the task is empty")
        self._task, self._tokenizer = task, tokenizer
        self._masked, self._max_tokens = masked, max_tokens
        self.documents_per_epoch: int | None = len(task)
        self.pad = ~tokenizer.encode_special("<|assistant_end|>")

    def chunks(self, position: Position, *, endless: bool = True) -> Iterator[Chunk]:
        """Render the conversations; `Position.document` is the index in the task."""
        total = len(self._task)
        epoch, start = position.epoch, position.document
        seen = start > 0
        while endless or epoch == position.epoch:
            dropped = 0
            for first in range(start, total, CONVERSATIONS_PER_CHUNK):
                stop = min(first + CONVERSATIONS_PER_CHUNK, total)
                rendered = [self._render(index) for index in range(first, stop)]
                kept = [ids for ids in rendered if (ids[1:] >= 0).any()]
                dropped += len(rendered) - len(kept)
                if kept:
                    seen = True
                    before, after = Position(epoch, 0, first), Position(epoch, 0, stop)
                    yield _chunk(kept, before, after)
            if dropped and epoch == 0:
                logger.warning(
                    "%d of %d conversations have no token to train on within %d tokens "
                    "and are left out",
                    *(dropped, total, self._max_tokens),
                )
            if not seen:
                raise UserError(
                    f"none of the {total} conversations has a token to train on within "
                    f"{self._max_tokens} tokens; use longer rows"
                )
            epoch, start = epoch + 1, 0

    def progress(self, position: Position) -> float:
        """Epochs read, to the conversation."""
        return position.epoch + position.document / len(self._task)

    def _render(self, index: int) -> Ids:
        conversation = self._task[index]
        ids, mask = self._tokenizer.render_conversation(conversation, max_tokens=self._max_tokens)
        tokens = np.array(ids, np.int32)
        return np.where(np.array(mask, bool), tokens, ~tokens) if self._masked else tokens


class Packer(Protocol):
    """Cuts a feed into rows; its state is that of the rows taken so far."""

    @property
    def progress(self) -> float:
        """Epochs taken."""
        ...

    def take(self, num_rows: int) -> Ids:
        """The next rows, (R, T + 1) signed ids."""
        ...

    def snapshot(self) -> Callable[[], State]:
        """What `load_state_dict` needs to go on with the next row, put together when called."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after the rows that were taken when the state was made."""
        ...


class SequentialPacker:
    """Documents used in order, so that a place in the stream is all the state there is.

    one_document_a_row: each document in a row of its own, padded. Otherwise all documents are one
    long text, cut so that the last id of a row is the first of the next.
    """

    def __init__(self, feed: Feed, sequence_len: int, *, one_document_a_row: bool) -> None:
        self._feed, self._sequence_len = feed, sequence_len
        self._by_document = one_document_a_row
        self._restart(Position(), 0)

    @property
    def progress(self) -> float:
        """Epochs taken, within a chunk by its used part."""
        if not self._chunks:
            return self._feed.progress(self._start)
        chunk = self._chunks[0]
        before, after = self._feed.progress(chunk.start), self._feed.progress(chunk.stop)
        return before + (after - before) * self._used / self._size(chunk)

    def take(self, num_rows: int) -> Ids:
        """The next rows, (R, T + 1) signed ids."""
        if self._by_document:
            self._load(num_rows)
            documents = [chunk.document(i) for chunk in self._chunks for i in range(len(chunk))]
            documents = documents[self._used : self._used + num_rows]
            self._drop(num_rows)
            return pad_rows(documents, self._sequence_len, self._feed.pad)
        length = num_rows * self._sequence_len
        self._load(length + 1)
        ids = np.concatenate([chunk.ids for chunk in self._chunks])
        ids = ids[self._used : self._used + length + 1]
        self._drop(length)
        rows = np.lib.stride_tricks.sliding_window_view(ids, self._sequence_len + 1)
        return rows[:: self._sequence_len]

    def snapshot(self) -> Callable[[], State]:
        """The first chunk still in use and how much of it is used."""
        start = self._chunks[0].start if self._chunks else self._start
        state = {**_position_state(start), "used": self._used}
        return lambda: state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Read that chunk again and go on behind its used part."""
        self._restart(_position_of(state), int(state["used"]))

    def _restart(self, start: Position, used: int) -> None:
        # `_used` counts tokens or documents of the first chunk that were taken already.
        self._start, self._used = start, used
        self._chunks: deque[Chunk] = deque()
        self._stream = self._feed.chunks(start)

    def _size(self, chunk: Chunk) -> int:
        return len(chunk) if self._by_document else len(chunk.ids)

    def _load(self, amount: int) -> None:
        """Read chunks until `amount` more than what is used is there."""
        available = sum(map(self._size, self._chunks)) - self._used
        while available < amount:
            self._chunks.append(next(self._stream))
            available += self._size(self._chunks[-1])

    def _drop(self, amount: int) -> None:
        """Count `amount` as used and forget the chunks that are used up."""
        self._used += amount
        while self._chunks and self._used >= self._size(self._chunks[0]):
            chunk = self._chunks.popleft()
            self._used -= self._size(chunk)
            self._start = chunk.stop


class ShuffledPacker:
    """Rows cut from the stream, drawn at random from a buffer of waiting ones.

    A long document fills several rows in succession; shuffled, those of a step come from many
    documents. No row is dropped or repeated, but a row may wait for long, into the next epoch, and
    `buffer_size` rows are waiting when a run ends. The order follows from `seed`.
    """

    def __init__(self, feed: Feed, sequence_len: int, *, buffer_size: int, seed: int) -> None:
        self._rows = SequentialPacker(feed, sequence_len, one_document_a_row=False)
        self._sequence_len, self._buffer_size = sequence_len, buffer_size
        self._seed = seed % 2**64
        self._waiting: list[Ids] = []
        self._taken = 0

    @property
    def progress(self) -> float:
        """Epochs taken, as if rows were taken in the order of the stream."""
        read = self._taken + len(self._waiting)
        return self._rows.progress * self._taken / read if read else 0.0

    def take(self, num_rows: int) -> Ids:
        """The next rows, (R, T + 1) signed ids."""
        if not self._waiting:
            self._waiting = self._read(self._buffer_size)
        rows = []
        for following in self._read(num_rows):
            # The n-th row is drawn by the seed and n alone: no random state to save.
            key = np.array([self._taken, self._seed], np.uint64)
            draw = np.random.Generator(np.random.Philox(key=key))
            index = int(draw.integers(self._buffer_size))
            rows.append(self._waiting[index])
            self._waiting[index] = following
            self._taken += 1
        return np.stack(rows)

    def snapshot(self) -> Callable[[], State]:
        """The place in the stream, the waiting rows in their order, and how many were taken."""
        place, waiting, taken = self._rows.snapshot(), list(self._waiting), self._taken
        none = np.empty((0, self._sequence_len + 1), np.int32)
        # Joined only when somebody saves: several MB, and every step has a snapshot.
        return lambda: {
            **place(),
            "waiting_rows": np.stack(waiting) if waiting else none,
            "taken": taken,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put the waiting rows back and read on."""
        rows = np.asarray(state["waiting_rows"], np.int32)
        if rows.shape[1] != self._sequence_len + 1:
            raise _other_length(self._sequence_len)
        if len(rows) not in (0, self._buffer_size):
            raise UserError(
                f"the saved place in the data has {len(rows)} waiting rows where "
                f"{self._buffer_size} are shuffled: another version's; start a new run"
            )
        self._rows.load_state_dict(state)
        self._waiting, self._taken = list(rows), int(state["taken"])

    def _read(self, num_rows: int) -> list[Ids]:
        # Copies, because a view would keep its whole chunk in memory while it waits.
        return [row.copy() for row in self._rows.take(num_rows)]


class BestFitPacker:
    """Whole documents, the largest that still fits first, out of a buffer of waiting ones.

    What is left of a row when none fits is filled with the beginning of the shortest waiting
    document, whose end is lost (overflow="crop"), or padded ("pad"). Every row begins with the
    beginning of a document. (As in the newest nanochat.s loaders.)
    """

    def __init__(
        self, feed: Feed, sequence_len: int, *, overflow: Literal["crop", "pad"], buffer_size: int
    ) -> None:
        self._feed, self._sequence_len = feed, sequence_len
        self._overflow, self._buffer_size = overflow, buffer_size
        self._restart(Position(), [], np.empty(0, np.int64))

    @property
    def progress(self) -> float:
        """Epochs taken; waiting documents are not taken yet (where their share is known)."""
        read = self._feed.progress(self._next)
        size = self._feed.documents_per_epoch
        return max(0.0, read - len(self._waiting) / size) if size else read

    def take(self, num_rows: int) -> Ids:
        """The next rows, (R, T + 1) signed ids."""
        rows = np.full((num_rows, self._sequence_len + 1), self._feed.pad, np.int32)
        for row in rows:
            self._fill(row)
        return rows

    def snapshot(self) -> Callable[[], State]:
        """The place in the stream and the waiting documents, in their order."""
        position, waiting = _position_state(self._next), list(self._waiting)
        lengths = self._lengths[: len(waiting)].copy()
        # Joined only when somebody saves: several MB, and every step has a snapshot.
        return lambda: {
            **position,
            "waiting_ids": np.concatenate([np.empty(0, np.int32), *waiting]),
            "waiting_lengths": lengths,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put the waiting documents back and read on."""
        lengths = np.array(state["waiting_lengths"], np.int64)
        ids = np.asarray(state["waiting_ids"], np.int32)
        ends = np.cumsum(np.minimum(lengths, self._sequence_len + 1))
        if len(ids) != (ends[-1] if len(ends) else 0):
            raise _other_length(self._sequence_len)
        waiting = np.split(ids, ends[:-1]) if len(ends) else []
        self._restart(_position_of(state), waiting, lengths)

    def _restart(
        self, position: Position, waiting: Sequence[Ids], lengths: npt.NDArray[np.int64]
    ) -> None:
        self._next = position
        self._stream = self._feed.chunks(position)
        # The whole lengths of the waiting documents, of which only the part that could enter a
        # row is kept. An array, so that a search is one operation.
        self._waiting, self._lengths = list(waiting), lengths

    def _fill(self, row: Ids) -> None:
        filled = 0
        while filled < len(row):
            while len(self._waiting) < self._buffer_size:
                chunk = next(self._stream)
                self._next = chunk.stop
                self._add(chunk)
            space = len(row) - filled
            lengths = self._lengths[: len(self._waiting)]
            fitting = np.where(lengths <= space, lengths, 0)
            chosen = int(fitting.argmax())
            if fitting[chosen] == 0:
                if self._overflow == "pad":
                    return
                chosen = int(lengths.argmin())
            document = self._remove(chosen)[:space]
            row[filled : filled + len(document)] = document
            filled += len(document)

    def _add(self, chunk: Chunk) -> None:
        keep = self._sequence_len + 1
        used = len(self._waiting)
        # Copies, because a view would keep its whole chunk in memory while it waits.
        self._waiting += [chunk.document(i)[:keep].copy() for i in range(len(chunk))]
        self._lengths = np.concatenate([self._lengths[:used], np.diff(chunk.offsets)])

    def _remove(self, index: int) -> Ids:
        """Take a document out; the last one moves into its place."""
        document, last = self._waiting[index], len(self._waiting) - 1
        self._waiting[index], self._lengths[index] = self._waiting[last], self._lengths[last]
        self._waiting.pop()
        return document


def evaluation_rows(feed: Feed, sequence_len: int, *, one_document_a_row: bool) -> Iterator[Ids]:
    """The rows of one epoch, (T + 1,) each, nothing left out: a short last row is padded."""
    rest = np.empty(0, np.int32)
    for chunk in feed.chunks(Position(), endless=False):
        if one_document_a_row:
            documents = [chunk.document(i) for i in range(len(chunk))]
            yield from pad_rows(documents, sequence_len, feed.pad)
            continue
        rest = np.concatenate([rest, chunk.ids])
        num_rows = (len(rest) - 1) // sequence_len
        for row in range(num_rows):
            yield rest[row * sequence_len : (row + 1) * sequence_len + 1]
        rest = rest[num_rows * sequence_len :]
    if len(rest) > 1:
        yield pad_rows([rest], sequence_len, feed.pad)[0]


def pad_rows(documents: Sequence[Ids], sequence_len: int, pad: int) -> Ids:
    """One document a row, cut or padded to (R, T + 1)."""
    rows = np.full((len(documents), sequence_len + 1), pad, np.int32)
    for row, document in zip(rows, documents, strict=True):
        row[: len(document)] = document[: sequence_len + 1]
    return rows


def split_rows(rows: Ids) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Inputs and targets (R, T) of signed rows (R, T + 1); a target that is none is -1."""
    context = rows[:, :-1].astype(np.int64)
    targets = rows[:, 1:].astype(np.int64)
    return np.where(context < 0, ~context, context), np.maximum(targets, -1)


def _other_length(sequence_len: int) -> UserError:
    return UserError(
        f"the saved place in the data belongs to rows of another length than {sequence_len}; "
        "resume with the sequence length of the first run"
    )


def _chunk(documents: Sequence[Ids], start: Position, stop: Position) -> Chunk:
    offsets = np.zeros(len(documents) + 1, np.int64)
    np.cumsum([len(document) for document in documents], out=offsets[1:])
    return Chunk(np.concatenate(documents), offsets, start, stop)


def _position_state(position: Position) -> State:
    return {
        "epoch": position.epoch,
        "row_group": position.row_group,
        "document": position.document,
    }


def _position_of(state: Mapping[str, Any]) -> Position:
    return Position(int(state["epoch"]), int(state["row_group"]), int(state["document"]))
