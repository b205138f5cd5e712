"""Talk to a trained model in the terminal.

python -m scripts.chat_cli
python -m scripts.chat_cli -p "What is the capital of France?" --temperature 0.5
"""

from __future__ import annotations

import logging
import secrets
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from nanochat import checkpoint_manager, configurator, runtime
from nanochat.answers import AnswerText
from nanochat.common import UserError
from nanochat.engine import Engine
from nanochat.sampling import check_settings

logger = logging.getLogger(__name__)

BANNER = 'Chat with nanochat. "clear" starts anew, "quit" ends; Ctrl-C stops an answer.'


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
    prompt: Annotated[str, tyro.conf.arg(aliases=["-p"])] = ""
    """Answer this, print the answer alone, and end."""
    temperature: Annotated[float, tyro.conf.arg(aliases=["-t"])] = 0.6
    """0 = always the likeliest token; higher is more varied."""
    top_k: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 50
    """Sample from the k likeliest tokens; 0 = off."""
    top_p: float | None = None
    """Sample from the fewest tokens that reach this probability together; default: off."""
    max_new_tokens: Annotated[int, tyro.conf.arg(aliases=["-m"])] = 256
    """Longest answer."""
    seed: int | None = None
    """Seed of the answers; default: a new one each time."""
    device_type: str = ""
    """cuda, cpu or mps; default: the best there is."""
    dtype: Annotated[str, tyro.conf.arg(aliases=["-d"])] = ""
    """Compute dtype: bfloat16 or float32; default: bfloat16 where the hardware is fast at it."""


class Chat:
    """A conversation with a model: exchanges of tokens, each a question and its answer."""

    def __init__(self, engine: Engine, config: Config) -> None:
        self.engine, self.config = engine, config
        self.exchanges: list[list[int]] = []
        self.num_asked = 0
        self.seed = secrets.randbits(31) if config.seed is None else config.seed

    def clear(self) -> None:
        """Forget what was said."""
        self.exchanges.clear()

    def ask(self, text: str) -> Iterator[str]:
        """Yield the answer piece by piece; an answer that is broken off stays as far as it got.

        The oldest exchanges are dropped when the context is too small for all. UserError when it
        is too small for `text` alone; the conversation is then as before.
        """
        tokenizer = self.engine.tokenizer
        special = tokenizer.encode_special
        exchange = [
            special("<|user_start|>"),
            *tokenizer.encode(text),
            special("<|user_end|>"),
            special("<|assistant_start|>"),
        ]
        # Shared context leaves at least this much for the answer.
        room = min(self.config.max_new_tokens, self.engine.context // 4)
        kept = list(self.exchanges)
        while kept and 1 + sum(map(len, kept)) + len(exchange) + room > self.engine.context:
            kept.pop(0)
        prompt = [tokenizer.bos_id, *(token for past in kept for token in past), *exchange]
        columns = self.engine.generate(
            prompt,
            max_tokens=self.config.max_new_tokens,
            temperature=self.config.temperature,
            top_k=self.config.top_k,
            top_p=self.config.top_p,
            seed=self.seed + self.num_asked,
        )
        if len(kept) < len(self.exchanges):
            dropped = len(self.exchanges) - len(kept)
            logger.info("the context is full: the oldest %d exchanges are forgotten", dropped)
        self.num_asked += 1
        self.exchanges = [*kept, exchange]
        shown = AnswerText(tokenizer)
        end = special("<|assistant_end|>")
        try:
            for (token,), _ in columns:
                if token in (end, tokenizer.bos_id):
                    break
                exchange.append(token)
                yield shown.feed(token)
            yield shown.finish()
        finally:
            exchange.append(end)


def main(config: Config) -> None:
    """Answer one prompt, or hold a conversation."""
    check_settings(config.temperature, config.top_k, config.top_p)
    if config.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens is {config.max_new_tokens}; it must be at least 1")
    source = config.source or checkpoint_manager.choose_source()
    with runtime.start(config.device_type, dtype=config.dtype) as rt:
        model, tokenizer, _ = checkpoint_manager.load_model(
            source,
            device=rt.device,
            dtype=rt.compute_dtype,
            tag=config.model_tag,
            step=config.step,
        )
        chat = Chat(Engine(model, tokenizer), config)
        if config.prompt:
            answer(chat, config.prompt)
        else:
            converse(chat, line_reader())


def converse(chat: Chat, read: Callable[[], str]) -> None:
    """Read and answer until "quit", "exit", end of input or Ctrl-C."""
    if sys.stdin.isatty():
        print(BANNER)
    while True:
        try:
            text = read().strip()
        except (EOFError, KeyboardInterrupt):
            break
        if text.lower() in ("quit", "exit"):
            break
        if text.lower() == "clear":
            chat.clear()
            print("The conversation starts anew.")
        elif text:
            try:
                answer(chat, text)
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)
    print("Goodbye.")


def answer(chat: Chat, text: str) -> None:
    """Print the answer as it comes; Ctrl-C ends the answer alone."""
    try:
        for piece in chat.ask(text):
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" [stopped]", end="", file=sys.stderr, flush=True)
    print(flush=True)


def line_reader() -> Callable[[], str]:
    """Reads a line: with editing and history from a terminal, plainly from a pipe."""
    if not sys.stdin.isatty():
        return input
    # Here, because it takes a tenth of a second that `-p` need not wait for.
    from prompt_toolkit import PromptSession

    session: PromptSession[str] = PromptSession()
    return lambda: session.prompt("> ")


if __name__ == "__main__":
    configurator.run(main, Config)
