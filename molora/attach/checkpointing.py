"""Activation checkpointing: what recomputed layers need from the forward that they belong to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar

import torch
from torch import nn

from molora.errors import AttachError
from molora.modules import ForwardContext

REMEDY = '{"use_reentrant": False, "context_fn": molora.checkpoint_context}'

_running: ContextVar[tuple[ForwardContext, ...]] = ContextVar("molora_running_forwards", default=())


def checkpoint_context() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The `context_fn` of torch.utils.checkpoint.

    Recomputed layers see the masks and decisions of their forward.

    Use it wherever activation checkpointing is on, such as
    ``model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn":
    molora.checkpoint_context})``. It is exact with several forwards before one backward, because
    every checkpoint call captures its own.

    Returns:
        The contexts of the forward (which changes nothing) and of the recomputation.
    """
    running = _running.get()
    if not running:
        return nullcontext(), nullcontext()
    context = running[-1]
    return nullcontext(), context.recomputing(context.side, dict(context.decisions))


def enter(context: ForwardContext) -> None:
    """Mark a forward as running. A compiled forward is one graph, whose recomputation it makes."""
    if torch.compiler.is_compiling():
        return
    _running.set((*_running.get(), context))


def leave(context: ForwardContext) -> None:
    """Mark it as done, together with any inside it."""
    if torch.compiler.is_compiling():
        return
    running = _running.get()
    if context in running:
        _running.set(running[: running.index(context)])


def check_checkpointing(model: nn.Module, *, needs_context: bool) -> None:
    """Refuse checkpointing modes that train silently wrong.

    Raises:
        AttachError: re-entrant checkpointing, which drops the gradient of auxiliary losses; or a
            recomputation that lacks the masks or decisions that this mixture's layers read.
    """
    for settings in _settings(model):
        if settings.get("use_reentrant", True):
            raise AttachError(
                "gradient checkpointing is re-entrant, which silently drops the gradient of "
                f"auxiliary losses. Enable it with {REMEDY}."
            )
        if needs_context and settings.get("context_fn") is not checkpoint_context:
            raise AttachError(
                "this mixture's layers read masks or shared decisions that a recomputation does "
                f"not have. Enable gradient checkpointing with {REMEDY}."
            )
        return


def _settings(model: nn.Module) -> Iterator[dict[str, object]]:
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            function = getattr(module, "_gradient_checkpointing_func", None)
            yield getattr(function, "keywords", {})
