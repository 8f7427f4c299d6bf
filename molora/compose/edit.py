"""Experts out of a mixture of them, and the mixture with others in their place."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor

from molora import io
from molora.attach import Mixture
from molora.attach.banks import blocks_of
from molora.compose.compose import Missing, compose, composed_config
from molora.compose.experts import FrozenExperts
from molora.compose.kept_routers import given_vectors, groups_of_routers, keep_learnt
from molora.compose.single_experts import for_stacks
from molora.config import (
    Imported,
    ImportedExpert,
    MixtureConfig,
    UnitTop1,
)
from molora.config.base import unknown_name
from molora.errors import ConfigError
from molora.io.adapter import Adapter, AdapterModule, ExpertParameter
from molora.io.peft_values import update_norm
from molora.presets.frozen import ROUTERS

Part = TypeVar("Part")


def experts_of(mixture: Mixture) -> FrozenExperts:
    """The experts of a composed mixture, the factors bit for bit.

    They are views: what is trained afterwards changes in them too.

    Raises:
        ConfigError: experts that were not imported.
    """
    return _experts(mixture.config, mixture.state_dict(), Path("mixture"))


def saved_experts(directory: str | Path) -> FrozenExperts:
    """The experts of a saved composed mixture, mapped from its file; no model is needed.

    Raises:
        CheckpointError: as `molora.io.read_tensors`.
        ConfigError: experts that were not imported.
    """
    manifest = io.read_manifest(Path(directory))
    tensors = io.read_tensors(Path(directory), manifest)
    return _experts(manifest.mixture, tensors, Path(directory))


def imported_form(config: MixtureConfig) -> Imported:
    """What the configuration says of a composed mixture's experts.

    Raises:
        ConfigError: experts that were not imported.
    """
    form = config.groups[0].expert
    if len(config.groups) != 1 or not isinstance(form, Imported):
        raise ConfigError(
            f"the mixture (method {config.method!r}) holds no experts that were trained elsewhere; "
            "its own belong to its routers. Only mixtures that `compose` made can be taken apart."
        )
    return form


def edited(
    mixture: Mixture,
    *,
    add: FrozenExperts | None = None,
    drop: Sequence[str] = (),
    router: str | Mapping[str, Any] | None = None,
    missing: Missing | None = None,
    trainable: Sequence[str] = (),
    new: Mapping[str, Mapping[str, float]] | Sequence[str] = (),
    seed: int = 0,
    **options: Any,
) -> Mixture:
    """The mixture without some experts and with others, on the same model.

    Experts that stay have the factors that they had, bit for bit, and are frozen unless `trainable`
    names them. Routers made from factors are made again. Learned routers of the same kind and size
    keep what they have learnt of experts that stay; a new expert's part starts as in `compose`.

    Args:
        mixture: composed; it is detached, and of no use afterwards, once the new configuration is
            known to be possible.
        add: further experts.
        drop: names of experts that go.
        router: as in `compose`; the one that is there if not given, over as many experts as before
            if there are so many; arguments without `kind` change it. Fixed weights must be given
            for experts that are added. Losses stay with a router of the same kind.
        missing: as in `compose`; as it was if not given.
        trainable, new, seed: as in `compose`.
        options: fields of `MixtureConfig` that change; others stay.

    Raises:
        ConfigError: experts, routers and settings that cannot be.
        AttachError: added experts that do not fit the model.
    """
    form, config = imported_form(mixture.config), mixture.config
    if config.train_modules or config.train_tokens:
        raise ConfigError(
            "the mixture has trained modules or token rows of the base beside its experts, which "
            "only it can keep. Compose anew from its experts: `experts_of`."
        )
    added = None if add is None else for_stacks(mixture.model, add)
    experts = _joined(experts_of(mixture), added, drop)
    recipe = _recipe(config, router, [*experts.names, *new])
    kept = {name: getattr(config, name) for name in _kept(config, router) if name not in options}
    options = kept | {"dropout": form.dropout.p} | options
    settings: dict[str, Any] = {
        "missing": missing or form.missing,
        "trainable": trainable,
        "new": new,
        **options,
    }
    anew = "vectors" in recipe
    if not anew and recipe["kind"] == config.method:
        recipe |= given_vectors(mixture, form.names, [*experts.names, *new])
    own = {name: value for name, value in recipe.items() if name != "vectors"}
    composed_config(experts, router=own, **settings)
    state, old = mixture.state_dict(), groups_of_routers(mixture)
    mixture.detach()
    made = compose(mixture.model, experts, router=recipe, seed=seed, **settings)
    if _size(made.config) == _size(config) and not anew:
        keep_learnt(made, state, old, form.names, experts=imported_form(made.config).names)
    return made


OF_LOSSES = ("label_loss", "balance")
"""Arguments of routers that say their auxiliary losses."""


def _kept(config: MixtureConfig, router: str | Mapping[str, Any] | None) -> list[str]:
    """Fields of the mixture that stay; losses with a router of the same kind."""
    given = {"kind": router} if isinstance(router, str) else dict(router or {})
    same = given.get("kind", config.method) == config.method
    losses = ["losses"] if same and not any(name in given for name in OF_LOSSES) else []
    return [*losses, "dtype", "backend", "share_products"]


def _recipe(
    config: MixtureConfig, router: str | Mapping[str, Any] | None, names: Sequence[str]
) -> dict[str, Any]:
    if isinstance(router, str):
        return {"kind": router}
    given = dict(router or {})
    if "kind" in given:
        return given
    replaced = [key for key in ("weights",) if key in given]
    return recovered(config, names, without=replaced) | given


def _size(config: MixtureConfig) -> tuple[Any, ...]:
    """What the shapes of a learned router hang on, the number of its experts aside."""
    group = config.groups[0]
    names = ("kind", "bias", "layerwise", "depth", "width", "dropout", "similarity")
    return (group.site, *(getattr(group.router, name, None) for name in names))


def recovered(
    config: MixtureConfig, names: Sequence[str], *, without: Sequence[str] = ()
) -> dict[str, Any]:
    """The router of a composed mixture as `compose` takes it, for these experts; arguments
    `without` are left out.

    Raises:
        ConfigError: a router that no recipe makes, or fixed weights that lack some of the experts.
    """
    group, kind = config.groups[0], config.method
    if kind not in ROUTERS:
        raise ConfigError(f"no recipe makes the router of {kind!r}. Say which router it is to be.")
    found: dict[str, Any] = {"scope": getattr(group.site, "scope", None)}
    for part in (group.router, group.select):
        found |= {name: getattr(part, name) for name in type(part).model_fields}
    k = getattr(group.select, "k", None)
    found["top_k"] = "all" if k is None else min(k.value, len(names))
    if isinstance(group.select, UnitTop1):
        found["top_k"] = 1
    found |= {"gate_scale": group.gate_scale, "softmax": group.score.kind == "softmax"}
    found["softmax_top_k"] = getattr(group.select, "softmax", False)
    if found.get("preselect") == len(imported_form(config).names):
        del found["preselect"]  # of all experts, which the default is too
    if kind in ("xlora", "given"):
        found |= _as_for_all(found, len(imported_form(config).names))
    if kind == "fixed" and "weights" not in without:
        weights = dict(zip(imported_form(config).names, group.router.weights, strict=True))  # type: ignore[union-attr]
        lacking = [name for name in names if name not in weights]
        if lacking:
            raise ConfigError(
                f"the fixed weights say nothing of {', '.join(lacking)}. Give the router with "
                "weights for all experts."
            )
        found["weights"] = {name: weights[name] for name in names}
    parameters = inspect.signature(ROUTERS[kind]).parameters.values()
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    return {
        "kind": kind,
        **{name: found[name] for name in known if name in found and name not in without},
    }


def _as_for_all(found: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Numbers that stood for all `count` experts as None, which stands for all of any number."""
    whole = {"top_k": ("all", count), "first_pass_score": (1 / count,)}
    return {
        key: None if found.get(key) in values else found.get(key) for key, values in whole.items()
    }


# ------------------------------------------------------------------------------------- experts


def _experts(config: MixtureConfig, tensors: Mapping[str, Tensor], source: Path) -> FrozenExperts:
    form = imported_form(config)
    modules: dict[str, dict[str, AdapterModule]] = {name: {} for name in form.names}
    parameters: dict[str, dict[str, ExpertParameter]] = {name: {} for name in form.names}
    for path in config.groups[0].targets:
        for block, columns in enumerate(blocks_of(form, path)):
            prefix = f"{path}.experts.{f'{block}.' if block else ''}"
            for row, column in enumerate(columns):
                expert = form.experts[column]
                if path in form.stacked:
                    parameter = _parameter(expert, path, tensors, prefix, row, form.stacked[path])
                    parameters[expert.name][path] = parameter
                else:
                    modules[expert.name][path] = _module(expert, path, tensors, prefix, row)
    adapters = {
        expert.name: Adapter(
            source=source,
            # in the order in which the adapter had them
            modules=_in_order(modules[expert.name], expert),
            base=expert.base,
            revision=expert.revision,
            fan_in_fan_out=False,
            sha256=_hash(expert, modules[expert.name]),
            notes=(),
            invocation_tokens=expert.invocation_tokens,
            parameters=_in_order(parameters[expert.name], expert),
        )
        for expert in form.experts
    }
    return FrozenExperts(MappingProxyType(adapters), ())


def _in_order(parts: Mapping[str, Part], expert: ImportedExpert) -> Mapping[str, Part]:
    return MappingProxyType({path: parts[path] for path in expert.modules if path in parts})


def _module(
    expert: ImportedExpert, path: str, tensors: Mapping[str, Tensor], prefix: str, row: int
) -> AdapterModule:
    def part(name: str) -> Tensor:
        return tensors[f"{prefix}{name}"][row]

    lora_A, lora_B, scaling = part("lora_A"), part("lora_B"), expert.modules[path][1]
    return AdapterModule(
        lora_A,
        lora_B,
        scaling,
        update_norm(lora_A, lora_B, scaling),
        bias=part("bias") if expert.has_bias else None,
        magnitude=part("magnitude") if expert.has_magnitude else None,
    )


def _parameter(
    expert: ImportedExpert,
    path: str,
    tensors: Mapping[str, Tensor],
    prefix: str,
    row: int,
    each: int,
) -> ExpertParameter:
    own = slice(row * each, (row + 1) * each)
    lora_A, lora_B = (tensors[f"{prefix}{name}"][own] for name in ("lora_A", "lora_B"))
    scaling = expert.modules[path][1]
    return ExpertParameter(lora_A, lora_B, scaling, update_norm(lora_A, lora_B, scaling))


def _hash(expert: ImportedExpert, modules: Mapping[str, AdapterModule]) -> str:
    """Of the file that frozen factors came from; of the factors themselves if they were trained."""
    if expert.sha256 is not None and not expert.trainable:
        return expert.sha256
    digest = hashlib.sha256()
    for path, module in modules.items():
        for tensor in (module.lora_A, module.lora_B):
            digest.update(path.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _joined(own: FrozenExperts, add: FrozenExperts | None, drop: Sequence[str]) -> FrozenExperts:
    for name in drop:
        if name not in own.adapters:
            raise ConfigError(f"drop: {unknown_name('expert', name, list(own.names))}")
    staying = {name: adapter for name, adapter in own.adapters.items() if name not in drop}
    added = {} if add is None else dict(add.adapters)
    for name in added:
        if name in staying:
            raise ConfigError(
                f"an expert is called {name!r} already. Give the other one another name, or drop "
                "the first."
            )
    if not staying and not added:
        raise ConfigError("every expert is dropped and none added. Keep one.")
    notes = () if add is None else add.notes
    return FrozenExperts(MappingProxyType(staying | added), notes)
