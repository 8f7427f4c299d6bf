"""Packing changes nothing: sequences that share a row give the logits, losses, gradients and loads
that they give in rows of their own (B-29)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from packed_batches import LENGTHS, WIDTH, by_positions, order_of_packed, ordinary, packed
from tiny_models import CAUSAL, batch_for, randomize, sequences, tiny
from torch import Tensor, nn
from transformers.modeling_outputs import ModelOutput

import molora
from molora.attach import packing
from molora.config import (
    Importance,
    LoadBalance,
    LocalizedBalance,
    Loss,
    MixtureConfig,
    RouterZ,
    RoutingEntropy,
)
from molora.modules import SideInputs

SMOOTH = tuple(
    Loss(term=term, coefficient=0.5)
    for term in (LoadBalance(form="switch"), RouterZ(), Importance(), RoutingEntropy())
)
LOSSES = (*SMOOTH, Loss(term=LoadBalance(), coefficient=0.5, scope="layer"))
LOCALIZED = (Loss(term=LocalizedBalance(), coefficient=0.5), *SMOOTH)
COMMON: dict[str, Any] = {"rank": 5, "dropout": 0.0, "losses": LOSSES}
SDPA_IN_FLOAT64 = ("llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3", "gpt2")
THREE = {**COMMON, "num_experts": 3}
LINEAR = molora.presets.mola(**THREE)


def scoped(scope: str) -> MixtureConfig:
    group = {"num_experts": 3, "rank": 5, "site": {"kind": "linear", "scope": scope}}
    return MixtureConfig.parse({"groups": [group], "losses": LOSSES})


PRESETS = {
    "lora": molora.presets.lora(rank=5, dropout=0.0),
    "molora": molora.presets.molora(**{**THREE, "losses": SMOOTH}),
    "mola": LINEAR,
    "mola-triangle": molora.presets.mola(**COMMON),
    "loramoe": molora.presets.loramoe(**{**COMMON, "num_experts": 4, "losses": LOCALIZED}),
    "mixlora": molora.presets.mixlora(**THREE),
    "mixlora-top_p": molora.presets.mixlora(**THREE, variant="top_p"),
    "mixlora-switch": molora.presets.mixlora(**THREE, variant="switch", capacity=2),
    "block": scoped("block"),
    "layer": scoped("layer"),
}


def adapted(family: str, config: MixtureConfig, **overrides: Any) -> tuple[Any, molora.Mixture]:
    """A float64 model in training mode, jitter off."""
    model = tiny(family, **overrides)
    if family not in ("mixtral", "qwen3_moe"):  # their fused experts have no float64
        model = model.double()
    mixture = molora.attach(model, config)
    randomize(mixture)
    for site in mixture.built.sites.values():
        site.router.jitter = 0.0
    return model.train(), mixture


def measured(
    model: nn.Module, mixture: molora.Mixture, batch: dict[str, Any]
) -> tuple[ModelOutput, dict[str, Tensor], dict[str, Tensor]]:
    """Output, loads by site and gradients by parameter of one training forward."""
    model.zero_grad()
    with mixture.statistics() as statistics:
        out = model(**batch)
    out.loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return out, statistics.loads(), gradients


def distance(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Greatest difference of any tensor, relative to its greatest entry."""
    assert left.keys() == right.keys()
    return max(
        (
            float((value - right[name]).abs().max() / value.abs().max().clamp_min(1e-30))
            for name, value in left.items()
        ),
        default=0.0,
    )


# ---------------------------------------------------------------------- logits


@pytest.mark.parametrize(
    ("family", "attention"),
    # transformers has no sdpa for Gemma 2
    [(f, a) for f in CAUSAL for a in ("sdpa", "eager") if (f, a) != ("gemma2", "sdpa")],
)
def test_a_packed_sequence_has_the_logits_that_it_has_alone(family: str, attention: str) -> None:
    model, mixture = adapted(family, LINEAR, attn_implementation=attention)
    assert packing.refusal(model) == ""
    model.eval()
    # eager attention has its softmax in float32
    close = 1e-10 if attention == "sdpa" and family in SDPA_IN_FLOAT64 else 1e-4
    alone = [model(input_ids=row[None]).logits[0] for row in sequences(LENGTHS)]
    expected = torch.cat([alone[n] for n in order_of_packed()])

    for side in ("right", "left"):
        batch = packed(side)
        out = model(input_ids=batch["input_ids"], segment_ids=batch["segment_ids"])
        logits = out.logits[batch["segment_ids"] != 0]
        assert (logits - expected).abs().max() < close
        assert out.past_key_values is None
        # what the collator gives says the same, and so does any number that is not the neighbours'
        falling = torch.where(batch["segment_ids"] == 0, 0, 9 - batch["segment_ids"])
        assert torch.equal(
            model(input_ids=batch["input_ids"], segment_ids=falling).logits, out.logits
        )
        whole = {n: v for n, v in batch.items() if n not in ("labels", "task_types")}
        assert torch.equal(model(**whole).logits, out.logits)
    with mixture.disabled():
        plain = model(**whole).logits[batch["segment_ids"] != 0]
        base = [model(input_ids=row[None]).logits[0] for row in sequences(LENGTHS)]
    assert (plain - torch.cat([base[n] for n in order_of_packed()])).abs().max() < close

    # negative controls: the row as one sequence, and what the base does by itself, with a cache
    joined = model(input_ids=batch["input_ids"]).logits[batch["segment_ids"] != 0]
    assert (joined - expected).abs().max() > 1e-2
    cached = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"])
    assert (cached.logits[batch["segment_ids"] != 0] - expected).abs().max() > 1e-2
    assert (plain - expected).abs().max() > 1e-2


# ---------------------------------------------------------------------- losses, gradients, loads


@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_packed_batch_has_the_losses_gradients_and_loads_of_an_ordinary_one(
    preset: str, checkpointed: bool
) -> None:
    model, mixture = adapted("llama", PRESETS[preset])
    if checkpointed:
        model.gradient_checkpointing_enable(
            {"use_reentrant": False, "context_fn": molora.checkpoint_context}
        )
    out, loads, gradients = measured(model, mixture, ordinary())
    for batch in (packed(), packed("left"), by_positions()):
        packed_out, packed_loads, packed_gradients = measured(model, mixture, batch)
        torch.testing.assert_close(packed_out.loss, out.loss)
        if out.aux_loss is not None:
            torch.testing.assert_close(packed_out.aux_loss, out.aux_loss)
        assert distance(packed_loads, loads) == 0
        assert distance(packed_gradients, gradients) < 1e-5

    # negative control: each row one sequence, by an attention mask
    batch = packed()
    blind = {n: v for n, v in batch.items() if n not in ("segment_ids", "position_ids")}
    blind["attention_mask"] = (batch["segment_ids"] != 0).long()
    if preset == "loramoe":
        blind["task_types"] = torch.tensor([0, 1, 1])
    blind_out, blind_loads, blind_gradients = measured(model, mixture, blind)
    assert (blind_out.loss - out.loss).abs() > 1e-3
    assert distance(blind_gradients, gradients) > 1e-2
    if loads and preset != "molora" and preset != "loramoe":  # whose experts all act on every row
        assert distance(blind_loads, loads) > 1e-3


def test_capacity_is_counted_by_sequence_and_not_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = adapted("llama", PRESETS["mixlora-switch"])
    expected = model(**ordinary()).loss
    torch.testing.assert_close(model(**packed()).loss, expected)

    def starts_of_rows(side: Any, stream: str, grid: tuple[int, ...], device: Any) -> Tensor:
        return (torch.arange(grid[1]) == 0).repeat(grid[0])

    monkeypatch.setattr(SideInputs, "starts", starts_of_rows)
    torch.testing.assert_close(model(**ordinary()).loss, expected)
    assert (model(**packed()).loss - expected).abs() > 1e-3


def test_a_task_type_is_that_of_its_sequence() -> None:
    model, _ = adapted("llama", PRESETS["loramoe"])
    batch = packed()
    expected = model(**batch).aux_loss
    types = batch["task_types"]
    assert types.tolist() == [n % 2 for n in order_of_packed()] != [0, 1, 0, 1, 0, 1]
    other = model(**{**batch, "task_types": types.flip(0)}).aux_loss
    assert (other - expected).abs() > 1e-4


def test_records_of_packed_rows_are_those_of_ordinary_rows() -> None:
    model, mixture = adapted("llama", LINEAR)
    model.eval()
    with mixture.record() as one:
        model(**ordinary())
    with mixture.record() as other:
        model(**packed())
    batch, whole = packed(), ordinary()
    order = torch.tensor(order_of_packed())
    in_order = torch.cat([whole["attention_mask"][n].nonzero()[:, 0] + n * 12 for n in order])
    for site, record in other.items():
        assert record.grid == (3, WIDTH)
        assert torch.equal(record.mask, batch["segment_ids"].flatten() != 0)
        lengths = torch.tensor(LENGTHS)[order]
        numbers = torch.arange(1, len(LENGTHS) + 1).repeat_interleave(lengths)
        assert torch.equal(record.segment_ids[record.mask], numbers)
        assert record.segment_ids[~record.mask].abs().max() == 0
        assert torch.equal(record.expert_index[record.mask], one[site].expert_index[in_order])
        torch.testing.assert_close(record.gates[record.mask], one[site].gates[in_order])
    assert {tuple(r.expert_index[r.mask].flatten().tolist()) for r in other.values()}


# ---------------------------------------------------------------------- positions alone


def test_positions_alone_separate_sequences_wherever_a_loss_is_made() -> None:
    model, mixture = adapted("llama", LINEAR)
    batch = by_positions()
    expected = model(**ordinary()).loss
    for training in (True, False):
        model.train(training)
        expected = model(**ordinary()).loss
        torch.testing.assert_close(model(**batch).loss, expected)
    # of several rows, in which no padding is known
    twice = {n: v.expand(2, -1) if v.dim() == 2 else v for n, v in batch.items()}
    twice["position_ids"] = batch["position_ids"]
    with mixture.record() as records:
        torch.testing.assert_close(model(**twice).loss, expected)
    for record in records.values():
        assert record.mask is None
        assert record.segment_ids.max() == 2 * len(LENGTHS)
    # without a loss the base's own default stands: a cache, and one sequence
    without = {n: v for n, v in batch.items() if n != "labels"}
    with mixture.record() as records:
        assert model(**without).past_key_values is not None
    assert all(record.segment_ids is None for record in records.values())
    with mixture.record() as records:
        model(**without, use_cache=False)
    assert all(record.segment_ids.max() == len(LENGTHS) for record in records.values())


def test_ordinary_positions_are_one_sequence_per_row() -> None:
    model, mixture = adapted("llama", PRESETS["mixlora-switch"])
    batch = batch_for(model, (6, 6, 6))
    del batch["attention_mask"]
    plain = measured(model, mixture, batch)
    positions = torch.arange(6).expand(3, -1)
    with mixture.record() as records:
        given = measured(model, mixture, batch | {"position_ids": positions})
    assert given[0].loss == plain[0].loss
    assert distance(given[2], plain[2]) == 0
    rows_of = torch.arange(1, 4).repeat_interleave(6)
    assert all(torch.equal(record.segment_ids, rows_of) for record in records.values())
