"""Continuous batching: exact in any company and order, fair, bounded, cancellable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.byte_tokenizer import ByteTokenizer
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from nanochat import kernels
from nanochat import scheduler as scheduler_module
from nanochat.common import UserError
from nanochat.decoder import Chunk, Decoder, PlainDecoder
from nanochat.decoders import make_decoder
from nanochat.gpt import GPT, GPTConfig
from nanochat.presets import MODELS
from nanochat.request import Request, TokenEvent
from nanochat.sampling import SamplingSettings
from nanochat.scheduler import QueueFullError, Scheduler, common_length

TOKENIZER: Any = ByteTokenizer()
END = TOKENIZER.encode_special("<|assistant_end|>")
TERMINAL = {END, TOKENIZER.bos_id}
GREEDY = SamplingSettings(temperature=0.0)
SHAPES = st.sampled_from(
    [
        {"n_head": 2, "n_embd": 32},
        {"n_head": 4, "n_kv_head": 2, "n_embd": 32},
        {"n_head": 3, "n_kv_head": 1, "n_embd": 48},
        {"n_head": 2, "n_embd": 32, "token_shift": 0.5},
        *({"n_head": 2, "n_embd": 32, **options} for options in MODELS.values()),
    ]
)


def random_model(seed: int = 0, sequence_len: int = 64, **shape: Any) -> GPT:
    """Weights so large that each token matters and no two logits are close."""
    shape = shape or {"n_head": 4, "n_kv_head": 2, "n_embd": 32}
    model = GPT(
        GPTConfig(sequence_len=sequence_len, vocab_size=TOKENIZER.vocab_size, n_layer=2, **shape)
    )
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return model.eval().requires_grad_(False)


def random_prompt(length: int, seed: int = 0) -> list[int]:
    ids = torch.randint(0, 256, (length - 1,), generator=torch.Generator().manual_seed(seed))
    return [TOKENIZER.bos_id, *ids.tolist()]


def naive_greedy(model: GPT, prompt: Sequence[int], max_tokens: int) -> list[int]:
    """Argmax of a full forward pass, token by token."""
    tokens = list(prompt)
    while len(tokens) < min(len(prompt) + max_tokens, model.config.sequence_len):
        token = int(model(torch.tensor([tokens]))[0, -1].argmax())
        if token in TERMINAL:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


def run(scheduler: Scheduler) -> list[TokenEvent]:
    events = []
    while not scheduler.is_idle:
        events += scheduler.step()
    return events


def answer(
    scheduler: Scheduler,
    prompt: Sequence[int],
    settings: SamplingSettings = GREEDY,
    sample: int = 0,
) -> list[int]:
    request = scheduler.submit(prompt, settings, sample=sample)
    run(scheduler)
    return request.tokens


@pytest.fixture(params=["plain", "made"])
def make(request: pytest.FixtureRequest) -> Any:
    """Schedulers over the plain decoder, and over the one that a model gets here."""

    def build(model: GPT, **limits: Any) -> Scheduler:
        decoder = PlainDecoder(model) if request.param == "plain" else make_decoder(model)
        return Scheduler(model, TOKENIZER, decoder=decoder, **limits)

    return build


# ---- equal to the naive way ----------------------------------------------------------------------


@settings(max_examples=10, deadline=None)
@given(
    shape=SHAPES,
    seed=st.integers(0, 5),
    max_rows=st.integers(1, 5),
    is_plain=st.booleans(),
    arrivals=st.lists(
        st.tuples(
            st.integers(0, 6),  # steps before it is submitted
            st.integers(1, 40),  # prompt tokens
            st.integers(0, 2),  # which text the prompt is a beginning of
            st.integers(1, 12),  # max tokens
        ),
        min_size=1,
        max_size=7,
    ),
)
def test_greedy_equals_full_forward_in_any_company_and_order(
    shape: dict[str, Any],
    seed: int,
    max_rows: int,
    is_plain: bool,
    arrivals: list[tuple[int, int, int, int]],
) -> None:
    model = random_model(seed, **shape)
    decoder = PlainDecoder(model) if is_plain else make_decoder(model)
    scheduler = Scheduler(model, TOKENIZER, decoder=decoder, max_rows=max_rows)
    requests = []
    for pause, length, text, max_tokens in arrivals:
        for _ in range(pause):
            scheduler.step()
        prompt = random_prompt(40, seed=text)[:length]
        own = SamplingSettings(temperature=0.0, max_tokens=max_tokens)
        requests.append(scheduler.submit(prompt, own))
    run(scheduler)
    for request, (_, _, _, max_tokens) in zip(requests, arrivals, strict=True):
        assert request.tokens == naive_greedy(model, request.prompt, max_tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("int8", [False, True])
def test_a_seeded_request_answers_the_same_alone_and_in_a_crowd(
    dtype: torch.dtype, int8: bool
) -> None:
    if kernels.load() is None:
        pytest.skip("no compiled decoder, whose promise it is; see the explanation of the engine")
    model = random_model(3, sequence_len=128).cast_matrices(dtype)
    decoders = [make_decoder(model, int8=int8) for _ in range(2)]
    styles = [
        {},
        {"top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.1, "temperature": 2.0},
        {"repetition_penalty": 1.3},
        {"logprobs": 3, "temperature": 0.3},
    ]
    prompts = [random_prompt(3 + 7 * i, seed=i % 3) for i in range(12)]
    styled = [
        SamplingSettings(seed=i // 2, max_tokens=20 + i, **styles[i % len(styles)])
        for i in range(12)
    ]
    alone = [
        answer(Scheduler(model, TOKENIZER, decoder=decoders[0]), prompt, setting)
        for prompt, setting in zip(prompts, styled, strict=True)
    ]
    crowd = Scheduler(model, TOKENIZER, decoder=decoders[1], max_rows=5)
    requests = []
    for prompt, setting in zip(prompts, styled, strict=True):
        requests.append(crowd.submit(prompt, setting))
        crowd.step()
    run(crowd)
    assert [request.tokens for request in requests] == alone
    assert len({tuple(tokens) for tokens in alone}) > 8


def test_a_long_prompt_is_read_beside_the_answers_of_others(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler_module, "PREFILL_TOKENS", 4)
    model = random_model()
    scheduler = make(model)
    short = scheduler.submit(random_prompt(3), SamplingSettings(temperature=0.0, max_tokens=9))
    scheduler.step()
    long = scheduler.submit(random_prompt(33, seed=1), GREEDY)
    speakers = [[event.request for event in scheduler.step()] for _ in range(8)]
    assert speakers == [[short]] * 8
    run(scheduler)
    assert long.tokens == naive_greedy(model, long.prompt, 64)


# ---- what is read once ---------------------------------------------------------------------------


def test_samples_of_one_prompt_read_it_once(make: Any) -> None:
    model = random_model()
    scheduler = make(model)
    prompt = random_prompt(30)
    sampled = SamplingSettings(max_tokens=6)
    requests = [scheduler.submit(prompt, sampled, sample=sample) for sample in range(5)]
    run(scheduler)
    # Its last token is fed again for each sample: the logits after it are needed.
    assert scheduler.num_prompt_tokens_read == 30 + 4
    assert len({tuple(request.tokens) for request in requests}) == 5
    alone = [answer(make(model), prompt, sampled, sample) for sample in range(5)]
    assert [request.tokens for request in requests] == alone


def test_the_next_turn_of_a_chat_reads_only_what_is_new(make: Any) -> None:
    model = random_model()
    scheduler = make(model)
    prompt = random_prompt(20)
    first = answer(scheduler, prompt, SamplingSettings(temperature=0.0, max_tokens=8))
    before = scheduler.num_prompt_tokens_read
    longer = [*prompt, *first, 7, 8, 9]
    second = answer(scheduler, longer, SamplingSettings(temperature=0.0, max_tokens=8))
    # The last token of the first answer was never fed.
    assert scheduler.num_prompt_tokens_read - before == 4
    assert second == naive_greedy(model, longer, 8)


def test_a_follower_outlives_the_leader_it_waited_for(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler_module, "PREFILL_TOKENS", 12)
    model = random_model()
    scheduler = make(model)
    leader = scheduler.submit(random_prompt(30), GREEDY)
    follower = scheduler.submit(random_prompt(30), GREEDY)
    scheduler.step()
    scheduler.cancel(leader)
    run(scheduler)
    assert follower.tokens == naive_greedy(model, follower.prompt, 64)


# ---- bounds --------------------------------------------------------------------------------------


def test_requests_beyond_the_rows_wait_their_turn(make: Any) -> None:
    scheduler = make(random_model(), max_rows=2)
    own = SamplingSettings(temperature=0.0, max_tokens=3)
    requests = [scheduler.submit(random_prompt(4, seed=i), own) for i in range(5)]
    scheduler.step()
    assert (scheduler.num_active, scheduler.num_waiting) == (2, 3)
    finished = [event.request for event in run(scheduler) if event.finish]
    assert finished == requests


def test_a_full_queue_refuses_and_takes_again_once_there_is_room(make: Any) -> None:
    scheduler = make(random_model(), max_rows=1, max_waiting=1)
    scheduler.submit(random_prompt(4), GREEDY)
    scheduler.submit(random_prompt(4), GREEDY)
    with pytest.raises(QueueFullError, match="try again later"):
        scheduler.submit(random_prompt(4), GREEDY)
    run(scheduler)
    scheduler.submit(random_prompt(4), GREEDY)


def test_memory_is_bounded_and_what_never_fits_is_refused(make: Any) -> None:
    scheduler = make(random_model(), max_cache_tokens=64)
    own = SamplingSettings(temperature=0.0, max_tokens=10)
    with pytest.raises(UserError, match=r"40 and an answer of up to 24 .* the 50 tokens"):
        make(random_model(), max_cache_tokens=50).submit(random_prompt(40), GREEDY)
    requests = [scheduler.submit(random_prompt(12, seed=i), own) for i in range(9)]
    most = 0
    while not scheduler.is_idle:
        scheduler.step()
        most = max(most, scheduler.num_cache_tokens)
    assert 44 <= most <= 64
    assert all(request.is_finished for request in requests)


def test_remembered_rows_are_given_up_for_new_requests(make: Any) -> None:
    model = random_model()
    scheduler = make(model, max_cache_tokens=100)
    own = SamplingSettings(temperature=0.0, max_tokens=4)
    for i in range(12):
        prompt = random_prompt(20 + i, seed=i)
        assert answer(scheduler, prompt, own) == naive_greedy(model, prompt, 4)
        assert scheduler.num_cache_tokens <= 100


class CacheBytes(TorchDispatchMode):
    """Most bytes of zeroed tensors, of which caches are made, that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: list[tuple[StorageWeakRef, int]] = []
        self.most = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if "zeros" in str(func) and result.ndim > 1:  # a number for each row is not counted
            self.alive.append((StorageWeakRef(result.untyped_storage()), result.nbytes))
            self.alive = [(ref, size) for ref, size in self.alive if not ref.expired()]
            self.most = max(self.most, sum(size for _, size in self.alive))
        return result


@settings(max_examples=15, deadline=None)
@given(
    limit=st.integers(64, 400),
    arrivals=st.lists(
        # As above: a pause, prompt tokens, which text, max tokens.
        st.tuples(
            st.integers(0, 3), st.integers(1, 50), st.integers(0, 3), st.sampled_from((1, 4, 14))
        ),
        min_size=1,
        max_size=12,
    ),
)
def test_the_memory_of_the_plain_decoder_never_exceeds_the_budget(
    limit: int, arrivals: list[tuple[int, int, int, int]]
) -> None:
    model = random_model()
    decoder = PlainDecoder(model)
    scheduler = Scheduler(model, TOKENIZER, decoder=decoder, max_cache_tokens=limit, max_rows=8)
    requests = []
    with CacheBytes() as used:
        for pause, length, text, max_tokens in arrivals:
            for _ in range(pause):
                scheduler.step()
            own = SamplingSettings(temperature=0.0, max_tokens=max_tokens)
            requests.append(scheduler.submit(random_prompt(50, seed=text)[:length], own))
        run(scheduler)
    assert 0 < used.most <= limit * decoder.bytes_per_token
    for request in requests:
        assert request.tokens == naive_greedy(model, request.prompt, request.limit)
    scheduler.forget_all()
    assert scheduler.num_cache_tokens == 0


def test_a_long_request_waits_where_all_rows_would_become_as_long() -> None:
    model = random_model()
    scheduler = Scheduler(
        model, TOKENIZER, decoder=PlainDecoder(model), max_cache_tokens=160, max_rows=8
    )
    own = SamplingSettings(temperature=0.0, max_tokens=6)
    short = [scheduler.submit(random_prompt(4, seed=i), own) for i in range(6)]
    long = scheduler.submit(random_prompt(50, seed=6), own)
    late = [scheduler.submit(random_prompt(4, seed=7 + i), own) for i in range(6)]
    scheduler.step()
    assert (scheduler.num_active, scheduler.num_waiting) == (6, 7)
    most = 0
    while not scheduler.is_idle:
        scheduler.step()
        if long.is_finished:
            most = max(most, scheduler.num_active)
    for request in (*short, long, *late):
        assert request.tokens == naive_greedy(model, request.prompt, 6)
    assert most >= 4  # the rectangle has become narrow again


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ([], "no tokens"),
        ([256, 265], "265 is not a token"),
        ([256, -1], "-1 is not a token"),
        ([256] * 64, "has 64 tokens.*context is 64"),
    ],
)
def test_impossible_prompts_are_refused(make: Any, prompt: list[int], named: str) -> None:
    scheduler = make(random_model())
    with pytest.raises(UserError, match=named):
        scheduler.submit(prompt, GREEDY)
    assert scheduler.is_idle


# ---- cancelling ----------------------------------------------------------------------------------


def test_a_cancelled_request_frees_its_row_at_once(make: Any) -> None:
    scheduler = make(random_model(), max_rows=1)
    first, second, third = (scheduler.submit(random_prompt(5, seed=i), GREEDY) for i in range(3))
    scheduler.step()
    scheduler.cancel(first)
    scheduler.cancel(second)
    assert (first.is_finished, first.finish, scheduler.num_active) == (True, None, 0)
    assert {event.request for event in scheduler.step()} == {third}
    scheduler.cancel(first)
    run(scheduler)
    assert third.finish is not None


# ---- events --------------------------------------------------------------------------------------


def test_events_tell_the_whole_answer(make: Any) -> None:
    scheduler = make(random_model())
    request = scheduler.submit(
        random_prompt(6), SamplingSettings(max_tokens=12, seed=4, logprobs=2)
    )
    events = run(scheduler)
    assert [event.finish for event in events] == [None] * (len(events) - 1) + ["length"]
    assert [event.token for event in events] == request.tokens
    for i, event in enumerate(events):
        logits = scheduler_logits(scheduler, request, i)
        expected = logits.log_softmax(-1)
        assert event.logprob == pytest.approx(float(expected[event.token]), abs=1e-4)
        values, tokens = expected.topk(2)
        assert [token for token, _ in event.alternatives] == tokens.tolist()
        assert [v for _, v in event.alternatives] == pytest.approx(values.tolist(), abs=1e-4)


def scheduler_logits(scheduler: Scheduler, request: Request, num_tokens: int) -> torch.Tensor:
    """Logits of the plain model after the prompt and so many tokens of the answer."""
    tokens = torch.tensor([[*request.prompt, *request.tokens[:num_tokens]]])
    return random_model()(tokens)[0, -1]


class SpoiltSteps:
    """A decoder whose logits are NaN in some steps, as where the last layer overflows."""

    def __init__(self, decoder: Decoder, steps: Sequence[int]) -> None:
        self._decoder, self._steps, self._step = decoder, steps, -1

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)

    def feed(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        self._step += 1
        logits = self._decoder.feed(chunks)
        return logits * float("nan") if self._step in self._steps else logits


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("steps", "is_found"), [([], False), ([0], True), ([3], True)])
def test_nan_in_the_logits_of_one_token_is_noted(
    steps: list[int], is_found: bool, temperature: float
) -> None:
    model = random_model()
    decoder: Any = SpoiltSteps(make_decoder(model), steps)
    scheduler = Scheduler(model, TOKENIZER, decoder=decoder)
    own = SamplingSettings(temperature, max_tokens=8, top_k=5, ignore_end=True)
    requests = [scheduler.submit(random_prompt(6, seed), own) for seed in range(2)]
    run(scheduler)
    assert [len(request.tokens) for request in requests] == [8, 8]
    assert [request.has_nan_logits for request in requests] == [is_found, is_found]


def test_a_penalty_changes_the_choice_and_not_the_reported_probability(make: Any) -> None:
    scheduler = make(random_model())
    prompt = random_prompt(30)
    free = answer(scheduler, prompt, SamplingSettings(temperature=0.0, max_tokens=30))
    own = SamplingSettings(temperature=0.0, max_tokens=30, repetition_penalty=1e6, logprobs=0)
    request = scheduler.submit(prompt, own)
    events = run(scheduler)
    assert request.tokens != free
    for i, event in enumerate(events):
        expected = scheduler_logits(scheduler, request, i).log_softmax(-1)
        assert event.logprob == pytest.approx(float(expected[event.token]), abs=1e-4)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [([], [1], 0), ([1, 2], [1, 2, 3], 2), ([1, 2, 3], [1, 9, 3], 1), ([5], [6], 0)],
)
def test_common_length(first: list[int], second: list[int], expected: int) -> None:
    assert common_length(first, second) == expected
