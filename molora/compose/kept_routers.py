"""What the routers of a mixture know of its experts, kept when others join or leave them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from molora.attach import Mixture
from molora.config import Projection, Prototype, UpdateNorm
from molora.errors import ConfigError
from molora.routing.classifier import HiddenStateClassifier
from molora.routing.outputs import OutputsRouter
from molora.routing.router import LinearRouter


@torch.no_grad()
def given_vectors(mixture: Mixture, names: Sequence[str], wanted: Sequence[str]) -> dict[str, Any]:
    """`vectors` of what the routers compare inputs with, where it follows from no factors."""
    if not isinstance(mixture.config.groups[0].router, Prototype):
        return {}
    lacking = [name for name in wanted if name not in names]
    if lacking:
        raise ConfigError(
            f"router {mixture.config.method} has no vectors for {', '.join(lacking)}. Give the "
            "router with vectors for all experts."
        )
    found = {
        name: {
            path: site.router.get_parameter("weight")[number]
            for path, site in mixture.built.sites.items()
        }
        for number, name in enumerate(names)
        if name in wanted
    }
    return {"vectors": found}


Groups = dict[str, tuple[str, ...]]
"""Path of a router → the sites that it decides for, in order."""


def groups_of_routers(mixture: Mixture) -> Groups:
    """Of every router; one that decides once for all has one group without a name."""
    return {name: _groups(mixture, router) for name, router in mixture.built.routers.items()}


def _groups(mixture: Mixture, router: nn.Module) -> tuple[str, ...]:
    if not isinstance(router, HiddenStateClassifier) or router.num_groups == 1:
        return ("",)
    sites: tuple[Any, ...] = mixture.built.model_scope.sites  # type: ignore[union-attr]
    return tuple(site.name for site in sites)


@torch.no_grad()
def keep_learnt(
    made: Mixture,
    state: Mapping[str, Tensor],
    old: Groups,
    names: Sequence[str],
    *,
    experts: Sequence[str],
) -> None:
    """Copy the rows of experts that stay into routers with the same inputs as before.

    Args:
        made: the new mixture.
        state: of the mixture before.
        old: its `groups_of_routers`.
        names: its experts in order.
        experts: those of the new one in order.
    """
    if isinstance(made.config.groups[0].router, Projection | UpdateNorm):
        return
    rows = [(experts.index(name), names.index(name)) for name in experts if name in names]
    for path, router in made.built.routers.items():
        if path in old and isinstance(router, OutputsRouter):
            _keep_of_outputs(router, path, state, rows, len(names))
        if path not in old or not isinstance(router, LinearRouter | HiddenStateClassifier):
            continue
        before, now = old[path], _groups(made, router)
        pairs = [(now.index(group), before.index(group)) for group in now if group in before]
        own = {f"{path}.{name}": parameter for name, parameter in router.named_parameters()}
        last = _last_layer(path, router)
        for name, parameter in own.items():
            if not last(name):
                parameter.copy_(state[name])
                continue
            target = parameter.view(len(now), len(experts), *parameter.shape[1:])
            source = state[name].view(len(before), len(names), *parameter.shape[1:])
            for group, group_before in pairs:
                for row, row_before in rows:
                    target[group, row] = source[group_before, row_before]


def _keep_of_outputs(
    router: OutputsRouter,
    path: str,
    state: Mapping[str, Tensor],
    rows: Sequence[tuple[int, int]],
    count: int,
) -> None:
    """A row for each expert, of parts that read each expert's output."""
    target_EEF = router.weight.view(router.num_experts, router.num_experts, -1)
    source_EEF = state[f"{path}.weight"].view(count, count, -1)
    for row, row_before in rows:
        for column, column_before in rows:
            target_EEF[row, column] = source_EEF[row_before, column_before]
    router.log_temperature.copy_(state[f"{path}.log_temperature"])


def _last_layer(path: str, router: nn.Module) -> Callable[[str], bool]:
    """Which of a router's parameters have a row for each expert."""
    if isinstance(router, HiddenStateClassifier):
        prefix = f"{path}.layers.{len(router.layers) - 1}."
        return lambda name: name.startswith(prefix)
    return lambda name: True
