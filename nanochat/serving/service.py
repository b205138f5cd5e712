"""From a request to running answers: prompts, settings, seeds. What all routes share."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from nanochat.chat_prompt import FittedPrompt, fit_conversation
from nanochat.common import UserError
from nanochat.conversation import Conversation, Message, Part
from nanochat.sampling import SamplingSettings
from nanochat.scheduler import QueueFullError
from nanochat.serving.pieces import TokenNames
from nanochat.serving.pool import Pool
from nanochat.serving.requests import (
    MAX_TOTAL_CHARS,
    ChatMessage,
    OpenAICompletionRequest,
    RequestError,
    Sampling,
    total_chars,
)
from nanochat.serving.responses import ModelInfo, ServerDefaults
from nanochat.serving.worker import Answer, AnswerError
from nanochat.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Long enough for a few waiting answers to end, short enough that a person still waits.
RETRY_SECONDS = 5
# Longer texts take milliseconds, which others need not wait for; a thread for a short one would
# cost more than the text, and make the event loop wait for the interpreter.
SHORT_CHARS = 4_000


@dataclass(frozen=True)
class Prompt:
    """What the model reads, and what had to be left out of it."""

    ids: list[int]
    dropped_turns: int = 0


class Service:
    """A model that is served: its tokenizer, its engines, its defaults."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        pool: Pool,
        *,
        model: ModelInfo,
        defaults: ServerDefaults,
        created: int,
        log_conversations: bool = False,
    ) -> None:
        self.tokenizer, self.pool = tokenizer, pool
        self.model, self.defaults, self.created = model, defaults, created
        self.log_conversations = log_conversations
        self.names = TokenNames(tokenizer)

    def check_model(self, name: str | None) -> None:
        """Refuse a model that is not the one served."""
        if name not in (None, "nanochat", self.model.id):
            raise RequestError(
                404,
                f"there is no such model here; this server has {self.model.id} "
                "(`nanochat` for short)",
                param="model",
                code="model_not_found",
            )

    def max_tokens(self, asked: int | None) -> int:
        """Longest answer of a request."""
        return self.defaults.max_tokens if asked is None else asked

    def settings(
        self, request: Sampling, *, max_tokens: int, logprobs: int | None
    ) -> SamplingSettings:
        """Settings of the answers: as asked, else the server's."""
        defaults = self.defaults
        top_k = defaults.top_k if request.top_k is None else request.top_k
        return SamplingSettings(
            temperature=_first(request.temperature, defaults.temperature),
            top_k=None if top_k == "off" else top_k,
            top_p=defaults.top_p if request.top_p is None else request.top_p,
            min_p=request.min_p,
            repetition_penalty=_first(request.repetition_penalty, 1.0),
            max_tokens=max_tokens,
            stop=request.stops,
            seed=secrets.randbits(31) if request.seed is None else request.seed,
            logprobs=logprobs,
        )

    async def chat_prompt(self, messages: Sequence[ChatMessage], max_tokens: int) -> Prompt:
        """The conversation as the model reads it, its oldest turns left out where it is too long.

        RequestError (400) for too much text, roles out of order, a last turn that does not fit.
        """
        chars = total_chars(messages)
        if chars > MAX_TOTAL_CHARS:
            raise RequestError(
                400,
                f"the conversation has {chars:,} characters; at most {MAX_TOTAL_CHARS:,} are "
                "allowed: leave out old messages",
                param="messages",
            )
        if messages[0].role == "system":
            # Where not all fits, it is read in front of each message that may come first.
            chars += total_chars(messages[:1]) * (len(messages) // 2)
        fitted = await _unhurried(chars, lambda: self._fit(messages, max_tokens))
        return Prompt(fitted.ids, fitted.dropped_turns)

    def _fit(self, messages: Sequence[ChatMessage], max_tokens: int) -> FittedPrompt:
        context = self.model.context
        try:
            conversation = Conversation(tuple(_message(message) for message in messages))
            if conversation.messages[-1].role != "user":
                raise UserError("the last message must be the user's")
            # What is left for the answer, when not everything fits.
            reserve = min(max_tokens, context // 4)
            return fit_conversation(self.tokenizer, conversation, context=context, reserve=reserve)
        except UserError as error:
            raise RequestError(400, str(error), param="messages") from error

    async def text_prompts(self, request: OpenAICompletionRequest) -> list[Prompt]:
        """The prompts of a completion. RequestError (400) for one that leaves no room."""
        texts, lists = _prompts(request.prompt)
        if texts:
            size, bos = sum(map(len, texts)), self.tokenizer.bos_id
            lists = await _unhurried(size, lambda: self.tokenizer.encode(texts, bos))
        for ids in lists:
            self._check_ids(ids)
        return [Prompt(ids) for ids in lists]

    async def text_ids(self, text: str) -> list[int]:
        """The tokens of a text, nothing around them."""
        ids: list[int] = await _unhurried(len(text), lambda: self.tokenizer.encode(text))
        return ids

    async def listing(self, ids: Sequence[int]) -> bytes:
        """Tokens as `TokenNames.listing` writes them."""
        return await _unhurried(len(ids), lambda: self.names.listing(ids))

    def _check_ids(self, ids: Sequence[int]) -> None:
        if len(ids) >= self.model.context:
            raise RequestError(
                400,
                f"the prompt has {len(ids):,} tokens, but the model's context is "
                f"{self.model.context:,} and the answer needs some: shorten it",
                param="prompt",
                code="context_length_exceeded",
            )
        if max(ids) >= self.tokenizer.vocab_size:
            raise RequestError(
                400,
                f"{max(ids)} is not a token id; the vocabulary has {self.tokenizer.vocab_size:,}",
                param="prompt",
            )

    def open(
        self, prompt: Prompt, settings: SamplingSettings, num_samples: int = 1
    ) -> list[Answer]:
        """Start answers. RequestError 429 when too many wait, 503 when no engine is alive."""
        if self.log_conversations:
            logger.info("asked: %s", ascii(self.tokenizer.decode(prompt.ids)))
        try:
            return self.pool.open(prompt.ids, settings, num_samples)
        except QueueFullError as error:
            raise RequestError(429, str(error), code="queue_full") from error
        except AnswerError as error:
            raise error_of(error) from error

    def note_answer(self, text: str) -> None:
        """Log an answer, where that was asked for."""
        if self.log_conversations:
            logger.info("answered: %s", ascii(text))


async def _unhurried(size: int, work: Callable[[], T]) -> T:
    """Do `work` on so many characters or tokens without holding up the event loop."""
    return work() if size <= SHORT_CHARS else await asyncio.to_thread(work)


def _prompts(
    given: str | list[str] | list[int] | list[list[int]],
) -> tuple[list[str], list[list[int]]]:
    """The texts, or the lists of token ids, that a client gave in one of four forms."""
    texts: list[str] = []
    ids: list[int] = []
    lists: list[list[int]] = []
    for entry in [given] if isinstance(given, str) else given:
        if isinstance(entry, str):
            texts.append(entry)
        elif isinstance(entry, int):
            ids.append(entry)
        else:
            lists.append(entry)
    return texts, [ids] if ids else lists


def error_of(error: AnswerError) -> RequestError:
    """The answer's failure as a response: 400 for a refusal, 429 when full, 503 for a defect."""
    status = {"refused": 400, "full": 429, "broken": 503}[error.failure.kind]
    return RequestError(status, error.failure.message)


def _first(asked: T | None, default: T) -> T:
    return default if asked is None else asked


def _message(message: ChatMessage) -> Message:
    if isinstance(message.said, str):
        return Message(message.role, message.said)
    parts = tuple(Part(part.type, part.text) for part in message.said)
    if message.role == "assistant":
        return Message("assistant", parts)
    if message.parts is not None:
        raise UserError(f"a {message.role} message may not have `parts`; send content")
    if any(part.type != "text" for part in parts):
        raise UserError(f"a {message.role} message may only have parts of type text")
    text = "".join(part.text for part in parts)
    if not text:
        raise UserError(f"a {message.role} message is empty")
    return Message(message.role, text)
