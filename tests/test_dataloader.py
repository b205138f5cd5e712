"""Batches: what is packed, that ranks and batch sizes change nothing, that resuming is exact."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nanochat.common import UserError
from nanochat.conversation import Conversation, chat
from nanochat.dataloader import (
    Batch,
    ConversationLoader,
    DocumentLoader,
    Loader,
    conversation_evaluation_batches,
    evaluation_batches,
)
from nanochat.dataset import DocumentSource, Position, open_source
from nanochat.packing import BestFitPacker, Chunk, SequentialPacker, ShuffledPacker
from nanochat.runtime import World
from nanochat.sources.parquet import shard_name, write_shard
from tests.reference.byte_tokenizer import ByteTokenizer

ONE = World()
BOS = ByteTokenizer.bos_id
LENGTH = 24


class Tokenizer(ByteTokenizer):
    """The byte tokenizer with rendered conversations: the assistant's text and end are targets."""

    def render_conversation(
        self, conversation: Conversation, max_tokens: int = 2048
    ) -> tuple[list[int], list[int]]:
        ids, mask = [self.bos_id], [0]
        for message in conversation.messages:
            turn = self._turn(message)
            is_target = message.role == "assistant"
            ids += turn
            mask += [0] + [int(is_target)] * (len(turn) - 1)
        return ids[:max_tokens], mask[:max_tokens]


TOKENIZER = Tokenizer()
ASSISTANT_END = TOKENIZER.encode_special("<|assistant_end|>")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> DocumentSource:
    """300 documents of 0 to 40 characters in two training shards."""
    folder = tmp_path_factory.mktemp("shards")
    texts = [f"{i} " + "abcdefgh" * (i * 7 % 6) for i in range(300)]
    for shard, part in enumerate([texts[:200], texts[200:], ["held out", "x" * 100, "end"]]):
        write_shard(folder / shard_name(shard), part, rows_per_group=64, note={})
    return open_source(str(folder))


class Chats:
    """Conversations of growing length; every seventh is a question without an answer."""

    def __init__(self, length: int = 40) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Conversation:
        question = f"q{index}"
        if index % 7 == 6:
            return chat(question)
        return chat(question, "a" * (index % 5 + 1))


def documents(source: DocumentSource, **options: Any) -> DocumentLoader:
    settings = {"rows_per_step": 4, "sequence_len": LENGTH, "world": ONE} | options
    return DocumentLoader(source, TOKENIZER, **settings)


def conversations(task: Any, **options: Any) -> ConversationLoader:
    settings: dict[str, Any] = {
        "rows_per_step": 4,
        "sequence_len": LENGTH,
        "world": ONE,
        "masked": True,
        "packing": "stream",
    }
    return ConversationLoader(task, TOKENIZER, **(settings | options))


def take(loader: Loader, num_steps: int) -> list[Batch]:
    batches = [loader.next_step() for _ in range(num_steps)]
    loader.close()
    return batches


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.inputs, b.inputs)
        assert torch.equal(a.targets, b.targets)
        assert a.num_targets == b.num_targets


def test_batches_are_pinned_where_they_are_copied_to_a_gpu(
    source: DocumentSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned: list[torch.Tensor] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor.clone())
        return pinned[-1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    assert take(documents(source), 1)
    assert not pinned
    settings: dict[str, Any] = {"steps_ahead": 0, "pin_memory": True}
    for loader in (documents(source, **settings), conversations(Chats(), **settings)):
        (batch,) = take(loader, 1)
        assert batch.inputs is pinned[-2]
        assert batch.targets is pinned[-1]


# ---- documents --------------------------------------------------------------------------------


def test_a_stream_is_the_documents_end_to_end_each_behind_a_bos(source: DocumentSource) -> None:
    texts = [t for batch, _ in source.documents("train", endless=False) for t in batch]
    expected = list(itertools.chain.from_iterable([BOS, *text.encode()] for text in texts))
    batches = take(documents(source), 20)
    inputs = torch.cat([batch.inputs.flatten() for batch in batches]).tolist()
    targets = torch.cat([batch.targets.flatten() for batch in batches]).tolist()
    assert inputs == expected[: 20 * 4 * LENGTH]
    assert targets == expected[1 : 20 * 4 * LENGTH + 1]
    assert [batch.num_targets for batch in batches] == [4 * LENGTH] * 20
    assert batches[0].inputs.shape == (4, LENGTH)
    assert batches[0].inputs.dtype == torch.int64


def best_fit_by_hand(lengths: list[int], width: int, capacity: int) -> list[list[int]]:
    """Rows in which a token is the number of its document; each choice by a plain search."""
    waiting: list[int] = []
    rest = iter(range(len(lengths)))
    rows = []
    while True:
        row: list[int] = []
        while len(row) < width:
            while len(waiting) < capacity:
                following = next(rest, None)
                if following is None:
                    return rows
                waiting.append(following)
            space = width - len(row)
            fitting = [d for d in waiting if lengths[d] <= space]
            chosen = (
                max(fitting, key=lambda d: lengths[d])
                if fitting
                else min(waiting, key=lambda d: lengths[d])
            )
            waiting.remove(chosen)
            row += [chosen] * min(lengths[chosen], space)
        rows.append(row)


class NumberedFeed:
    """Documents of given lengths whose every token is the number of the document."""

    pad, documents_per_epoch = -1, None

    def __init__(self, lengths: list[int]) -> None:
        self._lengths = lengths

    def chunks(self, position: Position, *, endless: bool = True) -> Iterator[Chunk]:
        for number, length in enumerate(self._lengths):
            ids = np.full(length, number, np.int32)
            yield Chunk(ids, np.array([0, length]), position, position)

    def progress(self, position: Position) -> float:
        return 0.0


def test_best_fit_takes_the_largest_that_fits_and_crops_the_shortest() -> None:
    lengths = [2 + (i * 37) % 101 for i in range(101)]  # all different: no ties to decide
    expected = best_fit_by_hand(lengths, width=60, capacity=8)
    assert len(expected) > 40
    packer = BestFitPacker(NumberedFeed(lengths), 59, overflow="crop", buffer_size=8)
    assert packer.take(len(expected)).tolist() == expected


def test_best_fit_rows_begin_with_a_document_and_have_no_padding(source: DocumentSource) -> None:
    batches = take(documents(source, packing="best-fit"), 10)
    assert all((batch.inputs[:, 0] == BOS).all() for batch in batches)
    assert all(batch.num_targets == 4 * LENGTH for batch in batches)


def test_shuffled_rows_are_those_of_the_stream_each_once_in_another_order() -> None:
    lengths = [10 * 23] * 40  # ten rows of 23 each
    stream = SequentialPacker(NumberedFeed(lengths), 23, one_document_a_row=False).take(60 + 240)
    packer = ShuffledPacker(NumberedFeed(lengths), 23, buffer_size=60, seed=1)
    taken = packer.take(240)
    waiting = packer.snapshot()()["waiting_rows"]
    assert waiting.shape == (60, 24)
    assert sorted([*taken.tolist(), *waiting.tolist()]) == sorted(stream.tolist())
    # Of sixteen rows the stream takes two documents; six wait here, and more come meanwhile.
    documents_of_steps = [len(set(step[:, 0])) for step in np.split(taken, 15)]
    assert min(documents_of_steps) >= 5
    numbers = taken[:, 0]
    assert (np.diff(numbers) < 0).any()


def test_the_order_of_shuffled_rows_follows_from_the_seed(source: DocumentSource) -> None:
    def rows(seed: int) -> torch.Tensor:
        batches = take(documents(source, packing="shuffled", seed=seed), 12)
        return torch.cat([batch.inputs for batch in batches])

    assert torch.equal(rows(3), rows(3))
    assert not torch.equal(rows(3), rows(4))
    assert not torch.equal(rows(3), rows(-3))


def test_progress_of_shuffled_rows_begins_at_none_taken(source: DocumentSource) -> None:
    loader, steps = documents(source, packing="shuffled"), []
    assert loader.progress == 0.0
    while loader.progress < 2.0:
        loader.next_step()
        steps.append(loader.progress)
    loader.close()
    stream = documents(source)
    take(stream, len(steps))
    assert steps == sorted(steps)
    assert stream.progress == pytest.approx(2.0, rel=0.05)


@pytest.mark.parametrize("packing", ["stream", "shuffled", "best-fit"])
@pytest.mark.parametrize("steps_ahead", [0, 2])
def test_ranks_share_the_rows_of_one_process(
    source: DocumentSource, packing: str, steps_ahead: int
) -> None:
    options = {"packing": packing, "steps_ahead": steps_ahead}
    alone = take(documents(source, **options), 12)
    even, odd = (take(documents(source, world=World(r, 2), **options), 12) for r in (0, 1))
    for whole, a, b in zip(alone, even, odd, strict=True):
        assert torch.equal(whole.inputs[0::2], a.inputs)
        assert torch.equal(whole.inputs[1::2], b.inputs)
        assert torch.equal(whole.targets[1::2], b.targets)
        assert whole.num_targets == a.num_targets == b.num_targets


@pytest.mark.parametrize("packing", ["stream", "shuffled", "best-fit"])
def test_rows_do_not_depend_on_how_many_make_a_step(source: DocumentSource, packing: str) -> None:
    small = take(documents(source, packing=packing, rows_per_step=2), 12)
    large = take(documents(source, packing=packing, rows_per_step=8), 3)
    assert torch.equal(
        torch.cat([batch.inputs for batch in small]), torch.cat([batch.inputs for batch in large])
    )


def saved(loader: Loader) -> dict[str, Any]:
    """The state as a checkpoint gives it back: integers from JSON, arrays from safetensors."""
    return {
        name: np.array(value) if isinstance(value, np.ndarray) else int(value)
        for name, value in loader.state_dict().items()
    }


@pytest.mark.parametrize("packing", ["stream", "shuffled", "best-fit"])
@pytest.mark.parametrize("steps_ahead", [0, 2])
def test_resuming_at_any_step_goes_on_exactly(
    source: DocumentSource, packing: str, steps_ahead: int
) -> None:
    def make() -> DocumentLoader:
        return documents(source, packing=packing, steps_ahead=steps_ahead)

    whole = take(make(), 110)
    interrupted = make()
    for step in range(100):
        resumed = make()
        resumed.load_state_dict(saved(interrupted))
        assert_same(take(resumed, 3), whole[step : step + 3])
        interrupted.next_step()
    assert interrupted.epoch >= 1
    interrupted.close()


def test_a_state_of_one_rank_is_valid_on_two(source: DocumentSource) -> None:
    alone = documents(source)
    take(alone, 5)
    second = documents(source, world=World(1, 2))
    second.load_state_dict(saved(alone))
    assert torch.equal(take(second, 1)[0].inputs, take(alone, 1)[0].inputs[1::2])


def test_closing_forgets_what_was_read_ahead_and_nothing_else(source: DocumentSource) -> None:
    whole = take(documents(source), 6)
    loader = documents(source)
    assert_same(take(loader, 3) + take(loader, 3), whole)


def test_epochs_are_counted(source: DocumentSource) -> None:
    loader = documents(source, rows_per_step=16)
    progress = []
    while loader.epoch < 2:
        loader.next_step()
        progress.append(loader.progress)
    loader.close()
    assert progress == sorted(progress)
    assert progress[0] < 1.0
    total = sum(1 + len(t.encode()) for b, _ in source.documents("train", endless=False) for t in b)
    assert len(progress) == -(-2 * total // (16 * LENGTH))


@pytest.mark.parametrize("packing", ["shuffled", "best-fit"])
def test_a_state_of_another_row_length_is_refused(source: DocumentSource, packing: str) -> None:
    loader = documents(source, packing=packing, sequence_len=50)
    take(loader, 1)
    with pytest.raises(UserError, match="rows of another length than 10"):
        documents(source, packing=packing, sequence_len=10).load_state_dict(saved(loader))


def test_a_state_with_another_number_of_waiting_rows_is_refused() -> None:
    def packer(buffer_size: int) -> ShuffledPacker:
        return ShuffledPacker(NumberedFeed([50] * 40), 23, buffer_size=buffer_size, seed=1)

    packer(60).load_state_dict(packer(50).snapshot()())  # none waits before the first row
    before = packer(60)
    before.take(4)
    for other in (50, 70):
        with pytest.raises(UserError, match=f"has 60 waiting rows where {other} are shuffled"):
            packer(other).load_state_dict(before.snapshot()())


def test_rows_that_can_not_be_dealt_equally_are_refused(source: DocumentSource) -> None:
    with pytest.raises(UserError, match="5 rows a step can not be dealt to 2 ranks"):
        documents(source, rows_per_step=5, world=World(0, 2))


def test_an_unknown_packing_is_refused(source: DocumentSource) -> None:
    with pytest.raises(UserError, match="unknown packing 'tight'; use stream, shuffled, rows"):
        documents(source, packing="tight")


def test_an_error_on_the_reading_thread_reaches_the_caller(tmp_path: Path) -> None:
    write_shard(tmp_path / shard_name(0), ["text " * 200] * 40, note={})
    write_shard(tmp_path / shard_name(1), ["held out"], note={})
    loader = documents(open_source(str(tmp_path)))
    (tmp_path / shard_name(0)).unlink()
    with pytest.raises(UserError, match=rf"{shard_name(0)} is damaged or incomplete"):
        loader.next_step()
    with pytest.raises(UserError, match=shard_name(0)):
        loader.next_step()
    loader.close()


# ---- evaluation -------------------------------------------------------------------------------


def targets_of(batches: list[Batch]) -> list[int]:
    flat = torch.cat([batch.targets.flatten() for batch in batches])
    return flat[flat >= 0].tolist()


def evaluate(source: DocumentSource, num_tokens: int, **options: Any) -> list[Batch]:
    settings = {"batch_size": 3, "sequence_len": LENGTH, "world": ONE} | options
    return list(evaluation_batches(source, TOKENIZER, num_tokens=num_tokens, **settings))


def held_out_ids(source: DocumentSource) -> list[int]:
    texts = [t for batch, _ in source.documents("val", endless=False) for t in batch]
    return list(itertools.chain.from_iterable([BOS, *text.encode()] for text in texts))


@pytest.mark.parametrize("num_tokens", [1, LENGTH, LENGTH + 1, 100])
@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_evaluation_is_exactly_the_first_tokens_at_any_batch_size(
    source: DocumentSource, num_tokens: int, batch_size: int
) -> None:
    batches = evaluate(source, num_tokens, batch_size=batch_size)
    assert targets_of(batches) == held_out_ids(source)[1 : num_tokens + 1]
    assert sum(batch.num_targets for batch in batches) == num_tokens


def test_evaluation_rows_are_dealt_to_ranks_once_each(source: DocumentSource) -> None:
    whole = torch.cat([batch.targets for batch in evaluate(source, 100)])
    for rank in (0, 1, 2):
        own = evaluate(source, 100, world=World(rank, 3), batch_size=1)
        assert torch.equal(torch.cat([batch.targets for batch in own]), whole[rank::3])


def test_a_validation_split_that_is_too_short_is_used_once_and_named(
    source: DocumentSource, caplog: pytest.LogCaptureFixture
) -> None:
    ids = held_out_ids(source)
    batches = evaluate(source, 10_000)
    assert targets_of(batches) == ids[1:]
    assert f"ends after {len(ids) - 1} tokens (10000 asked for)" in caplog.text


def test_no_tokens_to_evaluate_on_is_refused(source: DocumentSource) -> None:
    with pytest.raises(UserError, match="0 tokens to evaluate on"):
        evaluate(source, 0)


# ---- conversations ----------------------------------------------------------------------------


def rendered(task: Chats, *, answered_only: bool = True) -> list[tuple[list[int], list[int]]]:
    everything = [TOKENIZER.render_conversation(task[i]) for i in range(len(task))]
    return [(ids, mask) for ids, mask in everything if any(mask) or not answered_only]


def test_an_unmasked_stream_trains_on_every_token() -> None:
    task = Chats()
    expected = list(
        itertools.chain.from_iterable(ids for ids, _ in rendered(task, answered_only=False))
    )
    batches = take(conversations(task, masked=False), 3)
    assert torch.cat([b.inputs.flatten() for b in batches]).tolist() == expected[: 12 * LENGTH]
    assert targets_of(batches) == expected[1 : 12 * LENGTH + 1]


def test_a_masked_stream_trains_on_the_assistant_only() -> None:
    task = Chats()
    pairs = [pair for ids, mask in rendered(task) for pair in zip(ids, mask, strict=True)]
    expected = [token if is_target else -1 for token, is_target in pairs]
    batches = take(conversations(task), 3)
    assert torch.cat([b.inputs.flatten() for b in batches]).tolist() == [
        token for token, _ in pairs[: 12 * LENGTH]
    ]
    targets = torch.cat([b.targets.flatten() for b in batches]).tolist()
    assert targets == expected[1 : 12 * LENGTH + 1]
    assert [b.num_targets for b in batches] == [int((b.targets >= 0).sum()) for b in batches]


def test_rows_hold_one_conversation_each_padded_without_targets() -> None:
    task = Chats()
    batches = take(conversations(task, packing="rows"), 4)
    inputs, targets = (torch.cat([getattr(b, n) for b in batches]) for n in ("inputs", "targets"))
    for row, target, (ids, mask) in zip(inputs, targets, rendered(task), strict=False):
        padding = [ASSISTANT_END] * (LENGTH - len(ids))
        assert row.tolist() == ids + padding
        wanted = [token if is_target else -1 for token, is_target in zip(ids, mask, strict=True)]
        assert target.tolist() == wanted[1:] + [-1] * (LENGTH - len(ids) + 1)


def test_best_fit_rows_hold_whole_conversations() -> None:
    task = Chats()
    batches = take(conversations(task, packing="best-fit", sequence_len=60), 3)
    known = {tuple(ids) for ids, _ in rendered(task)}
    num_found = 0
    for row in torch.cat([batch.inputs for batch in batches]).tolist():
        assert row[0] == BOS
        starts = [i for i, token in enumerate(row) if token == BOS] + [len(row)]
        pieces = [tuple(row[a:b]) for a, b in itertools.pairwise(starts)]
        # The last input is not in the row, and padding repeats the end of the last conversation.
        for piece in pieces[:-1]:
            assert piece in known
            num_found += 1
    assert num_found > 12  # more conversations than rows
    assert all((batch.targets >= 0).any(dim=1).all() for batch in batches)


def test_a_conversation_longer_than_its_row_is_cut() -> None:
    task = [chat("question", "a" * 100)]
    batch = take(conversations(task, packing="rows", rows_per_step=1), 1)[0]
    ids, _ = TOKENIZER.render_conversation(task[0])
    assert batch.inputs[0].tolist() == ids[:LENGTH]
    assert batch.targets[0, -1] == ids[LENGTH]


@pytest.mark.parametrize("packing", ["rows", "best-fit"])
def test_rows_without_a_target_are_left_out_and_counted(
    packing: str, caplog: pytest.LogCaptureFixture
) -> None:
    batches = take(conversations(Chats(), packing=packing, rows_per_step=2), 40)
    assert all((batch.targets >= 0).any(dim=1).all() for batch in batches)
    assert "5 of 40 conversations have no token to train on" in caplog.text


def test_a_stream_step_without_a_target_is_passed_over() -> None:
    task = [chat("q" * 100, "a"), chat("r" * 10, "b" * 30)]
    batches = take(conversations(task, rows_per_step=1), 12)
    assert all(batch.num_targets > 0 for batch in batches)


def test_a_task_without_any_target_ends_in_one_sentence() -> None:
    with pytest.raises(UserError, match="none of the 3 conversations has a token to train on"):
        conversations([chat("only a question")] * 3).next_step()


def test_an_empty_task_is_refused() -> None:
    with pytest.raises(UserError, match="the task is empty"):
        conversations([])


@pytest.mark.parametrize("packing", ["stream", "rows", "best-fit"])
def test_conversations_resume_exactly_at_any_step(packing: str) -> None:
    def make() -> ConversationLoader:
        return conversations(Chats(), packing=packing)

    whole = take(make(), 40)
    interrupted = make()
    for step in range(35):
        resumed = make()
        resumed.load_state_dict(saved(interrupted))
        assert_same(take(resumed, 2), whole[step : step + 2])
        interrupted.next_step()
    assert interrupted.epoch >= 2
    interrupted.close()


@pytest.mark.parametrize("packing", ["stream", "rows", "best-fit"])
def test_two_ranks_share_the_conversations_of_one(packing: str) -> None:
    alone = take(conversations(Chats(), packing=packing), 8)
    ranks = [take(conversations(Chats(), packing=packing, world=World(r, 2)), 8) for r in (0, 1)]
    for whole, even, odd in zip(alone, *ranks, strict=True):
        assert torch.equal(whole.targets[0::2], even.targets)
        assert torch.equal(whole.targets[1::2], odd.targets)
        assert whole.num_targets == even.num_targets == odd.num_targets
        assert whole.num_targets == int((whole.targets >= 0).sum())


def test_an_epoch_of_rows_ends_with_the_last_conversation() -> None:
    loader = conversations(Chats(35), packing="rows", rows_per_step=5)
    epochs = []
    for _ in range(12):
        loader.next_step()
        epochs.append(loader.epoch)
    loader.close()
    assert epochs == [0] * 5 + [1] * 6 + [2]  # 30 of the 35 conversations have an answer


@pytest.mark.parametrize("packing", ["stream", "rows"])
@pytest.mark.parametrize("batch_size", [1, 7])
def test_conversation_evaluation_covers_each_target_once(packing: Any, batch_size: int) -> None:
    task = Chats()
    batches = conversation_evaluation_batches(
        task,
        TOKENIZER,
        num_tokens=50,
        batch_size=batch_size,
        sequence_len=LENGTH,
        world=ONE,
        masked=True,
        packing=packing,
    )
    wanted = [t for ids, mask in rendered(task) for t, m in zip(ids, mask, strict=True) if m]
    assert targets_of(list(batches)) == wanted[:50]
