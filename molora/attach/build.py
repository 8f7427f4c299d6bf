"""From a plan to modules on the base model; configuration stops here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from molora.attach.banks import BankMaker
from molora.attach.families import (
    OUTPUT_NAMES,
    FeedForwardLayout,
    block_in_features,
    feed_forward_layout,
    hidden_size,
    in_out_features,
    is_cross_attention_memory,
    plain_linear,
)
from molora.attach.model_scope import FirstPass, GivenGates
from molora.attach.plan import Placement
from molora.attach.routers import (
    keep_present,
    make_classifier,
    make_router,
    score_function,
    select_function,
    slots_of,
)
from molora.attach.stacked import adapt_stacked
from molora.attach.surgery import Surgery
from molora.config import Capacity, Given, Group, Imported, XLoRA
from molora.errors import AttachError
from molora.experts import ExpertBank
from molora.modules import (
    ForwardContext,
    ModelDecision,
    MoLoRAFeedForward,
    MoLoRALinear,
    Projection,
    RoutingSite,
    SharedDecision,
    SharedProduct,
)
from molora.routing.classifier import Standing

MODEL = "model"
"""Name of the site that decides for all linears."""
Decision = RoutingSite | SharedDecision | ModelDecision


@dataclass
class Built:
    """The parts of a mixture on a model."""

    banks: dict[str, ExpertBank]
    """Path of the linear → its bank."""
    sites: dict[str, RoutingSite]
    """Path of the module that owns the scope → what decides there."""
    layers: dict[str, str]
    """Site → path of its layer, or the site itself outside of layers."""
    routed_by: dict[str, str]
    """Path of a linear whose bank is routed → the site that decides for it."""
    routers: dict[str, nn.Module] = field(default_factory=dict)
    """Path of the router itself → the router."""
    model_scope: GivenGates | FirstPass | None = None
    """What decides for the whole model, before its forward."""


class Builder:
    """Builds the parts of one mixture; `surgery` records every change of the model."""

    def __init__(
        self,
        model: nn.Module,
        *,
        banks: BankMaker,
        share_products: bool,
        context: ForwardContext,
        surgery: Surgery,
    ) -> None:
        self.model = model
        self.banks = banks
        self.share_products = share_products
        self.context = context
        self.surgery = surgery
        self.built = Built({}, {}, {}, {})
        self._placements: tuple[Placement, ...] = ()
        self._shared: dict[str, SharedDecision] = {}
        self._linears: dict[str, MoLoRALinear] = {}

    def build(self, placements: tuple[Placement, ...]) -> Built:
        """Put banks and routers on all linears of a plan."""
        self._placements = placements
        blocks: dict[str, list[Placement]] = {}
        stacks: dict[str, list[Placement]] = {}
        for placement in placements:
            module = self.model.get_submodule(placement.module)
            bank = self.banks.make(placement, _device(module))
            self.built.banks[placement.path] = bank
            self.surgery.add_child(module, placement.child, bank)
            if placement.stacked:
                stacks.setdefault(placement.parent, []).append(placement)
            elif placement.group.site.kind == "ffn" and placement.routed:
                blocks.setdefault(placement.parent, []).append(placement)
            else:
                self._adapt_linear(placement, module, bank)
        for path, members in blocks.items():
            self._adapt_feed_forward(path, members)
        for path, members in stacks.items():
            adapt_stacked(self, path, members)
        if self.share_products:
            self._share_products()
        self._check_dtypes()
        return self.built

    def _share_products(self) -> None:
        """Linears of a block that may read the same tensor make one product of it."""
        readers: dict[tuple[str, bool, int], list[MoLoRALinear]] = {}
        for path, linear in self._linears.items():
            parent, _, name = path.rpartition(".")
            if name not in OUTPUT_NAMES:
                in_features, _ = in_out_features(self.model.get_submodule(path))
                key = (parent, is_cross_attention_memory(path), in_features)
                readers.setdefault(key, []).append(linear)
        for (parent, *_), members in readers.items():
            if len(members) > 1:
                product = SharedProduct(members)
                for member in members:
                    member.product = product
                block = self.model.get_submodule(parent)
                self.surgery.handles.append(
                    block.register_forward_hook(product.forget, always_call=True)
                )

    def _check_dtypes(self) -> None:
        trained = [p for bank in self.built.banks.values() for _, p in bank.factors()]
        routers = self.built.routers.values()
        trained += [p for router in routers if router.trainable for p in router.parameters()]
        for parameter in trained:
            if parameter.dtype != self.banks.dtype:
                raise AttachError(
                    f"new parameters became {parameter.dtype}, but the mixture's are to be "
                    f"{self.banks.dtype}: inside deepspeed.zero.Init DeepSpeed casts every one. "
                    "Attach after that context; the engine divides them all the same."
                )

    def _adapt_linear(self, placement: Placement, module: nn.Module, bank: ExpertBank) -> None:
        decision = self.decision(placement, module) if placement.routed else None
        if decision is not None:
            site = decision if isinstance(decision, RoutingSite) else decision.site
            self.built.routed_by[placement.path] = site.name
        glue = MoLoRALinear(
            module,
            module.forward,
            bank,
            decision=decision,
            context=self.context,
            plain=plain_linear(module),
        )
        self._linears[placement.path] = glue
        self.surgery.set_attribute(module, "forward", glue.forward)
        if not hasattr(module, "in_features"):  # Conv1D
            self.surgery.set_attribute(module, "in_features", placement.in_features)
            self.surgery.set_attribute(module, "out_features", placement.out_features)

    def decision(self, placement: Placement, module: nn.Module) -> Decision:
        """What decides for a placement, whose weight or bank `module` has."""
        site = placement.group.site
        scope = site.scope if site.kind == "linear" else "linear"
        if scope == "model":
            return self._model_decision(placement, module)
        if scope == "linear":
            return self.site(placement.path, module, [placement], placement.in_features)
        if scope == "layer" and placement.layer is None:
            raise AttachError(
                f"{placement.path} belongs to no layer, so scope='layer' has no router for it."
            )
        if is_cross_attention_memory(placement.path):
            raise AttachError(
                f"{placement.path} reads the encoder's output, not the input of its block, so it "
                "cannot share the block's decision. Give the keys and values of cross-attention a "
                "group with scope='linear'."
            )
        owner = _owner(placement)
        if owner not in self._shared:
            self._shared[owner] = self._shared_decision(owner, placement)
        shared = self._shared[owner]
        if shared.num_experts != placement.num_experts:
            raise AttachError(
                f"{placement.path} has {placement.num_experts} experts, but the router at "
                f"{owner!r} that it shares has {shared.num_experts}. Banks that share a decision "
                "need equal num_experts."
            )
        return shared

    def _model_decision(self, placement: Placement, module: nn.Module) -> ModelDecision:
        """A linear's share in what is decided before the model's forward."""
        group = placement.group
        members = [p for p in self._placements if p.group is group]
        if self.built.model_scope is None:
            self.built.model_scope = self._model_scope(group, members)
        config = group.router
        if not (isinstance(config, XLoRA) and config.layerwise):
            return ModelDecision(self.built.sites[MODEL])
        return ModelDecision(self.built.sites[placement.path])

    def _model_scope(self, group: Group, members: Sequence[Placement]) -> GivenGates | FirstPass:
        if any(_scope(p) == "model" and p.group is not group for p in self._placements):
            raise AttachError("two groups decide for the whole model. Make them one group.")
        config, first = group.router, members[0]
        if isinstance(config, Given):
            site = self._standing_site(MODEL, self.model, members)
            return GivenGates(site, first.num_experts)
        assert isinstance(config, XLoRA)
        device = _device(self.model.get_submodule(first.module))
        classifier = make_classifier(
            config,
            in_features=hidden_size(self.model),
            num_experts=first.num_experts,
            num_groups=len(members) if config.layerwise else 1,
            seed=self.banks.seed,
            dtype=self.banks.dtype,
            device=device,
        )
        self.surgery.add_child(self.model, "router", classifier)
        self.built.routers["router"] = classifier
        if config.layerwise:
            sites = [
                self._standing_site(p.path, self.model.get_submodule(p.module), [p], p.router)
                for p in members
            ]
        else:
            keep_present(classifier, _choosable(members), device)
            sites = [self._site_of(MODEL, classifier, first)]
        return FirstPass(
            self.model,
            classifier,
            sites,
            context=self.context,
            score=config.first_pass_score,
            num_experts=first.num_experts,
        )

    def _standing_site(
        self, name: str, owner: nn.Module, members: Sequence[Placement], child: str = "router"
    ) -> RoutingSite:
        """A site whose logits come from elsewhere."""
        router = Standing()
        keep_present(router, _choosable(members), _device(owner))
        self.surgery.add_child(owner, child, router)
        return self._site_of(name, router, members[0])

    def _shared_decision(self, owner: str, placement: Placement) -> SharedDecision:
        module = self.model.get_submodule(owner)
        sharing = [p for p in self._placements if p.group is placement.group and _owner(p) == owner]
        in_features = block_in_features(module)
        shared = SharedDecision(
            self.site(owner, module, sharing, in_features),
            in_features=in_features,
            num_experts=placement.num_experts,
        )
        self.surgery.handles.append(
            module.register_forward_pre_hook(shared.before, with_kwargs=True)
        )
        self.surgery.handles.append(module.register_forward_hook(shared.after, always_call=True))
        return shared

    def site(
        self, name: str, owner: nn.Module, members: Sequence[Placement], in_features: int
    ) -> RoutingSite:
        """The site that decides for these placements, which are of one group."""
        placement = members[0]
        router = make_router(
            name,
            placement,
            in_features=in_features,
            choosable=_choosable(members),
            seed=self.banks.seed,
            dtype=self.banks.dtype,
            device=_device(self.model.get_submodule(placement.module)),
        )
        self.surgery.add_child(owner, "router", router)
        self.built.routers[f"{name}.router"] = router
        return self._site_of(name, router, placement)

    def _site_of(self, name: str, router: nn.Module, placement: Placement) -> RoutingSite:
        select = placement.group.select
        site = RoutingSite(
            name,
            router,
            score=score_function(placement.group),
            select=select_function(placement.group, placement.top_k),
            capacity=select.tokens if isinstance(select, Capacity) else None,
            stream=placement.stream,
            context=self.context,
            slots=slots_of(placement),
            gate_scale=placement.group.gate_scale,
        )
        self.built.sites[name] = site
        self.built.layers[name] = placement.layer.path if placement.layer is not None else name
        return site

    def _adapt_feed_forward(self, path: str, members: list[Placement]) -> None:
        module = self.model.get_submodule(path)
        layout = feed_forward_layout(module)
        assert layout is not None
        first = members[0]
        self.built.routed_by.update({placement.path: path for placement in members})
        counts = {placement.num_experts for placement in members}
        if len(counts) > 1:
            raise AttachError(
                f"the projections of {path} have {sorted(counts)} experts; whole-FFN experts need "
                "one number."
            )
        reader = module.get_submodule(layout.inputs[0])
        in_features, _ = in_out_features(reader)
        select = first.group.select
        glue = MoLoRAFeedForward(
            tuple(self._projection(path, name, members) for name in layout.inputs),
            partial(activate, module, layout),
            self._projection(path, layout.down, members),
            is_deterministic=partial(is_deterministic, module, layout),
            finish=partial(finish, module, layout),
            site=self.site(path, module, members, in_features),
            context=self.context,
            base_forward=module.forward,
            overflow_input=isinstance(select, Capacity) and select.overflow == "input",
        )
        self.surgery.set_attribute(module, "forward", glue.forward)

    def _projection(self, path: str, name: str, members: list[Placement]) -> Projection:
        # a projection in another group adds its experts in its own forward
        linear = f"{path}.{name}"
        member = any(placement.path == linear for placement in members)
        return Projection(
            self.model.get_submodule(linear), self.built.banks[linear] if member else None
        )


def activate(module: nn.Module, layout: FeedForwardLayout, *projected_TKF: Tensor) -> Tensor:
    """act(gate) · up, or act(x), then the inner dropout; (T, K, F) → (T, K, I)."""
    parts = projected_TKF[0].chunk(2, dim=-1) if layout.fused else projected_TKF
    a_TKI = getattr(module, layout.activation)(parts[0])
    if len(parts) == 2:
        a_TKI = a_TKI * parts[1]
    if layout.inner_dropout is not None:
        a_TKI = getattr(module, layout.inner_dropout)(a_TKI)
    return a_TKI


def is_deterministic(module: nn.Module, layout: FeedForwardLayout) -> bool:
    """Whether `activate` draws no random numbers at the moment."""
    if layout.inner_dropout is None:
        return True
    dropout = getattr(module, layout.inner_dropout)
    return not dropout.training or dropout.p == 0


def finish(module: nn.Module, layout: FeedForwardLayout, y_TF: Tensor) -> Tensor:
    """What the FFN does after its down projection."""
    return y_TF if layout.outer_dropout is None else getattr(module, layout.outer_dropout)(y_TF)


def _scope(placement: Placement) -> str:
    site = placement.group.site
    return site.scope if site.kind == "linear" else "block"


def _owner(placement: Placement) -> str:
    """Path of the module that owns the router of a placement."""
    scope = _scope(placement)
    if scope == "layer" and placement.layer is not None:
        return placement.layer.path
    return placement.parent if scope == "block" else placement.path


def _choosable(members: Sequence[Placement]) -> tuple[bool, ...] | None:
    """For each expert whether a router of these placements may choose it; None: all."""
    form = members[0].group.expert
    if not isinstance(form, Imported) or form.missing != "mask":
        return None
    return tuple(any(placement.path in e.modules for placement in members) for e in form.experts)


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
