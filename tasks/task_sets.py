"""Which task set a run uses, and whether what it reads is on this machine."""

import difflib
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nanochat.assets import PREFETCH, problem_with
from nanochat.common import UserError
from tasks import mixtures
from tasks.common import Task
from tasks.mixtures import EMBEDDED, PUBLIC, STAGES, TASK_SETS, tasks_of
from tasks.public import Epochs

logger = logging.getLogger(__name__)

AUTO = "auto"


def missing_assets(tasks: Iterable[Task]) -> list[str]:
    """Return the names of what some tasks read and this machine does not have."""
    wanted = dict.fromkeys(asset for task in tasks for asset in task.assets())
    return [asset.name for asset in wanted if problem_with(asset) is not None]


def choose_task_set(asked: str | None, *, data: str, recorded: str | None = None) -> str:
    """Say whose tasks a stage uses: "embedded" or "public".

    What was asked for counts, then what the model was trained on before (`recorded`), then the
    data: the embedded world has its own tasks, everything else the public ones. Asked for "auto",
    the public tasks give way to the embedded ones, with a warning, when their files are not here,
    unless the model was trained on public ones.
    """
    if asked in TASK_SETS:
        return str(asked)
    if asked not in (None, AUTO):
        raise UserError(f"no tasks {asked!r}; use {', '.join(TASK_SETS)} or {AUTO}")
    if asked is None:
        return recorded or (EMBEDDED if data == EMBEDDED else PUBLIC)
    if recorded == PUBLIC:
        return PUBLIC
    missing = missing_assets(task for stage in STAGES for task in tasks_of(stage, PUBLIC))
    if not missing:
        return PUBLIC
    logger.warning(
        "the public tasks are not all on this machine (missing: %s), so the conversations and "
        "questions of the embedded world are used; for the public ones fetch them with: %s --all",
        *(", ".join(missing), PREFETCH),
    )
    return EMBEDDED


def task_named(name: str, known: Iterable[str], *, what: str = "task") -> str:
    """Return the known name that is meant, whatever its case; UserError listing the names."""
    by_name = {other.lower(): other for other in known}
    wanted = name.strip().lower()
    if wanted in by_name:
        return by_name[wanted]
    names = ", ".join(by_name.values())
    close = difflib.get_close_matches(wanted, by_name, n=1)
    if close:
        raise UserError(f"no {what} {name!r}; did you mean {by_name[close[0]]}? There are {names}")
    raise UserError(f"no {what} {name!r}; there are {names}")


def require_tasks(stage: str, tasks: str, chats: Sequence[str] = ()) -> None:
    """Raise UserError, with what to do, unless all that a stage reads is here."""
    require_files(stage, tasks_of(stage, tasks, chats))


def require_files(stage: str, tasks: Iterable[Task]) -> None:
    """Raise UserError, with what to do, unless all that these tasks of a stage read is here."""
    missing = missing_assets(tasks)
    if missing:
        raise UserError(
            f"the public tasks need files that are not on this machine: {', '.join(missing)}; "
            f"fetch them with {PREFETCH} --stage {stage}, or add --tasks=embedded to use the "
            "conversations of the embedded world"
        )


def require_chatcore(tasks: Iterable[Task]) -> None:
    """Raise UserError, with what to do, unless the problems of ChatCORE are here."""
    missing = missing_assets(tasks)
    if missing:
        raise UserError(
            f"ChatCORE asks problems that are not on this machine: {', '.join(missing)}; fetch "
            f"them with {PREFETCH} --stage eval; --chatcore-every=-1 trains without ChatCORE"
        )


def trained_on(record: Mapping[str, Any]) -> Task:
    """Return the conversations of one entry of a model's lineage: a stage, its tasks and chats.

    What a recipe has shown more than once is in it once. UserError unless all of it is on this
    machine.
    """
    stage, tasks, chats = record["stage"], record["tasks"], record.get("chats", ())
    gone = [path for path in chats if not Path(path).is_file()]
    if gone:
        raise UserError(f"{stage} was trained on {', '.join(gone)}, which is not there any more")
    if stage == "rl":
        pairs = mixtures.rl_tasks(tasks)
        if record["task"] not in pairs:
            raise UserError(f"rl practised {record['task']}, which is no {tasks} task any more")
        task, _ = pairs[record["task"]]
    elif "recipe" in record:
        epochs = Epochs(*(min(1, record[name]) for name in ("mmlu_epochs", "gsm8k_epochs")))
        task = mixtures.training_mixture("mid", tasks, chats, epochs)
    else:
        task = mixtures.training_mixture(stage, tasks, chats)
    missing = missing_assets([task])
    if missing:
        raise UserError(
            f"{stage} was trained on files that are not on this machine: {', '.join(missing)}; "
            f"fetch them with {PREFETCH} {' '.join(missing)}"
        )
    return task


def split_chats(chats: str | None) -> tuple[str, ...]:
    """Return the files that the flag --chats names, joined with commas."""
    return tuple(path.strip() for path in (chats or "").split(",") if path.strip())
