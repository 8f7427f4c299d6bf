"""How fast this machine multiplies matrices of a model's own shapes: what its time is held against.

A step cannot take less than its operations divided by that rate, so

    fraction of the floor = (operations of base and adapter / rate) / time

    python benchmarks/machine.py --hidden 1024 --tokens 1024      # operations per second
"""

from __future__ import annotations

import argparse
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable

# a spinning OpenMP thread slows every other process, and with it the measurement
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import nn

Product = tuple[int, int, int]
"""(T, D, F): T rows of D values times a (F, D) weight."""


def linear_products(model: nn.Module, rows: int) -> list[Product]:
    """The product of every linear of a model for so many rows."""
    linears = (module for module in model.modules() if isinstance(module, nn.Linear))
    return [(rows, linear.in_features, linear.out_features) for linear in linears]


def gemm_rate(
    products: Iterable[Product],
    dtype: torch.dtype = torch.float32,
    repeats: int = 20,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Floating-point operations per second of x Wᵀ, each shape at the fastest of its repeats.

    A product counts as often as it is named, and is measured once. The rate is that of the threads
    that torch uses; other processes can only lower it.

    Raises:
        ValueError: no product, or no repeat.
    """
    counts = Counter(products)
    if not counts or repeats < 1:
        raise ValueError(
            f"gemm_rate needs a product and a repeat (got {len(counts)} and {repeats}). "
            "Name at least one (T, D, F), and repeats=1 or more."
        )
    operations = seconds = 0.0
    for (rows, inner, outer), count in counts.items():
        operations += count * 2 * rows * inner * outer
        seconds += count * _fastest(rows, inner, outer, dtype, repeats, clock)
    return operations / seconds


def fraction_of_floor(operations: float, rate: float, seconds: float) -> float:
    """The time that the operations take at the machine's rate ÷ the time that passed."""
    return operations / rate / seconds


def _fastest(
    rows: int,
    inner: int,
    outer: int,
    dtype: torch.dtype,
    repeats: int,
    clock: Callable[[], float],
) -> float:
    x_TD = torch.randn(rows, inner, dtype=dtype)
    weight_FD = torch.randn(outer, inner, dtype=dtype)
    torch.nn.functional.linear(x_TD, weight_FD)  # the first call plans the product
    times = []
    for _ in range(repeats):
        start = clock()
        torch.nn.functional.linear(x_TD, weight_FD)
        times.append(clock() - start)
    return min(times)


def main() -> None:
    from step_cost import Sizes, base_model

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = base_model(Sizes(hidden=args.hidden, layers=1))
    products = linear_products(model, args.tokens)
    rate = gemm_rate(products, getattr(torch, args.dtype), args.repeats)
    print(f"{rate / 1e9:.1f} GFLOP/s")


if __name__ == "__main__":
    main()
