"""What ends a run early: numbers that are not finite, before they are learnt, and signals."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import TrainerCallback

from molora.attach.side_inputs import SIDE_COLUMNS
from molora.errors import TrainingError
from molora.train.gradients import own_gradient


class Guard:
    """Looks at loss and gradients of every optimiser step, before the optimiser does.

    Nothing is waited for but one small exchange per optimiser step, in which the ranks also agree
    on whether to stop after it.

    Args:
        model: read once more to find the place when a loss is not finite.
        parameters: the trained ones by name.
        device: where the ranks exchange tensors.
        release: called when gradients have been computed past an engine that fetches parameters
            for them.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        device: torch.device,
        *,
        release: Callable[[], object] = lambda: None,
    ) -> None:
        self.model = model
        self.parameters = dict(parameters)
        self.stop = 0
        """The signal on which all ranks stop after this step; 0 for none."""
        self._device = device
        self._release = release
        self._batches: list[tuple[Tensor, dict[str, Any]]] = []

    def add_loss(self, loss: Tensor, inputs: Mapping[str, Any]) -> None:
        """Remember the loss of a micro-batch until the next `check`."""
        self._batches.append((loss.detach(), dict(inputs)))

    def check(self, *, step: int, asked: int) -> None:
        """Before an optimiser step; all ranks take part.

        Args:
            step: its number, for the message.
            asked: the signal that this rank got, or 0.

        Raises:
            TrainingError: on all ranks, if a number of any is not finite; nothing was updated.
        """
        losses = [loss.to(self._device) for loss, _ in self._batches]
        norms = self._gradient_norms()
        seen = torch.stack([torch.zeros_like(losses[0]), *losses, *norms.values()])
        finite = torch.isfinite(seen).all()
        flags = torch.stack([(~finite).int(), torch.tensor(asked, device=self._device).int()])
        if dist.is_initialized():
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        faulty, self.stop = flags.tolist()
        if faulty:
            raise TrainingError(f"step {step}: {self._told(losses, norms)}.")
        self._batches.clear()

    def close(self) -> None:
        """Let go of the last batches."""
        self._batches.clear()

    def _gradient_norms(self) -> dict[str, Tensor]:
        """By parameter, of the averaged gradient, or of this rank's share of it."""
        gradients = {name: own_gradient(p) for name, p in self.parameters.items()}
        held = {name: g for name, g in gradients.items() if g is not None}
        if not held:
            return {}
        norms = torch._foreach_norm(list(held.values()), dtype=torch.float32)
        return dict(zip(held, (norm.to(self._device) for norm in norms), strict=True))

    def _told(self, losses: Sequence[Tensor], norms: Mapping[str, Tensor]) -> str:
        """What is not finite, in words, and on which rank it began; all ranks take part."""
        averaged = [name for name, norm in norms.items() if not torch.isfinite(norm)]
        own, averages = zip(*gather_object([(self._own_fault(losses), averaged)]), strict=True)
        if any(own):
            ranks = {fault: [r for r, f in enumerate(own) if f == fault] for fault in own if fault}
            return "; ".join(
                fault if len(own) == 1 else f"rank {', '.join(map(str, where))}: {fault}"
                for fault, where in ranks.items()
            )
        return _of_gradients(list(dict.fromkeys(name for names in averages for name in names)))

    def _own_fault(self, losses: Sequence[Tensor]) -> str:
        """What is not finite by this rank's rows alone; all ranks run the same again.

        Gradients have been averaged by now, so that a number of one rank is in those of all.
        """
        bad = [float(loss) for loss in losses if not torch.isfinite(loss)]
        places = [first_fault(self.model, inputs) for _, inputs in self._batches]
        gradients = [self._faulty_gradients(inputs) for _, inputs in self._batches]
        parts = [f"the loss is {bad[0]}"] if bad else []
        parts += [f"first at {place}" for place in [p for p in places if p][:1]]
        if not parts:
            parts = [_of_gradients(names) for names in gradients if names][:1]
        return ", ".join(parts)

    def _faulty_gradients(self, inputs: Mapping[str, Any]) -> list[str]:
        """Parameters whose gradient by these rows is not finite; none without labels."""
        if "labels" not in inputs:
            return []
        with torch.enable_grad():
            loss = self.model(**inputs).loss
        # not backward(): engines would take these gradients for those of a step
        gradients = torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True)
        self._release()
        return [
            name
            for name, gradient in zip(self.parameters, gradients, strict=True)
            if gradient is not None and not torch.isfinite(gradient).all()
        ]


def _of_gradients(names: Sequence[str]) -> str:
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if names[4:] else "")
    return f"the gradient of {shown} is not finite"


@torch.no_grad()
def first_fault(model: nn.Module, inputs: Mapping[str, Any]) -> str:
    """The first tensor of a forward that is not finite: a parameter, or a module's output."""
    found: list[str] = []

    def look(name: str, module: nn.Module, args: Any, output: Any) -> None:
        if found:
            return
        for path, parameter in module.named_parameters(name, recurse=True):
            if parameter.numel() and not torch.isfinite(parameter).all():
                found.append(f"the weights {path}")
                return
        if isinstance(output, Tensor) and not torch.isfinite(output).all():
            found.append(f"the output of {name}")

    leaves = [
        (name, module) for name, module in model.named_modules() if _is_place(module) and name
    ]
    hooks = [module.register_forward_hook(partial(look, name)) for name, module in leaves]
    try:
        model(**{name: value for name, value in inputs.items() if name not in SIDE_COLUMNS})
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else ""


def _is_place(module: nn.Module) -> bool:
    """A module that computes something itself: it has weights of its own."""
    return any(True for _ in module.parameters(recurse=False))


class Interruption:
    """Inside, Ctrl-C and SIGTERM are noted; a second one acts as it would have."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, tell: Callable[[str], object]) -> None:
        self.signal = 0
        self._tell = tell
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        # Python delivers signals to the main thread, and lets no other set a handler
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            self.__exit__()
            signal.raise_signal(number)
            return
        self.signal = number
        self._tell(
            f"{signal.Signals(number).name}: stopping after this step with a checkpoint; once more "
            "stops at once, without."
        )


class RunCallback(TrainerCallback):
    """What the Trainer's loop has to do at two moments.

    Args:
        begin: called when the loop has set its sums to zero.
        is_stopping: whether to save and stop, asked after every optimiser step.
    """

    def __init__(self, *, begin: Callable[[], None], is_stopping: Callable[[], int]) -> None:
        self._begin = begin
        self._is_stopping = is_stopping

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._is_stopping():
            control.should_save = control.should_training_stop = True


def after(first: Callable[[], None], then: Callable[..., Any]) -> Callable[..., Any]:
    """Both, one after the other."""

    def both(*args: Any, **kwargs: Any) -> Any:
        first()
        return then(*args, **kwargs)

    return both
