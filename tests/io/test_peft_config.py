"""Settings of published adapters: resolved as package peft does, or refused with the reason."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from molora.errors import CheckpointError, ConfigError
from molora.io import peft_config, peft_patterns
from molora.io.peft_config import parse_config, ranks_and_scalings, read_config
from molora.io.peft_patterns import first_matches

MODULES = [
    *(f"model.layers.{n}.self_attn.{p}_proj" for n in (0, 1, 11) for p in "qkv"),
    *("model.layers.1.mlp.up_proj", "lm_head", "q_proj", "xq_proj", "a-b.q_proj"),
]
PIECES = ["q_proj", "proj", ".", r"\.", "1", "layers", "model", "^", "$", "|", "(q|k)", ".*", "-"]
PIECES += ["[01]", r"\d+", "self_attn", "_proj", "lm_head", "(?:a|up)", "x?"]
PATTERNS = st.lists(st.lists(st.sampled_from(PIECES), max_size=4).map("".join), max_size=4)


def _config(**settings: Any) -> tuple[peft_config.AdapterConfig, list[str]]:
    return parse_config({"peft_type": "LORA", **settings}, where="adapter_config.json")


@given(PATTERNS.map(lambda names: list(dict.fromkeys(names))))
def test_the_first_pattern_is_that_of_peft(patterns: list[str]) -> None:
    config, _ = _config(r=2, rank_pattern={p: 3 + n for n, p in enumerate(patterns)})
    try:
        keys = {module: get_pattern_key(patterns, module) for module in MODULES}
    except re.error:
        with pytest.raises(ConfigError, match="no regular expression"):
            ranks_and_scalings(config, MODULES, where="")
        return
    expected = {module: config.rank_pattern.get(key, 2) for module, key in keys.items()}
    found = ranks_and_scalings(config, MODULES, where="")
    assert {module: rank for module, (rank, _) in found.items()} == expected


def test_order_of_patterns_matters() -> None:
    patterns = {"q_proj": 4, ".*_proj": 6}
    turned = dict(reversed(patterns.items()))
    ranks = [
        ranks_and_scalings(_config(rank_pattern=p)[0], ["a.q_proj", "a.k_proj"], where="")
        for p in (patterns, turned)
    ]
    assert [[rank for rank, _ in found.values()] for found in ranks] == [[4, 6], [6, 6]]


def test_a_name_that_is_no_match_of_itself_counts_as_a_key() -> None:
    pattern = "a-b.q_proj$x|"  # as a regex another thing
    config, _ = _config(r=8, rank_pattern={"zz": 1, pattern: 2})
    found = ranks_and_scalings(config, [pattern], where="")
    assert found[pattern][0] == {"zz": 1, pattern: 2}.get(get_pattern_key(["zz", pattern], pattern))


def test_a_pattern_that_takes_forever_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft_patterns, "TIME_LIMIT", 1.0)
    names = ["a" * 64 + "b"]
    with pytest.raises(ConfigError, match="rank_pattern: matching takes more than 1 s"):
        first_matches(["(a+)+c"], names, whole=False, where="rank_pattern")
    with pytest.raises(ConfigError, match="takes more than"):
        first_matches(["(a|a|b)*" * 9 + "c"], names, whole=True, where="target_modules")


def test_many_patterns_are_matched_apart_and_as_few_are(monkeypatch: pytest.MonkeyPatch) -> None:
    patterns = [f"layers.{n}.q_proj" for n in range(12)]
    here = first_matches(patterns, MODULES, whole=False, where="")
    assert here.count(None) == len(MODULES)
    patterns = [f"layers.{n}.self_attn.q_proj" for n in range(12)]
    here = first_matches(patterns, MODULES, whole=False, where="")
    assert [p for p in here if p] == [patterns[0], patterns[1], patterns[11]]
    monkeypatch.setattr(peft_patterns, "MAX_HERE", (11, 500_000))
    assert first_matches(patterns, MODULES, whole=False, where="") == here
    monkeypatch.setattr(peft_patterns, "TIME_LIMIT", 1e-9)
    with pytest.raises(ConfigError, match="takes more than"):
        first_matches(patterns, MODULES, whole=False, where="")


def test_patterns_are_bounded_in_length() -> None:
    longest = "q" * peft_patterns.MAX_LENGTH
    assert first_matches([longest], [longest], whole=False, where="x") == [longest]
    with pytest.raises(ConfigError, match=r"x: the pattern .* has 513 characters"):
        first_matches([longest + "q"], [longest], whole=False, where="x")


@pytest.mark.parametrize("patterns", [["(" * 250 + ")" * 250], ["a{99999999999}"], ["(?P<a"]])
def test_patterns_that_are_none_are_refused(patterns: list[str]) -> None:
    try:
        re.compile(patterns[0])
    except (re.error, OverflowError):
        with pytest.raises(ConfigError, match="no regular expression"):
            first_matches(patterns, ["a"], whole=True, where="x")
    else:
        assert first_matches(patterns, ["a"], whole=True, where="x") == [None]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", "XLORA"),
        ("modules_to_save", ["lm_head"]),
        ("trainable_token_indices", {"embed_tokens": [1]}),
        ("layer_replication", [[0, 2], [1, 2]]),
        ("megatron_config", {"a": 1}),
        ("use_qalora", True),
        ("use_bdlora", {"x": 1}),
        ("arrow_config", {"top_k": 1}),
        ("kasa_config", {"beta": 1}),
        ("ensure_weight_tying", True),
        ("enable_lora", [True, False]),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "pissa_niter_"),
        ("init_lora_weights", "newer"),
        ("init_lora_weights", ["new"]),
        ("use_something_new", True),
        ("something_new_config", {"a": 1}),
    ],
)
def test_what_would_change_the_function_is_refused(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"adapter_config.json: {key} is .*: .*\\."):
        _config(**{key: value})


def test_what_changes_nothing_is_read() -> None:
    config, notes = _config(
        use_dora=False,
        bias="none",
        init_lora_weights="gaussian",
        lora_dropout=0.1,
        loftq_config={},
        modules_to_save=None,
        auto_mapping={"parent_library": "os"},
        use_new=False,
        new_config=None,
        colour="red",
        rank_pattern=None,
    )
    assert config == peft_config.AdapterConfig()
    assert notes == [
        f"unknown setting '{k}' was not read" for k in ("use_new", "new_config", "colour")
    ]


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 0},
        {"r": -1},
        {"r": 2**31 + 1},
        {"r": 10**400},
        {"r": True},
        {"r": 8.0},
        {"r": "8"},
        {"lora_alpha": "16"},
        {"lora_alpha": float("nan")},
        {"lora_alpha": float("inf")},
        {"lora_alpha": 10**400},
        {"use_rslora": 1},
        {"rank_pattern": {"q": 1.5}},
        {"rank_pattern": ["q"]},
        {"alpha_pattern": {"q": None}},
        {"target_modules": 3},
        {"layers_to_transform": "1"},
        {"base_model_name_or_path": ["x"]},
        {"use_dora": 1},
        {"lora_bias": "true"},
        {"alora_invocation_tokens": [1, -1]},
        {"alora_invocation_tokens": [2**31]},
        {"alora_invocation_tokens": [1] * 4097},
        {"alora_invocation_tokens": "3 4"},
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"adapter_config.json: {next(iter(settings))}"):
        _config(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True, "lora_bias": True},
        {"use_dora": True, "alora_invocation_tokens": [3]},
        {"use_dora": True, "target_parameters": ["w"]},
        {"lora_bias": True, "target_parameters": ["w"]},
        {"alora_invocation_tokens": [3], "target_parameters": ["w"]},
    ],
)
def test_variants_that_exclude_each_other_are_refused(settings: dict[str, Any]) -> None:
    for key, value in settings.items():
        assert getattr(_config(**{key: value})[0], key) == value
    with pytest.raises(ConfigError, match=f"{' and '.join(settings)} are set, which package peft"):
        _config(**settings)
    assert _config(lora_bias=True, alora_invocation_tokens=[3])[0].lora_bias


@pytest.mark.parametrize("start", ["pissa", "PiSSA", "pissa_niter_16", "olora", "corda", "lora_ga"])
def test_starts_that_took_a_part_out_of_the_base_are_recognised(start: str) -> None:
    assert _config(init_lora_weights=start)[0].init_lora_weights == start.lower()


@pytest.mark.parametrize("text", ["", "[]", "{", "3", '"x"', "[" * 100_000, "\ud800", "9" * 5000])
def test_a_file_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(CheckpointError):
        read_config(path)


@pytest.mark.parametrize("depth", [100, 300, 500, 700, 900, 960, 980])
def test_deep_values_are_no_other_error(tmp_path: Path, depth: int) -> None:
    path = tmp_path / "adapter_config.json"
    for key in ("r", "use_dora", "rank_pattern", "target_modules", "init_lora_weights"):
        deep = '{"a":' * depth + "1" + "}" * depth
        path.write_text(f'{{"peft_type": "LORA", "{key}": {deep}}}')
        with pytest.raises((CheckpointError, ConfigError)):
            read_config(path)


def test_the_size_of_the_file_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "adapter_config.json"
    text = json.dumps({"peft_type": "LORA"})
    path.write_text(text)
    monkeypatch.setattr(peft_config, "MAX_CONFIG", len(text))
    assert read_config(path)[0].r == 8
    path.write_text(text + " ")
    with pytest.raises(CheckpointError, match="bytes, and at most"):
        read_config(path)
