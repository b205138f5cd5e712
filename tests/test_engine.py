"""Generation: equal to the naive way, independent rows, tool calls, clear refusals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from reference.byte_tokenizer import ByteTokenizer

from nanochat import engine as engine_module
from nanochat.answers import plain_text
from nanochat.common import UserError
from nanochat.decoder import Chunk, PlainDecoder
from nanochat.engine import Engine, sample_prompts
from nanochat.gpt import GPT, GPTConfig

TOKENIZER: Any = ByteTokenizer()
END = TOKENIZER.encode_special("<|assistant_end|>")
CALL, CALLED, OUT, OUT_END = (
    TOKENIZER.encode_special(f"<|{name}|>")
    for name in ("python_start", "python_end", "output_start", "output_end")
)


def random_model(seed: int = 0, *, sequence_len: int = 64, n_kv_head: int = 2) -> GPT:
    """A tiny model whose every matrix is random, so that each token matters."""
    config = GPTConfig(
        sequence_len=sequence_len,
        vocab_size=TOKENIZER.vocab_size,
        n_layer=2,
        n_head=4,
        n_kv_head=n_kv_head,
        n_embd=32,
    )
    model = GPT(config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return model.eval()


def random_prompt(length: int, seed: int = 0) -> list[int]:
    ids = torch.randint(0, 256, (length - 1,), generator=torch.Generator().manual_seed(seed))
    return [TOKENIZER.bos_id, *ids.tolist()]


@torch.no_grad()
def naive_greedy(model: GPT, prompt: list[int], max_tokens: int) -> list[int]:
    """Argmax of a full forward pass, token by token; stops at a terminal token."""
    tokens = list(prompt)
    while len(tokens) < min(len(prompt) + max_tokens, model.config.sequence_len):
        token = int(model(torch.tensor([tokens]))[0, -1].argmax())
        if token in (END, TOKENIZER.bos_id):
            break
        tokens.append(token)
    return tokens[len(prompt) :]


class ScriptedDecoder:
    """Stands in for a model: the r-th row goes on with `scripts[r]`, whatever it is fed."""

    context, vocab_size, bytes_per_token = 64, TOKENIZER.vocab_size, 1
    device = torch.device("cpu")

    def __init__(self, *scripts: list[int]) -> None:
        self.scripts = [iter(script + [END] * 99) for script in scripts]
        self.num_rows = 0
        self.fed: list[list[int]] = []

    def can_open(self, capacity: int, limit: int, *, closing: Sequence[int] = ()) -> bool:
        return True

    def open(self, capacity: int, limit: int | None = None) -> int:
        self.num_rows += 1
        return self.num_rows - 1

    def close(self, row: int) -> None:
        pass

    def feed(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        self.fed.append([chunk.tokens[-1] for chunk in chunks])
        wanted = [next(self.scripts[chunk.row]) for chunk in chunks]
        return torch.nn.functional.one_hot(torch.tensor(wanted), self.vocab_size).float()


def scripted(*scripts: list[int]) -> tuple[Engine, ScriptedDecoder]:
    decoder: Any = ScriptedDecoder(*scripts)
    no_model: Any = None
    return Engine(no_model, TOKENIZER, decoder=decoder), decoder


# ---- equality with the naive way -----------------------------------------------------------------


@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_greedy_batch_of_different_prompts_equals_full_forward(n_kv_head: int, seed: int) -> None:
    model = random_model(seed, n_kv_head=n_kv_head)
    prompts = [random_prompt(length, seed=length) for length in (1, 2, 7, 16, 31, 33)]
    expected = [naive_greedy(model, prompt, 20) for prompt in prompts]
    assert Engine(model, TOKENIZER).complete(prompts, max_tokens=20, temperature=0.0) == expected


def test_greedy_single_equals_full_forward_to_the_end_of_the_context() -> None:
    model = random_model(3)
    prompt = random_prompt(5)
    sequences, _ = Engine(model, TOKENIZER).generate_batch(prompt, temperature=0.0)
    assert sequences == [prompt + naive_greedy(model, prompt, 64)]
    assert len(sequences[0]) == 64


def test_greedy_in_bfloat16_equals_full_forward() -> None:
    model = random_model(4).cast_matrices(torch.bfloat16)
    prompts = [random_prompt(length, seed=length) for length in (3, 9)]
    expected = [naive_greedy(model, prompt, 12) for prompt in prompts]
    engine = Engine(model, TOKENIZER, decoder=PlainDecoder(model))
    assert engine.complete(prompts, max_tokens=12, temperature=0.0) == expected


@pytest.mark.parametrize("batch_size", [0, -3])
def test_a_batch_size_that_means_nothing_is_refused(batch_size: int) -> None:
    engine = Engine(random_model(), TOKENIZER)
    with pytest.raises(UserError, match=f"batch size is {batch_size}; use a positive number"):
        engine.complete([random_prompt(5)], max_tokens=4, batch_size=batch_size)


def test_a_batch_size_holds_for_one_call_only() -> None:
    engine = Engine(random_model(), TOKENIZER)
    max_rows = engine.scheduler.max_rows
    engine.complete([random_prompt(5)], max_tokens=4, batch_size=2)
    assert engine.scheduler.max_rows == max_rows
    with pytest.raises(UserError):
        engine.complete([random_prompt(5), [10**6]], max_tokens=4, batch_size=2)
    assert engine.scheduler.max_rows == max_rows


@pytest.mark.parametrize("batch_size", [1, 2, 3, 64])
def test_answers_do_not_depend_on_the_batch_size(batch_size: int) -> None:
    engine = Engine(random_model(5), TOKENIZER)
    prompts = [random_prompt(length, seed=length) for length in (4, 30, 12, 21, 4)]
    expected = engine.complete(prompts, max_tokens=16, seed=1)
    assert engine.complete(prompts, max_tokens=16, seed=1, batch_size=batch_size) == expected


def test_prompts_wait_outside_the_scheduler_until_their_turn_comes() -> None:
    engine = Engine(random_model(6), TOKENIZER)
    steps = []
    step = engine.scheduler.step

    def noted() -> Any:
        steps.append(engine.scheduler.num_waiting + engine.scheduler.num_active)
        return step()

    engine.scheduler.step = noted  # type: ignore[method-assign]
    prompts = [random_prompt(5, seed) for seed in range(40)]
    answers = engine.complete(prompts, max_tokens=3, batch_size=2)
    assert len(answers) == 40
    assert max(steps) == 4


def test_a_short_prompt_may_use_all_its_room_beside_a_long_one() -> None:
    model = random_model(6)
    prompts = [random_prompt(60), random_prompt(3)]
    long, short = Engine(model, TOKENIZER).complete(prompts, temperature=0.0)
    assert long == naive_greedy(model, prompts[0], 64)
    assert short == naive_greedy(model, prompts[1], 64)


# ---- sampling ------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"top_k": 5}, {"top_p": 0.7}, {"temperature": 2.0}])
def test_a_seeded_row_answers_the_same_alone_and_in_a_crowd(settings: dict[str, Any]) -> None:
    engine = Engine(random_model(7), TOKENIZER)
    prompts = [random_prompt(length, seed=length) for length in (9, 3, 17, 25)]
    seeds = [11, 5, 11, 8]
    alone = [
        engine.generate_batch(prompt, max_tokens=24, seed=seed, **settings)[0][0][len(prompt) :]
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    crowd = engine.complete(prompts, max_tokens=24, seeds=seeds, **settings)
    assert crowd == alone


def test_samples_of_one_prompt_have_independent_first_tokens() -> None:
    columns = Engine(random_model(8), TOKENIZER).generate(random_prompt(4), 16, max_tokens=1)
    tokens, masks = next(columns)
    assert len(set(tokens)) > 4
    assert masks == [1] * 16


def test_the_first_sample_does_not_depend_on_how_many_there_are() -> None:
    engine = Engine(random_model(9), TOKENIZER)
    one, _ = engine.generate_batch(random_prompt(4), 1, max_tokens=20)
    many, _ = engine.generate_batch(random_prompt(4), 5, max_tokens=20)
    assert many[0] == one[0]
    assert len(set(map(tuple, many))) == 5


def test_seeds_differ_and_repeat() -> None:
    engine = Engine(random_model(10), TOKENIZER)
    answers = [engine.generate_batch(random_prompt(4), max_tokens=20, seed=s)[0] for s in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]


# ---- stopping ------------------------------------------------------------------------------------


@pytest.mark.parametrize("terminal", [END, TOKENIZER.bos_id])
def test_rows_end_by_themselves_and_keep_their_terminal_token_to_themselves(terminal: int) -> None:
    engine, _ = scripted([65, 66, terminal, 67], [65, 66, 67, 68, 69, terminal])
    answers = engine.complete([[256, 1], [256, 2]], temperature=0.0)
    assert answers == [[65, 66], [65, 66, 67, 68, 69]]


def test_columns_stop_when_every_row_has_ended() -> None:
    engine, _ = scripted([65], [65])
    columns = engine.generate([256], num_samples=2, temperature=0.0)
    assert list(columns) == [([65, 65], [1, 1]), ([END, END], [1, 1])]


def test_a_finished_row_repeats_its_last_token_with_mask_zero() -> None:
    model = random_model(13)
    with torch.no_grad():
        model.lm_head.weight[END] *= 4
    engine = Engine(model, TOKENIZER)
    columns = list(engine.generate(random_prompt(4), num_samples=8, max_tokens=30))
    tokens, masks = (torch.tensor(part) for part in zip(*columns, strict=True))
    ends = (tokens == END).int().argmax(dim=0).tolist()
    ended = [row for row in range(8) if END in tokens[:, row]]
    assert len({ends[row] for row in ended}) > 2
    for row in ended:
        assert set(tokens[ends[row] :, row].tolist()) == {END}
        assert masks[:, row].tolist() == [1] * (ends[row] + 1) + [0] * (
            len(columns) - ends[row] - 1
        )


def test_max_tokens_bounds_every_row_and_zero_generates_nothing() -> None:
    engine = Engine(random_model(11), TOKENIZER)
    assert [len(a) for a in engine.complete([random_prompt(4)] * 3, max_tokens=5)] == [5, 5, 5]
    assert engine.complete([random_prompt(4)], max_tokens=0) == [[]]
    assert list(engine.generate(random_prompt(4), max_tokens=0)) == []


# ---- tool calls ----------------------------------------------------------------------------------


def test_a_call_is_answered_by_forced_tokens() -> None:
    call = [CALL, *b"12*3", CALLED]
    engine, model = scripted([65, *call, *b"xxxx", 66, END])
    sequences, masks = engine.generate_batch([256, 7], temperature=0.0)
    answer = [65, *call, OUT, *b"36", OUT_END, 66]
    assert sequences == [[256, 7, *answer]]
    assert masks == [[0, 0] + [1] * 7 + [0] * 4 + [1]]
    # What was forced is also what the model reads.
    assert [row[0] for row in model.fed] == [7, *answer]


def test_a_call_without_a_value_forces_nothing() -> None:
    call = [CALL, *b"2**3", CALLED]
    engine, _ = scripted([*call, 66, END])
    sequences, masks = engine.generate_batch([256], temperature=0.0)
    assert sequences == [[256, *call, 66]]
    assert masks == [[0] + [1] * 7]


def test_rows_call_the_tool_at_different_times() -> None:
    engine, _ = scripted(
        [CALL, *b"1+1", CALLED, 0, 0, 0, END],
        [65, 65, 65, CALL, *b"8/2", CALLED, 0, 0, 0, END],
    )
    first, second = engine.complete([[256], [256]], temperature=0.0)
    assert first == [CALL, *b"1+1", CALLED, OUT, *b"2", OUT_END]
    assert second == [65, 65, 65, CALL, *b"8/2", CALLED, OUT, *b"4", OUT_END]


def test_a_second_start_begins_the_expression_anew() -> None:
    engine, _ = scripted([CALL, *b"9", CALL, *b"1+1", CALLED, 0, 0, 0, END])
    (answer,) = engine.complete([[256]], temperature=0.0)
    assert answer == [CALL, *b"9", CALL, *b"1+1", CALLED, OUT, *b"2", OUT_END]


def test_an_end_without_start_is_only_a_token() -> None:
    engine, _ = scripted([CALLED, 65, END])
    assert engine.complete([[256]], temperature=0.0) == [[CALLED, 65]]


def test_forced_tokens_do_not_outlive_the_token_limit() -> None:
    engine, _ = scripted([CALL, *b"1+1", CALLED, 0, 0, 0])
    (answer,) = engine.complete([[256]], temperature=0.0, max_tokens=6)
    assert answer == [CALL, *b"1+1", CALLED, OUT]


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [64, 65, 200])
def test_a_prompt_that_fills_the_context_is_refused_with_its_length(length: int) -> None:
    engine = Engine(random_model(), TOKENIZER)
    with pytest.raises(UserError, match=rf"prompt has {length} tokens.*context is 64"):
        engine.complete([random_prompt(3), random_prompt(length)])
    with pytest.raises(UserError, match=f"prompt has {length} tokens"):
        engine.generate(random_prompt(length))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"tokens": []}, "no tokens"),
        ({"tokens": [256], "max_tokens": -1}, "max tokens is -1"),
        ({"tokens": [256], "temperature": -1.0}, "temperature is -1.0"),
        ({"tokens": [256], "top_k": -5}, "top-k is -5"),
        ({"tokens": [256], "top_p": 2.0}, "top-p is 2.0"),
        ({"tokens": [256], "num_samples": 0}, "0 samples"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_computed(
    arguments: dict[str, Any], named: str
) -> None:
    with pytest.raises(UserError, match=named):
        Engine(random_model(), TOKENIZER).generate(**arguments)


def test_sample_prompts_are_continued_greedily() -> None:
    model = random_model(12)
    texts = sample_prompts(model, TOKENIZER)
    assert len(texts) == len(engine_module.SAMPLE_PROMPTS) == 7
    prompt = [TOKENIZER.bos_id, *engine_module.SAMPLE_PROMPTS[0].encode()]
    expected = plain_text(TOKENIZER, naive_greedy(model, prompt, 16))
    assert texts[0] == engine_module.SAMPLE_PROMPTS[0] + expected
