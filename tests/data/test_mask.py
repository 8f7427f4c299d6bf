"""What is supervised: the answers and their stop tokens, for every style of chat template."""

from __future__ import annotations

from copy import deepcopy
from itertools import groupby
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from molora.data import IGNORED, Encoded, Row, RowEncoder
from molora.errors import DataError


def turns(*contents: str) -> list[dict[str, Any]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


def row(**fields: Any) -> Row:
    return Row(where="train.jsonl, line 7", **fields)


def supervised(example: Encoded, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The text of each run of tokens that have a label."""
    runs = groupby(example.labels, key=lambda label: label != IGNORED)
    return [tokenizer.decode(list(labels)) for has_loss, labels in runs if has_loss]


def retokenised(text: str, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# "<" and "[" would spell control tokens, which no template can tell from its own
contents = st.text(
    st.characters(codec="utf-8", exclude_characters="<[▁"), min_size=1, max_size=30
).filter(lambda text: text.strip() != "")


@settings(max_examples=25, deadline=None)
@given(conversation=st.lists(st.tuples(contents, contents), min_size=1, max_size=3))
def test_supervised_text_is_the_answers_with_their_stop_tokens(family, conversation):
    tokenizer = family.tokenizer
    messages = turns(*(text for pair in conversation for text in pair))

    (example,) = RowEncoder(tokenizer, max_length=4096)(row(messages=messages))

    answers = [answer.strip() if family.trims else answer for _, answer in conversation]
    # jinja gives an answer the space that Mistral's template puts before it
    found = [
        text.removeprefix(" ") if "[INST]" in family.template else text
        for text in supervised(example, tokenizer)
    ]
    assert found == [answer + family.stop for answer in answers]
    assert IGNORED in example.labels
    assert all(
        label in (IGNORED, token)
        for label, token in zip(example.labels, example.input_ids, strict=True)
    )


def test_an_answer_follows_exactly_the_prompt_of_inference(family):
    tokenizer = family.tokenizer
    messages = turns("What is the capital of France?", "Paris.", "And of Peru?", "\n\nLima.")

    (example,) = RowEncoder(tokenizer)(row(messages=messages))

    starts = [
        i
        for i in range(1, len(example.labels))
        if example.labels[i] != IGNORED and example.labels[i - 1] == IGNORED
    ]
    for start, asked in zip(starts, (messages[:1], messages[:3]), strict=True):
        text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        assert example.input_ids[:start] == retokenised(text, tokenizer)


def test_prompt_of_generation_is_what_stands_before_each_answer_in_training(family):
    encoder = RowEncoder(family.tokenizer)
    # the second answer begins with line breaks that a tokeniser would join with the prompt's own
    messages = turns("What is the capital of France?", "Paris.", "And of Peru?", "\n\nLima.")

    (example,) = encoder(row(messages=messages))

    starts = [
        i
        for i in range(1, len(example.labels))
        if example.labels[i] != IGNORED and example.labels[i - 1] == IGNORED
    ]
    assert encoder.prompt("What is the capital of France?") == example.input_ids[: starts[0]]
    assert encoder.prompt(messages[:3]) == example.input_ids[: starts[1]]
    assert example.labels[-1] == encoder.stop_id or encoder.stop_id in example.labels
    assert encoder.prompt("What is the capital of Peru?") != example.input_ids[: starts[0]]


def test_prompt_keeps_apart_what_training_keeps_apart(smollm2_tokenizer):
    encoder = RowEncoder(smollm2_tokenizer)
    messages = turns("Hi", "\n\n\nHello", "Bye", "See you")

    (example,) = encoder(row(messages=messages))

    prompt = encoder.prompt(messages[:3])
    assert example.input_ids[: len(prompt)] == prompt
    # the premise: rendered and tokenised as a whole, the first answer begins with another token
    text = smollm2_tokenizer.decode(prompt)
    assert retokenised(text, smollm2_tokenizer) != prompt


@pytest.mark.parametrize("prompt", ["Two and two? ", "a</s>"])
def test_prompt_without_a_template_is_the_text_as_it_stands(plain_tokenizer, prompt):
    encoder = RowEncoder(plain_tokenizer)
    (example,) = encoder(row(prompt=prompt, completion="Four."))
    start = next(i for i, label in enumerate(example.labels) if label != IGNORED)
    assert encoder.prompt(prompt) == example.input_ids[:start]
    assert encoder.stop_id == plain_tokenizer.eos_token_id
    with pytest.raises(DataError, match="need a chat template"):
        encoder.prompt(turns(prompt))


def test_prompt_and_completion_are_a_user_turn_and_an_assistant_turn(family):
    encoder = RowEncoder(family.tokenizer)
    pair = encoder(row(prompt="Two and two?", completion="Four."))
    assert pair == encoder(row(messages=turns("Two and two?", "Four.")))
    assert pair != encoder(row(messages=turns("Two and two?", "Five.")))


def test_stop_token_is_supervised_although_it_is_the_padding_token(family):
    tokenizer = family.tokenizer
    (example,) = RowEncoder(tokenizer)(row(prompt="Hi", completion="Hello"))
    last = max(i for i, label in enumerate(example.labels) if label != IGNORED)
    assert example.labels[last] == tokenizer.pad_token_id
    masked_by_id = [label for label in example.labels if label != tokenizer.pad_token_id]
    assert tokenizer.decode([i for i in masked_by_id if i != IGNORED]).strip() == "Hello"


def test_eos_inside_a_completion_is_supervised_although_it_is_the_padding_token(plain_tokenizer):
    (example,) = RowEncoder(plain_tokenizer)(row(prompt="a", completion="b</s>c"))
    assert plain_tokenizer.pad_token_id == plain_tokenizer.eos_token_id
    assert supervised(example, plain_tokenizer) == ["b</s>c</s>"]


def test_thinking_that_a_template_strips_gives_one_example_per_answer(qwen3_tokenizer):
    messages = turns("a", "<think>\nhm\n</think>\n\none", "b", "two")

    first, second = RowEncoder(qwen3_tokenizer)(row(messages=messages))

    assert supervised(first, qwen3_tokenizer) == ["<think>\nhm\n</think>\n\none<|im_end|>"]
    assert supervised(second, qwen3_tokenizer) == ["<think>\n\n</think>\n\ntwo<|im_end|>"]
    prompt = RowEncoder(qwen3_tokenizer).prompt(messages[:3])
    assert second.input_ids[: len(prompt)] == prompt
    before, _, _ = qwen3_tokenizer.decode(second.input_ids).partition("two")
    assert "hm" not in before
    assert "one<|im_end|>" in before


def test_system_prompt_of_the_template_is_context_without_loss(smollm2_tokenizer):
    (example,) = RowEncoder(smollm2_tokenizer)(row(prompt="Hi", completion="Hello"))
    assert "You are a helpful assistant." in smollm2_tokenizer.decode(example.input_ids)
    assert supervised(example, smollm2_tokenizer) == ["Hello<|im_end|>"]


def test_line_breaks_that_would_join_prompt_and_answer_stay_apart(smollm2_tokenizer):
    tokenizer = smollm2_tokenizer
    answer = "\n\n\nHello"
    (example,) = RowEncoder(tokenizer)(row(prompt="Hi", completion=answer))
    text = tokenizer.decode(example.input_ids)
    # the premise: tokenised as a whole, a token reaches from "assistant\n" into the answer
    assert retokenised(text, tokenizer) != example.input_ids
    assert supervised(example, tokenizer) == [answer + "<|im_end|>"]


def test_chat_template_none_joins_prompt_and_completion(smollm2_tokenizer):
    tokenizer = smollm2_tokenizer
    encoder = RowEncoder(tokenizer, chat_template="none")
    (example,) = encoder(row(prompt="Two and two? ", completion="Four."))
    assert tokenizer.decode(example.input_ids) == "Two and two? Four.<|im_end|>"
    assert supervised(example, tokenizer) == ["Four.<|im_end|>"]


def test_text_is_supervised_from_first_to_last_with_one_eos(plain_tokenizer):
    encoder = RowEncoder(plain_tokenizer)
    (example,) = encoder(row(text="Once upon a time"))
    assert example.labels == example.input_ids
    assert plain_tokenizer.decode(example.labels) == "Once upon a time</s>"
    assert encoder(row(text="Once upon a time</s>")) == [example]


def test_bos_of_the_tokenizer_is_there_and_has_no_loss(plain_tokenizer):
    with_bos = deepcopy(plain_tokenizer)
    with_bos.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", plain_tokenizer.bos_token_id)]
    )
    (example,) = RowEncoder(with_bos)(row(text="Once"))
    assert example.input_ids[0] == with_bos.bos_token_id
    assert example.labels[0] == IGNORED
    assert example.labels[1:] == example.input_ids[1:]


def test_max_length_cuts_the_end_and_says_so(plain_tokenizer):
    whole = RowEncoder(plain_tokenizer)(row(prompt="capital: ", completion="of France is Paris"))[0]
    encoder = RowEncoder(plain_tokenizer, max_length=len(whole.input_ids) - 1)
    (cut,) = encoder(row(prompt="capital: ", completion="of France is Paris"))
    assert not whole.truncated
    assert cut == Encoded(whole.input_ids[:-1], whole.labels[:-1], length=whole.length)
    assert cut.truncated
    (nothing,) = RowEncoder(plain_tokenizer, max_length=2)(
        row(prompt="Hello there", completion="x")
    )
    assert nothing.supervised == 0


def test_token_behind_the_last_turn_only_is_not_what_ends_a_turn(tokenizer_with):
    turn = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    prompt = "{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}"
    tokenizer = tokenizer_with(turn + prompt, "<|endoftext|>")
    (example,) = RowEncoder(tokenizer)(row(messages=turns("a", "b", "c", "d")))
    assert supervised(example, tokenizer) == ["b<|end|>", "d<|end|>"]
    assert example.input_ids[-1] == tokenizer.eos_token_id
    # the control: behind every turn it is
    always = turn.replace("<|end|>", "<|end|>{{ eos_token }}")
    begins = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    tokenizer = tokenizer_with(always + begins, "<|endoftext|>")
    (example,) = RowEncoder(tokenizer)(row(messages=turns("a", "b", "c", "d")))
    both = "<|end|><|endoftext|>"
    assert supervised(example, tokenizer) == [f"b{both}", f"d{both}"]


def test_template_without_a_stop_token_is_refused(tokenizer_with):
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    with pytest.raises(DataError, match=r"ends the assistant's turn with '\\n'.*never|not learn"):
        RowEncoder(tokenizer_with(template, "</s>"))


def test_template_whose_prompt_is_not_how_answers_begin_is_refused(tokenizer_with):
    template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>think: {% endif %}"
    )
    encoder = RowEncoder(tokenizer_with(template, "</s>"))
    with pytest.raises(DataError, match=r"line 7: .*'.*think: '.*chat_template: none"):
        encoder(row(prompt="Hi", completion="Hello"))


def test_template_that_stops_only_some_turns_is_refused(tokenizer_with):
    template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
        "{% if 'no' not in m['content'] %}</s>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    encoder = RowEncoder(tokenizer_with(template, "</s>"))
    assert encoder(row(prompt="Hi", completion="yes"))[0].supervised > 1
    with pytest.raises(DataError, match=r"line 7: .*not with the stop token '</s>'"):
        encoder(row(prompt="Hi", completion="no"))


def test_refusal_of_the_template_names_the_row(gemma_tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, *turns("Hi", "Hello")]
    encoder = RowEncoder(gemma_tokenizer)
    with pytest.raises(DataError, match=r"line 7: .*refuses.*System role not supported"):
        encoder(row(messages=messages))


def test_messages_without_a_template_are_refused(plain_tokenizer):
    with pytest.raises(DataError, match=r"line 7: `messages` need a chat template"):
        RowEncoder(plain_tokenizer)(row(messages=turns("a", "b")))


def test_row_without_content_is_refused(plain_tokenizer):
    with pytest.raises(DataError, match=r"line 7: a row has messages, prompt with completion"):
        RowEncoder(plain_tokenizer)(row(prompt="only"))


def test_row_without_a_supervised_token_is_refused(plain_tokenizer):
    # its only label would be the eos, which is what the prompt ends with already
    with pytest.raises(DataError, match=r"line 7: no token of the row would be supervised"):
        RowEncoder(plain_tokenizer)(row(prompt="a</s>", completion=""))


def test_token_that_cannot_be_split_between_prompt_and_answer_is_refused(tokenizer_with):
    encoder = RowEncoder(tokenizer_with(None, "</s>", "metaspace"))
    assert encoder(row(prompt="x", completion=" a"))[0].supervised == 2
    with pytest.raises(DataError, match=r"line 7: .*reaches from the prompt into the answer"):
        encoder(row(prompt="x ", completion="a"))


def test_tokenizer_without_eos_is_refused(tokenizer_with):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer_with(None, "</s>").backend_tokenizer
    )
    with pytest.raises(DataError, match="no eos token"):
        RowEncoder(tokenizer)
