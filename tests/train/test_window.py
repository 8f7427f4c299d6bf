"""Sums of a window: exact through a resume, added over ranks, and refused of another mixture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tiny_models import batch_for
from tiny_trainers import mixture_on
from torch import Tensor

import molora
from molora.attach.losses import weighted_terms
from molora.losses import total
from molora.routing.statistics import Sums
from molora.train.observation import Observation
from molora.train.summary import Report
from molora.train.window import Layout, MetricsWindow

QUERY = "model.layers.1.self_attn.q_proj"
DEVICE = torch.device("cpu")


def batches(number: int) -> list[tuple[dict[str, list[molora.Routing]], float]]:
    """Records of all sites of a model over several forwards."""
    mixture = mixture_on()
    found = []
    for seed in range(number):
        with mixture.record() as records:
            mixture.model(**batch_for(mixture.model, seed=seed))
        found.append(({site: [record] for site, record in records.items()}, float(seed)))
    return found


def filled(layout: Layout, forwards: Sequence[Any]) -> MetricsWindow:
    window = MetricsWindow(layout)
    fill(window, forwards)
    return window


def fill(window: MetricsWindow, forwards: Sequence[Any]) -> None:
    mixture = mixture_on()
    terms = weighted_terms(mixture.config)
    for records, number in forwards:
        window.routing.update(records)
        aux = total(records, terms, layer_of=mixture.built.layers, side={})
        window.add_losses(aux, torch.tensor(0.3 + number / 7))
        window.add_scalar("tokens", torch.tensor(17))


@pytest.mark.parametrize("cut", [0, 1, 3])
def test_a_window_goes_on_bit_for_bit(cut: int) -> None:
    layout, forwards = Layout.of(mixture_on()), batches(4)
    straight = filled(layout, forwards).vector()
    assert straight.shape == (sum(layout.sizes),)
    resumed = MetricsWindow(layout)
    resumed.add_vector(filled(layout, forwards[:cut]).vector().clone())
    fill(resumed, forwards[cut:])
    assert torch.equal(resumed.vector(), straight)
    without = filled(layout, forwards[cut:]).vector()
    assert torch.equal(without, straight) == (cut == 0)


def test_a_window_of_another_mixture_is_refused() -> None:
    window = MetricsWindow(Layout.of(mixture_on()))
    other = MetricsWindow(Layout.of(mixture_on(losses=())))
    with pytest.raises(molora.CheckpointError, match="has other sites, experts or losses"):
        window.add_vector(other.vector())


class OneProcess:
    """What an observation needs of Accelerate's Accelerator."""

    device = DEVICE
    num_processes = 1

    @staticmethod
    def gather(tensor: Tensor) -> Tensor:
        return tensor


def observed(forwards: Sequence[Any], *, dead_steps: int = 2) -> Observation:
    observation = Observation(mixture_on(), dead_steps=dead_steps)
    fill(observation._window, forwards)
    return observation


def numbers_of(report: Report) -> tuple[dict[str, Any], Any, Any]:
    timed = ("tokens_per_second", "memory_mib", "mfu")
    totals = {name: value for name, value in report.totals.items() if name not in timed}
    return totals, report.sites, report.alarms


def test_an_observation_goes_on_bit_for_bit() -> None:
    forwards = batches(6)
    straight = observed(forwards[:2])
    straight.read(step=2, accelerator=OneProcess)
    fill(straight._window, forwards[2:])
    expected = straight.read(step=6, accelerator=OneProcess)

    before = observed(forwards[:2])
    before.read(step=2, accelerator=OneProcess)
    fill(before._window, forwards[2:3])
    state = {name: tensor.clone() for name, tensor in before.state_dict().items()}
    assert all(tensor.dtype == torch.float64 for tensor in state.values())
    after = Observation(mixture_on(), dead_steps=2)
    after.load_state_dict([state], rank=0, world_size=1, device=DEVICE)
    fill(after._window, forwards[3:])
    assert after.seconds() >= state["totals"][2]
    assert numbers_of(after.read(step=6, accelerator=OneProcess)) == numbers_of(expected)
    assert expected.totals["tokens"] == 6 * 17

    fresh = observed(forwards[3:])
    assert numbers_of(fresh.read(step=6, accelerator=OneProcess)) != numbers_of(expected)


@pytest.mark.parametrize(("ranks", "now"), [(2, 1), (2, 3), (3, 2)])
def test_on_another_number_of_ranks_all_sums_are_kept(ranks: int, now: int) -> None:
    forwards = batches(6)
    share = len(forwards) // ranks
    parts = [forwards[i * share : (i + 1) * share] for i in range(ranks)]
    states = [observed(part).state_dict() for part in parts]
    vectors = []
    for rank in range(now):
        observation = Observation(mixture_on())
        observation.load_state_dict(states, rank=rank, world_size=now, device=DEVICE)
        vectors.append(observation._window.vector())
    whole = observed(forwards)._window.vector()
    torch.testing.assert_close(sum(vectors), whole, rtol=1e-12, atol=0)
    assert all(vector.count_nonzero() == 0 for vector in vectors[1:])


def test_sums_of_ranks_are_added_and_their_agreement_is_told() -> None:
    forwards = batches(4)
    parts = forwards[:1], forwards[1:]
    vectors = [observed(part)._window.vector() for part in parts]

    class TwoProcesses(OneProcess):
        num_processes = 2

        @staticmethod
        def gather(tensor: Tensor) -> Tensor:
            other = torch.cat([vectors[1], torch.tensor([10.0**9])])
            return torch.cat([tensor, other[None]])

    report = observed(parts[0]).read(step=1, accelerator=TwoProcesses)
    alone = observed(forwards).read(step=1, accelerator=OneProcess)
    assert report.totals["memory_mib"] == 10.0**9
    for name in ("load_min", "load_max", "routing_entropy", "routing_margin", "tokens"):
        assert report.totals[name] == pytest.approx(alone.totals[name])
    for site, numbers in report.sites.items():
        shares = []
        for part in (*parts, forwards):
            records = [record for found, _ in part for record in found[site]]
            chosen = torch.cat([record.expert_index[record.mask].flatten() for record in records])
            shares.append(torch.bincount(chosen, minlength=4) / len(chosen))
        distance = max(float((share - shares[-1]).abs().sum()) / 2 for share in shares)
        assert numbers["agreement"] == pytest.approx(1 - distance)
    assert report.totals["rank_agreement"] < 0.95
    assert report.totals["rank_agreement"] == min(n["agreement"] for n in report.sites.values())


def test_ranks_that_are_alike_agree_wholly() -> None:
    forwards = batches(2)

    class Twins(OneProcess):
        @staticmethod
        def gather(tensor: Tensor) -> Tensor:
            return torch.cat([tensor, tensor])

    report = observed(forwards).read(step=1, accelerator=Twins)
    assert report.totals["rank_agreement"] == pytest.approx(1)
    counts = Sums(observed(forwards)._window.routing.sums()[QUERY]).counts
    load = (4 * counts / counts.sum()).tolist()
    assert report.sites[QUERY]["load"] == pytest.approx(load)
