"""Weights of experts found without gradients, from the value of an objective at weights tried.

Source: LoraHub (2307.13269), which searches a box of ±1.5 with nevergrad's NGOpt for weights at
which few examples have the least loss. Here the weights combine the experts' outputs exactly, and
the searches are scipy's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from molora.config.base import unknown_name
from molora.errors import ConfigError, TrainingError

Objective = Callable[[Tensor], float]
"""Weights (E,), float32 → what is to be least, e.g. the mean loss of few examples."""
Method = Literal["auto", "cobyla", "cobyqa", "evolution", "nevergrad"]
BOUND = 1.5
MIN_BOUND, MAX_BOUND = 0.01, 100.0
BUDGET = 40
PENALTY = 0.05
RADII = (0.5, 0.25, 0.125, 0.0625)
"""How far from the best weights a search first looks; when it has converged before the budget is
spent, another one starts with the next of these."""


@dataclass(frozen=True)
class Trial:
    """One evaluation of the objective."""

    weights: tuple[float, ...]
    """Of each expert."""
    value: float
    """The objective's; NaN and infinity stand as infinity."""


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        best: the trial of least value, the first of equal ones; never worse than the first trial.
        trials: every evaluation, in order; the first is at weights 0.
        method: the one that was used.
    """

    best: Trial
    trials: tuple[Trial, ...]
    method: str

    @property
    def weights_E(self) -> Tensor:
        """The best weights, float32."""
        return torch.tensor(self.best.weights)


def search(
    objective: Objective,
    num_experts: int,
    *,
    budget: int = BUDGET,
    bound: float = BOUND,
    method: Method = "auto",
    seed: int = 0,
) -> SearchResult:
    """Weights in [−bound, bound] for which the objective is low, found by trying `budget` ones.

    Weights 0, the base model alone, are tried first. No weights are tried twice: an objective is
    taken to be the same each time. Every evaluation counts, and all methods but "nevergrad", which
    may ask for the same weights again, spend the whole budget.

    Args:
        objective: weights (E,) float32 → value. Its errors end the search.
        num_experts: E.
        budget: evaluations.
        bound: of each weight's size, 0.01 to 100.
        method: "cobyla", linear models, which has learned something after E + 1 evaluations;
            "cobyqa", quadratic ones, which needs 2 E + 1 and is then better; "auto", the latter
            with a budget of 4 E or more; "evolution", differential evolution, for budgets of 50 E
            or more and objectives with many valleys; "nevergrad", the authors' NGOpt, if that
            package is installed.
        seed: of whatever the method draws; the same seed finds the same weights.

    Raises:
        ConfigError: arguments that cannot be, a package that is not installed or fails.
        TrainingError: an objective that is not finite at weights 0.
    """
    _check(num_experts, budget, bound, method)
    used = method
    if method == "auto":
        used = "cobyqa" if budget >= 4 * num_experts else "cobyla"
    run = {"evolution": _evolution, "nevergrad": _nevergrad}.get(used, _trust_region)
    library = _library("nevergrad" if used == "nevergrad" else "scipy.optimize")
    trials = _Trials(objective, num_experts, budget, bound)
    first = trials.ask([0.0] * num_experts)
    if not math.isfinite(first):
        raise TrainingError(
            "the objective is not finite at weights 0, which is the base model alone. Check the "
            "examples and the base."
        )
    try:
        run(library, trials, seed, used)
    except _BudgetSpent:
        pass
    except Exception as error:
        # the objective's own error, perhaps wrapped, is raised below
        if trials.error is None:
            raise ConfigError(
                f"the method {used!r} failed after {len(trials.done)} evaluations: {error} Choose "
                "another method."
            ) from error
    if trials.error is not None:
        raise trials.error
    return SearchResult(trials.best, tuple(trials.done), used)


def penalized(loss: Objective, *, strength: float = PENALTY) -> Objective:
    """loss(w) + strength · mean |w|, LoraHub's objective for a mean loss over few examples.

    Deviation: LoraHub's code divides the mean loss by the number of examples once more, so that its
    penalty weighs as much more; strength = 0.05 · examples is the same trade-off.
    """
    return lambda weights_E: float(loss(weights_E)) + strength * float(weights_E.abs().mean())


class _BudgetSpent(Exception):
    """Ends a search from inside the objective."""


class _Trials:
    """The objective as searches see it: clipped to the box, without NaN, counted, once a point."""

    def __init__(self, objective: Objective, num_experts: int, budget: int, bound: float) -> None:
        self.num_experts = num_experts
        self.budget = budget
        self.bound = bound
        self.done: list[Trial] = []
        self.error: BaseException | None = None
        self._objective = objective
        self._values: dict[tuple[float, ...], float] = {}

    @property
    def left(self) -> int:
        """Evaluations that may still be made."""
        return self.budget - len(self.done)

    @property
    def best(self) -> Trial:
        """The trial of least value, the first of equal ones."""
        return min(self.done, key=lambda trial: trial.value)

    def ask(self, point: Any) -> float:
        """The value at the nearest point in the box.

        Raises:
            _BudgetSpent: a point that was not tried, when no evaluation is left.
        """
        clipped_E = torch.as_tensor(point, dtype=torch.float32).clamp(-self.bound, self.bound)
        weights_E = clipped_E.reshape(self.num_experts)
        weights = tuple(weights_E.tolist())
        if weights not in self._values:
            if not self.left or self.error is not None:
                raise _BudgetSpent
            try:
                value = float(self._objective(weights_E))
            except BaseException as error:
                self.error = error
                raise
            value = value if math.isfinite(value) else math.inf
            self._values[weights] = value
            self.done.append(Trial(weights, value))
        return self._values[weights]


def _trust_region(scipy: Any, trials: _Trials, seed: int, method: str) -> None:
    """COBYLA or COBYQA until the budget is spent: from the best weights while that gains anything,
    else from random ones. The experts have another order and other signs each time, which decides
    where it looks first."""
    source = torch.Generator().manual_seed(seed)
    size = trials.num_experts
    bounds = [(-trials.bound, trials.bound)] * size
    rounds, gains = 0, True
    while trials.left:
        order = torch.randperm(size, generator=source)
        signs = torch.randint(0, 2, (size,), generator=source).double() * 2 - 1
        anywhere = (torch.rand(size, generator=source, dtype=torch.float64) * 2 - 1) * trials.bound
        best = trials.best
        start = torch.tensor(best.weights, dtype=torch.float64) if gains else anywhere
        radius = min(RADII[rounds % len(RADII)] if gains else RADII[0], trials.bound / 2)

        def ask(point: Any, order: Tensor = order, signs: Tensor = signs) -> float:
            turned = torch.empty(size, dtype=torch.float64)
            turned[order] = torch.as_tensor(point, dtype=torch.float64) * signs
            return trials.ask(turned)

        many = 100 * (trials.budget + 10 * size)  # trials count for themselves
        options = {"initial_tr_radius": radius, "final_tr_radius": 1e-4, "maxfev": many}
        if method == "cobyla":
            options = {"rhobeg": radius, "tol": 1e-4, "maxiter": many}
        begin = (start[order] * signs).numpy()
        scipy.minimize(ask, begin, method=method.upper(), bounds=bounds, options=options)
        gained = best.value - trials.best.value
        gains = gained > 1e-4 * (trials.done[0].value - trials.best.value)
        rounds += 1


def _evolution(scipy: Any, trials: _Trials, seed: int, method: str) -> None:
    bounds = [(-trials.bound, trials.bound)] * trials.num_experts
    members = max(5, min(15 * trials.num_experts, trials.budget // 4))
    while trials.left:
        scipy.differential_evolution(
            trials.ask,
            bounds,
            x0=trials.best.weights,
            popsize=max(1, members // trials.num_experts),
            maxiter=trials.budget,
            tol=0,
            polish=False,
            rng=seed,
        )
        seed += 1


def _nevergrad(nevergrad: Any, trials: _Trials, seed: int, method: str) -> None:
    shape = nevergrad.p.Array(
        init=[0.0] * trials.num_experts,
        lower=[-trials.bound] * trials.num_experts,
        upper=[trials.bound] * trials.num_experts,
    )
    shape.random_state.seed(seed)
    optimizer = nevergrad.optimizers.NGOpt(parametrization=shape, budget=trials.budget)
    optimizer.minimize(trials.ask)


def _library(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        package = name.split(".")[0]
        hint = "molora[compose] brings it" if package == "scipy" else "pip install nevergrad"
        raise ConfigError(
            f"this search needs the package {package}, which is not installed: {hint}, or choose "
            "another method."
        ) from None


def _check(num_experts: int, budget: int, bound: float, method: str) -> None:
    if method not in get_args(Method):
        raise ConfigError(unknown_name("method", method, list(get_args(Method))))
    if num_experts < 1 or budget < 1:
        raise ConfigError(
            f"{num_experts} experts and a budget of {budget} evaluations: both are 1 or more."
        )
    if not MIN_BOUND <= bound <= MAX_BOUND:
        raise ConfigError(
            f"bound={bound}: weights lie in [−bound, bound]; give {MIN_BOUND:g} to {MAX_BOUND:g}."
        )
