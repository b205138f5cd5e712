"""The CORE bundle on disk: its tasks, its items, and the prompts made of them. No torch.

A bundle is a folder with `core.yaml` (tasks: label, type, file, shots, delimiter),
`eval_meta_data.csv` (chance of each task) and `eval_data/` (items, one JSON object a line), in
the format of Mosaic's in-context learning tasks.
"""

from __future__ import annotations

import csv
import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import yaml

from nanochat.assets import Asset, ZipUrl
from nanochat.common import UserError

# The 22 tasks of CORE in Mosaic's format, as the 2025 nanochat packed them.
EVAL_BUNDLE = Asset(
    name="eval-bundle",
    place="eval_bundle",
    source=ZipUrl(
        "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip", folder="eval_bundle"
    ),
    license="Apache-2.0 (Mosaic); the data sets inside keep their authors' licenses",
    approximate_bytes=162_000_000,
)

TaskKind = Literal["multiple_choice", "schema", "language_modeling"]
Item = dict[str, Any]

# Both seeds belong to the definition: other ones choose other items and other examples.
SHUFFLE_SEED = 1337
SHOTS_SEED = 1234

# field -> type, for each kind of task
_FIELDS: dict[str, dict[str, type]] = {
    "multiple_choice": {"query": str, "choices": list, "gold": int},
    "schema": {"context_options": list, "continuation": str, "gold": int},
    "language_modeling": {"context": str, "continuation": str},
}
_OPTIONS = {"multiple_choice": "choices", "schema": "context_options"}


@dataclass(frozen=True)
class CoreTask:
    """One task as the bundle describes it."""

    label: str
    kind: TaskKind
    path: Path
    num_shots: int
    """Solved examples in front of each question."""
    delimiter: str
    """Between question and answer."""
    chance: float
    """Accuracy of guessing, 0 to 1."""

    def center(self, accuracy: float) -> float:
        """0 at chance, 1 at perfection."""
        return (accuracy - self.chance) / (1.0 - self.chance)

    def items(self, max_items: int = -1) -> list[Item]:
        """All items in the task's fixed random order, or the first `max_items` of them if > 0.

        UserError names file and line of an item that is broken, a file without items, and a task
        with too few of them for its shots.
        """
        self.check_max_items(max_items)
        items = _read_items(self.path, self.kind)
        if not items:
            raise UserError(
                f"{self.path} is empty; put the items of {self.label} into it, or delete it to "
                "score without this task"
            )
        if len(items) <= self.num_shots:
            raise UserError(
                f"{self.label} shows {self.num_shots} solved examples before each question and "
                f"needs {self.num_shots + 1} items, but has {len(items)}; add items to {self.path} "
                "or lower num_fewshot in core.yaml"
            )
        random.Random(SHUFFLE_SEED).shuffle(items)
        return items[:max_items] if max_items > 0 else items

    def check_max_items(self, max_items: int) -> None:
        """UserError when so few items leave none to ask after the solved examples."""
        if 0 < max_items <= self.num_shots:
            raise UserError(
                f"{self.label} shows {self.num_shots} solved examples before each question, so "
                f"{max_items} items a task are too few; give --max-per-task (in base_train "
                f"--core-metric-max-per-task) at least {self.num_shots + 1}, or -1 for all items"
            )

    def shots(self, items: Sequence[Item], index: int) -> list[Item]:
        """The solved examples in front of item `index`: others, drawn by the index alone."""
        draw = random.Random(SHOTS_SEED + index)
        chosen = draw.sample(range(len(items) - 1), self.num_shots)
        # The same draw as from a list of all indices but `index`, without making that list.
        return [items[i if i < index else i + 1] for i in chosen]

    def prompts(self, items: Sequence[Item], index: int) -> list[str]:
        """The texts that decide item `index`.

        One for each option, or for language modeling the text without and with the answer; the
        first is cut at its last visible character, so that its tokens begin the second.
        """
        item = items[index]
        lead = "".join(f"{self._solved(shot)}\n\n" for shot in self.shots(items, index))
        if self.kind == "multiple_choice":
            stem = lead + cast(str, item["query"]) + self.delimiter
            return [stem + choice for choice in item["choices"]]
        if self.kind == "schema":
            ending = self.delimiter + cast(str, item["continuation"])
            return [lead + context + ending for context in item["context_options"]]
        stem = lead + cast(str, item["context"]).strip() + self.delimiter
        return [stem.rstrip(), stem + item["continuation"]]

    def _solved(self, item: Item) -> str:
        if self.kind == "multiple_choice":
            question, answer = item["query"], item["choices"][item["gold"]]
        elif self.kind == "schema":
            question, answer = item["context_options"][item["gold"]], item["continuation"]
        else:
            question, answer = item["context"].strip(), item["continuation"]
        return f"{question}{self.delimiter}{answer}"


def load_bundle(folder: Path) -> list[CoreTask]:
    """The tasks of a bundle in its order; their item files may be absent.

    UserError when the folder is no bundle, or a task is incomplete or has no known chance.
    """
    config = folder / "core.yaml"
    if not config.exists():
        raise UserError(
            f"no CORE bundle in {folder}: core.yaml is missing; fetch the 22 tasks with "
            f"python -m scripts.assets prefetch {EVAL_BUNDLE.name}"
        )
    entries = _read_entries(config)
    chances = _read_chances(folder / "eval_meta_data.csv")
    tasks = [_task(entry, folder, chances) for entry in entries]
    labels = [task.label for task in tasks]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise UserError(f"{config} has two tasks with the label {twice}; give each its own")
    return tasks


def bundle_digest(folder: Path) -> str:
    """Changes with every file of a bundle, and with nothing else that lies in its folder."""
    items = [task.path for task in load_bundle(folder) if task.path.exists()]
    return files_digest(folder, [folder / "core.yaml", folder / "eval_meta_data.csv", *items])


def files_digest(folder: Path, files: Iterable[Path]) -> str:
    """SHA-256 of the names below a folder, sizes and times of files that nobody is writing."""
    known = [(path.relative_to(folder).as_posix(), path.stat()) for path in sorted(set(files))]
    told = [(name, status.st_size, status.st_mtime_ns) for name, status in known]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _read_entries(config: Path) -> list[Any]:
    """What `core.yaml` says of each task, not checked yet."""
    try:
        content = yaml.safe_load(config.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{config} is not a list of icl_tasks in YAML: not UTF-8") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" (line {mark.line + 1} is not valid YAML)" if mark else ""
        raise UserError(f"{config} is not a list of icl_tasks in YAML{place}") from error
    entries = content.get("icl_tasks") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        found = "nothing" if entries is None else f"{entries!r:.40}"
        raise UserError(
            f"{config} is not a list of icl_tasks in YAML: icl_tasks is {found}; move the bundle's "
            "folder away and get it again"
        )
    return entries


def _task(entry: Any, folder: Path, chances: dict[str, float]) -> CoreTask:
    config = folder / "core.yaml"
    if not isinstance(entry, dict) or "label" not in entry:
        raise UserError(f"{config}: task {entry!r} is incomplete; it has no label")
    label = str(entry["label"])
    for name in ("icl_task_type", "dataset_uri"):
        if not isinstance(entry.get(name), str):
            found = repr(entry[name]) if name in entry else "missing"
            raise UserError(f"{config}: task {label} is incomplete; {name} is {found}, not text")
    kind, path = entry["icl_task_type"], folder / "eval_data" / entry["dataset_uri"]
    shots = entry.get("num_fewshot")
    # A bool is an int to Python.
    if not isinstance(shots, list) or not shots or type(shots[0]) is not int:
        found = repr(shots) if "num_fewshot" in entry else "missing"
        raise UserError(
            f"{config}: task {label} is incomplete; num_fewshot is {found}, not a list with a "
            "whole number such as [10]"
        )
    num_shots: int = shots[0]
    if kind not in get_args(TaskKind):
        known = ", ".join(get_args(TaskKind))
        raise UserError(f"{config}: {label} has type {kind!r}; known types are {known}")
    if num_shots < 0:
        raise UserError(f"{config}: {label} shows {num_shots} examples; num_fewshot is 0 or more")
    delimiter = entry.get("continuation_delimiter", " ")
    if not isinstance(delimiter, str):
        raise UserError(f"{config}: the delimiter of {label} is {delimiter!r}, not text")
    table = folder / "eval_meta_data.csv"
    if label not in chances:
        raise UserError(f"{table} has no random baseline for {label}")
    if not 0 <= chances[label] < 1:
        percent = 100 * chances[label]
        raise UserError(f"{table}: the baseline of {label} is {percent:g} %; give 0 to below 100")
    return CoreTask(label, kind, path, num_shots, delimiter, chances[label])


def _read_chances(path: Path) -> dict[str, float]:
    """Label -> accuracy of guessing, 0 to 1 (the file has percent)."""
    if not path.exists():
        raise UserError(f"the CORE bundle is incomplete: {path} is missing")
    needs = f"{path} needs the columns 'Eval Task' and 'Random baseline' (percent)"
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{needs}; it is not CSV in UTF-8") from error
    chances = {}
    for number, row in enumerate(rows, 1):
        label, percent = row.get("Eval Task"), row.get("Random baseline")
        try:
            if label is None or percent is None:
                raise ValueError
            chances[label] = float(percent) / 100
        except ValueError as error:
            raise UserError(f"{needs}; task {number} has {label!r} and {percent!r}") from error
    return chances


def _read_items(path: Path, kind: TaskKind) -> list[Item]:
    items = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                item = json.loads(line)
            except ValueError as error:  # not JSON, or not UTF-8
                raise UserError(f"{path}, line {number}: not valid JSON ({error})") from error
            problem = _problem(item, kind)
            if problem:
                raise UserError(f"{path}, line {number}: {problem}")
            items.append(item)
    return items


def _problem(item: Any, kind: TaskKind) -> str:
    """What is wrong with an item, "" for nothing."""
    if not isinstance(item, dict):
        return f"expected an object, got {type(item).__name__}"
    for name, wanted in _FIELDS[kind].items():
        # A bool is an int to Python, and would silently choose option 0 or 1.
        if type(item.get(name)) is not wanted:
            return f"a {kind} item needs {name!r} as {wanted.__name__}, got {item.get(name)!r}"
    if kind == "language_modeling":
        return "" if item["continuation"].strip() else "the continuation is empty"
    options = item[_OPTIONS[kind]]
    if len(options) < 2 or not all(isinstance(option, str) for option in options):
        return f"{_OPTIONS[kind]} must be at least two texts, got {options!r}"
    if not all(option.strip() for option in options):
        return f"one of the {_OPTIONS[kind]} is empty: {options!r}"
    if kind == "multiple_choice" and not item["query"].strip():
        return "the query is empty"
    if not 0 <= item["gold"] < len(options):
        return f"gold is {item['gold']}, but there are {len(options)} {_OPTIONS[kind]}"
    return ""
