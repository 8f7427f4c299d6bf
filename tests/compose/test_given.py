"""Gates that come with the batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft_adapters import save_adapter
from tiny_models import tiny
from torch import Tensor, nn

import molora
from molora.errors import AttachError

IDS = torch.randint(5, 50, (2, 7), generator=torch.Generator().manual_seed(0))
GATES = torch.tensor([[1.0, 0.0, 0.5], [0.0, -0.7, 0.3]])


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("given")
    for number, name in enumerate(("a", "b", "c")):
        save_adapter(root / name, seed=number + 1, r=2 + number)
    return {name: root / name for name in ("a", "b", "c")}


def composed(directories: dict[str, Path], **router: object) -> tuple[nn.Module, molora.Mixture]:
    model = tiny("llama").eval()
    experts = molora.load_experts(directories)
    return model, molora.compose(model, experts, router={"kind": "given", **router})


def fixed_logits(directories: dict[str, Path], weights_E: Tensor, ids: Tensor) -> Tensor:
    model = tiny("llama").eval()
    weights = dict(zip(directories, weights_E.tolist(), strict=True))
    experts = molora.load_experts(directories)
    molora.compose(model, experts, router={"kind": "fixed", "weights": weights})
    with torch.no_grad():
        found: Tensor = model(ids).logits
    return found


@pytest.mark.parametrize("top_k", [None, 2])
def test_each_row_has_its_own_gates(top_k: int | None, directories: dict[str, Path]) -> None:
    model, _ = composed(directories, top_k=top_k)
    with torch.no_grad():
        found = model(IDS, expert_gates=GATES.abs()).logits
    for row, weights_E in enumerate(GATES.abs()):
        expected = fixed_logits(directories, weights_E, IDS[row : row + 1])
        torch.testing.assert_close(found[row : row + 1], expected, atol=1e-5, rtol=1e-5)
        other = fixed_logits(directories, weights_E.flip(0), IDS[row : row + 1])
        assert (found[row : row + 1] - other).abs().max() > 1e-2


def test_negative_gates_act_as_they_are(directories: dict[str, Path]) -> None:
    model, _ = composed(directories)
    with torch.no_grad():
        found = model(IDS, expert_gates=GATES).logits
    expected = fixed_logits(directories, GATES[1], IDS[1:])
    torch.testing.assert_close(found[1:], expected, atol=1e-5, rtol=1e-5)


def test_gates_by_position_and_in_a_context(directories: dict[str, Path]) -> None:
    model, mixture = composed(directories)
    by_position = GATES[:, None].expand(-1, 7, -1)
    with torch.no_grad():
        expected = model(IDS, expert_gates=GATES).logits
        with mixture.context(expert_gates=by_position):
            assert torch.equal(model(IDS).logits, expected)
        changed = by_position.clone()
        changed[:, 3:] = 0
        later = model(IDS, expert_gates=changed).logits
    torch.testing.assert_close(later[:, :3], expected[:, :3])
    assert (later[:, 3:] - expected[:, 3:]).abs().max() > 1e-2


@pytest.mark.parametrize("beams", [1, 2])
def test_generation_goes_on_with_the_gates(beams: int, directories: dict[str, Path]) -> None:
    model, mixture = composed(directories)
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams}
    with mixture.context(expert_gates=GATES):
        found = model.generate(IDS, **options)
        alone = model.generate(IDS, use_cache=False, **options)
    assert torch.equal(found, alone)
    with mixture.context(expert_gates=GATES[1:]):
        second = model.generate(IDS[1:], **options)
    assert torch.equal(found[1, : second.shape[1]], second[0])


def test_the_record_holds_the_gates(directories: dict[str, Path]) -> None:
    model, mixture = composed(directories)
    with mixture.record() as records, torch.no_grad():
        model(IDS, expert_gates=GATES)
    assert records.keys() == {"model"}
    assert torch.equal(records["model"].dense_gates(), GATES.repeat_interleave(7, dim=0))


@pytest.mark.parametrize(
    "gates",
    [torch.ones(2, 2), torch.ones(3), torch.ones(2, 6, 3), torch.ones(3, 3), torch.ones(0, 3)],
    ids=["experts", "one-dimensional", "positions", "rows", "none"],
)
def test_gates_that_do_not_fit_are_refused(gates: Tensor, directories: dict[str, Path]) -> None:
    model, _ = composed(directories)
    with pytest.raises(AttachError, match=r"expert_gates has shape"):
        model(IDS, expert_gates=gates)
    with torch.no_grad():  # and nothing of it stays
        assert model(IDS, expert_gates=GATES).logits.isfinite().all()


def test_without_gates_the_way_to_give_them_is_told(directories: dict[str, Path]) -> None:
    model, mixture = composed(directories)
    with pytest.raises(AttachError, match=r"gates come with the batch. Pass model\(..., expert_"):
        model(IDS)
    with mixture.disabled(), torch.no_grad():
        assert torch.equal(model(IDS).logits, tiny("llama").eval()(IDS).logits)
