"""Loss curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molora.report.data import Curve
from molora.report.style import colour, dash, save, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Panel:
    """One pair of axes and the metrics that are drawn on it."""

    label: str
    names: tuple[str, ...]
    prefix: str = "\0"
    """Also metrics whose name starts with this."""
    reference: float | None = None
    """A value to mark with a line."""

    def holds(self, name: str) -> bool:
        return name in self.names or name.startswith(self.prefix)


PANELS = (
    Panel("loss", ("loss", "eval_loss")),
    Panel("auxiliary loss", ("aux_loss",), prefix="aux/"),
    Panel("expert load ÷ uniform", ("load_min", "load_max"), reference=1.0),
)
MARKERS_UP_TO = 40
"""Points of a curve that are drawn as points."""
CURVE = "curve"
"""Marks the lines that are curves."""


def plot_losses(curves: Sequence[Curve], path: str | Path) -> Path:
    """Write a PNG of losses, auxiliary losses and loads over the steps, a line per run and metric.

    Raises:
        ValueError: no curve among them that a panel shows.
    """
    return save(lambda: losses_figure(curves), path)


def losses_figure(curves: Sequence[Curve]) -> Figure:
    """The figure of `plot_losses`."""
    from matplotlib.figure import Figure

    shown = [(panel, [c for c in curves if panel.holds(c.name)]) for panel in PANELS]
    shown = [(panel, members) for panel, members in shown if _worth_a_panel(members)]
    if not shown:
        names = ", ".join(sorted({curve.name for curve in curves})) or "none"
        raise ValueError(f"no losses to draw; the curves are: {names}.")
    figure = Figure(figsize=(7.2, 0.5 + 1.9 * len(shown)), layout="constrained")
    axes = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    runs = list(dict.fromkeys(curve.run for curve in curves))
    for ax, (panel, members) in zip(axes, shown, strict=True):
        _draw(ax, panel, members, runs)
    axes[-1].set_xlabel("optimiser step")
    return figure


def has_losses(curves: Sequence[Curve]) -> bool:
    """Whether there is anything to draw."""
    return any(_worth_a_panel([c for c in curves if panel.holds(c.name)]) for panel in PANELS)


def _worth_a_panel(members: Sequence[Curve]) -> bool:
    """An auxiliary loss that is always 0, of a mixture without one, is not."""
    return any(value != 0 for curve in members for value in curve.values)


def _draw(ax: Axes, panel: Panel, members: Sequence[Curve], runs: Sequence[str]) -> None:
    names = list(dict.fromkeys(curve.name for curve in members))
    if panel.reference is not None:
        ax.axhline(panel.reference, color="0.6", linewidth=0.8, zorder=0)
    for position, curve in enumerate(members):
        # a colour per run, if there are several; the dash differs for every line
        chosen = runs.index(curve.run) if len(runs) > 1 else names.index(curve.name)
        style: dict[str, Any] = {
            "color": colour(chosen),
            "linestyle": dash(position),
            "marker": "o" if len(curve.steps) <= MARKERS_UP_TO else None,
        }
        label = f"{curve.run}: {curve.name}" if curve.run else curve.name
        ax.plot(
            curve.steps,
            curve.values,
            gid=CURVE,
            label=label,
            linewidth=1.3,
            markersize=2.8,
            **style,
        )
    ax.set_ylabel(panel.label)
    ax.grid(axis="y", color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.margins(x=0.01)
    lines = [line for line in ax.get_lines() if line.get_gid() == CURVE]
    labels = [short(str(line.get_label())) for line in lines]
    legend = ax.legend(lines, labels, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    for text in legend.get_texts():
        text.set_parse_math(False)  # a run may be called $x$
