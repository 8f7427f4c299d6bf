"""Changes of a model that can be taken back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from molora.errors import AttachError


@dataclass
class Surgery:
    """What was changed on the base model, so that it can be taken back in reverse order."""

    children: list[tuple[nn.Module, str]] = field(default_factory=list)
    attributes: list[tuple[nn.Module, str, Any]] = field(default_factory=list)
    handles: list[Any] = field(default_factory=list)

    def add_child(self, parent: nn.Module, name: str, child: nn.Module) -> None:
        """Register `child`, refusing to hide something that is there."""
        if hasattr(parent, name):
            raise AttachError(
                f"{type(parent).__name__} already has an attribute {name!r}, which molora needs "
                "for its own module. Detach the mixture that is on the model first, or target "
                "other modules."
            )
        parent.add_module(name, child)
        self.children.append((parent, name))

    def set_attribute(self, module: nn.Module, name: str, value: Any) -> None:
        """Set an instance attribute, remembering one that was set before."""
        self.attributes.append((module, name, module.__dict__.get(name, _ABSENT)))
        module.__dict__[name] = value

    def undo(self) -> None:
        """Leave the base model as it was."""
        for handle in self.handles:
            handle.remove()
        for module, name, previous in reversed(self.attributes):
            if previous is _ABSENT:
                module.__dict__.pop(name, None)
            else:
                module.__dict__[name] = previous
        for parent, name in reversed(self.children):
            delattr(parent, name)


class _ABSENT:
    """There was no such attribute. A class, because a deep copy of an object is another object."""
