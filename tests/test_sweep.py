"""Sweeps: what is planned, what is kept, what is refused, and what the numbers are taken for."""

from __future__ import annotations

import dataclasses
import math
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanochat import configurator, report
from nanochat.checkpoint_manager import newest_checkpoint
from nanochat.common import UserError, checkpoints_dir
from nanochat.gpt import GPT
from nanochat.pretraining import PretrainingConfig, settle, sizes_at
from nanochat.sweep import DEPTHS, Sweep, plan_run
from nanochat.sweep_plots import draw_isoflops, draw_miniseries
from nanochat.sweep_results import (
    Row,
    fit_budget,
    fit_budgets,
    fits_text,
    growth,
    markdown,
    read_rows,
    runs_table,
    write_rows,
)
from nanochat.tokenizer import Tokenizer, get_tokenizer
from nanochat.tracking import read_metrics
from scripts import sweep
from tests import stage_processes
from tests.distributed import free_port

REPOSITORY = Path(__file__).parents[1]
SECONDS = 300
SPEC_COLUMNS = (
    "depth,model_dim,num_params,num_scaling_params,num_iterations,tokens_trained,"
    "param_data_ratio,val_bpb,core_score,train_time_sec"
)
TINY = (
    *("--aspect_ratio=16", "--head_dim=16", "--max_seq_len=64", "--device_batch_size=4"),
    *("--total_batch_size=256", "--eval_tokens=1024", "--core_metric_every=-1", "--eval_every=0"),
    *("--device_type=cpu", "--data=embedded", "--log_every=1"),
)


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base folder with a tokenizer and no data."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    text = "one two three four five six seven eight nine ten " * 20
    Tokenizer.train_from_iterator([text], 300).save(tmp_path / "tokenizer")
    return tmp_path


def parse(*arguments: str) -> sweep.Config:
    return configurator.parse(sweep.Config, arguments)


def make_row(depth: int, *, budget: float | None = None, **values: Any) -> Row:
    """A row whose tag and command are those of the sweep `series` with the flags TINY."""
    asked = Sweep("miniseries", "series", (depth,), (), 2.0, TINY)
    flags = asked.flags(None, depth)
    fields: dict[str, Any] = {
        "flops_budget": budget,
        "depth": depth,
        "model_dim": 16 * depth,
        "num_params": 1000 * depth,
        "num_scaling_params": 500 * depth,
        "num_iterations": 10,
        "tokens_trained": 2560,
        "param_data_ratio": 2.0,
        "val_bpb": 2.0 / depth,
        "core_score": None,
        "train_time_sec": 1.25,
        "train_flops": 1e9 * depth,
        "core_partial": None,
        "model_tag": f"series_d{depth}",
        "data": "embedded",
        "tokenizer": get_tokenizer().hash if "tokenizer" not in values else "",
        "command": shlex.join(["python", "-m", "scripts.base_train", *flags]),
    }
    return Row(**(fields | values))


# ---- what is asked for ------------------------------------------------------------------------


def test_defaults_are_those_of_the_public_scripts() -> None:
    series = sweep.asked_sweep(parse("miniseries"))
    assert series.grid == [(None, depth) for depth in (12, 14, 16, 18, 20, 22, 24, 26)]
    laws = sweep.asked_sweep(parse("scaling_laws", "--name=first"))
    assert laws.budgets == (1e18, 2.15e18, 4.64e18, 1e19)
    assert laws.depths == DEPTHS["scaling_laws"] == (10, 12, 14, 16, 18, 20)
    assert len(laws.grid) == 24
    assert (series.folder.name, laws.folder.name) == (
        "default_miniseries_results",
        "scaling_laws_results_first",
    )
    flags = laws.flags(2.15e18, 10)
    assert flags[:3] == ("--depth=10", "--model_tag=first_2.15e18_d10", "--target_flops=2.15e+18")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["miniseries", "--depths=1,x"], "--depths is '1,x', where 'x' is no number"),
        (["miniseries", "--depths=0"], "--depths has 0; give numbers of at least 1"),
        (["miniseries", "--depths=2,2"], "which has a number twice"),
        (["miniseries", "--flops_budgets=1e9"], "--flops-budgets belongs to scaling_laws"),
        (["scaling_laws", "--flops_budgets=nan"], "--flops-budgets has nan"),
        (["scaling_laws", "--target_param_data_ratio=9"], "belongs to a miniseries"),
        (["miniseries", "--name=a/b"], "--name is 'a/b'"),
        (["miniseries", "--", "--depth=3"], "--depth=3 behind -- is what the sweep itself sets"),
        (["miniseries", "--", "--num-iterations", "3"], "--num-iterations behind --"),
        (["miniseries", "--", "--no-resume"], "--no-resume behind -- is what the sweep itself"),
        (["miniseries", "--", "--no_dry_run"], "--no_dry_run behind --"),
        (["miniseries", "--depths="], "--depths is empty; give numbers with commas"),
        (["scaling_laws", "--flops_budgets= "], "--flops-budgets is empty; give numbers"),
        (["miniseries", "--launch="], "--launch is empty"),
        (["miniseries", "--launch= "], "--launch is empty"),
        (["miniseries", "--launch=bash -c 'x"], "--launch is .*: No closing quotation"),
        (["miniseries", "--launch=nowhere -m", "--dry_run"], "cannot run 'nowhere'"),
        (["miniseries", "--target_param_data_ratio=0"], "--target-param-data-ratio is 0"),
        (["miniseries", "--target_param_data_ratio=-2"], "--target-param-data-ratio is -2"),
        (["miniseries", "--target_param_data_ratio=nan"], "--target-param-data-ratio is nan"),
        (["miniseries", "--", "--dpeth=3"], "unknown flag --dpeth; did you mean --depth"),
        (["miniseries", "--", "--eval_every=-1"], "--eval-every is -1: without validation"),
        (["miniseries", "--", "--spike_limit=-1"], "--spike-limit is -1"),
    ],
)
def test_what_no_sweep_can_be_is_refused_before_anything_runs(
    base: Path, arguments: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message.replace("?", ".")):
        sweep.main(parse(*arguments))
    assert sorted(path.name for path in base.iterdir()) == ["tokenizer"]


def test_a_budget_below_one_step_names_its_run(base: Path) -> None:
    with pytest.raises(UserError, match=r"default_1e06_d4: the horizon is less than one step"):
        sweep.main(parse("scaling_laws", "--flops_budgets=1e6", "--depths=4", "--dry_run"))


def test_sizes_that_do_not_fit_name_their_run_and_a_remedy(base: Path) -> None:
    message = (
        r"default_d5: n_embd 320 is not a multiple of n_head 3; .*--head_dim or --aspect_ratio.*"
        "or leave depth 5 out"
    )
    with pytest.raises(UserError, match=message):
        sweep.main(parse("miniseries", "--depths=4,5", "--dry_run"))


def test_a_value_behind_the_dashes_may_be_called_like_a_flag_of_the_sweep(base: Path) -> None:
    asked = Sweep("miniseries", "series", (3,), (), None, ("--run", "depth"))
    assert "--run=depth" in asked.flags(None, 3)


def test_a_dry_run_prints_commands_and_true_sizes_and_writes_nothing(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("miniseries", "--depths=1,2", "--target_param_data_ratio=20", "--dry_run")
    assert sweep.main(parse(*arguments, "--launch=bash -c", "--", *TINY)) == 0
    lines = capsys.readouterr().out.splitlines()
    # Vocabulary 298, width 32: two tables of 298 x 32, 12 x 32^2 in each block; 6 FLOPs for all but
    # the first table, and 12 x 32 for each of 64 positions in each layer.
    assert lines[2] == (
        "# default_d2: 43,648 parameters (34,112 of blocks and head), 3,410 steps x 256 tokens = "
        "872,960 tokens, 2.22e+11 FLOPs, 20.0 tokens per parameter"
    )
    words = shlex.split(lines[3])
    assert words[:3] == ["bash", "-c", "scripts.base_train"]
    config = configurator.parse(PretrainingConfig, words[3:])
    assert (config.depth, config.model_tag, config.resume) == (2, "default_d2", True)
    assert config.core_metric_every == -1  # what is given comes before what a sweep begins with
    assert lines[-1].startswith("# 2 of 2 runs to train, ")
    assert sorted(path.name for path in base.iterdir()) == ["tokenizer"]


def test_settings_from_a_file_are_spelled_out_and_cannot_set_what_the_sweep_sets(
    base: Path,
) -> None:
    settings = base / "settings.py"
    settings.write_text("seed = 7\nmax_seq_len = 64\n")
    asked = Sweep("miniseries", "series", (3,), (), None, (str(settings), "--seed=8"))
    assert {"--seed=8", "--max_seq_len=64"} < set(asked.flags(None, 3))
    assert not any(str(settings) in flag for flag in asked.flags(None, 3))
    settings.write_text("num_iterations = 7\n")
    with pytest.raises(UserError, match="--num_iterations=7 behind -- is what the sweep itself"):
        Sweep("miniseries", "series", (3,), (), None, (str(settings),))


@pytest.mark.parametrize("preset", ["classic", "modern"])
def test_a_plan_has_the_settings_of_base_train(base: Path, preset: str) -> None:
    flags = ("--max_seq_len=64", f"--preset={preset}")
    asked = Sweep("miniseries", "series", (3,), (), None, flags)
    run = plan_run(asked, None, 3, get_tokenizer())
    model = GPT(sizes_at(run.asked, 3, get_tokenizer().vocab_size))
    assert run.config == settle(run.asked, model)
    counts = model.count_parameters()
    counted = counts["transformer_matrices"] + counts["lm_head"]
    assert run.num_scaling_parameters == counted
    assert run.num_horizon_parameters == (counts["total"] if preset == "classic" else counted)
    assert run.flops == run.tokens * model.estimate_flops()


# ---- the CSV ----------------------------------------------------------------------------------


def test_rows_come_back_as_they_were_in_the_order_of_the_grid(base: Path) -> None:
    path = base / "results.csv"
    rows = [make_row(1, val_bpb=1 / 3), make_row(2, core_score=-0.012, core_partial=None)]
    write_rows(path, reversed(rows))
    assert read_rows(path) == rows
    assert path.read_text().startswith(SPEC_COLUMNS + ",")
    laws = [make_row(2, budget=1e9), make_row(1, budget=2e9)]
    write_rows(path, reversed(laws))
    assert read_rows(path) == laws
    assert path.read_text().startswith("flops_budget," + SPEC_COLUMNS)
    assert read_rows(base / "nothing.csv") == []


def test_a_damaged_file_is_named_with_its_line(base: Path) -> None:
    path = base / "results.csv"
    write_rows(path, [make_row(1), make_row(2)])
    whole = path.read_text()
    path.write_text(whole.replace(",2560,", ",many,", 1))
    with pytest.raises(UserError, match=r"results\.csv, line 2: .*'many'; delete that line"):
        read_rows(path)
    for cut in (",series_d2,", ",embedded,", ",2560,"):
        path.write_text(whole[: whole.rindex(cut)])
        with pytest.raises(UserError, match="line 3: no "):
            read_rows(path)
    path.write_text("depth,val_bpb\n1,2\n")
    with pytest.raises(UserError, match="has no column model_dim"):
        read_rows(path)


def test_a_file_that_is_no_csv_is_named(base: Path) -> None:
    path = base / "results.csv"
    write_rows(path, [make_row(1)])
    whole = path.read_bytes()
    path.write_bytes(b'"depth"x,' + whole)
    with pytest.raises(UserError, match=r"results\.csv, line 1: .*move it away"):
        read_rows(path)
    for damaged in (b"\xff" + whole, whole.replace(b"embedded", b"\xe9")):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"results\.csv is not UTF-8 .*save it as"):
            read_rows(path)


def test_a_file_that_a_spreadsheet_has_saved_is_read(base: Path) -> None:
    path = base / "results.csv"
    write_rows(path, [make_row(1)])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert read_rows(path) == [make_row(1)]


def run_series(*flags: str, depths: str = "1,2") -> int:
    arguments = ("--name=series", f"--depths={depths}", "--target_param_data_ratio=2")
    return sweep.main(parse("miniseries", *arguments, "--launch=false", "--", *flags))


def test_what_has_its_row_is_not_trained_again(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = base / "series_miniseries_results" / "results.csv"
    write_rows(path, [make_row(1), make_row(2)])
    # `false` would fail if it were called. Neither the rows of a pass nor the order of flags make
    # another run.
    assert run_series(*reversed(TINY), "--device_batch_size=2") == 0
    assert "|     2 |    32 |" in capsys.readouterr().out
    assert path.with_name("plot.svg").stat().st_size > 1000
    page = report.generate().read_text()
    assert "## Miniseries series" in page
    assert "(report_plots/miniseries-series.svg)" in page
    assert (base / "report" / "report_plots" / "miniseries-series.svg").is_file()


@pytest.mark.parametrize("depths", ["1,2", "2"])  # rows that were not asked for are shown as well
def test_a_row_of_other_flags_is_refused(base: Path, depths: str) -> None:
    path = base / "series_miniseries_results" / "results.csv"
    write_rows(path, [make_row(1)])
    with pytest.raises(UserError, match=r"series_d1 in .*matrix_lr None, not 0\.01.*--name"):
        run_series(*TINY, "--matrix_lr=0.01", depths=depths)
    with pytest.raises(UserError, match="eval_tokens 1024, not 2048"):
        run_series(*TINY, "--eval_tokens=2048", depths=depths)
    with pytest.raises(UserError, match=r"target_param_data_ratio 2\.0, not 3\.0"):
        sweep.main(parse("miniseries", "--name=series", "--target_param_data_ratio=3", "--", *TINY))
    Tokenizer.train_from_iterator(["another text"], 270).save(base / "tokenizer")
    with pytest.raises(UserError, match="tokenizer_hash"):
        run_series(*TINY, depths=depths)
    assert len(read_rows(path)) == 1


def test_data_that_is_named_later_is_the_same_data(base: Path) -> None:
    flags = tuple(flag for flag in TINY if not flag.startswith("--data="))
    unnamed = Sweep("miniseries", "series", (1,), (), 2.0, flags).flags(None, 1)
    command = shlex.join(["python", "-m", "scripts.base_train", *unnamed])
    path = base / "series_miniseries_results" / "results.csv"
    write_rows(path, [make_row(1, data="fineweb-edu", command=command)])
    assert run_series(*flags, depths="1") == 0
    assert run_series(*flags, "--data=fineweb-edu", depths="1") == 0
    with pytest.raises(UserError, match="data 'fineweb-edu', not 'climbmix'"):
        run_series(*flags, "--data=climbmix", depths="1")


HOLD = """
import sys
from pathlib import Path
from nanochat.run_folder import lock_run
with lock_run(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("tag", ["series_d1", "series_d2"])
def test_no_run_is_started_beside_one_that_a_killed_sweep_left_behind(base: Path, tag: str) -> None:
    run_dir, started = checkpoints_dir("base") / tag, base / "started"
    asked = ("miniseries", "--name=series", "--depths=1,2", f"--launch=bash -c 'touch {started}'")
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, run_dir],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as orphan:
        assert orphan.stdout is not None
        assert orphan.stdout.readline() == b"locked\n"
        with pytest.raises(
            UserError, match=f"{tag} is in use by process {orphan.pid} on .*stop it"
        ):
            sweep.main(parse(*asked, "--", *TINY))
        orphan.kill()
    assert not started.exists()
    sweep.main(parse(*asked, "--", *TINY))
    assert started.exists()


SLEEPER = """
trap 'echo USR1 > "$0"; exit 85' USR1
trap 'echo TERM > "$0"; exit 143' TERM
echo "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT" > "$0.started"
for ((i = 0; i < 600; i++)); do sleep 0.1; done
"""


@pytest.mark.parametrize(("asked", "sent"), [(None, "TERM"), ("USR1", "USR1"), ("SIGUSR1", "USR1")])
def test_a_stop_is_passed_on_as_the_signal_that_the_launcher_takes(
    base: Path, monkeypatch: pytest.MonkeyPatch, asked: str | None, sent: str
) -> None:
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", raising=False)
    monkeypatch.delenv("STOP_SIGNAL", raising=False)
    if asked is not None:
        monkeypatch.setenv("STOP_SIGNAL", asked)
    told, started = base / "told", base / "told.started"
    launch = f"--launch={shlex.join(['bash', '-c', SLEEPER, str(told)])}"
    stopper = threading.Thread(target=stop_when_there, args=(started,))
    stopper.start()
    code = sweep.main(parse("miniseries", "--depths=1", launch, "--", *TINY))
    stopper.join()
    assert code == 143
    assert told.read_text() == f"{sent}\n"
    assert started.read_text() == "300\n"


def stop_when_there(path: Path) -> None:
    """Send this process SIGTERM once a file has its text."""
    while not (path.exists() and path.read_text()):
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("name", ["KILL", "INT", "nonsense"])
def test_a_stop_signal_that_does_not_save_is_refused(
    base: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("STOP_SIGNAL", name)
    with pytest.raises(UserError, match=f"STOP_SIGNAL is '{name}'; use TERM or USR1"):
        sweep.main(parse("miniseries", "--depths=1", "--", *TINY))


def test_failed_runs_are_named_and_the_others_are_tried(
    base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert run_series(*TINY) == 1
    said = caplog.text
    assert "series_d1 failed with exit code 1; it has no row" in said
    assert "series_d2 failed with exit code 1; it has no row" in said
    assert not (base / "series_miniseries_results" / "results.csv").exists()


@pytest.mark.parametrize("code", [85, 130, 143])
def test_a_run_that_was_stopped_stops_the_sweep(
    base: Path, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    launch = f"--launch=bash -c 'exit {code}'"
    depths = ("--depths=1,2", "--name=series", "--target_param_data_ratio=2")
    assert sweep.main(parse("miniseries", *depths, launch, "--", *TINY)) == code
    assert f"stopped (exit code {code}) with 0 of 2 runs in" in caplog.text
    assert "start the same command again" in caplog.text
    assert "series_d2" not in caplog.text


def test_a_launcher_that_is_not_there_is_named(base: Path) -> None:
    with pytest.raises(UserError, match="cannot run 'nowhere'"):
        sweep.main(parse("miniseries", "--depths=1", "--launch=nowhere -m", "--", *TINY))


# ---- scaling laws -----------------------------------------------------------------------------


def iso_rows(budget: float, sizes: list[float], optimum: float) -> list[Row]:
    """Runs whose validation is 3 + 0.1 ln(N / optimum)^2; tokens = budget / 6 N."""
    return [
        make_row(
            index + 1,
            budget=budget,
            num_scaling_params=round(size),
            tokens_trained=round(budget / (6 * size)),
            param_data_ratio=budget / (6 * size) / size,
            val_bpb=3.0 + 0.1 * float(np.log(round(size) / optimum)) ** 2,
            tokenizer="",
        )
        for index, size in enumerate(sizes)
    ]


@pytest.mark.parametrize("num_sizes", [3, 6])
@pytest.mark.parametrize("optimum", [3.3e8, 9e8])
def test_a_known_minimum_is_found(num_sizes: int, optimum: float) -> None:
    sizes = list(np.geomspace(1e8, 2e9, num_sizes))
    fit = fit_budget(iso_rows(1e18, sizes, optimum), 1e18)
    # Sizes are whole numbers, and a parabola is what was put in: only rounding is left.
    assert fit.problem == ""
    assert fit.optimal_params == pytest.approx(optimum, rel=1e-6)
    assert fit.optimal_bpb == pytest.approx(3.0, abs=1e-9)
    assert fit.optimal_tokens == pytest.approx(1e18 / (6 * optimum), rel=1e-6)
    assert fit.optimal_ratio == pytest.approx(1e18 / (6 * optimum**2), rel=1e-6)
    assert fit.predict(np.array(sizes)) == pytest.approx(fit.bpb, abs=1e-9)


def test_optima_grow_with_the_budget_as_they_were_made_to(tmp_path: Path) -> None:
    sizes = list(np.geomspace(5e7, 5e9, 5))
    rows = [
        row
        for budget in (1e18, 1e19, 1e20)
        for row in iso_rows(budget, sizes, 3e8 * (budget / 1e18) ** 0.4)
    ]
    fits = fit_budgets(rows)
    assert growth(fits) == pytest.approx((0.4, 0.6), abs=1e-6)
    text = fits_text(fits)
    assert "optimal parameters grow as FLOPs^0.40, tokens as FLOPs^0.60" in text
    draw_isoflops(fits, tmp_path / "plot.svg")
    assert "Validation at equal training FLOPs" in (tmp_path / "plot.svg").read_text()


@pytest.mark.parametrize(
    ("optimum", "problem"),
    [
        (1e7, "the minimum lies below depths 1 to 4, outside of the grid; add smaller ones"),
        (1e11, "the minimum lies above depths 1 to 4, outside of the grid; add larger ones"),
    ],
)
def test_a_minimum_outside_of_the_grid_is_no_finding(optimum: float, problem: str) -> None:
    fits = fit_budgets(iso_rows(1e18, list(np.geomspace(1e8, 2e9, 4)), optimum))
    assert fits[0].problem == problem
    assert np.isnan(fits[0].optimal_params)
    assert growth(fits) is None
    assert fits_text(fits) == f"- budget 1e18: {problem}"


def test_curves_without_a_minimum_say_so(tmp_path: Path) -> None:
    rows = iso_rows(1e18, list(np.geomspace(1e8, 2e9, 4)), 5e8)
    few = fit_budget(rows[:2], 1e18)
    assert few.problem == "2 of the 3 sizes that a parabola needs"
    bent = [dataclasses.replace(row, val_bpb=6.0 - row.val_bpb) for row in rows]
    down = fit_budget(bent, 1e18)
    assert down.problem.startswith("no minimum: the curve over depths 1 to 4 does not bend upwards")
    draw_isoflops([few, down], tmp_path / "plot.svg")


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_validation_that_is_no_number_is_named_and_not_fitted(
    broken: float, tmp_path: Path
) -> None:
    rows = iso_rows(1e18, list(np.geomspace(1e8, 2e9, 4)), 5e8)
    rows[2] = dataclasses.replace(rows[2], val_bpb=broken)
    fit = fit_budget(rows, 1e18)
    assert fit.problem.startswith(f"val_bpb of series_d3 is {broken}")
    assert growth([fit]) is None
    assert fits_text([fit]) == f"- budget 1e18: {fit.problem}"
    draw_isoflops([fit], tmp_path / "plot.svg")


def test_a_miniseries_is_drawn_with_core_where_all_have_one(base: Path) -> None:
    rows = [make_row(1, core_score=0.1), make_row(2, core_score=0.2)]
    draw_miniseries(rows, base / "two.svg")
    draw_miniseries([make_row(1), rows[1]], base / "one.svg")
    assert "CORE" in (base / "two.svg").read_text()
    assert "CORE" not in (base / "one.svg").read_text()
    assert "CORE" in runs_table(rows)
    assert "CORE (part)" in runs_table([make_row(1, core_partial=0.1)])


def test_tables_are_markdown_of_equal_width() -> None:
    lines = markdown([{"a": "1", "long name": "x"}, {"a": "1,000"}]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0] == "|     a | long name |"
    assert lines[3] == "| 1,000 |         - |"


# ---- the real thing ---------------------------------------------------------------------------


def start(base: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """A command in a process group of its own; what it says is added to the base folder's log."""
    with stage_processes.log_of(base).open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", *arguments],
            cwd=REPOSITORY,
            env=os.environ | {"NANOCHAT_BASE_DIR": str(base), "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def wait_for(base: Path, tag: str, step: int, process: subprocess.Popen[bytes]) -> None:
    """Until a run has saved a step."""
    run_dir = checkpoints_dir("base") / tag
    for _ in range(SECONDS * 10):
        if any(int(path.name.removeprefix("step_")) >= step for path in run_dir.glob("step_*")):
            return
        assert process.poll() is None, stage_processes.log_of(base).read_text()[-3000:]
        time.sleep(0.1)
    raise AssertionError(f"no step {step} of {tag}")


@pytest.mark.slow
def test_a_killed_sweep_goes_on_to_the_rows_of_an_undisturbed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("miniseries", "--name=series", "--depths=1,2", "--target_param_data_ratio=1")
    line = ("scripts.sweep", *asked, "--", *TINY)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    stage_processes.prepare(whole)
    stage_processes.copy_of(whole, killed)
    stage_processes.run(whole, *line)
    undisturbed = rows_of(whole, monkeypatch)

    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(killed))
    process = start(killed, *line, "--save_every=1")
    wait_for(killed, "series_d1", 5, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    with pytest.raises(UserError, match=r"series_d1 holds a run that was made with seed 42, not 1"):
        sweep.main(parse(*asked, "--", *TINY, "--seed=1"))
    process = start(killed, *line, "--save_every=1")
    wait_for(killed, "series_d2", 5, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(SECONDS) == 143
    assert [row.depth for row in rows_of(killed, monkeypatch)] == [1]
    said = stage_processes.run(killed, *line)
    assert said.count("resumed from step") == 2
    assert "series_d1: done before, skipped" in said
    assert rows_of(killed, monkeypatch) == undisturbed


@pytest.mark.slow
def test_a_sweep_of_two_ranks_is_stopped_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    stage_processes.prepare(base)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    words = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2")
    place = ("--master_addr=127.0.0.1", f"--master_port={free_port()}")
    asked = ("miniseries", "--name=series", "--depths=1", "--target_param_data_ratio=1")
    launch = f"--launch={shlex.join([*words, *place, '-m'])}"
    line = ("scripts.sweep", *asked, launch, "--", *TINY, "--device_batch_size=2")
    process = start(base, *line, "--save_every=1")
    wait_for(base, "series_d1", 5, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(SECONDS) == 143
    assert rows_of(base, monkeypatch) == []
    process = start(base, *line)
    said = stage_processes.log_of(base)
    assert process.wait(SECONDS) == 0, said.read_text()[-3000:]
    assert said.read_text().count("resumed from step") == 1
    assert [row.depth for row in rows_of(base, monkeypatch)] == [1]


def rows_of(base: Path, monkeypatch: pytest.MonkeyPatch) -> list[Row]:
    """The rows of a sweep, held against the runs' records, without time and words."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    rows = read_rows(base / "series_miniseries_results" / "results.csv")
    for row in rows:
        check_against_records(row)
    return [dataclasses.replace(row, train_time_sec=0.0, command="") for row in rows]


def check_against_records(row: Row) -> None:
    """What a row says is what the run has written."""
    run_dir = checkpoints_dir("base") / row.model_tag
    newest = newest_checkpoint(run_dir)
    assert newest is not None
    assert newest.step == row.num_iterations
    metrics = read_metrics(run_dir / "metrics.jsonl")
    assert row.val_bpb == [line["val_bpb"] for line in metrics if "val_bpb" in line][-1]
    assert row.tokens_trained == 256 * row.num_iterations
