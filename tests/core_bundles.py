"""CORE bundles written for a test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_bundle(folder: Path, tasks: dict[str, dict[str, Any]]) -> Path:
    """A bundle of `label -> {type, shots, items, delimiter?, chance?}`."""
    (folder / "eval_data").mkdir(parents=True)
    entries, chances = [], ["Eval Task,Random baseline"]
    for label, task in tasks.items():
        entry = {
            "label": label,
            "icl_task_type": task["type"],
            "dataset_uri": f"{label}.jsonl",
            "num_fewshot": [task["shots"]],
        }
        if "delimiter" in task:
            entry["continuation_delimiter"] = task["delimiter"]
        entries.append(entry)
        chances.append(f"{label},{task.get('chance', 0)}")
        lines = "".join(json.dumps(item) + "\n" for item in task["items"])
        (folder / f"eval_data/{label}.jsonl").write_text(lines)
    # JSON is YAML.
    (folder / "core.yaml").write_text(json.dumps({"icl_tasks": entries}))
    (folder / "eval_meta_data.csv").write_text("\n".join(chances) + "\n")
    return folder


def write_two_tasks(folder: Path) -> Path:
    """A bundle of two tasks, "birds" and "trees", of twelve questions with one example each."""
    items = [{"query": f"{i}?", "choices": ["yes", "no"], "gold": i % 2} for i in range(12)]
    task = {"type": "multiple_choice", "shots": 1, "items": items, "chance": 50}
    return write_bundle(folder, {"birds": task, "trees": task})
