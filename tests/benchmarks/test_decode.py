"""benchmarks/decode.py: what is counted, and that every step is the same."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def decode() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        for name in ("decode", "step_cost"):
            patch.delitem(sys.modules, name, raising=False)
        return importlib.import_module("decode")


@pytest.fixture(scope="module")
def sizes(decode: ModuleType):  # type: ignore[no-untyped-def]
    return decode.Sizes(hidden=64, layers=2, vocab=64)


def test_every_implementation_is_measured_beside_base_and_lora(
    decode: ModuleType, sizes: object
) -> None:
    names = list(decode.IMPLEMENTATIONS)
    costs = list(decode.measure(names, sizes, cached=5, runs=1, steps=1))
    assert [cost.name for cost in costs] == names
    calls = {cost.name: cost.calls for cost in costs}
    assert 0 < calls["base"] < min(calls[name] for name in names[1:])
    assert all(cost.base_x > 0 and cost.lora_x > 0 and cost.milliseconds > 0 for cost in costs)


def test_a_step_decodes_one_token_after_the_cached_ones_and_leaves_them(
    decode: ModuleType, sizes: object
) -> None:
    model = decode.IMPLEMENTATIONS["mola-top2"](sizes)
    seen = []

    def note(module: torch.nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        cache = kwargs["past_key_values"]
        seen.append((kwargs["input_ids"], cache.get_seq_length(), output.logits))

    handle = model.register_forward_hook(note, with_kwargs=True)
    step = decode.decoding_step(model, sizes, 5)
    for _ in range(2):
        step()
    handle.remove()
    assert [(ids.shape[1], length) for ids, length, _ in seen] == [(5, 5), (1, 6), (1, 6)]
    torch.testing.assert_close(seen[1][2], seen[2][2], rtol=0, atol=0)
    # the token sees the cache: without it, its logits are others
    alone = model(input_ids=seen[1][0]).logits
    assert (alone - seen[1][2]).abs().max() > 1e-3
