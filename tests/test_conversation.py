"""Conversations as values."""

import json
from typing import Any

import pytest

from nanochat.common import UserError
from nanochat.conversation import Conversation, Message, Part, chat


def test_json_round_trip_keeps_parts_and_system() -> None:
    value = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2+2?"},
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "It is "},
                {"type": "python", "text": "2+2"},
                {"type": "python_output", "text": "4"},
            ],
        },
    ]
    conversation = Conversation.from_json(value)
    assert conversation.to_json() == value
    assert json.loads(json.dumps(conversation.to_json())) == value


def test_an_object_with_messages_is_accepted() -> None:
    messages = [{"role": "user", "content": "hi"}]
    conversation = Conversation.from_json({"messages": messages, "letters": ["A", "B"]})
    assert conversation == Conversation((Message("user", "hi"),), letters=("A", "B"))


def test_chat_alternates_from_the_user() -> None:
    assert [message.role for message in chat("a", "b", "c").messages] == [
        "user",
        "assistant",
        "user",
    ]


def test_text_joins_the_parts() -> None:
    assert Message("assistant", (Part("text", "a "), Part("python", "1+1"))).text == "a 1+1"
    assert Message("user", "b").text == "b"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "at least one user message"),
        ([{"role": "system", "content": "x"}], "at least one user message"),
        ([{"role": "assistant", "content": "x"}], "message 0 is from assistant, expected user"),
        (
            [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}],
            "message 1 is from user, expected assistant",
        ),
        (
            [{"role": "system", "content": "x"}, {"role": "assistant", "content": "y"}],
            "message 1 is from assistant, expected user",
        ),
        (
            [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}],
            "message 1 is from system, expected assistant",
        ),
        ([{"role": "human", "content": "x"}], "message 0: unknown role 'human'"),
        ([{"role": "user"}], "message 0: expected an object with 'role' and 'content'"),
        (["hello"], "message 0: expected an object"),
        ([{"role": "user", "content": 3}], "message 0: the content of a user message is int"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
            "message 0: the content of a user message is tuple",
        ),
        (
            [
                {"role": "user", "content": "x"},
                {"role": "assistant", "content": [{"type": "image", "text": "x"}]},
            ],
            "message 1: unknown part type 'image'",
        ),
        (
            [
                {"role": "user", "content": "x"},
                {"role": "assistant", "content": [{"type": "text", "text": None}]},
            ],
            "message 1: a text part holds None",
        ),
        ("hello", "a conversation is a list of messages"),
        ({"turns": []}, "a conversation is a list of messages"),
    ],
)
def test_wrong_conversations_name_the_message(value: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Conversation.from_json(value)


def test_conversations_are_values() -> None:
    assert chat("a", "b") == chat("a", "b")
    assert len({chat("a", "b"), chat("a", "b")}) == 1
