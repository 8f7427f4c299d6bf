"""Activated LoRA: experts that act from their tokens on."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from peft_adapters import save_adapter
from tiny_models import tiny
from torch import Tensor, nn

import molora
from molora.attach.invocation import acting_positions
from molora.errors import AttachError

CALL = (7, 8)
IDS = torch.tensor(
    [[5, 7, 8, 9, 7, 8, 11, 12], [5, 6, 9, 7, 10, 8, 11, 12], [7, 8, 9, 9, 9, 6, 5, 7]]
)


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("alora")
    save_adapter(root / "called", seed=1, alora_invocation_tokens=list(CALL), task_type="CAUSAL_LM")
    save_adapter(root / "plain", seed=2, r=4)
    return {"called": root / "called", "plain": root / "plain"}


def composed(directories: dict[str, Path], weights: dict[str, float]) -> nn.Module:
    model = tiny("llama").eval()
    experts = molora.load_experts({name: directories[name] for name in weights})
    molora.compose(model, experts, router={"kind": "fixed", "weights": weights})
    return model


def run(model: nn.Module, ids: Tensor = IDS, **arguments: object) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, **arguments).logits
    return found


def test_positions_from_the_last_call_on() -> None:
    acting = acting_positions(IDS, (CALL, None, (5,), (1,) * 9), None)
    assert acting.shape == (3, 8, 4)
    assert acting[:, :, 0].int().tolist() == [
        [0, 0, 0, 0, 1, 1, 1, 1],
        [0, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 1, 1, 1],
    ]
    assert acting[:, :, 1].all()
    assert acting[:, :, 2].int().argmax(dim=1).tolist() == [0, 0, 6]
    assert not acting[:, :, 3].any()


def test_one_called_expert_equals_package_peft(directories: dict[str, Path]) -> None:
    other = peft.PeftModel.from_pretrained(tiny("llama").eval(), directories["called"]).eval()
    model = composed(directories, {"called": 1.0})
    found, base = run(model), run(tiny("llama").eval())
    torch.testing.assert_close(found, run(other), atol=1e-5, rtol=1e-5)
    assert torch.equal(found[1], base[1])  # never called
    torch.testing.assert_close(found[0, :4], base[0, :4])
    assert (found[0, 4:] - base[0, 4:]).abs().max() > 1e-2
    assert (found[2] - base[2]).abs().max() > 1e-2


def test_an_expert_that_is_not_called_leaves_the_others(directories: dict[str, Path]) -> None:
    both = composed(directories, {"called": 1.0, "plain": 0.5})
    plain = composed(directories, {"plain": 0.5})
    torch.testing.assert_close(run(both)[1], run(plain)[1], atol=1e-5, rtol=1e-5)
    assert (run(both)[2] - run(plain)[2]).abs().max() > 1e-2


def test_a_called_expert_goes_on_acting_with_a_cache(directories: dict[str, Path]) -> None:
    model = composed(directories, {"called": 1.0, "plain": 0.5})
    whole = run(model, use_cache=False)
    with torch.no_grad():
        first = model(input_ids=IDS[:, :6], use_cache=True)
        parts, cache = [first.logits], first.past_key_values
        for t in (6, 7):
            output = model(input_ids=IDS[:, t : t + 1], past_key_values=cache)
            parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=1e-5)


def test_generation_equals_package_peft(directories: dict[str, Path]) -> None:
    other = peft.PeftModel.from_pretrained(tiny("llama").eval(), directories["called"]).eval()
    model = composed(directories, {"called": 1.0})
    options = {"max_new_tokens": 6, "do_sample": False}
    for row in IDS:
        expected = other.generate(input_ids=row[None], **options)
        assert torch.equal(model.generate(row[None], **options), expected)


def test_save_and_load_keep_the_tokens(directories: dict[str, Path], tmp_path: Path) -> None:
    model = tiny("llama").eval()
    mixture = molora.compose(model, molora.load_experts(directories), router="uniform")
    mixture.save(tmp_path / "saved")
    other = tiny("llama").eval()
    molora.load(other, tmp_path / "saved")
    assert torch.equal(run(other), run(model))


def test_embeddings_in_place_of_tokens_are_refused(directories: dict[str, Path]) -> None:
    model = composed(directories, {"called": 1.0})
    with pytest.raises(AttachError, match="must be called with input_ids"):
        model(inputs_embeds=torch.zeros(1, 3, model.config.hidden_size))
