"""Random streams continue, bit for bit, from where they were read."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from molora import CheckpointError, io
from molora.train.rng import rng_state, set_rng_state


@pytest.fixture(autouse=True)
def streams() -> Iterator[None]:
    """Seeded for the test, and back where they were after it."""
    python, numpy, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    yield
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(torch_state)


def _draw() -> dict[str, list[float]]:
    """Enough to use up the words of each stream, an odd number of normal numbers among them."""
    return {
        "python": [random.random() for _ in range(700)] + [random.gauss(0, 1) for _ in range(3)],
        "numpy": [*np.random.rand(700).tolist(), *(np.random.standard_normal() for _ in range(3))],
        "torch": [*torch.rand(1300).tolist(), *(float(torch.randn(())) for _ in range(3))],
        "dropout": torch.nn.functional.dropout(torch.ones(500), 0.3).tolist(),
    }


@pytest.mark.parametrize("draws", [0, 1, 2], ids=["fresh", "with_a_normal_left", "later"])
def test_streams_continue_where_they_were(draws: int) -> None:
    for _ in range(draws):
        _draw()
    state = rng_state()
    saved = {name: tensor.clone() for name, tensor in state.items()}
    want = _draw()
    other = _draw()
    assert all(want[name] != other[name] for name in want)  # negative control: streams do move
    set_rng_state(state)
    assert _draw() == want
    assert all(torch.equal(state[name], saved[name]) for name in saved if "normal" not in name)


def test_an_unused_normal_number_is_kept() -> None:
    """random.gauss and numpy make normal numbers in pairs: the second one is part of the state."""
    random.gauss(0, 1)
    np.random.standard_normal()
    state = rng_state()
    assert not state["python_normal"].isnan()
    assert not state["numpy_normal"].isnan()
    want = random.gauss(0, 1), np.random.standard_normal()
    after = rng_state()
    assert after["python_normal"].isnan()
    assert after["numpy_normal"].isnan()
    set_rng_state(state)
    assert (random.gauss(0, 1), np.random.standard_normal()) == want
    lost = {**state, "python_normal": after["python_normal"], "numpy_normal": after["numpy_normal"]}
    set_rng_state(lost)  # negative control
    assert random.gauss(0, 1) != want[0]
    assert np.random.standard_normal() != want[1]


def test_shapes_do_not_depend_on_the_position() -> None:
    def shapes() -> dict[str, tuple[torch.Size, torch.dtype]]:
        return {name: (tensor.shape, tensor.dtype) for name, tensor in rng_state().items()}

    fresh = shapes()
    _draw()
    assert shapes() == fresh
    assert fresh.keys() == {"python", "python_normal", "numpy", "numpy_normal", "torch"}


def test_a_state_that_was_written_and_read_continues(tmp_path: Path) -> None:
    _draw()
    tensors = {f"rank.0.{name}": tensor for name, tensor in rng_state().items()}
    io.write_checkpoint(
        tmp_path, step=1, world_size=1, stage=None, tensors=tensors, state={}, files=[]
    )
    want = _draw()
    read = io.read_checkpoint(tmp_path).tensors()
    set_rng_state({name.removeprefix("rank.0."): tensor for name, tensor in read.items()})
    assert _draw() == want


def _without(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda state: (state.pop(name), None)[1]


def _with(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    return lambda state: state.update({name: change(state[name])})


def _put(place: int, value: int) -> Callable[[Tensor], Tensor]:
    return lambda words: words.index_fill(0, torch.tensor([place]), value)


DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], None], str]] = {
    "missing": (_without("numpy"), "needs numpy"),
    "more": (lambda state: state.update({"cuda.0": torch.zeros(16)}), "has cuda.0, .*devices"),
    "shorter": (_with("torch", lambda t: t[:-1]), "'torch' is torch.uint8"),
    "other dtype": (_with("python", Tensor.float), "'python' is torch.float32"),
    "negative word": (_with("numpy", _put(0, -1)), "'numpy' holds what no stream has"),
    "large word": (_with("python", _put(5, 2**32)), "'python' holds what no stream has"),
    "position": (_with("numpy", _put(624, 625)), "'numpy' holds what no stream has"),
    "zeros": (_with("torch", torch.zeros_like), "is damaged: "),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_state_is_refused_and_moves_no_stream(
    damage: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    state = rng_state()
    damage(state)
    _draw()
    here = rng_state()
    with pytest.raises(CheckpointError, match=message):
        set_rng_state(state)
    want = _draw()
    set_rng_state(here)
    assert _draw() == want


def test_another_kind_of_numpy_generator_is_refused() -> None:
    default = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(1))
    try:
        with pytest.raises(CheckpointError, match="numpy's global generator is PCG64"):
            rng_state()
    finally:
        np.random.set_bit_generator(default)


@pytest.mark.gpu
def test_streams_of_devices_continue() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    state = rng_state([device])
    want = torch.rand(9, device=device)
    assert not torch.equal(torch.rand(9, device=device), want)
    set_rng_state(state, [device])
    assert torch.equal(torch.rand(9, device=device), want)
    with pytest.raises(CheckpointError, match=r"has cuda\.0, .*devices"):
        set_rng_state(state)
