"""``molora doctor``."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version

import typer

_REASONS = {"torch": "earlier releases can be made to run code from a weights file"}


@dataclass(frozen=True)
class Finding:
    """One line of the report; `fault` counts as something wrong."""

    what: str
    detail: str
    fault: bool = False


def doctor() -> None:
    """Look for what is wrong with this installation.

    The exit code is 1 if something is. Looks at the versions of the libraries, at the devices, and
    for locks that a killed DeepSpeed compilation left behind: they make every later run wait for
    ever.

    \b
    Example:
      molora doctor
    """
    findings = [*versions(), *compile_locks(), *devices()]
    width = max(len(finding.what) for finding in findings)
    for finding in findings:
        mark = "WRONG" if finding.fault else "ok   "
        typer.echo(f"{mark} {finding.what:<{width}}  {finding.detail}")
    faults = sum(finding.fault for finding in findings)
    typer.echo(f"{faults} thing(s) wrong." if faults else "Nothing is wrong.")
    if faults:
        raise typer.Exit(1)


def versions() -> Iterator[Finding]:
    """Python, molora, and every package that it declares, against the declared window."""
    yield Finding("python", platform.python_version())
    try:
        yield Finding("molora", version("molora"))
    except PackageNotFoundError:
        yield Finding("molora", "not installed: run pip install -e . in its folder.", fault=True)
        return
    for name, window, extra in declared():
        if extra != "dev":
            yield _package(name, window, extra)


def declared() -> Iterator[tuple[str, str, str | None]]:
    """Name, version window and extra of every package that molora declares."""
    for requirement in requires("molora") or []:
        found = re.fullmatch(r"([\w.-]+)([^;]*)(?:;\s*extra\s*==\s*['\"](\w+)['\"])?", requirement)
        if found:
            yield found[1], found[2].strip(), found[3]


def _package(name: str, window: str, extra: str | None) -> Finding:
    try:
        installed = version(name)
    except PackageNotFoundError:
        where = "molora" if extra is None else f"'molora[{extra}]'"
        return Finding(name, f"not installed (pip install {where})", fault=extra is None)
    if _within(installed, window):
        return Finding(name, installed)
    reason = f": {_REASONS[name]}" if name in _REASONS else ""
    return Finding(name, f"{installed}, but molora needs {window}{reason}.", fault=True)


def _within(installed: str, window: str) -> bool:
    """Whether a version fits bounds such as ``<3,>=2.10``; what is no number is not compared."""
    for operator, bound in re.findall(r"(>=|<)\s*([\d.]+)", window):
        if (_release(installed) >= _release(bound)) is (operator == "<"):
            return False
    return True


def _release(text: str) -> tuple[int, ...]:
    """The numbers of a version, without trailing zeros."""
    found = re.match(r"\d+(?:\.\d+)*", text)
    numbers = [int(part) for part in found[0].split(".")] if found else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def compile_locks() -> Iterator[Finding]:
    """Locks that a killed DeepSpeed compilation left behind."""
    from molora.train import compile_lock

    locks = compile_lock.compile_locks()
    for lock in locks:
        yield Finding(
            "compile lock",
            f"{lock} makes every DeepSpeed run wait. If none is compiling right now, it is left "
            "from a killed one: delete it.",
            fault=True,
        )
    if not locks:
        yield Finding("compile locks", "none")


def devices() -> Iterator[Finding]:
    """Processor cores, threads and accelerators."""
    import torch

    cores = os.cpu_count() or 1
    waiting = os.environ.get("OMP_WAIT_POLICY", "not set; PASSIVE is faster on a shared machine")
    detail = f"{cores} cores, {torch.get_num_threads()} threads, OMP_WAIT_POLICY {waiting}"
    yield Finding("cpu", detail)
    if not torch.cuda.is_available():
        yield Finding("gpu", "none that torch can use")
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        yield Finding(f"gpu {number}", f"{properties.name}, {properties.total_memory >> 20} MiB")
