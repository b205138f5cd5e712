"""One answer in the making: its tokens, the calculator it calls, its text, and why it ends.

Between <|python_start|> and <|python_end|> a row writes an expression; when the calculator knows
its value, the row continues with <|output_start|> value <|output_end|>, whatever it samples.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from typing import Literal, NamedTuple

from nanochat.answers import AnswerText, ControlIds
from nanochat.sampling import SamplingSettings
from nanochat.tokenizer import Tokenizer
from nanochat.tools import calculate

Finish = Literal["stop", "length"]


class Request:
    """A prompt, how to answer it, and the answer so far. Made by `Scheduler.submit`."""

    def __init__(
        self,
        prompt: Sequence[int],
        settings: SamplingSettings,
        *,
        tokenizer: Tokenizer,
        limit: int,
        sample: int = 0,
    ) -> None:
        """limit: most tokens of the answer; sample: which of several answers with one seed."""
        self.prompt = list(prompt)
        self.settings = settings
        self.limit = limit
        self.tokens: list[int] = []
        """The answer so far, without the terminal token."""
        self.mask: list[int] = []
        """1 where the model chose the token of `tokens`, 0 where the tool forced it."""
        self.finish: Finish | None = None
        self.is_cancelled = False
        self.has_nan_logits = False
        """Whether there was NaN in the logits of its tokens."""
        self._random = random.Random(f"{settings.seed}/{sample}")
        self._tools = ToolCalls(tokenizer)
        self._text = AnswerText(tokenizer)
        self._stop = StopStrings(settings.stop)
        terminal = ControlIds.of(tokenizer).terminal
        self._terminal = frozenset[int]() if settings.ignore_end else terminal

    @property
    def is_finished(self) -> bool:
        """Whether nothing will be added."""
        return self.finish is not None or self.is_cancelled

    def uniform(self) -> float:
        """The next random number in [0, 1) of this request."""
        return self._random.random()

    @property
    def forced(self) -> int | None:
        """The token that comes next whatever is sampled, None when the model may choose."""
        return self._tools.next_forced

    def accept(self, token: int) -> str:
        """Append the next token, which is `forced` if that is not None; returns new text."""
        is_forced = self._tools.feed(token)
        if token in self._terminal and not is_forced:
            self.finish = "stop"
        else:
            self.tokens.append(token)
            self.mask.append(0 if is_forced else 1)
        text = self._stop.feed(self._text.feed(token))
        if self._stop.is_found:
            self.finish = "stop"
            return text
        if self.finish is None and len(self.tokens) >= self.limit:
            self.finish = "length"
        if self.finish is not None:
            text += self._stop.feed(self._text.finish()) + self._stop.rest()
        return text


class ToolCalls:
    """Watches an answer for calls of the calculator and says which tokens must follow."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = ControlIds.of(tokenizer)
        self._forced: deque[int] = deque()
        self._expression: list[int] | None = None
        self.next_forced: int | None = None
        """The token that has to come next, None when any may."""

    def feed(self, token: int) -> bool:
        """Take the answer's next token; returns whether it was a forced one."""
        if self.next_forced is not None:
            assert token == self.next_forced
            self.next_forced = self._forced.popleft() if self._forced else None
            return True
        if token == self._special.python_start:
            self._expression = []
        elif token == self._special.python_end:
            self._call()
        elif self._expression is not None:
            self._expression.append(token)
        return False

    def _call(self) -> None:
        expression, self._expression = self._expression, None
        result = calculate(self._tokenizer.decode(expression)) if expression else None
        if result is not None:
            self.next_forced = self._special.output_start
            self._forced.extend(self._tokenizer.encode(result))
            self._forced.append(self._special.output_end)


class StopStrings:
    """Cuts a stream of text before the first stop string; holds back what may become one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.is_found = False

    def feed(self, text: str) -> str:
        """Text that certainly belongs to the answer."""
        if not self._stop or self.is_found:
            return "" if self.is_found else text
        self._held += text
        starts = [place for stop in self._stop if (place := self._held.find(stop)) >= 0]
        if starts:
            self.is_found = True
            return self._cut(min(starts))
        longest = max(map(len, self._stop)) - 1
        for start in range(max(len(self._held) - longest, 0), len(self._held)):
            if any(stop.startswith(self._held[start:]) for stop in self._stop):
                return self._cut(start)
        return self._cut(len(self._held))

    def rest(self) -> str:
        """What was held back, once the answer has ended without a stop string."""
        return "" if self.is_found else self._cut(len(self._held))

    def _cut(self, end: int) -> str:
        text, self._held = self._held[:end], self._held[end:]
        return text


class TokenEvent(NamedTuple):
    """A request has grown by one token. The last event of a request has `finish` set."""

    request: Request
    token: int
    """The terminal token too, which `request.tokens` leaves out."""
    is_forced: bool
    """Whether the tool wrote it."""
    text: str
    """Whole characters that became printable with it; never special tokens."""
    logprob: float | None = None
    """Natural logarithm of its probability by the model itself; None unless asked for."""
    alternatives: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens and their log-probabilities, best first."""
    finish: Finish | None = None
