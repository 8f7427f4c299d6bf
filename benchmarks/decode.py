"""What decoding one token of one sequence costs with an adapter that is not merged.

A Llama of random weights in evaluation has 256 tokens in its cache and is given one more; the cache
is then cut back, so that every step is the same. Three figures per implementation:

    base_x  median over runs of the ratio to the frozen base's step right beside it
    lora_x  likewise to a step of peft's LoRA of rank 16
    calls   ATen calls of a step, which at one row are most of its cost

    python benchmarks/decode.py                               # all implementations at hidden 512
    python benchmarks/decode.py mola-top2 --hidden 2048 --runs 31
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

# a spinning OpenMP thread slows every other process, and with it the measurement
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from step_cost import COMMON, EXPERTS, TOP_K, OpCounter, Sizes, base_model, mixture, peft_lora
from transformers import DynamicCache

import molora

Step = Callable[[], None]
LORA = "peft-lora-16"
IMPLEMENTATIONS: dict[str, Callable[[Sizes], torch.nn.Module]] = {
    "base": base_model,
    LORA: peft_lora(16),
    "lora-16": mixture(molora.presets.lora(rank=16)),
    "molora-soft": mixture(molora.presets.molora(num_experts=EXPERTS, **COMMON)),
    "mola-top2": mixture(
        molora.presets.mola(num_experts=EXPERTS, top_k=TOP_K, losses=(), **COMMON)
    ),
    "mixlora-top2": mixture(
        molora.presets.mixlora(num_experts=EXPERTS, top_k=TOP_K, losses=(), **COMMON)
    ),
}


@dataclass(frozen=True)
class Cost:
    """See the module's docstring."""

    name: str
    hidden: int
    base_x: float
    lora_x: float
    calls: int
    milliseconds: float


def decoding_step(model: torch.nn.Module, sizes: Sizes, cached: int) -> Step:
    """One token after `cached` others, whose keys and values are there."""
    model.eval()
    source = torch.Generator().manual_seed(1)
    ids_BS = torch.randint(0, sizes.vocab, (1, cached + 1), generator=source)
    cache = DynamicCache()
    with torch.inference_mode():
        model(input_ids=ids_BS[:, :cached], past_key_values=cache, use_cache=True)

    @torch.inference_mode()
    def step() -> None:
        model(input_ids=ids_BS[:, cached:], past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return step


def measure(
    names: list[str], sizes: Sizes, *, cached: int, runs: int, steps: int
) -> Iterator[Cost]:
    """All implementations interleaved in one process; a run times `steps` tokens of each of the
    base, peft's LoRA and the implementation."""
    wanted = dict.fromkeys(["base", LORA, *names])
    made = {name: decoding_step(IMPLEMENTATIONS[name](sizes), sizes, cached) for name in wanted}
    calls = {}
    for name, step in made.items():
        step()
        with OpCounter() as counter:
            step()
        calls[name] = counter.count
    seconds: dict[str, list[tuple[float, float, float]]] = {name: [] for name in names}
    for _ in range(runs):
        for name in names:
            base, lora = _timed(made["base"], steps), _timed(made[LORA], steps)
            seconds[name].append((base, lora, _timed(made[name], steps)))
    for name in names:
        yield Cost(
            name,
            sizes.hidden,
            base_x=round(statistics.median(own / base for base, _, own in seconds[name]), 3),
            lora_x=round(statistics.median(own / lora for _, lora, own in seconds[name]), 3),
            calls=calls[name],
            milliseconds=round(statistics.median(own for *_, own in seconds[name]) * 1e3, 2),
        )


def _timed(step: Step, steps: int) -> float:
    """Seconds of a step."""
    start = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - start) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(IMPLEMENTATIONS)}")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--cached", type=int, default=256, help="tokens in the cache")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=31)
    parser.add_argument("--steps", type=int, default=4, help="tokens timed together")
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in IMPLEMENTATIONS]
    if unknown:
        parser.error(f"unknown {', '.join(unknown)}; known: {', '.join(IMPLEMENTATIONS)}")
    torch.set_num_threads(args.threads)
    sizes = Sizes(hidden=args.hidden, layers=args.layers)
    names = args.names or list(IMPLEMENTATIONS)
    for cost in measure(names, sizes, cached=args.cached, runs=args.runs, steps=args.steps):
        print(json.dumps(asdict(cost)), flush=True)


if __name__ == "__main__":
    main()
