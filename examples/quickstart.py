"""The main job end to end: a mixture and a plain LoRA of the same size on four tasks, and a report.

    python examples/quickstart.py            # about ten minutes on two cores
    python examples/quickstart.py --fast     # two minutes: that everything runs

Training is `molora train configs/quickstart.yaml`. What is here compares the results: both get the
same rows, tokens and steps, and a learning rate chosen among as many (tune_quickstart.py).
Everything is written to runs/quickstart/; a second run reuses what is up to date.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from task_scores import Scored

# a spinning OpenMP thread slows every other process by an order of magnitude
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = {"mixture": "configs/quickstart.yaml", "LoRA": "configs/quickstart-lora.yaml"}
FAST_TRAIN_ROWS = 16
FAST_TEST_ROWS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="few rows: two minutes")
    parser.add_argument("--model", help="name or directory of another base model")
    parser.add_argument("--skip-lora", action="store_true", help="no comparison with a plain LoRA")
    parser.add_argument("--retrain", action="store_true", help="train even what is up to date")
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"))
    args = parser.parse_args()

    started = time.time()
    os.chdir(ROOT)
    model = args.model or bundled_model()
    names = ["mixture"] if args.skip_lora else list(CONFIGS)
    for name in names:
        train(name, model, args.output / name.lower(), fast=args.fast, retrain=args.retrain)
    report = write_report(names, model, args.output, fast=args.fast)
    adapter = args.output / "mixture" / "adapter"
    print(f"\nDone in {(time.time() - started) / 60:.1f} minutes. Report: {report}")
    print(f'Try it: molora generate --adapter {adapter} --prompt "What is a mixture of experts?"')


def bundled_model() -> str:
    """SmolLM2-135M-Instruct, converted once into the user's cache."""
    import assets

    return str(assets.smollm2())


def train(name: str, model: str, directory: Path, *, fast: bool, retrain: bool) -> None:
    """Run `molora train`, unless the adapter there comes from this very command."""
    config = (ROOT / CONFIGS[name]).read_text(encoding="utf-8")
    command = ["train", CONFIGS[name], "--output-dir", str(directory), f"model.name={model}"]
    if fast:
        command += [f"data.train.{task}.rows={FAST_TRAIN_ROWS}" for task in range(4)]
        command.append("train.logging_steps=1")
    receipt, wanted = directory / "quickstart.json", {"command": command, "config": config}
    if not retrain and receipt.is_file() and json.loads(receipt.read_text("utf-8")) == wanted:
        print(f"{name}: {directory / 'adapter'} is up to date (--retrain trains it again).")
        return
    print(f"\n{name}: molora {' '.join(command[:4])}", flush=True)
    receipt.unlink(missing_ok=True)
    molora = str(Path(sys.executable).parent / "molora")
    if code := subprocess.run([molora, *command], check=False).returncode:
        sys.exit(code)
    receipt.write_text(json.dumps(wanted), encoding="utf-8")


def evaluate(
    names: Sequence[str], model: str, output: Path, *, fast: bool
) -> dict[str, dict[str, Scored]]:
    """Scores by task of the base and of each adapter."""
    import task_scores
    import torch
    from rich.progress import track
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import molora

    rows = FAST_TEST_ROWS if fast else None
    tasks = {task: task_scores.held_out(task, rows) for task in task_scores.TASKS}
    tokenizer = AutoTokenizer.from_pretrained(model)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
    found = {}
    for name in track(["base", *names], description="scoring"):
        if name == "base":
            found[name] = task_scores.score_tasks(base, tokenizer, tasks)
            continue
        mixture = molora.load(base, output / name.lower() / "adapter")
        found[name] = task_scores.score_tasks(base, tokenizer, tasks, mixture)
        mixture.detach()
    return found


def write_report(names: Sequence[str], model: str, output: Path, *, fast: bool) -> Path:
    """Score everything, print the table, write report.html and its figures."""
    from rich.console import Console

    from molora.report import (
        Curve,
        Report,
        TaskScore,
        Utilisation,
        read_metrics,
        summary_table,
        write_html,
    )

    found = evaluate(names, model, output, fast=fast)
    scores = [
        TaskScore(task, name, scored.accuracy, scored.loss, scored.rows)
        for name, by_task in found.items()
        for task, scored in by_task.items()
    ]
    curves: list[Curve] = []
    for name in names:
        curves += read_metrics(output / name.lower() / "metrics.jsonl", run=name)
    loads = {task: scored.loads for task, scored in found["mixture"].items()}
    Console().print(summary_table(scores))
    report = Report(
        title="molora quick start: MoLA on four tasks",
        scores=scores,
        curves=curves,
        utilisation=Utilisation.from_loads(loads),
        configuration=(output / "mixture" / "config.yaml").read_text(encoding="utf-8"),
        notes=notes(names, fast=fast),
        facts={"base model": Path(model).name, **trained(names, output)},
    )
    return write_html(report, output)


def notes(names: Sequence[str], *, fast: bool) -> list[str]:
    """What a reader of the scores must know."""
    said = [
        "Scores are of held-out rows: the answer with the highest likelihood of the task's "
        "choices, "
        "and the loss per token of the right answer. One seed; the intervals say how little a "
        "hundred rows can tell."
    ]
    if "LoRA" in names:
        said.append(
            "The plain LoRA has the rank that comes nearest to the mixture's trainable parameters, "
            "and got the same rows, tokens, steps and number of tried learning rates."
        )
    if fast:
        said.append(
            "This was a run with --fast: it shows that everything works, not what it is worth."
        )
    return said


def trained(names: Sequence[str], output: Path) -> dict[str, str]:
    """Parameters, tokens and time of each run, from the last line of its metrics."""
    facts = {}
    for name in names:
        lines = (output / name.lower() / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        summary = json.loads(lines[-1])
        facts[name] = (
            f"{sum(summary['parameters'].values()):,} trainable parameters, "
            f"{summary['tokens']:,} tokens in {summary['training_seconds']:.0f} s"
        )
    return facts


if __name__ == "__main__":
    main()
