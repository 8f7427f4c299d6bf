"""What can go wrong under a program that writes files: full disks, failing calls, kills."""

from __future__ import annotations

import io
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

CALLS = ["mkdir", "open", "fsync", "replace", "unlink", "rmdir"]
"""Functions of `os` that saving and deleting call; bytes are written by files."""


@contextmanager
def patched(change: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Inside, every call of `CALLS` is `change(its name, itself)`."""
    originals = {name: getattr(os, name) for name in CALLS}
    try:
        for name, original in originals.items():
            setattr(os, name, change(name, original))
        yield
    finally:
        for name, original in originals.items():
            setattr(os, name, original)


@contextmanager
def failing(call: str, at: int, error: BaseException) -> Iterator[list[str]]:
    """Inside, the `at`-th call (from 0) of one function raises `error`; yields the calls."""
    calls: list[str] = []

    def change(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def replacement(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            if name == call and calls.count(call) == at + 1:
                raise error
            return original(*args, **kwargs)

        return replacement

    with patched(change):
        yield calls


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Inside, writing more into one file fails, as on a full disk."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def killed_in_child(run: Callable[[], object]) -> bool:
    """Whether a forked copy of this process was killed by a signal while it ran."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            run()
            code = 0
        finally:
            os._exit(code)  # neither pytest nor exit handlers of the parent run here
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) in (signal.SIGKILL, signal.SIGXFSZ)
        return True
    assert os.WEXITSTATUS(status) == 0, "the child failed"
    return False


def run_and_kill(run: Callable[[], object], at: int) -> None:
    """Run; SIGKILL this process at a point: before or after a call, before, amid or after a write.

    Points count from 0. To be called in a child: nothing is put back.
    """
    passed = 0

    def point() -> None:
        nonlocal passed
        if passed == at:
            os.kill(os.getpid(), signal.SIGKILL)
        passed += 1

    def change(_: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def replacement(*args: Any, **kwargs: Any) -> Any:
            point()
            try:
                return original(*args, **kwargs)
            finally:
                point()

        return replacement

    open_file = io.open

    def open_watched(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        opened = open_file(file, mode, *args, **kwargs)
        return _WatchedFile(opened, point) if "w" in mode else opened

    io.open = open_watched  # type: ignore[assignment]
    with patched(change):
        run()


class _WatchedFile:
    """A file that is written to in two halves, the first of which reaches the system alone."""

    def __init__(self, file: Any, point: Callable[[], None]) -> None:
        self.file, self.point = file, point

    def __enter__(self) -> _WatchedFile:
        self.file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.file.__exit__(*error)

    def write(self, data: Any) -> int:
        data = memoryview(data).cast("B")
        self.point()
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        self.point()
        self.file.write(data[len(data) // 2 :])
        self.point()
        return len(data)
