"""Regexes that come with an adapter, matched within a bounded length and time."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from molora.errors import ConfigError
from molora.io import peft_first_match

MAX_LENGTH = 512
"""Characters of a pattern."""
TIME_LIMIT = 10.0
"""Seconds for all patterns of one setting."""
MAX_HERE = 1000, 500_000
"""Plain patterns, and pairs of one and a name, that are matched in this process."""
PLAIN = re.compile(r"\^?[\w.-]*(?:\\\.[\w.-]*)*\$?", re.ASCII)
"""Patterns without repetition, choice or group: they cannot take long."""


def first_matches(
    patterns: Sequence[str], names: Sequence[str], *, whole: bool, where: str
) -> list[str | None]:
    """For each name the first pattern that matches it, or None, as `first_match` finds it.

    Patterns that repeat or choose are matched by a process of their own, which is ended after
    `TIME_LIMIT` seconds. `where` names the setting, for messages.

    Raises:
        ConfigError: a pattern that is too long, invalid, or takes too long.
    """
    for pattern in patterns:
        if len(pattern) > MAX_LENGTH:
            raise ConfigError(
                f"{where}: the pattern {pattern[:40]!a}… has {len(pattern)} characters, at most "
                f"{MAX_LENGTH} are matched. Write the names of the modules instead."
            )
    if not patterns or not names:
        return [None] * len(names)
    few = len(patterns) <= MAX_HERE[0] and len(patterns) * len(names) <= MAX_HERE[1]
    here = few and all(map(PLAIN.fullmatch, patterns))
    try:
        if here:
            found = peft_first_match.first_match(patterns, names, whole=whole)
        else:
            found = _matched_apart(patterns, names, whole)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}. Correct the pattern.") from None
    except subprocess.TimeoutExpired:
        raise ConfigError(
            f"{where}: matching takes more than {TIME_LIMIT:g} s, as regular expressions with "
            "repetitions inside repetitions can. Write the names of the modules instead."
        ) from None
    except OSError as error:
        raise ConfigError(
            f"{where}: regular expressions are matched by a process of their own, which could not "
            f"be started: {error}. Write the names of the modules instead."
        ) from None
    return [None if index is None else patterns[index] for index in found]


def _matched_apart(patterns: Sequence[str], names: Sequence[str], whole: bool) -> list[int | None]:
    asked = json.dumps({"patterns": list(patterns), "names": list(names), "whole": whole})
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(Path(peft_first_match.__file__))],
        input=asked.encode(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        timeout=TIME_LIMIT,
        check=False,
    )
    if done.returncode:
        raise ValueError("the patterns need more memory than they may have")
    answer: dict[str, list[int | None]] = json.loads(done.stdout)
    if "error" in answer:
        raise ValueError(answer["error"])
    return answer["found"]
