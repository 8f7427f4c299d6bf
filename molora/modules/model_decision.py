"""One decision for all linears of a model, made before its forward."""

from __future__ import annotations

from torch import Tensor

from molora.errors import AttachError
from molora.modules.site import RoutingSite
from molora.routing.record import Routing


class ModelDecision:
    """What a linear sees of a decision that is in the forward context, under the site's name."""

    def __init__(self, site: RoutingSite) -> None:
        self.site = site

    @property
    def slots(self) -> int | None:
        """K of the decision; None: a slot for every expert."""
        return self.site.slots

    def decide(self, x: Tensor, *, logits_TE: Tensor | None = None) -> Routing:
        """The decision for rows that are those of the model's input."""
        current = self.site.context.decisions.get(self.site.name)
        if current is None or current.grid != tuple(x.shape[:-1]):
            raise AttachError(
                f"{self.site.name}: a decision was made for rows of shape "
                f"{'none' if current is None else current.grid}, but a linear was called with "
                f"{tuple(x.shape[:-1])}. Call the model itself, not a part of it; a base that "
                "rearranges its rows cannot have a decision for the whole model."
            )
        return current
