"""CORE beside other libraries: models of transformers from disk, and lm-eval's multiple choice."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from reference.byte_tokenizer import ByteTokenizer
from test_core_eval import choice_items, random_model, write_bundle

from nanochat.common import UserError
from nanochat.configurator import parse
from nanochat.core_bundle import load_bundle
from nanochat.core_eval import evaluate_core
from nanochat.core_scoring import GptModel, decide
from nanochat.gpt import GPT
from nanochat.hf_model import HfTokenizer, load_hf_model
from nanochat.runtime import Runtime, World
from scripts import base_eval

RUNTIME = Runtime(torch.device("cpu"), torch.float32, World())
TOKENIZER: Any = ByteTokenizer()
SHARED_BUNDLE = Path(__file__).parents[2] / "shared/data/eval_bundle"


# ---- transformers --------------------------------------------------------------------------------


def write_hf_model(folder: Path) -> Path:
    """A tiny GPT-2 whose tokens are bytes, as its library saves it."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)} | {"<|endoftext|>": 256}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>"
    )
    fast.save_pretrained(folder)
    config = transformers.GPT2Config(
        vocab_size=257, n_positions=256, n_embd=32, n_layer=2, n_head=2, eos_token_id=256
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


def choices_bundle(folder: Path) -> Path:
    task = {"type": "multiple_choice", "shots": 2, "items": choice_items(20), "chance": 33.3}
    said = {
        "type": "language_modeling",
        "shots": 1,
        "items": [{"context": f"Item {i}", "continuation": "x"} for i in range(8)],
    }
    return write_bundle(folder, {"choices": task, "said": said})


@pytest.mark.slow
def test_a_transformers_model_is_scored_as_its_own_forward_pass_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_hf_model(tmp_path / "tiny")
    model, tokenizer = load_hf_model(str(folder), device=torch.device("cpu"), dtype=torch.float32)
    assert (model.max_length, tokenizer.bos_id) == (256, 256)
    bundle = choices_bundle(tmp_path / "bundle")
    result = evaluate_core(model, tokenizer, bundle, -1, RUNTIME)
    task = load_bundle(bundle)[0]
    items, expected = task.items(), []
    for index in range(len(items)):
        losses = []
        for prompt in task.prompts(items, index):
            ids = torch.tensor([[256, *tokenizer._tokenizer(prompt)["input_ids"]]])
            length = len(prompt) - prompt.rindex("? ") - 2
            with torch.no_grad():
                table = model.model(ids).logits[0, :-1].log_softmax(-1)
            losses.append(-table.gather(1, ids[0, 1:, None])[-length:].mean().item())
        expected.append(losses.index(min(losses)) == items[index]["gold"])
    # Options of this bundle never share their first letter with another, so the whole option is
    # what is scored.
    assert result.tasks[0].decisions == tuple(expected)

    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    (tmp_path / "base").mkdir()
    bundle.rename(tmp_path / "base/eval_bundle")
    arguments = [f"--hf-path={folder}", "--device-type=cpu", "--dtype=float32"]
    base_eval.main(parse(base_eval.Config, arguments))
    name = str(folder).strip("/").replace("/", "-")
    rows = (tmp_path / f"base/base_eval/{name}.csv").read_text().splitlines()
    assert float(rows[-1].split(",")[-1]) == pytest.approx(result.core, abs=1e-6)
    assert [path.suffix for path in (tmp_path / "base/base_eval").iterdir()] == [".csv"]


@pytest.mark.slow
def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    load = partial(load_hf_model, device=torch.device("cpu"), dtype=torch.float32)
    with pytest.raises(UserError, match=r"config\.json is missing; .*nothing is downloaded"):
        load(str(tmp_path))
    with pytest.raises(UserError, match=r"^there is no folder /nope; give a folder with config"):
        load("/nope")
    with pytest.raises(UserError, match=r"^nobody/nothing is neither a folder nor a model in the"):
        load("nobody/nothing")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"^the model in .* cannot be read: "):
        load(str(tmp_path))


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install 'nanochat\[hf\]'"):
        load_hf_model("anywhere", device=torch.device("cpu"), dtype=torch.float32)


def test_a_tokenizer_without_begin_and_end_is_refused() -> None:
    class Bare:
        bos_token_id = eos_token_id = None

    with pytest.raises(UserError, match="neither a begin nor an end token"):
        HfTokenizer(Bare(), "model")


def test_other_parts_than_core_need_a_checkpoint_of_ours(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="scored by CORE only"):
        base_eval.main(parse(base_eval.Config, ["--hf-path=x", "--eval=bpb", "--device-type=cpu"]))


# ---- lm-eval -------------------------------------------------------------------------------------


def log_likelihood(model: GPT, context: str, continuation: str) -> float:
    """Sum over the continuation's tokens, one sequence at a time."""
    before = [TOKENIZER.bos_id, *TOKENIZER.encode(context)]
    ids = [TOKENIZER.bos_id, *TOKENIZER.encode(context + continuation)]
    with torch.no_grad():
        table = model(torch.tensor([ids]))[0].log_softmax(-1)
    return sum(float(table[i - 1, ids[i]]) for i in range(len(before), len(ids)))


def lm_eval_decisions(folder: Path, rows: list[dict[str, Any]], model: GPT) -> list[bool]:
    """What lm-eval decides by its length-normalised accuracy on local rows."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.model import LM
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    class Ours(LM):
        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            return [(log_likelihood(model, *request.args), False) for request in requests]

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            raise NotImplementedError

        def generate_until(self, requests: list[Any]) -> list[str]:
            raise NotImplementedError

    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "core_choice.yaml").write_text(
        "task: core_choice\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {folder / 'rows.jsonl'}}}}}\n"
        "output_type: multiple_choice\n"
        "test_split: test\n"
        'doc_to_text: "{{stem}}"\n'
        'doc_to_choice: "{{choices}}"\n'
        'doc_to_target: "{{gold}}"\n'
        'target_delimiter: ""\n'
        "metric_list: [{metric: acc_norm}]\n"
    )
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    result = simple_evaluate(
        model=Ours(),
        tasks=["core_choice"],
        task_manager=manager,
        num_fewshot=0,
        bootstrap_iters=0,
        log_samples=True,
    )
    samples = sorted(result["samples"]["core_choice"], key=lambda sample: sample["doc_id"])
    return [sample["acc_norm"] == 1.0 for sample in samples]


MULTIPLE_CHOICE = {
    "hellaswag_zeroshot": 40,
    "arc_easy": 30,
    "arc_challenge": 30,
    "copa": 40,
    "commonsense_qa": 30,
    "piqa": 30,
    "openbook_qa": 40,
    "hellaswag": 12,
    "agi_eval_lsat_ar": 16,
    "boolq": 12,
    "bigbench_language_identification": 12,
}


@pytest.mark.slow
@pytest.mark.skipif(not SHARED_BUNDLE.exists(), reason="shared/data is not beside the repository")
@pytest.mark.parametrize("label", MULTIPLE_CHOICE)
def test_multiple_choice_decides_as_lm_eval_where_definitions_coincide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, label: str
) -> None:
    """lm-eval divides by the characters of a choice, CORE by its tokens: equal for byte tokens.

    CORE scores what the choices do not share in front, so lm-eval gets that with its question.
    """
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    model = random_model(11, sequence_len=2048)
    task = next(task for task in load_bundle(SHARED_BUNDLE) if task.label == label)
    items = task.items(MULTIPLE_CHOICE[label])
    rows, indices = [], []
    for index, item in enumerate(items):
        prompts = task.prompts(items, index)
        columns = enumerate(zip(*prompts, strict=False))
        start = next(i for i, letters in columns if len(set(letters)) > 1)
        choices = [prompt[start:] for prompt in prompts]
        if "".join(choices).isascii():
            rows.append({"stem": prompts[0][:start], "choices": choices, "gold": item["gold"]})
            indices.append(index)
    assert len(rows) >= len(items) // 2
    ours = decide(GptModel(model), TOKENIZER, task, items, indices)
    assert lm_eval_decisions(tmp_path, rows, model) == ours
