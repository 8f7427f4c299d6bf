"""Routers that start from prompts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from chat_models import chat_model, chat_tokenizer
from peft_adapters import save_adapter
from torch import Tensor, nn

import molora
from molora.compose.prompts import condition, prompt_vectors, settings_prompts
from molora.errors import ConfigError
from molora.io.formats.mergekit import read_mergekit_prompts

PROMPTS = {
    "math": (["what is two plus two", "add the numbers"], []),
    "code": (["write a function"], ["tell me a story"]),
}
FILE = """
base_model: some/base
gate_mode: hidden
experts:
  - source_model: base+math
    positive_prompts: ["what is two plus two", "add the numbers"]
  - source_model: base+code
    positive_prompts: ["write a function"]
    negative_prompts: ["tell me a story"]
"""


@pytest.fixture(scope="module")
def model() -> nn.Module:
    made: nn.Module = chat_model().eval()
    return made


def layer_inputs(model: nn.Module, text: str) -> list[Tensor]:
    """What each decoder layer reads, (S, hidden), seen by hooks."""
    seen: list[Tensor] = []
    handles = [
        layer.register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(**chat_tokenizer()(text, return_tensors="pt"))
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("mode", ["hidden", "hidden_avg"])
def test_vectors_are_means_of_what_layers_read(mode: str, model: nn.Module) -> None:
    found = prompt_vectors(model, chat_tokenizer(), PROMPTS, mode=mode)
    for name, (positive, negative) in PROMPTS.items():
        for number, layer in enumerate(found[name]):
            assert layer == f"model.layers.{number}"

            def mean(texts: list[str], number: int = number) -> Tensor:
                states = [layer_inputs(model, text)[number] for text in texts]
                return torch.stack([s[-1] if mode == "hidden" else s.mean(0) for s in states]).mean(
                    0
                )

            expected = mean(positive) - (mean(negative) if negative else 0)
            expected = expected / expected.norm()
            torch.testing.assert_close(found[name][layer], expected, atol=1e-6, rtol=1e-5)
            assert (found[name][layer] + expected).norm() > 1


def test_cheap_embeddings_are_the_same_for_all_layers(model: nn.Module) -> None:
    found = prompt_vectors(model, chat_tokenizer(), PROMPTS, mode="cheap_embed")
    first, second = found["math"].values()
    assert torch.equal(first, second)
    assert not torch.equal(first, next(iter(found["code"].values())))


def test_a_router_of_layers_starts_from_them(model: nn.Module, tmp_path: Path) -> None:
    vectors = prompt_vectors(model, chat_tokenizer(), PROMPTS)
    for number, name in enumerate(PROMPTS):
        save_adapter(tmp_path / name, seed=number)
    experts = molora.load_experts({name: tmp_path / name for name in PROMPTS})
    router = {"kind": "linear", "scope": "layer", "vectors": vectors}
    base = chat_model().eval()
    mixture = molora.compose(base, experts, router=router)
    with mixture.record() as records, torch.no_grad():
        base(**chat_tokenizer()("write a function", return_tensors="pt"))
    first = records["model.layers.0"]
    expected = (
        layer_inputs(model, "write a function")[0]
        @ torch.stack([vectors[name]["model.layers.0"] for name in PROMPTS]).T
    )
    torch.testing.assert_close(first.logits, expected, atol=1e-5, rtol=1e-5)
    assert first.expert_index[-1, 0] == 1
    mixture.detach()
    with pytest.raises(ConfigError, match=r"has none for expert 'code' at model\.layers\.0"):
        molora.compose(base, experts, router={**router, "vectors": {"math": vectors["math"]}})


def test_the_file_of_mergekit_gives_the_prompts(tmp_path: Path) -> None:
    (tmp_path / "moe.yaml").write_text(FILE)
    settings = read_mergekit_prompts(tmp_path / "moe.yaml")
    found = settings_prompts(settings, ["math", "code"])
    assert {name: tuple(map(list, pair)) for name, pair in found.items()} == {
        name: tuple(pair) for name, pair in PROMPTS.items()
    }
    with pytest.raises(ConfigError, match="prompts for 2 experts, and there are 3"):
        settings_prompts(settings, ["a", "b", "c"])


def test_alike_rows_are_seen(model: nn.Module) -> None:
    apart = prompt_vectors(model, chat_tokenizer(), PROMPTS)
    alike = {"a": apart["math"], "b": {k: v + 1e-3 for k, v in apart["math"].items()}}
    assert max(condition(apart).values()) < 100 < min(condition(alike).values())


def test_empty_prompts_are_refused(model: nn.Module) -> None:
    for wrong in ([], ["  "]):
        with pytest.raises(ConfigError, match="prompts of 'a': give positive ones"):
            prompt_vectors(model, chat_tokenizer(), {"a": (wrong, [])})
