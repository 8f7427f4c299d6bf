"""The rules of molora's structure. Each rule reads sources and returns one line per breach.

`test_architecture.py` runs every rule over molora/ and, to see it bite, over small bad sources.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# Which packages of molora a package may import: `routing.record` is that module alone.
# Itself and `errors` everyone may. Packages that come later have their row already.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "errors": (),
    "version": (),
    "dtypes": (),
    "config": (),
    "presets": ("config",),
    "kernels": (),
    # A router that compares few of many experts goes by their products.
    "routing": ("dtypes", "kernels.plan", "kernels.grouped_product"),
    "experts": ("dtypes", "kernels", "routing.record"),
    # What a load or an importance is has one definition, shared with what is logged.
    "losses": ("routing.record", "routing.statistics"),
    "modules": ("routing", "experts", "kernels"),
    "io": ("config", "version"),
    "attach": (
        *("config", "io", "losses", "routing", "experts", "modules", "version"),
        "kernels.backend",
    ),
    "compose": (
        *("attach", "config", "io", "losses", "presets", "routing", "experts", "modules"),
        "kernels",
    ),
    "data": ("config",),
    "generate": ("attach", "config", "data", "io"),
    "report": ("config", "io", "routing"),
    "train": (
        *("attach", "compose", "config", "data", "generate", "presets"),
        *("io", "losses", "routing", "experts", "modules", "kernels"),
    ),
    "cli": (
        *("attach", "compose", "config", "data", "generate", "presets", "report", "train"),
        *("io", "losses", "routing", "experts", "modules", "kernels"),
    ),
    "__main__": ("cli",),
}

# Libraries that only these packages may import, and packages that a library must stay out of.
ONLY_IN: dict[str, set[str]] = {
    "accelerate": {"train"},
    "datasets": {"data", "train"},
    "deepspeed": {"train"},
    "matplotlib": {"report"},
    "transformers": {"attach", "data", "generate", "compose", "train", "cli"},
    "triton": {"kernels"},
    "trl": {"train"},
}
NOT_IN: dict[str, set[str]] = {"torch": {"errors", "config", "presets"}}

# What no file that `import molora` executes may import while it is executed.
HEAVY = {"deepspeed", "trl", "triton", "matplotlib"}

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
FORBIDDEN_FILES = {"utils.py", "util.py", "common.py", "helpers.py", "misc.py"}
FORBIDDEN_TEXT = {
    r"\btorch\.load\(|from torch import .*\bload\b": "weights are read from safetensors only",
    # the name of the argument by which a caller asks for such a file aside
    r"(?<!\ballow_)pickle": "loading a pickled object runs code",
    r"trust_remote_code['\"]?\s*[=:]\s*True": "no code comes with a model or a data set",
    r"shell['\"]?\s*[=:]\s*True": "programs get lists of arguments",
    r"\b(TODO|FIXME|XXX)\b": "finish it, or file an issue",
}
# The one line that reads what torch saved, where a caller asks for it: of tensors alone.
PERMITTED_TEXT = {
    "molora/io/torch_file.py": r"\btorch\.load\([^()]*\bweights_only=True\)$",
}
MAY_PRINT = {"cli", "report", "train.progress"}


@dataclass(frozen=True)
class Source:
    """One parsed file: `path` from the root, `module` dotted, `package` below molora ('': top)."""

    path: str
    module: str
    package: str
    text: str
    tree: ast.Module


@dataclass(frozen=True)
class Import:
    """One imported module (dotted), its line, and whether importing the file runs the import."""

    module: str
    name: str | None
    line: int
    at_import: bool


def read_sources(root: Path) -> list[Source]:
    """Every Python file of ``root/molora``, parsed."""
    sources = []
    for path in sorted((root / "molora").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        package = parts[1] if parts[1] != "__init__" else ""
        text = path.read_text(encoding="utf-8")
        relative = path.relative_to(root).as_posix()
        sources.append(Source(relative, module, package, text, ast.parse(text, relative)))
    return sources


def imports_of(source: Source) -> list[Import]:
    """All imports at any depth, relative ones resolved, `import_module("name")` included."""
    found = []
    for node, at_import in _walk(source.tree, at_import=True):
        if isinstance(node, ast.Import):
            found += [Import(alias.name, None, node.lineno, at_import) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = _absolute(source, node)
            found += [Import(module, alias.name, node.lineno, at_import) for alias in node.names]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called, argument = ast.unparse(node.func), node.args[0].value
            if called.split(".")[-1] in {"import_module", "__import__"}:
                found.append(Import(str(argument), None, node.lineno, at_import))
    return found


def _walk(node: ast.AST, at_import: bool) -> Iterator[tuple[ast.AST, bool]]:
    for child in ast.iter_child_nodes(node):
        yield child, at_import
        deferred = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for_types = isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")
        yield from _walk(child, at_import and not deferred and not for_types)


def _absolute(source: Source, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    is_package = source.path.endswith("/__init__.py")
    parts = source.module.split(".")
    parts = parts[: len(parts) - node.level + is_package]
    return ".".join([*parts, node.module] if node.module else parts)


def internal_imports(sources: Sequence[Source]) -> list[str]:
    """Packages import only what MAY_IMPORT permits."""
    homes = _homes(sources)
    breaches = []
    for source in sources:
        if source.package == "":
            continue  # the top level re-exports from everywhere
        if source.package not in MAY_IMPORT:
            breaches.append(
                f"{source.path}: package {source.package!r} has no row in MAY_IMPORT. Add one."
            )
            continue
        permitted = ("errors", source.package, *MAY_IMPORT[source.package])
        for found in imports_of(source):
            target = homes.get(f"{found.module}.{found.name}", found.module)
            if target.split(".")[0] != "molora" or target == source.module:
                continue
            if target == "molora" and found.name == "__version__":
                continue
            if not any(f"{target}.".startswith(f"molora.{name}.") for name in permitted):
                breaches.append(
                    f"{source.path}:{found.line}: {source.package} may not import {target}. "
                    f"Permitted: {', '.join(permitted)}."
                )
    return breaches


def _homes(sources: Sequence[Source]) -> dict[str, str]:
    """What `package.name` stands for: a module, or the one from which `__init__.py` re-exports."""
    modules = {source.module for source in sources} | {f"molora.{name}" for name in MAY_IMPORT}
    homes = {
        f"{source.module}.{found.name}": found.module
        for source in sources
        if source.path.endswith("/__init__.py") and source.package
        for found in imports_of(source)
        if found.name
    }
    return homes | {module: module for module in modules}


def third_party_imports(sources: Sequence[Source]) -> list[str]:
    """Heavy libraries stay in the packages that exist for them."""
    breaches = []
    for source in sources:
        for found in imports_of(source):
            library = found.module.split(".")[0]
            where = f"{source.path}:{found.line}"
            if source.package not in ONLY_IN.get(library, {source.package}):
                places = ", ".join(sorted(ONLY_IN[library]))
                breaches.append(f"{where}: {library} may be imported only in {places}.")
            if source.package in NOT_IN.get(library, set()):
                breaches.append(f"{where}: {source.package} is pure data and imports no {library}.")
    return breaches


def heavy_imports_at_start(sources: Sequence[Source]) -> list[str]:
    """Of these files, which import a heavy library when they are imported."""
    return [
        f"{source.path}:{found.line}: imports {found.module} at import time."
        for source in sources
        for found in imports_of(source)
        if found.at_import and found.module.split(".")[0] in HEAVY
    ]


def file_names_and_sizes(sources: Sequence[Source]) -> list[str]:
    """Small files that are named for what they hold."""
    breaches = []
    for source in sources:
        lines = source.text.count("\n")
        if lines > MAX_FILE_LINES:
            breaches.append(f"{source.path}: {lines} lines; at most {MAX_FILE_LINES}. Split it.")
        if Path(source.path).name in FORBIDDEN_FILES:
            breaches.append(f"{source.path}: name the file for what it holds.")
    return breaches


def function_sizes(sources: Sequence[Source]) -> list[str]:
    """A function fits on a screen, its docstring not counted."""
    breaches = []
    for source in sources:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                doc = ast.get_docstring(node, clean=False)
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                lines -= doc.count("\n") + 1 if doc else 0
                if lines > MAX_FUNCTION_LINES:
                    breaches.append(
                        f"{source.path}:{node.lineno}: {node.name} has {lines} lines; "
                        f"at most {MAX_FUNCTION_LINES}."
                    )
    return breaches


def init_files_only_re_export(sources: Sequence[Source]) -> list[str]:
    """`__init__.py` holds a docstring, imports, literals and at most a lazy `__getattr__`."""
    return [
        f"{source.path}:{node.lineno}: __init__.py only re-exports; move this to a module."
        for source in sources
        if source.path.endswith("/__init__.py")
        for node in source.tree.body
        if not _belongs_in_init(node)
    ]


def _belongs_in_init(node: ast.stmt) -> bool:
    if isinstance(node, ast.Import | ast.ImportFrom):
        return True
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant)
    if isinstance(node, ast.FunctionDef):
        return node.name in {"__getattr__", "__dir__"}
    if isinstance(node, ast.If):
        is_for_types = ast.unparse(node.test).endswith("TYPE_CHECKING")
        return is_for_types and not node.orelse and all(map(_belongs_in_init, node.body))
    if isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        named = all(isinstance(t, ast.Name) and t.id.startswith("_") for t in targets)
        return named and _is_literal(node.value)
    return False


def _is_literal(node: ast.expr | None) -> bool:
    plain = ast.Constant | ast.Dict | ast.List | ast.Tuple | ast.Set | ast.Starred | ast.Load
    return node is not None and all(isinstance(part, plain) for part in ast.walk(node))


def no_subclass_of_ours(sources: Sequence[Source]) -> list[str]:
    """Among our own classes nothing subclasses: errors, `Frozen` and the Trainer mixin aside."""
    breaches = []
    for source in sources:
        names = {
            node.name: f"{source.module}.{node.name}"
            for node in ast.walk(source.tree)
            if isinstance(node, ast.ClassDef)
        }
        names |= _imported_names(source)
        for node in ast.walk(source.tree):
            if isinstance(node, ast.ClassDef):
                bases = [_resolved(base, names) for base in node.bases]
                breaches += [
                    f"{source.path}:{node.lineno}: {node.name} subclasses {base}. Compose instead."
                    for base in bases
                    if base.startswith("molora.") and not _may_be_base(base, source, bases)
                ]
    return breaches


def _imported_names(source: Source) -> dict[str, str]:
    names: dict[str, str] = {}
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ImportFrom):
            module = _absolute(source, node)
            names |= {alias.asname or alias.name: f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
    return names


def _resolved(base: ast.expr, names: dict[str, str]) -> str:
    if isinstance(base, ast.Subscript):
        return _resolved(base.value, names)
    first, _, rest = ast.unparse(base).partition(".")
    return ".".join(filter(None, [names.get(first, first), rest]))


def _may_be_base(base: str, source: Source, bases: list[str]) -> bool:
    if base.startswith("molora.errors.") or re.fullmatch(r"molora\.config(\.base)?\.Frozen", base):
        return True
    beside_a_library_class = any(not other.startswith("molora.") for other in bases)
    return source.package == "train" and base.endswith("Mixin") and beside_a_library_class


def forbidden_text(sources: Sequence[Source]) -> list[str]:
    """Words that stand for a way to run foreign code, or for unfinished work."""
    return [
        f"{source.path}:{number}: {line.strip()[:60]!r}: {reason}."
        for source in sources
        for number, line in enumerate(source.text.splitlines(), 1)
        for pattern, reason in FORBIDDEN_TEXT.items()
        if re.search(pattern, _without_permitted(source, line))
    ]


def _without_permitted(source: Source, line: str) -> str:
    permitted = PERMITTED_TEXT.get(source.path)
    return re.sub(permitted, "", line) if permitted else line


def no_print(sources: Sequence[Source]) -> list[str]:
    """Only the command line, reports and the progress display write to the terminal."""
    return [
        f"{source.path}:{node.lineno}: print() outside {', '.join(sorted(MAY_PRINT))}."
        for source in sources
        if not {source.package, source.module.removeprefix("molora.")} & MAY_PRINT
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print"
    ]


def no_silent_except(sources: Sequence[Source]) -> list[str]:
    """Nothing catches everything and says nothing."""
    return [
        f"{source.path}:{node.lineno}: catches everything and says nothing."
        for source in sources
        for node in ast.walk(source.tree)
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or ast.unparse(node.type) in {"Exception", "BaseException"})
        and all(isinstance(statement, ast.Pass) for statement in node.body)
    ]


RULES: dict[str, Callable[[Sequence[Source]], list[str]]] = {
    rule.__name__: rule
    for rule in (
        internal_imports,
        third_party_imports,
        file_names_and_sizes,
        function_sizes,
        init_files_only_re_export,
        no_subclass_of_ours,
        forbidden_text,
        no_print,
        no_silent_except,
    )
}
