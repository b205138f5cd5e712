"""The report's plots, as SVG files that are the same bytes for the same numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from nanochat.tracking import read_metrics

Values = npt.NDArray[np.float64]

# Okabe and Ito's colours, which people with any colour vision can tell apart.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#8C8C8C"
STAGE_COLOURS = {"BASE": GREY, "MID": ORANGE, "SFT": BLUE, "RL": GREEN}
STYLE: Any = {  # rcParams
    "font.size": 10,
    "font.family": "sans-serif",
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E5E5E5",
    "grid.linewidth": 0.8,
    "axes.edgecolor": "#666666",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "figure.facecolor": "white",  # readable on the dark page of a viewer, too
    "svg.fonttype": "none",  # text stays text: small files, searchable
    "svg.hashsalt": "nanochat",
}
MAX_POINTS = 1000  # more is not visible and makes the file heavy
SMOOTHING_SHARE = 0.03  # of the run, over which the bold loss line averages


def draw_training(metrics: Path, target: Path) -> bool:
    """Loss, validation and learning rate over the steps of a run; False if there is nothing."""
    rows = read_metrics(metrics)
    loss, rate = _series(rows, "loss"), _series(rows, "lr")
    validation_key = next((k for k in ("val_bpb", "val_loss") if len(_series(rows, k)[0])), None)
    if not len(loss[0]):
        return False
    panels = 2 + (validation_key is not None)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.0 * panels, 3.2), layout="constrained")
        axes: Sequence[Axes] = figure.subplots(1, panels)
        _draw_loss(axes[0], *loss)
        if validation_key is not None:
            _draw_validation(axes[1], *_series(rows, validation_key), key=validation_key)
        axes[-1].plot(*_thinned(*rate), color=PURPLE, linewidth=1.8)
        axes[-1].set(title="Learning rate", ylabel="multiple of the base rates")
        axes[-1].set_ylim(bottom=0)
        for panel in axes:
            panel.set_xlabel("step")
            panel.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
            panel.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
        _save(figure, target)
    return True


def draw_accuracies(
    accuracies: Mapping[str, Mapping[str, float]], chances: Mapping[str, float], target: Path
) -> None:
    """Grouped bars: a group for each task, a bar for each stage, a line at chance.

    accuracies: stage -> task -> share solved. chances: task -> share solved by guessing.
    """
    tasks = list(dict.fromkeys(task for column in accuracies.values() for task in column))
    stages = list(accuracies)
    width = 0.8 / len(stages)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(max(6.0, 1.7 * len(tasks)), 3.8), layout="constrained")
        axes = figure.subplots()
        for index, stage in enumerate(stages):
            places = np.arange(len(tasks)) + (index - (len(stages) - 1) / 2) * width
            heights = [100 * accuracies[stage].get(task, math.nan) for task in tasks]
            bars = axes.bar(
                places, heights, 0.92 * width, color=STAGE_COLOURS.get(stage), label=stage
            )
            labels = ["" if math.isnan(height) else f"{height:.0f}" for height in heights]
            axes.bar_label(bars, labels, padding=2, fontsize=8, color="#444444")
        for index, task in enumerate(tasks):
            if task in chances:
                axes.hlines(
                    100 * chances[task],
                    index - 0.45,
                    index + 0.45,
                    colors="black",
                    linestyles="dashed",
                    linewidth=1.2,
                    label="chance" if task == next(iter(chances)) else "_nolegend_",
                )
        axes.set_xticks(range(len(tasks)), tasks)
        axes.grid(visible=False, axis="x")
        axes.set(title="Accuracy by stage", ylabel="problems solved (%)", ylim=(0, 105))
        figure.legend(loc="outside upper right", ncols=len(stages) + 1, frameon=False)
        _save(figure, target)


def _draw_loss(axes: Axes, steps: Values, losses: Values) -> None:
    radius = round(SMOOTHING_SHARE * len(losses) / 2)
    axes.plot(*_thinned(steps, losses), color=BLUE, alpha=0.25, linewidth=0.8)
    axes.plot(*_thinned(steps, _smoothed(losses, radius)), color=BLUE, linewidth=1.8)
    axes.set(title="Training loss", ylabel="nats per token")
    # The first steps, at the logarithm of the vocabulary, would flatten all that follows.
    if len(losses) >= 20:
        low, high = losses.min(), float(np.quantile(losses, 0.97))
        axes.set_ylim(low - 0.05 * (high - low), high + 0.15 * (high - low))


def _draw_validation(axes: Axes, steps: Values, values: Values, *, key: str) -> None:
    axes.plot(steps, values, color=ORANGE, linewidth=1.8, marker="o", markersize=4)
    is_bpb = key == "val_bpb"
    axes.set(title="Validation", ylabel="bits per byte" if is_bpb else "nats per token")
    axes.annotate(
        f"{values[-1]:.3f}",
        (steps[-1], values[-1]),
        xytext=(0, 7),
        textcoords="offset points",
        ha="right",
        fontsize=9,
    )


def _series(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[Values, Values]:
    """Steps and values of a key; the last value counts where a step has several."""
    values = {row["step"]: row[key] for row in rows if isinstance(row.get(key), int | float)}
    steps = sorted(values)
    return np.array(steps, float), np.array([values[step] for step in steps], float)


def _smoothed(values: Values, radius: int) -> Values:
    """The mean over `radius` values on either side; fewer, but as many on each, at the ends."""
    places = np.arange(len(values))
    reach = np.minimum(np.minimum(places, places[::-1]), radius)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    means: Values = (sums[places + reach + 1] - sums[places - reach]) / (2 * reach + 1)
    return means


def _thinned(steps: Values, values: Values) -> tuple[Values, Values]:
    """At most about MAX_POINTS points, the last one always among them."""
    stride = max(1, math.ceil(len(steps) / MAX_POINTS))
    kept = np.arange(len(steps) - 1, -1, -stride)[::-1]
    return steps[kept], values[kept]


def _save(figure: Figure, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, format="svg", metadata={"Date": None})
