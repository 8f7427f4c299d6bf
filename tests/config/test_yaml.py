"""YAML as people mean it, and nothing that runs code or explodes."""

from __future__ import annotations

import math

import pytest
import yaml

from molora.config.yaml import MAX_BYTES, parse_yaml, read_yaml
from molora.errors import ConfigError


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("1e-4", 1e-4),
        ("1E4", 1e4),
        ("2.5e+3", 2500.0),
        ("-.5", -0.5),
        ("5.", 5.0),
        ("3", 3),
        ("-3", -3),
        ("0x1F", 31),
        ("010", 10),
        ("true", True),
        ("False", False),
        ("no", "no"),
        ("on", "on"),
        ("y", "y"),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("2024-01-01", "2024-01-01"),
        ("1.2.3", "1.2.3"),
        ("12e", "12e"),
        ("'7'", "7"),
        ('"true"', "true"),
        ("~", None),
        ("null", None),
        ("q_proj", "q_proj"),
        (r"re:.*\.q_proj", r"re:.*\.q_proj"),
        ("[1e-4, no]", [1e-4, "no"]),
    ],
)
def test_scalar_is_read_as_written(written, meant):
    value = parse_yaml(f"key: {written}")["key"]
    assert value == meant
    assert type(value) is type(meant) or (isinstance(meant, int) and isinstance(value, float))


def test_the_plain_loader_would_misread_these():
    plain = yaml.safe_load("a: 1e-4\nb: no\nc: 1:30\nd: 010")
    assert plain == {"a": "1e-4", "b": False, "c": 90, "d": 8}


def test_infinity_and_nan_are_floats_for_the_config_to_refuse():
    assert parse_yaml("a: -.inf")["a"] == -math.inf
    assert math.isnan(parse_yaml("a: .nan")["a"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2", r"key 'a' stands twice[\s\S]*line 2"),
        ("a: {b: 1, b: 1}", "key 'b' stands twice"),
        ("a: &x [1]\nb: *x", r"aliases[\s\S]*line 2"),
        ("a: !!python/object/apply:os.system [ls]", r"tags \(!name\) are not supported"),
        ("a: !!float abc", "tags"),
        ("!!map {a: 1}", "tags"),
        ("a: !mine 3", "tags"),
        ("<<: {a: 1}", "merge"),
        ("{[1]: 2}", "key must be a word"),
        ("a: [1", "not valid YAML"),
        ("a: 1\n---\nb: 2", "single document"),
        ("- a\n- b", "must hold a mapping of settings, not list"),
        ("", "not NoneType"),
        ("[" * 5000, "not valid YAML"),
    ],
)
def test_what_is_no_configuration_is_a_config_error(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_yaml(text)


def test_a_file_is_read_and_named_in_errors(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("name: Ω\n", encoding="utf-8")
    assert read_yaml(path) == {"name": "Ω"}

    path.write_text("a: [", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"run\.yaml is not valid YAML"):
        read_yaml(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: " + b"x" * MAX_BYTES, "more than 1000000 bytes"),
        (b"a: \xff\xfe", "cannot be read"),
        (None, "cannot be read"),
    ],
    ids=["huge", "not_utf8", "missing"],
)
def test_an_unreadable_file_is_a_config_error(tmp_path, content, message):
    path = tmp_path / "run.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_yaml(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(tmp_path)


def test_the_largest_permitted_file_is_read(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(b"a: " + b"x" * (MAX_BYTES - 3))
    assert len(read_yaml(path)["a"]) == MAX_BYTES - 3
