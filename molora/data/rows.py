"""What one row of training data may hold, and the check of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from molora.config.data import DataSource
from molora.errors import DataError

_FORMS = "`messages`, `prompt` with `completion`, or `text`"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One checked row; ``messages``, or ``prompt`` and ``completion``, or ``text`` is set.

    Of a preference, ``messages`` or ``prompt`` is set, and holds all up to the two answers.
    """

    where: str
    """``train.jsonl, line 7``: what an error about this row says."""
    messages: list[dict[str, Any]] | None = None
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    chosen: dict[str, Any] | None = None
    """The message that is preferred to ``rejected``."""
    rejected: dict[str, Any] | None = None
    task: str | None = None
    task_types: int | None = None
    cluster_ids: int | None = None
    expert_labels: int | None = None
    label: str | None = None
    """The right one of ``choices``."""
    choices: tuple[str, ...] | None = None
    """Completions whose likelihoods a scorer compares."""


Body = Callable[[Mapping[str, Any], str], dict[str, Any]]
"""(columns, where) → the fields of :class:`Row` that are trained on, checked."""


def to_learn(present: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Answers and texts to learn, in one of three forms: the body of supervised rows."""
    columns = ", ".join(present) or "none"
    refuse_tools(present, where)
    forms = [name for name in ("messages", "prompt", "text") if name in present]
    if {"chosen", "rejected"} <= present.keys() and "completion" not in present:
        raise DataError(
            f"{where}: `chosen` and `rejected` are for preference training. Set train.objective: "
            f"dpo, or give {_FORMS}."
        )
    if len(forms) != 1:
        raise DataError(f"{where}: a row needs one of {_FORMS}; its columns: {columns}.")
    if forms == ["messages"]:
        return {"messages": checked_messages(present["messages"], where)}
    if forms == ["text"]:
        return {"text": checked_text(present, "text", where)}
    if "completion" not in present:
        raise DataError(f"{where}: `prompt` needs a `completion`; the row's columns: {columns}.")
    return {name: checked_text(present, name, where) for name in ("prompt", "completion")}


def check_row(fields: Any, where: str, source: DataSource, body: Body = to_learn) -> Row:
    """The row that ``fields`` holds; what the source says about task, type and cluster goes first.

    Raises:
        DataError: naming ``where``, the rule and the value, for a row that is not of exactly one
            form, an empty, missing or wrongly typed column, and a label that is none of the
            choices.
    """
    if not isinstance(fields, Mapping):
        raise DataError(f"{where}: a row is an object with named columns, not {shown(fields)}.")
    # None is absent: parquet cannot leave a column out of single rows, and fills nested ones
    present = _renamed(_without_none(fields), where, source)
    label, choices = _scoring(present, where)
    return Row(
        where=where,
        task=_task(present, where, source),
        task_types=_number(present, "task_types", source.task_types, where),
        cluster_ids=_number(present, "cluster_ids", source.cluster_ids, where),
        expert_labels=_number(present, "expert_labels", source.expert_labels, where),
        label=label,
        choices=choices,
        **body(present, where),
    )


def _renamed(present: Mapping[str, Any], where: str, source: DataSource) -> Mapping[str, Any]:
    """The columns by our names, where the source says what it calls them."""
    if source.columns is None:
        return present
    named = {ours: theirs for ours, theirs in source.columns if theirs is not None}
    for ours, theirs in named.items():
        if theirs not in present:
            raise DataError(
                f"{where}: `columns` says that `{ours}` is called {theirs!r}, but the row's "
                f"columns are: {', '.join(present) or 'none'}."
            )
    return {ours: present[theirs] for ours, theirs in named.items()}


def refuse_tools(present: Mapping[str, Any], where: str) -> None:
    """Raise DataError for a row with tools."""
    if "tools" in present:
        raise DataError(
            f"{where}: `tools` are not rendered, and without them the row would teach calls to "
            "functions that nobody described. Put them into a system message instead."
        )


def checked_text(present: Mapping[str, Any], name: str, where: str) -> str:
    """A column that holds a text that is not blank."""
    value = present[name]
    if not isinstance(value, str):
        raise DataError(f"{where}: `{name}` must be a string, not {shown(value)}.")
    if not value.strip():
        raise DataError(f"{where}: `{name}` is empty. Remove the row, or fill it.")
    return value


def checked_messages(value: Any, where: str) -> list[dict[str, Any]]:
    """A conversation in which somebody speaks before the assistant does."""
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: `messages` must be a list of messages, not {shown(value)}.")
    for number, message in enumerate(value, 1):
        here = f"{where}: message {number}"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise DataError(f"{here} needs `role` and `content`, but is {shown(message)}.")
        content = message.get("content")
        if not isinstance(content, str):
            raise DataError(f"{here}: `content` must be a string, not {shown(content)}.")
        if message["role"] == "assistant" and not content.strip():
            raise DataError(f"{here}: the assistant's `content` is empty. Remove the message.")
    if not any(message["role"] == "assistant" for message in value):
        roles = ", ".join(message["role"] for message in value)
        raise DataError(
            f"{where}: nothing to learn, for no message has the role `assistant` (roles: {roles})."
        )
    if value[0]["role"] == "assistant":
        raise DataError(f"{where}: message 1 is the assistant's; put a user's or system's first.")
    return [dict(message) for message in value]


def _task(present: Mapping[str, Any], where: str, source: DataSource) -> str | None:
    task = source.task if source.task is not None else present.get("task")
    if task is not None and (not isinstance(task, str) or not task):
        raise DataError(f"{where}: `task` must be a name, not {shown(task)}.")
    return task


def _number(present: Mapping[str, Any], name: str, of_source: int | None, where: str) -> int | None:
    value = of_source if of_source is not None else present.get(name)
    # bool is an int in Python, and True would silently become task type 1
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
        raise DataError(f"{where}: `{name}` must be a whole number from 0 on, not {shown(value)}.")
    return value


def _scoring(present: Mapping[str, Any], where: str) -> tuple[str | None, tuple[str, ...] | None]:
    label, choices = present.get("label"), present.get("choices")
    if choices is None:
        # a column `label` alone is nobody's business: many files carry one for other uses
        return None, None
    if not isinstance(choices, list) or not all(isinstance(c, str) and c for c in choices):
        raise DataError(
            f"{where}: `choices` must be a list of non-empty strings, not {shown(choices)}."
        )
    if len(set(choices)) != len(choices) or len(choices) < 2:
        raise DataError(f"{where}: `choices` must be two or more different strings: {choices}.")
    if label not in choices:
        raise DataError(f"{where}: `label` must be one of {choices}, not {shown(label)}.")
    return label, tuple(choices)


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_none(item) for item in value]
    return value


def shown(value: Any) -> str:
    """A value as a message shows it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
