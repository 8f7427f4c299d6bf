"""The handle of a mixture on a model: record, disable, count, save, take off again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from molora.attach import parameters
from molora.attach.build import Built
from molora.attach.extras import Extras
from molora.attach.hooks import DeferredAux, ForwardHooks, Records
from molora.attach.partition import check_whole
from molora.attach.plan import Plan
from molora.attach.row_scale import set_row_scales
from molora.attach.side_inputs import SIDE_INPUTS
from molora.attach.surgery import Surgery
from molora.config import MixtureConfig
from molora.config.base import unknown_name
from molora.config.roles import Role
from molora.errors import AttachError, CheckpointError
from molora.modules import ForwardContext
from molora.routing import Routing
from molora.routing.statistics import RoutingStatistics


class Mixture:
    """What `molora.attach` returns; the model itself is used as before.

    Attributes:
        model: the adapted model.
        config: what it was built from.
        plan: which linear got what.
        built: banks by linear, routing sites by owner.
    """

    def __init__(
        self,
        model: nn.Module,
        config: MixtureConfig,
        *,
        plan: Plan,
        built: Built,
        hooks: ForwardHooks,
        context: ForwardContext,
        surgery: Surgery,
        extras: Extras,
        was_trainable: dict[str, bool],
    ) -> None:
        self.model = model
        self.config = config
        self.plan = plan
        self.built = built
        self.extras = extras
        self._hooks = hooks
        self._context = context
        self._surgery = surgery
        self._was_trainable = was_trainable
        self._attached = True

    # ------------------------------------------------------------------ while the model runs

    @contextmanager
    def record(self, *, detach: bool = True) -> Iterator[dict[str, Routing | list[Routing]]]:
        """Collect the routing of every forward inside: site → `Routing`, or a list of several.

        Records appear when a forward of the model ends. They are detached unless `detach` is False;
        nothing is kept outside of the yielded dict.
        """
        collected: dict[str, Routing | list[Routing]] = {}

        def collect(records: Records) -> None:
            for site, new in records.items():
                before = collected.get(site, [])
                kept = [*(before if isinstance(before, list) else [before])]
                kept += [r.detach() if detach else r for r in new]
                collected[site] = kept[0] if len(kept) == 1 else kept

        with self._observed_by(collect):
            yield collected

    @contextmanager
    def statistics(self, into: RoutingStatistics | None = None) -> Iterator[RoutingStatistics]:
        """Count loads, entropies and margins of every site over the forwards inside, on the device.

        Args:
            into: goes on counting here; a new count if not given.
        """
        statistics = RoutingStatistics() if into is None else into
        with self._observed_by(statistics.update):
            yield statistics

    @contextmanager
    def context(self, **columns: Tensor) -> Iterator[None]:
        """Side inputs for the forwards inside, such as `task_types=` (B,) integers, or the gates of
        a router of kind "given" as `expert_gates=` (B, E) or (B, S, E).

        Raises:
            AttachError: a name that no method reads.
        """
        for name in columns:
            if name not in SIDE_INPUTS:
                raise AttachError(unknown_name("side input", name, list(SIDE_INPUTS)))
        previous = self._hooks.columns
        self._hooks.columns = {**previous, **columns}
        try:
            yield
        finally:
            self._hooks.columns = previous

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the model is its base, bit for bit; nests.

        Trainable extra modules keep their values.
        """
        previous, self._context.enabled = self._context.enabled, False
        try:
            yield
        finally:
            self._context.enabled = previous

    @contextmanager
    def deferred_aux(self) -> Iterator[DeferredAux]:
        """Inside, auxiliary losses go to the caller in place of the output's loss."""
        previous, self._hooks.deferred = self._hooks.deferred, DeferredAux()
        try:
            yield self._hooks.deferred
        finally:
            self._hooks.deferred = previous

    @contextmanager
    def without_aux(self) -> Iterator[None]:
        """Inside, training has no auxiliary losses, and needs no columns for them."""
        hooks = self._hooks
        previous = hooks.losses, hooks.required_columns
        hooks.losses, hooks.required_columns = (), ()
        try:
            yield
        finally:
            hooks.losses, hooks.required_columns = previous

    @contextmanager
    def _observed_by(self, observer: Any) -> Iterator[None]:
        self._hooks.observers.append(observer)
        try:
            yield
        finally:
            self._hooks.observers.remove(observer)

    # ------------------------------------------------------------------ parameters

    def trainable_parameters(self) -> dict[str, list[nn.Parameter]]:
        """Parameters that get gradients: "experts", "router", "other" if extras are declared."""
        return parameters.trainable(self.built, self.extras)

    def parameter_groups(
        self,
        learning_rate: float,
        *,
        router_learning_rate: float | None = None,
        lora_plus_ratio: float | None = None,
        weight_decay: float = 0.0,
        weight_decay_B: float | None = None,
        router_weight_decay: float = 0.0,
    ) -> list[dict[str, Any]]:
        """Groups for an optimiser, named experts.A, experts.B, router, other and other.rows.

        Those without trainable parameters are left out.

        Args:
            learning_rate: of all that has none of its own: A, B, declared modules, token rows.
            router_learning_rate: `learning_rate` if not given.
            lora_plus_ratio: learning rate of B ÷ that of A (LoRA+, 2402.12354; about 16). As in
                PEFT, A keeps `learning_rate`; unlike there, so do declared embeddings.
            weight_decay: of A, B and declared modules; token rows have none.
            weight_decay_B: of B, instead of `weight_decay`.
            router_weight_decay: of routers.

        Raises:
            AttachError: every role is frozen.
            ConfigError: a negative rate.
        """
        rates = parameters.Rates(
            learning_rate=learning_rate,
            router_learning_rate=router_learning_rate,
            lora_plus_ratio=lora_plus_ratio,
            weight_decay=weight_decay,
            weight_decay_B=weight_decay_B,
            router_weight_decay=router_weight_decay,
        )
        return parameters.groups(self.built, self.extras, rates)

    def freeze(self, role: Role, *, frozen: bool = True) -> None:
        """Stop, or with `frozen=False` resume, training one role; for training in stages.

        Args:
            role: "experts" (A and B), "A", "B", "router", or "other" (declared modules and token
                rows). What is declared frozen, as the blocks of imported experts, stays so.
            frozen: whether to stop or to resume.

        Raises:
            AttachError: no such role, or one of which the mixture has nothing.
        """
        parameters.freeze(self.built, self.extras, role, frozen=frozen)

    def num_parameters(self) -> dict[str, int]:
        """Number of trainable parameters by role; token rows count only the rows that change."""
        return parameters.counts(self.built, self.extras)

    # ------------------------------------------------------------------ state

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Experts and routers under their paths, extras under their own names, each once.

        Frozen roles too. Of a parameter of which only token rows are trained, the whole.
        """
        for path, bank in self.built.banks.items():
            yield from bank.named_parameters(f"{path}.experts")
        for name, router in self.built.routers.items():
            yield from router.named_parameters(name)
        yield from self.extras.parameters.items()
        yield from self.extras.row_parameters.items()

    def state_dict(self) -> dict[str, Tensor]:
        """`named_parameters`, but of token rows these alone, as `{name}.rows`; no other copies.

        Raises:
            CheckpointError: parameters that ZeRO-3 has divided; see `molora.train.gather`.
        """
        check_whole(self.named_parameters())
        return {
            key: value
            for name, parameter in self.named_parameters()
            for key, value in [self.extras.stored(name, parameter.detach())]
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy values in, all or none.

        Raises:
            CheckpointError: missing, unexpected or mis-shaped tensors, each named; parameters that
                ZeRO-3 has divided.
        """
        own = self.state_dict()
        check_names_and_shapes(
            {name: tuple(t.shape) for name, t in own.items()},
            {name: tuple(t.shape) for name, t in state.items()},
        )
        extra = self.extras.state().keys()
        for name, tensor in own.items():
            if name not in extra:
                tensor.copy_(state[name])
        self.extras.load({name: state[name] for name in extra})
        self.refresh()

    def refresh(self) -> None:
        """Compute again what follows from the experts' factors and the base, as after loading."""
        with self.disabled():
            set_row_scales(self.model, self.built.banks)

    def save(self, directory: str | Path) -> None:
        """Write the mixture: one safetensors file and one JSON, complete or not at all."""
        from molora.attach.saving import save_mixture

        save_mixture(self, Path(directory))

    def detach(self) -> None:
        """Take the mixture off: the original model, bit-exact, with its `requires_grad` flags.

        Raises:
            AttachError: it is off already.
            CheckpointError: trained parts of the base are divided by ZeRO-3, or were when attached.
        """
        if not self._attached:
            raise AttachError(
                "this mixture has been detached already. Attach a new one with molora.attach."
            )
        self.extras.restore()
        self._surgery.undo()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._was_trainable[name])
        self._attached = False


def check_names_and_shapes(
    expected: dict[str, tuple[int, ...]],
    found: dict[str, tuple[int, ...]],
    *,
    where: str = "state dict",
) -> None:
    """Raise CheckpointError naming every missing, unexpected and mis-shaped tensor."""
    faults = [f"missing {name}" for name in expected if name not in found]
    faults += [f"unexpected {name}" for name in found if name not in expected]
    faults += [
        f"{name} has shape {found[name]}, the mixture needs {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if faults:
        shown = "; ".join(faults[:8]) + (f"; and {len(faults) - 8} more" if len(faults) > 8 else "")
        raise CheckpointError(
            f"the {where} does not fit this mixture: {shown}. Nothing was loaded."
        )
