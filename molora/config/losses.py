"""Auxiliary losses.

A term (what), and its scope, reduction, mask and coefficient (how it enters).
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from molora.config.base import Frozen


class LoadBalance(Frozen):
    """Product of routed fraction f and mean score P, summed over experts.

    P is the mean of the full scores, f comes from the hard selection and carries no gradient.
    """

    kind: Literal["load_balance"] = "load_balance"
    form: Literal["normalized", "slots", "switch", "unscaled"] = "normalized"
    """normalized: E Σ f P, f sums to 1, value 1 at uniform routing (MoLA). slots: E Σ f P, f sums
    to the number of
    slots, value k (MixLoRA, GOAT). switch: E Σ f P with f of the arg-max alone, value 1
    (2101.03961, Eq. 4).
    unscaled: Σ f P, value k/E (LLaVA-MoLE)."""


class Importance(Frozen):
    """CV² of the summed gates (1701.06538, Eq. 6); 0 at uniform routing."""

    kind: Literal["importance"] = "importance"


class LocalizedBalance(Frozen):
    """LoRAMoE's localized balancing constraint (2312.09979); needs `task_types` in the batch."""

    kind: Literal["localized_balance"] = "localized_balance"
    delta: float = Field(default=0.1, ge=0, lt=1)
    """At the minimum one half carries (1 + delta) / (1 − delta) times the load of the other: the
    first half for sequences of type 0, the second for type 1."""


class RouterZ(Frozen):
    """Mean of logsumexp(logits)² (ST-MoE, 2202.08906, Eq. 5); (log E)² at zero logits."""

    kind: Literal["router_z"] = "router_z"


class RoutingEntropy(Frozen):
    """Mean entropy of a token's scores in nats; log E at uniform routing.

    A positive coefficient sharpens.
    """

    kind: Literal["routing_entropy"] = "routing_entropy"


class LogBalance(Frozen):
    """−Σ log of each expert's mean score (MoLE's L_balance, 2404.13628, over the model's linears);
    E log E at uniform routing, and without a bound where an expert is never chosen."""

    kind: Literal["log_balance"] = "log_balance"


class TaskCrossEntropy(Frozen):
    """Mean cross entropy in nats of softmax(logits) with the expert that a row's sequence belongs
    to (MeteoRA, 2405.13053; MoA, 2403.03432); log E at equal logits. Needs `expert_labels` in the
    batch: one number of an expert per sequence, -100 for one that belongs to none."""

    kind: Literal["task_cross_entropy"] = "task_cross_entropy"


Term = Annotated[
    LoadBalance
    | Importance
    | LocalizedBalance
    | LogBalance
    | RouterZ
    | RoutingEntropy
    | TaskCrossEntropy,
    Field(discriminator="kind"),
]


class Loss(Frozen):
    """coefficient · reduction over pools of term(records of the pool)."""

    term: Term = LoadBalance()
    """What is penalised."""
    coefficient: float = 0.01
    """Weight in the training loss; it means nothing without the four other fields."""
    scope: Literal["site", "layer", "model"] = "site"
    """Which records are pooled before the term: one routing decision, a layer's, or all."""
    reduction: Literal["mean", "sum"] = "mean"
    """How the terms of the pools are combined."""
    mask: Literal["valid", "all"] = "valid"
    """Count only tokens that are not padding, or all, as some authors' code does."""

    @model_validator(mode="after")
    def _terms_of_sequences_are_per_site(self) -> Self:
        by_sequence = {
            LocalizedBalance: "localized balance",
            TaskCrossEntropy: "task cross entropy",
        }
        if type(self.term) in by_sequence and self.scope != "site":
            raise ValueError(
                f"scope={self.scope!r} pools sites, but the {by_sequence[type(self.term)]} loss "
                "needs the rows of one site in their sequences. Use scope='site'."
            )
        return self
