"""Text of one's own: JSONL and plain files become shards once, and nothing is lost silently."""

import gzip
import json
import random
from pathlib import Path

import pytest

from nanochat import dataset
from nanochat.common import UserError
from nanochat.dataset import Config, open_source
from nanochat.sources import own, plain_text

LETTERS = "abcdefghij \u00e9\u4e2d\u0440\U0001f600"


@pytest.fixture
def base_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    return tmp_path / "base"


@pytest.fixture
def folder(tmp_path: Path, base_dir: Path) -> Path:
    (tmp_path / "texts").mkdir()
    return tmp_path / "texts"


def documents(data: Path, split: str) -> list[str]:
    source = open_source(str(data))
    stream = source.documents(split, endless=False)  # type: ignore[arg-type]
    return [text for texts, _ in stream for text in texts]


def all_documents(data: Path) -> list[str]:
    return sorted(documents(data, "train") + documents(data, "val"))


def write_jsonl(path: Path, texts: list[str]) -> list[str]:
    lines = [json.dumps({"text": t, "id": i}, ensure_ascii=False) for i, t in enumerate(texts)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return texts


def some_texts(count: int, seed: int = 1) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(LETTERS, k=30)).strip() + f" {i}" for i in range(count)]


def test_every_document_of_every_kind_of_file_arrives_once(folder: Path) -> None:
    texts = write_jsonl(folder / "a.jsonl", some_texts(300))
    (folder / "deeper").mkdir()
    (folder / "deeper/b.txt").write_text("una p\u00e1gina\r\nde texto\r\n", encoding="utf-8")
    (folder / "c.md").write_text("\ufeff# \u6807\u9898\n\n\u6587\u672c\n", encoding="utf-8")
    with gzip.open(folder / "d.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(json.dumps("a line that is only a string") + "\n")
    expected = [*texts, "una p\u00e1gina\nde texto", "# \u6807\u9898\n\n\u6587\u672c"]
    assert all_documents(folder) == sorted([*expected, "a line that is only a string"])


def test_a_single_file_is_enough(folder: Path) -> None:
    texts = write_jsonl(folder / "a.jsonl", some_texts(50))
    assert all_documents(folder / "a.jsonl") == sorted(texts)


def test_documents_are_mixed_and_some_validate(folder: Path) -> None:
    texts = write_jsonl(folder / "a.jsonl", some_texts(2000))
    held_out = documents(folder, "val")
    assert 5 <= len(held_out) <= 50
    train = documents(folder, "train")
    assert train != [text for text in texts if text in set(train)]
    assert not set(train) & set(held_out)


@pytest.mark.parametrize(("unit_bytes", "num_workers"), [(64, 1), (999, 2), (1 << 20, 1)])
def test_pieces_and_processes_do_not_change_the_shards(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unit_bytes: int, num_workers: int
) -> None:
    write_jsonl(folder / "a.jsonl", some_texts(100))
    write_jsonl(folder / "b.jsonl", some_texts(100, seed=2))
    whole = own.convert(own.find_inputs(folder), tmp_path / "whole")
    monkeypatch.setattr(plain_text, "UNIT_BYTES", unit_bytes)
    cut = own.convert(own.find_inputs(folder), tmp_path / "cut", num_workers=num_workers)
    assert cut == whole
    for path in (tmp_path / "whole").glob("*.parquet"):
        assert (tmp_path / "cut" / path.name).read_bytes() == path.read_bytes()


def test_repeated_texts_are_left_out_and_counted(folder: Path) -> None:
    texts = some_texts(100)
    write_jsonl(folder / "a.jsonl", texts)
    write_jsonl(folder / "b.jsonl", texts[:30])
    assert all_documents(folder) == sorted(texts)
    report = own.last_report(folder)
    assert report is not None
    assert report.documents == 100
    assert report.skipped["a text that came before"] == 30


@pytest.mark.parametrize("unit_bytes", [40, 1 << 20])
def test_what_is_skipped_is_named_with_its_line(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    unit_bytes: int,
) -> None:
    monkeypatch.setattr(plain_text, "UNIT_BYTES", unit_bytes)
    good = [json.dumps({"text": t}).encode() for t in some_texts(20)]
    bad = [
        b"{not json",
        b'{"title": "no text"}',
        b'{"text": "  "}',
        b'{"text": "\\ud800"}',
        b"\xff",
    ]
    (folder / "a.jsonl").write_bytes(b"\n".join(good + bad + good[:1]) + b"\n")
    (folder / "b.txt").write_bytes("text".encode("utf-16"))
    (folder / "c.txt").write_bytes(b"good\n\xff\xfe bad\ngood\n")
    (folder / "d.tar.gz").write_bytes(b"whatever")
    (folder / "e.txt.gz").write_bytes(b"\x1f\x8bbroken")
    with gzip.open(folder / "f.jsonl.gz", "wb") as file:
        file.write(b"\n".join([*good[:3], b"{}"]))
    assert dataset.main(Config(data=str(folder))) == 0
    printed = capsys.readouterr().out
    for line in (
        "skipped 2: a line that is not JSON in UTF-8 (a.jsonl, line 21; a.jsonl, line 25)",
        "skipped 2: a line without a field 'text' (a.jsonl, line 22; f.jsonl.gz, line 4)",
        "skipped 1: an empty text (a.jsonl, line 23)",
        "skipped 1: a text with half a surrogate pair (a.jsonl, line 24)",
        "skipped 1: a file in UTF-16; save it as UTF-8 (b.txt)",
        "skipped 1: a line that is not UTF-8 (c.txt, line 2)",
        "skipped 1: neither .jsonl nor .txt inside the .gz (d.tar.gz)",
        "skipped 1: a damaged .gz, from there on (e.txt.gz)",
        "21 documents",
    ):
        assert line in printed


def test_a_book_becomes_documents_that_end_with_a_paragraph(folder: Path) -> None:
    paragraphs = [f"paragraph {i}\n" + "word " * 300 for i in range(200)]
    (folder / "book.txt").write_text("\n\n".join(paragraphs))
    found = all_documents(folder)
    assert 20 <= len(found) <= 40
    assert all(text.startswith("paragraph ") for text in found)
    assert max(map(len, found)) < 3 * plain_text.DOCUMENT_CHARACTERS
    joined = sorted(p.strip() for text in found for p in text.split("\n\n"))
    assert joined == sorted(p.strip() for p in paragraphs)


def test_a_line_without_end_is_cut_and_nothing_of_it_lost(folder: Path) -> None:
    text = "".join(random.Random(0).choices("abc", k=200_000))
    (folder / "line.txt").write_text(text)
    found = all_documents(folder)
    assert sum(map(len, found)) == len(text)
    assert max(map(len, found)) <= 3 * plain_text.DOCUMENT_CHARACTERS


def test_conversion_happens_once_and_again_when_a_file_changes(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    write_jsonl(folder / "a.jsonl", some_texts(50))
    open_source(str(folder))
    open_source(str(folder))
    assert caplog.text.count("converting 1 files") == 1
    texts = write_jsonl(folder / "a.jsonl", some_texts(60, seed=5))
    assert all_documents(folder) == sorted(texts)
    assert caplog.text.count("converting 1 files") == 2


def test_a_conversion_that_was_killed_is_made_again(folder: Path) -> None:
    texts = write_jsonl(folder / "a.jsonl", some_texts(50))
    target = own.shards_of(folder)
    open_source(str(folder))
    (target / "conversion.json").unlink()
    (target / "shard_00000.parquet").write_bytes(b"half")
    assert all_documents(folder) == sorted(texts)


def test_many_shards_keep_their_numbers_without_gaps(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own, "SHARD_CHARACTERS", 400)
    texts = write_jsonl(folder / "a.jsonl", some_texts(200))
    source = open_source(str(folder))
    names = [path.name for path in source.shards("train") + source.shards("val")]
    assert len(names) > 5
    assert names == [f"shard_{i:05d}.parquet" for i in range(len(names))]
    assert all_documents(folder) == sorted(texts)


@pytest.mark.parametrize("texts", [[], ["only one"], ["twice", "twice"]])
def test_too_few_documents_are_refused_with_the_report(folder: Path, texts: list[str]) -> None:
    write_jsonl(folder / "a.jsonl", texts)
    with pytest.raises(UserError, match="too few"):
        open_source(str(folder))


@pytest.mark.parametrize("number", range(4))
def test_two_documents_are_enough(folder: Path, number: int) -> None:
    texts = write_jsonl(folder / "a.jsonl", [f"first {number}", f"second {number}"])
    assert all_documents(folder) == sorted(texts)
    assert len(documents(folder, "val")) == 1


def test_notes_beside_parquet_shards_do_not_matter(folder: Path) -> None:
    from nanochat.sources.parquet import write_shard

    for number in range(2):
        write_shard(folder / f"{number}.parquet", [f"text {number}"], note={})
    (folder / "README.txt").write_text("about these shards")
    assert all_documents(folder) == ["text 0", "text 1"]
