"""How far apart tasks are routed, as a figure."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from molora.report.data import Utilisation
from molora.report.divergence import divergences, pairwise
from molora.report.heatmap import layer_labels
from molora.report.style import COLOUR_MAP, colour, save, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NUMBERS_UP_TO = 8
"""Tasks for which there is room to write the values into the matrix."""


def plot_differences(utilisation: Utilisation, path: str | Path) -> Path:
    """Write a PNG: Jensen–Shannon divergence between tasks, per layer and per pair of tasks.

    Raises:
        ValueError: fewer than two tasks.
    """
    return save(lambda: differences_figure(utilisation), path)


def differences_figure(utilisation: Utilisation) -> Figure:
    """The figure of `plot_differences`: axes 0 per layer, axes 1 per pair."""
    from matplotlib.figure import Figure

    num_tasks = len(utilisation.tasks)
    if num_tasks < 2:
        raise ValueError(f"{num_tasks} task has no differences; give the loads of two or more.")
    figure = Figure(figsize=(9.4, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
    _draw_layers(left, utilisation)
    _draw_pairs(right, utilisation)
    return figure


def _draw_layers(ax: Axes, utilisation: Utilisation) -> None:
    layers = utilisation.layers
    values = [list(divergences(utilisation, layer).values()) for layer in layers]
    shown = [(row, found) for row, found in enumerate(values) if found]
    rows = [row for row, _ in shown]
    ax.vlines(
        rows,
        [min(found) for _, found in shown],
        [max(found) for _, found in shown],
        color="0.75",
        linewidth=3,
        label="range over its sites",
    )
    means = [sum(found) / len(found) for _, found in shown]
    ax.plot(rows, means, color=colour(0), marker="o", markersize=3.5, linewidth=1.2, label="mean")
    step = -(-len(layers) // 16)
    ax.set_xticks(range(0, len(layers), step), layer_labels(layers)[::step])
    ax.set_xlabel("layer")
    ax.set_ylabel("Jensen–Shannon divergence")
    # room above for the legend
    ax.set_ylim(0, max(0.05, 1.3 * max((max(found) for _, found in shown), default=0.0)))
    ax.set_title("all tasks, by layer (0 same experts, 1 disjoint)")
    ax.grid(axis="y", color="0.9", linewidth=0.6)
    ax.legend(loc="upper left", ncols=2)


def _draw_pairs(ax: Axes, utilisation: Utilisation) -> None:
    matrix = pairwise(utilisation)
    for i, row in enumerate(matrix):
        row[i] = math.nan  # a task does not differ from itself: nothing to show
    tasks = [short(task) for task in utilisation.tasks]
    top = max(0.05, *(value for row in matrix for value in row if math.isfinite(value)))
    image = ax.imshow(matrix, cmap=COLOUR_MAP, vmin=0, vmax=top, interpolation="nearest")
    ax.set_xticks(range(len(tasks)), tasks, rotation=40, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(len(tasks)), tasks)
    for label in (*ax.get_xticklabels(), *ax.get_yticklabels()):
        label.set_parse_math(False)
    if len(tasks) <= NUMBERS_UP_TO:
        for i, row in enumerate(matrix):
            for j, value in enumerate(row):
                if math.isfinite(value):
                    shade = "white" if value > 0.55 * top else "black"
                    ax.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color=shade)
    ax.set_title("pairs of tasks, mean over sites")
    ax.figure.colorbar(image, ax=ax, shrink=0.8)
