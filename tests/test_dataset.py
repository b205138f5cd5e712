"""Parquet shards: order, positions, splits, the command, and every kind of unusable input."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from nanochat import dataset
from nanochat.common import UserError
from nanochat.dataset import Config, Position, open_source
from nanochat.sources import START, generated, hub
from nanochat.sources.embedded import DEFAULT_SEED, generate_documents
from nanochat.sources.hub import HUB_DATASETS, HubDataset
from nanochat.sources.parquet import ParquetSource, read_note, shard_name, write_shard


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
    refused(tmp_path, str(tmp_path), "no .parquet shards")


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


class FakeHub:
    """Stands in for `hf_hub_download`: fails as told, then writes what the hub would."""

    def __init__(self, failures: list[Exception] | None = None, gone: tuple[int, ...] = ()):
        self.failures, self.gone = failures or [], [shard_name(i) for i in gone]
        self.asked: list[str] = []

    def __call__(self, repository: str, filename: str, *, local_dir: Path, **_: object) -> str:
        self.asked.append(filename)
        if self.failures:
            raise self.failures.pop(0)
        if filename in self.gone:
            raise OSError("500 Server Error")
        write_shard(local_dir / filename, [f"text of {filename}"] * 3, note={})
        return str(local_dir / filename)


@pytest.fixture
def small_dataset(base_dir: Path, monkeypatch: pytest.MonkeyPatch) -> HubDataset:
    small = HubDataset("climbmix", "somebody/climbmix", num_shards=5)
    monkeypatch.setitem(HUB_DATASETS, "climbmix", small)
    monkeypatch.setattr(hub.time, "sleep", lambda seconds: None)
    return small


def use(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    monkeypatch.setattr(hub, "_hub_download", lambda: fake)
    return fake


def test_n_shards_come_with_the_validation_shard_first(
    small_dataset: HubDataset, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = use(FakeHub(), monkeypatch)
    assert dataset.main(Config(num_files=2, num_workers=1, data="climbmix")) == 0
    assert fake.asked == [shard_name(4), shard_name(0), shard_name(1)]
    assert "Downloaded: 3/3" in capsys.readouterr().out
    assert len(open_source("climbmix").shards("train")) == 2


def test_shards_that_are_there_are_not_fetched_and_damaged_ones_are(
    small_dataset: HubDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(FakeHub(), monkeypatch)
    dataset.main(Config(num_files=3, data="climbmix"))
    path = small_dataset.path(1)
    path.write_bytes(path.read_bytes()[:-10])
    again = use(FakeHub(), monkeypatch)
    assert dataset.main(Config(num_files=3, data="climbmix")) == 0
    assert again.asked == [shard_name(1)]


def test_a_failed_attempt_is_repeated(
    small_dataset: HubDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = use(FakeHub(failures=[OSError("cut"), OSError("cut")]), monkeypatch)
    assert dataset.main(Config(num_files=1, num_workers=1, data="climbmix")) == 0
    assert len(fake.asked) == 4


def test_a_missing_shard_makes_the_command_fail_and_is_named(
    small_dataset: HubDataset,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake = use(FakeHub(gone=(1,)), monkeypatch)
    assert dataset.main(Config(num_files=3, num_workers=1, data="climbmix")) == 1
    assert fake.asked.count(shard_name(1)) == hub.ATTEMPTS
    assert "missing shards: 1" in caplog.text
    assert "Downloaded: 3/4" in capsys.readouterr().out


def test_without_a_connection_only_one_shard_is_tried(
    small_dataset: HubDataset, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake = use(FakeHub(failures=[LocalEntryNotFoundError("no connection")] * 9), monkeypatch)
    assert dataset.main(Config(num_files=3, num_workers=1, data="climbmix")) == 1
    assert fake.asked == [shard_name(4)]
    assert "missing shards: 4, 0, 1, 2" in caplog.text


def test_more_shards_than_exist_are_refused(small_dataset: HubDataset) -> None:
    with pytest.raises(UserError, match="4 training shards, 7 were asked for"):
        dataset.main(Config(num_files=7, data="climbmix"))


def test_published_data_sets_have_the_documented_sizes() -> None:
    ends = {name: d.path(d.validation_id).name for name, d in HUB_DATASETS.items()}
    assert ends == {"fineweb-edu": "shard_01822.parquet", "climbmix": "shard_06542.parquet"}


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
