"""The heat map experts × layers × tasks."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molora.report.data import Layer, Utilisation
from molora.report.style import COLOUR_MAP, save, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CELL_WIDTH, CELL_HEIGHT = 0.21, 0.165
"""Inches."""
MIN_PANEL, MAX_PANEL = (1.7, 1.6), (4.2, 11.0)
PEAK_WIDTH = 0.45
FIGURE_WIDTH = 11.0
PANELS_IN_A_ROW = 4
NUMBERS_UP_TO = 10
"""Experts and layers for which there is room to write the values into the cells."""
PEAKS_UP_TO = 64
"""Layers for which there is room to write the peaks."""
NOTE = "hatched: no such expert; peak: the greatest value at any one site of the layer"


def plot_utilisation(utilisation: Utilisation, path: str | Path) -> Path:
    """Write a PNG: a panel per task, layers × experts, coloured by load ÷ uniform load.

    A cell is the average over the sites of the layer. Averaging hides a site that uses one expert
    only, so beside each row stands the greatest value at any single site. Experts that a layer does
    not have are hatched.

    Raises:
        ValueError: no loads.
    """
    return save(lambda: utilisation_figure(utilisation), path)


def utilisation_figure(utilisation: Utilisation) -> Figure:
    """The figure of `plot_utilisation`; each panel's image holds its values, NaN where absent."""
    from matplotlib.figure import Figure

    tasks, layers = utilisation.tasks, utilisation.layers
    if not tasks or not layers:
        raise ValueError("no loads to draw: the utilisation has no task with a routed site.")
    panels = {task: load_matrix(utilisation, task) for task in tasks}
    finite = [v for rows in panels.values() for row in rows for v in row if math.isfinite(v)]
    # at least twice the uniform load, so that a balanced router looks even
    top = max([2.0, *finite])
    width, height = _panel_size(utilisation.num_experts, len(layers))
    across = min(len(tasks), PANELS_IN_A_ROW, max(1, int((FIGURE_WIDTH - 1.5) / width)))
    down = -(-len(tasks) // across)
    figure = Figure(
        figsize=(width * across + 1.9, (height + 0.6) * down + 0.5), layout="constrained"
    )
    axes = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True).ravel()
    for ax in axes[len(tasks) :]:
        ax.set_visible(False)
    for position, (ax, task) in enumerate(zip(axes, tasks, strict=False)):
        image = _draw(ax, panels[task], top)
        ax.set_title(short(task), parse_math=False)
        ax.tick_params(labelbottom=position + across >= len(tasks))
        _write_peaks(ax, [utilisation.peak(task, layer) for layer in layers])
    _label_axes(axes[0], layers, utilisation.num_experts)
    note = textwrap.fill(NOTE, int(13 * figure.get_size_inches()[0]))
    figure.supxlabel(f"expert\n{note}", fontsize=8)
    figure.supylabel("layer", fontsize=9)
    _add_bar(figure, image, axes[: len(tasks)].tolist())
    return figure


def _add_bar(figure: Figure, image: Any, axes: list[Axes]) -> None:
    aspect = 6.5 * figure.get_size_inches()[1]  # as wide in a tall figure as in a flat one
    bar = figure.colorbar(image, ax=axes, label="load ÷ uniform load", shrink=0.9, aspect=aspect)
    bar.ax.axhline(1.0, color="#D55E00", linewidth=1.5)
    bar.ax.annotate(
        "even",
        (0, 1.0),
        xycoords=bar.ax.get_yaxis_transform(),
        xytext=(-3, 0),
        textcoords="offset points",
        ha="right",
        va="center",
        fontsize=7,
        color="#B04A00",
    )


def load_matrix(utilisation: Utilisation, task: str) -> list[list[float]]:
    """(layers, experts): average load ÷ uniform load; NaN where there is no expert or no token."""
    rows = []
    for layer in utilisation.layers:
        average = utilisation.average(task, layer)
        rows.append([*average, *[math.nan] * (utilisation.num_experts - len(average))])
    return rows


def layer_labels(layers: Sequence[Layer]) -> list[str]:
    """Numbers; with the part of the stack's path that tells stacks apart, if there are several."""
    stacks = list(dict.fromkeys(layer.stack for layer in layers))
    if len(stacks) == 1:
        return [str(layer.index) for layer in layers]
    paths = {stack: stack.split(".") for stack in stacks}
    names = {
        stack: next((p for p in path if sum(p in other for other in paths.values()) == 1), stack)
        for stack, path in paths.items()
    }
    counts = {stack: sum(layer.stack == stack for layer in layers) for stack in stacks}
    return [
        names[layer.stack] + (f" {layer.index}" if counts[layer.stack] > 1 else "")
        for layer in layers
    ]


def _panel_size(num_experts: int, num_layers: int) -> tuple[float, float]:
    width = min(MAX_PANEL[0], max(MIN_PANEL[0], CELL_WIDTH * num_experts)) + PEAK_WIDTH
    return width, min(MAX_PANEL[1], max(MIN_PANEL[1], CELL_HEIGHT * num_layers))


def _draw(ax: Axes, rows: list[list[float]], top: float) -> Any:
    import matplotlib
    import numpy as np

    values = np.ma.masked_invalid(np.array(rows))
    # hatching lies below the image and shows through where cells are masked
    ax.set_facecolor("white")
    ax.patch.set(hatch="//////", edgecolor="0.75", linewidth=0)
    colours = matplotlib.colormaps[COLOUR_MAP]
    image = ax.imshow(
        values, cmap=colours, vmin=0, vmax=top, aspect="auto", interpolation="nearest"
    )
    if max(values.shape) <= NUMBERS_UP_TO:
        for row, cells in enumerate(rows):
            for column, value in enumerate(cells):
                if math.isfinite(value):
                    shade = "white" if value > 0.55 * top else "black"
                    place: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 6.5}
                    ax.text(column, row, f"{value:.1f}", color=shade, **place)
    for spine in ax.spines.values():
        spine.set(visible=True, color="0.4", linewidth=0.6)
    return image


def _write_peaks(ax: Axes, peaks: Sequence[float | None]) -> None:
    if len(peaks) > PEAKS_UP_TO:
        return
    size = 6.5 if len(peaks) <= 36 else 5
    for row, peak in enumerate(peaks):
        if peak is not None:
            ax.annotate(
                f"{peak:.1f}",
                (1, row),
                xycoords=("axes fraction", "data"),
                xytext=(3, 0),
                textcoords="offset points",
                va="center",
                fontsize=size,
                color="0.25",
                annotation_clip=False,
            )
    ax.annotate(
        "peak",
        (1, 1),
        xycoords="axes fraction",
        xytext=(3, 3),
        textcoords="offset points",
        fontsize=6.5,
        color="0.25",
        style="italic",
    )


def _label_axes(ax: Axes, layers: Sequence[Layer], num_experts: int) -> None:
    """Ticks at whole numbers, as many as fit; panels share them."""
    step = -(-len(layers) // 40)
    labels = layer_labels(layers)
    ax.set_yticks(range(0, len(layers), step), labels[::step])
    for label in ax.get_yticklabels():
        label.set_parse_math(False)
    step = 1 if num_experts <= 10 else -(-num_experts // 8)
    ax.set_xticks(range(0, num_experts, step), [str(e) for e in range(0, num_experts, step)])
