"""Fetch, check and list what the stages read; examine the machine a run is meant for.

python -m scripts.assets prefetch --all              everything the speedrun reads, about 26 GB
python -m scripts.assets prefetch --stage mid,sft    what these stages read
python -m scripts.assets prefetch identity           one thing by its name
python -m scripts.assets check --offline             can a job run here without a network?
python -m scripts.assets list --stage base           what there is, and what there should be
python -m scripts.assets doctor                      can this machine run it at all?
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from nanochat import configurator
from nanochat.assets import PREFETCH, Asset, hub_split, problem_with, read_manifest
from nanochat.common import UserError, base_dir, refresh_aliases
from nanochat.prefetch import prefetch
from tasks.needs import DEFAULT_NUM_TRAIN, STAGES, needs

logger = logging.getLogger(__name__)

NUM_CHECKING = 16  # threads: a check waits for the disk, not for a processor
NUM_NAMED = 12  # missing assets in a message


@dataclass(frozen=True)
class Config:
    """What a run reads, and whether it is here."""

    action: tyro.conf.Positional[Literal["prefetch", "check", "list", "doctor"]]
    """prefetch: make it present. check: exit with 0 when it is. list: show it. doctor: examine
    the machine."""
    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Only these assets, by name or the beginning of one; as `list` shows them."""
    stage: str | None = None
    """Only what these stages read, joined with commas."""
    all: bool = False
    """What all stages read; the default without --stage and names."""
    data: str = "fineweb-edu"
    """Pretraining data: fineweb-edu, climbmix, embedded or a folder."""
    tasks: Literal["embedded", "public", "auto"] | None = None
    """Conversations and questions; default: those that belong to --data; auto: public if here."""
    num_files: Annotated[int, tyro.conf.arg(aliases=["-n"])] = DEFAULT_NUM_TRAIN
    """Training shards; 240 are read by the d20 model, 800 by d32."""
    num_workers: Annotated[int, tyro.conf.arg(aliases=["-w"])] = 4
    """Transfers at the same time."""
    allow_missing: str | None = None
    """Assets, joined with commas, that a run may do without: named in a warning if missing."""
    verify: bool = False
    """Compare SHA-256 as well, which reads every byte."""
    offline: bool = False
    """Ask no server. check never does; prefetch then takes over and makes what it can."""
    depth: int = 20
    """doctor: the model that the machine is to train."""
    device_batch_size: int = 32
    """doctor: rows of one forward pass on each device."""


def main(config: Config) -> int:
    """Do what was asked; 1 when something is missing or unfit."""
    if config.num_workers < 1:
        raise UserError(f"-w is {config.num_workers}; give at least 1 worker")
    if config.action == "doctor":
        # Here, because it loads torch, which the other three do without.
        from nanochat import doctor
        from nanochat.doctor.network import check_network

        recipe = doctor.Recipe(config.depth, config.device_batch_size)
        assets = _flat(_chosen(config))
        missing = _required(assets, _problems(assets, verify=config.verify), config)
        state = _state_of(assets, missing, config)
        extra = [
            lambda: check_network([asset for asset, _ in missing]),
            lambda: doctor.Finding("assets", *state),
        ]
        return doctor.examine(recipe, extra=extra)
    by_stage = _chosen(config)
    assets = _flat(by_stage)
    if config.action == "prefetch":
        return _prefetch(assets, config)
    if config.action == "check":
        return _check(assets, config)
    return _list(by_stage, config)


# ---- which assets -----------------------------------------------------------------------------


def _chosen(config: Config) -> dict[str, list[Asset]]:
    """The assets that are asked for, by stage."""
    if config.all and config.stage:
        raise UserError("--all and --stage exclude each other; give one of them")
    stages = [stage.strip() for stage in config.stage.split(",")] if config.stage else list(STAGES)
    by_stage = needs(stages, data=config.data, tasks=config.tasks, num_train=config.num_files)
    if not config.names:
        return by_stage
    known = [asset for found in by_stage.values() for asset in found]
    return {"named": [asset for name in config.names for asset in _named(name, known)]}


def _flat(by_stage: dict[str, list[Asset]]) -> list[Asset]:
    """The assets of several stages, each once."""
    return list(dict.fromkeys(asset for found in by_stage.values() for asset in found))


def _named(name: str, known: Sequence[Asset]) -> list[Asset]:
    """The assets that a name, or the beginning of one, means."""
    found = [a for a in known if a.name == name or a.name.startswith((f"{name}/", f"{name}:"))]
    if found:
        return found
    dataset, _, rest = name.partition(":")
    config, _, split = rest.partition(":")
    if "/" in dataset and split:
        return [hub_split(dataset, config, split, license_name="see its page")]
    names = dict.fromkeys(_group(asset) for asset in known)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {close[0]}?" if close else f"; there are {', '.join(names)}"
    raise UserError(f"no asset {name!r}{hint}")


def _group(asset: Asset) -> str:
    """The shards of a data set are one line of a list."""
    head, _, tail = asset.name.rpartition("/")
    return head if tail.isdigit() else asset.name


def _command(config: Config) -> str:
    """The one command that mends what a check with the same flags finds."""
    chosen = " ".join(config.names) if config.names else f"--stage {config.stage}"
    words = [PREFETCH, chosen if config.names or config.stage else "--all"]
    words += [f"--data={config.data}"] if config.data != "fineweb-edu" else []
    words += [f"--tasks={config.tasks}"] if config.tasks else []
    words += [f"-n {config.num_files}"] if config.num_files != DEFAULT_NUM_TRAIN else []
    return " ".join(words)


# ---- what is done with them -------------------------------------------------------------------


def _problems(assets: Sequence[Asset], *, verify: bool) -> list[str | None]:
    with ThreadPoolExecutor(NUM_CHECKING) as pool:
        return list(pool.map(lambda asset: problem_with(asset, verify=verify), assets))


def _prefetch(assets: Sequence[Asset], config: Config) -> int:
    outcomes = prefetch(
        assets, num_workers=config.num_workers, offline=config.offline, verify=config.verify
    )
    refresh_aliases()
    counts: dict[str, int] = {}
    for outcome in outcomes:
        if outcome.problem is None:
            counts[outcome.action] = counts.get(outcome.action, 0) + 1
    done = ", ".join(f"{count} {action}" for action, count in counts.items()) or "none"
    print(f"{len(assets)} assets in {base_dir()}: {done}")
    problems = [outcome.problem for outcome in outcomes]
    if not (required := _required(assets, problems, config)):
        return 0
    raise UserError(
        f"{len(required)} of {len(assets)} assets are not here: {_summary(required)}; "
        f"run the same command again: {_command(config)}"
    )


def _check(assets: Sequence[Asset], config: Config) -> int:
    required = _required(assets, _problems(assets, verify=config.verify), config)
    if not required:
        print(f"everything that is required is in {base_dir()} ({len(assets)} assets)")
        return 0
    raise UserError(
        f"{len(required)} of {len(assets)} assets cannot be used in {base_dir()}: "
        f"{_summary(required)}; on a machine with internet run: {_command(config)}"
    )


def _required(
    assets: Sequence[Asset], problems: Sequence[str | None], config: Config
) -> list[tuple[Asset, str]]:
    """The missing assets that a run cannot do without; the others are named in a warning."""
    allowed = {name.strip() for name in (config.allow_missing or "").split(",")}
    missing = [(a, p) for a, p in zip(assets, problems, strict=True) if p is not None]
    optional = [a for a, _ in missing if a.is_optional or {a.name, _group(a)} & allowed]
    if optional:
        names = ", ".join(asset.name for asset in optional)
        logger.warning("not here, and what uses it is left out: %s", names)
    return [(asset, problem) for asset, problem in missing if asset not in optional]


def _state_of(
    assets: Sequence[Asset], missing: Sequence[tuple[Asset, str]], config: Config
) -> tuple[Literal["ok", "FAIL"], str, str]:
    """The last line of the doctor: is what the stages read on this machine."""
    if not missing:
        return "ok", f"{len(assets)} in {base_dir()}", ""
    return "FAIL", _summary(missing), f"with internet run: {_command(config)}"


def _summary(missing: Sequence[tuple[Asset, str]]) -> str:
    """Name the first few, the shards of a data set together."""
    by_group: dict[str, list[tuple[Asset, str]]] = {}
    for asset, problem in missing:
        by_group.setdefault(_group(asset), []).append((asset, problem))
    named = []
    for group, found in list(by_group.items())[:NUM_NAMED]:
        asset, problem = found[0]
        more = f", and {len(found) - 1} more of {group}" if len(found) > 1 else ""
        named.append(f"{asset.name} ({problem}{more})")
    rest = len(by_group) - NUM_NAMED
    return ", ".join(named) + (f" and {rest} more" if rest > 0 else "")


def _list(by_stage: dict[str, list[Asset]], config: Config) -> int:
    """One line for each asset or data set: stages, name, size, rows, state, source, license."""
    lines: dict[str, _Line] = {}
    stages: dict[str, list[str]] = {}
    assets = _flat(by_stage)
    for stage, found in by_stage.items():
        for group in dict.fromkeys(map(_group, found)):
            stages.setdefault(group, []).append(stage)
    for asset, problem in zip(assets, _problems(assets, verify=config.verify), strict=True):
        line = lines.setdefault(_group(asset), _Line(asset))
        manifest = read_manifest(asset)
        line.count += 1
        line.present += problem is None
        num_bytes = manifest.num_bytes if manifest else asset.approximate_bytes
        line.num_bytes += num_bytes
        line.bytes_here += num_bytes if problem is None else 0
        line.rows += (manifest.rows or 0) if manifest else 0
        line.problem = line.problem or problem
    for group, line in lines.items():
        print(line.text(group, ",".join(stages[group])))
    here, whole = (
        sum(getattr(line, name) for line in lines.values()) / 1e9
        for name in ("bytes_here", "num_bytes")
    )
    present = sum(line.present for line in lines.values())
    sizes = f"{here:,.2f} of about {whole:,.2f} GB"
    print(f"{present} of {len(assets)} assets, {sizes}, are in {base_dir()}")
    return 0


@dataclass
class _Line:
    """A line of the list: one asset, or the shards of a data set."""

    first: Asset
    count: int = 0
    present: int = 0
    num_bytes: int = 0
    bytes_here: int = 0
    rows: int = 0
    problem: str | None = None

    def text(self, name: str, stages: str) -> str:
        state = "present" if self.problem is None else str(self.problem)
        if self.count > 1:
            state = f"{self.present} of {self.count} present"
        size = f"{self.num_bytes / 1e6:,.1f} MB" if self.num_bytes else ""
        rows = f"{self.rows:,} rows" if self.rows else ""
        source = f"{self.first.source} ({self.first.license})"
        return f"{name:<44} {state:<22} {size:>12} {rows:>15}  {stages:<20}  {source}".rstrip()


if __name__ == "__main__":
    configurator.run(main, Config)
