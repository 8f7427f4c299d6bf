"""Where a process stands in its launch, as launchers say it in the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from molora.errors import TrainingError


@dataclass(frozen=True)
class Place:
    """Where this process stands in its launch."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    address: str = ""
    port: int = 0


def find_place() -> Place:
    """The place that a launcher gave, in the variables of torchrun and DeepSpeed or of a Slurm
    step; what Slurm says is written into the former, since libraries read these.

    Raises:
        TrainingError: variables that are missing or no numbers.
    """
    if "RANK" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        os.environ |= _of_slurm(os.environ)
    if "RANK" not in os.environ:
        return Place()
    # DeepSpeed's launcher has another word for it, and accelerate then takes all cores
    os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1"))
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if not os.environ.get(name)]
    if missing:
        raise TrainingError(
            f"RANK is set, but {', '.join(missing)} not, so the processes cannot find each other. "
            "Start them with molora train --nproc, deepspeed, torchrun or srun."
        )
    try:
        rank, size, local_rank, port = (int(os.environ[name]) for name in (*names[:3], names[4]))
    except ValueError:
        values = ", ".join(f"{name}={os.environ[name]!r}" for name in names)
        raise TrainingError(f"{values}: all but the address must be whole numbers.") from None
    if not 0 <= rank < size:
        raise TrainingError(f"RANK={rank} is not below WORLD_SIZE={size}.")
    return Place(rank, size, local_rank, os.environ["MASTER_ADDR"], port)


def _of_slurm(slurm: Mapping[str, str]) -> dict[str, str]:
    # of the step, not of the job: a batch script is no task of the job that it starts
    place = {
        "RANK": slurm["SLURM_PROCID"],
        "WORLD_SIZE": slurm["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": slurm["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": slurm.get("SLURM_STEP_TASKS_PER_NODE", "1").partition("(")[0],
        "MASTER_PORT": slurm.get(
            "MASTER_PORT", str(20_000 + int(slurm.get("SLURM_JOB_ID", "0")) % 20_000)
        ),
    }
    if slurm.get("SLURM_STEP_NUM_NODES", "1") == "1":
        return {"MASTER_ADDR": "127.0.0.1", **place}
    if "MASTER_ADDR" not in slurm:
        raise TrainingError(
            f"the Slurm step has {slurm['SLURM_STEP_NUM_NODES']} nodes, but MASTER_ADDR is not "
            'set. Set it to the first: scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1; '
            "examples/launch/slurm.sh does."
        )
    return place
