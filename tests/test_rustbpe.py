"""The BPE core against its reference, against tiktoken, tokenizers and the regex engine."""

import ctypes
import itertools
import json
import logging
import os
import pickle
import random
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rustbpe
from rustbpe import formats, native, reference
from rustbpe.unicode_ranges import LETTERS, UNICODE_VERSION

ROOT = Path(__file__).parents[1]
SHARED_TEXT = ROOT.parent / "shared" / "data" / "text"
needs_core = pytest.mark.skipif(not rustbpe.has_core(), reason="no compiled core")
NAMES = sorted(reference.PATTERNS)

# Pieces from which every rule of every pattern, and every way out of the fast scanner, is reached.
PIECES = [
    *("the", "Hello", "a", "Z", "x1y2", "don't", "I'LL", "we'Ve", "'s", "'", "''s", "'\u017f"),
    *(" ", "  ", "   ", "\n", "\r\n", "\n\n", "\t", " \n ", "\u00a0", "\u3000", "\x85", "\x1c"),
    *(
        ".",
        "...",
        ", ",
        "! ",
        "-",
        "_",
        "(x)",
        "#!/",
        "1",
        "12",
        "123",
        "12345",
        "\u0663",
        "\u2167",
    ),
    *("\u00e9", "na\u00efve", "\u4f60\u597d", "\u2019", "\u201c", "e\u0301", "\u200d", "\0"),
    *(
        "\U0001f469\u200d\U0001f680",
        "\U0001f1e9\U0001f1ea",
        "\u1c89",
        "\ud55c\uad6d",
        "\u0905\u093f",
    ),
]


def corpus(seed: int, num_pieces: int) -> str:
    rng = random.Random(seed)
    return "".join(rng.choice(PIECES) + rng.choice(("", "", " ")) for _ in range(num_pieces))


@pytest.fixture(scope="module")
def trained() -> rustbpe.Tokenizer:
    tokenizer = rustbpe.Tokenizer()
    texts = [corpus(seed, 400) for seed in range(40)]
    tokenizer.train_from_iterator(texts, 700, pattern="nanochat")
    return tokenizer


def tiktoken_of(tokenizer: rustbpe.Tokenizer, pattern: str):
    tiktoken = pytest.importorskip("tiktoken")
    ranks = dict(tokenizer.get_mergeable_ranks())
    return tiktoken.Encoding("t", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


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
    regex = pytest.importorskip("regex")
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
    pytest.importorskip("regex")
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


# ---- without the core -------------------------------------------------------------------------


def test_without_a_core_everything_works_with_one_notice(tmp_path):
    """In a process of its own: the package copied without any compiled file."""
    package = tmp_path / "rustbpe"
    package.mkdir()
    for source in (ROOT / "rustbpe").glob("*.py"):
        (package / source.name).write_text(source.read_text())
    program = (
        "import json, logging, sys, rustbpe\n"
        "logging.basicConfig()\n"
        "t = rustbpe.Tokenizer()\n"
        "t.train_from_iterator(['low lower lowest'] * 3, 262, pattern='nanochat')\n"
        "print(json.dumps([rustbpe.has_core(), t.merges, t.encode('lowest slow')]))\n"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    has_core, merges, ids = json.loads(done.stdout)
    assert not has_core
    assert done.stderr.count("no compiled core found") == 1
    compiled = rustbpe.Tokenizer()
    compiled.train_from_iterator(["low lower lowest"] * 3, 262, pattern="nanochat")
    assert [tuple(pair) for pair in merges] == compiled.merges
    assert ids == compiled.encode("lowest slow")


@pytest.mark.slow
def test_installing_without_cargo_gives_a_working_package(tmp_path):
    """The sources of this tree, installed by pip with cargo hidden from PATH."""
    pytest.importorskip("setuptools_rust")
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".git", "target", "*.so", "build", "*.egg-info", ".venv")
    shutil.copytree(ROOT, source, ignore=ignored)
    tools = tmp_path / "bin"
    tools.mkdir()
    environment = {**os.environ, "PATH": str(tools), "PIP_NO_INDEX": "1"}
    environment["CARGO_HOME"] = environment["RUSTUP_HOME"] = str(tmp_path / "nothing")
    options = ["--no-deps", "--no-build-isolation", "--target", str(tmp_path / "site")]
    install = [sys.executable, "-m", "pip", "install", "--quiet", *options, str(source)]
    subprocess.run(install, env=environment, check=True, capture_output=True, cwd=tmp_path)
    program = "import rustbpe; t = rustbpe.Tokenizer(); print(rustbpe.has_core(), t.encode('hi'))"
    environment["PYTHONPATH"] = str(tmp_path / "site")
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, env=environment, check=True, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stdout.strip() == "False [104, 105]"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cargo-clippy") is None, reason="no clippy")
def test_the_crate_is_formatted_and_free_of_lints():
    cargo = ["cargo", "clippy", "--offline", "--all-targets", "--release", "--", "-D", "warnings"]
    subprocess.run(cargo, cwd=ROOT / "rustbpe", check=True, capture_output=True)
    subprocess.run(["cargo", "fmt", "--check"], cwd=ROOT / "rustbpe", check=True)


# ---- the C ABI --------------------------------------------------------------------------------


@needs_core
def test_a_panic_becomes_an_exception():
    with pytest.raises(native.CoreError, match="panic in the Rust core: asked for by a test"):
        native.call("rbpe_test_panic")


@needs_core
def test_random_arguments_neither_crash_nor_read_outside(trained):
    """Null pointers, wrong lengths of offsets, offsets anywhere, unknown handles."""
    rng = random.Random(11)
    u64, size, i32, i64 = ctypes.c_uint64, ctypes.c_size_t, ctypes.c_int32, ctypes.c_int64
    core, handle = native.library(), trained._core()._handle.number
    statuses = set()
    for _ in range(4000):
        data = rng.choice(
            [None, b"", b"plain text", "\u00e9\u4f60".encode(), b"\xff\xfe", b"a" * 99]
        )
        length = len(data) if data is not None else rng.choice([0, 1, 2**63, 2**64 - 1])
        count = rng.randrange(5)
        values = [rng.choice([0, 1, 2, 5, length, 2**32, 2**64 - 1]) for _ in range(count + 1)]
        offsets = rng.choice(
            [None, (u64 * (count + 1))(*sorted(values)), (u64 * (count + 1))(*values)]
        )
        declared = rng.choice([count, 0]) if offsets is not None else rng.choice([0, 3, 2**64 - 1])
        ids, ends = (i32 * 64)(), (i64 * (count + 1))()
        room = rng.choice([0, 3, 64])
        status = core.rbpe_encoder_encode(
            rng.choice([handle, 0, 2**63]), data, length, offsets, declared,
            rng.choice([-1, 5, 2**62]), rng.choice([-1, 5]), rng.choice([0, 1, 2**32 - 1]),
            rng.choice([ids, None]), room, rng.choice([ends, None]),
        )  # fmt: skip
        statuses.add(status)
        core.rbpe_trainer_feed(rng.choice([handle, 0]), data, length, offsets, declared)
        core.rbpe_split(data, min(length, 8), data, length, None, 0, None)
        core.rbpe_encoder_new(data, length, data, length, offsets, declared, ctypes.byref(u64()))
        core.rbpe_trainer_start(rng.choice([0, handle]), 5, None)
        core.rbpe_trainer_merges(handle, None, 2**63, ctypes.byref(size()))
        core.rbpe_free(rng.choice([0, 2**64 - 1]))
    assert statuses == {0, -1}
    assert trained.decode(trained.encode("still alive")) == "still alive"


@needs_core
def test_a_trainer_used_in_the_wrong_order_says_so():
    trainer = native.Trainer("gpt2", 1)
    with pytest.raises(ValueError, match="has not started"):
        trainer.step(1)
    trainer.start(1)
    with pytest.raises(ValueError, match="started merging"):
        trainer.feed(["late"])
    with pytest.raises(ValueError, match="permutation"):
        native.Trainer("gpt2", 1, byte_ids=[0] * 256)


# ---- formats ----------------------------------------------------------------------------------


def test_tiktoken_file_there_and_back(trained, tmp_path):
    formats.dump_tiktoken(trained.tokens, tmp_path / "t.tiktoken")
    assert formats.load_tiktoken(tmp_path / "t.tiktoken") == trained.tokens
    (tmp_path / "bad").write_bytes(b"YQ== 0\nYg== 2\n")
    with pytest.raises(ValueError, match="without a gap"):
        formats.load_tiktoken(tmp_path / "bad")
    (tmp_path / "bad").write_bytes(b"!! zero\n")
    with pytest.raises(ValueError, match="line 1"):
        formats.load_tiktoken(tmp_path / "bad")


def test_gpt2_files(tmp_path):
    """Ids 0..255 are the printable characters in order, as in the published files."""
    order = sorted(formats.byte_characters())
    learned = ["\u0120t", "\u0120th", "er"]
    vocab = {token: index for index, token in enumerate([*order, *learned, "<|endoftext|>"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    merges = "#version: 0.2\n\u0120 t\n\u0120t h\ne r\n"
    (tmp_path / "merges.txt").write_text(merges, encoding="utf-8")
    tokens, specials = formats.load_gpt2(tmp_path / "vocab.json", tmp_path / "merges.txt")
    assert tokens[256:] == [b" t", b" th", b"er"]
    assert specials == {"<|endoftext|>": 259}
    tokenizer = rustbpe.Tokenizer.from_tokens(tokens, "gpt2")
    assert tokenizer.encode(" ther") == [257, 258]
    assert tokenizer.decode([vocab["\u0120"], vocab["!"]]) == " !"


@pytest.mark.parametrize("name", ["nanochat", "gpt4-2023", "gpt2", "gpt4"])
@pytest.mark.parametrize("known_merges", [True, False])
def test_huggingface_export_gives_identical_ids(name, known_merges):
    tokenizers = pytest.importorskip("tokenizers")
    texts = [corpus(seed, 300).replace("\u1c89", "") for seed in range(20)]
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(texts, 600, pattern=name)
    merges = tokenizer.merges if known_merges else None
    content = formats.to_huggingface(tokenizer.tokens, name, {"<|bos|>": 600}, merges)
    exported = tokenizers.Tokenizer.from_str(json.dumps(content))
    for text in texts:
        assert exported.encode(text).ids == tokenizer.encode(text)
        assert exported.decode(tokenizer.encode(text)) == text
    assert exported.token_to_id("<|bos|>") == 600


class _Exploit:
    def __reduce__(self):
        return (print, ("executed",))


def test_a_pickled_encoding_is_read_and_nothing_else(trained, tmp_path, capsys):
    encoding = tiktoken_of(trained, reference.PATTERNS["nanochat"])
    path = tmp_path / "tokenizer.pkl"
    path.write_bytes(pickle.dumps(encoding))
    tokens, pattern, specials = formats.load_pickled_encoding(path)
    assert tokens == trained.tokens
    assert pattern == reference.PATTERNS["nanochat"]
    assert specials == {}
    for content in (pickle.dumps(_Exploit()), b"garbage", pickle.dumps({"a": 1})):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"tokenizer\.pkl"):
            formats.load_pickled_encoding(path)
    assert capsys.readouterr().out == ""


# ---- large ------------------------------------------------------------------------------------


def shared_texts(num_shards: int) -> list[str]:
    parquet = pytest.importorskip("pyarrow.parquet")
    shards = sorted(SHARED_TEXT.glob("*.parquet"))[:num_shards]
    if not shards:
        pytest.skip("no real text at hand")
    columns = [parquet.read_table(shard, columns=["text"])["text"] for shard in shards]
    return [text for column in columns for text in column.to_pylist()]


def multilingual_text(num_bytes: int) -> str:
    """Words in many scripts, mixed with spaces, punctuation and digits; from a seed."""
    rng = random.Random(17)
    scripts = [(0x61, 26), (0x430, 32), (0x3B1, 25), (0x5D0, 27), (0x627, 36), (0x915, 37)]
    scripts += [(0x3042, 80), (0x4E00, 3000), (0xAC00, 3000), (0xE01, 46), (0x10A0, 90)]
    words = []
    for _ in range(30_000):
        first, count = rng.choice(scripts)
        letters = (chr(first + rng.randrange(count)) for _ in range(rng.randrange(1, 9)))
        words.append("".join(letters) + rng.choice(("", "", "\u0301", "\u3002", ", ", "12")))
    parts, size = [], 0
    while size < num_bytes:
        part = " ".join(rng.choices(words, k=500)) + "\n"
        parts.append(part)
        size += len(part.encode())
    return "".join(parts)


def code_text(num_bytes: int) -> str:
    sources = []
    size = 0
    for path in itertools.cycle(sorted(Path(json.__file__).parents[1].rglob("*.py"))):
        text = path.read_text(encoding="utf-8", errors="ignore")
        sources.append(text)
        size += len(text.encode())
        if size >= num_bytes:
            return "".join(sources)
    raise AssertionError("no Python sources")


@needs_core
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["english", "code", "multilingual"])
def test_20_megabytes_equal_tiktoken_for_two_vocabularies(kind):
    size = 20_000_000
    if kind == "english":
        text = "\n".join(shared_texts(2))
    else:
        text = code_text(size) if kind == "code" else multilingual_text(size)
    assert len(text.encode()) >= size
    texts = [text[at : at + 20_000] for at in range(0, len(text), 20_000)]
    for name, vocab_size in (("nanochat", 4096), ("gpt4", 20_000)):
        tokenizer = rustbpe.Tokenizer()
        tokenizer.train_from_iterator(texts[:300], vocab_size, pattern=name)
        expected = tiktoken_of(tokenizer, reference.PATTERNS[name])
        assert tokenizer.batch_encode(texts) == [expected.encode_ordinary(t) for t in texts]
