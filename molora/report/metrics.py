"""`metrics.jsonl` → curves."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from molora.report.data import Curve

NOT_A_METRIC = frozenset({"kind", "step", "epoch", "seconds"})
KINDS = frozenset({"train", "eval", None})
"""Lines of other kinds, such as the summary, are no points of a curve."""


def read_metrics(path: str | Path, *, run: str = "") -> list[Curve]:
    """One curve per number that the lines have, in order of appearance.

    A line that is no JSON object with a step, such as the last one of a killed run, is passed over.
    `null` stands for a value that was not finite and becomes NaN. A step that was written again, by
    a resumed run, has its last value. A file that is not there has no curves.
    """
    path = Path(path)
    if not path.is_file():
        return []
    points: dict[str, dict[int, float]] = {}
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        line = _parsed(text)
        step = line.get("step")
        if not isinstance(step, int) or line.get("kind") not in KINDS:
            continue
        for name, value in line.items():
            if name not in NOT_A_METRIC and _is_number(value):
                points.setdefault(name, {})[step] = math.nan if value is None else float(value)
    return [
        Curve(name, tuple(sorted(values)), tuple(values[step] for step in sorted(values)), run)
        for name, values in points.items()
    ]


def _parsed(text: str) -> dict[str, Any]:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return line if isinstance(line, dict) else {}


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))
