"""`molora generate` and `molora chat`."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chat_models import save_chat_model

from molora.generate import generate_texts, load_for_generation


def test_one_prompt_gives_its_continuation_alone(molora: Callable[..., Any], adapter: Path) -> None:
    outcome = molora("generate", "--adapter", adapter, "--prompt", "Hi", "--max-new-tokens", 9)
    expected = generate_texts(load_for_generation(adapter), ["Hi"], max_new_tokens=9)
    assert (outcome.code, outcome.out) == (0, f"{expected[0]}\n")
    assert outcome.err == ""


def test_several_prompts_stand_before_their_continuations(
    molora: Callable[..., Any], adapter: Path
) -> None:
    options = ["--max-new-tokens", 9, "--temperature", 0.8, "--top-p", 0.9, "--seed", 3]
    outcome = molora("generate", "--adapter", adapter, *options, "--prompt", "a", "--prompt", "b")
    first, second = generate_texts(
        load_for_generation(adapter),
        ["a", "b"],
        max_new_tokens=9,
        temperature=0.8,
        top_p=0.9,
        seed=3,
    )
    assert (outcome.code, outcome.out) == (0, f"> a\n{first}\n> b\n{second}\n")


def test_beams_dtype_and_template_are_passed_on(molora: Callable[..., Any], adapter: Path) -> None:
    arguments = ["generate", "--adapter", adapter, "--prompt", "Hello there", "--max-new-tokens", 9]
    plain = molora(*arguments).out
    for options in (
        ["--num-beams", 4],
        ["--chat-template", "none"],
        ["--temperature", 1.5],
    ):
        outcome = molora(*arguments, *options)
        assert outcome.code == 0
        assert outcome.out != plain
    assert molora(*arguments, "--dtype", "float32").out == plain


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--adapter", "{base}"], "has no molora.json"),
        (["--adapter", "{base}/nowhere"], "is not a directory"),
        (["--adapter", "{adapter}", "--model", "{other}"], "other values"),
        (["--adapter", "{adapter}", "--model", "{adapter}"], "cannot be loaded"),
        (["--adapter", "{adapter}", "--dtype", "bf16"], "unknown dtype 'bf16'"),
        (["--adapter", "{adapter}", "--chat-template", "off"], "unknown chat template 'off'"),
        (["--adapter", "{adapter}", "--temperature", "-1"], "temperature"),
        (["--adapter", "{adapter}", "--max-new-tokens", "999"], "exceeds the 256 positions"),
        (["--adapter", "{adapter}", "--prompt", " ", "--max-new-tokens", "9"], "prompt 2 is empty"),
    ],
)
def test_a_users_error_is_exit_code_2_and_one_message(
    molora: Callable[..., Any],
    base: Path,
    adapter: Path,
    tmp_path: Path,
    options: list[str],
    message: str,
) -> None:
    other = save_chat_model(tmp_path / "other", seed=9) if "{other}" in options else None
    filled = [text.format(base=base, adapter=adapter, other=other) for text in options]
    outcome = molora("generate", "--prompt", "Hi", *filled)
    assert outcome.code == 2
    assert outcome.out == ""
    assert message in outcome.err
    assert outcome.err.count("Error") == 1


def test_a_base_that_is_no_directory_here_is_asked_for(
    molora: Callable[..., Any], base: Path, adapter: Path, tmp_path: Path
) -> None:
    moved = shutil.copytree(base, tmp_path / "moved")
    away = base.rename(base.parent / "away")
    try:
        outcome = molora("generate", "--adapter", adapter, "--prompt", "Hi")
        assert outcome.code == 2
        assert f"was trained on '{base}'" in outcome.err
        assert "--model" in outcome.err
        arguments = ["generate", "--adapter", adapter, "--prompt", "Hi", "--max-new-tokens", 3]
        assert molora(*arguments, "--model", moved).code == 0
    finally:
        away.rename(base)


def chat(
    molora: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, adapter: Path, *lines: str
) -> list[str]:
    """The answers to some lines."""
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    outcome = molora("chat", "--adapter", adapter, "--max-new-tokens", 7)
    assert outcome.code == 0, outcome.err
    return outcome.out.removesuffix("> \n").split("> ")[1:]


def test_chat_answers_in_the_context_of_what_was_said(
    molora: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, adapter: Path
) -> None:
    loaded = load_for_generation(adapter)
    messages: list[dict[str, str]] = []
    expected = []
    for line in ("Hi", "Bye"):
        messages.append({"role": "user", "content": line})
        (answer,) = generate_texts(loaded, [messages], max_new_tokens=7)
        messages.append({"role": "assistant", "content": answer})
        expected.append(f"{answer}\n")
    assert chat(molora, monkeypatch, adapter, "Hi", "", "Bye") == [expected[0], "", expected[1]]
    # /new forgets the first turn
    answers = chat(molora, monkeypatch, adapter, "Hi", "/new", "Bye")
    (alone,) = generate_texts(loaded, ["Bye"], max_new_tokens=7)
    assert answers == [expected[0], "", f"{alone}\n"]
    assert alone != expected[1].strip()


def test_chat_goes_on_after_a_turn_that_cannot_be_answered(
    molora: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, adapter: Path
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"Hi\n{'a' * 300}\nBye\n"))
    outcome = molora("chat", "--adapter", adapter, "--max-new-tokens", 7)
    assert outcome.code == 0
    assert outcome.err.count("Error: prompt 1 has") == 1
    assert len(outcome.out.split("> ")) == 5


def test_chat_with_a_system_message_and_settings(
    molora: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, adapter: Path
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n"))
    options = ["--system", "Be brief.", "--max-new-tokens", 7, "--temperature", 0.7, "--seed", 4]
    outcome = molora("chat", "--adapter", adapter, *options)
    conversation = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
    ]
    (expected,) = generate_texts(
        load_for_generation(adapter), [conversation], max_new_tokens=7, temperature=0.7, seed=4
    )
    assert outcome.out == f"> {expected}\n> \n"


def test_an_interrupt_while_chatting_is_exit_code_130(
    molora: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, adapter: Path
) -> None:
    def interrupted(prompt: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    assert molora("chat", "--adapter", adapter).code == 130
