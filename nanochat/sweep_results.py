"""What a sweep over many models has found: its CSV, its table, and the fits of scaling laws.

A sweep trains one model for each row. A miniseries has one depth a row, at equal tokens per
parameter; scaling laws have one training budget and depth a row. numpy only: no torch.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nanochat.common import UserError, atomic_write_text

Values = npt.NDArray[np.float64]

BUDGET = "flops_budget"  # a column of scaling laws only
POINTS_OF_A_PARABOLA = 3
_AWAY = "move it away to start over: runs that are finished are not trained again"


@dataclass(frozen=True)
class Row:
    """One finished run. The fields up to `train_time_sec` are the columns other tools expect."""

    flops_budget: float | None
    """Training FLOPs that were asked for; None in a miniseries."""
    depth: int
    model_dim: int
    num_params: int
    """All parameters."""
    num_scaling_params: int
    """Those of blocks and head."""
    num_iterations: int
    tokens_trained: int
    param_data_ratio: float
    """Tokens per parameter, in the parameters that --target-param-data-ratio counts."""
    val_bpb: float
    """Bits per byte of validation text after the last step."""
    core_score: float | None
    """CORE over all its items; None where it was not measured."""
    train_time_sec: float
    """Seconds of training, all starts together; evaluations and saves are not in it."""
    train_flops: float
    """Tokens times the training FLOPs of a token (`GPT.estimate_flops`)."""
    core_partial: float | None
    """CORE over a part of its items."""
    model_tag: str
    data: str
    tokenizer: str
    """SHA-256 of its vocabulary: another one makes another model and other tokens."""
    command: str
    """What trained it."""


def _optional(text: str) -> float | None:
    return float(text) if text else None


_PARSERS: dict[str, Callable[[str], Any]] = {
    "int": int,
    "float": float,
    "float | None": _optional,
    "str": str,
}
_COLUMNS = {field.name: _PARSERS[str(field.type)] for field in dataclasses.fields(Row)}


# ---- the file ---------------------------------------------------------------------------------


def read_rows(path: Path) -> list[Row]:
    """The rows of a sweep's CSV, none when it is not there; UserError where it is damaged."""
    if not path.exists():
        return []
    try:
        text = path.read_bytes().decode("utf-8-sig")  # spreadsheets begin with a byte order mark
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 ({error}); save it as CSV in UTF-8, or {_AWAY}"
        ) from None
    rows: list[Row] = []
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        names = {BUDGET, *(reader.fieldnames or ())}
    except csv.Error as error:
        raise UserError(f"{path}, line 1: {error}; {_AWAY}") from None
    missing = [name for name in _COLUMNS if name not in names]
    if missing:
        raise UserError(f"{path} has no column {', '.join(missing)}; {_AWAY}")
    while True:
        try:
            cells = next(reader, None)
            if cells is None:
                return rows
            rows.append(_parse(cells))
        except (csv.Error, TypeError, ValueError) as error:
            raise UserError(
                f"{path}, line {reader.line_num}: {error}; delete that line, a finished run "
                "gets its row again without being trained again"
            ) from None


def _parse(cells: Mapping[str, str | None]) -> Row:
    texts = {name: cells.get(name, "") for name in _COLUMNS}
    cut_off = [name for name, text in texts.items() if text is None]
    if cut_off:
        raise ValueError(f"no {cut_off[0]}")
    return Row(**{name: _COLUMNS[name](text or "") for name, text in texts.items()})


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write all rows by budget and depth, atomically."""
    ordered = sorted(rows, key=lambda row: (row.flops_budget or 0.0, row.depth))
    names = [name for name in _COLUMNS if name != BUDGET or ordered[0].flops_budget is not None]
    text = io.StringIO()
    writer = csv.DictWriter(text, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(dataclasses.asdict(row) for row in ordered)
    atomic_write_text(path, text.getvalue())


# ---- tables -----------------------------------------------------------------------------------


def short(value: float) -> str:
    """A large number as budgets are written: 2.15e18."""
    return f"{value:g}".replace("e+", "e")


def runs_table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table that reads well in a terminal, too."""
    return markdown([_cells(row) for row in rows])


def _cells(row: Row) -> dict[str, str]:
    budget = {} if row.flops_budget is None else {"budget": short(row.flops_budget)}
    core, name = (
        (row.core_score, "CORE")
        if row.core_partial is None
        else (
            row.core_partial,
            "CORE (part)",
        )
    )
    return budget | {
        "depth": str(row.depth),
        "width": f"{row.model_dim:,}",
        "parameters": f"{row.num_params:,}",
        "steps": f"{row.num_iterations:,}",
        "tokens": f"{row.tokens_trained:,}",
        "ratio": f"{row.param_data_ratio:.1f}",
        "FLOPs": f"{row.train_flops:.2e}",
        "val bpb": f"{row.val_bpb:.4f}",
        **({} if core is None else {name: f"{core:.4f}"}),
        "seconds": f"{row.train_time_sec:,.0f}",
    }


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """A table with one column a key, padded to equal width."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, *([row.get(name, "-") for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
    lines.insert(1, [f"{'-' * (width - 1)}:" for width in widths])
    return "\n".join(
        f"| {' | '.join(cell.rjust(w) for cell, w in zip(line, widths, strict=True))} |"
        for line in lines
    )


# ---- scaling laws -----------------------------------------------------------------------------


@dataclass(frozen=True)
class IsoFlop:
    """Validation over model size at one budget, and the parabola through it.

    Approach 2 of arXiv:2203.15556 (section 3.2): at equal training FLOPs the loss is a parabola
    in the logarithm of the parameters, and its minimum is the compute-optimal size.
    """

    budget: float
    params: Values
    """Parameters of blocks and head, ascending."""
    bpb: Values
    coefficients: tuple[float, float, float] | None
    """Of the parabola in ln(params), highest power first; None when it has no minimum."""
    problem: str
    """Why there is no optimum to rely on; "" when there is one."""
    optimal_params: float = math.nan
    """Where the parabola is lowest, if that is within the sizes that were trained."""
    optimal_tokens: float = math.nan
    optimal_ratio: float = math.nan
    """Tokens per parameter there, as --target-param-data-ratio counts them."""
    optimal_bpb: float = math.nan

    def predict(self, params: Values) -> Values:
        """The parabola's bits per byte."""
        assert self.coefficients is not None
        return np.asarray(np.polyval(self.coefficients, np.log(params)), np.float64)


def fit_budgets(rows: Sequence[Row]) -> list[IsoFlop]:
    """A fit for every budget, the smallest first."""
    budgets = sorted({row.flops_budget for row in rows if row.flops_budget is not None})
    return [fit_budget([row for row in rows if row.flops_budget == b], b) for b in budgets]


def fit_budget(rows: Sequence[Row], budget: float) -> IsoFlop:
    """Where validation is best over the sizes of one budget.

    A minimum outside of the sizes is no finding: the fit says so, and gives no optimum. Nor does
    it leave out a run whose validation is no number: that run is named.
    """
    rows = sorted(rows, key=lambda row: row.num_scaling_params)
    params = np.array([row.num_scaling_params for row in rows], float)
    bpb = np.array([row.val_bpb for row in rows], float)
    depths = f"depths {rows[0].depth} to {rows[-1].depth}"
    if len(rows) < POINTS_OF_A_PARABOLA:
        problem = f"{len(rows)} of the {POINTS_OF_A_PARABOLA} sizes that a parabola needs"
        return IsoFlop(budget, params, bpb, None, problem)
    for row in rows:
        if not math.isfinite(row.val_bpb):
            problem = (
                f"val_bpb of {row.model_tag} is {row.val_bpb:g}: no parabola goes through that; "
                "try other learning rates under another --name"
            )
            return IsoFlop(budget, params, bpb, None, problem)
    # Around the mean, where the powers of a logarithm near 20 do not cancel.
    logs, centre = np.log(params), float(np.log(params).mean())
    a, b, c = (float(value) for value in np.polyfit(logs - centre, bpb, 2))
    if a <= 0:
        problem = f"no minimum: the curve over {depths} does not bend upwards"
        return IsoFlop(budget, params, bpb, None, problem)
    lowest = -b / (2 * a)
    coefficients = (a, b - 2 * a * centre, a * centre**2 - b * centre + c)
    if not logs[0] <= lowest + centre <= logs[-1]:
        side, wanted = ("below", "smaller") if lowest + centre < logs[0] else ("above", "larger")
        problem = f"the minimum lies {side} {depths}, outside of the grid; add {wanted} ones"
        return IsoFlop(budget, params, bpb, coefficients, problem)

    def at_lowest(values: Iterable[float]) -> float:
        """Tokens at a budget are nearly a power of the size, so between two sizes as well."""
        return math.exp(float(np.interp(lowest + centre, logs, np.log(list(values)))))

    return IsoFlop(
        budget,
        params,
        bpb,
        coefficients,
        "",
        optimal_params=math.exp(lowest + centre),
        optimal_tokens=at_lowest(row.tokens_trained for row in rows),
        optimal_ratio=at_lowest(row.param_data_ratio for row in rows),
        optimal_bpb=c - b**2 / (4 * a),
    )


def growth(fits: Sequence[IsoFlop]) -> tuple[float, float] | None:
    """Exponents with which optimal parameters and tokens grow with the budget.

    Least squares in logarithms; None with fewer than two budgets that have an optimum.
    """
    sound = [fit for fit in fits if not fit.problem]
    if len(sound) < 2:
        return None
    budgets = np.log([fit.budget for fit in sound])
    params = np.polyfit(budgets, np.log([fit.optimal_params for fit in sound]), 1)
    tokens = np.polyfit(budgets, np.log([fit.optimal_tokens for fit in sound]), 1)
    return float(params[0]), float(tokens[0])


def fits_text(fits: Sequence[IsoFlop]) -> str:
    """The optimum of every budget as a table, then what is not to be relied on."""
    table = [
        {
            "budget": short(fit.budget),
            "sizes": str(len(fit.params)),
            "optimal parameters": f"{fit.optimal_params:.3g}",
            "tokens": f"{fit.optimal_tokens:.3g}",
            "ratio": f"{fit.optimal_ratio:.1f}",
            "val bpb": f"{fit.optimal_bpb:.4f}",
        }
        for fit in fits
        if not fit.problem
    ]
    lines = [f"- budget {short(fit.budget)}: {fit.problem}" for fit in fits if fit.problem]
    exponents = growth(fits)
    if exponents is not None:
        lines.append(
            "- optimal parameters grow as FLOPs^{:.2f}, tokens as FLOPs^{:.2f}".format(*exponents)
        )
    return "\n\n".join(
        part for part in (markdown(table) if table else "", "\n".join(lines)) if part
    )
