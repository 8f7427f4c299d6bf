"""What the router did, asked for with record() and statistics(); and nothing kept unless asked
(B-39)."""

import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
from tiny_models import batch_for, randomize, tiny
from torch import Tensor, nn

import molora
from molora.config import MixtureConfig

MOLA = molora.presets.mola(num_experts=3, rank=5, dropout=0.0)
MIXLORA = molora.presets.mixlora(num_experts=3, rank=5, dropout=0.0)
LAYER = MixtureConfig.parse(
    {"groups": [{"num_experts": 3, "rank": 5, "site": {"kind": "linear", "scope": "layer"}}]}
)
CONFIGS = [
    pytest.param(MOLA, id="linear"),
    pytest.param(LAYER, id="layer"),
    pytest.param(MIXLORA, id="ffn"),
]


@pytest.fixture
def model() -> nn.Module:
    return tiny("llama")


@pytest.fixture
def mixture(model: nn.Module) -> molora.Mixture:
    handle = molora.attach(model, MOLA)
    randomize(handle)
    return handle


def test_one_record_per_site_with_the_decision_that_was_used(
    model: nn.Module, mixture: molora.Mixture
) -> None:
    inputs: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if name in mixture.built.sites:
            module.register_forward_pre_hook(
                lambda _, args, name=name: inputs.update({name: args[0].flatten(0, 1)})
            )
    batch = batch_for(model)
    with mixture.record() as records:
        assert records == {}
        model(**batch)
    assert records.keys() == mixture.built.sites.keys() == inputs.keys()
    for site, record in records.items():
        router = mixture.built.sites[site].router
        torch.testing.assert_close(record.logits, inputs[site] @ router.weight.T)
        torch.testing.assert_close(record.scores, record.logits.softmax(dim=-1))
        best = record.scores.topk(2, dim=-1)
        assert torch.equal(record.expert_index, best.indices)
        torch.testing.assert_close(
            record.gates, best.values / best.values.sum(dim=-1, keepdim=True)
        )
        assert torch.equal(record.mask, batch["attention_mask"].bool().flatten())
        assert record.grid == (3, 7)
        assert len({frozenset(row.tolist()) for row in record.expert_index}) > 1


def test_the_configured_router_score_and_selector_are_the_ones_that_decide() -> None:
    model = tiny("llama")
    group = {
        "targets": "up_proj",
        "num_experts": 3,
        "rank": 5,
        "router": {"temperature": 0.25, "init": {"kind": "normal", "std": 0.3}},
        "score": {"kind": "sigmoid"},
        "select": {"kind": "threshold", "threshold": 0.6},
    }
    mixture = molora.attach(model, MixtureConfig.parse({"groups": [group]}))
    inputs: list[Tensor] = []
    layer = model.model.layers[0].mlp
    layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1)))
    assert 0.2 < layer.up_proj.router.weight.std() < 0.4
    with mixture.record() as records:
        model(**batch_for(model))
    record = records["model.layers.0.mlp.up_proj"]
    scores_TE = torch.sigmoid(inputs[0] @ layer.up_proj.router.weight.T / 0.25)
    torch.testing.assert_close(record.scores, scores_TE)
    acts_TE = (scores_TE > 0.6) | (scores_TE == scores_TE.max(dim=-1, keepdim=True).values)
    assert torch.equal(record.dense_gates() > 0, acts_TE)
    assert {1, 2} <= set(acts_TE.sum(dim=-1).tolist())


def test_records_are_detached_unless_asked(model: nn.Module, mixture: molora.Mixture) -> None:
    site = "model.layers.0.mlp.up_proj"
    with mixture.record() as records, mixture.record(detach=False) as live:
        model(**batch_for(model))
    assert not records[site].scores.requires_grad
    live[site].scores[:, 0].sum().backward()
    assert mixture.built.sites[site].router.weight.grad.abs().max() > 0


def test_several_forwards_make_lists_and_the_outer_record_sees_all(
    model: nn.Module, mixture: molora.Mixture
) -> None:
    site = "model.layers.1.self_attn.q_proj"
    with mixture.record() as outer:
        model(**batch_for(model, (3, 2)))
        with mixture.record() as inner:
            model(**batch_for(model, (4,)))
        model(**batch_for(model, (5,)))
    model(**batch_for(model))
    assert inner[site].grid == (1, 4)
    assert [record.grid for record in outer[site]] == [(2, 3), (1, 4), (1, 5)]
    with mixture.record() as generated:
        model.generate(batch_for(model, (4, 4))["input_ids"], max_new_tokens=3, eos_token_id=None)
    assert [record.grid for record in generated[site]] == [(2, 4), (2, 1), (2, 1)]


def test_statistics_count_what_the_records_hold(model: nn.Module, mixture: molora.Mixture) -> None:
    with mixture.statistics() as statistics, mixture.record() as records:
        for seed in range(3):
            model(**batch_for(model, seed=seed))
    loads = statistics.loads()
    assert loads.keys() == records.keys()
    for site, site_records in records.items():
        chosen = torch.cat([r.expert_index[r.mask].flatten() for r in site_records])
        counts = torch.bincount(chosen, minlength=3)
        assert counts.sum() == 3 * 16 * 2
        torch.testing.assert_close(loads[site], counts / counts.sum())


@pytest.mark.parametrize(
    ("config", "mode"),
    [
        pytest.param(MOLA, "eval", id="linear-eval"),
        pytest.param(MOLA, "no_grad", id="linear-no_grad"),
        pytest.param(MOLA, "train", id="linear-train"),
        pytest.param(LAYER, "train", id="layer-train"),
        pytest.param(MIXLORA, "train", id="ffn-train"),
    ],
)
def test_nothing_outlives_a_forward(config: MixtureConfig, mode: str) -> None:
    model = tiny("llama")
    mixture = molora.attach(model, config)
    randomize(mixture)
    model.train(mode == "train")
    batch = batch_for(model, (4, 3))

    def run() -> None:
        with torch.no_grad() if mode == "no_grad" else nullcontext():
            model(**batch)

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(o), (Tensor, molora.Routing)) for o in gc.get_objects())

    run()
    before = tensors()
    for _ in range(100):
        run()
    # caches of other tests may have gone meanwhile
    assert tensors() <= before

    kept = []
    for site in mixture.built.sites.values():
        decide = site.decide
        site.decide = lambda x, decide=decide, **made: (
            kept.append(weakref.ref(r := decide(x, **made))),
            r,
        )[1]
    run()
    assert len(kept) == len(mixture.built.sites)
    assert all(reference() is None for reference in kept)
    before = tensors()
    # the negative control: what record() yields is kept, for as long as it is held
    with mixture.record(detach=False) as records:
        run()
    assert tensors() > before
    del records
    assert tensors() <= before


@pytest.mark.parametrize("config", CONFIGS)
def test_a_forward_that_fails_leaves_nothing_open(config: MixtureConfig) -> None:
    model = tiny("llama")
    mixture = molora.attach(model, config)
    randomize(mixture)
    model.train()
    batch = batch_for(model)
    expected = model(**batch)
    fault = model.model.layers[1].self_attn.o_proj.register_forward_hook(_fail)
    with mixture.record() as records:
        with pytest.raises(RuntimeError, match="a fault in the second layer"):
            model(**batch)
        fault.remove()
        assert records == {}
        assert molora.checkpoint_context()[1].__class__ is nullcontext
        again = model(**batch)
    assert all(isinstance(record, molora.Routing) for record in records.values())
    assert torch.equal(again.loss, expected.loss)
    assert mixture._context.trace is None
    assert mixture._context.decisions == {}
    assert mixture._context.side.masks == {}


def test_an_error_in_the_hook_itself_leaves_nothing_open(
    model: nn.Module, mixture: molora.Mixture
) -> None:
    model.train()
    batch = batch_for(model)
    expected = model(**batch).aux_loss
    for wrong, message in (
        ({"attention_mask": torch.ones(3, 1, 7, 7)}, "is a 4-D tensor"),
        ({"fused_lm_head": True}, "fused LM head"),
    ):
        with pytest.raises(molora.AttachError, match=message):
            model(**batch | wrong)
        assert mixture._context.trace is None
        assert molora.checkpoint_context()[1].__class__ is nullcontext
    assert torch.equal(model(**batch).aux_loss, expected)


def _fail(*arguments: object) -> None:
    raise RuntimeError("a fault in the second layer")
