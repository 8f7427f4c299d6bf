"""The weighted sum: scopes, reductions, masks and coefficients against sums made by hand."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import pytest
import torch
from routing_records import collapsed_logits, dense_record, top_k_record
from torch import Tensor

from molora.losses import WeightedTerm, terms, total
from molora.routing import Routing

# three sites in two layers; the last was called twice and has experts of another number
LAYERS = {"0.q": "0", "0.up": "0", "1.q": "1"}


def constant(rows: int, value: float, num_experts: int = 2, mask: Tensor | None = None) -> Routing:
    """A record whose logits are all `value`."""
    return dense_record(torch.full((rows, num_experts), value), mask=mask)


RECORDS = {
    "0.q": [constant(2, 1.0, mask=torch.tensor([True, True]))],
    "0.up": [constant(4, 4.0, mask=torch.tensor([True, True, False, False]))],
    "1.q": [constant(1, 10.0, num_experts=3), constant(3, 20.0, num_experts=3)],
}


def mean_logit(record: Routing, side: Mapping[str, Tensor]) -> Tensor:
    """A term that tells which rows it was given: their mean logit."""
    valid_T = record.valid_rows()
    return (record.logits.mean(dim=-1) * valid_T).sum() / valid_T.sum()


def weighted(term=mean_logit, name: str = "term", **settings: object) -> WeightedTerm:
    defaults = {"coefficient": 1.0, "scope": "site", "reduction": "mean", "mask": "valid"}
    return WeightedTerm(name=name, term=term, **{**defaults, **settings})


# pools: site 1, 4, (10 + 3·20)/4 = 17.5; layer "0" (2·1 + 2·4)/4 = 2.5; a model has one per width
@pytest.mark.parametrize(
    ("scope", "mask", "pools"),
    [
        ("site", "valid", [1.0, 4.0, 17.5]),
        ("layer", "valid", [2.5, 17.5]),
        ("model", "valid", [2.5, 17.5]),
        ("layer", "all", [3.0, 17.5]),
        ("site", "all", [1.0, 4.0, 17.5]),
    ],
)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_total_is_the_coefficient_times_the_reduced_pools(scope, mask, pools, reduction):
    loss = weighted(scope=scope, mask=mask, reduction=reduction, coefficient=0.5)
    aux = total(RECORDS, [loss], layer_of=LAYERS, side={})
    reduced = sum(pools) / (len(pools) if reduction == "mean" else 1)
    assert aux.weighted.item() == pytest.approx(0.5 * reduced)
    assert {name: value.item() for name, value in aux.raw.items()} == {
        "term": pytest.approx(reduced)
    }


def test_the_term_of_each_sites_pool_is_told():
    three = [
        weighted(name="a", coefficient=2.0, reduction="sum"),
        weighted(name="b", coefficient=3.0, scope="layer"),
        weighted(name="c", coefficient=3.0),
    ]
    aux = total({**RECORDS, "2.q": []}, three, layer_of=LAYERS, side={})
    assert aux.sites == ("0.q", "0.up", "1.q")
    assert {name: values.tolist() for name, values in aux.per_site.items()} == {
        "a": [1.0, 4.0, 17.5],
        "b": [2.5, 2.5, 17.5],
        "c": [1.0, 4.0, 17.5],
    }
    assert aux.factors == {"a": 2.0, "b": 1.5, "c": 1.0}
    assert not any(values.requires_grad for values in aux.per_site.values())


def test_a_layer_pools_its_own_sites_only():
    same_width = {**RECORDS, "1.q": [constant(4, 7.0)]}
    for scope, pools in {"layer": [2.5, 7.0], "model": [(2 + 8 + 28) / 8]}.items():
        aux = total(same_width, [weighted(scope=scope)], layer_of=LAYERS, side={})
        assert aux.weighted.item() == pytest.approx(sum(pools) / len(pools)), scope


def test_losses_add_up_and_keep_their_names():
    two = [weighted(name="a", coefficient=2.0), weighted(name="b", coefficient=-1.0, scope="layer")]
    aux = total(RECORDS, two, layer_of=LAYERS, side={})
    assert aux.weighted.item() == pytest.approx(2 * 7.5 - 10.0)
    assert {name: value.item() for name, value in aux.raw.items()} == {"a": 7.5, "b": 10.0}


def test_terms_get_the_columns_of_the_batch():
    def of_column(record: Routing, side: Mapping[str, Tensor]) -> Tensor:
        return side["task_types"].float().mean()

    side = {"task_types": torch.tensor([1, 0])}
    aux = total(RECORDS, [weighted(of_column)], layer_of=LAYERS, side=side)
    assert aux.weighted.item() == 0.5


def test_gradient_is_scaled_by_coefficient_and_pools_and_raw_values_are_detached():
    logits = {site: torch.randn(4, 3, requires_grad=True) for site in LAYERS}
    records = {site: [dense_record(value)] for site, value in logits.items()}
    term = partial(lambda term, record, side: term(record), terms.router_z)
    aux = total(records, [weighted(term, coefficient=0.3)], layer_of=LAYERS, side={})
    aux.weighted.backward()
    assert not any(value.requires_grad for value in aux.raw.values())
    for value in logits.values():
        alone = value.detach().requires_grad_()
        terms.router_z(dense_record(alone)).backward()
        torch.testing.assert_close(value.grad, 0.3 / 3 * alone.grad)


def test_without_records_or_losses_the_total_is_0():
    for records, losses in (({}, [weighted()]), (RECORDS, [])):
        aux = total(records, losses, layer_of=LAYERS, side={})
        assert aux.weighted.item() == 0
        assert aux.raw == {}


def test_collapse_of_every_layer_on_another_expert_is_hidden_only_by_pooling():
    layers = [f"layer.{expert}" for expert in range(4)]
    records = {
        site: [top_k_record(collapsed_logits(5, 4, expert=expert), 1)]
        for expert, site in enumerate(layers)
    }
    term = partial(
        lambda term, record, side: term(record), partial(terms.load_balance, form="normalized")
    )
    for scope, value in {"site": 4.0, "layer": 4.0, "model": 1.0}.items():
        loss = weighted(term, scope=scope)
        aux = total(records, [loss], layer_of={site: site for site in layers}, side={})
        assert aux.weighted.item() == pytest.approx(value, rel=1e-6), scope
