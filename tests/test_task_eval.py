"""Task evaluation: letters by logits, judged answers, intervals, ChatCORE, clear refusals."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest
import torch
from reference.byte_tokenizer import ByteTokenizer

from nanochat.answers import plain_text
from nanochat.common import NotScoredError, UserError
from nanochat.conversation import Conversation, chat
from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.runtime import Runtime, World
from nanochat.task_eval import Sampling, run_categorical, run_generative, run_task
from nanochat.task_results import Record, TaskResult, chat_core, wilson_interval
from tests import short_memory
from tests.distributed import run_ranks

TOKENIZER: Any = ByteTokenizer()
QUESTIONS = ("Which one?", "And now?", "What is the colour of the sea on a sunny day?", "Hm?")


def random_model(seed: int = 0, sequence_len: int = 128) -> GPT:
    config = GPTConfig(
        sequence_len=sequence_len, vocab_size=TOKENIZER.vocab_size, n_layer=2, n_head=2, n_embd=32
    )
    model = GPT(config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return model.eval()


class Judged:
    """A task that every machine can judge."""

    def reason_to_skip(self) -> str | None:
        return None


class Letters(Judged):
    """Multiple choice with letters that differ between problems."""

    name = "letters"
    eval_type = "categorical"
    chance = 0.25

    def __init__(self, size: int = 23, letters: tuple[str, ...] | None = None) -> None:
        self.size, self.letters = size, letters

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Conversation:
        letters = tuple("ABCDE"[: 3 + index % 3]) if self.letters is None else self.letters
        question = f"{index}. {QUESTIONS[index % 4]}"
        return Conversation(chat(question, "B").messages, letters)

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        return completion == conversation.messages[-1].text


class Vowels(Judged):
    """Right are answers with at least `needed` of a few letters."""

    name = "vowels"
    eval_type = "generative"
    chance = 0.0

    def __init__(self, size: int = 11, needed: int = 1) -> None:
        self.size, self.needed = size, needed

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Conversation:
        return chat(f"{index}. {QUESTIONS[index % 4]}", "any")

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        return sum(map(completion.count, "aeiouAEIOU")) >= self.needed


# ---- categorical ---------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_the_likeliest_letter_after_each_prompt_is_chosen(batch_size: int) -> None:
    model, task = random_model(), Letters()
    expected = []
    for index in range(len(task)):
        prompt = TOKENIZER.render_for_completion(task[index])
        logits = model(torch.tensor([prompt]))[0, -1]
        expected.append(max(task[index].letters, key=lambda letter: logits[ord(letter)].item()))
    result = run_categorical(task, TOKENIZER, model, batch_size=batch_size)
    assert [record.completions[0] for record in result.records] == expected
    assert result.num_passed == expected.count("B")
    assert result.num_problems == 23
    assert 0 < result.accuracy < 1


def test_max_problems_takes_the_first_and_no_more_than_there_are() -> None:
    model = random_model()
    assert run_categorical(Letters(), TOKENIZER, model, max_problems=7).num_problems == 7
    assert run_categorical(Letters(), TOKENIZER, model, max_problems=700).num_problems == 23
    assert run_categorical(Letters(), TOKENIZER, model, max_problems=-1).num_problems == 23


def test_a_letter_of_several_tokens_is_refused() -> None:
    with pytest.raises(UserError, match=r"letter 'AB' of problem 0 of letters is 2 tokens"):
        run_categorical(Letters(letters=("A", "AB")), TOKENIZER, random_model())


def test_a_problem_without_letters_is_refused() -> None:
    with pytest.raises(UserError, match=r"problem 0 of letters has no letters"):
        run_categorical(Letters(letters=()), TOKENIZER, random_model())


def test_logits_that_are_no_numbers_choose_no_letter() -> None:
    model = random_model()
    model.lm_head.weight.data[ord("B")] = float("nan")
    with pytest.raises(NotScoredError, match=r"problem \d+ of letters: .* are not numbers"):
        run_categorical(Letters(), TOKENIZER, model)


def test_choices_are_made_in_smaller_batches_when_memory_is_short(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = random_model()
    expected = run_categorical(Letters(), TOKENIZER, model)
    short_memory.allow_prompts(monkeypatch, 3)
    result = run_categorical(Letters(), TOKENIZER, model, batch_size=8)
    assert result.records == expected.records
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        f"out of memory with {rows} answers at once: going on with {fewer}; {short_memory.REASON}"
        for rows, fewer in ((8, 4), (4, 2))
    ]


def test_a_choice_that_has_no_room_even_alone_gives_no_score(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    short_memory.allow_prompts(monkeypatch, 0)
    with pytest.raises(NotScoredError, match=r"letters: out of memory with a single answer \(CUDA"):
        run_categorical(Letters(), TOKENIZER, random_model())


# ---- generative ----------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_answers_are_those_of_the_engine_one_by_one(batch_size: int) -> None:
    model, task = random_model(1), Vowels()
    sampling = Sampling(max_new_tokens=10)
    result = run_generative(task, TOKENIZER, model, sampling=sampling, batch_size=batch_size)
    engine = Engine(model, TOKENIZER)
    for record in result.records:
        prompt = TOKENIZER.render_for_completion(task[record.index])
        (tokens,), _ = engine.generate_batch(prompt, max_tokens=10, temperature=0.0)
        text = plain_text(TOKENIZER, tokens[len(prompt) :])
        assert record.completions == (text,)
        assert record.verdicts == (task.evaluate(task[record.index], text),)
    assert result.num_passed == sum(record.verdicts[0] for record in result.records)


def broken_at(name: str) -> GPT:
    """A model with NaN in one place of one of its matrices."""
    model = random_model(1)
    matrix = dict(model.named_parameters())[name]
    with torch.no_grad():
        matrix[-1, 0] = float("nan")
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "name",
    ["lm_head.weight", "transformer.h.0.mlp.c_fc.weight", "transformer.h.0.attn.c_q.weight"],
)
def test_logits_that_are_no_numbers_write_no_answer(
    name: str, temperature: float, dtype: torch.dtype
) -> None:
    model = broken_at(name).cast_matrices(dtype)
    sampling = Sampling(num_samples=2, max_new_tokens=5, temperature=temperature, top_k=50)
    with pytest.raises(NotScoredError, match=r"problem 0 of vowels: .* are not numbers \(NaN\)"):
        run_generative(Vowels(), TOKENIZER, model, sampling=sampling)


def test_a_token_whose_embedding_is_no_number_is_found_when_the_answer_holds_it() -> None:
    model, task = random_model(1), Vowels(size=3)
    prompt = TOKENIZER.render_for_completion(task[1])
    (tokens,), _ = Engine(model, TOKENIZER).generate_batch(prompt, max_tokens=8, temperature=0.0)
    written = tokens[len(prompt) + 2]
    assert written not in tokens[: len(prompt)]
    model.transformer.wte.weight.data[written] = float("nan")
    with pytest.raises(NotScoredError, match=r"of vowels: .* are not numbers"):
        run_generative(task, TOKENIZER, model, sampling=Sampling(max_new_tokens=8))


def test_answers_are_written_in_smaller_batches_when_memory_is_short(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, task = random_model(1), Vowels(size=23)
    sampling = Sampling(num_samples=2, max_new_tokens=10, temperature=1.0)
    expected = run_generative(task, TOKENIZER, model, sampling=sampling)
    short_memory.allow_rows(monkeypatch, 5)
    result = run_generative(task, TOKENIZER, model, sampling=sampling, batch_size=20)
    assert [r.completions for r in result.records] == [r.completions for r in expected.records]
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        f"out of memory with {rows} answers at once: going on with {fewer}; {short_memory.REASON}"
        for rows, fewer in ((20, 10), (10, 5))
    ]


def test_a_task_whose_answers_have_no_room_even_alone_has_no_score(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    short_memory.allow_rows(monkeypatch, 0)
    with pytest.raises(NotScoredError, match=r"vowels: out of memory with a single answer \(CUDA"):
        run_generative(Vowels(), TOKENIZER, random_model(), batch_size=4)


def test_a_task_whose_answers_do_not_fit_what_is_left_has_no_score(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("nanochat.scheduler.affordable_tokens", lambda decoder, max_rows: 5)
    with pytest.raises(NotScoredError, match=r"vowels: .* than the 5 tokens of cache memory"):
        run_generative(Vowels(), TOKENIZER, random_model())


def test_one_right_sample_of_several_passes_a_problem() -> None:
    sampling = Sampling(num_samples=4, max_new_tokens=8, temperature=1.0)
    result = run_generative(Vowels(), TOKENIZER, random_model(2), sampling=sampling)
    passed = [any(record.verdicts) for record in result.records]
    every = [all(record.verdicts) for record in result.records]
    assert result.num_passed == sum(passed)
    assert passed != every
    assert all(len(set(record.completions)) > 1 for record in result.records)


def test_samples_do_not_depend_on_the_number_of_problems_or_the_batch() -> None:
    sampling = Sampling(num_samples=2, max_new_tokens=8, temperature=1.0)
    model = random_model(3)
    few = run_generative(Vowels(), TOKENIZER, model, sampling=sampling, max_problems=3)
    all_ = run_generative(Vowels(), TOKENIZER, model, sampling=sampling, batch_size=5)
    assert [r.completions for r in few.records] == [r.completions for r in all_.records[:3]]


@pytest.mark.parametrize("task", [Letters(4), Vowels(4)])
def test_a_prompt_longer_than_the_context_is_named(task: Any) -> None:
    with pytest.raises(
        UserError, match=rf"2 of 4 prompts of {task.name} do not fit .*context of 16.* tokens"
    ):
        run_task(task, TOKENIZER, random_model(sequence_len=16))


def test_no_samples_is_refused() -> None:
    with pytest.raises(UserError, match="0 samples"):
        Sampling(num_samples=0)
    with pytest.raises(UserError, match="10001 samples asked for; ask for at most 10,000"):
        Sampling(num_samples=10_001)


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"temperature": -1.0}, "temperature is -1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, "top-k is -1"),
        ({"max_new_tokens": 0}, "max tokens is 0"),
    ],
)
def test_sampling_that_means_nothing_is_refused_before_it_is_used(
    setting: dict[str, Any], named: str
) -> None:
    with pytest.raises(UserError, match=named):
        Sampling(**setting)


@pytest.mark.parametrize(("cpus", "threads"), [(64, 8), (6, 3), (1, 1)])
def test_judges_share_the_processors_with_the_other_ranks_of_the_machine(
    cpus: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OneOfTwo(World):
        def sum(self, value: float) -> float:
            return value

        def gather_objects(self, obj: object) -> list[Any]:
            return [obj, obj if isinstance(obj, str) else None]

    judges = set()

    class Noting(Vowels):
        def evaluate(self, conversation: Conversation, completion: str) -> bool:
            together.wait(10)
            judges.add(threading.get_ident())
            return True

    together = threading.Barrier(threads)
    monkeypatch.setattr("nanochat.task_eval.usable_cpus", lambda: cpus)
    task = Noting(2 * 2 * threads)
    world = OneOfTwo(0, 2)
    run_generative(
        task, TOKENIZER, random_model(), sampling=Sampling(max_new_tokens=1), world=world
    )
    assert len(judges) == threads


# ---- both ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [Letters(0), Vowels(0)])
def test_an_empty_task_has_no_accuracy(task: Any) -> None:
    with pytest.raises(NotScoredError, match=f"task {task.name} has no problems"):
        run_task(task, TOKENIZER, random_model())


def test_a_training_task_is_refused() -> None:
    task: Any = Vowels()
    task.eval_type = "training"
    with pytest.raises(UserError, match="vowels is for training"):
        run_task(task, TOKENIZER, random_model())


class OneOfThree(World):
    """A rank whose sums are its own."""

    def sum(self, value: float) -> float:
        return value

    def gather_objects(self, obj: object) -> list[Any]:
        return [obj]


@pytest.mark.parametrize("task", [Letters(), Vowels()])
def test_ranks_share_the_problems(task: Any) -> None:
    model, sampling = random_model(4), Sampling(max_new_tokens=6)
    alone = run_task(task, TOKENIZER, model, sampling=sampling)
    parts = [
        run_task(task, TOKENIZER, model, sampling=sampling, world=OneOfThree(rank, 3))
        for rank in range(3)
    ]
    together = sorted((r for part in parts for r in part.records), key=lambda r: r.index)
    assert tuple(together) == alone.records
    assert sum(part.num_passed for part in parts) == alone.num_passed
    assert {part.num_problems for part in parts} == {alone.num_problems}


def records_or_reason(runtime: Runtime, task: Any) -> tuple[Record, ...] | str:
    """What a rank ends with."""
    sampling = Sampling(num_samples=2, max_new_tokens=6, temperature=1.0)
    try:
        return run_task(
            task, TOKENIZER, random_model(4), sampling=sampling, world=runtime.world
        ).records
    except UserError as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("task", [Letters(), Vowels()])
def test_two_processes_answer_as_one(task: Any) -> None:
    alone = records_or_reason(Runtime(torch.device("cpu"), torch.float32, World()), task)
    parts = run_ranks(records_or_reason, 2, task)
    assert [len(part) for part in parts] == [(len(task) + 1) // 2, len(task) // 2]
    assert tuple(sorted((r for part in parts for r in part), key=lambda r: r.index)) == alone


class OneBroken(Letters):
    """One of the two ranks has a row that cannot be read."""

    def __getitem__(self, index: int) -> Conversation:
        if index == 3:
            raise UserError("row 3 has no answer")
        return super().__getitem__(index)


def test_what_one_rank_cannot_read_ends_all_with_its_reason() -> None:
    reason = "NotScoredError: task letters, problem 3: row 3 has no answer"
    assert run_ranks(records_or_reason, 2, OneBroken()) == [reason, reason]


def reason_with_a_full_device(runtime: Runtime, task: Any) -> tuple[Record, ...] | str:
    """What a rank ends with where the device of rank 1 has no memory left."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        if runtime.world.rank == 1:
            short_memory.allow_prompts(monkeypatch, 0)
            short_memory.allow_rows(monkeypatch, 0)
        return records_or_reason(runtime, task)


@pytest.mark.parametrize("task", [Letters(), Vowels()])
def test_a_full_device_of_one_rank_costs_all_of_them_the_score(task: Any) -> None:
    first, second = run_ranks(reason_with_a_full_device, 2, task)
    assert first == second
    assert str(first).startswith(f"NotScoredError: task {task.name}: out of memory")


class Faulty(Vowels):
    """Problem 2 is what a test says, and so is the verdict on it."""

    name = "B"

    def __init__(self, row: Any = None, says: Any = None) -> None:
        super().__init__(4)
        self.row, self.says = row, says

    def __getitem__(self, index: int) -> Conversation:
        if index != 2 or self.row is None:
            return super().__getitem__(index)
        return self.row()

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        return True if self.says is None else self.says()


def without_column() -> Any:
    return {}["answer"]


@pytest.mark.parametrize(
    ("row", "named"),
    [
        (lambda: chat("Sort"), r"it has no answer: .* this one with a message of the user"),
        (lambda: chat("Sort", " "), "its answer is empty"),
        (lambda: None, "it is None, not a conversation"),
        (without_column, r"KeyError 'answer' \(test_task_eval.py, line \d+\)"),
        (lambda: int("x"), "ValueError invalid literal"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_with_its_task(row: Any, named: str) -> None:
    with pytest.raises(NotScoredError, match=f"^task B, problem 2: {named}"):
        run_task(Faulty(row), TOKENIZER, random_model())


@pytest.mark.parametrize(
    ("says", "named"),
    [
        (without_column, "KeyError 'answer'"),
        (lambda: "yes", "evaluate returned 'yes'; it must return True or False"),
        (list, r"evaluate returned \[\]; it must"),
    ],
)
def test_a_verdict_that_is_none_is_named_with_its_task(says: Any, named: str) -> None:
    with pytest.raises(NotScoredError, match=f"^task B, problem 0: {named}"):
        run_task(Faulty(says=says), TOKENIZER, random_model(), sampling=Sampling(max_new_tokens=1))


def test_a_task_that_returns_no_verdict_has_no_score() -> None:
    class Forgetful(Vowels):
        def evaluate(self, conversation: Conversation, completion: str) -> Any:
            completion.startswith("a")

    with pytest.raises(NotScoredError, match="evaluate returned None; it must return True"):
        run_task(Forgetful(), TOKENIZER, random_model(), sampling=Sampling(max_new_tokens=1))


def test_a_record_is_a_line_of_json_with_its_verdict() -> None:
    result = run_categorical(Letters(2), TOKENIZER, random_model())
    row = json.loads(json.dumps(result.records[1].to_json(result.name)))
    assert row["messages"][-1] == {"role": "assistant", "content": "B"}
    assert row["correct"] == [row["completions"] == ["B"]]
    assert (row["task"], row["index"]) == ("letters", 1)


# ---- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("passed", "total", "expected"),
    [
        # Newcombe 1998, Statistics in Medicine 17:857-872, table I, method 3.
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
    ],
)
def test_wilson_intervals_are_the_published_ones(
    passed: int, total: int, expected: tuple[float, float]
) -> None:
    assert wilson_interval(passed, total) == pytest.approx(expected, abs=5e-5)


def test_wilson_intervals_stay_within_0_and_1() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)
    for total in range(1, 400):
        assert wilson_interval(total, total)[1] == 1.0
        assert wilson_interval(0, total)[0] == 0.0


def result_of(name: str, passed: int, chance: float) -> TaskResult:
    return TaskResult(name, chance, passed, 100, 1.0, ())


def test_chat_core_is_the_mean_centered_accuracy() -> None:
    results = [result_of("a", 70, 0.25), result_of("b", 30, 0.0)]
    assert chat_core(results, ["b", "a"]) == pytest.approx((0.6 + 0.3) / 2)


@pytest.mark.parametrize("names", [["a"], ["a", "b", "c"], []])
def test_chat_core_needs_exactly_all_tasks(names: list[str]) -> None:
    assert chat_core([result_of("a", 70, 0.25), result_of("b", 30, 0.0)], names) is None
