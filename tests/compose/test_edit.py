"""Experts out of a composed mixture, and mixtures with experts added and dropped."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_adapters import save_adapter
from tiny_models import batch_for, tiny
from torch import Tensor

import molora
from molora.compose.compose import composed_config
from molora.compose.edit import edited, experts_of, recovered, saved_experts
from molora.compose.experts import FrozenExperts
from molora.errors import ConfigError
from molora.io.adapter import Adapter
from molora.presets.frozen import ROUTERS

KINDS: dict[str, dict[str, Any]] = {
    "math": {"target_modules": ["q_proj", "v_proj"]},
    "code": {"target_modules": ["q_proj", "down_proj"], "lora_alpha": 7},
    "law": {"r": 5, "use_rslora": True, "target_modules": ["q_proj"]},
    "dora": {"use_dora": True, "target_modules": ["down_proj", "q_proj"]},
    "bias": {"lora_bias": True, "target_modules": ["q_proj", "k_proj"]},
}


LOSSES = [{"term": {"kind": "load_balance"}}]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    for seed, (name, settings) in enumerate(KINDS.items()):
        save_adapter(root / name, seed=seed, **settings)
    return {name: root / name for name in KINDS}


def read(directories: Mapping[str, Path], *names: str) -> FrozenExperts:
    return molora.load_experts({name: directories[name] for name in names or KINDS})


def composed(directories: Mapping[str, Path], *names: str, **options: Any) -> molora.Mixture:
    return molora.compose(tiny("llama"), read(directories, *names), **options)


def logits(mixture: molora.Mixture) -> Tensor:
    with torch.no_grad():
        found: Tensor = mixture.model(**batch_for(mixture.model, labels=False)).logits
    return found


def parts(adapter: Adapter) -> dict[str, Any]:
    return {
        f"{path}.{part}": getattr(module, part)
        for path, module in adapter.modules.items()
        for part in ("lora_A", "lora_B", "bias", "magnitude", "scaling")
    }


def assert_same(found: FrozenExperts, expected: FrozenExperts) -> None:
    assert found.names == expected.names
    for name, adapter in expected.adapters.items():
        own, meant = parts(found.adapters[name]), parts(adapter)
        assert list(own) == list(meant)
        for key, value in meant.items():
            if isinstance(value, Tensor):
                assert own[key].dtype == value.dtype
                assert torch.equal(own[key], value), (name, key)
            else:
                assert own[key] == value, (name, key)
        described = ("sha256", "base", "revision", "invocation_tokens")
        assert [getattr(found.adapters[name], d) for d in described] == [
            getattr(adapter, d) for d in described
        ]
        norms = [module.update_norm for module in found.adapters[name].modules.values()]
        expected_norms = [module.update_norm for module in adapter.modules.values()]
        assert norms == pytest.approx(expected_norms, rel=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_experts_come_out_as_they_went_in(
    directories: Mapping[str, Path], tmp_path: Path, dtype: str
) -> None:
    experts = read(directories)
    mixture = composed(directories, dtype=dtype)  # of what is trained: frozen ones keep theirs
    assert_same(experts_of(mixture), experts)
    mixture.save(tmp_path)
    assert_same(saved_experts(tmp_path), experts)
    path, name = "model.layers.0.self_attn.q_proj", "1.lora_B"
    mixture.state_dict()[f"{path}.experts.{name}"][0, 0, 0] += 1
    with pytest.raises(AssertionError):
        assert_same(experts_of(mixture), experts)


def test_other_mixtures_cannot_be_taken_apart(tmp_path: Path) -> None:
    mixture = molora.attach(tiny("llama"), molora.presets.mola(num_experts=2, rank=2))
    mixture.save(tmp_path)
    for take in (lambda: experts_of(mixture), lambda: saved_experts(tmp_path)):
        with pytest.raises(ConfigError, match="holds no experts that were trained elsewhere"):
            take()


@pytest.mark.parametrize("router", ["uniform", "arrow", "spectr", "lag"])
def test_edited_mixture_is_the_one_composed_of_those_experts(
    directories: Mapping[str, Path], tmp_path: Path, router: str
) -> None:
    composed(directories, "math", "law", "dora", router=router).save(tmp_path)
    saved = molora.load(tiny("llama"), tmp_path)
    before = logits(saved)
    found = edited(saved, add=read(directories, "code", "bias"), drop=["law"])
    expected = composed(directories, "math", "dora", "code", "bias", router=router)
    assert found.config == expected.config
    torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=0, atol=1e-6)
    torch.testing.assert_close(logits(found), logits(expected), rtol=0, atol=1e-5)
    assert (logits(found) - before).abs().max() > 0.05


@pytest.mark.parametrize(
    "router",
    [
        {"kind": "arrow", "top_k": 2, "temperature": 0.5},
        {"kind": "spectr", "relative": True, "top_k": "all"},
        {"kind": "lag", "preselect": 2, "top_k": 1},
        {"kind": "phatgoose", "renormalize": False},
        {"kind": "linear", "scope": "block", "bias": True, "top_k": 2},
        {"kind": "hard_top1", "scope": "linear"},
        {"kind": "fixed", "weights": {"math": 0.5, "law": 2.0, "dora": -1.0}},
        {"kind": "xlora", "layerwise": True, "depth": 2, "width": 8, "softmax": False},
        {"kind": "xlora", "top_k": 2, "softmax_top_k": True, "first_pass_score": None},
        {"kind": "xlora", "gate_scale": 2.0, "first_pass_score": 0.2, "temperature": 3.0},
        {"kind": "given", "top_k": 1},
        *(name for name in ROUTERS if name != "fixed"),  # which needs weights
    ],
    ids=str,
)
def test_router_is_recovered_from_the_configuration(
    directories: Mapping[str, Path], router: Any
) -> None:
    experts = read(directories, "math", "law", "dora")
    config = composed_config(experts, router=router)
    assert composed_config(experts, router=recovered(config, experts.names)) == config


def test_what_stands_for_all_experts_stands_for_all_that_there_are_then(
    directories: Mapping[str, Path],
) -> None:
    router = {"kind": "xlora", "softmax_top_k": True, "first_pass_score": None}
    mixture = composed(directories, "math", "law", router=router)
    found = edited(mixture, add=read(directories, "code"))
    assert found.config == composed(directories, "math", "law", "code", router=router).config


@pytest.mark.parametrize(
    ("router", "last"),
    [
        ({"kind": "linear", "bias": True}, ".router."),
        ({"kind": "linear", "scope": "layer"}, ".router."),
        ({"kind": "xlora"}, "router.layers.0."),
        ({"kind": "xlora", "depth": 2, "width": 6, "layerwise": True}, "router.layers.3."),
    ],
    ids=["linear", "layer", "xlora", "xlora_layerwise"],
)
def test_learned_routers_keep_the_rows_of_experts_that_stay(
    directories: Mapping[str, Path], router: dict[str, Any], last: str
) -> None:
    mixture = composed(directories, "math", "law", "dora", router=router, missing="zero")
    source = torch.Generator().manual_seed(3)
    for learned in mixture.built.routers.values():
        for tensor in learned.parameters():
            tensor.data.normal_(generator=source)
    old = {k: v.clone() for k, v in mixture.state_dict().items() if "router." in k}
    # the same linears, in another order of experts
    found = edited(mixture, add=read(directories, "code"), drop=["law"])
    fresh = composed(directories, "math", "dora", "code", router=router, missing="zero")
    assert found.config == fresh.config
    started = fresh.state_dict()
    for name, tensor in found.state_dict().items():
        if "router." not in name:
            torch.testing.assert_close(tensor, started[name], rtol=0, atol=0)
        elif last not in name:
            torch.testing.assert_close(tensor, old[name], rtol=0, atol=0)
        else:
            before, now = _by_expert(old[name], 3), _by_expert(tensor, 3)
            torch.testing.assert_close(now[:, :2], before[:, [0, 2]], rtol=0, atol=0)
            start = _by_expert(started[name], 3)
            torch.testing.assert_close(now[:, 2], start[:, 2], rtol=0, atol=0)
            assert (now[:, :2] - start[:, :2]).abs().max() > 0.1


def _by_expert(tensor: Tensor, count: int) -> Tensor:
    return tensor.view(-1, count, *tensor.shape[1:])


def test_routers_of_outputs_keep_what_they_know_of_each_pair(
    directories: Mapping[str, Path],
) -> None:
    mixture = composed(directories, "math", "law", "bias", router="mole")
    path = "model.layers.0.self_attn.q_proj.router"
    state = mixture.state_dict()
    learnt = state[f"{path}.weight"].normal_().clone().view(3, 3, -1)
    state[f"{path}.log_temperature"].fill_(0.5)
    found = edited(mixture, add=read(directories, "code"), drop=["law"])
    fresh = composed(directories, "math", "bias", "code", router="mole").state_dict()
    now, start = (s[f"{path}.weight"].view(3, 3, -1) for s in (found.state_dict(), fresh))
    staying = torch.tensor([0, 2])
    assert torch.equal(now[:2, :2], learnt[staying][:, staying])
    assert torch.equal(now[2], start[2])
    assert torch.equal(now[:, 2], start[:, 2])
    assert found.state_dict()[f"{path}.log_temperature"] == 0.5


def test_losses_stay_with_their_router(directories: Mapping[str, Path]) -> None:
    mixture = composed(directories, "math", "law", router={"kind": "moa", "label_loss": 0.5})
    losses = mixture.config.losses
    assert len(losses) == 1
    mixture = edited(mixture, add=read(directories, "code"))
    assert mixture.config.losses == losses
    mixture = edited(mixture, router={"top_k": "all", "label_loss": 0.25})
    assert mixture.config.losses[0].coefficient == 0.25
    assert edited(mixture, router="linear").config.losses == ()


def test_settings_of_a_router_change_and_it_keeps_what_it_learnt(
    directories: Mapping[str, Path],
) -> None:
    mixture = composed(directories, "math", "law", router="linear")
    path = "model.layers.0.self_attn.q_proj.router.weight"
    learnt = mixture.state_dict()[path].normal_().clone()
    found = edited(mixture, router={"top_k": 1, "temperature": 2.0}, losses=LOSSES)
    router = {"kind": "linear", "top_k": 1, "temperature": 2.0}
    expected = composed(directories, "math", "law", router=router, losses=LOSSES)
    assert found.config == expected.config
    assert torch.equal(found.state_dict()[path], learnt)
    anew = edited(found, router="lora_flow", losses=())
    assert anew.config.method == "lora_flow"
    again = edited(anew, router={"kind": "linear", "top_k": "all"})
    assert not torch.equal(again.state_dict()[path], learnt)


def test_weights_of_fixed_routers_change(directories: Mapping[str, Path]) -> None:
    router = {"kind": "fixed", "weights": {"math": 0.25, "law": 2.0}}
    mixture = composed(directories, "math", "law", router=router)
    weights = {"math": 1.0, "law": 2.0, "code": 3.0}
    found = edited(mixture, add=read(directories, "code"), router={"weights": weights})
    assert found.config.groups[0].router.weights == (1.0, 2.0, 3.0)  # type: ignore[union-attr]


def test_dropping_an_expert_takes_its_linears_along(directories: Mapping[str, Path]) -> None:
    router = {"kind": "xlora", "layerwise": True}
    mixture = composed(directories, "math", "law", router=router)
    values = mixture.state_dict()["router.layers.0.weight"].normal_().clone()
    values_LEH = _by_expert(values, 2)
    paths = list(mixture.built.banks)
    found = edited(mixture, drop=["math"])  # v_proj goes
    kept = [number for number, path in enumerate(paths) if path.endswith("q_proj")]
    assert 0 < len(kept) < len(paths)
    now_LEH = _by_expert(found.state_dict()["router.layers.0.weight"], 1)
    torch.testing.assert_close(now_LEH, values_LEH[kept][:, 1:], rtol=0, atol=0)


def test_vectors_stay_with_their_experts(directories: Mapping[str, Path]) -> None:
    experts = read(directories, "math", "law")
    source = torch.Generator().manual_seed(0)
    vectors = {
        name: {p: torch.randn(m.lora_A.shape[1], generator=source) for p, m in a.modules.items()}
        for name, a in experts.adapters.items()
    }
    mixture = molora.compose(
        tiny("llama"), experts, router={"kind": "phatgoose", "vectors": vectors}
    )
    with pytest.raises(ConfigError, match="has no vectors for code"):
        edited(mixture, add=read(directories, "code"))
    old = {k: v.clone() for k, v in mixture.state_dict().items() if "router." in k}
    found = edited(mixture, drop=["math"])
    for name, tensor in found.state_dict().items():
        if "router." in name:
            torch.testing.assert_close(tensor, old[name][1:], rtol=0, atol=0)


def test_continual_learning_freezes_what_was_learnt(directories: Mapping[str, Path]) -> None:
    mixture = composed(directories, "math", router="linear", new={"one": {"rank": 2}})
    path = "model.layers.0.self_attn.q_proj"
    bank = mixture.built.banks[path]
    learnt = next(p for b in bank.blocks() if b.trainable for p in [b.lora_B]).data.normal_()
    learnt = learnt.clone()
    found = edited(mixture, new=["two"])
    form = found.config.groups[0].expert
    assert [e.trainable for e in form.experts] == [False, False, True]  # type: ignore[union-attr]
    one = experts_of(found).adapters["one"]
    torch.testing.assert_close(one.modules[path].lora_B, learnt[0], rtol=0, atol=0)
    assert len(one.sha256) == 64
    again = edited(found, trainable=["one"], drop=["two"])
    assert again.num_parameters()["experts"] == sum(
        m.lora_A.numel() + m.lora_B.numel() for m in one.modules.values()
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop": ["maths"]}, "Close names: math"),
        ({"drop": ["math", "law"]}, "every expert is dropped"),
        ({"add": "law"}, "is called 'law' already"),
        ({"router": "arow"}, "Close names: arrow"),
        ({"router": {"kind": "arrow", "top_k": 3}}, "top_k=3 exceeds num_experts=2"),
        ({"new": ["x"]}, "router arrow is made from the experts' factors"),
        ({"new": ["law"], "router": "linear"}, "cannot be called 'law'"),
        ({"dtyp": "float16"}, "Close names: dtype"),
    ],
    ids=str,
)
def test_what_cannot_be_leaves_the_mixture_as_it_was(
    directories: Mapping[str, Path], options: dict[str, Any], message: str
) -> None:
    mixture = composed(directories, "math", "law")
    before = logits(mixture)
    if "add" in options:
        options = {"add": read(directories, options["add"])}
    with pytest.raises(ConfigError, match=message):
        edited(mixture, **options)
    torch.testing.assert_close(logits(mixture), before, rtol=0, atol=0)


def test_fixed_weights_are_asked_for_where_they_are_missing(
    directories: Mapping[str, Path],
) -> None:
    weights = {"math": 0.25, "law": 2.0}
    mixture = composed(directories, *weights, router={"kind": "fixed", "weights": weights})
    with pytest.raises(ConfigError, match="fixed weights say nothing of code"):
        edited(mixture, add=read(directories, "code"))
    found = edited(mixture, drop=["math"])
    assert found.config.groups[0].router.weights == (2.0,)  # type: ignore[union-attr]


def test_trained_parts_of_the_base_are_not_lost_in_silence(
    directories: Mapping[str, Path],
) -> None:
    mixture = composed(directories, "math", router="linear", train_modules=["lm_head"])
    with pytest.raises(ConfigError, match="trained modules or token rows"):
        edited(mixture, new=["x"])
