"""A mixture in a file: as a preset with its arguments, or spelt out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

import molora
from molora.config import LoadBalance, Loss, MixtureConfig
from molora.errors import ConfigError
from molora.presets import mixlora, mixture_config, mola

RUN = {"model": {"name": "model"}, "data": {"train": ["train.jsonl"]}}


def write(path: Path, mixture: Any, **changes: Any) -> Path:
    path.write_text(yaml.safe_dump({**RUN, "mixture": mixture, **changes}), encoding="utf-8")
    return path


def test_a_preset_in_a_file_is_the_call(tmp_path):
    mixture = {
        "preset": "mola",
        "num_experts": [2, 4],
        "rank": 3,
        "targets": "q_proj",
        "losses": [{"term": {"kind": "load_balance", "form": "slots"}, "coefficient": 0.5}],
        "dtype": "bfloat16",
    }
    expected = mola(
        num_experts=(2, 4),
        rank=3,
        targets=["q_proj"],
        losses=[Loss(term=LoadBalance(form="slots"), coefficient=0.5)],
        dtype="bfloat16",
    )
    path = write(tmp_path / "run.yaml", mixture)
    assert molora.load_config(path).mixture == expected
    assert molora.load_config(str(path)).mixture == expected
    assert expected != mola(num_experts=(2, 4), rank=3, targets=["q_proj"], dtype="bfloat16")


def test_a_preset_without_arguments_is_its_default(tmp_path):
    path = write(tmp_path / "run.yaml", {"preset": "mixlora", "variant": "switch"})
    assert molora.load_config(path).mixture == mixlora(variant="switch")


def test_a_mixture_that_is_spelt_out_is_itself(tmp_path):
    config = mola(top_k=1, renormalize=False)
    path = write(tmp_path / "run.yaml", config.model_dump(mode="json"))
    assert molora.load_config(path).mixture == config
    assert mixture_config(config.model_dump()) == config


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ({"preset": "moola"}, r"mixture\.preset: unknown preset 'moola'\. Close names: mola"),
        ({"preset": ["mola"]}, r"mixture\.preset: unknown preset"),
        ({"preset": None}, r"mixture\.preset: unknown preset 'None'"),
        ({"preset": "mola", "topk": 2}, r"mixture: unknown key 'topk'\. Close names: top_k"),
        ({"preset": "lora", "num_experts": 2}, "mixture: unknown key 'num_experts'"),
        ({"preset": "mola", "method": "mine"}, "unknown key 'method'"),
        ({"preset": "mola", "groups": []}, "unknown key 'groups'"),
        ({"preset": "mola", "options": {}}, "unknown key 'options'"),
        (
            {"preset": "mola", "rank": 0},
            r"mixture \(preset mola\): groups\.0\.rank.*greater than 0",
        ),
        ({"preset": "mola", "top_k": 9, "num_experts": 4}, "top_k=9 exceeds num_experts=4"),
        ({"preset": "loramoe", "delta": "x"}, r"\(preset loramoe\): delta: .*number"),
        ({"preset": "mixlora", "variant": "x"}, r"unknown variant 'x'\. Known: top_k, top_p"),
        ({"groups": [{"rnak": 1}]}, r"mixture\.groups\.0: unknown key 'rnak'\. Close names: rank"),
        ({}, "mixture.groups: Field required"),
        ("mola", "mixture"),
        (None, "mixture"),
    ],
)
def test_a_faulty_mixture_is_an_error_that_names_it(tmp_path, mixture, message):
    with pytest.raises(ConfigError, match=message):
        molora.load_config(write(tmp_path / "run.yaml", mixture))


def test_a_run_without_a_mixture_says_so(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(RUN), encoding="utf-8")
    with pytest.raises(ConfigError, match="mixture: Field required"):
        molora.load_config(path)


def test_other_sections_are_checked_beside_the_preset(tmp_path):
    path = write(tmp_path / "run.yaml", {"preset": "lora"}, train={"learning_rat": 1})
    with pytest.raises(ConfigError, match=r"train: unknown key 'learning_rat'"):
        molora.load_config(path)


def test_numbers_are_read_as_people_write_them(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: {name: model}\ndata: {train: [a.jsonl]}\ntrain: {learning_rate: 1e-4}\n"
        "mixture: {preset: lora, alpha: 1e1}\n",
        encoding="utf-8",
    )
    config = molora.load_config(path)
    assert config.train.learning_rate == 1e-4
    assert config.mixture.groups[0].expert.alpha == 10
    assert isinstance(config.mixture, MixtureConfig)
