"""Generation: as training renders, as single prompts, as without a cache, and it stops."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from chat_models import chat_model, chat_tokenizer
from tiny_models import randomize

import molora
from molora.data import Row, RowEncoder
from molora.errors import ConfigError, DataError
from molora.generate import Loaded, generate_texts

PROMPTS = ["Hi", "What is the capital of France?", "1 2 3", "Once upon a time there"]


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    model = chat_model()
    config = molora.presets.mola(num_experts=3, rank=2, dropout=0.5)
    mixture = molora.attach(model, config)
    randomize(mixture)
    return Loaded(model, chat_tokenizer(), mixture)


@pytest.fixture(autouse=True)
def _default_generation_config(loaded: Loaded) -> Iterator[None]:
    before = loaded.model.generation_config.to_dict()
    yield
    loaded.model.generation_config.update(**before)


def prompt_ids(loaded: Loaded, prompt: str) -> torch.Tensor:
    return loaded.tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )["input_ids"]


def greedy_without_cache(loaded: Loaded, prompt: str, steps: int) -> list[int]:
    ids = prompt_ids(loaded, prompt)
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(steps):
            best = loaded.model(ids, use_cache=False).logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, best], dim=1)
    return ids[0, start:].tolist()


def make_stop_after(loaded: Loaded, prompt: str, token: str, steps: int) -> str:
    """Change the head so that greedy decoding writes `token` after `steps` others; those's text."""
    written = greedy_without_cache(loaded, prompt, steps)
    ids = torch.cat([prompt_ids(loaded, prompt), torch.tensor([written])], dim=1)
    with torch.no_grad():
        out = loaded.model(ids, output_hidden_states=True)
        hidden_SD = out.hidden_states[-1][0, -steps - 1 :]
        wanted_S = torch.tensor([-50.0] * steps + [500.0])
        row = torch.linalg.lstsq(hidden_SD, wanted_S[:, None]).solution[:, 0]
        loaded.model.lm_head.weight[loaded.tokenizer.convert_tokens_to_ids(token)] = row
    return loaded.tokenizer.decode(written)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_text_is_greedy_decoding_step_by_step_without_a_cache(loaded: Loaded, prompt: str) -> None:
    (text,) = generate_texts(loaded, [prompt], max_new_tokens=12)
    expected = greedy_without_cache(loaded, prompt, 12)
    assert text == loaded.tokenizer.decode(expected, skip_special_tokens=True)
    with loaded.mixture.disabled():
        assert generate_texts(loaded, [prompt], max_new_tokens=12) != [text]


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("batch_size", [2, 4])
def test_prompts_of_a_batch_are_continued_as_they_are_alone(
    loaded: Loaded, num_beams: int, batch_size: int
) -> None:
    settings = {"max_new_tokens": 10, "num_beams": num_beams}
    together = generate_texts(loaded, PROMPTS, batch_size=batch_size, **settings)
    alone = [generate_texts(loaded, [prompt], **settings)[0] for prompt in PROMPTS]
    assert together == alone
    assert len(set(together)) == len(PROMPTS)


def test_padding_that_is_attended_to_changes_the_text(loaded: Loaded) -> None:
    # the control of the test above: it would pass empty if padding did nothing
    (text,) = generate_texts(loaded, PROMPTS[:1], max_new_tokens=10)
    ids = prompt_ids(loaded, PROMPTS[0])
    ids = torch.cat([torch.full((1, 9), loaded.tokenizer.pad_token_id), ids], dim=1)
    out = loaded.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False
    )
    assert loaded.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True) != text


def test_prompt_is_what_stood_before_the_answer_in_training(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = Row(where="row", prompt=PROMPTS[1], completion="Paris.")
    (example,) = RowEncoder(loaded.tokenizer)(row)
    start = next(i for i, label in enumerate(example.labels) if label != -100)
    seen: list[Any] = []
    forward = type(loaded.model).generate

    def spy(self: Any, ids: torch.Tensor, **kwargs: Any) -> Any:
        seen.append(ids.tolist())
        return forward(self, ids, **kwargs)

    monkeypatch.setattr(type(loaded.model), "generate", spy)
    generate_texts(loaded, [PROMPTS[1]], max_new_tokens=1)
    generate_texts(loaded, [PROMPTS[1]], max_new_tokens=1, chat_template="none")
    assert seen[0] == [example.input_ids[:start]]
    assert seen[1] == [loaded.tokenizer(PROMPTS[1]).input_ids]


def test_text_ends_at_the_end_of_turn() -> None:
    own = Loaded(chat_model(), chat_tokenizer(), None)  # type: ignore[arg-type]
    without = generate_texts(own, PROMPTS[:1], max_new_tokens=9)
    expected = make_stop_after(own, PROMPTS[0], "<|im_end|>", steps=4)
    assert own.model.generation_config.eos_token_id == own.tokenizer.convert_tokens_to_ids("</s>")
    assert generate_texts(own, PROMPTS[:1], max_new_tokens=9) == [expected]
    # in a batch the row goes on as padding while the others are written
    batch = generate_texts(own, PROMPTS[:2], max_new_tokens=9)
    assert batch[0] == expected
    assert len(batch[1]) > len(expected)
    assert without != [expected]


@pytest.mark.parametrize("several", [False, True], ids=["one id", "a list"])
def test_text_ends_at_the_stop_tokens_of_the_generation_config(
    loaded: Loaded, several: bool
) -> None:
    written = greedy_without_cache(loaded, PROMPTS[1], 9)
    stop = next(token for token in written[3:] if token not in written[:3])
    end = written.index(stop)
    loaded.model.generation_config.eos_token_id = [0, stop] if several else stop
    expected = loaded.tokenizer.decode([t for t in written[:end] if t != 0])
    assert generate_texts(loaded, [PROMPTS[1]], max_new_tokens=9) == [expected]


def test_sampling_is_repeatable_and_leaves_the_callers_random_state(loaded: Loaded) -> None:
    settings = {"max_new_tokens": 10, "temperature": 0.9, "top_p": 0.95}
    state = torch.get_rng_state()
    first = generate_texts(loaded, PROMPTS, seed=1, **settings)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    assert generate_texts(loaded, PROMPTS, seed=1, **settings) == first
    assert generate_texts(loaded, PROMPTS, seed=2, **settings) != first
    assert generate_texts(loaded, PROMPTS, max_new_tokens=10) != first


def test_a_tiny_top_p_or_temperature_is_greedy(loaded: Loaded) -> None:
    greedy = generate_texts(loaded, PROMPTS, max_new_tokens=8)
    for settings in ({"temperature": 1.0, "top_p": 1e-6}, {"temperature": 1e-5}):
        assert generate_texts(loaded, PROMPTS, max_new_tokens=8, **settings) == greedy
    assert generate_texts(loaded, PROMPTS, max_new_tokens=8, temperature=1.0) != greedy


def test_defaults_of_the_base_model_do_not_turn_sampling_on(loaded: Loaded) -> None:
    greedy = generate_texts(loaded, PROMPTS, max_new_tokens=8)
    loaded.model.generation_config.update(do_sample=True, temperature=2.0, top_p=0.5, num_beams=2)
    assert generate_texts(loaded, PROMPTS, max_new_tokens=8) == greedy


def test_text_can_be_followed_while_it_is_written(loaded: Loaded) -> None:
    pieces: list[str] = []
    texts = generate_texts(loaded, PROMPTS[:1], max_new_tokens=12, on_text=pieces.append)
    assert "".join(pieces) == texts[0]
    assert len(pieces) > 3
    with pytest.raises(ConfigError, match=r"one prompt without beams, not 4 prompts"):
        generate_texts(loaded, PROMPTS, on_text=pieces.append)


def test_stream_holds_back_half_a_character() -> None:
    from molora.generate.text import TokenStream

    tokenizer, pieces = chat_tokenizer(), []
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    stream = TokenStream(tokenizer, [stop], pieces.append)
    stream.put(torch.tensor([[1, 2, 3]]))
    for token in [*tokenizer("aé!").input_ids, stop]:
        stream.put(torch.tensor([token]))
    stream.end()
    assert pieces == ["a", "é", "!"]


def test_conversation_is_continued(loaded: Loaded) -> None:
    conversation = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
    ]
    text = generate_texts(loaded, [conversation, "Bye"], max_new_tokens=8)
    assert generate_texts(loaded, [conversation], max_new_tokens=8) == text[:1]
    assert text[0] != text[1]


def test_generation_leaves_a_model_in_training_mode_there(loaded: Loaded) -> None:
    in_evaluation = generate_texts(loaded, PROMPTS, max_new_tokens=8)
    loaded.model.train()
    try:
        # with its dropout of 0.5 the mixture would write something else
        assert generate_texts(loaded, PROMPTS, max_new_tokens=8) == in_evaluation
        assert all(module.training for module in loaded.model.modules())
    finally:
        loaded.model.eval()


@pytest.mark.parametrize(
    ("prompts", "settings", "error", "message"),
    [
        ([], {}, DataError, "no prompt to continue"),
        (["a", " \n"], {"max_new_tokens": 9}, DataError, "prompt 2 is empty"),
        (["a" * 250], {"max_new_tokens": 9}, DataError, r"exceeds the 256 positions.*max_new_to"),
        (["a"], {"max_new_tokens": 0}, ConfigError, r"max_new_tokens.*greater than 0"),
        (["a"], {"temperature": -1.0}, ConfigError, "temperature"),
        (["a"], {"top_p": 1.5}, ConfigError, "top_p"),
        (["a"], {"num_beams": 0}, ConfigError, "num_beams"),
        ([[{"role": "user", "content": "a"}]], {"chat_template": "none"}, DataError, "chat templ"),
    ],
)
def test_what_cannot_be_generated_is_refused(
    loaded: Loaded, prompts: list[Any], settings: dict[str, Any], error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        generate_texts(loaded, prompts, **settings)
