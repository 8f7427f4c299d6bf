"""A process finds its place in what torchrun, DeepSpeed and Slurm write into the environment."""

from __future__ import annotations

import os

import pytest

from molora.errors import TrainingError
from molora.train.place import Place, find_place

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "first",
    "MASTER_PORT": "29500",
}
SLURM = {
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "20007",
}


@pytest.fixture(autouse=True)
def _nobody_launched_this(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment without launchers; what a test writes into it is undone."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "LOCAL_"))}
    for name in TORCHRUN:
        kept.pop(name, None)
    monkeypatch.setattr(os, "environ", kept)


def given(variables: dict[str, str], **changes: str | None) -> None:
    os.environ |= variables
    for name, value in changes.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


def test_without_a_launcher_a_process_is_alone() -> None:
    given({}, SLURM_STEP_NUM_TASKS="1", SLURM_PROCID="0", SLURM_NTASKS="8")
    before = dict(os.environ)
    assert find_place() == Place(rank=0, size=1, local_rank=0)
    assert os.environ == before


def test_torchrun() -> None:
    given(TORCHRUN, LOCAL_WORLD_SIZE="2")
    assert find_place() == Place(3, 4, 1, "first", 29500)
    assert os.environ["LOCAL_WORLD_SIZE"] == "2"


def test_deepspeed_says_local_size() -> None:
    given(TORCHRUN, LOCAL_SIZE="2")
    assert find_place() == Place(3, 4, 1, "first", 29500)
    assert os.environ["LOCAL_WORLD_SIZE"] == "2"


def test_slurm_is_translated_for_the_libraries() -> None:
    given(SLURM, MASTER_ADDR="first")
    assert find_place() == Place(3, 4, 1, "first", 20_007)
    named = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
    assert [os.environ[name] for name in named] == ["3", "4", "1", "2", "20007"]
    assert find_place() == Place(3, 4, 1, "first", 20_007)


def test_slurm_on_one_node_needs_no_address() -> None:
    given(SLURM, SLURM_STEP_NUM_NODES="1", MASTER_PORT="1234")
    assert find_place() == Place(3, 4, 1, "127.0.0.1", 1234)


def test_slurm_on_several_nodes_needs_one() -> None:
    given(SLURM)
    with pytest.raises(TrainingError, match=r"2 nodes, but MASTER_ADDR is not set.*scontrol"):
        find_place()


def test_a_launcher_comes_before_slurm() -> None:
    given({**SLURM, **TORCHRUN}, SLURM_PROCID="0")
    assert find_place().rank == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"MASTER_ADDR": None}, "RANK is set, but MASTER_ADDR not"),
        ({"WORLD_SIZE": None, "MASTER_PORT": None}, "but WORLD_SIZE, MASTER_PORT not"),
        ({"RANK": "one"}, "RANK='one', .*must be whole numbers"),
        ({"RANK": "4"}, "RANK=4 is not below WORLD_SIZE=4"),
    ],
)
def test_what_cannot_be_is_an_error(changes: dict[str, str | None], message: str) -> None:
    given(TORCHRUN, **changes)
    with pytest.raises(TrainingError, match=message):
        find_place()
