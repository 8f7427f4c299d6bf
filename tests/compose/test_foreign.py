"""Routers that other packages' files describe."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from peft_adapters import save_adapter
from tiny_models import tiny

import molora
from molora.compose.foreign import router_from
from molora.errors import CheckpointError, ConfigError

NAMES = ("math", "code")
MERGOO = {
    "model_type": "llama",
    "num_experts_per_tok": 1,
    "base_model": "some/base",
    "experts": [{"expert_name": name, "model_id": f"some/{name}"} for name in NAMES],
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("foreign")
    for number, name in enumerate(NAMES):
        save_adapter(root / name, seed=number + 1)
    return {name: root / name for name in NAMES}


@pytest.mark.parametrize("file", ["", "adapter_config.json"])
def test_arrow_of_package_peft(file: str, directories: dict[str, Path], tmp_path: Path) -> None:
    model = peft.create_arrow_model(
        tiny("llama"),
        [str(path) for path in directories.values()],
        peft.ArrowConfig(top_k=1, router_temperature=0.5),
    )
    model.save_pretrained(tmp_path)
    router = router_from(tmp_path / "arrow_router" / file, NAMES)
    assert router == {"kind": "arrow", "top_k": 1, "temperature": 0.5}
    molora.compose(tiny("llama"), molora.load_experts(directories), router=router)


def test_weights_of_lorahub(directories: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "weights.json"
    for data in (
        {"modules": ["code", "math"], "weights": [0.25, -1.5]},
        {"math": -1.5, "code": 0.25},
    ):
        path.write_text(json.dumps(data))
        router = router_from(path, NAMES)
        assert router == {"kind": "fixed", "weights": {"math": -1.5, "code": 0.25}}
    base = tiny("llama").eval()
    mixture = molora.compose(base, molora.load_experts(directories), router=router)
    with mixture.record() as records, torch.no_grad():
        base(torch.tensor([[5, 6]]))
    assert all(r.dense_gates()[0].tolist() == [-1.5, 0.25] for r in records.values())
    with pytest.raises(ConfigError, match="weights for other experts than were given: law, math"):
        router_from(path, ("law", "code"))


def test_settings_of_mergoo(directories: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "mergoo.json"
    path.write_text(json.dumps(MERGOO))
    router = router_from(path, NAMES)
    assert router == {"kind": "linear", "top_k": 1}
    with pytest.raises(ConfigError, match="about 2 experts, and 3 were given"):
        router_from(path, (*NAMES, "law"))


def test_what_describes_no_router_is_refused(directories: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no arrow_config: it is an adapter"):
        router_from(directories["math"], NAMES)
    with pytest.raises(ConfigError, match="describes no router: give package peft's"):
        router_from(tmp_path, NAMES)
    with pytest.raises(CheckpointError, match=r"none\.json"):
        router_from(tmp_path / "none.json", NAMES)
