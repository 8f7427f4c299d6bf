"""Base model and adapter together: found, checked, and nothing fetched unasked."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from chat_models import save_adapter, save_chat_model

from molora.errors import CheckpointError, ConfigError
from molora.generate import generate_texts, load_for_generation


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    return save_adapter(base.parent / "adapter", base)


def test_the_base_that_the_adapter_names_is_taken_where_it_is_a_directory(
    base: Path, adapter: Path
) -> None:
    loaded = load_for_generation(adapter)
    assert not loaded.model.training
    assert loaded.mixture.model is loaded.model
    text = generate_texts(loaded, ["Hi"], max_new_tokens=8)
    assert text == generate_texts(
        load_for_generation(adapter, model=str(base)), ["Hi"], max_new_tokens=8
    )
    with loaded.mixture.disabled():
        assert generate_texts(loaded, ["Hi"], max_new_tokens=8) != text


@pytest.mark.parametrize(
    ("dtype", "stored"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)]
)
def test_dtype_is_the_bases(adapter: Path, dtype: str, stored: torch.dtype) -> None:
    loaded = load_for_generation(adapter, dtype=dtype)
    assert loaded.model.dtype == stored
    assert {tensor.dtype for tensor in loaded.mixture.state_dict().values()} == {torch.float32}
    assert len(generate_texts(loaded, ["Hi", "Bye bye"], max_new_tokens=3)) == 2


def test_a_base_that_moved_is_asked_for_by_name_and_not_fetched(tmp_path: Path) -> None:
    base = save_chat_model(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base)
    base.rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match=rf"trained on '{base}'.*--model"):
        load_for_generation(adapter)
    loaded = load_for_generation(adapter, model=str(tmp_path / "moved"))
    assert generate_texts(loaded, ["Hi"], max_new_tokens=2)


def test_another_base_is_refused(adapter: Path, tmp_path: Path) -> None:
    other = save_chat_model(tmp_path / "other", seed=7)
    with pytest.raises(CheckpointError, match="other values"):
        load_for_generation(adapter, model=str(other))


def test_code_in_the_base_is_not_run(adapter: Path, base: Path, tmp_path: Path) -> None:
    copy = tmp_path / "with code"
    shutil.copytree(base, copy)
    ran = tmp_path / "ran"
    (copy / "modeling.py").write_text(f"open({str(ran)!r}, 'w')\n", encoding="utf-8")
    text = (copy / "config.json").read_text(encoding="utf-8")
    text = text.replace(
        '"model_type": "llama"',
        '"model_type": "odd", "auto_map": {"AutoConfig": "modeling.C", '
        '"AutoModelForCausalLM": "modeling.M"}',
    )
    (copy / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_for_generation(adapter, model=str(copy))
    assert not ran.exists()


@pytest.mark.parametrize(
    ("files", "message"),
    [({}, "cannot be loaded"), ({"config.json": "{"}, "cannot be loaded")],
    ids=["nothing there", "damaged"],
)
def test_what_is_no_model_is_refused(
    adapter: Path, tmp_path: Path, files: dict[str, str], message: str
) -> None:
    (tmp_path / "base").mkdir()
    for name, text in files.items():
        (tmp_path / "base" / name).write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        load_for_generation(adapter, model=str(tmp_path / "base"))


def test_what_is_no_adapter_is_refused(base: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no molora\.json"):
        load_for_generation(base)


def test_an_unknown_dtype_is_refused(adapter: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown dtype 'bf16'.*bfloat16"):
        load_for_generation(adapter, dtype="bf16")
