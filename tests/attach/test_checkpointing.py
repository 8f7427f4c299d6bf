"""Activation checkpointing changes nothing: the same gradients, losses and records (B-8, B-9,
B-10)."""

from typing import Any

import pytest
import torch
from tiny_models import batch_for, randomize, tiny
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

import molora
from molora.attach import checkpointing
from molora.config import LoadBalance, Loss, MixtureConfig, RouterZ

LOSSES = (Loss(term=LoadBalance(), coefficient=1.0), Loss(term=RouterZ(), coefficient=0.1))
EXPERTS = {"num_experts": 3, "rank": 5}
LINEAR = molora.presets.mola(**EXPERTS, dropout=0.0, losses=LOSSES)
FFN = molora.presets.mixlora(**EXPERTS, dropout=0.0, losses=LOSSES)
SWITCH = molora.presets.mixlora(**EXPERTS, dropout=0.0, variant="switch", capacity=2, losses=LOSSES)
OURS = {"use_reentrant": False, "context_fn": molora.checkpoint_context}
PLAIN = {"use_reentrant": False}


def scoped(scope: str, **group: Any) -> MixtureConfig:
    group = {**EXPERTS, "site": {"kind": "linear", "scope": scope}, **group}
    return MixtureConfig.parse({"groups": [group], "losses": LOSSES})


LAYER = scoped("layer")
NOISY = scoped(
    "linear",
    router={"noise_std": 1.0, "jitter": 0.1},
    expert={"kind": "lora", "dropout": {"p": 0.2}},
)
CASES = [
    pytest.param("llama", LINEAR, OURS, id="llama-linear"),
    pytest.param("llama", LINEAR, PLAIN, id="llama-linear-without_context"),
    pytest.param("llama", scoped("block"), PLAIN, id="llama-block-without_context"),
    pytest.param("llama", LAYER, OURS, id="llama-layer"),
    pytest.param("llama", FFN, OURS, id="llama-ffn"),
    pytest.param("llama", SWITCH, OURS, id="llama-capacity"),
    pytest.param("llama", NOISY, OURS, id="llama-noise_and_dropout"),
    pytest.param("gpt2", LAYER, OURS, id="gpt2-layer"),
    pytest.param("t5", FFN, OURS, id="t5-ffn"),
    pytest.param("mixtral", LINEAR, OURS, id="mixtral-linear"),
    *(
        pytest.param(
            "llama",
            config.model_copy(update={"backend": backend}),
            OURS,
            id=f"llama-{site}-{backend}",
        )
        for site, config in {"linear": LINEAR, "block": scoped("block"), "ffn": FFN}.items()
        for backend in ("reference", "dense", "grouped", "gather")
    ),
]


def adapted(family: str, config: MixtureConfig) -> tuple[nn.Module, molora.Mixture]:
    model = tiny(family)
    if family != "mixtral":  # its fused experts have no float64
        model = model.double()
    mixture = molora.attach(model, config)
    randomize(mixture)
    return model.train(), mixture


def step(
    model: nn.Module, mixture: molora.Mixture, *batches: dict[str, Tensor]
) -> tuple[list[Tensor], dict[str, Tensor], dict[str, int]]:
    """Aux losses, gradients and number of records: a forward per batch, then one backward."""
    torch.manual_seed(5)  # the same noise and dropout every time
    model.zero_grad()
    with mixture.record() as records:
        outs = [model(**batch) for batch in batches]
        torch.stack([out.loss for out in outs]).sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    counts = {site: len(r) if isinstance(r, list) else 1 for site, r in records.items()}
    aux = [out.molora_aux_loss if hasattr(out, "molora_aux_loss") else out.aux_loss for out in outs]
    return aux, gradients, counts


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert value.isfinite().all(), name
        # gradients of trainables are float32
        assert (value - right[name]).abs().max() <= 1e-5 * value.abs().max(), name


@pytest.mark.parametrize(("family", "config", "settings"), CASES)
def test_same_losses_gradients_and_records_with_two_forwards_before_one_backward(
    family: str, config: MixtureConfig, settings: dict[str, Any]
) -> None:
    model, mixture = adapted(family, config)
    # padding comes first, so that a capacity that counted it would be used up
    side = "right" if family == "t5" else "left"
    batches = batch_for(model, side=side), batch_for(model, (3, 6), seed=1, side=side)
    aux, gradients, counts = step(model, mixture, *batches)
    calls = _count_calls(model)
    model.gradient_checkpointing_enable(settings)
    again = step(model, mixture, *batches)

    torch.testing.assert_close(again[0], aux)
    assert_equal(again[1], gradients)
    assert again[2] == counts == dict.fromkeys(mixture.built.sites, 2)
    assert calls[0] == 2 * len(batches)  # the layers did run a second time
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert gradients.keys() == trainable
    other = step(model, mixture, batches[0])[1]
    router = next(name for name in gradients if name.endswith("router.weight"))
    assert (other[router] - gradients[router]).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        pytest.param(LINEAR, {"use_reentrant": True}, "is re-entrant", id="reentrant"),
        pytest.param(LAYER, PLAIN, "read masks or shared decisions", id="layer"),
        pytest.param(SWITCH, PLAIN, "read masks or shared decisions", id="capacity"),
    ],
)
def test_a_mode_that_trains_wrong_is_refused_in_training_alone(
    config: MixtureConfig, settings: dict[str, Any], message: str
) -> None:
    model, _ = adapted("llama", config)
    model.gradient_checkpointing_enable(settings)
    with pytest.raises(
        molora.AttachError, match=rf"{message}.*\"context_fn\": molora\.checkpoint_context"
    ):
        model(**batch_for(model))
    model.eval()
    assert model(**batch_for(model)).logits.isfinite().all()


def test_a_recomputation_without_its_forwards_masks_would_be_wrong(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The negative control: what the refusals above guard against."""
    monkeypatch.setattr(checkpointing, "check_checkpointing", lambda model, needs_context: None)
    model, mixture = adapted("llama", SWITCH)
    # padding comes first, so that counting it uses up the places
    batch = batch_for(model, (7, 2, 3), side="left")
    _, gradients, _ = step(model, mixture, batch)
    model.gradient_checkpointing_enable(PLAIN)
    _, wrong, _ = step(model, mixture, batch)
    assert any((wrong[n] - g).abs().max() > 1e-4 * g.abs().max() for n, g in gradients.items())

    model, mixture = adapted("llama", LAYER)
    model.gradient_checkpointing_enable(PLAIN)
    with pytest.raises((molora.AttachError, CheckpointError), match="called outside of it"):
        step(model, mixture, batch)


def test_ties_and_noise_recompute_the_same_experts() -> None:
    """With all logits equal, the noise alone decides; it must be the same the second time."""
    model, mixture = adapted("llama", NOISY)
    for site in mixture.built.sites.values():
        nn.init.zeros_(site.router.weight)
    batch = batch_for(model)
    _, gradients, _ = step(model, mixture, batch)
    model.gradient_checkpointing_enable(OURS)
    _, again, _ = step(model, mixture, batch)
    assert_equal(again, gradients)
    # without noise there are real ties
    for site in mixture.built.sites.values():
        site.router.noise_std = 0.0
    _, tied, _ = step(model, mixture, batch)
    assert all(gradient.isfinite().all() for gradient in tied.values())


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(LINEAR, id="linear"),
        pytest.param(LAYER, id="layer"),
        pytest.param(FFN, id="ffn"),
    ],
)
def test_training_and_evaluation_have_the_same_forward(config: MixtureConfig) -> None:
    """Dropout, noise and jitter at 0; capacity acts in training only and is exempt (B-8)."""
    model, mixture = adapted("llama", config)
    batch = batch_for(model)
    training = model(**batch).logits
    model.gradient_checkpointing_enable(OURS)
    checkpointed = model(**batch).logits
    model.eval()
    evaluation = model(**batch).logits
    assert torch.equal(training, evaluation)
    assert torch.equal(checkpointed, evaluation)
    with mixture.disabled():
        assert (model(**batch).logits - evaluation).abs().max() > 1e-2


def test_noise_jitter_and_dropout_act_in_training_only() -> None:
    model, _ = adapted("llama", NOISY)
    batch = batch_for(model)
    assert not torch.equal(model(**batch).logits, model(**batch).logits)
    model.eval()
    assert torch.equal(model(**batch).logits, model(**batch).logits)


def test_capacity_acts_in_training_only() -> None:
    model, mixture = adapted("llama", SWITCH)
    with mixture.record() as training:
        model(**batch_for(model))
    model.eval()
    with mixture.record() as evaluation:
        model(**batch_for(model))
    assert all((record.gates == 0).any() for record in training.values())
    assert all((record.gates > 0).all() for record in evaluation.values())
    assert all(record.selected.all() for record in training.values())


def _count_calls(model: nn.Module) -> list[int]:
    """How often the first layer's norm runs."""
    calls = [0]
    layer = next(m[0] for m in model.modules() if isinstance(m, nn.ModuleList))
    norm = next(m for name, m in layer.named_modules() if "norm" in name or "ln" in name)

    def count(*arguments: object) -> None:
        calls[0] += 1

    norm.register_forward_hook(count)
    return calls
