"""Held-out accuracy and loss per task, and the load of every expert while a task was scored."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from molora.attach import Mixture
from molora.config.data import DataSource
from molora.data import Row, read
from molora.generate import completion_loss, score_choices

TASKS = ("sms_spam", "noun_class", "language", "python_module")
DATA = Path(__file__).resolve().parent / "data"


@dataclass(frozen=True)
class Scored:
    """One model on one task."""

    accuracy: float
    """Share of rows whose right label is the most likely of the choices."""
    loss: float
    """Negative log-likelihood of the right answers, in nats per token."""
    rows: int
    loads: dict[str, list[float]]
    """Routing site → share of the choices that fell on each expert; empty without a router."""


def held_out(task: str, rows: int | None = None) -> list[Row]:
    """Test rows of a task, or the first so many."""
    return list(read(DataSource(path=DATA / task / "test.jsonl", rows=rows)))


def score(
    model: Any, tokenizer: Any, rows: Sequence[Row], mixture: Mixture | None = None
) -> Scored:
    """Score the answers of one task's rows."""
    with mixture.statistics() if mixture is not None else nullcontext() as statistics:
        likelihoods = score_choices(model, tokenizer, rows)
    nll, tokens = completion_loss(model, tokenizer, rows)
    right = 0
    for row, values in zip(rows, likelihoods, strict=True):
        assert row.choices is not None
        right += row.choices[max(range(len(values)), key=values.__getitem__)] == row.label
    loads = {} if statistics is None else statistics.loads()
    return Scored(
        right / len(rows), nll / tokens, len(rows), {site: v.tolist() for site, v in loads.items()}
    )


def score_tasks(
    model: Any, tokenizer: Any, tasks: dict[str, list[Row]], mixture: Mixture | None = None
) -> dict[str, Scored]:
    """Task → its score."""
    return {task: score(model, tokenizer, rows, mixture) for task, rows in tasks.items()}
