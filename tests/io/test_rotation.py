"""Which checkpoint is the newest complete one, and which are deleted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from faults import failing
from saved_checkpoints import is_exact, save_checkpoint, steps_of

import molora
from molora import io
from molora.io.rotation import Rotation


def save(output_dir: Path, *steps: int) -> list[Path]:
    return [save_checkpoint(output_dir, step) for step in steps]


def damage(directory: Path) -> None:
    """Same sizes, other bytes: only the hash tells."""
    (path,) = directory.glob("trainer-*.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def steps_left(output_dir: Path) -> list[int]:
    """Of directories, whatever is in them."""
    return sorted(int(path.name.split("-")[1]) for path in output_dir.glob("checkpoint-*"))


def newest_step(output_dir: Path) -> int | None:
    found, _ = io.newest_complete(output_dir)
    return found and found.step


def test_the_newest_is_the_one_of_the_highest_number(tmp_path: Path) -> None:
    save(tmp_path, 10, 9, 100)
    found, skipped = io.newest_complete(tmp_path)
    assert found is not None
    assert found.directory == tmp_path / "checkpoint-100"
    assert is_exact(found)
    assert skipped == {}
    assert steps_of(tmp_path) == [9, 10, 100]


@pytest.mark.parametrize("make", [True, False], ids=["empty", "missing"])
def test_a_directory_without_checkpoints_has_none(make: bool, tmp_path: Path) -> None:
    output_dir = tmp_path / "out"
    if make:
        output_dir.mkdir()
    assert io.newest_complete(output_dir) == (None, {})
    assert io.complete_checkpoints(output_dir) == ([], {})
    assert io.rotate(output_dir, limit=1) == Rotation((), {})


def test_a_file_in_the_place_of_the_output_directory_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(molora.CheckpointError, match="out cannot be listed"):
        io.newest_complete(tmp_path / "out")


def test_incomplete_ones_are_passed_over_with_the_reason(tmp_path: Path) -> None:
    damaged, _, killed, half = save(tmp_path, 1, 2, 3, 4)
    damage(damaged)
    (killed / "checkpoint.json").unlink()
    (half / "trainer_state.json").unlink()
    found, skipped = io.newest_complete(tmp_path)
    assert found is not None
    assert found.step == 2
    assert list(skipped) == [half, killed]  # nor is the older one even looked at
    assert "has no trainer_state.json" in skipped[half]
    assert "has no checkpoint.json" in skipped[killed]
    complete, skipped = io.complete_checkpoints(tmp_path)
    assert [checkpoint.step for checkpoint in complete] == [2]
    assert "does not have the SHA-256" in skipped[damaged]


def test_older_ones_are_not_hashed(tmp_path: Path) -> None:
    old, _ = save(tmp_path, 1, 2)
    damage(old)
    assert io.newest_complete(tmp_path)[1] == {}
    damage(tmp_path / "checkpoint-2")  # negative control
    assert list(io.newest_complete(tmp_path)[1]) == [tmp_path / "checkpoint-2", old]


def test_other_names_links_and_files_are_no_checkpoints(tmp_path: Path) -> None:
    output_dir = tmp_path / "out"
    (directory,) = save(output_dir, 5)
    for name in ("checkpoint-", "checkpoint-07", "checkpoint-7a", "checkpoint--7", "xcheckpoint-7"):
        directory.rename(output_dir / name)
        assert io.newest_complete(output_dir) == (None, {})
        (output_dir / name).rename(directory)
    (output_dir / "checkpoint-6").symlink_to(directory)
    (output_dir / "checkpoint-7").write_text("mine")
    found, skipped = io.newest_complete(output_dir)
    assert found is not None
    assert found.step == 5
    assert "is a link" in skipped[output_dir / "checkpoint-6"]
    assert "is not a directory" in skipped[output_dir / "checkpoint-7"]


def test_a_directory_named_for_another_step_is_passed_over(tmp_path: Path) -> None:
    save(tmp_path, 5)
    renamed = (tmp_path / "checkpoint-5").rename(tmp_path / "checkpoint-50")
    found, skipped = io.newest_complete(tmp_path)
    assert found is None
    assert "holds step 5. Name it checkpoint-5" in skipped[renamed]
    assert is_exact(io.read_checkpoint(renamed))


# steps, limit, kept for other reasons, left
LIMITS = {
    "below": ([1, 2], 3, [], [1, 2]),
    "at": ([1, 2, 3], 3, [], [1, 2, 3]),
    "beyond": ([1, 2, 3, 4], 3, [], [2, 3, 4]),
    "one": ([1, 2, 3, 4], 1, [], [4]),
    "none": ([1, 2, 3, 4], None, [], [1, 2, 3, 4]),
    "by number": ([9, 10, 100], 2, [], [10, 100]),
    "best is oldest": ([1, 2, 3, 4], 2, [1], [1, 4]),
    "best and one more": ([1, 2, 3, 4], 3, [1], [1, 3, 4]),
    "best beyond the limit": ([1, 2, 3], 1, [1], [1, 3]),
    "best is newest": ([1, 2, 3], 2, [3], [2, 3]),
    "best is gone": ([1, 2, 3], 2, [0], [2, 3]),
    "best and newest": ([1, 2, 3, 4], 2, [2, 4], [2, 4]),
}


@pytest.mark.parametrize(("steps", "limit", "keep", "left"), LIMITS.values(), ids=LIMITS.keys())
def test_the_oldest_beyond_the_limit_are_deleted(
    steps: list[int], limit: int | None, keep: list[int], left: list[int], tmp_path: Path
) -> None:
    save(tmp_path, *steps)
    kept = [io.checkpoint_directory(tmp_path, step) for step in keep]
    deleted, failed = io.rotate(tmp_path, limit=limit, keep=kept)
    gone = [step for step in steps if step not in left]
    assert deleted == tuple(io.checkpoint_directory(tmp_path, step) for step in gone)
    assert failed == {}
    assert steps_left(tmp_path) == steps_of(tmp_path) == left
    assert io.rotate(tmp_path, limit=limit, keep=kept) == Rotation((), {})


def test_a_limit_below_one_is_an_error(tmp_path: Path) -> None:
    (directory,) = save(tmp_path, 1)
    with pytest.raises(molora.ConfigError, match="The limit of checkpoints is 0"):
        io.rotate(tmp_path, limit=0)
    assert directory.exists()


def test_the_newest_complete_one_stays_though_a_newer_one_is_damaged(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3)
    damage(tmp_path / "checkpoint-3")
    io.rotate(tmp_path, limit=1)
    assert steps_left(tmp_path) == [2, 3]
    assert newest_step(tmp_path) == 2


def test_nothing_is_deleted_where_nothing_is_complete(tmp_path: Path) -> None:
    for directory in save(tmp_path, 1, 2, 3):
        damage(directory)
    assert io.rotate(tmp_path, limit=1) == Rotation((), {})
    assert steps_left(tmp_path) == [1, 2, 3]


@pytest.mark.parametrize("limit", [None, 2])
def test_what_killed_saves_left_is_deleted_if_it_is_older(
    limit: int | None, tmp_path: Path
) -> None:
    save(tmp_path, 1, 2, 3, 4, 5)
    for step in (1, 3, 5):
        (tmp_path / f"checkpoint-{step}" / "checkpoint.json").unlink()
    (tmp_path / "checkpoint-0").mkdir()
    (tmp_path / "checkpoint-3" / ".molora.00.partial").write_text("half")
    deleted, _ = io.rotate(tmp_path, limit=limit)
    assert deleted == tuple(tmp_path / f"checkpoint-{step}" for step in (0, 1, 3))
    assert steps_left(tmp_path) == [2, 4, 5]


@pytest.mark.parametrize(("limit", "left"), [(2, [2, 3]), (None, [1, 2, 3])])
def test_a_damaged_older_one_does_not_count(
    limit: int | None, left: list[int], tmp_path: Path
) -> None:
    save(tmp_path, 1, 2, 3)
    os.truncate(tmp_path / "checkpoint-1" / "trainer_state.json", 3)
    io.rotate(tmp_path, limit=limit)
    assert steps_left(tmp_path) == left


def test_links_are_neither_followed_nor_deleted(tmp_path: Path) -> None:
    (outside,) = save(tmp_path / "elsewhere", 1)
    output_dir = tmp_path / "out"
    save(output_dir, 2, 3)
    (output_dir / "checkpoint-1").symlink_to(outside)
    (state,) = (output_dir / "checkpoint-2").glob("trainer_state.json")
    state.unlink()
    (tmp_path / "precious.json").write_text("mine")
    state.symlink_to(tmp_path / "precious.json")
    io.rotate(output_dir, limit=1)
    assert (output_dir / "checkpoint-1").is_symlink()
    assert is_exact(io.read_checkpoint(outside))
    assert not (output_dir / "checkpoint-2").exists()
    assert (tmp_path / "precious.json").read_text() == "mine"


def test_links_do_not_count(tmp_path: Path) -> None:
    (outside,) = save(tmp_path / "elsewhere", 2)
    output_dir = tmp_path / "out"
    save(output_dir, 1, 3)
    (output_dir / "checkpoint-2").symlink_to(outside)
    assert io.rotate(output_dir, limit=2) == Rotation((), {})
    assert steps_of(output_dir) == [1, 3]


def test_an_output_directory_that_is_a_link_is_used(tmp_path: Path) -> None:
    save(tmp_path / "out", 1, 2)
    (tmp_path / "link").symlink_to(tmp_path / "out")
    kept = [tmp_path / "out" / "checkpoint-1"]
    assert io.rotate(tmp_path / "link", limit=1, keep=kept) == Rotation((), {})
    io.rotate(tmp_path / "link", limit=1)
    assert steps_left(tmp_path / "out") == [2]


def test_files_of_others_stay(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    old = tmp_path / "checkpoint-1"
    (old / "notes.txt").write_text("mine")
    (old / "plots").mkdir()
    (tmp_path / "run.jsonl").write_text("mine")
    (tmp_path / "checkpoint-best").mkdir()
    for _ in range(2):
        io.rotate(tmp_path, limit=1)
        assert names(old) == {"notes.txt", "plots"}
        assert names(tmp_path) == {"run.jsonl", "checkpoint-best", "checkpoint-1", "checkpoint-2"}


@pytest.mark.parametrize("manifest", ["none", "foreign"])
def test_a_checkpoint_of_another_program_stays_whole(manifest: str, tmp_path: Path) -> None:
    other = tmp_path / "checkpoint-1"
    other.mkdir()
    files = {"trainer_state.json", "optimizer.pt"}
    files |= {"checkpoint.json"} if manifest == "foreign" else set()
    for name in files:
        (other / name).write_text("{}")
    save(tmp_path, 2)
    assert io.rotate(tmp_path, limit=1) == Rotation((), {})
    assert names(other) == files
    (other / "optimizer.pt").unlink()  # negative control: the rest could be what we left
    assert io.rotate(tmp_path, limit=1).deleted == (other,)


def test_what_the_manifest_lists_is_deleted_whatever_its_name(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoint-1"
    directory.mkdir()
    (directory / "tokenizer.json").write_text("{}")
    io.write_checkpoint(
        directory,
        step=1,
        world_size=1,
        stage=None,
        tensors={},
        state={},
        files=["tokenizer.json"],
    )
    assert is_exact(io.read_checkpoint(save_checkpoint(tmp_path, 2)))
    with failing("unlink", 0, PermissionError("no")):
        assert io.rotate(tmp_path, limit=1) == Rotation((), {directory: "no"})
    assert newest_step(tmp_path) == 2
    assert steps_of(tmp_path) == [2]  # it counts no more, and its files are known still
    assert io.rotate(tmp_path, limit=None).deleted == (directory,)
    assert not directory.exists()


def test_a_checkpoint_that_cannot_be_made_invisible_stays_complete(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    with failing("replace", 0, PermissionError("no")):
        assert io.rotate(tmp_path, limit=1).failed == {tmp_path / "checkpoint-1": "no"}
    assert steps_of(tmp_path) == [1, 2]


def test_deleting_says_whether_there_was_anything(tmp_path: Path) -> None:
    (directory,) = save(tmp_path, 1)
    assert io.delete_checkpoint(directory)
    assert not directory.exists()
    assert not io.delete_checkpoint(directory)
    (tmp_path / "file").write_text("")
    assert not io.delete_checkpoint(tmp_path / "file")
