"""``python -m molora``: the command line."""

import sys

from molora.cli import main

if __name__ == "__main__":
    sys.exit(main())
