"""On every rank: what Trainers do under DDP and every ZeRO stage; started by test_trainer_ranks.py.

    trainer_ranks.py DIRECTORY JOB:ARGUMENT,… …

A job is a function below. Rank 0's answers go to DIRECTORY/results.json, by job.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from bitsandbytes.nn import Linear4bit
from resume_ranks import engine
from safetensors.torch import save_file
from tiny_models import tiny
from tiny_trainers import mixture_on, sft
from torch import Tensor
from trainer_curves import CURVES, Watch, state, trained, trainer_of
from trainer_steps import distance, norm, one_step, reference
from transformers import BitsAndBytesConfig, LlamaForCausalLM
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import molora
from molora.io import newest_complete, read_manifest, read_tensors
from molora.train import SFTTrainer, filling, train
from molora.train.gather import gathered

LAYOUTS = {"2x1x4": (4, 1), "2x2x2": (2, 2), "2x4x1": (1, 4)}
"""Ranks × micro-batches × rows → rows, micro-batches."""


def options_of(stage: str) -> dict[str, Any]:
    """Training arguments of a stage: none (DDP), 0, 1, 2, 3, 3-offload."""
    forget_engines()
    return {"deepspeed": engine(stage), "use_cpu": True, "ddp_find_unused_parameters": False}


def forget_engines() -> None:
    """Each trainer is of a process of its own, as far as accelerate and transformers know."""
    AcceleratorState._reset_state()
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    unset_hf_deepspeed_config()


def everyones(value: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def step(directory: Path, path: str, stage: str, layout: str, case: str) -> dict[str, Any]:
    """One step against plain autograd, and against what a mistake would give."""
    rows, accumulate = LAYOUTS[layout]
    made = one_step(
        path, directory / "out", case=case, rows=rows, accumulate=accumulate, **options_of(stage)
    )
    batches = [batch for own in everyones(made.batches) for batch in own]
    expected, loss = reference(batches, case)
    found = {
        "error": max(everyones(distance(made.moved, expected))),
        "loss_error": abs(made.logged["loss"] - loss),
        "norm_error": None,
        "partitioned": made.partitioned,
        "supervised": [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches],
    }
    if "grad_norm" in made.logged:
        found["norm_error"] = abs(made.logged["grad_norm"] / norm(expected) - 1)
    for name, mistake in {
        "no_shares": {"shares": False},
        "no_ranks": {"auxiliary_factor": 1 / dist.get_world_size()},
        "no_auxiliary": {"auxiliary_factor": 0.0},
    }.items():
        found[name] = distance(reference(batches, case, **mistake)[0], expected)  # type: ignore[arg-type]
    _write(made.moved, directory / f"step-{path}-{stage}-{layout}-{case}.safetensors")
    return found


def curve(directory: Path, name: str, stage: str) -> dict[str, Any]:
    """Twenty steps of one of CURVES; its mixture goes to DIRECTORY/curve-NAME-STAGE.safetensors."""
    trainer = trainer_of(CURVES[name], directory / "out", **options_of(stage))
    found = trained(trainer)
    found["everyones"] = everyones(found["curves"])
    _write(state(trainer), directory / f"curve-{name}-{stage}.safetensors")
    return found


def repeated(directory: Path, name: str) -> list[float]:
    """The losses of a curve if rows that fill up the last batches were learnt again."""
    fills_up, filling.fills_up = filling.fills_up, lambda accelerator: False
    try:
        trainer = trainer_of(CURVES[name], directory / "out", **options_of("none"))
        losses: list[float] = trained(trainer)["curves"]["loss"]
    finally:
        filling.fills_up = fills_up
    return losses


def fault(directory: Path, stage: str, kind: str) -> dict[str, Any]:
    """What each rank says when in the third step the last one's `gradient` or `loss` is not
    finite."""
    out = directory / f"fault-{stage}-{kind}"
    options = {"save_strategy": "steps", "save_steps": 2, **options_of(stage)}
    trainer = trainer_of(CURVES["mola"], out, **options)
    linear = trainer.model.model.layers[1].mlp.down_proj

    def spoilt(tensor: Tensor, factor: float) -> Tensor:
        strikes = dist.get_rank() == 1 and trainer.model.training and trainer.state.global_step == 2
        return tensor * factor if strikes else tensor

    if kind == "gradient":
        dict(linear.named_parameters())["experts.lora_B"].register_hook(
            lambda gradient: spoilt(gradient, float("inf"))
        )
    else:
        linear.register_forward_hook(lambda module, args, y: spoilt(y, float("nan")))
    said = None
    try:
        trainer.train()
    except molora.TrainingError as error:
        said = str(error)
    newest, _ = newest_complete(out)
    assert newest is not None
    kept = read_tensors(newest.directory, read_manifest(newest.directory))
    now = state(trainer)
    return {
        "said": everyones(said),
        "checkpoint": newest.directory.name,
        "changed": max(float((now[name] - kept[name]).abs().max()) for name in now),
        "finite": all(bool(torch.isfinite(value).all()) for value in kept.values()),
    }


def quantized(directory: Path, bits: str, stage: str) -> dict[str, Any]:
    """Two steps on a base that bitsandbytes quantised."""
    forget_engines()
    tiny("llama").save_pretrained(directory / "base")  # on the first rank
    dist.barrier()
    model = LlamaForCausalLM.from_pretrained(
        directory / "base",
        quantization_config=BitsAndBytesConfig(**{f"load_in_{bits}bit": True}),
        dtype=torch.float32,
        device_map={"": "cpu"},
    )
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # on some CPUs evaluation repacks the weights for good
            module.support_avx512bf16_for_cpu = False
    options = options_of(stage)
    trainer = sft(
        mixture_on(model, losses=()), directory / "out", per_device_train_batch_size=2, **options
    )
    watch = Watch(model)
    trainer.add_callback(watch)
    trainer.train()
    _write(state(trainer), directory / f"quantized-{bits}-{stage}.safetensors")
    lines = [line for line in trainer.state.log_history if "loss" in line]
    return {"losses": [line["loss"] for line in lines], "partitioned": watch.partitioned}


def run(directory: Path, name: str) -> dict[str, Any]:
    """`molora.train.train` of DIRECTORY/NAME.yaml, and logits of the model that it leaves."""
    watches: list[Watch] = []
    init = SFTTrainer.__init__

    def watched(trainer: SFTTrainer, *args: Any, **kwargs: Any) -> None:
        init(trainer, *args, **kwargs)
        watches.append(Watch(trainer.model))
        trainer.add_callback(watches[0])

    SFTTrainer.__init__ = watched  # type: ignore[method-assign]
    forget_engines()
    try:
        result = train(molora.load_config(directory / f"{name}.yaml"), progress=False)
    finally:
        SFTTrainer.__init__ = init  # type: ignore[method-assign]
    ids = torch.arange(3, 15).view(2, 6)
    with torch.no_grad(), gathered(result.model.parameters()):
        logits = result.model(input_ids=ids).logits
    _write({"logits": logits.contiguous()}, directory / f"{name}-logits.safetensors")
    return {"metrics": result.metrics, "partitioned": watches[0].partitioned}


def _write(tensors: dict[str, Tensor], path: Path) -> None:
    if dist.get_rank() == 0:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def main(directory: str, *jobs: str) -> None:
    if not dist.is_initialized():
        deepspeed.init_distributed("gloo")
    gc.freeze()  # every Trainer collects garbage: half a second over all that was imported
    answers = {}
    for job in jobs:
        started = time.perf_counter()
        name, _, arguments = job.partition(":")
        answers[job] = globals()[name](Path(directory), *filter(None, arguments.split(",")))
        if dist.get_rank() == 0:
            print(f"{job}: {time.perf_counter() - started:.1f} s", flush=True)
    if dist.get_rank() == 0:
        (Path(directory) / "results.json").write_text(json.dumps(answers, indent=1))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
