"""Which parameters of a mixture are trained, by role: groups for an optimiser, freezing, counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

from torch import nn

from molora.attach.build import Built
from molora.attach.extras import Extras
from molora.attach.partition import whole_shape
from molora.config.base import unknown_name
from molora.config.roles import Role
from molora.errors import AttachError, ConfigError

ROLES = get_args(Role)


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Learning rates and AdamW weight decays by role.

    Raises:
        ConfigError: a rate or ratio that is negative or not finite.
    """

    learning_rate: float
    router_learning_rate: float | None = None
    lora_plus_ratio: float | None = None
    weight_decay: float = 0.0
    weight_decay_B: float | None = None
    router_weight_decay: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is None or (math.isfinite(value) and value >= 0):
                continue
            raise ConfigError(f"{name}={value}: it must be a finite number from 0 on.")
        if self.lora_plus_ratio == 0:
            raise ConfigError(
                "lora_plus_ratio=0: B would never change. Use a positive number, or freeze B."
            )

    def of(self, role: str) -> dict[str, float]:
        """`lr` and `weight_decay` of a factor's role, or of `router`, `other` or `other.rows`."""
        lr, decay = self.learning_rate, self.weight_decay
        if role == "B":
            lr *= 1.0 if self.lora_plus_ratio is None else self.lora_plus_ratio
            decay = decay if self.weight_decay_B is None else self.weight_decay_B
        elif role == "router":
            lr = lr if self.router_learning_rate is None else self.router_learning_rate
            decay = self.router_weight_decay
        elif role == "other.rows":
            # decay would reach the rows of the same embedding that are not trained
            decay = 0.0
        return {"lr": lr, "weight_decay": decay}


def by_role(built: Built, extras: Extras) -> dict[str, list[nn.Parameter]]:
    """Every parameter that is meant to be trained, frozen or not: `experts`, each factor, `router`
    and `other`; roles without parameters are left out."""
    factors = [pair for bank in built.banks.values() for pair in bank.factors()]
    roles = {"experts": [parameter for _, parameter in factors]}
    for role, parameter in factors:
        roles.setdefault(role, []).append(parameter)
    routers = [router for router in built.routers.values() if router.trainable]
    roles["router"] = [p for router in routers for p in router.parameters()]
    roles["other"] = extras.trainable()
    return {role: parameters for role, parameters in roles.items() if parameters}


def groups(built: Built, extras: Extras, rates: Rates) -> list[dict[str, Any]]:
    """Parameter groups with a `name`: `experts.A`, `experts.B`, `router`, `other`, `other.rows`.

    Raises:
        AttachError: every role is frozen.
    """
    roles = by_role(built, extras)
    rows = {id(p) for p in extras.row_parameters.values()}
    other = roles.pop("other", [])
    roles.pop("experts", None)
    split = roles | {
        "other": [p for p in other if id(p) not in rows],
        "other.rows": [p for p in other if id(p) in rows],
    }
    found = [
        {
            "name": role if role in ("router", "other", "other.rows") else f"experts.{role}",
            "params": _trained(parameters),
            **rates.of(role),
        }
        for role, parameters in split.items()
    ]
    if not any(group["params"] for group in found):
        raise AttachError(
            "every role of the mixture is frozen: nothing would be trained. Thaw one with "
            "mixture.freeze(role, frozen=False), or shorten train.freeze."
        )
    return [group for group in found if group["params"]]


def freeze(built: Built, extras: Extras, role: str, *, frozen: bool) -> None:
    """Set `requires_grad` of one role.

    Raises:
        AttachError: no such role, or one of which this mixture has nothing.
    """
    roles = by_role(built, extras)
    if role not in roles:
        if role not in ROLES:
            raise AttachError(unknown_name("role", role, [*ROLES]))
        raise AttachError(
            f"role {role!r}: this mixture has nothing of it to freeze or thaw. It has "
            f"{', '.join(roles)}."
        )
    for parameter in roles[role]:
        parameter.requires_grad_(not frozen)


def trainable(built: Built, extras: Extras) -> dict[str, list[nn.Parameter]]:
    """Parameters that get gradients: `experts`, `router`, and `other` if there are any."""
    roles = by_role(built, extras)
    found = {role: _trained(roles.get(role, [])) for role in ("experts", "router", "other")}
    return {role: ps for role, ps in found.items() if ps or role != "other"}


def counts(built: Built, extras: Extras) -> dict[str, int]:
    """Number of trainable parameters by role; of token rows only those that change."""
    found = {
        role: sum(math.prod(whole_shape(p)) for p in ps)
        for role, ps in trainable(built, extras).items()
    }
    for parameter in _trained([*extras.row_parameters.values()]):
        rows, width = whole_shape(parameter)
        found["other"] -= (rows - len(extras.row_ids)) * width
    return found


def _trained(parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    return [parameter for parameter in parameters if parameter.requires_grad]
