"""A conversation that is cut to the context."""

from __future__ import annotations

import hypothesis
import pytest
from hypothesis import strategies
from scripted_model import byte_tokenizer

from nanochat.chat_prompt import FittedPrompt, fit_conversation
from nanochat.common import UserError
from nanochat.conversation import Conversation, Message, Part
from nanochat.tokenizer import Tokenizer

MERGING = Tokenizer.train_from_iterator(
    ["the cat and the dog\n\nthe end. The  end\n" * 20], 300, trained_on="embedded"
)


def rendered_each_time(
    tokenizer: Tokenizer, conversation: Conversation, *, context: int, reserve: int
) -> FittedPrompt:
    """The plain way: render what is left after each exchange that is dropped."""
    messages = conversation.messages
    if messages[-1].role == "user":
        messages = (*messages, Message("assistant", ""))
    num_system = int(messages[0].role == "system")
    turns = messages[num_system:]
    for dropped in range(0, len(turns), 2):
        kept = Conversation((*messages[:num_system], *turns[dropped:]))
        ids = tokenizer.render_for_completion(kept)
        if len(ids) + reserve <= context:
            return FittedPrompt(ids, dropped)
    raise UserError(f"{len(ids)} tokens")


TEXTS = strategies.text("the ca.\n 1\U0001f642", max_size=12)
PARTS = strategies.builds(Part, strategies.sampled_from(["text", "python", "python_output"]), TEXTS)
ANSWERS = TEXTS | strategies.lists(PARTS, max_size=3).map(tuple)


@strategies.composite
def conversations(draw: strategies.DrawFn) -> Conversation:
    system = draw(strategies.none() | TEXTS)
    messages = [] if system is None else [Message("system", system)]
    for _ in range(draw(strategies.integers(0, 8))):
        messages += [Message("user", draw(TEXTS)), Message("assistant", draw(ANSWERS))]
    if len(messages) < 2 or draw(strategies.booleans()):
        messages.append(Message("user", draw(TEXTS)))
    return Conversation(tuple(messages))


@hypothesis.settings(deadline=None, max_examples=400)
@hypothesis.given(
    conversation=conversations(),
    context=strategies.integers(1, 150),
    reserve=strategies.integers(0, 40),
    is_merging=strategies.booleans(),
)
def test_what_is_kept_is_what_rendering_each_rest_keeps(
    conversation: Conversation, context: int, reserve: int, is_merging: bool
) -> None:
    tokenizer = MERGING if is_merging else byte_tokenizer()
    try:
        expected = rendered_each_time(tokenizer, conversation, context=context, reserve=reserve)
    except UserError as error:
        with pytest.raises(UserError, match=f" {error}, and the answer needs {reserve}, "):
            fit_conversation(tokenizer, conversation, context=context, reserve=reserve)
    else:
        found = fit_conversation(tokenizer, conversation, context=context, reserve=reserve)
        assert found == expected


def test_a_long_conversation_is_not_encoded_for_each_exchange_it_loses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    turns = [Message("user" if i % 2 == 0 else "assistant", "12345678") for i in range(499)]
    encode, lengths = Tokenizer.encode, []

    def count(self: Tokenizer, text: str | list[str], *arguments: int, **settings: int) -> object:
        lengths.append(len("".join(text)))
        return encode(self, text, *arguments, **settings)

    monkeypatch.setattr(Tokenizer, "encode", count)
    fitted = fit_conversation(
        byte_tokenizer(), Conversation(tuple(turns)), context=1024, reserve=100
    )
    assert fitted.dropped_turns > 300
    # Once to count, once as each exchange's first message, once what is kept; not 240 times.
    assert sum(lengths) < 3 * 8 * len(turns)
