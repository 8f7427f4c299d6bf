"""From the configuration of a router, a score and a selector to what computes them."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from molora.attach.initial import initial
from molora.attach.plan import Placement
from molora.config import (
    Capacity,
    Dense,
    ExpertOutputs,
    Fixed,
    Group,
    Identity,
    LinearRouter,
    NormalInit,
    Projection,
    Prototype,
    Sigmoid,
    Threshold,
    TopK,
    TopP,
    UnitTop1,
    UpdateNorm,
    XLoRA,
)
from molora.routing import frozen
from molora.routing import router as learned
from molora.routing import scores as score_functions
from molora.routing import select as select_functions
from molora.routing.classifier import HiddenStateClassifier
from molora.routing.outputs import OutputsRouter
from molora.routing.scores import ScoreFunction
from molora.routing.select import SelectFunction

READS = {"layer_norm": "layer_norm", "cosine": "unit", "dot": "as it is"}
"""Similarity of prototypes → how the router reads its input."""


def make_router(
    name: str,
    placement: Placement,
    *,
    in_features: int,
    choosable: tuple[bool, ...] | None,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
) -> nn.Module:
    """The router of the site `name`. What is made from the experts' factors is 0 until filled.

    `choosable` says which experts it may choose; None: all.
    """
    config, shape = placement.group.router, (placement.num_experts, in_features)
    start_of = partial(initial, seed=seed, dtype=dtype, device=device)
    router: nn.Module
    match config:
        case LinearRouter(init=start):
            std = start.std if isinstance(start, NormalInit) else 0.0
            router = learned.LinearRouter(
                start_of(f"{name}.router.weight", shape, start.kind, std),
                torch.zeros(shape[0], dtype=dtype, device=device) if config.bias else None,
                temperature=config.temperature,
                noise_std=config.noise_std,
                jitter=config.jitter,
            )
        case Projection():
            router = learned.LinearRouter(
                _zeros(shape, device),
                temperature=config.temperature,
                absolute=True,
                trainable=False,
            )
        case Prototype():
            router = learned.LinearRouter(
                _zeros(shape, device),
                temperature=config.temperature,
                reads=READS[config.similarity],  # type: ignore[arg-type]
                trainable=False,
            )
        case UpdateNorm():
            router = frozen.UpdateNormRouter(
                _zeros((shape[0], placement.rank, in_features), device),
                None if config.preselect is None else _zeros(shape, device),
                temperature=config.temperature,
                preselect=config.preselect,
            )
        case Fixed():
            router = frozen.FixedRouter(torch.tensor(config.weights, device=device))
        case ExpertOutputs():
            width = shape[0] * placement.out_features
            weight = start_of(f"{name}.router.weight", (shape[0], width), "kaiming", 0.0)
            router = OutputsRouter(weight, torch.zeros(1, dtype=dtype, device=device))
        case _:
            raise AssertionError(f"{config.kind} decides for the whole model")
    keep_present(router, choosable, device)
    return router


def keep_present(
    router: nn.Module, choosable: tuple[bool, ...] | None, device: torch.device
) -> None:
    """Let the router's site know which experts can be chosen; None: all."""
    if choosable is not None and not all(choosable):
        present_E = torch.tensor(choosable, device=device)
        router.register_buffer("present", present_E, persistent=False)


def make_classifier(
    config: XLoRA,
    *,
    in_features: int,
    num_experts: int,
    num_groups: int,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
) -> HiddenStateClassifier:
    """X-LoRA's classifier, kaiming-uniform with a = √5 as nn.Linear's, biases 0."""

    def make(name: str, shape: tuple[int, ...]) -> Tensor:
        if len(shape) == 1:
            return torch.zeros(shape, dtype=dtype, device=device)
        return initial(
            f"router.{name}", shape, "kaiming", 0.0, seed=seed, dtype=dtype, device=device
        )

    return HiddenStateClassifier(
        in_features,
        num_experts=num_experts,
        num_groups=num_groups,
        depth=config.depth,
        width=config.width,
        dropout=config.dropout,
        temperature=config.temperature,
        make=make,
    )


def _zeros(shape: tuple[int, ...], device: torch.device) -> Tensor:
    # float32 whatever the mixture's dtype is: nothing trains them, and lower precision ties
    return torch.zeros(shape, dtype=torch.float32, device=device)


def score_function(group: Group) -> ScoreFunction:
    """The pure function behind a score config."""
    match group.score:
        case Sigmoid():
            return score_functions.sigmoid
        case Identity():
            return score_functions.identity
        case _:
            return score_functions.softmax


def select_function(group: Group, top_k: int | None) -> SelectFunction:
    """The pure function behind a selector config."""
    match group.select:
        case Dense():
            return select_functions.dense
        case TopK(renormalize=renormalize, softmax=softmax):
            assert top_k is not None
            return partial(
                select_functions.top_k, k=top_k, renormalize=renormalize, softmax=softmax
            )
        case Capacity(renormalize=renormalize):
            assert top_k is not None
            return partial(select_functions.top_k, k=top_k, renormalize=renormalize)
        case TopP(p=p, renormalize=renormalize):
            return partial(select_functions.top_p, p=p, renormalize=renormalize)
        case Threshold(threshold=minimum, renormalize=renormalize):
            return partial(select_functions.threshold, minimum=minimum, renormalize=renormalize)
        case UnitTop1(straight_through=straight_through):
            return partial(select_functions.unit_top1, straight_through=straight_through)


def slots_of(placement: Placement) -> int | None:
    """Experts that every row of a site chooses; None: one slot for each expert."""
    match placement.group.select:
        case TopK() | Capacity():
            return placement.top_k
        case UnitTop1():
            return 1
        case _:
            return None
