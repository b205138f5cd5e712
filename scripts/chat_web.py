"""Talk to a trained model in the browser, or from a program that speaks the OpenAI API.

python -m scripts.chat_web                            # then open http://localhost:8000
python -m scripts.chat_web -i mid --port=8001 --temperature=0.5
"""

from __future__ import annotations

import errno
import getpass
import ipaddress
import logging
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from nanochat import configurator
from nanochat.common import UserError

logger = logging.getLogger(__name__)

KEY_VARIABLE = "NANOCHAT_API_KEY"


@dataclass(frozen=True)
class Config:
    """Flags of chat_web."""

    num_gpus: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 1
    """GPUs to serve on, each with the whole model; more than 1 needs CUDA."""
    source: Annotated[Literal["sft", "rl", "mid", "base"] | None, tyro.conf.arg(aliases=["-i"])] = (
        None
    )
    """Stage of the model; default: sft, or the next best of rl, mid and base that exists."""
    model_tag: Annotated[str | None, tyro.conf.arg(aliases=["-g"])] = None
    """Folder name of the run; default: the one written last."""
    step: Annotated[int | None, tyro.conf.arg(aliases=["-s"])] = None
    """Step of the checkpoint; default: the newest."""
    temperature: Annotated[float, tyro.conf.arg(aliases=["-t"])] = 0.8
    """For requests that do not say. 0 = always the likeliest token."""
    top_k: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 50
    """For requests that do not say: sample from the k likeliest tokens; 0 = off."""
    top_p: float | None = None
    """For requests that do not say: sample from the tokens that reach this probability."""
    max_tokens: Annotated[int, tyro.conf.arg(aliases=["-m", "--max-new-tokens"])] = 512
    """For requests that do not say: longest answer."""
    port: Annotated[int, tyro.conf.arg(aliases=["-p"])] = 8000
    """TCP port."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is every network this machine is in, and needs a key."""
    api_key_file: str = ""
    """File whose first line is the API key that clients must send; or set $NANOCHAT_API_KEY."""
    insecure: bool = False
    """Listen on other addresses than this machine's own without asking for a key."""
    allow_host: tuple[str, ...] = ()
    """More names that browsers may know this server by, such as that of a proxy."""
    max_rows: int = 64
    """Answers written at once on each device."""
    max_waiting: int = 256
    """Requests that may wait on each device; more are turned away with status 429."""
    log_conversations: bool = False
    """Write questions and answers to the log."""
    device_type: str = ""
    """cuda, cpu or mps; default: the best there is."""
    dtype: Annotated[str, tyro.conf.arg(aliases=["-d"])] = ""
    """bfloat16, float16, float32, or int8 weights on a CPU; default: bfloat16 where it is fast."""


def main(config: Config) -> None:
    """Load the model and serve it until SIGTERM or Ctrl-C."""
    _check(config)
    key = _api_key(config)
    if key is None and not config.insecure and not _is_loopback(config.host):
        raise UserError(
            f"--host={config.host} lets other machines in; give an API key (${KEY_VARIABLE} or "
            "--api-key-file), or --insecure if everybody may use it"
        )
    try:
        # Not at the top: the flags are documented and tested where these are not installed.
        from nanochat import server
        from nanochat.serving import assembly
        from nanochat.serving.guard import Access
        from nanochat.serving.responses import ServerDefaults
    except ModuleNotFoundError as error:
        raise UserError(
            f"the web server needs the package {error.name}; install it with "
            "`pip install -e '.[web]'`"
        ) from error
    service = assembly.load_service(
        config.source,
        tag=config.model_tag,
        step=config.step,
        device_type=config.device_type,
        dtype=config.dtype,
        num_gpus=config.num_gpus,
        defaults=ServerDefaults(
            temperature=config.temperature,
            top_k=config.top_k or None,
            top_p=config.top_p,
            max_tokens=config.max_tokens,
        ),
        capacity=assembly.Capacity(config.max_rows, config.max_waiting),
        log_conversations=config.log_conversations,
    )
    names = {"localhost", socket.gethostname(), config.host, *config.allow_host}
    access = Access(api_key=key, hosts=frozenset(name.lower() for name in names))
    with _listening_socket(config.host, config.port) as listener:
        port = listener.getsockname()[1]  # --port=0 takes any that is free
        logger.info("serving at http://%s:%d", _shown(config.host), port)
        if os.environ.get("SSH_CONNECTION") or os.environ.get("SLURM_JOB_ID"):
            logger.info(
                "from your own machine: %s, then open http://localhost:%d", _tunnel(port), port
            )
        server.serve(service, access, listener)
    logger.info("the last answer is finished; goodbye")


def _tunnel(port: int) -> str:
    """The command that brings the page to another machine, through the login node of a job."""
    user, here = getpass.getuser(), socket.gethostname()
    login_node = os.environ.get("SLURM_SUBMIT_HOST", here)
    jump = f"-J {user}@{login_node} " if login_node != here else ""
    return f"ssh -L {port}:localhost:{port} {jump}{user}@{here}"


def _check(config: Config) -> None:
    """UserError for a flag that would only fail later. The limits are those of a request."""
    wrong = [
        (config.temperature, "--temperature", 0.0, 2.0),
        (config.top_k, "--top-k", 0, 200),
        (config.max_tokens, "--max-tokens", 1, 4096),
        (config.port, "--port", 0, 65535),
        (config.max_rows, "--max-rows", 1, 4096),
        (config.max_waiting, "--max-waiting", 0, 100_000),
        (1.0 if config.top_p is None else config.top_p, "--top-p", 1e-6, 1.0),
    ]
    for value, flag, least, most in wrong:
        if not least <= value <= most:
            raise UserError(f"{flag} is {value}; use a number from {least} to {most}")


def _api_key(config: Config) -> str | None:
    """The key from the file or the environment, None when there is none."""
    key = os.environ.get(KEY_VARIABLE, "")
    if config.api_key_file:
        try:
            lines = Path(config.api_key_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise UserError(f"--api-key-file={config.api_key_file}: {reason}") from error
        key = lines[0].strip() if lines else ""
        if not key:
            raise UserError(f"the first line of {config.api_key_file} is empty; put the key there")
    if key and not (key.isascii() and key.isprintable() and " " not in key):
        raise UserError("the API key may only have visible ASCII characters")
    return key or None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _shown(host: str) -> str:
    """A host as it is written in an address."""
    if _is_loopback(host):
        return "localhost"
    return f"[{host}]" if ":" in host else host


def _listening_socket(host: str, port: int) -> socket.socket:
    """Bind before anything is said to be served."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except UnicodeError as error:  # what a name on the network can not be, such as a..b
        reason, flag = "no name of a machine", "--host"
        cause: Exception = error
    except OSError as error:
        # create_server adds the address to the system's words; it stands here already.
        reason = str(error.strerror).partition(" (while")[0]
        is_host = isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL
        flag, cause = "--host" if is_host else "--port", error
    raise UserError(f"cannot listen on {host} port {port} ({reason}); choose another {flag}") from (
        cause
    )


if __name__ == "__main__":
    configurator.run(main, Config)
