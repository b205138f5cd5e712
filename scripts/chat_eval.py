"""Evaluate a chat model on tasks; together they give ChatCORE.

python -m scripts.chat_eval --source=sft
python -m scripts.chat_eval -i mid -a 'GSM8K|MMLU' -x 20 --max-new-tokens=128 --save=answers.jsonl
python -m scripts.chat_eval --show=answers.jsonl --verdict=wrong
torchrun --standalone --nproc_per_node=8 -m scripts.chat_eval -- -i sft
"""

from __future__ import annotations

import json
import logging
import pydoc
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from nanochat import checkpoint_manager, configurator, report, runtime
from nanochat.answers import terminal_text
from nanochat.checkpoint_manager import Checkpoint
from nanochat.common import NotScoredError, UserError, atomic_write_text
from nanochat.configurator import UsageError
from nanochat.contamination import (
    Contamination,
    SetOverlap,
    training_conversations,
    training_documents,
)
from nanochat.dataset import check_data, open_source
from nanochat.lineage import lineage_of
from nanochat.problems import num_problems, problem
from nanochat.runtime import World
from nanochat.score_lines import Line
from nanochat.stage import check_count, check_positive
from nanochat.task_eval import MAX_SAMPLES, Sampling, run_task
from nanochat.task_results import (
    TaskResult,
    chat_core,
    check_writable,
    read_records,
    show_records,
)
from tasks import mixtures
from tasks.common import Task, question_of
from tasks.task_sets import choose_task_set, task_named, trained_on

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Config:
    """Flags of chat_eval."""

    source: Annotated[Literal["base", "mid", "sft", "rl"] | None, tyro.conf.arg(aliases=["-i"])] = (
        None
    )
    """Stage of the model; needed unless answers are shown."""
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
    batch_size: Annotated[int | None, tyro.conf.arg(aliases=["-b"])] = None
    """Problems of multiple choice, or written answers, at a time; default: 8, or 64."""
    model_tag: Annotated[str | None, tyro.conf.arg(aliases=["-g"])] = None
    """Folder name of the run; default: the one written last."""
    step: Annotated[int | None, tyro.conf.arg(aliases=["-s"])] = None
    """Step of the checkpoint; default: the newest."""
    max_problems: Annotated[int | None, tyro.conf.arg(aliases=["-x"])] = None
    """Problems of each task; default, or -1: all."""
    tasks: Literal["embedded", "public", "auto"] | None = None
    """Whose tasks; auto: public if they are here; default: those the model was trained with."""
    data: str | None = None
    """The pretraining data, which decides about the tasks; default: what the model has read."""
    contamination: bool = False
    """Also say how many problems are in the training data, and the accuracy on the others."""
    unsafe: bool = False
    """Run the programs that the model writes (HumanEval) without the sandbox, with your rights."""
    save: str | None = None
    """File for every problem, answer and verdict, one JSON object a line."""
    show: str | None = None
    """Page through answers that --save has written, and evaluate nothing."""
    verdict: Literal["all", "right", "wrong"] = "all"
    """Which answers to show."""
    device_type: str = ""
    """cuda, cpu or mps; default: the best there is."""


def main(config: Config) -> None:
    """Run the tasks, print and report; or show saved answers."""
    if config.show is not None:
        show(config)
        return
    if config.source is None:
        raise UsageError("--source is missing: give base, mid, sft or rl, or a file to --show")
    sampling = _sampling(config)
    if config.save is not None:
        check_writable(_path(config, "save"))
    if config.data is not None:
        check_data(config.data)
    with runtime.start(config.device_type, dtype=config.dtype) as rt:
        checkpoint = checkpoint_manager.find_checkpoint(
            config.source, config.model_tag, config.step, weights_only=True
        )
        task_set = _task_set(config, checkpoint)
        all_tasks = mixtures.evaluation_tasks(task_set, unsafe=config.unsafe)
        tasks = choose(all_tasks, config.task_name)
        model, tokenizer = checkpoint_manager.model_of(
            checkpoint, device=rt.device, dtype=rt.compute_dtype
        )
        overlaps: dict[str, SetOverlap] = {}
        not_compared = ""
        if config.contamination:
            overlaps, not_compared = contamination(config, tasks, checkpoint, rt.world)

        def evaluate(task: Task) -> Line:
            try:
                result = run_task(
                    task,
                    tokenizer,
                    model,
                    sampling=sampling,
                    max_problems=config.max_problems,
                    batch_size=config.batch_size,
                    world=rt.world,
                )
            except NotScoredError as error:
                return Line(task.name, no_score=str(error))
            overlap = overlaps.get(task.name)
            unseen = None if overlap is None else unseen_accuracy(result, overlap, rt.world)
            return Line(
                task.name,
                result,
                overlap=overlap,
                not_compared=not_compared,
                unseen=unseen,
                measure=measure(task, sampling),
            )

        lines = []
        for task in tasks:
            lines.append(evaluate(task))
            if rt.world.is_main:
                print(lines[-1].text(), flush=True)
        results = [line.result for line in lines if line.result is not None]
        if not results:
            raise NotScoredError(lines[0].no_score)
        # Before the report, so that a failing one costs no answers; its own failure waits for it.
        failure = "" if config.save is None else save(results, config.save, rt.world)
        if rt.world.is_main:
            if not_compared:
                print(f"not compared with the training data: {not_compared}")
            core = chat_core(results, [task.name for task in all_tasks])
            if core is not None:
                print(f"{report.score_name('ChatCORE', task_set)} {core:.4f}")
            _report(config, checkpoint, lines, core, task_set)
        if failure:
            raise UserError(failure)


def _sampling(config: Config) -> Sampling:
    check_positive(config, "num_samples", "max_new_tokens")
    if config.batch_size is not None:
        check_positive(config, "batch_size")
    if config.max_problems is not None:
        check_count(config, "max_problems", "all problems")
    num_samples = config.num_samples
    if num_samples > MAX_SAMPLES:
        raise UserError(f"--num-samples is {num_samples}; it must be at most {MAX_SAMPLES:,}")
    if num_samples > 1 and config.temperature == 0:
        logger.warning(
            "--temperature is 0, so all %d answers to a problem are the same; one is written",
            num_samples,
        )
        num_samples = 1
    return Sampling(
        num_samples=num_samples,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
    )


def _task_set(config: Config, checkpoint: Checkpoint) -> str:
    """Whose tasks: what a flag says, else what the model was trained with."""
    recorded = checkpoint.state.get("tasks") if config.data is None else None
    data = checkpoint.state["data"] if config.data is None else config.data
    return choose_task_set(config.tasks, data=data, recorded=recorded)


def choose(tasks: Sequence[Task], names: str | None) -> list[Task]:
    """The tasks named, in their own order; None for all. UserError for a name of none of them."""
    if names is None:
        return list(tasks)
    known = [task.name for task in tasks]
    wanted = {task_named(name, known) for name in _split(names)}
    return [task for task in tasks if task.name in wanted]


def _split(names: str) -> list[str]:
    wanted = [name.strip() for name in names.split("|") if name.strip()]
    if not wanted:
        raise UserError("--task-name is empty; leave it out for all tasks")
    return wanted


# ---- contamination ------------------------------------------------------------------------------


def contamination(
    config: Config, tasks: Sequence[Task], checkpoint: Checkpoint, world: World
) -> tuple[dict[str, SetOverlap], str]:
    """Which problems of the tasks stand in what the model was trained on, by task.

    Or none, and the reason why this cannot be said: with a part of the training data missing, a
    count would be too low.
    """
    problems = {task.name: _questions(task, config.max_problems) for task in tasks}
    check = Contamination(problems)
    reason = ""
    try:
        _read_training_data(check, config, checkpoint, world)
    except UserError as error:
        reason = str(error)
    # A reason on one rank is one on all, so that none waits for another.
    reasons = [other for other in world.gather_objects(reason) if other]
    if reasons:
        return {}, reasons[0]
    for found in world.gather_objects(check.found()):
        check.add(found)
    return check.results(), ""


def _read_training_data(
    check: Contamination, config: Config, checkpoint: Checkpoint, world: World
) -> None:
    """Show it this rank's share of what the model was trained on; UserError unless all is here.

    Documents: all training shards on this machine. Conversations: all those of each stage that
    the model went through.
    """
    lineage = lineage_of(checkpoint)
    if lineage is None:
        raise UserError(
            f"{checkpoint.path} does not say what all its stages were trained on; a model that is "
            "trained with this version does"
        )
    base, *stages = lineage
    # Opened before any is read: the documents may take hours.
    source = open_source(config.data or base["data"])
    conversations = [(entry["stage"], trained_on(entry)) for entry in stages]
    share = {"rank": world.rank, "size": world.size}
    check.read(training_documents(source, **share))
    for stage, task in conversations:
        logger.info("reading %s conversations of %s", f"{len(task):,}", stage)
        check.read(training_conversations(task, **share))


def _questions(task: Task, max_problems: int | None) -> list[str]:
    """The questions of a task; none where it will have no score anyway."""
    if task.reason_to_skip() is not None:
        return []
    try:
        asked = num_problems(task)
        if max_problems is not None and max_problems >= 0:
            asked = min(asked, max_problems)
        return [question_of(problem(task, index)) for index in range(asked)]
    except UserError as error:
        logger.warning("%s is not compared with the training data: %s", task.name, error)
        return []


def unseen_accuracy(result: TaskResult, overlap: SetOverlap, world: World) -> float | None:
    """Accuracy over all ranks on the problems that were not found in the training data."""
    unseen = [record for record in result.records if record.index not in overlap.seen]
    total = world.sum(len(unseen))
    passed = world.sum(sum(any(record.verdicts) for record in unseen))
    return passed / total if total else None


# ---- what is said -------------------------------------------------------------------------------


def measure(task: Task, sampling: Sampling) -> str:
    """What the accuracy is of where several answers are sampled: pass@n at a temperature."""
    if task.eval_type != "generative" or sampling.num_samples == 1:
        return ""
    return f"pass@{sampling.num_samples} at temperature {sampling.temperature:g}"


def _report(
    config: Config,
    checkpoint: Checkpoint,
    lines: Sequence[Line],
    core: float | None,
    task_set: str,
) -> None:
    sections: list[dict[str, Any]] = [
        asdict(config),
        {"Model": f"{checkpoint.tag}, step {checkpoint.step}", report.TASK_SET: task_set},
        {"accuracies": [line.row() for line in lines if line.result is not None]},
    ]
    sections += [{f"No score for {line.name}": line.no_score} for line in lines if line.no_score]
    reasons = dict.fromkeys(line.not_compared for line in lines if line.not_compared)
    sections += [{"Not compared with the training data": reason} for reason in reasons]
    if core is not None:
        sections.append({"ChatCORE metric": core})
    report.append(f"Chat evaluation {config.source}", sections)


# ---- answers on disk ----------------------------------------------------------------------------


def _path(config: Config, name: Literal["save", "show"]) -> Path:
    value = getattr(config, name)
    if not value.strip():
        raise UserError(f"--{name} is empty; name a file, or leave it out")
    return Path(value)


def save(results: Sequence[TaskResult], path: str, world: World) -> str:
    """Write the records of all ranks, task by task in the order of problems.

    Returns what went wrong, "" for nothing: the scores are worth more than the file.
    """
    own = [[record.to_json(result.name) for record in result.records] for result in results]
    gathered = world.gather_objects(own)
    if not world.is_main:
        return ""
    rows = [
        record
        for number in range(len(results))
        for record in sorted(
            (record for rank in gathered for record in rank[number]),
            key=lambda record: int(record["index"]),
        )
    ]
    lines = (json.dumps(record, ensure_ascii=False) for record in rows)
    try:
        atomic_write_text(path, "".join(f"{line}\n" for line in lines))
    except OSError as error:
        return f"the scores are in the report, but --save={path} was not written: {error.strerror}"
    logger.info("wrote %d records to %s", len(rows), path)
    return ""


def show(config: Config) -> None:
    """Page through saved answers: by task, right or wrong ones, the first so many of each task."""
    if config.max_problems is not None:
        check_count(config, "max_problems", "all problems")
    records = read_records(_path(config, "show"))
    if config.task_name is not None:
        known = {record["task"].lower(): record["task"] for record in records}
        wanted = _split(config.task_name)
        for name in wanted:
            if name.lower() not in known:
                names = ", ".join(sorted(known.values()))
                raise UserError(f"no answers of {name!r} in {config.show}; it has {names}")
        chosen_tasks = {known[name.lower()] for name in wanted}
        records = [record for record in records if record["task"] in chosen_tasks]
    if config.verdict != "all":
        records = [r for r in records if any(r["correct"]) == (config.verdict == "right")]
    if config.max_problems is not None and config.max_problems >= 0:
        places: Counter[str] = Counter()
        chosen = []
        for record in records:
            places[record["task"]] += 1
            if places[record["task"]] <= config.max_problems:
                chosen.append(record)
        records = chosen
    text = terminal_text("\n".join(show_records(records))) + "\n"
    if sys.stdout.isatty():
        pydoc.pager(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    configurator.run(main, Config)
