"""CORE: few-shot accuracy of a base model over the tasks of a bundle, centered by chance.

The definition is that of DCLM (arXiv:2406.11794, section 3.5): centered accuracy is 0 at chance
and 1 at perfection, CORE is its plain mean over tasks. A slow implementation that scores one
sequence at a time is in tests/reference; every decision here must equal the one there.

Legend: N = sequences of a batch, T = positions of the longest, C = model width.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from nanochat.common import UserError
from nanochat.core_bundle import CoreTask, Item, load_bundle
from nanochat.gpt import GPT, softcap
from nanochat.runtime import Runtime, World
from nanochat.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# Items tokenized together: enough that sorting by length leaves little padding in a batch.
ITEMS_PER_GROUP = 512
# Padded tokens of one forward pass: keeps the states of a depth-4 model within a few MB.
TOKENS_PER_BATCH = 16_384
HEAD_ROWS = 512  # positions whose logits are held at once


@dataclass(frozen=True)
class TaskScore:
    """How a model did on one task."""

    label: str
    accuracy: float
    centered: float
    num_items: int
    seconds: float
    decisions: tuple[bool, ...]
    """Right or wrong, for the items rank, rank + world, ... of this rank."""


@dataclass(frozen=True)
class CoreResult:
    """Scores of the tasks whose items are there, and the labels of those whose are not."""

    tasks: tuple[TaskScore, ...]
    missing: tuple[str, ...]

    @property
    def core(self) -> float:
        """Mean centered accuracy of the scored tasks."""
        return sum(task.centered for task in self.tasks) / len(self.tasks)

    @property
    def is_partial(self) -> bool:
        """Whether tasks are missing, so that `core` compares with no complete CORE."""
        return bool(self.missing)

    @property
    def label(self) -> str:
        """The name `core` must be shown under."""
        if not self.is_partial:
            return "CORE"
        return f"CORE (partial, {len(self.tasks)} of {len(self.tasks) + len(self.missing)} tasks)"

    def to_csv(self) -> str:
        """Padded columns Task, Accuracy, Centered; the last row is CORE."""
        lines = [f"{'Task':<35}, {'Accuracy':<10}, {'Centered':<10}"]
        lines += [f"{t.label:<35}, {t.accuracy:<10.6f}, {t.centered:<10.6f}" for t in self.tasks]
        # No comma inside the label: it is a column.
        lines.append(f"{self.label.replace(',', ''):<35}, {'':<10}, {self.core:<10.6f}")
        return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class _Sequence:
    """One text of an item; the tokens ids[start:end] are scored."""

    item: int
    ids: list[int]
    start: int
    end: int


def evaluate_core(
    model: GPT, tokenizer: Tokenizer, bundle_dir: Path, max_per_task: int, runtime: Runtime
) -> CoreResult:
    """Score every task of a bundle, each on its first `max_per_task` items if that is > 0.

    All ranks take part and get the same result. UserError for a broken bundle; a task without
    item file is named in the log and in the result.
    """
    tasks = load_bundle(bundle_dir)
    present = [task for task in tasks if task.path.exists()]
    missing = tuple(task.label for task in tasks if not task.path.exists())
    if not present:
        raise UserError(f"no task of {bundle_dir / 'core.yaml'} has its file in eval_data")
    if missing:
        logger.warning("CORE is partial: no items for %s", ", ".join(missing))
    # Read at once: a broken file of the last task must not cost the time of all before.
    items = [task.items(max_per_task) for task in present]
    scores = []
    for number, (task, task_items) in enumerate(zip(present, items, strict=True), 1):
        score = evaluate_task(model, tokenizer, task, task_items, runtime.world)
        scores.append(score)
        logger.info(
            "%d/%d %s  %d-shot  accuracy %.4f  centered %+.4f  %.1f s",
            *(number, len(present), task.label, task.num_shots),
            *(score.accuracy, score.centered, score.seconds),
        )
    return CoreResult(tuple(scores), missing)


def evaluate_task(
    model: GPT, tokenizer: Tokenizer, task: CoreTask, items: Sequence[Item], world: World
) -> TaskScore:
    """Score one task; rank r decides the items r, r + world, ..."""
    started = time.perf_counter()
    indices = range(world.rank, len(items), world.size)
    was_training = model.training
    model.eval()
    decisions: list[bool] = []
    for start in range(0, len(indices), ITEMS_PER_GROUP):
        group = indices[start : start + ITEMS_PER_GROUP]
        decisions += decide(model, tokenizer, task, items, group)
    model.train(was_training)
    accuracy = world.sum(sum(decisions)) / len(items)
    return TaskScore(
        label=task.label,
        accuracy=accuracy,
        centered=task.center(accuracy),
        num_items=len(items),
        seconds=time.perf_counter() - started,
        decisions=tuple(decisions),
    )


def decide(
    model: GPT, tokenizer: Tokenizer, task: CoreTask, items: Sequence[Item], indices: Sequence[int]
) -> list[bool]:
    """Whether the model is right on each of the given items."""
    sequences = _sequences(tokenizer, task, items, indices, max_length=model.cos.size(0))
    losses, exact = _score(model, sequences, padding=tokenizer.bos_id)
    if task.kind == "language_modeling":
        return exact
    by_item: dict[int, list[float]] = {index: [] for index in indices}
    for sequence, loss in zip(sequences, losses, strict=True):
        by_item[sequence.item].append(loss)
    return [by_item[index].index(min(by_item[index])) == items[index]["gold"] for index in indices]


def _sequences(
    tokenizer: Tokenizer,
    task: CoreTask,
    items: Sequence[Item],
    indices: Sequence[int],
    *,
    max_length: int,
) -> list[_Sequence]:
    """Token sequences of the items, in order; one an option, or one for language modeling."""
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
        for option, (start, end) in zip(options, spans, strict=True):
            # What the model cannot hold is cut from the left.
            cut = max(len(option) - max_length, 0)
            if not 0 < start - cut < end - cut:
                raise UserError(
                    f"{task.label}, item {index} of the shuffled order: nothing is left to score "
                    f"of an answer of {end - start} tokens in a sequence of {len(option)}"
                )
            sequences.append(_Sequence(index, option[cut:], start - cut, end - cut))
    return sequences


def _scored_spans(task: CoreTask, options: list[list[int]]) -> list[tuple[int, int]]:
    """Where the answers lie: what options do not share in front, or do share at the end."""
    if task.kind == "multiple_choice":
        start = _common_prefix(options)
        return [(start, len(option)) for option in options]
    if task.kind == "schema":
        length = _common_prefix([option[::-1] for option in options])
        return [(len(option) - length, len(option)) for option in options]
    question, whole = options
    if whole[: len(question)] != question:
        raise UserError(
            f"{task.label}: the tokens of a question do not begin those of question and answer, "
            f"so the answer has no first token; check the delimiter {task.delimiter!r}"
        )
    return [(len(question), len(whole))]


def _common_prefix(rows: list[list[int]]) -> int:
    """Number of leading tokens that all rows share."""
    length = 0
    for column in zip(*rows, strict=False):
        if any(token != column[0] for token in column):
            break
        length += 1
    return length


def _score(
    model: GPT, sequences: list[_Sequence], *, padding: int
) -> tuple[list[float], list[bool]]:
    """Mean loss of each sequence's scored tokens, and whether all of them are the likeliest."""
    losses, exact = [0.0] * len(sequences), [False] * len(sequences)
    for batch in _batches(sequences):
        chosen = [sequences[i] for i in batch]
        batch_losses, batch_exact = _score_batch(model, chosen, padding)
        for i, loss, is_exact in zip(batch, batch_losses, batch_exact, strict=True):
            losses[i], exact[i] = loss, is_exact
    return losses, exact


def _batches(sequences: list[_Sequence]) -> Iterator[list[int]]:
    """Indices of sequences of similar length, longest first, within the token budget."""
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i].ids), reverse=True)
    start = 0
    while start < len(order):
        longest = len(sequences[order[start]].ids)
        stop = start + max(TOKENS_PER_BATCH // longest, 1)
        yield order[start:stop]
        start = stop


@torch.inference_mode()
def _score_batch(
    model: GPT, sequences: list[_Sequence], padding: int
) -> tuple[list[float], list[bool]]:
    """Only the scored positions meet the head: few-shot prompts are long, answers short."""
    longest = max(len(sequence.ids) for sequence in sequences)
    ids = torch.tensor(
        [s.ids + [padding] * (longest - len(s.ids)) for s in sequences], device=model.device
    )
    counts = torch.tensor([s.end - s.start for s in sequences], device=model.device)
    rows = torch.arange(len(sequences), device=model.device).repeat_interleave(counts)
    positions = torch.cat([torch.arange(s.start, s.end) for s in sequences]).to(model.device)
    states = model.hidden(ids)[rows, positions - 1]
    losses, hits = _head(model, states, ids[rows, positions])
    # Sums of one sequence after the other, so that a sequence's mean is independent of the batch.
    parts = torch.split(losses, counts.tolist()), torch.split(hits, counts.tolist())
    means = [float(part.mean()) for part in parts[0]]
    return means, [bool(part.all()) for part in parts[1]]


def _head(model: GPT, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and hits of targets (P,) predicted from states (P, C)."""
    losses, hits = [], []
    chunks = torch.split(states, HEAD_ROWS), torch.split(targets, HEAD_ROWS)
    for part, wanted in zip(*chunks, strict=True):
        logits = softcap(model.lm_head(part))
        losses.append(F.cross_entropy(logits, wanted, reduction="none"))
        hits.append(logits.argmax(dim=-1) == wanted)
    return torch.cat(losses), torch.cat(hits)
