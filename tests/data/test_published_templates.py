"""The chat templates that model families publish, as the installed trl carries them: what each
supervises, and which ones no mask can be made for. And templates that mean harm."""

from __future__ import annotations

import re
from functools import cache
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from molora.data import IGNORED, Encoded, Row, RowEncoder
from molora.errors import DataError

IM, EOT, TURN, END = "<|im_end|>", "<|eot_id|>", "<turn|>", "<|end|>"
EMPTY_THOUGHT = "<think>\n\n</think>\n\n"

# family → what the model writes before an answer, and the end of turn behind it
SUPERVISED = {
    "cohere": ("", "<|END_OF_TURN_TOKEN|>"),
    "cohere2": ("", "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"),
    "gemma": ("", "<end_of_turn>"),
    "gemma3": ("", "<end_of_turn>"),
    "gemma4": ("", TURN),
    "gemma4_v5": ("", TURN),
    # what is said in the final channel, and the token that ends the whole answer
    "gptoss": ("<|channel|>final<|message|>", "<|return|>"),
    "lfm2": ("", IM),
    "lfm2_2_5": ("", IM),
    "llama3": ("", EOT),
    "llama3_1": ("", EOT),
    "llama3_2": ("", EOT),
    "phi3": ("", END),
    "phi3_5": ("", END),
    "qwen2_5": ("", IM),
    "qwen3": (EMPTY_THOUGHT, IM),
    "qwen3_5_nothink": ("", IM),
    # their prompt opens the thought, so the answer begins inside of it
    "qwen3_5_think": ("\n</think>\n\n", IM),
    "qwen3_8": ("\n</think>\n\n", IM),
    "qwen3_instruct_2507": ("", IM),
    "qwen3_vl": ("", IM),
}
REFUSED = {
    # their prompt opens a thought that their finished conversation does not have
    "deepseek_r1_distill": r"prompt for an answer ends with .*<think>.*chat_template: none",
    "deepseekv3": r"prompt for an answer ends with .*<think>.*chat_template: none",
    "nemotron_3_nano": r"prompt for an answer ends with .*<think>.*chat_template: none",
    # the next turn's first token is its end of turn, and a last turn has none
    "glm4moe": r"ends the assistant's turn with '', .*would not learn to stop",
    # they read lists of parts, and make nothing of a string
    "idefics3": r"leaves out the text of messages: it makes '.*' of the answer 'molora'",
    "smolvlm": r"leaves out the text of messages",
    "llava_next": r"refuses this conversation: 'str object' has no attribute",
}
CONVERSATION = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": 'Paris, "la ville lumière": it is.'},
    {"role": "user", "content": "And of Peru?"},
    {"role": "assistant", "content": "Lima.\n\nA user might ask for more."},
]
ANSWERS = [turn["content"] for turn in CONVERSATION if turn["role"] == "assistant"]
# tokens of their own in all these vocabularies: between bars, or with a name of this kind
SPECIAL = re.compile(
    r"<[|｜][^<>\s'\"]{1,40}?[|｜]>|<[a-z_]+[|]>|<[|][a-z_]+>|<[a-z]+_of_[a-z]+>|</?think>"
)


def templates() -> Path:
    spec = find_spec("trl")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "chat_templates"


@cache
def tokenizer_of(family: str, core: Any) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with the template and its special tokens. The end of turn is the
    padding token too, so that a mask by token id would hide it."""
    template = (templates() / f"{family}.jinja").read_text(encoding="utf-8")
    stop = SUPERVISED.get(family, ("", "<|pad|>"))[1].replace("><", "> <").split()[-1]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="<|my_eos|>", pad_token=stop
    )
    fast.add_tokens(sorted(set(SPECIAL.findall(template))), special_tokens=True)
    fast.chat_template = template
    return fast


def runs(example: Encoded, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    grouped = groupby(example.labels, key=lambda label: label != IGNORED)
    return [tokenizer.decode(list(labels)) for has_loss, labels in grouped if has_loss]


def encoded(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, Any]]) -> list[Encoded]:
    return RowEncoder(tokenizer, max_length=4096)(Row(where="row 1", messages=messages))


@pytest.fixture(scope="module")
def core(tokenizer_with: Any) -> Any:
    return tokenizer_with(None, "</s>").backend_tokenizer


def test_most_published_templates_are_looked_at():
    present = {path.stem for path in templates().glob("*.jinja")}
    assert {*SUPERVISED, *REFUSED} <= present
    assert len(SUPERVISED) >= 20


@pytest.mark.parametrize("family", SUPERVISED)
def test_supervised_text_is_the_answers_with_their_end_of_turn(family, core):
    tokenizer = tokenizer_of(family, core)
    before, stop = SUPERVISED[family]

    examples = encoded(tokenizer, CONVERSATION)

    found = [run for example in examples for run in runs(example, tokenizer)]
    assert found == [before + answer + stop for answer in ANSWERS]
    assert all(example.supervised < len(example.input_ids) for example in examples)
    # the end of turn is supervised although it is the padding token
    last = [label for example in examples for label in example.labels if label != IGNORED][-1]
    assert last == tokenizer.pad_token_id == RowEncoder(tokenizer).stop_id
    # the control: with another answer, another text is supervised
    other = [*CONVERSATION[:-1], {"role": "assistant", "content": "Cusco."}]
    assert runs(encoded(tokenizer, other)[-1], tokenizer)[-1] == f"{before}Cusco.{stop}"


@pytest.mark.parametrize("family", SUPERVISED)
def test_an_answer_follows_the_prompt_of_inference(family, core):
    tokenizer = tokenizer_of(family, core)
    last = encoded(tokenizer, CONVERSATION)[-1]
    prompt = RowEncoder(tokenizer).prompt(CONVERSATION[:-1])
    assert last.input_ids[: len(prompt)] == prompt
    assert last.labels[len(prompt)] != IGNORED
    assert last.labels[len(prompt) - 1] == IGNORED


@pytest.mark.parametrize("family", REFUSED)
def test_template_that_no_mask_can_be_made_for_is_refused(family, core):
    with pytest.raises(DataError, match="(?s)" + REFUSED[family]):
        encoded(tokenizer_of(family, core), CONVERSATION)


# ---- templates are code from strangers ----

HARMLESS = "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch MARK') }}",
        "{{ lipsum.__globals__['os'].popen('touch MARK').read() }}",
        "{{ raise_exception.__globals__['__builtins__']['open']('MARK', 'w') }}",
        "{{ (messages|attr('__class__')).__mro__ }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ messages.append(messages[0]) }}",
        "{{ messages[0].update({'content': 'x'}) }}",
    ],
)
def test_template_that_reaches_for_python_is_refused(attack, tokenizer_with, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    template = attack.replace("MARK", str(tmp_path / "mark")) + HARMLESS
    with pytest.raises(DataError, match=r"tries what a template may not do: .*unsafe.*: none\."):
        RowEncoder(tokenizer_with(template, "</s>"))
    assert list(tmp_path.iterdir()) == []
    assert RowEncoder(tokenizer_with(HARMLESS, "</s>")).stop_id is not None


@pytest.mark.parametrize(
    ("attack", "reason"),
    [
        ("{% for i in range(10 ** 12) %}x{% endfor %}", "Range too big"),
        ("{% include '/etc/hostname' %}", "no loader"),
        ("{% import 'os' as os %}", "no loader"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ undefined_function() }}", "is undefined"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{% if %}", "Expected an expression"),
    ],
)
def test_template_that_fails_is_refused_with_its_reason(attack, reason, tokenizer_with):
    with pytest.raises(DataError, match=rf"refuses this conversation: .*{reason}"):
        RowEncoder(tokenizer_with(attack + HARMLESS, "</s>"))
