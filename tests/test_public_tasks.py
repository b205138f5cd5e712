"""The public tasks: formats, splits, order, scoring, mixtures, and rows that cannot be used."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from public_data import (
    ARC_ROW,
    GSM8K_ROW,
    HUMANEVAL_ROW,
    MMLU_ROW,
    REASON,
    SHARED,
    place,
    place_shared,
)

from nanochat.common import UserError
from nanochat.conversation import Part
from nanochat.execution import sandbox_problem
from nanochat.tools import calculate
from tasks import mixtures
from tasks.arc import ARC
from tasks.common import TaskMixture, TaskSequence, question_of
from tasks.gsm8k import GSM8K, with_calls
from tasks.hub import HubTask
from tasks.humaneval import HumanEval, imports_of, program_in
from tasks.mmlu import MMLU
from tasks.smoltalk import SmolTalk
from tasks.spellingbee import SimpleSpelling, SpellingBee
from tasks.task_sets import missing_assets


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    return tmp_path / "base"


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base folder with the real data sets."""
    if not SHARED.is_dir():
        pytest.skip(REASON)
    folder = tmp_path_factory.mktemp("real")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder))
        place_shared()
    return folder


def one(task: HubTask, row: dict[str, Any]) -> Any:
    """The conversation of a split with a single row."""
    place(task.rows.asset, [row])
    return task[0]


# ---- formats ------------------------------------------------------------------------------------


def test_arc_asks_with_the_letters_of_the_row() -> None:
    task = ARC("ARC-Easy", "test")
    conversation = one(task, ARC_ROW)
    assert conversation.messages[0].content == (
        "Multiple choice: What is hot?\n- ice=A\n- fire=B\n- snow=C\n\nAnswer with the letter only."
    )
    assert conversation.messages[1].content == "B"
    assert conversation.letters == ("A", "B", "C")
    assert task.evaluate(conversation, "B")
    assert not task.evaluate(conversation, "C")
    assert (task.name, task.eval_type, task.chance) == ("ARC-Easy", "categorical", 0.25)


def test_arc_questions_may_have_numbers_for_letters() -> None:
    choices = {"text": ["ice", "fire", "snow", "fog"], "label": ["1", "2", "3", "4"]}
    conversation = one(ARC("ARC-Challenge"), ARC_ROW | {"choices": choices, "answerKey": "4"})
    assert conversation.letters == ("1", "2", "3", "4")
    assert conversation.messages[-1].text == "4"
    assert "- fog=4\n" in conversation.messages[0].text


def test_mmlu_asks_with_the_letters_a_to_d() -> None:
    task = MMLU("test")
    conversation = one(task, MMLU_ROW)
    assert conversation.messages[0].content == (
        "Multiple choice: What is 2 + 2?\n- 1=A\n- 2=B\n- 3=C\n- 4=D\n\n"
        "Answer with the letter only."
    )
    assert conversation.messages[1].content == "D"
    assert task.evaluate(conversation, "D")


def test_the_question_without_its_choices_can_be_had_back() -> None:
    assert question_of(one(MMLU("test"), MMLU_ROW)) == "What is 2 + 2?"
    assert question_of(one(GSM8K("test"), GSM8K_ROW)) == GSM8K_ROW["question"]


def test_gsm8k_calculations_become_calls_of_the_tool() -> None:
    task = GSM8K("train")
    conversation = one(task, GSM8K_ROW)
    assert conversation.messages[1].content == (
        Part("text", "He has 3*4="),
        Part("python", "3*4"),
        Part("python_output", "12"),
        Part("text", "12 nuts.\nLeft are "),
        Part("python", "12-2"),
        Part("python_output", "10"),
        Part("text", "10.\n#### 10"),
    )


@pytest.mark.parametrize(
    ("answer", "parts"),
    [
        ("No call.\n#### 1", [("text", "No call.\n#### 1")]),
        ("<<1+1=2>>2", [("python", "1+1"), ("python_output", "2"), ("text", "2")]),
        ("x <<2=1+1=2>>", [("text", "x "), ("python", "2=1+1"), ("python_output", "2")]),
        ("<<1=1>><<2=2>>", [("python", "1"), ("python_output", "1")] * 1
         + [("python", "2"), ("python_output", "2")]),
    ],
)  # fmt: skip
def test_a_calculation_is_cut_at_its_last_equals_sign(
    answer: str, parts: list[tuple[str, str]]
) -> None:
    assert [(part.type, part.text) for part in with_calls(answer)] == parts


@pytest.mark.parametrize(
    ("reference", "completion", "is_right"),
    [
        ("1,200", "so #### 1,200", True),
        ("1,200", "#### 1200", True),
        ("-5", "#### -5", True),
        ("-5", "#### 5", False),
        ("2.5", "#### 2.5", True),
        ("18", "#### 18.0", False),  # compared as text, as the 2025 nanochat does
        ("18", "18", False),
        ("18", "####18", False),
        ("18", "#### 17 no, #### 18", False),
        ("18", "", False),
    ],
)
def test_gsm8k_is_right_when_the_first_number_after_the_mark_is_the_same(
    reference: str, completion: str, is_right: bool
) -> None:
    task = GSM8K("test")
    conversation = one(task, GSM8K_ROW | {"answer": f"Think.\n#### {reference}"})
    assert task.evaluate(conversation, completion) is is_right
    assert task.reward(conversation, completion) == float(is_right)


def test_smoltalk_keeps_the_system_message() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
    ]
    conversation = one(SmolTalk("train"), {"messages": messages, "source": "made"})
    assert [message.role for message in conversation.messages] == ["system", "user", "assistant"]
    with pytest.raises(UserError, match="for training and cannot be evaluated"):
        SmolTalk("test").evaluate(conversation, "Hello")


# ---- HumanEval ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "program"),
    [
        ("def f(): pass", "def f(): pass"),
        ("Here:\n```python\ndef f():\n    pass\n```\nDone.", "def f():\n    pass\n"),
        ("```\nx = 1\n```\n```python\nx = 2\n```", "x = 1\n"),
        ("```bash\npip install x\n```\nThen:\n```python\nx = 1\n```\nThat is all.", "x = 1\n"),
        ('```json\n{"a": 1}\n```\nand\n```\nx = 1\n```', "x = 1\n"),
        ("```Python3 title=a.py\nx = 1\n```", "x = 1\n"),
        ("``` py \nx = 1\n```", "x = 1\n"),
        ("```sage\nx = 1\n```\nprose\n```text\nx = 2\n```", "x = 1\n"),
        ("Use ```math``` here:\n```python\nx = 1\n```", "x = 1\n"),
        ("```python\nnever closed", "```python\nnever closed"),
        ("", ""),
    ],
)
def test_the_program_is_the_first_block_of_python_or_of_anything_or_all(
    completion: str, program: str
) -> None:
    assert program_in(completion) == program


def test_the_imports_at_the_top_of_a_prompt_are_kept() -> None:
    prompt = "# of lists\nfrom typing import List\n\nimport math\ndef f():\n    import os\n"
    assert imports_of(prompt) == "from typing import List\nimport math\n"
    assert imports_of("def f():\n    pass\nimport late\n") == ""


@pytest.mark.skipif(sandbox_problem() is not None, reason=str(sandbox_problem()))
@pytest.mark.parametrize(
    ("completion", "is_right"),
    [
        (HUMANEVAL_ROW["prompt"] + HUMANEVAL_ROW["canonical_solution"], True),
        ("Sure:\n```python\ndef double(x):\n    return int(math.ldexp(x, 1))\n```", True),
        ("def double(x):\n    return x * x - x", False),
        ("I do not know.", False),
        ("import os\nos._exit(0)", False),
    ],
)
def test_humaneval_is_right_when_the_program_passes_its_tests(
    completion: str, is_right: bool
) -> None:
    task = HumanEval()
    conversation = one(task, HUMANEVAL_ROW)
    assert task.reason_to_skip() is None
    assert task.evaluate(conversation, completion) is is_right


def test_without_a_sandbox_humaneval_says_why_it_has_no_score(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task = HumanEval()
    place(task.rows.asset, [HUMANEVAL_ROW])
    monkeypatch.setattr("tasks.humaneval.sandbox_problem", lambda unsafe: "there are no walls here")
    assert task.reason_to_skip() == "skipped: there are no walls here"


# ---- rows that cannot be used ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "row", "named"),
    [
        (ARC("ARC-Easy"), ARC_ROW | {"answerKey": ""}, r"its answer is '', none of A, B, C"),
        (ARC("ARC-Easy"), ARC_ROW | {"answerKey": "E"}, r"its answer is 'E', none of A, B, C"),
        (
            ARC("ARC-Easy"),
            ARC_ROW | {"choices": {"text": ["ice", "fire"], "label": ["A", "B", "C"]}},
            "it has 2 choices and 3 letters",
        ),
        (ARC("ARC-Easy"), {"question": "?", "answerKey": "A"}, "it has no column 'choices'"),
        (ARC("ARC-Easy"), ARC_ROW | {"choices": None}, "its choices are None, not texts with"),
        (
            ARC("ARC-Easy"),
            ARC_ROW | {"choices": {"text": None, "label": ["A", "B", "C"]}},
            "its choices are None, not a list of texts",
        ),
        (
            ARC("ARC-Easy"),
            ARC_ROW | {"choices": {"text": ["ice", None, "snow"], "label": ["A", "B", "C"]}},
            r"its choices are \['ice', None, 'snow'\], not a list of texts",
        ),
        (
            ARC("ARC-Easy"),
            ARC_ROW | {"choices": {"text": ["ice", "fire", "snow"], "label": None}},
            "its letters are None, not a list of texts",
        ),
        (
            ARC("ARC-Easy"),
            ARC_ROW | {"choices": {"text": ["ice", "fire", "snow"], "label": ["A", "B", "B"]}},
            "its letters are A, B, B; each must come once",
        ),
        (ARC("ARC-Easy"), ARC_ROW | {"answerKey": None}, "its answer is None, none of A, B, C"),
        (MMLU("test"), MMLU_ROW | {"answer": None}, "its answer is None, not a number from 0 to 3"),
        (MMLU("test"), MMLU_ROW | {"answer": 4}, "its answer is 4, not a number from 0 to 3"),
        (MMLU("test"), MMLU_ROW | {"choices": ["1", "2"]}, "it has 2 choices, not 4"),
        (MMLU("test"), MMLU_ROW | {"choices": None}, "its choices are None, not a list of texts"),
        (
            MMLU("test"),
            MMLU_ROW | {"choices": ["1", None, "3", "4"]},
            r"its choices are \['1', None, '3', '4'\], not a list of texts",
        ),
        # The form of the hub's own configuration `auxiliary_train`; ours is a split of `all`.
        (MMLU("auxiliary_train"), {"train": MMLU_ROW}, "it has no column 'choices'"),
        (MMLU("test"), MMLU_ROW | {"question": None}, "its question is None, not text"),
        (GSM8K("test"), GSM8K_ROW | {"answer": "Ten."}, 'its answer has no number after "#### "'),
        (GSM8K("test"), GSM8K_ROW | {"answer": None}, "its answer is None, not text"),
        (GSM8K("test"), GSM8K_ROW | {"answer": "<<1>>\n#### 1"}, "<<1>> has no result"),
        (HumanEval(), HUMANEVAL_ROW | {"test": None}, "its test is None, not text"),
        (HumanEval(), HUMANEVAL_ROW | {"entry_point": None}, "its entry_point is None"),
        (
            SmolTalk("train"),
            {"messages": [{"role": "assistant", "content": "a"}]},
            "message 0 is from assistant, expected user",
        ),
    ],
)
def test_a_row_that_cannot_be_used_is_named(task: HubTask, row: dict[str, Any], named: str) -> None:
    with pytest.raises(
        UserError, match=rf"row 0 of {task.rows.asset.name} cannot be used: .*{named}"
    ):
        one(task, row)


def test_an_unknown_subset_is_refused() -> None:
    with pytest.raises(UserError, match="no subset 'ARC-Hard'; use ARC-Easy or ARC-Challenge"):
        ARC("ARC-Hard")  # type: ignore[arg-type]


# ---- order and slices --------------------------------------------------------------------------


def numbered(count: int) -> list[dict[str, Any]]:
    return [MMLU_ROW | {"question": f"question {i}"} for i in range(count)]


def test_rows_are_shuffled_with_seed_42_and_sliced_after_that() -> None:
    place(MMLU("test").rows.asset, numbered(20))
    order = np.random.default_rng(42).permutation(20)
    asked = [question_of(conversation) for conversation in MMLU("test", start=3, stop=17, step=5)]
    assert asked == [f"question {order[i]}" for i in (3, 8, 13)]


def test_a_stop_past_the_end_and_empty_slices_are_defined() -> None:
    place(MMLU("test").rows.asset, numbered(5))
    assert len(MMLU("test", stop=5_200)) == 5
    assert len(MMLU("test", start=5, stop=9)) == 0
    assert list(MMLU("test", stop=0)) == []
    assert len(TaskMixture([])) == len(TaskSequence([])) == 0
    mixture = TaskMixture([MMLU("test", stop=0), MMLU("test"), MMLU("test", start=4)])
    assert Counter(map(question_of, mixture)).most_common(1)[0][1] == 2
    assert len(mixture) == 6


# ---- the real data sets ------------------------------------------------------------------------


def test_real_splits_have_the_documented_rows(real: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(real))
    assert (
        missing_assets([*mixtures.evaluation_tasks("public"), *mixtures.tasks_of("rl", "public")])
        == []
    )
    for task, rows in (
        (ARC("ARC-Easy", "train"), 2_251),
        (ARC("ARC-Easy", "test"), 2_376),
        (ARC("ARC-Challenge", "train"), 1_119),
        (ARC("ARC-Challenge", "test"), 1_172),
        (GSM8K("train"), 7_473),
        (HumanEval(), 164),
    ):
        assert len(task) == rows
    assert len(SimpleSpelling().words) == len(SpellingBee().words) == 370_099


def test_real_rows_are_usable_and_accept_their_reference(
    real: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(real))
    letters = Counter()
    for task in mixtures.evaluation_tasks("public"):
        if task.name == "HumanEval":
            assert len(list(task)) == 164
            continue
        for index in range(0, len(task), 7):
            conversation = task[index]
            assert task.evaluate(conversation, conversation.messages[-1].text)
            assert not task.evaluate(conversation, "")
            letters.update(conversation.letters)
    assert set(letters) <= set("ABCDE1234")
    assert set(letters) >= set("ABCD")


def test_calculations_of_gsm8k_are_what_the_tool_gives(
    real: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(real))
    agreeing = calls = 0
    for conversation in GSM8K("train", step=10):
        content = conversation.messages[1].content
        for call, output in pairwise(content if isinstance(content, tuple) else ()):
            if call.type == "python":
                assert output.type == "python_output"
                calls += 1
                agreeing += calculate(call.text) == output.text
    assert calls > 2_000
    assert agreeing / calls > 0.95
