"""A base model in a directory, and runs on it."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
from transformers.utils import logging


@pytest.fixture(scope="session", autouse=True)
def _quiet_and_quick() -> Iterator[None]:
    logging.disable_progress_bar()
    importlib.import_module("trl.trainer.sft_trainer")
    # every Trainer.train() collects garbage: half a second with all libraries in the heap
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    logging.enable_progress_bar()


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large weights, since a frozen head of small ones cannot be certain of any token."""
    return tiny_runs.save_base(tmp_path_factory.mktemp("base"), initializer_range=0.5)


@pytest.fixture
def run_file(tmp_path: Path, base: Path) -> Callable[..., Path]:
    """(mixture, rows=…, train={…}, …) → a YAML file of a run whose output is `tmp_path`/out."""

    def write(mixture: dict[str, Any], *, rows: Any = tiny_runs.ROWS, **sections: Any) -> Path:
        data = tiny_runs.write_rows(tmp_path / "rows.jsonl", rows)
        return tiny_runs.write_run(tmp_path / "run.yaml", base, data, mixture, **sections)

    return write
