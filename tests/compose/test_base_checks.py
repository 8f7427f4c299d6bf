"""Other bases and updates out of proportion are named; what fits is not."""

from __future__ import annotations

from pathlib import Path

import pytest
from peft_adapters import edit_config, save_adapter
from tiny_models import tiny

import molora
from molora.compose.base_checks import other_bases, relative_norms
from molora.compose.experts import FrozenExperts

COMMITS = "a" * 40, "b" * 40


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate("abc"):
        save_adapter(path / name, seed=seed, target_modules=["q_proj", "down_proj"])
    save_adapter(path / "d", seed=4, target_modules=["v_proj"])
    return path


def _experts(root: Path, names: str = "ab", **settings: object) -> FrozenExperts:
    for name in "abcd":
        edit_config(root / name, base_model_name_or_path=None, revision=None, lora_alpha=5)
    edit_config(root / names[0], **settings)
    return molora.load_experts({name: root / name for name in names})


@pytest.mark.parametrize(
    ("stated", "name", "differs"),
    [
        ("org/base", "org/base", False),
        ("Org/Base", "org/base", False),
        ("org/base", "other/base", True),
        ("org/base", "org/base-2", True),
        ("/models/base/", "org/base", False),
        ("org/base", "./base", False),
        ("C:\\models\\base", "org/base", False),
        ("/models/base", "/elsewhere/base", False),
        ("/models/base", "/models/base-2", True),
        ("base", "org/base", False),
        (None, "org/base", False),
        ("org/base", None, False),
        ("", "org/base", False),
    ],
)
def test_another_base_is_named(
    root: Path, stated: str | None, name: str | None, differs: bool
) -> None:
    notes = other_bases(_experts(root, base_model_name_or_path=stated), name=name)
    assert len(notes) == differs
    if differs:
        assert notes[0].startswith(f"a: trained on {stated!r}, but the base is {name!r}")


@pytest.mark.parametrize(
    ("stated", "revision", "differs"),
    [
        (COMMITS[0], COMMITS[1], True),
        (COMMITS[0], COMMITS[0], False),
        ("v1", "v2", True),
        ("main", COMMITS[0], False),  # which commit it was cannot be known
        (None, "v1", False),
        ("v1", None, False),
    ],
)
def test_another_revision_is_named(
    root: Path, stated: str | None, revision: str | None, differs: bool
) -> None:
    experts = _experts(root, base_model_name_or_path="org/base", revision=stated)
    notes = other_bases(experts, name="org/base", revision=revision)
    assert len(notes) == differs
    if differs:
        assert f"a: trained on revision {stated!r} of 'org/base'" in notes[0]


def test_experts_of_one_other_base_share_a_line(root: Path) -> None:
    experts = _experts(root, "abc")
    for name in "ab":
        edit_config(root / name, base_model_name_or_path="\x1b[2J/x")
    experts = molora.load_experts({name: root / name for name in "abc"})
    (note,) = other_bases(experts, name="org/base")
    assert note.startswith("a, b: trained on ")
    assert note.isprintable()


def _norms(family: str = "llama") -> dict[str, float]:
    model = tiny(family)
    return {
        name: float(module.weight.norm())
        for name, module in model.named_modules()
        if getattr(module, "weight", None) is not None
    }


def test_ratios_are_those_of_the_dense_update(root: Path) -> None:
    experts, model = _experts(root), tiny("llama")
    found = relative_norms(experts, _norms())
    assert set(found.ratios) == {"a", "b"}
    for name, adapter in experts.adapters.items():
        assert set(found.ratios[name]) == set(adapter.modules)
        for path, module in adapter.modules.items():
            update = (module.scaling * module.lora_B @ module.lora_A).double()
            weight = model.get_submodule(path).weight.double()
            assert found.ratios[name][path] == pytest.approx(float(update.norm() / weight.norm()))


def test_updates_that_stand_out_are_named(root: Path) -> None:
    norms = {path: 20 * norm for path, norm in _norms().items()}
    assert not relative_norms(_experts(root), norms).notes
    (note,) = relative_norms(_experts(root, lora_alpha=80), norms).notes
    assert note.startswith("a: relative to the base its updates are ")
    large, apart = relative_norms(_experts(root, lora_alpha=800), norms).notes
    assert large.startswith("a: the update is up to ")
    assert "at model.layers" in large
    assert apart.startswith("a: relative to")
    # of other modules than the rest, so that no module has two norms
    assert relative_norms(_experts(root, "dbc", lora_alpha=80), norms).notes[0].startswith("d: ")
    assert not relative_norms(_experts(root, "a"), norms).notes


def test_weights_of_zero_and_updates_of_zero_have_ratios(root: Path) -> None:
    experts = _experts(root, "a")
    zero = relative_norms(experts, dict.fromkeys(experts.modules, 0.0))
    assert set(zero.ratios["a"].values()) == {float("inf")}
    assert "up to inf times" in zero.notes[0]
    silent = relative_norms(_experts(root, "a", lora_alpha=0), dict.fromkeys(experts.modules, 0.0))
    assert set(silent.ratios["a"].values()) == {0.0}
    assert not silent.notes


def test_norms_that_are_none_are_refused(root: Path) -> None:
    experts = _experts(root)
    with pytest.raises(molora.ConfigError, match=r"base_norms lack model.*, which a adapts"):
        relative_norms(experts, {})
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(molora.ConfigError, match="are no norms"):
            relative_norms(experts, dict.fromkeys(experts.modules, wrong))
