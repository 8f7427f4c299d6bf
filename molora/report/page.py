"""One HTML file that needs nothing else, and its figures as PNG files beside it."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from molora.errors import MoLoRAError
from molora.report.data import Report, Utilisation
from molora.report.differences import plot_differences
from molora.report.heatmap import plot_utilisation
from molora.report.losses import has_losses, plot_losses
from molora.report.scores import MEAN, UNCLEAR, score_table
from molora.report.template import TEMPLATE

PAGE = "report.html"


@dataclass(frozen=True)
class FigureText:
    """A figure on the page; its file is `{name}.png`."""

    name: str
    title: str
    alt: str
    how: tuple[str, ...]
    """How to read it, a paragraph each."""
    base64: str


@dataclass(frozen=True)
class Usage:
    """One task's row of the table below the heat map."""

    task: str
    sites: int
    experts: int
    unused: int
    greatest: str
    where: str


def write_html(report: Report, directory: str | Path) -> Path:
    """Write `report.html` with embedded figures, and the figures as PNG files; returns its path.

    Sections for which the report has nothing are left out. Every text is escaped.

    Raises:
        MoLoRAError: jinja2 or matplotlib is not installed.
    """
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError:
        raise MoLoRAError("the page needs jinja2. Run pip install 'molora[viz]'.") from None

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    html = environment.from_string(TEMPLATE).render(
        report=report,
        table=score_table(report.scores),
        mean=MEAN,
        unclear=UNCLEAR,
        figures=list(_figures(report, directory)),
        usage=usage(report.utilisation) if report.utilisation is not None else [],
    )
    path = directory / PAGE
    # lone surrogates, which a damaged name may hold, have no bytes in UTF-8
    path.write_text(html, encoding="utf-8", errors="replace")
    return path


def usage(utilisation: Utilisation) -> list[Usage]:
    """Counts over all sites of each task; averages of layers hide what these show."""
    rows = []
    for task in utilisation.tasks:
        sites = {
            site: loads
            for layer in utilisation.layers
            for site, loads in utilisation.sites_of(task, layer).items()
        }
        where = max(sites, key=lambda site: max(sites[site]), default="–")
        rows.append(
            Usage(
                task=task,
                sites=len(sites),
                experts=sum(map(len, sites.values())),
                unused=sum(load == 0 for loads in sites.values() for load in loads),
                greatest=f"{max(sites[where]):.2f}" if sites else "–",
                where=where,
            )
        )
    return rows


def _figures(report: Report, directory: Path) -> Iterator[FigureText]:
    """Draw what there is data for."""
    if has_losses(report.curves):
        yield _figure(
            "losses",
            "Training",
            plot_losses(report.curves, directory / "losses.png"),
            "Curves of the losses over optimiser steps.",
            (
                "Loss is the cross-entropy per supervised token as logged during training, with "
                "the weighted auxiliary losses in it where the method has some; eval_loss is over "
                "the evaluation rows. Curves of different runs compare only if they saw the same "
                "rows in the same order.",
                "Load is an expert's share of its site's choices relative to an even share: the "
                "least and the greatest of all experts. 0 is an expert that was never chosen in "
                "that interval.",
            ),
        )
    if report.utilisation is not None and report.utilisation.tasks:
        yield _figure(
            "utilisation",
            "Which experts serve which task",
            plot_utilisation(report.utilisation, directory / "utilisation.png"),
            "Heat map of expert load by layer, one panel per task.",
            (
                "One panel per task, one row per layer. Colour is load relative to an even share: "
                "1 is even, 0 is never chosen, 2 is twice its share. Hatched experts do not exist "
                "in that layer.",
                "A cell averages the sites of a layer, whose experts of one number have nothing in "
                "common. Averages look even although single sites are not: the number to the right "
                "of a row is the greatest load at any one site, and the table counts experts site "
                "by site. A method that runs every expert on every token is even by construction.",
            ),
        )
        if len(report.utilisation.tasks) > 1:
            yield _figure(
                "differences",
                "How far apart tasks are routed",
                plot_differences(report.utilisation, directory / "differences.png"),
                "Jensen–Shannon divergence of loads between tasks, by layer and by pair.",
                (
                    "Jensen–Shannon divergence of the loads, computed at each site: 0 means that "
                    "all tasks use the experts alike, 1 that no expert serves two tasks. Small "
                    "values arise by chance if a task has few tokens. Different routing is not "
                    "better routing; the scores say what is better.",
                ),
            )


def _figure(name: str, title: str, path: Path, alt: str, how: tuple[str, ...]) -> FigureText:
    return FigureText(name, title, alt, how, base64.b64encode(path.read_bytes()).decode("ascii"))
