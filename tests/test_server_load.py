"""No request holds up the others."""

from __future__ import annotations

import json
import os
import threading
from typing import Any

import httpx
import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError
from scripted_model import byte_tokenizer
from web_server import CONTEXT, HELLO, ScriptedScheduler, always, service_of, serving

from benchmarks import bench_server
from nanochat.serving.requests import (
    MAX_BODY_BYTES,
    ChatRequest,
    OpenAIChatRequest,
    OpenAICompletionRequest,
    TokenizeRequest,
)
from nanochat.serving.responses import Tokenized
from nanochat.serving.service import Service

CHAT = "/chat/completions"


def hey() -> Service:
    return service_of(lambda: ScriptedScheduler(always("Hey")))


# ---- long texts --------------------------------------------------------------------------------


@pytest.mark.parametrize("work", ["encode", "listing"])
def test_the_server_is_well_while_a_long_text_is_tokenized(
    monkeypatch: pytest.MonkeyPatch, work: str
) -> None:
    service = hey()
    owner: Any = service.names if work == "listing" else service.tokenizer
    begun, may_end = threading.Event(), threading.Event()
    do_work = getattr(owner, work)

    def wait_and_work(*arguments: Any, **settings: Any) -> Any:
        begun.set()
        assert may_end.wait(20)
        return do_work(*arguments, **settings)

    monkeypatch.setattr(owner, work, wait_and_work)
    # One token a byte: 4,400 characters are more than a few milliseconds' worth either way.
    text = "\U0001f642" * 4_400
    with serving(service) as address, httpx.Client(base_url=address, timeout=20) as client:
        responses: list[httpx.Response] = []
        asking = threading.Thread(
            target=lambda: responses.append(client.post("/tokenize", json={"text": text}))
        )
        asking.start()
        assert begun.wait(20)
        assert client.get("/health").status_code == 200
        may_end.set()
        asking.join(20)
    found = Tokenized.model_validate_json(responses[0].content)
    assert [token.id for token in found.tokens] == list(text.encode())
    assert found.tokens[0].text == "<F0>"
    assert (found.dropped_turns, found.context) == (0, CONTEXT)


def test_a_listing_is_the_json_of_each_token() -> None:
    names = hey().names
    ids = [*range(byte_tokenizer().vocab_size), 65, 65]
    assert json.loads(names.listing(ids)) == [
        {"id": token, "text": names.label(token), "special": token in names.special}
        for token in ids
    ]
    assert names.listing([]) == b"[]"


# ---- bodies with many mistakes -----------------------------------------------------------------

MANY = {f"{number:x}": 0 for number in range(40_000)}
MANY_PARTS = {"role": "user", "content": [{"type": "text", "text": ""}] * 400}
ANSWER = {"role": "assistant", "content": "a", "parts": [{"type": "text", "text": ""}] * 400}
PARTS = [{"role": "user", "content": [{}] * 500}] * 300
WRONG: dict[str, tuple[type[BaseModel], Any]] = {
    "unknown fields": (ChatRequest, {**HELLO, **MANY}),
    "unknown fields of an OpenAI request": (OpenAICompletionRequest, {"prompt": "a", **MANY}),
    "unknown fields of a message": (ChatRequest, {"messages": [MANY]}),
    "unknown fields of a part": (
        TokenizeRequest,
        {"messages": [{"role": "user", "content": [MANY]}]},
    ),
    "metadata": (OpenAIChatRequest, {**HELLO, "metadata": MANY}),
    "logit_bias": (OpenAIChatRequest, {**HELLO, "logit_bias": dict.fromkeys(MANY, "")}),
    "many sound parts": (ChatRequest, {"messages": [MANY_PARTS] * 11}),
    "many sound parts of answers": (ChatRequest, {"messages": [ANSWER] * 11}),
    "many sound ids": (OpenAICompletionRequest, {"prompt": [[1] * 31_000] * 8}),
    "messages": (ChatRequest, {"messages": [{}] * 500}),
    "parts": (ChatRequest, {"messages": PARTS}),
    "ids": (OpenAICompletionRequest, {"prompt": [1, *[{}] * 31_000]}),
    "texts": (OpenAICompletionRequest, {"prompt": ["a", *[{}] * 170_000]}),
    "lists of ids": (OpenAICompletionRequest, {"prompt": [[{}] * 30_000] * 5}),
}


@pytest.mark.parametrize("name", WRONG)
def test_of_many_mistakes_only_the_first_is_looked_for(name: str) -> None:
    kind, body = WRONG[name]
    assert len(json.dumps(body, separators=(",", ":"))) < MAX_BODY_BYTES
    # As FastAPI does it; each error costs it about as much as a short request.
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(kind).validate_python(body, from_attributes=True)
    assert caught.value.error_count() <= 3


def test_too_many_fields_are_named_as_the_mistake() -> None:
    with serving(hey()) as address:
        response = httpx.post(address + CHAT, json={**HELLO, **MANY}, timeout=20)
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "an object has more than 100 fields"


# ---- the benchmark -----------------------------------------------------------------------------


def test_the_benchmark_reports_the_threads_that_the_server_uses() -> None:
    # Not the processors of the machine, of which it may use a part.
    assert bench_server._threads({**os.environ, "OMP_NUM_THREADS": "1"}) == 1
