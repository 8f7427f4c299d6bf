from __future__ import annotations

import math

import pytest
import torch
from report_samples import mola_loads

from molora.report import Curve, Layer, Utilisation
from molora.report.data import layer_of
from molora.routing.statistics import RoutingStatistics

Q = "model.layers.3.self_attn.q_proj"
OUT = "model.layers.3.self_attn.o_proj"
MLP = "model.layers.3.mlp"


@pytest.mark.parametrize(
    ("site", "layer"),
    [
        (Q, Layer("model.layers", 3)),
        ("model.layers.12", Layer("model.layers", 12)),
        ("transformer.h.0.attn.c_attn", Layer("transformer.h", 0)),
        ("decoder.block.1.layer.2.DenseReluDense", Layer("decoder.block", 1)),
        ("lm_head", Layer("lm_head", 0)),
    ],
)
def test_a_site_belongs_to_the_layer_of_its_first_number(site: str, layer: Layer) -> None:
    assert layer_of(site) == layer


def test_cells_are_load_over_uniform_load_averaged_over_sites() -> None:
    found = Utilisation({"t": {Q: (0.75, 0.25), OUT: (0.5, 0.5)}})
    assert found.average("t", Layer("model.layers", 3)) == (1.25, 0.75)
    assert found.peak("t", Layer("model.layers", 3)) == 1.5


def test_an_expert_is_averaged_over_the_sites_that_have_it() -> None:
    """Each site is compared with its own uniform load, whatever its number of experts."""
    found = Utilisation({"t": {Q: (0.5, 0.5), MLP: (0.25, 0.25, 0.0, 0.5)}})
    assert found.average("t", Layer("model.layers", 3)) == (1.0, 1.0, 0.0, 2.0)
    assert found.num_experts == 4


def test_collapse_on_a_different_expert_per_site_shows_in_the_peak_alone() -> None:
    found = Utilisation({"t": {Q: (1.0, 0.0), OUT: (0.0, 1.0)}})
    layer = Layer("model.layers", 3)
    assert found.average("t", layer) == (1.0, 1.0)
    assert found.peak("t", layer) == 2.0


def test_a_site_without_tokens_counts_nowhere() -> None:
    found = Utilisation({"t": {Q: (0.0, 0.0), OUT: (0.75, 0.25)}, "u": {Q: (0.0, 0.0)}})
    layer = Layer("model.layers", 3)
    assert found.average("t", layer) == (1.5, 0.5)
    assert found.average("u", layer) == ()
    assert found.peak("u", layer) is None


def test_layers_are_in_numerical_order_and_stacks_in_theirs() -> None:
    sites = [f"{stack}.block.{i}.wi" for stack in ("encoder", "decoder") for i in (10, 2, 0)]
    found = Utilisation({"t": dict.fromkeys(sites, (0.5, 0.5))})
    assert [(layer.stack, layer.index) for layer in found.layers] == [
        *(("encoder.block", i) for i in (0, 2, 10)),
        *(("decoder.block", i) for i in (0, 2, 10)),
    ]


def test_layers_of_a_triangle_have_different_numbers_of_experts() -> None:
    found = mola_loads(8)
    widths = [len(found.average("spam", layer)) for layer in found.layers]
    assert widths == [2, 2, 4, 4, 6, 6, 8, 8]


def test_loads_of_statistics_go_in_as_they_are() -> None:
    statistics = RoutingStatistics()
    statistics.add({Q: torch.tensor([3.0, 1.0, 2.5, 1.5, 4.0, 0.5, 0.5])})
    assert Utilisation.from_loads({"t": statistics.loads()}).loads == {"t": {Q: (0.75, 0.25)}}


def test_tasks_without_any_site_are_left_out() -> None:
    assert Utilisation.from_loads({"empty": {}, "t": {Q: [1.0]}}).tasks == ["t"]


@pytest.mark.parametrize("load", [-0.1, math.nan, math.inf])
def test_impossible_loads_are_refused(load: float) -> None:
    with pytest.raises(ValueError, match=f"loads of site '{Q}' on task 't'"):
        Utilisation({"t": {Q: (0.5, load)}})


def test_loads_of_different_mixtures_are_refused() -> None:
    with pytest.raises(ValueError, match="has 3 experts on task 'u' and 2 on another"):
        Utilisation({"t": {Q: (0.5, 0.5)}, "u": {Q: (0.5, 0.25, 0.25)}})


def test_a_curve_has_a_value_per_step() -> None:
    with pytest.raises(ValueError, match="'loss' has 2 steps and 1 values"):
        Curve("loss", (1, 2), (0.5,))
