"""What every test needs: a quiet, offline, repeatable process.

The environment is set before anything imports torch or transformers: both read it only once.
"""

import os
import sys

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
# One thread: small tensors gain nothing from more, and sums in another order are other numbers.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# No user's calibration: which backend "auto" takes is that of the shipped figures.
os.environ["XDG_CONFIG_HOME"] = os.path.join(os.path.dirname(__file__), "no-such-folder")

settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=40)
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile("repeatable")  # pytest --hypothesis-profile explore searches further


@pytest.fixture(autouse=True)
def _seed_torch() -> None:
    """Each test starts from the same random state, alone or among others."""
    if "torch" in sys.modules:  # tests of plain data do not pay for the import
        sys.modules["torch"].manual_seed(0)
