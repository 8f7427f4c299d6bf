"""Saved compositions as what others read: LoRA directories of package peft, and plain models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from molora import io
from molora.attach import Mixture, load
from molora.attach.families import in_out_features
from molora.attach.row_scale import bias_at_zero
from molora.compose.edit import experts_of, imported_form, saved_experts
from molora.compose.experts import FrozenExperts
from molora.compose.merging import Merged, merge
from molora.compose.servable import Servable, linear_shapes, write_servable
from molora.config import Dense, Fixed, Identity, Imported, MixtureConfig
from molora.errors import CheckpointError, ConfigError
from molora.io.peft_write import check_free, put_directory, write_adapters

CLOSE = 1e-4
"""Largest ‖difference‖ / ‖logits‖ between a mixture and its merged model, both in float32."""
ROWS, LENGTH = 4, 32
"""Random tokens on which logits are compared."""


def export_each(directory: Path, out: Path, *, model: nn.Module | None = None) -> FrozenExperts:
    """Every expert of a saved composition as a LoRA directory of package peft, called by its name.

    Read again, each has the bytes and scalings that it had.

    Args:
        directory: the saved mixture.
        out: must not exist, or be empty; complete or not there.
        model: the base, or its skeleton on the meta device, which says how weights lie.

    Raises:
        CheckpointError: a mixture that is damaged, a place that is in use.
        ConfigError: experts that were not imported, or names that package peft cannot save.
    """
    experts = for_base(saved_experts(directory), io.read_manifest(directory).base.name, model)
    check_free(out)
    _put(out, lambda partial: write_adapters(partial, experts.adapters))
    return experts


def export_one(
    directory: Path,
    out: Path,
    *,
    model: nn.Module | None = None,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> tuple[Merged, Servable]:
    """A composition with fixed weights as one LoRA that servers load.

    Args:
        directory, out, model: as in `export_each`; with the model, sizes of linears that servers
            expect and no expert adapts are known.
        dtype: of the factors.
        options: `method`, `rank` and others of `molora.compose.merging.merge`.

    Raises:
        CheckpointError: as in `export_each`.
        ConfigError: a router that decides by what it reads, experts that are no sum of factors, a
            rank that servers do not have.
    """
    manifest = io.read_manifest(directory)
    weights = static_weights(manifest.mixture)
    missing = "renorm" if imported_form(manifest.mixture).missing == "renorm" else "zero"
    experts = for_base(saved_experts(directory), manifest.base.name, model)
    merged = merge(experts, weights, missing=missing, **options)  # type: ignore[arg-type]
    made = write_servable(
        out,
        merged.modules,
        base=merged.base or manifest.base.name,
        revision=merged.revision,
        fan_in_fan_out=merged.fan_in_fan_out,
        shapes=None if model is None else linear_shapes(model),
        dtype=dtype,
    )
    return merged, made


@dataclass(frozen=True)
class MergedModel:
    """What merging a composition into its base came to.

    Attributes:
        linears: how many weights changed, a parameter of stacked weights counted as one.
        difference: ‖logits − the mixture's‖ / ‖logits‖ on random tokens, in float32.
        rounding: the same of the model in the type in which it was written.
        dtype: that type.
    """

    linears: int
    difference: float
    rounding: float
    dtype: torch.dtype


def export_merged(
    model: nn.Module,
    directory: Path,
    out: Path,
    *,
    tokenizer: Any = None,
    dtype: torch.dtype = torch.float32,
) -> MergedModel:
    """A composition with fixed weights as a plain model, after its logits were compared.

    Args:
        model: the base in float32; it becomes the merged model, in `dtype`.
        directory, out: as in `export_each`.
        tokenizer: written beside the model.
        dtype: in which the model is written.

    Raises:
        CheckpointError: as in `export_each`, a base with quantised weights, or logits that differ;
            nothing is written then.
        ConfigError: a router that decides by what it reads, or biases of experts where the base
            has none.
    """
    weights = static_weights(io.read_manifest(directory).mixture)
    check_free(out)
    parameters = dict(model.named_parameters())
    other = next((n for n, p in parameters.items() if p.dtype != torch.float32), None)
    if other is not None:
        raise CheckpointError(
            f"{other} of the base is {parameters[other].dtype}; a model is merged in float32. Load "
            "the base in float32, and one that is quantised from its unquantised weights."
        )
    mixture = load(model.eval(), directory)
    try:
        expected = random_logits(model)
        stacked = stacked_updates(mixture, weights)
        paths = [path for path in mixture.built.banks if path not in stacked]
        changed = {path: merged_weight(model.get_submodule(path), path) for path in paths}
    finally:
        mixture.detach()
    _put_weights(model, changed)
    _add_stacked(model, stacked)
    difference = _apart(random_logits(model), expected)
    if not difference <= CLOSE:
        raise CheckpointError(
            f"the merged model's logits differ from the mixture's by {difference:.1e} of their "
            f"norm, at most {CLOSE:g} is rounding. Nothing was written."
        )
    model.to(dtype)
    rounding = _apart(random_logits(model).float(), expected)

    def write(partial: Path) -> None:
        saved: Any = model
        saved.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)

    _put(out, write)
    return MergedModel(len(changed) + len(stacked), difference, rounding, dtype)


def static_weights(config: MixtureConfig) -> dict[str, float]:
    """The weight of each expert in a composition that does not depend on what is read.

    Raises:
        ConfigError: another composition.
    """
    form, group = imported_form(config), config.groups[0]
    router = group.router
    if not isinstance(router, Fixed):
        raise ConfigError(
            f"the router ({config.method!r}) chooses experts by what it reads, so that no one "
            "matrix does what the mixture does: it cannot be merged. Export the experts one by one "
            "(peft-each), or compose with router 'fixed' or 'uniform'."
        )
    plain = isinstance(group.score, Identity) and isinstance(group.select, Dense)
    if not plain or getattr(group.site, "scope", None) != "linear":
        raise ConfigError(
            "the weights are scored or selected after they are given. Compose with router 'fixed' "
            "and the weights that come out of it."
        )
    _check_always_acts(form)
    weights = zip(form.names, router.weights, strict=True)
    return {name: weight * group.gate_scale for name, weight in weights}


def _check_always_acts(form: Imported) -> None:
    for expert in form.experts:
        if expert.invocation_tokens is not None:
            raise ConfigError(
                f"{expert.name} acts only after its invocation tokens, which no fixed weight does. "
                "Drop it first (molora compose --from … --drop)."
            )


def for_base(experts: FrozenExperts, base: str, model: nn.Module | None) -> FrozenExperts:
    """Experts with the base named where they do not say it, and how its weights lie."""
    modules = dict(model.named_modules()) if model is not None else {}
    adapters = {
        name: replace(
            adapter,
            base=adapter.base or base,
            fan_in_fan_out=any(isinstance(modules.get(path), Conv1D) for path in adapter.modules),
        )
        for name, adapter in experts.adapters.items()
    }
    return FrozenExperts(MappingProxyType(adapters), experts.notes)


# ---------------------------------------------------------------------------- merging into a base


@torch.no_grad()
def merged_weight(linear: nn.Module, path: str) -> tuple[Tensor, Tensor | None]:
    """(out, in) and (out,): the linear map that an adapted linear is, and what it adds to every
    row; None if nothing. It is asked for the unit vectors and for 0, so that whatever experts do
    is in it."""
    in_features, _ = in_out_features(linear)
    bias = linear._parameters.get("bias")
    x_ND = torch.eye(in_features + 1, in_features)  # the last row is 0
    with bias_at_zero(linear):
        y_NF: Tensor = linear(x_ND)
    added_F = y_NF[-1]
    if not bool(added_F.any()):
        return y_NF[:-1].T.contiguous(), None
    if bias is None:
        raise ConfigError(
            f"experts add a bias at {path} (lora_bias), where the base has none: a merged model "
            "would need another configuration. Export with --to peft-each instead."
        )
    return (y_NF[:-1] - added_F).T.contiguous(), added_F


@torch.no_grad()
def stacked_updates(mixture: Mixture, weights: Mapping[str, float]) -> dict[str, Tensor]:
    """Parameter of stacked weights → (M, out, in): what the experts add to its M weights."""
    form, found = imported_form(mixture.config), dict[str, Tensor]()
    adapters = experts_of(mixture).adapters
    for path in form.stacked:
        parts = {name: a.parameters[path] for name, a in adapters.items() if path in a.parameters}
        present = sum(weights[name] for name in parts)
        grown = sum(weights.values()) / present if form.missing == "renorm" and present else 1.0
        found[path] = sum(
            (
                weights[name] * grown * part.scaling * part.lora_B.float() @ part.lora_A.float()
                for name, part in parts.items()
            ),
            start=torch.zeros(()),
        )
    return found


@torch.no_grad()
def _add_stacked(model: nn.Module, updates: Mapping[str, Tensor]) -> None:
    for path, update_MFD in updates.items():
        module: Any = model.get_submodule(path.rpartition(".")[0])
        added = update_MFD.mT if module.is_transposed else update_MFD
        model.get_parameter(path).add_(added)


@torch.no_grad()
def _put_weights(model: nn.Module, changed: Mapping[str, tuple[Tensor, Tensor | None]]) -> None:
    for path, (weight_FD, added_F) in changed.items():
        linear = model.get_submodule(path)
        own = linear.get_parameter("weight")
        own.copy_(weight_FD.T if isinstance(linear, Conv1D) else weight_FD)
        if added_F is not None:
            linear.get_parameter("bias").add_(added_F)


@torch.no_grad()
def random_logits(model: nn.Module) -> Tensor:
    """(B, S, V): of tokens that are the same every time."""
    config: Any = model.config
    source = torch.Generator().manual_seed(0)
    size = config.get_text_config().vocab_size
    ids = torch.randint(0, size, (ROWS, LENGTH), generator=source)
    device = next(model.parameters()).device
    found: Tensor = model(input_ids=ids.to(device), use_cache=False).logits
    return found


def _apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def _put(out: Path, write: Any) -> None:
    try:
        put_directory(out, write)
    except OSError as error:
        raise CheckpointError(f"{out} cannot be written: {error}. Nothing is left there.") from None
