"""The report's plots, as SVG files that are the same bytes for the same numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
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
REWARD_SMOOTHING_SHARE = 0.15  # rewards of single steps differ by their questions more than losses
PASS_KEY = re.compile(r"pass_at_(\d+)")


def draw_training(metrics: Path, target: Path) -> bool:
    """What a run measured over its steps; False if there is nothing.

    Loss and validation, or in reinforcement learning reward and pass@k; and the learning rate.
    """
    rows = read_metrics(metrics)
    loss, reward = _series(rows, "loss"), _series(rows, "reward")
    if not len(loss[0]):
        return False
    panels: list[Callable[[Axes], None]] = []
    if len(reward[0]):
        panels.append(lambda axes: _draw_reward(axes, *reward))
        passes = _pass_series(rows)
        if passes:
            panels.append(lambda axes: _draw_passes(axes, passes))
            panels.append(lambda axes: _draw_before_and_after(axes, passes))
    else:
        panels.append(lambda axes: _draw_loss(axes, *loss))
        for key in ("val_bpb", "val_loss"):
            validation = _series(rows, key)
            if len(validation[0]):
                panels.append(partial(_draw_validation, values=validation, key=key))
                break
    panels.append(lambda axes: _draw_rate(axes, *_series(rows, "lr")))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.0 * len(panels), 3.2), layout="constrained")
        for axes, draw in zip(figure.subplots(1, len(panels)), panels, strict=True):
            axes.set_xlabel("step")
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
            draw(axes)
        save_figure(figure, target)
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
        save_figure(figure, target)


def _draw_loss(axes: Axes, steps: Values, losses: Values) -> None:
    radius = round(SMOOTHING_SHARE * len(losses) / 2)
    axes.plot(*_thinned(steps, losses), color=BLUE, alpha=0.25, linewidth=0.8)
    axes.plot(*_thinned(steps, _smoothed(losses, radius)), color=BLUE, linewidth=1.8)
    axes.set(title="Training loss", ylabel="nats per token")
    # The first steps, at the logarithm of the vocabulary, would flatten all that follows.
    if len(losses) >= 20:
        low, high = losses.min(), float(np.quantile(losses, 0.97))
        axes.set_ylim(low - 0.05 * (high - low), high + 0.15 * (high - low))


def _draw_rate(axes: Axes, steps: Values, rates: Values) -> None:
    axes.plot(*_thinned(steps, rates), color=PURPLE, linewidth=1.8)
    axes.set(title="Learning rate", ylabel="multiple of the base rates")
    axes.set_ylim(bottom=0)


def _draw_reward(axes: Axes, steps: Values, rewards: Values) -> None:
    radius = max(round(REWARD_SMOOTHING_SHARE * len(rewards) / 2), 1)
    axes.plot(*_thinned(steps, rewards), color=GREEN, alpha=0.25, linewidth=0.8)
    axes.plot(*_thinned(steps, _smoothed(rewards, radius)), color=GREEN, linewidth=1.8)
    axes.set(title="Reward in practice", ylabel="mean reward of an answer")


def _pass_series(rows: Sequence[Mapping[str, Any]]) -> dict[int, tuple[Values, Values]]:
    """Steps and shares of pass@k by k."""
    found = {int(match[1]) for row in rows for key in row if (match := PASS_KEY.fullmatch(key))}
    return {k: _series(rows, f"pass_at_{k}") for k in sorted(found)}


def _draw_passes(axes: Axes, passes: Mapping[int, tuple[Values, Values]]) -> None:
    shown = [k for k in passes if k & (k - 1) == 0]  # 1, 2, 4, 8, ...
    for k in shown:
        steps, shares = passes[k]
        alpha = 1.0 if k == 1 else 0.25 + 0.4 / k
        axes.plot(steps, 100 * shares, color=BLUE, alpha=alpha, marker="o", markersize=4)
        axes.annotate(
            f"pass@{k}",
            (steps[-1], 100 * shares[-1]),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axes.margins(x=0.15)
    axes.set(title="Held-out questions", ylabel="solved (%)")


def _draw_before_and_after(axes: Axes, passes: Mapping[int, tuple[Values, Values]]) -> None:
    for place, colour, when in ((0, GREY, "before"), (-1, BLUE, "after")):
        shares = [100 * passes[k][1][place] for k in passes]
        axes.plot(list(passes), shares, color=colour, marker="o", markersize=4, label=when)
        axes.annotate(
            f"{shares[0]:.1f}",
            (1, shares[0]),
            xytext=(0, 7 if place else -12),
            textcoords="offset points",
            fontsize=9,
        )
    axes.margins(y=0.15)
    axes.legend(frameon=False, loc="lower right")
    axes.set(title="pass@k", xlabel="answers (k)", ylabel="one of k is right (%)")


def _draw_validation(axes: Axes, values: tuple[Values, Values], key: str) -> None:
    steps, measured = values
    axes.plot(steps, measured, color=ORANGE, linewidth=1.8, marker="o", markersize=4)
    is_bpb = key == "val_bpb"
    axes.set(title="Validation", ylabel="bits per byte" if is_bpb else "nats per token")
    axes.annotate(
        f"{measured[-1]:.3f}",
        (steps[-1], measured[-1]),
        xytext=(5, 0),
        textcoords="offset points",
        va="center",
        fontsize=9,
    )
    axes.margins(x=0.2)  # room for the number, beside the line and not on it


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


def save_figure(figure: Figure, target: Path) -> None:
    """Write an SVG file without its time of making; the folder is created on demand."""
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, format="svg", metadata={"Date": None})
