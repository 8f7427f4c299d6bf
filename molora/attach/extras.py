"""Trained and saved outside the experts: whole modules, and rows of new tokens."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from molora.attach.partition import check_whole, whole_shape
from molora.config import MixtureConfig
from molora.errors import AttachError, CheckpointError


class RowGradient:
    """A gradient hook that leaves the gradient of some rows alone and zeroes the others.

    With AdamW and no weight decay the other rows then stay bit-equal.
    """

    def __init__(self, ids: tuple[int, ...]) -> None:
        self.ids = ids

    def __call__(self, grad_VD: Tensor) -> Tensor:
        kept = torch.zeros_like(grad_VD)
        index = torch.tensor(self.ids, device=grad_VD.device)
        return kept.index_copy_(0, index, grad_VD.index_select(0, index))


class Extras:
    """The declared modules and token rows of one model; restored when detached.

    Raises:
        AttachError: a path that is no module or has no parameters, an id outside the vocabulary.
    """

    def __init__(self, model: nn.Module, config: MixtureConfig) -> None:
        unique: dict[int, tuple[str, nn.Parameter]] = {}
        for name, parameter in _module_parameters(model, config.train_modules):
            # a tied parameter has several names, of which the first counts
            unique.setdefault(id(parameter), (name, parameter))
        self.parameters = dict(unique.values())
        self.row_ids = config.train_tokens.ids if config.train_tokens is not None else ()
        self.row_parameters: dict[str, nn.Parameter] = {}
        if self.row_ids:
            whole = {id(p) for p in self.parameters.values()}
            rows = _embedding_weights(model, self.row_ids)
            self.row_parameters = {name: p for name, p in rows if id(p) not in whole}
        self._originals = {
            name: parameter.detach().clone()
            for name, parameter in (*self.parameters.items(), *self.row_parameters.items())
            if parameter.numel() and not parameter.is_meta
        }
        for parameter in self.trainable():
            parameter.requires_grad_(True)
        self.hooks = [
            p.register_hook(RowGradient(self.row_ids)) for p in self.row_parameters.values()
        ]

    def trainable(self) -> list[nn.Parameter]:
        """Every parameter here that gets gradients."""
        return [*self.parameters.values(), *self.row_parameters.values()]

    def stored(self, name: str, value: Tensor) -> tuple[str, Tensor]:
        """Key and value under which a parameter of the mixture is saved."""
        if name not in self.row_parameters:
            return name, value
        return f"{name}.rows", value[list(self.row_ids)]

    def state(self) -> dict[str, Tensor]:
        """Values by name: whole parameters under their own name, rows as `{name}.rows` (n, D)."""
        named = {**self.parameters, **self.row_parameters}
        return dict(self.stored(name, p.detach()) for name, p in named.items())

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Copy values that have the names and shapes of `state()`."""
        for name, parameter in self.parameters.items():
            parameter.copy_(state[name])
        for name, parameter in self.row_parameters.items():
            parameter[list(self.row_ids)] = state[f"{name}.rows"].to(parameter)

    @torch.no_grad()
    def restore(self) -> None:
        """Give all parameters back their values from before, bit-exact.

        Raises:
            CheckpointError: parameters that ZeRO-3 has divided, or had when they were declared.
        """
        named = {**self.parameters, **self.row_parameters}
        check_whole(named.items())
        for name, parameter in named.items():
            if name in self._originals:
                parameter.copy_(self._originals[name])
            elif not parameter.is_meta:
                raise CheckpointError(
                    f"{name} was divided by ZeRO-3 when the mixture was attached, so the values "
                    "that it had are not kept. Load the base model again."
                )


def _module_parameters(
    model: nn.Module, paths: tuple[str, ...]
) -> Iterator[tuple[str, nn.Parameter]]:
    modules = dict(model.named_modules())
    for path in paths:
        if path not in modules:
            close = (
                ", ".join(difflib.get_close_matches(path, list(modules), n=3, cutoff=0.4)) or "none"
            )
            raise AttachError(
                f"train_modules={path!r} is no module of this model. Close names: {close}."
            )
        named = list(modules[path].named_parameters(path))
        if not named:
            raise AttachError(f"train_modules={path!r} has no parameters to train.")
        yield from named


def _embedding_weights(
    model: nn.Module, ids: tuple[int, ...]
) -> Iterator[tuple[str, nn.Parameter]]:
    """The token embedding, and the output embedding unless it is the same parameter."""
    embeddings = [model.get_input_embeddings(), model.get_output_embeddings()]  # type: ignore[operator]
    weights = {id(e.weight): e.weight for e in embeddings if e is not None}
    for name, parameter in model.named_parameters():
        if id(parameter) in weights:
            rows = whole_shape(parameter)[0]
            if max(ids) >= rows:
                raise AttachError(
                    f"train_tokens has id {max(ids)}, but {name} has {rows} rows. "
                    "Call model.resize_token_embeddings first."
                )
            yield name, parameter
