"""Checkpoints of a training run: written whole or not at all, and gone on from exactly.

    OUT/checkpoint-N/   the mixture · trainer-….safetensors · run_state.json · trainer_state.json ·
                        checkpoint.json, last

`molora.load` reads the mixture of one; no file runs code when it is read, or needs DeepSpeed. The
Trainer's own would hold the base, and with DeepSpeed a file per rank that fits the same number of
ranks only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from torch import nn

from molora import io
from molora.attach.saving import save_mixture
from molora.errors import CheckpointError
from molora.io import atomic, checkpoint, rotation
from molora.io.checkpoint import RUN_STATE, Checkpoint
from molora.train import run_state
from molora.train.gather import gathered_state
from molora.train.optimizer_state import load_weights, read_state, write_state


def save(trainer: Any) -> Path:
    """Write the checkpoint of the present step and delete old ones; all ranks take part.

    Raises:
        CheckpointError: on all ranks, when it could not be written; older ones are untouched.
    """
    output_dir, step = Path(trainer.args.output_dir), trainer.state.global_step
    directory = rotation.checkpoint_directory(output_dir, step)
    trainer.store_flos()
    best = trainer.state.best_global_step
    best_directory = rotation.checkpoint_directory(output_dir, best) if best else None
    # on every rank: all of them take the best weights at the end
    trainer.state.best_model_checkpoint = str(best_directory) if best_directory else None
    weights = gathered_state(trainer.mixture)
    tensors = {
        f"optimizer/{name}": value
        for name, value in read_state(trainer.optimizer, trained(trainer)).items()
    }
    tensors |= run_state.read_ranks(trainer)
    common = run_state.read_common(trainer)

    def write() -> None:
        try:
            put()
        except CheckpointError:
            # makes room: what is there is no checkpoint
            with contextlib.suppress(OSError):
                rotation.delete_checkpoint(directory)
            raise

    def put() -> None:
        save_mixture(trainer.mixture, directory, state=weights, base=trainer.base)
        text = json.dumps(common, indent=2).encode()
        atomic.put(directory, lambda path: path.write_bytes(text), lambda _: RUN_STATE)
        checkpoint.write_checkpoint(
            directory,
            step=step,
            world_size=trainer.args.world_size,
            stage=stage(trainer),
            tensors=tensors,
            state=dataclasses.asdict(trainer.state),
            files=[*mixture_files(directory), RUN_STATE],
        )
        keep = [directory, *([best_directory] if best_directory else [])]
        outcome = rotation.rotate(output_dir, limit=trainer.args.save_total_limit, keep=keep)
        for path, reason in outcome.failed.items():
            trainer.tell(f"{path.name} could not be deleted: {reason}")

    on_first_rank(trainer, write)
    return directory


def find(resume: Any, output_dir: Path, tell: Callable[[str], object]) -> Checkpoint | None:
    """The checkpoint to go on from; all ranks take part, and get the same one.

    Args:
        resume: a directory; True or "auto" for the newest complete one, if there is any; None or
            False for the beginning.
        output_dir: where the run writes.
        tell: gets a sentence about what was chosen, and each directory that was passed over.

    Raises:
        CheckpointError: a directory that is no complete checkpoint, or that a rank cannot read;
            True without there being one; newer checkpoints in `output_dir` than the one chosen.
    """
    chosen: list[Any] = [None, None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            found = _choose(resume, output_dir, tell)
            chosen = [None if found is None else str(found.directory), None]
        except CheckpointError as error:
            chosen = [None, str(error)]
    if dist.is_initialized():
        dist.broadcast_object_list(chosen)
    path, fault = chosen
    if fault is not None:
        raise CheckpointError(fault)
    if path is None:
        return None
    own: Checkpoint | None = None
    try:
        own = checkpoint.read_checkpoint(Path(path))
    except CheckpointError as error:
        fault = str(error)
    faults = gather_object([fault])
    for rank, message in enumerate(faults):
        if message is not None:
            raise CheckpointError(f"rank {rank}: {message} Every rank has to see the directory.")
    return own


def _choose(resume: Any, output_dir: Path, tell: Callable[[str], object]) -> Checkpoint | None:
    newest, skipped = rotation.newest_complete(output_dir)
    if resume in (True, "auto"):
        for path, reason in skipped.items():
            tell(f"passed over {path.name}: {reason}")
        if newest is not None:
            tell(f"resuming from {newest.directory}, step {newest.step}")
        elif resume is True:
            raise CheckpointError(
                f"{output_dir} has no complete checkpoint to resume from. Set save_steps, or "
                "start from the beginning."
            )
        else:
            tell(f"no complete checkpoint in {output_dir}: starting from the beginning")
        return newest
    found = checkpoint.read_checkpoint(Path(resume)) if resume else None
    if newest is not None and (found is None or newest.step > found.step):
        raise CheckpointError(
            f"{newest.directory} is of an earlier run and would pass for this one's newest. "
            'Resume from it (--resume auto, or resume_from_checkpoint="auto"), delete it, or '
            "choose another output_dir."
        )
    return found


def read_run_state(found: Checkpoint) -> dict[str, Any]:
    """What `run_state.read_common` said."""
    path = found.directory / RUN_STATE
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}. Only checkpoints that molora.train wrote can be "
            "resumed from."
        ) from None
    return state


def restore(trainer: Any, found: Checkpoint) -> None:
    """Weights, optimiser and schedule, on a trainer that is ready to begin; all ranks take part."""
    load_mixture(trainer.mixture, found.directory)
    tensors = found.tensors()
    optimizer = {
        name.removeprefix("optimizer/"): value
        for name, value in tensors.items()
        if name.startswith("optimizer/")
    }
    write_state(trainer.optimizer, trained(trainer), optimizer)
    run_state.write_common(trainer, read_run_state(found))


def restore_progress(trainer: Any, found: Checkpoint) -> None:
    """Sums and counts that the Trainer's loop sets to zero when it begins."""
    run_state.write_progress(trainer, read_run_state(found))
    run_state.write_sums(trainer, found.tensors(), world_size=found.world_size)


def load_mixture(mixture: Any, directory: Path) -> None:
    """The weights of the mixture saved in a directory, on every rank.

    Raises:
        CheckpointError: another mixture, or damaged files.
    """
    load_weights(mixture, io.read_tensors(directory, io.read_manifest(directory)))


def trained(trainer: Any) -> dict[str, nn.Parameter]:
    """The parameters that the optimiser has, by name."""
    return {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}


def stage(trainer: Any) -> int | None:
    """DeepSpeed's ZeRO stage; None without DeepSpeed."""
    if not trainer.is_deepspeed_enabled:
        return None
    return int(trainer.accelerator.state.deepspeed_plugin.zero_stage)


def mixture_files(directory: Path) -> list[str]:
    """Names of the files of the mixture in a directory."""
    return [io.MANIFEST, io.read_manifest(directory).tensors_file]


def on_first_rank(trainer: Any, action: Callable[[], None]) -> None:
    """Do it on the rank that writes; what goes wrong there ends all ranks, with one message.

    Raises:
        CheckpointError: on the other ranks.
    """
    failure: Exception | None = None
    if trainer.args.should_save:
        try:
            action()
        except Exception as error:
            failure = error
    failed = torch.tensor(failure is not None, device=trainer.args.device).int()
    if dist.is_initialized():
        dist.all_reduce(failed, op=dist.ReduceOp.MAX)
    if failure is not None:
        raise failure
    if failed:
        raise CheckpointError("rank 0 could not save; its message says why.")
