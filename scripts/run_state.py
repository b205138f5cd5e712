"""Remember which stages of a pipeline are done: $NANOCHAT_BASE_DIR/run_state.json.

scripts/stages.sh asks and tells; a person may look:

    python -m scripts.run_state list

A stage is done when the same command ended with 0, nothing it builds on has run since, and
what it wrote is still there.
"""

import hashlib
import time
from dataclasses import dataclass
from typing import Any, Literal

import tyro

from nanochat import configurator
from nanochat.common import UserError, base_dir, read_json, write_json

FILE_NAME = "run_state.json"


@dataclass(frozen=True)
class Config:
    """Ask or record the state of a pipeline's stages."""

    action: tyro.conf.Positional[Literal["check", "begin", "end", "list"]]
    """check prints done, begun or new; begin and end record; list shows all."""
    name: tyro.conf.Positional[str] = ""
    """The stage."""
    command: str = ""
    """Its command line; another one means another stage."""
    artifact: str = ""
    """A file pattern, relative to the base folder, that the stage leaves behind."""
    clears: str = ""
    """Stages, separated by commas, that build on this one and are no longer done."""
    exit_code: int = 0
    """What the command ended with."""


def main(config: Config) -> int:
    stages = _load()
    if config.action == "list":
        for name, record in stages.items():
            print(_describe(name, record))
        return 0
    if not config.name:
        raise UserError(f"{config.action} needs the name of a stage")
    if config.action == "check":
        print(status(stages.get(config.name), config.command, config.artifact))
        return 0
    if config.action == "begin":
        _begin(stages, config)
    else:
        _end(stages, config)
    return 0


def status(record: dict[str, Any] | None, command: str, artifact: str) -> str:
    """Return "done", "begun" (the same command was started and did not finish) or "new"."""
    if record is None or record["command_hash"] != _hash(command):
        return "new"
    if record["exit_code"] != 0:
        return "begun"
    # Finished, but its files were removed: nothing of it can be continued.
    return "done" if _exists(artifact) else "new"


def _begin(stages: dict[str, Any], config: Config) -> None:
    for name in config.clears.split(","):
        stages.pop(name, None)
    stages.pop(config.name, None)  # so that the file keeps the order of the last run
    stages[config.name] = {
        "command": config.command,
        "command_hash": _hash(config.command),
        "started": time.time(),
        "ended": None,
        "exit_code": None,
    }
    _save(stages)


def _end(stages: dict[str, Any], config: Config) -> None:
    if config.name not in stages:
        raise UserError(f"stage {config.name!r} was never begun")
    record = stages[config.name]
    record["ended"] = time.time()
    is_missing = config.exit_code == 0 and not _exists(config.artifact)
    record["exit_code"] = 1 if is_missing else config.exit_code
    _save(stages)
    if is_missing:
        raise UserError(
            f"stage {config.name} ended with 0 but left no {base_dir() / config.artifact}"
        )
    print(_describe(config.name, record))


def _load() -> dict[str, Any]:
    path = base_dir() / FILE_NAME
    if not path.exists():
        return {}
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("stages"), dict):
        raise UserError(f"{path} is not a record of stages; delete it to start over")
    stages: dict[str, Any] = content["stages"]
    return stages


def _save(stages: dict[str, Any]) -> None:
    write_json(base_dir() / FILE_NAME, {"stages": stages})


def _exists(artifact: str) -> bool:
    return not artifact or any(base_dir().glob(artifact))


def _hash(command: str) -> str:
    return hashlib.sha256(command.encode()).hexdigest()


def _describe(name: str, record: dict[str, Any]) -> str:
    if record["exit_code"] is None:
        return f"{name}: begun, not finished"
    seconds = record["ended"] - record["started"]
    outcome = "done" if record["exit_code"] == 0 else f"failed ({record['exit_code']})"
    return f"{name}: {outcome} in {seconds:.0f} s"


if __name__ == "__main__":
    configurator.run(main, Config)
