"""What routers over frozen experts are made of, put into the routers of a mixture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from molora.attach import Mixture
from molora.compose.lowrank import low_rank_svd, prototype, spectral_factor
from molora.config import Group, LinearRouter, LinearSite, Projection, Prototype, UpdateNorm
from molora.config.base import unknown_name
from molora.errors import ConfigError
from molora.experts import ExpertBank

Vectors = Mapping[str, Mapping[str, Tensor]]
"""Expert → linear, or owner of a router that several share → (in,) vector."""


@torch.no_grad()
def fill_routers(
    mixture: Mixture, names: Sequence[str], vectors: Vectors | str | None = None
) -> None:
    """Give the routers of a composed mixture the directions that they compare inputs with.

    Args:
        mixture: composed; its banks hold the experts' factors.
        names: the experts in order.
        vectors: those that are given, or "arrow" for a linear router that starts from the experts'
            own directions.

    Raises:
        ConfigError: vectors where the router takes none, needs them, or that do not fit.
    """
    for placement in mixture.plan.placements:
        bank, group = mixture.built.banks[placement.path], placement.group
        _check_vectors(group, names, vectors)
        owner = mixture.built.routed_by.get(placement.path, placement.path)
        if owner != placement.path:
            _fill_shared(mixture.built.sites[owner].router, owner, names, vectors)
            continue
        if owner not in mixture.built.sites:
            continue
        router: Any = mixture.built.sites[owner].router
        match group.router:
            case Projection():
                router.weight.copy_(_directions(bank, placement.num_experts))
            case UpdateNorm(relative=relative, preselect=preselect):
                router.factor.copy_(_factors(bank, placement.num_experts, placement.rank, relative))
                if preselect is not None:
                    router.weight.copy_(_directions(bank, placement.num_experts))
            case Prototype(similarity=similarity):
                assert isinstance(vectors, Mapping)
                given_ED = _given(vectors, names, placement.path, placement.in_features, bank)
                router.weight.copy_(_normalised(given_ED, similarity))
            case LinearRouter() if vectors == "arrow":
                router.weight.copy_(_directions(bank, placement.num_experts))
            case LinearRouter() if isinstance(vectors, Mapping):
                router.weight.copy_(
                    _given(vectors, names, placement.path, placement.in_features, bank)
                )


def _fill_shared(
    router: Any, owner: str, names: Sequence[str], vectors: Vectors | str | None
) -> None:
    """A learned router of several linears starts from one vector per expert and owner."""
    if isinstance(vectors, Mapping):
        router.weight.copy_(_given(vectors, names, owner, router.in_features, None))


def _check_vectors(group: Group, names: Sequence[str], vectors: Vectors | str | None) -> None:
    kind = group.router
    if isinstance(vectors, str) and vectors != "arrow":
        raise ConfigError(f"router.vectors={vectors!r}: give vectors by expert and linear.")
    takes = isinstance(kind, LinearRouter | Prototype)
    if vectors is not None and not takes:
        raise ConfigError(
            f"router.vectors: a router of kind {kind.kind!r} takes none; its own come from the "
            "experts' factors."
        )
    scope = group.site.scope if isinstance(group.site, LinearSite) else "block"
    if scope != "linear" and vectors == "arrow":
        raise ConfigError(
            "router.vectors='arrow': these directions are as wide as the input of each linear, but "
            f"scope={scope!r} has one router for several. Use scope='linear'."
        )
    for name in vectors if isinstance(vectors, Mapping) else ():
        if name not in names:
            raise ConfigError(f"router.vectors: {unknown_name('expert', str(name), list(names))}")
    if isinstance(kind, Prototype) and not isinstance(vectors, Mapping):
        raise ConfigError(
            "this router needs `vectors`: expert → linear → (in,) vector, trained or collected on "
            "the expert's own data."
        )


def columns_of(bank: ExpertBank, num_experts: int) -> list[list[int]]:
    """For each block of a bank the numbers of its experts in routing decisions."""
    every = list(range(num_experts)) if bank.columns is None else bank.columns.tolist()
    sizes = [block.size for block in bank.blocks()]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [every[start : start + size] for start, size in zip(starts, sizes, strict=True)]


def _directions(bank: ExpertBank, num_experts: int) -> Tensor:
    """(E, in): the first right-singular vector of each update; 0 of none or of an update of 0."""
    found_ED = bank.lora_A.new_zeros(num_experts, bank.lora_A.shape[2], dtype=torch.float32)
    for block, columns in zip(bank.blocks(), columns_of(bank, num_experts), strict=True):
        svd = low_rank_svd(block.lora_A.detach(), _effective_B(block), block.scaling)
        found_ED[columns] = (prototype(svd) * (svd.S[:, :1] > 0)).float()
    return found_ED


def _factors(bank: ExpertBank, num_experts: int, rank: int, relative: bool) -> Tensor:
    """(E, R, in): S Vᵀ of each update, divided by ‖S‖ if `relative`; 0 of none."""
    width = bank.lora_A.shape[2]
    found_ERD = bank.lora_A.new_zeros(num_experts, rank, width, dtype=torch.float32)
    for block, columns in zip(bank.blocks(), columns_of(bank, num_experts), strict=True):
        svd = low_rank_svd(block.lora_A.detach(), _effective_B(block), block.scaling)
        factor = spectral_factor(svd)
        if relative:
            norm = svd.S.norm(dim=-1)[:, None, None]
            factor = factor / norm.clamp_min(torch.finfo(norm.dtype).tiny)
        found_ERD[columns, : factor.shape[1]] = factor.float()
    return found_ERD


def _effective_B(block: ExpertBank) -> Tensor:
    lora_B = block.lora_B.detach()
    return lora_B if block.row_scale is None else lora_B * block.row_scale[:, :, None]


def _given(
    vectors: Vectors, names: Sequence[str], path: str, in_features: int, bank: ExpertBank | None
) -> Tensor:
    """(E, in); 0 for experts that lack the linear of the bank, if there is one."""
    rows = torch.zeros(len(names), in_features)
    present = set(range(len(names)))
    if bank is not None:
        present = {c for columns in columns_of(bank, len(names)) for c in columns}
    for number, name in enumerate(names):
        if number not in present:
            continue
        vector = vectors.get(name, {}).get(path)
        if vector is None or tuple(vector.shape) != (in_features,):
            found = "none" if vector is None else f"one of shape {tuple(vector.shape)}"
            raise ConfigError(
                f"router.vectors has {found} for expert {name!r} at {path}; it needs ({in_features}"
                ",)."
            )
        if not bool(torch.isfinite(vector).all()):
            raise ConfigError(f"router.vectors of {name!r} at {path} hold NaN or infinity.")
        rows[number] = vector
    return rows


def _normalised(given_ED: Tensor, similarity: str) -> Tensor:
    """So that a product with the input, read as the similarity asks, is the logit."""
    if similarity == "layer_norm":
        width = given_ED.shape[-1]
        return torch.nn.functional.layer_norm(given_ED, (width,)) / math.sqrt(width)
    unit_ED = torch.nn.functional.normalize(given_ED, dim=-1)
    return unit_ED if similarity == "cosine" else unit_ED / math.sqrt(given_ED.shape[-1])
