"""Which modules a configuration names: those that package peft would adapt."""

from __future__ import annotations

from typing import Any

import peft
import pytest
from peft.tuners.tuners_utils import check_target_module_exists

from molora.io.peft_config import parse_config
from molora.io.peft_targets import target_differences

MODULES = [
    *(f"model.layers.{n}.self_attn.{p}_proj" for n in (0, 1, 11) for p in "qk"),
    *("model.layers.1.mlp.experts.0.up_proj", "layers.1.q_proj", "h.0", "a.h.1.q_proj"),
    *("lm_head", "q_proj", "xq_proj", "model.q_proj.inner", "transformer.h.1.1.q_proj"),
]
SETTINGS: list[dict[str, Any]] = [
    {"target_modules": ["q_proj"]},
    {"target_modules": ["q_proj", "self_attn.k_proj", "lm_head", "h.0"]},
    {"target_modules": ["proj", "layers", "lm_head"]},
    {"target_modules": r".*\.[qk]_proj"},
    {"target_modules": r"model\.layers\.1\..*"},
    {"target_modules": "q_proj"},
    {"target_modules": r"q_proj|lm_head"},
    {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["self_attn.k_proj"]},
    {"target_modules": r".*proj", "exclude_modules": r".*\.1\..*"},
    {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    {"target_modules": ["q_proj"], "layers_to_transform": 1},
    {"target_modules": ["q_proj", "k_proj"], "layers_to_transform": [0, 11]},
    {"target_modules": ["q_proj"], "layers_to_transform": []},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_modules_that_the_config_names_are_those_of_peft(settings: dict[str, Any]) -> None:
    theirs = peft.LoraConfig(**settings)
    config, _ = parse_config({"peft_type": "LORA", **settings}, where="")
    named = [module for module in MODULES if bool(check_target_module_exists(theirs, module))]
    for module in MODULES:
        lines = target_differences(config, [module], where="")
        surplus = [line for line in lines if " adapted " in line]
        assert bool(surplus) == (module not in named), (module, lines)
    assert 0 < len(named) < len(MODULES)
