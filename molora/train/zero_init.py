"""Base models that ZeRO-3 divides over the processes while it reads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from molora.train.deepspeed_config import is_partitioned

_CASTS = {torch.bfloat16: "bf16", torch.float16: "fp16"}


@contextmanager
def divided(engine: Mapping[str, Any] | None, dtype: torch.dtype) -> Iterator[None]:
    """Inside, `from_pretrained` leaves on each process its part of the weights, if the engine
    divides them; else nothing is changed.

    Args:
        engine: DeepSpeed's configuration.
        dtype: of the weights. The engine's configuration says nothing of it, and DeepSpeed would
            make float32 of what it divides.
    """
    if engine is None or not is_partitioned(engine):
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig

    casts = {_CASTS[dtype]: {"enabled": True}} if dtype in _CASTS else {}
    # transformers knows of it for as long as this object lives
    kept = HfDeepSpeedConfig({**engine, **casts})
    try:
        yield
    finally:
        del kept
