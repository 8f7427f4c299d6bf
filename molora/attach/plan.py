"""A configuration meets a model: which linear gets how many experts of which rank."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from molora.attach.families import Layer, feed_forward_layout, in_out_features, layer_of, stream_of
from molora.attach.stacked import (
    check_stacked,
    in_model_order,
    match_parameters,
    stacked_features,
)
from molora.attach.targets import Match, match_paths, match_targets, untouched_experts
from molora.config import (
    Capacity,
    Group,
    Imported,
    MixtureConfig,
    PerLayer,
    Shape,
    TopK,
    Uniform,
    resolve,
)
from molora.config.mixture import top_k_exceeds
from molora.errors import AttachError, ConfigError


@dataclass(frozen=True)
class Placement:
    """One linear, or one parameter of stacked weights, and the bank that it gets."""

    path: str
    group: Group
    layer: Layer | None
    num_experts: int
    rank: int
    top_k: int | None
    """None where the selector has no k."""
    stream: str
    in_features: int
    out_features: int
    stacked: int | None = None
    """Number of the base's weights in the parameter; None for a linear."""

    @property
    def routed(self) -> bool:
        """Whether a router decides; one expert alone needs none, unless it is weighed."""
        return self.num_experts > 1 or self.group.weighs_one_expert

    @property
    def up_parameters(self) -> int:
        """Number of values of the bank's up-projections."""
        form = self.group.expert
        if isinstance(form, Imported):
            ranks = (e.modules[self.path][0] for e in form.experts if self.path in e.modules)
            return sum(ranks) * self.out_features * (self.stacked or 1)
        return self.num_experts * self.rank * self.out_features

    @property
    def parent(self) -> str:
        return self.path.rpartition(".")[0]

    @property
    def module(self) -> str:
        """Path of the module that the bank belongs to."""
        return self.parent if self.stacked else self.path

    @property
    def child(self) -> str:
        """Name that the bank has there."""
        return f"{self.path.rpartition('.')[2]}_lora" if self.stacked else "experts"

    @property
    def router(self) -> str:
        """Name that a router of this placement alone has there."""
        return f"{self.path.rpartition('.')[2]}_router" if self.stacked else "router"


@dataclass(frozen=True)
class Plan:
    """Everything that attaching will do."""

    placements: tuple[Placement, ...]
    matches: tuple[Match, ...]
    untouched: tuple[str, ...]
    """Fused expert parameters of the base that carry no LoRA experts."""


def make_plan(model: nn.Module, config: MixtureConfig) -> Plan:
    """Resolve targets and allocations.

    Raises:
        AttachError: a pattern that matches nothing, a linear matched by two groups, an FFN site
            outside an FFN.
        ConfigError: lists that do not fit the number of layers, more chosen experts than a layer
            has.
    """
    placements: dict[str, Placement] = {}
    matches: list[Match] = []
    for group in config.groups:
        _check_targets_of_imported(group)
        check_stacked(group)
        group_matches = _matches(model, group)
        matches += group_matches
        for path in dict.fromkeys(path for match in group_matches for path in match.paths):
            if path in placements:
                raise AttachError(
                    f"{path} is matched by two groups, with targets "
                    f"{list(placements[path].group.targets)} and {list(group.targets)}. Give every "
                    "linear to one group."
                )
            placements[path] = _place(model, path, group)
    ordered = in_model_order(model, placements.values())
    return Plan(ordered, tuple(matches), untouched_experts(model, placements))


def _matches(model: nn.Module, group: Group) -> tuple[Match, ...]:
    form = group.expert
    if not isinstance(form, Imported):
        return match_targets(model, group.targets)
    linears = match_paths(model, [path for path in group.targets if path not in form.stacked])
    return linears + match_parameters(model, form.stacked)


def _place(model: nn.Module, path: str, group: Group) -> Placement:
    layer = layer_of(model, path)
    if group.site.kind == "ffn":
        _check_in_feed_forward(model, path)
    form = group.expert
    stacked = form.stacked.get(path) if isinstance(form, Imported) else None
    in_features, out_features = (
        stacked_features(model, path) if stacked else in_out_features(model.get_submodule(path))
    )
    num_experts = _at_layer(group.num_experts, layer, path, "num_experts")
    top_k = None
    if isinstance(group.select, (TopK, Capacity)) and (num_experts > 1 or group.weighs_one_expert):
        top_k = _at_layer(group.select.k, layer, path, "top_k")
        if top_k > num_experts:
            if not isinstance(group.num_experts, Shape):
                raise ConfigError(top_k_exceeds(top_k, num_experts))
            top_k = num_experts
    return Placement(
        path=path,
        group=group,
        layer=layer,
        num_experts=num_experts,
        rank=_rank(group, layer, path),
        top_k=top_k,
        stream=stream_of(model, path),
        in_features=in_features,
        out_features=out_features,
        stacked=stacked,
    )


def _check_targets_of_imported(group: Group) -> None:
    if not isinstance(group.expert, Imported):
        return
    adapted = {path for expert in group.expert.experts for path in expert.modules}
    odd = sorted(adapted.symmetric_difference(group.targets))
    if odd:
        whose = "no target" if odd[0] in adapted else "adapted by none of them"
        raise ConfigError(
            f"targets of imported experts are the linears that they adapt, but {odd[0]} is {whose}."
        )
    unknown = sorted(group.expert.stacked.keys() - adapted)
    if unknown:
        raise ConfigError(f"expert.stacked names {unknown[0]}, which no expert adapts.")


def _rank(group: Group, layer: Layer | None, path: str) -> int:
    """The rank of every expert, or of imported ones the largest."""
    if isinstance(group.expert, Imported):
        experts = group.expert.experts
        return max(expert.modules[path][0] for expert in experts if path in expert.modules)
    return _at_layer(group.rank, layer, path, "rank")


def _at_layer(
    allocation: Uniform | PerLayer | Shape, layer: Layer | None, path: str, what: str
) -> int:
    if layer is not None:
        return resolve(allocation, layer.depth, what=what)[layer.index]
    if not isinstance(allocation, Uniform):
        raise ConfigError(
            f"{what} varies over layers, but {path} belongs to no layer. Give it a group of its "
            "own."
        )
    return allocation.value


def _check_in_feed_forward(model: nn.Module, path: str) -> None:
    parent, _, name = path.rpartition(".")
    layout = feed_forward_layout(model.get_submodule(parent))
    if layout is None or name not in (*layout.inputs, layout.down):
        raise AttachError(
            f"site 'ffn' mixes whole FFN modules, but {path} is not a projection of one: its "
            f"parent is a {type(model.get_submodule(parent)).__name__}. Families with the FFN as "
            "one module (Llama, Mistral, Qwen, Gemma, Phi-3, GPT-2, T5) have this site; BERT and "
            "RoBERTa split the FFN over two modules and do not. Use targets='ffn' there, or site "
            "'linear'."
        )
