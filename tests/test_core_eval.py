"""CORE: decisions equal the slow oracle, scores equal a count by hand, broken bundles are named."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from core_bundles import write_bundle
from reference import core_eval as reference
from reference.byte_tokenizer import ByteTokenizer

from nanochat.branches import Branches
from nanochat.common import NotScoredError, UserError
from nanochat.core_bundle import load_bundle
from nanochat.core_eval import check_core, evaluate_core, evaluate_task
from nanochat.core_progress import CoreProgress
from nanochat.core_scoring import GptModel, decide
from nanochat.core_tokens import CachedTokenizer
from nanochat.gpt import GPT, GPTConfig
from nanochat.runtime import Runtime, World
from tests.distributed import run_ranks

TOKENIZER: Any = ByteTokenizer()
RUNTIME = Runtime(torch.device("cpu"), torch.float32, World())
SHARED_BUNDLE = Path(__file__).parents[2] / "shared/data/eval_bundle"
WORDS = ("red", "green apple", "on the old table", "seven", "a", "in Rome", "sea", "not today")


def choice_items(count: int) -> list[dict[str, Any]]:
    return [
        {
            "query": f"Question {i}: {WORDS[i % 8]}?",
            "choices": [WORDS[(i + 3 * j) % 8] for j in range(3)],
            "gold": i % 3,
        }
        for i in range(count)
    ]


def schema_items(count: int) -> list[dict[str, Any]]:
    return [
        {
            "context_options": [f"{WORDS[(i + 2 * j) % 8]} because it" for j in range(2)],
            "continuation": f"is {WORDS[i % 8]}",
            "gold": i % 2,
        }
        for i in range(count)
    ]


def language_items(model: GPT, count: int) -> list[dict[str, Any]]:
    """Every other continuation is what `model` says without examples."""
    items = []
    for i in range(count):
        context = f"Number {i} is {WORDS[i % 8]}"
        ids = [TOKENIZER.bos_id, *TOKENIZER.encode(context + ":")]
        said = int(model(torch.tensor([ids]))[0, -1, :128].argmax())
        items.append({"context": f" {context} ", "continuation": chr(said) if i % 2 else "x"})
    return items


def random_model(seed: int, sequence_len: int = 256) -> GPT:
    config = GPTConfig(
        sequence_len=sequence_len, vocab_size=TOKENIZER.vocab_size, n_layer=2, n_head=2, n_embd=32
    )
    model = GPT(config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    # Only visible ASCII is ever likely, so that continuations survive whitespace rules.
    model.lm_head.weight.data[:33] = 0
    model.lm_head.weight.data[127:] = 0
    return model.eval()


def toy_bundle(folder: Path, model: GPT) -> Path:
    return write_bundle(
        folder,
        {
            "choices": {
                "type": "multiple_choice",
                "shots": 3,
                "items": choice_items(41),
                "delimiter": "\nAnswer: ",
                "chance": 33.3,
            },
            "choices_zeroshot": {
                "type": "multiple_choice",
                "shots": 0,
                "items": choice_items(30),
                "chance": 33.3,
            },
            "schemas": {
                "type": "schema",
                "shots": 2,
                "items": schema_items(31),
                "chance": 50,
            },
            "said": {
                "type": "language_modeling",
                "shots": 0,
                "items": language_items(model, 30),
                "delimiter": ":",
            },
            "said_with_examples": {
                "type": "language_modeling",
                "shots": 4,
                "items": language_items(model, 30),
                "delimiter": ":",
            },
        },
    )


# ---- equal to the oracle -------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("max_per_task", [-1, 12])
def test_every_decision_equals_the_slow_oracle(
    tmp_path: Path, seed: int, max_per_task: int
) -> None:
    model = random_model(seed)
    bundle = toy_bundle(tmp_path / "bundle", model)
    result = evaluate_core(GptModel(model), TOKENIZER, bundle, max_per_task, RUNTIME)
    expected = {
        task.label: tuple(reference.decisions(model, TOKENIZER, bundle, task.label, max_per_task))
        for task in result.tasks
    }
    assert {task.label: task.decisions for task in result.tasks} == expected
    assert any(expected["said"])
    assert result.core == pytest.approx(
        reference.core(model, TOKENIZER, bundle, max_per_task), abs=1e-12
    )


def test_a_forward_pass_for_some_columns_or_branches_equals_the_whole_one() -> None:
    config = GPTConfig(64, 50, n_layer=3, n_head=4, n_kv_head=2, n_embd=32, token_shift=0.5)
    model = GPT(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    ids = torch.randint(0, 50, (2, 20), generator=generator)
    columns = torch.tensor([[3, 19, 0], [7, 7, 18]])
    with torch.inference_mode():
        whole = model.hidden(ids)
        some = model.hidden(ids, columns=columns)
        torch.testing.assert_close(some[1, 2], whole[1, 18], rtol=0, atol=1e-5)
        torch.testing.assert_close(some[0], whole[0, columns[0]], rtol=0, atol=1e-5)

        rows = ids.tolist()
        tails = [[rows[0][12:], [1, 2, 3]], [[4], [], rows[1][9:]]]
        branches = Branches(
            [rows[0][:12], rows[1][:9]], tails, padding=0, device=torch.device("cpu")
        )
        ends = model.hidden(branches.prefix_ids, branches, branches.last_columns)[:, 0]
        states = model.hidden(branches.branch_ids, branches)
        torch.testing.assert_close(ends, whole[[0, 1], [11, 8]], rtol=0, atol=1e-5)
        torch.testing.assert_close(states[0, :8], whole[0, 12:], rtol=0, atol=1e-5)
        torch.testing.assert_close(states[1, 1:12], whole[1, 9:], rtol=0, atol=1e-5)
        other = model.hidden(torch.tensor([[*rows[0][:12], 1, 2, 3]]))
        torch.testing.assert_close(states[0, 8:11], other[0, 12:], rtol=0, atol=1e-5)


def test_a_less_precise_copy_decides_only_what_is_clear(tmp_path: Path) -> None:
    precise, rough = GptModel(random_model(8)), random_model(8)
    bundle = toy_bundle(tmp_path / "bundle", precise.model)
    generator = torch.Generator().manual_seed(1)
    for parameter in rough.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    asked = 0

    class Counted(GptModel):
        def _head(self, states: torch.Tensor) -> Any:
            nonlocal asked
            asked += len(states)
            return super()._head(states)

    def decisions(model: GptModel) -> list[tuple[bool, ...]]:
        result = evaluate_core(model, TOKENIZER, bundle, -1, RUNTIME)
        return [task.decisions for task in result.tasks]

    expected = decisions(precise)
    assert decisions(GptModel(rough)) != expected
    assert decisions(Counted(precise.model)) == expected
    asked, all_of_them = 0, asked
    assert decisions(GptModel(rough, exact=Counted(precise.model))) == expected
    assert 0 < asked < all_of_them


def test_a_text_is_tokenized_once_however_often_it_is_asked_for(tmp_path: Path) -> None:
    read: list[str] = []

    class Noting(ByteTokenizer):
        def encode_batch(self, texts: Any, *, prepend: int | None = None) -> Any:
            read.extend(texts)
            return super().encode_batch(texts, prepend=prepend)

    model = random_model(2)
    bundle = toy_bundle(tmp_path / "bundle", model)
    cached = CachedTokenizer(Noting())
    plain = evaluate_core(GptModel(model), TOKENIZER, bundle, 20, RUNTIME)
    for _ in range(2):
        result = evaluate_core(GptModel(model), cached, bundle, 20, RUNTIME)
        assert [task.decisions for task in result.tasks] == [t.decisions for t in plain.tasks]
    assert len(read) == len(set(read)) > 200


def test_batches_do_not_change_decisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(2)
    bundle = toy_bundle(tmp_path / "bundle", model)
    together = evaluate_core(GptModel(model), TOKENIZER, bundle, -1, RUNTIME)
    monkeypatch.setattr("nanochat.core_scoring.CPU_TOKENS_PER_BATCH", 700)
    monkeypatch.setattr("nanochat.core_eval.ITEMS_PER_GROUP", 7)
    monkeypatch.setattr("nanochat.core_scoring.HEAD_ROWS", 5)
    apart = evaluate_core(GptModel(model), TOKENIZER, bundle, -1, RUNTIME)
    assert [task.decisions for task in apart.tasks] == [task.decisions for task in together.tasks]


@pytest.mark.parametrize("kind", ["multiple_choice", "schema"])
def test_prompts_longer_than_the_model_are_cut_from_the_left(tmp_path: Path, kind: str) -> None:
    model = random_model(3, sequence_len=16)
    items = choice_items(9) if kind == "multiple_choice" else schema_items(9)
    for item in items:
        item["query"] = "far away " * (10 + len(item.get("query", ""))) + item.get("query", "")
        item["context_options"] = ["far " * 50 + text for text in item.get("context_options", [])]
    bundle = write_bundle(tmp_path / "b", {"long": {"type": kind, "shots": 0, "items": items}})
    (score,) = evaluate_core(GptModel(model), TOKENIZER, bundle, -1, RUNTIME).tasks
    expected = reference.decisions(model, TOKENIZER, bundle, "long", -1, max_length=160)
    assert score.decisions == tuple(expected)


@pytest.mark.skipif(not SHARED_BUNDLE.exists(), reason="shared/data is not beside the repository")
def test_real_tasks_render_and_decide_as_the_oracle() -> None:
    model = random_model(4)
    labels = {"copa", "winogrande", "bigbench_operators", "bigbench_qa_wikidata"}
    for task in load_bundle(SHARED_BUNDLE):
        if task.label in labels:
            score = evaluate_task(
                GptModel(model), TOKENIZER, task, task.items(14), CoreProgress(None, World())
            )
            expected = reference.decisions(model, TOKENIZER, SHARED_BUNDLE, task.label, 14)
            assert score.decisions == tuple(expected)
            labels.remove(task.label)
    assert not labels


@pytest.mark.skipif(not SHARED_BUNDLE.exists(), reason="shared/data is not beside the repository")
def test_the_real_bundle_names_its_three_missing_tasks() -> None:
    missing = [task.label for task in load_bundle(SHARED_BUNDLE) if not task.path.exists()]
    assert sorted(missing) == ["bigbench_cs_algorithms", "coqa", "winograd"]


# ---- by hand -------------------------------------------------------------------------------------


class AlphabetModel:
    """Believes that each byte is followed by the next one of the alphabet, at 9 nats to 0."""

    training = False
    device = torch.device("cpu")
    cos = torch.zeros(1000, 1)

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        return self.logits(self.hidden(ids))

    def hidden(
        self, ids: torch.Tensor, past: Any = None, columns: torch.Tensor | None = None
    ) -> torch.Tensor:
        if past is not None:
            past.advance(ids.size(1))
        chosen = ids if columns is None else ids.gather(1, columns)
        return torch.nn.functional.one_hot(chosen + 1, TOKENIZER.vocab_size + 1).float()

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        return 9.0 * states[..., : TOKENIZER.vocab_size]


def test_a_toy_bundle_scores_what_a_person_counts(tmp_path: Path) -> None:
    alphabet: Any = AlphabetModel()
    bundle = write_bundle(
        tmp_path / "b",
        {
            "follow": {
                "type": "multiple_choice",
                "shots": 0,
                "chance": 50,
                "delimiter": "",
                # Right, right, wrong, right: "m" follows "l", not "z".
                "items": [
                    {"query": "ab", "choices": ["cd", "xx"], "gold": 0},
                    {"query": "fg", "choices": ["aaa", "h"], "gold": 1},
                    {"query": "kl", "choices": ["m", "z"], "gold": 1},
                    {"query": "pq", "choices": ["b", "r"], "gold": 1},
                ],
            },
            "continue": {
                "type": "language_modeling",
                "shots": 0,
                "chance": 0,
                "delimiter": "",
                # Right, wrong in its last letter.
                "items": [
                    {"context": "ab", "continuation": "cde"},
                    {"context": "ab", "continuation": "cdx"},
                ],
            },
            "which": {
                "type": "schema",
                "shots": 0,
                "chance": 50,
                "delimiter": "",
                # Only the shared end counts: "n" follows "m". One right, one wrong.
                "items": [
                    {"context_options": ["..m", "..q"], "continuation": "no", "gold": 0},
                    {"context_options": ["..m", "..q"], "continuation": "no", "gold": 1},
                ],
            },
        },
    )
    result = evaluate_core(GptModel(alphabet), TOKENIZER, bundle, -1, RUNTIME)
    assert [task.accuracy for task in result.tasks] == [0.75, 0.5, 0.5]
    assert [task.centered for task in result.tasks] == [0.5, 0.5, 0.0]
    assert result.core == pytest.approx(1 / 3)
    assert (result.label, result.is_partial) == ("CORE", False)
    assert result.to_csv().splitlines() == [
        "Task                               , Accuracy  , Centered  ",
        "follow                             , 0.750000  , 0.500000  ",
        "continue                           , 0.500000  , 0.500000  ",
        "which                              , 0.500000  , 0.000000  ",
        "CORE                               ,           , 0.333333  ",
    ]


@pytest.mark.parametrize("kind", ["multiple_choice", "schema"])
def test_an_option_that_is_all_shared_is_scored_by_what_is_left(tmp_path: Path, kind: str) -> None:
    model = random_model(5)
    options = [["on the", "on the mat"], ["mat", "the mat"]]
    items = [
        {"query": "It sat", "choices": pair, "context_options": pair, "continuation": "", "gold": i}
        for pair in options
        for i in (0, 1)
    ]
    task = {"type": kind, "shots": 0, "items": items}
    bundle = write_bundle(tmp_path / "b", {"shared": task})
    (score,) = evaluate_core(GptModel(model), TOKENIZER, bundle, -1, RUNTIME).tasks
    assert score.decisions == tuple(reference.decisions(model, TOKENIZER, bundle, "shared", -1))
    # Each pair is there with either gold: exactly one of them is right.
    assert score.accuracy == 0.5


def test_the_same_options_everywhere_count_as_the_first(tmp_path: Path) -> None:
    alphabet: Any = AlphabetModel()
    items = [{"context_options": ["aXb", "aYb"], "continuation": "c", "gold": i} for i in (0, 1)]
    bundle = write_bundle(
        tmp_path / "b", {"tie": {"type": "schema", "shots": 0, "items": items, "delimiter": ""}}
    )
    (score,) = evaluate_core(GptModel(alphabet), TOKENIZER, bundle, -1, RUNTIME).tasks
    assert score.accuracy == 0.5


# ---- ranks ---------------------------------------------------------------------------------------


class OneOfThree:
    """Rank `rank` of three as it sees itself; the others' decisions are put in by the test."""

    def __init__(self, rank: int) -> None:
        self.rank, self.size, self.is_main = rank, 3, rank == 0
        self.others: list[dict[int, bool]] = []

    def barrier(self) -> None: ...

    def gather_objects(self, own: object) -> list[Any]:
        return [own, *self.others]


def test_ranks_decide_every_item_once(tmp_path: Path) -> None:
    model = random_model(5)
    bundle = toy_bundle(tmp_path / "bundle", model)
    task = load_bundle(bundle)[0]
    items = task.items()
    alone = decide(GptModel(model), TOKENIZER, task, items, range(len(items)))
    worlds: list[Any] = [OneOfThree(rank) for rank in range(3)]
    for world in worlds:
        left = CoreProgress(None, world).remaining(task.label, len(items))
        decisions = decide(GptModel(model), TOKENIZER, task, items, left)
        worlds[0].others.append(dict(zip(left, decisions, strict=True)))
    assert sum(map(len, worlds[0].others)) == len(items)
    gathered = CoreProgress(None, worlds[0]).gathered(task.label, {})
    assert list(gathered.values()) == alone


def core_or_reason(runtime: Runtime, bundle: Path) -> list[tuple[bool, ...]] | str:
    """What a rank ends with."""
    try:
        result = evaluate_core(GptModel(random_model(5)), TOKENIZER, bundle, -1, runtime)
    except UserError as error:
        return f"{type(error).__name__}: {error}"
    return [task.decisions for task in result.tasks]


def test_two_ranks_decide_as_one(tmp_path: Path) -> None:
    bundle = toy_bundle(tmp_path / "bundle", random_model(5))
    alone = core_or_reason(RUNTIME, bundle)
    assert isinstance(alone, list)
    assert run_ranks(core_or_reason, 2, bundle) == [alone, alone]


def test_what_one_rank_cannot_decide_ends_all_with_its_reason(tmp_path: Path) -> None:
    """Only one of the two ranks has the item whose options are the same."""
    items = choice_items(9)
    items[4]["choices"] = ["same", "same", "same"]
    task = {"type": "multiple_choice", "shots": 0, "items": items}
    bundle = write_bundle(tmp_path / "b", {"task": task})
    reasons = run_ranks(core_or_reason, 2, bundle)
    assert reasons[0] == reasons[1] == core_or_reason(RUNTIME, bundle)
    assert "its options are all the same" in reasons[0]


# ---- shown ---------------------------------------------------------------------------------------


def test_a_terminal_shows_items_done_and_the_running_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    model, terminal = random_model(5), Terminal()
    bundle = toy_bundle(tmp_path / "bundle", model)
    monkeypatch.setattr("sys.stderr", terminal)
    result = evaluate_core(GptModel(model), TOKENIZER, bundle, 12, RUNTIME)
    shown = [line for line in terminal.getvalue().split("\r") if "CORE so far" in line]
    assert shown[0].startswith(f"[===={' ' * 16}] 12/60 items  choices  CORE so far -  ")
    first_four = sum(task.centered for task in result.tasks[:4]) / 4
    assert f"] 60/60 items  said_with_examples  CORE so far {first_four:+.4f}" in shown[-1]


# ---- interrupted ---------------------------------------------------------------------------------


def test_a_killed_evaluation_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = random_model(7)
    bundle, folder = toy_bundle(tmp_path / "bundle", model), tmp_path / "progress"
    whole = evaluate_core(GptModel(model), TOKENIZER, bundle, -1, RUNTIME)
    monkeypatch.setattr("nanochat.core_eval.ITEMS_PER_GROUP", 16)
    decided: list[int] = []

    def until_killed(*arguments: Any) -> list[bool]:
        decided.extend(arguments[4])
        if len(decided) > 100:
            raise KeyboardInterrupt
        return decide(*arguments)

    monkeypatch.setattr("nanochat.core_eval.decide", until_killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate_core(GptModel(model), TOKENIZER, bundle, -1, RUNTIME, progress_dir=folder)
    # A power cut in the middle of a line.
    (file,) = folder.iterdir()
    file.write_text(file.read_text() + '["choices", [1, 2')
    first, decided[:] = len(decided), []
    caplog.set_level(logging.INFO)
    resumed = evaluate_core(GptModel(model), TOKENIZER, bundle, -1, RUNTIME, progress_dir=folder)
    assert [task.decisions for task in resumed.tasks] == [task.decisions for task in whole.tasks]
    total = sum(task.num_items for task in whole.tasks)
    assert 0 < len(decided) < total - 60
    assert f"continuing: {total - len(decided)} items" in caplog.text
    assert first > 100
    assert not folder.exists()


def test_another_number_of_ranks_takes_over(tmp_path: Path) -> None:
    worlds: list[Any] = [OneOfThree(rank) for rank in range(3)]
    for world in worlds:
        progress = CoreProgress(tmp_path, world)
        left = progress.remaining("task", 30)[:4]
        progress.add("task", left, [True] * 4)
    alone = CoreProgress(tmp_path, World())
    assert len(alone.remaining("task", 30)) == 30 - 12
    assert set(alone.remaining("task", 30)) | set(alone.done["task"]) == set(range(30))


# ---- missing and broken --------------------------------------------------------------------------


def test_a_missing_file_is_named_and_the_score_is_called_partial(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = random_model(6)
    bundle = toy_bundle(tmp_path / "bundle", model)
    (bundle / "eval_data/schemas.jsonl").unlink()
    with caplog.at_level(logging.WARNING):
        result = evaluate_core(GptModel(model), TOKENIZER, bundle, 10, RUNTIME)
    assert "schemas" in caplog.text
    assert result.missing == ("schemas",)
    assert result.label == "CORE (partial, 4 of 5 tasks, 10 a task)"
    # A comma would be another column.
    assert result.to_csv().splitlines()[-1].startswith("CORE (partial 4 of 5 tasks 10 a task), ")
    assert result.to_text().splitlines()[-1].startswith(f"{result.label}, ")


def test_the_score_of_another_bundle_has_its_name(tmp_path: Path) -> None:
    model = random_model(6)
    bundle = toy_bundle(tmp_path / "bundle", model)

    def label(max_per_task: int) -> str:
        return evaluate_core(
            GptModel(model), TOKENIZER, bundle, max_per_task, RUNTIME, bundle_name="embedded"
        ).label

    assert label(10) == "CORE (embedded, 10 a task)"
    assert label(41) == "CORE (embedded)"  # no task has more
    (bundle / "eval_data/schemas.jsonl").unlink()
    assert label(-1) == "CORE (embedded, partial, 4 of 5 tasks)"
    assert label(40) == "CORE (embedded, partial, 4 of 5 tasks, 40 a task)"


@pytest.mark.parametrize("kind", ["choices", "schemas", "said"])
@pytest.mark.parametrize("has_exact", [False, True])
def test_logits_that_are_no_numbers_give_no_score(
    tmp_path: Path, kind: str, has_exact: bool
) -> None:
    model = random_model(6)
    bundle = toy_bundle(tmp_path / "bundle", model)
    (task,) = (task for task in load_bundle(bundle) if task.label == kind)
    model.lm_head.weight.data[:] = float("nan")
    broken_model = GptModel(model, GptModel(model) if has_exact else None)
    with pytest.raises(NotScoredError, match=rf"{kind}, item 0 .* logits are not numbers"):
        decide(broken_model, TOKENIZER, task, task.items(), range(5))


def test_an_exact_model_scores_what_the_other_one_has_no_numbers_for(tmp_path: Path) -> None:
    precise, rough = GptModel(random_model(6)), random_model(6)
    task = load_bundle(toy_bundle(tmp_path / "bundle", precise.model))[0]
    items = task.items()
    rough.lm_head.weight.data[200] = float("nan")
    decisions = decide(GptModel(rough, precise), TOKENIZER, task, items, range(9))
    assert decisions == decide(precise, TOKENIZER, task, items, range(9))


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ('{"query": "q", "choices": ["same", "same"], "gold": 0}', "its options are all the same"),
        ('{"query": "q", "choices": ["' + 170 * "b" + '", "a"], "gold": 0}', "nothing is left"),
        ('{"query": ', "line 3: not valid JSON"),
    ],
)
def test_what_would_have_no_score_is_found_without_a_model(
    tmp_path: Path, line: str, named: str
) -> None:
    bundle = broken(tmp_path, line)
    with pytest.raises(UserError, match=named):
        check_core(TOKENIZER, bundle, -1, max_length=160, world=World())


def test_a_sound_bundle_passes_and_is_tokenized(tmp_path: Path) -> None:
    model = random_model(6)
    bundle = toy_bundle(tmp_path / "bundle", model)
    read = 0

    class Counting(ByteTokenizer):
        def encode_batch(self, texts: Any, *, prepend: int | None = None) -> Any:
            nonlocal read
            read += len(texts)
            return super().encode_batch(texts, prepend=prepend)

    cached = CachedTokenizer(Counting())
    check_core(cached, bundle, 12, max_length=2560, world=World())
    assert read > 100
    before = read
    evaluate_core(GptModel(model), cached, bundle, 12, RUNTIME)
    assert read == before


def broken(tmp_path: Path, line: str, kind: str = "multiple_choice", shots: int = 0) -> Path:
    good = {
        "multiple_choice": {"query": "q", "choices": ["a", "b"], "gold": 0},
        "schema": {"context_options": ["a", "b"], "continuation": "c", "gold": 0},
        "language_modeling": {"context": "a", "continuation": "b"},
    }[kind]
    task = {"type": kind, "shots": shots, "items": [good, good]}
    bundle = write_bundle(tmp_path / "b", {"task": task})
    with (bundle / "eval_data/task.jsonl").open("a") as file:
        file.write(line + "\n")
    return bundle


@pytest.mark.parametrize(
    ("kind", "line", "named"),
    [
        ("multiple_choice", '{"query": ', "not valid JSON"),
        ("multiple_choice", "[1]", "expected an object, got list"),
        ("multiple_choice", '{"query": "q", "choices": ["a", "b"]}', "needs 'gold' as int"),
        (
            "multiple_choice",
            '{"query": "q", "choices": ["a", "b"], "gold": true}',
            "needs 'gold' as int, got True",
        ),
        ("multiple_choice", '{"query": "q", "choices": ["", "b"], "gold": 1}', "choices is empty"),
        ("multiple_choice", '{"query": "", "choices": ["a", "b"], "gold": 1}', "query is empty"),
        (
            "schema",
            '{"context_options": ["a", " "], "continuation": "c", "gold": 0}',
            "context_options is empty",
        ),
        ("multiple_choice", '{"query": "q", "choices": ["a"], "gold": 0}', "at least two texts"),
        ("multiple_choice", '{"query": "q", "choices": ["a", 1], "gold": 0}', "at least two"),
        ("multiple_choice", '{"query": "q", "choices": ["a", "b"], "gold": 2}', "gold is 2"),
        ("schema", '{"context_options": ["a", "b"], "gold": 0}', "needs 'continuation' as str"),
        ("language_modeling", '{"context": "a", "continuation": " "}', "continuation is empty"),
    ],
)
def test_a_broken_line_is_named_by_file_and_number(
    tmp_path: Path, kind: str, line: str, named: str
) -> None:
    bundle = broken(tmp_path, line, kind)
    with pytest.raises(UserError, match=rf"task\.jsonl, line 3: .*{named}"):
        evaluate_core(GptModel(random_model(0)), TOKENIZER, bundle, -1, RUNTIME)


def test_a_line_that_is_not_utf8_is_named_by_file_and_number(tmp_path: Path) -> None:
    bundle = broken(tmp_path, "")
    path = bundle / "eval_data/task.jsonl"
    path.write_bytes(path.read_bytes() + b'{"query": "\xff", "choices": ["a", "b"], "gold": 0}\n')
    with pytest.raises(UserError, match=r"task\.jsonl, line 4: not valid JSON"):
        evaluate_core(GptModel(random_model(0)), TOKENIZER, bundle, -1, RUNTIME)


@pytest.mark.parametrize("shots", [2, 10])
def test_more_shots_than_other_items_is_refused(tmp_path: Path, shots: int) -> None:
    bundle = broken(tmp_path, "", shots=shots)
    with pytest.raises(UserError, match=rf"task shows {shots} solved examples .* but has 2; add"):
        evaluate_core(GptModel(random_model(0)), TOKENIZER, bundle, -1, RUNTIME)


def test_fewer_items_a_task_than_its_shots_need_are_refused(tmp_path: Path) -> None:
    bundle = broken(tmp_path, "", shots=1)
    with pytest.raises(
        UserError, match=r"task shows 1 solved .* 1 items .* too few; .* at least 2"
    ):
        evaluate_core(GptModel(random_model(0)), TOKENIZER, bundle, 1, RUNTIME)


def test_an_empty_file_is_named(tmp_path: Path) -> None:
    bundle = broken(tmp_path, "", shots=1)
    (bundle / "eval_data/task.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"eval_data/task\.jsonl is empty; put the items of task"):
        evaluate_core(GptModel(random_model(0)), TOKENIZER, bundle, -1, RUNTIME)


@pytest.mark.parametrize("kind", ["multiple_choice", "schema"])
def test_options_that_do_not_differ_are_refused(tmp_path: Path, kind: str) -> None:
    pair = ["same", "same"]
    item = {"query": "q", "choices": pair, "context_options": pair, "continuation": "c", "gold": 0}
    bundle = broken(tmp_path, json.dumps(item), kind=kind)
    with pytest.raises(UserError, match=r"task, item \d of .* its options are all the same"):
        evaluate_core(GptModel(random_model(0)), TOKENIZER, bundle, -1, RUNTIME)


def test_an_answer_longer_than_the_model_cannot_be_scored(tmp_path: Path) -> None:
    choices = json.dumps(["b" * 170, "a"])
    bundle = broken(tmp_path, f'{{"query": "q", "choices": {choices}, "gold": 0}}')
    short = GptModel(random_model(0, sequence_len=16))
    with pytest.raises(UserError, match=r"task, item \d .* nothing is left to score"):
        evaluate_core(short, TOKENIZER, bundle, -1, RUNTIME)


def test_answers_glued_to_their_question_are_refused(tmp_path: Path) -> None:
    class Merging(ByteTokenizer):
        """Every text is one token, so that no text begins another."""

        def encode(self, text: str) -> list[int]:
            return [len(text)]

    merging: Any = Merging()
    task = {
        "type": "language_modeling",
        "shots": 0,
        "delimiter": "",
        "items": [{"context": "a", "continuation": "b"}],
    }
    bundle = write_bundle(tmp_path / "b", {"glued": task})
    with pytest.raises(UserError, match="glued: the tokens of a question do not begin"):
        evaluate_core(GptModel(random_model(0)), merging, bundle, -1, RUNTIME)


def one_task(copies: int = 1, **changes: Any) -> str:
    """core.yaml for the bundle of `broken`, with another value here and there."""
    entry = {
        "label": "task",
        "icl_task_type": "multiple_choice",
        "dataset_uri": "task.jsonl",
        "num_fewshot": [0],
    }
    return json.dumps({"icl_tasks": [{**entry, **changes}] * copies})


def test_a_folder_that_is_no_bundle_is_named(tmp_path: Path) -> None:
    fetch = "python -m scripts.assets prefetch eval-bundle"
    with pytest.raises(UserError, match=rf"no CORE bundle in .*core\.yaml is missing; .*{fetch}"):
        load_bundle(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "named"),
    [
        ("core.yaml", "icl_tasks: [", "not a list of icl_tasks"),
        ("core.yaml", "tasks: []", "not a list of icl_tasks"),
        ("core.yaml", "icl_tasks:", "not a list of icl_tasks"),
        ("core.yaml", "", "icl_tasks is nothing"),
        ("core.yaml", "icl_tasks: many", "icl_tasks is 'many'"),
        ("core.yaml", "icl_tasks: [{label: task}]", "is incomplete; icl_task_type is missing"),
        ("core.yaml", "icl_tasks: [task]", "'task' is incomplete; it has no label"),
        ("core.yaml", one_task(dataset_uri=3), "dataset_uri is 3, not text"),
        ("core.yaml", one_task(num_fewshot=[]), r"num_fewshot is \[\], not a list with a whole"),
        ("core.yaml", one_task(num_fewshot=5), "num_fewshot is 5, not a list with a whole"),
        ("core.yaml", one_task(num_fewshot=[True]), r"num_fewshot is \[True\], not a list"),
        ("core.yaml", one_task(num_fewshot=[-1]), "task shows -1 examples"),
        ("core.yaml", one_task(continuation_delimiter=None), "delimiter of task is None, not text"),
        ("core.yaml", one_task(2), "two tasks with the label task"),
        ("eval_meta_data.csv", "Eval Task,Random baseline\n", "no random baseline for task"),
        ("eval_meta_data.csv", "a,b\n1,2\n", "needs the columns"),
        ("eval_meta_data.csv", "Eval Task,Random baseline\ntask,many\n", "needs the columns"),
        ("eval_meta_data.csv", "Eval Task,Random baseline\ntask,100\n", "of task is 100 %"),
        ("eval_meta_data.csv", "Eval Task,Random baseline\ntask,nan\n", "of task is nan %"),
        ("eval_meta_data.csv", b"Eval Task,Random baseline\nt\xff,1\n", "needs the columns"),
    ],
)
def test_a_broken_description_is_named(
    tmp_path: Path, file: str, content: str | bytes, named: str
) -> None:
    bundle = broken(tmp_path, "")
    (bundle / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=named) as caught:
        load_bundle(bundle)
    said = str(caught.value)
    assert not any(word in said for word in ("NoneType", "Error(", "\n"))


def test_an_unknown_type_is_named_with_the_known_ones(tmp_path: Path) -> None:
    bundle = broken(tmp_path, "")
    config = (bundle / "core.yaml").read_text().replace("multiple_choice", "essay")
    (bundle / "core.yaml").write_text(config)
    with pytest.raises(UserError, match="type 'essay'; known types are multiple_choice"):
        load_bundle(bundle)


def test_a_bundle_without_any_items_is_refused(tmp_path: Path) -> None:
    bundle = broken(tmp_path, "")
    (bundle / "eval_data/task.jsonl").unlink()
    with pytest.raises(UserError, match=r"no task of .* has its file"):
        evaluate_core(GptModel(random_model(0)), TOKENIZER, bundle, -1, RUNTIME)
