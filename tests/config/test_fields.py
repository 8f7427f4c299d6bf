"""Every setting is documented, and read by code that acts on it: a flag that is accepted and never
read is worse than none."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from collections.abc import Iterable
from pathlib import Path

from pydantic import Field

import molora
from molora import config
from molora.config import Frozen

PACKAGE = Path(molora.__file__).parent


def config_models() -> list[type[Frozen]]:
    for module in pkgutil.iter_modules(config.__path__, "molora.config."):
        importlib.import_module(module.name)
    return sorted(
        (m for m in Frozen.__subclasses__() if m.__module__.startswith("molora.config.")),
        key=lambda model: model.__name__,
    )


def names_read(source: str) -> set[str]:
    """Attributes that are read, by a dot or by the keyword of a match pattern."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            names.add(node.attr)
        elif isinstance(node, ast.MatchClass):
            names.update(node.kwd_attrs)
    return names


def acting_sources() -> Iterable[str]:
    """All of molora but its configuration, and `resolve`, through which counts are read."""
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if path.parent.name != "config":
            yield text
        elif path.name == "allocation.py":
            functions = (n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef))
            yield "\n".join(ast.unparse(f) for f in functions if f.name == "resolve")


def unread(models: Iterable[type[Frozen]], sources: Iterable[str]) -> list[str]:
    read = set().union(*map(names_read, sources))
    return [f"{m.__name__}.{name}" for m in models for name in m.model_fields if name not in read]


def undocumented(models: Iterable[type[Frozen]]) -> list[str]:
    return [
        f"{m.__name__}.{name}"
        for m in models
        for name, field in m.model_fields.items()
        if name != "kind" and not field.description  # the tag's meaning is its class's docstring
    ] + [m.__name__ for m in models if not (m.__doc__ or "").strip()]


def test_every_field_has_a_docstring():
    models = config_models()
    assert len(models) > 25
    assert undocumented(models) == []


def test_every_field_is_read_outside_of_the_configuration():
    assert unread(config_models(), acting_sources()) == []


class Careless(Frozen):
    """A model with one good field and two that nobody would miss."""

    coefficient: float = Field(default=1.0, description="read by attach/losses.py")
    momentum_of_nothing: float = Field(default=0.9, description="read by nobody")
    rank: int = 8


def test_an_unread_and_an_undocumented_field_would_be_found():
    assert unread([Careless], acting_sources()) == ["Careless.momentum_of_nothing"]
    assert undocumented([Careless]) == ["Careless.rank"]
    assert names_read("match a:\n case C(one=x): a.two = b.three") == {"one", "three"}
