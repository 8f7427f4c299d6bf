"""What the router reads, how logits become scores, and how scores become gates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt

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
    """logits = (W x + b) / temperature, W of shape (E, in), computed in float32."""

    kind: Literal["linear"] = "linear"
    init: Annotated[KaimingInit | NormalInit, Field(discriminator="kind")] = KaimingInit()
    """How W starts."""
    temperature: PositiveFloat = 1.0
    """Divides the logits; below 1 sharpens."""
    noise_std: float = Field(default=0.0, ge=0)
    """Standard deviation of Gaussian noise added to the logits in training."""
    jitter: float = Field(default=0.0, ge=0, lt=1)
    """In training the router's input is multiplied by uniform(1 − jitter, 1 + jitter)."""
    bias: bool = False
    """Whether a bias is added, which starts at zero."""


class Projection(Frozen):
    """logits = |W x| / temperature, W fixed and of shape (E, in).

    Arrow (Ostapenko et al., 2405.11157): row e is the first right-singular vector of ΔW_e, whose
    sign is arbitrary.
    """

    kind: Literal["projection"] = "projection"
    temperature: PositiveFloat = 1.0
    """Divides the logits."""


class UpdateNorm(Frozen):
    """logits = ‖ΔW_e x‖ / temperature (SpectR, 2504.03454).

    With `preselect`, only of that many experts with the largest |W x|, W as of `Projection` (LAG,
    2507.05346); the others are out.
    """

    kind: Literal["update_norm"] = "update_norm"
    temperature: PositiveFloat = 1.0
    """Divides the logits."""
    relative: bool = False
    """Divide by ‖ΔW_e‖, so that a large update does not win by its size alone (ours)."""
    preselect: PositiveInt | None = None
    """Experts of a row that are compared; None: all."""


class Prototype(Frozen):
    """logits = p_e · x / temperature for one fixed vector per expert and linear.

    similarity "layer_norm": of both, each normalised to mean 0 and variance 1, over √in (PHATGOOSE,
    2402.05859); "cosine"; "dot": of x as it is.
    """

    kind: Literal["prototype"] = "prototype"
    similarity: Literal["layer_norm", "cosine", "dot"] = "layer_norm"
    """How vectors are compared."""
    temperature: PositiveFloat = 1.0
    """Divides the logits."""


class Fixed(Frozen):
    """The same logits for every row."""

    kind: Literal["fixed"] = "fixed"
    weights: tuple[float, ...] = Field(min_length=1)
    """One for each expert."""


class ExpertOutputs(Frozen):
    """logits = W n / τ of the experts' own outputs for a row, put together and normalised to length
    1 (MoLE, 2404.13628); W of shape (E, E · out) and τ are learned."""

    kind: Literal["expert_outputs"] = "expert_outputs"


class XLoRA(Frozen):
    """logits = a classifier of the final hidden state that a first pass through the base gives
    (X-LoRA, 2402.07148), for the whole model."""

    kind: Literal["xlora"] = "xlora"
    layerwise: bool = False
    """Whether each linear has logits of its own."""
    depth: PositiveInt = 1
    """Linear layers of the classifier; between them ReLU and dropout."""
    width: PositiveInt = 2048
    """Features between them."""
    dropout: float = Field(default=0.2, ge=0, lt=1)
    """Dropout between them."""
    temperature: PositiveFloat = 1.0
    """Divides the logits."""
    first_pass_score: float = 0.0
    """Score of every expert in the first pass; 0: it is the base alone."""


class Given(Frozen):
    """The gates of a batch come with it as `expert_gates`: (B, E), or (B, S, E) by position."""

    kind: Literal["given"] = "given"


def _linear_by_default(data: Any) -> Any:
    return {"kind": "linear", **data} if isinstance(data, Mapping) else data


Router = Annotated[
    LinearRouter | Projection | UpdateNorm | Prototype | Fixed | ExpertOutputs | XLoRA | Given,
    Field(discriminator="kind"),
    BeforeValidator(_linear_by_default),
]


class Identity(Frozen):
    """scores = logits."""

    kind: Literal["identity"] = "identity"


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
    softmax: bool = False
    """Gates are the softmax over the chosen scores, as X-LoRA's `enable_softmax_topk` makes them;
    an expert whose score is exactly 0 is out."""


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
    """The best expert acts with gate exactly 1, the scale at which an adapter was trained."""

    kind: Literal["unit_top1"] = "unit_top1"
    straight_through: bool = False
    """Whether the gate has the gradient of the score (hard routing of 2606.31413); else the task
    loss gives the router none."""


Score = Annotated[Softmax | Sigmoid | Identity, Field(discriminator="kind")]
Select = Annotated[
    Dense | TopK | TopP | Threshold | Capacity | UnitTop1, Field(discriminator="kind")
]
