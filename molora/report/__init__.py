"""Figures and one HTML page of what the router did; pure functions of plain data."""

from molora.report.data import Curve, Layer, Report, TaskScore, Utilisation
from molora.report.differences import plot_differences
from molora.report.heatmap import plot_utilisation
from molora.report.losses import plot_losses
from molora.report.metrics import read_metrics
from molora.report.page import write_html
from molora.report.scores import summary_table

__all__ = [
    "Curve",
    "Layer",
    "Report",
    "TaskScore",
    "Utilisation",
    "plot_differences",
    "plot_losses",
    "plot_utilisation",
    "read_metrics",
    "summary_table",
    "write_html",
]
