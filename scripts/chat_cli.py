"""Talk to a trained model in the terminal.

python -m scripts.chat_cli
python -m scripts.chat_cli -p "What is the capital of France?" --temperature 0.5
"""

from __future__ import annotations

import io
import logging
import secrets
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from nanochat import checkpoint_manager, configurator, runtime
from nanochat.answers import answer_message, terminal_text
from nanochat.chat_prompt import fit_conversation
from nanochat.common import UserError, write_json
from nanochat.conversation import Conversation, Message
from nanochat.decoders import make_decoder
from nanochat.sampling import SamplingSettings, check_settings
from nanochat.scheduler import Scheduler

logger = logging.getLogger(__name__)

BANNER = 'Chat: "clear" starts anew, "quit" ends, /help shows more; Ctrl-C stops an answer.'


STOPPED = 130  # what a shell shows of a program that Ctrl-C has ended
# Where tyro would read the word None as nothing.
_AS_TYPED = tyro.constructors.PrimitiveConstructorSpec[str | None](
    nargs=1,
    metavar="TEXT",
    instance_from_str=lambda words: words[0],
    is_instance=lambda value: value is None or isinstance(value, str),
    str_from_instance=lambda value: [str(value)],
)


@dataclass(frozen=True)
class Config:
    """Flags of chat_cli."""

    source: Annotated[Literal["sft", "rl", "mid", "base"] | None, tyro.conf.arg(aliases=["-i"])] = (
        None
    )
    """Stage of the model; default: sft, or the next best of rl, mid and base that exists."""
    model_tag: Annotated[str | None, tyro.conf.arg(aliases=["-g"])] = None
    """Folder name of the run; default: the one written last."""
    step: Annotated[int | None, tyro.conf.arg(aliases=["-s"])] = None
    """Step of the checkpoint; default: the newest."""
    prompt: Annotated[str | None, tyro.conf.arg(aliases=["-p"]), _AS_TYPED] = None
    """Answer this, print the answer alone, and end."""
    temperature: Annotated[float, tyro.conf.arg(aliases=["-t"])] = 0.6
    """0 = always the likeliest token; higher is more varied."""
    top_k: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 50
    """Sample from the k likeliest tokens; 0 = off."""
    top_p: float | None = None
    """Sample from the fewest tokens that reach this probability together; default: off."""
    max_new_tokens: Annotated[int, tyro.conf.arg(aliases=["-m"])] = 256
    """Longest answer."""
    system: str = ""
    """What the model is told before the conversation."""
    seed: int | None = None
    """Seed of the answers; default: a new one each time."""
    device_type: str = ""
    """cuda, cpu or mps; default: the best there is."""
    dtype: Annotated[str, tyro.conf.arg(aliases=["-d"])] = ""
    """bfloat16, float16, float32, or int8 weights on a CPU; default: bfloat16 where it is fast."""


class Chat:
    """A conversation with a model, and how its answers are written."""

    def __init__(self, scheduler: Scheduler, config: Config) -> None:
        self.scheduler, self.config = scheduler, config
        self.system = _whole_characters(config.system)
        self.turns: tuple[Message, ...] = ()
        self.num_asked = self.num_dropped = 0
        self.seed = secrets.randbits(31) if config.seed is None else config.seed
        self.sampling = SamplingSettings(
            config.temperature, config.top_k, config.top_p, max_tokens=config.max_new_tokens
        )

    def clear(self) -> None:
        """Forget what was said; the system text stays."""
        self.turns, self.num_dropped = (), 0

    def conversation(self) -> Conversation:
        """What was said so far, the system text first. UserError before the first question."""
        system = (Message("system", self.system),) if self.system else ()
        return Conversation((*system, *self.turns))

    def ask(self, text: str) -> Generator[str, None, None]:
        """Yield the answer piece by piece; an answer that is broken off stays as far as it got.

        The model is not shown the oldest messages when the context is too small for all.
        UserError when it is too small for `text` alone; the conversation is then as before.
        """
        text = _whole_characters(text)
        scheduler, before = self.scheduler, self.turns
        context = scheduler.decoder.context
        # Shared context leaves at least this much for the answer.
        reserve = min(self.config.max_new_tokens, context // 4)
        self.turns = (*before, Message("user", text))
        try:
            fitted = fit_conversation(
                scheduler.tokenizer, self.conversation(), context=context, reserve=reserve
            )
            settings = replace(self.sampling, seed=self.seed + self.num_asked)
            request = scheduler.submit(fitted.ids, settings)
        except UserError:
            self.turns = before
            raise
        if fitted.dropped_turns > self.num_dropped:
            logger.warning("%s", fitted.notice)
        self.num_dropped = fitted.dropped_turns
        self.num_asked += 1
        try:
            while not request.is_finished:
                yield "".join(event.text for event in scheduler.step())
        finally:
            scheduler.cancel(request)
            answer = answer_message(scheduler.tokenizer, request.tokens)
            self.turns = (*self.turns, answer)

    def take_back(self) -> str:
        """Remove the last question and its answer; returns the question. UserError if none."""
        if not self.turns:
            raise UserError("there is no question to ask again")
        *turns, question, _ = self.turns
        self.turns = tuple(turns)
        return question.text


def _whole_characters(text: str) -> str:
    """`text` as UTF-8 can hold it: lone surrogates stand for odd bytes of the command line."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def main(config: Config) -> int:
    """Answer one prompt, or hold a conversation. Returns the exit code."""
    check_settings(config.temperature, config.top_k, config.top_p)
    if config.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens is {config.max_new_tokens}; it must be at least 1")
    if config.prompt is not None and not config.prompt.strip():
        raise UserError("--prompt is empty; give a question, or leave it out for a conversation")
    is_int8 = config.dtype == "int8"
    with runtime.start(config.device_type, dtype=config.dtype, takes_int8=True) as rt:
        model, tokenizer, _ = checkpoint_manager.load_model(
            config.source,
            device=rt.device,
            dtype=rt.compute_dtype,
            tag=config.model_tag,
            step=config.step,
        )
        decoder = make_decoder(model, int8=is_int8)
        chat = Chat(Scheduler(model, tokenizer, max_rows=1, decoder=decoder), config)
        if config.prompt is not None:
            # Whoever called must not take a part for the answer.
            return 0 if answer(chat, config.prompt) else STOPPED
        return converse(chat, line_reader())


def converse(chat: Chat, read: Callable[[], str]) -> int:
    """Read and answer until "quit", "exit", end of input or Ctrl-C. Returns the exit code.

    Who types sees what went wrong. Of questions from a pipe only the exit code may be seen: Ctrl-C
    ends them at once with 130, and a line that could not be done makes it 1.
    """
    is_typed = sys.stdin.isatty()
    failed = False
    if is_typed:
        print(BANNER)
    while True:
        try:
            text = read().strip()
        except EOFError:
            break
        except KeyboardInterrupt:
            if is_typed:
                break
            raise
        if text.lower() in ("quit", "exit", "/quit", "/exit"):
            break
        try:
            if text.lower() == "clear":
                print(COMMANDS["/clear"].run(chat, ""))
            elif text.startswith("/"):
                obey(chat, text)
            elif text and not answer(chat, text):
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            if not is_typed:
                return STOPPED
        except UserError as error:
            failed = True
            print(f"error: {error}", file=sys.stderr)
    print("Goodbye.", file=sys.stderr)
    return int(failed and not is_typed)


def answer(chat: Chat, text: str) -> bool:
    """Print the answer as it comes; Ctrl-C ends it. Whether it was left in peace."""
    with _interrupts_noted() as is_interrupted, closing(chat.ask(text)) as pieces:
        for piece in pieces:
            print(terminal_text(piece), end="", flush=True)
            if is_interrupted():
                print(" [stopped]", end="", file=sys.stderr, flush=True)
                break
    print(flush=True)
    return not is_interrupted()


@contextmanager
def _interrupts_noted() -> Iterator[Callable[[], bool]]:
    """Note Ctrl-C instead of raising KeyboardInterrupt; yields whether it was pressed.

    The exception would come at any line: in the middle of a step, or in a finalizer, where Python
    drops it and the answer would go on.
    """
    pressed = False

    def note(*_: object) -> None:
        nonlocal pressed
        pressed = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


# ---- commands of a conversation -------------------------------------------------------------


@dataclass(frozen=True)
class Command:
    """A line that begins with a slash."""

    usage: str
    explanation: str
    run: Callable[[Chat, str], str]
    """Takes what follows the name; returns what is to be shown."""


def obey(chat: Chat, line: str) -> None:
    """Carry out a command. UserError for one that does not exist."""
    name, _, argument = line.partition(" ")
    command = COMMANDS.get(name.lower())
    if command is None:
        raise UserError(f"there is no command {name}; /help lists them")
    shown = command.run(chat, argument.strip())
    if shown:
        print(shown)


def _help(chat: Chat, argument: str) -> str:
    width = max(len(command.usage) for command in COMMANDS.values())
    return "\n".join(f"{c.usage:<{width}}  {c.explanation}" for c in COMMANDS.values())


def _clear(chat: Chat, argument: str) -> str:
    chat.clear()
    return "The conversation starts anew."


def _setter(name: str, read: Callable[[str], float]) -> Callable[[Chat, str], str]:
    """A command that shows a sampling setting, or changes it; "off" switches it off."""

    def run(chat: Chat, argument: str) -> str:
        if argument:
            try:
                value = (
                    None if argument.lower() == "off" and name != "temperature" else read(argument)
                )
            except ValueError:
                raise UserError(f"{argument!r} is not a number for {name}") from None
            change: dict[str, Any] = {name: value}
            chat.sampling = replace(chat.sampling, **change)
        value = getattr(chat.sampling, name)
        is_off = value is None or (name == "top_k" and value == 0)
        return f"{name} is {'off' if is_off else value}"

    return run


def _system(chat: Chat, argument: str) -> str:
    if argument:
        chat.system = "" if argument == "off" else argument
    return f"system text: {chat.system or 'none'}"


def _retry(chat: Chat, argument: str) -> str:
    before = chat.turns
    try:
        is_whole = answer(chat, chat.take_back())
    except UserError:  # such as a system text that leaves no room for the question
        chat.turns = before
        raise
    if not is_whole:
        raise KeyboardInterrupt
    return ""


def _save(chat: Chat, argument: str) -> str:
    name = argument or "chat.json"
    document = chat.conversation().to_json()
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:  # the folder of a user who is not known here
        raise UserError(f"cannot save to {name} ({error}); save somewhere else") from error
    if "\0" in name:
        raise UserError(f"cannot save to {name!r}: a file's name has no NUL; save somewhere else")
    try:
        if not path.parent.is_dir():
            # Made on the way, a mistyped folder would swallow the conversation.
            raise UserError(f"there is no folder {path.parent}; make it, or save somewhere else")
        write_json(path, document)
    except OSError as error:
        # Its own name is that of a temporary file beside the one that was asked for.
        raise UserError(f"cannot save to {path} ({error.strerror}); save somewhere else") from error
    return f"saved to {path}"


COMMANDS = {
    command.usage.partition(" ")[0]: command
    for command in (
        Command("/help", "show this list", _help),
        Command("/clear", "forget the conversation", _clear),
        Command("/temperature [number]", "0 = the likeliest answer", _setter("temperature", float)),
        Command("/topk [number|off]", "sample from the k likeliest tokens", _setter("top_k", int)),
        Command("/topp [number|off]", "sample from this much probability", _setter("top_p", float)),
        Command("/system [text|off]", "what the model is told before all", _system),
        Command("/retry", "ask the last question again", _retry),
        Command("/save [file]", "write the conversation as JSON (chat.json)", _save),
        Command("/quit", "end", lambda chat, argument: ""),
    )
}


def line_reader() -> Callable[[], str]:
    """Reads a line: with editing and history from a terminal, plainly from a pipe."""
    if not sys.stdin.isatty():
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")
        return input
    # Here, because it takes a tenth of a second that `-p` need not wait for.
    from prompt_toolkit import PromptSession

    session: PromptSession[str] = PromptSession()
    return lambda: session.prompt("> ")


if __name__ == "__main__":
    configurator.run(main, Config)
