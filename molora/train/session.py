"""One call of a Trainer's `train`: where it goes on from, what may end it early, how it ends."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

from molora.errors import TrainingError
from molora.io import newest_complete
from molora.train import checkpoints, run_state
from molora.train.guard import Guard, Interruption, after


class Session:
    """What the mixin's overrides of the Trainer's loop share.

    Args:
        trainer: the trainer.
        resume: as `checkpoints.find` takes it.

    Raises:
        CheckpointError: a checkpoint that is damaged, or of another run.
    """

    def __init__(self, trainer: Any, resume: Any) -> None:
        self.trainer = trainer
        self.interruption = Interruption(trainer.tell)
        self.guard: Guard | None = None
        self.resumed = checkpoints.find(resume, Path(trainer.args.output_dir), trainer.tell)
        if self.resumed is not None:
            saved = checkpoints.read_run_state(self.resumed)["settings"]
            where = str(self.resumed.directory)
            run_state.check_settings(saved, run_state.settings(trainer), where=where)

    @property
    def stopping(self) -> int:
        """The signal on which all ranks stop after this step, or 0."""
        return 0 if self.guard is None else self.guard.stop

    # ------------------------------------------------------------------ moments of the loop

    def prepare(self) -> None:
        """Model, optimiser and schedule are ready."""
        trainer = self.trainer
        trained, device = checkpoints.trained(trainer), trainer.args.device
        if trainer.is_deepspeed_enabled:
            engine = trainer.deepspeed
            self.guard = Guard(trainer.model, trained, device, release=engine.empty_partition_cache)
            # an engine steps at the end of its backward pass, and clips by itself
            engine.step = after(self.check_step, engine.step)
        else:
            self.guard = Guard(trainer.model, trained, device)
        if self.resumed is not None:
            checkpoints.restore(trainer, self.resumed)

    def begin(self) -> None:
        """The loop has set its sums to zero."""
        if self.resumed is not None:
            checkpoints.restore_progress(self.trainer, self.resumed)

    def restore_rng(self) -> None:
        """The loop has skipped the batches that were trained on."""
        if self.resumed is not None:
            run_state.write_rng(self.trainer, self.resumed.tensors())

    def check_step(self) -> None:
        """Gradients are whole, and neither clipped nor learnt.

        Raises:
            TrainingError: a loss or gradient that is not finite.
        """
        assert self.guard is not None
        trainer, step = self.trainer, self.trainer.state.global_step + 1
        if _is_logged(trainer, step):
            trainer.observation.measure_gradients(step=step, device=trainer.args.device)
        try:
            self.guard.check(step=step, asked=self.interruption.signal)
        except TrainingError as error:
            raise TrainingError(f"{error} {self._after_fault()}") from None

    def close(self) -> None:
        """The loop has ended, well or not."""
        if self.guard is not None:
            self.guard.close()

    def finish(self) -> None:
        """Act on a signal, now that its checkpoint is written.

        Raises:
            KeyboardInterrupt: after Ctrl-C; SystemExit after SIGTERM.
        """
        if not (number := self.stopping):
            return
        step = self.trainer.state.global_step
        self.trainer.tell(f"stopped after step {step}; its checkpoint is complete")
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)

    def _after_fault(self) -> str:
        found, _ = newest_complete(Path(self.trainer.args.output_dir))
        kept = f"{found.directory} is the last complete checkpoint" if found else "none was saved"
        return (
            f"No weight was changed by this step; {kept}. Lower the learning rate, look at the "
            "rows of this step, or compute in a wider dtype, and resume from it."
        )


def _is_logged(trainer: Any, step: int) -> bool:
    args = trainer.args
    if args.logging_strategy != "steps" or (step == 1 and args.logging_first_step):
        return True
    return bool(step % trainer.state.logging_steps == 0)
