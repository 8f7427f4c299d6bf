"""molora keeps its structure: every rule holds for molora/, and every rule is seen to bite."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from architecture_rules import (
    HEAVY,
    MAX_FILE_LINES,
    MAX_FUNCTION_LINES,
    MAY_IMPORT,
    RULES,
    Source,
    heavy_imports_at_start,
    read_sources,
)

ROOT = Path(__file__).resolve().parents[1]

LONG_FUNCTION = "def long():\n" + "    x = 1\n" * MAX_FUNCTION_LINES
LONG_DOCSTRING = 'def short():\n    """\n' + "    words\n" * MAX_FUNCTION_LINES + '    """\n'

# (rule, file, its text, what the complaint must say)
BAD = [
    ("internal_imports", "losses/a.py", "import molora.attach", "losses may not import"),
    ("internal_imports", "routing/a.py", "from molora.experts.bank import B", "routing may not"),
    (
        "internal_imports",
        "experts/a.py",
        "from molora.routing.select import top_k",
        "molora.routing.select.",
    ),
    ("internal_imports", "modules/a.py", "from molora import config", "import molora.config"),
    ("internal_imports", "modules/a.py", "from ..config import X", "import molora.config"),
    (
        "internal_imports",
        "kernels/op/a.py",
        "def f():\n  from ...routing import y",
        "molora.routing",
    ),
    ("internal_imports", "attach/a.py", "from molora import Routing", "may not import molora."),
    (
        "internal_imports",
        "config/a.py",
        "from importlib import import_module\nimport_module('molora.io')",
        "config may not",
    ),
    ("internal_imports", "surprise/a.py", "", "'surprise' has no row"),
    ("third_party_imports", "config/a.py", "import torch.nn as nn", "imports no torch"),
    (
        "third_party_imports",
        "attach/a.py",
        "def f():\n  import deepspeed",
        "deepspeed may be imported only",
    ),
    ("third_party_imports", "modules/a.py", "from transformers import X", "only in attach, cli"),
    ("third_party_imports", "cli/a.py", "import matplotlib.pyplot", "only in report"),
    ("third_party_imports", "__init__.py", "import trl", "only in train"),
    ("file_names_and_sizes", "io/a.py", "x = 1\n" * (MAX_FILE_LINES + 1), "401 lines"),
    ("file_names_and_sizes", "io/utils.py", "", "name the file"),
    ("function_sizes", "io/a.py", LONG_FUNCTION, "long has 61 lines"),
    ("init_files_only_re_export", "io/__init__.py", "def load(): ...", "only re-exports"),
    ("init_files_only_re_export", "__init__.py", "_X = build()", "only re-exports"),
    ("init_files_only_re_export", "io/__init__.py", "import os\nfor x in y: pass", ":2:"),
    (
        "no_subclass_of_ours",
        "io/a.py",
        "class A: ...\nclass B(A): ...",
        "B subclasses molora.io.a.A",
    ),
    (
        "no_subclass_of_ours",
        "experts/a.py",
        "from .bank import Bank as B\nclass C(B[int]): ...",
        "molora.experts.bank.Bank",
    ),
    (
        "no_subclass_of_ours",
        "experts/a.py",
        "import molora.experts.bank\nclass C(molora.experts.bank.Bank): ...",
        "C subclasses",
    ),
    (
        "no_subclass_of_ours",
        "io/a.py",
        "from molora.config import Frozen\nclass A(Frozen): ...\nclass B(A): ...",
        "B subclasses molora.io.a.A",
    ),
    (
        "no_subclass_of_ours",
        "train/a.py",
        "class FooMixin: ...\nclass B(FooMixin): ...",
        "B subclasses",
    ),
    ("forbidden_text", "io/a.py", "x = torch.load(path)", "safetensors only"),
    ("forbidden_text", "io/a.py", "from torch import load", "safetensors only"),
    ("forbidden_text", "io/a.py", "import pickle", "runs code"),
    ("forbidden_text", "io/a.py", "x = torch.load(path, weights_only=True)", "safetensors only"),
    ("forbidden_text", "io/torch_file.py", "x = torch.load(path)", "safetensors only"),
    (
        "forbidden_text",
        "io/torch_file.py",
        "x = torch.load(path, weights_only=True, **more)",
        "safetensors only",
    ),
    ("forbidden_text", "io/a.py", "f(trust_remote_code = True)", "no code comes"),
    ("forbidden_text", "io/a.py", "options = {'trust_remote_code': True}", "no code comes"),
    ("forbidden_text", "cli/a.py", "run(x, shell=True)", "lists of arguments"),
    ("forbidden_text", "cli/a.py", "# TODO later", "finish it"),
    ("no_print", "routing/a.py", "print(1)", "print() outside"),
    ("no_print", "train/loop.py", "def f():\n  print(1)", "print() outside"),
    ("no_silent_except", "io/a.py", "try: f()\nexcept Exception: pass", "says nothing"),
    ("no_silent_except", "io/a.py", "try: f()\nexcept: pass", "says nothing"),
]

GOOD = [
    (
        "internal_imports",
        "experts/a.py",
        "from molora.routing.record import R\nfrom molora.errors import E\nfrom .b import c",
    ),
    (
        "internal_imports",
        "attach/a.py",
        "from molora import losses\nfrom molora.kernels.backend import x",
    ),
    ("internal_imports", "io/a.py", "from molora import __version__"),
    ("internal_imports", "__init__.py", "from molora.attach import attach"),
    ("internal_imports", "cli/a.py", "import torch\nfrom molora.train.sft import t"),
    ("third_party_imports", "train/a.py", "import trl, deepspeed, datasets, transformers, torch"),
    ("third_party_imports", "kernels/op/triton_mix.py", "import triton.language as tl"),
    ("file_names_and_sizes", "io/a.py", "x = 1\n" * MAX_FILE_LINES),
    ("function_sizes", "io/a.py", LONG_DOCSTRING),
    (
        "init_files_only_re_export",
        "__init__.py",
        '"""Doc."""\nfrom typing import TYPE_CHECKING\n'
        '__version__ = "1"\n_LAZY = {"a": ("b", "c")}\n'
        "if TYPE_CHECKING:\n  from molora.io import x\ndef __getattr__(name): ...",
    ),
    (
        "no_subclass_of_ours",
        "io/a.py",
        "import torch\nfrom molora.errors import E\n"
        "class A(torch.nn.Module): ...\nclass B(E, ValueError): ...",
    ),
    (
        "no_subclass_of_ours",
        "config/a.py",
        "from molora.config.base import Frozen\nclass A(Frozen): ...",
    ),
    (
        "no_subclass_of_ours",
        "train/a.py",
        "import trl\nfrom .mixin import MixtureMixin\nclass T(MixtureMixin, trl.SFTTrainer): ...",
    ),
    ("forbidden_text", "io/a.py", "safetensors.torch.load_file(p); f(trust_remote_code=False)"),
    ("forbidden_text", "io/torch_file.py", "x = torch.load(path, mmap=True, weights_only=True)"),
    ("forbidden_text", "compose/a.py", "read(path, allow_pickle=True)"),
    ("no_print", "cli/a.py", "print(1)"),
    ("no_print", "train/progress.py", "print(1)"),
    ("no_print", "io/a.py", "console.print(1); pprint(2)"),
    (
        "no_silent_except",
        "io/a.py",
        "try: f()\nexcept OSError: pass\ntry: f()\nexcept Exception as e: raise X from e",
    ),
]


def sources_of(tmp_path: Path, name: str, text: str) -> list[Source]:
    path = tmp_path / "molora" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return read_sources(tmp_path)


@pytest.fixture(scope="module")
def molora_sources() -> list[Source]:
    return read_sources(ROOT)


@pytest.mark.parametrize("rule", RULES)
def test_molora_keeps_the_rule(rule: str, molora_sources: list[Source]) -> None:
    assert {"", "errors", "config"} <= {source.package for source in molora_sources}
    breaches = RULES[rule](molora_sources)
    assert not breaches, "\n" + "\n".join(breaches)


@pytest.mark.parametrize(("rule", "name", "text", "complaint"), BAD)
def test_a_bad_source_breaks_the_rule(
    rule: str, name: str, text: str, complaint: str, tmp_path: Path
) -> None:
    breaches = RULES[rule](sources_of(tmp_path, name, text))
    assert len(breaches) == 1
    assert complaint in breaches[0]
    assert breaches[0].startswith(f"molora/{name}")


@pytest.mark.parametrize(("rule", "name", "text"), GOOD)
def test_a_good_source_keeps_the_rule(rule: str, name: str, text: str, tmp_path: Path) -> None:
    assert RULES[rule](sources_of(tmp_path, name, text)) == []


@pytest.mark.parametrize(("name", "breaches"), [("Routing", 0), ("top_k", 1)])
def test_a_re_exported_name_counts_as_an_import_of_its_home(
    name: str, breaches: int, tmp_path: Path
) -> None:
    init = "from molora.routing.record import Routing\nfrom .select import top_k"
    sources_of(tmp_path, "routing/__init__.py", init)
    sources = sources_of(tmp_path, "experts/a.py", f"from molora.routing import {name}")
    assert len(RULES["internal_imports"](sources)) == breaches


def test_every_rule_is_seen_to_bite() -> None:
    assert {case[0] for case in BAD} == set(RULES)


def test_permitted_imports_have_no_cycle() -> None:
    graph = {
        package: {name.split(".")[0] for name in permitted}
        for package, permitted in MAY_IMPORT.items()
    }
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError
    assert set(order) == set(MAY_IMPORT)


@pytest.mark.parametrize(
    ("text", "heavy"),
    [
        ("import trl", True),
        ("try:\n  import deepspeed.comm\nexcept ImportError: ...", True),
        ("class A:\n  from matplotlib import pyplot", True),
        ("def f():\n  import triton", False),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n  import trl", False),
        ("import torch", False),
    ],
)
def test_heavy_imports_are_found_where_they_run(text: str, heavy: bool, tmp_path: Path) -> None:
    assert bool(heavy_imports_at_start(sources_of(tmp_path, "train/a.py", text))) is heavy


def test_import_molora_executes_no_file_of_ours_that_imports_a_heavy_library(
    molora_sources: list[Source],
) -> None:
    # Asked of our files, not of sys.modules alone: transformers itself imports triton.
    code = "import json, sys, molora; print(json.dumps(sorted(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    out = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    loaded = set(json.loads(out.stdout))
    executed = [source for source in molora_sources if source.module in loaded]
    assert any(source.module == "molora" for source in executed)
    assert heavy_imports_at_start(executed) == []
    assert not loaded & (HEAVY - {"triton"})
