"""Small reports with known content."""

from __future__ import annotations

import random

from molora.report import Curve, Report, TaskScore, Utilisation

TASKS = ("spam", "nouns", "language", "python")
LINEARS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj")
MOLA = (2, 4, 6, 8)


def mola_loads(num_layers: int, tasks: tuple[str, ...] = TASKS, *, seed: int = 0) -> Utilisation:
    """Random loads of MoLA's 2-4-6-8 over the layers, three sites each."""
    source = random.Random(seed)
    loads: dict[str, dict[str, list[float]]] = {task: {} for task in tasks}
    for task in tasks:
        for layer in range(num_layers):
            for linear in LINEARS:
                counts = [source.random() for _ in range(MOLA[4 * layer // num_layers])]
                loads[task][f"model.layers.{layer}.{linear}"] = [c / sum(counts) for c in counts]
    return Utilisation.from_loads(loads)


def scores(task: str = "spam") -> list[TaskScore]:
    """Of three models on two tasks."""
    return [
        TaskScore(task, "base", 0.5, 1.25, 100),
        TaskScore(task, "mixture", 0.9, 0.5, 100),
        TaskScore(task, "LoRA", 0.875, 0.625, 100),
        TaskScore("nouns", "base", 0.25, 2.0, 80),
        TaskScore("nouns", "mixture", 0.5, 1.5, 80),
        TaskScore("nouns", "LoRA", 0.75, 1.0, 80),
    ]


def report(name: str = "spam", **changes: object) -> Report:
    """A report with every part; `name` appears wherever a name can."""
    parts: dict[str, object] = {
        "title": f"title {name}",
        "scores": [*scores(name), TaskScore(name, f"model {name}", 0.1, 3.0, 100)],
        "curves": [
            Curve("loss", (5, 10), (2.0, 1.0), f"run {name}"),
            Curve("loss", (5, 10), (2.5, 1.5), "other"),
        ],
        "utilisation": mola_loads(4, (name, "nouns")),
        "configuration": f"preset: mola # configuration {name}",
        "notes": [f"note {name}"],
        "facts": {f"fact {name}": f"value {name}"},
    }
    return Report(**{**parts, **changes})  # type: ignore[arg-type]
