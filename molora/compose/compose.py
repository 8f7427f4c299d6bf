"""Frozen experts and a router, on a model."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from molora.attach import Mixture
from molora.attach.attach import attach_with
from molora.attach.stacked import check_stacked
from molora.compose.base_checks import other_bases, relative_norms
from molora.compose.experts import NAME, FrozenExperts
from molora.compose.single_experts import for_stacks
from molora.compose.vectors import Vectors, fill_routers
from molora.config import ExpertOutputs, Fixed, Given, Imported, LinearRouter, MixtureConfig, XLoRA
from molora.config.base import unknown_name
from molora.errors import ConfigError
from molora.io.adapter import Adapter, AdapterModule, ExpertParameter
from molora.presets.frozen import recipe

Missing = Literal["mask", "renorm", "zero", "error"]
NEW = {"rank": 8, "alpha": 16.0}
"""Rank and alpha of a new expert."""


def compose(
    model: nn.Module,
    experts: FrozenExperts,
    *,
    router: str | Mapping[str, Any] = "arrow",
    missing: Missing | None = None,
    trainable: Sequence[str] = (),
    new: Mapping[str, Mapping[str, float]] | Sequence[str] = (),
    seed: int = 0,
    **options: Any,
) -> Mixture:
    """Put pretrained experts on the linears and stacked weights that they adapt, with a router over
    them.

    Experts may differ in rank, scaling, dtype and linears. They are copied; neither they nor the
    base are changed.

    Args:
        model: the base that the experts were trained on.
        experts: from `molora.load_experts`.
        router: a name of `molora.presets.frozen.ROUTERS`, or `kind` and its arguments, among them
            `vectors`, {expert: {linear: tensor}} or "arrow", for routers that start from vectors.
        missing: what an expert's part becomes at a linear that it does not adapt: "mask", it cannot
            be chosen there; "renorm", the others' gates grow to the same sum; "zero", it is lost;
            "error". By default "mask", and "zero" where several linears share a decision.
        trainable: experts that start from their adapter and are trained on.
        new: names of further experts on every linear, which start at 0 and are trained; or names
            with their `rank` and `alpha`.
        seed: starts what is trained.
        options: further fields of `MixtureConfig`: losses, dtype, backend …

    Raises:
        ConfigError: names, routers and settings that cannot be.
        AttachError: experts that do not fit the model; it is then as it was.
    """
    given = {"kind": router} if isinstance(router, str) else dict(router)
    vectors: Vectors | str | None = given.pop("vectors", None)
    experts = for_stacks(model, experts)
    config = composed_config(
        experts, router=given, missing=missing, trainable=trainable, new=new, **options
    )
    if vectors == "arrow" and experts.parameters:
        raise ConfigError(
            f"router.vectors='arrow': experts adapt {experts.parameters[0]}, where an expert has "
            "one direction for each of the base's weights, and so none to start a router from. "
            "Leave vectors out."
        )
    brought = {name: _parts(adapter) for name, adapter in experts.adapters.items()}
    mixture = attach_with(model, config, seed=seed, brought=brought)
    try:
        mixture.refresh()
        form = config.groups[0].expert
        assert isinstance(form, Imported)
        fill_routers(mixture, form.names, vectors)
    except BaseException:
        mixture.detach()
        raise
    for note in (*experts.notes, *_notes_on_base(model, experts)):
        warnings.warn(note, stacklevel=2)
    return mixture


def composed_config(
    experts: FrozenExperts,
    *,
    router: str | Mapping[str, Any] = "arrow",
    missing: Missing | None = None,
    trainable: Sequence[str] = (),
    new: Mapping[str, Mapping[str, float]] | Sequence[str] = (),
    **options: Any,
) -> MixtureConfig:
    """The configuration of `compose`, with the same arguments and errors."""
    new = new if isinstance(new, Mapping) else {name: {} for name in new}
    names = [*experts.names, *new]
    for name in trainable:
        if name not in experts.names:
            raise ConfigError(f"trainable: {unknown_name('expert', name, list(experts.names))}")
    kind, fields = recipe(names, router)
    losses = options.pop("losses", fields.pop("losses", ()))
    dropout = options.pop("dropout", 0.0)
    form = {
        "kind": "imported",
        "experts": [
            *(_described(n, a, n in trainable) for n, a in experts.adapters.items()),
            *(_new_expert(name, experts, settings) for name, settings in new.items()),
        ],
        "stacked": _stacked(experts),
        "missing": _policy(missing, fields, experts),
        "dropout": {"p": dropout},
    }
    group = {
        "targets": [*experts.modules, *experts.parameters],
        "num_experts": len(names),
        "expert": form,
        **fields,
    }
    config = MixtureConfig.parse({"method": kind, "groups": [group], "losses": losses, **options})
    check_stacked(config.groups[0])
    learned = isinstance(
        config.groups[0].router, LinearRouter | ExpertOutputs | XLoRA | Given | Fixed
    )
    if (trainable or new) and not learned:
        raise ConfigError(
            f"router {kind} is made from the experts' factors as they are, so that experts that "
            "are trained would outgrow it. Use a learned router, or fixed weights."
        )
    return config


def _described(name: str, adapter: Adapter, trained: bool) -> dict[str, Any]:
    modules = adapter.modules.values()
    parts = [part for p in _parts(adapter).values() for part in (p.lora_A, p.lora_B)]
    parts += [part for m in modules for part in (m.bias, m.magnitude) if part is not None]
    dtypes = {part.dtype for part in parts}
    # the only type that holds every value of two different ones
    dtype = str(dtypes.pop()).removeprefix("torch.") if len(dtypes) == 1 else "float32"
    has_magnitude = any(m.magnitude is not None for m in modules)
    has_bias = any(m.bias is not None for m in modules)
    if trained and (has_magnitude or has_bias):
        raise ConfigError(
            f"trainable: {name} has {'a magnitude (DoRA)' if has_magnitude else 'biases'}, which "
            "stay as they are. Keep it frozen, or leave it out."
        )
    return {
        "name": name,
        "modules": {path: (p.rank, p.scaling) for path, p in _parts(adapter).items()},
        "dtype": dtype,
        "trainable": trained,
        "has_bias": has_bias,
        "has_magnitude": has_magnitude,
        "invocation_tokens": adapter.invocation_tokens,
        "base": adapter.base,
        "revision": adapter.revision,
        "sha256": adapter.sha256,
    }


def _parts(adapter: Adapter) -> dict[str, AdapterModule | ExpertParameter]:
    return {**adapter.modules, **adapter.parameters}


def _stacked(experts: FrozenExperts) -> dict[str, int]:
    """Stacked parameters that experts adapt → the number of weights in each."""
    every = [adapter.parameters for adapter in experts.adapters.values()]
    return {path: p.num_experts for parameters in every for path, p in parameters.items()}


def _new_expert(name: str, experts: FrozenExperts, settings: Mapping[str, float]) -> dict[str, Any]:
    if name in experts.names or not NAME.fullmatch(name):
        raise ConfigError(
            f"new: an expert cannot be called {name[:80]!a}. Give up to 64 letters, digits, '_' "
            "and '-' that no other expert has."
        )
    for key in settings:
        if key not in NEW:
            raise ConfigError(f"new.{name}: {unknown_name('setting', key, NEW)}")
    rank, alpha = ({**NEW, **settings}[key] for key in ("rank", "alpha"))
    if rank != int(rank) or rank < 1 or not 0 < alpha < math.inf:
        raise ConfigError(
            f"new.{name}: rank={rank}, alpha={alpha}; a rank is an integer from 1 on, alpha "
            "positive and finite."
        )
    if not experts.modules:
        raise ConfigError(
            f"new: {name} would go on linears, but the others adapt stacked weights of the base "
            "alone, on which experts stay frozen. Leave it out."
        )
    modules = {path: (int(rank), alpha / rank) for path in experts.modules}
    return {"name": name, "modules": modules, "trainable": True}


def _policy(missing: Missing | None, fields: Mapping[str, Any], experts: FrozenExperts) -> str:
    if missing == "error":
        for name, adapter in experts.adapters.items():
            every = [*experts.modules, *experts.parameters]
            lacking = [path for path in every if path not in _parts(adapter)]
            if lacking:
                more = f" and {len(lacking) - 1} more linears or parameters"
                raise ConfigError(
                    f"expert {name} does not adapt {lacking[0]}"
                    f"{more if len(lacking) > 1 else ''}. Leave it out, or choose missing='mask', "
                    "'renorm' or 'zero'."
                )
        return "mask"
    weights = fields["router"].get("weights", ())
    if missing == "renorm" and any(weight < 0 for weight in weights):
        raise ConfigError(
            "missing='renorm' makes gates grow to the sum that all have, which means nothing with "
            f"a negative weight ({min(weights)}). Use 'zero'."
        )
    shared = fields.get("site", {}).get("scope", "linear") != "linear"
    return missing or ("zero" if shared else "mask")


def _notes_on_base(model: nn.Module, experts: FrozenExperts) -> tuple[str, ...]:
    """What names and norms tell about experts and this base."""
    config: Any = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", None) or None
    notes = other_bases(experts, name=name, revision=getattr(config, "_commit_hash", None))
    norms = {path: _weight_norm(model, path) for path in (*experts.modules, *experts.parameters)}
    known = {path: norm for path, norm in norms.items() if norm is not None}
    if len(known) < len(norms):  # quantised, divided or not there yet
        return notes
    return (*notes, *relative_norms(experts, known).notes)


@torch.no_grad()
def _weight_norm(model: nn.Module, path: str) -> float | None:
    """‖W‖ of a linear or of stacked weights; None where the values are not there to read."""
    owner = model.get_submodule(path.rpartition(".")[0])
    found = getattr(owner, path.rpartition(".")[2])
    weight: Any = found.weight if isinstance(found, nn.Module) else found
    # ZeRO-3 leaves nothing in a parameter that it divides
    if weight.is_meta or weight.numel() == 0 or not weight.is_floating_point():
        return None
    wide = torch.promote_types(weight.dtype, torch.float32)  # a base may be in float64
    return float(torch.linalg.vector_norm(weight, dtype=wide))
