"""The command chat_web as a process: flags, who may come in, SIGTERM, several engines."""

from __future__ import annotations

import asyncio
import os
import queue
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from scripted_model import byte_tokenizer, save, scripted_model, tokens_of
from web_server import (
    END,
    HELLO,
    ScriptedScheduler,
    always,
    events_of,
    service_of,
    serving,
    text_of,
)

from nanochat.common import UserError
from nanochat.configurator import parse
from nanochat.gpt import GPT
from nanochat.sampling import SamplingSettings
from nanochat.serving import worker
from nanochat.serving.assembly import Recipe, load_service
from nanochat.serving.links import SPAWN, Delivery, ProcessLink
from nanochat.serving.pool import Pool
from nanochat.serving.responses import ServerDefaults
from nanochat.serving.service import Service
from nanochat.serving.worker import Worker
from scripts import chat_web
from scripts.chat_web import Config

REPOSITORY = Path(__file__).parents[1]
SECONDS = 120.0
GREETING = tokens_of("<|assistant_start|>", "Hey \U0001f642!", END)
CHAT = "/chat/completions"
GREEDY = {**HELLO, "temperature": 0.0}


@pytest.fixture
def base_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("NANOCHAT_API_KEY", raising=False)
    return tmp_path


def main(*arguments: str) -> None:
    chat_web.main(parse(Config, ["--device-type=cpu", "--port=0", *arguments]))


# ---- flags -------------------------------------------------------------------------------------


def test_flags_have_the_documented_spellings() -> None:
    short = parse(Config, "-n 1 -i mid -t 0.5 -k 20 -m 99 -g d4 -s 7 -p 8001 -d float32".split())
    assert (short.num_gpus, short.source, short.temperature, short.top_k) == (1, "mid", 0.5, 20)
    assert (short.max_tokens, short.model_tag, short.step, short.port) == (99, "d4", 7, 8001)
    assert parse(Config, ["--max-new-tokens=5"]).max_tokens == 5
    assert parse(Config, []).host == "127.0.0.1"


@pytest.mark.parametrize(
    ("argument", "reason"),
    [
        ("--temperature=3", "--temperature is 3.0; use a number from 0.0 to 2.0"),
        ("--top-k=500", "--top-k is 500"),
        ("--max-tokens=0", "--max-tokens is 0"),
        ("--port=70000", "--port is 70000"),
        ("--num-gpus=2", "needs CUDA"),
        ("--num-gpus=0", "use at least 1"),
        ("--model-tag=d9", "no sft model 'd9'"),
        ("--dtype=x", "'x'; use one of bfloat16, float16, float32, int8"),
        ("--host=0.0.0.0", "--host=0.0.0.0 lets other machines in"),
        ("--host=192.0.2.7", "or --insecure"),
        ("--api-key-file=/nowhere", "--api-key-file=/nowhere: No such file or directory"),
    ],
)
def test_wrong_flags_are_explained(base_dir: Path, argument: str, reason: str) -> None:
    save("sft", scripted_model(GREETING))
    with pytest.raises(UserError, match=re.escape(reason)):
        main(argument)


def test_a_missing_model_is_explained_with_the_command_that_makes_it(base_dir: Path) -> None:
    with pytest.raises(UserError, match=r"make one with `python -m scripts\.chat_sft`"):
        main()


def test_a_port_in_use_is_explained(base_dir: Path) -> None:
    save("sft", scripted_model(GREETING))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"port {port} \([^()]+\); choose another --port"):
            main(f"--port={port}")


@pytest.mark.parametrize(
    "host", ["a..b", "x" * 80, "no.such.host.invalid", "192.0.2.7"], ids=lambda host: host[:5]
)
def test_a_host_that_is_none_of_ours_is_explained(base_dir: Path, host: str) -> None:
    save("sft", scripted_model(GREETING))
    reason = rf"cannot listen on {re.escape(host)} port 0 \([^()]+\); choose another --host$"
    with pytest.raises(UserError, match=reason):
        main("--insecure", f"--host={host}")


def test_a_key_is_read_from_a_file_or_the_environment(
    base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = base_dir / "key"
    file.write_text("from-file\nsecond line\n")
    assert chat_web._api_key(Config()) is None
    monkeypatch.setenv("NANOCHAT_API_KEY", "from-environment")
    assert chat_web._api_key(Config()) == "from-environment"
    assert chat_web._api_key(Config(api_key_file=str(file))) == "from-file"
    file.write_text("")
    with pytest.raises(UserError, match="is empty"):
        chat_web._api_key(Config(api_key_file=str(file)))


# ---- the process -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("login_node", "expected"),
    [
        (None, "ssh -L 8001:localhost:8001 me@node7"),
        ("node7", "ssh -L 8001:localhost:8001 me@node7"),
        ("login2", "ssh -L 8001:localhost:8001 -J me@login2 me@node7"),
    ],
)
def test_the_tunnel_of_a_job_goes_through_the_login_node(
    monkeypatch: pytest.MonkeyPatch, login_node: str | None, expected: str
) -> None:
    monkeypatch.setattr(chat_web.socket, "gethostname", lambda: "node7")
    monkeypatch.setattr(chat_web.getpass, "getuser", lambda: "me")
    monkeypatch.delenv("SLURM_SUBMIT_HOST", raising=False)
    if login_node:
        monkeypatch.setenv("SLURM_SUBMIT_HOST", login_node)
    assert chat_web._tunnel(8001) == expected


@pytest.fixture
def process(base_dir: Path) -> Iterator[Any]:
    """Starts chat_web; returns the process and its address, once it serves."""
    children = []

    def start(*arguments: str) -> tuple[subprocess.Popen[str], str]:
        child = subprocess.Popen(
            [sys.executable, "-m", "scripts.chat_web", "--device-type=cpu", "--port=0", *arguments],
            cwd=REPOSITORY,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        # A log that says nothing more comes to its end then: a test fails instead of waiting.
        watch = threading.Timer(SECONDS, child.kill)
        watch.start()
        children.append((child, watch))
        assert child.stderr is not None
        for line in child.stderr:
            if "serving at " in line:
                return child, line.split("serving at ")[1].strip()
        raise AssertionError("chat_web ended")

    yield start
    for child, watch in children:
        watch.cancel()
        child.kill()
        child.communicate()


@pytest.mark.parametrize("to_all", [False, True], ids=["server", "group"])
def test_it_drains_on_sigterm_and_serves_from_memory(
    base_dir: Path, process: Any, to_all: bool
) -> None:
    folder = save("mid", scripted_model(GREETING))
    child, address = process()
    assert httpx.get(f"{address}/health").json()["model"]["id"] == "nanochat-d1-mid"
    shutil.rmtree(folder)  # a checkpoint that is deleted while it is served
    assert text_of(httpx.post(address + CHAT, json=GREEDY)) == "Hey \U0001f642!"
    body = {**HELLO, "temperature": 2.0, "max_tokens": 50, "top_k": 200}
    with httpx.stream("POST", address + CHAT, json=body, timeout=30) as response:
        lines = response.iter_lines()
        first = next(lines)
        # As `timeout` and job schedulers do it, the signal goes to the engine, too.
        (os.killpg if to_all else os.kill)(child.pid, signal.SIGTERM)
        rest = list(lines)
    assert "prompt_tokens" in first
    assert '"done":true' in rest[-2]
    assert child.wait(timeout=30) == 0


def test_an_engine_ends_with_its_server_however_that_ends(base_dir: Path, process: Any) -> None:
    save("sft", scripted_model(GREETING))
    child, _ = process()
    engine = psutil.Process(engine_of(child.pid))
    engine.terminate()
    with pytest.raises(psutil.TimeoutExpired):
        engine.wait(0.5)
    child.kill()
    assert psutil.wait_procs([engine], timeout=30)[1] == []


def test_a_port_in_use_ends_the_engine_as_well(base_dir: Path) -> None:
    save("sft", scripted_model(GREETING))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        flag = f"--port={taken.getsockname()[1]}"
        command = [sys.executable, "-m", "scripts.chat_web", "--device-type=cpu", flag]
        # Not before all have ended who hold the other end of its pipes.
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, timeout=60, check=False)
    assert done.returncode == 1
    assert b"choose another --port" in done.stderr


# ---- several engines ---------------------------------------------------------------------------


def engines(number: int) -> Service:
    """A service of processes with the model of the base folder, on the CPU."""
    workers = [
        Worker(
            ProcessLink(Recipe("sft", "d1", 7, "cpu", torch.float32, 4)),
            gpu_id=gpu_id,
            device=f"cpu:{gpu_id}",
            max_rows=4,
            max_waiting=4,
        )
        for gpu_id in range(number)
    ]
    service = service_of(lambda: ScriptedScheduler(always("")))
    service.pool = Pool(workers)
    return service


@pytest.mark.slow
def test_two_processes_answer_behind_one_port_and_one_may_die(base_dir: Path) -> None:
    save("sft", scripted_model(GREETING))
    service = engines(2)
    with serving(service) as address, httpx.Client(base_url=address, timeout=60) as client:
        assert client.get("/health").json()["num_gpus"] == 2
        used: list[int] = []

        def ask() -> None:
            response = client.post(CHAT, json={**GREEDY, "logprobs": 1})
            assert text_of(response) == "Hey \U0001f642!"
            used.append(events_of(response)[0]["gpu"])

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert set(used) == {0, 1}
        assert len(used) == 8
        # No "broken pipe" reaches the clients of the other one.
        link = service.pool.workers[0]._link
        assert isinstance(link, ProcessLink)
        kill(link._process.pid)
        for _ in range(50):
            client.post(CHAT, json=GREEDY)
            if client.get("/stats").json()["workers"][0]["deaths"] == 1:
                break
        assert client.get("/stats").json()["workers"][0]["deaths"] == 1
        assert text_of(client.post(CHAT, json=GREEDY)) == "Hey \U0001f642!"
        assert client.get("/health").json()["ready"] is True


def kill(pid: int | None) -> None:
    """End a process as the system does when memory runs out, and wait until it is gone."""
    assert pid is not None
    process = psutil.Process(pid)
    process.kill()
    psutil.wait_procs([process], timeout=30)


def engine_of(server_pid: int) -> int:
    """The engine's process below a server's."""
    (engine,) = [
        child
        for child in psutil.Process(server_pid).children()
        if "spawn_main" in " ".join(child.cmdline())
    ]
    return engine.pid


def log_until(lines: Iterator[str], words: str) -> str:
    """The log's next line with these words."""
    return next(line for line in lines if words in line)


def test_an_engine_that_is_killed_is_started_again_and_503_is_said_meanwhile(
    base_dir: Path, process: Any
) -> None:
    save("sft", scripted_model(GREETING))
    child, address = process()
    kill(engine_of(child.pid))
    assert "died (by SIGKILL); it is started again" in log_until(child.stderr, "died")
    refused = httpx.post(address + CHAT, json=GREEDY)
    assert refused.status_code == 503
    assert "started again" in refused.json()["error"]["message"]
    assert int(refused.headers["retry-after"]) > 0
    assert httpx.get(f"{address}/health").json()["ready"] is False
    assert "is back after" in log_until(child.stderr, "is back")
    assert text_of(httpx.post(address + CHAT, json=GREEDY)) == "Hey \U0001f642!"


def test_an_engine_that_ends_before_it_is_listened_to_is_lost_as_any_other(base_dir: Path) -> None:
    save("sft", scripted_model(GREETING))
    link = ProcessLink(Recipe("sft", "d1", 7, "cpu", torch.float32, 4))
    link.wait()
    link._process.kill()
    link._process.join()
    told: queue.Queue[str] = queue.Queue()
    link.start(lambda _: None, told.put)
    assert told.get(timeout=SECONDS) == "by SIGKILL"


def test_an_engine_process_is_told_which_sample_of_a_seed_is_asked_for(base_dir: Path) -> None:
    save("sft", scripted_model(()))  # has learned nothing: all tokens are about as likely
    link = ProcessLink(Recipe("sft", "d1", 7, "cpu", torch.float32, 4))
    told: queue.Queue[Delivery] = queue.Queue()
    link.start(told.put, lambda how: None)
    prompt = tokens_of("<|bos|>", "Hey")
    settings = SamplingSettings(temperature=1.0, seed=5, max_tokens=12)
    for number, sample in enumerate((0, 0, 1)):
        link.send(("submit", number, prompt, settings, sample))
    answers: dict[int, list[Any]] = {0: [], 1: [], 2: []}
    while not all(answer and answer[-1].finish for answer in answers.values()):
        for number, token in told.get(timeout=SECONDS):
            answers[number].append(token)
    link.stop()
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.slow
def test_an_engine_that_is_killed_again_and_again_ends_the_server(
    base_dir: Path, process: Any
) -> None:
    save("sft", scripted_model(GREETING))
    child, _ = process()
    for _ in range(worker.MAX_DEATHS - 1):
        kill(engine_of(child.pid))
        log_until(child.stderr, "is back")
    kill(engine_of(child.pid))
    rest = list(child.stderr)
    assert any("is not started again" in line for line in rest)
    assert "no engine could be kept alive" in rest[-1]
    assert child.wait(timeout=30) == 1


class MortalLink:
    """An engine that dies when it is told to, and starts as often as `starts` says."""

    def __init__(self, starts: int, trouble: Exception | None = None) -> None:
        self.starts = starts
        self.trouble = trouble or UserError("no sft model")
        self.num_tries = 0

    def start(self, deliver: Any, lost: Any) -> None:
        self.num_tries += 1
        if self.starts == 0:
            raise self.trouble
        self.starts -= 1
        self.lost = lost

    def send(self, command: Any) -> None:
        self.command = command

    def stop(self) -> None:
        self.lost("told to")


def dying(worker_: Worker, *, times: int) -> list[bool]:
    """Let an engine die several times; whether it was alive after each."""

    async def run() -> list[bool]:
        worker_.start()
        seen = []
        for _ in range(times):
            worker_._link.lost("by SIGKILL")  # type: ignore[attr-defined]
            while worker_._revival is None and not worker_.is_given_up:
                await asyncio.sleep(0)
            while worker_._revival is not None and not worker_.is_given_up:
                revival, worker_._revival = worker_._revival, None
                await revival
            seen.append(worker_.is_alive)
        return seen

    return asyncio.run(run())


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What a worker slept, without sleeping."""
    slept: list[float] = []
    sleep = asyncio.sleep

    async def note(seconds: float) -> None:
        if seconds:
            slept.append(seconds)
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", note)
    return slept


@pytest.mark.parametrize(
    ("starts", "alive", "num_deaths", "num_pauses"),
    [
        (100, [True] * (worker.MAX_DEATHS - 1) + [False], worker.MAX_DEATHS, 0),
        (1, [False], 1, len(worker.LOAD_PAUSES)),  # it never comes back
    ],
)
@pytest.mark.parametrize("trouble", [UserError("no sft model"), OSError(12, "no memory")])
def test_an_engine_that_dies_too_often_is_given_up(
    starts: int,
    alive: list[bool],
    num_deaths: int,
    num_pauses: int,
    trouble: Exception,
    pauses: list[float],
    caplog: pytest.LogCaptureFixture,
) -> None:
    link = MortalLink(starts, trouble)
    one = Worker(link, gpu_id=0, device="cpu", max_rows=1, max_waiting=1)
    pool = Pool([one])
    ended: list[bool] = []
    pool.hopeless = lambda: ended.append(True)
    assert dying(one, times=len(alive)) == alive
    assert one.is_given_up
    assert ended == [True]
    assert one.num_deaths == num_deaths
    assert pauses == list(worker.LOAD_PAUSES)[:num_pauses]
    assert "it is not started again" in caplog.text


def test_an_engine_comes_back_when_what_was_short_is_there_again(
    pauses: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    class ShortOfMemory(MortalLink):
        def start(self, deliver: Any, lost: Any) -> None:
            if self.num_tries in (1, 2):
                self.num_tries += 1
                raise self.trouble
            super().start(deliver, lost)

    link = ShortOfMemory(100, BlockingIOError(11, "Resource temporarily unavailable"))
    one = Worker(link, gpu_id=0, device="cpu", max_rows=1, max_waiting=1)
    assert dying(one, times=1) == [True]
    assert not one.is_given_up
    assert pauses == list(worker.LOAD_PAUSES)[:2]
    assert "Resource temporarily unavailable); next try in 1 seconds" in caplog.text


def test_an_engine_that_is_stopped_is_not_tried_again(pauses: list[float]) -> None:
    class StoppedMeanwhile(MortalLink):
        def start(self, deliver: Any, lost: Any) -> None:
            if self.starts == 0:
                one.stop()
            super().start(deliver, lost)

    link = StoppedMeanwhile(1)
    one = Worker(link, gpu_id=0, device="cpu", max_rows=1, max_waiting=1)

    async def run() -> None:
        one.start()
        one._lost("by SIGKILL")
        assert one._revival is not None
        await one._revival

    asyncio.run(run())
    assert (one.is_alive, one.is_given_up, link.num_tries) == (False, False, 2)


def test_a_process_that_could_not_be_made_is_made_at_the_next_try(
    base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save("sft", scripted_model(GREETING))
    link = ProcessLink(Recipe("sft", "d1", 7, "cpu", torch.float32, 4))
    link.wait()
    told: queue.Queue[str] = queue.Queue()
    link.start(lambda _: None, told.put)
    link._process.kill()
    assert told.get(timeout=SECONDS) == "by SIGKILL"
    with monkeypatch.context() as patch:

        def fail(self: Any) -> None:
            raise BlockingIOError(11, "Resource temporarily unavailable")

        patch.setattr(SPAWN.Process, "start", fail)
        for _ in range(2):
            with pytest.raises(BlockingIOError):
                link.start(lambda _: None, told.put)
    link.start(lambda _: None, told.put)
    assert link._process.is_alive()
    link.stop()


def test_an_engine_that_dies_now_and_then_is_started_again_each_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(worker, "DEATHS_SECONDS", 0.0)
    one = Worker(MortalLink(100), gpu_id=0, device="cpu", max_rows=1, max_waiting=1)
    assert dying(one, times=9) == [True] * 9


def test_an_engine_process_that_cannot_load_its_model_is_an_error(base_dir: Path) -> None:
    link = ProcessLink(Recipe("sft", "d1", 7, "cpu", torch.float32, 4))
    with pytest.raises(UserError, match="no sft checkpoint"):
        link.wait()


def test_int8_weights_that_are_not_possible_are_refused_before_serving(base_dir: Path) -> None:
    config = replace(scripted_model(GREETING).config, n_head=1, n_kv_head=1, n_embd=1024)
    save("sft", GPT(config))
    with pytest.raises(UserError, match="int8 weights need the compiled decoder"):
        main("--dtype=int8")


def test_a_service_of_a_checkpoint_knows_what_it_serves(base_dir: Path) -> None:
    save("rl", scripted_model(GREETING))
    service = load_service(
        "rl",
        tag=None,
        step=None,
        device_type="cpu",
        dtype="float32",
        num_gpus=1,
        defaults=ServerDefaults(temperature=0.5, top_k=None, top_p=0.9, max_tokens=9),
    )
    info = service.model
    assert (info.id, info.step, info.context, info.dtype) == ("nanochat-d1-rl", 7, 64, "float32")
    assert info.vocab_size == byte_tokenizer().vocab_size
    assert info.num_parameters > 100_000
    with serving(service) as address:
        response = httpx.post(address + CHAT, json={**GREEDY, "max_tokens": 50})
    assert text_of(response) == "Hey \U0001f642!"
