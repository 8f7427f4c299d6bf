"""Vectors made on experts' own examples: PHATGOOSE's gates and mean inputs, and their storage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from frozen_sets import load_set, logits
from saved_mixtures import Snapshot
from tiny_models import batch_for, tiny
from torch import Tensor, nn

import molora
from molora.compose.experts import FrozenExperts
from molora.compose.gate_vectors import mean_activations, train_gate_vectors
from molora.errors import ConfigError, DataError

SET: dict[str, Any] = {
    "math": {"target_modules": ["q_proj", "down_proj"]},
    "code": {"r": 5, "target_modules": ["q_proj", "up_proj"]},
}


def data(model: nn.Module) -> dict[str, list[dict[str, Tensor]]]:
    return {
        name: [batch_for(model, (7, 4, 5), seed=seed + n) for n in range(3)]
        for seed, name in enumerate(("math", "code"), start=10)
    }


def test_a_gate_starts_at_one_half_and_its_vector_gets_the_tasks_gradient(tmp_path: Path) -> None:
    experts = load_set(tmp_path, SET)
    one = FrozenExperts({"math": experts.adapters["math"]}, ())
    model = tiny("llama")
    zeros = {
        "math": {p: torch.zeros(m.lora_A.shape[1]) for p, m in one.adapters["math"].modules.items()}
    }
    mixture = molora.compose(model, one, router={"kind": "gate", "vectors": zeros})
    with mixture.record() as records:
        model.train()(**batch_for(model)).loss.backward()
    assert set(records) == set(one.modules)
    for path, record in records.items():
        assert torch.equal(record.gates, torch.full_like(record.gates, 0.5))
        gradient = mixture.built.sites[path].router.weight.grad
        assert gradient.shape == (1, model.get_submodule(path).in_features)
        assert gradient.abs().max() > 0
    assert mixture.num_parameters()["experts"] == 0


def test_one_step_is_that_of_adamw_by_hand(tmp_path: Path) -> None:
    experts = load_set(tmp_path, SET)
    model = tiny("llama")
    batch = batch_for(model)
    found = train_gate_vectors(
        model, experts, {"code": [batch]}, steps=1, learning_rate=0.25, warmup=0.0
    )
    # σ'(0) = 1/4: the gradient of v is Σ_t x_t · (∂loss/∂gate_t) / 4, by hooks on a plain model
    hand = tiny("llama").train()
    gates: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}
    for path, module in experts.adapters["code"].modules.items():

        def adapted(
            layer: Any, args: Any, out: Tensor, path: str = path, m: Any = module
        ) -> Tensor:
            inputs[path] = args[0].detach()
            gates[path] = torch.full(args[0].shape[:-1], 0.5, requires_grad=True)
            return out + gates[path][..., None] * m.scaling * (args[0] @ m.lora_A.T @ m.lora_B.T)

        hand.get_submodule(path).register_forward_hook(adapted)
    hand(**batch).loss.backward()
    assert set(found) == {"code"}
    for path in experts.adapters["code"].modules:
        gradient = torch.einsum("bsd,bs->d", inputs[path], gates[path].grad) / 4
        big = gradient.abs() > 1e-6
        expected = -0.25 * gradient.sign()  # the first step of Adam
        torch.testing.assert_close(found["code"][path][big], expected[big], rtol=1e-2, atol=1e-3)
        assert big.sum() > 8


def test_gates_are_learned_and_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    experts = load_set(tmp_path, SET)
    model = tiny("llama")
    model.model.layers[1].train()
    before, base = Snapshot.of(model), logits(model)
    modes = [module.training for module in model.modules()]
    examples = data(model)
    vectors = train_gate_vectors(model, experts, examples, steps=30, learning_rate=5e-2)
    before.assert_same(model)
    assert torch.equal(logits(model), base)
    assert [module.training for module in model.modules()] == modes
    for name, adapter in experts.adapters.items():
        assert set(vectors[name]) == set(adapter.modules)
        one = FrozenExperts({name: adapter}, ())
        losses = []
        for scale in (0.0, 1.0):
            given = {name: {path: scale * v for path, v in vectors[name].items()}}
            mixture = molora.compose(model, one, router={"kind": "gate", "vectors": given})
            with torch.no_grad():
                losses.append(sum(float(model(**batch).loss) for batch in examples[name]))
            mixture.detach()
        assert losses[1] < losses[0] - 0.05
    again = train_gate_vectors(
        model,
        experts,
        dict(reversed(examples.items())),
        steps=30,
        learning_rate=5e-2,
    )
    for name, by_path in vectors.items():
        assert all(torch.equal(again[name][path], v) for path, v in by_path.items())
    mixture = molora.compose(model, experts, router={"kind": "phatgoose", "vectors": vectors})
    assert (logits(model) - base).abs().max() > 1e-2
    mixture.detach()


@pytest.mark.parametrize("last_token", [True, False])
@pytest.mark.parametrize("with_expert", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_means_are_of_tokens_that_count(
    tmp_path: Path, last_token: bool, with_expert: bool, side: str
) -> None:
    experts = load_set(tmp_path, SET)
    model = tiny("llama")
    batches = [batch_for(model, (7, 4, 5), seed=n, side=side) for n in range(3)]
    found = mean_activations(
        model,
        experts,
        {"math": batches},
        samples=5,
        last_token=last_token,
        with_expert=with_expert,
    )
    seen: dict[str, list[Tensor]] = {}
    kept: list[Tensor] = []
    hand = tiny("llama")
    router = {"kind": "fixed", "weights": {"math": 1.0, "code": 0.0}}
    mixture = molora.compose(hand, experts, router=router, missing="zero")
    if not with_expert:
        mixture.detach()
    for path in experts.adapters["math"].modules:
        hand.get_submodule(path).register_forward_pre_hook(
            lambda layer, args, path=path: seen.setdefault(path, []).append(
                torch.cat([row[mask] for row, mask in zip(args[0], kept[-1], strict=True)])
            )
        )
    for batch, rows in zip(batches, (3, 2), strict=False):
        mask_BS = batch["attention_mask"][:rows].bool()
        if last_token:
            last_B = [int(row.nonzero().max()) for row in mask_BS]
            mask_BS = nn.functional.one_hot(torch.tensor(last_B), mask_BS.shape[1]).bool()
        kept.append(mask_BS)
        with torch.no_grad():
            hand(**{name: value[:rows] for name, value in batch.items()})
    assert set(found["math"]) == set(seen)
    for path, rows_of in seen.items():
        expected = torch.cat(rows_of).mean(dim=0)
        torch.testing.assert_close(found["math"][path], expected, rtol=1e-4, atol=1e-5)
        assert expected.abs().max() > 1e-2


def test_means_of_an_encoder_and_a_decoder_follow_their_own_masks(tmp_path: Path) -> None:
    experts = load_set(tmp_path, {"one": {"target_modules": ["q", "k", "wo"]}}, "t5")
    model = tiny("t5")
    batch = batch_for(model, (7, 4, 5))
    short = mean_activations(model, experts, {"one": [batch]}, last_token=False)
    longer = batch_for(model, (7, 4, 5), extra=3)
    padded = mean_activations(model, experts, {"one": [longer]}, last_token=False)
    for path, mean in short["one"].items():
        torch.testing.assert_close(padded["one"][path], mean, rtol=1e-3, atol=1e-4)
    assert any("decoder" in path for path in short["one"])


MISTAKES: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "a stranger": (lambda b: {"law": [b]}, {}, ConfigError, "unknown expert 'law'"),
    "no batch": (lambda b: {"math": []}, {}, DataError, "math has 0 batches for 100 steps"),
    "one generator": (
        lambda b: {"math": iter([b, b])},
        {"steps": 3},
        DataError,
        "math has 2 batches for 3 steps",
    ),
    "no labels": (
        lambda b: {"math": [{n: v for n, v in b.items() if n != "labels"}]},
        {},
        DataError,
        "math gives no loss",
    ),
    "no steps": (lambda b: {"math": [b]}, {"steps": 0}, ConfigError, "steps=0"),
    "no rate": (lambda b: {"math": [b]}, {"learning_rate": 0}, ConfigError, "learning_rate=0"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named_and_leave_the_model(tmp_path: Path, mistake: str) -> None:
    make, options, kind, message = MISTAKES[mistake]
    experts = load_set(tmp_path, SET)
    model = tiny("llama")
    before = Snapshot.of(model)
    with pytest.raises(kind, match=message):
        train_gate_vectors(model, experts, make(batch_for(model)), **options)
    before.assert_same(model)
    assert not model.training


def test_experts_of_stacked_weights_have_no_vectors(tmp_path: Path) -> None:
    path = "mlp.experts.down_proj"
    settings = {"one": {"target_modules": ["q_proj"], "target_parameters": [path]}}
    experts = load_set(tmp_path, settings, "mixtral")
    model = tiny("mixtral")
    for make in (train_gate_vectors, mean_activations):
        with pytest.raises(ConfigError, match=r"one adapts .*experts\.down_proj, stacked weights"):
            make(model, experts, {"one": [batch_for(model)]})


@pytest.mark.parametrize("kind", ["nothing", "padding", "packed"])
def test_means_of_nothing_are_refused(tmp_path: Path, kind: str) -> None:
    experts = load_set(tmp_path, SET)
    model = tiny("llama")
    batch = batch_for(model, labels=False)
    if kind == "padding":
        batch["attention_mask"].zero_()
    if kind == "packed":
        batch["segment_ids"] = batch["attention_mask"]
    with pytest.raises(DataError):
        mean_activations(model, experts, {"math": [batch] if kind != "nothing" else []})
    assert mean_activations(model, experts, {"math": [batch_for(model)]})["math"]
