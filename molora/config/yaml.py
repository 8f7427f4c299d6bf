"""YAML as people mean it: `1e-4` is a float, `no` a word, duplicate keys are errors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from molora.errors import ConfigError

MAX_BYTES = 1_000_000


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's numbers and booleans, and without tags and aliases."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        # aliases of aliases expand exponentially, tags make objects, and no configuration needs
        # them
        if isinstance(event, yaml.events.AliasEvent):
            raise _unsupported("aliases (*name) are not supported", event)
        if getattr(event, "tag", None) is not None:
            raise _unsupported("tags (!name) are not supported", event)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise _unsupported("a key must be a word, not a list or a mapping", key_node)
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise _unsupported(f"key {key!r} stands twice", key_node)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def _unsupported(problem: str, where: Any) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, problem, where.start_mark)


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in resolvers
        if not tag.endswith((":int", ":float", ":bool", ":timestamp"))
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(  # not 010, which YAML 1.1 reads as 8, nor 1:30, which it reads as 90
    "tag:yaml.org,2002:int",
    re.compile(r"^[-+]?(0|[1-9]\d*)$|^0x[0-9a-fA-F]+$"),
    list("-+0123456789"),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(\d+\.\d*|\.\d+|\d+)([eE][-+]?\d+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: no such file, too large, not YAML, or not a mapping.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{path} has more than {MAX_BYTES} bytes, which is no configuration.")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from None
    return parse_yaml(text, source=str(path))


def parse_yaml(text: str, *, source: str = "text") -> dict[str, Any]:
    """The mapping in a YAML text; see `read_yaml`."""
    try:
        data = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{source} is not valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{source} must hold a mapping of settings, not {type(data).__name__}.")
    return data
