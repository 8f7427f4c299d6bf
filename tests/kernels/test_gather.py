"""What the backend for few rows promises beside what `test_backends.py` holds of all."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from host_reads import HostReads
from kernel_problems import LOOPS, call, problem
from torch.utils._python_dispatch import TorchDispatchMode

from molora.kernels import BACKENDS


class Calls(TorchDispatchMode):
    """Counts ATen calls inside by name."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func.__name__.partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


# what moves no number here: `to` finds the dtype that it is asked for
VIEWS = {"view", "t", "transpose", "unsqueeze", "expand", "select", "_unsafe_view", "reshape", "to"}


def test_one_token_takes_eight_calls():
    p = problem(T=1, base="w").to(torch.float32)
    calls = {}
    for name in ("dense", "grouped", "gather"):
        with torch.inference_mode(), Calls() as counted:
            call(BACKENDS[name], "lora_mix")(p)
        calls[name] = sum(n for op, n in counted.count.items() if op not in VIEWS)
    assert calls["gather"] == 8, "of which the base's product is one"
    assert calls["gather"] < min(calls["dense"], calls["grouped"])


def test_only_chosen_experts_are_read():
    p = problem(T=3, only=(0, 2))
    expected = call(BACKENDS["gather"], "lora_mix")(p)
    for factor in (p.lora_A, p.lora_B):
        factor[[1, 3]] = torch.nan
    assert torch.equal(call(BACKENDS["gather"], "lora_mix")(p), expected)
    assert call(BACKENDS["dense"], "lora_mix")(p).isnan().any()


def test_nothing_is_read_on_the_host():
    reads = HostReads()
    for op in ("lora_mix", "lora_rows"):
        reads.counting(call(BACKENDS["gather"], op))(problem())
    assert reads.reads == []


@pytest.mark.parametrize("name", ["gather", "grouped"])
def test_gates_alone_are_those_of_the_experts_in_order(name):
    p = problem(E=4, K=4, base="w")
    in_order = replace(p, index=torch.arange(4).expand(len(p.x), -1))
    alone = call(BACKENDS[name], "lora_mix")(replace(p, index=None))
    torch.testing.assert_close(alone, LOOPS["lora_mix"](in_order))
    assert not torch.allclose(alone, LOOPS["lora_mix"](p)), "else the order plays no role"
