"""On every rank: runs that are interrupted and go on, under each stage; prints what differs.

    resume_ranks.py OUT.json DIRECTORY STAGE…      stages: none, 1, 2, 3, 3-offload

DIRECTORY/from-1 is a checkpoint of one process. Checkpoints that one process is to go on from are
left in DIRECTORY/STAGE-even.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from resumable import At, Killed, everything, kill, logged, trainer_in
from torch import Tensor
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from molora.train import SFTTrainer

EVEN = {"mixture": {"dropout": 0.0}}
"""Without dropout, whose random numbers are a rank's own, the number of ranks does not matter."""


def engine(stage: str) -> dict[str, Any] | None:
    """DeepSpeed's configuration; a tiny model is partitioned only without a threshold."""
    if stage == "none":
        return None
    zero: dict[str, Any] = {
        "stage": int(stage[0]),
        "overlap_comm": False,
        "contiguous_gradients": True,
        "stage3_param_persistence_threshold": 0,
    }
    if stage.endswith("offload"):
        zero |= {name: {"device": "cpu"} for name in ("offload_param", "offload_optimizer")}
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }


def make(out: Path, stage: str, **options: Any) -> SFTTrainer:
    """The run of `resumable` with its four rows a step and process."""
    # each trainer is of a process of its own, as far as accelerate and transformers know
    AcceleratorState._reset_state()
    unset_hf_deepspeed_config()
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    return trainer_in(
        out,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        deepspeed=engine(stage),
        use_cpu=True,
        ddp_find_unused_parameters=False,
        **options,
    )


def interrupted(out: Path, stage: str, at: int, **options: Any) -> None:
    trainer = make(out, stage, callbacks=[At(at, kill)], **options)
    try:
        trainer.train()
    except Killed:
        return
    raise AssertionError("was not interrupted")


def resumed(out: Path, stage: str, checkpoint: Any, **options: Any) -> SFTTrainer:
    trainer = make(out, stage, seed=5, **options)
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest difference of any weight or moment."""
    assert found.keys() == expected.keys()
    return max(float((found[n].double() - expected[n].double()).abs().max()) for n in expected)


def losses(trainer: SFTTrainer) -> list[float]:
    return [line["loss"] for line in logged(trainer) if "loss" in line]


def partitioned(trainer: SFTTrainer) -> bool:
    return all(p.numel() == 0 for p in trainer.model.parameters())


def scenarios(stage: str, others: list[str], directory: Path) -> dict[str, Any]:
    """Results of one stage, and of going on from its checkpoint under the other stages."""
    out = directory / stage
    run = make(out / "straight", stage, save_strategy="no")
    run.train()
    straight = everything(run)
    result = {"partitioned": partitioned(run), "losses": losses(run)}
    # inside a window of metrics
    interrupted(out / "cut", stage, 6, save_steps=5)
    again = resumed(out / "cut", stage, True, save_steps=5)
    result["same"] = distance(everything(again), straight)
    result["lines_are_equal"] = logged(again) == logged(run)
    # the negative control: one random number more, once
    other = make(out / "other", stage, save_strategy="no")
    other.add_callback(At(5, lambda: torch.rand(1)))
    other.train()
    result["control"] = distance(everything(other), straight)
    # the dropout of a run does not depend on the stage, nor on a change of it
    for other_stage in others:
        moved = resumed(
            out / f"to-{other_stage}", other_stage, str(out / "cut" / "checkpoint-5"), save_steps=5
        )
        result[f"to {other_stage}"] = distance(everything(moved), straight)
        result[f"losses to {other_stage}"] = losses(moved)
    return result


def even(stage: str, directory: Path) -> dict[str, Any]:
    """Between one process and several: 2 → 1 is gone on from by the caller, 1 → 2 here."""
    run = make(directory / f"{stage}-even", stage, save_steps=5, save_total_limit=3, **EVEN)
    run.train()
    moved = resumed(directory / f"{stage}-from-1", stage, str(directory / "from-1"), **EVEN)
    return {
        "losses": losses(run),
        "from one": losses(moved),
        "distance from one": distance(everything(moved), everything(run)),
    }


if __name__ == "__main__":
    target, place, stages = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    results = {s: scenarios(s, [o for o in stages if o != s], place) for s in stages}
    results["even"] = {s: even(s, place) for s in stages}
    if dist.get_rank() == 0:
        target.write_text(json.dumps(results, indent=1))
    # together: a rank that ends first takes the store of the others along
    dist.barrier()
    dist.destroy_process_group()
