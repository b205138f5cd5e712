"""What once broke the tokenizer: strings that went away, copies, ids and sizes out of range."""

from __future__ import annotations

import copy
import json
import pickle
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rustbpe
from nanochat.common import UserError
from nanochat.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """A small vocabulary."""
    texts = ["the cat sat on the mat and the hat " * 20, "hello there, hello again " * 20]
    return Tokenizer.train_from_iterator(texts, 300)


class MadeOnAccess(Sequence[str]):
    """Strings that nobody but the reader holds."""

    def __len__(self) -> int:
        return 50

    def __getitem__(self, index: Any) -> Any:
        if index >= 50:
            raise IndexError
        return chr(97 + index % 26) * 3000 + str(index)


def test_texts_made_on_access_encode_like_a_list(tokenizer: Tokenizer) -> None:
    lazy = MadeOnAccess()
    encode = tokenizer.encode_batch
    for ours, theirs in zip(encode(lazy), encode(list(lazy)), strict=True):
        assert np.array_equal(ours, theirs)


def test_list_emptied_during_encoding_does_no_harm(tokenizer: Tokenizer) -> None:
    texts = [("the cat " * 500_000) + str(i) for i in range(4)]
    expected = tokenizer.encode_batch(list(texts))[0]
    timer = threading.Timer(0.005, texts.clear)
    timer.start()
    ids = tokenizer.encode_batch(texts)[0]
    timer.join()
    assert len(ids) in (0, len(expected))


def test_copies_are_independent_of_the_original(tokenizer: Tokenizer) -> None:
    expected = tokenizer.encode("hello there")
    for copied in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert copied.encode("hello there") == expected
        del copied
    other = Tokenizer.train_from_iterator(["something else entirely " * 50], 290)
    assert other.encode("hello there") != expected
    assert tokenizer.encode("hello there") == expected


@pytest.mark.parametrize("token_id", [-1, 300, 2**31, 2**64])
def test_id_out_of_range_is_not_put_around_texts(tokenizer: Tokenizer, token_id: int) -> None:
    with pytest.raises(ValueError, match=str(token_id)):
        tokenizer.encode("hi", prepend=token_id)
    with pytest.raises(ValueError, match=str(token_id)):
        tokenizer.encode("hi", append=token_id)


@pytest.mark.parametrize("vocab_size", [2**24 + 1, 99_999_999_999])
def test_vocabulary_beyond_all_reason_is_refused_at_once(vocab_size: int) -> None:
    with pytest.raises(ValueError, match="at most 16,777,216"):
        rustbpe.Tokenizer().train_from_iterator(iter(["text"]), vocab_size)
    with pytest.raises(UserError, match="at most 16,777,216"):
        Tokenizer.train_from_iterator(iter(["text"]), vocab_size)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("merges", [5]),
        ("special_tokens", []),
        ("trained_on", 5),
        ("pattern", "("),
        ("pattern", 5),
        ("special_tokens", {"<|bos|>": 1e400}),
        ("special_tokens", {"<|bos|>": 10**12}),
    ],
)
def test_damaged_tokenizer_file_is_named_in_one_sentence(
    tokenizer: Tokenizer, tmp_path: Path, field: str, value: Any
) -> None:
    tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    assert field in content
    path.write_text(json.dumps(content | {field: value}))
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        Tokenizer.from_directory(tmp_path)


def test_special_tokens_that_share_an_id_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    content["special_tokens"] = dict.fromkeys(content["special_tokens"], 291)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        Tokenizer.from_directory(tmp_path)
