"""Mixtures with a router at every linear, deciding per token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from molora.config import LoadBalance, LocalizedBalance, Loss, MixtureConfig
from molora.presets.assemble import Count, Targets, assemble, lora_group


def mola(
    *,
    num_experts: Count = "inverted_triangle",
    top_k: Count = 2,
    rank: Count = 8,
    alpha: float = 16.0,
    dropout: float = 0.05,
    targets: Targets = "all",
    renormalize: bool = True,
    losses: Sequence[Loss] | None = None,
    **options: Any,
) -> MixtureConfig:
    """MoLA: higher layers get more LoRA experts, top-2 per token (Gao et al., 2402.08562).

    By default layers have 2, 4, 6, 8 experts by quarters, and the loss is 0.001 · Σ over layers of
    E Σ f P, pooled over the linears of a layer, as in the authors' code.
    Deviations: padding is left out of the loss (mask="all" counts it), and one dropout mask serves
    all experts.
    """
    group = lora_group(
        targets=targets,
        num_experts=num_experts,
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        select={"kind": "top_k", "k": top_k, "renormalize": renormalize},
    )
    if losses is None:
        losses = (
            Loss(
                term=LoadBalance(form="normalized"),
                coefficient=0.001,
                scope="layer",
                reduction="sum",
            ),
        )
    return assemble(mola, group, losses=losses, options=options)


def loramoe(
    *,
    num_experts: Count = 6,
    rank: Count = 4,
    alpha: float = 32.0,
    dropout: float = 0.05,
    targets: Targets = "ffn",
    delta: float = 0.1,
    losses: Sequence[Loss] | None = None,
    **options: Any,
) -> MixtureConfig:
    """LoRAMoE: dense softmax mixture on the FFN with a localized balance between two groups of
    experts (2312.09979).

    Training needs a column `task_types` of 0 and 1, one per sequence, unless `losses=()`. The loss
    is 0.1 · the sum over linears, with the paper's delta = 0.1; the authors' script has both at 0.
    Deviations: the variance is divided by the squared mean as in the authors' code, not the paper's
    mean; padding is left out; one dropout mask serves all experts; attention linears can be targets
    too.
    """
    group = lora_group(
        targets=targets,
        num_experts=num_experts,
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        select={"kind": "dense"},
    )
    if losses is None:
        losses = (
            Loss(
                term=LocalizedBalance.parse({"delta": delta}),
                coefficient=0.1,
                scope="site",
                reduction="sum",
            ),
        )
    return assemble(loramoe, group, losses=losses, options=options)
