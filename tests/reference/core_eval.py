"""CORE one sequence at a time, as plainly as possible: the oracle of nanochat/core_eval.py.

Written from the definition alone and sharing no code with the fast version: it reads the bundle
itself, asks the model for all logits of one sequence, and looks up what it needs.
"""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import torch
import yaml


def read_tasks(bundle: Path) -> dict[str, dict]:
    tasks = yaml.safe_load((bundle / "core.yaml").read_text())["icl_tasks"]
    with open(bundle / "eval_meta_data.csv", newline="") as file:
        chance = {row["Eval Task"]: float(row["Random baseline"]) for row in csv.DictReader(file)}
    return {task["label"]: {**task, "chance": chance[task["label"]]} for task in tasks}


def read_items(bundle: Path, task: dict, max_per_task: int) -> list[dict]:
    with open(bundle / "eval_data" / task["dataset_uri"]) as file:
        items = [json.loads(line) for line in file]
    random.Random(1337).shuffle(items)
    return items[:max_per_task] if max_per_task > 0 else items


def render(task: dict, item: dict, examples: list[dict]) -> list[str]:
    kind = task["icl_task_type"]
    delimiter = task.get("continuation_delimiter", " ")
    text = ""
    for example in examples:
        if kind == "multiple_choice":
            text += example["query"] + delimiter + example["choices"][example["gold"]]
        if kind == "schema":
            text += example["context_options"][example["gold"]] + delimiter
            text += example["continuation"]
        if kind == "language_modeling":
            text += example["context"].strip() + delimiter + example["continuation"]
        text += "\n\n"
    if kind == "multiple_choice":
        return [text + item["query"] + delimiter + choice for choice in item["choices"]]
    if kind == "schema":
        return [
            text + context + delimiter + item["continuation"] for context in item["context_options"]
        ]
    without = (text + item["context"].strip() + delimiter).rstrip()
    return [without, text + item["context"].strip() + delimiter + item["continuation"]]


def log_probabilities(model, ids: list[int]) -> torch.Tensor:
    """Row i: the distribution of token i + 1."""
    with torch.no_grad():
        return model(torch.tensor([ids]))[0].log_softmax(-1)


def mean_loss(model, ids: list[int], start: int, max_length: int) -> float:
    cut = max(len(ids) - max_length, 0)
    ids, start = ids[cut:], start - cut
    table = log_probabilities(model, ids)
    return -torch.stack([table[i - 1, ids[i]] for i in range(start, len(ids))]).mean().item()


def is_right(model, tokenizer, task: dict, items: list[dict], index: int, max_length: int) -> bool:
    others = [i for i in range(len(items)) if i != index]
    drawn = random.Random(1234 + index).sample(others, task["num_fewshot"][0])
    prompts = render(task, items[index], [items[i] for i in drawn])
    options = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in prompts]
    # An option that begins (or ends) another one is scored by its last token (or all but BOS).
    shortest = min(len(ids) for ids in options) - 1
    if task["icl_task_type"] == "language_modeling":
        without, ids = options
        assert ids[: len(without)] == without
        cut = max(len(ids) - max_length, 0)
        guesses = log_probabilities(model, ids[cut:]).argmax(-1).tolist()
        return all(guesses[i - cut - 1] == ids[i] for i in range(len(without), len(ids)))
    if task["icl_task_type"] == "multiple_choice":
        shared = 0
        while shared < shortest and len({ids[shared] for ids in options}) == 1:
            shared += 1
        losses = [mean_loss(model, ids, shared, max_length) for ids in options]
    else:
        shared = 0
        while shared < shortest and len({ids[-1 - shared] for ids in options}) == 1:
            shared += 1
        losses = [mean_loss(model, ids, len(ids) - shared, max_length) for ids in options]
    return losses.index(min(losses)) == items[index]["gold"]


def decisions(
    model, tokenizer, bundle: Path, label: str, max_per_task: int, max_length: int = 10**9
) -> list[bool]:
    task = read_tasks(bundle)[label]
    items = read_items(bundle, task, max_per_task)
    return [
        is_right(model, tokenizer, task, items, index, max_length) for index in range(len(items))
    ]


def core(model, tokenizer, bundle: Path, max_per_task: int) -> float:
    centered = []
    for label, task in read_tasks(bundle).items():
        right = decisions(model, tokenizer, bundle, label, max_per_task)
        accuracy, chance = sum(right) / len(right), 0.01 * task["chance"]
        centered.append((accuracy - chance) / (1 - chance))
    return sum(centered) / len(centered)
