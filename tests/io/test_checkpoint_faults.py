"""Whatever fails during the save of a checkpoint, the older one counts, or the new one, whole."""

from __future__ import annotations

import errno
import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
from faults import failing, largest_file
from saved_checkpoints import (
    BASE,
    CONFIG,
    is_exact,
    mixture_tensors,
    random_tensor,
    save_checkpoint,
    steps_of,
    trainer_state,
    trainer_tensors,
)

import molora
from molora import io

ERRORS = {
    "ENOSPC": OSError(errno.ENOSPC, "No space left on device"),
    "EROFS": OSError(errno.EROFS, "Read-only file system"),
    "interrupt": KeyboardInterrupt("by the user"),
}


@pytest.fixture
def output_dir(tmp_path: Path) -> Path:
    """Step 1 is saved; of step 2 the mixture."""
    save_checkpoint(tmp_path, 1)
    save_mixture(tmp_path)
    return tmp_path


def save_mixture(output_dir: Path) -> None:
    io.write(
        output_dir / "checkpoint-2",
        state=mixture_tensors(2),
        mixture=CONFIG,
        base=BASE,
        molora_version="0.1.0",
    )


def write(output_dir: Path) -> None:
    directory = output_dir / "checkpoint-2"
    io.write_checkpoint(
        directory,
        step=2,
        world_size=2,
        stage=3,
        tensors=trainer_tensors(2),
        state=trainer_state(2),
        files=[io.MANIFEST, io.read_manifest(directory).tensors_file],
    )


def newest(output_dir: Path) -> int:
    """Step of the newest complete one, which is exact."""
    found, _ = io.newest_complete(output_dir)
    assert found is not None
    assert is_exact(found)
    return found.step


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_full_disk_is_an_error_that_leaves_the_older_checkpoint(
    share: float, output_dir: Path
) -> None:
    before = names(output_dir / "checkpoint-2")
    (tensors,) = (output_dir / "checkpoint-1").glob("trainer-*.safetensors")
    with (
        largest_file(int(tensors.stat().st_size * share)),
        pytest.raises(
            molora.CheckpointError,
            match=r"checkpoint-2 could not be written: .*File too large.* Make room",
        ),
    ):
        write(output_dir)
    assert names(output_dir / "checkpoint-2") == before
    assert newest(output_dir) == 1
    write(output_dir)
    assert newest(output_dir) == 2


def test_a_disk_that_is_just_not_full_is_none(output_dir: Path) -> None:
    """Negative control of the test above."""
    (tensors,) = (output_dir / "checkpoint-1").glob("trainer-*.safetensors")
    with largest_file(tensors.stat().st_size):
        write(output_dir)
    assert newest(output_dir) == 2


def calls_of_a_save(output_dir: Path) -> list[str]:
    with failing("nothing", 0, OSError()) as calls:
        write(output_dir)
    return calls


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS.keys())
def test_any_failing_call_leaves_the_older_checkpoint_or_the_new_one(
    error: BaseException, output_dir: Path
) -> None:
    counts = Counter(calls_of_a_save(output_dir))
    for call in ("open", "fsync", "replace"):
        for at in range(counts[call]):
            shutil.rmtree(output_dir / "checkpoint-2")
            save_mixture(output_dir)
            expected = molora.CheckpointError if isinstance(error, OSError) else KeyboardInterrupt
            with (
                failing(call, at, error),
                pytest.raises(expected, match=error.args[-1]),
            ):
                write(output_dir)
            # only the last flush comes after the manifest is in its place
            comes_last = call in ("open", "fsync") and at == counts[call] - 1
            assert newest(output_dir) == (2 if comes_last else 1)
            assert not list(output_dir.glob("*/*.partial"))
            assert comes_last or not list(output_dir.glob("checkpoint-2/trainer-*"))
            write(output_dir)
            assert newest(output_dir) == 2
            assert steps_of(output_dir) == [1, 2]


def test_data_reaches_the_disk_before_the_name_that_promises_it(output_dir: Path) -> None:
    """Tensors, state, once more every file and the parent's entry, and only then the manifest."""
    calls = [call for call in calls_of_a_save(output_dir) if call in ("fsync", "replace", "unlink")]
    put = ["fsync", "replace", "fsync"]
    assert calls == [*put, *put, *["fsync"] * 4, "fsync", *put]


def test_a_directory_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(molora.CheckpointError, match="checkpoint-1 could not be written"):
        io.write_checkpoint(
            tmp_path / "file" / "checkpoint-1",
            step=1,
            world_size=1,
            stage=None,
            tensors={},
            state={},
            files=[],
        )
    assert (tmp_path / "file").read_text() == "mine"


def test_what_killed_saves_and_deletions_left_is_replaced(output_dir: Path) -> None:
    directory = output_dir / "checkpoint-2"
    (directory / f"trainer-{'0' * 16}.safetensors").write_bytes(b"half")
    (directory / ".molora.0123.partial").write_bytes(b"half")
    (directory / ".checkpoint.deleted.json").write_text("{}")
    (directory / "trainer_state.json").write_text('{"global_step": 1')
    (directory / "notes.txt").write_text("mine")
    write(output_dir)
    assert newest(output_dir) == 2
    left = set(names(directory)) - set(names(output_dir / "checkpoint-1"))
    assert {name for name in left if "safetensors" not in name} == {"notes.txt"}
    assert len(names(directory)) == 6


def test_a_save_over_a_complete_checkpoint_replaces_it(output_dir: Path) -> None:
    write(output_dir)
    directory = output_dir / "checkpoint-2"
    old = names(directory)
    tensors = {"other": random_tensor("float32", (9,))}
    kept = [io.MANIFEST, io.read_manifest(directory).tensors_file]
    io.write_checkpoint(
        directory, step=2, world_size=1, stage=None, tensors=tensors, state={}, files=kept
    )
    assert io.read_checkpoint(directory).tensors().keys() == {"other"}
    assert len(names(directory)) == len(old)
    assert names(directory) != old


def test_a_full_disk_leaves_a_complete_checkpoint_of_the_same_step(output_dir: Path) -> None:
    write(output_dir)
    directory = output_dir / "checkpoint-2"
    with largest_file(1000), pytest.raises(molora.CheckpointError, match="File too large"):
        io.write_checkpoint(
            directory,
            step=2,
            world_size=1,
            stage=None,
            tensors={"other": random_tensor("float32", (9, 99))},
            state={},
            files=[],
        )
    assert newest(output_dir) == 2
    assert len(names(directory)) == 5


@pytest.mark.parametrize("at", range(9))
def test_what_cannot_be_deleted_does_not_fail_the_save(at: int, output_dir: Path) -> None:
    (output_dir / "checkpoint-2" / f"trainer-{'0' * 16}.safetensors").write_bytes(b"half")
    with failing("unlink", at, PermissionError(errno.EACCES, os.strerror(errno.EACCES))):
        write(output_dir)
    assert newest(output_dir) == 2
