"""What a mixture cannot be, and what the error says about it: the rule, the value, the remedy."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest

from molora.config import MixtureConfig
from molora.config.run import RunConfig
from molora.errors import ConfigError

RUN: dict[str, Any] = {
    "model": {"name": "model"},
    "data": {"train": ["train.jsonl"], "eval": [{"path": "eval.jsonl"}]},
    "mixture": {
        "groups": [
            {
                "targets": ["q_proj"],
                "num_experts": 4,
                "rank": [2, 3],
                "expert": {"kind": "lora", "dropout": {"p": 0.1}},
                "router": {"init": {"kind": "normal", "std": 0.1}},
                "score": {"kind": "softmax"},
                "select": {"kind": "top_k", "k": 2},
                "site": {"kind": "linear", "scope": "block"},
            }
        ],
        "losses": [{"term": {"kind": "load_balance", "form": "switch"}, "coefficient": 0.1}],
        "train_tokens": {"ids": [5]},
    },
    "train": {"epochs": 2},
}


def with_value(path: str, value: Any) -> dict[str, Any]:
    """A valid run with the value at a dotted path replaced or added."""
    data = copy.deepcopy(RUN)
    *parents, last = path.split(".")
    node: Any = data
    for part in parents:
        node = node[int(part) if part.isdigit() else part]
    node[last] = value
    return data


def test_the_run_that_these_tests_break_is_valid():
    assert RunConfig.parse(RUN).mixture.groups[0].rank.values == (2, 3)


@pytest.mark.parametrize(
    ("path", "close"),
    [
        ("modle", "model"),
        ("model.dtpye", "dtype"),
        ("data.max_lenght", "max_length"),
        ("data.eval.0.taks", "task"),
        ("train.learning_rat", "learning_rate"),
        ("mixture.loses", "losses"),
        ("mixture.groups.0.num_expert", "num_experts"),
        ("mixture.groups.0.site.scop", "scope"),
        ("mixture.groups.0.expert.aplha", "alpha"),
        ("mixture.groups.0.expert.dropout.msk", "mask"),
        ("mixture.groups.0.router.temprature", "temperature"),
        ("mixture.groups.0.router.init.sdt", "std"),
        ("mixture.groups.0.select.renormalise", "renormalize"),
        ("mixture.losses.0.coef", "coefficient"),
        ("mixture.losses.0.term.fomr", "form"),
        ("mixture.train_tokens.idz", "ids"),
    ],
)
def test_unknown_key_is_refused_with_its_path_and_the_nearest_name(path, close):
    parent, _, key = path.rpartition(".")
    with pytest.raises(ConfigError) as caught:
        RunConfig.parse(with_value(path, 1))

    (line,) = str(caught.value).splitlines()
    where, _, message = line.partition(": ")
    # the option of a union stands in the path too: expert.lora.aplha
    options = {"lora", "linear", "normal", "top_k", "load_balance"}
    assert [part for part in where.split(".") if part not in options] == (
        parent.split(".") if parent else ["config"]
    )
    assert f"unknown key {key!r}" in message
    assert re.search(rf"Close names: .*\b{close}\b", message)


def test_unknown_key_far_from_all_lists_what_is_known():
    with pytest.raises(ConfigError, match=r"unknown key 'xyz'\. Known: ids\."):
        RunConfig.parse(with_value("mixture.train_tokens.xyz", 1))


def test_every_fault_has_its_own_line():
    data = with_value("mixture.groups.0.rank", 0)
    data["train"]["epochs"] = -1
    data["mixture"]["groups"][0]["expert"]["dropout"]["p"] = 1.0
    with pytest.raises(ConfigError) as caught:
        RunConfig.parse(data)

    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "mixture.groups.0.rank.uniform.value",
        "mixture.groups.0.expert.lora.dropout.p",
        "train.epochs",
    ]
    assert lines[2].endswith("(got -1)")


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("mixture.groups.0.select", {"kind": "topk"}, ["'topk'", "'top_k'", "'top_p'", "'dense'"]),
        ("mixture.groups.0.select", {"k": 2}, ["'kind'"]),
        ("mixture.groups.0.select", {"kind": "top_p", "k": 2}, ["unknown key 'k'", "p"]),
        ("mixture.groups.0.select", {"kind": "dense", "renormalize": True}, ["unknown key"]),
        ("mixture.groups.0.site", {"kind": "ffn", "scope": "block"}, ["unknown key 'scope'"]),
        (
            "mixture.groups.0.router",
            {"init": {"kind": "kaiming", "std": 1}},
            ["router.linear.init", "unknown key 'std'"],
        ),
        ("mixture.losses.0.term", {"kind": "importance", "form": "slots"}, ["unknown key 'form'"]),
        ("mixture.losses.0.term", {"kind": "z"}, ["'router_z'", "'load_balance'"]),
        ("mixture.groups.0.rank", {"kind": "uniform", "values": [1]}, ["unknown key 'values'"]),
        ("mixture.groups.0.expert", {"kind": "hira"}, ["'lora'", "'shared_a'"]),
    ],
)
def test_an_option_has_its_own_fields_only(path, value, named):
    with pytest.raises(ConfigError, match=re.escape(path)) as caught:
        RunConfig.parse(with_value(path, value))
    for word in named:
        assert word in str(caught.value)


GROUP = {"num_experts": 4, "select": {"kind": "top_k", "k": 2}}
BALANCE = {"term": {"kind": "load_balance"}}
LOCALIZED = {"term": {"kind": "localized_balance"}}


def mixture(group: dict[str, Any], *losses: dict[str, Any]) -> dict[str, Any]:
    return {"groups": [{**GROUP, **group}], "losses": list(losses)}


def top_k(k: Any, renormalize: bool = True) -> dict[str, Any]:
    return {"kind": "top_k", "k": k, "renormalize": renormalize}


# id: (refused, the nearest thing that is accepted, message)
RULES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "top_k_above_uniform": (
        mixture({"num_experts": 4, "select": top_k(5)}),
        mixture({"num_experts": 4, "select": top_k(4)}),
        "top_k=5 exceeds num_experts=4",
    ),
    "top_k_above_one_layer": (
        mixture({"num_experts": [4, 2, 4], "select": top_k(3)}),
        mixture({"num_experts": [4, 3, 4], "select": top_k(3)}),
        "top_k=3 exceeds num_experts=2",
    ),
    "top_k_list_above_one_layer": (
        mixture({"num_experts": [4, 2], "select": top_k([2, 4])}),
        mixture({"num_experts": [4, 2], "select": top_k([4, 2])}),
        "top_k=4 exceeds num_experts=2",
    ),
    "top_k_shape_above_uniform": (
        mixture({"num_experts": 6, "select": top_k("inverted_triangle")}),
        mixture({"num_experts": 8, "select": top_k("inverted_triangle")}),
        "top_k=8 exceeds num_experts=6",
    ),
    "capacity_k_above_uniform": (
        mixture({"num_experts": 2, "select": {"kind": "capacity", "k": 3}}),
        mixture({"num_experts": 3, "select": {"kind": "capacity", "k": 3}}),
        "top_k=3 exceeds num_experts=2",
    ),
    "only_shapes_are_clamped": (
        mixture({"num_experts": [2, 4, 6, 8], "select": top_k(6)}),
        mixture({"num_experts": "inverted_triangle", "select": top_k(6)}),
        "or use a named shape, for which top_k is clamped",
    ),
    "unit_top1_without_a_loss": (
        mixture({"select": {"kind": "unit_top1"}}),
        mixture({"select": {"kind": "unit_top1"}}, BALANCE),
        "it would never learn",
    ),
    "renormalized_top1_without_a_loss": (
        mixture({"select": top_k(1)}),
        mixture({"select": top_k(1, renormalize=False)}),
        "it would never learn",
    ),
    "renormalized_capacity_top1_without_a_loss": (
        mixture({"select": {"kind": "capacity", "renormalize": True}}),
        mixture({"select": {"kind": "capacity", "renormalize": True}}, BALANCE),
        "it would never learn",
    ),
    "renormalized_top1_in_one_layer_with_a_router": (
        mixture({"num_experts": [1, 4, 4], "select": top_k([1, 1, 2])}),
        mixture({"num_experts": [1, 1, 4], "select": top_k([1, 1, 2])}),
        "it would never learn",
    ),
    "localized_balance_with_odd_experts": (
        mixture({"num_experts": [4, 5]}, LOCALIZED),
        mixture({"num_experts": [4, 5]}, BALANCE),
        r"even \(got 5\)",
    ),
    "localized_balance_with_odd_shape": (
        mixture({"num_experts": "rectangle"}, LOCALIZED),
        mixture({"num_experts": "hourglass"}, LOCALIZED),
        r"even \(got 5\)",
    ),
    "localized_balance_over_a_layer": (
        mixture({}, {**LOCALIZED, "scope": "layer"}),
        mixture({}, {**LOCALIZED, "scope": "site"}),
        "scope='layer' pools sites",
    ),
    "load_balance_of_dense_routing": (
        mixture({"select": {"kind": "dense"}}, BALANCE),
        mixture(
            {"select": {"kind": "dense"}}, {"term": {"kind": "load_balance", "form": "switch"}}
        ),
        "constant without gradient",
    ),
    "load_balance_of_dense_softmax": (
        mixture({"select": {"kind": "dense"}}, {"term": {"kind": "load_balance", "form": "slots"}}),
        mixture({"select": {"kind": "dense"}, "score": {"kind": "sigmoid"}}, BALANCE),
        "the slots load balance is a constant",
    ),
    "alpha_list_of_another_length": (
        mixture({"expert": {"kind": "lora", "alpha": [1, 2, 3]}}),
        mixture({"expert": {"kind": "lora", "alpha": [1, 2, 3, 4]}}),
        "expert.alpha has 3 values",
    ),
    "alpha_list_with_experts_by_layer": (
        mixture({"num_experts": [4, 2], "expert": {"kind": "shared_a", "alpha": [1, 2, 3, 4]}}),
        mixture({"num_experts": [4, 4], "expert": {"kind": "shared_a", "alpha": [1, 2, 3, 4]}}),
        "must be 4 in every layer",
    ),
    "overflow_to_the_input_of_a_linear": (
        mixture({"select": {"kind": "capacity", "overflow": "input"}}),
        mixture({"select": {"kind": "capacity", "overflow": "input"}, "site": {"kind": "ffn"}}),
        "needs site.kind='ffn'",
    ),
    "no_groups": ({"groups": []}, mixture({}), "at least 1 item"),
    "no_targets": (mixture({"targets": []}), mixture({"targets": "q_proj"}), "at least 1 item"),
    "not_a_number": (
        mixture({}, {**BALANCE, "coefficient": float("nan")}),
        mixture({}, {**BALANCE, "coefficient": -0.5}),
        "finite",
    ),
    "infinite_alpha": (
        mixture({"expert": {"kind": "lora", "alpha": float("inf")}}),
        mixture({"expert": {"kind": "lora", "alpha": 1e9}}),
        "finite",
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_impossible_mixture_is_refused_and_its_nearest_neighbour_is_not(rule):
    refused, accepted, message = RULES[rule]
    with pytest.raises(ConfigError, match=message):
        MixtureConfig.parse(refused)
    assert MixtureConfig.parse(accepted).groups


def test_one_expert_has_no_router_to_starve():
    group = {"num_experts": 1, "select": top_k(1)}
    assert not MixtureConfig.parse(mixture(group)).groups[0].routed


@pytest.mark.parametrize("steps", [None, 5])
def test_evaluation_steps_need_evaluation_data(steps):
    data = with_value("train.eval_steps", steps)
    assert RunConfig.parse(data).train.eval_steps == steps
    data["data"]["eval"] = []
    if steps is None:
        assert RunConfig.parse(data).data.eval == ()
    else:
        with pytest.raises(ConfigError, match=r"train\.eval_steps is set, but data\.eval is empty"):
            RunConfig.parse(data)


def test_configs_cannot_be_changed():
    config = MixtureConfig.parse(mixture({}))
    with pytest.raises(ValueError, match="frozen"):
        config.dtype = "bfloat16"
    with pytest.raises(ValueError, match="frozen"):
        config.groups[0].select.k = 3
