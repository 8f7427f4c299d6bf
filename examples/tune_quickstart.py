"""Choose the quick start's learning rates, with as many tries for the mixture as for the LoRA.

    python examples/tune_quickstart.py 5e-4 1e-3 2e-3 4e-3

Trains on the first 200 training rows of each task and scores the other 50, so that no test row
takes part. Prints one JSON line per try; the lowest mean loss wins, since the accuracy of so few
rows is noisy. A try takes about six minutes on one thread.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import assets
import task_scores

import molora
from molora.config.data import DataSource
from molora.config.run import RunConfig
from molora.data import read
from molora.train import train

CONFIGS = {"mixture": "configs/quickstart.yaml", "LoRA": "configs/quickstart-lora.yaml"}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("learning_rates", nargs="+", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=CONFIGS, help="tune one of the two")
    parser.add_argument("--model", help="name or directory of another base model")
    parser.add_argument("--rows", type=int, default=200, help="training rows per task")
    parser.add_argument("--kept", type=int, default=50, help="rows per task that are scored")
    args = parser.parse_args(arguments)
    model = args.model or str(assets.smollm2())
    for name, path in CONFIGS.items():
        if args.only not in (None, name):
            continue
        for learning_rate in args.learning_rates:
            config = run_config(path, model, learning_rate, rows=args.rows, seed=args.seed)
            found = attempt(config, kept=slice(args.rows, args.rows + args.kept))
            print(json.dumps({"method": name, "learning_rate": learning_rate, **found}), flush=True)


def run_config(path: str, model: str, learning_rate: float, *, rows: int, seed: int) -> RunConfig:
    """The quick start's run with other values."""
    config = molora.load_config(path)
    sources = tuple(source.model_copy(update={"rows": rows}) for source in config.data.train)
    changed = {
        "model": config.model.model_copy(update={"name": model}),
        "data": config.data.model_copy(update={"train": sources}),
        "train": config.train.model_copy(update={"learning_rate": learning_rate}),
        "seed": seed,
    }
    return config.model_copy(update=changed)


def attempt(config: RunConfig, *, kept: slice) -> dict[str, float]:
    """Train, and score the training rows that were kept apart."""
    with tempfile.TemporaryDirectory() as scratch:
        result = train(config.model_copy(update={"output_dir": Path(scratch)}), progress=False)
    tasks = {
        task: list(read(DataSource(path=task_scores.DATA / task / "train.jsonl")))[kept]
        for task in task_scores.TASKS
    }
    scores = task_scores.score_tasks(result.model, result.tokenizer, tasks)
    return {
        "accuracy": round(sum(s.accuracy for s in scores.values()) / len(scores), 4),
        "loss": round(sum(s.loss for s in scores.values()) / len(scores), 4),
        "seconds": round(result.seconds, 1),
        "tokens_per_second": round(result.tokens / result.seconds, 1),
        **{task: round(s.accuracy, 3) for task, s in scores.items()},
    }


if __name__ == "__main__":
    main()
