"""Loss configs → weighted terms: the place where losses lose their config."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from torch import Tensor

from molora.config import (
    Importance,
    LoadBalance,
    LocalizedBalance,
    LogBalance,
    Loss,
    MixtureConfig,
    RouterZ,
    TaskCrossEntropy,
)
from molora.losses import WeightedTerm, terms
from molora.losses.total import Term
from molora.routing import Routing


def weighted_terms(config: MixtureConfig) -> tuple[WeightedTerm, ...]:
    """Every loss of a mixture, named by its kind, numbered where a kind comes twice."""
    kinds = [loss.term.kind for loss in config.losses]
    return tuple(
        WeightedTerm(
            name=kind if kinds.count(kind) == 1 else f"{kind}_{kinds[:i].count(kind)}",
            term=_term(loss),
            coefficient=loss.coefficient,
            scope=loss.scope,
            reduction=loss.reduction,
            mask=loss.mask,
        )
        for i, (kind, loss) in enumerate(zip(kinds, config.losses, strict=True))
    )


def required_columns(config: MixtureConfig) -> tuple[str, ...]:
    """Columns that a training batch must have."""
    kinds = {type(loss.term) for loss in config.losses if loss.coefficient}
    needed = {LocalizedBalance: "task_types", TaskCrossEntropy: "expert_labels"}
    return tuple(column for kind, column in needed.items() if kind in kinds)


def _term(loss: Loss) -> Term:
    match loss.term:
        case LoadBalance(form=form):
            return partial(_without_side, partial(terms.load_balance, form=form))
        case LocalizedBalance(delta=delta):
            return partial(_localized, delta)
        case Importance():
            return partial(_without_side, terms.importance)
        case LogBalance():
            return partial(_without_side, terms.log_balance)
        case TaskCrossEntropy():
            return _of_experts
        case RouterZ():
            return partial(_without_side, terms.router_z)
        case _:
            return partial(_without_side, terms.routing_entropy)


def _without_side(term: terms.RecordTerm, record: Routing, side: Mapping[str, Tensor]) -> Tensor:
    return term(record)


def _localized(delta: float, record: Routing, side: Mapping[str, Tensor]) -> Tensor:
    return terms.localized_balance(record, delta=delta, task_types_B=side["task_types"])


def _of_experts(record: Routing, side: Mapping[str, Tensor]) -> Tensor:
    return terms.task_cross_entropy(record, expert_labels_B=side["expert_labels"])
