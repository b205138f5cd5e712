"""chat_cli in a real terminal and in a pipe, with models that know one answer by heart."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pexpect
import pytest
from scripted_model import byte_tokenizer, save, scripted_model, tokens_of

from nanochat.common import UserError
from nanochat.configurator import UsageError, parse
from nanochat.engine import Engine
from scripts import chat_cli
from scripts.chat_cli import Chat, Config

REPOSITORY = Path(__file__).parents[1]
# What prompt_toolkit sends when it begins to read a line (bracketed paste on).
READY = "\x1b[?2004h"
START, END = "<|assistant_start|>", "<|assistant_end|>"
GREETING = tokens_of(START, "Hey \U0001f642!", END)
COUNTING = tokens_of(START, "It", "<|python_start|>", "6*7", "<|python_end|>")
# What the calculator forces ends with output_end; from there the chain goes on.
COUNTED = tokens_of("<|output_end|>", ".", END)


@pytest.fixture
def base_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "scripts.chat_cli", "--device-type=cpu", *arguments],
        cwd=REPOSITORY,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@pytest.fixture
def terminal(base_dir: Path) -> Iterator[Any]:
    """Starts chat_cli in a terminal of its own."""
    children = []

    def start(*arguments: str) -> pexpect.spawn:
        child = pexpect.spawn(
            sys.executable,
            ["-m", "scripts.chat_cli", "--device-type=cpu", *arguments],
            cwd=str(REPOSITORY),
            env={**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"},
            encoding="utf-8",
            timeout=30,
        )
        children.append(child)
        return child

    yield start
    for child in children:
        child.close(force=True)


# ---- one prompt ----------------------------------------------------------------------------------


def test_a_prompt_prints_the_answer_alone_on_stdout(base_dir: Path) -> None:
    save("sft", scripted_model(GREETING))
    done = run("-p", "Hello?", "-t", "0")
    assert (done.returncode, done.stdout) == (0, "Hey \U0001f642!\n")
    assert "loaded sft model d1, step 7" in done.stderr


def answer_of(*arguments: str) -> None:
    chat_cli.main(parse(Config, ["--device-type=cpu", "-t", "0", *arguments]))


def test_a_tool_call_is_shown_with_its_value_and_without_special_tokens(
    base_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save("sft", scripted_model([*COUNTING, *COUNTED]))
    answer_of("--prompt=6 times 7?")
    assert capsys.readouterr().out == "It[6*7 = 42].\n"


@pytest.mark.parametrize("spelling", ["--max-new-tokens=3", "--max_new_tokens=3", "-m=3"])
def test_max_new_tokens_ends_the_answer(
    base_dir: Path, capsys: pytest.CaptureFixture[str], spelling: str
) -> None:
    save("sft", scripted_model(GREETING))
    answer_of("-p", "Hello?", spelling)
    assert capsys.readouterr().out == "Hey\n"


@pytest.mark.parametrize("stage", ["rl", "mid", "base"])
def test_another_stage_is_taken_with_a_notice(
    base_dir: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    stage: str,
) -> None:
    save(stage, scripted_model(GREETING))
    answer_of("-p", "Hello?")
    assert capsys.readouterr().out == "Hey \U0001f642!\n"
    assert f"no sft model yet (python -m scripts.chat_sft makes one); taking {stage}" in caplog.text


# ---- bad input -----------------------------------------------------------------------------------


def test_without_any_model_the_command_that_makes_one_is_named(base_dir: Path) -> None:
    done = run("-p", "Hello?")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "python -m scripts.chat_sft" in done.stderr


def test_a_stage_that_was_asked_for_is_not_replaced(base_dir: Path) -> None:
    save("mid", scripted_model(GREETING))
    with pytest.raises(UserError, match=r"no sft checkpoint .* mid \(d1\)"):
        answer_of("-p", "Hello?", "-i", "sft")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["-t", "-1"], "temperature is -1.0"),
        (["--top-p=1.5"], "top-p is 1.5"),
        (["-k", "-2"], "top-k is -2"),
        (["--max-new-tokens=0"], "--max-new-tokens is 0"),
        (["-p", "word " * 100], "the prompt has 504 tokens, but the model's context is 64"),
        (["--step=3"], "no step 3"),
        (["-g", "d9"], "no sft model 'd9'"),
    ],
)
def test_bad_settings_end_with_one_sentence(
    base_dir: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    save("sft", scripted_model(GREETING))
    with pytest.raises(UserError, match=re.escape(named)):
        answer_of("-p", "Hello?", *arguments)
    assert capsys.readouterr().out == ""


def test_a_misspelt_flag_names_the_right_one() -> None:
    with pytest.raises(UsageError, match="did you mean --temperature"):
        parse(Config, ["--temprature=1"])


# ---- a conversation ------------------------------------------------------------------------------


def test_a_terminal_session_with_two_turns_clear_and_quit(terminal: Any) -> None:
    save("sft", scripted_model(GREETING))
    child = terminal("-t", "0")
    child.expect_exact('"quit" ends')
    for _ in range(2):
        child.expect_exact(READY)
        child.sendline("Hello?")
        child.expect_exact("Hey \U0001f642!")
    child.expect_exact(READY)
    child.sendline("CLEAR")
    child.expect_exact("starts anew")
    child.expect_exact(READY)
    child.sendline("")
    child.sendline("Quit")
    child.expect_exact("Goodbye.")
    child.expect(pexpect.EOF)
    child.wait()
    assert child.exitstatus == 0


@pytest.mark.parametrize("key", ["\x03", "\x04"])
def test_ctrl_c_and_ctrl_d_say_goodbye(terminal: Any, key: str) -> None:
    save("sft", scripted_model(GREETING))
    child = terminal()
    child.expect_exact(READY)
    child.send(key)
    child.expect_exact("Goodbye.")
    child.expect(pexpect.EOF)
    child.wait()
    assert child.exitstatus == 0


def test_earlier_lines_come_back_with_the_arrow_key(terminal: Any) -> None:
    save("sft", scripted_model(GREETING))
    child = terminal("-t", "0")
    child.expect_exact(READY)
    child.sendline("Hello?")
    child.expect_exact("Hey \U0001f642!")
    child.expect_exact(READY)
    child.send("\x1b[A")
    child.expect_exact("Hello?")
    child.send("\r")
    child.expect_exact("Hey \U0001f642!")


def test_ctrl_c_stops_the_answer_and_not_the_program(terminal: Any) -> None:
    # Two tokens that follow each other for ever, in a context that takes minutes to fill.
    a, b = tokens_of("ab")
    model = scripted_model([*tokens_of(START), a, b], sequence_len=20_000)
    model.lm_head.weight.data[a, b] = 3.0
    save("sft", model)
    child = terminal("-t", "0", "--max-new-tokens=19000")
    child.expect_exact(READY)
    child.sendline("Hello?")
    child.expect_exact("abababababab")
    child.kill(signal.SIGINT)
    child.expect_exact("[stopped]")
    child.expect_exact(READY)
    child.sendline("exit")
    child.expect_exact("Goodbye.")


def test_a_pipe_gives_answers_without_banner_or_prompts(base_dir: Path) -> None:
    save("sft", scripted_model(GREETING))
    done = run("-t", "0", stdin="Hello?\n\nAgain?\n")
    assert done.returncode == 0
    assert done.stdout == "Hey \U0001f642!\nHey \U0001f642!\nGoodbye.\n"


def test_a_question_too_long_is_refused_and_the_chat_goes_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = iter(["word " * 100, "Hello?", "exit"])
    chat_cli.converse(make_chat()[0], lines.__next__)
    output = capsys.readouterr()
    assert output.out == "Hey \U0001f642!\nGoodbye.\n"
    assert "the prompt has" in output.err


# ---- what the model is given ---------------------------------------------------------------------


class Recording(Engine):
    """Remembers its prompts."""

    prompts: list[list[int]]

    def generate(self, tokens: Any, *arguments: Any, **settings: Any) -> Any:
        self.prompts = [*getattr(self, "prompts", []), list(tokens)]
        self.settings = settings
        return super().generate(tokens, *arguments, **settings)


def make_chat(**settings: Any) -> tuple[Chat, Recording]:
    engine = Recording(scripted_model(GREETING), byte_tokenizer())
    return Chat(engine, Config(temperature=0.0, **settings)), engine


def test_turns_are_rendered_as_in_training() -> None:
    chat, engine = make_chat()
    assert "".join(chat.ask("Hi")) == "Hey \U0001f642!"
    assert "".join(chat.ask("Yo")) == "Hey \U0001f642!"
    first = tokens_of("<|bos|>", "<|user_start|>", "Hi", "<|user_end|>", START)
    second = tokens_of("Hey \U0001f642!", END, "<|user_start|>", "Yo", "<|user_end|>", START)
    assert engine.prompts == [first, first + second]


def test_an_answer_that_is_cut_off_is_closed_for_the_next_turn() -> None:
    chat, engine = make_chat(max_new_tokens=2)
    assert "".join(chat.ask("Hi")) == "He"
    list(chat.ask("Yo"))
    second = tokens_of("He", END, "<|user_start|>", "Yo", "<|user_end|>", START)
    assert engine.prompts[1] == engine.prompts[0] + second


def test_the_oldest_exchanges_make_room_in_a_full_context(caplog: Any) -> None:
    chat, engine = make_chat()
    with caplog.at_level("INFO"):
        for word in ("one", "two", "three", "four"):
            assert "".join(chat.ask(word)) == "Hey \U0001f642!"
    assert "forgotten" in caplog.text
    decoded = byte_tokenizer().decode(engine.prompts[-1])
    assert "four" in decoded
    assert "one" not in decoded
    assert decoded.startswith("<|bos|><|user_start|>")


def test_clear_forgets_and_a_refused_question_leaves_no_trace() -> None:
    chat, engine = make_chat()
    list(chat.ask("Hi"))
    with pytest.raises(UserError, match="the prompt has"):
        list(chat.ask("word " * 100))
    list(chat.ask("Hi"))
    assert len(engine.prompts[-1]) > len(engine.prompts[0])
    chat.clear()
    list(chat.ask("Hi"))
    assert engine.prompts[-1] == engine.prompts[0]


def test_every_question_has_a_seed_of_its_own() -> None:
    chat, engine = make_chat(seed=5)
    list(chat.ask("Hi"))
    assert engine.settings["seed"] == 5
    list(chat.ask("Hi"))
    assert engine.settings["seed"] == 6
    assert make_chat()[0].seed != make_chat()[0].seed
