"""Watch a run in the terminal: its numbers, plotted as text, while they are written.

python -m scripts.watch                 # the run written to last
python -m scripts.watch base/d4 --metrics=loss,val_bpb,tokens_per_second

Ends when the run ends. Where output is no terminal it prints one picture.
"""

from __future__ import annotations

import shutil
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import plotext
import psutil
import tyro

from nanochat import configurator
from nanochat.common import STAGES, UserError, checkpoints_dir, read_json
from nanochat.tracking import read_metrics

LOSS_WINDOW = 0.95  # of the smoothed line: single steps hide the trend
CLEAR_SCREEN = "\x1b[H\x1b[2J"
SILENT_SECONDS = 600  # a run on another machine that writes nothing for so long has ended
HEADLINE = ("loss", "val_bpb", "core", "core_partial")
CLOCK_SECONDS = 2.0  # the start of a process and the time of a file are known no more exactly
SMALLEST = (40, 8)  # columns and lines below which a plot says nothing


@dataclass(frozen=True)
class Config:
    """Flags of watch."""

    run: tyro.conf.Positional[str] = ""
    """A stage, stage/tag, or a run's folder; default: the run written to last."""
    metrics: str = "loss,val_bpb"
    """What to plot, joined with commas."""
    every: float = 2.0
    """Seconds between looks."""
    once: bool = False
    """Print one picture and end."""


def main(config: Config) -> int:
    """Draw until the run has ended."""
    run_dir = find_run(config.run)
    names = [name.strip() for name in config.metrics.split(",") if name.strip()]
    is_live = sys.stdout.isatty() and not config.once
    while True:
        is_running = has_writer(run_dir)
        size = shutil.get_terminal_size()
        picture = draw(run_dir, names, is_running=is_running, width=size.columns, height=size.lines)
        print(f"{CLEAR_SCREEN}{picture}" if is_live else picture, flush=True)
        if not is_live or not is_running:
            return 0
        time.sleep(max(config.every, 0.1))


def find_run(name: str) -> Path:
    """The folder of a run by stage, stage/tag or path; UserError that lists what there is."""
    given = Path(name).expanduser()
    if name and (given / "metrics.jsonl").is_file():
        return given
    runs = {
        f"{stage}/{path.parent.name}": path
        for stage in STAGES
        for path in sorted(checkpoints_dir(stage).glob("*/metrics.jsonl"))
    }
    matching = [
        path for key, path in runs.items() if not name or name in (key, key.partition("/")[0])
    ]
    if not matching:
        there = ", ".join(runs) or "none yet"
        raise UserError(f"no run {name!r} has metrics; there is {there}")
    return max(matching, key=lambda path: path.stat().st_mtime_ns).parent


def has_writer(run_dir: Path) -> bool:
    """Whether a process still writes this run."""
    try:
        process, _, host = (run_dir / ".lock").read_text(encoding="utf-8").strip().partition(" on ")
    except FileNotFoundError:
        return False
    # Only looked at, never locked: a lock held for an instant could turn a starting run away.
    if host == socket.gethostname():
        return process.isdigit() and _is_older(int(process), (run_dir / ".lock").stat().st_mtime)
    return time.time() - (run_dir / "metrics.jsonl").stat().st_mtime < SILENT_SECONDS


def _is_older(process: int, written: float) -> bool:
    """Whether a process of this number is there and may have written at that time.

    Numbers are used again: one that began later belongs to another program.
    """
    try:
        return psutil.Process(process).create_time() < written + CLOCK_SECONDS
    except psutil.NoSuchProcess:
        return False


def draw(run_dir: Path, names: list[str], *, is_running: bool, width: int, height: int) -> str:
    """A headline and one plot below the other, in at most `height` lines where that is possible."""
    rows = read_metrics(run_dir / "metrics.jsonl")
    series = {name: points(rows, name) for name in names}
    unknown = [name for name, (steps, _) in series.items() if not steps]
    # One point is no curve: its axes would be made up.
    single = {name: xy for name, xy in series.items() if len(xy[0]) == 1}
    series = {name: xy for name, xy in series.items() if len(xy[0]) > 1}
    lines = [headline(run_dir, rows, is_running)]
    if unknown:
        known = sorted({key for row in rows for key in row if key != "step"})
        lines.append(f"no {', '.join(unknown)} yet; there is {', '.join(known) or 'nothing'}")
    lines += [f"{name} {ys[0]:.4g} at step {xs[0]}" for name, (xs, ys) in single.items()]
    room = max((height - len(lines) - 1) // max(len(series), 1), SMALLEST[1])
    pictures = [
        plot(name, steps, values, max(width, SMALLEST[0]), room)
        for name, (steps, values) in series.items()
    ]
    return "\n".join([*lines, *pictures])


def points(rows: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of a metric; a loss is smoothed, a value that was no number left out."""
    steps: list[int] = []
    values: list[float] = []
    average = 0.0
    for row in rows:
        value = row.get(name)
        if not isinstance(value, int | float):
            continue
        if name == "loss":
            average = LOSS_WINDOW * average + (1.0 - LOSS_WINDOW) * value
            value = average / (1.0 - LOSS_WINDOW ** (len(steps) + 1))
        steps.append(row["step"])
        values.append(float(value))
    return steps, values


def headline(run_dir: Path, rows: list[dict[str, Any]], is_running: bool) -> str:
    """Which run, how far, the newest of its numbers, and whether it goes on."""
    newest: dict[str, Any] = {}
    for row in rows:
        newest |= {key: value for key, value in row.items() if value is not None}
    step = newest.get("step", 0)
    states = sorted(run_dir.glob("step_*/state.json"))
    planned = read_json(states[-1]).get("num_iterations") if states else None
    parts = [
        f"{run_dir.parent.name.removesuffix('_checkpoints')} {run_dir.name}",
        f"step {step}/{planned}" if planned else f"step {step}",
        *(f"{name} {newest[name]:.4g}" for name in HEADLINE if name in newest),
    ]
    if "tokens_per_second" in newest:
        parts.append(f"{newest['tokens_per_second']:,.0f} tok/s")
    ended = "finished" if planned == step else "not running"
    return "  ".join([*parts, "running" if is_running else ended])


def plot(name: str, steps: list[int], values: list[float], width: int, height: int) -> str:
    """One metric over steps, `width` columns by `height` lines of plain text."""
    figure = plotext.figure
    figure.clear()
    figure.theme("colorless")
    figure.plot_size(width, height)
    figure.title(f"{name} (smoothed)" if name == "loss" else name)
    signal = figure.signal(steps, values)
    signal.lines()
    figure.draw(signal)
    text: str = figure.build().string(colorless=True)
    return "\n".join(line.rstrip() for line in text.splitlines())


if __name__ == "__main__":
    configurator.run(main, Config)
