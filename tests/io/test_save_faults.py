"""Whatever happens during a save, the directory loads as the old or the new mixture, whole."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import failing, killed_in_child, largest_file, patched
from saved_mixtures import MANIFEST, save_tiny, tensors_path
from tiny_models import randomize, tiny
from torch import Tensor

import molora

State = dict[str, Tensor]


@pytest.fixture
def mixture(tmp_path: Path) -> molora.Mixture:
    """Saved in `old`, then changed: what `_new` holds is saved nowhere."""
    mixture = save_tiny(tmp_path / "old")
    randomize(mixture, seed=7)
    return mixture


def _copy(mixture: molora.Mixture) -> State:
    return {name: tensor.clone() for name, tensor in mixture.state_dict().items()}


def _same(first: State, second: State) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(tensor, second[name]) for name, tensor in first.items()
    )


def _loaded(directory: Path) -> State:
    return _copy(molora.load(tiny("llama"), directory))


def _save_and_kill(mixture: molora.Mixture, directory: Path, at: int) -> None:
    """Save; SIGKILL before the `at`-th call, or after it if `at` is odd."""
    count = 0

    def change(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def replacement(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            mine, count = count, count + 2
            if mine == at:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return original(*args, **kwargs)
            finally:
                if mine + 1 == at:
                    os.kill(os.getpid(), signal.SIGKILL)

        return replacement

    with patched(change):
        mixture.save(directory)


def _age(directory: Path) -> None:
    """Make leftovers old enough to be taken for leftovers."""
    for path in directory.glob(".molora.*.partial"):
        os.utime(path, (0, 0))


@pytest.mark.parametrize("existing", [True, False], ids=["over_an_older_save", "new"])
def test_killed_at_any_call_the_old_or_the_new_mixture_loads(
    existing: bool, mixture: molora.Mixture, tmp_path: Path
) -> None:
    directory = tmp_path / ("old" if existing else "new")
    old = _loaded(directory) if existing else {}
    new = _copy(mixture)
    outcomes: list[str] = []
    while killed_in_child(lambda: _save_and_kill(mixture, directory, len(outcomes))):
        if (directory / MANIFEST).exists() or existing:
            found = _loaded(directory)
            assert _same(found, new) != _same(found, old)
            outcomes.append("new" if _same(found, new) else "old")
        else:
            with pytest.raises(molora.CheckpointError, match="no"):
                _loaded(directory)
            outcomes.append("nothing")
        if outcomes[-1] == "new":  # the next one starts as this one did, but for the leftovers
            if existing:
                _save(mixture, old, directory)
                mixture.load_state_dict(new)
            else:
                (directory / MANIFEST).unlink()
    assert set(outcomes) == {"old" if existing else "nothing", "new"}
    assert len(outcomes) >= 16
    _age(directory)
    mixture.save(directory)
    assert _same(_loaded(directory), new)
    assert len(list(directory.iterdir())) == 2


def _save(mixture: molora.Mixture, state: State, directory: Path) -> None:
    mixture.load_state_dict(state)
    mixture.save(directory)


@pytest.mark.parametrize("tenths", range(11))
def test_killed_in_the_middle_of_writing_the_old_mixture_loads(
    tenths: int, mixture: molora.Mixture, tmp_path: Path
) -> None:
    """SIGXFSZ ends the process inside a write, as SIGKILL would; sizes up to the whole file."""
    directory = tmp_path / "old"
    old = _loaded(directory)
    size = tensors_path(directory).stat().st_size

    def save() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        with largest_file(size * tenths // 10):
            mixture.save(directory)

    assert killed_in_child(save) == (tenths < 10)
    assert _same(_loaded(directory), old if tenths < 10 else _copy(mixture))
    leftovers = list(directory.glob(".molora.*.partial"))
    assert len(leftovers) == (tenths < 10)
    mixture.save(directory)  # a leftover does not disturb, nor is it deleted while it is young
    assert list(directory.glob(".molora.*.partial")) == leftovers
    _age(directory)
    mixture.save(directory)
    assert _same(_loaded(directory), _copy(mixture))
    assert len(list(directory.iterdir())) == 2


@pytest.mark.parametrize("existing", [True, False], ids=["over_an_older_save", "new"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_full_disk_is_an_error_that_leaves_the_old_mixture(
    share: float, existing: bool, mixture: molora.Mixture, tmp_path: Path
) -> None:
    directory = tmp_path / ("old" if existing else "new")
    size = tensors_path(tmp_path / "old").stat().st_size
    names = sorted(path.name for path in directory.glob("*"))
    with (
        largest_file(int(size * share)),
        pytest.raises(molora.CheckpointError, match=r"could not be written: .*File too large"),
    ):
        mixture.save(directory)
    assert sorted(path.name for path in directory.glob("*")) == names
    assert directory.exists() == existing
    if existing:
        assert not _same(_loaded(directory), _copy(mixture))
    mixture.save(directory)
    assert _same(_loaded(directory), _copy(mixture))


@pytest.mark.parametrize("existing", [True, False], ids=["over_an_older_save", "new"])
@pytest.mark.parametrize(
    ("call", "at"), [("fsync", i) for i in range(4)] + [("replace", 0), ("replace", 1)]
)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=["ENOSPC", "EIO"])
def test_a_failing_call_is_an_error_that_leaves_a_whole_mixture(
    code: int, call: str, at: int, existing: bool, mixture: molora.Mixture, tmp_path: Path
) -> None:
    directory = tmp_path / ("old" if existing else "new")
    old = _loaded(directory) if existing else {}
    with (
        failing(call, at, OSError(code, os.strerror(code))),
        pytest.raises(molora.CheckpointError, match=f"could not be written: .*{os.strerror(code)}"),
    ):
        mixture.save(directory)
    # only the last flush comes after the new manifest is in place
    if (call, at) == ("fsync", 3):
        assert _same(_loaded(directory), _copy(mixture))
    elif existing:
        assert _same(_loaded(directory), old)
    else:
        assert not directory.exists()
    assert not existing or len(list(directory.iterdir())) == 2
    mixture.save(directory)
    assert _same(_loaded(directory), _copy(mixture))
    assert len(list(directory.iterdir())) == 2


def test_what_cannot_be_deleted_does_not_fail_the_save(
    mixture: molora.Mixture, tmp_path: Path
) -> None:
    with failing("unlink", 0, PermissionError("no")) as calls:
        mixture.save(tmp_path / "old")
    assert "unlink" in calls
    assert len(list((tmp_path / "old").glob("*.safetensors"))) == 2
    assert _same(_loaded(tmp_path / "old"), _copy(mixture))
    mixture.save(tmp_path / "old")
    assert len(list((tmp_path / "old").iterdir())) == 2


def test_data_reaches_the_disk_before_the_name_that_promises_it(
    mixture: molora.Mixture, tmp_path: Path
) -> None:
    """Tensors, then the manifest that names them, then the old file goes: each flushed before."""
    with failing("nothing", 0, OSError()) as calls:
        mixture.save(tmp_path / "old")
    order = [call for call in calls if call in ("fsync", "replace", "unlink")]
    assert order == ["fsync", "replace", "fsync"] * 2 + ["unlink"]
