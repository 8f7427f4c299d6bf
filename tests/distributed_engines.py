"""Ways in which several processes can train one model, behind one interface."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from distributed_scenarios import OPTIMISERS
from torch import Tensor, nn

ENGINES = ("ddp", "zero0", "zero1", "zero2", "zero3", "zero3_tight")
"""`zero3_tight` releases and fetches a parameter around every use; `zero3` keeps what is used again
soon, as by default. Neither keeps small parameters whole."""


def settings(name: str) -> dict[str, Any]:
    """DeepSpeed's JSON, with buckets so small that a step needs several."""
    zero: dict[str, Any] = {
        "stage": int(name[4]),
        "overlap_comm": False,
        "reduce_bucket_size": 500,
        "allgather_bucket_size": 500,
    }
    if name.startswith("zero3"):
        zero |= {"stage3_param_persistence_threshold": 0}
    if name == "zero3_tight":
        zero |= {
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": 0,
        }
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,  # 1.0 unless given
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


class Engine:
    """A model under one of ENGINES, whose gradients are averaged over the ranks.

    Attributes:
        model: the model itself, which the mixture is on.
        wrapped: what is called in training.
    """

    def __init__(
        self, name: str, model: nn.Module, *, optimiser: str = "sgd", accumulate: int = 1
    ) -> None:
        self.name = name
        self.model = model
        self.wrapped: Any
        parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimiser = OPTIMISERS[optimiser](parameters)
        if name == "ddp":
            self.wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=False)
        else:
            config = {**settings(name), "gradient_accumulation_steps": accumulate}
            self.wrapped, *_ = deepspeed.initialize(
                model=model, optimizer=self.optimiser, config=config
            )

    def backward(self, loss: Tensor) -> None:
        """Of a rank's share of the loss of all: averaging the gradients divides by the ranks."""
        loss = loss * dist.get_world_size()
        if self.name == "ddp":
            loss.backward()
        else:
            self.wrapped.backward(loss, scale_wrt_gas=False)

    def step(self) -> float:
        """One optimiser step; returns the norm of the whole gradient."""
        if self.name != "ddp":
            self.wrapped.step()
            return float(self.wrapped.get_global_grad_norm() or 0.0)
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = float(torch.stack([g.norm() for g in grads]).norm())
        self.optimiser.step()
        self.optimiser.zero_grad()
        return norm

    def close(self) -> None:
        """Take the engine's hooks off, so that the next one starts alone."""
        if self.name != "ddp":
            self.wrapped.destroy()

    def is_partitioned(self) -> bool:
        """Whether no rank holds a whole parameter."""
        return all(p.shape == (0,) for p in self.model.parameters())
