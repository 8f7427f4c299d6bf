"""A configuration survives being written and read: as data, as JSON and as YAML."""

from __future__ import annotations

import json
from typing import Any

import yaml
from hypothesis import given
from hypothesis import strategies as st

from molora.config import MixtureConfig
from molora.config.run import RunConfig
from molora.config.yaml import parse_yaml

positive = st.floats(1e-6, 1e6)
share = st.floats(0, 0.99)


def kind(name: str, **fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """An option of a tagged union in which every field may be left out."""
    return st.fixed_dictionaries({"kind": st.just(name)}, optional=fields)


def allocations(smallest: int, largest: int) -> st.SearchStrategy[Any]:
    counts = st.integers(smallest, largest)
    return st.one_of(
        counts,
        st.lists(counts, min_size=1, max_size=4),
        st.builds(lambda value: {"kind": "uniform", "value": value}, counts),
    )


names = st.text("abcdefghijklmnopqrstuvwxyz_.", min_size=1, max_size=12)
dropouts = st.fixed_dictionaries(
    {}, optional={"p": share, "mask": st.sampled_from(["shared", "per_expert"])}
)
forms = st.sampled_from(["lora", "shared_a"]).flatmap(
    lambda name: kind(
        name,
        alpha=positive,
        scaling=st.sampled_from(["alpha/r", "alpha/sqrt(r)"]),
        init=st.sampled_from(["kaiming", "gaussian"]),
        dropout=dropouts,
    )
)
routers = kind(
    "linear",
    init=st.one_of(kind("kaiming"), kind("normal", std=positive)),
    temperature=positive,
    noise_std=st.floats(0, 10),
    jitter=share,
)
selects = st.one_of(
    kind("top_k", k=st.just(2), renormalize=st.booleans()),
    kind("top_p", p=st.floats(0.01, 1), renormalize=st.booleans()),
    st.builds(
        lambda rest, value: {**rest, "threshold": value},
        kind("threshold", renormalize=st.booleans()),
        share,
    ),
    kind("capacity", k=st.integers(1, 2), tokens=st.integers(1, 9)),
    kind("dense"),
)
groups = st.fixed_dictionaries(
    {"score": st.just({"kind": "sigmoid"})},  # with softmax some losses are constant and refused
    optional={
        "targets": st.one_of(names, st.lists(names, min_size=1, max_size=3)),
        "site": st.one_of(
            kind("ffn"), kind("linear", scope=st.sampled_from(["linear", "block", "layer"]))
        ),
        "num_experts": st.one_of(
            st.integers(1, 4).map(lambda half: 2 * half), st.sampled_from(["triangle", "hourglass"])
        ),
        "rank": st.one_of(allocations(1, 64), st.just("rectangle")),
        "expert": forms,
        "router": routers,
        "select": selects,
    },
)
terms = st.one_of(
    kind("load_balance", form=st.sampled_from(["normalized", "slots", "switch", "unscaled"])),
    kind("importance"),
    kind("router_z"),
    kind("routing_entropy"),
)
reduction = st.sampled_from(["mean", "sum"])
losses = st.one_of(
    st.fixed_dictionaries(
        {"term": terms},
        optional={
            "coefficient": st.floats(-1, 1),
            "scope": st.sampled_from(["site", "layer", "model"]),
            "reduction": reduction,
            "mask": st.sampled_from(["valid", "all"]),
        },
    ),
    st.fixed_dictionaries(
        {"term": kind("localized_balance", delta=share)}, optional={"reduction": reduction}
    ),
)
mixtures = st.fixed_dictionaries(
    {"groups": st.lists(groups, min_size=1, max_size=2)},
    optional={
        "method": names,
        "losses": st.lists(losses, max_size=3),
        "dtype": st.sampled_from(["float32", "bfloat16", "float16"]),
        "backend": st.sampled_from(["auto", "reference", "dense", "grouped", "gather", "triton"]),
        "share_products": st.booleans(),
        "train_modules": st.lists(names, max_size=2),
        "train_tokens": st.one_of(
            st.none(), st.builds(lambda i: {"ids": i}, st.lists(st.integers(0, 9), min_size=1))
        ),
    },
)


@given(mixture=mixtures)
def test_mixture_survives_data_json_and_yaml(mixture):
    config = MixtureConfig.parse(mixture)
    assert MixtureConfig.parse(config.model_dump()) == config
    plain = config.model_dump(mode="json")
    assert MixtureConfig.parse(json.loads(json.dumps(plain))) == config
    assert MixtureConfig.parse(parse_yaml(yaml.safe_dump(plain))) == config


@given(
    mixture=mixtures,
    train=st.fixed_dictionaries(
        {},
        optional={
            "epochs": positive,
            "learning_rate": positive,
            "router_learning_rate": st.one_of(st.none(), positive),
            "weight_decay": st.floats(0, 1),
            "save_steps": st.one_of(st.none(), st.integers(1, 1000)),
            "gradient_checkpointing": st.booleans(),
        },
    ),
    path=names,
    seed=st.integers(0, 2**31),
)
def test_run_survives_being_written_as_json(mixture, train, path, seed):
    config = RunConfig.parse(
        {
            "model": {"name": "model", "revision": "1e5"},
            "data": {"train": [path, {"path": f"{path}.jsonl", "rows": 3}]},
            "mixture": mixture,
            "train": train,
            "output_dir": path,
            "seed": seed,
        }
    )
    # JSON is YAML in which every string has quotes: 1e5 as a revision must not become a float
    assert RunConfig.parse(parse_yaml(config.model_dump_json(indent=1))) == config


def test_two_configs_that_differ_are_not_equal():
    one = MixtureConfig.parse({"groups": [{"rank": [2, 3]}]})
    assert one != MixtureConfig.parse({"groups": [{"rank": [3, 2]}]})
    assert one == MixtureConfig.parse({"groups": [{"rank": {"kind": "list", "values": [2, 3]}}]})
