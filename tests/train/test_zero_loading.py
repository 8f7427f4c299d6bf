"""A base that ZeRO-3 divides while it is read carries the mixture that a whole one carries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from launches import launch

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def ranks(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks found."""
    folder = tmp_path_factory.mktemp("zero")
    launch(Path(__file__).with_name("zero_loading.py"), base, folder)
    return [json.loads((folder / f"rank-{rank}.json").read_text("utf-8")) for rank in range(2)]


@pytest.mark.parametrize("preset", ["mola", "mixlora", "lora"])
def test_a_mixture_made_inside_zero_init_starts_as_any_other(
    ranks: list[dict[str, Any]], preset: str
) -> None:
    for rank in ranks:
        found = rank["inside"][preset]
        assert found.pop("shapes") == [[0]]
        assert found.pop("start of another seed") is False
        assert all(found.values()), found


def test_a_context_that_casts_what_is_to_be_trained_is_refused(
    ranks: list[dict[str, Any]],
) -> None:
    for rank in ranks:
        assert "new parameters became torch.bfloat16" in rank["refused"]
        assert "Attach after that context" in rank["refused"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "auto"])
def test_a_base_is_divided_in_its_own_dtype_and_known_by_its_values(
    ranks: list[dict[str, Any]], dtype: str
) -> None:
    for rank in ranks:
        found = rank["loaded"][dtype]
        assert found.pop("shapes") == [[0]]
        assert found.pop("dtype") == f"torch.{dtype if dtype != 'auto' else 'float32'}"
        assert found.pop("samples") >= 16
        assert found.pop("samples without gathering") == 0
        assert all(found.values()), found
