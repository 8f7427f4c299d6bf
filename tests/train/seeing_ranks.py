"""On every rank: what a run on several ranks says of itself, under DDP and every ZeRO stage.

seeing_ranks.py OUT.json DIRECTORY STAGE…      stages: none, 0, 1, 2, 3, 2-offload, 3-offload
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from seeing import reports_of, trainer_in
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from molora.train import SFTTrainer


def engine(stage: str) -> dict[str, Any] | None:
    """DeepSpeed's configuration, with buckets so small that parameters are cut."""
    if stage == "none":
        return None
    zero: dict[str, Any] = {
        "stage": int(stage[0]),
        "overlap_comm": False,
        "reduce_bucket_size": 500,
        "allgather_bucket_size": 500,
        "stage3_param_persistence_threshold": 0,
    }
    if stage.endswith("offload"):
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }


class Counts:
    """Rows that this rank's routers sent to each expert in training, by site."""

    def __init__(self, trainer: SFTTrainer) -> None:
        self.by_site: dict[str, torch.Tensor] = {}
        self.trainer, self.compute_loss = trainer, trainer.compute_loss
        trainer.compute_loss = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.trainer.mixture.record() as records:
            loss = self.compute_loss(*args, **kwargs)
        for site, record in records.items():
            counts = torch.bincount(record.expert_index[record.mask].flatten(), minlength=4)
            self.by_site[site] = self.by_site.get(site, 0) + counts
        return loss


def scenario(directory: Path, stage: str) -> dict[str, Any]:
    """The reports of a run, and what every rank counted itself in the only window."""
    # each trainer is of a process of its own, as far as accelerate and transformers know
    AcceleratorState._reset_state()
    unset_hf_deepspeed_config()
    options = {"deepspeed": engine(stage), "use_cpu": True, "ddp_find_unused_parameters": False}
    trainer = trainer_in(directory / stage, rows_per_process=4, **options)
    counts = Counts(trainer)
    found: dict[str, Any] = {"reports": reports_of(trainer)}
    found["lines"] = [line for line in trainer.state.log_history if "loss" in line]
    by_rank: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(by_rank, {site: c.tolist() for site, c in counts.by_site.items()})
    found["counts"] = by_rank
    found["partitioned"] = all(p.numel() == 0 for p in trainer.model.parameters())
    return found


if __name__ == "__main__":
    target, place, stages = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    results = {stage: scenario(place, stage) for stage in stages}
    if dist.get_rank() == 0:
        target.write_text(json.dumps(results, indent=1))
    # a rank that leaves while another still talks to it can take that one down
    dist.barrier()
    dist.destroy_process_group()
