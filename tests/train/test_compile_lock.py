"""A lock that a killed compilation left is told; one of a compilation at work is waited for."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from molora.errors import TrainingError
from molora.train.compile_lock import check_locks, compile_locks, is_compiling


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """(extension, age in seconds) → a lock in torch's cache."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))

    def plant(name: str = "op", *, age: float = 0.0) -> Path:
        path = tmp_path / name / "lock"
        path.parent.mkdir()
        path.touch()
        for entry in (path, path.parent):
            os.utime(entry, (time.time() - age, time.time() - age))
        return path

    return plant


def test_without_a_lock_there_is_nothing_to_wait_for(lock: Callable[..., Path]) -> None:
    check_locks(["op"])
    other = lock("another_op", age=1000)
    assert compile_locks() == [other]
    check_locks(["op"])


def test_an_old_lock_is_told_at_once(lock: Callable[..., Path]) -> None:
    path = lock(age=1000)
    started = time.monotonic()
    with pytest.raises(TrainingError, match=rf"{path} makes DeepSpeed wait .*Delete it"):
        check_locks(["op"])
    assert time.monotonic() - started < 10


def test_a_fresh_lock_gets_its_time(lock: Callable[..., Path]) -> None:
    lock()
    started = time.monotonic()
    with pytest.raises(TrainingError, match="makes DeepSpeed wait"):
        check_locks(["op"], patience=1.5)
    assert time.monotonic() - started > 1


def test_a_lock_that_is_released_is_no_fault(lock: Callable[..., Path]) -> None:
    path = lock()
    threading.Timer(1.0, path.unlink).start()
    check_locks(["op"], patience=30)
    assert not path.exists()


def test_a_process_that_works_there_is_waited_for(lock: Callable[..., Path]) -> None:
    path = lock(age=1000)
    code = "import time, os; time.sleep(3); os.remove('lock')"
    with subprocess.Popen([sys.executable, "-c", code], cwd=path.parent):
        assert is_compiling(path)
        check_locks(["op"], patience=0.5)
    assert not is_compiling(path)
