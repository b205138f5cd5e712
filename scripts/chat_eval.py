"""Evaluate a chat model on tasks; together they give ChatCORE.

python -m scripts.chat_eval --source=sft
python -m scripts.chat_eval -i mid -a 'GSM8K|MMLU' -x 20 --max-new-tokens=128
torchrun --standalone --nproc_per_node=8 -m scripts.chat_eval -- -i sft
"""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import tyro

from nanochat import checkpoint_manager, configurator, report, runtime
from nanochat.common import UserError, atomic_write_text
from nanochat.runtime import World
from nanochat.task_eval import Sampling, Task, TaskResult, chat_core, run_task
from tasks.mixtures import evaluation_tasks

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Config:
    """Flags of chat_eval."""

    source: Annotated[Literal["base", "mid", "sft", "rl"], tyro.conf.arg(aliases=["-i"])]
    """Stage of the model."""
    task_name: Annotated[str | None, tyro.conf.arg(aliases=["-a"])] = None
    """Tasks, joined with |; default: all."""
    dtype: Annotated[str, tyro.conf.arg(aliases=["-d"])] = ""
    """Compute dtype: bfloat16 or float32; default: bfloat16 where the hardware is fast at it."""
    temperature: Annotated[float, tyro.conf.arg(aliases=["-t"])] = 0.0
    """Of written answers; 0 = greedy."""
    max_new_tokens: Annotated[int, tyro.conf.arg(aliases=["-m"])] = 512
    """Longest written answer."""
    num_samples: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 1
    """Answers to each problem; one right one passes it."""
    top_k: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 50
    """Sample from the k likeliest tokens; 0 = off."""
    batch_size: Annotated[int, tyro.conf.arg(aliases=["-b"])] = 64
    """Problems (or written answers) at a time."""
    model_tag: Annotated[str | None, tyro.conf.arg(aliases=["-g"])] = None
    """Folder name of the run; default: the one written last."""
    step: Annotated[int | None, tyro.conf.arg(aliases=["-s"])] = None
    """Step of the checkpoint; default: the newest."""
    max_problems: Annotated[int | None, tyro.conf.arg(aliases=["-x"])] = None
    """Problems of each task; default: all."""
    data: str | None = None
    """Whose tasks: embedded or the public ones; default: those of the data it was trained on."""
    save: str | None = None
    """File for every problem, answer and verdict, one JSON object a line."""
    device_type: str = ""
    """cuda, cpu or mps; default: the best there is."""


def main(config: Config) -> None:
    """Run the tasks, print and report."""
    if config.batch_size < 1:
        raise UserError(f"--batch-size is {config.batch_size}; it must be at least 1")
    sampling = Sampling(
        num_samples=config.num_samples,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
    )
    with runtime.start(config.device_type, dtype=config.dtype) as rt:
        model, tokenizer, checkpoint = checkpoint_manager.load_model(
            config.source,
            device=rt.device,
            dtype=rt.compute_dtype,
            tag=config.model_tag,
            step=config.step,
        )
        all_tasks = evaluation_tasks(config.data or checkpoint.state["data"])
        results = []
        for task in choose(all_tasks, config.task_name):
            result = run_task(
                task,
                tokenizer,
                model,
                sampling=sampling,
                max_problems=config.max_problems,
                batch_size=config.batch_size,
                world=rt.world,
            )
            results.append(result)
            if rt.world.is_main:
                print(describe(result), flush=True)
        if config.save is not None:
            save(results, config.save, rt.world)
        if not rt.world.is_main:
            return
        sections: list[dict[str, Any]] = [
            asdict(config),
            {"Model": f"{checkpoint.tag}, step {checkpoint.step}"},
            {"accuracies": [row(result) for result in results]},
        ]
        core = chat_core(results, [task.name for task in all_tasks])
        if core is not None:
            print(f"ChatCORE {core:.4f}")
            sections.append({"ChatCORE metric": core})
        report.append(f"Chat evaluation {config.source}", sections)


def choose(tasks: Sequence[Task], names: str | None) -> list[Task]:
    """The tasks named, in their own order; None for all. UserError with the nearest name."""
    if names is None:
        return list(tasks)
    by_name = {task.name.lower(): task for task in tasks}
    wanted = [name.strip().lower() for name in names.split("|") if name.strip()]
    for name in wanted:
        if name not in by_name:
            nearest = difflib.get_close_matches(name, by_name, n=1, cutoff=0.0)[0]
            known = ", ".join(task.name for task in tasks)
            raise UserError(
                f"no task {name!r}; did you mean {by_name[nearest].name}? There are {known}"
            )
    if not wanted:
        raise UserError("--task-name is empty; leave it out for all tasks")
    return [task for task in tasks if task.name.lower() in wanted]


def describe(result: TaskResult) -> str:
    """One line for the console."""
    low, high = result.interval
    return (
        f"{result.name:<24} {100 * result.accuracy:6.2f} %  "
        f"[{100 * low:.1f}, {100 * high:.1f}]  "
        f"{result.num_passed}/{result.num_problems}  chance {100 * result.chance:.0f} %  "
        f"{result.seconds:.1f} s"
    )


def row(result: TaskResult) -> dict[str, Any]:
    """One line of the report's table."""
    low, high = result.interval
    return {
        "task": result.name,
        "accuracy": result.accuracy,
        "95 % low": low,
        "95 % high": high,
        "chance": result.chance,
        "passed": result.num_passed,
        "problems": result.num_problems,
        "seconds": round(result.seconds, 2),
    }


def save(results: Sequence[TaskResult], path: str, world: World) -> None:
    """Write the records of all ranks, task by task in the order of problems."""
    own = [[record.to_json(result.name) for record in result.records] for result in results]
    gathered = world.gather_objects(own)
    if not world.is_main:
        return
    rows = [
        record
        for number in range(len(results))
        for record in sorted(
            (record for rank in gathered for record in rank[number]),
            key=lambda record: int(record["index"]),
        )
    ]
    lines = (json.dumps(record, ensure_ascii=False) for record in rows)
    atomic_write_text(path, "".join(f"{line}\n" for line in lines))
    logger.info("wrote %d records to %s", len(rows), path)


if __name__ == "__main__":
    configurator.run(main, Config)
