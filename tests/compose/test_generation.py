"""Gates that follow the text while it is written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from chat_models import chat_model, chat_tokenizer
from peft_adapters import save_adapter
from torch import Tensor, nn

import molora
from molora.compose.generation import gates_by_text
from molora.errors import AttachError, DataError

PROMPTS = ["write a function", "tell me a longer story of it"]


@pytest.fixture(scope="module")
def composed(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, molora.Mixture]:
    root = tmp_path_factory.mktemp("generation")
    for number, name in enumerate(("a", "b")):
        save_adapter(root / name, seed=number + 1, target_modules=["q_proj", "down_proj"])
    model = chat_model().eval()
    experts = molora.load_experts({name: root / name for name in ("a", "b")})
    return model, molora.compose(model, experts, router="given")


def by_length(texts: Sequence[str]) -> Tensor:
    """Gates that change with every character."""
    return torch.tensor([[len(text) % 7 / 3, len(text) % 5 / 4] for text in texts])


def encoded(prompts: Sequence[str]) -> dict[str, Tensor]:
    tokenizer = chat_tokenizer()
    tokenizer.padding_side = "left"
    found: dict[str, Tensor] = tokenizer(list(prompts), return_tensors="pt", padding=True)
    return found


OPTIONS = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


@pytest.mark.parametrize("every", [None, 1, 2])
def test_generate_equals_a_loop_with_the_gates_of_each_token(
    every: int | None, composed: tuple[nn.Module, molora.Mixture]
) -> None:
    model, mixture = composed
    tokenizer, inputs = chat_tokenizer(), encoded(PROMPTS)
    with gates_by_text(mixture, by_length, PROMPTS, tokenizer=tokenizer, every=every) as criteria:
        found = model.generate(**inputs, stopping_criteria=criteria, **OPTIONS)
    assert found.shape[1] == inputs["input_ids"].shape[1] + 6

    ids, mask, cache, gates = (
        inputs["input_ids"],
        inputs["attention_mask"],
        None,
        by_length(PROMPTS),
    )
    seen = []
    for step in range(6):
        with torch.no_grad():
            output = model(
                input_ids=ids if cache is None else ids[:, -1:],
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
                expert_gates=gates,
            )
        cache = output.past_key_values
        logits = output.logits[:, -1]
        logits[:, tokenizer.eos_token_id] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
        mask = torch.cat([mask, mask[:, :1] * 0 + 1], dim=1)
        if every is not None and (step + 1) % every == 0:
            gates = by_length(tokenizer.batch_decode(ids, skip_special_tokens=True))
        seen.append(gates)
    assert torch.equal(found, ids)
    assert (every is None) == all(torch.equal(g, seen[0]) for g in seen)


def test_the_gates_change_what_is_written(composed: tuple[nn.Module, molora.Mixture]) -> None:
    model, mixture = composed
    inputs, written = encoded(PROMPTS), []
    for sign in (1.0, -3.0):
        with gates_by_text(mixture, lambda texts, s=sign: s * by_length(texts), PROMPTS):
            written.append(model.generate(**inputs, **OPTIONS))
    assert not torch.equal(*written)
    with pytest.raises(AttachError, match="gates come with the batch"):
        model.generate(**inputs, **OPTIONS)  # outside, there are none


def test_what_cannot_be_is_refused(
    composed: tuple[nn.Module, molora.Mixture], tmp_path: Path
) -> None:
    model, mixture = composed
    with (
        pytest.raises(AttachError, match="give the model's tokenizer"),
        gates_by_text(mixture, by_length, PROMPTS, every=1),
    ):
        pass
    with (
        pytest.raises(AttachError, match=r"have the shape \(2, 3\)"),
        gates_by_text(mixture, lambda texts: torch.ones(len(texts), 3), PROMPTS),
    ):
        pass
    with (
        gates_by_text(mixture, by_length, PROMPTS, tokenizer=chat_tokenizer(), every=1) as criteria,
        pytest.raises(DataError, match=r"\d texts follow on 2"),
    ):
        model.generate(**encoded(PROMPTS), stopping_criteria=criteria, num_beams=2, **OPTIONS)
    save_adapter(tmp_path / "a")
    other = molora.compose(
        chat_model(), molora.load_experts({"a": tmp_path / "a"}), router="uniform"
    )
    with (
        pytest.raises(AttachError, match=r"method 'uniform'\) decides by itself"),
        gates_by_text(other, by_length, PROMPTS),
    ):
        pass
