"""The quick start compares like with like, and its tuning and scoring scripts run."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from chat_models import save_chat_model

import molora
from molora.config.run import RunConfig
from molora.train.dry_run import dry_run

ROOT = Path(__file__).parents[2]


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run from the repository, with examples/ importable as its scripts see it."""
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return ROOT / "examples"


def script(name: str) -> ModuleType:
    return importlib.import_module(name)


def run_of(path: str) -> RunConfig:
    return molora.load_config(ROOT / "configs" / path)


def test_mixture_and_lora_differ_in_method_learning_rate_and_place_alone() -> None:
    mixture, lora = run_of("quickstart.yaml"), run_of("quickstart-lora.yaml")
    same = {"mixture": lora.mixture, "output_dir": lora.output_dir}
    train = mixture.train.model_copy(update={"learning_rate": lora.train.learning_rate})
    assert mixture.model_copy(update={**same, "train": train}) == lora
    assert mixture.mixture != lora.mixture


def test_lora_has_the_rank_that_comes_nearest_to_the_mixtures_parameters(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    # the shapes of SmolLM2-135M, without its weights
    shapes = {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    }
    config = LlamaConfig(**shapes)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    size = {}
    for path in ("quickstart.yaml", "quickstart-lora.yaml"):
        run = run_of(path)
        model = run.model.model_copy(update={"name": str(tmp_path)})
        size[path] = dry_run(run.model_copy(update={"model": model})).trainable
    mixture, lora = size["quickstart.yaml"], size["quickstart-lora.yaml"]
    one_rank = lora / 42
    assert abs(lora - mixture) <= one_rank / 2
    assert abs(lora + one_rank - mixture) > one_rank / 2


def test_tuning_script_tries_every_rate_for_both(
    scripts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_chat_model(tmp_path / "model", num_hidden_layers=4, max_position_embeddings=512)
    tuning = script("tune_quickstart")
    for name, path in tuning.CONFIGS.items():
        # the small model has a token per byte
        text = (ROOT / path).read_text("utf-8").replace("max_length: 96", "max_length: 512")
        tuning.CONFIGS[name] = tmp_path / f"{name}.yaml"
        tuning.CONFIGS[name].write_text(text, encoding="utf-8")
    tuning.main(["1e-3", "2e-3", "--rows", "1", "--kept", "2", "--model", str(model)])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if "{" in line]
    tried = [(line["method"], line["learning_rate"]) for line in lines]
    assert tried == [("mixture", 1e-3), ("mixture", 2e-3), ("LoRA", 1e-3), ("LoRA", 2e-3)]
    assert all(0 <= line["accuracy"] <= 1 and line["loss"] > 0 for line in lines)
    sys.modules.pop("tune_quickstart")
