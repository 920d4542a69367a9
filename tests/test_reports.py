"""A comparison as people read it: CSV, Markdown, HTML, the picture and the terminal, from tables made by hand."""

import csv
import io
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go
import pytest
from rich.console import Console

from camri_tune.differences import SeedDifference
from camri_tune.pages import COLOURS, comparison_page, recall_over_accuracy
from camri_tune.records import Figure
from camri_tune.report import cell_text, comparison_csv, comparison_markdown, write_comparison
from camri_tune.table1 import METHODS, TITLES, Cell, Method, Outcome, Protocol, Scores, Table, below, best_of
from camri_tune.tables import comparison_tables
from tests.browsing import opened
from tests.samples import MANY, hits_of

if TYPE_CHECKING:
    from playwright.sync_api import Browser

EVIL = "<b>x & y</b></script>|z"  # a class's name is its folder's
CE_RECALL, CE_ACCURACY = (0.50, 0.52), (0.90, 0.92)
PAPER = (0.7654, 0.9876)


def _outcome(recall: Sequence[float], accuracy: Sequence[float]) -> Outcome:
    test = Scores(Figure(tuple(recall)), Figure(tuple(accuracy)))
    return Outcome(
        validation=Scores(Figure((0.123, 0.124)[: len(recall)]), Figure((0.321, 0.322)[: len(recall)])),
        test=test,
        recall_difference=SeedDifference.of(hits_of(recall), hits_of(CE_RECALL[: len(recall)])),
        accuracy_difference=SeedDifference.of(hits_of(accuracy), hits_of(CE_ACCURACY[: len(recall)])),
        hits=hits_of(recall),
        groups=np.arange(MANY),
    )


CE = _outcome(CE_RECALL, CE_ACCURACY)
BETTER = _outcome((0.7012, 0.7238), (0.93, 0.94))  # +20.12 and +20.38 points: holds up
WORSE = _outcome((0.41, 0.47), (0.88, 0.91))  # accuracy 0.895: below 0.91
MATCHED = _outcome((0.61, 0.63), (0.9001, 0.9101))  # below, too
MORE = _outcome((0.64, 0.65), (0.95, 0.96))

Row = tuple[Method, Outcome | None, Outcome | None]
FULL: list[Row] = [
    ("ce", CE, MATCHED),
    ("threshold", MATCHED, MATCHED),
    ("wce", WORSE, MORE),
    ("l2", None, None),
    ("camri", BETTER, MORE),
]
# Nobody's lead holds up; nothing of camri kept accuracy.
EVEN: list[Row] = [("ce", CE, CE), ("threshold", CE, CE), ("wce", WORSE, MORE), ("l2", CE, CE), ("camri", None, None)]


def _column(dataset: str, token: str, name: str, rows: Sequence[Row]) -> list[Cell]:
    return [
        Cell(dataset, token, 7, name, method, {"scale": 16.0, "learning_rate": 0.00234}, trained, matched, paper)
        for method, trained, matched in rows
        for paper in [PAPER if (dataset, token, method) == ("gtsrb", "worst1", "camri") else None]
    ]


def _table(protocol: Protocol = "ours", folder: Path = Path("/tmp/a <b> & c")) -> Table:
    facts = {"train": 1234, "validation": 100, "test": 50, "epochs": 3, "wall_seconds": 90.0}
    cells = [
        *_column("gtsrb", "worst1", EVIL, FULL),
        *_column("gtsrb", "median", "stop", EVEN),
        *_column("my | <i>set</i>", "worst1", "cat", EVEN),
    ]
    names = dict.fromkeys(cell.dataset for cell in cells)
    return Table(
        tuple(cells),
        protocol,
        {"model": "compact", "trials": 5, "seeds": 2, "datasets": dict.fromkeys(names, facts)},
        folder,
    )


def test_the_tables_made_by_hand_have_the_best_that_they_should() -> None:
    table = _table()
    winners = [best_of(table.column(*column)) for column in table.columns()]
    assert [winner and winner.method for winner in winners] == ["camri", None, None]


# --- CSV --------------------------------------------------------------------------------------------------------------


def test_the_csv_has_every_cell_with_its_figures() -> None:
    table = _table()
    rows = list(csv.DictReader(io.StringIO(comparison_csv(table), newline="")))
    assert [(r["dataset"], r["important"], r["class"], r["class_name"], r["method"]) for r in rows] == [
        (c.dataset, c.token, str(c.important), c.class_name, c.method) for c in table.cells
    ]
    for row, cell in zip(rows, table.cells, strict=True):
        assert None not in row, "no row is longer than the head"
        assert None not in row.values(), "nor shorter"
        for prefix, outcome in (("", cell.trained), ("matched_", cell.matched)):
            names = [key for key in row if key.startswith((f"{prefix}recall", f"{prefix}accuracy"))]
            assert len(names) == 7
            if outcome is None:
                assert {row[name] for name in names} == {""}
                continue
            assert float(row[f"{prefix}recall"]) == pytest.approx(outcome.test.recall.mean, abs=5e-7)
            assert float(row[f"{prefix}accuracy"]) == pytest.approx(outcome.test.accuracy.mean, abs=5e-7)
            assert float(row[f"{prefix}recall_sd"]) == pytest.approx(outcome.test.recall.sd, abs=5e-7)
            assert float(row[f"{prefix}accuracy_sd"]) == pytest.approx(outcome.test.accuracy.sd, abs=5e-7)
            assert float(row[f"{prefix}recall_gain"]) == pytest.approx(outcome.recall_difference.mean, abs=5e-7)
            low, high = (row[f"{prefix}recall_gain_{end}"] for end in ("low", "high"))
            if (interval := outcome.recall_difference.interval) is None:
                assert outcome is CE, "no difference to itself, and no spread"
                assert (low, high) == ("", "")
                continue
            assert (float(low), float(high)) == pytest.approx(interval, abs=5e-7)
    paper = [(row["paper_recall"], row["paper_accuracy"]) for row in rows]
    assert paper[4] == ("0.7654", "0.9876")
    assert set(paper[:4] + paper[5:]) == {("", "")}
    assert [row["best"] for row in rows] == ["0"] * 4 + ["1"] + ["0"] * 10


def test_names_in_the_csv_are_no_formulas() -> None:
    cells = _column("@x", "3", "=1+1", [("ce", _outcome((0.5,), (0.9,)), None)])
    (row,) = csv.DictReader(io.StringIO(comparison_csv(Table(tuple(cells), "ours", {}, Path())), newline=""))
    assert (row["dataset"], row["class_name"]) == ("'@x", "'=1+1")


def test_the_csv_of_one_seed_leaves_spread_and_interval_empty() -> None:
    cells = _column("digits", "3", "3", [("ce", _outcome((0.5,), (0.9,)), None)])
    (row,) = csv.DictReader(io.StringIO(comparison_csv(Table(tuple(cells), "ours", {}, Path())), newline=""))
    assert (row["recall"], row["accuracy"], row["recall_gain"]) == ("0.5", "0.9", "0.0")
    assert {row[key] for key in ("recall_sd", "accuracy_sd", "recall_gain_low", "recall_gain_high")} == {""}


# --- Markdown ---------------------------------------------------------------------------------------------------------


def _markdown_tables(text: str) -> dict[str, list[list[str]]]:
    """The rows of each table by its heading, without the rule below the head. Every row has as many cells."""
    tables: dict[str, list[list[str]]] = {}
    for part in text.split("### ")[1:]:
        heading, *lines = part.splitlines()
        rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines if line.startswith("|")]
        assert len({len(row) for row in rows}) == 1, f"rows of different lengths under {heading}"
        assert set(rows.pop(1)) == {"---"}
        tables[heading] = rows
    return tables


def test_the_markdown_has_tables_of_even_rows() -> None:
    tables = _markdown_tables(comparison_markdown(_table()))
    bias = "with a bias tuned to the baseline's validation accuracy"
    theirs = "my | <i>set</i>"
    assert list(tables) == [
        "gtsrb, as trained",
        f"gtsrb, {bias}",
        "gtsrb, the paper's figures",
        f"{theirs}, as trained",
        f"{theirs}, {bias}",
    ], "the paper has no figures of the other data set"
    for heading, rows in tables.items():
        assert [row[0] for row in rows[1:]] == [TITLES[method] for method, *_ in FULL]
        assert len(rows[0]) == (2 if heading.startswith(theirs) else 3)
    assert tables["gtsrb, as trained"][0][1:] == [
        f"worst1: class 7 ({EVIL})".replace("|", "\\|"),
        "median: class 7 (stop)",
    ]


def test_the_markdown_says_what_a_bias_may_give_up() -> None:
    given = replace(_table(), facts={**_table().facts, "tolerance": 0.5})
    assert "### gtsrb, with a bias tuned to the baseline's validation accuracy less 0.5 points" in comparison_markdown(
        given
    )


def test_the_markdown_has_dashes_daggers_and_bold_where_they_belong() -> None:
    tables = list(_markdown_tables(comparison_markdown(_table())).values())
    ce, matched = "0.5100 ± 0.0141 / 0.9100 ± 0.0141", "0.6200 ± 0.0141 / 0.9051 ± 0.0071 †"
    worse, more = "0.4400 ± 0.0424 / 0.8950 ± 0.0212 †", "0.6450 ± 0.0071 / 0.9550 ± 0.0071"
    best = "**0.7125 ± 0.0160 / 0.9350 ± 0.0071**"
    assert [row[1:] for row in tables[0][1:]] == [[ce, ce], [matched, ce], [worse, worse], ["-", ce], [best, "-"]]
    assert [row[1:] for row in tables[1][1:]] == [[matched, ce], [matched, ce], [more, more], ["-", ce], [more, "-"]]
    assert [row[1:] for row in tables[2][1:]] == [["-", "-"]] * 4 + [["0.7654 / 0.9876", "-"]]
    assert [row[1:] for row in tables[3][1:]] == [[ce], [ce], [worse], [ce], ["-"]]


def test_the_markdown_ends_with_how_to_read_it() -> None:
    assert "validation chose every setting" in comparison_markdown(_table()).splitlines()[-1]
    assert "PAPER'S PROTOCOL" in comparison_markdown(_table("paper")).splitlines()[-1]


def test_one_seed_has_no_spread_in_words() -> None:
    one = _outcome((0.5,), (0.9,))
    assert cell_text(_table().cells[0], one) == "0.5000 / 0.9000"


# --- HTML -------------------------------------------------------------------------------------------------------------


class _Page(HTMLParser):
    """What a browser would see: tags with attributes, the text outside scripts, the scripts."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.rows: list[tuple[str, list[str]]] = []  # class of each table row, text of its cells
        self._open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "link", "img"):
            self._open.append(tag)
        if tag == "script":
            self.scripts.append("")
        if tag == "tr":
            self.rows.append((dict(attrs).get("class") or "", []))
        if tag in ("td", "th"):
            self.rows[-1][1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, "tags close in the order in which they were opened"

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "script":
            self.scripts[-1] += data
            return
        self.texts.append(data)
        if "td" in self._open or "th" in self._open:
            self.rows[-1][1][-1] += data if self._open[-1] != "small" else f" {data}"


@pytest.fixture(scope="module")
def page() -> _Page:
    return _Page(comparison_page(_table()))


def test_names_on_the_page_are_text(page: _Page) -> None:
    assert {tag for tag, _ in page.tags} == {
        "html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "div", "script", "table", "tr", "th",
        "td", "small",
    }  # fmt: skip
    text = "\n".join(page.texts)
    assert f"gtsrb, worst1: class 7 ({EVIL})" in text
    assert "my | <i>set</i>, worst1: class 7 (cat)" in text
    assert "a <b> & c: 3 important classes" in text


@pytest.mark.parametrize(
    ("token", "name", "heading"),
    [
        ("worst1", "stop", "worst1: class 7 (stop)"),
        ("worst1", "7", "worst1: class 7"),
        ("7", "stop", "class 7 (stop)"),
        ("stop", "stop", "class 7 (stop)"),
        ("7", "7", "class 7"),
    ],
)
def test_a_class_is_named_once(token: str, name: str, heading: str) -> None:
    assert _column("gtsrb", token, name, EVEN)[0].heading == heading


_LINES = """element => {
    const range = document.createRange();
    range.selectNode(element.firstChild);
    return range.getClientRects().length;
}"""


def test_on_a_phone_the_page_is_no_wider_and_no_figure_is_broken(browser: "Browser", tmp_path: Path) -> None:
    path = tmp_path / "comparison.html"
    path.write_text(comparison_page(_table()), encoding="utf-8")
    with opened(browser, path, 360) as shown:
        assert shown.evaluate("document.documentElement.scrollWidth") <= 360
        figures = shown.get_by_text(re.compile(r"^0\.\d{4} ± 0\.\d{4}"))
        assert figures.count() > 4
        assert {figures.nth(place).evaluate(_LINES) for place in range(figures.count())} == {1}


def test_the_page_stands_alone(page: _Page) -> None:
    assert not [tag for tag, attributes in page.tags if tag == "link" or "src" in attributes or "href" in attributes]
    whole = [script for script in page.scripts if len(script) > 1_000_000]
    assert len(whole) == 1, "Plotly's code, once for both pictures"
    drawn = [script for script in page.scripts if "Plotly.newPlot(" in script and script not in whole]
    assert len(drawn) == 2
    assert page.scripts.index(whole[0]) < page.scripts.index(drawn[0])


def test_the_page_has_every_figure(page: _Page) -> None:
    heads = [cells for _, cells in page.rows if cells[0] == ""]
    assert len(heads) == 3
    assert {len(cells) for _, cells in page.rows} == {7}
    rows = [(kind, cells) for kind, cells in page.rows if cells[0]]
    assert [cells[0] for _, cells in rows] == [
        f"{TITLES[method]} learning_rate 0.00234, scale 16" for method, *_ in (*FULL, *EVEN, *EVEN)
    ]
    assert [kind for kind, _ in rows] == [""] * 4 + ["best"] + [""] * 10
    _, l2 = rows[3]
    assert l2[1:] == ["-"] * 6
    _, camri = rows[4]
    assert camri[6] == "0.7654 / 0.9876"
    _, ce = rows[0]
    assert ce[3] == "+0.00", "no difference to itself, and no interval"
    assert [cell.split(" ")[0] for cell in camri[1:6]] == ["0.7125", "0.9350", "+20.25", "0.6450", "0.9550"]
    interval = BETTER.recall_difference.interval
    assert interval
    assert camri[3] == f"+20.25 [{100 * interval.low:+.2f}, {100 * interval.high:+.2f}]"
    over_seeds = BETTER.test.recall.interval
    assert over_seeds
    assert camri[1] == f"0.7125 ± 0.0160 [{over_seeds.low:.4f}, {over_seeds.high:.4f}]"
    daggers = [[place for place, cell in enumerate(cells) if "†" in cell] for _, cells in rows]
    assert daggers[:5] == [[5], [2, 5], [2], [], []]
    assert daggers[5:] == [[], [], [2], [], []] * 2


def test_the_page_says_what_was_measured_on_what(page: _Page) -> None:
    text = "\n".join(page.texts)
    assert "1,234 training, 100 validation, 50 test images; 3 epochs; network compact; 2 min of training here" in text
    assert "validation chose every setting" in text
    assert "In brackets 95 % intervals: over seeds for means (Student's t), over seeds and images for gains." in text


def test_only_the_papers_protocol_comes_with_a_warning(page: _Page) -> None:
    paper = _Page(comparison_page(_table("paper")))
    assert "PAPER'S PROTOCOL" in "\n".join(paper.texts)
    assert [attributes for tag, attributes in paper.tags if attributes.get("class") == "warning"]
    assert not [attributes for tag, attributes in page.tags if attributes.get("class") == "warning"]
    assert "PAPER'S PROTOCOL" not in "\n".join(page.texts)


# --- the picture ------------------------------------------------------------------------------------------------------


def _points(figure: go.Figure, mean: bool) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Traces of means, or of seeds, by panel and method."""
    traces = json.loads(figure.to_json())["data"]
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for trace in traces:
        if ("one seed" in trace["hovertemplate"]) is not mean:
            found.setdefault((trace["xaxis"], trace["legendgroup"]), []).append(trace)
    return found


def test_the_picture_has_one_mean_for_each_method_and_panel() -> None:
    table = _table()
    columns = [table.column("gtsrb", token) for token in ("worst1", "median")]
    figure = recall_over_accuracy(columns)
    means, seeds = _points(figure, True), _points(figure, False)
    expected = {
        (axis, cell.method): cell.trained.test
        for axis, cells in zip(("x", "x2"), columns, strict=True)
        for cell in cells
        if cell.trained is not None
    }
    assert len(expected) == 8
    assert set(means) == set(seeds) == set(expected)
    for key, (recall, accuracy) in expected.items():
        (mean,), (seed,) = means[key], seeds[key]
        assert (mean["x"], mean["y"]) == (
            pytest.approx([100 * accuracy.mean]),
            pytest.approx([100 * recall.mean]),
        )
        assert seed["x"] == pytest.approx([100 * v for v in accuracy.values])
        assert seed["y"] == pytest.approx([100 * v for v in recall.values])
        assert mean["marker"]["size"] > seed["marker"]["size"]
        assert mean["marker"]["color"] == seed["marker"]["color"] == COLOURS[_method(key[1])]
    legend = [trace["legendgroup"] for traces in means.values() for trace in traces if trace.get("showlegend")]
    assert sorted(legend) == ["camri", "ce", "l2", "threshold", "wce"], "each once"
    assert not [trace for traces in seeds.values() for trace in traces if trace.get("showlegend")]


def _method(name: str) -> Method:
    return next(method for method in METHODS if method == name)


def test_a_line_stands_at_cross_entropys_accuracy_in_each_panel() -> None:
    table = _table()
    layout = json.loads(recall_over_accuracy([table.column(*column) for column in table.columns()[:2]]).to_json())
    lines = [(shape["xref"], shape["x0"], shape["x1"]) for shape in layout["layout"]["shapes"]]
    assert lines == [("x", pytest.approx(91.0), pytest.approx(91.0)), ("x2", pytest.approx(91.0), pytest.approx(91.0))]


def test_names_in_the_picture_are_text() -> None:
    """Plotly would read the tags in them."""
    figure = recall_over_accuracy([_table().column("gtsrb", "worst1")])
    (title,) = [annotation.text for annotation in figure.layout.annotations]
    assert title == "worst1: class 7 (&lt;b&gt;x &amp; y&lt;/b&gt;&lt;/script&gt;|z)"


def test_every_method_has_a_colour_of_its_own() -> None:
    assert set(COLOURS) == set(METHODS)
    assert len(set(COLOURS.values())) == len(METHODS)


# --- the terminal and the files ---------------------------------------------------------------------------------------


def test_the_terminal_shows_what_the_page_shows() -> None:
    console = Console(width=160, file=io.StringIO(), highlight=False, markup=False)
    with console.capture() as capture:
        for part in comparison_tables(_table()):
            console.print(part)
    text = capture.get()
    assert f"gtsrb, worst1: class 7 ({EVIL})" in text
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    assert [cells[0] for cells in lines] == [TITLES[method] for method, *_ in (*FULL, *EVEN, *EVEN)]
    assert lines[3][1:] == ["-"] * 6
    low, high = BETTER.recall_difference.interval or (0, 0)
    assert lines[4][1:] == [
        "0.7125 ± 0.0160",
        "0.9350 ± 0.0071",
        f"+20.25 [{100 * low:+.2f}, {100 * high:+.2f}]",
        "0.6450 ± 0.0071",
        "0.9550 ± 0.0071",
        "0.7654 / 0.9876",
    ]
    assert lines[1][2] == "0.9051 ± 0.0071 †"
    heads = [column.header for column in comparison_tables(_table())[0].columns]
    assert heads[3] == "gain in recall, points", "as on the page"


@pytest.mark.parametrize("width", [80, 100, 200])
def test_no_terminal_is_too_narrow_for_a_figure(width: int) -> None:
    """Least of all for the dagger that says that accuracy fell."""
    console = Console(width=width, file=io.StringIO(), highlight=False, markup=False)
    with console.capture() as capture:
        for part in comparison_tables(_table()):
            console.print(part)
    text = capture.get()
    assert "…" not in text
    figures = [mean for cell in _table().cells for mean in re.findall(r"[\d.]+", " ".join(_written(cell)))]
    shown = re.findall(r"\d+\.\d+", text)
    assert sorted(figures) == sorted(shown)
    outcomes = [one for cell in _table().cells for one in (cell.trained, cell.matched) if one is not None]
    assert text.count("†") == sum(below(one.accuracy_difference) for one in outcomes) > 0


def _written(cell: Cell) -> list[str]:
    """All figures of a row of the terminal's table."""
    found = []
    for outcome in (cell.trained, cell.matched):
        if outcome is not None:
            found += [f"{f.mean:.4f} {f.sd:.4f}" for f in outcome.test if f.sd is not None]
    if cell.trained is not None:
        found.append(" ".join(cell.trained.recall_difference.in_points()))
    return [*found, *(f"{figure:.4f}" for figure in cell.paper or ())]


@pytest.mark.parametrize(("protocol", "stem"), [("ours", "comparison"), ("paper", "comparison-paper")])
def test_each_protocol_has_files_of_its_own(protocol: Protocol, stem: str, tmp_path: Path) -> None:
    table = _table(protocol, tmp_path)
    write_comparison(table)
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{stem}.{suffix}" for suffix in ("json", "csv", "md", "html")
    }
    assert json.loads((tmp_path / f"{stem}.json").read_text())["protocol"] == protocol
    assert (tmp_path / f"{stem}.csv").read_text() == comparison_csv(table)
    assert (tmp_path / f"{stem}.md").read_text(encoding="utf-8") == comparison_markdown(table)
    assert (tmp_path / f"{stem}.html").read_text(encoding="utf-8").startswith("<!doctype html>")
