"""Every command and code block of the pages that a newcomer reads works as printed."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from chat_models import save_chat_model
from markdown_runner import blocks_of, commands_of, run_page

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", "CONTRIBUTING.md"]
# Named on a page → replaced by a random model of the same architecture, much smaller.
LARGE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def run_sample(markdown: str, molora: Callable[[list[str]], int] = lambda _: 0) -> list[str]:
    return run_page(markdown, root=ROOT, molora=molora, stand_ins={})


class Recorder:
    """A stand-in for the command: keeps its arguments and succeeds."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def __call__(self, arguments: list[str]) -> int:
        self.calls.append(arguments)
        return 0


def fenced(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```\n"


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like a fresh clone, entered: links to the repository's folders, configs copied."""
    for folder in ("benchmarks", "docs", "examples"):
        if (ROOT / folder).is_dir():
            (tmp_path / folder).symlink_to(ROOT / folder)
    for config in ROOT.glob("configs/**/*.*"):
        copy = tmp_path / config.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(config.read_text("utf-8").replace(LARGE_MODEL, "small-model"), "utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def molora_command(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], int]:
    """The console script's function, called in this process as the shell would call it."""

    def run(arguments: list[str]) -> int:
        from molora.cli import main

        monkeypatch.setattr(sys, "argv", ["molora", *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
        try:
            code = main()
        except SystemExit as stop:
            code = stop.code
        return code if isinstance(code, int) else int(code is not None)

    return run


@pytest.mark.parametrize("name", PAGES)
def test_page_runs_as_printed(
    name: str, reader: Path, molora_command: Callable[[list[str]], int]
) -> None:
    page = (ROOT / name).read_text(encoding="utf-8")
    if LARGE_MODEL in page or "molora train" in page:
        save_chat_model(reader / "small-model", num_hidden_layers=4)
    stand_ins = {LARGE_MODEL: "small-model"}
    done = run_page(page, root=ROOT, molora=molora_command, stand_ins=stand_ins)
    assert len(done) >= 2


def test_readme_is_short_and_names_the_two_commands() -> None:
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert page.count("\n") <= 200
    bash = [block.text for block in blocks_of(page) if block.language == "bash"]
    commands = commands_of("\n".join(bash))
    assert ["make", "test"] in commands
    assert any(words[:2] == ["make", "quickstart"] for words in commands)


@pytest.mark.parametrize("name", [*PAGES, "SECURITY.md"])
def test_links_of_a_page_lead_somewhere(name: str) -> None:
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", (ROOT / name).read_text(encoding="utf-8"))
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_quickstart_runs_and_leaves_a_report() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count() or 1)}
    command = [sys.executable, "examples/quickstart.py", "--fast"]
    out = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert out.returncode == 0, out.stdout[-3000:] + out.stderr[-3000:]
    reports = list((ROOT / "runs" / "quickstart").rglob("report.html"))
    assert reports
    assert all("</html>" in report.read_text(encoding="utf-8") for report in reports)


def test_blocks_are_found_in_order_with_their_lines() -> None:
    page = (
        "# A\n"
        + fenced("python", "x = 1\n\ny = 2")
        + "words `code`\n- item\n  "
        + fenced("text", "  a")
    )
    assert [(b.language, b.line, b.text) for b in blocks_of(page)] == [
        ("python", 3, "x = 1\n\ny = 2"),
        ("text", 10, "a"),
    ]


@pytest.mark.parametrize(
    ("page", "complaint"),
    [
        (fenced("sh", "make test"), "language 'sh'"),
        (fenced("", "make test"), "language ''"),
        ("```bash\nmake test\n", "never closed"),
    ],
)
def test_a_block_that_would_go_untested_is_refused(page: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        blocks_of(page)


def test_python_blocks_share_a_namespace_and_text_blocks_are_not_run() -> None:
    page = (
        fenced("python", "x = 20")
        + fenced("text", "x = 1 / 0")
        + fenced("python", "assert x == 20")
    )
    assert run_sample(page) == ["python:2", "python:8"]


def test_a_failing_python_block_names_its_line_of_the_page() -> None:
    page = "# Title\n\n" + fenced("python", "x = 1\nx / 0")
    with pytest.raises(ZeroDivisionError, match="division by zero") as caught:
        run_sample(page)
    assert caught.traceback[-1].lineno + 1 == 5


def test_stand_ins_replace_what_the_page_names(tmp_path: Path) -> None:
    page = fenced("python", "assert 'big/model' == 'small'") + fenced(
        "bash", "molora chat big/model"
    )
    molora = Recorder()
    run_page(page, root=ROOT, molora=molora, stand_ins={"big/model": "small"})
    assert molora.calls == [["chat", "small"]]


def test_commands_are_run_or_checked_in_order() -> None:
    page = fenced(
        "bash",
        "make quickstart FAST=1   # two minutes\npip install -c constraints.txt -e '.[train,viz]'\n"
        'molora generate --adapter out \\\n    --prompt "two words"',
    )
    molora = Recorder()
    done = run_sample(page, molora)
    assert [command.split()[0] for command in done] == ["make", "pip", "molora"]
    assert molora.calls == [["generate", "--adapter", "out", "--prompt", "two words"]]


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        ("make nonsense", "targets are help, venv, quickstart"),
        ("make test SPEED=1", "SPEED=1"),
        ("pip install -e .[tarin]", "no extra tarin"),
        ("pip install -c missing.txt -e .", "no such file"),
        ("pip install something", "something is not molora"),
        ("curl example.org", "only make, pip install and molora"),
        ("molora train x.yaml | tail", "one plain command a line"),
        ("molora fails", "exit code 2"),
    ],
)
def test_a_command_that_a_reader_cannot_run_is_found(command: str, complaint: str) -> None:
    page = "words\n" + fenced("bash", command)
    with pytest.raises(AssertionError, match=r"block at line 3: ") as caught:
        run_sample(page, lambda arguments: 2)
    assert complaint in str(caught.value)
