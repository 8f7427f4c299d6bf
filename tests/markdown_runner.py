"""Run a Markdown page as its reader would: its python blocks, and its commands, from top to bottom.

A page is text that nobody compiles; what it shows is either run here or refused.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping
from configparser import ConfigParser
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RUN = {"bash", "python"}
ONLY_SHOWN = {"bibtex", "json", "text", "yaml"}
# Commands of make are looked up, not run: their work is tested elsewhere, or is this very test.
MAKE_TARGET = re.compile(r"^([a-z]+):.*## ", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the line of its first line of content, and the content."""

    language: str
    line: int
    text: str


def blocks_of(markdown: str) -> list[Block]:
    """The fenced blocks in order.

    Raises:
        ValueError: for a block that is never closed, or of a language that is neither run nor
            known as shown only: `sh` in place of `bash` would go untested.
    """
    blocks, lines = [], markdown.splitlines()
    number = 0
    while number < len(lines):
        opening = re.match(r"(\s*)(`{3,}|~{3,})(.*)$", lines[number])
        number += 1
        if not opening:
            continue
        indent, fence, language = opening.group(1), opening.group(2), opening.group(3).strip()
        if language not in RUN | ONLY_SHOWN:
            known = ", ".join(sorted(RUN | ONLY_SHOWN))
            raise ValueError(f"line {number}: block of language {language!r}. Use one of: {known}.")
        start = number
        while number < len(lines) and not lines[number].strip().startswith(fence):
            number += 1
        if number == len(lines):
            raise ValueError(f"line {start}: this block is never closed.")
        text = "\n".join(line.removeprefix(indent) for line in lines[start:number])
        blocks.append(Block(language, start + 1, text))
        number += 1
    return blocks


def run_page(
    markdown: str,
    *,
    root: Path,
    molora: Callable[[list[str]], int],
    stand_ins: Mapping[str, str],
) -> list[str]:
    """Run every python block (one namespace for the page) and check or run every command.

    Args:
        markdown: the page.
        root: the repository, for what `make` and `pip` commands name.
        molora: takes the arguments of a `molora …` line and returns its exit code.
        stand_ins: what the page names → what is used in its place (a small model for a large one).

    Returns:
        What was run, in order: `python:<line>` or the command.

    Raises:
        AssertionError: naming the line, for a command that fails or that the reader cannot run.
        Exception: whatever a python block raises; the traceback names the line of the page.
    """
    namespace: dict[str, Any] = {"__name__": "__main__"}
    done = []
    for block in blocks_of(markdown):
        text = block.text
        for shown, used in stand_ins.items():
            text = text.replace(shown, used)
        if block.language == "python":
            # The empty lines in front make a traceback point at the page's own line.
            exec(compile("\n" * (block.line - 1) + text, "<page>", "exec"), namespace)
            done.append(f"python:{block.line}")
        elif block.language == "bash":
            for words in commands_of(text):
                run_command(words, block.line, root=root, molora=molora)
                done.append(shlex.join(words))
    return done


def commands_of(text: str) -> list[list[str]]:
    """The commands of a bash block as words: comments dropped, continued lines joined."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def run_command(
    words: list[str], line: int, *, root: Path, molora: Callable[[list[str]], int]
) -> None:
    """Run a `molora` command; check that a `make` or `pip install` command can be run."""
    where = f"block at line {line}: {shlex.join(words)}"
    operators = {"|", "||", "&&", ";", ">", ">>", "<", "&"}
    assert not operators & set(words), f"{where}: one plain command a line"
    match words:
        case ["molora", *arguments]:
            code = molora(arguments)
            assert code == 0, f"{where}: exit code {code}"
        case ["make", target, *settings]:
            known = MAKE_TARGET.findall((root / "Makefile").read_text(encoding="utf-8"))
            assert target in known, f"{where}: targets are {', '.join(known)}"
            for setting in settings:
                assert re.fullmatch(r"(ARGS|FAST|PYTHON3|VENV)=.*", setting), f"{where}: {setting}"
        case ["pip", "install", *arguments]:
            _check_pip(arguments, where, root)
        case _:
            raise AssertionError(f"{where}: only make, pip install and molora are run by a test")


def _check_pip(arguments: list[str], where: str, root: Path) -> None:
    config = ConfigParser()
    config.read(root / "setup.cfg", encoding="utf-8")
    extras = set(config["options.extras_require"])
    words = iter(arguments)
    for word in words:
        if word in {"-c", "--constraint"}:
            assert (root / next(words)).is_file(), f"{where}: no such file"
        elif word not in {"-e", "--editable"}:
            found = re.fullmatch(r"(?:\.|molora)(?:\[([a-z,]+)\])?", word)
            assert found, f"{where}: {word} is not molora"
            unknown = set((found[1] or "").split(",")) - extras - {""}
            assert not unknown, f"{where}: no extra {', '.join(unknown)}"
