"""Training on conversations: what midtraining and finetuning share beyond `stage`.

They differ in their mixture, in which tokens count, in how rows are filled, and in learning rates;
all of that arrives here as settings.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro

from nanochat import checkpoint_manager, report, task_eval
from nanochat.answers import plain_text
from nanochat.common import UserError, sha256_file
from nanochat.conversation import Conversation
from nanochat.dataloader import Batch, ConversationLoader, conversation_evaluation_batches
from nanochat.engine import Engine
from nanochat.gpt import GPT
from nanochat.inheritance import check_warm_start
from nanochat.lineage import LINEAGE, lineage
from nanochat.packing import Task
from nanochat.runtime import Runtime, World
from nanochat.stage import (
    StageConfig,
    check_count,
    check_numbers,
    check_positive,
    load_parent,
    optimizer_of,
    origin,
    train_stage,
)
from nanochat.task_scores import Accuracies, ChatCore, TaskScores
from nanochat.tokenizer import Tokenizer
from nanochat.training import Hook, Trainer
from nanochat.validation import Validation

logger = logging.getLogger(__name__)

NUM_SAMPLES, SAMPLE_TOKENS = 2, 48  # answers shown when the stage ends
SAMPLE_SIZE = 1000  # conversations rendered to estimate the mean length; 1 % error is plenty


@dataclass(frozen=True)
class ConversationStageConfig(StageConfig):
    """Flags of a stage that trains on conversations."""

    step: Annotated[int | None, tyro.conf.arg(aliases=["--model-step"])] = None
    """Checkpoint to start from; default: the newest."""
    tasks: Literal["embedded", "public", "auto"] | None = None
    """Whose conversations: embedded, public, auto (public if they are here); default: by data."""
    chats: str | None = None
    """Files of conversations (JSONL) in the place of SmolTalk, joined with commas."""
    max_seq_len: int | None = None
    """Context in tokens; default: the model's."""
    eval_steps: int | None = None
    """Validation by batches of --device-batch-size rows, instead of --eval-tokens."""
    num_epochs: int = 1
    """Passes over the mixture, if --num-iterations is -1."""
    masked: bool = False
    """Only what the assistant says is a target; otherwise every token is."""
    packing: Literal["stream", "rows", "best-fit"] = "stream"
    """How conversations fill rows: end to end, one a row, or several whole ones a row."""
    eval_metrics_every: int = -1
    """Steps between accuracies on the multiple-choice tasks; 0 or -1 = never."""
    eval_metrics_max_problems: int = 1024
    """Problems of each such task."""
    chatcore_every: int = -1
    """Steps between measurements of ChatCORE; 0 or -1 = never."""
    chatcore_max_cat: int = -1
    """Problems of each of its multiple-choice tasks; -1 = all."""
    chatcore_max_sample: int = 24
    """Problems of each of its tasks whose answers are written; -1 = all."""
    load_optimizer: bool = False
    """Begin with the optimizer state of the checkpoint: momentum and moments, no learning rates."""


def check_flags(config: ConversationStageConfig) -> None:
    """Raise UserError for numbers that mean nothing; before a device or a checkpoint is touched."""
    check_numbers(config)
    check_positive(config, "num_epochs")
    if config.max_seq_len is not None:
        check_positive(config, "max_seq_len")
    check_count(config, "num_iterations", "--num-epochs passes over the conversations")
    check_count(config, "chatcore_max_cat", "all problems")
    check_count(config, "chatcore_max_sample", "all problems")


def train_on_conversations(
    config: ConversationStageConfig,
    *,
    stage: str,
    title: str,
    source: str,
    rows_per_step: int,
    task_set: str,
    chats: Sequence[str],
    train_task: Task,
    validation_task: Task,
    metric_tasks: Sequence[task_eval.Task],
    chat_tasks: Sequence[task_eval.Task],
    parent: checkpoint_manager.Checkpoint,
    runtime: Runtime,
    record: Mapping[str, Any] | None = None,
) -> int:
    """Train `parent`'s model on `train_task`; returns the exit code.

    source: the stage that parent came from. rows_per_step: rows of one optimizer step.
    task_set: name of the tasks, and chats: files of conversations among them, for later stages.
    chat_tasks: all tasks of ChatCORE. record: what else the lineage says of this stage.
    """
    if config.load_optimizer:
        check_warm_start(parent, config)
    if rows_per_step % (config.device_batch_size * runtime.world.size):
        raise UserError(
            f"{rows_per_step} rows a step are not a multiple of --device-batch-size "
            f"{config.device_batch_size} x {runtime.world.size} ranks; change one of them"
        )
    tokenizer = Tokenizer.from_directory(parent.path)
    model = load_parent(parent, config.max_seq_len).to(runtime.device)
    sequence_len = model.config.sequence_len
    token_bytes = torch.from_numpy(tokenizer.token_bytes).to(runtime.device)
    eval_tokens = config.eval_tokens
    if config.eval_steps is not None:
        eval_tokens = config.eval_steps * config.device_batch_size * sequence_len
    mean_length, digits = _sample(train_task, tokenizer, sequence_len, chats)
    num_iterations = config.num_iterations
    if num_iterations <= 0:
        steps = _steps_per_epoch(config, len(train_task), mean_length, rows_per_step, sequence_len)
        num_iterations = config.num_epochs * steps

    def validation_batches() -> Iterator[Batch]:
        return conversation_evaluation_batches(
            validation_task,
            tokenizer,
            num_tokens=eval_tokens,
            batch_size=config.device_batch_size,
            sequence_len=sequence_len,
            world=runtime.world,
            masked=config.masked,
            packing="stream",
        )

    def sample(trainer: Trainer) -> dict[str, float]:
        if runtime.world.is_main:
            for question, answer in sample_answers(trainer.model, tokenizer, validation_task):
                logger.info("sample: %s -> %s", question, answer)
        return {}

    hooks = [
        Hook(
            "validation",
            config.eval_every,
            Validation(validation_batches, token_bytes, runtime.world, config.bpb_limit),
            judges=True,
        ),
        Hook("samples", 0, sample),
    ]
    hooks += _score_hooks(
        config,
        tokenizer,
        metric_tasks,
        chat_tasks,
        label=report.score_name("ChatCORE", task_set),
        context=sequence_len,
        world=runtime.world,
    )
    loader = ConversationLoader(
        train_task,
        tokenizer,
        rows_per_step=rows_per_step,
        sequence_len=sequence_len,
        world=runtime.world,
        masked=config.masked,
        packing=config.packing,
        pin_memory=runtime.device.type == "cuda",
    )
    return train_stage(
        config,
        stage=stage,
        title=title,
        runtime=runtime,
        model=model,
        tokenizer=tokenizer,
        tokenizer_dir=parent.path,
        loader=loader,
        rows_per_step=rows_per_step,
        num_iterations=num_iterations,
        hooks=hooks,
        facts={
            "data": config.data or parent.state["data"],
            "tasks": task_set,
            "conversations": digits,
            "parent": origin(parent, source),
            LINEAGE: lineage(
                parent,
                stage=stage,
                tasks=task_set,
                chats=[str(Path(path).absolute()) for path in chats],
                **(record or {}),
            ),
        },
        optimizer=optimizer_of(parent),
        warm_start=parent if config.load_optimizer else None,
        dry_run_trains=stage == "mid",  # what --dry_run has always meant in midtraining
    )


def sample_answers(model: GPT, tokenizer: Tokenizer, task: Task) -> list[tuple[str, str]]:
    """The first questions of a task with the model's greedy answers, each on one line."""
    asked: list[tuple[str, list[int]]] = []
    for index in range(min(NUM_SAMPLES, len(task))):
        messages = task[index].messages
        end = next(i for i, m in enumerate(messages) if m.role == "assistant") + 1
        prompt = tokenizer.render_for_completion(Conversation(messages[:end]))
        if len(prompt) + SAMPLE_TOKENS <= model.config.sequence_len:
            asked.append((messages[end - 2].text, prompt))
    if not asked:
        return []
    prompts = [prompt for _, prompt in asked]
    answers = Engine(model, tokenizer).complete(prompts, max_tokens=SAMPLE_TOKENS, temperature=0.0)
    return [
        (" ".join(question.split()), " ".join(plain_text(tokenizer, answer).split()))
        for (question, _), answer in zip(asked, answers, strict=True)
    ]


def _score_hooks(
    config: ConversationStageConfig,
    tokenizer: Tokenizer,
    metric_tasks: Sequence[task_eval.Task],
    chat_tasks: Sequence[task_eval.Task],
    *,
    label: str,
    context: int,
    world: World,
) -> list[Hook]:
    """What is measured besides bits per byte, of the tasks that a model with that context can do.

    label: what ChatCORE is shown as.
    """
    hooks = []
    rows = config.device_batch_size
    if config.eval_metrics_every > 0:
        scores = TaskScores(tokenizer, world, rows, lambda task: config.eval_metrics_max_problems)
        action = Accuracies(scores, scores.measurable(metric_tasks, context=context))
        hooks.append(Hook("tasks", config.eval_metrics_every, action, at_start=False))
    if config.chatcore_every > 0:
        limits = {
            "categorical": config.chatcore_max_cat,
            "generative": config.chatcore_max_sample,
        }
        scores = TaskScores(tokenizer, world, rows, lambda task: limits[task.eval_type])
        core = ChatCore(
            scores,
            scores.measurable(chat_tasks, context=context),
            kinds={task.name: task.eval_type for task in chat_tasks},
            label=label,
            scope="".join(
                f", {most} problems a {kind} task" for kind, most in limits.items() if most > 0
            ),
        )
        hooks.append(Hook("ChatCORE", config.chatcore_every, core, at_start=False))
    return hooks


def _sample(
    task: Task, tokenizer: Tokenizer, sequence_len: int, chats: Sequence[str]
) -> tuple[float, str]:
    """Mean length of the conversations in tokens, and eight digits by which to recognise them.

    Both are of a sample; the digits are of all own files, too.
    """
    digest = hashlib.sha256(str(len(task)).encode())
    lengths = []
    for index in range(0, len(task), max(1, len(task) // SAMPLE_SIZE)):
        rendered = tokenizer.render_conversation(task[index], max_tokens=sequence_len)
        lengths.append(len(rendered[0]))
        digest.update(np.array(rendered, np.int32).tobytes())
    for path in chats:
        digest.update(sha256_file(Path(path)).encode())
    return sum(lengths) / max(1, len(lengths)), digest.hexdigest()[:8]


def _steps_per_epoch(
    config: ConversationStageConfig,
    num_conversations: int,
    mean_length: float,
    rows_per_step: int,
    sequence_len: int,
) -> int:
    """Optimizer steps of one pass over the conversations; estimated unless one row is one."""
    if config.packing == "rows":
        return math.ceil(num_conversations / rows_per_step)
    return max(1, round(mean_length * num_conversations / (rows_per_step * sequence_len)))
