"""Makes the preferences beside this file: ``python -m examples.preferences.make_preferences``.

They are the rows of ``examples/data/language``, whose LICENSES.md says where its sentences come
from: the right language is chosen, one of the five others is rejected. Same inputs, same files.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCE = HERE.parent / "data" / "language"
ROWS = {"train": 160, "test": 40}


def preferences(split: str) -> Iterator[dict[str, str]]:
    """The first rows of a split of the task, each with an answer that is wrong."""
    wrong = random.Random(0)
    lines = (SOURCE / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    for line in lines[: ROWS[split]]:
        row = json.loads(line)
        others = [choice for choice in row["choices"] if choice != row["label"]]
        yield {
            "prompt": row["prompt"],
            "chosen": row["label"],
            "rejected": wrong.choice(others),
            "task": row["task"],
        }


def main(directory: Path = HERE) -> None:
    """Write both files."""
    for split in ROWS:
        rows = (json.dumps(row, ensure_ascii=False) + "\n" for row in preferences(split))
        (directory / f"{split}.jsonl").write_text("".join(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
