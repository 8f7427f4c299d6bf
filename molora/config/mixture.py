"""A mixture as data.

Groups of projections, each with its experts and routing, and the auxiliary losses.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from molora.config.allocation import Allocation, PerLayer, Shape, Uniform, resolve, smallest
from molora.config.base import Frozen
from molora.config.experts import ExpertForm, Imported, LoRA
from molora.config.losses import LoadBalance, LocalizedBalance, Loss
from molora.config.routing import (
    Capacity,
    Dense,
    Fixed,
    Given,
    LinearRouter,
    Router,
    Score,
    Select,
    Sigmoid,
    Softmax,
    TopK,
    UnitTop1,
    XLoRA,
)
from molora.config.shorthand import AlsoAs


class LinearSite(Frozen):
    """Experts are added at each linear: y = W x + Σ_k gate_k · scaling · B A x."""

    kind: Literal["linear"] = "linear"
    scope: Literal["linear", "block", "layer", "model"] = "linear"
    """Who shares one routing decision: a linear alone, the linears of one attention or FFN block,
    of one layer, or of the whole model, which is decided before its forward."""


class FFNSite(Frozen):
    """An expert is the whole FFN, mixed after the non-linearity (MixLoRA, 2404.15159).

    It has its own LoRA on each projection.
    """

    kind: Literal["ffn"] = "ffn"


Site = Annotated[LinearSite | FFNSite, Field(discriminator="kind")]


def _as_tuple(data: Any) -> Any:
    return (data,) if isinstance(data, str) else data


Targets = Annotated[
    tuple[Annotated[str, Field(min_length=1)], ...],
    BeforeValidator(_as_tuple),
    Field(min_length=1),
    AlsoAs(({"type": "string", "minLength": 1},)),
]
"""`attention`, `ffn`, `all`, name suffixes such as `q_proj` or `mlp.down_proj`, or `re:` and a
regular expression
for the whole module path. Several may be mixed; each must match."""


class Group(Frozen):
    """The projections that share one recipe."""

    targets: Targets = ("all",)
    """Which linears."""
    site: Site = LinearSite()
    """Where the experts' outputs mix."""
    num_experts: Allocation = Field(default=8, validate_default=True)
    """Experts per bank. A layer with one expert has no router: it is a plain LoRA."""
    rank: Allocation = Field(default=8, validate_default=True)
    """Rank of each expert."""
    expert: ExpertForm = LoRA()
    """How an expert is parametrised."""
    router: Router = LinearRouter()
    """What makes the logits."""
    score: Score = Softmax()
    """Logits to scores."""
    select: Select = TopK()
    """Scores to gates."""
    gate_scale: float = 1.0
    """Multiplies every gate; a pretrained adapter was trained at gate 1."""

    @property
    def routed(self) -> bool:
        """Whether any layer can have a router. One expert needs none, unless it is weighed."""
        return self.num_experts != Uniform(value=1) or self.weighs_one_expert

    @property
    def weighs_one_expert(self) -> bool:
        """Whether one expert alone has a router too: its gate need not be 1."""
        return not isinstance(self.router, LinearRouter) or (
            isinstance(self.expert, Imported)
            and (
                isinstance(self.score, Sigmoid)
                or any(e.invocation_tokens is not None for e in self.expert.experts)
            )
        )

    @model_validator(mode="after")
    def _top_k_fits_every_layer(self) -> Self:
        experts, select = self.num_experts, self.select
        if (
            not isinstance(select, (TopK, Capacity))
            or isinstance(experts, Shape)
            or not self.routed
        ):
            return self
        pairs = (
            zip(select.k.values, experts.values, strict=False)
            if isinstance(experts, PerLayer) and isinstance(select.k, PerLayer)
            else [(max(_counts(select.k)), smallest(experts))]
        )
        for top_k, num_experts in pairs:
            if top_k > num_experts:
                raise ValueError(top_k_exceeds(top_k, num_experts))
        return self

    @model_validator(mode="after")
    def _overflow_needs_the_ffn_site(self) -> Self:
        select = self.select
        if isinstance(select, Capacity) and select.overflow == "input" and self.site.kind != "ffn":
            raise ValueError(
                "select.overflow='input' replaces a block's output by its input and needs "
                "site.kind='ffn'. Use overflow='zero' at a linear."
            )
        return self

    @model_validator(mode="after")
    def _one_alpha_per_expert(self) -> Self:
        if isinstance(self.expert, Imported):
            return self
        alpha = self.expert.alpha
        if isinstance(alpha, tuple) and set(_counts(self.num_experts)) != {len(alpha)}:
            raise ValueError(
                f"expert.alpha has {len(alpha)} values, one per expert, so num_experts must be "
                f"{len(alpha)} in every layer. Give one alpha for all, or as many as there are "
                "experts."
            )
        return self

    @model_validator(mode="after")
    def _routers_of_imported_experts(self) -> Self:
        form, router = self.expert, self.router
        if not isinstance(form, Imported):
            if self.site.kind == "linear" and self.site.scope == "model":
                raise ValueError("site.scope='model' is for imported experts. Use scope='layer'.")
            if not isinstance(router, LinearRouter):
                raise ValueError(
                    f"router.kind={router.kind!r} is made from experts that are trained already. "
                    "Use molora.compose, or router.kind='linear'."
                )
            return self
        if self.num_experts != Uniform(value=len(form.experts)):
            raise ValueError(
                f"expert.experts has {len(form.experts)} experts, so num_experts must be as many."
            )
        if self.site.kind == "ffn":
            raise ValueError(
                "site.kind='ffn' mixes whole FFNs, but imported experts were trained at each "
                "linear. Use site.kind='linear'."
            )
        of_model = isinstance(router, (XLoRA, Given))
        if of_model != (self.site.scope == "model"):
            raise ValueError(
                f"router.kind={router.kind!r} cannot have site.scope={self.site.scope!r}. Use "
                f"{'model' if of_model else 'linear'!r}."
            )
        one_width = isinstance(router, (LinearRouter, Fixed, XLoRA, Given))
        if self.site.scope != "linear" and not one_width:
            raise ValueError(
                f"router.kind={router.kind!r} has a vector of each linear's width, so every linear "
                "decides for itself. Use site.scope='linear'."
            )
        if isinstance(router, Fixed) and len(router.weights) != len(form.experts):
            raise ValueError(
                f"router.weights has {len(router.weights)} values for {len(form.experts)} experts."
            )
        return self

    def router_gets_no_task_gradient(self) -> bool:
        """Whether gates are constant 1, so that only an auxiliary loss can teach the router."""
        if not self.routed or not isinstance(self.router, LinearRouter):
            return False
        if isinstance(self.select, UnitTop1):
            return not self.select.straight_through
        select = self.select
        if not isinstance(select, (TopK, Capacity)) or not select.renormalize:
            return False
        if isinstance(self.num_experts, PerLayer) and isinstance(select.k, PerLayer):
            pairs = zip(select.k.values, self.num_experts.values, strict=False)
            return any(top_k == 1 < num_experts for top_k, num_experts in pairs)
        return smallest(select.k) == 1


class TokenRows(Frozen):
    """Rows of the token embeddings that are trained and saved, e.g. of tokens that were added."""

    ids: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1)
    """Token ids; the same rows of an untied output embedding are trained too."""


class MixtureConfig(Frozen):
    """Everything that defines a mixture; a preset is a function that returns one."""

    method: str = "custom"
    """Name of the preset, for reports."""
    groups: tuple[Group, ...] = Field(min_length=1)
    """Recipes; no linear may be matched by two of them."""
    losses: tuple[Loss, ...] = ()
    """Auxiliary losses; empty turns them off."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Storage of all trainable parameters; products run in the input's dtype."""
    backend: Literal["auto", "reference", "dense", "grouped", "gather", "triton"] = "auto"
    """Which kernel computes the mixture."""
    share_products: bool = True
    """Whether projections that read the same tensor multiply it once, with all their factors and
    all their routers; the results differ by rounding."""
    train_modules: tuple[str, ...] = ()
    """Paths of modules outside the experts that are trained whole and saved, e.g. `score` or
    `lm_head`."""
    train_tokens: TokenRows | None = None
    """Rows of the embeddings that are trained and saved."""

    @model_validator(mode="after")
    def _router_can_learn(self) -> Self:
        for i, group in enumerate(self.groups):
            if group.router_gets_no_task_gradient() and not self.losses:
                raise ValueError(
                    f"groups.{i}.select: top-1 with gate 1 gives the router no gradient from the "
                    "task loss and there is no auxiliary loss, so it would never learn. Use "
                    "renormalize=False, k ≥ 2, or add a loss."
                )
        return self

    @model_validator(mode="after")
    def _load_balance_can_act(self) -> Self:
        routed = [group for group in self.groups if group.routed]
        constant = routed and all(
            isinstance(group.select, Dense) and isinstance(group.score, Softmax) for group in routed
        )
        for i, loss in enumerate(self.losses):
            # every expert is chosen by every token: f is constant, and so is Σ f P of a softmax
            if constant and isinstance(loss.term, LoadBalance) and loss.term.form != "switch":
                raise ValueError(
                    f"losses.{i}.term: with select.kind='dense' the {loss.term.form} load balance "
                    "is a constant without gradient. Use form='switch', kind='importance', or no "
                    "loss."
                )
        return self

    @model_validator(mode="after")
    def _localized_balance_needs_two_halves(self) -> Self:
        if not any(isinstance(loss.term, LocalizedBalance) for loss in self.losses):
            return self
        for i, group in enumerate(self.groups):
            counts = _counts(group.num_experts)
            odd = [count for count in counts if count > 1 and count % 2]
            if odd:
                raise ValueError(
                    f"groups.{i}.num_experts: the localized balance loss splits the experts into "
                    f"two halves, so their number must be even (got {odd[0]})."
                )
        return self


def top_k_exceeds(top_k: int, num_experts: int) -> str:
    """The message for more chosen experts than there are."""
    return (
        f"top_k={top_k} exceeds num_experts={num_experts} of some layer. Lower top_k, give top_k "
        "as a list over layers, or use a named shape, for which top_k is clamped."
    )


def _counts(allocation: Uniform | PerLayer | Shape) -> tuple[int, ...]:
    num_layers = len(allocation.values) if isinstance(allocation, PerLayer) else 4
    return resolve(allocation, num_layers, what="allocation")
