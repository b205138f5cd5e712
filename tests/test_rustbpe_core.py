"""The package around the BPE core: installing, the C ABI, files of others, large texts."""

import ctypes
import itertools
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from bpe_texts import corpus, tiktoken_of, trained_tokenizer

import rustbpe
from rustbpe import formats, native, reference
from rustbpe.libraries import fitting_libraries

ROOT = Path(__file__).parents[1]
SHARED_TEXT = ROOT.parent / "shared" / "data" / "text"
needs_core = pytest.mark.skipif(not rustbpe.has_core(), reason="no compiled core")


@pytest.fixture(scope="module")
def trained() -> rustbpe.Tokenizer:
    return trained_tokenizer()


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
@pytest.mark.skipif(shutil.which("cargo-clippy") is None, reason="cargo-clippy is not installed")
def test_the_crate_is_formatted_and_free_of_lints():
    cargo = ["cargo", "clippy", "--offline", "--all-targets", "--release", "--", "-D", "warnings"]
    subprocess.run(cargo, cwd=ROOT / "rustbpe", check=True, capture_output=True)
    subprocess.run(["cargo", "fmt", "--check"], cwd=ROOT / "rustbpe", check=True)


# ---- the C ABI --------------------------------------------------------------------------------


@needs_core
def test_libraries_that_are_absent_foreign_or_of_another_version_are_passed_over(tmp_path):
    release = tmp_path / "target" / "release"
    release.mkdir(parents=True)
    (tmp_path / "_core.so").write_bytes(b"for another machine")
    core = native.load()._name
    shutil.copy(core, release / "librustbpe.so")

    def found(version_function, version):
        return list(
            fitting_libraries(
                tmp_path, "rustbpe", version_function=version_function, version=version
            )
        )

    assert len(found("rbpe_abi_version", native.ABI_VERSION)) == 1
    assert found("rbpe_abi_version", native.ABI_VERSION + 1) == []
    assert found("another_version", native.ABI_VERSION) == []


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
        core.rbpe_encoder_decode(handle, ids, rng.choice([0, 64]), None, 0, None)
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
    shards = sorted(SHARED_TEXT.glob("*.parquet"))[:num_shards]
    if not shards:
        pytest.skip("shared/data/text is not here")
    columns = [pq.read_table(shard, columns=["text"])["text"] for shard in shards]
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
