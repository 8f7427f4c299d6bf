"""Processes tell each other what they were started with; here threads over a store in memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch.distributed import HashStore

from molora.config.run import RunConfig
from molora.errors import TrainingError
from molora.presets import run_config
from molora.train.peers import Peers
from molora.train.place import Place
from molora.train.startup import facts, source_sha256


def on_ranks(size: int, act: Callable[[Peers], Any], *, absent: tuple[int, ...] = ()) -> list[Any]:
    """What `act` returns on every rank, or the error that it raises."""
    store = HashStore()
    peers = [Peers(Place(rank, size, address="first", port=1), store) for rank in range(size)]

    def run(peer: Peers) -> Any:
        try:
            return act(peer)
        except TrainingError as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, [peer for peer in peers if peer.rank not in absent]))


def run(**train: Any) -> RunConfig:
    return run_config(
        {
            "model": {"name": "base"},
            "data": {"train": ["rows.jsonl"]},
            "mixture": {"preset": "mola"},
            "train": train,
        }
    )


def test_every_rank_gets_the_facts_of_all_in_order() -> None:
    told = on_ranks(3, lambda peer: peer.exchange({"rank": peer.rank}, seconds=5))
    assert told == [[{"rank": 0}, {"rank": 1}, {"rank": 2}]] * 3


def test_exchanges_follow_each_other_without_mixing() -> None:
    def twice(peer: Peers) -> list[Any]:
        return [peer.exchange({"n": n, "rank": peer.rank}, seconds=5)[0] for n in range(2)]

    assert on_ranks(2, twice) == [[{"n": 0, "rank": 0}, {"n": 1, "rank": 0}]] * 2


def test_one_process_agrees_with_itself() -> None:
    alone = Peers(Place(), None)
    alone.agree({"seed": 1}, seconds=0.1, what="run")
    assert alone.exchange({"seed": 1}, seconds=0.1) == [{"seed": 1}]
    assert alone.first_to_say("anything")


def test_the_same_run_is_agreed_upon() -> None:
    agreed = on_ranks(2, lambda p: p.agree(facts(run(), None), seconds=5, what="run"))
    assert agreed == [None, None]


def test_a_difference_is_named_with_both_values_and_the_rank() -> None:
    def act(peer: Peers) -> None:
        config = run(learning_rate=2e-3 if peer.rank == 1 else 1e-3)
        peer.agree(facts(config, {"stage": peer.rank}), seconds=5, what="run")

    first, second = on_ranks(2, act)
    assert isinstance(first, TrainingError)
    assert str(first) == str(second)
    assert "the processes do not have the same run:" in str(first)
    assert "- config.train.learning_rate: 0.002 on rank 1, 0.001 on rank 0" in str(first)
    assert "- deepspeed.stage: 1 on rank 1, 0 on rank 0" in str(first)
    assert str(first).count("\n") == 2


def test_many_differences_are_counted() -> None:
    errors = on_ranks(
        2, lambda p: p.agree({f"key{n}": p.rank for n in range(11)}, seconds=5, what="data")
    )
    assert str(errors[0]).endswith("- and 3 more")


def test_a_fact_that_one_rank_lacks_is_a_difference() -> None:
    errors = on_ranks(2, lambda p: p.agree({"a": 1} if p.rank else {}, seconds=5, what="run"))
    assert "- a: 1 on rank 1, None on rank 0" in str(errors[0])


def test_ranks_that_do_not_come_are_counted_and_named() -> None:
    started = time.monotonic()
    errors = on_ranks(4, lambda p: p.exchange({}, seconds=1), absent=(1, 3))
    assert time.monotonic() - started < 10
    assert len(errors) == 2
    for error in errors:
        assert "2 of 4 processes came within 1 s; not rank 1, 3." in str(error)
        assert "first:1" in str(error)


def test_a_message_is_said_by_one_rank_and_another_by_another() -> None:
    said = on_ranks(4, lambda p: p.first_to_say("the same"))
    assert sorted(said) == [False, False, False, True]
    assert on_ranks(3, lambda p: p.first_to_say(f"rank {p.rank}")) == [True] * 3


def test_rank_0_leaves_last_but_does_not_wait_for_ever() -> None:
    def act(peer: Peers) -> float:
        time.sleep(0.3 * peer.rank)
        started = time.monotonic()
        peer.leave(patience=5)
        return time.monotonic() - started

    waited = on_ranks(2, act)
    assert 0.2 < waited[0] < 3
    assert waited[1] < 0.2
    alone = on_ranks(2, lambda p: p.leave(patience=0.2), absent=(1,))
    assert alone == [None]


def test_facts_hold_the_run_versions_and_the_source() -> None:
    found = facts(run(learning_rate=3e-4), {"zero_optimization": {"stage": 2}})
    assert found["config"]["train"]["learning_rate"] == 3e-4
    assert found["deepspeed"] == {"zero_optimization": {"stage": 2}}
    assert {"torch", "transformers", "deepspeed", "python"} <= found["versions"].keys()
    assert found["molora"]["source"] == source_sha256()
    assert len(source_sha256()) == 16
