"""Runs jobs on every rank, one after another; started on two ranks by the tests beside it.
Usage: jobs.py DIRECTORY MODULE.FUNCTION[:ARGUMENT,…] …

A job takes DIRECTORY and its arguments and returns what can be written as JSON; rank 0's answers
go to DIRECTORY/results.json, by job.
"""

from __future__ import annotations

import gc
import importlib
import json
import sys
import time
from pathlib import Path

import deepspeed
import torch.distributed as dist


def main(directory: str, *jobs: str) -> None:
    deepspeed.init_distributed("gloo")
    gc.freeze()  # DeepSpeed collects garbage once an engine: 0.7 s over all that was imported
    answers = {}
    for job in jobs:
        started = time.perf_counter()
        name, _, arguments = job.partition(":")
        module, _, function = name.partition(".")
        run = getattr(importlib.import_module(module), function)
        answers[job] = run(Path(directory), *filter(None, arguments.split(",")))
        if dist.get_rank() == 0:
            print(f"{job}: {time.perf_counter() - started:.1f} s", flush=True)
    if dist.get_rank() == 0:
        (Path(directory) / "results.json").write_text(json.dumps(answers, indent=1))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
