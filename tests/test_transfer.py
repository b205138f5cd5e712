"""Files over HTTP: whatever a server does, the file is whole or there is a sentence about it."""

import email.utils
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanochat.transfer import Patience, StoppedError, Transfer, TransferError, part_path
from tests.fake_hub import FakeHub, Fault, running

CONTENT = os.urandom(300_000)
RESOLVE = "/datasets/owner/data/resolve/main/file.bin"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    hub = FakeHub(tmp_path / "hub")
    hub.add("owner/data/file.bin", CONTENT)
    with running(hub) as started:
        yield started


class Download:
    """A transfer to a folder that notes how long it was made to wait, and does not wait."""

    def __init__(self, hub: FakeHub, folder: Path) -> None:
        self.hub, self.target = hub, folder / "file.bin"
        self.waits: list[float] = []
        self.num_bytes = 0
        patience = Patience(connect_seconds=2.0, read_seconds=0.2)
        self.transfer = Transfer(patience, on_bytes=self.count, wait=self.waits.append)

    def count(self, count: int) -> None:
        self.num_bytes += count

    def run(self, path: str = RESOLVE, **options: object) -> bytes:
        self.transfer.download(self.hub.url + path, self.target, **options)  # type: ignore[arg-type]
        return self.target.read_bytes()


@pytest.fixture
def download(hub: FakeHub, tmp_path: Path) -> Download:
    return Download(hub, tmp_path / "here")


def test_a_file_arrives_whole_and_leaves_nothing_beside_it(download: Download) -> None:
    assert download.run() == CONTENT
    assert [path.name for path in download.target.parent.iterdir()] == ["file.bin"]
    assert download.num_bytes == len(CONTENT)


@pytest.mark.parametrize("status", [500, 502, 503, 429, 408])
def test_a_passing_error_is_waited_out(download: Download, status: int) -> None:
    download.hub.fail(RESOLVE, Fault(status), Fault(status))
    assert download.run() == CONTENT
    assert download.waits == [1.0, 2.0]


def test_the_server_says_how_long_to_wait(download: Download) -> None:
    download.hub.fail(RESOLVE, Fault(429, {"Retry-After": "7"}))
    assert download.run() == CONTENT
    assert download.waits == [7.0]


def test_the_server_says_until_when_to_wait(download: Download) -> None:
    date = email.utils.formatdate(time.time() + 100, usegmt=True)
    download.hub.fail(RESOLVE, Fault(503, {"Retry-After": date}))
    assert download.run() == CONTENT
    assert download.waits == [pytest.approx(100, abs=5)]


def test_a_wait_of_hours_is_told_and_not_waited(download: Download) -> None:
    download.hub.fail(RESOLVE, Fault(429, {"Retry-After": "7200"}))
    with pytest.raises(TransferError, match="asks to wait 7,200 s"):
        download.run()
    assert download.waits == []


def test_an_error_that_stays_ends_with_its_name(download: Download) -> None:
    download.hub.fail(RESOLVE, *[Fault(503)] * 9)
    with pytest.raises(TransferError, match="HTTP 503"):
        download.run()
    assert len(download.hub.requests) == 5
    assert not download.target.exists()


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (Fault(404), "does not exist"),
        (Fault(401), "set HF_TOKEN if it is private"),
        (Fault(403), "is refused"),
        (Fault(403, {"X-Error-Code": "GatedRepo"}), "accept its terms .* HF_TOKEN"),
        (Fault(400), "HTTP 400"),
    ],
)
def test_a_refusal_is_not_repeated_and_says_what_to_do(
    download: Download, fault: Fault, sentence: str
) -> None:
    download.hub.fail(RESOLVE, fault)
    with pytest.raises(TransferError, match=sentence):
        download.run()
    assert len(download.hub.requests) == 1


def test_a_cut_connection_goes_on_where_it_was_cut(download: Download) -> None:
    download.hub.fail(RESOLVE, Fault(cut_after=150_000))
    assert download.run() == CONTENT
    first, second = download.hub.requests
    assert first.range is None
    start = int(str(second.range).removeprefix("bytes=").removesuffix("-"))
    assert 80_000 <= start <= 150_000
    assert download.num_bytes == len(CONTENT)


def test_a_connection_cut_often_arrives_as_long_as_it_moves(download: Download) -> None:
    download.hub.fail(RESOLVE, *[Fault(cut_after=70_000)] * 20)
    with_progress = download.run()
    assert with_progress == CONTENT
    assert set(download.waits) == {1.0}


def test_a_connection_that_brings_nothing_is_given_up(download: Download) -> None:
    download.hub.fail(RESOLVE, *[Fault(cut_after=0)] * 9)
    with pytest.raises(TransferError, match="cut"):
        download.run()
    assert len(download.hub.requests) == 5


def test_a_silent_server_is_left_and_asked_for_the_rest(download: Download) -> None:
    download.hub.fail(RESOLVE, Fault(stall_after=150_000))
    assert download.run() == CONTENT
    assert download.hub.requests[1].range is not None


def test_a_file_that_changed_meanwhile_is_fetched_from_its_start(download: Download) -> None:
    download.hub.fail(RESOLVE, *[Fault(cut_after=150_000), *[Fault(404)]])
    with pytest.raises(TransferError, match="does not exist"):
        download.run()
    assert part_path(download.target).stat().st_size > 0
    newer = download.hub.add("owner/data/file.bin", os.urandom(200_000))
    assert download.run() == newer
    assert download.num_bytes == len(newer)


def test_a_part_that_is_already_everything_is_fetched_again(download: Download) -> None:
    download.hub.fail(RESOLVE, Fault(cut_after=150_000), Fault(404))
    with pytest.raises(TransferError):
        download.run()
    part_path(download.target).write_bytes(CONTENT + b"more")
    assert download.run() == CONTENT


def test_bytes_that_are_not_the_announced_ones_are_refused(download: Download) -> None:
    wrong = Fault(body=b"x" * len(CONTENT))
    download.hub.fail(RESOLVE, wrong)
    assert download.run() == CONTENT
    download.target.unlink()
    download.hub.fail(RESOLVE, wrong, wrong)
    with pytest.raises(TransferError, match="SHA-256"):
        download.run()
    assert list(download.target.parent.iterdir()) == []


def test_a_wrong_length_is_refused(download: Download) -> None:
    wrong = Fault(body=CONTENT[:-5])
    download.hub.fail(RESOLVE, wrong, wrong)
    with pytest.raises(TransferError, match="299,995 bytes instead of 300,000"):
        download.run()


def test_what_the_caller_knows_of_a_file_counts(download: Download) -> None:
    download.hub.linked = False
    with pytest.raises(TransferError, match="SHA-256"):
        download.run(sha256="0" * 64)
    with pytest.raises(TransferError, match="instead of 5"):
        download.run(num_bytes=5)


def test_a_redirect_is_followed_without_the_token(download: Download, tmp_path: Path) -> None:
    elsewhere = FakeHub(tmp_path / "elsewhere")
    elsewhere.add("blobs/1", CONTENT)
    elsewhere.linked = False
    with running(elsewhere):
        # another name of this machine is another host for the client
        there = elsewhere.url.replace("127.0.0.1", "localhost") + "/blobs/1"
        download.hub.fail(RESOLVE, Fault(redirect_to=there))
        assert download.run(headers={"Authorization": "Bearer secret"}) == CONTENT
    assert download.hub.requests[0].authorization == "Bearer secret"
    assert [request.authorization for request in elsewhere.requests] == [None]


def test_without_an_answer_the_next_file_of_the_host_does_not_wait(tmp_path: Path) -> None:
    hub = FakeHub(tmp_path / "hub")
    with running(hub):
        pass  # its port is closed again
    download = Download(hub, tmp_path / "here")
    for _ in range(2):
        with pytest.raises(
            TransferError, match=r"127\.0\.0\.1:\d+ cannot be reached: no connection"
        ):
            download.run()
        assert download.waits == [1.0, 2.0]


def test_a_host_that_has_answered_before_is_waited_for_longer(tmp_path: Path) -> None:
    hub = FakeHub(tmp_path / "hub")
    hub.add("owner/data/file.bin", CONTENT)
    download = Download(hub, tmp_path / "here")
    with running(hub):
        download.run()
    with pytest.raises(TransferError, match="no connection"):
        download.run()
    assert download.waits == [1.0, 2.0, 4.0, 8.0]


def test_when_the_others_have_stopped_nothing_is_asked(download: Download) -> None:
    download.transfer.stop.set()
    with pytest.raises(StoppedError):
        download.run()
    assert download.hub.requests == []
