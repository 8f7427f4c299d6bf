"""Counts over layers: uniform, by list, by named shape, for any number of layers."""

from __future__ import annotations

import pytest
from pydantic import TypeAdapter

from molora.config import SHAPES, Allocation, PerLayer, Shape, Uniform, resolve
from molora.errors import ConfigError

ALLOCATION: TypeAdapter[Allocation] = TypeAdapter(Allocation)

# MoLA (2402.08562), Fig. 1, restated
QUARTERS = {
    "inverted_triangle": [2, 4, 6, 8],
    "triangle": [8, 6, 4, 2],
    "hourglass": [8, 2, 2, 8],
    "rectangle": [5, 5, 5, 5],
}


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_named_shape_gives_each_layer_the_count_of_its_quarter(name):
    for num_layers in range(1, 71):
        counts = resolve(Shape(name=name), num_layers, what="num_experts")
        # layer l is in the last quarter q whose start ⌈q·L/4⌉ it has reached
        starts = [-(-quarter * num_layers // 4) for quarter in range(4)]
        expected = tuple(
            QUARTERS[name][max(q for q in range(4) if starts[q] <= layer)]
            for layer in range(num_layers)
        )
        assert counts == expected, num_layers
        assert len(counts) == num_layers


def test_thirty_two_layers_have_eight_of_each_as_in_the_paper():
    counts = resolve(Shape(name="inverted_triangle"), 32, what="num_experts")
    assert counts == (2,) * 8 + (4,) * 8 + (6,) * 8 + (8,) * 8
    assert sum(counts) == sum(resolve(Shape(name="rectangle"), 32, what="num_experts")) == 160


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (3, Uniform(value=3)),
        ([3, 1], PerLayer(values=(3, 1))),
        ((3, 1), PerLayer(values=(3, 1))),
        ("triangle", Shape(name="triangle")),
        ({"kind": "uniform", "value": 3}, Uniform(value=3)),
        ({"kind": "list", "values": [3]}, PerLayer(values=(3,))),
        (Shape(name="hourglass"), Shape(name="hourglass")),
    ],
)
def test_shorthand_means_what_it_says(written, meant):
    assert ALLOCATION.validate_python(written) == meant


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (0, "greater than 0"),
        (-1, "greater than 0"),
        ([2, 0], "greater than 0"),
        ([], "at least 1 item"),
        ([2, 1.5], "valid integer"),
        (True, "not a bool"),
        (2.5, "valid dictionary"),
        (None, "valid dictionary"),
        ("triangel", r"unknown shape 'triangel'\. Close names: triangle"),
        ("x", r"unknown shape 'x'\. Known: inverted_triangle, triangle"),
    ],
)
def test_a_count_is_a_positive_integer_a_list_or_a_shape(wrong, message):
    with pytest.raises(ValueError, match=message):
        ALLOCATION.validate_python(wrong)


def test_a_list_must_have_one_entry_per_layer():
    assert resolve(PerLayer(values=(1, 2, 3)), 3, what="rank") == (1, 2, 3)
    with pytest.raises(ConfigError, match="rank has 3 entries and the model has 4 layers"):
        resolve(PerLayer(values=(1, 2, 3)), 4, what="rank")
