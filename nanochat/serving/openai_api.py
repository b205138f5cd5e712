"""The OpenAI API's two ways to answer, streamed and whole, for chats and for texts."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from nanochat.sampling import SamplingSettings
from nanochat.serving.guard import error_body, kind_of
from nanochat.serving.links import Token
from nanochat.serving.pieces import Piece, Pieces, TokenNames
from nanochat.serving.responses import (
    AnswerMessage,
    AnswerPart,
    ChatChoice,
    ChatCompletion,
    TextChoice,
    TextCompletion,
    Usage,
)
from nanochat.serving.service import Prompt, Service, error_of
from nanochat.serving.stream import DONE, event
from nanochat.serving.worker import Answer, AnswerError

DEFAULT_TEXT_TOKENS = 16  # as in the OpenAI API


@dataclass
class Choice:
    """One of the answers to a request, and what has come of it so far."""

    index: int
    prompt: Prompt
    answer: Answer
    pieces: Pieces
    start: str = ""
    """Text in front of the answer: the prompt, for a completion that is to echo it."""
    text: str = ""
    parts: list[Piece] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    """Those that `usage` counts."""

    def add(self, tokens: Sequence[Token]) -> str:
        """Take tokens; returns the text they add."""
        # The end is no part of the answer: neither its text nor its length has it.
        self.tokens += [token for token in tokens if token.id not in self.pieces.terminal]
        added = self.pieces.feed(tokens)
        self.parts += added
        text = "".join(piece.shown for piece in added)
        self.text += text
        return text

    @property
    def finish(self) -> Literal["stop", "length"]:
        """Why it ended; only for an answer that has."""
        assert self.pieces.finish is not None
        return self.pieces.finish


class Form(Protocol):
    """How chats, or texts, are written down."""

    prefix: str
    chunk_object: str

    def opening(self, choice: Choice) -> dict[str, Any] | None:
        """The first chunk's choice, if there is something to say before the first token."""

    def notes(self, choice: Choice) -> dict[str, Any]:
        """What the first chunk says beside its choice."""

    def addition(self, choice: Choice, text: str, logprobs: Any) -> dict[str, Any]:
        """A chunk's choice that adds text."""

    def ending(self, choice: Choice) -> dict[str, Any]:
        """The last chunk's choice."""

    def logprobs(self, names: TokenNames, tokens: Sequence[Token], offset: int) -> dict[str, Any]:
        """Log probabilities of tokens; `offset` characters came before them."""

    def whole(self, reply: Reply) -> ChatCompletion | TextCompletion:
        """The finished answers."""


class ChatForm:
    """/v1/chat/completions."""

    prefix, chunk_object = "chatcmpl", "chat.completion.chunk"

    def opening(self, choice: Choice) -> dict[str, Any] | None:
        """Say who speaks."""
        delta = {"role": "assistant", "content": ""}
        return {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}

    def notes(self, choice: Choice) -> dict[str, Any]:
        """Say what the model does not get to read."""
        return {"dropped_turns": choice.prompt.dropped_turns}

    def addition(self, choice: Choice, text: str, logprobs: Any) -> dict[str, Any]:
        """Add content."""
        return {
            "index": choice.index,
            "delta": {"content": text},
            "logprobs": logprobs,
            "finish_reason": None,
        }

    def ending(self, choice: Choice) -> dict[str, Any]:
        """Say why it ended, and the parts where the content alone does not tell them."""
        parts = _parts(choice)
        return {
            "index": choice.index,
            "delta": {} if parts is None else {"parts": [part.model_dump() for part in parts]},
            "logprobs": None,
            "finish_reason": choice.finish,
        }

    def logprobs(self, names: TokenNames, tokens: Sequence[Token], offset: int) -> dict[str, Any]:
        """One entry a token."""
        return names.chat_logprobs(tokens)

    def whole(self, reply: Reply) -> ChatCompletion:
        """All messages; one that called the calculator has its parts as well."""
        return ChatCompletion(
            id=reply.id,
            created=reply.created,
            model=reply.service.model.id,
            choices=[
                ChatChoice(
                    index=choice.index,
                    message=AnswerMessage(content=choice.text, parts=_parts(choice)),
                    logprobs=reply.logprobs(choice, choice.tokens, 0),
                    finish_reason=choice.finish,
                )
                for choice in reply.choices
            ],
            usage=reply.usage(),
            dropped_turns=reply.choices[0].prompt.dropped_turns,
        )


class TextForm:
    """/v1/completions."""

    prefix, chunk_object = "cmpl", "text_completion"

    def opening(self, choice: Choice) -> dict[str, Any] | None:
        """Echo the prompt."""
        return self.addition(choice, choice.start, None) if choice.start else None

    def notes(self, choice: Choice) -> dict[str, Any]:
        """Nothing: a prompt is read as a whole, or refused."""
        return {}

    def addition(self, choice: Choice, text: str, logprobs: Any) -> dict[str, Any]:
        """Add text."""
        return {"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": None}

    def ending(self, choice: Choice) -> dict[str, Any]:
        """Say why it ended."""
        return {**self.addition(choice, "", None), "finish_reason": choice.finish}

    def logprobs(self, names: TokenNames, tokens: Sequence[Token], offset: int) -> dict[str, Any]:
        """Parallel lists, one entry a token."""
        return names.text_logprobs(tokens, offset)

    def whole(self, reply: Reply) -> TextCompletion:
        """All texts."""
        return TextCompletion(
            id=reply.id,
            created=reply.created,
            model=reply.service.model.id,
            choices=[
                TextChoice(
                    index=choice.index,
                    text=choice.start + choice.text,
                    logprobs=reply.logprobs(choice, choice.tokens, 0),
                    finish_reason=choice.finish,
                )
                for choice in reply.choices
            ],
            usage=reply.usage(),
        )


class Reply:
    """The answers to one request."""

    def __init__(
        self, service: Service, form: Form, *, wants_logprobs: bool, wants_usage: bool
    ) -> None:
        self.service, self.form = service, form
        self.wants_logprobs, self.wants_usage = wants_logprobs, wants_usage
        self.id = f"{form.prefix}-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.choices: list[Choice] = []

    def open(
        self,
        prompts: Sequence[Prompt],
        settings: SamplingSettings,
        *,
        num_choices: int,
        echo: bool = False,
    ) -> None:
        """Start `num_choices` answers to each prompt; RequestError, and none, when not all fit."""
        tokenizer = self.service.tokenizer
        try:
            for prompt in prompts:
                start = tokenizer.decode(prompt.ids).removeprefix("<|bos|>") if echo else ""
                for answer in self.service.open(prompt, settings, num_choices):
                    place = len(self.choices)
                    self.choices.append(Choice(place, prompt, answer, Pieces(tokenizer), start))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give all slots back."""
        for choice in self.choices:
            choice.answer.close()

    def _end(self) -> None:
        self.close()
        for choice in self.choices:
            self.service.note_answer(choice.text)

    async def collect(self) -> ChatCompletion | TextCompletion:
        """Wait for all answers to end. RequestError when the engine gives one up."""
        try:
            async for choice, tokens in _in_turn(self.choices):
                choice.add(tokens)
        except AnswerError as error:
            raise error_of(error) from error
        finally:
            self._end()
        return self.form.whole(self)

    async def stream(self) -> AsyncIterator[bytes]:
        """The chunks of all answers as they come, then [DONE]."""
        for choice in self.choices:
            if (first := self.form.opening(choice)) is not None:
                yield event({**self._chunk([first]), **self.form.notes(choice)})
        try:
            async for choice, tokens in _in_turn(self.choices):
                offset, num_before = len(choice.text), len(choice.tokens)
                text = choice.add(tokens)
                added = choice.tokens[num_before:]
                entries = []
                if text or (self.wants_logprobs and added):
                    logprobs = self.logprobs(choice, added, offset)
                    entries.append(self.form.addition(choice, text, logprobs))
                if choice.pieces.finish is not None:
                    entries.append(self.form.ending(choice))
                for entry in entries:
                    yield event(self._chunk([entry]))
            if self.wants_usage:
                yield event({**self._chunk([]), "usage": self.usage().model_dump()})
        except AnswerError as error:
            yield event(error_body(str(error), kind=kind_of(error_of(error).status)))
        finally:
            self._end()
        yield DONE

    def usage(self) -> Usage:
        """Prompt tokens once for each prompt, as the choices of one prompt share it."""
        prompts = {id(choice.prompt): len(choice.prompt.ids) for choice in self.choices}
        answered = sum(choice.pieces.num_tokens for choice in self.choices)
        return Usage.of(sum(prompts.values()), answered)

    def logprobs(
        self, choice: Choice, tokens: Sequence[Token], offset: int
    ) -> dict[str, Any] | None:
        """Log probabilities of some tokens of a choice, if they were asked for."""
        if not self.wants_logprobs:
            return None
        return self.form.logprobs(self.service.names, tokens, len(choice.start) + offset)

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk = {
            "id": self.id,
            "object": self.form.chunk_object,
            "created": self.created,
            "model": self.service.model.id,
            "choices": choices,
        }
        return {**chunk, "usage": None} if self.wants_usage else chunk


async def _in_turn(choices: Sequence[Choice]) -> AsyncIterator[tuple[Choice, list[Token]]]:
    """The tokens of all choices, as they come."""
    if len(choices) == 1:  # the usual case, without a task for each step
        async for tokens in choices[0].answer:
            yield choices[0], tokens
        return
    waiting = {_next(choice): choice for choice in choices}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                choice = waiting.pop(task)
                yield choice, task.result()
                if choice.answer.is_open or choice.answer.has_news:
                    waiting[_next(choice)] = choice
    finally:
        for task in waiting:
            task.cancel()


def _next(choice: Choice) -> asyncio.Task[list[Token]]:
    return asyncio.ensure_future(choice.answer.__anext__())


def _parts(choice: Choice) -> list[AnswerPart] | None:
    if not choice.text:
        return [AnswerPart(type="text", text="")]
    joined: list[AnswerPart] = []
    for piece in choice.parts:
        if joined and joined[-1].type == piece.kind:
            joined[-1].text += piece.text
        elif piece.text:
            joined.append(AnswerPart(type=piece.kind, text=piece.text))
    return None if all(part.type == "text" for part in joined) else joined
