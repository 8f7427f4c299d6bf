"""``molora train --nproc N``: starts the processes of a run on this machine."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Mapping, Sequence

import torch
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from molora.config.run import RunConfig
from molora.errors import ConfigError
from molora.train.deepspeed_config import deepspeed_config
from molora.train.place import find_place

SAVING_SECONDS = 120
"""After a signal: what the processes have for their checkpoint before they are killed."""


def launch(config: RunConfig, arguments: Sequence[str], *, processes: int) -> int:
    """Run ``python -m molora.train ARGUMENTS`` in several processes; their common exit code.

    Ctrl-C, SIGTERM and SIGHUP reach every process; the code is then 128 + the signal. If a process
    fails, the others are ended, and the code is that of the first: 2 for an error of the user's,
    128 + the signal for one that was killed.

    Args:
        config: the run, which the processes read again from `arguments`.
        arguments: the command line of `molora.train.__main__`.
        processes: how many.

    Raises:
        ConfigError: more processes than GPUs, or an engine that does not fit.
    """
    if find_place().size > 1:
        raise ConfigError(
            f"--nproc {processes}: this process is one of several already, which a launcher "
            "started. Leave --nproc out."
        )
    gpus = torch.cuda.device_count()
    if gpus and processes > gpus:
        raise ConfigError(f"--nproc {processes}: this machine has {gpus} GPUs, one per process.")
    deepspeed_config(config, world_size=processes)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    threads = config.train.threads or max(1, (os.cpu_count() or 1) // processes)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            # it tells every exit code three times
            logging.getLogger(name).setLevel(logging.CRITICAL)
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=f"molora-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        shutdown_timeout=SAVING_SECONDS,
    )
    try:
        elastic_launch(settings, sys.executable)("-m", "molora.train", *arguments)
    except ChildFailedError as failed:
        return _code({rank: failure.exitcode for rank, failure in _first(failed).items()})
    except SignalException as stopped:
        return 128 + stopped.sigval
    return 0


def _first(failed: ChildFailedError) -> dict[int, ProcessFailure]:
    """The failures of the second in which the first was seen; the others followed from these."""
    when = min(failure.timestamp for failure in failed.failures.values())
    return {rank: f for rank, f in failed.failures.items() if f.timestamp == when}


def _code(exit_codes: Mapping[int, int]) -> int:
    """128 + the signal for a killed process, else a process's own code."""
    # SIGTERM is what the others got
    killed = {r: c for r, c in exit_codes.items() if c < 0 and c != -signal.SIGTERM}
    rank, code = next(iter((killed or exit_codes).items()))
    if code >= 0:
        return code
    name = signal.Signals(-code).name
    hint = " The kernel does so when memory is used up." if name == "SIGKILL" else ""
    sys.stderr.write(f"Error: rank {rank} was ended by {name}; the others were stopped.{hint}\n")
    return 128 - code
