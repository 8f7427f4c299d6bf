"""Short ways to write a value, told to the JSON schema."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema


@dataclass(frozen=True)
class AlsoAs:
    """Annotation: the schema accepts these forms too; a `BeforeValidator` makes them the value.

    Without it an editor that checks a file against the schema marks `rank: 8` as a mistake.
    """

    schemas: tuple[dict[str, Any], ...]

    def __get_pydantic_json_schema__(
        self, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return {"anyOf": [*self.schemas, handler(core_schema)]}
