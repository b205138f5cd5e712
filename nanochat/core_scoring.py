"""How CORE decides items: token sequences in, losses of their answers out, in batches.

Two things make it fast: sequences of similar length share a batch, and what the options of an
item have in common is read once. Neither may change a decision: where two options are nearly
equal, or a token is nearly not the likeliest, the item is scored again, one sequence at a time.

Legend: N = sequences of a batch, T = positions of the longest, C = model width, V = vocabulary,
P = scored positions of a batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from nanochat.branches import Branches
from nanochat.common import UserError
from nanochat.core_bundle import CoreTask, Item
from nanochat.gpt import GPT

# Padded tokens of one forward pass. On a CPU the states must stay in its cache: 1 or 2 sequences
# of 574 tokens take 56 ms each at depth 4, 8 of them 74 ms (2026-11-21).
CPU_TOKENS_PER_BATCH = 1_536
TOKENS_PER_BATCH = 16_384
HEAD_ROWS = 512  # positions whose logits are held at once
# Kernels sum in another order for another shape. In fp32 that moved mean losses of a depth-4 model
# by up to 2e-6 (2026-11-21); decisions nearer than fifty times that are taken again.
NEAR_TIE = 1e-4
_SHORTEST_SHARED = 16  # tokens in common from which on reading them once saves time


class Tokenizer(Protocol):
    """What CORE needs of a tokenizer."""

    @property
    def bos_id(self) -> int:
        """The token in front of every text."""
        ...

    def encode_batch(self, texts: Any, *, prepend: int) -> tuple[Any, Any]:
        """Ids of all texts in one array, and where each one begins, with the end of the last."""
        ...


class LanguageModel(Protocol):
    """What CORE needs of a model; `GptModel` is one."""

    device: torch.device
    max_length: int
    """Tokens it can read at once."""
    can_branch: bool
    """Whether it reads the common beginning of several sequences once: has `branch_logits`."""

    def plain_logits(self, ids: Tensor) -> Tensor:
        """Logits fp32 (T, V) after every token of one sequence (T,), as plainly as possible."""
        ...

    def logits(self, ids: Tensor, rows: Tensor, positions: Tensor) -> Iterator[Tensor]:
        """Logits fp32 (chunk, V) at places (rows, positions) of ids (N, T), in chunks, in order."""
        ...

    def branch_logits(self, branches: Branches, places: Sequence[Place]) -> Iterator[Tensor]:
        """Logits fp32 (chunk, V) at places of branches, in chunks, in order."""
        ...


@dataclass(frozen=True)
class Place:
    """A token whose successor is scored."""

    row: int
    column: int
    """In the row of continuations."""
    is_in_prefix: bool
    """It is the last token of the beginning instead."""


@dataclass(frozen=True)
class _Sequence:
    """One text of an item; the tokens ids[start:end] are scored."""

    item: int
    ids: list[int]
    start: int
    end: int


@dataclass(frozen=True)
class _Score:
    """Mean loss of a sequence's scored tokens, and by how much each was the likeliest."""

    loss: float
    margin: float
    """Least difference between a scored token's logit and the best other one."""


class GptModel:
    """A `GPT` as CORE sees it."""

    def __init__(self, model: GPT) -> None:
        self.model = model
        self.device = model.device
        self.max_length = model.cos.size(0)
        self.can_branch = True

    def plain_logits(self, ids: Tensor) -> Tensor:
        """The model's own forward pass."""
        logits: Tensor = self.model(ids[None].to(self.device))
        return logits[0]

    def logits(self, ids: Tensor, rows: Tensor, positions: Tensor) -> Iterator[Tensor]:
        """The last block and the head see only what is asked for: prompts are long."""
        counts = torch.bincount(rows, minlength=len(ids))
        slots = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]
        columns = torch.zeros(len(ids), int(counts.max()), dtype=torch.int64)
        columns[rows, slots] = positions
        states = self.model.hidden(ids.to(self.device), columns=columns.to(self.device))
        return self._head(states[rows, slots])

    def branch_logits(self, branches: Branches, places: Sequence[Place]) -> Iterator[Tensor]:
        """Reads the beginnings, then all continuations."""
        rows = torch.tensor([place.row for place in places], device=self.device)
        columns = torch.tensor([place.column for place in places], device=self.device)
        in_prefix = torch.tensor([place.is_in_prefix for place in places], device=self.device)
        # Of a beginning, only its end predicts a token that is scored.
        first = self.model.hidden(branches.prefix_ids, branches, branches.last_columns)
        states = first.new_empty((len(places), first.size(-1)))
        states[in_prefix] = first[rows[in_prefix], 0]
        if branches.branch_ids.size(1):
            second = self.model.hidden(branches.branch_ids, branches)
            states[~in_prefix] = second[rows[~in_prefix], columns[~in_prefix]]
        return self._head(states)

    def _head(self, states: Tensor) -> Iterator[Tensor]:
        for part in torch.split(states, HEAD_ROWS):
            yield self.model.logits(part)


def decide(
    model: LanguageModel,
    tokenizer: Tokenizer,
    task: CoreTask,
    items: Sequence[Item],
    indices: Sequence[int],
) -> list[bool]:
    """Whether the model is right on each of the given items."""
    options = _sequences(tokenizer, task, items, indices, max_length=model.max_length)
    with torch.inference_mode():
        scores = _score(model, options, padding=tokenizer.bos_id)
        decisions = []
        for index, sequences, scored in zip(indices, options, scores, strict=True):
            if _is_near_tie(task, scored):
                scored = [_score_alone(model, sequence) for sequence in sequences]
            if task.kind == "language_modeling":
                decisions.append(scored[0].margin >= 0)
            else:
                losses = [score.loss for score in scored]
                decisions.append(losses.index(min(losses)) == items[index]["gold"])
    return decisions


def _is_near_tie(task: CoreTask, scores: Sequence[_Score]) -> bool:
    if task.kind == "language_modeling":
        return abs(scores[0].margin) < NEAR_TIE
    best, second = sorted(score.loss for score in scores)[:2]
    return second - best < NEAR_TIE


# ---- from items to tokens ------------------------------------------------------------------------


def _sequences(
    tokenizer: Tokenizer,
    task: CoreTask,
    items: Sequence[Item],
    indices: Sequence[int],
    *,
    max_length: int,
) -> list[list[_Sequence]]:
    """Token sequences of each item: one an option, or one for language modeling."""
    texts = [task.prompts(items, index) for index in indices]
    flat = [text for prompts in texts for text in prompts]
    ids, offsets = tokenizer.encode_batch(flat, prepend=tokenizer.bos_id)
    rows = (ids[a:b].tolist() for a, b in itertools.pairwise(offsets))
    sequences = []
    for index, prompts in zip(indices, texts, strict=True):
        options = [next(rows) for _ in prompts]
        spans = _scored_spans(task, options)
        if task.kind == "language_modeling":
            options = options[1:]
        pairs = zip(options, spans, strict=True)
        sequences.append([_cropped(task, index, *pair, max_length) for pair in pairs])
    return sequences


def _cropped(
    task: CoreTask, index: int, ids: list[int], span: tuple[int, int], max_length: int
) -> _Sequence:
    """What the model cannot hold is cut from the left."""
    (start, end), cut = span, max(len(ids) - max_length, 0)
    if not 0 < start - cut < end - cut:
        raise UserError(
            f"{task.label}, item {index} of the shuffled order: nothing is left to score "
            f"of an answer of {end - start} tokens in a sequence of {len(ids)} (the model holds "
            f"{max_length})"
        )
    return _Sequence(index, ids[cut:], start - cut, end - cut)


def _scored_spans(task: CoreTask, options: list[list[int]]) -> list[tuple[int, int]]:
    """Where the answers lie: what options do not share in front, or do share at the end.

    At least the last token of each: three items of piqa have a choice that begins another one.
    """
    longest = min(map(len, options)) - 1
    if task.kind == "multiple_choice":
        start = min(_common_prefix(options), longest)
        return [(start, len(option)) for option in options]
    if task.kind == "schema":
        length = min(_common_prefix([option[::-1] for option in options]), longest)
        return [(len(option) - length, len(option)) for option in options]
    question, whole = options
    if whole[: len(question)] != question:
        raise UserError(
            f"{task.label}: the tokens of a question do not begin those of question and answer, "
            f"so the answer has no first token; check the delimiter {task.delimiter!r}"
        )
    return [(len(question), len(whole))]


def _common_prefix(rows: Sequence[list[int]]) -> int:
    """Number of leading tokens that all rows share."""
    first = rows[0]
    shared = min(len(row) for row in rows)
    for row in rows[1:]:
        # Lists compare at the speed of C: halve the range until the first difference is found.
        low, high = 0, shared
        while low < high:
            middle = (low + high + 1) // 2
            if row[low:middle] == first[low:middle]:
                low = middle
            else:
                high = middle - 1
        shared = low
    return shared


# ---- from tokens to losses -----------------------------------------------------------------------


def _score(
    model: LanguageModel, options: list[list[_Sequence]], *, padding: int
) -> list[list[_Score]]:
    """The scores of every item's sequences."""
    prefixes = [_shared_length(sequences) if model.can_branch else 0 for sequences in options]
    scores: dict[tuple[int, int], _Score] = {}
    shared = [i for i, length in enumerate(prefixes) if length >= _SHORTEST_SHARED]
    sizes = [prefixes[i] + _num_branch_tokens(options[i], prefixes[i]) for i in shared]
    budget = CPU_TOKENS_PER_BATCH if model.device.type == "cpu" else TOKENS_PER_BATCH
    for batch in _batches(sizes, budget):
        chosen = [shared[b] for b in batch]
        found = _score_branches(model, [options[i] for i in chosen], [prefixes[i] for i in chosen])
        names = [(i, n) for i in chosen for n in range(len(options[i]))]
        scores.update(zip(names, found, strict=True))
    apart = [(i, n) for i in range(len(options)) for n in range(len(options[i]))]
    apart = [name for name in apart if name not in scores]
    for batch in _batches([len(options[i][n].ids) for i, n in apart], budget):
        names = [apart[b] for b in batch]
        found = _score_batch(model, [options[i][n] for i, n in names], padding)
        scores.update(zip(names, found, strict=True))
    return [[scores[i, n] for n in range(len(options[i]))] for i in range(len(options))]


def _shared_length(sequences: list[_Sequence]) -> int:
    """Tokens read once for all sequences of an item; 0 for a single sequence."""
    if len(sequences) == 1:
        return 0
    # The token before the first scored one is needed, and may be the last of the beginning.
    shared = _common_prefix([sequence.ids for sequence in sequences])
    return min(shared, *(sequence.start for sequence in sequences))


def _num_branch_tokens(sequences: list[_Sequence], prefix: int) -> int:
    return sum(sequence.end - 1 - prefix for sequence in sequences)


def _batches(sizes: list[int], budget: int) -> Iterator[list[int]]:
    """Indices of things of similar size, largest first, within a budget of tokens."""
    order = sorted(range(len(sizes)), key=lambda i: sizes[i], reverse=True)
    start = 0
    while start < len(order):
        stop = start + max(budget // sizes[order[start]], 1)
        yield order[start:stop]
        start = stop


def _score_branches(
    model: LanguageModel, items: list[list[_Sequence]], prefixes: list[int]
) -> list[_Score]:
    """Items whose options are read after their common beginning; scores in one row."""
    beginnings = [item[0].ids[:prefix] for item, prefix in zip(items, prefixes, strict=True)]
    # The last token of a sequence predicts nothing.
    tails = [
        [sequence.ids[prefix : sequence.end - 1] for sequence in item]
        for item, prefix in zip(items, prefixes, strict=True)
    ]
    branches = Branches(beginnings, tails, padding=0, device=model.device)
    places, targets, counts = [], [], []
    for row, (item, prefix) in enumerate(zip(items, prefixes, strict=True)):
        offset = 0
        for sequence in item:
            for position in range(sequence.start - 1, sequence.end - 1):
                # Scored tokens begin after the beginning, so only its last one can be here.
                places.append(Place(row, offset + position - prefix, position < prefix))
            offset += sequence.end - 1 - prefix
            targets += sequence.ids[sequence.start : sequence.end]
            counts.append(sequence.end - sequence.start)
    return _summed(model.branch_logits(branches, places), targets, counts)


def _score_batch(model: LanguageModel, sequences: list[_Sequence], padding: int) -> list[_Score]:
    """Sequences that are read whole, padded on the right."""
    longest = max(len(sequence.ids) for sequence in sequences)
    ids = torch.tensor([s.ids + [padding] * (longest - len(s.ids)) for s in sequences])
    counts = [s.end - s.start for s in sequences]
    rows = torch.arange(len(sequences)).repeat_interleave(torch.tensor(counts))
    positions = torch.cat([torch.arange(s.start - 1, s.end - 1) for s in sequences])
    targets = [token for s in sequences for token in s.ids[s.start : s.end]]
    return _summed(model.logits(ids, rows, positions), targets, counts)


def _score_alone(model: LanguageModel, sequence: _Sequence) -> _Score:
    """One sequence by itself, the definition's way; what a tie is decided by."""
    logits = model.plain_logits(torch.tensor(sequence.ids))
    span = slice(sequence.start - 1, sequence.end - 1)
    targets = torch.tensor(sequence.ids[sequence.start : sequence.end], device=logits.device)
    table = logits.log_softmax(-1)[span]
    loss = -table.gather(1, targets[:, None]).mean()
    hits = logits[span].argmax(-1) == targets
    return _Score(float(loss), 0.0 if bool(hits.all()) else -1.0)


def _summed(logits: Iterator[Tensor], targets: list[int], counts: list[int]) -> list[_Score]:
    """Scores of sequences with `counts` scored tokens each, in order."""
    losses, margins, start = [], [], 0
    for part in logits:
        wanted = torch.tensor(targets[start : start + len(part)], device=part.device)
        start += len(part)
        losses.append(F.cross_entropy(part, wanted, reduction="none"))
        own = part.gather(1, wanted[:, None]).squeeze(1)
        margins.append(own - part.scatter(1, wanted[:, None], float("-inf")).amax(-1))
    loss, margin = torch.cat(losses).cpu(), torch.cat(margins).cpu()
    # Sums of one sequence after the other, so that its mean is independent of the batch.
    parts = zip(torch.split(loss, counts), torch.split(margin, counts), strict=True)
    return [_Score(float(part.mean()), float(least.min())) for part, least in parts]
