"""chat_cli in a real terminal and in a pipe, with models that know one answer by heart."""

from __future__ import annotations

import json
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

from nanochat import kernels
from nanochat.common import UserError
from nanochat.configurator import UsageError, parse
from nanochat.sampling import SamplingSettings
from nanochat.scheduler import Scheduler
from scripts import chat_cli
from scripts.chat_cli import Chat, Config, answer

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


def test_the_word_none_is_a_question_as_any_other() -> None:
    assert parse(Config, ["-p", "None"]).prompt == "None"
    assert parse(Config, ["--prompt=None"]).prompt == "None"
    assert parse(Config, []).prompt is None


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


def test_a_run_that_was_asked_for_is_taken_at_the_best_stage_that_has_it(
    base_dir: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    save("sft", scripted_model(tokens_of(START, "no", END)), tag="d2")
    save("base", scripted_model(GREETING), tag="d4")
    answer_of("-p", "Hello?", "-g", "d4")
    assert capsys.readouterr().out == "Hey \U0001f642!\n"
    assert (
        "no sft model 'd4' yet (python -m scripts.chat_sft makes one); taking base" in caplog.text
    )


def test_a_stage_whose_only_checkpoint_is_damaged_is_passed_over_with_a_notice(
    base_dir: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    damaged = save("sft", scripted_model(tokens_of(START, "no", END)))
    os.truncate(damaged / "model.safetensors", 20)
    save("mid", scripted_model(GREETING))
    answer_of("-p", "Hello?")
    assert capsys.readouterr().out == "Hey \U0001f642!\n"
    assert f"{damaged} is damaged" in caplog.text
    assert "taking mid instead" in caplog.text
    with pytest.raises(UserError, match="is damaged"):
        answer_of("-p", "Hello?", "-s", "7")
    with pytest.raises(UserError, match="no sound checkpoint"):
        answer_of("-p", "Hello?", "-i", "sft")


def test_where_every_checkpoint_is_damaged_the_best_one_is_named(base_dir: Path) -> None:
    for stage in ("sft", "base"):
        os.truncate(save(stage, scripted_model(GREETING)) / "model.safetensors", 20)
    with pytest.raises(UserError, match=r"no sound checkpoint in .*chatsft_checkpoints"):
        answer_of("-p", "Hello?")


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
        (["-p", "word " * 100], "the last message has 504 tokens, and the answer needs 16"),
        (["--step=3"], "no step 3"),
        (["-d", "x"], "'x'; use one of bfloat16, float16, float32, int8"),
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


@pytest.mark.parametrize("nothing", ["", "  "])
def test_an_empty_prompt_is_refused_and_begins_no_conversation(nothing: str) -> None:
    with pytest.raises(UserError, match="--prompt is empty"):
        answer_of("-p", nothing)


def test_a_misspelt_flag_names_the_right_one() -> None:
    with pytest.raises(UsageError, match="did you mean --temperature"):
        parse(Config, ["--temprature=1"])


# ---- a conversation ------------------------------------------------------------------------------


def test_a_terminal_session_with_two_turns_clear_and_quit(terminal: Any) -> None:
    save("sft", scripted_model(GREETING))
    child = terminal("-t", "0")
    child.expect_exact("/help shows more")
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


class _Gone:
    """Sends Ctrl-C while it is being finalized, where an exception would be lost."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_is_not_lost_when_it_comes_in_a_finalizer(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Endless:
        def ask(self, text: str) -> Iterator[str]:
            for number in range(100):
                if number == 3:
                    _Gone()
                yield "word "

    before = signal.getsignal(signal.SIGINT)
    answer(Endless(), "Hello?")  # type: ignore[arg-type]
    captured = capsys.readouterr()
    assert captured.out == "word " * 4 + "\n"
    assert captured.err == " [stopped]"
    assert signal.getsignal(signal.SIGINT) is before


def save_endless() -> None:
    """A model of two tokens that follow each other for ever; its context takes minutes to fill."""
    a, b = tokens_of("ab")
    model = scripted_model([*tokens_of(START), a, b], sequence_len=20_000)
    model.lm_head.weight.data[a, b] = 3.0
    save("sft", model)


def start_endless(*arguments: str) -> subprocess.Popen[str]:
    """The command with such a model, and pipes."""
    save_endless()
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "scripts.chat_cli", "--device-type=cpu"),
            *("-t", "0", "--max-new-tokens=19000", *arguments),
        ],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_ctrl_c_stops_the_answer_and_not_the_program(terminal: Any) -> None:
    save_endless()
    child = terminal("-t", "0", "--max-new-tokens=19000")
    child.expect_exact(READY)
    child.sendline("Hello?")
    child.expect_exact("abababababab")
    child.kill(signal.SIGINT)
    child.expect_exact("[stopped]")
    child.expect_exact(READY)
    child.sendline("exit")
    child.expect_exact("Goodbye.")


def test_one_prompt_that_is_stopped_with_ctrl_c_ends_with_130(base_dir: Path) -> None:
    process = start_endless("-p", "Hello?")
    with process:
        assert process.stdout is not None
        assert process.stdout.read(4) == "abab"
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert rest.strip("\n").strip("ab") == ""
    assert errors.endswith(" [stopped]")


def test_ctrl_c_ends_questions_from_a_pipe(base_dir: Path) -> None:
    process = start_endless()
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("Hello?\nAgain?\n")
        process.stdin.flush()  # and stays open: the end of the input is not what ends the run
        assert process.stdout.read(4) == "abab"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
        rest, errors = process.communicate()
    assert rest.count("\n") == 1
    assert errors.endswith(" [stopped]")


def test_ctrl_c_ends_a_pipe_that_is_waited_for_and_a_terminal_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> str:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chat_cli.converse(make_chat()[0], interrupted)
    monkeypatch.setattr(chat_cli, "answer", lambda *_: False)
    lines = ("Hello?", "/retry", "Again?", "exit")
    chat, _ = make_chat()
    list(chat.ask("Hi"))
    assert chat_cli.converse(chat, iter(lines).__next__) == 130
    assert chat_cli.converse(chat, iter(lines[1:]).__next__) == 130
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    assert chat_cli.converse(chat, iter(lines[:1] + lines[2:]).__next__) == 0
    assert capsys.readouterr().err == "Goodbye.\n"


def test_a_pipe_gives_answers_without_banner_or_prompts(base_dir: Path) -> None:
    save("sft", scripted_model(GREETING))
    done = run("-t", "0", stdin="Hello?\n\nAgain?\n")
    assert done.returncode == 0
    assert done.stdout == "Hey \U0001f642!\nHey \U0001f642!\n"
    assert done.stderr.endswith("Goodbye.\n")


def test_a_pipe_whose_reader_has_gone_ends_the_chat(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(chat: Chat, text: str) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(chat_cli, "answer", gone)
    with pytest.raises(BrokenPipeError):
        chat_cli.converse(make_chat()[0], iter(["Hello?", "exit"]).__next__)
    assert capsys.readouterr().err == ""


def test_a_question_too_long_is_refused_and_the_chat_goes_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = iter(["word " * 100, "Hello?", "exit"])
    # Whoever counts the answers to a pipe's questions learns that one is missing.
    assert chat_cli.converse(make_chat()[0], lines.__next__) == 1
    output = capsys.readouterr()
    assert output.out == "Hey \U0001f642!\n"
    assert "the last message has 503 tokens" in output.err


# ---- what the model is given ---------------------------------------------------------------------


class Recording(Scheduler):
    """Remembers its prompts and settings."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.prompts: list[list[int]] = []
        self.settings: list[SamplingSettings] = []

    def submit(self, prompt: Any, settings: SamplingSettings, *, sample: int = 0) -> Any:
        self.prompts.append(list(prompt))
        self.settings.append(settings)
        return super().submit(prompt, settings, sample=sample)


def make_chat(chain: list[int] = GREETING, **settings: Any) -> tuple[Chat, Recording]:
    scheduler = Recording(scripted_model(chain), byte_tokenizer())
    return Chat(scheduler, Config(temperature=0.0, **settings)), scheduler


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
    with caplog.at_level("WARNING"):
        for word in ("one", "two", "three", "four"):
            assert "".join(chat.ask(word)) == "Hey \U0001f642!"
    assert caplog.text.count("the oldest 2 messages are left out") == 1
    decoded = byte_tokenizer().decode(engine.prompts[-1])
    assert "four" in decoded
    assert "one" not in decoded
    assert decoded.startswith("<|bos|><|user_start|>")


def test_clear_forgets_and_a_refused_question_leaves_no_trace() -> None:
    chat, engine = make_chat()
    list(chat.ask("Hi"))
    with pytest.raises(UserError, match=r"the last message has 50[0-9] tokens"):
        list(chat.ask("word " * 100))
    list(chat.ask("Hi"))
    assert len(engine.prompts[-1]) > len(engine.prompts[0])
    chat.clear()
    list(chat.ask("Hi"))
    assert engine.prompts[-1] == engine.prompts[0]


def test_every_question_has_a_seed_of_its_own() -> None:
    chat, engine = make_chat(seed=5)
    list(chat.ask("Hi"))
    list(chat.ask("Hi"))
    assert [settings.seed for settings in engine.settings] == [5, 6]
    assert make_chat()[0].seed != make_chat()[0].seed


def test_a_tool_call_is_shown_to_the_model_as_in_training() -> None:
    chat, scheduler = make_chat([*COUNTING, *COUNTED])
    assert "".join(chat.ask("6 times 7?")) == "It[6*7 = 42]."
    list(chat.ask("Yo"))
    call = tokens_of("It", "<|python_start|>", "6*7", "<|python_end|>")
    result = tokens_of("<|output_start|>", "42", "<|output_end|>", ".", END)
    question = tokens_of("<|user_start|>", "Yo", "<|user_end|>", START)
    assert scheduler.prompts[1] == scheduler.prompts[0] + call + result + question


def test_the_system_text_stays_when_the_oldest_turns_go() -> None:
    chat, scheduler = make_chat(system="Be kind", max_new_tokens=8)
    for word in ("one", "two", "three", "four"):
        list(chat.ask(word))
    decoded = byte_tokenizer().decode(scheduler.prompts[-1])
    assert "Be kind\n\n" in decoded
    assert "four" in decoded
    assert "one" not in decoded


# ---- commands ------------------------------------------------------------------------------------


def talk(capsys: pytest.CaptureFixture[str], chat: Chat, *lines: str) -> tuple[str, str]:
    chat_cli.converse(chat, iter([*lines, "/quit"]).__next__)
    output = capsys.readouterr()
    return output.out, output.err.removesuffix("Goodbye.\n")


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = talk(capsys, make_chat()[0], "/help")
    names = [line.split()[0] for line in out.splitlines()]
    assert names == list(chat_cli.COMMANDS)
    assert set(names) >= {"/clear", "/topk", "/topp", "/system", "/retry", "/save", "/quit"}


def test_settings_are_shown_and_changed(capsys: pytest.CaptureFixture[str]) -> None:
    chat, scheduler = make_chat()
    lines = ("/temperature", "/temperature 0.5", "/topk 1", "/topp 0.9", "/topp off", "Hi")
    out, err = talk(capsys, chat, *lines)
    assert out.splitlines()[:5] == [
        "temperature is 0.0",
        "temperature is 0.5",
        "top_k is 1",
        "top_p is 0.9",
        "top_p is off",
    ]
    assert err == ""
    used = scheduler.settings[0]
    assert (used.temperature, used.top_k, used.top_p) == (0.5, 1, None)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("/temperature warm", "'warm' is not a number for temperature"),
        ("/temperature -1", "temperature is -1.0"),
        ("/topk 2.5", "'2.5' is not a number for top_k"),
        ("/topp 3", "top-p is 3.0"),
        ("/retry", "no question to ask again"),
        ("/save", "needs at least one user message"),
        ("/dance", "there is no command /dance; /help lists them"),
        ("/save /nowhere/at/all.json", "needs at least one user message"),
    ],
)
def test_a_command_that_can_not_be_done_is_explained_and_the_chat_goes_on(
    capsys: pytest.CaptureFixture[str], line: str, reason: str
) -> None:
    chat, _ = make_chat()
    out, err = talk(capsys, chat, line, "Hi")
    assert out == "Hey \U0001f642!\n"
    assert err.startswith("error: ")
    assert reason in err


def test_retry_asks_again_with_another_seed_and_clear_keeps_the_system_text(
    capsys: pytest.CaptureFixture[str],
) -> None:
    chat, scheduler = make_chat(seed=1)
    talk(capsys, chat, "/system Be kind", "Hi", "/retry", "/clear", "Hi")
    first, again, cleared = scheduler.prompts
    assert first == again == cleared
    assert "Be kind" in byte_tokenizer().decode(first)
    assert [settings.seed for settings in scheduler.settings] == [1, 2, 3]


def test_a_retry_that_is_refused_keeps_question_and_answer(
    capsys: pytest.CaptureFixture[str],
) -> None:
    chat, scheduler = make_chat()
    lines = ("Hi", f"/system {'word ' * 100}", "/retry", "/system off", "/retry")
    out, err = talk(capsys, chat, *lines)
    assert err.count("error: ") == 1
    assert out.count("Hey \U0001f642!\n") == 2
    assert scheduler.prompts[0] == scheduler.prompts[-1]
    assert [message.text for message in chat.turns] == ["Hi", "Hey \U0001f642!"]


def test_control_characters_of_an_answer_do_not_reach_the_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Clears the screen, one rings, one is a control sequence introducer of 8 bits; \x7f deletes.
    chat, _ = make_chat(tokens_of(START, "a\x1b[2J\tb\x07\r\nc\x9b\x7f", END))
    out, _ = talk(capsys, chat, "Hi")
    assert out == "a\\x1b[2J\tb\\x07\\x0d\nc\\x9b\\x7f\n"
    assert chat.turns[-1].text == "a\x1b[2J\tb\x07\r\nc\x9b\x7f"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("~nosuchuser/x.json", "cannot save to ~nosuchuser/x.json (Could not determine home"),
        ("a\0b.json", "cannot save to 'a\\x00b.json': a file's name has no NUL"),
        ("/proc/x.json", "cannot save to /proc/x.json (No such file or directory); save some"),
        ("x" * 300, f"cannot save to {'x' * 300} (File name too long); save somewhere else"),
        (f"{'x' * 300}/y", f"cannot save to {'x' * 300}/y (File name too long)"),
        ("/tmp", "cannot save to /tmp ("),
    ],
)
def test_a_place_that_cannot_be_saved_to_is_named_and_the_chat_goes_on(
    capsys: pytest.CaptureFixture[str], name: str, reason: str
) -> None:
    out, err = talk(capsys, make_chat()[0], "Hi", f"/save {name}", "Hi")
    assert out.count("Hey \U0001f642!\n") == 2
    assert err.startswith(f"error: {reason}")
    assert err.count("\n") == 1


def test_save_makes_no_folders(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    chat, _ = make_chat()
    _, err = talk(capsys, chat, "Hi", f"/save {tmp_path}/tpyo/talk.json")
    assert err == f"error: there is no folder {tmp_path}/tpyo; make it, or save somewhere else\n"
    assert list(tmp_path.iterdir()) == []


def test_save_writes_the_conversation(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    chat, _ = make_chat(system="Be kind")
    path = tmp_path / "talk.json"
    out, _ = talk(capsys, chat, "Hi", f"/save {path}")
    assert out.endswith(f"saved to {path}\n")
    assert json.loads(path.read_text(encoding="utf-8")) == [
        {"role": "system", "content": "Be kind"},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hey \U0001f642!"},
    ]


def test_bytes_that_are_not_text_are_replaced(base_dir: Path) -> None:
    save("sft", scripted_model(GREETING))
    done = subprocess.run(
        [sys.executable, "-m", "scripts.chat_cli", "--device-type=cpu", "-t", "0"],
        cwd=REPOSITORY,
        input=b"Hi \xff\xfe\n",
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout.decode()) == (0, "Hey \U0001f642!\n")
    chat, _ = make_chat(system="Be kind \udcff")
    assert "".join(chat.ask("Hi \udcff")) == "Hey \U0001f642!"


def test_int8_weights_answer_too(base_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if kernels.load() is None:
        pytest.skip("no compiled decoder")
    save("sft", scripted_model(GREETING))
    answer_of("-p", "Hello?", "--dtype=int8")
    assert capsys.readouterr().out == "Hey \U0001f642!\n"
