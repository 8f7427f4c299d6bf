"""Padding changes nothing: not losses, not gradients, not records (B-5); and whose mask a row
follows."""

import inspect
from typing import Any

import pytest
import torch
from tiny_models import batch_for, randomize, tiny
from torch import Tensor, nn
from transformers.modeling_outputs import ModelOutput

import molora
from molora.config import (
    Importance,
    LoadBalance,
    Loss,
    MixtureConfig,
    RouterZ,
    RoutingEntropy,
)

TERMS = (LoadBalance(), LoadBalance(form="slots"), RouterZ(), Importance(), RoutingEntropy())
LOSSES = tuple(Loss(term=term, coefficient=0.5) for term in TERMS)
LINEAR = molora.presets.mola(num_experts=3, rank=5, dropout=0.0, losses=LOSSES)
FFN = molora.presets.mixlora(num_experts=3, rank=5, dropout=0.0, losses=LOSSES)
SWITCH = molora.presets.mixlora(
    num_experts=3, rank=5, dropout=0.0, variant="switch", capacity=2, losses=LOSSES
)


def scoped(scope: str) -> MixtureConfig:
    group = {"num_experts": 3, "rank": 5, "site": {"kind": "linear", "scope": scope}}
    return MixtureConfig.parse({"groups": [group], "losses": LOSSES})


def adapted(family: str, config: MixtureConfig) -> tuple[nn.Module, molora.Mixture]:
    """A float64 model in training mode, jitter off."""
    model = tiny(family).double()
    mixture = molora.attach(model, config)
    randomize(mixture)
    for site in mixture.built.sites.values():
        site.router.jitter = 0.0
    return model.train(), mixture


def with_positions(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Positions counted from the first token that is not padding, where the model takes them."""
    positions = (batch["attention_mask"].cumsum(dim=1) - 1).clamp_min(0)
    takes = "position_ids" in inspect.signature(type(model).forward).parameters
    return batch | {"position_ids": positions} if takes else batch


def measured(
    model: nn.Module, mixture: molora.Mixture, batch: dict[str, Any]
) -> tuple[ModelOutput, dict[str, Tensor], dict[str, Tensor]]:
    """Output, loads by site and gradients by parameter of one training forward."""
    model.zero_grad()
    with mixture.statistics() as statistics:
        out = model(**batch)
    (out.loss if out.loss.isfinite() else out.aux_loss).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return out, statistics.loads(), gradients


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        # losses and gradients of parameters are float32
        difference = (value - right[name]).abs().max()
        assert difference <= 1e-5 * value.abs().max(), f"{name} differs by {difference}"


CASES = {
    "llama-linear": ("llama", LINEAR),
    "llama-block": ("llama", scoped("block")),
    "llama-layer": ("llama", scoped("layer")),
    "llama-ffn": ("llama", FFN),
    "llama-capacity": ("llama", SWITCH),
    "gpt2-linear": ("gpt2", LINEAR),
    "gemma3-linear": ("gemma3", LINEAR),
    "bert-linear": ("bert", LINEAR),
    "t5-linear": ("t5", LINEAR),
    "t5-ffn": ("t5", FFN),
}


@pytest.mark.parametrize(
    ("family", "config", "side"),
    [
        pytest.param(*case, side, id=f"{name}-{side}")
        for name, case in CASES.items()
        for side in ("left", "right")
        # BERT classifies the first position, and T5's decoder starts there
        if side == "right" or case[0] not in ("bert", "t5")
    ],
)
def test_more_padding_changes_neither_losses_nor_loads_nor_gradients(
    family: str, config: MixtureConfig, side: str
) -> None:
    model, mixture = adapted(family, config)
    tight = with_positions(model, batch_for(model, side=side))
    wide = with_positions(model, batch_for(model, side=side, extra=3))
    assert wide["input_ids"].shape[1] == tight["input_ids"].shape[1] + 3
    out, loads, gradients = measured(model, mixture, tight)
    wide_out, wide_loads, wide_gradients = measured(model, mixture, wide)

    torch.testing.assert_close(wide_out.aux_loss, out.aux_loss)
    torch.testing.assert_close(wide_out.loss, out.loss)
    assert_equal(wide_loads, loads)
    assert_equal(wide_gradients, gradients)
    assert all((load > 0).sum() > 1 for load in loads.values())

    # the negative control: the same tokens, of which the mixture does not know which are padding
    blind = {n: v for n, v in wide.items() if n != "attention_mask"}
    blind_out, blind_loads, _ = measured(model, mixture, blind)
    assert (blind_out.aux_loss - out.aux_loss).abs() > 1e-3
    assert any((blind_loads[site] - loads[site]).abs().max() > 1e-3 for site in loads)


@pytest.mark.parametrize("config", [LINEAR, FFN, scoped("layer"), SWITCH])
def test_a_row_of_nothing_but_padding_counts_for_nothing(config: MixtureConfig) -> None:
    model, mixture = adapted("llama", config)
    batch = batch_for(model)
    out, loads, gradients = measured(model, mixture, batch)
    padded = {
        name: torch.cat([value, torch.full_like(value[:1], -100 if name == "labels" else 0)])
        for name, value in batch.items()
    }
    padded_out, padded_loads, padded_gradients = measured(model, mixture, padded)
    torch.testing.assert_close(padded_out.loss, out.loss)
    assert_equal(padded_loads, loads)
    assert_equal(padded_gradients, gradients)


@pytest.mark.parametrize("config", [LINEAR, FFN, SWITCH])
def test_a_batch_of_nothing_but_padding_has_a_finite_loss_in_the_graph(
    config: MixtureConfig,
) -> None:
    model, mixture = adapted("llama", config)
    batch = {name: torch.zeros_like(value) for name, value in batch_for(model).items()}
    batch["labels"] = batch["labels"] - 100
    out = model(**batch, num_items_in_batch=10)
    assert out.aux_loss == 0
    assert out.loss == 0
    out.loss.backward()
    gradients = [p.grad for ps in mixture.trainable_parameters().values() for p in ps]
    assert all(g is not None and bool(g.isfinite().all()) for g in gradients)
    assert model(**batch_for(model)).aux_loss > 0


def test_each_stream_of_an_encoder_decoder_has_its_own_mask() -> None:
    """Keys and values of cross-attention follow the encoder, all else in the decoder the
    decoder."""
    model, mixture = adapted("t5", LINEAR)
    batch = batch_for(model)
    expected = {
        "encoder": batch["attention_mask"].bool().flatten(),
        "decoder": (batch["labels"] != -100).flatten(),
    }
    for arguments in (
        batch,  # without a decoder mask, the positions with a label count
        batch
        | {"decoder_attention_mask": (batch["labels"] != -100).long()}
        | {"labels": batch["labels"].clamp_min(3)},
    ):
        with mixture.record() as records:
            model(**arguments)
        assert len(records) == 32
        for site, record in records.items():
            reads_encoder = site.startswith("encoder") or site.endswith(
                ("EncDecAttention.k", "EncDecAttention.v")
            )
            assert torch.equal(record.mask, expected["encoder" if reads_encoder else "decoder"])


@pytest.mark.parametrize("scope", ["block", "layer"])
def test_cross_attention_shares_the_decoders_decision_except_keys_and_values(scope: str) -> None:
    site = {"kind": "linear", "scope": scope}
    refused = {"targets": "attention", "num_experts": 3, "rank": 5, "site": site}
    with pytest.raises(
        molora.AttachError, match=r"EncDecAttention\.k reads the encoder's output.*scope='linear'"
    ):
        molora.attach(tiny("t5"), MixtureConfig.parse({"groups": [refused]}))

    memory = ["EncDecAttention.k", "EncDecAttention.v"]
    others = [f"SelfAttention.{n}" for n in "qkvo"] + ["EncDecAttention.q", "EncDecAttention.o"]
    groups = [refused | {"targets": others}, {"targets": memory, "num_experts": 3, "rank": 5}]
    model, mixture = adapted("t5", MixtureConfig.parse({"groups": groups, "losses": LOSSES}))
    with mixture.record() as records:
        model(**batch_for(model)).loss.backward()
    # per layer of the encoder one site, of the decoder one or two, and its keys and values
    assert len(records) == 2 * (1 + (2 if scope == "block" else 1) + 2)
    assert all(s.router.weight.grad.abs().max() > 0 for s in mixture.built.sites.values())


MASK_4D = torch.zeros(3, 1, 7, 7, dtype=torch.float64)
UNREADABLE = [
    pytest.param("llama", MASK_4D, "a 4-D tensor", id="4d"),
    pytest.param(
        "gemma3", {"full_attention": MASK_4D, "sliding_attention": MASK_4D}, "a dict", id="dict"
    ),
]


@pytest.mark.parametrize(("family", "mask", "what"), UNREADABLE)
def test_a_mask_that_cannot_be_read_is_an_error_only_when_it_is_needed(
    family: str, mask: Any, what: str
) -> None:
    model, mixture = adapted(family, LINEAR)
    batch = batch_for(model) | {"attention_mask": mask}
    with pytest.raises(molora.AttachError, match=f"attention_mask is {what}.*ones and zeros"):
        model(**batch)
    model.eval()
    with (
        pytest.raises(molora.AttachError, match=f"attention_mask is {what}"),
        mixture.record(),
    ):
        model(**batch)
    assert model(**batch).logits.isfinite().all()

    mixture.detach()
    mixture = molora.attach(model, LINEAR.model_copy(update={"losses": ()}))
    randomize(mixture)
    model.train()
    model(**batch).loss.backward()


def test_without_padding_no_mask_is_needed() -> None:
    model, mixture = adapted("llama", LINEAR)
    batch = batch_for(model, (6, 6, 6))
    with_mask = measured(model, mixture, batch)
    without = measured(model, mixture, {n: v for n, v in batch.items() if n != "attention_mask"})
    assert with_mask[0].aux_loss == without[0].aux_loss
    assert_equal(with_mask[1], without[1])
