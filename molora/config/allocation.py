"""How a count (experts, rank, top_k) is spread over the layers of a stack."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveInt

from molora.config.base import Frozen, unknown_name
from molora.config.shorthand import AlsoAs
from molora.errors import ConfigError

SHAPES: dict[str, tuple[int, int, int, int]] = {
    "inverted_triangle": (2, 4, 6, 8),
    "triangle": (8, 6, 4, 2),
    "hourglass": (8, 2, 2, 8),
    "rectangle": (5, 5, 5, 5),
}
"""MoLA's named shapes (2402.08562, Fig. 1): the count of each quarter of the layers, lowest
first."""


class Uniform(Frozen):
    """The same count in every layer."""

    kind: Literal["uniform"] = "uniform"
    value: PositiveInt
    """The count."""


class PerLayer(Frozen):
    """One count per layer, lowest layer first."""

    kind: Literal["list"] = "list"
    values: tuple[PositiveInt, ...] = Field(min_length=1)
    """The counts; as many as the stack has layers."""


class Shape(Frozen):
    """A named shape: layer l of L takes the count of quarter ⌊4l/L⌋."""

    kind: Literal["shape"] = "shape"
    name: Literal["inverted_triangle", "triangle", "hourglass", "rectangle"]
    """Which of MoLA's shapes."""


def _from_shorthand(data: Any) -> Any:
    if isinstance(data, bool):
        raise ValueError("a count is an int, a list over layers or a named shape, not a bool")
    if isinstance(data, int):
        return (
            Uniform.model_construct(value=data) if data > 0 else {"kind": "uniform", "value": data}
        )
    if isinstance(data, (list, tuple)):
        return {"kind": "list", "values": list(data)}
    if isinstance(data, str):
        if data not in SHAPES:
            raise ValueError(unknown_name("shape", data, SHAPES))
        return {"kind": "shape", "name": data}
    return data


Allocation = Annotated[
    Annotated[Uniform | PerLayer | Shape, Field(discriminator="kind")],
    BeforeValidator(_from_shorthand),
    AlsoAs(
        (
            {"type": "integer", "minimum": 1},
            {"type": "array", "items": {"type": "integer", "minimum": 1}, "minItems": 1},
            {"type": "string", "enum": list(SHAPES)},
        )
    ),
]
"""An int (uniform), a list (one entry per layer) or the name of a shape."""


def resolve(
    allocation: Uniform | PerLayer | Shape, num_layers: int, *, what: str
) -> tuple[int, ...]:
    """The count of each of `num_layers` layers.

    Raises:
        ConfigError: a list whose length is not the number of layers; `what` names the setting.
    """
    match allocation:
        case Uniform(value=value):
            return (value,) * num_layers
        case Shape(name=name):
            return tuple(SHAPES[name][4 * layer // num_layers] for layer in range(num_layers))
        case PerLayer(values=values):
            if len(values) != num_layers:
                raise ConfigError(
                    f"{what} has {len(values)} entries and the model has {num_layers} layers. "
                    "Give one entry per layer, one int for all, or a named shape: "
                    f"{', '.join(SHAPES)}."
                )
            return values


def smallest(allocation: Uniform | PerLayer | Shape) -> int:
    """The least count of any layer, known without the model."""
    match allocation:
        case Uniform(value=value):
            return value
        case Shape(name=name):
            return min(SHAPES[name])
        case PerLayer(values=values):
            return min(values)
