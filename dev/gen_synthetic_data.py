"""Let a large language model write the conversations that teach a small one who it is.

python -m dev.gen_synthetic_data --dry-run          show what is asked first; costs nothing
python -m dev.gen_synthetic_data                    1,000 conversations about README.md
python -m dev.gen_synthetic_data --about=me.md      about somebody else

They become identity_conversations.jsonl of the base folder, one JSON array of messages a line,
when all of them are there. Until then they lie beside it, and the same command goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from tqdm import tqdm
from urllib3.util import Retry

from nanochat import configurator
from nanochat.assets import Manifest, record_file, write_manifest
from nanochat.common import UserError, atomic_write_text
from nanochat.conversation import Conversation
from nanochat.transfer import check_network_allowed
from tasks.customjson import IDENTITY, parse_conversation

REPOSITORY = Path(__file__).parents[1]
KEY_FILE = REPOSITORY / "openroutertoken.txt"
STARTERS_FILE = Path(__file__).with_name("conversation_starters.txt")
STARTERS_SHOWN = 5  # enough to set a tone, too few to be copied one after the other
ATTEMPTS = 5  # bad answers to one request; a model of which one in five is bad still succeeds
BACKOFF_SECONDS = 1.0  # before the third attempt of a request, doubled for each one more
TIMEOUT = (10, 180)  # seconds to connect, and without a byte: an answer is written all at once
WORTH_REPEATING = (408, 429, 500, 502, 503, 504)

PROMPT = """\
You write training data for a small language model. Who it shall be stands in this text:

=====
{about}
=====

Write one conversation between a user and the assistant that the text describes, from which the
assistant learns who it is.

- The user begins, both take turns, the assistant has the last word. Two to eight messages.
- The user's first message is in the manner of the following, in mood, length, spelling and
  language. Do not copy any of them.
{starters}
- The assistant speaks of itself as "I", in a friendly, honest and brief way. What it says about
  itself stands in the text or follows from it; what does not, it says that it does not know.
- When the user writes in another language than the text's, the assistant answers in the user's
  and mentions which one it knows best.
- Plain sentences: no Markdown, no emoji, no names in front of what is said.
"""

SCHEMA = {
    "type": "object",
    "properties": {
        "messages": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "role": {"type": "string", "enum": ["user", "assistant"]},
                    "content": {"type": "string"},
                },
                "required": ["role", "content"],
                "additionalProperties": False,
            },
        }
    },
    "required": ["messages"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Config:
    """Flags of gen_synthetic_data."""

    num: int = 1000
    """Conversations."""
    about: Path = REPOSITORY / "README.md"
    """Text that says who the assistant is."""
    out: Path | None = None
    """Where they go; default: the identity conversations of the base folder."""
    model: str = "google/gemini-2.5-flash"
    """Who writes them."""
    base_url: str = "https://openrouter.ai/api/v1"
    """Any server with OpenAI's chat API that answers in a JSON schema."""
    temperature: float = 1.0
    """Of that model; less makes the conversations alike."""
    seed: int = 0
    """Which opening messages are shown as examples."""
    threads: int = 4
    """Requests at a time."""
    dry_run: bool = False
    """Print the first request's prompt and stop."""


class BadAnswerError(UserError):
    """The model's answer is not a conversation; the next one may be."""


def main(config: Config) -> None:
    """Make what is missing, then put everything in its place."""
    if config.num < 1 or config.threads < 1:
        raise UserError(f"--num={config.num} --threads={config.threads}: both must be at least 1")
    bodies = make_bodies(config)
    if config.dry_run:
        print(bodies[0]["messages"][0]["content"])
        return
    check_network_allowed(of_hub=False)
    key, out = read_key(), config.out or IDENTITY.path
    if out.is_dir():
        raise UserError(f"--out={out} is a folder; name a file")
    out.parent.mkdir(parents=True, exist_ok=True)
    drafts = Drafts(out.with_name(f"{out.name}.part"))
    names = [f"{index} {_digest(body)}" for index, body in enumerate(bodies)]
    missing = [(n, body) for n, body in zip(names, bodies, strict=True) if n not in drafts.made]
    try:
        make_all(config, key, missing, drafts)
    except UserError as error:
        kept = len(drafts.made.keys() & set(names))
        raise UserError(
            f"{error}; {kept} of {config.num} conversations are kept in {drafts.path}, and the "
            "same command goes on from there"
        ) from error
    atomic_write_text(out, "".join(f"{drafts.made[name]}\n" for name in names))
    drafts.path.unlink(missing_ok=True)
    if out.resolve() == IDENTITY.path.resolve():  # without its manifest no stage would take it
        write_manifest(IDENTITY, Manifest((record_file(IDENTITY.folder, IDENTITY.path),)))
    print(f"{config.num} conversations in {out}")


# ---- what is asked ----------------------------------------------------------------------------


def make_bodies(config: Config) -> list[dict[str, Any]]:
    """The requests; number i depends on the seed and i alone, however many there are."""
    try:
        about = config.about.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--about={config.about} cannot be read ({error})") from error
    starters = STARTERS_FILE.read_text(encoding="utf-8").splitlines()
    return [_body(config, about, starters, index) for index in range(config.num)]


def _body(config: Config, about: str, starters: list[str], index: int) -> dict[str, Any]:
    shown = random.Random(f"{config.seed} {index}").sample(starters, STARTERS_SHOWN)
    prompt = PROMPT.format(about=about, starters="\n".join(f"    {line}" for line in shown))
    return {
        "model": config.model,
        "temperature": config.temperature,
        "messages": [{"role": "user", "content": prompt}],
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "conversation", "strict": True, "schema": SCHEMA},
        },
    }


def read_key() -> str:
    """The key of the API, from the environment or the file that git ignores."""
    key = os.environ.get("OPENROUTER_API_KEY", "").strip()
    if not key and KEY_FILE.is_file():
        key = KEY_FILE.read_text(encoding="utf-8", errors="replace").strip()
    if not key:
        raise UserError(f"no API key: write it to {KEY_FILE}, or set OPENROUTER_API_KEY")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(f"the API key in OPENROUTER_API_KEY or {KEY_FILE} must be a single word")
    return key


# ---- what comes back --------------------------------------------------------------------------


class Drafts:
    """The conversations made so far, in a file that is only appended to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.made: dict[str, str] = {}
        """Number and digest of the request -> the conversation as a line of JSON."""
        self._lock = threading.Lock()
        path.touch()  # a folder that cannot be written shows before anything is paid for
        for line in path.read_bytes().splitlines():
            try:
                name, conversation = json.loads(line)
            except ValueError:  # empty, or cut when the program was killed
                continue
            self.made[name] = conversation

    def keep(self, name: str, conversation: str) -> None:
        """Add one. The line begins with its end, in case the one before was cut."""
        with self._lock, self.path.open("ab") as file:
            file.write(f"\n{json.dumps([name, conversation])}".encode())
            self.made[name] = conversation


def make_all(
    config: Config, key: str, missing: list[tuple[str, dict[str, Any]]], drafts: Drafts
) -> None:
    """Ask for all that is missing. The first that fails ends it; those under way are kept."""
    stop = threading.Event()

    def make(name: str, body: dict[str, Any]) -> None:
        if stop.is_set():
            return
        try:
            made = make_one(config, key, body)
            drafts.keep(name, json.dumps(made.to_json(), ensure_ascii=False))
        except BaseException:
            stop.set()
            raise

    num_kept = config.num - len(missing)
    with (
        ThreadPoolExecutor(config.threads) as pool,
        tqdm(total=config.num, initial=num_kept, unit=" conversations", disable=None) as bar,
    ):
        futures = [pool.submit(make, *each) for each in missing]
        try:
            for future in as_completed(futures):
                future.result()
                bar.update()
        except BaseException:  # Ctrl-C as well
            stop.set()
            raise


def make_one(config: Config, key: str, body: dict[str, Any]) -> Conversation:
    """Ask until the answer is a conversation, a few times at most."""
    bad: BadAnswerError | None = None
    for _ in range(ATTEMPTS):
        try:
            return read_answer(post(config.base_url, key, body))
        except BadAnswerError as error:
            bad = error
    raise UserError(f"{config.model} gave {ATTEMPTS} bad answers, at last: {bad}") from bad


def post(base_url: str, key: str, body: dict[str, Any]) -> requests.Response:
    """Send one request; again, ever more slowly, while the server is busy or broken."""
    url = f"{base_url.rstrip('/')}/chat/completions"
    patience = Retry(
        total=6,
        connect=2,
        status_forcelist=WORTH_REPEATING,
        allowed_methods=None,  # POST as well: asking twice does no harm
        backoff_factor=BACKOFF_SECONDS,
        raise_on_status=False,
    )
    with requests.Session() as session:
        for scheme in ("http://", "https://"):
            session.mount(scheme, HTTPAdapter(max_retries=patience))
        headers = {"Authorization": f"Bearer {key}"}
        try:
            response = session.post(url, json=body, headers=headers, timeout=TIMEOUT)
        except requests.RequestException as error:
            raise UserError(f"{url} does not answer ({error})") from error
    if response.ok:
        return response
    said = f"HTTP {response.status_code}: {' '.join(response.text.split())[:200]}"
    if response.status_code in (401, 403):
        raise UserError(
            f"{url} refused the API key ({said}); see OPENROUTER_API_KEY, or {KEY_FILE}"
        )
    if response.status_code == 402:
        raise UserError(f"the account of the API key has no credit left ({said})")
    raise UserError(f"{url} refused the request ({said})")


def read_answer(response: requests.Response) -> Conversation:
    """The conversation in a server's answer; BadAnswerError says why there is none."""
    try:
        text = response.json()["choices"][0]["message"]["content"]
        line = json.dumps(json.loads(text)["messages"], ensure_ascii=False).encode()
    except (ValueError, LookupError, TypeError) as error:
        start = " ".join(response.text.split())[:200]
        raise BadAnswerError(f"not the JSON that was asked for: {start}") from error
    try:
        conversation = parse_conversation(line, "the answer")
    except UserError as error:
        raise BadAnswerError(str(error)) from error
    if conversation.messages[-1].role != "assistant":
        raise BadAnswerError("the assistant does not have the last word")
    if not all(message.text.strip() for message in conversation.messages):
        raise BadAnswerError("a message is empty")
    return conversation


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


if __name__ == "__main__":
    configurator.run(main, Config)
