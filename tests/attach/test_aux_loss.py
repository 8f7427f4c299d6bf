"""How auxiliary losses enter the training loss: once, by share of tokens, and nowhere else."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from tiny_models import batch_for, randomize, tiny
from torch import Tensor, nn

import molora
from molora.config import LoadBalance, Loss, MixtureConfig
from molora.presets import mola

BALANCE = Loss(term=LoadBalance(), coefficient=1.0)
CONFIG = mola(num_experts=3, rank=5, dropout=0.0, losses=(BALANCE,))


def adapted(
    family: str = "llama", config: MixtureConfig = CONFIG, **settings: Any
) -> tuple[nn.Module, molora.Mixture, dict[str, Tensor]]:
    """A model in training mode with experts that do something, and a ragged batch."""
    model = tiny(family, **settings)
    if "moe" not in family and family != "mixtral":  # their fused experts have no float64
        model = model.double()
    batch = batch_for(model)
    mixture = molora.attach(model, config)
    randomize(mixture)
    return model.train(), mixture, batch


def balance(logits_TE: Tensor, valid_T: Tensor) -> Tensor:
    """E Σ f P over the rows that count, top-2: written out for the test."""
    scores_TE = logits_TE[valid_T].softmax(dim=-1)
    top_T2 = scores_TE.topk(2).indices
    f_E = torch.stack([(top_T2 == e).sum() for e in range(3)]) / top_T2.numel()
    return 3 * (f_E * scores_TE.mean(dim=0)).sum()


def test_training_loss_holds_the_mean_over_sites_of_the_balance_of_unpadded_tokens() -> None:
    model, mixture, batch = adapted()
    with mixture.deferred_aux():
        alone = model(**batch)
    with mixture.record() as records:
        out = model(**batch)
    valid_T = batch["attention_mask"].bool().flatten()
    expected = torch.stack([balance(r.logits, valid_T) for r in records.values()]).mean()
    torch.testing.assert_close(out.aux_loss, expected)
    torch.testing.assert_close(out.loss, alone.loss + out.aux_loss)
    everywhere = torch.ones_like(valid_T)
    padded = torch.stack([balance(r.logits, everywhere) for r in records.values()]).mean()
    assert (padded - expected).abs() > 1e-3

    out.aux_loss.backward()
    assert all(site.router.weight.grad.abs().max() > 0 for site in mixture.built.sites.values())


@pytest.mark.parametrize(
    ("prepare", "context"),
    [
        pytest.param(nn.Module.eval, nullcontext, id="eval"),
        pytest.param(nn.Module.train, torch.no_grad, id="no_grad"),
    ],
)
def test_outside_of_training_there_is_none(
    prepare: Callable[[nn.Module], Any], context: Callable[[], Any]
) -> None:
    model, mixture, batch = adapted()
    prepare(model)
    with context():
        with mixture.record() as records:
            out = model(**batch)
        with mixture.disabled():
            base = model(**batch)
    assert len(records) == 14
    assert out.aux_loss is None
    assert base.aux_loss is None
    torch.testing.assert_close(out.loss, _cross_entropy(out.logits, batch["labels"]))


def test_without_labels_there_is_an_aux_loss_and_no_loss() -> None:
    model, _, batch = adapted()
    with_labels = model(**batch)
    del batch["labels"]
    out = model(**batch)
    assert out.loss is None
    torch.testing.assert_close(out.aux_loss, with_labels.aux_loss)


def test_a_tuple_output_holds_it_in_its_loss() -> None:
    model, mixture, batch = adapted()
    out = model(**batch)
    loss, logits, *_ = model(**batch, return_dict=False)
    torch.testing.assert_close(loss, out.loss)
    with mixture.deferred_aux():
        alone, *_ = model(**batch, return_dict=False)
    assert (loss - alone).abs() > 1e-2
    del batch["labels"]
    assert torch.equal(model(**batch, return_dict=False)[0], logits)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_moe_base_keeps_its_own_aux_loss(family: str) -> None:
    model, mixture, batch = adapted(family, router_aux_loss_coef=0.5)
    with mixture.disabled():
        base_alone = model(**batch, output_router_logits=True)
    out = model(**batch, output_router_logits=True)
    torch.testing.assert_close(
        out.loss,
        _cross_entropy(out.logits, batch["labels"]) + 0.5 * out.aux_loss + out.molora_aux_loss,
        check_dtype=False,
    )
    assert out.molora_aux_loss > 0.5
    assert base_alone.molora_aux_loss is None
    model.eval()
    assert model(**batch).molora_aux_loss is None


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_eight_rows_at_once_and_four_times_two_have_the_same_gradient(family: str) -> None:
    model, mixture, batch = adapted(family)
    row = {name: value[:1] for name, value in batch.items()}
    row["labels"][:, 0] = row["input_ids"][:, 0]
    # as transformers' Trainer counts: GPT-2's first label too
    first = 0 if family == "gpt2" else 1
    total = 8 * int((row["labels"][:, first:] != -100).sum())

    def gradients(rows: int, **arguments: Any) -> dict[str, Tensor]:
        model.zero_grad()
        for _ in range(8 // rows):
            micro_batch = {name: value.expand(rows, -1) for name, value in row.items()}
            model(**micro_batch, **arguments).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    at_once = gradients(8, num_items_in_batch=total)
    accumulated = gradients(2, num_items_in_batch=torch.tensor(total))
    for name, gradient in at_once.items():
        torch.testing.assert_close(accumulated[name], gradient, rtol=1e-6, atol=1e-7)
    assert at_once.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    # a batch that is all there is has a share of 1
    whole = {name: value.expand(8, -1) for name, value in row.items()}
    shared = model(**whole, num_items_in_batch=total).aux_loss
    torch.testing.assert_close(shared, model(**whole).aux_loss)
    # the negative control: without the count, four losses add up
    router = next(name for name in at_once if "router" in name)
    assert not torch.allclose(gradients(2)[router], at_once[router], rtol=1e-2)
    with mixture.deferred_aux():
        without_aux = gradients(8, num_items_in_batch=total)
    assert not torch.allclose(without_aux[router], at_once[router], rtol=1e-2)


def test_deferred_losses_go_to_the_caller_weighted_by_the_share_of_tokens() -> None:
    model, mixture, batch = adapted()
    whole = model(**batch).aux_loss
    supervised = int((batch["labels"][:, 1:] != -100).sum())
    with mixture.deferred_aux() as deferred:
        for _ in range(2):
            out = model(**batch)
            torch.testing.assert_close(out.loss, _cross_entropy(out.logits, batch["labels"]))
    assert len(deferred.forwards) == 2
    torch.testing.assert_close(deferred.weighted(None), 2 * whole)
    torch.testing.assert_close(deferred.weighted(2 * supervised), whole)
    torch.testing.assert_close(deferred.weighted(torch.tensor(8 * supervised)), whole / 4)
    deferred.weighted(None).backward()
    assert all(site.router.weight.grad.abs().max() > 0 for site in mixture.built.sites.values())
    torch.testing.assert_close(model(**batch).aux_loss, whole)


def test_a_fused_lm_head_without_our_trainer_is_refused() -> None:
    model, mixture, batch = adapted()
    with pytest.raises(molora.AttachError, match=r"fused LM head.*molora\.train\.SFTTrainer"):
        model(**batch, fused_lm_head=True)
    with mixture.deferred_aux() as deferred:
        model(**batch, fused_lm_head=True)
    assert len(deferred.forwards) == 1


class TestTaskTypes:
    """LoRAMoE's balance loss reads a column of the batch (decisions 24)."""

    config = molora.presets.loramoe(num_experts=4, rank=3, dropout=0.0)
    types = torch.tensor([0, 1, 1])

    def test_training_without_them_is_an_error_that_names_the_column(self) -> None:
        model, _, batch = adapted(config=self.config)
        with pytest.raises(molora.AttachError, match=r"needs the column 'task_types'.*losses=\(\)"):
            model(**batch)

    def test_as_an_argument_and_as_a_context_they_are_the_same(self) -> None:
        model, mixture, batch = adapted(config=self.config)
        by_argument = model(**batch, task_types=self.types).aux_loss
        with mixture.context(task_types=1 - self.types):
            other = model(**batch).aux_loss
            with mixture.context(task_types=self.types):
                by_context = model(**batch).aux_loss
            assert torch.equal(model(**batch).aux_loss, other)
        assert torch.equal(by_argument, by_context)
        assert (by_argument - other).abs() > 1e-4
        with mixture.disabled():  # the base does not know the argument
            model(**batch, task_types=self.types)

    def test_evaluation_and_generation_do_without(self) -> None:
        model, _, batch = adapted(config=self.config)
        model.eval()
        assert model(**batch).aux_loss is None
        assert model.generate(batch["input_ids"][:1], max_new_tokens=2).shape == (1, 9)

    def test_one_value_per_sequence_is_needed(self) -> None:
        model, _, batch = adapted(config=self.config)
        with pytest.raises(molora.ConfigError, match=r"task_types has shape \(2,\).*\(3,\)"):
            model(**batch, task_types=self.types[:2])

    def test_an_unknown_column_is_an_error(self) -> None:
        _, mixture, _ = adapted()
        with (
            pytest.raises(molora.AttachError, match=r"unknown side input 'task_type'.*task_types"),
            mixture.context(task_type=self.types),
        ):
            pass


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    )
