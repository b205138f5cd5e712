"""The web server: the page, its streaming API, and the OpenAI API.

`create_app` puts the rooms of `nanochat.serving` together; `serve` runs them until SIGTERM.
No route reads a file: the page and the model are in memory before the first request.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import logging
import re
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from nanochat import __version__
from nanochat.common import UserError
from nanochat.runtime import spare_the_collector
from nanochat.serving import openai_api
from nanochat.serving.guard import MAX_HEAD_BYTES, Access, App, Guard, error_body, kind_of
from nanochat.serving.pieces import Pieces
from nanochat.serving.pool import Pool
from nanochat.serving.protocol import PatientProtocol
from nanochat.serving.requests import (
    LIMITS,
    ChatRequest,
    OpenAIChatRequest,
    OpenAICompletionRequest,
    RequestError,
    TokenizeRequest,
    reason_of,
)
from nanochat.serving.responses import (
    ChatCompletion,
    ErrorBody,
    Health,
    ModelEntry,
    ModelList,
    Stats,
    TextCompletion,
    Tokenized,
    WorkerStats,
)
from nanochat.serving.service import RETRY_SECONDS, Service, error_of
from nanochat.serving.stream import ClientGoneError, EventStream, event, while_connected
from nanochat.serving.worker import Answer, AnswerError

logger = logging.getLogger(__name__)

# Beyond those of the requests that the engines take on: people who only look, and requests that
# are told that the queue is full. One engine with its usual queue makes 512.
SPARE_CONNECTIONS = 192
# Open files that are no connections: the engines' pipes, the log, what Python itself holds.
OTHER_FILES = 128
DRAIN_SECONDS = 30
_HERE = Path(__file__).parent
_STREAM: dict[str, Any] = {"text/event-stream": {}}
DROPPED_TURNS = "x-nanochat-dropped-turns"
_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "A limit is exceeded, or a value means nothing"},
    401: {"model": ErrorBody, "description": "The API key is missing or wrong"},
    403: {"model": ErrorBody, "description": "Host or Origin is not this server's"},
    404: {"model": ErrorBody, "description": "No such model"},
    408: {"model": ErrorBody, "description": "The body came too slowly"},
    413: {"model": ErrorBody, "description": "The body is too long"},
    415: {"model": ErrorBody, "description": "The body is not announced as JSON"},
    422: {"model": ErrorBody, "description": "The body is not JSON of the right form"},
    429: {"model": ErrorBody, "description": "Too many requests wait; see Retry-After"},
    503: {"model": ErrorBody, "description": "The engine cannot answer"},
}


def create_app(service: Service, access: Access | None = None) -> App:
    """The ASGI application. Its engines start and end with its lifespan."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.pool.start()
        try:
            yield
        finally:
            service.pool.stop()

    access = access or Access()
    app = FastAPI(
        title="nanochat",
        version=__version__,
        lifespan=lifespan,
        # Their pages load scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
        # What is no route is an error as any other, not a way to one.
        redirect_slashes=False,
        responses=_ERRORS,
    )
    app.add_exception_handler(RequestError, _on_request_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_defect)
    _add_page(app)
    _add_status(app, service, access)
    _add_chat(app, service)
    _add_openai(app, service)
    return Guard(app, access)


def serve(service: Service, access: Access, listener: socket.socket) -> None:
    """Answer until SIGTERM or Ctrl-C; then finish the answers in the making, and return.

    UserError when no engine could be kept alive.
    """
    # uvicorn raises the signal again when it has drained; that is the end, not an accident.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    connections = allow_connections(max_connections(service.pool))
    running = uvicorn.Server(settings_of(create_app(service, access), connections))

    def end() -> None:
        running.should_exit = True

    service.pool.hopeless = end
    spare_the_collector()
    running.run(sockets=[listener])
    if service.pool.is_hopeless:
        raise UserError("no engine could be kept alive; the log says how they died")


def max_connections(pool: Pool) -> int:
    """Connections that may be open at once; uvicorn turns others away with a bare 503.

    More than the engines take on, so that a full queue gives 429 and a time to come back.
    """
    return pool.capacity + SPARE_CONNECTIONS


def allow_connections(wanted: int) -> int:
    """Ask the system for so many open files; returns how many connections it allows."""
    if sys.platform == "win32":  # has no such limit
        return wanted
    import resource

    needed = wanted + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if soft == unlimited or soft >= needed:
        return wanted
    allowed = needed if hard == unlimited else min(needed, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    except (OSError, ValueError):  # macOS has a lower limit than the one it tells
        allowed = soft
    if allowed == needed:
        return wanted
    connections = max(allowed - OTHER_FILES, 1)
    logger.warning(
        "the system lets this process open %d files, so at most %d connections are kept, not %d; "
        "raise the limit with `ulimit -n %d`",
        *(allowed, connections, wanted, needed),
    )
    return connections


def settings_of(app: App, connections: int) -> uvicorn.Config:
    """How uvicorn is to serve: patient, but not for ever; bounded; quiet."""
    return uvicorn.Config(
        app,
        http=PatientProtocol,
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=connections,
        timeout_graceful_shutdown=DRAIN_SECONDS,
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
    )


# ---- errors ------------------------------------------------------------------------------------


def _error(
    status: int, message: str, *, param: str | None = None, code: str | None = None, **headers: str
) -> JSONResponse:
    body = error_body(message, kind=kind_of(status), param=param, code=code)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return JSONResponse(body, status_code=status, headers=named)


async def _on_request_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    headers = {"retry_after": str(RETRY_SECONDS)} if error.status in (429, 503) else {}
    return _error(error.status, error.message, param=error.param, code=error.code, **headers)


async def _on_validation_error(request: Request, error: Exception) -> Response:
    """A limit gives 400; a wrong form 422, but 400 on /v1, whose clients expect that."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        param, message = "", "the body is not valid JSON"
    else:
        param, message = reason_of({**first, "loc": first["loc"][1:]})
    is_limit = first["type"] in LIMITS or request.url.path.startswith("/v1/")
    return _error(400 if is_limit else 422, message, param=param or None, code=first["type"])


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    reasons = {
        # Not UTF-8, or a number too long or lists too deep for the parser.
        400: "the body cannot be read as JSON in UTF-8",
        404: "there is no such route",
        405: "this route does not take that method",
    }
    status = error.status_code
    response = _error(status, reasons.get(status, str(error.detail)))
    response.headers.update(error.headers or {})
    return response


async def _on_defect(request: Request, error: Exception) -> Response:
    return _error(500, "the server has failed; its log says how")


# ---- routes ------------------------------------------------------------------------------------


def _add_page(app: FastAPI) -> None:
    page = (_HERE / "ui.html").read_bytes()
    logo = (_HERE / "logo.svg").read_bytes()
    policy = content_security_policy(page.decode())

    @app.get("/", include_in_schema=False)
    async def show_page() -> Response:
        headers = {"content-security-policy": policy}
        return Response(page, media_type="text/html", headers=headers)

    @app.get("/logo.svg", include_in_schema=False)
    async def show_logo() -> Response:
        return Response(logo, media_type="image/svg+xml")


def content_security_policy(page: str) -> str:
    """Allow a page its own script and style, by their hashes, and requests to its own server."""

    def hashes(tag: str) -> str:
        blocks = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = [hashlib.sha256(block.encode()).digest() for block in blocks]
        return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; "
        "connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )


def _add_status(app: FastAPI, service: Service, access: Access) -> None:
    pool = service.pool

    @app.get("/health")
    async def health() -> Health:
        """Whether the server can answer, and what it serves."""
        is_ready = pool.num_alive > 0
        return Health(
            status="ok" if is_ready else "failed",
            ready=is_ready,
            num_gpus=len(pool.workers),
            available_workers=pool.num_free,
            needs_key=access.api_key is not None,
            model=service.model,
            defaults=service.defaults,
        )

    @app.get("/stats")
    async def stats() -> Stats:
        """What each engine is doing."""
        workers = [
            WorkerStats(
                gpu_id=worker.gpu_id,
                device=worker.device,
                alive=worker.is_alive,
                deaths=worker.num_deaths,
                open_requests=worker.num_open,
                answered=worker.num_answered,
                tokens=worker.num_tokens,
            )
            for worker in pool.workers
        ]
        return Stats(
            total_workers=len(workers),
            available_workers=pool.num_free,
            busy_workers=sum(worker.open_requests > 0 for worker in workers),
            workers=workers,
        )


def _add_chat(app: FastAPI, service: Service) -> None:
    @app.post(
        "/chat/completions",
        response_class=StreamingResponse,  # for the document, which would say JSON otherwise
        responses={200: {"content": _STREAM, "description": "Events of JSON, the last is done"}},
    )
    async def chat(request: ChatRequest, http: Request) -> Response:
        """Answer a conversation as a stream of {"token": text, "gpu": id}, then {"done": true}.

        The first event tells the prompt's length and how many old turns were left out. Text
        inside a call of the calculator has a "part" and its bare "text" as well.
        """
        max_tokens = service.max_tokens(request.max_tokens)
        prompt = await service.chat_prompt(request.messages, max_tokens)
        settings = service.settings(request, max_tokens=max_tokens, logprobs=request.logprobs)
        (answer,) = service.open(prompt, settings)
        start = {"prompt_tokens": len(prompt.ids), "dropped_turns": prompt.dropped_turns}
        events = _chat_events(
            service,
            answer,
            start,
            began=http.state.arrived,
            wants_tokens=request.logprobs is not None,
        )
        return EventStream(events, close=answer.close)

    @app.post("/tokenize", response_model=Tokenized)
    async def tokenize(request: TokenizeRequest) -> Response:
        """Show what the model would read: the tokens of a conversation's prompt, or of a text."""
        dropped = 0
        if request.messages is not None:
            max_tokens = service.max_tokens(request.max_tokens)
            prompt = await service.chat_prompt(request.messages, max_tokens)
            ids, dropped = prompt.ids, prompt.dropped_turns
        else:
            ids = await service.text_ids(request.text or "")
        body = b'{"tokens":%b,"dropped_turns":%d,"context":%d}' % (
            *(await service.listing(ids), dropped, service.model.context),
        )
        return Response(body, media_type="application/json")


async def _chat_events(
    service: Service, answer: Answer, start: dict[str, Any], *, began: float, wants_tokens: bool
) -> AsyncIterator[bytes]:
    gpu = answer.worker.gpu_id
    pieces = Pieces(service.tokenizer)
    first: float | None = None
    text = ""
    yield event({**start, "gpu": gpu})
    try:
        async for tokens in answer:
            first = first or time.monotonic()
            data = b""
            for piece in pieces.feed(tokens):
                text += piece.shown
                told: dict[str, Any] = {"token": piece.shown, "gpu": gpu}
                if piece.kind != "text" or piece.text != piece.shown:
                    told |= {"part": piece.kind, "text": piece.text}
                data += event(told)
            if wants_tokens:
                data += event({"tokens": service.names.look_inside(tokens)})
            if data:
                yield data
    except AnswerError as error:
        yield event(error_body(str(error), kind=kind_of(error_of(error).status)))
        return
    finally:
        service.note_answer(text)
    yield event(
        {
            "done": True,
            "finish": pieces.finish,
            "num_tokens": pieces.num_tokens,
            "first_token_seconds": round((first or began) - began, 4),
            "seconds": round(time.monotonic() - began, 4),
        }
    )


def _add_openai(app: FastAPI, service: Service) -> None:
    entry = ModelEntry(id=service.model.id, created=service.created)

    @app.get("/v1/models")
    async def models() -> ModelList:
        """The model that is served."""
        return ModelList(data=[entry])

    @app.get("/v1/models/{name}")
    async def model(name: str) -> ModelEntry:
        """The model, if that is its name."""
        service.check_model(name)
        return entry

    @app.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        responses={200: {"content": _STREAM}},
    )
    async def chat_completions(body: OpenAIChatRequest, request: Request) -> Any:
        """As in the OpenAI API; `model` may be left out.

        `dropped_turns`, in the first chunk of a stream, and a header of that name tell how many old
        messages were left out of a conversation that is longer than the context.
        """
        service.check_model(body.model)
        if body.top_logprobs is not None and not body.logprobs:
            raise RequestError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        limits = {body.max_tokens, body.max_completion_tokens} - {None}
        if len(limits) > 1:
            sentence = "max_tokens and max_completion_tokens differ; leave one of them out"
            raise RequestError(400, sentence, param="max_tokens")
        max_tokens = service.max_tokens(body.max_completion_tokens or body.max_tokens)
        prompt = await service.chat_prompt(body.messages, max_tokens)
        settings = service.settings(
            body,
            max_tokens=max_tokens,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        )
        reply = _reply(service, openai_api.ChatForm(), body, bool(body.logprobs))
        reply.open([prompt], settings, num_choices=body.n or 1)
        headers = {DROPPED_TURNS: str(prompt.dropped_turns)}
        return await _answered(reply, request, is_streamed=bool(body.stream), headers=headers)

    @app.post(
        "/v1/completions", response_model=TextCompletion, responses={200: {"content": _STREAM}}
    )
    async def completions(body: OpenAICompletionRequest, request: Request) -> Any:
        """Continue texts, as in the OpenAI API; `model` may be left out."""
        service.check_model(body.model)
        if body.echo and body.logprobs is not None:
            raise RequestError(400, "echo and logprobs cannot be combined here", param="echo")
        prompts = await service.text_prompts(body)
        settings = service.settings(
            body,
            max_tokens=body.max_tokens or openai_api.DEFAULT_TEXT_TOKENS,
            logprobs=body.logprobs,
        )
        reply = _reply(service, openai_api.TextForm(), body, body.logprobs is not None)
        reply.open(prompts, settings, num_choices=body.n or 1, echo=bool(body.echo))
        return await _answered(reply, request, is_streamed=bool(body.stream), headers={})


def _reply(
    service: Service,
    form: openai_api.Form,
    body: OpenAIChatRequest | OpenAICompletionRequest,
    wants_logprobs: bool,
) -> openai_api.Reply:
    wants_usage = bool(body.stream_options and body.stream_options.include_usage)
    return openai_api.Reply(service, form, wants_logprobs=wants_logprobs, wants_usage=wants_usage)


async def _answered(
    reply: openai_api.Reply, request: Request, *, is_streamed: bool, headers: dict[str, str]
) -> Response:
    if is_streamed:
        return EventStream(reply.stream(), close=reply.close, headers=headers)
    try:
        whole = await while_connected(request.receive, reply.collect())
    except ClientGoneError:
        # Nobody reads it; nginx's number for "client closed request" shows in the log.
        return Response(status_code=499)
    return JSONResponse(whole.model_dump(), headers=headers)
