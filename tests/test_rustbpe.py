"""Splitting, training and encoding against the reference, tiktoken, tokenizers and regex."""

import itertools
import json
import logging
import random
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import regex
from bpe_texts import PIECES, corpus, tiktoken_of, trained_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

import rustbpe
from rustbpe import formats, native, reference
from rustbpe.unicode_ranges import LETTERS, UNICODE_VERSION

ROOT = Path(__file__).parents[1]
SHARED_TEXT = ROOT.parent / "shared" / "data" / "text"
needs_core = pytest.mark.skipif(not rustbpe.has_core(), reason="no compiled core")
NAMES = sorted(reference.PATTERNS)


@pytest.fixture(scope="module")
def trained() -> rustbpe.Tokenizer:
    return trained_tokenizer()


# ---- split ------------------------------------------------------------------------------------


def test_tables_are_unicode_16_as_in_tiktoken():
    letters = {c for first, last in LETTERS for c in range(first, last + 1)}
    assert UNICODE_VERSION == "16.0"
    assert len(letters) == 141_028
    assert 0x1C89 in letters  # new in 16.0
    assert 0x088F not in letters  # a letter since 17.0
    if unicodedata.unidata_version == "16.0.0":
        assert letters == {c for c in range(0x110000) if unicodedata.category(chr(c))[0] == "L"}


@pytest.mark.slow
def test_tables_are_what_the_generator_writes():
    pytest.importorskip("tiktoken")
    script = ROOT / "dev" / "gen_unicode_tables.py"
    subprocess.run([sys.executable, script, "--check"], check=True)


@needs_core
@pytest.mark.parametrize("name", NAMES)
def test_every_character_splits_as_in_the_reference(name):
    """Every code point once, alone, after a space and before a letter."""
    split, around = reference.splitter(name), ("", " ", "x")
    points = itertools.chain(range(0xD800), range(0xE000, 0x110000))
    while block := list(itertools.islice(points, 20_000)):
        text = "".join(around[c % 3] + chr(c) + around[c // 3 % 3] for c in block)
        assert native.split(text, name) == split(text)


@needs_core
@pytest.mark.parametrize("name", NAMES)
def test_split_equals_the_regex_engine(name):
    # that package has its own Unicode version: characters on which it differs are left out
    pattern, pieces = regex.compile(reference.PATTERNS[name]), [p for p in PIECES if p != "\u1c89"]
    rng = random.Random(7)
    for _ in range(300):
        text = "".join(rng.choice(pieces) + rng.choice(("", " ")) for _ in range(120))
        assert native.split(text, name) == pattern.findall(text)


@needs_core
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=150, deadline=None)
@given(pieces=st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=3)), max_size=60))
def test_split_equals_the_reference_on_any_text(name, pieces):
    text = "".join(pieces).encode("utf-8", "ignore").decode()
    assert native.split(text, name) == reference.splitter(name)(text)


def test_published_patterns_are_recognised_in_every_spelling():
    assert all(reference.pattern_name(reference.PATTERNS[name]) == name for name in NAMES)
    assert reference.pattern_name(r"\w+|\W") is None


@needs_core
def test_an_unknown_pattern_is_refused_by_the_core_and_done_in_python(caplog):
    with pytest.raises(ValueError, match="no compiled scanner for the split pattern"):
        native.split("a", r"\w+|\W")
    tokenizer = rustbpe.Tokenizer()
    with caplog.at_level(logging.WARNING):
        tokenizer.train_from_iterator(["ab ab", "ab ab"], 257, pattern=r"\w+|\W")
    assert tokenizer.decode(tokenizer.encode("ab!ab")) == "ab!ab"
    assert tokenizer.encode("ab") == [256]
    assert "no compiled scanner" in caplog.text


def test_an_invalid_pattern_is_a_clear_error():
    with pytest.raises(ValueError, match="is not valid"):
        rustbpe.Tokenizer().train_from_iterator(["a"], 256, pattern="(")


# ---- train ------------------------------------------------------------------------------------


@needs_core
@pytest.mark.parametrize("name", NAMES)
def test_merges_equal_the_reference(name):
    texts = [corpus(seed, 150) for seed in range(30)]
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(texts, 800, pattern=name)
    counts = reference.count_chunks(texts, name)
    assert tokenizer.merges == reference.learn_merges(counts, 800 - 256)


@needs_core
@settings(max_examples=100, deadline=None)
@given(texts=st.lists(st.text("ab\u00e9 ", max_size=40), max_size=8))
def test_merges_equal_the_reference_where_everything_ties(texts):
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(texts, 300, pattern="gpt4")
    assert tokenizer.merges == reference.learn_merges(reference.count_chunks(texts, "gpt4"), 44)


@needs_core
def test_merges_do_not_depend_on_threads_or_batches():
    texts = [corpus(seed, 3000) for seed in range(60)]
    results = []
    for threads, buffer_size in ((1, 8192), (2, 7), (7, 1)):
        tokenizer = rustbpe.Tokenizer()
        tokenizer.train_from_iterator(
            iter(texts), 600, buffer_size, pattern="nanochat", num_threads=threads
        )
        results.append(tokenizer.merges)
    assert results[0] == results[1] == results[2]


def huggingface_merges(texts, vocab_size, pattern):
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated")
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, byte_level])
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, show_progress=False, min_frequency=1, initial_alphabet=alphabet
    )
    model.train_from_iterator(texts, trainer)
    content = json.loads(model.to_str())["model"]
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in content["merges"]]
    return content["vocab"], [(content["vocab"][a], content["vocab"][b]) for a, b in pairs]


@needs_core
def test_merges_equal_huggingface_up_to_the_order_of_the_bytes():
    texts = [corpus(seed, 600).replace("\u1c89", "") for seed in range(30)]
    vocab, expected = huggingface_merges(texts, 900, formats._ONIGURUMA["nanochat"])
    byte_ids = [vocab[character] for character in formats.byte_characters()]
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(texts, 900, pattern="nanochat", byte_ids=byte_ids)
    assert tokenizer.merges == expected


@needs_core
def test_ctrl_c_stops_training_between_steps():
    def stop(done, total):
        raise KeyboardInterrupt

    tokenizer = rustbpe.Tokenizer()
    with pytest.raises(KeyboardInterrupt):
        tokenizer.train_from_iterator([corpus(1, 5000)], 5000, progress=stop)
    assert tokenizer.vocab_size == 256


def test_a_vocabulary_too_small_or_too_large_for_the_text():
    with pytest.raises(ValueError, match="no room for the 256 bytes"):
        rustbpe.Tokenizer().train_from_iterator(["a"], 255)
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(["abc"], 1000)
    assert tokenizer.merges == [(97, 98), (256, 99)]
    tokenizer.train_from_iterator([], 1000)
    assert tokenizer.merges == []


# ---- encode -----------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_any_text_comes_back(trained, text):
    try:
        text.encode()
    except UnicodeEncodeError:
        with pytest.raises(ValueError, match="lone surrogate"):
            trained.encode(text)
        return
    assert trained.decode(trained.encode(text)) == text


@settings(max_examples=100, deadline=None)
@given(data=st.binary())
def test_any_bytes_have_ids(trained, data):
    ranks = dict(trained.get_mergeable_ranks())
    assert trained.decode_bytes(reference.encode_chunk(data, ranks)) == data


@needs_core
@settings(max_examples=200, deadline=None)
@given(text=st.lists(st.sampled_from(PIECES), max_size=80).map("".join))
def test_ids_equal_the_reference(trained, text):
    ranks = dict(trained.get_mergeable_ranks())
    assert trained.encode(text) == reference.encode(text, ranks, "nanochat")


@needs_core
@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text("abc", min_size=2, max_size=5), unique=True, max_size=12),
    st.lists(st.text("abc", max_size=120), min_size=1, max_size=5),
)
def test_ids_equal_tiktoken_for_vocabularies_that_no_training_gives(tokens, texts):
    """Ranks in any order, tokens without parts: what a .tiktoken file may hold."""
    all_tokens = [bytes([value]) for value in range(256)] + [token.encode() for token in tokens]
    tokenizer = rustbpe.Tokenizer.from_tokens(all_tokens, "gpt4")
    expected = tiktoken_of(tokenizer, reference.PATTERNS["gpt4"])
    for text in texts:
        assert tokenizer.encode(text) == expected.encode_ordinary(text)


PATHOLOGICAL = {
    "one letter": "a" * 1_000_000,
    "spaces": " " * 1_000_000,
    "newlines": "\n" * 1_000_000,
    "spaces then a word": " " * 300_000 + "word",
    "combining marks": "e" + "\u0301" * 300_000,
    "emoji joined": "\U0001f469\u200d" * 100_000,
    "apostrophes": "'" * 300_000,
    "digits": "7" * 300_000,
    "one word": "abcdefghij" * 50_000,
    "empty": "",
}


@needs_core
@pytest.mark.parametrize("case", PATHOLOGICAL)
def test_pathological_texts_equal_tiktoken(trained, case):
    """Chunk by chunk: tiktoken's own regex overflows its stack on a megabyte of spaces."""
    text = PATHOLOGICAL[case]
    encoding = tiktoken_of(trained, reference.PATTERNS["nanochat"])
    chunks = reference.splitter("nanochat")(text)
    ids = {chunk: encoding._core_bpe.encode_single_piece(chunk.encode()) for chunk in set(chunks)}
    assert trained.encode(text) == [token_id for chunk in chunks for token_id in ids[chunk]]


@needs_core
def test_a_word_of_5_megabytes_is_not_quadratic(trained):
    # a million squared would be hours; the time limit of the suite is the assertion
    word = "".join(random.Random(3).choices("thequickbrown", k=5_000_000))
    ids = trained.encode(word)
    assert trained.decode(ids) == word


@needs_core
@pytest.mark.parametrize("num_threads", [1, 2, 7])
def test_flat_ids_and_offsets_are_those_of_single_texts(trained, num_threads):
    texts = ["", "a", corpus(5, 40_000), "", *(corpus(seed, 3000) for seed in range(30)), ""]
    ids, offsets = trained.encode_to_array(texts, prepend=7, append=9, num_threads=num_threads)
    assert ids.dtype == np.int32
    assert offsets.dtype == np.int64
    assert offsets[0] == 0
    for index, text in enumerate(texts):
        row = ids[offsets[index] : offsets[index + 1]].tolist()
        assert row == [7, *trained.encode(text), 9]


@needs_core
def test_short_and_long_texts_take_both_ways_into_the_core(trained):
    short, long = ["ab", "\u00e9", ""], [corpus(1, 400), corpus(2, 400)]
    assert native.Batch.of(short).suffix == ""
    assert native.Batch.of(long).suffix == "_scattered"
    for texts in (short, long):
        assert trained.batch_encode(texts) == [trained.encode(text) for text in texts]


@pytest.mark.parametrize("text", ["\ud800", "ok \udfff", "x" * 2000 + "\ud83d"])
def test_lone_surrogates_are_a_clear_error(trained, text):
    with pytest.raises(ValueError, match="text 1 holds the lone surrogate"):
        trained.batch_encode(["fine", text])


def test_ids_out_of_range_are_a_clear_error(trained):
    for wrong in (-1, trained.vocab_size):
        with pytest.raises(ValueError, match="id"):
            trained.decode([wrong])


def test_an_array_of_ids_decodes_as_a_list_does(trained):
    ids, _ = trained.encode_to_array([corpus(2, 2000), "\u00e9"])
    assert trained.decode_bytes(ids) == trained.decode_bytes(ids.tolist())
    assert trained.decode(ids[:0]) == ""
    with pytest.raises(ValueError, match="id"):
        trained.decode(np.array([5, trained.vocab_size], dtype=np.int32))


def test_a_stream_shows_characters_when_they_are_complete(trained):
    text = "na\u00efve \U0001f469\u200d\U0001f680 \u4f60\u597d"
    ids = [byte for byte in text.encode()]  # noqa: C416 - one id per byte, the hardest case
    decoder = rustbpe.StreamDecoder(trained.tokens)
    parts = [decoder.feed(token_id) for token_id in ids]
    assert "".join(parts) + decoder.finish() == text
    assert all("\ufffd" not in part for part in parts)
    decoder.feed(0xF0)
    assert decoder.finish() == "\ufffd"


def test_malformed_vocabularies_are_refused():
    single = [bytes([value]) for value in range(256)]
    with pytest.raises(ValueError, match="twice"):
        rustbpe.Tokenizer.from_tokens([*single, b"a"], "gpt2")
    with pytest.raises(ValueError, match="have no token"):
        rustbpe.Tokenizer.from_tokens(single[:-1], "gpt2")
    with pytest.raises(ValueError, match="merge 0"):
        rustbpe.Tokenizer.from_merges([(97, 300)], "gpt2")
