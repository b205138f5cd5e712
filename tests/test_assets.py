"""What is present, what is missing or damaged, and the rows of a data set on this machine."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat import assets
from nanochat.assets import Asset, Manifest, Url, problem_with, record_file, require
from nanochat.common import UserError
from nanochat.sources import hub_rows
from nanochat.sources.hub_rows import HubRows
from tasks.common import Task, TaskMixture


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    return tmp_path / "base"


def rows_asset() -> HubRows:
    return HubRows("owner/quiz", "main", "train", license_name="MIT")


def place(asset: Asset, tables: list[list[dict[str, object]]]) -> list[Path]:
    """Write the files of a hub split with their manifest, as a fetch leaves them."""
    asset.path.mkdir(parents=True)
    paths = []
    for number, rows in enumerate(tables):
        path = asset.path / f"{number:05d}.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=4)
        paths.append(path)
    records = tuple(record_file(asset.path, path) for path in paths)
    assets.write_manifest(asset, Manifest(records, revision="a" * 40))
    return paths


def quiz(start: int, stop: int) -> list[dict[str, object]]:
    return [{"question": f"q{i}", "choices": ["a", "b"], "answer": i} for i in range(start, stop)]


def test_rows_of_all_files_come_in_the_order_of_seed_42(base: Path) -> None:
    rows = rows_asset()
    place(rows.asset, [quiz(0, 7), quiz(7, 12)])
    assert len(rows) == 12
    expected = np.random.default_rng(42).permutation(12)
    assert [row["answer"] for row in rows] == expected.tolist()
    assert rows[0] == {"question": f"q{expected[0]}", "choices": ["a", "b"], "answer": expected[0]}
    with pytest.raises(IndexError, match="row 12"):
        rows[12]


def test_the_files_are_looked_at_once_and_not_for_every_row(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_asset()
    place(rows.asset, [quiz(0, 7)])
    looks: list[Asset] = []

    def look(asset: Asset) -> Manifest:
        looks.append(asset)
        return require(asset)

    monkeypatch.setattr(hub_rows, "require", look)
    assert [len(rows) for _ in rows] == [7] * 7
    assert len(looks) == 1


def test_rows_can_be_had_in_the_order_of_the_files(base: Path) -> None:
    place(rows_asset().asset, [quiz(0, 3), quiz(3, 5)])
    rows = HubRows("owner/quiz", "main", "train", license_name="MIT", shuffled=False)
    assert [row["answer"] for row in rows] == [0, 1, 2, 3, 4]


def test_missing_rows_name_the_place_and_the_command(base: Path) -> None:
    with pytest.raises(UserError) as error:
        len(rows_asset())
    assert str(base / "task_data/owner--quiz/main/train") in str(error.value)
    assert "python -m scripts.assets prefetch owner/quiz:main:train" in str(error.value)


def test_an_asset_without_a_manifest_is_not_present(base: Path) -> None:
    rows = rows_asset()
    place(rows.asset, [quiz(0, 3)])
    assert problem_with(rows.asset) is None
    rows.asset.manifest_path.unlink()
    assert problem_with(rows.asset) == "there, but without a manifest"


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": 99}', "not json"])
def test_an_unreadable_manifest_counts_as_none(base: Path, text: str) -> None:
    rows = rows_asset()
    place(rows.asset, [quiz(0, 3)])
    rows.asset.manifest_path.write_text(text)
    assert problem_with(rows.asset) == "there, but without a manifest"


def test_a_truncated_file_is_found_by_its_size(base: Path) -> None:
    rows = rows_asset()
    (path,) = place(rows.asset, [quiz(0, 30)])
    path.write_bytes(path.read_bytes()[:-10])
    assert "00000.parquet has" in str(problem_with(rows.asset))
    with pytest.raises(UserError, match=r"instead of .* prefetch owner/quiz:main:train"):
        require(rows.asset)


def test_a_broken_footer_is_found_without_reading_the_rest(base: Path) -> None:
    rows = rows_asset()
    (path,) = place(rows.asset, [quiz(0, 30)])
    data = path.read_bytes()
    path.write_bytes(data[:-8] + b"\0" * 8)
    assert "is damaged" in str(problem_with(rows.asset))


def test_a_changed_byte_in_the_middle_is_found_when_all_is_read(base: Path) -> None:
    rows = rows_asset()
    (path,) = place(rows.asset, [quiz(0, 30)])
    data = bytearray(path.read_bytes())
    data[20] ^= 1
    path.write_bytes(data)
    assert problem_with(rows.asset) is None
    assert "SHA-256" in str(problem_with(rows.asset, verify=True))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", b"[1]\nnot json\n", "line 2"),
        ("a.jsonl", b"\n", "empty"),
        ("a.json", b"{", "not JSON"),
        ("a.txt", b"<!DOCTYPE html><html>", "web page"),
        ("a.parquet", b"PAR1 and nothing else", "footer"),
    ],
)
def test_content_that_is_not_what_the_name_says_is_refused(
    tmp_path: Path, name: str, content: bytes, reason: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(assets.DamagedError, match=reason):
        assets.count_rows(path)


def test_a_single_file_keeps_its_manifest_beside_it(base: Path) -> None:
    asset = Asset("words", "words.txt", Url("https://example.com/words.txt"))
    base.mkdir()
    asset.path.write_text("apple\npear\n")
    assets.write_manifest(asset, Manifest((record_file(asset.folder, asset.path),)))
    assert asset.manifest_path == base / ".manifests/words.txt.json"
    assert json.loads(asset.manifest_path.read_text())["rows"] == 2
    assert assets.files_of(asset) == [base / "words.txt"]


class Quiz(Task):
    """A task as they are written: the rows are declared, and read when they are asked for."""

    name = "quiz"

    def __init__(self) -> None:
        super().__init__()
        self.rows = rows_asset()

    def assets(self) -> tuple[Asset, ...]:
        return (self.rows.asset,)

    def num_rows(self) -> int:
        return len(self.rows)


def test_a_mixture_names_what_it_reads_before_anything_is_there(base: Path) -> None:
    mixture = TaskMixture([Quiz(), Quiz()])
    assert [asset.name for asset in mixture.assets()] == ["owner/quiz:main:train"]
    with pytest.raises(UserError, match="prefetch"):
        len(mixture)
