"""The HTML page: its content, and that names in it are harmless."""

from __future__ import annotations

import base64
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_samples import mola_loads, report, scores

from molora.errors import MoLoRAError
from molora.report import Curve, Report, Utilisation, write_html
from molora.report import page as page_module
from molora.report.page import usage
from molora.report.scores import score_table

SCRIPT = "<script>alert('x')</script>"
NAMES = [
    SCRIPT,
    '"><img src=x onerror=alert(1)>',
    "'; --{{ 7 * 7 }}{% raw %}",
    "</title></pre></style>&amp;&lt;",
    "\ud800\x00$\\frac{",
]


class _Page(HTMLParser):
    """Tags with their attributes, and the text of each cell."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.rows: list[list[str]] = []
        self._open: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        elif tag == "td":
            self.rows[-1].append("")
        if tag not in ("meta", "img"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if "td" in self._open:
            self.rows[-1][-1] += " ".join(data.split())

    @property
    def headings(self) -> list[str | None]:
        return [attributes.get("id") for tag, attributes in self.tags if tag == "h2"]

    @property
    def images(self) -> list[str]:
        return [str(attributes["src"]) for tag, attributes in self.tags if tag == "img"]


@pytest.fixture
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are their file's name: what is on them is tested elsewhere."""

    def write(content: object, path: Path) -> Path:
        path.write_bytes(path.name.encode())
        return path

    for name in ("plot_losses", "plot_utilisation", "plot_differences"):
        monkeypatch.setattr(page_module, name, write)


def _page(content: Report, directory: Path) -> _Page:
    return _Page(write_html(content, directory))


def test_the_page_has_every_part_and_its_figures(tmp_path: Path) -> None:
    page = _page(report(), tmp_path)
    assert page.headings == ["scores", "losses", "utilisation", "differences", "configuration"]
    text = " ".join(page.texts)
    for part in ("title spam", "note spam", "fact spam", "value spam", "preset: mola"):
        assert part in text
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("differences.png", "losses.png", "report.html", "utilisation.png"),
    ]
    files = [tmp_path / f"{name}.png" for name in ("losses", "utilisation", "differences")]
    embedded = [source.removeprefix("data:image/png;base64,") for source in page.images]
    assert [base64.b64decode(data) for data in embedded] == [path.read_bytes() for path in files]
    assert all(attributes["alt"] for tag, attributes in page.tags if tag == "img")


@pytest.mark.usefixtures("no_drawing")
def test_the_table_has_every_score_and_difference(tmp_path: Path) -> None:
    rows = [row for row in _page(report(scores=scores()), tmp_path).rows if row][:3]
    for shown, row in zip(rows, score_table(scores()).rows, strict=True):
        values = [v for pair in zip(row.accuracies, row.losses, strict=True) for v in pair]
        assert shown[:2] == [row.task, row.rows]
        assert shown[2:8] == values
        for cell, found in zip(shown[8:], row.differences, strict=True):
            assert found is not None
            assert cell == f"{found}{found.interval}"


@pytest.mark.usefixtures("no_drawing")
def test_no_model_is_set_off_from_the_others(tmp_path: Path) -> None:
    """The same page with the scores of two models exchanged differs in numbers alone."""
    other_of = {"base": "base", "LoRA": "mixture", "mixture": "LoRA"}
    given = {(score.task, score.model): score for score in scores()}
    exchanged = [
        replace(score, accuracy=other.accuracy, loss=other.loss)
        for score in scores()
        for other in [given[score.task, other_of[score.model]]]
    ]
    first = _page(Report("t", scores=scores()), tmp_path / "first")
    second = _page(Report("t", scores=exchanged), tmp_path / "second")
    assert first.tags == second.tags
    assert first.rows != second.rows


@pytest.mark.usefixtures("no_drawing")
def test_differences_that_so_few_rows_cannot_show_are_marked(tmp_path: Path) -> None:
    page = _page(report(scores=scores()), tmp_path)
    (spam,) = (row for row in page.rows if row and row[0] == "spam" and len(row) > 6)
    assert spam[-1].startswith("≈ +2.5[−")
    assert not spam[-2].startswith("≈")
    assert "cannot tell which model is better" in " ".join(" ".join(page.texts).split())


@pytest.mark.usefixtures("no_drawing")
@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_names_are_harmless_wherever_they_stand(name: str, tmp_path: Path) -> None:
    page = _page(report(name), tmp_path)
    plain = _page(report("spam"), tmp_path / "plain")
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in plain.tags]
    allowed = {"lang", "charset", "http-equiv", "content", "name", "scope", "rowspan", "colspan"}
    allowed |= {"class", "id", "src", "alt"}
    assert {key for _, attributes in page.tags for key in attributes} <= allowed
    shown = "".join(page.texts)
    visible = name.encode("utf-8", "replace").decode().replace("\x00", "")
    for part in ("title", "note", "fact", "value", "configuration", "model"):
        assert f"{part} {visible}" in shown.replace("\x00", "").replace("\ufffd", "")


@pytest.mark.usefixtures("no_drawing")
def test_the_page_loads_nothing_and_runs_nothing(tmp_path: Path) -> None:
    page = _page(report(SCRIPT), tmp_path)
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base", "form", "a"}
    assert all(source.startswith("data:image/png;base64,") for source in page.images)
    assert "url(" not in page.source
    assert "@import" not in page.source
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv"))
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@pytest.mark.usefixtures("no_drawing")
@pytest.mark.parametrize(
    ("missing", "headings"),
    [
        ({"scores": ()}, ["losses", "utilisation", "differences", "configuration"]),
        ({"curves": ()}, ["scores", "utilisation", "differences", "configuration"]),
        (
            {"curves": (Curve("loss", (), ()),)},
            ["scores", "utilisation", "differences", "configuration"],
        ),
        ({"utilisation": None}, ["scores", "losses", "configuration"]),
        ({"utilisation": Utilisation({"t": {}})}, ["scores", "losses", "configuration"]),
        (
            {"utilisation": mola_loads(4, ("only",))},
            ["scores", "losses", "utilisation", "configuration"],
        ),
        ({"configuration": ""}, ["scores", "losses", "utilisation", "differences"]),
    ],
    ids=["scores", "curves", "points", "utilisation", "loads", "second task", "configuration"],
)
def test_what_is_missing_is_left_out(
    missing: dict[str, object], headings: list[str], tmp_path: Path
) -> None:
    assert _page(report(**missing), tmp_path).headings == headings


@pytest.mark.usefixtures("no_drawing")
def test_an_empty_report_is_a_page(tmp_path: Path) -> None:
    page = _page(Report("nothing yet"), tmp_path / "new" / "directory")
    assert page.headings == []
    assert "nothing yet" in page.texts


def test_the_counts_below_the_heat_map_are_per_site() -> None:
    """One expert of four is idle, one site takes three times its share; the layer averages hide
    both."""
    utilisation = Utilisation(
        {"t": {"layers.0.a": (0.75, 0.25, 0.0, 0.0), "layers.0.b": (0.0, 0.25, 0.5, 0.25)}}
    )
    (row,) = usage(utilisation)
    assert (row.sites, row.experts, row.unused) == (2, 8, 3)
    assert (row.greatest, row.where) == ("3.00", "layers.0.a")


@pytest.mark.parametrize("library", ["matplotlib", "jinja2"])
def test_a_missing_library_is_named_with_its_remedy(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MoLoRAError, match=rf"{library}. Run pip install 'molora\[viz\]'"):
        write_html(report(), tmp_path)
