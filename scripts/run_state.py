"""Remember which stages of a pipeline are done: $NANOCHAT_BASE_DIR/run_state.json.

scripts/stages.sh asks and tells; a person may look:

    python -m scripts.run_state list

A stage is done when the same command ended with 0, nothing it builds on has run since, and
every file it left is still there with its size.
"""

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from nanochat import configurator
from nanochat.common import UserError, base_dir, read_json, write_json

FILE_NAME = "run_state.json"
STOPPED = (0, 85, 130, 143)  # ends that are no failure: done, or asked to stop
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Config:
    """Ask or record the state of a pipeline's stages."""

    action: tyro.conf.Positional[Literal["status", "begin", "end", "verify", "list"]]
    """status prints done, begun or new; begin does, too, and records a beginning unless it is done;
    end records how it ended; verify fails unless all are done; list shows all."""
    name: tyro.conf.Positional[str] = ""
    """The stage; for verify several, separated by commas."""
    command: str = ""
    """Its command line; another one means another stage."""
    artifact: str = ""
    """A file pattern, relative to the base folder, that the stage leaves behind. A manifest
    stands for its whole folder."""
    clears: str = ""
    """Stages, separated by commas, that build on this one and are no longer done."""
    force: bool = False
    """Begin it even if it is done."""
    exit_code: int = 0
    """What the command ended with."""


def main(config: Config) -> int:
    stages = _load()
    if config.action == "list":
        if not stages:
            print(f"no stage has been run in {base_dir()}")
        for name, record in stages.items():
            print(_describe(name, record))
        return 0
    if not config.name:
        raise UserError(f"{config.action} needs the name of a stage")
    if config.action == "verify":
        _verify(stages, config.name.split(","))
        return 0
    if config.action == "status":
        print(status(stages.get(config.name), config.command))
    elif config.action == "begin":
        _begin(stages, config)
    else:
        _end(stages, config)
    return 0


def status(record: dict[str, Any] | None, command: str) -> str:
    """Return "done", "begun" (the same command was started and did not finish) or "new"."""
    if record is None or record["command_hash"] != _hash(command):
        return "new"
    if record["exit_code"] != 0:
        return "begun"
    # Finished, but its files were removed: nothing of it can be continued.
    return "new" if _damaged(record) else "done"


def _verify(stages: dict[str, Any], names: list[str]) -> None:
    """Print what the named stages took and left; UserError when one of them is not done."""
    for name in names:
        record = stages.get(name)
        if record is None or record["exit_code"] != 0:
            raise UserError(f"stage {name} is not done, whatever was printed above")
        if damaged := _damaged(record):
            raise UserError(f"stage {name} is not done: {damaged} is missing or was changed")
        print(_describe(name, record))
    what = "stage is" if len(names) == 1 else "stages are"
    print(f"{'all ' if len(names) > 1 else ''}{len(names)} {what} done; in {base_dir()}:")
    for name in names:
        if main_files := [f for f in stages[name]["artifacts"] if _is_main(f)]:
            print(f"  {name}: {main_files[-1]}")


def _begin(stages: dict[str, Any], config: Config) -> None:
    is_other = status(stages.get(config.name), config.command) == "new"
    if is_other and _put_back(stages, config.name):  # a command that was killed
        _save(stages)
    record = stages.get(config.name)
    before = status(record, config.command)
    print(before)
    if before == "done" and not config.force:
        return
    was_done = record is not None and record["exit_code"] == 0
    names = [config.name, *config.clears.split(",")]
    # So that a mistyped flag, which fails before it changes a file, costs nothing.
    replaced = {name: stages[name] for name in names if was_done and name in stages}
    for name in names:  # its own, too, so that the file keeps the order of the last run
        stages.pop(name, None)
    stages[config.name] = {
        "command": config.command,
        "command_hash": _hash(config.command),
        "started": time.time(),
        "ended": None,
        "exit_code": None,
        "artifacts": {},
        "replaced": replaced,
    }
    _save(stages)


def _put_back(stages: dict[str, Any], name: str) -> bool:
    """Undo a beginning that changed none of the files that were there; say whether it could be."""
    replaced: dict[str, Any] = stages.get(name, {}).get("replaced", {})
    if name not in replaced or _damaged(replaced[name]):
        return False
    del stages[name]
    stages.update(replaced)
    return True


def _end(stages: dict[str, Any], config: Config) -> None:
    if config.name not in stages:
        raise UserError(f"stage {config.name!r} was never begun")
    if config.exit_code not in STOPPED and _put_back(stages, config.name):
        _save(stages)
        print(f"{config.name}: failed ({config.exit_code}); what was done before is still there")
        return
    record = stages[config.name]
    record.pop("replaced", None)
    record["ended"] = time.time()
    artifacts = _find(config.artifact)
    is_missing = config.exit_code == 0 and bool(config.artifact) and not artifacts
    record["artifacts"] = artifacts
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
    for record in stages.values():
        record.setdefault("artifacts", {})  # not noted by the first version
    return stages


def _save(stages: dict[str, Any]) -> None:
    write_json(base_dir() / FILE_NAME, {"stages": stages})


def _find(artifact: str) -> dict[str, int]:
    """Size in bytes of every file that a pattern stands for, by path below the base folder."""
    if not artifact:
        return {}
    files: list[Path] = []
    for path in sorted(base_dir().glob(artifact)):
        files += sorted(path.parent.iterdir()) if path.name == MANIFEST else [path]
    return {str(path.relative_to(base_dir())): path.stat().st_size for path in files}


def _damaged(record: dict[str, Any]) -> str | None:
    """The first file of a finished stage that is gone or has another size; None if all is well."""
    for name, size in record["artifacts"].items():
        path = base_dir() / name
        if not path.exists() or path.stat().st_size != size:
            return str(path)
    return None


def _is_main(name: str) -> bool:
    """Whether a file is one to show, not one of the many in a checkpoint's folder."""
    return "/step_" not in name or name.endswith(f"/{MANIFEST}")


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
