"""What each stage trains on and is evaluated with on real data: the mixtures of the 2025 nanochat.

Nothing is read here: a task reads its rows when the first one is asked for. With `chats`, files of
conversations (as in `CustomJSON`) stand in the place of SmolTalk; the last twentieth of each is
for validation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from nanochat.common import UserError
from tasks.arc import ARC
from tasks.common import Task, TaskMixture, TaskSequence
from tasks.customjson import IDENTITY, CustomJSON
from tasks.gsm8k import GSM8K
from tasks.humaneval import HumanEval
from tasks.mmlu import MMLU
from tasks.smoltalk import SmolTalk
from tasks.spellingbee import SimpleSpelling, SpellingBee

VALIDATION_SHARE = 20  # one conversation in so many of a file of one's own
# Shares of the validation mixture like those of the training mixture.
MID_VALIDATION_MMLU = 5_200
MID_VALIDATION_GSM8K = 420
MID_SPELLING_BEE = 80_000
RL_SPELLING_BEE = 50_000  # more than a run asks


@dataclass(frozen=True)
class Epochs:
    """How often a pass over the mixture of midtraining sees what is scarce."""

    mmlu: int = 1
    """Multiple choice."""
    gsm8k: int = 1
    """Word problems."""

    def __post_init__(self) -> None:
        for name, value in (("mmlu", self.mmlu), ("gsm8k", self.gsm8k)):
            if value < 0:
                raise UserError(f"--{name}-epochs is {value}; give at least 0, which leaves it out")


ONCE = Epochs()


def training_tasks(stage: str, chats: Sequence[str] = (), epochs: Epochs = ONCE) -> list[Task]:
    """Return the tasks of a training mixture; one listed twice is seen twice as often.

    epochs: of the mixture of "mid".
    """
    if stage == "mid":
        return [
            *_dialogues("train", chats),
            *[MMLU("auxiliary_train")] * epochs.mmlu,
            *[GSM8K("train")] * epochs.gsm8k,
            CustomJSON(IDENTITY),
            CustomJSON(IDENTITY),
            SimpleSpelling(200_000),
            SpellingBee(MID_SPELLING_BEE),
        ]
    return [
        ARC("ARC-Easy", "train"),
        ARC("ARC-Challenge", "train"),
        GSM8K("train"),
        *_dialogues("train", chats, stop=10_000),
        CustomJSON(IDENTITY),
        SimpleSpelling(300),
        SpellingBee(300),
    ]


def validation_tasks(stage: str, chats: Sequence[str] = ()) -> list[Task]:
    """Return the tasks of a validation mixture."""
    if stage == "mid":
        return [
            *_dialogues("test", chats),
            MMLU("test", stop=MID_VALIDATION_MMLU),
            GSM8K("test", stop=MID_VALIDATION_GSM8K),
        ]
    return _dialogues("test", chats)


def evaluation_tasks(*, unsafe: bool = False) -> list[Task]:
    """Return the tasks of ChatCORE. unsafe: run written programs without the sandbox."""
    return [
        ARC("ARC-Easy", "test"),
        ARC("ARC-Challenge", "test"),
        MMLU("test"),
        GSM8K("test"),
        HumanEval(unsafe=unsafe),
        _spelling_bee_test(),
    ]


def rl_tasks() -> dict[str, tuple[Task, Task]]:
    """Return what reinforcement learning can train on, by name: (training task, held-out task).

    All public tasks whose answers are written and which have a training split.
    """
    first = MID_SPELLING_BEE  # the items before it were shown with their answers
    return {
        "GSM8K": (GSM8K("train"), GSM8K("test")),
        "SpellingBee": (SpellingBee(first + RL_SPELLING_BEE, start=first), _spelling_bee_test()),
    }


def metric_tasks() -> list[Task]:
    """Return the tasks that are measured now and then while a stage trains."""
    return [MMLU("test"), ARC("ARC-Easy", "test")]


def _spelling_bee_test() -> Task:
    return SpellingBee(256, "test")


def _dialogues(split: str, chats: Sequence[str], *, stop: int | None = None) -> list[Task]:
    if not chats:
        return [SmolTalk(split, stop=stop)]
    tasks: list[Task] = []
    for path in chats:
        whole = _conversations(path, Path(path).stat().st_mtime_ns if Path(path).exists() else 0)
        held_out = -(-len(whole) // VALIDATION_SHARE)
        if len(whole) < 2:
            raise UserError(
                f"{path} has {len(whole)} conversations; at least 2 are needed, one of them for "
                "validation"
            )
        first = len(whole) - held_out
        if split == "train":
            tasks.append(TaskSequence([whole], stop=first))
        else:
            tasks.append(TaskSequence([whole], start=first))
    # Shuffled as SmolTalk is, so that the first so many are of all files.
    return [TaskMixture(tasks, stop=stop)]


@cache
def _conversations(path: str, changed: int) -> CustomJSON:
    """A file of conversations, read once for training, validation and the check of what is here."""
    return CustomJSON(path)
