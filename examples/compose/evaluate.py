"""Every router over the same experts on the same rows: ``python -m examples.compose.evaluate``.

Writes runs/compose/results.json and prints the tables of README.md. Differences are paired: each
row's loss under one entrant minus its loss under another; the interval is a bootstrap over rows.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import molora
from examples.compose import suite
from examples.compose.entrants import ENTRANTS, Bench, Effort, Entrant
from examples.compose.suite import Scores
from examples.compose.train_experts import EXPERTS, OUTPUT, load

RESAMPLES = 10_000
SAME = 1e-3
"""Losses of runs on one machine differ by less."""
REFERENCE = "uniform"
SINGLE = "best expert alone"
NONE = "–"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="few rows: that everything runs")
    parser.add_argument("--model", help="name or directory of another base model")
    parser.add_argument("--encoder", type=Path, help="directory of another text encoder")
    parser.add_argument("--experts", type=Path, default=OUTPUT)
    parser.add_argument("--output", type=Path, default=Path("runs/compose/results.json"))
    parser.add_argument("--only", nargs="*", help="measure these; keep the other results")
    args = parser.parse_args(arguments)
    bench = make_bench(args)
    found = {}
    for entrant in wanted(args.only):
        begun = time.monotonic()
        found[entrant.name] = measure(bench, entrant)
        result = found[entrant.name]
        print(
            f"{entrant.name}: {result['test'].loss_N.mean():.3f} {result['tried'] or ''} "
            f"({time.monotonic() - begun:.0f} s)",
            flush=True,
        )
    results = summary(bench, found)
    if args.only is not None and args.output.is_file():
        results = merged(json.loads(args.output.read_text("utf-8")), results)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", "utf-8")
    print("\n".join(["", *tables(results)]))


def wanted(only: Sequence[str] | None) -> list[Entrant]:
    """The entrants called so, and those that every other is compared with."""
    if only is None:
        return list(ENTRANTS)
    names = {*only, REFERENCE, *(e.name for e in ENTRANTS if e.name.startswith("expert "))}
    return [entrant for entrant in ENTRANTS if entrant.name in names]


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Old results with new ones in their places, if both have the same to be compared with."""
    for key in ("model", "rows", "best_single"):
        if old[key] != new[key]:
            raise SystemExit(f"{key} was {old[key]} and is {new[key]}: measure all entrants again")
    both = {**old["entrants"], **new["entrants"]}
    for name in (REFERENCE, new["best_single"]):
        losses = [of["entrants"][name]["loss"] for of in (old, new)]
        if abs(losses[0] - losses[1]) > SAME:
            raise SystemExit(f"{name} had the loss {losses[0]}, now {losses[1]}: measure all again")
        both[name] = old["entrants"][name]
    ordered = {e.name: both[e.name] for e in ENTRANTS if e.name in both}
    return {**old, "entrants": ordered}


def make_bench(args: argparse.Namespace) -> Bench:
    """Model, experts and rows."""
    upper, tokenizer = load(args.model)
    encoder = args.encoder
    if encoder is None:
        from examples.assets import minilm

        encoder = minilm()
    experts = molora.load_experts({name: args.experts / name for name in EXPERTS})
    rows = {"train": 16, "validation": 4, "test": 4} if args.fast else {}
    split = {
        name: suite.load_examples(upper, tokenizer, name, rows.get(name))
        for name in ("train", "validation", "test")
    }
    effort = Effort(6, 2, 4, 2) if args.fast else Effort()
    return Bench(upper, tokenizer, experts, encoder_directory=encoder, effort=effort, **split)


def measure(bench: Bench, entrant: Entrant) -> dict[str, Any]:
    """Test scores, with the settings that are best on the validation rows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # experts name their base by its directory
        tried = []
        for change in entrant.grid[: bench.effort.tried_settings]:
            with entrant.changed(change).ready(bench) as scored:
                tried.append((float(scored(bench.validation).loss_N.mean()), change))
        chosen = min(tried, key=lambda pair: pair[0])[1] if tried else None
        with (entrant if chosen is None else entrant.changed(chosen)).ready(bench) as scored:
            validation = scored(bench.validation) if entrant.name.startswith("expert ") else None
            test = scored(bench.test)
    return {
        "sees": entrant.sees,
        "test": test,
        "validation": validation,
        "chosen": chosen,
        "tried": [[round(loss, 4), change] for loss, change in tried],
    }


def summary(bench: Bench, found: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """What is written: means, paired differences and their intervals."""
    alone = [name for name, result in found.items() if result["validation"] is not None]
    best = min(alone, key=lambda name: float(found[name]["validation"].loss_N.mean()))
    tasks = [example.task for example in bench.test]
    entrants = {}
    for name, result in found.items():
        scores: Scores = result["test"]
        entrants[name] = {
            "sees": result["sees"],
            "loss": mean(scores.loss_N),
            "accuracy": mean(scores.right_N),
            "own": mean(scores.own_N),
            "loss_by_task": by_task(scores.loss_N, tasks),
            "accuracy_by_task": by_task(scores.right_N, tasks),
            "minus_uniform": difference(scores, found[REFERENCE]["test"], tasks),
            "minus_single": difference(scores, found[best]["test"], tasks),
            **({"chosen": result["chosen"], "tried": result["tried"]} if result["tried"] else {}),
        }
    return {
        "model": "SmolLM2-135M-Instruct",
        "versions": {"molora": molora.__version__, "torch": torch.__version__},
        "rows": {split: len(getattr(bench, split)) for split in ("train", "validation", "test")},
        "best_single": best,
        "entrants": entrants,
    }


def mean(values_N: Tensor) -> float | None:
    """Of the values that are no NaN."""
    found = float(values_N.nanmean())
    return None if found != found else round(found, 4)


def by_task(values_N: Tensor, tasks: Sequence[str]) -> dict[str, float | None]:
    """The mean of each task's rows."""
    return {
        task: mean(values_N[[i for i, own in enumerate(tasks) if own == task]])
        for task in dict.fromkeys(tasks)
    }


def difference(scores: Scores, reference: Scores, tasks: Sequence[str]) -> list[float]:
    """[mean, low, high] of the paired differences of losses, with its 95 % interval."""
    low, high = interval(scores.loss_N - reference.loss_N, tasks)
    return [round(v, 4) for v in (float((scores.loss_N - reference.loss_N).mean()), low, high)]


def interval(
    differences_N: Tensor, tasks: Sequence[str], *, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap of the mean: rows are drawn again within their tasks, whose numbers
    are part of the suite."""
    source = torch.Generator().manual_seed(0)
    sums_R = torch.zeros(RESAMPLES, dtype=torch.float64)
    for task in dict.fromkeys(tasks):
        own_M = differences_N[[i for i, other in enumerate(tasks) if other == task]].double()
        index_RM = torch.randint(len(own_M), (RESAMPLES, len(own_M)), generator=source)
        sums_R += own_M[index_RM].sum(dim=1)
    tail = (1 - level) / 2
    low, high = torch.quantile(sums_R / len(differences_N), torch.tensor([tail, 1 - tail]).double())
    return float(low), float(high)


def tables(results: Mapping[str, Any]) -> list[str]:
    """README.md's tables in Markdown, as lines."""
    rows = [
        "| | made from | loss | − uniform | − best expert alone | accuracy | own expert |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, e in results["entrants"].items():
        label = f"{name} ({SINGLE})" if name == results["best_single"] else name
        own = NONE if e["own"] is None else f"{e['own']:.2f}"
        rows.append(
            f"| {label} | {e['sees']} | {e['loss']:.3f} | {shown(e['minus_uniform'])} | "
            f"{shown(e['minus_single'])} | {e['accuracy']:.3f} | {own} |"
        )
    tasks = list(next(iter(results["entrants"].values()))["loss_by_task"])
    rows += ["", f"| loss (accuracy) | {' | '.join(tasks)} |", f"|---|{'---|' * len(tasks)}"]
    for name, e in results["entrants"].items():
        cells = [
            f"{e['loss_by_task'][task]:.2f}"
            + ("" if (hit := e["accuracy_by_task"][task]) is None else f" ({hit:.2f})")
            for task in tasks
        ]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return rows


def shown(difference: Sequence[float]) -> str:
    """A difference and its interval; nothing against itself."""
    middle, low, high = difference
    if middle == low == high == 0:
        return NONE
    return f"{middle:+.3f} [{low:+.3f}, {high:+.3f}]".replace("-", "−")


if __name__ == "__main__":
    main()
