"""What each stage trains on and is evaluated with, as data.

There are two task sets: that of the embedded world, here, and the public one, in `public.py`.
Every command that trains, evaluates or fetches reads these functions, so that no list is written
twice.

The embedded sizes are upper bounds chosen so that no item comes twice in a run of the documented
length; what counts is their proportion. A row is made when it is asked for.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, Protocol

from nanochat.common import UserError, eval_bundle_dir, locked
from tasks import public
from tasks.common import Task, TaskMixture
from tasks.embedded_chat import Identity, SmallTalk, Stories, SystemMessages, TwoTurn
from tasks.embedded_core import write_bundle
from tasks.embedded_facts import (
    BindingExercises,
    ChoiceQuestions,
    FactQuestions,
    Facts,
    Guesses,
)
from tasks.embedded_problems import WordProblems
from tasks.public import ONCE, Epochs
from tasks.spellingbee import SimpleSpelling, SpellingBee

EMBEDDED, PUBLIC = TASK_SETS = ("embedded", "public")
STAGES = ("mid", "sft", "rl", "eval")

# Rows of each kind. Midtraining is heavy on what the documents cannot teach: the letter of an
# answer, the call of a tool. Finetuning shows every format again in smaller numbers.
MID_ROWS = {
    "choice": 80_000,
    "binding": 40_000,
    "guesses": 6_000,
    "facts": 20_000,
    "problems": 50_000,
    "letters": 44_000,
    "spelling": 12_000,
    "identity": 6_000,
    "two_turn": 20_000,
    "small_talk": 4_000,
    "system": 4_000,
    "stories": 2_000,
}
SFT_ROWS = {
    "choice": 20_000,
    "binding": 3_000,
    "guesses": 2_000,
    "facts": 8_000,
    "problems": 16_000,
    "letters": 11_000,
    "spelling": 2_000,
    "identity": 3_000,
    "two_turn": 8_000,
    "small_talk": 2_000,
    "system": 2_000,
    "stories": 1_000,
}
VALIDATION_DIVISOR = 50  # a validation set is this much smaller than its training set
NUM_EVALUATION_ITEMS = 500
RL_ROWS, RL_SEED = 50_000, 5
_SEEDS = {("mid", "train"): 1, ("mid", "val"): 2, ("sft", "train"): 3, ("sft", "val"): 4}


def _letters(size: int, seed: int) -> Task:
    # An item of a spelling task has its number as seed; each mixture takes a range of its own.
    first = seed * 1_000_000
    return SpellingBee(first + size, style="compact", start=first)


def _spelling(size: int, seed: int) -> Task:
    first = seed * 1_000_000
    return SimpleSpelling(first + size, style="compact", start=first)


_KINDS: dict[str, Callable[[int, int], Task]] = {
    "choice": lambda size, seed: ChoiceQuestions(size, seed=seed),
    "binding": lambda size, seed: BindingExercises(size, seed=seed),
    "guesses": lambda size, seed: Guesses(size, seed=seed),
    "facts": lambda size, seed: FactQuestions(size, seed=seed),
    "problems": lambda size, seed: WordProblems(size, seed=seed),
    "letters": _letters,
    "spelling": _spelling,
    "identity": lambda size, seed: Identity(size, seed=seed),
    "two_turn": lambda size, seed: TwoTurn(size, seed=seed),
    "small_talk": lambda size, seed: SmallTalk(size, seed=seed),
    "system": lambda size, seed: SystemMessages(size, seed=seed),
    "stories": lambda size, seed: Stories(size, seed=seed),
}


def parts(stage: str, split: Literal["train", "val"] = "train") -> dict[str, Task]:
    """Return the tasks of a stage's mixture by kind, in the order of the table above."""
    rows = {"mid": MID_ROWS, "sft": SFT_ROWS}[stage]
    divisor = 1 if split == "train" else VALIDATION_DIVISOR
    seed = _SEEDS[stage, split]
    return {kind: _KINDS[kind](count // divisor, seed) for kind, count in rows.items()}


def training_mixture(
    stage: str, tasks: str, chats: Sequence[str] = (), epochs: Epochs = ONCE
) -> Task:
    """Return the conversations `stage` ("mid" or "sft") trains on.

    tasks: "embedded" or "public". chats: files of conversations in the place of SmolTalk.
    epochs: how often the mixture of "mid" holds its multiple choice and its word problems.
    """
    _check_mixture(stage, tasks, chats)
    if epochs != ONCE and stage != "mid":
        raise UserError(f"epochs of MMLU and GSM8K belong to the mixture of mid, not of {stage}")
    if tasks == PUBLIC:
        return TaskMixture(public.training_tasks(stage, chats, epochs))
    times = {"choice": epochs.mmlu, "problems": epochs.gsm8k}
    return TaskMixture(
        [task for kind, task in parts(stage).items() for _ in range(times.get(kind, 1))]
    )


def contents(mixture: Task) -> dict[str, int]:
    """Return how many conversations of each task a mixture holds, repeats counted, by name.

    Those of --chats are together under "chats".
    """
    counts: Counter[str] = Counter()
    for task in mixture.tasks if isinstance(mixture, TaskMixture) else (mixture,):
        counts["chats" if isinstance(task, TaskMixture) else task.name] += len(task)
    return dict(counts)


def validation_mixture(stage: str, tasks: str, chats: Sequence[str] = ()) -> Task:
    """Return conversations of the same kinds as in training that are not in it."""
    _check_mixture(stage, tasks, chats)
    if tasks == PUBLIC:
        return TaskMixture(public.validation_tasks(stage, chats))
    return TaskMixture(list(parts(stage, "val").values()))


def evaluation_tasks(tasks: str, *, unsafe: bool = False) -> list[Task]:
    """Return the tasks a chat model is evaluated with, held out from training, in fixed order.

    unsafe: run programs that a model wrote without the sandbox.
    """
    _check("eval", tasks)
    if tasks == PUBLIC:
        return public.evaluation_tasks(unsafe=unsafe)
    size = NUM_EVALUATION_ITEMS
    return [
        Facts(size, "test"),
        WordProblems(size, "test"),
        SpellingBee(size, "test", style="compact"),
        Identity(size // 2, "test"),
        TwoTurn(size, "test"),
    ]


def metric_tasks(tasks: str) -> list[Task]:
    """Return the multiple choice tasks that are measured now and then while a stage trains."""
    if tasks == PUBLIC:
        return public.metric_tasks()
    return [task for task in evaluation_tasks(tasks) if task.eval_type == "categorical"]


def rl_tasks(tasks: str) -> dict[str, tuple[Task, Task]]:
    """Return what reinforcement learning can train on, by name: (training task, held-out task)."""
    _check("rl", tasks)
    if tasks == PUBLIC:
        return public.rl_tasks()
    size = NUM_EVALUATION_ITEMS
    return {
        # Texts of their own, which nobody showed how to solve; measured with held-out numbers.
        "WordProblems": (
            WordProblems(RL_ROWS, "practice", seed=RL_SEED),
            WordProblems(size, "practised"),
        ),
        "SpellingBee": (
            _KINDS["letters"](RL_ROWS, RL_SEED),
            SpellingBee(size, "test", style="compact"),
        ),
    }


def tasks_of(stage: str, tasks: str, chats: Sequence[str] = ()) -> list[Task]:
    """Return every task that a stage reads: "mid", "sft", "rl" (without --task) or "eval"."""
    _check(stage, tasks, chats)
    if stage == "eval":
        return evaluation_tasks(tasks)
    if stage == "rl":
        return list(next(iter(rl_tasks(tasks).values())))
    return [
        training_mixture(stage, tasks, chats),
        validation_mixture(stage, tasks, chats),
        *metric_tasks(tasks),
    ]


def _check(stage: str, tasks: str, chats: Sequence[str] = ()) -> None:
    if stage not in STAGES:
        raise UserError(f"no tasks for stage {stage!r}; use {', '.join(STAGES)}")
    if tasks not in TASK_SETS:
        raise UserError(f"no tasks {tasks!r}; use {' or '.join(TASK_SETS)}")
    if chats and tasks != PUBLIC:
        raise UserError("--chats stands in the place of SmolTalk; use it with --tasks=public")


def _check_mixture(stage: str, tasks: str, chats: Sequence[str]) -> None:
    if stage not in ("mid", "sft"):
        raise UserError(f"no mixture of conversations for stage {stage!r}; use mid or sft")
    _check(stage, tasks, chats)


class Ranks(Protocol):
    """What `nanochat.runtime.World` says of the processes of one run."""

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes shared files."""
        ...

    def barrier(self) -> None:
        """Wait for every rank."""
        ...


def core_bundle(data: str, ranks: Ranks) -> Path:
    """Return the folder of CORE tasks for runs on `data`; the embedded ones are made on demand.

    All ranks call this: the main one writes, and no other comes back before all of it is there.
    """
    folder = eval_bundle_dir(data)
    if data == EMBEDDED:
        if ranks.is_main:
            with locked(folder):  # another run may be at it in the same base folder
                if not (folder / "core.yaml").is_file():
                    write_bundle(folder)
        ranks.barrier()
    return folder
