"""What a line of metrics says, against numbers made by hand; what it costs in waits; and what a
resume inside a window leaves of it."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from host_reads import HostReads
from tiny_models import tiny
from tiny_trainers import mixture_on, sft
from torch import Tensor, nn

import molora
from molora.config import LoadBalance, Loss, RouterZ, TopK
from molora.routing.statistics import RoutingStatistics
from molora.train import SFTTrainer
from molora.train.summary import Report

QUERY = "model.layers.1.self_attn.q_proj"
DEVICE = torch.device("cpu")


def reports_of(trainer: SFTTrainer) -> list[Report]:
    found: list[Report] = []
    trainer.observation.listeners.append(found.append)
    trainer.train()
    return found


def lines(trainer: SFTTrainer) -> list[dict[str, Any]]:
    return [line for line in trainer.state.log_history if "loss" in line]


# ---------------------------------------------------------------------- numbers


class Recorded:
    """Keeps the records of all training forwards of a trainer."""

    def __init__(self, trainer: SFTTrainer) -> None:
        self.records: dict[str, list[molora.Routing]] = {}
        self.trainer, self.compute_loss = trainer, trainer.compute_loss
        trainer.compute_loss = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.trainer.mixture.record() as records:
            loss = self.compute_loss(*args, **kwargs)
        for site, record in records.items():
            self.records.setdefault(site, []).append(record)
        return loss

    def site(self, name: str) -> tuple[Tensor, Tensor]:
        """(rows, E) scores and (rows, K) choices of all rows that are not padding."""
        records = self.records[name]
        return (
            torch.cat([r.scores[r.mask] for r in records]).double(),
            torch.cat([r.expert_index[r.mask] for r in records]),
        )


def test_a_report_says_of_every_site_what_its_router_did(tmp_path: Path) -> None:
    options = {"max_steps": 3, "logging_steps": 3, "per_device_train_batch_size": 2}
    trainer = sft(mixture_on(), tmp_path, gradient_accumulation_steps=2, **options)
    recorded = Recorded(trainer)
    (report,) = reports_of(trainer)
    assert report.step == 3
    assert report.sites.keys() == trainer.mixture.built.sites.keys()
    for site, numbers in report.sites.items():
        p_TE, chosen_TK = recorded.site(site)
        counts = torch.bincount(chosen_TK.flatten(), minlength=4).double()
        load = 4 * counts / counts.sum()
        assert numbers["load"] == pytest.approx(load.tolist())
        assert numbers["dead"] == (load == 0).nonzero().flatten().tolist()
        assert (numbers["load_min"], numbers["load_max"]) == (load.min(), load.max())
        entropy = -(p_TE * p_TE.log()).sum(dim=1).mean() / math.log(4)
        assert numbers["entropy"] == pytest.approx(entropy.item(), rel=1e-5)
        ordered = p_TE.sort(dim=1, descending=True).values
        margin = (ordered[:, 0] - ordered[:, 1]).mean()
        assert numbers["margin"] == pytest.approx(margin.item(), rel=1e-5)
        balance = (load * p_TE.mean(dim=0)).sum()
        assert numbers["balance"] == pytest.approx(balance.item(), rel=1e-5)
        assert "agreement" not in numbers
    routed = list(report.sites.values())
    (line,) = lines(trainer)
    assert line["load_min"] == min(numbers["load_min"] for numbers in routed)
    assert line["load_max"] == max(numbers["load_max"] for numbers in routed)
    for name in ("entropy", "margin"):
        mean = sum(numbers[name] for numbers in routed) / len(routed)
        assert line[f"routing_{name}"] == pytest.approx(mean)
        assert 0.05 < mean < 0.95
    assert len({round(numbers["entropy"], 6) for numbers in routed}) == len(routed)


def test_losses_per_site_add_up_to_the_auxiliary_loss(tmp_path: Path) -> None:
    losses = (
        Loss(term=LoadBalance(), coefficient=0.5),
        Loss(term=RouterZ(), coefficient=0.1, reduction="sum"),
        Loss(term=LoadBalance(form="switch"), coefficient=0.2, scope="layer"),
    )
    trainer = sft(mixture_on(losses=losses), tmp_path, max_steps=4, logging_steps=2)
    for report in reports_of(trainer):
        totals, sites = report.totals, report.sites.values()
        per_site = {
            name: [numbers[name] for numbers in sites]
            for name in report.sites[QUERY]
            if name.startswith(("aux/", "weighted/"))
        }
        names = ("load_balance_0", "router_z", "load_balance_1")
        assert per_site.keys() == {f"{k}/{name}" for k in ("aux", "weighted") for name in names}
        balance, z = per_site["aux/load_balance_0"], per_site["aux/router_z"]
        assert sum(balance) / len(balance) == pytest.approx(totals["aux/load_balance_0"], rel=1e-5)
        assert sum(z) == pytest.approx(totals["aux/router_z"], rel=1e-5)
        # the third is pooled by layer, and each of the two layers has seven sites
        pooled = [sum(per_site[f"{kind}/load_balance_1"]) / 7 for kind in ("aux", "weighted")]
        assert pooled[0] / 2 == pytest.approx(totals["aux/load_balance_1"], rel=1e-5)
        own = (sum(per_site[f"weighted/{name}"]) for name in names[:2])
        assert sum(own) + pooled[1] == pytest.approx(totals["aux_loss"], rel=1e-5)
        assert pooled[1] > 0.1


def test_gradient_norms_are_those_of_the_last_step_before_clipping(tmp_path: Path) -> None:
    trainer = sft(mixture_on(), tmp_path, max_steps=2, logging_steps=2, max_grad_norm=0.01)
    measured: list[dict[str, float]] = []
    clip = trainer._clip_grad_norm

    def before_clipping(model: nn.Module) -> Any:
        roles = trainer.mixture.trainable_parameters().items()
        measured.append(
            {
                role: math.sqrt(sum(float(p.grad.double().square().sum()) for p in parameters))
                for role, parameters in roles
            }
        )
        return clip(model)

    trainer._clip_grad_norm = before_clipping
    (report,) = reports_of(trainer)
    (line,) = lines(trainer)
    assert line["expert_grad_norm"] == pytest.approx(measured[1]["experts"], rel=1e-5)
    assert line["router_grad_norm"] == pytest.approx(measured[1]["router"], rel=1e-5)
    assert measured[0]["router"] != pytest.approx(measured[1]["router"], rel=1e-3)
    whole = math.hypot(line["expert_grad_norm"], line["router_grad_norm"])
    assert whole == pytest.approx(line["grad_norm"], rel=1e-6)
    for role in ("router", "expert"):
        of_sites = [numbers[f"{role}_grad_norm"] for numbers in report.sites.values()]
        assert math.hypot(*of_sites) == pytest.approx(line[f"{role}_grad_norm"], rel=1e-6)


def test_a_mixture_without_routers_has_no_routing(tmp_path: Path) -> None:
    mixture = molora.attach(tiny("llama"), molora.presets.lora(rank=3))
    trainer = sft(mixture, tmp_path, max_steps=1)
    (report,) = reports_of(trainer)
    assert report.sites == {}
    (line,) = lines(trainer)
    assert "load_min" not in line
    assert line["expert_grad_norm"] == pytest.approx(line["grad_norm"])
    assert "router_grad_norm" not in line


# ---------------------------------------------------------------------- collapse, and alarms


def biased(mixture: molora.Mixture, expert: int, bias: float) -> molora.Mixture:
    """Every router prefers one expert, whatever it reads."""
    for site in mixture.built.sites.values():
        add = torch.zeros(4)
        add[expert] = bias
        site.router.register_forward_hook(lambda module, args, logits, add=add: logits + add)
    return mixture


def test_a_collapsed_router_is_reported_per_site_and_an_alarm_fires(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    top_1 = {"select": TopK(k=1, renormalize=False)}
    mixture = biased(mixture_on(group=top_1), 2, 100.0)
    trainer = sft(mixture, tmp_path, max_steps=4, keywords={"dead_steps": 3})
    with caplog.at_level(logging.WARNING, "molora"):
        reports = reports_of(trainer)
    for report in reports:
        for numbers in report.sites.values():
            assert numbers["load"] == [0, 0, 4, 0]
            assert numbers["dead"] == [0, 1, 3]
            assert numbers["entropy"] < 1e-3
            assert numbers["margin"] > 0.999
        assert report.totals["dead_experts"] == 3 * 14
    events = [[(a.site, a.event, a.experts) for a in report.alarms] for report in reports]
    sites = trainer.mixture.built.sites
    assert events[0] == events[1] == events[3] == []
    assert set(events[2]) == {
        told for site in sites for told in ((site, "collapsed", (2,)), (site, "dead", (0, 1, 3)))
    }
    first = f"step 3: {next(iter(sites))}: collapsed, expert 2 took 100% of the choices for 3 steps"
    assert caplog.messages[0] == first
    assert len(caplog.messages) == 9
    assert caplog.messages[8] == "step 3: and 20 more alarms, of other sites"


def test_a_balanced_router_is_reported_and_no_alarm_fires(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mixture = mixture_on()
    for site in mixture.built.sites.values():
        # any expert as often as another, whatever the model reads
        site.router.register_forward_hook(lambda module, args, logits: torch.randn_like(logits))
    trainer = sft(mixture, tmp_path, max_steps=12, logging_steps=6, keywords={"dead_steps": 6})
    with caplog.at_level(logging.WARNING, "molora"):
        reports = reports_of(trainer)
    for report in reports:
        assert report.alarms == ()
        assert report.totals["dead_experts"] == 0
        assert report.totals["load_min"] > 0.6
        assert report.totals["routing_entropy"] > 0.5
    assert caplog.messages == []


# ---------------------------------------------------------------------- waits


def test_a_line_of_metrics_waits_for_the_device_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = sft(
        mixture_on(),
        tmp_path,
        max_steps=6,
        logging_steps=3,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
    )
    between, reading = HostReads(), HostReads()
    observation = trainer.observation
    monkeypatch.setattr(RoutingStatistics, "update", between.counting(RoutingStatistics.update))
    observation.add_micro_batch = between.counting(observation.add_micro_batch)
    observation.measure_gradients = between.counting(observation.measure_gradients)
    observation.read = reading.counting(observation.read)
    assert len(reports_of(trainer)) == 2
    assert (between.copies, between.reads) == (0, [])
    # and once more for the tokens of the summary
    assert (reading.copies, reading.reads) == (3, [])


def test_waits_would_be_noticed() -> None:
    found = HostReads()
    x = torch.rand(4)
    with found:
        float(x.sum())
        x[x > 0.5]
        (x > 0).nonzero()
        x.cpu().tolist()
        _ = x.to("cpu")
    assert found.copies == 1
    assert found.reads == ["__float__", "__getitem__", "nonzero", "to"]


def test_tokens_of_packed_rows_are_those_of_their_segments() -> None:
    from molora.train.observation import _tokens

    segments = torch.tensor([[1, 1, 2, 0], [1, 2, 3, 3]])
    ids = torch.zeros_like(segments)
    assert _tokens({"input_ids": ids, "segment_ids": segments}, DEVICE) == 7
    assert _tokens({"input_ids": ids, "attention_mask": segments > 1}, DEVICE) == 4
    assert _tokens({"input_ids": ids}, DEVICE) == 8
    assert _tokens({}, DEVICE) == 0
