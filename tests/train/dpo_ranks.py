"""One rank of preference training from a file; writes what its trainer held after every step."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

import molora
from molora.train import DPOTrainer, train


class Watch(TrainerCallback):
    """Shapes of parameters, groups of the optimiser, and gradients on the base."""

    def __init__(self, trainer: DPOTrainer) -> None:
        self.trainer = trainer
        self.seen: list[dict[str, Any]] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        model, groups = self.trainer.model, self.trainer.optimizer.param_groups
        ours = {id(p) for _, p in self.trainer.mixture.named_parameters()}
        self.seen.append(
            {
                "shapes": sorted({tuple(p.shape) for p in model.parameters()}),
                "groups": {g["name"]: [g["initial_lr"], g["weight_decay"]] for g in groups},
                "grads_on_base": sum(
                    p.grad is not None for p in model.parameters() if id(p) not in ours
                ),
            }
        )


def main(config: str) -> None:
    watches = []
    init = DPOTrainer.__init__

    def watched(trainer: DPOTrainer, *args: Any, **kwargs: Any) -> None:
        init(trainer, *args, **kwargs)
        watches.append(Watch(trainer))
        trainer.add_callback(watches[0])

    DPOTrainer.__init__ = watched  # type: ignore[method-assign]
    run = molora.load_config(config)
    train(run, progress=False)
    rank = watches[0].trainer.args.process_index
    path = Path(run.output_dir) / f"rank{rank}.json"
    path.write_text(json.dumps(watches[0].seen), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
