"""The server over real HTTP: routes, limits, who may come in, what happens when things break."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from scripted_model import byte_tokenizer, scripted_model, tokens_of
from web_server import (
    CONTEXT,
    END,
    HELLO,
    ScriptedScheduler,
    always,
    events_of,
    service_of,
    serving,
    text_of,
)

from nanochat import server
from nanochat.runtime import spare_the_collector
from nanochat.scheduler import Scheduler
from nanochat.serving import guard, protocol
from nanochat.serving.guard import Access
from nanochat.serving.requests import MAX_BODY_BYTES

CHAT = "/chat/completions"
CALCULATION = ["It is ", "<|python_start|>", "6*7", "<|python_end|>"]
CALLED = tokens_of(*CALCULATION, "<|output_start|>", "42", "<|output_end|>", ".", END)


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    """A server that says the same to everything."""
    service = service_of(lambda: ScriptedScheduler(always("Hey \U0001f642 you")))
    with serving(service) as address, httpx.Client(base_url=address, timeout=20) as client:
        yield client


def user(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}]}


# ---- the documented routes ---------------------------------------------------------------------


def test_health_and_stats_have_the_documented_fields(client: httpx.Client) -> None:
    health = client.get("/health").json()
    assert (health["status"], health["ready"]) == ("ok", True)
    assert (health["num_gpus"], health["available_workers"]) == (1, 1)
    stats = client.get("/stats").json()
    assert (stats["total_workers"], stats["available_workers"], stats["busy_workers"]) == (1, 1, 0)
    assert (stats["workers"][0]["gpu_id"], stats["workers"][0]["device"]) == (0, "cpu")


def test_an_answer_is_a_stream_of_tokens_that_ends_with_done(client: httpx.Client) -> None:
    response = client.post(CHAT, json=HELLO)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = events_of(response)
    assert events[0]["dropped_turns"] == 0
    assert all(event["gpu"] == 0 for event in events if "token" in event)
    assert events[-1]["done"] is True
    assert text_of(response) == "Hey \U0001f642 you"


def test_the_time_to_the_first_token_begins_when_the_request_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    service = service_of(lambda: ScriptedScheduler(always("Hey")))
    settings = service.settings

    def slow(*arguments: Any, **options: Any) -> Any:
        time.sleep(0.2)
        return settings(*arguments, **options)

    monkeypatch.setattr(service, "settings", slow)
    with serving(service) as address:
        done = events_of(httpx.post(address + CHAT, json=HELLO))[-1]
    assert 0.2 < done["first_token_seconds"] <= done["seconds"] < 10


def test_characters_of_several_tokens_are_never_cut(client: httpx.Client) -> None:
    # One token a byte: the smiley is four of them.
    events = events_of(client.post(CHAT, json=HELLO))
    pieces = [event["token"] for event in events if "token" in event]
    assert "\ufffd" not in "".join(pieces)
    assert any("\U0001f642" in piece for piece in pieces)


def test_a_call_of_the_calculator_is_told_apart_from_text() -> None:
    service = service_of(lambda: ScriptedScheduler(lambda _: CALLED))
    with serving(service) as address:
        response = httpx.post(address + CHAT, json=HELLO)
    events = events_of(response)
    parts: dict[str, str] = {}
    for event in events:
        if "token" in event:
            kind = event.get("part", "text")
            parts[kind] = parts.get(kind, "") + event.get("text", event["token"])
    assert parts == {"text": "It is .", "python": "6*7", "python_output": "42"}
    assert text_of(response) == "It is [6*7 = 42]."


def test_each_token_is_reported_with_its_alternatives_on_request(client: httpx.Client) -> None:
    events = events_of(client.post(CHAT, json={**HELLO, "logprobs": 2}))
    tokens = [token for event in events for token in event.get("tokens", [])]
    assert len(tokens) == len(tokens_of("Hey \U0001f642 you", END))
    assert tokens[0]["text"] == "H"
    assert [other["logprob"] for other in tokens[0]["top"]] == [-0.25, -2.0]
    assert tokens[4]["text"] == "<F0>"  # the first byte of the smiley
    assert tokens[-1]["special"] is True


def test_tokenize_shows_a_prompt_and_a_text(client: httpx.Client) -> None:
    shown = client.post("/tokenize", json=user("Hi")).json()
    texts = [token["text"] for token in shown["tokens"]]
    assert texts == ["<|bos|>", "<|user_start|>", "H", "i", "<|user_end|>", "<|assistant_start|>"]
    assert [token["special"] for token in shown["tokens"]] == [True, True, False, False, True, True]
    assert len(client.post("/tokenize", json={"text": "abc"}).json()["tokens"]) == 3
    assert client.post("/tokenize", json={}).status_code == 400


def test_the_page_is_self_contained_and_may_run_only_its_own_script(client: httpx.Client) -> None:
    response = client.get("/")
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert policy.count("'sha256-") == 2
    assert "unsafe" not in policy
    for word in ("http://", "https://", "innerHTML", "outerHTML", "insertAdjacentHTML", "eval("):
        assert word not in response.text.replace("http://www.w3.org/2000/svg", ""), word
    assert client.get("/logo.svg").headers["content-type"] == "image/svg+xml"


def test_a_long_conversation_loses_its_oldest_turns_and_says_so(client: httpx.Client) -> None:
    turns = [
        {"role": role, "content": "x" * 1200} for role in ("user", "assistant", "user", "assistant")
    ]
    body = {"messages": [*turns, {"role": "user", "content": "and now?"}], "max_tokens": 10}
    assert events_of(client.post(CHAT, json=body))[0]["dropped_turns"] == 2


# ---- limits, each with its reason --------------------------------------------------------------

TALK = [{"role": role, "content": "a"} for role in ("user", "assistant")]


def in_parts(*texts: str) -> dict[str, Any]:
    parts = [{"type": "text", "text": text} for text in texts]
    return {"messages": [{"role": "user", "content": parts}]}


LIMITS = {
    "no messages": ({"messages": []}, "messages must have at least 1 entry"),
    "501 messages": ({"messages": (TALK * 251)[:501]}, "messages must have at most 500 entries"),
    "an empty message": (user(""), "messages[0].content must not be empty"),
    "a long message": (user("a" * 8001), "messages[0].content must have at most 8,000 characters"),
    "a long conversation": (
        {"messages": [{"role": m["role"], "content": "a" * 8000} for m in (TALK * 3)[:5]]},
        "the conversation has 40,000 characters; at most 32,000 are allowed",
    ),
    "a wrong role": ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role must be"),
    "two questions": (
        {"messages": [TALK[0], TALK[0]]},
        "message 1 is from user, expected assistant",
    ),
    "an answer at the end": ({"messages": TALK}, "the last message must be the user's"),
    "only a system text": ({"messages": [{"role": "system", "content": "a"}]}, "at least one user"),
    "cold": ({**HELLO, "temperature": -0.1}, "temperature must be at least 0"),
    "hot": ({**HELLO, "temperature": 2.1}, "temperature must be at most 2"),
    "no candidates": ({**HELLO, "top_k": 0}, "top_k must be at least 1"),
    "many candidates": ({**HELLO, "top_k": 201}, "top_k must be at most 200"),
    "no mass": ({**HELLO, "top_p": 0}, "top_p must be above 0"),
    "much mass": ({**HELLO, "top_p": 1.1}, "top_p must be at most 1"),
    "a negative min_p": ({**HELLO, "min_p": -0.1}, "min_p must be at least 0"),
    "a min_p of all": ({**HELLO, "min_p": 1}, "min_p must be below 1"),
    "no penalty": ({**HELLO, "repetition_penalty": 0}, "repetition_penalty must be at least 0.1"),
    "a penalty of 11": (
        {**HELLO, "repetition_penalty": 11},
        "repetition_penalty must be at most 10",
    ),
    "21 alternatives": ({**HELLO, "logprobs": 21}, "logprobs must be at most 20"),
    "no tokens": ({**HELLO, "max_tokens": 0}, "max_tokens must be at least 1"),
    "many tokens": ({**HELLO, "max_tokens": 4097}, "max_tokens must be at most 4096"),
    "a huge seed": ({**HELLO, "seed": 2**64}, "seed must be at most"),
    "a huge negative seed": ({**HELLO, "seed": -(2**64)}, "seed must be at least"),
    "many stops": ({**HELLO, "stop": ["a"] * 5}, "stop must have at most 4 entries"),
    "an empty stop": ({**HELLO, "stop": ""}, "stop must not be empty"),
    "a long stop": ({**HELLO, "stop": "a" * 101}, "stop must have at most 100 characters"),
    "an empty stop among two": ({**HELLO, "stop": ["a", ""]}, "stop[1] must not be empty"),
    "a long stop among two": (
        {**HELLO, "stop": ["a", "a" * 101]},
        "stop[1] must have at most 100 characters",
    ),
    "no parts": (in_parts(), "messages[0].content must have at least 1 entry"),
    "501 parts": (in_parts(*["a"] * 501), "messages[0].content must have at most 500 entries"),
    "a long part": (
        in_parts("a" * 8001),
        "messages[0].content[0].text must have at most 8,000 characters",
    ),
    "long parts": (in_parts(*["a" * 8000] * 5), "the conversation has 40,000 characters"),
    "empty parts": (in_parts("", ""), "a user message is empty"),
    "a whole answer": ({**HELLO, "stream": False}, "stream must be true"),
    "a huge temperature": ({**HELLO, "temperature": 1e300}, "temperature must be at most 2"),
    "a prompt without room": (user("a" * (CONTEXT - 20)), "and the answer needs"),
}


@pytest.mark.parametrize("name", LIMITS)
def test_limits_are_answered_with_400_and_the_reason(client: httpx.Client, name: str) -> None:
    body, reason = LIMITS[name]
    response = client.post(CHAT, json=body)
    assert response.status_code == 400
    assert reason in response.json()["error"]["message"]


FORMS: dict[str, tuple[bytes, str]] = {
    "malformed JSON": (b'{"messages": [', "the body is not valid JSON"),
    "an empty body": (b"", "is missing"),
    "a list": (b"[1]", "the body must be a JSON object"),
    "no messages": (b"{}", "messages is missing"),
    "a number as text": (b'{"messages": [{"role": "user", "content": 5}]}', "valid string"),
    "a text as number": (json.dumps({**HELLO, "temperature": "hot"}).encode(), "valid number"),
    "a misspelt setting": (json.dumps({**HELLO, "temprature": 1}).encode(), "temprature is not a"),
    "half a character": (rb'{"messages": [{"role": "user", "content": "\ud83d"}]}', "Unicode"),
    "a word for top_k": (
        b'{"messages": [{"role": "user", "content": "a"}], "top_k": "on"}',
        "top_k",
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_wrong_form_is_answered_with_422(client: httpx.Client, name: str) -> None:
    body, reason = FORMS[name]
    response = client.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 422
    assert reason in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [
        b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}',
        b"[" * 100_000,
        b'{"max_tokens": 1' + b"0" * 5000 + b"}",
    ],
    ids=["invalid UTF-8", "deep nesting", "a number of 5,000 digits"],
)
def test_json_that_cannot_be_read_is_refused(client: httpx.Client, body: bytes) -> None:
    response = client.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    message = response.json()["error"]["message"]
    assert message == "the body cannot be read as JSON in UTF-8"


def test_not_a_number_is_refused(client: httpx.Client) -> None:
    body = json.dumps({**HELLO, "temperature": float("nan")})
    response = client.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400


def test_errors_do_not_repeat_what_the_client_sent(client: httpx.Client) -> None:
    for body in (user("secret" * 2000), {"messages": [{"role": "secret", "content": "secret"}]}):
        assert "secret" not in client.post(CHAT, json=body).text


# ---- who may come in ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "", "localhost.evil.example"]
)
def test_other_host_names_are_refused(client: httpx.Client, host: str) -> None:
    response = client.get("/health", headers={"host": host})
    assert (response.status_code, response.json()["error"]["code"]) == (403, "host_not_allowed")


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:99", "127.0.0.1", "[::1]:8000", "10.0.0.7"]
)
def test_our_names_and_addresses_are_let_in(client: httpx.Client, host: str) -> None:
    assert client.get("/health", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1"])
def test_pages_of_other_origins_are_refused(client: httpx.Client, origin: str) -> None:
    response = client.post(CHAT, json=HELLO, headers={"origin": origin})
    assert (response.status_code, response.json()["error"]["code"]) == (403, "origin_not_allowed")
    assert "access-control-allow-origin" not in response.headers


def test_the_own_page_is_let_in(client: httpx.Client) -> None:
    origin = str(client.base_url).rstrip("/")
    assert client.post(CHAT, json=HELLO, headers={"origin": origin}).status_code == 200


@pytest.mark.parametrize("media_type", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_only_json_is_taken(client: httpx.Client, media_type: str) -> None:
    # What a form on another page can send without asking first.
    body = json.dumps(HELLO)
    response = client.post(CHAT, content=body, headers={"content-type": media_type})
    assert response.status_code == 415


def test_a_key_is_asked_for_everywhere_but_on_the_page() -> None:
    service = service_of(lambda: ScriptedScheduler(always("Hey")))
    with serving(service, Access(api_key="k3y")) as address:
        assert httpx.get(address + "/health").json()["needs_key"] is True
        assert httpx.get(address + "/").status_code == 200
        for route in ("/stats", "/v1/models", "/openapi.json"):
            assert httpx.get(address + route).status_code == 401
        for key in ("", "Bearer", "Bearer k3", "k3y", "Basic k3y"):
            response = httpx.post(address + CHAT, json=HELLO, headers={"authorization": key})
            assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer")
        good = {"authorization": "Bearer k3y"}
        assert httpx.post(address + CHAT, json=HELLO, headers=good).status_code == 200


def test_a_route_with_a_slash_too_many_is_none(client: httpx.Client) -> None:
    response = client.get("/health/")
    assert response.status_code == 404
    assert response.json()["error"]["message"] == "there is no such route"


def test_no_path_leads_to_a_file(client: httpx.Client) -> None:
    for path in ("/../pyproject.toml", "/%2e%2e/server.py", "/ui.html", "/v1/models/..%2f..%2fx"):
        assert client.get(path).status_code == 404


# ---- abuse -------------------------------------------------------------------------------------


def raw(client: httpx.Client, *, timeout: float = 10) -> socket.socket:
    return socket.create_connection((client.base_url.host, client.base_url.port or 0), timeout)


def test_a_long_body_is_refused_before_and_while_it_comes(client: httpx.Client) -> None:
    head = {"content-type": "application/json"}
    announced = client.post(CHAT, content=b" " * (MAX_BODY_BYTES + 1), headers=head)
    assert announced.status_code == 413
    chunks = (b" " * 65536 for _ in range(MAX_BODY_BYTES // 65536 + 2))
    assert client.post(CHAT, content=chunks, headers=head).status_code == 413


def test_a_long_head_is_refused(client: httpx.Client) -> None:
    assert client.get("/health", headers={"x-long": "a" * 20_000}).status_code == 431
    assert client.get("/health?" + "a" * 20_000).status_code == 431


def test_a_head_without_end_is_cut_off(client: httpx.Client) -> None:
    endless = b"GET /health HTTP/1.1\r\nhost: localhost\r\n" + (b"x-more: aaaaaaaa\r\n" * 500_000)
    with raw(client) as connection, pytest.raises((BrokenPipeError, ConnectionResetError)):
        connection.sendall(endless)
    assert client.get("/health").status_code == 200


def test_a_head_that_does_not_come_ends_the_connection(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.2)
    for start in (b"", b"GET /health HTTP/1.1\r\nhost: loc"):
        with raw(client) as connection:
            connection.sendall(start)
            assert connection.recv(100).startswith(b"HTTP/1.1 408")
            assert connection.recv(100) == b""


def test_a_body_that_does_not_come_ends_the_request(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.2)
    with raw(client) as connection:
        connection.sendall(
            b"POST /chat/completions HTTP/1.1\r\nhost: localhost\r\n"
            b"content-type: application/json\r\ncontent-length: 100\r\n\r\n{"
        )
        assert connection.recv(100).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize("head", ["content-length: 1000000", "transfer-encoding: chunked"])
@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE"])
def test_a_body_that_nobody_asked_for_cannot_keep_a_connection_by_dribbling(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch, method: str, head: str
) -> None:
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.2)
    monkeypatch.setattr(protocol, "IDLE_SECONDS", 0.2)
    with raw(client) as connection:
        start = f"{method} /health HTTP/1.1\r\nhost: localhost\r\n{head}\r\n\r\n"
        connection.sendall(start.encode())
        if "chunked" in head:
            connection.sendall(b"f4240\r\n")

        def is_closed() -> bool:
            try:
                connection.sendall(b"x")
            except (BrokenPipeError, ConnectionResetError):
                return True
            return False

        eventually(is_closed)


def test_a_body_that_nobody_asked_for_is_taken_and_forgotten(client: httpx.Client) -> None:
    assert client.request("GET", "/health", content=b"x" * 1000).status_code == 200
    assert client.request("PUT", CHAT, content=b"x" * 1000).status_code == 405
    assert client.request("GET", "/health", content=b" " * (MAX_BODY_BYTES + 1)).status_code == 413
    assert client.get("/health").status_code == 200


def test_a_client_that_leaves_a_little_unread_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    made = protocol.PatientProtocol.connection_made

    def with_little_room(self: protocol.PatientProtocol, transport: Any) -> None:
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        made(self, transport)

    monkeypatch.setattr(protocol.PatientProtocol, "connection_made", with_little_room)
    monkeypatch.setattr(protocol, "WRITE_SECONDS", 0.2)
    with (
        serving(service_of(lambda: ScriptedScheduler(always("Hey")))) as address,
        socket.socket() as connection,
    ):
        url = httpx.URL(address)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((url.host, url.port))
        # Less than what asyncio by itself keeps for a reader before it takes it for a slow one.
        assert 16_000 < len(httpx.get(f"{address}/openapi.json").content) < 60_000
        connection.sendall(b"GET /openapi.json HTTP/1.1\r\nhost: localhost\r\n\r\n")
        waiting = select.poll()
        waiting.register(connection, 0)  # errors only: nothing is read
        assert waiting.poll(10_000) != []


def test_a_client_that_does_not_read_is_cut_off(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "WRITE_SECONDS", 0.2)
    with raw(client) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n" * 300)  # 20 MB of page
        waiting = select.poll()
        waiting.register(connection, 0)  # errors only: nothing is read
        assert waiting.poll(10_000) != []
    assert client.get("/health").status_code == 200


def test_connections_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "SPARE_CONNECTIONS", 2)
    service = service_of(lambda: ScriptedScheduler(always("Hey")), max_rows=1, max_waiting=0)
    with serving(service) as address, contextlib.ExitStack() as stack:
        url = httpx.URL(address)
        for _ in range(3):
            idle = socket.create_connection((url.host, url.port or 0))
            stack.enter_context(idle)
        assert httpx.get(f"{address}/health").status_code == 503
        stack.close()
        eventually(lambda: httpx.get(f"{address}/health").status_code == 200)


def test_no_part_of_a_response_waits_for_the_part_before_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = []
    answer = protocol.PatientProtocol.data_received

    def note(self: protocol.PatientProtocol, data: bytes) -> None:
        connection = self.transport.get_extra_info("socket")
        found.append(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        answer(self, data)

    monkeypatch.setattr(protocol.PatientProtocol, "data_received", note)
    with serving(service_of(lambda: ScriptedScheduler(always("Hey")))) as address:
        httpx.get(f"{address}/health").raise_for_status()
    assert found == [1]


def test_a_kept_connection_is_given_up_by_its_client_first() -> None:
    # A request that met the server's own closing failed: httpx and uvicorn both waited 5 seconds.
    for limits in (httpx.Limits(), openai.DEFAULT_CONNECTION_LIMITS):
        assert limits.keepalive_expiry is not None
        assert limits.keepalive_expiry < protocol.IDLE_SECONDS


@pytest.mark.parametrize("num_connections", [1, 2])
def test_a_kept_connection_is_closed_soon_in_a_crowd_and_late_else(
    monkeypatch: pytest.MonkeyPatch, num_connections: int
) -> None:
    is_crowd = num_connections == 2
    monkeypatch.setattr(server, "SPARE_CONNECTIONS", 2)
    monkeypatch.setattr(protocol, "CROWDED_IDLE_SECONDS", 0.1 if is_crowd else 60)
    monkeypatch.setattr(protocol, "IDLE_SECONDS", 60 if is_crowd else 0.1)
    service = service_of(lambda: ScriptedScheduler(always("Hey")), max_rows=1, max_waiting=0)
    with serving(service) as address, contextlib.ExitStack() as stack:
        url = httpx.URL(address)
        kept = [
            stack.enter_context(socket.create_connection((url.host, url.port or 0), 10))
            for _ in range(num_connections)
        ]
        kept[-1].sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        received = b"".join(iter(lambda: kept[-1].recv(65536), b""))  # ends when it is closed
        assert received.startswith(b"HTTP/1.1 200")
        assert received.count(b"HTTP/1.1") == 1


def test_nonsense_instead_of_http_is_refused(client: httpx.Client) -> None:
    with raw(client) as connection:
        connection.sendall(b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 400")
    assert client.get("/health").status_code == 200


# ---- the engine's side -------------------------------------------------------------------------


class Gate:
    """Lets the engine take a counted number of steps."""

    def __init__(self) -> None:
        self._steps = threading.Semaphore(0)
        self.num_waits = 0

    def __call__(self) -> None:
        self.num_waits += 1
        assert self._steps.acquire(timeout=20)

    def open(self, steps: int = 100_000) -> None:
        self._steps.release(steps)


def eventually(claim: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not claim():
        assert time.monotonic() < deadline
        time.sleep(0.005)


LONG = tokens_of(*["word "] * 300)


@pytest.mark.parametrize("route", [CHAT, "/v1/chat/completions"])
def test_a_client_that_goes_away_frees_its_slot_within_a_step(route: str) -> None:
    gate = Gate()
    scheduler = ScriptedScheduler(lambda _: LONG, pace=gate)
    service = service_of(lambda: scheduler)
    body = json.dumps(HELLO).encode()
    with serving(service) as address:
        host = httpx.URL(address)
        with socket.create_connection((host.host, host.port or 0)) as connection:
            connection.sendall(
                b"POST %s HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
                b"content-length: %d\r\n\r\n%s" % (route.encode(), len(body), body)
            )
            eventually(lambda: gate.num_waits == 1)
        (worker,) = service.pool.workers
        eventually(lambda: worker.num_open == 0)  # the server has noticed
        gate.open(1)
        eventually(lambda: len(scheduler.cancelled) == 1)
        assert scheduler.is_idle
        assert gate.num_waits == 1
        gate.open()


def test_many_requests_at_once_are_let_in_one_for_each_turn_of_the_loop() -> None:
    turn = 0
    entered: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        entered.append(turn)

    async def count_turns() -> None:
        nonlocal turn
        while len(entered) < 30:
            turn += 1
            await asyncio.sleep(0)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def send(message: Any) -> None:
        raise AssertionError(message)

    async def run() -> None:
        gate = guard.Guard(app, Access())
        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/", "raw_path": b"/"}
        scope |= {"query_string": b"", "headers": headers}
        await asyncio.gather(count_turns(), *(gate(scope, receive, send) for _ in range(30)))

    asyncio.run(run())
    assert len(set(entered)) == len(entered) == 30


def test_a_full_queue_is_429_with_a_time_to_come_back() -> None:
    gate = Gate()
    service = service_of(
        lambda: ScriptedScheduler(always("Hey"), pace=gate, max_rows=1), max_rows=1, max_waiting=1
    )
    with serving(service) as address, httpx.Client(base_url=address, timeout=20) as client:
        answers = []

        def ask() -> None:
            answers.append(text_of(client.post(CHAT, json=HELLO)))

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        eventually(lambda: service.pool.workers[0].num_open == 2)
        assert client.get("/health").json()["available_workers"] == 0
        refused = client.post(CHAT, json=HELLO)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "5")
        assert refused.json()["error"]["code"] == "queue_full"
        gate.open()
        for thread in threads:
            thread.join(20)
        assert answers == ["Hey", "Hey"]
        assert client.post(CHAT, json=HELLO).status_code == 200


def test_a_server_leaves_what_it_began_with_out_of_collections() -> None:
    try:
        spare_the_collector()
        # A full collection took 50 ms, in which nothing was answered.
        assert gc.get_freeze_count() > 10_000
    finally:
        gc.unfreeze()


def test_a_step_that_breaks_ends_its_answers_and_nothing_else(
    caplog: pytest.LogCaptureFixture,
) -> None:
    troubles = iter([RuntimeError("out of memory")])

    def pace() -> None:
        if (trouble := next(troubles, None)) is not None:
            raise trouble

    service = service_of(lambda: ScriptedScheduler(always("Hey"), pace=pace))
    with serving(service) as address, httpx.Client(base_url=address) as client:
        broken = events_of(client.post(CHAT, json=HELLO))
        assert "engine failed" in broken[-1]["error"]["message"]
        assert text_of(client.post(CHAT, json=HELLO)) == "Hey"
        assert client.get("/health").json()["ready"] is True
    assert "out of memory" in caplog.text


def test_an_answer_of_special_tokens_only_is_empty_and_ends() -> None:
    silent = tokens_of("<|python_start|>", "<|output_end|>", "<|user_end|>", END)
    service = service_of(lambda: ScriptedScheduler(lambda _: silent))
    with serving(service) as address:
        response = httpx.post(address + CHAT, json=HELLO)
        assert events_of(response)[-1] | {"seconds": 0, "first_token_seconds": 0} == {
            "done": True,
            "finish": "stop",
            "num_tokens": 3,
            "seconds": 0,
            "first_token_seconds": 0,
        }
        assert "<|" not in text_of(response)


def test_a_real_model_is_served() -> None:
    model = scripted_model(tokens_of("<|assistant_start|>", "Hey!", END))
    service = service_of(lambda: Scheduler(model, byte_tokenizer()))
    with serving(service) as address:
        response = httpx.post(address + CHAT, json={**user("?"), "temperature": 0.0})
    assert text_of(response) == "Hey!"


@pytest.mark.parametrize("is_wanted", [False, True])
def test_conversations_are_logged_only_on_request(
    caplog: pytest.LogCaptureFixture, is_wanted: bool
) -> None:
    caplog.set_level(logging.DEBUG)
    service = service_of(
        lambda: ScriptedScheduler(always("the answer")), log_conversations=is_wanted
    )
    with serving(service) as address:
        httpx.post(address + CHAT, json=user("the question"))
        httpx.post(address + "/v1/chat/completions", json=user("the question"))
        httpx.get(address + "/%0Afake?the%20question")
    assert ("the question" in caplog.text, "the answer" in caplog.text) == (is_wanted, is_wanted)
    assert "POST /chat/completions 200" in caplog.text
    assert "GET /\\nfake 404" in caplog.text


def test_the_page_lies_beside_the_server_whatever_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert server.create_app(service_of(lambda: ScriptedScheduler(always("Hey")))) is not None
