"""X-LoRA: gates from what was read are those of package peft, and a classifier is whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from peft_adapters import CONFIG, TENSORS, edit_config, save_adapter
from safetensors.torch import load_file, save_file
from tiny_models import tiny
from torch import Tensor, nn

from molora.errors import CheckpointError, ConfigError
from molora.io.formats import XLora, read_xlora
from molora.io.peft_adapter import read_adapter

WIDTH, NUM_MODULES = 32, 4
KINDS: dict[str, dict[str, Any]] = {
    "depth 1": {"xlora_depth": 1},
    "depth 2": {"xlora_depth": 2, "softmax_temperature": 0.3},
    "depth 3 without dropout": {"xlora_depth": 3, "xlora_dropout_p": 0.0},
    "layerwise": {"xlora_depth": 3, "layerwise_scalings": True},
    "no softmax": {"xlora_depth": 1, "enable_softmax": False, "layerwise_scalings": True},
}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate("abc"):
        save_adapter(root / name, seed=seed, task_type="CAUSAL_LM")
    return root


def _trained(adapters: Path, **settings: Any) -> nn.Module:
    """Package peft's, with a classifier of random values."""
    base = tiny("llama")
    base.config.use_cache = False
    paths = {name: str(path) for name, path in _given(adapters).items()}
    config = peft.XLoraConfig(
        task_type="CAUSAL_LM", hidden_size=WIDTH, xlora_size=16, adapters=paths, **settings
    )
    model = peft.get_peft_model(base, config).eval()
    for parameter in model.base_model.internal_xlora_classifier.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


def _save(model: nn.Module, directory: Path) -> None:
    """As package peft, and then what it leaves out of the classifier."""
    model.save_pretrained(directory)
    state = model.base_model.internal_xlora_classifier.state_dict()
    prefix = "base_model.internal_xlora_classifier."
    whole = {f"{prefix}{name}": tensor.contiguous() for name, tensor in state.items()}
    save_file(whole, directory / TENSORS, metadata={"format": "pt"})


def _given(adapters: Path) -> dict[str, Path]:
    return {str(number): adapters / place for number, place in enumerate("abc")}


def _gates(mixture: XLora, h_BSD: Tensor) -> Tensor:
    """(B, S, L, E) from what was read; the dropout is off."""
    settings = mixture.settings
    for number, layer in enumerate(mixture.layers):
        assert layer is not None
        h_BSD = h_BSD.relu() if number and settings.enable_relu_and_dropout else h_BSD
        h_BSD = nn.functional.linear(h_BSD, layer.weight, layer.bias)
    logits = h_BSD.unflatten(-1, (mixture.num_modules or 1, len(mixture.adapters)))
    logits = logits.expand(-1, -1, NUM_MODULES, -1)
    return (
        (logits / settings.softmax_temperature).softmax(-1) if settings.enable_softmax else logits
    )


@pytest.mark.parametrize("kind", KINDS)
def test_gates_are_those_of_peft(tmp_path: Path, adapters: Path, kind: str) -> None:
    model = _trained(adapters, **KINDS[kind])
    _save(model, tmp_path)
    mixture = read_xlora(tmp_path, adapters=_given(adapters))
    assert len(mixture.layers) == KINDS[kind]["xlora_depth"]
    assert mixture.num_modules == (4 if KINDS[kind].get("layerwise_scalings") else None)
    assert not mixture.notes
    h_BSD = torch.randn(2, 5, WIDTH)
    classifier = model.base_model.internal_xlora_classifier
    with torch.no_grad():
        expected = classifier(SimpleNamespace(hidden_states=[h_BSD]), input_ids=h_BSD[..., 0])
    torch.testing.assert_close(_gates(mixture, h_BSD), expected)
    assert expected.std() > 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_what_peft_leaves_out_is_missed(tmp_path: Path, adapters: Path, kind: str) -> None:
    _trained(adapters, **KINDS[kind]).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"lacks .*layers.0.weight.* of the classifier"):
        read_xlora(tmp_path, adapters=_given(adapters))
    mixture = read_xlora(tmp_path, adapters=_given(adapters), allow_reinit=True)
    assert mixture.layers[0] is None
    assert "drawn anew" in mixture.notes[0]


@pytest.mark.parametrize("number", [3, 12])
def test_columns_are_in_the_order_of_training(tmp_path: Path, number: int) -> None:
    """As text 10 comes before 2, and so package peft loads what it saved in another order."""
    for seed in range(number):
        save_adapter(tmp_path / f"a{seed}", seed=seed, target_modules=["q_proj"])
    base = tiny("llama")
    base.config.use_cache = False
    places = {str(n): str(tmp_path / f"a{n}") for n in range(number)}
    config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=WIDTH, adapters=places)
    model = peft.get_peft_model(base, config)
    _save(model, tmp_path / "x")
    stored = json.loads((tmp_path / "x" / CONFIG).read_text())["adapters"]
    assert (list(stored) == list(places)) == (number == 3)
    mixture = read_xlora(tmp_path / "x", adapters=places)
    assert list(mixture.adapters) == list(places)
    name = "model.layers.0.self_attn.q_proj"
    layer = next(
        m for n, m in model.named_modules() if n.endswith(name) and isinstance(m, LoraLayer)
    )
    columns = [layer.lora_A[active].weight for active in layer.active_adapters]
    for path, expected in zip(mixture.adapters.values(), columns, strict=True):
        assert torch.equal(read_adapter(path).modules[name].lora_A, expected)


def test_other_names_are_in_the_order_of_the_file(tmp_path: Path, adapters: Path) -> None:
    _save(_trained(adapters), tmp_path)
    edit_config(tmp_path, adapters={"law": "a", "code": "b", "math": "c"})
    places = {name: adapters / name[0] for name in ("code", "law", "math")}
    mixture = read_xlora(tmp_path, adapters={**places, "law": adapters / "a"})
    assert list(mixture.adapters) == ["law", "code", "math"]
    assert "compare their order" in mixture.notes[0]


def test_adapters_are_found_inside_the_directory_only(tmp_path: Path, adapters: Path) -> None:
    _save(_trained(adapters), tmp_path / "x")
    with pytest.raises(CheckpointError, match=r"has no adapter '0': .* nothing outside"):
        read_xlora(tmp_path / "x")  # what peft writes beside it holds no factors
    shutil.rmtree(tmp_path / "x" / "0")
    shutil.copytree(adapters / "a", tmp_path / "x" / "0")
    for place in "bc":
        shutil.copytree(adapters / place, tmp_path / "x" / "experts" / place)
    edit_config(
        tmp_path / "x", adapters={"0": "0", "1": "experts/b", "2": "./experts/../experts/c"}
    )
    found = read_xlora(tmp_path / "x").adapters
    assert [path.name for path in found.values()] == ["0", "b", "c"]


@pytest.mark.parametrize(
    "place", ["../a", "/etc", "experts/../../a", "", ".", "link", "a\0b", "a" * 5000, "~/a"]
)
def test_a_path_of_the_settings_does_not_lead_out(
    tmp_path: Path, adapters: Path, place: str
) -> None:
    _save(_trained(adapters), tmp_path / "x")
    for name in "012":
        shutil.rmtree(tmp_path / "x" / name)
    shutil.copytree(adapters / "a", tmp_path / "a")
    (tmp_path / "x" / "link").symlink_to(tmp_path / "a")
    edit_config(tmp_path / "x", adapters={"0": place, "1": place, "2": place})
    with pytest.raises((CheckpointError, ConfigError)):
        read_xlora(tmp_path / "x")


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "type": ({"peft_type": "LORA"}, "peft_type is not XLORA"),
    "no adapters": ({"adapters": {}}, "adapters are no 1 to"),
    "adapters": ({"adapters": 3}, "adapters are no 1 to"),
    "names": ({"adapters": {"0": 3, "1": "b", "2": "c"}}, "adapters: name"),
    "others": ({"adapters": {"0": "a", "1": "b"}}, "adapters and those that were given differ: 2"),
    "depth": ({"xlora_depth": 0}, "xlora_depth"),
    "deep": ({"xlora_depth": 65}, "xlora_depth"),
    "text": ({"hidden_size": "32"}, "hidden_size"),
    "temperature": ({"softmax_temperature": 0.0}, "softmax_temperature"),
    "top": ({"top_k_lora": 4}, "top_k_lora is larger than the 3"),
    "top 0": ({"top_k_lora": 0}, "top_k_lora"),
    "dropout": ({"xlora_dropout_p": 2}, "xlora_dropout_p"),
    "new": ({"use_new": True}, "'use_new' is unknown to this version"),
    "width": ({"hidden_size": 31}, r"ask for \(16, 31\)"),
    "size": ({"xlora_size": 17}, r"ask for \(17, 32\)"),
    "deeper": ({"xlora_depth": 3}, "layers.6.weight"),
    "shallower": ({"xlora_depth": 1}, "which no classifier of these settings has"),
    "without dropout": ({"xlora_dropout_p": 0}, "which no classifier of these settings has"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_settings_that_are_none_or_of_another_are_refused(
    tmp_path: Path, adapters: Path, kind: str
) -> None:
    changes, message = CHANGES[kind]
    _save(_trained(adapters, xlora_depth=2), tmp_path)
    assert read_xlora(tmp_path, adapters=_given(adapters)).layers
    edit_config(tmp_path, **changes)
    with pytest.raises((ConfigError, CheckpointError), match=message):
        read_xlora(tmp_path, adapters=_given(adapters))


EDITS: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "NaN": (lambda t: next(iter(t.values())).fill_(float("nan")), "NaN or infinity"),
    "type": (lambda t: t.update({n: x.double() for n, x in t.items()}), "float64"),
    "more": (lambda t: t.update({"base_model.other": torch.ones(1)}), "base_model.other, which no"),
    "bias": (
        lambda t: t.update({n: x[:-1] for n, x in t.items() if x.dim() == 1}),
        "with a bias of as many rows",
    ),
    "gates": (
        lambda t: t.update({n: x[:-1] for n, x in t.items() if "layers.3" in n}),
        "11 outputs, which are not gates of 3 adapters",
    ),
}


@pytest.mark.parametrize("kind", EDITS)
def test_a_classifier_that_is_none_is_refused(tmp_path: Path, adapters: Path, kind: str) -> None:
    edit, message = EDITS[kind]
    _save(_trained(adapters, xlora_depth=2, layerwise_scalings=True), tmp_path)
    tensors = {name: tensor.clone() for name, tensor in load_file(tmp_path / TENSORS).items()}
    edit(tensors)
    (tmp_path / TENSORS).unlink()
    save_file({n: x.contiguous() for n, x in tensors.items()}, tmp_path / TENSORS)
    with pytest.raises(CheckpointError, match=message):
        read_xlora(tmp_path, adapters=_given(adapters))


class _Theirs(nn.Module):
    """The names of layers in the authors' package."""

    def __init__(self, depth: int, outputs: int, *, relu: bool, bias: bool) -> None:
        super().__init__()
        self.inner = nn.ModuleList()
        for number in range(depth - 1):
            self.inner.append(nn.Linear(WIDTH if number == 0 else 16, 16, bias=bias))
            if relu:
                self.inner.extend([nn.ReLU(), nn.Dropout(0.2)])
        self.last = nn.Linear(WIDTH if depth == 1 else 16, outputs, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.inner:
            x = layer(x)
        logits: Tensor = self.last(x)
        return logits


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_the_authors_checkpoints_are_read(
    tmp_path: Path, adapters: Path, depth: int, relu: bool, bias: bool
) -> None:
    classifier = _Theirs(depth, 3 * NUM_MODULES, relu=relu, bias=bias).eval()
    save_file(classifier.state_dict(), tmp_path / "xlora_classifier.safetensors")
    config = {
        "hidden_size": WIDTH,
        "base_model_id": "x",
        "adapters": ["math", "code", "law"],
        "layerwise_scalings": True,
        "xlora_depth": depth,
        "xlora_size": 16,
        "enable_relu_and_dropout": relu,
        "use_bias": bias,
        "top_k_lora": 2,
        "enable_softmax": True,
        "enable_softmax_topk": True,
        "xlora_dropout_p": 0.0,
    }
    (tmp_path / "xlora_config.json").write_text(json.dumps(config))
    places = {"law": adapters / "c", "code": adapters / "b", "math": adapters / "a"}
    mixture = read_xlora(tmp_path, adapters=places)
    assert list(mixture.adapters) == ["math", "code", "law"]
    assert mixture.adapters["code"] == adapters / "b"
    assert (mixture.num_modules, mixture.settings.top_k_lora) == (NUM_MODULES, 2)
    assert len(mixture.notes) == 2
    h_BSD = torch.randn(2, 5, WIDTH)
    with torch.no_grad():
        expected = classifier(h_BSD).unflatten(-1, (NUM_MODULES, 3)).softmax(-1)
    torch.testing.assert_close(_gates(mixture, h_BSD), expected)
    for name in ("math", "code", "law"):
        shutil.copytree(adapters / "a", tmp_path / name)
    inside = read_xlora(tmp_path).adapters
    assert [path.parent.resolve() for path in inside.values()] == [tmp_path.resolve()] * 3


def test_links_and_missing_files_are_refused(tmp_path: Path, adapters: Path) -> None:
    with pytest.raises(CheckpointError, match=f"has no {CONFIG}"):
        read_xlora(tmp_path)
    _save(_trained(adapters), tmp_path / "x")
    (tmp_path / "x" / TENSORS).rename(tmp_path / TENSORS)
    (tmp_path / "x" / TENSORS).symlink_to(tmp_path / TENSORS)
    with pytest.raises(CheckpointError, match="is a link and could lead anywhere"):
        read_xlora(tmp_path / "x", adapters=_given(adapters))
