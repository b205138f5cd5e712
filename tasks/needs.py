"""What a stage reads, asked of what it uses: its data source, its tasks, its evaluations.

Nothing is listed here that is declared elsewhere: a task that is added to a mixture is fetched,
checked and listed without another line.
"""

from collections.abc import Callable, Sequence
from functools import partial

from nanochat.assets import Asset
from nanochat.common import UserError
from nanochat.core_bundle import EVAL_BUNDLE
from nanochat.dataset import EMBEDDED, assets_of
from nanochat.vocabularies import BASELINES
from tasks import mixtures
from tasks.task_sets import choose_task_set

# What the d20 model of the speedrun reads: 11.2e9 tokens of 4.8 characters, shards of 2.5e8.
DEFAULT_NUM_TRAIN = 240


def _tokenizer(data: str, tasks: str, num_train: int) -> list[Asset]:
    vocabularies = [asset for vocabulary in BASELINES for asset in vocabulary.assets]
    return [*assets_of(data, num_train), *vocabularies]


def _base(data: str, tasks: str, num_train: int) -> list[Asset]:
    # The embedded world has CORE tasks of its own, which are made on demand.
    bundle = [] if data == EMBEDDED else [EVAL_BUNDLE]
    return [*assets_of(data, num_train), *bundle]


def _of_tasks(stage: str, data: str, tasks: str, num_train: int) -> list[Asset]:
    return [asset for task in mixtures.tasks_of(stage, tasks) for asset in task.assets()]


# In the order of a run; "eval" is what chat_eval asks after each of the last three.
STAGES: dict[str, Callable[[str, str, int], list[Asset]]] = {
    "tokenizer": _tokenizer,
    "base": _base,
    **{stage: partial(_of_tasks, stage) for stage in mixtures.STAGES},
}


def needs(
    stages: Sequence[str],
    *,
    data: str,
    tasks: str | None = None,
    num_train: int = DEFAULT_NUM_TRAIN,
) -> dict[str, list[Asset]]:
    """What each of the stages reads, each asset once a stage.

    tasks: "embedded" or "public"; None for what belongs to `data`. num_train: training shards of
    a hub data set, besides its validation shard.
    """
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown:
        raise UserError(f"no stage {unknown[0]!r}; there are {', '.join(STAGES)}")
    chosen = choose_task_set(tasks, data=data)
    return {stage: list(dict.fromkeys(STAGES[stage](data, chosen, num_train))) for stage in stages}
