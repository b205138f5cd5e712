"""Identity conversations from a chat API: what is asked, kept, and said when it fails."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from dev import gen_synthetic_data as gen
from nanochat.assets import problem_with
from nanochat.common import UserError
from tasks.customjson import IDENTITY, CustomJSON, read_conversations

WAIT = 60  # seconds; nothing waits that long unless it is broken


def conversation(prompt: str) -> list[dict[str, str]]:
    """What the model of these tests writes: it depends on the request alone."""
    digest = hashlib.sha256(prompt.encode()).hexdigest()
    return [
        {"role": "user", "content": f"who are you? {digest}"},
        {"role": "assistant", "content": "I am nanochat. \u4f60\u597d"},
    ]


def answer_with(messages: Any) -> bytes:
    content = json.dumps({"messages": messages})
    return json.dumps({"choices": [{"message": {"content": content}}]}).encode()


@dataclass
class Api:
    """A chat API; `faults` come first, one for each request: status and body."""

    faults: list[tuple[int, bytes]] = field(default_factory=list)
    always: tuple[int, bytes] | None = None
    stall_after: int = 1_000_000
    """Good answers after which nothing comes any more."""
    requests: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)
    """Path, authorization and body."""
    num_stalled: int = 0
    num_good: int = 0
    changed: threading.Condition = field(default_factory=threading.Condition)
    gone: threading.Event = field(default_factory=threading.Event)
    url: str = ""

    def reply(self, path: str, authorization: str, body: dict[str, Any]) -> tuple[int, bytes]:
        with self.changed:
            self.requests.append((path, authorization, body))
            if self.faults:
                return self.faults.pop(0)
            if self.always:
                return self.always
            stalls = self.num_good >= self.stall_after
            self.num_stalled += stalls
            self.num_good += not stalls
            self.changed.notify_all()
        if stalls:
            self.gone.wait(WAIT)
        return 200, answer_with(conversation(body["messages"][0]["content"]))


class _Handler(BaseHTTPRequestHandler):
    api: Api

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        status, content = self.api.reply(self.path, self.headers["Authorization"], body)
        with suppress(OSError):  # a client that was killed does not wait
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            if status == 429:
                self.send_header("Retry-After", "0")
            self.end_headers()
            self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setenv("OPENROUTER_API_KEY", "sk-secret")
    monkeypatch.delenv("NANOCHAT_OFFLINE", raising=False)
    monkeypatch.setattr(gen, "KEY_FILE", tmp_path / "openroutertoken.txt")
    monkeypatch.setattr(gen, "BACKOFF_SECONDS", 0.0)
    api = Api()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"api": api}))
    api.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield api
    api.gone.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def config(api: Api, tmp_path: Path) -> gen.Config:
    return gen.Config(num=12, base_url=api.url, out=tmp_path / "out" / "chats.jsonl")


def out_of(config: gen.Config) -> Path:
    assert config.out is not None
    return config.out


def part_of(config: gen.Config) -> Path:
    return out_of(config).with_name("chats.jsonl.part")


# ---- what is asked ----------------------------------------------------------------------------


def test_there_are_enough_starters_of_many_kinds() -> None:
    starters = gen.STARTERS_FILE.read_text(encoding="utf-8").splitlines()
    assert len(starters) == len(set(starters)) >= 200
    assert all(line == line.strip() != "" for line in starters)
    assert sum(line.isupper() and line.isascii() for line in starters) >= 5  # somebody shouts
    assert sum(line.islower() and line.isascii() for line in starters) >= 30  # or is in a hurry
    assert sum(not line.isascii() for line in starters) >= 30  # other languages


def test_examples_depend_on_the_seed_and_the_number_alone() -> None:
    ten = gen.make_bodies(gen.Config(num=10))
    assert gen.make_bodies(gen.Config(num=4)) == ten[:4]
    other = gen.make_bodies(gen.Config(num=10, seed=1))
    prompts = {body["messages"][0]["content"] for body in ten + other}
    assert len(prompts) == 20
    starters = set(gen.STARTERS_FILE.read_text(encoding="utf-8").splitlines())
    for prompt in prompts:
        shown = [line.strip() for line in prompt.splitlines() if line.startswith("    ")]
        assert len([line for line in shown if line in starters]) >= 5


def test_the_request_is_the_documented_one(api: Api, config: gen.Config) -> None:
    gen.main(replace(config, num=1))
    ((path, authorization, body),) = api.requests
    assert (path, authorization) == ("/v1/chat/completions", "Bearer sk-secret")
    assert (body["model"], body["temperature"]) == ("google/gemini-2.5-flash", 1.0)
    schema = body["response_format"]["json_schema"]["schema"]
    assert set(schema["properties"]["messages"]["items"]["properties"]) == {"role", "content"}
    readme = (gen.REPOSITORY / "README.md").read_text(encoding="utf-8").strip()
    assert readme in body["messages"][0]["content"]


def test_a_dry_run_asks_nobody_and_needs_no_key(
    api: Api,
    config: gen.Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("OPENROUTER_API_KEY")
    (tmp_path / "me.md").write_text("Its name is {Ada}.")
    gen.main(replace(config, about=tmp_path / "me.md", dry_run=True))
    assert "Its name is {Ada}." in capsys.readouterr().out
    assert (api.requests, out_of(config).parent.exists()) == ([], False)


# ---- what comes of it -------------------------------------------------------------------------


def test_conversations_are_written_in_order_and_nothing_else_stays(config: gen.Config) -> None:
    gen.main(config)
    asked = [conversation(body["messages"][0]["content"]) for body in gen.make_bodies(config)]
    assert [c.to_json() for c in read_conversations(out_of(config))] == asked
    assert os.listdir(out_of(config).parent) == ["chats.jsonl"]


def test_training_finds_them_without_another_command(api: Api, config: gen.Config) -> None:
    IDENTITY.path.write_text('[{"role": "user", "content": "who was there before?"}]\n')
    gen.main(replace(config, out=None))
    assert problem_with(IDENTITY, verify=True) is None
    assert len(CustomJSON(IDENTITY)) == 12


def test_a_busy_or_broken_server_is_asked_again(api: Api, config: gen.Config) -> None:
    api.faults = [(429, b"slow down"), (503, b""), (500, b"oops")]
    gen.main(replace(config, threads=1))
    assert len(api.requests) == 12 + 3
    assert len(read_conversations(out_of(config))) == 12


USER, ASSISTANT = conversation("")
BAD_ANSWERS = {
    "no JSON": b"<html>hello</html>",
    "an error in a good answer": b'{"error": {"message": "upstream is gone"}}',
    "no content": b'{"choices": [{"message": {"content": null}}]}',
    "cut": b'{"choices": [{"message": {"content": "{\\"messages\\": [{\\"role"}}]}',
    "a list": b"[1]",
    "one message": answer_with([USER]),
    "no turns": answer_with([USER, USER]),
    "the assistant first": answer_with([ASSISTANT, USER]),
    "the user last": answer_with([USER, ASSISTANT, USER]),
    "an empty message": answer_with([USER, {**ASSISTANT, "content": " "}]),
    "half a character": answer_with([USER, {**ASSISTANT, "content": "\ud800"}]),
    "another role": answer_with([USER, {**ASSISTANT, "role": "robot"}]),
    "parts": answer_with([USER, {**ASSISTANT, "content": [{"type": "text", "text": "a"}]}]),
}


@pytest.mark.parametrize("body", BAD_ANSWERS.values(), ids=list(BAD_ANSWERS))
def test_a_bad_answer_is_asked_for_again(api: Api, config: gen.Config, body: bytes) -> None:
    api.faults = [(200, body)]
    gen.main(replace(config, num=2, threads=1))
    assert len(api.requests) == 3
    assert len(read_conversations(out_of(config))) == 2


# ---- what ends it -----------------------------------------------------------------------------


def test_a_model_that_only_gives_bad_answers_is_named(api: Api, config: gen.Config) -> None:
    api.always = (200, answer_with([USER, USER]))
    with pytest.raises(UserError, match=r"2\.5-flash gave 5 bad answers, at last: .* user, exp"):
        gen.main(replace(config, threads=1))
    assert len(api.requests) == gen.ATTEMPTS


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "completions refused the API key .HTTP 401: no such user"),
        (402, "no credit left"),
        (400, "refused the request .HTTP 400: no such user"),
        (503, "HTTP 503"),
    ],
)
def test_a_refusal_ends_it_with_the_servers_words(
    api: Api, config: gen.Config, status: int, message: str
) -> None:
    api.always = (status, b"no such user")
    with pytest.raises(UserError, match=message) as raised:
        gen.main(replace(config, threads=1))
    assert len(api.requests) == (7 if status == 503 else 1)
    assert "sk-secret" not in str(raised.value)
    assert not out_of(config).exists()


def test_a_server_that_is_not_there_is_named(config: gen.Config) -> None:
    with pytest.raises(UserError, match=r"http://127.0.0.1:9/v1/chat/completions does not answer"):
        gen.main(replace(config, base_url="http://127.0.0.1:9/v1/"))


def test_the_key_is_looked_for_in_two_places(
    api: Api, config: gen.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENROUTER_API_KEY", "")
    with pytest.raises(UserError, match=r"no API key: write it to .*openroutertoken\.txt, or set"):
        gen.main(config)
    gen.KEY_FILE.write_text("two words\n")
    with pytest.raises(UserError, match="must be a single word"):
        gen.main(config)
    gen.KEY_FILE.write_text("sk-file\n")
    gen.main(replace(config, num=1))
    assert [authorization for _, authorization, _ in api.requests] == ["Bearer sk-file"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num": 0}, "--num=0 .* at least 1"),
        ({"threads": 0}, "--threads=0"),
        ({"about": Path("no/such.md")}, "--about=no/such.md cannot be read"),
        ({"out": Path()}, "--out=. is a folder"),
    ],
)
def test_impossible_settings_are_named(
    api: Api, config: gen.Config, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        gen.main(replace(config, **change))
    assert api.requests == []


def test_without_a_network_nobody_is_asked(
    api: Api, config: gen.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOCHAT_OFFLINE", "1")
    with pytest.raises(UserError, match="NANOCHAT_OFFLINE"):
        gen.main(config)
    assert api.requests == []


# ---- interrupted ------------------------------------------------------------------------------


def until(api: Api, claim: Callable[[], bool]) -> None:
    with api.changed:
        assert api.changed.wait_for(claim, WAIT)


def test_a_killed_run_is_continued_and_gives_the_same_file(api: Api, config: gen.Config) -> None:
    api.stall_after = 5
    flags = [f"--num={config.num}", f"--base-url={api.url}", f"--out={config.out}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "dev.gen_synthetic_data", *flags], cwd=gen.REPOSITORY
    )
    until(api, lambda: api.num_stalled == config.threads)  # so all before them are kept
    process.send_signal(signal.SIGKILL)
    process.wait(WAIT)
    assert not out_of(config).exists()
    with part_of(config).open("ab") as file:
        file.write(b'\n["7 abc", "[{\\"ro')  # as if it had been killed while it wrote
    api.stall_after, asked = 1_000_000, len(api.requests)
    api.gone.set()

    gen.main(config)

    assert len(api.requests) - asked == config.num - 5
    undisturbed = replace(config, out=out_of(config).with_name("other.jsonl"))
    gen.main(undisturbed)
    assert out_of(config).read_bytes() == out_of(undisturbed).read_bytes()


def test_after_a_failure_it_is_said_what_is_kept(api: Api, config: gen.Config) -> None:
    gen.main(replace(config, num=3, out=out_of(config)))
    before = out_of(config).read_bytes()
    api.requests.clear()
    api.faults = [(200, answer_with(conversation("x")))] * 4 + [(402, b"")]
    with pytest.raises(UserError, match=r"4 of 12 conversations are kept in .*chats\.jsonl\.part"):
        gen.main(replace(config, threads=1))
    assert out_of(config).read_bytes() == before
    gen.main(config)
    assert len(read_conversations(out_of(config))) == 12


def test_conversations_about_another_text_are_not_mixed_in(
    api: Api, config: gen.Config, tmp_path: Path
) -> None:
    api.faults = [(200, answer_with(conversation("x"))), (402, b"")]
    with pytest.raises(UserError, match="1 of 12"):
        gen.main(replace(config, threads=1))
    (tmp_path / "me.md").write_text("I am Ada.")
    api.requests.clear()
    gen.main(replace(config, about=tmp_path / "me.md"))
    assert len(api.requests) == 12
