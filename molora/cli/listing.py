"""``molora methods`` and ``molora schema``."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from typing import Any

import typer


def methods() -> None:
    """List the presets and the routers, with their papers.

    \b
    Example:
      molora methods
    """
    from molora.presets import methods as presets
    from molora.presets.frozen import ROUTERS

    routers = {name: _summary(recipe) for name, recipe in ROUTERS.items()}
    _print_table("Presets, for `molora train`:", presets())
    typer.echo()
    _print_table("Routers over experts that others trained, for `molora compose`:", routers)


def _print_table(heading: str, table: Mapping[str, str]) -> None:
    typer.echo(heading)
    width = max(map(len, table))
    for name, what in table.items():
        typer.echo(f"  {name:<{width}}  {what}")


def _summary(recipe: Any) -> str:
    """The first paragraph of its docstring, on one line."""
    return " ".join((recipe.__doc__ or "").strip().partition("\n\n")[0].split())


def schema() -> None:
    """Print the JSON schema of a run's YAML file.

    Editors check and complete files with it.

    \b
    Example:
      molora schema > molora.schema.json
    """
    typer.echo(json.dumps(run_schema(), indent=2, ensure_ascii=False))


def run_schema() -> dict[str, Any]:
    """The schema of `RunConfig`, in which the mixture may also be a preset with its arguments, or a
    saved one."""
    from pydantic.json_schema import models_json_schema

    from molora.config.run import RunConfig
    from molora.presets import PRESETS

    run = RunConfig.model_json_schema()
    models = [_arguments_of(name, preset) for name, preset in PRESETS.items()]
    references, definitions = models_json_schema([(model, "validation") for model in models])
    mixture = run["properties"]["mixture"]
    spelt_out = {key: value for key, value in mixture.items() if key == "$ref"}
    run["properties"]["mixture"] = {
        "anyOf": [
            spelt_out,
            *(references[model, "validation"] for model in models),
            _saved(run["$defs"]["MixtureConfig"]["properties"]),
        ],
        "description": mixture["description"],
    }
    run["$defs"] = {**run["$defs"], **definitions["$defs"]}
    return run


def _saved(fields: dict[str, Any]) -> dict[str, Any]:
    """Of ``{from: DIR, …}``."""
    from molora.config.saved import FROM, REPLACED

    place = {"type": "string", "format": "path", "description": "Directory of a saved mixture."}
    return {
        "type": "object",
        "title": "saved mixture",
        "additionalProperties": False,
        "properties": {FROM: place, **{name: fields[name] for name in REPLACED}},
        "required": [FROM],
    }


def _arguments_of(name: str, preset: Any) -> Any:
    """A pydantic model of ``{preset: name, …}``.

    Its fields are the preset's arguments, and the settings that every mixture has.
    """
    from typing import Literal, get_type_hints

    from pydantic import ConfigDict, create_model

    from molora.config import MixtureConfig

    hints = get_type_hints(preset, include_extras=True)
    fields: dict[str, Any] = {"preset": (Literal[name], ...)}
    for setting, field in MixtureConfig.model_fields.items():
        if setting not in ("method", "groups"):
            fields[setting] = (field.annotation, field)
    for parameter in inspect.signature(preset).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY:
            fields[parameter.name] = (hints[parameter.name], parameter.default)
    return create_model(
        f"preset_{name}",
        __config__=ConfigDict(extra="forbid"),
        __doc__=(preset.__doc__ or "").strip().partition("\n")[0],
        **fields,
    )
