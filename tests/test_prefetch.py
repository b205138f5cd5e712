"""Fetching, checking and listing what the stages read, from a hub on this machine."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pexpect
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat import prefetch
from nanochat.assets import Asset, HubSplit, Url, ZipUrl, hub_split, problem_with, read_manifest
from nanochat.common import UserError, base_dir
from nanochat.hub import select_split
from nanochat.prefetch import Outcome
from nanochat.sources.hub_rows import HubRows
from nanochat.transfer import Patience, Transfer
from scripts import assets as command
from scripts.assets import Config
from tasks import mixtures, public
from tasks.common import Task
from tasks.customjson import IDENTITY, CustomJSON
from tasks.needs import needs
from tests.fake_hub import FakeHub, Fault, running

REPOSITORY = Path(__file__).parents[1]
COMMIT = "a" * 40


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for variable in ("NANOCHAT_OFFLINE", "HF_HUB_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path / "base"


@pytest.fixture
def hub(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub, and a mirror of everything else."""
    fake = FakeHub(tmp_path / "hub")
    with running(fake):
        monkeypatch.setenv("HF_ENDPOINT", fake.url)
        monkeypatch.setenv("NANOCHAT_ASSETS_MIRROR", f"{fake.url}/mirror")
        impatient = Transfer(Patience(backoff_seconds=0.0, read_seconds=1.0))
        monkeypatch.setattr(prefetch, "Transfer", lambda: replace(impatient))
        yield fake


def parquet(start: int, stop: int) -> bytes:
    buffer = io.BytesIO()
    rows = [{"question": f"question {i}", "answer": i} for i in range(start, stop)]
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


QUIZ = hub_split("owner/quiz", "main", "train", license_name="MIT")
WORDS = Asset("words", "words.txt", Url("https://example.com/lists/words.txt"))


def add_quiz(fake: FakeHub) -> None:
    fake.add("owner/quiz/README.md", b"about it")
    for number in range(3):
        content = parquet(100 * number, 100 * number + 100)
        fake.add(f"owner/quiz/main/train-{number:05d}-of-00003.parquet", content)
    fake.add("owner/quiz/main/test-00000-of-00001.parquet", parquet(0, 5))


def fetch(*assets: Asset, **options: bool) -> list[Outcome]:
    return prefetch.prefetch(assets, num_workers=2, **options)


def problem(*assets: Asset, **options: bool) -> str:
    (outcome,) = fetch(*assets, **options)
    return str(outcome.problem)


# ---- one asset --------------------------------------------------------------------------------


def test_a_split_arrives_with_a_manifest_and_is_not_fetched_twice(hub: FakeHub) -> None:
    add_quiz(hub)
    (outcome,) = fetch(QUIZ)
    assert (outcome.action, outcome.problem) == ("fetched", None)
    assert [path.name for path in sorted(QUIZ.path.glob("*.parquet"))] == [
        "00000.parquet",
        "00001.parquet",
        "00002.parquet",
    ]
    manifest = read_manifest(QUIZ)
    assert manifest is not None
    assert (manifest.rows, manifest.revision) == (300, COMMIT)
    rows = HubRows("owner/quiz", "main", "train", license_name="MIT")
    assert sorted(row["answer"] for row in rows) == list(range(300))
    hub.requests.clear()
    assert fetch(QUIZ)[0].action == "already there"
    assert hub.requests == []


def test_files_are_those_of_one_commit(hub: FakeHub) -> None:
    add_quiz(hub)
    fetch(QUIZ)
    resolved = [request.path for request in hub.requests if "/resolve/" in request.path]
    assert len(resolved) == 3
    assert all(f"/resolve/{COMMIT}/" in path for path in resolved)


def test_only_the_damaged_file_of_a_split_is_fetched_again(hub: FakeHub) -> None:
    add_quiz(hub)
    fetch(QUIZ)
    path = QUIZ.path / "00001.parquet"
    path.write_bytes(path.read_bytes()[:-5])
    hub.requests.clear()
    assert fetch(QUIZ)[0].action == "fetched"
    assert [r.path.rpartition("/")[2] for r in hub.requests if "resolve" in r.path] == [
        "train-00001-of-00003.parquet"
    ]
    assert problem_with(QUIZ, verify=True) is None


@pytest.mark.parametrize(
    ("config", "split", "expected"),
    [
        (
            "main",
            "train",
            ["main/train-00000-of-00002.parquet", "main/train-00001-of-00002.parquet"],
        ),
        ("main", "test", ["main/test-00000-of-00001-0123abcd.parquet"]),
        ("default", "train", ["data/train-00000-of-00001.parquet"]),
        ("export", "test", ["export/test/0000.parquet"]),
        ("main", "tra", []),
    ],
)
def test_the_files_of_a_split_are_known_by_the_rules_of_the_hub(
    config: str, split: str, expected: list[str]
) -> None:
    paths = [
        "main/train-00001-of-00002.parquet",
        "main/train-00000-of-00002.parquet",
        "main/test-00000-of-00001-0123abcd.parquet",
        "data/train-00000-of-00001.parquet",
        "export/test/0000.parquet",
        "main/train-extra.txt",
    ]
    assert select_split(paths, config, split) == expected


def test_a_split_that_does_not_exist_is_told_with_what_there_is(hub: FakeHub) -> None:
    add_quiz(hub)
    wrong = hub_split("owner/quiz", "main", "validation", license_name="MIT")
    assert "it has main/test-00000-of-00001.parquet" in problem(wrong)


def test_a_repository_that_does_not_exist_is_told(hub: FakeHub) -> None:
    assert "does not exist" in problem(QUIZ)


def test_a_gated_repository_is_told_with_what_to_do(hub: FakeHub) -> None:
    add_quiz(hub)
    hub.gated.add("owner/quiz")
    assert "accept its terms" in problem(QUIZ)


def test_faults_while_listing_are_waited_out(hub: FakeHub) -> None:
    add_quiz(hub)
    path = "/api/datasets/owner/quiz/revision/main"
    hub.fail(path, Fault(500), Fault(429, {"Retry-After": "0"}))
    assert fetch(QUIZ)[0].problem is None
    assert len(hub.asked(path)) == 3


def test_a_web_page_instead_of_a_list_is_told(hub: FakeHub) -> None:
    hub.add("mirror/words.txt", b"<html>please log in</html>")
    assert "web page" in problem(WORDS)
    assert not WORDS.path.exists()
    hub.add("mirror/words.txt", b"apple\npear\n")
    assert fetch(WORDS)[0].action == "fetched"


def test_a_published_hash_is_insisted_on(hub: FakeHub) -> None:
    hub.add("mirror/words.txt", b"apple\npear\n")
    strict = replace(WORDS, source=Url("https://example.com/words.txt", "0" * 64))
    assert "SHA-256" in problem(strict)


def zip_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in files.items():
            file.writestr(name, content)
    return buffer.getvalue()


BUNDLE = Asset("bundle", "bundle", ZipUrl("https://example.com/bundle.zip", "bundle"))


def test_a_zip_is_unpacked_into_its_place(hub: FakeHub) -> None:
    hub.add("mirror/bundle.zip", zip_of({"bundle/a.jsonl": b"{}\n", "bundle/deep/b.csv": b"x\n"}))
    assert fetch(BUNDLE)[0].problem is None
    assert (BUNDLE.path / "deep/b.csv").read_bytes() == b"x\n"
    manifest = read_manifest(BUNDLE)
    assert manifest is not None
    assert [record.path for record in manifest.files] == ["a.jsonl", "deep/b.csv"]
    assert [p.name for p in BUNDLE.path.parent.iterdir() if "bundle" in p.name] == ["bundle"]
    assert fetch(BUNDLE)[0].action == "already there"
    assert len(hub.requests) == 1


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"not a zip", "is not a zip"),
        (zip_of({"other/a.txt": b"x"}), "has no folder 'bundle'"),
        (zip_of({"bundle/a.jsonl": b"{\n"}), "line 1 is not JSON"),
    ],
)
def test_a_zip_that_is_not_the_expected_one_is_refused(
    hub: FakeHub, content: bytes, reason: str
) -> None:
    hub.add("mirror/bundle.zip", content)
    assert reason in problem(BUNDLE)
    assert problem_with(BUNDLE) is not None


def test_a_file_put_into_the_default_folder_is_found(base: Path, tmp_path: Path) -> None:
    default = tmp_path / "home/.cache/nanochat"
    default.mkdir(parents=True)
    (default / "words.txt").write_text("apple\n")
    assert fetch(WORDS, offline=True)[0].action == "taken over"
    assert WORDS.path.read_text() == "apple\n"


def test_a_folder_that_was_copied_is_taken_over_only_offline(hub: FakeHub) -> None:
    add_quiz(hub)
    fetch(QUIZ)
    QUIZ.manifest_path.unlink()
    assert fetch(QUIZ, offline=True)[0].action == "taken over"
    QUIZ.manifest_path.unlink()
    (QUIZ.path / "00002.parquet").unlink()
    assert fetch(QUIZ)[0].action == "fetched"
    manifest = read_manifest(QUIZ)
    assert manifest is not None
    assert manifest.rows == 300


def test_one_failure_does_not_keep_the_others(hub: FakeHub) -> None:
    add_quiz(hub)
    outcomes = fetch(WORDS, QUIZ)
    assert [outcome.problem is None for outcome in outcomes] == [False, True]


def test_a_full_disk_stops_all_with_one_sentence(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_quiz(hub)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "No space left on device while writing" in problem(QUIZ)


def test_a_killed_fetch_goes_on_where_it_was(hub: FakeHub, base: Path) -> None:
    content = b"\n".join(b"word %d" % i for i in range(60_000))
    hub.add("mirror/words_alpha.txt", content)
    hub.fail("/mirror/words_alpha.txt", Fault(stall_after=400_000))
    words = [sys.executable, "-m", "scripts.assets", "prefetch", "words"]
    first = subprocess.Popen(words, cwd=REPOSITORY, stderr=subprocess.DEVNULL)
    part = base / ".words_alpha.txt.part"
    try:
        _wait_until(lambda: part.exists() and part.stat().st_size > 200_000)
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert not (base / "words_alpha.txt").exists()
    second = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert second.returncode == 0, second.stderr
    assert (base / "words_alpha.txt").read_bytes() == content
    rest = str(hub.asked("/mirror/words_alpha.txt")[1].range)
    assert int(rest.removeprefix("bytes=").removesuffix("-")) > 200_000


def test_on_a_terminal_a_bar_shows_how_far_it_is(hub: FakeHub) -> None:
    hub.add("mirror/words_alpha.txt", b"apple\npear\n")
    words = ["-m", "scripts.assets", "prefetch", "words"]
    terminal = pexpect.spawn(
        sys.executable, words, cwd=REPOSITORY, dimensions=(24, 100), encoding="utf-8", timeout=120
    )
    shown = terminal.read()
    assert "0/1 assets:   0%" in shown
    assert "1/1 assets: 100%" in shown
    assert "\n1 assets in" in shown


def _wait_until(is_true: Callable[[], bool]) -> None:
    pause = threading.Event()
    for _ in range(1200):
        if is_true():
            return
        pause.wait(0.05)
    raise AssertionError("it did not happen within a minute")


# ---- what the stages read ---------------------------------------------------------------------


def names(stage: str, **options: object) -> list[str]:
    chosen: dict[str, object] = {"data": "fineweb-edu", "num_train": 2} | options
    return [asset.name for asset in needs([stage], **chosen)[stage]]  # type: ignore[arg-type]


def test_every_stage_names_what_the_documents_say(base: Path) -> None:
    assert names("base")[:3] == ["fineweb-edu/01822", "fineweb-edu/00000", "fineweb-edu/00001"]
    assert "eval-bundle" in names("base")
    assert "vocabulary/cl100k_base/cl100k_base.tiktoken" in names("tokenizer")
    for name in ("cais/mmlu:all:auxiliary_train", "cais/mmlu:all:test", "identity", "words"):
        assert name in names("mid")
    assert "HuggingFaceTB/smol-smoltalk:default:train" in names("sft")
    assert "allenai/ai2_arc:ARC-Challenge:train" in names("sft")
    for name in ("allenai/ai2_arc:ARC-Challenge:test", "openai/gsm8k:main:test"):
        assert name in names("eval")
    assert any(name.startswith("openai/openai_humaneval") for name in names("eval"))


class Riddles(Task):
    name = "riddles"

    def assets(self) -> tuple[Asset, ...]:
        return (hub_split("owner/riddles", "main", "train", license_name="MIT"),)


def test_a_task_added_to_a_stage_is_in_its_list(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "owner/riddles:main:train" not in names("sft")
    before = public.training_tasks

    def more(stage: str, *others: Any) -> list[Task]:
        return [*before(stage, *others), Riddles()]

    monkeypatch.setattr(mixtures.public, "training_tasks", more)
    assert "owner/riddles:main:train" in names("sft")
    command.main(Config("list", stage="sft", num_files=1))
    assert "owner/riddles:main:train" in capsys.readouterr().out


def test_an_embedded_run_needs_nothing_from_anywhere(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NANOCHAT_OFFLINE", "1")
    assert command.main(Config("check", data="embedded", offline=True)) == 0
    assert names("mid", data="embedded") == []


# ---- the command ------------------------------------------------------------------------------


def test_check_names_what_is_missing_and_the_one_command(base: Path) -> None:
    config = Config("check", stage="rl", num_files=3, offline=True)
    with pytest.raises(UserError) as error:
        command.main(config)
    text = str(error.value)
    assert "openai/gsm8k:main:train (missing)" in text
    assert text.endswith("python -m scripts.assets prefetch --stage rl -n 3")


def test_the_command_that_check_names_mends_it(
    hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "test"):
        hub.add(f"openai/gsm8k/main/{split}-00000-of-00001.parquet", parquet(0, 9))
    with pytest.raises(UserError):
        command.main(Config("check", stage="rl"))
    assert command.main(Config("prefetch", stage="rl")) == 0
    assert "2 fetched" in capsys.readouterr().out
    assert command.main(Config("check", stage="rl", offline=True)) == 0


def test_prefetch_fails_when_something_is_missing(hub: FakeHub) -> None:
    hub.add("openai/gsm8k/main/train-00000-of-00001.parquet", parquet(0, 9))
    with pytest.raises(UserError, match=r"1 of 2 assets are not here: openai/gsm8k:main:test"):
        command.main(Config("prefetch", stage="rl"))


def test_missing_vocabularies_are_a_warning(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert command.main(Config("check", stage="tokenizer", data="embedded")) == 0
    assert "vocabulary/gpt2/encoder.json" in caplog.text


def test_what_may_be_missing_is_a_warning(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UserError, match="openai/gsm8k:main:train"):
        command.main(Config("check", stage="rl", allow_missing="openai/gsm8k:main:test"))
    allowed = "openai/gsm8k:main:test,openai/gsm8k:main:train"
    assert command.main(Config("check", stage="rl", allow_missing=allowed)) == 0
    assert "openai/gsm8k:main:test" in caplog.text


def test_one_asset_is_fetched_by_its_name(hub: FakeHub) -> None:
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "nanochat"}]
    hub.add("mirror/identity_conversations.jsonl", json.dumps(turns).encode() + b"\n")
    assert command.main(Config("prefetch", names=("identity",))) == 0
    assert len(CustomJSON(IDENTITY)) == 1


@pytest.mark.parametrize("offline", [False, True])
def test_conversations_of_ones_own_replace_those_that_were_fetched(
    hub: FakeHub, offline: bool
) -> None:
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "nanochat"}]
    line = json.dumps(turns).encode() + b"\n"
    hub.add("mirror/identity_conversations.jsonl", line)
    assert command.main(Config("prefetch", names=("identity",))) == 0
    IDENTITY.path.write_bytes(line * 3)
    assert command.main(Config("prefetch", names=("identity",), offline=offline)) == 0
    assert len(CustomJSON(IDENTITY)) == 3


def test_a_split_can_be_fetched_though_no_stage_reads_it(hub: FakeHub) -> None:
    add_quiz(hub)
    assert command.main(Config("prefetch", names=("owner/quiz:main:test",))) == 0


def test_a_wrong_name_is_answered_with_the_nearest(base: Path) -> None:
    with pytest.raises(UserError, match="did you mean identity"):
        command.main(Config("check", names=("identty",)))
    with pytest.raises(UserError, match="no stage 'medium'"):
        command.main(Config("check", stage="medium"))


def test_conversations_that_are_required_are_an_error_and_not_empty(base: Path) -> None:
    with pytest.raises(UserError, match="prefetch identity"):
        len(CustomJSON(IDENTITY))


def test_the_list_names_size_rows_state_source_and_license(
    hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "test"):
        hub.add(f"openai/gsm8k/main/{split}-00000-of-00001.parquet", parquet(0, 9))
    command.main(Config("prefetch", stage="rl"))
    capsys.readouterr()
    command.main(Config("list", stage="rl,base", num_files=2))
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "0 of 3 present" in lines["fineweb-edu"]
    total = f"2 of 6 assets, 0.00 of about 0.46 GB, are in {base_dir()}"
    assert " ".join(lines["2"].split()) == total
    for part in ("present", "9 rows", "rl", "Hugging Face hub", "(MIT)"):
        assert part in lines["openai/gsm8k:main:train"]


def test_a_hub_split_says_what_it_is() -> None:
    assert str(HubSplit("a/b", "main", "train")) == "a/b (main, train) of the Hugging Face hub"
