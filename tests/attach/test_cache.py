"""Generation with a KV cache is the training forward (B-7)."""

from typing import Any

import pytest
import torch
from tiny_models import batch_for, randomize, sequences, tiny
from torch import Tensor, nn

import molora
from molora.config import MixtureConfig

LINEAR = molora.presets.mola(num_experts=3, rank=5)
FFN = molora.presets.mixlora(num_experts=3, rank=5)
SOFT = molora.presets.molora(num_experts=3, rank=5)


def scoped(scope: str) -> MixtureConfig:
    group = {"num_experts": 3, "rank": 5, "site": {"kind": "linear", "scope": scope}}
    return MixtureConfig.parse({"groups": [group]})


CASES = [
    pytest.param("llama", LINEAR, id="llama-linear"),
    pytest.param("llama", SOFT, id="llama-soft"),
    pytest.param("llama", scoped("block"), id="llama-block"),
    pytest.param("llama", scoped("layer"), id="llama-layer"),
    pytest.param("llama", FFN, id="llama-ffn"),
    pytest.param("phi3", scoped("block"), id="phi3-block"),
    pytest.param("gpt2", FFN, id="gpt2-ffn"),
    pytest.param("gemma3", LINEAR, id="gemma3-linear"),  # sliding window of 8
    pytest.param("mixtral", LINEAR, id="mixtral-linear"),
]


def adapted(family: str, config: MixtureConfig) -> tuple[nn.Module, molora.Mixture]:
    model = tiny(family)
    mixture = molora.attach(model, config)
    randomize(mixture)
    return model, mixture


def as_list(records: dict[str, Any]) -> dict[str, list[molora.Routing]]:
    return {site: r if isinstance(r, list) else [r] for site, r in records.items()}


def rows_of(values: list[Tensor], batch: int) -> Tensor:
    """The rows of several forwards, (batch · steps, …) each, as (batch, positions, …)."""
    return torch.cat([v.view(batch, -1, *v.shape[1:]) for v in values], dim=1)


@pytest.mark.parametrize(("family", "config"), CASES)
@torch.no_grad()
def test_step_by_step_with_a_cache_equals_one_forward(family: str, config: MixtureConfig) -> None:
    model, mixture = adapted(family, config)
    batch = batch_for(model, (12, 7, 9), side="left", labels=False)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
    with mixture.record() as whole_records:
        whole = model(ids, attention_mask=mask, position_ids=positions).logits

    steps, cache = [], None
    with mixture.record() as step_records:
        for start, end in [(0, 4), *((t, t + 1) for t in range(4, 12))]:
            out = model(
                ids[:, start:end],
                attention_mask=mask[:, :end],
                position_ids=positions[:, start:end],
                past_key_values=cache,
                use_cache=True,
            )
            steps.append(out.logits)
            cache = out.past_key_values
    stepwise = torch.cat(steps, dim=1)
    valid = mask.bool()
    assert (stepwise - whole)[valid].abs().max() < 1e-5
    for site, pieces in as_list(step_records).items():
        (record,) = as_list(whole_records)[site]
        stepwise_index = rows_of([piece.expert_index for piece in pieces], 3)
        assert torch.equal(stepwise_index[valid], record.expert_index.view(3, 12, -1)[valid])
        # under a cache, too, the mask of a record is that of its rows
        assert torch.equal(rows_of([piece.mask for piece in pieces], 3), valid)

    with mixture.disabled():
        base = model(ids, attention_mask=mask, position_ids=positions).logits
    assert (whole - base)[valid].abs().max() > 1e-2
    if config is not SOFT:
        chosen = next(iter(as_list(whole_records).values()))[0].expert_index
        assert len({frozenset(row.tolist()) for row in chosen}) > 1


@pytest.mark.parametrize(("family", "config"), [*CASES, pytest.param("t5", LINEAR, id="t5")])
@pytest.mark.parametrize("num_beams", [1, 3], ids=["greedy", "beams"])
def test_a_padded_batch_writes_what_each_row_writes_alone(
    family: str, config: MixtureConfig, num_beams: int
) -> None:
    model, mixture = adapted(family, config)
    lengths = (7, 3, 5)
    settings = {
        "max_new_tokens": 5,
        "min_new_tokens": 5,
        "num_beams": num_beams,
        "do_sample": False,
    }
    batch = batch_for(model, lengths, side="right" if family == "t5" else "left")
    prompt = {name: batch[name] for name in ("input_ids", "attention_mask")}
    together = model.generate(**prompt, **settings)[:, -5:]
    for row, written in zip(sequences(lengths), together, strict=True):
        alone = model.generate(row[None], attention_mask=torch.ones_like(row)[None], **settings)
        assert torch.equal(alone[0, -5:], written)
    assert len({tuple(row.tolist()) for row in together}) > 1
    with mixture.disabled():
        assert not torch.equal(model.generate(**prompt, **settings)[:, -5:], together)


@torch.no_grad()
def test_greedy_generation_continues_with_the_argmax_of_the_forward() -> None:
    model, _ = adapted("llama", scoped("layer"))
    (prompt,) = sequences((4,))
    written = model.generate(prompt[None], max_new_tokens=8, do_sample=False, eos_token_id=None)
    teacher = model(written).logits.argmax(dim=-1)
    assert torch.equal(teacher[0, 3:-1], written[0, 4:])
    assert not torch.equal(tiny("llama")(written).logits.argmax(dim=-1)[0, 3:-1], written[0, 4:])
