"""`molora doctor` finds what is wrong, and says nothing where nothing is."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import pytest

from molora.cli import doctor as doctor_module


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home directory."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    return tmp_path


def plant(cache: Path, *folders: str) -> Path:
    lock = cache.joinpath(*folders, "deepspeed_shm_comm", "lock")
    lock.parent.mkdir(parents=True)
    lock.touch()
    return lock


def wrong(outcome: Any) -> list[str]:
    return [line for line in outcome.out.splitlines() if line.startswith("WRONG")]


def pretend(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str | None]) -> None:
    """Other versions of some packages; None: not installed."""

    def installed(name: str) -> str:
        found = versions.get(name, version(name) if name not in versions else None)
        if found is None:
            raise PackageNotFoundError(name)
        return found

    monkeypatch.setattr("molora.cli.doctor.version", installed)


def test_a_sound_installation_is_exit_code_0(molora: Callable[..., Any]) -> None:
    outcome = molora("doctor")
    assert (outcome.code, wrong(outcome), outcome.err) == (0, [], "")
    assert outcome.out.endswith("Nothing is wrong.\n")
    named = {line.split()[1] for line in outcome.out.splitlines()[:-1]}
    assert {"python", "molora", "torch", "transformers", "trl", "matplotlib", "cpu"} <= named
    assert "pytest" not in named  # a tool of development is nobody's trouble


@pytest.mark.parametrize("place", ["home", "XDG_CACHE_HOME", "TORCH_EXTENSIONS_DIR"])
def test_a_stale_compile_lock_is_found(
    molora: Callable[..., Any], home: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    if place == "home":
        lock = plant(home / ".cache" / "torch_extensions", "py311_cpu")
    elif place == "XDG_CACHE_HOME":
        lock = plant(home / "caches" / "torch_extensions", "py311_cpu")
    else:
        lock = plant(home / "extensions")
    if place != "home":
        assert molora("doctor").code == 0
        monkeypatch.setenv(place, str(home / {"X": "caches", "T": "extensions"}[place[0]]))
    outcome = molora("doctor")
    assert outcome.code == 1
    assert [str(lock) in line and "delete it" in line for line in wrong(outcome)] == [True]
    lock.unlink()
    assert molora("doctor").code == 0


@pytest.mark.parametrize(
    ("versions", "message"),
    [
        ({"torch": "2.9.1"}, "torch .*2.9.1, but molora needs <3,>=2.10: .*run code"),
        ({"torch": "3.0.0"}, "torch .*3.0.0, but molora needs"),
        ({"transformers": "4.57.0"}, "transformers .*4.57.0, but molora needs <6,>=5.0"),
        ({"trl": "0.9"}, "trl .*0.9, but molora needs"),
        ({"einops": None}, r"einops .*not installed \(pip install molora\)"),
    ],
    ids=["torch too old", "torch too new", "transformers", "of an extra", "missing"],
)
def test_a_version_outside_the_window_is_wrong(
    molora: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    versions: dict[str, str | None],
    message: str,
) -> None:
    pretend(monkeypatch, versions)
    outcome = molora("doctor")
    assert outcome.code == 1
    (line,) = wrong(outcome)
    assert re.search(message, line)
    assert outcome.out.endswith("1 thing(s) wrong.\n")


def test_a_missing_optional_package_is_told_and_not_wrong(
    molora: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, {"trl": None, "matplotlib": None})
    outcome = molora("doctor")
    assert outcome.code == 0
    assert "not installed (pip install 'molora[train]')" in outcome.out
    assert "not installed (pip install 'molora[viz]')" in outcome.out


def test_molora_that_is_not_installed_is_wrong(
    molora: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, {"molora": None})
    outcome = molora("doctor")
    assert outcome.code == 1
    assert "run pip install" in wrong(outcome)[0]


@pytest.mark.parametrize(
    ("installed", "window", "good"),
    [
        ("2.10.0", "<3,>=2.10", True),
        ("2.10.0+cu128", "<3,>=2.10", True),
        ("2.10", ">=2.10.0", True),
        ("2.9.9", "<3,>=2.10", False),
        ("2.9", ">=2.10", False),
        ("3.0", "<3,>=2.10", False),
        ("3.0.0rc1", "<3", False),
        ("7", "", True),
    ],
)
def test_versions_are_compared_as_numbers(installed: str, window: str, good: bool) -> None:
    assert doctor_module._within(installed, window) is good


def test_every_declared_requirement_is_understood() -> None:
    declared = requires("molora") or []
    runtime = [line for line in declared if "extra" not in line or "dev" not in line]
    found = {finding.what for finding in doctor_module.versions()}
    assert len(found) == len(runtime) + 2  # python and molora itself
