"""What a client may ask, with its limits: one place for the checks and for the OpenAPI document.

Types are strict (no "5" for 5), unknown fields are refused: a setting is honoured or named in an
error, never ignored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

# The limits that the documents state, for all routes.
MAX_MESSAGES = 500
MAX_MESSAGE_CHARS = 8_000
MAX_TOTAL_CHARS = 32_000
MAX_TEMPERATURE = 2.0
MAX_TOP_K = 200
MAX_TOKENS = 4_096
# Ours. One client may take an eighth of the 64 rows that an engine answers at a time.
MAX_CHOICES = 8
MAX_STOPS, MAX_STOP_CHARS = 4, 100
MAX_LOGPROBS = 20
MAX_SEED = 2**63 - 1
# More than any request has. A body has room for 20,000 parts, or 60,000 unknown fields; pydantic
# makes an object, or an error, of each, and nobody else is answered meanwhile.
MAX_PARTS = 4_000
MAX_FIELDS = 100
# 32,000 characters, each written \ud83d\ude00 (12 bytes), and 500 messages around them.
MAX_BODY_BYTES = 512 * 1024


def _whole(value: Any) -> Any:
    """JSON does not tell 5.0 from 5."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]


def _kind(value: Any) -> str:
    """Which form a value has that may be a text or a list; the others then do not complain."""
    if not isinstance(value, list):
        return "text"
    if value and all(isinstance(entry, list) for entry in value):
        return "lists"
    return "ids" if value and isinstance(value[0], int) else "list"


def _few_tokens(value: Any) -> Any:
    entries = _list(value)
    lengths = (len(entry) for entry in entries if isinstance(entry, str | list))
    if len(entries) > MAX_TOTAL_CHARS or sum(lengths) > MAX_TOTAL_CHARS:
        raise ValueError(f"must have at most {MAX_TOTAL_CHARS:,} characters or tokens in all")
    return value


TokenId = Annotated[Whole, Field(ge=0)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_TOTAL_CHARS, fail_fast=True)]


class _Model(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class _Request(_Model):
    @model_validator(mode="before")
    @classmethod
    def _is_within_reason(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        messages = _list(value.get("messages"))
        objects = [message for message in messages if isinstance(message, dict)]
        lists = [message.get(name) for message in objects for name in ("content", "parts")]
        parts = [part for entries in lists for part in _list(entries)]
        if len(parts) > MAX_PARTS:
            raise ValueError(f"messages have more than {MAX_PARTS:,} parts together")
        values = [value, *value.values(), *objects, *parts]
        if any(isinstance(each, dict) and len(each) > MAX_FIELDS for each in values):
            raise ValueError(f"an object has more than {MAX_FIELDS} fields")
        return value


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


# ---- conversations -----------------------------------------------------------------------------


class ContentPart(_Model):
    """A piece of a message: text; in an assistant's also a call of the calculator, its result."""

    type: Literal["text", "python", "python_output"]
    text: Annotated[str, Field(max_length=MAX_MESSAGE_CHARS)]


# Lists end at their first mistake: only one is told, and a body has room for 300,000.
Parts = Annotated[list[ContentPart], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
# Only at the value that changes nothing: the model has nothing of the kind.
NoText = Annotated[str, Field(max_length=0)]
NoList = Annotated[list[Any], Field(max_length=0)]
NoObject = Annotated[dict[str, Any], Field(max_length=0)]


class ChatMessage(_Model):
    """One turn. A system text may come first; then user and assistant take turns.

    An answer's message may be sent back as it came, with what the OpenAI client adds to it.
    """

    role: Literal["system", "user", "assistant"]
    parts: Parts | None = None
    """Counts instead of `content`, in which a call of the calculator is but text."""
    content: Annotated[
        Annotated[str, Field(max_length=MAX_MESSAGE_CHARS), Tag("text")]
        | Annotated[Parts, Tag("list")],
        Discriminator(lambda value: "list" if isinstance(value, list) else "text"),
    ]
    name: NoText | None = None
    refusal: NoText | None = None
    tool_calls: NoList | None = None
    function_call: NoObject | None = None
    audio: NoObject | None = None
    annotations: NoList | None = None
    parsed: NoObject | None = None

    @field_validator("content")
    @classmethod
    def _is_not_empty(
        cls, content: str | list[ContentPart], info: ValidationInfo
    ) -> str | list[ContentPart]:
        # An answer may be empty; its parts say that this is meant.
        if content == "" and info.data.get("parts") is None:
            raise ValueError("must not be empty")
        return content

    @property
    def said(self) -> str | list[ContentPart]:
        """What the model is to read."""
        return self.content if self.parts is None else self.parts


Messages = Annotated[
    list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
]


# ---- settings ----------------------------------------------------------------------------------


class Sampling(_Request):
    """How to choose tokens; what is left out is as the server was started."""

    temperature: Annotated[float, Field(ge=0, le=MAX_TEMPERATURE)] | None = None
    top_k: (
        Annotated[
            Annotated[Whole, Field(ge=1, le=MAX_TOP_K), Tag("number")]
            | Annotated[Literal["off"], Tag("off")],
            Discriminator(lambda value: "off" if value == "off" else "number"),
        ]
        | None
    ) = None
    """"off": all tokens, also where the server was started with a limit."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    min_p: Annotated[float, Field(ge=0, lt=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10)] | None = None
    max_tokens: Annotated[Whole, Field(ge=1, le=MAX_TOKENS)] | None = None
    seed: Annotated[Whole, Field(ge=-MAX_SEED, le=MAX_SEED)] | None = None
    stop: (
        Annotated[
            Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS), Tag("text")]
            | Annotated[
                list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]],
                Field(max_length=MAX_STOPS),
                Tag("list"),
            ],
            Discriminator(lambda value: "list" if isinstance(value, list) else "text"),
        ]
        | None
    ) = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class ChatRequest(Sampling):
    """POST /chat/completions: what the page sends. The answer is always a stream."""

    messages: Messages
    logprobs: Annotated[Whole, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    """Report each token with its log probability and this many alternatives."""
    stream: Literal[True] | None = None


class TokenizeRequest(_Request):
    """POST /tokenize: a conversation as the model would read it, or a plain text."""

    messages: Messages | None = None
    text: Annotated[str, Field(min_length=1, max_length=MAX_TOTAL_CHARS)] | None = None
    max_tokens: Annotated[Whole, Field(ge=1, le=MAX_TOKENS)] | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> TokenizeRequest:
        if (self.messages is None) == (self.text is None):
            raise ValueError("give either messages or text")
        return self


# ---- the OpenAI API ----------------------------------------------------------------------------


class StreamOptions(_Model):
    """Options of a streamed answer."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class _OpenAI(Sampling):
    model: Annotated[str, Field(max_length=200)] | None = None
    n: Annotated[Whole, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Only at the value that changes nothing: there is no such feature here.
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: NoObject | None = None
    # Labels for the client's own book-keeping.
    user: Annotated[str, Field(max_length=200)] | None = None


class ResponseFormat(_Model):
    """Only plain text."""

    type: Literal["text"]


class OpenAIChatRequest(_OpenAI):
    """POST /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: Annotated[Whole, Field(ge=1, le=MAX_TOKENS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: NoList | None = None
    tool_choice: Literal["none", "auto"] | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None


class OpenAICompletionRequest(_OpenAI):
    """POST /v1/completions: continue a text, or several."""

    prompt: Annotated[
        Annotated[str, Field(min_length=1, max_length=MAX_TOTAL_CHARS), Tag("text")]
        | Annotated[
            list[Annotated[str, Field(min_length=1, max_length=MAX_TOTAL_CHARS)]],
            Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True),
            Tag("list"),
        ]
        | Annotated[TokenIds, Tag("ids")]
        | Annotated[
            list[TokenIds],
            Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True),
            Tag("lists"),
        ],
        Discriminator(_kind),
        BeforeValidator(_few_tokens),
    ]
    echo: bool | None = None
    logprobs: Annotated[Whole, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    best_of: Literal[1] | None = None
    suffix: NoText | None = None


# ---- reasons -----------------------------------------------------------------------------------


class RequestError(Exception):
    """A request that is answered with an error: status, sentence, and which field is wrong."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code


# Violations of a limit, in words; everything else pydantic finds is a matter of form.
_REASONS = {
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be above {gt}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be below {lt}",
    "finite_number": "must be a finite number",
    "string_too_short": "must not be empty",
    "string_too_long": "must have at most {max_length:,} characters",
    "too_short": "must have at least {min_length} entry",
    "too_long": "must have at most {max_length:,} entries",
    "literal_error": "must be {expected}",
    "value_error": "{error}",
    "extra_forbidden": "is not a field of this request",
    "missing": "is missing",
    "string_unicode": "is not valid Unicode (a lone surrogate)",
    "model_attributes_type": "must be a JSON object",
}
LIMITS = frozenset(_REASONS) - {
    "extra_forbidden",
    "missing",
    "string_unicode",
    "model_attributes_type",
}
_TAGS = {"text", "list", "ids", "lists", "number", "off"}


def reason_of(error: dict[str, Any]) -> tuple[str, str]:
    """The field a validation error is about, and a sentence that says what is wrong with it.

    error: one entry of `pydantic.ValidationError.errors()`, its place without the leading "body".
    The value itself is not repeated: it may be long, and it is the client's.
    """
    # Where a value may have several forms, pydantic names the form after the field.
    loc = error["loc"]
    steps = [
        step
        for i, step in enumerate(loc)
        if not (i and isinstance(loc[i - 1], str) and step in _TAGS)
    ]
    place = "".join(f"[{s}]" if isinstance(s, int) else f".{s}" for s in steps).lstrip(".")
    template = _REASONS.get(error["type"])
    context = error.get("ctx", {})
    if context.get("expected") in ("True", "False"):
        context = {"expected": context["expected"].lower()}  # as JSON writes it
    if 0 in (context.get(bound) for bound in ("max_length", "le")):
        # A field that is there only for the value that changes nothing.
        template = "is not supported here; leave it out"
    if template is None:
        what = error["msg"][:1].lower() + error["msg"][1:]
    else:
        what = template.format(**context)
    if error["type"] == "value_error":
        return place, f"{place} {what}".lstrip()
    return place, f"{place or 'the body'} {what}" if template else f"{place or 'the body'}: {what}"


def total_chars(messages: Sequence[ChatMessage]) -> int:
    """Characters of all messages together."""
    return sum(
        len(message.said)
        if isinstance(message.said, str)
        else sum(len(part.text) for part in message.said)
        for message in messages
    )
