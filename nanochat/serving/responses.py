"""What the server answers, as the OpenAPI document promises it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

Finish = Literal["stop", "length"]


class ErrorDetail(BaseModel):
    """What went wrong, in the OpenAI API's words."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every status from 400 on."""

    error: ErrorDetail


class ModelInfo(BaseModel):
    """The model that is served."""

    id: str
    stage: str
    tag: str
    step: int
    num_parameters: int
    context: int
    vocab_size: int
    dtype: str


class ServerDefaults(BaseModel):
    """What a request that does not say gets."""

    temperature: float
    top_k: int | None
    top_p: float | None
    max_tokens: int


class Health(BaseModel):
    """GET /health."""

    status: Literal["ok", "failed"]
    ready: bool
    num_gpus: int
    available_workers: int
    needs_key: bool
    model: ModelInfo
    defaults: ServerDefaults


class WorkerStats(BaseModel):
    """One engine."""

    gpu_id: int
    device: str
    alive: bool
    deaths: int
    open_requests: int
    answered: int
    tokens: int


class Stats(BaseModel):
    """GET /stats."""

    total_workers: int
    available_workers: int
    busy_workers: int
    workers: list[WorkerStats]


class PromptToken(BaseModel):
    """A token of a prompt: its id and its text, or its bytes as <F0> where they are no text."""

    id: int
    text: str
    special: bool


class Tokenized(BaseModel):
    """POST /tokenize."""

    tokens: list[PromptToken]
    dropped_turns: int
    context: int


class ModelEntry(BaseModel):
    """A model in GET /v1/models."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "nanochat"


class ModelList(BaseModel):
    """GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelEntry]


class Usage(BaseModel):
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, num_prompt: int, num_answer: int) -> Usage:
        """Add up."""
        return cls(
            prompt_tokens=num_prompt,
            completion_tokens=num_answer,
            total_tokens=num_prompt + num_answer,
        )


class AnswerPart(BaseModel):
    """A piece of an answer: text, a call of the calculator, or its result."""

    type: Literal["text", "python", "python_output"]
    text: str


class AnswerMessage(BaseModel):
    """An answer; may be sent back as it is.

    `parts`: for one that called the calculator, or is empty, which `content` alone cannot tell.
    """

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None
    parts: list[AnswerPart] | None = None


class ChatChoice(BaseModel):
    """One of `n` answers."""

    index: int
    message: AnswerMessage
    logprobs: dict[str, Any] | None
    finish_reason: Finish


class ChatCompletion(BaseModel):
    """POST /v1/chat/completions, not streamed."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    dropped_turns: int
    """Messages, from the oldest on, that were left out as the context is too small for them."""


class TextChoice(BaseModel):
    """One continuation."""

    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: Finish


class TextCompletion(BaseModel):
    """POST /v1/completions, not streamed."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage
