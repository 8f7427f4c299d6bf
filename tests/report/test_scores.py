from __future__ import annotations

import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_samples import scores
from rich.console import Console

from molora.report import TaskScore, summary_table
from molora.report.scores import MEAN, difference, score_table, wilson

ACCURACY = st.integers(0, 50).map(lambda right: right / 50)


def _printed(table: object, width: int = 120) -> str:
    file = io.StringIO()
    Console(file=file, width=width, color_system=None).print(table)
    return file.getvalue()


def test_wilson_interval_of_half_of_a_hundred() -> None:
    assert wilson(0.5, 100) == pytest.approx((0.40383, 0.59617), abs=1e-5)


def test_newcombe_interval_of_his_own_example() -> None:
    """56 of 70 against 48 of 80: 0.0524 to 0.3339 in the paper's table II, method 10."""
    found = difference(
        TaskScore("t", "a", 56 / 70, None, 70), TaskScore("t", "b", 48 / 80, None, 80)
    )
    assert found is not None
    assert (found.value, found.low, found.high) == pytest.approx((20.0, 5.24, 33.39), abs=5e-3)


@given(first=ACCURACY, second=ACCURACY)
def test_exchanging_two_models_exchanges_signs_and_nothing_else(
    first: float, second: float
) -> None:
    a, b = TaskScore("t", "a", first, 1.0, 50), TaskScore("t", "b", second, 1.0, 50)
    there, back = difference(a, b), difference(b, a)
    assert there is not None
    assert back is not None
    assert (there.value, there.low, there.high) == pytest.approx(
        (-back.value, -back.high, -back.low)
    )
    assert there.is_clear == back.is_clear
    assert there.low <= there.value <= there.high


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_equal_scores_are_never_a_clear_difference(share: float) -> None:
    found = difference(TaskScore("t", "a", share, 1.0, 9), TaskScore("t", "b", share, 1.0, 9))
    assert found is not None
    assert not found.is_clear
    assert str(found) == "≈ +0.0"


def test_few_rows_cannot_tell_what_many_can() -> None:
    def found(rows: int) -> bool:
        pair = (TaskScore("t", "a", 0.9, 1.0, rows), TaskScore("t", "b", 0.8, 1.0, rows))
        answer = difference(*pair)
        assert answer is not None
        return answer.is_clear

    assert [found(rows) for rows in (10, 50, 1000)] == [False, False, True]


def test_models_and_tasks_stay_in_the_order_given() -> None:
    table = score_table(scores())
    assert table.models == ("base", "mixture", "LoRA")
    assert table.pairs == (("mixture", "base"), ("LoRA", "base"), ("mixture", "LoRA"))
    assert [row.task for row in table.rows] == ["spam", "nouns", MEAN]
    reversed_table = score_table(scores()[::-1])
    assert reversed_table.models == ("LoRA", "mixture", "base")


def test_values_are_those_of_the_scores() -> None:
    spam, nouns, mean = score_table(scores()).rows
    assert spam.accuracies == ("50.0", "90.0", "87.5")
    assert spam.losses == ("1.250", "0.500", "0.625")
    assert (spam.rows, nouns.rows) == ("100", "80")
    assert [str(found) for found in spam.differences] == ["+40.0", "+37.5", "≈ +2.5"]
    assert [str(found) for found in nouns.differences] == ["+25.0", "+50.0", "−25.0"]
    assert mean.accuracies == ("37.5", "70.0", "81.2")
    assert mean.losses == ("1.625", "1.000", "0.812")
    assert [str(found) for found in mean.differences] == ["+32.5", "+43.8", "−11.2"]


def test_the_mean_is_over_tasks_that_every_model_was_scored_on() -> None:
    partial = [*scores(), TaskScore("more", "base", 1.0, 0.1, 10)]
    rows = score_table(partial).rows
    assert [row.task for row in rows] == ["spam", "nouns", "more", MEAN]
    assert rows[2].accuracies == ("100.0", "–", "–")
    assert rows[2].differences == (None, None, None)
    assert rows[3].accuracies == score_table(scores()).rows[2].accuracies


def test_one_task_and_one_model_have_no_mean_and_no_difference() -> None:
    table = score_table([TaskScore("t", "base", None, 0.5, 10)])
    assert table.pairs == ()
    (row,) = table.rows
    assert (row.accuracies, row.losses) == (("–",), ("0.500",))
    assert "≈" not in _printed(summary_table([TaskScore("t", "base", None, 0.5, 10)]))


def test_the_terminal_table_shows_every_number() -> None:
    text = _printed(summary_table(scores()))
    for row in score_table(scores()).rows:
        (line,) = (line for line in text.splitlines() if line.strip().startswith(row.task))
        for part in (*row.accuracies, *row.losses, *map(str, row.differences)):
            assert part in line
    assert "80–100 rows" in text


def test_the_terminal_table_fits_eighty_columns() -> None:
    text = _printed(summary_table(scores("python_module")), width=80)
    assert "python_module" in text
    assert "…" not in text
    assert all(len(line) <= 80 for line in text.splitlines())


def test_markup_in_names_is_text() -> None:
    names = ["[red]a[/red]", "[link=file:///etc]b"]
    text = _printed(summary_table([TaskScore(names[0], names[1], 0.5, 1.0, 10)]), width=200)
    assert all(re.search(re.escape(name), text) for name in names)
