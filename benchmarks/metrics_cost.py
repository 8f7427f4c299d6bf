"""What the metrics of routing cost, as a share of a training step without them.

Three figures, all of one process and one thread:

    share   time inside the calls that watch a step, the check that it is finite among them, and
            their part of a line of metrics, ÷ the time of a step without them; the operations of a
            CPU are done when a call returns
    ratio   median over runs of the time of a watched step ÷ that of a step without, side by side
    ops     ATen calls of watching ÷ those of a step, a proxy for kernel launches on a GPU

A step is forward, auxiliary losses, backward, clipping and AdamW, of a Llama of random weights with
8 experts of rank 8 on all seven projections, top-2. A line of metrics is written every
`--logging-steps` steps, with the numbers of every site, to a file.

    python benchmarks/metrics_cost.py                       # hidden 512
    python benchmarks/metrics_cost.py --hidden 1024 --runs 5
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# a spinning OpenMP thread slows every other process, and with it the measurement
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from step_cost import OpCounter, Sizes, base_model
from torch import Tensor

import molora
from molora.attach.hooks import DeferredAux
from molora.train.guard import Guard
from molora.train.metrics import MetricsWriter
from molora.train.observation import Observation


@dataclass(frozen=True)
class Cost:
    """See the module's docstring; `step_ms` is of a step without metrics."""

    hidden: int
    tokens: int
    sites: int
    share: float
    ratio: float
    ops: float
    step_ms: float
    watching_ms: float
    line_ms: float


class Alone:
    """What an observation needs of Accelerate's Accelerator in one process."""

    device = torch.device("cpu")

    @staticmethod
    def gather(tensor: Tensor) -> Tensor:
        return tensor


class Run:
    """A model in training, with or without metrics."""

    def __init__(self, sizes: Sizes, folder: Path, *, logging_steps: int) -> None:
        model = base_model(sizes)
        config = molora.presets.mola(num_experts=8, top_k=2, rank=8, dropout=0.0)
        self.mixture = molora.attach(model, config)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4)
        self.observation = Observation(self.mixture)
        self.writer = MetricsWriter(folder / "metrics.jsonl")
        self.observation.listeners.append(self.writer.on_report)
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.guard = Guard(model, named, Alone.device)
        self.logging_steps = logging_steps
        self.ids_BS = torch.randint(0, sizes.vocab, (4, sizes.tokens // 4))
        self.made = 0
        self.watching = self.line = 0.0
        """Seconds in the calls of the last step, and of the last line of metrics."""

    def step(self, *, watched: bool) -> None:
        """One optimiser step."""
        self.watching = 0.0
        observe = self._observing() if watched else contextlib.nullcontext()
        with self.mixture.deferred_aux() as deferred, observe:
            out = self.mixture.model(input_ids=self.ids_BS, labels=self.ids_BS)
        loss = out.loss + deferred.weighted(None)
        loss.backward()
        if watched:
            self._watch(deferred, loss)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.made += 1
        if watched and self.made % self.logging_steps == 0:
            self._log()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @contextlib.contextmanager
    def _observing(self) -> Iterator[None]:
        routing = self.observation._window.routing
        update = routing.update

        def timed(*args: Any) -> None:
            started = time.perf_counter()
            update(*args)
            self.watching += time.perf_counter() - started

        routing.update = timed  # type: ignore[method-assign]
        try:
            with self.observation.watching():
                yield
        finally:
            del routing.update

    def _watch(self, deferred: DeferredAux, loss: Tensor) -> None:
        started = time.perf_counter()
        self.observation.add_micro_batch(
            {"input_ids": self.ids_BS},
            deferred,
            num_items_in_batch=None,
            scale=1.0,
            device=Alone.device,
        )
        # that loss and gradients are finite is looked at in every step
        self.guard.add_loss(loss, {"input_ids": self.ids_BS})
        self.guard.check(step=self.made + 1, asked=0)
        self.watching += time.perf_counter() - started

    def _log(self) -> None:
        started = time.perf_counter()
        self.observation.measure_gradients(step=self.made, device=Alone.device)
        report = self.observation.read(step=self.made, accelerator=Alone, grad_norm=1.0)
        self.observation.publish(report)
        self.line = time.perf_counter() - started


def measure(sizes: Sizes, runs: int, *, logging_steps: int = 10) -> Cost:
    """Steps with and without metrics in turn, `runs` times as many as there are to a line."""
    with tempfile.TemporaryDirectory() as folder:
        run = Run(sizes, Path(folder), logging_steps=logging_steps)
        counts = []
        for watched in (True, False):
            run.step(watched=watched)  # a warm-up that is not counted
            with OpCounter() as ops:
                run.step(watched=watched)
            counts.append(ops.count)
        plain, watched_, watching, lines, ratios = [], [], [], [], []
        run.made = 0
        for _ in range(runs * logging_steps):
            plain.append(_timed(run, watched=False))
            run.made -= 1  # as if it had not been made
            watched_.append(_timed(run, watched=True))
            watching.append(run.watching)
            ratios.append(watched_[-1] / plain[-1])
            if run.made % logging_steps == 0:
                lines.append(run.line)
        step = statistics.median(plain)
        line = statistics.median(lines)
        cost = statistics.median(watching) + line / logging_steps
    return Cost(
        hidden=sizes.hidden,
        tokens=sizes.tokens,
        sites=len(run.mixture.built.sites),
        share=round(cost / step, 4),
        ratio=round(statistics.median(ratios), 4),
        ops=round((counts[0] - counts[1]) / counts[1], 4),
        step_ms=round(step * 1e3, 1),
        watching_ms=round(statistics.median(watching) * 1e3, 2),
        line_ms=round(line * 1e3, 2),
    )


def _timed(run: Run, *, watched: bool) -> float:
    started = time.perf_counter()
    run.step(watched=watched)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--logging-steps", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(1)
    sizes = Sizes(hidden=args.hidden, layers=args.layers, tokens=args.tokens)
    cost = measure(sizes, args.runs, logging_steps=args.logging_steps)
    print(json.dumps(asdict(cost)), flush=True)


if __name__ == "__main__":
    main()
