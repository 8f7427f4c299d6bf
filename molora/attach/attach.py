"""Put a mixture on a model."""

from __future__ import annotations

from torch import nn

from molora.attach.banks import DTYPES, BankMaker, Brought, check_fit
from molora.attach.build import Builder, Built
from molora.attach.extras import Extras
from molora.attach.hooks import ForwardHooks
from molora.attach.losses import required_columns, weighted_terms
from molora.attach.mixture import Mixture
from molora.attach.plan import Plan, make_plan
from molora.attach.surgery import Surgery
from molora.config import Capacity, Group, Imported, LinearSite, MixtureConfig
from molora.errors import AttachError, ConfigError
from molora.experts import ExpertBank
from molora.kernels import backend
from molora.modules import ForwardContext
from molora.routing.outputs import OutputsRouter


def attach(model: nn.Module, config: MixtureConfig, *, seed: int = 0) -> Mixture:
    """Replace the targeted linears' forwards in place and freeze everything else.

    Base modules stay where they are, so parameter names do not change; the model is used as before.
    Experts start with B = 0: the adapted model equals the base until the first step (sites that mix
    whole FFNs: to rounding).

    Args:
        model: a Hugging Face model, or any module with nn.Linear or Conv1D layers.
        config: a preset, or `molora.load_config(path).mixture`.
        seed: starts experts and routers; each depends on the seed and its own path alone.

    Raises:
        AttachError: a mixture is on the model already, a PEFT model, or targets that do not fit;
            the model is then as it was.
        ConfigError: allocations that do not fit the model's layers.
    """
    return attach_with(model, config, seed=seed, brought={})


def attach_with(model: nn.Module, config: MixtureConfig, *, seed: int, brought: Brought) -> Mixture:
    """As `attach`, with the factors that imported experts bring; without them they are 0."""
    check_attachable(model)
    plan = make_plan(model, config)
    check_fit(plan.placements, brought)
    context, surgery = ForwardContext(), Surgery()
    was_trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    builder = Builder(
        model,
        banks=BankMaker(seed, DTYPES[config.dtype], backend(config.backend), brought),
        share_products=config.share_products,
        context=context,
        surgery=surgery,
    )
    try:
        model.requires_grad_(False)
        # before the experts, which are no parameters of a declared module that they are put on
        extras = Extras(model, config)
        surgery.handles += extras.hooks
        built = builder.build(plan.placements)
        _bind_outputs(built)
    except Exception:
        surgery.undo()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(was_trainable[name])
        raise
    hooks = ForwardHooks(
        model,
        context=context,
        losses=weighted_terms(config),
        layers=built.layers,
        streams={name: site.stream for name, site in built.sites.items()},
        required_columns=required_columns(config),
        needs_context=_needs_context(plan),
        model_scope=built.model_scope,
        invocations=_invocations(config),
    )
    surgery.handles.append(model.register_forward_pre_hook(hooks.before, with_kwargs=True))
    surgery.handles.append(
        model.register_forward_hook(hooks.after, with_kwargs=True, always_call=True)
    )
    # new modules start in training mode; a model in evaluation must not get dropout and noise
    for bank in built.banks.values():
        bank.train(model.training)
    for router in built.routers.values():
        router.train(model.training)
    return Mixture(
        model,
        config,
        plan=plan,
        built=built,
        hooks=hooks,
        context=context,
        surgery=surgery,
        extras=extras,
        was_trainable=was_trainable,
    )


def _bind_outputs(built: Built) -> None:
    """Let routers that read the experts' outputs have their bank."""
    for name, site in built.sites.items():
        if not isinstance(site.router, OutputsRouter):
            continue
        bank = built.banks[name]
        if bank.reads_product:
            raise AttachError(
                f"an expert at {name} has a magnitude (DoRA), with which its output is more than "
                "B A x. Leave it out, or choose a router that does not read outputs."
            )
        site.router.bind(bank)


def check_attachable(model: nn.Module) -> None:
    """Raise AttachError if the model carries adapters already or has no parameters."""
    if type(model).__module__.partition(".")[0] == "peft":
        raise AttachError(
            "the model is a PEFT model. Attach to the base model: merge_and_unload() it, or load "
            "it without the adapter."
        )
    for name, module in model.named_modules():
        if isinstance(module, ExpertBank):
            raise AttachError(
                "the model has a mixture already. Call detach() on it before attaching another."
            )
        if type(module).__module__.startswith("peft.tuners"):
            raise AttachError(
                "the model carries PEFT adapters. Unload them before attaching a mixture."
            )
        if hasattr(module, "_hf_hook") and any(p.is_meta for p in module.parameters(recurse=False)):
            raise AttachError(
                f"weights of {name or 'the model'} were offloaded by accelerate, which runs "
                "such layers for inference only. Choose a device_map without 'disk' and 'cpu' "
                "beside other devices, or quantise the base."
            )
    if not isinstance(model, nn.Module) or not any(True for _ in model.parameters()):
        raise AttachError("the model has no parameters.")


def _needs_context(plan: Plan) -> bool:
    routed = [placement.group for placement in plan.placements if placement.routed]
    return any(
        isinstance(group.select, Capacity)
        or (isinstance(group.site, LinearSite) and group.site.scope in ("layer", "model"))
        or _invocations_of(group)
        for group in routed
    )


def _invocations(config: MixtureConfig) -> tuple[tuple[int, ...] | None, ...]:
    found = [group for group in config.groups if _invocations_of(group)]
    if len(found) > 1:
        raise ConfigError("two groups have experts that act after tokens. Make them one group.")
    return _invocations_of(found[0]) if found else ()


def _invocations_of(group: Group) -> tuple[tuple[int, ...] | None, ...]:
    """For each expert the tokens after which it acts; empty if all act always."""
    if not isinstance(group.expert, Imported):
        return ()
    tokens = tuple(expert.invocation_tokens for expert in group.expert.experts)
    return tokens if any(t is not None for t in tokens) else ()
