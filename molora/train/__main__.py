"""``python -m molora.train config.yaml``: one process of a run, as launchers start it."""

from __future__ import annotations

import argparse
import atexit
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from molora.errors import ConfigError, MoLoRAError
from molora.presets.overrides import load_run
from molora.train.place import find_place


class _Parser(argparse.ArgumentParser):
    """Raises what is wrong, so that it is told once and not by every process."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}. {self.format_usage().strip()}")


def parser() -> argparse.ArgumentParser:
    """The command line of one process; that of `molora train` but for --nproc and --dry-run."""
    found = _Parser(prog="python -m molora.train", description=__doc__)
    found.add_argument("config", type=Path, help="a YAML file, such as configs/mola.yaml")
    found.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="values that replace the file's"
    )
    found.add_argument("--output-dir", type=Path, help="instead of the file's output_dir")
    found.add_argument(
        "--resume", metavar="auto|DIR", help="go on from a checkpoint; auto: the newest, if any"
    )
    found.add_argument("--quiet", action="store_true", help="show no progress")
    # launchers add it, wherever they like; the process finds its rank in the environment
    found.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Train; 0 if it went well, 2 for a fault of the user's, told in one message by all ranks."""
    try:
        options = parser().parse_intermixed_args(arguments)
    except ConfigError as error:
        return _tell(error)
    try:
        return train_here(
            options.config,
            options.overrides,
            output_dir=options.output_dir,
            resume=options.resume,
            quiet=options.quiet,
        )
    except KeyboardInterrupt:
        return 130


def train_here(
    config: Path,
    overrides: Sequence[str],
    *,
    output_dir: Path | None = None,
    resume: str | None = None,
    quiet: bool = False,
) -> int:
    """Train in this process, one of its launch or the only one; the exit code as of `main`."""
    try:
        place = find_place()
        if place.size > 1:
            from molora.train.peers import meet

            # before the file is read: what is wrong with it is then told by one process
            meet()
        run = load_run(config, overrides, output_dir=output_dir)
        from molora.train.progress import closing_words
        from molora.train.run import train

        result = train(run, progress=not quiet, resume=resume)
    except MoLoRAError as error:
        return _tell(error)
    if place.rank == 0 and not quiet:
        sys.stdout.write(f"{closing_words(run, result)}\n")
    return 0


def _tell(error: MoLoRAError) -> int:
    peers = sys.modules.get("molora.train.peers")
    if peers is None or peers.say(str(error)):
        sys.stderr.write(f"Error: {error}\n")
    return 2


def leave(code: int) -> NoReturn:
    """End this process, without the interpreter's own end if there is a process group.

    gloo's threads let go of the tensors of the last communication whenever they come to it. If the
    interpreter is going by then, they abort the process, and the run has failed after its success.
    """
    dist = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_initialized():
        sys.exit(code)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main())
