"""ZeRO-3 lays all that is trained into one tensor, and fails without a word on two dtypes."""

import pytest
import torch
from tiny_models import tiny

import molora
from molora.train.refusals import check_one_dtype


@pytest.fixture
def mixture() -> molora.Mixture:
    config = molora.presets.mola(num_experts=3, rank=4, train_modules=["lm_head"])
    return molora.attach(tiny("llama").bfloat16(), config)


def test_a_trained_head_of_another_dtype_is_refused(mixture: molora.Mixture) -> None:
    with pytest.raises(
        molora.ConfigError, match=r"lora_A is torch\.float32 and lm_head\.weight is"
    ):
        check_one_dtype(mixture, 3)


@pytest.mark.parametrize("stage", [None, 0, 1, 2])
def test_other_stages_keep_a_tensor_per_group(mixture: molora.Mixture, stage: int | None) -> None:
    check_one_dtype(mixture, stage)
    assert all(len({p.dtype for p in g["params"]}) == 1 for g in mixture.parameter_groups(1.0))


def test_what_is_not_trained_does_not_count(mixture: molora.Mixture) -> None:
    mixture.freeze("other")
    check_one_dtype(mixture, 3)


def test_a_base_in_the_mixtures_dtype_has_one() -> None:
    config = molora.presets.mola(num_experts=3, rank=4, train_modules=["lm_head"])
    check_one_dtype(molora.attach(tiny("llama"), config), 3)
    half = config.model_copy(update={"dtype": "bfloat16"})
    mixture = molora.attach(tiny("llama").bfloat16(), half)
    check_one_dtype(mixture, 3)
    assert {p.dtype for _, p in mixture.named_parameters()} == {torch.bfloat16}
