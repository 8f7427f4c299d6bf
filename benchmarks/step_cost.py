"""What one training step of an adapted causal LM costs, relative to the frozen base and to a plain
LoRA of the same size, on the same data.

Figures of an implementation, the first three free of timing noise:

    flops       floating-point operations of forward and backward
    saved       bytes of distinct storages that autograd keeps between forward and backward
    ops         ATen calls of one step, a proxy for kernel launches on a GPU
    time        median over runs of the ratio to the frozen base's step right beside it
    lora        the same to a step of peft's LoRA of rank 64
    overhead    (time − base's) / (LoRA's − base's), of the medians of these two ratios
    floor       operations / the rate at which the machine multiplies the base's shapes / time

The frozen base has no adapter, but gradients flow down to its embeddings. All parties run at
dropout 0 without auxiliary losses; the model is a Llama of random weights.

    python benchmarks/step_cost.py                          # all implementations at hidden 512
    python benchmarks/step_cost.py mola-top2 peft-lora-64 --hidden 1024 --threads 2
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from statistics import median

# a spinning OpenMP thread slows every other process, and with it the measurement
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import flops
import torch
from machine import fraction_of_floor, gemm_rate, linear_products
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

import molora

flops.register()

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EXPERTS, RANK, TOP_K = 8, 8, 2


@dataclass(frozen=True)
class Sizes:
    """The base model and the batch."""

    hidden: int = 512
    layers: int = 4
    tokens: int = 1024
    vocab: int = 2048


@dataclass(frozen=True)
class Cost:
    """One implementation; `*_x` are ratios to the frozen base, `lora_*` to a plain LoRA."""

    name: str
    time_x: float
    flops_x: float
    saved_x: float
    ops_x: float
    milliseconds: float
    saved_mib: float
    floor: float
    lora_time: float | None = None
    lora_saved: float | None = None
    lora_overhead: float | None = None


def base_model(sizes: Sizes) -> LlamaForCausalLM:
    """A frozen Llama in training mode, the same at every call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=sizes.hidden,
        intermediate_size=int(sizes.hidden * 2.75) // 64 * 64,
        num_hidden_layers=sizes.layers,
        num_attention_heads=max(1, sizes.hidden // 64),
        num_key_value_heads=max(1, sizes.hidden // 64),
        vocab_size=sizes.vocab,
    )
    return LlamaForCausalLM(config).requires_grad_(False).train()


def frozen(sizes: Sizes) -> torch.nn.Module:
    """The floor: no adapter, gradients down to the embeddings."""
    model = base_model(sizes)
    model.get_input_embeddings().register_forward_hook(lambda *args: args[2].requires_grad_(True))
    return model


def peft_lora(rank: int) -> Callable[[Sizes], torch.nn.Module]:
    """Plain LoRA of the package peft."""

    def build(sizes: Sizes) -> torch.nn.Module:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=rank, lora_alpha=16, lora_dropout=0.0, target_modules=PROJECTIONS)
        return get_peft_model(base_model(sizes), config)

    return build


def mixture(config: molora.MixtureConfig) -> Callable[[Sizes], torch.nn.Module]:
    """A molora mixture."""

    def build(sizes: Sizes) -> torch.nn.Module:
        model = base_model(sizes)
        molora.attach(model, config)
        return model

    return build


COMMON = {"rank": RANK, "dropout": 0.0}
IMPLEMENTATIONS: dict[str, Callable[[Sizes], torch.nn.Module]] = {
    "peft-lora-16": peft_lora(16),
    "peft-lora-64": peft_lora(64),
    "lora-64": mixture(molora.presets.lora(rank=64)),
    "molora-soft": mixture(molora.presets.molora(num_experts=EXPERTS, **COMMON)),
    "mola-top2": mixture(
        molora.presets.mola(num_experts=EXPERTS, top_k=TOP_K, losses=(), **COMMON)
    ),
    "mola-top2-of-128": mixture(
        molora.presets.mola(num_experts=128, top_k=TOP_K, losses=(), **COMMON)
    ),
    "mixlora-top2": mixture(
        molora.presets.mixlora(num_experts=EXPERTS, top_k=TOP_K, losses=(), **COMMON)
    ),
}


@dataclass(frozen=True)
class Step:
    """Forward, backward, and the gradients dropped again."""

    model: torch.nn.Module
    ids_BS: Tensor

    def forward(self) -> Tensor:
        return self.model(input_ids=self.ids_BS, labels=self.ids_BS).loss

    def __call__(self) -> None:
        self.forward().backward()
        for parameter in self.model.parameters():
            parameter.grad = None


class OpCounter(TorchDispatchMode):
    """Counts ATen calls."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += 1
        return func(*args, **(kwargs or {}))


def saved_bytes(forward: Callable[[], object]) -> int:
    """Bytes of distinct storages that a forward saves for its backward, parameters left out."""
    parameters = {
        obj.untyped_storage().data_ptr()
        for obj in gc.get_objects()
        # those of compiled graphs have no storage
        if isinstance(obj, torch.nn.Parameter) and not isinstance(obj, FakeTensor)
    }
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = forward()
    del kept
    return sum(seen.values())


@dataclass(frozen=True)
class Counts:
    """The figures that do not depend on the machine's speed."""

    flops: int
    saved: int
    ops: int


def count(step: Step) -> Counts:
    """Count one step; the first one is a warm-up that is not counted."""
    step()
    with FlopCounterMode(display=False) as products:
        step()
    with OpCounter() as ops:
        step()
    return Counts(products.get_total_flops(), saved_bytes(step.forward), ops.count)


LORA = "peft-lora-64"


def measure(
    names: list[str], sizes: Sizes, runs: int, *, lora: str | None = LORA
) -> Iterator[Cost]:
    """All implementations interleaved in one process, each between a step of the frozen base and
    one of a plain LoRA."""
    ids_BS = torch.randint(
        0, sizes.vocab, (4, sizes.tokens // 4), generator=torch.Generator().manual_seed(1)
    )
    floor = Step(frozen(sizes), ids_BS)
    floor_counts = count(floor)
    wanted = dict.fromkeys([*names, *([lora] if lora else [])])
    steps = {name: Step(IMPLEMENTATIONS[name](sizes), ids_BS) for name in wanted}
    counts = {name: count(step) for name, step in steps.items()}
    rate = gemm_rate(linear_products(floor.model, sizes.tokens))
    seconds: dict[str, list[Seconds]] = {name: [] for name in names}
    for _ in range(runs):
        for name in names:
            base, own = _timed(floor), _timed(steps[name])
            seconds[name].append(Seconds(base, own, _timed(steps[lora]) if lora else None))
    for name in names:
        counted, runs_of = counts[name], seconds[name]
        time_x = median(s.own / s.base for s in runs_of)
        cost = Cost(
            name,
            time_x=round(time_x, 3),
            flops_x=round(counted.flops / floor_counts.flops, 3),
            saved_x=round(counted.saved / floor_counts.saved, 3),
            ops_x=round(counted.ops / floor_counts.ops, 3),
            milliseconds=round(median(s.own for s in runs_of) * 1e3, 1),
            saved_mib=round(counted.saved / 2**20, 1),
            floor=round(median(fraction_of_floor(counted.flops, rate, s.own) for s in runs_of), 3),
        )
        yield (
            cost
            if lora is None
            else replace(
                cost,
                lora_time=round(median(s.own / s.lora for s in runs_of if s.lora), 3),
                lora_saved=round(counted.saved / counts[lora].saved, 3),
                lora_overhead=round(
                    (time_x - 1) / (median(s.lora / s.base for s in runs_of if s.lora) - 1), 3
                ),
            )
        )


@dataclass(frozen=True)
class Seconds:
    """Of steps right after each other."""

    base: float
    own: float
    lora: float | None


def _timed(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def arguments(description: str | None, known: Iterable[str]) -> tuple[list[str], Sizes, int]:
    """Names, all that are known if none is given, sizes and runs from the command line."""
    known = list(known)
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(known)}")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=7)
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in known]
    if unknown:
        parser.error(f"unknown {', '.join(unknown)}; known: {', '.join(known)}")
    torch.set_num_threads(args.threads)
    sizes = Sizes(hidden=args.hidden, layers=args.layers, tokens=args.tokens)
    return args.names or known, sizes, args.runs


def main() -> None:
    for cost in measure(*arguments(__doc__, IMPLEMENTATIONS)):
        print(json.dumps(asdict(cost)), flush=True)


if __name__ == "__main__":
    main()
