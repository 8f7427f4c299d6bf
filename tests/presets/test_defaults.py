"""What a preset is without arguments is what its paper or its authors' code says."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest

import molora
from molora.config import LoadBalance, LocalizedBalance, MixtureConfig, RouterZ
from molora.errors import ConfigError
from molora.presets import PRESETS, lora, loramoe, methods, mixlora, mola


def count(value: int) -> dict[str, Any]:
    return {"kind": "uniform", "value": value}


FFN = {"targets": {"ffn"}, "num_experts": count(8), "rank": 16, "alpha": 32, "dropout": 0.05}

# of the first group
DEFAULTS: dict[str, dict[str, Any]] = {
    "lora": {
        "targets": {"all"},
        "num_experts": count(1),
        "rank": 8,
        "alpha": 16,
        "dropout": 0.0,
        "select": {},
    },
    "molora": {
        "targets": {"all"},
        "num_experts": count(8),
        "rank": 8,
        "alpha": 16,
        "dropout": 0.0,
        "select": {"kind": "dense"},
    },
    "mola": {
        "targets": {"all"},
        "num_experts": {"kind": "shape", "name": "inverted_triangle"},
        "rank": 8,
        "alpha": 16,
        "dropout": 0.05,
        "select": {"kind": "top_k", "k": count(2), "renormalize": True},
    },
    "loramoe": {
        "targets": {"ffn"},
        "num_experts": count(6),
        "rank": 4,
        "alpha": 32,
        "dropout": 0.05,
        "select": {"kind": "dense"},
    },
    "mixlora": {**FFN, "select": {"kind": "top_k", "k": count(2), "renormalize": True}},
    "mixlora_top_p": {**FFN, "select": {"kind": "top_p", "p": 0.8, "renormalize": False}},
    "mixlora_switch": {
        **FFN,
        "select": {
            "kind": "capacity",
            "k": count(1),
            "tokens": 32,
            "renormalize": False,
            "overflow": "input",
        },
    },
}


def made(name: str) -> MixtureConfig:
    preset, _, variant = name.partition("_")
    return PRESETS[preset](**({"variant": variant} if variant else {}))


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_of_a_preset(name):
    expected, config = DEFAULTS[name], made(name)
    group = config.groups[0]
    found = group.model_dump()
    assert set(group.targets) == expected["targets"]
    assert found["num_experts"] == expected["num_experts"]
    assert found["rank"] == count(expected["rank"])
    assert group.expert.alpha == expected["alpha"]
    assert group.expert.scaling == "alpha/r"
    assert group.expert.init == "kaiming"
    assert group.expert.dropout.p == expected["dropout"]
    assert group.site.kind == ("ffn" if name.startswith("mixlora") else "linear")
    assert group.score.kind == "softmax"
    assert {key: found["select"][key] for key in expected["select"]} == expected["select"]
    assert config.method == name.partition("_")[0]
    assert config.dtype == "float32"


def test_routers_of_the_presets_start_as_their_authors_do():
    def router(name: str) -> tuple[str, float | None, float]:
        config = made(name).groups[0].router
        return config.init.kind, getattr(config.init, "std", None), config.jitter

    assert router("mola") == router("loramoe") == ("kaiming", None, 0)
    assert router("mixlora") == router("mixlora_top_p") == ("normal", 0.02, 0)
    assert router("mixlora_switch") == ("normal", 1.0, 0.01)


def test_mixlora_puts_plain_lora_on_attention():
    ffn, attention = mixlora(rank=5, alpha=7, dropout=0.2).groups
    assert attention.targets == ("attention",)
    assert not attention.routed
    assert (attention.rank, attention.expert) == (ffn.rank, ffn.expert)
    assert [g.targets for g in mixlora(attention_targets=None).groups] == [("ffn",)]


def test_losses_have_their_authors_form_scope_reduction_and_coefficient():
    def losses(name: str) -> list[tuple[Any, ...]]:
        return [(x.term, x.coefficient, x.scope, x.reduction, x.mask) for x in made(name).losses]

    pooled = ("model", "mean", "valid")
    assert losses("lora") == losses("molora") == []
    assert losses("mola") == [(LoadBalance(form="normalized"), 0.001, "layer", "sum", "valid")]
    assert losses("loramoe") == [(LocalizedBalance(delta=0.1), 0.1, "site", "sum", "valid")]
    assert losses("mixlora") == [(LoadBalance(form="slots"), 0.01, *pooled)]
    assert losses("mixlora_top_p") == losses("mixlora")
    assert losses("mixlora_switch") == [
        (LoadBalance(form="switch"), 0.01, *pooled),
        (RouterZ(), 0.001, *pooled),
    ]


@pytest.mark.parametrize("name", PRESETS)
def test_losses_can_be_turned_off_and_other_fields_set(name):
    config = PRESETS[name](losses=(), dtype="bfloat16", train_modules=("lm_head",), rank=[1, 2])
    assert config.losses == ()
    assert config.dtype == "bfloat16"
    assert config.train_modules == ("lm_head",)
    assert config.groups[0].rank.values == (1, 2)


COMMON = ["num_experts", "top_k", "rank", "alpha", "dropout", "targets", "renormalize", "losses"]
WITHOUT = {  # one expert, or all of them, have no top_k and nothing to renormalise
    "lora": {"num_experts", "top_k", "renormalize", "losses"},
    "molora": {"top_k", "renormalize"},
    "loramoe": {"top_k", "renormalize"},
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_take_the_common_arguments_where_they_apply(name):
    parameters = inspect.signature(PRESETS[name]).parameters
    missing = {argument for argument in COMMON if argument not in parameters}
    assert missing == WITHOUT.get(name, set())
    assert all(p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD) for p in parameters.values())


def test_methods_lists_every_preset_with_its_paper_on_one_line():
    assert list(methods()) == list(PRESETS) == ["lora", "molora", "mola", "loramoe", "mixlora"]
    assert molora.methods() == methods()
    for line in methods().values():
        assert re.search(r"\d{4}\.\d{5}", line), line
        assert line.endswith(".")
        assert "\n" not in line


def test_arguments_that_cannot_be_are_config_errors():
    with pytest.raises(ConfigError, match=r"delta: .*less than 1"):
        loramoe(delta=1.5)
    with pytest.raises(ConfigError, match=r"unknown variant 'switsh'\. Close names: switch"):
        mixlora(variant="switsh")
    with pytest.raises(ConfigError, match=r"lora: unknown argument 'rnak'\. Close names: rank"):
        lora(rnak=3)
    with pytest.raises(ConfigError, match="top_k=9 exceeds num_experts=4"):
        mola(num_experts=4, top_k=9)
    with pytest.raises(ConfigError, match=r"even \(got 5\)"):
        loramoe(num_experts=5)
    assert loramoe(num_experts=5, losses=()).groups[0].routed
