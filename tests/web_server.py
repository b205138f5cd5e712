"""A real server over HTTP, in a thread, whose engine follows a script."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import httpx
import uvicorn
from scripted_model import byte_tokenizer, tokens_of

from nanochat import server
from nanochat.request import Request, TokenEvent
from nanochat.sampling import SamplingSettings
from nanochat.serving.guard import Access
from nanochat.serving.links import ThreadLink
from nanochat.serving.pool import Pool
from nanochat.serving.responses import ModelInfo, ServerDefaults
from nanochat.serving.service import Service
from nanochat.serving.worker import Worker

END = "<|assistant_end|>"
CONTEXT = 4096
HELLO = {"messages": [{"role": "user", "content": "Hello?"}]}


class ScriptedScheduler:
    """As `Scheduler` to its caller, but `script` says what is answered to a prompt's text.

    `pace` is called before each step: a test may wait in it, or raise.
    """

    def __init__(
        self,
        script: Callable[[str], Sequence[int]],
        *,
        pace: Callable[[], None] = lambda: None,
        max_rows: int = 64,
    ) -> None:
        self.script, self.pace, self.max_rows = script, pace, max_rows
        self.requests: list[Request] = []
        self.cancelled: list[Request] = []

    @property
    def is_idle(self) -> bool:
        return not self.requests

    def submit(
        self, prompt: Sequence[int], settings: SamplingSettings, *, sample: int = 0
    ) -> Request:
        limit = min(settings.max_tokens or CONTEXT, CONTEXT - len(prompt))
        request = Request(prompt, settings, tokenizer=byte_tokenizer(), limit=limit, sample=sample)
        self.requests.append(request)
        return request

    def cancel(self, request: Request) -> None:
        request.is_cancelled = True
        self.cancelled.append(request)
        self.requests.remove(request)

    def step(self) -> list[TokenEvent]:
        self.pace()
        events = []
        for request in self.requests[: self.max_rows]:
            answer = self.script(byte_tokenizer().decode(request.prompt))
            forced, place = request.forced, len(request.tokens)
            token = answer[place] if forced is None else forced
            alternatives = ((token, -0.25), (65, -2.0))[: request.settings.logprobs or 0]
            logprob = None if request.settings.logprobs is None else -0.25
            text = request.accept(token)
            events.append(
                TokenEvent(
                    request, token, forced is not None, text, logprob, alternatives, request.finish
                )
            )
        self.requests = [request for request in self.requests if not request.is_finished]
        return events


def always(*parts: str) -> Callable[[str], Sequence[int]]:
    """The same answer to everything; then the end."""
    tokens = tokens_of(*parts, END)
    return lambda _: tokens


def service_of(
    make_scheduler: Callable[[], Any], *, max_rows: int = 64, max_waiting: int = 256, **options: Any
) -> Service:
    """A service with one engine in a thread."""
    worker = Worker(
        ThreadLink(make_scheduler),
        gpu_id=0,
        device="cpu",
        max_rows=max_rows,
        max_waiting=max_waiting,
    )
    return Service(
        byte_tokenizer(),
        Pool([worker]),
        model=ModelInfo(
            id="nanochat-d1-sft",
            stage="sft",
            tag="d1",
            step=7,
            num_parameters=1_234_567,
            context=CONTEXT,
            vocab_size=byte_tokenizer().vocab_size,
            dtype="float32",
        ),
        defaults=ServerDefaults(temperature=0.8, top_k=50, top_p=None, max_tokens=512),
        created=1_700_000_000,
        **options,
    )


@contextlib.contextmanager
def serving(service: Service, access: Access | None = None, *, port: int = 0) -> Iterator[str]:
    """Run a server; yields its address."""
    with socket.create_server(("127.0.0.1", port)) as listener:
        app = server.create_app(service, access)
        config = server.settings_of(app, server.max_connections(service.pool))
        config.timeout_graceful_shutdown = 1
        running = uvicorn.Server(config)
        began = threading.Event()
        startup = running.startup

        async def startup_and_tell(sockets: Any = None) -> None:
            await startup(sockets)
            began.set()

        running.startup = startup_and_tell  # type: ignore[method-assign]
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        assert began.wait(20), "the server did not start"
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # it logs its own shutdown
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            running.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    """The JSON of all server-sent events of a finished response."""
    blocks = response.text.split("\n\n")
    assert blocks.pop() == ""
    assert all(block.startswith("data: ") for block in blocks)
    return [json.loads(block[6:]) for block in blocks if block != "data: [DONE]"]


def text_of(response: httpx.Response) -> str:
    """The answer that a stream of /chat/completions tells."""
    return "".join(event.get("token", "") for event in events_of(response))
