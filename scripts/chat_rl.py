"""Improve a chat model by reinforcement: it answers questions, right answers become likelier.

python -m scripts.chat_rl --num_iterations=100
python -m scripts.chat_rl --task=SpellingBee --examples_per_step=32 --num_samples=8
torchrun --standalone --nproc_per_node=8 -m scripts.chat_rl -- --tasks=public
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from nanochat import checkpoint_manager, configurator, runtime, task_eval
from nanochat.common import UserError
from nanochat.dataset import check_data
from nanochat.lineage import LINEAGE, lineage
from nanochat.rollouts import RolloutLoader, RolloutSettings, check_prompts, check_task, pass_at_k
from nanochat.runtime import Runtime
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
from nanochat.tokenizer import Tokenizer
from nanochat.training import Hook, Trainer
from tasks import mixtures
from tasks.common import Task
from tasks.task_sets import choose_task_set, require_files, task_named

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Config(StageConfig):
    """Flags of chat_rl."""

    source: Literal["sft", "mid"] = "sft"
    """Stage of the model to start from."""
    step: Annotated[int | None, tyro.conf.arg(aliases=["--model-step"])] = None
    """Checkpoint to start from; default: the newest."""
    tasks: Literal["embedded", "public", "auto"] | None = None
    """Whose questions; default: those of the data, or as the model was trained before."""
    task: str | None = None
    """What to practise; default: the first of the task set, WordProblems or GSM8K."""
    num_epochs: int = 1
    """Passes over the task, if --num-iterations is -1."""
    examples_per_step: int = 16
    """Questions of one optimizer step."""
    num_samples: int = 16
    """Answers to each question."""
    max_new_tokens: int = 256
    """Longest answer."""
    temperature: float = 1.0
    """Of the answers, in practice and in evaluation."""
    top_k: int = 50
    """Sample from the k likeliest tokens; 0 = off."""
    kl_weight: float = 0.0
    """Reward that a token costs for each nat it is likelier than at the start; 0 = off."""
    device_batch_size: int = 8
    """Rows of one forward pass on each device."""
    init_lr_frac: float = 0.05
    """Multiplies all learning rates."""
    warmdown_ratio: float | None = 1.0
    """Share of the run over which learning rates fall at its end."""
    eval_every: int = 60
    """Steps between evaluations; 0 = only at the end, -1 = never."""
    eval_examples: int = 400
    """Held-out questions of an evaluation."""
    eval_samples: int = 8
    """Answers to each of them: pass@k is measured for k from 1 to this."""
    save_every: int = 60
    """Steps between checkpoints; 0 or -1 = only at the end."""
    compile: str = "off"
    """Compile the step: on, off or auto; rows are padded to the context then."""

    def rollouts(self) -> RolloutSettings:
        """The part about questions and answers; UserError for what has no meaning."""
        return RolloutSettings(
            examples_per_step=self.examples_per_step,
            num_samples=self.num_samples,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            kl_weight=self.kl_weight,
            seed=self.seed,
        )


def main(config: Config) -> int:
    """Train from an sft or mid checkpoint to an rl checkpoint."""
    check_numbers(config)
    check_positive(config, "device_batch_size", "num_epochs", "eval_examples", "eval_samples")
    check_count(config, "num_iterations", "--num-epochs passes over the questions")
    if config.data is not None:
        check_data(config.data)
    settings = config.rollouts()
    if config.shard != "optimizer":
        raise UserError(
            f"--shard={config.shard}: answers are written with whole weights, which every rank "
            "must hold; leave --shard out"
        )
    with runtime.start(config.device_type, dtype=config.dtype, seed=config.seed) as rt:
        parent = checkpoint_manager.find_checkpoint(config.source, config.model_tag, config.step)
        data = config.data or parent.state["data"]
        tasks = choose_task_set(config.tasks, data=data, recorded=parent.state.get("tasks"))
        practice, held_out = choose(mixtures.rl_tasks(tasks), config.task)
        require_files("rl", (practice, held_out))
        check_task(practice)
        tokenizer = Tokenizer.from_directory(parent.path)
        model = load_parent(parent).to(rt.device)
        reference = None
        if config.kl_weight:
            reference = load_parent(parent).to(rt.device).cast_matrices(rt.compute_dtype)
        loader = RolloutLoader(
            model,
            tokenizer,
            practice,
            settings=settings,
            world=rt.world,
            reference=reference,
            row_length=None if config.compile == "off" else model.config.sequence_len,
        )
        logger.info(
            "practice: %s, %d questions x %d answers of at most %d tokens a step",
            practice.name,
            settings.examples_per_step,
            settings.num_samples,
            settings.max_new_tokens,
        )
        num_iterations = config.num_iterations
        if num_iterations <= 0:
            steps = max(1, len(practice) // settings.examples_per_step)
            num_iterations = config.num_epochs * steps
        # All that will be asked, before an earlier run is moved out of the way.
        context = model.config.sequence_len
        num_questions = num_iterations * settings.examples_per_step
        check_prompts(practice, num_questions, tokenizer, context=context)
        if config.eval_every >= 0:
            check_prompts(held_out, config.eval_examples, tokenizer, context=context)
        return train_stage(
            config,
            stage="rl",
            title="Chat RL",
            runtime=rt,
            model=model,
            tokenizer=tokenizer,
            tokenizer_dir=parent.path,
            loader=loader,
            rows_per_step=settings.examples_per_step * settings.num_samples,
            num_iterations=num_iterations,
            hooks=[Hook("pass@k", config.eval_every, evaluation(config, held_out, tokenizer, rt))],
            facts={
                "data": data,
                "tasks": tasks,
                "task": practice.name,
                "parent": origin(parent, config.source),
                LINEAGE: lineage(parent, stage="rl", tasks=tasks, task=practice.name),
            },
            optimizer=optimizer_of(parent),
        )


def choose(pairs: dict[str, tuple[Task, Task]], name: str | None) -> tuple[Task, Task]:
    """The named pair of training and held-out task, None for the first; UserError otherwise."""
    if name is None:
        return next(iter(pairs.values()))
    try:
        return pairs[task_named(name, pairs, what="task to practise")]
    except UserError as error:
        raise UserError(f"{error}; --tasks chooses another set") from None


def evaluation(
    config: Config, task: Task, tokenizer: Tokenizer, rt: Runtime
) -> Callable[[Trainer], dict[str, float]]:
    """The action of a hook that measures pass@k on held-out questions."""
    most = config.eval_samples

    def measure(trainer: Trainer) -> dict[str, float]:
        result = task_eval.run_generative(
            task,
            tokenizer,
            trainer.model,
            sampling=task_eval.Sampling(
                num_samples=most,
                max_new_tokens=config.max_new_tokens,
                temperature=config.temperature,
                top_k=config.top_k,
            ),
            max_problems=config.eval_examples,
            world=rt.world,
        )
        values = {}
        for k in range(1, most + 1):
            chances = [pass_at_k(most, sum(record.verdicts), k) for record in result.records]
            values[f"pass_at_{k}"] = rt.world.sum(sum(chances)) / result.num_problems
        logger.info(
            "step %d  %s pass@1 %.1f %%  pass@%d %.1f %%  (%d held-out questions)",
            trainer.state.step,
            task.name,
            100 * values["pass_at_1"],
            most,
            100 * values[f"pass_at_{most}"],
            result.num_problems,
        )
        return values

    return measure


if __name__ == "__main__":
    configurator.run(main, Config)
