"""What each process does for benchmarks/scaling.py, which starts it with torchrun.

    scaling_ranks.py JOB.json OUT.json

Every engine of the job is measured in turn; rank 0 writes one object per engine.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# a spinning OpenMP thread slows every other process, and with it the measurement
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import psutil
import torch
import torch.distributed as dist
from allocations import most_allocated
from deepspeed.comm.comm import comms_logger
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from transformers import AutoModelForCausalLM, LlamaConfig

import molora
from molora.config.run import RunConfig
from molora.train.deepspeed_config import deepspeed_config


@dataclass(frozen=True)
class Job:
    """What is trained, and how.

    Attributes:
        what: "speed" or "state".
        engines: `alone` (processes that do not know of each other), `ddp`, or molora's defaults for
            a value of `train.deepspeed`.
        llama: the base's configuration; its weights are random.
        zero: keys of DeepSpeed's zero_optimization that are changed.
    """

    what: str
    engines: list[str]
    llama: dict[str, int]
    dtype: str = "float32"
    num_experts: int = 8
    rank: int = 8
    rows: int = 4
    length: int = 256
    steps: int = 5
    accumulation: int = 1
    checkpointing: bool = False
    zero: dict[str, Any] = field(default_factory=dict)


class Engine:
    """Top-2 of equal experts at every linear, under one engine, with AdamW and clipping."""

    def __init__(self, name: str, job: Job) -> None:
        torch.manual_seed(0)
        config = LlamaConfig(**job.llama)
        self.model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, job.dtype))
        mola = molora.presets.mola(
            num_experts=job.num_experts,
            rank=job.rank,
            top_k=2,
            dropout=0.0,
            losses=(),
            backend="dense",
        )
        self.mixture = molora.attach(self.model.train(), mola)
        if job.checkpointing:
            self.model.activation_checkpointing_enable(
                {"use_reentrant": False, "context_fn": molora.checkpoint_context}
            )
        self.job, self.name = job, name
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        source = torch.Generator().manual_seed(dist.get_rank())
        shape = (job.rows, job.length)
        self.ids_BS = torch.randint(0, config.vocab_size, shape, generator=source)
        self.bucket_bytes: list[int] = []
        # fused, as the Trainer's is
        self.optimizer = torch.optim.AdamW(self.mixture.parameter_groups(1e-4), fused=True)
        self.wrapped: Any = self.model
        if name == "ddp":
            self.wrapped = nn.parallel.DistributedDataParallel(self.model)
            self.wrapped.register_comm_hook(None, self._reduce)
        elif self.zero is not None:
            self.wrapped, *_ = deepspeed.initialize(
                model=self.model, optimizer=self.optimizer, config=self._settings()
            )

    @property
    def zero(self) -> dict[str, Any] | None:
        """`zero_optimization`; None without DeepSpeed."""
        if self.name in ("alone", "ddp"):
            return None
        zero: dict[str, Any] = self._settings()["zero_optimization"]
        return zero

    def _settings(self) -> dict[str, Any]:
        run = RunConfig(
            model={"name": "random", "dtype": self.job.dtype},
            data={"train": ["none.jsonl"]},
            mixture=self.mixture.config,
            train={
                "deepspeed": self.name,
                "batch_size": self.job.rows,
                "gradient_accumulation": self.job.accumulation,
            },
        )
        settings = deepspeed_config(run, world_size=dist.get_world_size())
        assert settings is not None
        settings["zero_optimization"] |= self.job.zero
        return settings

    def _reduce(self, state, bucket):  # type: ignore[no-untyped-def]  # DDP refuses names as types
        self.bucket_bytes.append(bucket.buffer().nbytes)
        return allreduce_hook(dist.group.WORLD, bucket)

    def backward(self) -> None:
        """Forward and backward of the micro-batches of one step."""
        for index in range(self.job.accumulation):
            last = index == self.job.accumulation - 1
            if self.zero is not None:
                self.wrapped.backward(self._loss())
                if not last:
                    self.wrapped.step()
            elif last or self.name == "alone":
                (self._loss() / self.job.accumulation).backward()
            else:
                with self.wrapped.no_sync():
                    (self._loss() / self.job.accumulation).backward()

    def _loss(self) -> Tensor:
        loss: Tensor = self.wrapped(input_ids=self.ids_BS, labels=self.ids_BS, use_cache=False).loss
        return loss

    def update(self) -> None:
        """The optimiser's part of a step."""
        if self.zero is not None:
            self.wrapped.step()
            return
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def step(self) -> None:
        self.backward()
        self.update()

    def close(self) -> None:
        if self.zero is not None:
            self.wrapped.destroy()


def speed(engine: Engine) -> dict[str, Any]:
    """Seconds of each step, and of its communication where DeepSpeed's logger sees it."""
    for _ in range(3):  # ZeRO-3 knows the order of the modules from the third on
        engine.step()
    seconds = []
    for _ in range(engine.job.steps):
        dist.barrier()
        started = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - started)
    operations = _logged(engine)
    return {"seconds": seconds, "communication": operations}


def state(engine: Engine, *, before: dict[int, int], rss_before: int) -> dict[str, Any]:
    """Bytes that are held before and after the update, and the operations of a step."""
    for _ in range(3):
        engine.step()
    del engine.bucket_bytes[:]
    engine.backward()
    held, rss_held = _live(before), _rss() - rss_before
    buckets = {"all_reduce": [[size, 1, 0.0] for size in engine.bucket_bytes]}
    engine.update()
    between, rss_between = _live(before), _rss() - rss_before
    return {
        "held": held,
        "between": between,
        "rss_held": rss_held,
        "rss_between": rss_between,
        "operations": _logged(engine) or buckets,
        "gathered": _most_gathered(engine),
        # last: the profiler itself takes memory
        "peak": between + most_allocated(engine.step),
    }


def _logged(engine: Engine) -> dict[str, Any]:
    """Of one step: operation → [bytes of its tensor, how often, seconds]."""
    comms_logger.reset_data()
    deepspeed.comm.configure(enabled=True, prof_all=True)
    engine.step()
    comms_logger.enabled = False
    return {
        name: [[size, entry[0], sum(entry[1]) / 1e3] for size, entry in sizes.items()]
        for name, sizes in comms_logger.comms_dict.items()
    }


def _most_gathered(engine: Engine) -> int:
    """Most bytes of partitioned parameters that are whole at a time."""
    divided = [p for p in engine.model.parameters() if hasattr(p, "ds_id") and not p.ds_persist]
    most = 0

    def look(*_: Any) -> None:
        nonlocal most
        most = max(most, sum(p.numel() * p.itemsize for p in divided))

    handles = [m.register_forward_hook(look) for m in engine.model.modules()] if divided else []
    engine.step()
    for handle in handles:
        handle.remove()
    return most


def _live(before: dict[int, int]) -> int:
    """Bytes of distinct storages of all tensors of this process that were not there before."""
    return sum(size for pointer, size in _storages().items() if pointer not in before)


def _storages() -> dict[int, int]:
    gc.collect()
    found: dict[int, int] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for thing in gc.get_objects():
            if isinstance(thing, Tensor):
                for tensor in (thing, thing.grad if thing.is_leaf else None):
                    if tensor is not None:
                        storage = tensor.untyped_storage()
                        found[storage.data_ptr()] = storage.nbytes()
    return found


def _rss() -> int:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(psutil.Process().memory_info().rss)


def main() -> None:
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    if job.what == "state":
        _warm_up(job)
    results = []
    for name in job.engines:
        before, rss_before = _storages(), _rss()
        engine = Engine(name, job)
        found = (
            speed(engine)
            if job.what == "speed"
            else state(engine, before=before, rss_before=rss_before)
        )
        results.append({"engine": name, "zero": engine.zero, **found})
        engine.close()
        del engine
    if dist.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


def _warm_up(job: Job) -> None:
    """Code that is loaded at first use is no memory of a training."""
    tiny = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
    for name in job.engines:
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
        small = Job("state", [], {**tiny, **heads}, dtype=job.dtype, rows=1, length=4)
        engine = Engine(name, small)
        engine.step()
        engine.close()


if __name__ == "__main__":
    main()
