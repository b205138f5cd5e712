"""Parquet shards: order, positions, splits, the command, and every kind of unusable input."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat import dataset, prefetch
from nanochat.common import UserError
from nanochat.dataset import Config, Position, assets_of, open_source
from nanochat.sources import START, changed_data, generated
from nanochat.sources.embedded import DEFAULT_SEED, generate_documents
from nanochat.sources.hub import HUB_DATASETS, HubDataset
from nanochat.sources.parquet import ParquetSource, read_note, shard_name, write_shard
from nanochat.transfer import Patience, Transfer
from tests.fake_hub import FakeHub, Fault, running


def write_folder(folder: Path, *, rows_per_group: int = 150) -> list[str]:
    """Two training shards and a validation shard; returns the training texts in order."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = [f"document {i}" for i in range(700)]
    options = {"rows_per_group": rows_per_group, "note": {}}
    write_shard(folder / shard_name(0), texts[:400], **options)
    write_shard(folder / shard_name(1), texts[400:], **options)
    write_shard(folder / shard_name(2), ["held out 0", "held out 1"], **options)
    return texts


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_folder(tmp_path / "shards")
    return tmp_path / "shards"


@pytest.fixture
def base_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    return tmp_path / "base"


def one_epoch(source: dataset.DocumentSource, position: Position = START) -> list[str]:
    stream = source.documents("train", position, endless=False)
    return [text for texts, _ in stream for text in texts]


# ---- reading ----------------------------------------------------------------------------------


def test_one_epoch_is_every_document_once_in_order(tmp_path: Path) -> None:
    texts = write_folder(tmp_path)
    assert one_epoch(open_source(str(tmp_path))) == texts


def test_the_last_shard_is_the_validation_split_and_only_that(folder: Path) -> None:
    source = open_source(str(folder))
    assert [path.name for path in source.shards("train")] == [shard_name(0), shard_name(1)]
    held_out = [texts for texts, _ in source.documents("val", endless=False)]
    assert held_out == [["held out 0", "held out 1"]]


def test_reading_on_from_any_position_gives_the_rest(tmp_path: Path) -> None:
    texts = write_folder(tmp_path)
    source = open_source(str(tmp_path))
    read = 0
    for batch, position in source.documents("train", endless=False):
        read += len(batch)
        assert one_epoch(source, position) == texts[read:]
    assert read == len(texts)


def test_an_endless_stream_counts_epochs_and_repeats(tmp_path: Path) -> None:
    texts = write_folder(tmp_path)
    stream = open_source(str(tmp_path)).documents("train")
    read: list[str] = []
    while len(read) < 2 * len(texts):
        batch, position = next(stream)
        read += batch
    assert read == texts + texts
    assert position == Position(epoch=1, row_group=5)
    assert next(stream)[1].epoch == 2


def test_a_list_is_small_even_when_a_row_group_is_large(tmp_path: Path) -> None:
    write_folder(tmp_path, rows_per_group=10_000)
    stream = open_source(str(tmp_path)).documents("train", endless=False)
    assert max(len(texts) for texts, _ in stream) == 128


def test_shards_added_at_the_end_do_not_move_a_position(folder: Path) -> None:
    position = Position(row_group=4)
    before = one_epoch(open_source(str(folder)), position)
    (folder / shard_name(2)).rename(folder / shard_name(9))
    write_shard(folder / shard_name(2), ["new"], note={})
    assert one_epoch(open_source(str(folder)), position) == [*before, "new"]


def test_null_documents_are_skipped_and_large_strings_and_dictionaries_read(
    tmp_path: Path,
) -> None:
    kinds = [pa.large_string(), pa.dictionary(pa.int32(), pa.string())]
    for index, kind in enumerate(kinds):
        table = pa.table({"text": pa.array(["a", None, "b"], pa.string()).cast(kind)})
        pq.write_table(table, tmp_path / shard_name(index))
    write_shard(tmp_path / shard_name(2), ["held out"], note={})
    assert one_epoch(open_source(str(tmp_path))) == ["a", "b", "a", "b"]


def test_a_written_shard_has_the_layout_of_fineweb_edu(tmp_path: Path) -> None:
    path = tmp_path / shard_name(0)
    write_shard(path, ["text"] * 3000, note={"made by": "a test"})
    metadata = pq.ParquetFile(path).metadata
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [
        1024,
        1024,
        952,
    ]
    assert metadata.row_group(0).column(0).compression == "ZSTD"
    assert pq.read_schema(path).names == ["text"]
    assert read_note(path)["made by"] == "a test"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


# ---- unusable input ---------------------------------------------------------------------------


def refused(folder: Path | str, *parts: str) -> None:
    with pytest.raises(UserError) as caught:
        open_source(str(folder))
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", str(tmp_path / "nowhere"), "does not exist")


def test_a_misspelt_name_is_answered_with_the_nearest() -> None:
    refused("fineweb_edu", "did you mean fineweb-edu?")


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    refused(tmp_path, str(tmp_path), "no .parquet", ".jsonl", ".txt")


def test_no_name_is_not_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--data=$TEXTS with a variable that is not set would train on whatever lies around."""
    (tmp_path / "notes.txt").write_text("not meant")
    monkeypatch.chdir(tmp_path)
    refused("", "--data is empty")
    with pytest.raises(UserError, match="--data is empty"):
        assets_of("", 1)


def test_a_single_shard_leaves_nothing_for_validation(tmp_path: Path) -> None:
    write_shard(tmp_path / shard_name(0), ["text"], note={})
    refused(tmp_path, "only shard_00000.parquet", "validation")


def test_a_shard_without_text_is_named_with_its_columns(folder: Path) -> None:
    pq.write_table(pa.table({"content": ["a"], "url": ["b"]}), folder / shard_name(1))
    refused(folder, shard_name(1), "no column 'text'", "content, url")


def test_a_text_column_of_numbers_is_named_with_its_type(folder: Path) -> None:
    pq.write_table(pa.table({"text": [1, 2]}), folder / shard_name(1))
    refused(folder, shard_name(1), "int64, not a string")


@pytest.mark.parametrize("num_bytes", [0, 3, 200])
def test_a_truncated_shard_is_named(folder: Path, num_bytes: int) -> None:
    path = folder / shard_name(1)
    path.write_bytes(path.read_bytes()[:num_bytes])
    refused(folder, shard_name(1), "damaged or incomplete", "fetch or write it again")


def test_a_shard_without_rows_is_named(folder: Path) -> None:
    write_shard(folder / shard_name(1), [], note={})
    refused(folder, shard_name(1), "no rows")


def test_damage_inside_a_shard_is_named_when_it_is_read(folder: Path) -> None:
    path = folder / shard_name(0)
    content = bytearray(path.read_bytes())
    content[4:60] = bytes(56)
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"{shard_name(0)} is damaged"):
        one_epoch(open_source(str(folder)))


def test_a_split_of_nulls_ends_instead_of_looping(tmp_path: Path) -> None:
    table = pa.table({"text": pa.array([None, None], pa.string())})
    pq.write_table(table, tmp_path / shard_name(0))
    write_shard(tmp_path / shard_name(1), ["held out"], note={})
    with pytest.raises(UserError, match="no text in any document"):
        next(open_source(str(tmp_path)).documents("train"))


# ---- hub data sets ----------------------------------------------------------------------------


def test_a_hub_data_set_that_was_not_fetched_names_the_command(base_dir: Path) -> None:
    refused("climbmix", "python -m nanochat.dataset -n 8 --data=climbmix")


def test_validation_is_pinned_to_the_last_id(base_dir: Path) -> None:
    folder = base_dir / "base_data"
    write_folder(folder)
    write_shard(folder / shard_name(1822), ["pinned"], note={})
    source = open_source("fineweb-edu")
    assert [path.name for path in source.shards("val")] == [shard_name(1822)]
    assert len(source.shards("train")) == 3


def test_without_the_pinned_shard_the_last_one_is_held_out_with_a_notice(
    base_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_folder(base_dir / "base_data")
    source = open_source("fineweb-edu")
    assert [path.name for path in source.shards("val")] == [shard_name(2)]
    assert "shard_01822.parquet is not there" in caplog.text


@pytest.fixture
def small_hub(base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub with a data set of five shards under the name climbmix."""
    small = HubDataset("climbmix", "somebody/climbmix", num_shards=5, license="MIT")
    monkeypatch.setitem(HUB_DATASETS, "climbmix", small)
    fake = FakeHub(tmp_path / "hub")
    (tmp_path / "hub/somebody/climbmix").mkdir(parents=True)
    for shard in range(5):
        texts = [f"text {i} of {shard}" for i in range(2000)]
        write_shard(tmp_path / "hub/somebody/climbmix" / shard_name(shard), texts, note={})
    with running(fake):
        monkeypatch.setenv("HF_ENDPOINT", fake.url)
        for variable in ("NANOCHAT_OFFLINE", "HF_HUB_OFFLINE"):
            monkeypatch.delenv(variable, raising=False)
        impatient = Transfer(Patience(backoff_seconds=0.0))
        monkeypatch.setattr(prefetch, "Transfer", lambda: replace(impatient))
        yield fake


def fetch(num_files: int, **options: object) -> int:
    config = Config(num_files=num_files, num_workers=1, data="climbmix", **options)  # type: ignore[arg-type]
    return dataset.main(config)


def names_asked(fake: FakeHub) -> list[str]:
    return [request.path.rpartition("/")[2] for request in fake.requests]


def address(shard: int) -> str:
    return f"/datasets/somebody/climbmix/resolve/main/{shard_name(shard)}"


def test_n_shards_come_with_the_validation_shard_first(
    small_hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fetch(2) == 0
    assert names_asked(small_hub) == [shard_name(4), shard_name(0), shard_name(1)]
    assert "Downloaded: 3/3" in capsys.readouterr().out
    source = open_source("climbmix")
    assert [path.name for path in source.shards("train")] == [shard_name(0), shard_name(1)]
    assert [path.name for path in source.shards("val")] == [shard_name(4)]


def test_shards_that_are_there_need_no_network(
    small_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch(3)
    small_hub.requests.clear()
    monkeypatch.setenv("NANOCHAT_OFFLINE", "1")
    assert fetch(3) == 0
    assert small_hub.requests == []


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def lose_footer(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8] + b"\0" * 8)


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"PAR1")


@pytest.mark.parametrize("damage", [cut_short, lose_footer, grow])
def test_a_damaged_shard_is_put_aside_and_fetched_again(
    small_hub: FakeHub, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    fetch(3)
    path = HUB_DATASETS["climbmix"].path(1)
    whole = path.read_bytes()
    damage(path)
    damaged = path.read_bytes()
    small_hub.requests.clear()
    assert fetch(3) == 0
    assert names_asked(small_hub) == [shard_name(1)]
    assert path.read_bytes() == whole
    assert (path.parent / ".quarantine" / path.name).read_bytes() == damaged
    assert "shard_00001.parquet" in caplog.text


def test_one_changed_byte_is_found_with_verify(small_hub: FakeHub) -> None:
    fetch(1)
    path = HUB_DATASETS["climbmix"].path(0)
    whole = path.read_bytes()
    path.write_bytes(whole[:30] + bytes([whole[30] ^ 1]) + whole[31:])
    small_hub.requests.clear()
    assert fetch(1) == 0
    assert names_asked(small_hub) == []
    assert fetch(1, verify=True) == 0
    assert path.read_bytes() == whole


def test_shards_that_came_another_way_are_taken_over(small_hub: FakeHub) -> None:
    fetch(2)
    folder = HUB_DATASETS["climbmix"].folder
    shutil.rmtree(folder / ".manifests")
    cut_short(folder / shard_name(0))
    small_hub.requests.clear()
    assert fetch(2) == 0
    assert names_asked(small_hub) == [shard_name(0)]
    assert len(list((folder / ".manifests").iterdir())) == 3


def test_a_passing_error_is_repeated(small_hub: FakeHub) -> None:
    small_hub.fail(address(0), Fault(503), Fault(cut_after=2000), Fault(500))
    assert fetch(1) == 0
    assert names_asked(small_hub).count(shard_name(0)) == 4


def test_a_missing_shard_makes_the_command_fail_and_is_named(
    small_hub: FakeHub, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    (small_hub.root / "somebody/climbmix" / shard_name(1)).unlink()
    assert fetch(3) == 1
    assert names_asked(small_hub).count(shard_name(1)) == 1
    assert "missing shards: 00001" in caplog.text
    assert "Downloaded: 3/4" in capsys.readouterr().out


@pytest.mark.parametrize("variable", ["NANOCHAT_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_nothing_is_asked_and_the_variable_is_named(
    small_hub: FakeHub,
    variable: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv(variable, "1")
    assert fetch(1) == 1
    assert small_hub.requests == []
    assert f"{variable} is set" in caplog.text


def test_the_token_is_sent_to_the_hub(small_hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fetch(0)
    assert [request.authorization for request in small_hub.requests] == ["Bearer hf_secret"]


def test_a_gated_repository_says_what_to_do(
    small_hub: FakeHub, caplog: pytest.LogCaptureFixture
) -> None:
    small_hub.gated.add("somebody/climbmix")
    assert fetch(0) == 1
    assert "accept its terms" in caplog.text


def test_a_full_disk_is_told_before_anything_is_fetched(
    small_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")._replace(free=600_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"5 assets need about 0.5 GB, but .* has 0.6 GB free"):
        fetch(4)
    assert small_hub.requests == []


def test_more_shards_than_exist_are_refused(small_hub: FakeHub) -> None:
    with pytest.raises(UserError, match="4 training shards, 7 were asked for"):
        fetch(7)


def test_published_data_sets_have_the_documented_sizes() -> None:
    ends = {name: d.path(d.validation_id).name for name, d in HUB_DATASETS.items()}
    assert ends == {"fineweb-edu": "shard_01822.parquet", "climbmix": "shard_06542.parquet"}


# ---- what a checkpoint remembers of its data --------------------------------------------------


def test_shards_added_at_the_end_are_the_same_data(folder: Path) -> None:
    saved = open_source(str(folder)).fingerprint()
    (folder / shard_name(2)).rename(folder / shard_name(9))
    write_shard(folder / shard_name(2), ["later"], note={})
    assert changed_data(saved, open_source(str(folder)).fingerprint()) is None


def test_a_changed_or_missing_shard_is_named(folder: Path) -> None:
    saved = open_source(str(folder)).fingerprint()
    write_shard(folder / shard_name(1), ["other"] * 300, note={})
    assert "train shard 1 with" in str(changed_data(saved, open_source(str(folder)).fingerprint()))
    (folder / shard_name(1)).unlink()
    changed = changed_data(saved, open_source(str(folder)).fingerprint())
    assert changed == "1 train shards, which were 2"


def test_another_validation_shard_is_named(folder: Path) -> None:
    saved = open_source(str(folder)).fingerprint()
    write_shard(folder / shard_name(2), ["other"], note={})
    assert "val shard 0" in str(changed_data(saved, open_source(str(folder)).fingerprint()))


# ---- the embedded world -----------------------------------------------------------------------


@pytest.fixture
def small_world(base_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(generated, "DOCUMENTS_PER_SHARD", 64)
    monkeypatch.setattr(generated, "NUM_DOCUMENTS", 64 * 7)
    monkeypatch.setattr(generated, "DEFAULT_NUM_TRAIN", 3)
    monkeypatch.setattr(generated.os, "cpu_count", lambda: 1)
    generated.fingerprint.cache_clear()
    yield base_dir / "base_data_embedded"
    generated.fingerprint.cache_clear()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.parquet"))


def test_opening_the_embedded_world_writes_the_default_shards_once(small_world: Path) -> None:
    source = open_source("embedded")
    assert names(small_world) == [shard_name(i) for i in (0, 1, 2, 6)]
    written = {path: path.stat().st_mtime_ns for path in small_world.glob("*.parquet")}
    open_source("embedded")
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert one_epoch(source) == list(generate_documents(DEFAULT_SEED, 0, 3 * 64))
    held_out = [t for texts, _ in source.documents("val", endless=False) for t in texts]
    assert held_out == list(generate_documents(DEFAULT_SEED, 6 * 64, 7 * 64))


def test_only_as_many_embedded_shards_are_written_as_asked(
    small_world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dataset.main(Config(num_files=2, num_workers=1, data="embedded")) == 0
    assert names(small_world) == [shard_name(i) for i in (0, 1, 6)]
    assert "2 training shards, 1 validation shard" in capsys.readouterr().out
    assert dataset.main(Config(num_files=-1, num_workers=1, data="embedded")) == 0
    assert len(open_source("embedded").shards("train")) == 6


def test_generation_that_was_cut_off_is_completed_when_opened(small_world: Path) -> None:
    open_source("embedded")
    (small_world / shard_name(1)).unlink()
    (small_world / shard_name(6)).unlink()
    assert len(open_source("embedded").shards("train")) == 3


def test_shards_of_another_generator_are_written_again(
    small_world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_source("embedded")
    monkeypatch.setattr(generated, "DEFAULT_SEED", 7)
    generated.fingerprint.cache_clear()
    assert one_epoch(open_source("embedded")) == list(generate_documents(7, 0, 3 * 64))


@pytest.mark.parametrize("asked", [0, 7])
def test_more_embedded_shards_than_documents_are_refused(small_world: Path, asked: int) -> None:
    with pytest.raises(UserError, match=f"6 training shards, {asked} were asked for"):
        dataset.main(Config(num_files=asked, data="embedded"))


def test_worker_processes_write_the_same_shards(base_dir: Path) -> None:
    assert generated.generate(2, num_workers=2) == 3
    source = open_source("embedded")
    texts, _ = next(source.documents("train", Position(row_group=8)))
    assert texts == list(generate_documents(DEFAULT_SEED, 8192, 8192 + 128))


# ---- real text --------------------------------------------------------------------------------


def test_the_shared_english_text_is_read_whole() -> None:
    text = Path(__file__).parents[2] / "shared" / "data" / "text"
    if not text.is_dir():
        pytest.skip("shared/data/text is not here")
    source = ParquetSource.from_folder(text)
    num_documents = sum(len(texts) for texts, _ in source.documents("val", endless=False))
    assert num_documents == 2048
    assert source.num_row_groups("train") == 23
