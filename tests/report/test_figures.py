"""What the figures show, read from their axes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib import image as images
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from report_samples import MOLA, TASKS, mola_loads

from molora.report import (
    Curve,
    Utilisation,
    plot_differences,
    plot_losses,
    plot_utilisation,
    style,
)
from molora.report.differences import differences_figure
from molora.report.divergence import jensen_shannon
from molora.report.divergence import pairwise as task_pairs
from molora.report.heatmap import layer_labels, load_matrix, utilisation_figure
from molora.report.losses import losses_figure

NASTY = "$\\frac{x <script>_"


@pytest.fixture(autouse=True)
def _settings() -> Iterator[None]:
    with matplotlib.rc_context(style.SETTINGS):
        yield


def _panels(figure: Figure) -> list[Any]:
    return [ax for ax in figure.axes if ax.get_visible() and ax.get_title()]


def _drawn(figure: Figure) -> Any:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return canvas.get_renderer()


# ---------------------------------------------------------------------------------- heat map


def test_the_heat_map_has_a_panel_per_task_with_its_loads() -> None:
    utilisation = mola_loads(8)
    figure = utilisation_figure(utilisation)
    panels = _panels(figure)
    assert [ax.get_title() for ax in panels] == list(TASKS)
    for ax, task in zip(panels, TASKS, strict=True):
        shown = ax.images[0].get_array()
        assert shown.shape == (8, 8)
        for row, layer in enumerate(utilisation.layers):
            cells = utilisation.average(task, layer)
            assert shown[row, : len(cells)].tolist() == pytest.approx(list(cells))


def test_absent_experts_are_masked_and_present_ones_are_not() -> None:
    figure = utilisation_figure(mola_loads(8))
    expected = [[expert >= MOLA[layer // 2] for expert in range(8)] for layer in range(8)]
    for ax in _panels(figure):
        assert ax.images[0].get_array().mask.tolist() == expected
        assert ax.patch.get_hatch()


def test_a_dead_expert_is_drawn_as_zero_and_not_as_absent() -> None:
    loads = {"t": {"layers.0.a": [0.5, 0.5, 0.0], "layers.1.a": [0.5, 0.5]}}
    utilisation = Utilisation.from_loads(loads)
    matrix = load_matrix(utilisation, "t")
    assert matrix[0] == [1.5, 1.5, 0.0]
    assert matrix[1][:2] == [1.0, 1.0]
    assert math.isnan(matrix[1][2])
    shown = utilisation_figure(utilisation).axes[0].images[0].get_array()
    assert shown.mask.tolist() == [[False] * 3, [False, False, True]]


def test_one_colour_scale_for_all_tasks_starting_at_zero_and_labelled() -> None:
    loads = {"even": {"layers.0.a": [0.25] * 4}, "collapsed": {"layers.0.a": [1.0, 0, 0, 0]}}
    figure = utilisation_figure(Utilisation.from_loads(loads))
    assert {ax.images[0].get_clim() for ax in _panels(figure)} == {(0.0, 4.0)}
    assert [ax.get_ylabel() for ax in figure.axes if ax.get_label() == "<colorbar>"] == [
        "load ÷ uniform load"
    ]
    assert figure.get_supylabel() == "layer"
    assert figure.get_supxlabel().startswith("expert")


def test_an_even_router_looks_even() -> None:
    """Not stretched over the whole scale."""
    figure = utilisation_figure(
        Utilisation.from_loads({"t": {"layers.0.a": [0.26, 0.24, 0.25, 0.25]}})
    )
    assert figure.axes[0].images[0].get_clim() == (0.0, 2.0)


def test_the_greatest_load_of_a_site_stands_beside_its_row() -> None:
    """Averages over the sites of both layers are even."""
    loads = {
        f"model.layers.{layer}.{name}": row
        for layer, rows in enumerate([[(1, 0), (0, 1)], [(0.5, 0.5), (0.5, 0.5)]])
        for name, row in zip("ab", rows, strict=True)
    }
    ax = utilisation_figure(Utilisation.from_loads({"t": loads})).axes[0]
    assert ax.images[0].get_array().tolist() == [[1.0, 1.0], [1.0, 1.0]]
    beside = [(text.get_text(), text.xy) for text in ax.texts if isinstance(text, Annotation)]
    assert beside == [("2.0", (1, 0)), ("1.0", (1, 1)), ("peak", (1, 1))]


@pytest.mark.parametrize("num_layers", [4, 30, 96])
def test_nothing_overlaps(num_layers: int) -> None:
    figure = utilisation_figure(mola_loads(num_layers))
    renderer = _drawn(figure)
    panels = _panels(figure)
    boxes = [ax.get_window_extent(renderer) for ax in panels]
    assert not any(first.overlaps(second) for first, second in combinations(boxes, 2))
    for ax in panels:
        labels = [t for t in (*ax.get_yticklabels(), *ax.get_xticklabels()) if t.get_visible()]
        texts = [*labels, ax.title, *ax.texts]
        placed = [t.get_window_extent(renderer) for t in texts if t.get_text()]
        placed = [box for box in placed if box.width and box.height]
        for first, second in combinations(placed, 2):
            assert not first.shrunk(0.9, 0.9).overlaps(second.shrunk(0.9, 0.9))
        for box in placed:
            assert figure.bbox.x0 <= box.x0 <= box.x1 <= figure.bbox.x1
            assert figure.bbox.y0 <= box.y0 <= box.y1 <= figure.bbox.y1


def test_overlap_is_noticed() -> None:
    """Negative control: with a tick per layer at four times the size, labels do overlap."""
    figure = utilisation_figure(mola_loads(30))
    ax = _panels(figure)[0]
    ax.tick_params(labelsize=32)
    renderer = _drawn(figure)
    boxes = [t.get_window_extent(renderer) for t in ax.get_yticklabels()]
    assert any(first.overlaps(second) for first, second in pairwise(boxes))


def test_tasks_wrap_into_rows() -> None:
    tasks = tuple(f"task {i}" for i in range(9))
    figure = utilisation_figure(mola_loads(4, tasks))
    assert [ax.get_title() for ax in _panels(figure)] == list(tasks)
    width, height = figure.get_size_inches()
    assert width <= 12
    assert height <= 12


def test_rows_of_two_stacks_are_told_apart() -> None:
    sites = [f"{stack}.block.{i}.wi" for stack in ("encoder", "decoder") for i in (0, 1)]
    layers = Utilisation({"t": dict.fromkeys(sites, (0.5, 0.5))}).layers
    assert layer_labels(layers) == ["encoder 0", "encoder 1", "decoder 0", "decoder 1"]
    assert layer_labels(layers[:2]) == ["0", "1"]


def test_no_loads_draw_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no loads to draw"):
        plot_utilisation(Utilisation({}), tmp_path / "u.png")
    assert not (tmp_path / "u.png").exists()


# ---------------------------------------------------------------------------------- losses


def test_lines_are_the_curves() -> None:
    curves = [
        Curve("loss", (5, 10, 15), (3.0, math.nan, 1.0)),
        Curve("eval_loss", (10,), (1.5,)),
        Curve("aux_loss", (5, 10), (0.25, 0.125)),
        Curve("load_max", (5, 10), (2.0, 3.0)),
        Curve("learning_rate", (5, 10), (1e-3, 1e-4)),
    ]
    figure = losses_figure(curves)
    assert [ax.get_ylabel() for ax in figure.axes] == [
        "loss",
        "auxiliary loss",
        "expert load ÷ uniform",
    ]
    lines = {line.get_label(): line for ax in figure.axes for line in ax.lines if line.get_gid()}
    assert lines.keys() == {"loss", "eval_loss", "aux_loss", "load_max"}
    for curve in curves[:4]:
        np.testing.assert_array_equal(lines[curve.name].get_xdata(), curve.steps)
        np.testing.assert_array_equal(lines[curve.name].get_ydata(), curve.values)
    assert figure.axes[-1].get_xlabel() == "optimiser step"


def test_runs_and_metrics_are_told_apart_without_colour() -> None:
    curves = [
        Curve(name, (1, 2), (1.0, 2.0), run)
        for run in ("mixture", "LoRA")
        for name in ("loss", "eval_loss")
    ]
    (ax,) = losses_figure(curves).axes
    lines = [line for line in ax.lines if line.get_gid()]
    assert len({str(line._dash_pattern) for line in lines}) == 4  # type: ignore[attr-defined]
    colours = [line.get_color() for line in lines]
    assert colours[0] == colours[1] != colours[2] == colours[3]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        *("mixture: loss", "mixture: eval_loss", "LoRA: loss", "LoRA: eval_loss"),
    ]


def test_an_auxiliary_loss_of_zero_has_no_panel() -> None:
    curves = [Curve("loss", (1,), (1.0,)), Curve("aux_loss", (1,), (0.0,))]
    assert [ax.get_ylabel() for ax in losses_figure(curves).axes] == ["loss"]


def test_no_losses_draw_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no losses to draw; the curves are: learning_rate"):
        plot_losses([Curve("learning_rate", (1,), (1.0,))], tmp_path / "l.png")
    with pytest.raises(ValueError, match="the curves are: none"):
        plot_losses([], tmp_path / "l.png")


# ---------------------------------------------------------------------------------- differences


@pytest.mark.parametrize(
    ("distributions", "value"),
    [
        ([[0.5, 0.5], [0.5, 0.5]], 0.0),
        ([[1.0, 0.0], [0.0, 1.0]], 1.0),
        ([[1, 0, 0], [0, 1, 0], [0, 0, 1]], 1.0),
        ([[1.0, 0.0], [0.5, 0.5]], 0.3112781),
        ([[0.3, 0.7]], 0.0),
    ],
)
def test_divergence_of_known_distributions(distributions: list[list[float]], value: float) -> None:
    """The fourth in bits: H(¾, ¼) − ½ H(½, ½) = 0.8113 − 0.5."""
    assert jensen_shannon(distributions) == pytest.approx(value, abs=1e-6)


def test_differences_are_per_site_before_they_are_averaged() -> None:
    """Two sites that swap experts between tasks: averaged loads are alike, routing is disjoint."""
    utilisation = Utilisation(
        {
            "t": {"layers.0.a": (1.0, 0.0), "layers.0.b": (0.0, 1.0), "layers.1.a": (0.5, 0.5)},
            "u": {"layers.0.a": (0.0, 1.0), "layers.0.b": (1.0, 0.0), "layers.1.a": (0.5, 0.5)},
        }
    )
    assert load_matrix(utilisation, "t") == load_matrix(utilisation, "u")
    assert task_pairs(utilisation) == [[0.0, pytest.approx(2 / 3)], [pytest.approx(2 / 3), 0.0]]
    left, right, *_ = differences_figure(utilisation).axes
    (line,) = left.lines
    np.testing.assert_allclose(line.get_ydata(), [1.0, 0.0], atol=1e-12)
    shown = right.images[0].get_array()
    assert shown.mask.tolist() == [[True, False], [False, True]]
    assert shown[0, 1] == pytest.approx(2 / 3)


def test_one_task_has_no_differences(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 task has no differences"):
        plot_differences(mola_loads(4, ("only",)), tmp_path / "d.png")


# ---------------------------------------------------------------------------------- files


def test_files_are_pngs_of_something(tmp_path: Path) -> None:
    utilisation = mola_loads(8)
    paths = [
        plot_losses([Curve("loss", (1, 2), (2.0, 1.0))], tmp_path / "new" / "losses.png"),
        plot_utilisation(utilisation, tmp_path / "utilisation.png"),
        plot_differences(utilisation, tmp_path / "differences.png"),
    ]
    for path in paths:
        pixels = images.imread(path)[..., :3]
        assert min(pixels.shape[:2]) > 300
        assert 0.02 < (pixels < 0.9).any(axis=-1).mean() < 0.9
        assert (pixels[[0, -1]] > 0.99).all()  # nothing is cut off at the top and the bottom
        assert (pixels[:, [0, -1]] > 0.99).all()


def test_names_are_text_and_not_formulas(tmp_path: Path) -> None:
    """An unmatched $ or an unknown command would be an error of the formula parser."""
    utilisation = mola_loads(4, (NASTY, "_hidden"))
    plot_utilisation(utilisation, tmp_path / "u.png")
    plot_differences(utilisation, tmp_path / "d.png")
    curves = [Curve("loss", (1, 2), (1.0, 2.0), run) for run in (NASTY, "_hidden")]
    plot_losses(curves, tmp_path / "l.png")
    legend = losses_figure(curves).axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()][1] == "_hidden: loss"
    titles = [ax.get_title() for ax in _panels(utilisation_figure(utilisation))]
    assert titles == [NASTY, "_hidden"]


def test_long_names_are_shortened_and_control_characters_dropped() -> None:
    assert style.short("a" * 60) == "a" * 23 + "…"
    assert style.short("a\nb\x00c") == "a b c"
