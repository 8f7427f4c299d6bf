"""Composed mixtures saved and loaded: the same logits without the adapters' files, or an error."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from frozen_sets import RAGGED, load_set, logits, save_set
from saved_mixtures import Snapshot, edit_manifest, edit_tensors, read_tensors, seal
from tiny_models import batch_for, tiny

import molora
from molora.errors import CheckpointError

FORMS: dict[str, dict[str, Any]] = {
    **RAGGED,
    "dora": {"use_dora": True, "target_modules": ["q_proj", "down_proj"]},
    "bias": {"lora_bias": True, "target_modules": ["q_proj", "up_proj"]},
}
ROUTERS: dict[str, dict[str, Any]] = {
    "arrow": {"router": "arrow"},
    "spectr": {"router": "spectr"},
    "lag": {"router": {"kind": "lag", "preselect": 2}},
    "uniform": {"router": "uniform"},
    "fixed": {"router": {"kind": "fixed", "weights": dict.fromkeys(FORMS, 0.3)}},
    "phatgoose": {"router": {"kind": "phatgoose", "vectors": "given"}},
    "linear": {"router": "linear", "missing": "renorm"},
    "lora_flow": {"router": "lora_flow"},
    "hard_top1": {"router": "hard_top1"},
    "growing": {"router": "linear", "trainable": ["math"], "new": ["more"], "dtype": "bfloat16"},
}


def composed(directory: Path, kind: str) -> tuple[torch.nn.Module, molora.Mixture]:
    experts = load_set(directory, FORMS)
    options = dict(ROUTERS[kind])
    if kind == "phatgoose":
        vectors = {
            name: {path: torch.randn(m.lora_A.shape[1]) for path, m in adapter.modules.items()}
            for name, adapter in experts.adapters.items()
        }
        options["router"] = {"kind": "phatgoose", "vectors": vectors}
    model = tiny("llama")
    return model, molora.compose(model, experts, **options)


@pytest.mark.parametrize("kind", ROUTERS)
def test_loaded_on_a_fresh_base_it_gives_the_same_logits(tmp_path: Path, kind: str) -> None:
    model, mixture = composed(tmp_path / "experts", kind)
    if mixture.trainable_parameters()["experts"]:
        optimiser = torch.optim.SGD(mixture.parameter_groups(0.3))
        model.train()(**batch_for(model)).loss.backward()
        optimiser.step()
        model.eval()
    expected = logits(model)
    mixture.save(tmp_path / "saved")
    shutil.rmtree(tmp_path / "experts")

    fresh = tiny("llama")
    base = logits(fresh)
    loaded = molora.load(fresh, tmp_path / "saved")
    assert torch.equal(logits(fresh), expected)
    assert (expected - base).abs().max() > 1e-2
    assert loaded.config == mixture.config
    trainable = {n: p.requires_grad for n, p in mixture.named_parameters()}
    assert {n: p.requires_grad for n, p in loaded.named_parameters()} == trainable
    loaded.save(tmp_path / "again")
    first, second = read_tensors(tmp_path / "saved"), read_tensors(tmp_path / "again")
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    loaded.detach()
    assert torch.equal(logits(fresh), base)


def test_row_scales_follow_what_is_loaded(tmp_path: Path) -> None:
    """Values into a mixture that is there: its DoRA experts' row scales are computed again."""
    model, mixture = composed(tmp_path / "experts", "arrow")
    expected = logits(model)
    state = {name: tensor.clone() for name, tensor in mixture.state_dict().items()}
    mixture.load_state_dict({n: t * 1.5 if "lora_" in n else t for n, t in state.items()})
    assert (logits(model) - expected).abs().max() > 1e-2
    scales = mixture.built.banks["model.layers.0.self_attn.q_proj"]
    assert any(block.row_scale is not None for block in scales.blocks())
    mixture.load_state_dict(state)
    assert torch.equal(logits(model), expected)


DAMAGE: dict[str, tuple[Any, str]] = {
    "a factor that lacks": (lambda t: t.pop(next(n for n in t if "1.lora_B" in n)), "missing"),
    "one too many": (lambda t: t.update(more=torch.zeros(1)), "unexpected more"),
    "another rank": (
        lambda t: t.update({n: t[n][:, :1].contiguous() for n in t if n.endswith("1.lora_A")}),
        "shape|smaller|experts of at least",
    ),
    "another type": (
        lambda t: t.update({n: t[n].bfloat16() for n in t if n.endswith("experts.lora_A")}),
        "bfloat16",
    ),
    "no magnitude": (
        lambda t: [t.pop(n) for n in [*t] if n.endswith("magnitude")],
        "missing .*magnitude",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_files_that_do_not_fit_are_refused_and_the_base_is_left(
    tmp_path: Path, damage: str
) -> None:
    edit, message = DAMAGE[damage]
    _, mixture = composed(tmp_path / "experts", "arrow")
    mixture.save(tmp_path / "saved")
    edit_tensors(tmp_path / "saved", edit)
    seal(tmp_path / "saved")
    fresh = tiny("llama")
    before = Snapshot.of(fresh)
    with pytest.raises(CheckpointError, match=message):
        molora.load(fresh, tmp_path / "saved")
    before.assert_same(fresh)


EDITS: dict[str, tuple[Any, str]] = {
    "an expert less": (lambda e, g: e["experts"].pop(), "num_experts"),
    "an expert's linear less": (
        lambda e, g: e["experts"][0]["modules"].pop("model.layers.0.self_attn.q_proj"),
        "shape|unexpected",
    ),
    "a linear that is not there": (
        lambda e, g: e["experts"][0]["modules"].update({"model.layers.7.mlp.up_proj": [3, 1.0]}),
        "is no target",
    ),
    "a rank of a million": (
        lambda e, g: e["experts"][0]["modules"].update(
            {"model.layers.0.self_attn.q_proj": [1000000, 1.0]}
        ),
        "experts of at least",
    ),
    "a name twice": (lambda e, g: e["experts"][0].update(name="law"), "two experts"),
    "targets without experts": (
        lambda e, g: g.update(targets=[*g["targets"], "model.layers.0.self_attn.o_proj"]),
        "o_proj",
    ),
    "linears without targets": (
        lambda e, g: g.update(targets=g["targets"][1:]),
        "is no target",
    ),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_manifest_that_does_not_fit_is_refused_and_the_base_is_left(
    tmp_path: Path, edit: str
) -> None:
    change, message = EDITS[edit]
    _, mixture = composed(tmp_path / "experts", "arrow")
    mixture.save(tmp_path / "saved")

    def edited(data: dict[str, Any]) -> None:
        group = data["mixture"]["groups"][0]
        change(group["expert"], group)

    edit_manifest(tmp_path / "saved", edited)
    fresh = tiny("llama")
    before = Snapshot.of(fresh)
    with pytest.raises(CheckpointError, match=message):
        molora.load(fresh, tmp_path / "saved")
    before.assert_same(fresh)


def test_the_configuration_says_where_experts_came_from(tmp_path: Path) -> None:
    dirs = save_set(tmp_path / "experts", RAGGED)
    experts = molora.load_experts(dirs)
    mixture = molora.compose(tiny("llama"), experts, router="linear", new=["more"])
    form = mixture.config.groups[0].expert
    assert form.names == (*RAGGED, "more")
    for expert in form.experts[:-1]:
        adapter = experts.adapters[expert.name]
        assert expert.sha256 == adapter.sha256
        assert expert.modules == {
            path: (m.rank, pytest.approx(m.scaling)) for path, m in adapter.modules.items()
        }
    assert form.experts[-1].sha256 is None
    assert form.experts[-1].trainable
