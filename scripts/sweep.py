"""Train a series of base models and compare them: one CSV row, one point of a plot for each.

python -m scripts.sweep miniseries --depths=12,14,16 -- --preset=modern
python -m scripts.sweep scaling_laws --flops_budgets=1e18,2.15e18 --depths=10,12,14,16

What follows the bare -- goes to every scripts.base_train. Start the same command again to go on.
"""

from __future__ import annotations

import logging
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from nanochat import configurator, report, sweep_plots
from nanochat.common import UserError, locked
from nanochat.stopping import EXIT_STOPPED, StopRequest, catch_signals
from nanochat.sweep import (
    BUDGETS,
    DEPTHS,
    MODULE,
    Kind,
    PlannedRun,
    Sweep,
    check_rows,
    parse_numbers,
    plan,
)
from nanochat.sweep_results import (
    Row,
    fit_budgets,
    fits_text,
    read_rows,
    runs_table,
    write_rows,
)
from nanochat.tokenizer import get_tokenizer

logger = logging.getLogger(__name__)

CSV_FILE, PLOT_FILE = "results.csv", "plot.svg"
# What saves a run, and the exit code that then is the sweep's.
STOP_CODES = {signal.SIGUSR1: EXIT_STOPPED, signal.SIGINT: 130, signal.SIGTERM: 143}
# Not SIGINT: a second Ctrl-C ends a run without saving, and a terminal sends the first one itself.
PASSED_ON = {"TERM": signal.SIGTERM, "USR1": signal.SIGUSR1}
POLL_SECONDS = 0.2  # how long a signal may wait before it is passed on
# Time to write the checkpoint of a large model after a signal, as in scripts/ranks.sh; torchrun's
# own default is 30 s.
ENVIRONMENT = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "300"}


@dataclass(frozen=True)
class Config:
    """Flags of sweep. Those behind a bare -- go to every scripts.base_train."""

    kind: tyro.conf.Positional[Kind]
    """miniseries: depths at equal tokens per parameter. scaling_laws: depths at equal FLOPs."""
    name: str = "default"
    """Begins the model tags and names the folder of results."""
    depths: str | None = None
    """Layers, joined with commas; default: 12 to 26, of scaling_laws 10 to 20, in steps of 2."""
    flops_budgets: str | None = None
    """Training FLOPs of scaling_laws, joined with commas; default: 1e18,2.15e18,4.64e18,1e19."""
    target_param_data_ratio: float | None = None
    """Tokens per parameter of a miniseries; default: the optimizer's."""
    launch: str | None = None
    """Words in front of the module's name, as torchrun's; default: this Python, one process."""
    dry_run: bool = False
    """Print commands and sizes, run none."""
    training_flags: configurator.Rest = ()


@dataclass(frozen=True)
class Launcher:
    """How a run is started and stopped."""

    words: tuple[str, ...]
    """In front of the module's name; empty for this Python."""
    stop_signal: signal.Signals

    @property
    def command(self) -> tuple[str, ...]:
        """What runs a module."""
        return self.words or (sys.executable, "-m")

    @property
    def shown(self) -> tuple[str, ...]:
        """The same, as one types it."""
        return self.words or ("python", "-m")


def main(config: Config) -> int:
    """Train what has no row yet; then a table, a plot and a section of the report."""
    sweep, launcher = asked_sweep(config), asked_launcher(config.launch)
    tokenizer = get_tokenizer()
    runs, path = plan(sweep, tokenizer), sweep.folder / CSV_FILE
    if config.dry_run:
        rows = read_rows(path)
        check_rows(sweep, rows, path, tokenizer)
        announce(runs, {row.model_tag for row in rows}, launcher)
        return 0
    with locked(sweep.folder):
        rows = read_rows(path)
        check_rows(sweep, rows, path, tokenizer)
        return Progress(sweep, runs, rows, launcher).run()


def asked_sweep(config: Config) -> Sweep:
    """The sweep that the flags describe."""
    is_series = config.kind == "miniseries"
    ratio = config.target_param_data_ratio
    if is_series and config.flops_budgets is not None:
        raise UserError("--flops-budgets belongs to scaling_laws; leave it out of a miniseries")
    if not is_series and ratio is not None:
        raise UserError(
            "--target-param-data-ratio belongs to a miniseries; in scaling_laws it follows from "
            "the budgets"
        )
    if ratio is not None and not 0 < ratio < math.inf:
        raise UserError(
            f"--target-param-data-ratio is {ratio:g}; give tokens per parameter above 0, or leave "
            "it out for the optimizer's own"
        )
    budgets: tuple[float, ...] = () if is_series else BUDGETS
    if config.flops_budgets is not None:
        budgets = parse_numbers("flops-budgets", config.flops_budgets, float, 1.0)
    depths = DEPTHS[config.kind]
    if config.depths is not None:
        depths = parse_numbers("depths", config.depths, int, 1)
    return Sweep(
        kind=config.kind,
        name=config.name,
        depths=depths,
        budgets=budgets,
        ratio=ratio,
        training_flags=config.training_flags,
    )


def asked_launcher(launch: str | None) -> Launcher:
    """What --launch and STOP_SIGNAL, which a SLURM job sets, say; UserError naming them."""
    name = os.environ.get("STOP_SIGNAL") or "TERM"
    stop_signal = PASSED_ON.get(name.removeprefix("SIG"))
    if stop_signal is None:
        raise UserError(f"STOP_SIGNAL is {name!r}; use {' or '.join(PASSED_ON)}, or unset it")
    if launch is None:
        return Launcher((), stop_signal)
    try:
        words = tuple(shlex.split(launch))
    except ValueError as error:
        raise UserError(f"--launch is {launch!r}: {error}") from error
    if not words:
        raise UserError("--launch is empty; give a command such as torchrun's, or leave it out")
    if shutil.which(words[0]) is None:
        raise UserError(f"cannot run {words[0]!r}, with which --launch begins: no such program")
    return Launcher(words, stop_signal)


def announce(runs: Sequence[PlannedRun], done: set[str], launcher: Launcher) -> None:
    """What a dry run says: every command that would be run, and how large it is."""
    flops = 0.0
    for run in runs:
        if run.tag in done:
            print(f"# {run.describe()}; done")
            continue
        checkpoint = run.earlier_checkpoint()
        goes_on = f"; goes on from step {checkpoint.step:,}" if checkpoint else ""
        print(f"# {run.describe()}{goes_on}")
        print(shlex.join([*launcher.shown, *words(run)]))
        flops += run.flops
    left = sum(run.tag not in done for run in runs)
    print(f"# {left} of {len(runs)} runs to train, {flops:.2e} FLOPs")


def words(run: PlannedRun) -> list[str]:
    """A run's command behind its launcher."""
    return [MODULE, *run.flags, "--resume"]


class Progress:
    """The runs of a sweep, one after the other, and what has become of them."""

    def __init__(
        self, sweep: Sweep, runs: Sequence[PlannedRun], rows: Sequence[Row], launcher: Launcher
    ) -> None:
        self._sweep, self._runs = sweep, runs
        self._rows = {row.model_tag: row for row in rows}
        self._launcher = launcher
        self._path = sweep.folder / CSV_FILE
        self._failed: dict[str, str] = {}
        self._stop = StopRequest()

    def run(self) -> int:
        """Train, then show; returns the exit code."""
        for run in self._runs:  # before anything is trained: a changed flag costs nothing
            if run.tag not in self._rows:
                run.earlier_checkpoint()
        with catch_signals(self._stop):
            code = next((code for run in self._runs if (code := self._finish(run))), 0)
        if code:
            logger.warning(
                "stopped (exit code %d) with %d of %d runs in %s; start the same command again "
                "to go on",
                code,
                sum(run.tag in self._rows for run in self._runs),
                len(self._runs),
                self._path,
            )
            return code
        if self._rows:
            show(self._sweep, sorted(self._rows.values(), key=_order))
        for tag, failure in self._failed.items():
            logger.error("%s failed with %s; it has no row", tag, failure)
        if self._failed:
            logger.error("mend the cause and start the same command again; the rest is skipped")
        return 1 if self._failed else 0

    def _finish(self, run: PlannedRun) -> int:
        """Bring a run to its row; returns the exit code of a stop, 0 when there was none."""
        if run.tag in self._rows:
            logger.info("%s: done before, skipped", run.tag)
            return 0
        if self._note(run):  # ended before, and killed before its row was written
            return 0
        code = self._stop_code()
        if code:
            return code
        for other in self._runs:  # one that is left over would train beside this one
            other.check_unused()
        command = [*self._launcher.command, *words(run)]
        logger.info("%s: %s", run.tag, shlex.join(command))
        code = run_process(command, self._stop, stop_signal=self._launcher.stop_signal)
        # Whether a run is finished its records say: a launcher may hide an exit code.
        is_finished = self._note(run)
        if stopped := self._stop_code():
            return stopped
        if code in STOP_CODES.values():
            return code
        if not is_finished:
            failure = f"exit code {code}"
            if not code:
                failure += f" but no checkpoint and validation of step {run.num_iterations:,}"
            self._failed[run.tag] = failure
            logger.error("%s failed with %s", run.tag, failure)
        return 0

    def _note(self, run: PlannedRun) -> bool:
        """Write the row of a finished run; False when it is not finished."""
        row = run.finished_row()
        if row is None:
            return False
        self._rows[run.tag] = row
        write_rows(self._path, self._rows.values())
        logger.info("%s: val bpb %.4f, written to %s", run.tag, row.val_bpb, self._path)
        return True

    def _stop_code(self) -> int:
        received = self._stop.received
        return STOP_CODES[signal.Signals(received[0])] if received else 0


def run_process(
    command: Sequence[str], stop: StopRequest, *, stop_signal: signal.Signals = signal.SIGTERM
) -> int:
    """The exit code of a command, as a shell counts it; a stop is passed on as `stop_signal`.

    So is Ctrl-C: the terminal has sent that to the command as well, and a second one would end it
    without saving.
    """
    try:
        process = subprocess.Popen(command, env=ENVIRONMENT | os.environ)
    except OSError as error:
        raise UserError(f"cannot run {command[0]!r} ({error.strerror}); see --launch") from error
    passed_on = 0
    try:
        while True:
            try:
                code = process.wait(POLL_SECONDS)
                return code if code >= 0 else 128 - code
            except subprocess.TimeoutExpired:
                if len(stop.received) > passed_on:
                    passed_on = len(stop.received)
                    process.send_signal(stop_signal)
    finally:
        if process.poll() is None:  # a second Ctrl-C
            process.terminate()
            process.wait()


def show(sweep: Sweep, rows: Sequence[Row]) -> None:
    """Print the table, draw the plot, write the report's section."""
    text, plot = runs_table(rows), sweep.folder / PLOT_FILE
    if sweep.kind == "miniseries":
        sweep_plots.draw_miniseries(rows, plot)
    else:
        fits = fit_budgets(rows)
        text = f"{text}\n\n{fits_text(fits)}"
        sweep_plots.draw_isoflops(fits, plot)
    print(text)
    report.append(sweep.title, [text, {"results": str(sweep.folder / CSV_FILE), "plot": str(plot)}])
    logger.info("the plot is %s", plot)


def _order(row: Row) -> tuple[float, int]:
    return row.flops_budget or 0.0, row.depth


if __name__ == "__main__":
    configurator.run(main, Config)
