"""LoraHub on a model: the loss that is searched, against mixtures with fixed weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft_adapters import save_adapter
from tiny_models import tiny
from torch import nn

import molora
from molora.compose.few_shot import few_shot_weights
from molora.errors import AttachError, ConfigError, TrainingError

IDS = torch.randint(5, 50, (3, 9), generator=torch.Generator().manual_seed(0))
TRUE = {"a": 1.2, "b": -0.6, "c": 0.0}


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("few")
    targets = {"a": ["q_proj", "down_proj"], "b": ["q_proj"], "c": ["v_proj"]}
    for number, (name, modules) in enumerate(targets.items()):
        save_adapter(root / name, seed=number + 1, r=2 + number, target_modules=modules)
    return {name: root / name for name in targets}


def composed(directories: dict[str, Path], router: object) -> tuple[nn.Module, molora.Mixture]:
    model = tiny("llama").eval()
    experts = molora.load_experts(directories)
    return model, molora.compose(model, experts, router=router, missing="zero")


def fixed(weights: dict[str, float]) -> dict[str, object]:
    return {"kind": "fixed", "weights": weights}


@pytest.fixture(scope="module")
def wanted(directories: dict[str, Path]) -> torch.Tensor:
    """Next tokens' probabilities with the weights that are to be found."""
    model, _ = composed(directories, fixed(TRUE))
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits.softmax(-1)
    return found


def loss_with(model: nn.Module, wanted: torch.Tensor) -> Callable[[], float]:
    def loss() -> float:
        logits_NV = model(IDS).logits.flatten(0, 1)
        return float(nn.functional.cross_entropy(logits_NV, wanted.flatten(0, 1)))

    return loss


def test_every_trial_is_the_loss_of_fixed_weights_and_the_penalty(
    directories: dict[str, Path], wanted: torch.Tensor
) -> None:
    model, mixture = composed(directories, "given")
    found = few_shot_weights(mixture, loss_with(model, wanted), examples=3, budget=12, seed=1)
    assert len(found.result.trials) == 12
    for trial in found.result.trials[:4]:
        weights = dict(zip(TRUE, trial.weights, strict=True))
        other, _ = composed(directories, fixed(weights))
        with torch.no_grad():
            plain = loss_with(other, wanted)()
        penalty = 0.05 * 3 * sum(abs(weight) for weight in trial.weights) / 3
        assert trial.value == pytest.approx(plain + penalty, abs=1e-5)
    best = dict(zip(TRUE, found.result.best.weights, strict=True))
    assert found.weights == best
    other, _ = composed(directories, fixed(best))
    with torch.no_grad():
        assert found.loss == pytest.approx(loss_with(other, wanted)(), abs=1e-5)
        with mixture.disabled():
            assert found.base_loss == pytest.approx(loss_with(model, wanted)(), abs=1e-5)
    assert found.loss < found.base_loss


def test_the_weights_that_made_the_examples_are_found(
    directories: dict[str, Path], wanted: torch.Tensor
) -> None:
    model, mixture = composed(directories, "given")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    arguments = (mixture, loss_with(model, wanted))
    free = few_shot_weights(*arguments, examples=3, budget=80, strength=0.0)
    for name, weight in TRUE.items():
        assert free.weights[name] == pytest.approx(weight, abs=0.1)
    # the authors' penalty, and more so for more examples, makes them smaller
    sizes = [
        sum(abs(w) for w in few_shot_weights(*arguments, examples=n, budget=80).weights.values())
        for n in (3, 30)
    ]
    assert sum(map(abs, free.weights.values())) > sizes[0] > sizes[1]
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    with pytest.raises(AttachError, match="gates come with the batch"):
        model(IDS)  # nothing stays


def test_the_same_seed_finds_the_same_weights(
    directories: dict[str, Path], wanted: torch.Tensor
) -> None:
    model, mixture = composed(directories, "given")
    loss = loss_with(model, wanted)
    first, second, other = (
        few_shot_weights(mixture, loss, examples=3, budget=10, seed=seed) for seed in (0, 0, 5)
    )
    assert first == second
    assert first.result.trials != other.result.trials


def test_what_cannot_be_is_refused(directories: dict[str, Path]) -> None:
    _, mixture = composed(directories, "given")
    with pytest.raises(ConfigError, match="0 examples"):
        few_shot_weights(mixture, lambda: 0.0, examples=0)
    with pytest.raises(ConfigError, match=r"a penalty of -1\.0"):
        few_shot_weights(mixture, lambda: 0.0, examples=1, strength=-1.0)
    with pytest.raises(TrainingError, match="not finite at weights 0"):
        few_shot_weights(mixture, lambda: float("nan"), examples=1)
    _, other = composed(directories, "uniform")
    with pytest.raises(AttachError, match=r"method 'uniform'\) decides by itself"):
        few_shot_weights(other, lambda: 0.0, examples=1)
