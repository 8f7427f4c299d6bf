"""SIGKILL at any point of "save step 2, then delete step 1": nothing is lost.

Each point is a forked process that ends before or after a call of the file system, or before, amid
or after a write. The process after it finds step 1 or step 2, exact, and goes on from there.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from faults import killed_in_child, run_and_kill
from saved_checkpoints import copy, is_exact, save_checkpoint, steps_of

from molora import io

Save = Callable[[Path, int], None]


def save_and_rotate(output_dir: Path, step: int) -> None:
    directory = save_checkpoint(output_dir, step)
    assert io.rotate(output_dir, limit=1, keep=[directory]).failed == {}


def rotate_and_save(output_dir: Path, step: int) -> None:
    """A wrong order, which the check must find out."""
    for path in output_dir.glob("checkpoint-*"):
        io.delete_checkpoint(path)
    save_checkpoint(output_dir, step)


def delete_the_manifest_last(output_dir: Path, step: int) -> None:
    """Another: what is half deleted still has the file that calls it whole."""
    save_checkpoint(output_dir, step)
    old = output_dir / f"checkpoint-{step - 1}"
    for path in sorted(old.iterdir(), key=lambda path: path.name == "checkpoint.json"):
        path.unlink()
    old.rmdir()


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output directory with step 1."""
    output_dir = tmp_path_factory.mktemp("before")
    save_checkpoint(output_dir, 1)
    return output_dir


def found_after_a_kill(before: Path, output_dir: Path, save: Save, at: int) -> int | None:
    """The step that the next process finds; None if the save ended before the `at`-th point."""
    shutil.rmtree(output_dir, ignore_errors=True)
    copy(before, output_dir)
    if not killed_in_child(lambda: run_and_kill(lambda: save(output_dir, 2), at)):
        return None
    found, _ = io.newest_complete(output_dir)
    assert found is not None, f"nothing is left after a kill at point {at}"
    assert is_exact(found)
    assert found.step in (1, 2)
    assert all(is_exact(other) for other in io.complete_checkpoints(output_dir)[0])
    return found.step


def go_on(output_dir: Path, found: int) -> None:
    """The next process trains one step more and saves: only its checkpoint is left, whole."""
    save_and_rotate(output_dir, found + 1)
    (directory,) = output_dir.iterdir()
    assert steps_of(output_dir) == [found + 1]
    assert is_exact(io.read_checkpoint(directory))
    assert len(list(directory.iterdir())) == 5


def outcomes(before: Path, output_dir: Path, save: Save, *, every: int = 1) -> Counter[int]:
    """Steps found, over every `every`-th point."""
    counts: Counter[int] = Counter()
    while found := found_after_a_kill(before, output_dir, save, counts.total() * every):
        go_on(output_dir, found)
        counts[found] += 1
    return counts


def test_killed_at_some_points_nothing_is_lost(before: Path, tmp_path: Path) -> None:
    counts = outcomes(before, tmp_path / "out", save_and_rotate, every=9)
    assert counts.keys() == {1, 2}
    assert counts.total() >= 12


@pytest.mark.slow
def test_killed_at_any_point_nothing_is_lost(before: Path, tmp_path: Path) -> None:
    counts = outcomes(before, tmp_path / "out", save_and_rotate)
    assert counts[1] >= 80
    assert counts[2] >= 20
    assert counts.total() >= 100


def test_a_wrong_order_is_found_out(before: Path, tmp_path: Path) -> None:
    """Negative control."""
    with pytest.raises(AssertionError, match="nothing is left after a kill"):
        outcomes(before, tmp_path / "out", rotate_and_save)


@pytest.mark.parametrize(
    ("save", "kept"), [(save_and_rotate, {False}), (delete_the_manifest_last, {True, False})]
)
@pytest.mark.slow
def test_a_checkpoint_that_is_being_deleted_has_no_manifest(
    save: Save, kept: set[bool], before: Path, tmp_path: Path
) -> None:
    """Whatever is gone of it; hashes need not find that out, as with the wrong order."""
    output_dir, at = tmp_path / "out", 0
    has_manifest = set()
    while found_after_a_kill(before, output_dir, save, at):
        at += 1
        old = output_dir / "checkpoint-1"
        if old.exists() and 1 not in steps_of(output_dir):
            has_manifest.add((old / "checkpoint.json").exists())
    assert has_manifest == kept


def test_points_are_reached_in_the_middle_of_writes(tmp_path: Path) -> None:
    """Negative control of the harness: a file is there in part, and the parent is unchanged."""

    def write() -> None:
        (tmp_path / "file").write_bytes(b"12345678")

    sizes = []
    while killed_in_child(lambda: run_and_kill(write, len(sizes))):
        sizes.append((tmp_path / "file").stat().st_size)
    assert sizes == [0, 4, 4]  # the second half had not been flushed
    assert (tmp_path / "file").read_bytes() == b"12345678"
