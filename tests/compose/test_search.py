"""Searches without gradients: known optima, every evaluation counted, never worse than at 0."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from molora.compose.search import SearchResult, penalized, search
from molora.errors import ConfigError, TrainingError

METHODS = ["auto", "cobyla", "cobyqa", "evolution"]


class Watched:
    """An objective that notes at which weights it was asked, and what it said."""

    def __init__(self, objective: Callable[[Tensor], float]) -> None:
        self.objective = objective
        self.asked: list[tuple[float, ...]] = []
        self.said: list[float] = []

    def __call__(self, weights_E: Tensor) -> float:
        assert weights_E.dtype == torch.float32
        self.asked.append(tuple(weights_E.tolist()))
        self.said.append(self.objective(weights_E))
        return self.said[-1]


def bowl(num_experts: int, *, seed: int = 0, noise: float = 0.0) -> tuple[Watched, Tensor]:
    """A quadratic with valleys along no axis, of value 1 at weights 0, and its optimum: few experts
    count, at least the first."""
    source = torch.Generator().manual_seed(seed)
    optimum = torch.rand(num_experts, generator=source) * 2.2 - 1
    optimum *= torch.rand(num_experts, generator=source) < 0.5
    optimum[0] = 0.8
    factor = torch.randn(num_experts, 2 * num_experts, generator=source)
    curvature = factor @ factor.T / (2 * num_experts)
    start = float(optimum @ curvature @ optimum)

    def value(weights_E: Tensor) -> float:
        away = weights_E - optimum
        drawn = noise * float(torch.randn((), generator=source))
        return float(away @ curvature @ away) / start + drawn

    return Watched(value), optimum


def check(result: SearchResult, objective: Watched, budget: int) -> None:
    """What holds for every search."""
    assert [trial.weights for trial in result.trials] == objective.asked
    assert [trial.value for trial in result.trials] == objective.said
    assert len(objective.asked) <= budget
    assert objective.asked[0] == (0.0,) * len(objective.asked[0])
    assert result.best.value == min(objective.said)
    assert result.best == result.trials[objective.said.index(result.best.value)]
    assert torch.equal(result.weights_E, torch.tensor(result.best.weights))


@pytest.mark.parametrize("budget", [1, 2, 40, 200])
@pytest.mark.parametrize("num_experts", [1, 3, 20])
@pytest.mark.parametrize("method", METHODS)
def test_every_evaluation_counts(method, num_experts, budget):
    objective, _ = bowl(num_experts)
    result = search(objective, num_experts, budget=budget, method=method)
    check(result, objective, budget)
    assert len(objective.asked) == budget
    assert len(set(objective.asked)) == len(objective.asked)
    assert max(abs(w) for weights in objective.asked for w in weights) <= 1.5
    if budget >= 40 and (method, num_experts) != ("evolution", 20):
        assert result.best.value < 0.9


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("method", "num_experts", "budget", "share"),
    [
        ("auto", 1, 40, 1e-4),
        ("auto", 3, 40, 1e-3),
        ("auto", 8, 40, 0.1),
        ("auto", 8, 200, 1e-3),
        ("auto", 20, 40, 0.4),
        ("auto", 20, 200, 0.01),
        ("cobyla", 8, 200, 0.02),
        ("cobyqa", 8, 200, 1e-3),
        ("evolution", 3, 400, 0.05),
    ],
)
def test_known_optima_are_found(method, num_experts, budget, share, seed):
    objective, optimum = bowl(num_experts, seed=seed)
    result = search(objective, num_experts, budget=budget, method=method, seed=seed)
    assert result.best.value <= share
    if share <= 1e-3:
        torch.testing.assert_close(result.weights_E, optimum, atol=0.1, rtol=0)
    # the same number of random weights does not come so far
    source = torch.Generator().manual_seed(seed)
    drawn = torch.rand(budget, num_experts, generator=source) * 3 - 1.5
    assert min(objective(weights_E) for weights_E in drawn) > result.best.value


def test_the_authors_search_runs_where_it_is_installed():
    objective, _ = bowl(20)
    if find_spec("nevergrad") is None:
        with pytest.raises(ConfigError, match="needs the package nevergrad"):
            search(objective, 20, method="nevergrad")
        return
    result = search(objective, 20, budget=40, method="nevergrad")
    check(result, objective, 40)
    assert result.best.value < 0.9


def test_auto_takes_quadratic_models_once_the_budget_allows():
    for budget, method in ((79, "cobyla"), (80, "cobyqa")):
        objective, _ = bowl(20)
        found = search(objective, 20, budget=budget)
        named = search(bowl(20)[0], 20, budget=budget, method=method)
        assert (found.method, found.trials) == (method, named.trials)


@pytest.mark.parametrize("method", ["auto", "cobyla"])
def test_noise_does_not_hide_the_valley(method):
    for seed in range(3):
        objective, _ = bowl(6, seed=seed, noise=0.02)
        result = search(objective, 6, budget=200, method=method, seed=seed)
        check(result, objective, 200)
        clean, _ = bowl(6, seed=seed)
        assert clean(result.weights_E) < 0.2


def test_an_optimum_outside_of_the_box_is_met_at_its_side():
    def objective(weights_E: Tensor) -> float:
        return float(((weights_E - torch.tensor([3.0, -0.2])) ** 2).sum())

    for bound in (1.5, 0.25, 0.01, 2.9):
        result = search(objective, 2, budget=60, bound=bound)
        torch.testing.assert_close(
            result.weights_E, torch.tensor([bound, max(-bound, -0.2)]), atol=0.02, rtol=0
        )
        assert result.weights_E[0] <= bound


def test_a_valley_elsewhere_is_found_with_what_is_left_of_the_budget():
    def objective(weights_E: Tensor) -> float:
        near = 0.5 * float(((weights_E - 0.3) ** 2).sum())
        far = 8 * float(((weights_E + 1.1) ** 2).sum()) - 1
        return min(near, far)

    assert search(objective, 2, budget=20).best.value == pytest.approx(0, abs=1e-3)
    assert search(objective, 2, budget=400).best.value == pytest.approx(-1, abs=1e-2)


@pytest.mark.parametrize("method", METHODS)
def test_a_seed_decides(method):
    runs = [search(bowl(5)[0], 5, budget=30, method=method, seed=seed) for seed in (0, 0, 1)]
    assert runs[0] == runs[1]
    assert runs[0].trials != runs[2].trials


def test_what_others_draw_is_left_alone():
    torch.manual_seed(7)
    state = torch.get_rng_state()
    search(bowl(3)[0], 3)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_at_which_a_model_breaks_are_avoided(method, bad):
    def objective(weights_E: Tensor) -> float:
        away = float(((weights_E - 0.5) ** 2).sum())
        return bad if float(weights_E.sum()) > 1.2 else away

    result = search(objective, 2, budget=120, method=method)
    assert any(trial.value == math.inf for trial in result.trials)
    assert not any(math.isnan(trial.value) for trial in result.trials)
    torch.testing.assert_close(result.weights_E, torch.tensor([0.5, 0.5]), atol=0.15, rtol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_start_that_is_not_finite_is_an_error(value):
    with pytest.raises(TrainingError, match="not finite at weights 0"):
        search(lambda weights_E: value, 3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", [ValueError, RuntimeError, KeyboardInterrupt])
def test_an_objectives_error_is_the_callers(method, kind):
    calls = []

    def objective(weights_E: Tensor) -> float:
        calls.append(weights_E)
        if len(calls) == 5:
            raise kind("out of memory")
        return float((weights_E**2).sum())

    with pytest.raises(kind, match="out of memory"):
        search(objective, 3, method=method)
    assert len(calls) == 5


def test_the_penalty_is_lorahubs():
    loss = lambda weights_E: float((weights_E[0] - 1) ** 2)  # noqa: E731
    weights_E = torch.tensor([0.5, -1.0, 0.0, 0.0])
    assert penalized(loss)(weights_E) == pytest.approx(0.25 + 0.05 * 1.5 / 4)
    assert penalized(loss, strength=2)(weights_E) == pytest.approx(0.25 + 2 * 1.5 / 4)
    # what does not help is left out
    objective, _ = bowl(3)
    bare = search(objective, 3, budget=150).weights_E
    pressed = search(penalized(bowl(3)[0], strength=10.0), 3, budget=150).weights_E
    assert bare.abs().mean() > 0.2
    assert pressed.abs().mean() < 0.01


def test_what_cannot_be_is_refused(monkeypatch):
    objective, _ = bowl(2)
    with pytest.raises(ConfigError, match=r"unknown method 'cobylla'\. Close names: cobyla"):
        search(objective, 2, method="cobylla")  # type: ignore[arg-type]
    for num_experts, budget in ((0, 40), (2, 0)):
        with pytest.raises(ConfigError, match="both are 1 or more"):
            search(objective, num_experts, budget=budget)
    for bound in (0.0, -1.0, 0.009, 101.0, math.nan, math.inf):
        with pytest.raises(ConfigError, match=f"bound={bound}"):
            search(objective, 2, bound=bound)
    for package, method in (("scipy", "auto"), ("scipy", "evolution"), ("nevergrad", "nevergrad")):
        name = "scipy.optimize" if package == "scipy" else package
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ConfigError, match=f"needs the package {package}, which is not"):
            search(objective, 2, method=method)  # type: ignore[arg-type]
    assert objective.asked == []


def test_a_library_that_fails_says_which_and_how_far(monkeypatch):
    def breaks(*arguments: object, **options: object) -> None:
        raise TypeError("only 0-dimensional arrays")

    monkeypatch.setattr("scipy.optimize.minimize", breaks)
    with pytest.raises(ConfigError, match="'cobyla' failed after 1 evaluations: only 0-dim"):
        search(bowl(2)[0], 2, method="cobyla")
