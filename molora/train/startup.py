"""What happens in every process before a run: it meets the others, sees that all were started with
the same run, and forms a process group. What cannot work is told within a minute."""

from __future__ import annotations

import atexit
import hashlib
import os
import platform
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import DistError, PrefixStore
from transformers import TrainerCallback

from molora import __version__
from molora.config.run import RunConfig
from molora.errors import TrainingError
from molora.kernels.calibration import load_calibration
from molora.train.compile_lock import check_locks
from molora.train.deepspeed_config import deepspeed_config
from molora.train.peers import Peers, meet

_LIBRARIES = ("torch", "transformers", "trl", "accelerate", "datasets", "deepspeed", "safetensors")
# what DeepSpeed compiles as soon as it communicates between processes on CPUs
_COMPILED_ON_CPU = ("deepspeed_shm_comm",)


@contextmanager
def joined(config: RunConfig) -> Iterator[Peers]:
    """This process as one of its launch, with a process group if there are several or an engine.

    The group stays until the process ends: DeepSpeed keeps what it made of it.

    Raises:
        TrainingError: processes that do not come, or not with the same run; a lock that would make
            DeepSpeed wait; inside, the loss of a process.
    """
    peers = meet()
    engine = deepspeed_config(config, world_size=peers.size)
    seconds = config.train.timeout_seconds
    peers.agree(facts(config, engine), what="run")
    if engine is not None and not torch.cuda.is_available():
        check_locks(_COMPILED_ON_CPU)
    if (peers.size > 1 or engine is not None) and not dist.is_initialized():
        _form_group(peers, seconds=seconds, threads=config.train.threads)
    if engine is not None:
        import deepspeed

        # now, since the weights of ZeRO-3 are divided before there is an engine
        deepspeed.init_distributed(
            dist.get_backend(), auto_mpi_discovery=False, timeout=timedelta(seconds=seconds)
        )
    try:
        yield peers
    except RuntimeError as error:
        if peers.size > 1 and _is_loss(error):
            raise TrainingError(
                f"rank {peers.rank} of {peers.size} on {socket.gethostname()} lost the others: "
                "another process ended, or did not answer within train.timeout_seconds="
                f"{seconds}. Look at what the others wrote. ({_first_line(error)})"
            ) from error
        raise


def facts(config: RunConfig, engine: Mapping[str, Any] | None) -> dict[str, Any]:
    """What must be the same on every process: the run, the engine, versions and molora's source."""
    return {
        "config": config.model_dump(mode="json"),
        "deepspeed": engine,
        "versions": {"python": platform.python_version(), **dict(map(_version, _LIBRARIES))},
        "molora": {"version": __version__, "source": source_sha256()},
        # which backend "auto" takes
        "calibration": hashlib.sha256(load_calibration().text().encode()).hexdigest(),
    }


def _version(name: str) -> tuple[str, str | None]:
    try:
        return name, version(name)
    except PackageNotFoundError:
        return name, None


@cache
def source_sha256() -> str:
    """One hash over all of molora's Python files and their names."""
    root = Path(__file__).parents[1]
    total = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        total.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()[:16]


def _form_group(peers: Peers, *, seconds: int, threads: int | None) -> None:
    place = peers.place
    if peers.store is None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        # DeepSpeed looks for MPI unless a launcher has spoken
        os.environ |= {**alone, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if torch.cuda.is_available():
        _take_gpu(place.local_rank)
    elif "OMP_NUM_THREADS" not in os.environ:
        local = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        count = threads or max(1, (os.cpu_count() or 1) // local)
        # accelerate sets the number of threads unless this says it
        os.environ["OMP_NUM_THREADS"] = str(count)
        torch.set_num_threads(count)
    dist.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo",
        store=PrefixStore("group", peers.store) if peers.store else dist.HashStore(),
        rank=peers.rank,
        world_size=peers.size,
        timeout=timedelta(seconds=seconds),
    )

    # what __main__.leave does for certain, for programs that end by themselves
    atexit.register(time.sleep, 0.2)


def _take_gpu(local_rank: int) -> None:
    if local_rank >= torch.cuda.device_count():
        raise TrainingError(
            f"local rank {local_rank} has no GPU: {socket.gethostname()} shows "
            f"{torch.cuda.device_count()}. Start at most one process per GPU."
        )
    torch.cuda.set_device(local_rank)


class WaitLimit(TrainerCallback):
    """Gives every group of processes the run's time-out: those that DeepSpeed makes have torch's
    default of 10 or 30 minutes, whatever the first was made with."""

    def __init__(self, seconds: int) -> None:
        self.limit = timedelta(seconds=seconds)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for group in list(dist.distributed_c10d._world.pg_map):
            dist.distributed_c10d._set_pg_timeout(self.limit, group)


def _is_loss(error: RuntimeError) -> bool:
    words = ("gloo", "nccl", "connection closed by peer", "connection reset by peer")
    return isinstance(error, DistError) or any(word in str(error).lower() for word in words)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0] if len(lines[0]) <= 200 else f"{lines[0][:199]}…"
