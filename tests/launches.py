"""Real processes on the CPU: a script on several ranks with gloo, as `torchrun` starts them."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from molora.train.compile_lock import compile_locks, is_compiling

ROOT = Path(__file__).parents[1]
# one thread a rank: two spinning ranks on two cores are 15 times slower
ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def launch(
    script: Path | str, *arguments: object, nproc: int = 2, timeout: float = 240, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run a script, or with `-m` a module, on `nproc` ranks; with `check`, fail with its output."""
    clear_left_locks()
    named = str(script).removeprefix("-m ")
    module = ["-m"] if named != str(script) else []
    target = [str(ROOT / "tests" / "rank.py"), *module, named]
    command = [
        *(sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={nproc}"),
        *("--master-addr=127.0.0.1", f"--master-port={free_port()}"),
        *(*target, *map(str, arguments)),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, env=environment(), check=False
    )
    if check and done.returncode:
        raise AssertionError(
            f"{' '.join(command)} ended with {done.returncode}\n"
            f"{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
        )
    return done


def environment(**changes: str) -> dict[str, str]:
    """This process's environment, set for ranks on a CPU; scripts find molora and the helpers."""
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        **ENVIRONMENT,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        **changes,
    }


def clear_left_locks(*, seconds: float = 20.0) -> None:
    """Delete locks of compilations that a killed test left: every later launch would wait."""
    for lock in compile_locks():
        with contextlib.suppress(FileNotFoundError):
            if time.time() - lock.stat().st_mtime > seconds and not is_compiling(lock):
                lock.unlink()


def free_port() -> int:
    """A port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
