"""A set of experts merged with fixed weights: one LoRA, and how far it is from their sum."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from molora.compose.experts import FrozenExperts
from molora.compose.merging.elementwise import MajoritySign
from molora.compose.merging.factors import update_norm
from molora.compose.merging.kinds import check_fixed_update
from molora.compose.merging.methods import (
    METHODS,
    TAKES_DENSITY,
    TAKES_RANK,
    TAKES_SEED,
    TAKES_SIGN,
    Combined,
    Options,
    combine,
)
from molora.errors import ConfigError
from molora.io.peft_adapter import AdapterModule
from molora.io.peft_keys import examples

Missing = Literal["zero", "renorm", "error"]


@dataclass(frozen=True, eq=False)
class Merged:
    """One LoRA in the place of several: y += B A x + bias at each module, all scalings 1.

    Attributes:
        modules: by the module's name, of the union of the experts' modules.
        residuals: module → ‖result − Σ w ΔW‖ / ‖Σ w ΔW‖ (Frobenius norm), 0 for `cat`.
        method: of `METHODS`.
        weights: by the expert's name.
        base: as the experts call it; None where they differ or do not say.
        revision: likewise.
        fan_in_fan_out: the base's adapted weights are (in, out).
        notes: what the caller should know of the result.
    """

    modules: Mapping[str, AdapterModule]
    residuals: Mapping[str, float]
    method: str
    weights: Mapping[str, float]
    base: str | None
    revision: str | None
    fan_in_fan_out: bool
    notes: tuple[str, ...]


def merge(
    experts: FrozenExperts,
    weights: Mapping[str, float] | None = None,
    *,
    method: str = "cat",
    rank: int | None = None,
    density: float | None = None,
    majority_sign: MajoritySign | None = None,
    seed: int | None = None,
    missing: Missing = "zero",
) -> Merged:
    """Σ w_e ΔW_e as one LoRA, exactly (`cat`) or as another method has it.

    Semantics of the methods with names of package peft are those of 0.21.2's
    `add_weighted_adapter`, but for two faults: a bias beside lora_B is combined too instead of
    dropped, and the result has scaling 1 where the experts use rsLoRA, instead of √rank. One
    expert alone is merged by the method that is asked for, too, where peft takes `linear`.

    Args:
        experts: not changed.
        weights: name → number; who is not named takes no part. By default 1 / E each.
        method: of `METHODS`. `cat` keeps all ranks and is exact; `svd` is its best approximation of
            a rank; `…_svd` combine dense updates, all of one module in memory at once, and
            approximate; the others combine factors, which must be of one rank, and so hold products
            of different experts. `factor` is LoraHub's and mttl's combination, `lego` LoRA-LEGO.
        rank: of the result, for `svd`, `…_svd` and `lego`; by default the largest of the experts.
        density: fraction of values that ties, dare and magnitude_prune keep; they need it.
        majority_sign: for ties: "total" (default) or "frequency".
        seed: for dare and lego, by default 0. The draws of a module do not depend on others.
        missing: what an expert without a module means there: "zero", nothing is added, and ties do
            not count it; "renorm", the weights of the others grow so that their sum stays; "error".

    Raises:
        ConfigError: an option that the method does not take or lacks, a name or number that cannot
            be, an expert that is no sum of factors (DoRA, activated LoRA), or different ranks.
    """
    numbers = _weights(experts, weights)
    _check_options(method, rank, density, majority_sign, seed, missing)
    for name in numbers:
        check_fixed_update(name, experts.adapters[name])
    if rank is None:
        rank = max(m.rank for name in numbers for m in experts.adapters[name].modules.values())
    combined: dict[str, Combined] = {}
    for path in experts.modules:
        present = {n: w for n, w in numbers.items() if path in experts.adapters[n].modules}
        if method in ("cat", "svd"):  # others count who takes part
            present = {n: w for n, w in present.items() if w} or present
        if not present:
            continue
        factor = _correction(numbers, present, missing, path)
        options = Options(rank, density or 1.0, majority_sign or "total", _seed(seed, path))
        combined[path] = combine(
            method,
            [experts.adapters[name].modules[path] for name in present],
            [weight * factor for weight in present.values()],
            options,
            where=path,
        )
    return _merged(experts, numbers, method, combined)


def _merged(
    experts: FrozenExperts,
    weights: Mapping[str, float],
    method: str,
    combined: Mapping[str, Combined],
) -> Merged:
    modules = {
        path: AdapterModule(
            one.lora_A, one.lora_B, 1.0, update_norm(one.lora_A, one.lora_B), one.bias
        )
        for path, one in combined.items()
    }
    adapters = [experts.adapters[name] for name in weights]
    bases = {(adapter.base, adapter.revision) for adapter in adapters}
    base, revision = bases.pop() if len(bases) == 1 else (None, None)
    notes = ["the experts name different bases"] if bases else []
    if method == "factor":
        first = {
            path: {experts.adapters[n].modules[path].scaling for n in weights
                   if path in experts.adapters[n].modules}
            for path in combined
        }  # fmt: skip
        differing = [path for path, scalings in first.items() if len(scalings) > 1]
        if differing:
            notes.append(f"the first expert's scaling was used for all at {examples(differing)}")
    return Merged(
        modules=MappingProxyType(modules),
        residuals=MappingProxyType({path: one.residual for path, one in combined.items()}),
        method=method,
        weights=MappingProxyType(dict(weights)),
        base=base,
        revision=revision,
        fan_in_fan_out=any(adapter.fan_in_fan_out for adapter in adapters),
        notes=tuple(notes),
    )


def _weights(experts: FrozenExperts, weights: Mapping[str, float] | None) -> dict[str, float]:
    """By name, in the order of the experts."""
    if weights is None:
        return dict.fromkeys(experts.names, 1 / len(experts.names))
    unknown = [name for name in weights if name not in experts.adapters]
    if unknown or not weights:
        raise ConfigError(
            f"weights name {examples(unknown) or 'nobody'}; the experts are "
            f"{examples(experts.names)}."
        )
    wrong = [name for name, weight in weights.items() if not math.isfinite(weight)]
    if wrong:
        raise ConfigError(f"weights of {examples(wrong)} are not finite. Give numbers.")
    return {name: float(weights[name]) for name in experts.names if name in weights}


def _check_options(
    method: str,
    rank: int | None,
    density: float | None,
    majority_sign: MajoritySign | None,
    seed: int | None,
    missing: Missing,
) -> None:
    if method not in METHODS:
        raise ConfigError(f"method={method!r} is none of {', '.join(METHODS)}.")
    given = {
        "rank": (rank, TAKES_RANK),
        "density": (density, TAKES_DENSITY),
        "majority_sign": (majority_sign, TAKES_SIGN),
        "seed": (seed, TAKES_SEED),
    }
    for name, (value, takers) in given.items():
        if value is not None and method not in takers:
            raise ConfigError(
                f"{name}={value!r} means nothing to method={method!r}; it is for "
                f"{', '.join(m for m in METHODS if m in takers)}. Leave it out."
            )
    if method in TAKES_DENSITY and density is None:
        raise ConfigError(f"method={method!r} needs density, the fraction of values to keep.")
    if density is not None and not 0 < density <= 1:
        raise ConfigError(f"density={density!r} is a fraction of values: above 0, at most 1.")
    if rank is not None and rank < 1:
        raise ConfigError(f"rank={rank!r} is of the result: 1 or more.")
    if missing not in ("zero", "renorm", "error"):
        raise ConfigError(f"missing={missing!r} is none of 'zero', 'renorm', 'error'.")
    if majority_sign not in (None, "total", "frequency"):
        raise ConfigError(f"majority_sign={majority_sign!r} is neither 'total' nor 'frequency'.")


def _correction(
    weights: Mapping[str, float], present: Mapping[str, float], missing: Missing, path: str
) -> float:
    """What the weights at a module are multiplied with."""
    lacking = [name for name in weights if name not in present and weights[name]]
    if missing == "zero" or not lacking:
        return 1.0
    if missing == "error":
        raise ConfigError(
            f"{examples(lacking)} do not adapt {path}, and missing='error'. Leave them out, or let "
            "them count as zero."
        )
    rest = sum(present.values())
    if not rest:
        raise ConfigError(
            f"The weights of those that adapt {path} sum to 0, so that missing='renorm' cannot "
            "scale them. Use missing='zero'."
        )
    return sum(weights.values()) / rest


def _seed(seed: int | None, path: str) -> int:
    digest = hashlib.sha256(f"{seed or 0}:{path}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
