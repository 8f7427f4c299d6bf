"""``rank.py SCRIPT ARGUMENTS`` or ``rank.py -m MODULE ARGUMENTS``: as python runs it, but without
the interpreter's own end.

gloo's threads let go of the tensors of the last communication whenever they come to it, and abort
the process if the interpreter is going by then: about one launch in ten on a busy machine.
"""

from __future__ import annotations

import os
import runpy
import sys
import traceback
from typing import NoReturn


def main() -> NoReturn:
    """Run what the command line names; the exit code is 1 for an exception."""
    del sys.argv[0]
    code = 0
    try:
        if sys.argv[0] == "-m":
            del sys.argv[0]
            sys.path[0] = os.getcwd()
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            sys.stderr.write(f"{stop.code}\n")
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
