"""Which regex of a list is the first to match a name, here or as a program of its own.

Run as a program it reads {"patterns", "names", "whole"} from its input and writes {"found"} or
{"error"}; whoever started it may end it when it takes too long, which `re` itself cannot. So this
file imports the standard library only.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence

MAX_MEMORY = 2**30
"""Bytes of the program's address space, where the system can hold to it."""


def first_match(patterns: Sequence[str], names: Sequence[str], *, whole: bool) -> list[int | None]:
    """For each name the index of the first pattern that matches it, or None.

    `whole`: the pattern matches the whole name, as `target_modules` does. Otherwise the name or its
    end after a dot, as in `rank_pattern` (peft 0.21.2, `get_pattern_key`). A pattern is compiled
    only when the ones before it did not match.

    Raises:
        ValueError: an invalid pattern.
    """
    compiled: dict[int, re.Pattern[str]] = {}
    found: list[int | None] = []
    for name in names:
        found.append(None)
        for index, pattern in enumerate(patterns):
            if index not in compiled:
                compiled[index] = _compiled(pattern, whole)
            regex = compiled[index]
            if regex.fullmatch(name) if whole else regex.match(name):
                found[-1] = index
                break
    return found


def _compiled(pattern: str, whole: bool) -> re.Pattern[str]:
    try:
        return re.compile(pattern if whole else rf"(.*\.)?({pattern})$")
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{pattern[:80]!a} is no regular expression: {error}") from None


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # not on every system; the time is limited everywhere
        return
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))


def _main() -> None:
    asked = json.load(sys.stdin)
    _limit_memory()
    try:
        found = first_match(asked["patterns"], asked["names"], whole=asked["whole"])
        answer: dict[str, object] = {"found": found}
    except ValueError as error:
        answer = {"error": str(error)}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    _main()
