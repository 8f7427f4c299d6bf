"""What the router reads, how logits become scores, and how scores become gates."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from molora.config.allocation import Allocation
from molora.config.base import Frozen


class KaimingInit(Frozen):
    """Uniform in ±1/√in: kaiming_uniform with a = √5, as nn.Linear and most authors."""

    kind: Literal["kaiming"] = "kaiming"


class NormalInit(Frozen):
    """Normal with mean 0."""

    kind: Literal["normal"] = "normal"
    std: PositiveFloat = 0.02
    """Standard deviation."""


class LinearRouter(Frozen):
    """logits = W x / temperature, W of shape (E, in), computed in float32."""

    kind: Literal["linear"] = "linear"
    init: Annotated[KaimingInit | NormalInit, Field(discriminator="kind")] = KaimingInit()
    """How W starts."""
    temperature: PositiveFloat = 1.0
    """Divides the logits; below 1 sharpens."""
    noise_std: float = Field(default=0.0, ge=0)
    """Standard deviation of Gaussian noise added to the logits in training."""
    jitter: float = Field(default=0.0, ge=0, lt=1)
    """In training the router's input is multiplied by uniform(1 − jitter, 1 + jitter)."""


class Softmax(Frozen):
    """scores = softmax(logits) over the experts."""

    kind: Literal["softmax"] = "softmax"


class Sigmoid(Frozen):
    """scores = sigmoid(logits), one expert independent of the others."""

    kind: Literal["sigmoid"] = "sigmoid"


class Dense(Frozen):
    """Every expert acts; gates = scores."""

    kind: Literal["dense"] = "dense"


class TopK(Frozen):
    """The k experts with the highest scores act."""

    kind: Literal["top_k"] = "top_k"
    k: Allocation = Field(default=2, validate_default=True)
    """Experts per row; clamped to the experts of the layer only where those come from a named
    shape."""
    renormalize: bool = True
    """Divide the chosen scores by their sum."""


class TopP(Frozen):
    """The fewest best experts whose scores together exceed p act."""

    kind: Literal["top_p"] = "top_p"
    p: float = Field(default=0.8, gt=0, le=1)
    """The mass to reach; the expert that crosses it is included."""
    renormalize: bool = False
    """Divide the chosen scores by their sum."""


class Threshold(Frozen):
    """Experts with a score above the threshold act, and the best one always does."""

    kind: Literal["threshold"] = "threshold"
    threshold: float = Field(ge=0, lt=1)
    """The score to exceed."""
    renormalize: bool = False
    """Divide the chosen scores by their sum."""


class Capacity(Frozen):
    """Top-k with at most `tokens` tokens per expert and sequence in training.

    First come, first served.
    """

    kind: Literal["capacity"] = "capacity"
    k: Allocation = Field(default=1, validate_default=True)
    """Experts per row."""
    tokens: PositiveInt = 32
    """Tokens that one expert accepts per sequence."""
    renormalize: bool = False
    """Divide the chosen scores by their sum, before capacity drops any."""
    overflow: Literal["zero", "input"] = "zero"
    """What a dropped token gets in place of its expert's output; "input" (FFN site only) is score ·
    x."""


class UnitTop1(Frozen):
    """The best expert acts with gate exactly 1; the task loss gives the router no gradient."""

    kind: Literal["unit_top1"] = "unit_top1"


Score = Annotated[Softmax | Sigmoid, Field(discriminator="kind")]
Select = Annotated[
    Dense | TopK | TopP | Threshold | Capacity | UnitTop1, Field(discriminator="kind")
]
