"""CORE on the real tasks with models of depth 4: one trained on real text, one random.

Every decision must be that of the plain implementation, in float32 and with bfloat16 first; and
for options of equally many tokens that of lm-eval, which adds losses where CORE takes their mean.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from public_data import REASON, SHARED
from reference import core_eval as reference

from nanochat import checkpoint_manager
from nanochat.configurator import parse
from nanochat.core_bundle import CoreTask, Item, load_bundle
from nanochat.core_scoring import GptModel, decide
from nanochat.gpt import GPT
from nanochat.tokenizer import Tokenizer, get_tokenizer
from scripts import base_train, tok_train

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not SHARED.is_dir(), reason=REASON)]

BUNDLE = SHARED / "eval_bundle"
# Their texts are the longest: 11 options of 2,300 tokens, 4 of 1,400, and stories with questions.
LONG = ("bigbench_language_identification", "hellaswag", "squad", "boolq")
# Few of their items have options of equally many tokens.
UNEQUAL = ("bigbench_language_identification", "hellaswag", "hellaswag_zeroshot", "piqa")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A base folder with a model of depth 4 that has read sixty thousand tokens."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("base")
        patch.setenv("NANOCHAT_BASE_DIR", str(folder))
        text = f"--data={SHARED / 'text'}"
        for script, arguments in (
            (tok_train, [text, "--max_chars=4000000", "--vocab_size=4096"]),
            (
                base_train,
                [
                    *(text, "--device-type=cpu", "--dtype=float32", "--compile=off", "--depth=4"),
                    *("--max_seq_len=256", "--device_batch_size=8", "--total_batch_size=2048"),
                    *("--num_iterations=30", "--eval_tokens=2048", "--core_metric_every=-1"),
                    *("--sample_every=-1", "--bpb_limit=9"),
                ],
            ),
        ):
            assert not script.main(parse(script.Config, arguments))
        yield folder


@pytest.fixture
def tokenizer(base: Path, monkeypatch: pytest.MonkeyPatch) -> Tokenizer:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    return get_tokenizer()


@pytest.fixture(params=["trained", "random"])
def model(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> GPT:
    found, _, _ = checkpoint_manager.load_model(
        "base", device=torch.device("cpu"), dtype=torch.float32
    )
    if request.param == "random":
        generator = torch.Generator().manual_seed(0)
        for parameter in found.parameters():
            torch.nn.init.normal_(parameter, std=0.05, generator=generator)
    return found


def real_tasks() -> list[CoreTask]:
    return [task for task in load_bundle(BUNDLE) if task.path.exists()]


def test_decisions_are_those_of_the_plain_implementation(model: GPT, tokenizer: Tokenizer) -> None:
    exact = GptModel(model)
    first = GptModel(copy.deepcopy(model).cast_matrices(torch.bfloat16), exact=exact)
    described = reference.read_tasks(BUNDLE)
    expected, in_float32, in_bfloat16 = {}, {}, {}
    for task in real_tasks():
        items, limit = task.items(), model.cos.size(0)
        indices = range(1 if task.label in LONG else 6)
        expected[task.label] = [
            reference.is_right(model, tokenizer, described[task.label], items, index, limit)
            for index in indices
        ]
        in_float32[task.label] = decide(exact, tokenizer, task, items, indices)
        # A group is checked in float32 in any case up to four items, so these alone test nothing.
        group = range(6 if task.label in LONG else 16)
        in_bfloat16[task.label] = decide(first, tokenizer, task, items, group)[: len(indices)]
    assert len(expected) == 19
    assert in_float32 == expected
    assert in_bfloat16 == expected


# ---- lm-eval -------------------------------------------------------------------------------------


def as_lm_eval_row(tokenizer: Tokenizer, task: CoreTask, item: Item, prompts: Sequence[str]) -> Any:
    """The item with what CORE scores split off by tokens; None where lm-eval adds up other ones.

    That is where options have different numbers of tokens, or the parts alone have other ones.
    """
    options = [tokenizer.encode(prompt) for prompt in prompts]
    is_schema = task.kind == "schema"
    aligned = [ids[::-1] if is_schema else ids for ids in options]
    shared = next(
        (i for i, column in enumerate(zip(*aligned, strict=False)) if len(set(column)) > 1), 0
    )
    counts = {shared if is_schema else len(ids) - shared for ids in options}
    cuts = [len(ids) - shared if is_schema else shared for ids in options]
    fronts = [tokenizer.decode(ids[:cut]) for ids, cut in zip(options, cuts, strict=True)]
    ends = [tokenizer.decode(ids[cut:]) for ids, cut in zip(options, cuts, strict=True)]
    survives = all(
        tokenizer.encode(front) == ids[:cut] and front + end == prompt
        for front, end, ids, cut, prompt in zip(fronts, ends, options, cuts, prompts, strict=True)
    )
    if len(counts) > 1 or not survives or shared == 0:
        return None
    told, choices = (ends[0], fronts) if is_schema else (fronts[0], ends)
    return {"told": told, "choices": choices, "gold": item["gold"]}


def lm_eval_decisions(
    folder: Path, rows: dict[CoreTask, list[Any]], model: GPT, tokenizer: Tokenizer
) -> dict[str, list[bool]]:
    """What lm-eval decides by the likeliest choice on local rows of several tasks."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.model import LM
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    class Ours(LM):
        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            return [(self._sum(*request.args), False) for request in requests]

        def _sum(self, context: str, continuation: str) -> float:
            num_before = 1 + len(tokenizer.encode(context))
            ids = [tokenizer.bos_id, *tokenizer.encode(context + continuation)]
            table = reference.log_probabilities(model, ids)
            return sum(float(table[i - 1, ids[i]]) for i in range(num_before, len(ids)))

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            raise NotImplementedError

        def generate_until(self, requests: list[Any]) -> list[str]:
            raise NotImplementedError

    for task, lines in rows.items():
        data = folder / f"{task.label}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in lines))
        # lm-eval takes a number as text for "the contexts are the choices".
        text, target = ("gold", "told") if task.kind == "schema" else ("told", "gold")
        (folder / f"{task.label}.yaml").write_text(
            f"task: core_{task.label}\n"
            "dataset_path: json\n"
            f"dataset_kwargs: {{data_files: {{test: {data}}}}}\n"
            "output_type: multiple_choice\n"
            "test_split: test\n"
            f'doc_to_text: "{{{{{text}}}}}"\n'
            'doc_to_choice: "{{choices}}"\n'
            f'doc_to_target: "{{{{{target}}}}}"\n'
            'target_delimiter: ""\n'
            "metric_list: [{metric: acc}]\n"
        )
    result = simple_evaluate(
        model=Ours(),
        tasks=[f"core_{task.label}" for task in rows],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        num_fewshot=0,
        bootstrap_iters=0,
        log_samples=True,
    )
    samples = {task.label: result["samples"][f"core_{task.label}"] for task in rows}
    return {
        label: [s["acc"] == 1.0 for s in sorted(found, key=lambda s: s["doc_id"])]
        for label, found in samples.items()
    }


def test_options_of_equally_many_tokens_are_decided_as_by_lm_eval(
    model: GPT, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    rows: dict[CoreTask, list[Any]] = {}
    ours: dict[str, list[bool]] = {}
    for task in real_tasks():
        if task.kind == "language_modeling":
            continue
        items, wanted = task.items(), 1 if task.label in LONG else 4
        chosen = {}
        for index in range(min(len(items), 60 if task.label in UNEQUAL else 400)):
            row = as_lm_eval_row(tokenizer, task, items[index], task.prompts(items, index))
            if row is not None:
                chosen[index] = row
            if len(chosen) == wanted:
                break
        assert len(chosen) == wanted or task.label in UNEQUAL, task.label
        if chosen:
            rows[task] = list(chosen.values())
            ours[task.label] = decide(GptModel(model), tokenizer, task, items, list(chosen))
    assert len(rows) >= 8
    assert lm_eval_decisions(tmp_path, rows, model, tokenizer) == ours
