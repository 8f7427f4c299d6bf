"""Many experts on one basis: ΔW_e ≈ U Σ_e Vᵀ (Compress-then-Serve, arXiv 2407.00066).

Per module U (F, C) and V (D, C) are shared, and an expert keeps a core Σ_e, which is a C × C matrix
("full") or a diagonal one. No update is made dense: everything is computed in the coordinates of
the factors' column spaces, in float64.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from molora.compose.experts import FrozenExperts
from molora.compose.joint_solvers import Update, diagonal_basis, diagonal_core, full_basis
from molora.compose.merging.factors import update_norm
from molora.compose.merging.kinds import check_fixed_update
from molora.errors import ConfigError
from molora.io.peft_adapter import AdapterModule

Kind = Literal["full", "diagonal"]


@dataclass(frozen=True, eq=False)
class JointModule:
    """The basis of one module and what the experts are on it.

    Attributes:
        U: (F, C); orthonormal columns with full cores, columns of norm 1 with diagonal ones.
        V: (D, C), likewise.
        cores: expert's name → (C, C), or (C,) with diagonal cores; in float32.
        errors: expert's name → ‖ΔW_e − U Σ_e Vᵀ‖ / ‖ΔW_e‖ (Frobenius norm), 0 for an update of 0.
        norms: expert's name → ‖ΔW_e‖.
    """

    U: Tensor
    V: Tensor
    cores: Mapping[str, Tensor]
    errors: Mapping[str, float]
    norms: Mapping[str, float]


@dataclass(frozen=True, eq=False)
class JointExperts:
    """A set of experts on shared bases.

    Attributes:
        kind: of the cores.
        modules: by the module's name.
        experts: those that were compressed, as they were.
    """

    kind: Kind
    modules: Mapping[str, JointModule]
    experts: FrozenExperts

    @property
    def errors(self) -> dict[str, float]:
        """Expert's name → ‖difference‖ / ‖update‖ over all its modules together."""
        lost = dict.fromkeys(self.experts.names, 0.0)
        whole = dict(lost)
        for module in self.modules.values():
            for name, norm in module.norms.items():
                lost[name] += (module.errors[name] * norm) ** 2
                whole[name] += norm**2
        return {n: math.sqrt(lost[n] / whole[n]) if whole[n] else 0.0 for n in lost}

    @property
    def share(self) -> float:
        """Numbers in bases and cores over numbers in the experts' factors."""
        kept = sum(
            m.U.numel() + m.V.numel() + sum(core.numel() for core in m.cores.values())
            for m in self.modules.values()
        )
        modules = [m for one in self.experts.adapters.values() for m in one.modules.values()]
        return kept / sum(m.lora_A.numel() + m.lora_B.numel() for m in modules)

    def as_experts(self) -> FrozenExperts:
        """Ordinary experts of rank C: A = Vᵀ, one tensor that all share, and B = U Σ_e. The hash of
        each is of its own, the kind, the rank and the hashes of all."""
        adapters = {}
        together = " ".join(adapter.sha256 for adapter in self.experts.adapters.values())
        largest = max(module.U.shape[1] for module in self.modules.values())
        for name, adapter in self.experts.adapters.items():
            modules = {path: self._module(path, name, one) for path, one in adapter.modules.items()}
            note = f"compressed with others, relative error {self.errors[name]:.3g}"
            identity = f"{adapter.sha256} {self.kind} {largest} {together}"
            adapters[name] = replace(
                adapter,
                modules=MappingProxyType(modules),
                sha256=hashlib.sha256(identity.encode()).hexdigest(),
                notes=(*adapter.notes, note),
            )
        return FrozenExperts(MappingProxyType(adapters), self.experts.notes)

    def _module(self, path: str, name: str, original: AdapterModule) -> AdapterModule:
        joint = self.modules[path]
        core = joint.cores[name]
        lora_A, lora_B = joint.V.mT, joint.U @ core if self.kind == "full" else joint.U * core
        bias = None if original.bias is None else original.bias.float() * original.scaling
        return AdapterModule(lora_A, lora_B, 1.0, update_norm(lora_A, lora_B), bias)


def compress(
    experts: FrozenExperts,
    rank: int,
    *,
    kind: Kind = "full",
    relative: bool = True,
    iterations: int = 100,
    tolerance: float = 1e-6,
) -> JointExperts:
    """Bases of a rank that leave the least of Σ_e ‖ΔW_e − U Σ_e Vᵀ‖², by alternating steps.

    With full cores, U and V start at the leading vectors of Σ ΔW ΔWᵀ and Σ ΔWᵀ ΔW and follow by
    orthogonal iteration; with diagonal ones it is the alternating least squares of a CP
    decomposition. Neither is sure to find the global optimum; both only go down.

    Args:
        experts: not changed; ranks, scalings and modules may differ.
        rank: C; less at a module that is smaller.
        kind: of the cores.
        relative: weigh each expert by 1 / ‖ΔW_e‖², so that relative errors count. Without it, large
            updates decide.
        iterations: at most, per module.
        tolerance: stop where the sum falls by less than this part of its start.

    Raises:
        ConfigError: a rank below 1, another kind, or experts with DoRA or activated ones.
    """
    if rank < 1 or iterations < 1:
        raise ConfigError(f"rank={rank} and iterations={iterations} must be 1 or more.")
    if kind not in ("full", "diagonal"):
        raise ConfigError(f"kind={kind!r} is neither 'full' nor 'diagonal'.")
    for name, adapter in experts.adapters.items():
        check_fixed_update(name, adapter)
    modules = {}
    for path in experts.modules:
        present = {n: a.modules[path] for n, a in experts.adapters.items() if path in a.modules}
        modules[path] = _joint(present, rank, kind, relative, iterations, tolerance)
    return JointExperts(kind, MappingProxyType(modules), experts)


def project(joint: JointModule, module: AdapterModule, kind: Kind) -> tuple[Tensor, float]:
    """(core, relative error) of an expert that is added later, the basis staying as it is."""
    update = _update(module)
    U, V = joint.U.double(), joint.V.double()
    core = _core(update, U, V, kind)
    norm = update_norm(*update)
    return core.float(), _error(update, U, V, core, norm)


def _joint(
    present: Mapping[str, AdapterModule],
    rank: int,
    kind: Kind,
    relative: bool,
    iterations: int,
    tolerance: float,
) -> JointModule:
    updates = [_update(module) for module in present.values()]
    norms = [update_norm(*update) for update in updates]
    q_A, q_B, small = _reduced(updates)
    weights = [1 / n if relative and n else float(n > 0) for n in norms]
    weighted = [(a, b * w) for (a, b), w in zip(small, weights, strict=True)]
    solve = full_basis if kind == "full" else diagonal_basis
    U, V = solve(weighted, rank, iterations=iterations, tolerance=tolerance)
    cores = [_core(update, U, V, kind) for update in small]
    errors = [
        _error(update, U, V, core, norm)
        for update, core, norm in zip(small, cores, norms, strict=True)
    ]
    return JointModule(
        U=(q_B @ U).float(),
        V=(q_A @ V).float(),
        cores=MappingProxyType({n: c.float() for n, c in zip(present, cores, strict=True)}),
        errors=MappingProxyType(dict(zip(present, errors, strict=True))),
        norms=MappingProxyType(dict(zip(present, norms, strict=True))),
    )


def _update(module: AdapterModule) -> Update:
    return module.lora_A.double(), module.lora_B.double() * module.scaling


def _reduced(updates: Sequence[Update]) -> tuple[Tensor, Tensor, list[Update]]:
    """(Q_A (D, Q), Q_B (F, P), updates in their coordinates), all updates being Q_B · Q_Aᵀ."""
    ranks = [a.shape[0] for a, _ in updates]
    q_A, r_A = torch.linalg.qr(torch.cat([a for a, _ in updates]).mT)
    q_B, r_B = torch.linalg.qr(torch.cat([b for _, b in updates], dim=1))
    pairs = zip(r_A.split(ranks, dim=1), r_B.split(ranks, dim=1), strict=True)
    return q_A, q_B, [(a.mT, b) for a, b in pairs]


def _core(update: Update, U: Tensor, V: Tensor, kind: Kind) -> Tensor:
    """The best core on a basis, which need not be orthonormal to the last digit."""
    a, b = update
    if kind == "diagonal":
        return diagonal_core(update, U, V)
    return torch.linalg.lstsq(U, b).solution @ torch.linalg.lstsq(V, a.mT).solution.mT


def _error(update: Update, U: Tensor, V: Tensor, core: Tensor, norm: float) -> float:
    if not norm:
        return 0.0
    a, b = update
    left = U @ core if core.dim() == 2 else U * core
    return update_norm(torch.cat([a, V.mT]), torch.cat([b, -left], dim=1)) / norm
