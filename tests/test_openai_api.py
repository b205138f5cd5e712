"""The OpenAI API, through the official client."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
from scripted_model import byte_tokenizer, scripted_model, tokens_of
from web_server import END, ScriptedScheduler, service_of, serving

from nanochat.scheduler import Scheduler
from nanochat.serving.guard import Access

CALLED = ["It is ", "<|python_start|>", "6*7", "<|python_end|>"]
SCRIPT = {
    "Count": ["one two three four", END],
    "Multiply": [*CALLED, "<|output_start|>", "42", "<|output_end|>", ".", END],
    "Smile": ["\U0001f642\U0001f680", END],
    "Nothing": ["<|user_end|>", END],
}
MODEL = "nanochat-d1-sft"
# What the model reads of an answer that is sent back.
READ_AGAIN = {
    "Count": "one two three four",
    "Multiply": "".join([*CALLED, "<|output_start|>", "42", "<|output_end|>", "."]),
    "Nothing": "",
}


def script(prompt: str) -> list[int]:
    parts = next((parts for word, parts in SCRIPT.items() if word in prompt), ["Hello.", END])
    return tokens_of(*parts)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    service = service_of(lambda: ScriptedScheduler(script))
    with serving(service, Access(api_key="k3y")) as address:
        yield address


@pytest.fixture(scope="module")
def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="k3y", max_retries=0, timeout=20)


def asking(text: str, **settings: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": text}], **settings}


def test_models_are_listed_and_found(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "nanochat"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-5")
    assert caught.value.code == "model_not_found"


def test_a_chat_completion(client: openai.OpenAI) -> None:
    done = client.chat.completions.create(**asking("Count"))
    assert (done.object, done.model, done.id[:9]) == ("chat.completion", MODEL, "chatcmpl-")
    (choice,) = done.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "one two three four")
    assert choice.finish_reason == "stop"
    assert done.usage is not None
    # bos, user_start, "Count", user_end, assistant_start; one token a byte
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (9, 18)
    assert done.usage.total_tokens == 27


def test_a_streamed_chat_completion(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(**asking("Smile"), stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(texts) == "\U0001f642\U0001f680"
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "stop"
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.object == "chat.completion.chunk" and chunk.usage is None for chunk in chunks)


def test_usage_comes_last_in_a_stream_that_asks_for_it(client: openai.OpenAI) -> None:
    options = {"include_usage": True}
    chunks = list(
        client.chat.completions.create(**asking("Count"), stream=True, stream_options=options)
    )
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 18


def test_a_reply_says_when_it_was_made_and_a_model_since_when_it_is_served(
    client: openai.OpenAI,
) -> None:
    began = int(time.time())
    text = {"model": MODEL, "prompt": "Count"}
    chat, chats = client.chat.completions.create, asking("Count")
    made = [chat(**chats).created, client.completions.create(**text).created]
    made += [chunk.created for chunk in chat(**chats, stream=True)]
    made += [chunk.created for chunk in client.completions.create(**text, stream=True)]
    assert all(began <= moment <= time.time() for moment in made)
    assert client.models.retrieve(MODEL).created == 1_700_000_000


@pytest.mark.parametrize(("size", "dropped"), [(10, 0), (1200, 2)])  # a context of 4,096 bytes
def test_a_reply_tells_how_many_old_turns_were_left_out(
    client: openai.OpenAI, size: int, dropped: int
) -> None:
    roles = ("user", "assistant", "user", "assistant", "user")
    turns: list[Any] = [{"role": role, "content": "x" * size} for role in roles]
    chat = client.chat.completions
    whole = chat.with_raw_response.create(model=MODEL, messages=turns, max_tokens=10)
    stream = chat.with_raw_response.create(model=MODEL, messages=turns, max_tokens=10, stream=True)
    for response in (whole, stream):
        assert response.headers["x-nanochat-dropped-turns"] == str(dropped)
    assert (whole.parse().model_extra or {})["dropped_turns"] == dropped
    first, *others = stream.parse()
    assert (first.model_extra or {})["dropped_turns"] == dropped
    assert not any("dropped_turns" in (chunk.model_extra or {}) for chunk in others)
    with chat.stream(model=MODEL, messages=turns, max_tokens=10) as helper:
        final = helper.get_final_completion()
    assert (final.model_extra or {})["dropped_turns"] == dropped


def test_the_streaming_helper_puts_the_answer_together(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(**asking("Count")) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert "".join(deltas) == "one two three four"
    assert final.choices[0].message.content == "one two three four"
    assert final.choices[0].finish_reason == "stop"


def test_max_tokens_ends_with_length(client: openai.OpenAI) -> None:
    both = {"max_tokens": 3, "max_completion_tokens": 3}
    for settings in ({"max_tokens": 3}, {"max_completion_tokens": 3}, both):
        (choice,) = client.chat.completions.create(**asking("Count", **settings)).choices
        assert (choice.message.content, choice.finish_reason) == ("one", "length")


def test_stop_strings_end_the_answer_and_do_not_show(client: openai.OpenAI) -> None:
    for stop in (" three", ["zzz", " three"]):
        (choice,) = client.chat.completions.create(**asking("Count", stop=stop)).choices
        assert (choice.message.content, choice.finish_reason) == ("one two", "stop")
    chunks = client.chat.completions.create(**asking("Count", stop="o t"), stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "one tw"


def test_several_choices(client: openai.OpenAI) -> None:
    done = client.chat.completions.create(**asking("Count", n=3))
    assert [choice.index for choice in done.choices] == [0, 1, 2]
    assert {choice.message.content for choice in done.choices} == {"one two three four"}
    texts = ["", "", ""]
    for chunk in client.chat.completions.create(**asking("Count", n=3), stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == ["one two three four"] * 3


def test_the_choices_of_a_seed_are_no_choices_of_another() -> None:
    # A model that has learned nothing: all tokens are about as likely.
    service = service_of(lambda: Scheduler(scripted_model(()), byte_tokenizer()))
    settings = {"temperature": 1, "max_tokens": 12, "logprobs": True, "extra_body": {"top_k": 200}}
    with serving(service) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0, timeout=60)

        def choices(seed: int, n: int) -> list[str]:
            done = client.chat.completions.create(**asking("?", **settings, seed=seed, n=n))
            return [str(choice.logprobs and choice.logprobs.content) for choice in done.choices]

        five, six = choices(5, 3), choices(6, 3)
        assert len({*five, *six}) == 6
        assert choices(5, 3) == five
        assert choices(5, 1) == five[:1]


def test_logprobs_have_an_entry_for_each_token(client: openai.OpenAI) -> None:
    settings = {"logprobs": True, "top_logprobs": 2}
    (choice,) = client.chat.completions.create(**asking("Smile", **settings)).choices
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    smile = choice.logprobs.content[:4]
    assert bytes(byte for entry in smile for byte in entry.bytes or []).decode() == "\U0001f642"
    assert [entry.logprob for entry in smile] == [-0.25] * 4
    assert [len(entry.top_logprobs) for entry in smile] == [2] * 4
    streamed = client.chat.completions.create(**asking("Smile", **settings), stream=True)
    entries = [
        entry
        for chunk in streamed
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content or []
    ]
    assert [entry.token for entry in entries] == [entry.token for entry in choice.logprobs.content]


# Settings, the answer's text, and its tokens where they are not just the text.
LOOKED_INTO: dict[str, tuple[str, dict[str, Any], str, str | None]] = {
    "an end": ("Count", {}, "one two three four", None),
    "a limit": ("Count", {"max_tokens": 3}, "one", None),
    "no text": ("Nothing", {}, "", "<|user_end|>"),
    "a stop string": ("Count", {"stop": " three"}, "one two", "one two three"),
    "half a stop string": ("Count", {"stop": "four!"}, "one two three four", None),
    "a call": ("Multiply", {}, "It is [6*7 = 42].", READ_AGAIN["Multiply"]),
    "a call at the limit": ("Multiply", {"max_tokens": 10}, "It is [6*7]", "".join(CALLED)[:-14]),
}


@pytest.mark.parametrize("case", LOOKED_INTO)
@pytest.mark.parametrize("is_streamed", [False, True])
def test_logprobs_are_of_the_tokens_that_usage_counts(
    client: openai.OpenAI, case: str, is_streamed: bool
) -> None:
    word, settings, text, tokens = LOOKED_INTO[case]
    body = asking(word, logprobs=True, **settings)
    if is_streamed:
        options = {"include_usage": True}
        chunks = list(client.chat.completions.create(**body, stream=True, stream_options=options))
        usage = chunks[-1].usage
        choices = [chunk.choices[0] for chunk in chunks[:-1]]
        said = "".join(choice.delta.content or "" for choice in choices)
    else:
        done = client.chat.completions.create(**body)
        usage, choices, said = done.usage, done.choices, done.choices[0].message.content
    entries = [
        entry
        for choice in choices
        if choice.logprobs is not None
        for entry in choice.logprobs.content or []
    ]
    assert said == text
    assert "".join(entry.token for entry in entries) == (text if tokens is None else tokens)
    assert usage is not None
    assert len(entries) == usage.completion_tokens
    assert {entry.logprob for entry in entries} == {-0.25}  # the calculator's tokens as well


def test_logprobs_of_a_text_are_of_the_tokens_that_usage_counts(client: openai.OpenAI) -> None:
    done = client.completions.create(model=MODEL, prompt="Count", logprobs=1, max_tokens=100)
    logprobs = done.choices[0].logprobs
    assert logprobs is not None
    assert "".join(logprobs.tokens or []) == done.choices[0].text == "one two three four"
    assert done.usage is not None
    assert len(logprobs.tokens or []) == done.usage.completion_tokens
    assert logprobs.text_offset == list(range(18))


def test_a_call_of_the_calculator_comes_in_parts_that_can_be_sent_back(
    client: openai.OpenAI,
) -> None:
    (choice,) = client.chat.completions.create(**asking("Multiply")).choices
    assert choice.message.content == "It is [6*7 = 42]."
    parts = choice.message.model_extra["parts"]
    assert [part["type"] for part in parts] == ["text", "python", "python_output", "text"]
    turns = [
        {"role": "user", "content": "Multiply"},
        {"role": "assistant", "content": parts},
        {"role": "user", "content": [{"type": "text", "text": "Count"}]},
    ]
    assert client.chat.completions.create(model=MODEL, messages=turns).choices  # type: ignore[arg-type]


def whole_message(client: openai.OpenAI, turns: list[Any]) -> Any:
    return client.chat.completions.create(model=MODEL, messages=turns).choices[0].message


def streamed_message(client: openai.OpenAI, turns: list[Any]) -> Any:
    with client.chat.completions.stream(model=MODEL, messages=turns) as stream:
        return stream.get_final_completion().choices[0].message


@pytest.mark.parametrize("answer", [whole_message, streamed_message])
@pytest.mark.parametrize("word", READ_AGAIN)
def test_an_answer_is_appended_and_sent_again_as_it_came(
    word: str, answer: Callable[[openai.OpenAI, list[Any]], Any]
) -> None:
    read = [""]

    def noting(prompt: str) -> list[int]:
        read.append(prompt)
        return script(prompt)

    with serving(service_of(lambda: ScriptedScheduler(noting))) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0, timeout=20)
        turns: list[Any] = [{"role": "user", "content": word}]
        turns.append(answer(client, turns))
        turns.append({"role": "user", "content": "Again"})
        answer(client, turns)
    assert read[-1] == (
        f"<|bos|><|user_start|>{word}<|user_end|>"
        f"<|assistant_start|>{READ_AGAIN[word]}<|assistant_end|>"
        "<|user_start|>Again<|user_end|><|assistant_start|>"
    )


def conversation(**answer: Any) -> dict[str, Any]:
    question = {"role": "user", "content": "Count"}
    answer = {"role": "assistant", "content": "one", **answer}
    return {"model": MODEL, "messages": [question, answer, question]}


@pytest.mark.parametrize(
    ("field", "empty", "full"),
    [
        ("name", "", "Ada"),  # the conversation format has no place for it
        ("refusal", "", "I must not"),
        ("tool_calls", [], [{"id": "1", "type": "function", "function": {"name": "f"}}]),
        ("function_call", {}, {"name": "f", "arguments": ""}),
        ("audio", {}, {"id": "audio"}),
        ("annotations", [], [{"type": "url_citation"}]),
        ("parsed", {}, {"answer": 1}),
    ],
)
def test_what_an_answer_cannot_have_may_only_be_sent_empty(
    client: openai.OpenAI, field: str, empty: Any, full: Any
) -> None:
    for value in (None, empty):
        assert client.chat.completions.create(**conversation(**{field: value})).choices
    with pytest.raises(openai.BadRequestError, match=rf"messages\[1\].{field} is not supported"):
        client.chat.completions.create(**conversation(**{field: full}))


def test_an_empty_answer_needs_parts_that_say_so(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"messages\[1\].content must not be empty"):
        client.chat.completions.create(**conversation(content=""))
    parts = [{"type": "text", "text": ""}]
    assert client.chat.completions.create(**conversation(content="", parts=parts)).choices


def test_only_an_answer_has_parts(client: openai.OpenAI) -> None:
    question = {"role": "user", "content": "Count", "parts": [{"type": "text", "text": "Hi"}]}
    with pytest.raises(openai.BadRequestError, match="a user message may not have `parts`"):
        client.chat.completions.create(**asking("Count") | {"messages": [question]})


def test_settings_beyond_the_openai_api(client: openai.OpenAI) -> None:
    extra = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1}
    done = client.chat.completions.create(**asking("Count", seed=3, top_p=0.9), extra_body=extra)
    assert done.choices[0].message.content == "one two three four"


def test_an_answer_without_text_is_empty(client: openai.OpenAI) -> None:
    (choice,) = client.chat.completions.create(**asking("Nothing")).choices
    assert (choice.message.content, choice.finish_reason) == ("", "stop")


def test_a_text_completion(client: openai.OpenAI) -> None:
    done = client.completions.create(model=MODEL, prompt="Count", max_tokens=100)
    assert (done.object, done.choices[0].text) == ("text_completion", "one two three four")
    assert done.usage is not None
    assert done.usage.prompt_tokens == 6
    assert client.completions.create(model=MODEL, prompt="Count").choices[0].finish_reason == (
        "length"  # 16 tokens, as in the OpenAI API
    )


def test_text_completions_of_several_prompts_echoed(client: openai.OpenAI) -> None:
    done = client.completions.create(
        model=MODEL, prompt=["Count", "Hi"], echo=True, n=2, max_tokens=100
    )
    counted = "Countone two three four"
    assert [choice.text for choice in done.choices] == [counted, counted, "HiHello.", "HiHello."]


def test_text_completions_of_token_ids(client: openai.OpenAI) -> None:
    ids = tokens_of("<|bos|>", "Count")
    for prompt in (ids, [ids, ids]):
        done = client.completions.create(model=MODEL, prompt=prompt, max_tokens=100)
        assert {choice.text for choice in done.choices} == {"one two three four"}


def test_a_streamed_text_completion_with_logprobs(client: openai.OpenAI) -> None:
    chunks = list(
        client.completions.create(
            model=MODEL, prompt="Count", stream=True, logprobs=1, max_tokens=100
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == "one two three four"
    first = chunks[0].choices[0].logprobs
    assert first is not None
    assert (first.tokens or [])[0] == "o"
    assert (first.text_offset or [])[0] == 0
    assert chunks[-1].choices[0].finish_reason == "stop"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "hot": ({"temperature": 3}, "temperature"),
    "penalty": ({"presence_penalty": 1}, "presence_penalty"),
    "tools": ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    "json": ({"response_format": {"type": "json_object"}}, "response_format"),
    "many": ({"n": 9}, "n"),
    "alternatives without logprobs": ({"top_logprobs": 3}, "top_logprobs"),
    "nobody": ({"messages": []}, "messages"),
    "wrong role": ({"messages": [{"role": "critic", "content": "a"}]}, "messages"),
    "text for a number": ({"max_tokens": "many"}, "max_tokens"),
    "many tokens": ({"max_completion_tokens": 4097}, "max_completion_tokens"),
    "two lengths": ({"max_completion_tokens": 3, "max_tokens": 4}, "max_tokens"),
    "21 alternatives": ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    "an empty stop": ({"stop": ""}, "stop"),
    "a long stop": ({"stop": ["a", "a" * 101]}, "stop[1]"),
    "a min_p of all": ({"extra_body": {"min_p": 1}}, "min_p"),
    "a penalty of 11": ({"extra_body": {"repetition_penalty": 11}}, "repetition_penalty"),
    "a long model": ({"model": "a" * 201}, "model"),
    "a long user": ({"user": "a" * 201}, "user"),
    "no parts": (conversation(parts=[]), "messages[1].parts"),
    "501 parts": (conversation(parts=[{"type": "text", "text": "a"}] * 501), "messages[1].parts"),
    "long parts": (conversation(parts=[{"type": "text", "text": "a" * 8000}] * 5), "messages"),
    "an unknown part": (conversation(parts=[{"type": "image", "text": "a"}]), "messages[1].parts"),
    "kept": ({"store": True}, "store"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_possible_is_a_bad_request_that_names_the_field(
    client: openai.OpenAI, name: str
) -> None:
    settings, field = REFUSED[name]
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**asking("Count") | settings)
    assert (caught.value.param or "").startswith(field)
    assert caught.value.type == "invalid_request_error"


IN_ALL = "prompt must have at most 32,000 characters or tokens in all"


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("a" * 5000, "5,001 tokens"),
        ([100_000], "not a token id"),
        ([-1], r"prompt\[0\] must be at least 0"),
        ("", "prompt must not be empty"),
        ([], "prompt must have at least 1 entry"),
        (["a"] * 9, "at most 8 entries"),
        ([[65]] * 9, "at most 8 entries"),
        ("a" * 32_001, "at most 32,000 characters"),
        ([65] * 32_001, IN_ALL),
        (["a" * 20_000] * 2, IN_ALL),
        ([[65] * 20_000] * 2, IN_ALL),
    ],
    ids=[
        *("too long", "unknown id", "negative id", "empty", "none", "too many", "too many lists"),
        *("huge", "many ids", "long in all", "many ids in all"),
    ],
)
def test_wrong_prompts_are_bad_requests(client: openai.OpenAI, prompt: Any, reason: str) -> None:
    with pytest.raises(openai.BadRequestError, match=reason):
        client.completions.create(model=MODEL, prompt=prompt)


@pytest.mark.parametrize(
    ("field", "value"),
    [("logprobs", 21), ("logprobs", -1), ("best_of", 2), ("suffix", "a"), ("n", 9), ("n", 0)],
)
def test_wrong_settings_of_a_text_are_bad_requests(
    client: openai.OpenAI, field: str, value: Any
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="Count", **{field: value})
    assert caught.value.param == field


@pytest.mark.parametrize(
    ("field", "value"),
    [("tools", [{"type": "function"}]), ("logit_bias", {"5": 1.0}), ("presence_penalty", 0.5)],
)
def test_what_does_not_exist_here_is_said_to_be_unsupported(
    client: openai.OpenAI, field: str, value: Any
) -> None:
    with pytest.raises(openai.BadRequestError, match=f"{field} is not supported here; leave it"):
        client.chat.completions.create(**asking("Count") | {field: value})


def test_an_unknown_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="this server has nanochat-d1-sft"):
        client.chat.completions.create(**asking("Count") | {"model": "../../etc/passwd"})


def test_a_wrong_key_is_an_authentication_error(address: str) -> None:
    stranger = openai.OpenAI(base_url=f"{address}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        stranger.models.list()


def test_a_full_queue_is_a_rate_limit_error() -> None:
    service = service_of(lambda: ScriptedScheduler(script), max_rows=1, max_waiting=1)
    with serving(service) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0)
        with pytest.raises(openai.RateLimitError) as caught:
            client.chat.completions.create(**asking("Count", n=3))
        assert caught.value.response.headers["retry-after"] == "5"
        assert client.chat.completions.create(**asking("Count", n=2)).choices


def test_an_engine_that_breaks_is_told_in_and_out_of_a_stream() -> None:
    def trouble() -> None:
        raise RuntimeError("out of memory")

    service = service_of(lambda: ScriptedScheduler(script, pace=trouble))
    with serving(service) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0)
        with pytest.raises(openai.InternalServerError, match="the engine failed"):
            client.chat.completions.create(**asking("Count"))
        with pytest.raises(openai.APIError, match="the engine failed"):
            list(client.chat.completions.create(**asking("Count"), stream=True))
