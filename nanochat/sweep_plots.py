"""The plots of a sweep, in the style of the report's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nanochat.report_plots import BLUE, GREEN, GREY, ORANGE, PURPLE, STYLE, save_figure
from nanochat.sweep_results import IsoFlop, Row, short

BUDGET_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, GREY)
CURVE_POINTS = 100
MARGIN = 1.15  # by which a parabola is drawn beyond the sizes it was fitted to, as a factor


def draw_miniseries(rows: Sequence[Row], target: Path) -> None:
    """Bits per byte over training FLOPs, one point a depth; CORE beside it where there is one."""
    cores = [row.core_score if row.core_partial is None else row.core_partial for row in rows]
    flops = [row.train_flops for row in rows]
    with mpl.rc_context(STYLE):
        panels = 1 if any(core is None for core in cores) else 2
        figure = Figure(figsize=(5.2 * panels, 3.6), layout="constrained")
        first, *others = figure.subplots(1, panels, squeeze=False)[0]
        _draw_points(first, rows, flops, [row.val_bpb for row in rows])
        first.set(title="Validation", ylabel="bits per byte")
        for axes in others:
            _draw_points(axes, rows, flops, [core for core in cores if core is not None])
            part = any(row.core_partial is not None for row in rows)
            axes.set(title="CORE", ylabel="score of a part of its items" if part else "score")
        save_figure(figure, target)


def _draw_points(
    axes: Axes, rows: Sequence[Row], flops: Sequence[float], values: Sequence[float]
) -> None:
    axes.plot(flops, values, color=BLUE, linewidth=1.8, marker="o", markersize=5)
    for row, x, y in zip(rows, flops, values, strict=True):
        axes.annotate(  # above the point: lines rise on one side and fall on the other
            f"d{row.depth}",
            (x, y),
            xytext=(0, 8),
            textcoords="offset points",
            ha="center",
            fontsize=9,
        )
    axes.set_xscale("log")
    axes.set_xlabel("training FLOPs")
    axes.margins(x=0.1, y=0.15)


def draw_isoflops(fits: Sequence[IsoFlop], target: Path) -> None:
    """A curve for every budget over model size; a star where a parabola is lowest."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        axes = figure.subplots()
        for index, fit in enumerate(fits):
            _draw_budget(axes, fit, BUDGET_COLOURS[index % len(BUDGET_COLOURS)])
        axes.set_xscale("log")
        axes.set(
            title="Validation at equal training FLOPs",
            xlabel="parameters of blocks and head",
            ylabel="bits per byte",
        )
        axes.legend(title="FLOPs", frameon=False)
        save_figure(figure, target)


def _draw_budget(axes: Axes, fit: IsoFlop, colour: str) -> None:
    axes.plot(
        fit.params, fit.bpb, "o", color=colour, markersize=5, label=short(fit.budget), zorder=3
    )
    if fit.coefficients is None:
        axes.plot(fit.params, fit.bpb, ":", color=colour, linewidth=1.0)
        return
    sizes = np.geomspace(fit.params[0] / MARGIN, fit.params[-1] * MARGIN, CURVE_POINTS)
    axes.plot(sizes, fit.predict(sizes), color=colour, linewidth=1.6, alpha=0.8)
    if not fit.problem:
        axes.plot(fit.optimal_params, fit.optimal_bpb, "*", color=colour, markersize=13, zorder=4)
