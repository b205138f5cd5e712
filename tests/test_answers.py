"""Text of answers: whole characters, no special tokens, readable tool calls."""

from __future__ import annotations

from typing import Any

import pytest
from reference.byte_tokenizer import ByteTokenizer

from nanochat.answers import AnswerText, plain_text, shown_text

TOKENIZER: Any = ByteTokenizer()
END = TOKENIZER.encode_special("<|assistant_end|>")
CALL, CALLED, OUT, OUT_END = (
    TOKENIZER.encode_special(f"<|{name}|>")
    for name in ("python_start", "python_end", "output_start", "output_end")
)


def stream(tokens: list[int]) -> list[str]:
    text = AnswerText(TOKENIZER)
    return [*map(text.feed, tokens), text.finish()]


def test_text_streams_by_whole_characters() -> None:
    assert stream(list("a\u00e9\U0001f642b".encode())) == [
        *("a", "", "\u00e9"),
        *("", "", "", "\U0001f642"),
        *("b", ""),
    ]


def test_a_character_that_never_completes_shows_once_at_the_end() -> None:
    assert stream([65, 0xF0, 0x9F]) == ["A", "", "", "\ufffd"]


def test_special_tokens_never_show_and_calls_read_well() -> None:
    call = [CALL, *b"12*3", CALLED, OUT, *b"36", OUT_END]
    assert "".join(stream([*b"So ", *call, *b".", END])) == "So [12*3 = 36]."


@pytest.mark.parametrize(
    ("tokens", "shown"),
    [
        ([CALL, *b"2**3", CALLED, *b" ok"], "[2**3] ok"),
        ([CALL, *b"2"], "[2]"),
        ([CALL, *b"2", END], "[2]"),
        ([CALL, *b"2", CALLED, END], "[2]"),
        ([CALL, *b"1", CALL, *b"2", CALLED, END], "[1][2]"),
        ([CALLED, OUT, *b"3", OUT_END, END], "3"),
        ([0xF0, END], "\ufffd"),
    ],
)
def test_broken_calls_still_read_as_text(tokens: list[int], shown: str) -> None:
    assert "".join(stream(tokens)) == shown


def test_plain_text_drops_special_tokens_and_keeps_calls() -> None:
    call = [CALL, *b"12*3", CALLED, OUT, *b"36", OUT_END]
    assert plain_text(TOKENIZER, [*b"So ", *call, *b"!", END]) == "So 12*336!"


def test_shown_text_is_what_a_stream_shows() -> None:
    call = [CALL, *b"12*3", CALLED, OUT, *b"36", OUT_END]
    assert shown_text(TOKENIZER, [*b"So ", *call, CALL, *b"2"]) == "So [12*3 = 36][2]"
