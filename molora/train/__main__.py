"""``python -m molora.train config.yaml``: one process of a run, as launchers start it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from molora.errors import MoLoRAError
from molora.presets import load_config


def main(arguments: Sequence[str] | None = None) -> int:
    """Train; 0 if it went well, 2 for a fault of the user's, told in one message."""
    parser = argparse.ArgumentParser(prog="python -m molora.train", description=__doc__)
    parser.add_argument("config", help="a YAML file, such as configs/mola.yaml")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    # launchers add it, wherever they like; the process finds its rank in the environment
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        config = load_config(options.config)
        from molora.train.run import train

        train(config, progress=not options.quiet)
    except MoLoRAError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
