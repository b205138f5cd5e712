"""How CORE decides items: token sequences in, losses of their answers out, in batches.

Three things make it fast: sequences of similar length share a batch, what the options of an item
have in common is read once, and where the hardware is fast at a lower precision, that decides what
is clear. None may change a decision: whatever is nearly undecided is scored again in float32, and
what is then still nearly equal one sequence at a time.

Legend: N = sequences of a batch, T = positions of the longest, C = model width, V = vocabulary,
P = scored positions of a batch.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from nanochat.branches import Branches
from nanochat.common import no_numbers
from nanochat.core_bundle import CoreTask, Item
from nanochat.core_tokens import Tokenizer, TokenSequence, common_prefix, sequences_of
from nanochat.gpt import GPT

# Padded tokens of one forward pass. On a CPU the states must stay in its cache: 1 or 2 sequences
# of 574 tokens take 56 ms each at depth 4, 8 of them 74 ms (2026-11-21).
CPU_TOKENS_PER_BATCH = 1_536
TOKENS_PER_BATCH = 16_384
HEAD_ROWS = 512  # positions whose logits are held at once
# Kernels sum in another order for another shape. In fp32 that moved mean losses of a depth-4 model
# by up to 2e-6 (2026-11-21); decisions nearer than fifty times that are taken again.
NEAR_TIE = 1e-4
# In bf16 losses moved by 0.01 to 0.02 at most and logits by 0.06, where half of the leads were
# beyond 0.5 and 10 (2026-11-21). An item's lead decides where it is four times what any item of
# its group was seen to move; `_CHECKED` items of each group are looked at in any case.
LOW_PRECISION_TIE = 0.04
_SAFETY, _CHECKED = 4.0, 4
_SHORTEST_SHARED = 16  # tokens in common from which on reading them once saves time


class LanguageModel(Protocol):
    """What CORE needs of a model; `GptModel` is one."""

    device: torch.device
    max_length: int
    """Tokens it can read at once."""
    can_branch: bool
    """Whether it reads the common beginning of several sequences once: has `branch_logits`."""

    @property
    def exact(self) -> LanguageModel | None:
        """The same model in float32 where this one is a less precise copy; it has the last word."""
        ...

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
class _Score:
    """Mean loss of a sequence's scored tokens, and by how much each was the likeliest."""

    loss: float
    margin: float
    """Least difference between a scored token's logit and the best other one."""


class GptModel:
    """A `GPT` as CORE sees it."""

    def __init__(self, model: GPT, exact: GptModel | None = None) -> None:
        self.model = model
        self.exact = exact
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
    """Whether the model is right on each of the given items.

    NotScoredError when its logits are no numbers: every comparison would then be false.
    """
    options = sequences_of(tokenizer, task, items, indices, max_length=model.max_length)
    with torch.inference_mode():
        scores = _settled(model, task, options, padding=tokenizer.bos_id)
    for index, scored in zip(indices, scores, strict=True):
        if any(math.isnan(score.loss) for score in scored):
            raise no_numbers(f"{task.label}, item {index} of the shuffled order")
    if task.kind == "language_modeling":
        return [scored[0].margin >= 0 for scored in scores]
    losses = [[score.loss for score in scored] for scored in scores]
    return [
        row.index(min(row)) == items[index]["gold"]
        for row, index in zip(losses, indices, strict=True)
    ]


def count_tokens(
    model: LanguageModel,
    tokenizer: Tokenizer,
    task: CoreTask,
    items: Sequence[Item],
    indices: Sequence[int],
) -> tuple[int, int]:
    """Tokens of the given items one sequence at a time, and those that `decide` reads."""
    options = sequences_of(tokenizer, task, items, indices, max_length=model.max_length)
    apart = [sum(len(sequence.ids) for sequence in sequences) for sequences in options]
    together = [
        prefix + _num_branch_tokens(sequences, prefix) if prefix else alone
        for sequences, prefix, alone in zip(
            options, _shared_lengths(model, options), apart, strict=True
        )
    ]
    return sum(apart), sum(together)


# ---- until every decision stands -----------------------------------------------------------------


def _settled(
    model: LanguageModel, task: CoreTask, options: list[list[TokenSequence]], *, padding: int
) -> list[list[_Score]]:
    """The scores of every item's sequences, precise wherever a decision hangs on it."""
    scores = _score(model, options, padding=padding)
    leads = [_lead(task, scored) for scored in scores]
    if model.exact is None:
        for i in (i for i, lead in enumerate(leads) if lead < NEAR_TIE):
            scores[i] = [_score_alone(model, sequence) for sequence in options[i]]
        return scores
    leads = [0.0 if math.isnan(lead) else lead for lead in leads]
    order = sorted(range(len(leads)), key=leads.__getitem__)
    ascending = [leads[i] for i in order]
    tolerance, done = LOW_PRECISION_TIE, 0
    while True:
        stop = max(bisect.bisect_left(ascending, tolerance), min(_CHECKED, len(order)))
        again = order[done:stop]
        if not again:
            return scores
        found = _settled(model.exact, task, [options[i] for i in again], padding=padding)
        for i, precise in zip(again, found, strict=True):
            tolerance = max(tolerance, _SAFETY * _movement(task, scores[i], precise))
            scores[i] = precise
        done = stop


def _lead(task: CoreTask, scores: Sequence[_Score]) -> float:
    """How far the decision is from another one."""
    if task.kind == "language_modeling":
        return abs(scores[0].margin)
    best, second = sorted(score.loss for score in scores)[:2]
    return second - best


def _movement(task: CoreTask, scores: Sequence[_Score], precise: Sequence[_Score]) -> float:
    """By how much an item's leads differ between two precisions, at most."""
    if task.kind == "language_modeling":
        return abs(scores[0].margin - precise[0].margin)
    moved = [a.loss - b.loss for a, b in zip(scores, precise, strict=True)]
    return max(moved) - min(moved)


# ---- from tokens to losses -----------------------------------------------------------------------


def _score(
    model: LanguageModel, options: list[list[TokenSequence]], *, padding: int
) -> list[list[_Score]]:
    """The scores of every item's sequences."""
    prefixes = _shared_lengths(model, options)
    scores: dict[tuple[int, int], _Score] = {}
    shared = [i for i, length in enumerate(prefixes) if length]
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


def _shared_lengths(model: LanguageModel, options: list[list[TokenSequence]]) -> list[int]:
    """Tokens of each item that are read once for all its sequences; 0 where that saves no time."""
    if not model.can_branch:
        return [0] * len(options)
    lengths = [_shared_length(sequences) for sequences in options]
    return [length if length >= _SHORTEST_SHARED else 0 for length in lengths]


def _shared_length(sequences: list[TokenSequence]) -> int:
    """Tokens that all sequences of an item begin with; 0 for a single sequence."""
    if len(sequences) == 1:
        return 0
    # The token before the first scored one is needed, and may be the last of the beginning.
    shared = common_prefix([sequence.ids for sequence in sequences])
    return min(shared, *(sequence.start for sequence in sequences))


def _num_branch_tokens(sequences: list[TokenSequence], prefix: int) -> int:
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
    model: LanguageModel, items: list[list[TokenSequence]], prefixes: list[int]
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


def _score_batch(
    model: LanguageModel, sequences: list[TokenSequence], padding: int
) -> list[_Score]:
    """Sequences that are read whole, padded on the right."""
    longest = max(len(sequence.ids) for sequence in sequences)
    ids = torch.tensor([s.ids + [padding] * (longest - len(s.ids)) for s in sequences])
    counts = [s.end - s.start for s in sequences]
    rows = torch.arange(len(sequences)).repeat_interleave(torch.tensor(counts))
    positions = torch.cat([torch.arange(s.start - 1, s.end - 1) for s in sequences])
    targets = [token for s in sequences for token in s.ids[s.start : s.end]]
    return _summed(model.logits(ids, rows, positions), targets, counts)


def _score_alone(model: LanguageModel, sequence: TokenSequence) -> _Score:
    """One sequence by itself, the definition's way; what a tie is decided by."""
    logits = model.plain_logits(torch.tensor(sequence.ids))
    span = slice(sequence.start - 1, sequence.end - 1)
    targets = torch.tensor(sequence.ids[sequence.start : sequence.end], device=logits.device)
    table = logits.log_softmax(-1)[span]
    loss = -table.gather(1, targets[:, None]).mean()
    hits = logits[span].argmax(-1) == targets
    return _Score(float(loss), 0.0 if bool(hits.all()) else -NEAR_TIE)


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
