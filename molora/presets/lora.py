"""Plain LoRA and the dense soft mixture: the two ends that other methods are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from molora.config import Loss, MixtureConfig
from molora.presets.assemble import Count, Targets, assemble, lora_group


def lora(
    *,
    rank: Count = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    targets: Targets = "all",
    **options: Any,
) -> MixtureConfig:
    """Plain LoRA: one expert per linear and no router (Hu et al., 2106.09685).

    Args:
        rank, alpha, dropout, targets: as in every preset.
        options: other fields of `MixtureConfig`, such as `dtype` or `train_modules`.
    """
    group = lora_group(targets=targets, num_experts=1, rank=rank, alpha=alpha, dropout=dropout)
    return assemble(lora, group, options=options)


def molora(
    *,
    num_experts: Count = 8,
    rank: Count = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    targets: Targets = "all",
    losses: Sequence[Loss] = (),
    **options: Any,
) -> MixtureConfig:
    """Dense soft mixture: softmax over all experts at every linear (MoLORA, Zadouri et al.,
    2309.05444).

    Deviations from the authors' code: any linear of a PyTorch model in place of T5X's, routers
    start kaiming-uniform as in the other presets in place of N(0, 0.02), and alpha is free where
    theirs is 16.
    """
    group = lora_group(
        targets=targets,
        num_experts=num_experts,
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        select={"kind": "dense"},
    )
    return assemble(molora, group, losses=losses, options=options)
