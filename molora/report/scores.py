"""Scores side by side, with intervals that say what so few rows can tell."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table
from rich.text import Text

from molora.report.data import TaskScore

Z = 1.959964
"""Of a 95 % interval."""
MEAN = "mean of tasks"
UNCLEAR = "≈"
"""Marks a difference whose interval includes 0."""


@dataclass(frozen=True)
class Difference:
    """Of two accuracies, in percentage points, with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0

    @property
    def margin(self) -> float:
        """The longer arm of the interval."""
        return max(self.value - self.low, self.high - self.value)

    @property
    def interval(self) -> str:
        """`[low, high]`."""
        return f"[{_signed(self.low)}, {_signed(self.high)}]"

    def __str__(self) -> str:
        return f"{'' if self.is_clear else f'{UNCLEAR} '}{_signed(self.value)}"


@dataclass(frozen=True)
class ScoreRow:
    """One task, or the mean over all that every model was scored on."""

    task: str
    rows: str
    accuracies: tuple[str, ...]
    """One per model, as in `ScoreTable.models`."""
    losses: tuple[str, ...]
    differences: tuple[Difference | None, ...]
    """One per pair, as in `ScoreTable.pairs`."""


@dataclass(frozen=True)
class ScoreTable:
    """Scores, ready to be shown."""

    models: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]
    """(a, b): the difference is a − b."""
    rows: tuple[ScoreRow, ...]


def score_table(scores: Sequence[TaskScore]) -> ScoreTable:
    """Models and tasks in order of appearance.

    Compared are every model with the first, and the second with every later one. Nothing is sorted
    or singled out by who wins.
    """
    models = tuple(dict.fromkeys(score.model for score in scores))
    tasks = list(dict.fromkeys(score.task for score in scores))
    pairs = tuple((model, models[0]) for model in models[1:])
    pairs += tuple((models[1], model) for model in models[2:])
    by_key = {(score.task, score.model): score for score in scores}
    rows = [_row(task, [by_key.get((task, model)) for model in models], pairs) for task in tasks]
    whole = [task for task in tasks if all((task, model) in by_key for model in models)]
    if len(whole) > 1:
        columns = {model: [by_key[task, model] for task in whole] for model in models}
        rows.append(_mean_row(columns, pairs))
    return ScoreTable(models, pairs, tuple(rows))


def summary_table(scores: Sequence[TaskScore]) -> Table:
    """The table for a terminal: accuracy in percent and loss per model, then the differences."""
    content = score_table(scores)
    table = Table(
        title=f"Held-out accuracy (%) and loss (nats per token), {_row_counts(scores)} rows a task",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("task", no_wrap=True)
    for model in content.models:
        table.add_column(Text(model), justify="right")
    for first, second in content.pairs:
        table.add_column(Text(f"{first} − {second}"), justify="right")
    for row in content.rows:
        if row.task == MEAN:
            table.add_section()
        table.add_row(
            Text(row.task),  # Text: square brackets in a name are no markup
            *(
                f"{accuracy}  {loss}"
                for accuracy, loss in zip(row.accuracies, row.losses, strict=True)
            ),
            *(
                Text("–" if found is None else f"{found} ±{found.margin:.0f}")
                for found in row.differences
            ),
        )
    if content.pairs:
        table.caption = (
            f"Differences in percentage points ± 95 %; {UNCLEAR}: so few rows cannot tell."
        )
    return table


def difference(first: TaskScore, second: TaskScore) -> Difference | None:
    """Newcombe's interval of first − second from Wilson's of each, as of independent samples.

    The models answer the same rows, so the true interval is mostly narrower: what is called clear
    here is clear. Source: Newcombe 1998, Statistics in Medicine 17, method 10.
    """
    if first.accuracy is None or second.accuracy is None:
        return None
    p, (p_low, p_high) = first.accuracy, wilson(first.accuracy, first.rows)
    q, (q_low, q_high) = second.accuracy, wilson(second.accuracy, second.rows)
    return Difference(
        100 * (p - q),
        100 * (p - q - math.hypot(p - p_low, q_high - q)),
        100 * (p - q + math.hypot(p_high - p, q - q_low)),
    )


def wilson(share: float, rows: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of so many rows."""
    if rows <= 0:
        return 0.0, 1.0
    centre = share + Z**2 / (2 * rows)
    spread = Z * math.sqrt(share * (1 - share) / rows + (Z / (2 * rows)) ** 2)
    scale = 1 + Z**2 / rows
    return (centre - spread) / scale, (centre + spread) / scale


def _row(
    task: str, scores: Sequence[TaskScore | None], pairs: Sequence[tuple[str, str]]
) -> ScoreRow:
    by_model = {score.model: score for score in scores if score is not None}
    return ScoreRow(
        task=task,
        rows=_row_counts(list(by_model.values())),
        accuracies=tuple(_percent(score.accuracy if score else None) for score in scores),
        losses=tuple(_loss(score.loss if score else None) for score in scores),
        differences=tuple(
            difference(by_model[a], by_model[b]) if a in by_model and b in by_model else None
            for a, b in pairs
        ),
    )


def _row_counts(scores: Sequence[TaskScore]) -> str:
    counts = [score.rows for score in scores]
    low, high = min(counts, default=0), max(counts, default=0)
    return str(low) if low == high else f"{low}–{high}"


def _mean_row(columns: dict[str, list[TaskScore]], pairs: Sequence[tuple[str, str]]) -> ScoreRow:
    """Every task counts the same, however many rows it has."""
    return ScoreRow(
        task=MEAN,
        rows="",
        accuracies=tuple(_percent(_mean([s.accuracy for s in c])) for c in columns.values()),
        losses=tuple(_loss(_mean([s.loss for s in c])) for c in columns.values()),
        differences=tuple(
            _mean_difference(
                [difference(p, q) for p, q in zip(columns[a], columns[b], strict=True)]
            )
            for a, b in pairs
        ),
    )


def _mean_difference(found: Sequence[Difference | None]) -> Difference | None:
    """Tasks have rows of their own, so the distances to the bounds add up as squares."""
    known = [one for one in found if one is not None]
    if len(known) < len(found):
        return None
    value = sum(one.value for one in known) / len(known)
    return Difference(
        value,
        value - math.hypot(*(one.value - one.low for one in known)) / len(known),
        value + math.hypot(*(one.high - one.value for one in known)) / len(known),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"


def _loss(loss: float | None) -> str:
    return "–" if loss is None else f"{loss:.3f}"


def _signed(points: float) -> str:
    # adding 0.0 turns a rounded −0.0 into 0.0
    return f"{round(points, 1) + 0.0:+.1f}".replace("-", "−")
