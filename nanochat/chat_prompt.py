"""A conversation as a prompt that fits the model's context. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from nanochat.common import UserError
from nanochat.conversation import Conversation, Message
from nanochat.tokenizer import Tokenizer


@dataclass(frozen=True)
class FittedPrompt:
    """Token ids for the model, and what had to be left out."""

    ids: list[int]
    dropped_turns: int
    """Messages, of user and assistant, that the context was too small for."""

    @property
    def notice(self) -> str:
        """A sentence for the user, "" when nothing was left out."""
        if not self.dropped_turns:
            return ""
        return f"the context is full: the oldest {self.dropped_turns} messages are left out"


def fit_conversation(
    tokenizer: Tokenizer, conversation: Conversation, *, context: int, reserve: int
) -> FittedPrompt:
    """The prompt for the assistant's answer to the last user message.

    A conversation that leaves fewer than `reserve` of `context` tokens for the answer loses its
    oldest exchanges, a user's message and its answer together; the system text and the last user
    message stay. UserError with the numbers when even those do not fit.
    """
    messages = conversation.messages
    if messages[-1].role == "user":
        messages = (*messages, Message("assistant", ""))
    num_system = int(messages[0].role == "system")
    system, turns = messages[:num_system], messages[num_system:]
    answer = turns[-1]
    # Counted once: to render the rest for each exchange it loses takes up to 250 times as long.
    lengths = tokenizer.turn_lengths(turns[:-1])
    for dropped in range(0, len(turns), 2):
        num_behind = sum(lengths[dropped + 1 :])
        if num_behind and num_behind + reserve > context:
            continue
        # The system text becomes part of the first message that is kept.
        ids = tokenizer.render_for_completion(Conversation((*system, turns[dropped], answer)))
        if len(ids) + num_behind + reserve <= context:
            kept = Conversation((*system, *turns[dropped:]))
            return FittedPrompt(tokenizer.render_for_completion(kept), dropped)
    what = "the system text and the last message have" if system else "the last message has"
    raise UserError(
        f"{what} {len(ids)} tokens, and the answer needs {reserve}, but the model's context is "
        f"{context} tokens; shorten the text"
    )
