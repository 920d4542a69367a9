"""`report.html` as a person sees it: in a browser, without a network, wide and narrow."""

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from optuna.trial import TrialState as OptunaState

from camri_tune.charts import recall_accuracy
from camri_tune.config import StudyConfig
from camri_tune.datasets import Dataset, open_dataset
from camri_tune.evidence import Evidence, kinds_of_images
from camri_tune.overview import EVIDENCE, RESULT, find_study, read_overview
from camri_tune.report import write_report
from camri_tune.search import parameter_importance
from camri_tune.study_page import _finalists
from tests.browsing import opened
from tests.command import camri_tune, result_of
from tests.studies import FLOOR, hand_made, trial

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

HOSTILE = "ValueError: </script><img src=x onerror='document.title=\"owned\"'> (x.py:1)"
SEARCH = [
    trial(0.80, 0.93, params={"learning_rate": 0.004, "scale": 16.0, "margin": 0.2}),
    trial(0.95, 0.89, params={"learning_rate": 0.004, "scale": 8.0, "margin": 0.4}),
    trial(0.84, 0.91, params={"learning_rate": 0.008, "scale": 12.0, "margin": 0.3}),
    trial(0.60, 0.88, params={"learning_rate": 0.002, "scale": 6.0, "margin": 0.1}),
    trial(0.82, 0.92, params={"learning_rate": 0.003, "scale": 24.0, "margin": 0.25}),
    trial(0.30, 0.70, OptunaState.PRUNED, params={"learning_rate": 0.03, "scale": 40.0, "margin": 0.5}),
    trial(state=OptunaState.FAIL, failure=HOSTILE),
]
ABOVE, BELOW = {0, 2, 4}, {1, 3}
MODELS = [trial(0.8 + n / 100, 0.92 - source / 100, source_trial=source, seed=n) for source in (2, 0) for n in (0, 1)]


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return open_dataset(StudyConfig(limit=200))


@pytest.fixture
def unfinished(tmp_path: Path, digits: Dataset, empty_database: Path) -> Path:
    """The report of a study whose finalists are trained, but not judged."""
    return write_report(hand_made(tmp_path, digits, empty_database, SEARCH, MODELS, limit=200, tolerance=1.5))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of a real study that was judged, and its result."""
    out = tmp_path_factory.mktemp("runs")
    options = [
        "--epochs",
        "2",
        "--trials",
        "5",
        "--seeds",
        "2",
        "--finalists",
        "1",
        "--tolerance",
        "100",
        "--name",
        "d",
    ]
    done = camri_tune("run", "--important", "8", *options, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    return out / "d", result_of(done)


_POINTS = """
(plot) => Object.fromEntries(document.getElementById(plot).calcdata.map((trace) => {
  const points = [...trace[0].node3.node().querySelectorAll("path.point")];
  return [trace[0].trace.name, points.map((point) => {
    const box = point.getBoundingClientRect(), style = getComputedStyle(point);
    return {x: box.x + box.width / 2, y: box.y + box.height / 2, wide: box.width, shape: point.getAttribute("d"),
            colour: box.width ? (style.fill === "none" ? style.stroke : style.fill) : "none"};
  })];
}))
"""


def _points(page: "Page", plot: str) -> dict[str, list[dict[str, Any]]]:
    """Where the markers of each trace are on the screen, and what they look like."""
    found: dict[str, list[dict[str, Any]]] = page.evaluate(_POINTS, plot)
    return found


def test_the_floor_parts_the_trials_on_the_screen(unfinished: Path, browser: "Browser") -> None:
    with opened(browser, unfinished) as page:
        plane = page.locator("#recall-accuracy")
        plane.scroll_into_view_if_needed()
        floor = plane.locator(".shapelayer path").last.bounding_box()
        assert floor is not None
        assert floor["height"] > 200, "the floor is a line from top to bottom"
        assert plane.get_by_text(f"floor: {100 * FLOOR:.2f} %").is_visible()
        points = _points(page, "recall-accuracy")
        line = floor["x"] + floor["width"] / 2
        above, below = points["trials above the floor"], points["trials below the floor"]
        assert len(above) == len(ABOVE)
        assert len(below) == len(BELOW)
        assert all(p["x"] > line and p["wide"] > 4 for p in above)
        assert all(p["x"] < line and p["wide"] > 4 for p in below)
        assert {p["shape"] for p in above}.isdisjoint(p["shape"] for p in below), "not told apart by colour alone"
        assert {p["colour"] for p in above}.isdisjoint(p["colour"] for p in below)
        assert len(points["stopped early"]) == 1
        assert len(points["finalists, mean over fresh seeds"]) == 2
        assert len(points["baseline, mean of 2 seeds"]) == 1
        frame = plane.locator(".bglayer .bg").first.bounding_box() or plane.locator(".plot").first.bounding_box()
        assert frame is not None
        for name in ("baseline, mean of 2 seeds", "finalists, mean over fresh seeds"):
            assert all(frame["x"] < p["x"] < frame["x"] + frame["width"] for p in points[name]), "in sight"
        assert plane.get_by_text("best so far: #2").is_visible()
        highest = min(above, key=lambda p: p["y"])
        assert sum(p["y"] < highest["y"] for p in below) == 1, "the highest recall of all is below the floor"


def test_the_history_climbs_over_trials_that_kept_the_floor(unfinished: Path, browser: "Browser") -> None:
    with opened(browser, unfinished) as page:
        points = _points(page, "search-history")
        assert {name: len(found) for name, found in points.items() if found} == {
            "trials above the floor": 3,
            "trials below the floor": 2,
            "stopped early": 1,
            "failed": 1,
        }
        steps = page.evaluate(
            "document.getElementById('search-history').data.find((t) => t.name === 'best above the floor so far')"
        )
        assert steps["x"] == [0, 2, 4, 6]
        assert steps["y"] == pytest.approx([80, 84, 84, 84])


def test_what_is_said_before_a_result_is_no_result(unfinished: Path, browser: "Browser") -> None:
    with opened(browser, unfinished) as page:
        text = page.locator("body").inner_text()
        assert "This study is not finished, and nothing works on it here." in text
        assert "#2, recall 84.00 %, accuracy 91.00 % on validation: a candidate, not a result" in " ".join(text.split())
        go_on = re.search("Go on with: (camri-tune run .*)", text)
        assert go_on
        assert f"--out {unfinished.parents[1]}" in go_on[1], "elsewhere it would be another study"
        assert "Certified" not in text
        page.locator("summary").click()
        assert page.get_by_text("missed by 1.00").is_visible()


def test_what_stands_in_a_failure_is_text(unfinished: Path, browser: "Browser") -> None:
    with opened(browser, unfinished) as page:
        page.locator("summary").click()
        assert page.get_by_text("</script><img src=x").first.is_visible()
        assert page.title() == "s: camri-tune"
        assert page.locator("img[src=x]").count() == 0


@pytest.mark.parametrize("width", [360, 768])
def test_on_a_phone_nothing_is_wider_than_the_screen(
    finished: tuple[Path, dict[str, Any]], browser: "Browser", width: int
) -> None:
    with opened(browser, finished[0] / "report.html", width) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        box = page.locator("#recall-accuracy .main-svg").first.bounding_box()
        assert box is not None
        assert box["width"] <= width


def test_the_verdict_stands_at_the_top(finished: tuple[Path, dict[str, Any]], browser: "Browser") -> None:
    folder, result = finished
    with opened(browser, folder / "report.html") as page:
        assert page.get_by_text(result["sentence"]).is_visible()
        box = page.locator(".verdict").bounding_box()
        assert box is not None
        assert box["y"] < 300
        mean = result["best"]["test"]["recall"]["mean"]
        assert page.locator(".card").first.get_by_text(f"{100 * mean:.2f} %").first.is_visible()
        assert page.get_by_text("exported setting, mean over fresh seeds").first.is_visible()
        number = page.locator("#recall-accuracy").get_by_text(f"#{result['best']['trial']}", exact=True)
        assert number.is_visible(), "the exported trial is named in the plane"
        assert "in the order in which test judged them" in page.locator("body").inner_text()
        assert not re.search(r"[{}]", page.locator("body").inner_text()), "an unfilled blank"
        for line in result["provenance"]:
            assert page.get_by_text(line).count() == 1


def test_the_baseline_with_a_bias_stands_between_baseline_and_best(
    finished: tuple[Path, dict[str, Any]], browser: "Browser"
) -> None:
    folder, result = finished
    with opened(browser, folder / "report.html") as page:
        rows = page.locator("table").first.locator("tr")
        cells = [rows.nth(index).locator("th, td").all_inner_texts() for index in range(rows.count())]
        assert {len(row) for row in cells} == {4}
        assert [head.split(",")[0] for head in cells[0]] == [
            "", "cross-entropy baseline", "baseline with a bias", "best: camri"
        ]  # fmt: skip
        mean = result["threshold"]["test"]["recall"]["mean"]
        assert cells[1][0].startswith("recall on test")
        assert cells[1][2].startswith(f"{100 * mean:.2f} %")
        gain = result["best"]["test"]["recall"]["mean"] - mean
        text = " ".join(page.locator("body").inner_text().split())
        assert "tuned on validation to keep accuracy there, less 100 points, (threshold tuning)" in text
        assert f"beside it the best setting has {100 * gain:+.2f} points of recall" in text


def test_the_images_are_those_that_test_decided(finished: tuple[Path, dict[str, Any]], browser: "Browser") -> None:
    folder, result = finished
    evidence = Evidence.load(folder / EVIDENCE, 10)
    assert evidence is not None
    matrix = evidence.confusion(1, 10)
    place = result["best"]["test"]["accuracy"]["values"]
    assert matrix.trace() / matrix.sum() in place
    kinds = kinds_of_images(evidence.labels, evidence.answers, result["important"])
    with opened(browser, folder / "report.html") as page:
        for kind, rows in kinds.items():
            assert page.get_by_role("heading", name=re.compile(f"^{kind}: {len(rows)}$", re.I)).count() == 1
        images = page.locator(".gallery img")
        assert images.count() == sum(len(rows) for rows in kinds.values())
        for index in range(images.count()):
            assert images.nth(index).evaluate("image => image.naturalWidth") == 8
        for plot in ("learning-curves", "classes", "errors", "confusion", "embedding", "slices"):
            assert page.locator(f"#{plot} .main-svg").first.is_visible()


def test_in_print_every_part_is_open_and_nothing_is_cut(
    finished: tuple[Path, dict[str, Any]], browser: "Browser"
) -> None:
    with opened(browser, finished[0] / "report.html") as page:
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        page.wait_for_function("document.querySelector('#recall-accuracy .main-svg').clientWidth == 690")
        assert page.locator("details").get_attribute("open") is not None
        page.evaluate("dispatchEvent(new Event('afterprint'))")
        page.wait_for_function("document.querySelector('#recall-accuracy .main-svg').clientWidth > 900")


def test_the_report_is_written_again_from_what_is_stored(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = finished
    before = (folder / "report.html").read_text()
    done = camri_tune("report", folder)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == folder / "report.html"
    assert (folder / "report.html").read_text() == before
    assert (folder / "report.html").stat().st_size < 10e6


def test_without_its_evidence_the_report_says_so(finished: tuple[Path, dict[str, Any]], browser: "Browser") -> None:
    folder, _ = finished
    kept = (folder / EVIDENCE).rename(folder / "kept")
    try:
        assert camri_tune("report", folder).returncode == 0
        with opened(browser, folder / "report.html") as page:
            assert page.get_by_text("were not kept").is_visible()
            assert page.locator(".gallery").count() == 0
    finally:
        kept.rename(folder / EVIDENCE)
        assert camri_tune("report", folder).returncode == 0


def test_names_of_classes_are_text(finished: tuple[Path, dict[str, Any]], browser: "Browser", tmp_path: Path) -> None:
    """Folders name them, and anyone may have named the folders."""
    folder = shutil.copytree(finished[0], tmp_path / "d")
    hostile = [f"<img src=x onerror=alert({c})> & a name that is longer than any column" for c in range(10)]
    path = folder / RESULT
    path.write_text(json.dumps({**finished[1], "classes": hostile}))
    store = find_study(str(folder), out=tmp_path, storage=None)
    store.set("classes", hostile)
    report = write_report(store)
    for width in (360, 1200):
        with opened(browser, report, width) as page:
            assert page.locator("img[src=x]").count() == 0
            assert page.get_by_text("<img src=x onerror=alert(8)>").first.is_visible()
            assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_finalist_whose_recall_has_no_bound_has_a_dash() -> None:
    figure = {"values": [0.9]}
    finalist = {"trial": 3, "params": {}, "validation": {"recall": figure, "accuracy": figure}, "kept_accuracy": True}
    judged = {"accuracy_difference": None, "recall_lower_bound": None}
    page = _finalists({"finalists": [{**finalist, **judged}], "best": None, "seeds": 1})
    assert "<td>90.00 %</td><td>-</td><td>90.00 %</td>" in page
    assert "<th>its lower bound (95 %, one-sided)</th>" in page


def test_no_model_is_no_best(finished: tuple[Path, dict[str, Any]], browser: "Browser") -> None:
    """The page of a study that ended without a model: what is withdrawn is not shown."""
    folder, result = finished
    path = folder / RESULT
    whole = path.read_text()
    none = {
        **result,
        "finalists": [{**f, "kept_accuracy": False, "accuracy_difference": None} for f in result["finalists"]],
        "verdict": "none",
        "best": None,
        "threshold": {**result["threshold"], "best_less_this": None},
        "accuracy_difference": None,
        "sentence": "No model at all.",
        "provenance": [],
    }
    try:
        path.write_text(json.dumps(none))
        assert camri_tune("report", folder).returncode == 0
        with opened(browser, folder / "report.html") as page:
            assert page.get_by_text("No model at all.").is_visible()
            mean = result["baseline"]["test"]["recall"]["mean"]
            assert page.locator(".card").first.get_by_text(f"{100 * mean:.2f} %").is_visible(), "how bad it is"
            assert page.get_by_text("Every class under the baseline").is_visible()
            assert page.get_by_text("baseline with a bias").is_visible()
            assert page.get_by_text("best setting").count() == page.get_by_text("exported").count() == 0
    finally:
        path.write_text(whole)
        assert camri_tune("report", folder).returncode == 0


def test_trials_that_went_to_pieces_are_counted_beside_the_plane(
    tmp_path: Path, digits: Dataset, empty_database: Path
) -> None:
    near = [trial(0.8 + n / 100, FLOOR + n / 1000) for n in range(8)]
    for far, said in ((0, []), (1, ["← 1 trial further left"]), (2, ["← 2 trials further left"])):
        store = hand_made(tmp_path, digits, empty_database, [*near, *[trial(0.2, 0.3)] * far], name=f"far-{far}")
        figure = recall_accuracy(read_overview(store))
        assert [note.text for note in figure.layout.annotations if "further left" in note.text] == said
        left, _ = figure.layout.xaxis.range
        assert sum(x < left for trace in figure.data if trace.mode == "markers" for x in trace.x) == far


def test_importance_needs_trials_that_differ(tmp_path: Path, digits: Dataset, empty_database: Path) -> None:
    one = [trial(0.8 + n / 100, 0.93, params={"learning_rate": 0.001 * (n + 1)}) for n in range(6)]
    searches = {"several": SEARCH, "few": SEARCH[:4], "same": [trial(0.8, 0.93)] * 6, "one": one}
    stores = {
        name: hand_made(tmp_path, digits, empty_database, search, limit=200, name=name)
        for name, search in searches.items()
    }
    found = parameter_importance(stores["several"])
    assert set(found) == {"recall", "accuracy"}
    for shares in found.values():
        assert set(shares) == {"learning_rate", "scale", "margin"}
        assert sum(shares.values()) == pytest.approx(1)
    assert parameter_importance(stores["few"]) == {}
    assert parameter_importance(stores["same"]) == {}
    assert parameter_importance(stores["one"]) == {}, "of one parameter it is always all"


def test_trials_queued_beyond_the_ranges_have_no_part_in_importance(
    tmp_path: Path, digits: Dataset, empty_database: Path
) -> None:
    """Whoever opens the study with Optuna may queue such."""
    store = hand_made(tmp_path, digits, empty_database, SEARCH, limit=200)
    before = parameter_importance(store)
    study = store.optuna_study("search")
    study.enqueue_trial({"scale": 500.0})
    queued = study.ask()
    with pytest.warns(UserWarning, match="out of range"):
        assert queued.suggest_float("scale", 4.0, 64.0, log=True) == 500.0
    queued.set_user_attr("recall", 0.1)
    queued.set_user_attr("accuracy", 0.2)
    study.tell(queued, 0.1)
    assert parameter_importance(store) == before != {}
    assert write_report(store).exists()
