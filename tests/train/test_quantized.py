"""Trainers on a base that bitsandbytes quantised, on its CPU path."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import transformers
from tiny_models import batch_for, tiny
from tiny_trainers import dataset, mixture_on, sft
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, FbgemmFp8Config, LlamaForCausalLM
from transformers.quantizers.quantizer_fbgemm_fp8 import FbgemmFp8HfQuantizer

import molora
from molora.data import Collator
from molora.train import Trainer

BITS = {
    "4bit": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "8bit": BitsAndBytesConfig(load_in_8bit=True),
}
Make = Callable[[], nn.Module]


@pytest.fixture(params=BITS, ids=str)
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    """Reads one quantised base again and again."""
    tiny("llama").save_pretrained(tmp_path / "base")

    def read() -> nn.Module:
        model: nn.Module = LlamaForCausalLM.from_pretrained(
            tmp_path / "base",
            quantization_config=BITS[request.param],
            dtype=torch.float32,
            device_map={"": "cpu"},
        )
        for module in model.modules():
            if isinstance(module, bnb.nn.Linear4bit):
                # on some CPUs evaluation repacks the weights for good
                module.support_avx512bf16_for_cpu = False
        return model

    return read


def hf(mixture: molora.Mixture, directory: Path) -> Trainer:
    options = transformers.TrainingArguments(
        str(directory),
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    return Trainer(
        mixture.model,
        options,
        mixture=mixture,
        train_dataset=dataset(),
        data_collator=Collator(pad_token_id=2),
    )


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model.eval()(**batch_for(model)).logits
    return found


def losses(trainer: Any) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("trainer_of", [sft, hf], ids=["trl", "molora"])
def test_it_trains_as_by_hand_and_only_the_mixture(
    make: Make, trainer_of: Callable[..., Any], tmp_path: Path
) -> None:
    model = make()
    packed = {n: p.detach().clone() for n, p in model.named_parameters()}
    described = dict(vars(model))
    mixture = mixture_on(model)
    before = {name: value.clone() for name, value in mixture.state_dict().items()}
    trainer = trainer_of(mixture, tmp_path / "out")
    for name in ("_hf_peft_config_loaded", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        assert vars(model).get(name) == described.get(name)
    trainer.train()

    assert {value.dtype for value in mixture.state_dict().values()} == {torch.float32}
    assert all((v - before[n]).abs().max() > 1e-4 for n, v in mixture.state_dict().items())
    assert all(torch.equal(dict(model.named_parameters())[n], value) for n, value in packed.items())

    by_hand = mixture_on(make())
    model = by_hand.model.train()
    optimiser = torch.optim.AdamW(by_hand.parameter_groups(1e-2))
    order = [
        int(row)
        for row in torch.utils.data.RandomSampler(
            dataset(), generator=torch.Generator().manual_seed(42)
        )
    ]
    found = []
    for start in (0, 4):
        loss = model(**Collator(2)([dataset()[i] for i in order[start : start + 4]])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        found.append(loss.item())
    assert losses(trainer) == pytest.approx(found, rel=1e-4)


def test_it_is_saved_loaded_and_resumed(make: Make, tmp_path: Path) -> None:
    out = tmp_path / "out"
    straight = sft(mixture_on(make()), out, save_strategy="steps", save_steps=1)
    straight.train()
    straight.save_model()
    fresh = make()
    base = logits(fresh)
    molora.load(fresh, out / "adapter")
    assert torch.equal(logits(fresh), logits(straight.model))
    assert (logits(fresh) - base).abs().max() > 1e-2

    again = sft(mixture_on(make()), out, save_strategy="steps", save_steps=1)
    # as if the last checkpoint had never been written
    (out / "checkpoint-2" / "checkpoint.json").unlink()
    again.train(resume_from_checkpoint=True)
    expected = straight.mixture.state_dict()
    assert all(torch.equal(v, expected[n]) for n, v in again.mixture.state_dict().items())


def test_a_kind_that_cannot_be_trained_through_is_refused(tmp_path: Path) -> None:
    model = tiny("llama")
    model.is_quantized = True
    model.hf_quantizer = FbgemmFp8HfQuantizer(FbgemmFp8Config())
    with pytest.raises(molora.ConfigError, match="quantised by fbgemm_fp8, through which"):
        sft(mixture_on(model), tmp_path)
