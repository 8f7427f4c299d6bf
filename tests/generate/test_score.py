"""Scores of choices: what full forwards say, row by row, whatever is padded or shared."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from chat_models import END, chat_model, chat_tokenizer
from tiny_models import randomize

import molora
from molora.data import Row
from molora.errors import DataError
from molora.generate import completion_loss, score_choices

ROWS = [
    Row(where="row 1", prompt="Is this spam?", completion="no", choices=("no", "yes", "not sure")),
    Row(where="row 2", prompt="Hi", completion="b", choices=("b", "a")),
    Row(where="row 3", prompt="Where is the river?", completion="y", choices=("x", "xy", "xyz")),
    Row(where="row 4", prompt="1", completion="\n2", choices=("\n\n2", "\n2", " 2", "2")),
]
# the sliding window of two of these families is 8 tokens: shorter than any prefix
MODELS = ["llama", "mistral", "gemma3", "gpt2", "qwen3_moe"]


def adapted(family: str) -> tuple[Any, molora.Mixture]:
    model = chat_model(family)
    config = molora.presets.mola(num_experts=3, rank=2, dropout=0.5, targets="attention")
    mixture = molora.attach(model, config)
    randomize(mixture)
    return model, mixture


@pytest.fixture(scope="module")
def models() -> Callable[[str], tuple[Any, molora.Mixture]]:
    made: dict[str, tuple[Any, molora.Mixture]] = {}

    def get(family: str) -> tuple[Any, molora.Mixture]:
        if family not in made:
            made[family] = adapted(family)
        return made[family]

    return get


def token_scores(model: Any, prompt_ids: list[int], answer_ids: list[int]) -> torch.Tensor:
    """log p of every answer token: one forward of the whole text, nothing padded or cached."""
    ids = torch.tensor([[*prompt_ids, *answer_ids]])
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[0].double()
    rows = logits.log_softmax(-1)[len(prompt_ids) - 1 : -1]
    return rows.gather(1, torch.tensor(answer_ids)[:, None])[:, 0]


def expected(model: Any, row: Row, choice: str, *, template: bool = True) -> float:
    tokenizer = chat_tokenizer()
    text, end = str(row.prompt), tokenizer.eos_token
    if template:
        text, end = f"<|im_start|>user\n{text}{END}\n<|im_start|>assistant\n", END
    scores = token_scores(model, tokenizer(text).input_ids, tokenizer(choice + end).input_ids)
    return scores.sum().item()


def flat(scores: list[tuple[float, ...]]) -> torch.Tensor:
    return torch.tensor([value for row in scores for value in row], dtype=torch.float64)


@pytest.mark.parametrize("batch_size", [1, 3, 4])
@pytest.mark.parametrize("family", MODELS)
def test_scores_are_those_of_full_forwards(
    models: Callable[..., Any], family: str, batch_size: int
) -> None:
    model, mixture = models(family)
    scores = score_choices(model, chat_tokenizer(), ROWS, batch_size=batch_size)
    assert [len(row) for row in scores] == [3, 2, 3, 4]
    reference = [
        tuple(expected(model, row, choice) for choice in row.choices or ()) for row in ROWS
    ]
    torch.testing.assert_close(flat(scores), flat(reference), rtol=0, atol=1e-4)
    with mixture.disabled():
        base = score_choices(model, chat_tokenizer(), ROWS, batch_size=batch_size)
    difference = (flat(base) - flat(scores)).abs()
    assert difference.min() > 1e-3
    assert difference.max() > 0.1


def test_scores_without_a_template_are_of_the_text_as_it_stands(models: Callable[..., Any]) -> None:
    model, _ = models("llama")
    # a prompt of one token leaves nothing to share, and in a batch its row is all padding
    rows = [replace(ROWS[0], prompt="a"), ROWS[1], ROWS[2]]
    for batch_size in (1, 3):
        scores = score_choices(
            model, chat_tokenizer(), rows, chat_template="none", batch_size=batch_size
        )
        reference = [
            tuple(expected(model, row, choice, template=False) for choice in row.choices or ())
            for row in rows
        ]
        torch.testing.assert_close(flat(scores), flat(reference), rtol=0, atol=1e-4)


def test_only_the_last_answer_of_a_conversation_is_scored(models: Callable[..., Any]) -> None:
    model, _ = models("llama")
    tokenizer = chat_tokenizer()
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "So long"},
    ]
    row = Row(where="row", messages=messages, choices=("So long", "Ciao"))
    prompt = tokenizer.apply_chat_template(messages[:3], tokenize=False, add_generation_prompt=True)
    reference = [
        token_scores(model, tokenizer(prompt).input_ids, tokenizer(choice + END).input_ids).sum()
        for choice in ("So long", "Ciao")
    ]
    (scores,) = score_choices(model, tokenizer, [row])
    torch.testing.assert_close(torch.tensor(scores), torch.stack(reference).float())


def test_the_end_of_turn_counts(models: Callable[..., Any]) -> None:
    # without it, "x" could never be less likely than "xy", which begins with it
    model, _ = models("llama")
    tokenizer = chat_tokenizer()
    (scores,) = score_choices(model, tokenizer, ROWS[2:3])
    prompt = tokenizer("<|im_start|>user\nWhere is the river?<|im_end|>\n<|im_start|>assistant\n")
    without = token_scores(model, prompt.input_ids, tokenizer("x").input_ids).sum().item()
    assert without - scores[0] > 0.1


def test_the_prompt_is_run_once_for_all_choices(
    models: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = models("llama")
    shapes: list[tuple[int, ...]] = []
    forward = type(model).forward

    def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
        shapes.append(tuple(kwargs["input_ids"].shape))
        return forward(self, *args, **kwargs)

    spy.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    monkeypatch.setattr(type(model), "forward", spy)
    score_choices(model, chat_tokenizer(), ROWS[:1])
    text = f"<|im_start|>user\nIs this spam?{END}\n<|im_start|>assistant\n"
    length = len(chat_tokenizer()(text).input_ids)
    # the last token of the prompt predicts the first of every choice; the stop token predicts none
    assert shapes == [(1, length - 1), (3, 1 + len("not sure"))]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_completion_loss_is_the_models_own_loss(
    models: Callable[..., Any], batch_size: int
) -> None:
    model, mixture = models("llama")
    nll, tokens = completion_loss(model, chat_tokenizer(), ROWS, batch_size=batch_size)
    reference = -sum(expected(model, row, str(row.completion)) for row in ROWS)
    assert tokens == sum(len(str(row.completion)) + 1 for row in ROWS)
    assert nll == pytest.approx(reference, abs=1e-4)
    with mixture.disabled():
        base, _ = completion_loss(model, chat_tokenizer(), ROWS, batch_size=batch_size)
    assert abs(base - nll) > 1e-2


def test_scoring_is_in_evaluation_mode_and_without_gradient(models: Callable[..., Any]) -> None:
    model, _ = models("llama")
    before = score_choices(model, chat_tokenizer(), ROWS)
    model.train()
    try:
        assert score_choices(model, chat_tokenizer(), ROWS) == before
        assert completion_loss(model, chat_tokenizer(), ROWS)[0] > 0
        assert all(module.training for module in model.modules())
        assert all(parameter.grad is None for parameter in model.parameters())
    finally:
        model.eval()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (Row(where="row 7", prompt="a", completion="b"), "row 7: there are no `choices`"),
        (Row(where="row 7", text="a", choices=("a", "b")), "row 7: .*not `text`"),
        (Row(where="row 7", prompt="", choices=("a", "b")), "row 7: nothing stands before"),
    ],
)
def test_a_row_that_cannot_be_scored_is_named(
    models: Callable[..., Any], row: Row, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        score_choices(models("llama")[0], chat_tokenizer(), [row], chat_template="none")
