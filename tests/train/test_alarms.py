"""Alarms: fired once, in words, for dead experts and collapsed sites, and for nothing else."""

from __future__ import annotations

import pytest
import torch
from routing_records import collapsed_logits, dense_record, top_k_record
from torch import Tensor

import molora
from molora.routing.statistics import row_sums
from molora.train.alarms import Alarm, RoutingAlarms, concentration

SITE = "model.layers.3.mlp.q_proj"


def window(counts: list[float], *, rows: float | None = None, mass: list[float] | None = None):
    """Sums of a window: choices by expert, of rows that have one each unless said."""
    number = sum(counts) if rows is None else rows
    return torch.tensor([*counts, *(mass or counts), number, 0.0, 0.0], dtype=torch.float64)


class Run:
    """Windows of one site, fed one after the other."""

    def __init__(self, num_experts: int, *, steps: int | None, window_steps: int = 10) -> None:
        self.alarms = RoutingAlarms({SITE: num_experts}, steps=steps)
        self.window_steps = window_steps
        self.step = 0

    def feed(self, *windows: Tensor) -> list[Alarm]:
        found = []
        for sums in windows:
            self.step += self.window_steps
            found += self.alarms.update({SITE: sums}, step=self.step, steps=self.window_steps)
        return found


SOME_DEAD = window([9, 0, 5, 7, 0, 3, 0, 8])
ALIVE = window([9, 1, 5, 7, 2, 3, 2, 8])


def test_dead_experts_are_told_once_in_words() -> None:
    run = Run(8, steps=200)
    assert run.feed(*[SOME_DEAD] * 19) == []
    (alarm,) = run.feed(SOME_DEAD)
    assert alarm.message == f"{SITE}: experts 1, 4 and 6 got no token for 200 steps"
    assert (alarm.step, alarm.site, alarm.event) == (200, SITE, "dead")
    assert (alarm.experts, alarm.steps) == ((1, 4, 6), 200)
    assert run.feed(*[SOME_DEAD] * 50) == []


def test_what_recovers_is_told_and_may_die_again() -> None:
    run = Run(8, steps=20)
    assert [alarm.event for alarm in run.feed(SOME_DEAD, SOME_DEAD, SOME_DEAD)] == ["dead"]
    (alarm,) = run.feed(window([9, 0, 5, 7, 2, 3, 0, 8]))
    assert alarm.message == f"{SITE}: expert 4 got tokens again, after 30 steps without"
    assert (alarm.event, alarm.experts) == ("recovered", (4,))
    assert run.feed(SOME_DEAD) == []
    (alarm,) = run.feed(SOME_DEAD)
    assert alarm.message == f"{SITE}: expert 4 got no token for 20 steps"


def test_an_expert_that_was_never_told_of_recovers_in_silence() -> None:
    run = Run(8, steps=30)
    assert run.feed(SOME_DEAD, SOME_DEAD, ALIVE, SOME_DEAD, SOME_DEAD, ALIVE) == []


def test_windows_in_which_a_site_was_not_used_do_not_count() -> None:
    run = Run(8, steps=20)
    assert run.feed(*[window([0] * 8)] * 5, SOME_DEAD, *[window([0] * 8)] * 5) == []
    assert len(run.feed(SOME_DEAD)) == 1
    assert run.alarms.update({}, step=1000, steps=10) == []


def test_no_alarms_if_not_wanted() -> None:
    assert Run(8, steps=None).feed(*[SOME_DEAD] * 1000) == []


# ---------------------------------------------------------------------- collapse


def site_sums(logits_TE: Tensor, k: int | None) -> Tensor:
    record = dense_record(logits_TE) if k is None else top_k_record(logits_TE, k)
    return row_sums([record])[0]


def collapsed_on(experts: list[int], rows: int = 40) -> Tensor:
    logits_TE = torch.randn(rows, 6)
    logits_TE[:, experts] += 30 * torch.rand(rows, len(experts)) + 30
    return logits_TE


@pytest.mark.parametrize(
    ("experts", "k", "told"),
    [
        ([2], 1, "expert 2 took 100% of the choices"),
        ([5, 2], 2, "experts 2 and 5 took 100% of the choices"),
        ([2], None, "expert 2 took 100% of the scores"),
    ],
    ids=["top-1", "top-2", "dense"],
)
def test_a_collapsed_router_is_told_of(experts: list[int], k: int | None, told: str) -> None:
    run = Run(6, steps=30)
    assert run.feed(*(site_sums(collapsed_on(experts), k) for _ in range(2))) == []
    alarms = run.feed(site_sums(collapsed_on(experts), k))
    assert alarms[0].message == f"{SITE}: collapsed, {told} for 30 steps"
    assert alarms[0].experts == tuple(sorted(experts))
    # a dense site has no dead experts, however small their scores
    assert [alarm.event for alarm in alarms[1:]] == ([] if k is None else ["dead"])
    assert run.feed(*(site_sums(collapsed_on(experts), k) for _ in range(9))) == []
    back = run.feed(site_sums(torch.randn(40, 6), k))
    assert back[0].message == (
        f"{SITE}: choices depend on the token again, after 120 steps of collapse"
    )
    assert back[0].event == "recovered"


@pytest.mark.parametrize("k", [1, 2, 5, None])
def test_a_router_that_decides_by_the_token_is_not_collapsed(k: int | None) -> None:
    run = Run(6, steps=10)
    assert run.feed(*(site_sums(3 * torch.randn(400, 6), k) for _ in range(30))) == []


def test_undecided_dense_routing_is_not_collapsed() -> None:
    assert Run(6, steps=10).feed(*[site_sums(torch.zeros(40, 6), None)] * 30) == []


def test_one_row_a_window_is_judged_by_all_windows() -> None:
    # each window has one row, which one expert has entirely
    first, second = window([1, 0, 0]), window([0, 1, 0])
    run = Run(3, steps=100, window_steps=1)
    assert [alarm.event for alarm in run.feed(*[first, second] * 99)] == ["dead"]
    same = Run(3, steps=100, window_steps=1)
    assert [alarm.event for alarm in same.feed(*[first] * 99)] == []
    assert [alarm.event for alarm in same.feed(first)] == ["collapsed", "dead"]


@pytest.mark.parametrize(
    ("counts", "rows", "share", "experts"),
    [
        ([94, 6, 0, 0], 100, 0.94, (0,)),
        ([100, 60, 40, 0], 100, 0.8, (0, 1)),
        # a selector of varying width: 1.2 choices a row, of which one expert can have 1/1.2
        ([20, 100, 0, 0], 100, 1.0, (1,)),
        # capacity dropped most choices
        ([0, 30, 0, 0], 100, 1.0, (1,)),
        ([0, 0, 0, 0], 100, 0.0, (0,)),
    ],
)
def test_concentration_is_the_share_of_what_the_busiest_can_have(
    counts: list[float], rows: float, share: float, experts: tuple[int, ...]
) -> None:
    found, busiest = concentration(window(counts, rows=rows).tolist())
    assert found == pytest.approx(share)
    assert busiest == experts or share == 0


# ---------------------------------------------------------------------- state


def random_windows(number: int) -> list[Tensor]:
    source = torch.Generator().manual_seed(1)
    found = []
    for _ in range(number):
        logits_TE = torch.randn(3, 6, generator=source)
        if torch.rand((), generator=source) < 0.6:
            logits_TE += collapsed_logits(3, 6, expert=2)
        found.append(site_sums(logits_TE, 1))
    return found


@pytest.mark.parametrize("cut", [0, 7, 31, 44])
def test_alarms_go_on_after_a_resume_as_if_nothing_happened(cut: int) -> None:
    windows = random_windows(60)
    straight = Run(6, steps=30)
    expected = straight.feed(*windows)
    assert {alarm.event for alarm in expected} == {"dead", "collapsed", "recovered"}
    before = Run(6, steps=30)
    alarms = before.feed(*windows[:cut])
    after = Run(6, steps=30)
    after.step = before.step
    after.alarms.load(before.alarms.state().clone())
    alarms += after.feed(*windows[cut:])
    assert alarms == expected
    assert torch.equal(after.alarms.state(), straight.alarms.state())


def test_a_resume_without_the_state_would_be_noticed() -> None:
    windows = random_windows(60)
    expected = [alarm.event for alarm in Run(6, steps=30).feed(*windows)]

    def forgetting(cut: int) -> list[str]:
        parts = windows[:cut], windows[cut:]
        return [alarm.event for part in parts for alarm in Run(6, steps=30).feed(*part)]

    assert sum(forgetting(cut) != expected for cut in range(1, 60)) > 20


def test_alarms_of_another_mixture_are_refused() -> None:
    alarms = RoutingAlarms({SITE: 4, "other": 3}, steps=10)
    with pytest.raises(molora.CheckpointError, match=r"have 29 numbers, .* has 38"):
        alarms.load(RoutingAlarms({SITE: 6}, steps=10).state())
