"""One vector per expert and linear, made on the expert's own examples, for routers that compare
inputs with vectors: gates that are trained for a moment, or the mean of what the linear reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from molora.attach import Mixture
from molora.attach.side_inputs import ArgumentReader
from molora.compose.compose import compose
from molora.compose.experts import FrozenExperts
from molora.config.base import unknown_name
from molora.errors import ConfigError, DataError

Batches = Iterable[Mapping[str, Any]]
"""Keyword arguments of the model's forward, one dict of tensors a batch."""


def train_gate_vectors(
    model: nn.Module,
    experts: FrozenExperts,
    data: Mapping[str, Batches],
    *,
    steps: int = 100,
    learning_rate: float = 5e-3,
    warmup: float = 0.06,
) -> dict[str, dict[str, Tensor]]:
    """PHATGOOSE's gate of each expert: v in y = W x + σ(v · x) · ΔW_e x, from 0, so that the gate
    starts at 0.5 (Muqeeth et al., 2402.05859). Nothing else is trained.

    AdamW without weight decay at a constant rate after a linear warm-up, as the authors train their
    LoRAs; a package of others takes 1e-3 for the gates. The result does not depend on the order
    of the experts, unless the model itself has dropout.

    Args:
        model: the base; it is left as it was.
        experts: the experts.
        data: the name of every expert whose gates are wanted → batches of its own examples with
            labels, gone through again until there were enough.
        steps: batches, for each expert.
        learning_rate: after the warm-up.
        warmup: share of the steps in which the rate grows.

    Returns:
        Expert → linear → (in,) float32 on the CPU: the `vectors` of router "phatgoose".

    Raises:
        ConfigError: names that are no experts, settings that cannot be.
        DataError: too few batches, no labels in them, a loss that is not finite.
    """
    if steps < 1 or not learning_rate > 0 or not 0 <= warmup < 1:
        raise ConfigError(
            f"steps={steps}, learning_rate={learning_rate}, warmup={warmup}: give at least one "
            "step, a positive rate, and a warm-up of a share below 1."
        )
    found: dict[str, dict[str, Tensor]] = {}
    for name, batches in _checked(data, experts):
        gates = {"kind": "gate", "vectors": _zeros(experts, name)}
        with _alone(model, experts, name, gates) as mixture, _mode(model, training=True):
            optimiser = torch.optim.AdamW(mixture.parameter_groups(learning_rate))
            grown = max(1.0, warmup * steps)
            for step, batch in enumerate(_again(name, batches, steps)):
                for group in optimiser.param_groups:
                    group["lr"] = learning_rate * min(1.0, (step + 1) / grown)
                _loss(model, name, batch).backward()
                optimiser.step()
                optimiser.zero_grad()
            found[name] = {
                path: site.router.get_parameter("weight").detach()[0].float().cpu().clone()
                for path, site in mixture.built.sites.items()
            }
    return found


@torch.no_grad()
def mean_activations(
    model: nn.Module,
    experts: FrozenExperts,
    data: Mapping[str, Batches],
    *,
    samples: int = 10,
    last_token: bool = True,
    with_expert: bool = True,
) -> dict[str, dict[str, Tensor]]:
    """The mean input of each linear over examples of each expert.

    Args:
        model: the base; it is left as it was.
        experts: the experts.
        data: the name of every expert whose means are wanted → batches of its own examples. The
            model runs in evaluation mode.
        samples: sequences of each expert that are read; 10 as in the code of 2405.11157.
        last_token: of each sequence its last token that is not padding, as there; else all.
        with_expert: whether the expert acts meanwhile, as there; else the base alone runs.

    Returns:
        Expert → linear → (in,) float32 on the CPU: the `vectors` of router "average_activation".

    Raises:
        ConfigError: names that are no experts, no samples.
        DataError: no batch, or nothing in it but padding.
    """
    if samples < 1:
        raise ConfigError(f"samples={samples}: read one sequence or more.")
    found: dict[str, dict[str, Tensor]] = {}
    for name, batches in _checked(data, experts):
        router = {"kind": "fixed", "weights": {name: float(with_expert)}}
        with _alone(model, experts, name, router) as mixture, _mode(model, training=False):
            means = _Means(mixture, last_token=last_token)
            try:
                for batch in _first(batches, samples):
                    means.begin(batch)
                    model(**_on_device(model, batch))
            finally:
                means.end()
            found[name] = means.result(name)
    return found


class _Means:
    """Sums what each linear of a mixture reads, by hooks."""

    def __init__(self, mixture: Mixture, *, last_token: bool) -> None:
        self.reader = ArgumentReader(mixture.model)
        self.last_token = last_token
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}
        self.side = self.reader.side_inputs((), {}, {})
        self.handles = []
        for placement in mixture.plan.placements:
            linear = mixture.model.get_submodule(placement.path)

            def look(
                module: nn.Module,
                inputs: Any,
                path: str = placement.path,
                stream: str = placement.stream,
            ) -> None:
                self._add(path, stream, inputs[0])

            self.handles.append(linear.register_forward_pre_hook(look))

    def begin(self, batch: Mapping[str, Any]) -> None:
        """Take the padding from the batch that comes."""
        self.side = self.reader.side_inputs((), batch, {})

    def _add(self, path: str, stream: str, x: Tensor) -> None:
        grid = tuple(x.shape[:-1])
        rows_T = self.side.rows(stream, grid)
        counted = torch.ones(grid, device=x.device)
        if rows_T is not None:
            counted = rows_T.view(grid).to(counted)
        if self.last_token and len(grid) == 2:
            # the last that counts has the largest number among those that count
            number_BS = torch.arange(1, grid[1] + 1, device=x.device) * counted
            counted = counted * (number_BS == number_BS.amax(dim=1, keepdim=True))
        summed_D = counted.flatten() @ x.flatten(0, -2).float()
        self.sums[path] = self.sums.get(path, 0) + summed_D
        self.counts[path] = self.counts.get(path, 0) + counted.sum()

    def end(self) -> None:
        for handle in self.handles:
            handle.remove()

    def result(self, name: str) -> dict[str, Tensor]:
        """Linear → mean."""
        if not self.sums or not all(bool(count > 0) for count in self.counts.values()):
            raise DataError(f"{name} has no example with a token that is not padding.")
        return {path: (self.sums[path] / self.counts[path]).cpu() for path in self.sums}


@contextmanager
def _alone(
    model: nn.Module, experts: FrozenExperts, name: str, router: Mapping[str, Any]
) -> Iterator[Mixture]:
    """One expert on the model, which is the base again afterwards."""
    mixture = compose(model, FrozenExperts({name: experts.adapters[name]}, ()), router=router)
    try:
        yield mixture
    finally:
        mixture.detach()


def _zeros(experts: FrozenExperts, name: str) -> dict[str, dict[str, Tensor]]:
    modules = experts.adapters[name].modules
    return {name: {path: torch.zeros(m.lora_A.shape[1]) for path, m in modules.items()}}


def _checked(data: Mapping[str, Batches], experts: FrozenExperts) -> Iterable[tuple[str, Batches]]:
    for name in data:
        if name not in experts.names:
            raise ConfigError(f"data: {unknown_name('expert', str(name), list(experts.names))}")
        stacked = next(iter(experts.adapters[name].parameters), None)
        if stacked is not None:
            raise ConfigError(
                f"{name} adapts {stacked}, stacked weights, for which no router compares vectors. "
                "Leave it out."
            )
    return data.items()


def _again(name: str, batches: Batches, steps: int) -> Iterator[Mapping[str, Any]]:
    """So many batches, from the start again where they end."""
    given = 0
    while given < steps:
        before = given
        for batch in batches:
            yield batch
            given += 1
            if given == steps:
                return
        if given == before:
            raise DataError(
                f"{name} has {given} batches for {steps} steps. Give as many, or a list or loader "
                "that can be gone through again."
            )


def _first(batches: Batches, samples: int) -> Iterator[Mapping[str, Any]]:
    """Batches of so many sequences together."""
    left = samples
    for batch in batches:
        if "segment_ids" in batch:
            raise DataError("sequences packed into one row cannot be told apart here.")
        size = next(len(value) for value in batch.values() if isinstance(value, Tensor))
        kept = {
            name: value[:left] if isinstance(value, Tensor) and len(value) == size else value
            for name, value in batch.items()
        }
        yield kept
        left -= size
        if left <= 0:
            return


def _loss(model: nn.Module, name: str, batch: Mapping[str, Any]) -> Tensor:
    loss: Any = getattr(model(**_on_device(model, batch)), "loss", None)
    if not isinstance(loss, Tensor):
        raise DataError(f"a batch of {name} gives no loss. Put labels into it.")
    if not bool(torch.isfinite(loss)):
        raise DataError(
            f"the loss of {name} is {float(loss)}. Lower learning_rate, look at the data."
        )
    return loss


def _on_device(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    device = next(model.parameters()).device
    return {n: v.to(device) if isinstance(v, Tensor) else v for n, v in batch.items()}


@contextmanager
def _mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    before = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, was in before.items():
            module.training = was
