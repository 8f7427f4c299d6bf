from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from saved_mixtures import Snapshot, save_tiny
from tiny_models import tiny
from torch import nn


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved mixture that no test changes."""
    directory = tmp_path_factory.mktemp("pristine") / "mixture"
    save_tiny(directory)
    return directory


@pytest.fixture
def saved(pristine: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(pristine, tmp_path / "mixture")


@pytest.fixture
def base() -> nn.Module:
    """The base model of `saved`, with some parameters that train and some that do not."""
    model = tiny("llama")
    model.lm_head.weight.requires_grad_(False)
    return model


@pytest.fixture
def before(base: nn.Module) -> Snapshot:
    """`base` as it was before the test."""
    return Snapshot.of(base)
