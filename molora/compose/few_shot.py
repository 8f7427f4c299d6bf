"""Weights of a mixture's experts from few examples, without gradients: LoraHub on a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from molora.attach import Mixture
from molora.attach.model_scope import GivenGates
from molora.compose.edit import imported_form
from molora.compose.search import BOUND, BUDGET, PENALTY, Method, SearchResult, penalized, search
from molora.errors import AttachError, ConfigError


@dataclass(frozen=True)
class FewShotWeights:
    """What few examples ask for.

    Attributes:
        weights: of each expert, for router "fixed".
        loss: the examples' at these weights, without the penalty.
        base_loss: the examples' at weights 0, the base model alone.
        result: the search, whose values hold the penalty.
    """

    weights: dict[str, float]
    loss: float
    base_loss: float
    result: SearchResult


def few_shot_weights(
    mixture: Mixture,
    loss: Callable[[], float],
    *,
    examples: int,
    strength: float | None = None,
    budget: int = BUDGET,
    bound: float = BOUND,
    method: Method = "auto",
    seed: int = 0,
) -> FewShotWeights:
    """Weights for which the loss of few examples is low: LoraHub (2307.13269), whose search is over
    one weight for each expert. Deviation: weights combine updates exactly, where the authors
    combine the factors A and B, each by itself.

    Args:
        mixture: composed with router "given". It is not changed: compose with router "fixed" and
            what is found.
        loss: the mean loss of the examples of the model as it then is.
        examples: how many there are.
        strength: of the penalty on mean |w|; by default 0.05 · examples, the authors' trade-off.
        budget, bound, method, seed: as in `search`.

    Raises:
        AttachError: a mixture with another router.
        ConfigError: no examples, a negative strength, and as `search`.
        TrainingError: a loss that is not finite at weights 0.
    """
    scope = mixture.built.model_scope
    if not isinstance(scope, GivenGates):
        raise AttachError(
            f"this mixture (method {mixture.config.method!r}) decides by itself. Compose it with "
            "router='given' to search weights."
        )
    chosen = PENALTY * examples if strength is None else strength
    if examples < 1 or not 0 <= chosen < float("inf"):
        raise ConfigError(
            f"{examples} examples and a penalty of {chosen}: give 1 example or more, and a penalty "
            "of 0 or more."
        )
    device = next(mixture.model.parameters()).device
    losses: dict[tuple[float, ...], float] = {}

    def measured(weights_E: Tensor) -> float:
        with torch.no_grad(), mixture.context(expert_gates=weights_E[None].to(device)):
            found = float(loss())
        losses[tuple(weights_E.tolist())] = found
        return found

    objective = penalized(measured, strength=chosen)
    result = search(
        *(objective, scope.num_experts), budget=budget, bound=bound, method=method, seed=seed
    )
    names, best = imported_form(mixture.config).names, result.best.weights
    zero = losses[result.trials[0].weights]
    return FewShotWeights(dict(zip(names, best, strict=True)), losses[best], zero, result)
