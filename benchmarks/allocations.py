"""Most bytes that a piece of code allocates on the CPU."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch


def most_allocated(step: Callable[[], object]) -> int:
    """Most bytes that tensors allocate during a step beside those that are there before it."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(itertools.accumulate(changes, initial=0))
