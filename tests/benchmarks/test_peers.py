"""benchmarks/peers.py beside a stand-in for MoE-PEFT, which runs in an environment of its own."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

FOLDER = Path(__file__).parents[2] / "benchmarks"


class StandIn(nn.Module):
    """The parts of moe_peft's model that the script uses: adapters are kept out of the modules."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.batches: list[object] = []

    def init_adapter(self, config: SimpleNamespace) -> None:
        linear = self.base.model.layers[0].self_attn.q_proj
        self.weight = torch.zeros(linear.in_features)
        dropouts = {
            name: nn.Dropout(config.lora_dropout) for name in ("peer", "moe.peer.experts.0")
        }
        linear.loras_ = {name: SimpleNamespace(dropout_=d) for name, d in dropouts.items()}

    def get_adapter_weight_dict(self, name: str) -> dict[str, torch.Tensor]:
        return {"weight": self.weight}

    def forward(self, batch: SimpleNamespace) -> list[object]:
        self.batches.append(batch)
        ids_BS = torch.tensor(batch.batch_tokens_)
        hidden_BSD = self.base.get_input_embeddings()(ids_BS) + self.weight
        return [SimpleNamespace(loss=self.base(inputs_embeds=hidden_BSD, labels=ids_BS).loss)]


@pytest.fixture
def peers() -> Iterator[ModuleType]:
    def config(fields: dict[str, object]) -> SimpleNamespace:
        return SimpleNamespace(**fields)

    def batch_config(*fields: object) -> tuple[object, ...]:
        return fields

    stand_ins = {
        "moe_peft": {},
        "moe_peft.adapters": {"lora_config_factory": config},
        "moe_peft.common": {"LLMBatchConfig": batch_config, "LLMModelInput": SimpleNamespace},
        "moe_peft.model": {"LLMModel": StandIn},
        "moe_peft.models": {"from_pretrained": lambda model, **options: model},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        for name, members in stand_ins.items():
            module = ModuleType(name)
            module.__dict__.update(members)
            patch.setitem(sys.modules, name, module)
        for name in ("peers", "step_cost"):
            patch.delitem(sys.modules, name, raising=False)
        yield importlib.import_module("peers")


def test_peers_have_the_sizes_of_the_other_implementations(peers: ModuleType) -> None:
    mixture = peers.adapter_fields("mola")
    assert (mixture["num_experts"], mixture["r"], mixture["top_k"]) == (8, 8, 2)
    lora = peers.adapter_fields("lora")
    assert lora["r"] == mixture["num_experts"] * mixture["r"]
    assert "num_experts" not in lora
    assert mixture["target_modules"] == lora["target_modules"] == peers.PROJECTIONS


def test_a_peer_is_measured_by_its_own_parameters(peers: ModuleType) -> None:
    sizes = peers.Sizes(hidden=64, layers=1, tokens=16, vocab=32)
    peers.IMPLEMENTATIONS["moe-peft-mola"] = peers.builder("mola")
    (cost,) = peers.measure(["moe-peft-mola"], sizes, runs=1)
    assert cost.time_x > 0
    assert cost.ops_x > 1


def test_experts_have_no_dropout_and_steps_train_the_adapter_alone(peers: ModuleType) -> None:
    peer = peers.Peer(peers.Sizes(hidden=64, layers=1, vocab=32), "mola")
    (model,) = peer.model
    adapters = model.base.model.layers[0].self_attn.q_proj.loras_
    dropouts = {name: adapter.dropout_.p for name, adapter in adapters.items()}
    assert dropouts == {"peer": 0.05, "moe.peer.experts.0": 0.0}
    (weight,) = peer.parameters()
    ids_BS = torch.arange(8).view(2, 4)
    peer(input_ids=ids_BS, labels=ids_BS).loss.backward()
    assert weight.grad.abs().max() > 0
    (batch,) = model.batches
    assert batch.batch_tokens_ == batch.batch_labels_ == ids_BS.tolist()
    assert batch.batch_masks_ == [[1] * 4] * 2


def test_an_unknown_method_is_named(
    peers: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["peers.py", "moe"])
    with pytest.raises(SystemExit):
        peers.main()
    assert "unknown moe; known: lora, loramoe, mola, mixlora" in capsys.readouterr().err
