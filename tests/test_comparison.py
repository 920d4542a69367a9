"""Many methods under one protocol, through the installed command, and its figures again from the checkpoints alone."""

import csv
import json
import math
import shutil
import signal
import sqlite3
import subprocess
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from camri_tune import comparison
from camri_tune.bundle import ModelSpec, load_classifier
from camri_tune.comparison import compare
from camri_tune.config import StudyConfig
from camri_tune.database import open_storage
from camri_tune.datasets import Dataset, open_dataset
from camri_tune.differences import SeedDifference
from camri_tune.evaluation import Judge
from camri_tune.images import Images
from camri_tune.posthoc import tune_bias
from camri_tune.records import Figure, TrialRecord
from camri_tune.report import cell_text
from camri_tune.stages import only_run
from camri_tune.stats import Hidden, crossed_interval, design_effect
from camri_tune.storage import StudyStore
from camri_tune.table1 import Cell, Outcome, Scores, legend
from tests.command import COMMAND, assert_one_line_error, camri_tune, result_of
from tests.patience import wait_for
from tests.samples import crossed

# Accuracy may fall by any amount: whether a small noisy run is feasible must not decide these tests.
SMALL = ["--epochs", "5", "--limit", "400", "--trials", "2", "--seeds", "2", "--finalists", "1", "--tolerance", "100"]
LOSSES = ("wce", "l2", "camri")
METHODS = ("ce", "threshold", *LOSSES)
ASKED = ["--important", "worst1,median", "--methods", "threshold,l2,wce,camri"]
# A loss that does not look at the important class is searched once for all.
SHARED = ("l2", "arcface")
SEEDS = (0, 1)


class Compared(NamedTuple):
    """A finished comparison: its folder and its JSON as printed."""

    folder: Path
    table: dict[str, Any]

    @property
    def cells(self) -> dict[tuple[str, str], dict[str, Any]]:
        return {(cell["important"], cell["method"]): cell for cell in self.table["cells"]}


def _compare(out: Path, *arguments: object) -> Compared:
    done = camri_tune("compare", "--out", out, *SMALL, *arguments, "--json", "--quiet")
    assert done.returncode == 0, done.stderr
    return Compared(out / "compare", result_of(done))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Compared:
    return _compare(tmp_path_factory.mktemp("comparison"), *ASKED)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return open_dataset(StudyConfig(limit=400))


def _trials(folder: Path) -> dict[str, list[tuple[int, str]]]:
    """Number and state of every training, by the name of its Optuna study."""
    path = folder / "compare-digits" / "study.db"
    if not path.exists():
        return {}
    found: dict[str, list[tuple[int, str]]] = {}
    try:
        with closing(sqlite3.connect(path)) as database:
            rows = database.execute(
                "select study_name, number, state from studies left join trials using (study_id) "
                "where study_name not like '%.runs' order by number"
            ).fetchall()
    except sqlite3.OperationalError:  # not created yet
        return {}
    for study, number, state in rows:
        found.setdefault(study, [])
        if number is not None:
            found[study].append((number, state))
    return found


def _counts(folder: Path) -> dict[str, int]:
    """Trials of each Optuna study that has any, less the comparison's name. All must be complete."""
    trials = _trials(folder)
    assert {state for found in trials.values() for _, state in found} == {"COMPLETE"}
    return {name.removeprefix("compare-digits"): len(found) for name, found in trials.items() if found}


def _label(loss: str, important: int) -> str:
    return loss if loss in SHARED else f"{important}.{loss}"


def _store(folder: Path, label: str = "") -> StudyStore:
    head = StudyStore.existing(
        open_storage(f"sqlite:///{folder / 'compare-digits' / 'study.db'}"), "compare-digits"
    )  # as moved: its checkpoints lie where it was made
    return head.cell(f"compare-digits.{label}") if label else head


# --- what is written --------------------------------------------------------------------------------------------------


def test_a_comparison_leaves_the_promised_files(finished: Compared) -> None:
    assert {path.name for path in finished.folder.iterdir()} - {".lock"} == {
        "comparison.json", "comparison.csv", "comparison.md", "comparison.html", "compare-digits",
    }  # fmt: skip
    assert not list(finished.folder.rglob("*.partial"))
    assert not list(finished.folder.rglob("best")), "a comparison exports nothing"


def test_the_files_agree_with_what_was_printed(finished: Compared) -> None:
    folder, table = finished
    assert json.loads((folder / "comparison.json").read_text()) == table
    with (folder / "comparison.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    page, text = (folder / "comparison.html").read_text(), (folder / "comparison.md").read_text()
    assert len(rows) == len(table["cells"]) == 2 * len(METHODS)
    for row, cell in zip(rows, table["cells"], strict=True):
        assert (row["important"], row["method"]) == (cell["important"], cell["method"])
        assert (row["class"], row["class_name"]) == (str(cell["class"]), cell["class_name"])
        assert row["best"] == str(int(cell["best"]))
        for prefix, outcome in (("", cell["trained"]), ("matched_", cell["matched"])):
            for name in ("recall", "accuracy"):
                figure = outcome["test"][name]
                assert float(row[f"{prefix}{name}"]) == pytest.approx(figure["mean"], abs=5e-7)
                assert f"{figure['mean']:.4f}" in page
            assert cell_text(_cell(cell), _outcome(outcome)) in text


def _outcome(written: dict[str, Any]) -> Outcome:
    def scores(part: str) -> Scores:
        recall, accuracy = (Figure(tuple(written[part][name]["values"])) for name in ("recall", "accuracy"))
        return Scores(recall, accuracy)

    return Outcome(
        validation=scores("validation"),
        test=scores("test"),
        recall_difference=SeedDifference(tuple(written["recall_difference"]["values"]), None),
        accuracy_difference=SeedDifference(tuple(written["accuracy_difference"]["values"]), None),
        hits=np.zeros((2, 0), bool),  # in no file
        groups=np.zeros(0, int),
    )


def _cell(written: dict[str, Any]) -> Cell:
    return Cell("digits", written["important"], 0, "", written["method"], {}, None, None, None)


def test_the_table_has_a_cell_for_each_class_and_method(finished: Compared) -> None:
    table = finished.table
    assert [(c["important"], c["method"]) for c in table["cells"]] == [
        (token, method) for token in ("worst1", "median") for method in METHODS
    ]
    assert (table["schema"], table["protocol"], table["trials"], table["seeds"]) == (1, "ours", 2, 2)
    about = table["datasets"]["digits"]
    assert (about["validation"], about["test"], about["epochs"], about["limit"]) == (287, 359, 5, 400)
    assert about["train"] <= 400
    assert len({c["class"] for c in table["cells"]}) == 2
    for cell in table["cells"]:
        assert cell["paper"] is None, "the paper has no digits"
        expected = {"wce": {"weight"}, "l2": {"scale"}, "camri": {"scale", "margin"}}.get(cell["method"], set())
        assert set(cell["params"]) == {"learning_rate"} | expected


def test_the_classes_are_ranked_by_the_baselines_validation_recall(finished: Compared) -> None:
    records = [r for r in _store(finished.folder).records("baseline") if r.seed in SEEDS]
    recalls = [sum(r.recall_per_class[c] for r in records) for c in range(10)]
    ranked = sorted(range(10), key=lambda c: (recalls[c], c))
    classes = [finished.cells[token, "ce"]["class"] for token in ("worst1", "median")]
    assert classes == [ranked[0], ranked[5]]


# --- who shares what --------------------------------------------------------------------------------------------------


def test_one_baseline_and_one_search_for_each_loss_that_looks_at_no_class(finished: Compared) -> None:
    worst, median = (finished.cells[token, "ce"]["class"] for token in ("worst1", "median"))
    counts = _counts(finished.folder)
    baseline, shared = counts.pop(".baseline"), counts.pop(".l2.finalists")
    assert 4 + 2 <= baseline <= 6 + 2
    assert shared in (2, 4), "one finalist for each class, which may be the same"
    assert counts == {".l2": 2} | {
        f".{c}.{loss}{suffix}": 2 for c in (worst, median) for loss in ("wce", "camri") for suffix in ("", ".finalists")
    }


def test_each_setting_is_the_best_of_its_search_on_validation(finished: Compared) -> None:
    """With one finalist: the trial of highest recall of the class, then of accuracy, then the earlier one."""
    for cell in finished.table["cells"]:
        if cell["method"] in LOSSES:
            records = _store(finished.folder, _label(cell["method"], cell["class"])).records("search")
            best = max(records, key=lambda r: (r.recall_per_class[cell["class"]], r.accuracy or 0.0, -r.number))
            assert cell["params"] == best.params


def test_cross_entropy_has_no_difference_to_itself(finished: Compared) -> None:
    for token in ("worst1", "median"):
        ce = finished.cells[token, "ce"]
        assert ce["params"] == {"learning_rate": finished.table["datasets"]["digits"]["learning_rate"]}
        for name in ("recall", "accuracy"):
            nothing = {"mean": 0.0, "values": [0.0, 0.0], "interval": None}  # no spread to judge by
            assert ce["trained"][f"{name}_difference"] == nothing


def test_the_threshold_row_is_cross_entropy_with_its_bias(finished: Compared) -> None:
    for token in ("worst1", "median"):
        threshold, ce = finished.cells[token, "threshold"], finished.cells[token, "ce"]
        assert threshold["trained"] == threshold["matched"] == ce["matched"]
        assert threshold["params"] == ce["params"]
        assert len(ce["matched"]["biases"]) == 2
        assert ce["trained"]["biases"] == []


def test_differences_are_those_of_the_values(finished: Compared) -> None:
    for (token, _), cell in finished.cells.items():
        base = finished.cells[token, "ce"]["trained"]["test"]
        for outcome in (cell["trained"], cell["matched"]):
            for name in ("recall", "accuracy"):
                values = [a - b for a, b in zip(outcome["test"][name]["values"], base[name]["values"], strict=True)]
                difference = outcome[f"{name}_difference"]
                assert difference["values"] == pytest.approx(values, abs=1e-15)
                assert difference["mean"] == pytest.approx(sum(values) / 2, abs=1e-15)


# --- the figures again, from the checkpoints --------------------------------------------------------------------------


def _models(compared: Compared, cell: dict[str, Any]) -> list[TrialRecord]:
    """The cell's models, one a seed: those of its parameters among the retrained."""
    stage, label = "finalists", _label(cell["method"], cell["class"])
    if cell["method"] in ("ce", "threshold"):
        stage, label = "baseline", ""
    records = _store(compared.folder, label).records(stage)  # type: ignore[arg-type]
    return [next(r for r in records if r.seed == seed and r.params == cell["params"]) for seed in SEEDS]


def _logits(compared: Compared, record: TrialRecord, pixels: Tensor) -> Tensor:
    spec = ModelSpec(
        model="compact",
        channels=1,
        image_size=int(pixels.shape[-1]),
        classes=tuple("0123456789"),
        head="cosine" if "scale" in record.params else "dense",
        scale=record.params.get("scale"),
    )
    path = compared.folder / "compare-digits" / "artifacts" / str(record.checkpoint)
    with torch.no_grad():
        logits: Tensor = load_classifier(path, spec)(pixels)
    return logits.double()


def _right(logits: Tensor, labels: Tensor, important: int, bias: float = 0.0) -> Tensor:
    shifted = logits.clone()
    shifted[:, important] += bias
    return shifted.argmax(dim=1) == labels


def _recall_and_accuracy(logits: Tensor, labels: Tensor, important: int, bias: float = 0.0) -> tuple[float, float]:
    right = _right(logits, labels, important, bias)
    return float(right[labels == important].double().mean()), float(right.double().mean())


def test_every_figure_is_that_of_the_checkpoints(finished: Compared, digits: Dataset) -> None:
    test = digits.test()
    for cell in finished.table["cells"]:
        models = _models(finished, cell)
        for name, outcome in (("trained", cell["trained"]), ("matched", cell["matched"])):
            biases = outcome["biases"] or [0.0, 0.0]
            assert len(biases) == 2
            assert bool(outcome["biases"]) is (name == "matched" or cell["method"] == "threshold")
            for part, images in (("test", test), ("validation", digits.validation)):
                expected = [
                    _recall_and_accuracy(_logits(finished, r, images.pixels), images.labels, cell["class"], bias)
                    for r, bias in zip(models, biases, strict=True)
                ]
                written = outcome[part]
                found = list(zip(written["recall"]["values"], written["accuracy"]["values"], strict=True))
                assert found == [pytest.approx(pair, abs=1e-12) for pair in expected], (cell["method"], name, part)
                assert math.isclose(written["recall"]["mean"], sum(r for r, _ in expected) / 2)


def _answers(compared: Compared, cell: dict[str, Any], test: Images) -> dict[str, NDArray[np.bool_]]:
    """Whether each seed's model gets each test image right (2, N), as trained and at matched accuracy."""
    logits = [_logits(compared, record, test.pixels) for record in _models(compared, cell)]
    return {
        name: np.stack(
            [
                _right(each, test.labels, cell["class"], bias).numpy()
                for each, bias in zip(logits, cell[name]["biases"] or [0.0, 0.0], strict=True)
            ]
        )
        for name in ("trained", "matched")
    }


def test_intervals_and_the_best_are_those_of_the_models_answers(finished: Compared, digits: Dataset) -> None:
    test = digits.test()
    assert len(set(test.groups.tolist())) == len(test), "here every image counts alone"
    for token in ("worst1", "median"):
        right = {method: _answers(finished, finished.cells[token, method], test) for method in METHODS}
        ours = (test.labels == finished.cells[token, "ce"]["class"]).numpy()
        base = right["ce"]["trained"]
        for method, answers in right.items():
            for name, new in answers.items():
                written = finished.cells[token, method][name]
                for figure, part in (("recall", ours), ("accuracy", np.ones_like(ours))):
                    expected = crossed(new[:, part], base[:, part])
                    assert written[f"{figure}_difference"]["interval"] == pytest.approx(expected, abs=1e-9)

        first, second = sorted(METHODS, key=lambda m: -right[m]["trained"][:, ours].sum())[:2]
        low, high = crossed(right[first]["trained"][:, ours], right[second]["trained"][:, ours]) or (0, 0)
        best = [method for method in METHODS if finished.cells[token, method]["best"]]
        assert best == ([first] if 0 < low < high else [])


def test_test_images_of_one_group_count_together(
    finished: Compared, digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The digits have no groups: here some are made of what was judged already. Nothing is trained for it."""
    shutil.copytree(finished.folder, tmp_path / "compare")
    test = digits.test()
    groups = torch.arange(len(test)) // 40
    monkeypatch.setattr(Judge, "test", Images(test.pixels, test.labels, groups))
    options = {name.removeprefix("--"): value for name, value in zip(SMALL[::2], SMALL[1::2], strict=True)}
    config = StudyConfig.build({**options, "important": ("worst1",), "out": tmp_path})
    table = compare(config, datasets=["digits"], methods=["ce", "l2"], protocol="ours")
    ours = (test.labels == table.cells[0].important).numpy()
    base = _answers(finished, finished.cells["worst1", "ce"], test)["trained"]
    new = _answers(finished, finished.cells["worst1", "l2"], test)["trained"]
    assert _counts(tmp_path / "compare") == _counts(finished.folder)

    l2 = table.cells[1].trained
    assert l2 is not None
    assert (l2.hits == new[:, ours]).all()
    assert l2.groups.tolist() == groups[ours].tolist()
    for difference, part in ((l2.recall_difference, ours), (l2.accuracy_difference, np.ones_like(ours))):
        grouped, alone = (crossed(new[:, part], base[:, part], g) for g in (groups[part].tolist(), None))
        assert difference.interval == pytest.approx(grouped, abs=1e-9)
        assert difference.interval != pytest.approx(alone, abs=1e-9)


def test_test_images_of_unnamed_tracks_count_as_validations_tracks_show(
    finished: Compared, digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The digits have none: here validation's images are put in tracks of one class, and test's in unnamed ones."""
    shutil.copytree(finished.folder, tmp_path / "compare")
    data = open_dataset(StudyConfig(limit=400))
    train, images = data.fold(0)
    order = torch.argsort(images.labels, stable=True)
    groups = torch.empty_like(order)
    groups[order] = torch.arange(len(order)) // 9
    data.validation = Images(images.pixels, images.labels, groups)
    data._folds[0] = train, data.validation
    data.hidden_group_size = 9
    monkeypatch.setattr(comparison, "open_dataset", lambda *_: data)
    options = {name.removeprefix("--"): value for name, value in zip(SMALL[::2], SMALL[1::2], strict=True)}
    config = StudyConfig.build({**options, "important": ("worst1",), "out": tmp_path})
    table = compare(config, datasets=["digits"], methods=["ce", "l2", "wce"], protocol="ours")
    assert _counts(tmp_path / "compare") == _counts(finished.folder), "nothing is trained for it"

    test, c = digits.test(), table.cells[0].important
    right = {
        (method, part): _answers(finished, finished.cells["worst1", method], of_part)["trained"]
        for method in ("ce", "l2", "wce")
        for part, of_part in (("test", test), ("validation", images))
    }

    effects: list[float] = []

    def expected(new: str, old: str, ours: bool) -> tuple[float, float] | None:
        values = []
        for part, of_part in (("test", test), ("validation", images)):
            chosen = (of_part.labels == c).numpy() if ours else np.ones(len(of_part), bool)
            values.append((right[new, part][:, chosen].astype(float) - right[old, part][:, chosen], chosen))
        (here, _), (known, mask) = values
        effect = design_effect(known.mean(axis=0), groups.numpy()[mask], 9)
        effects.append(effect)
        return crossed_interval(here, hidden=Hidden(9, effect))

    l2, wce = (cell.trained for cell in table.cells[1:])
    assert l2 is not None
    assert wce is not None
    assert l2.recall_difference.interval == pytest.approx(expected("l2", "ce", True))
    assert l2.accuracy_difference.interval == pytest.approx(expected("l2", "ce", False))
    assert l2.less(wce).interval == pytest.approx(expected("l2", "wce", True)), "as who is best is decided"
    assert max(effects) > 1.05, "else nothing is seen of it"
    assert table.facts["datasets"]["digits"]["hidden_group_size"] == 9
    assert "The 359 test images of digits are frames of about 40 unnamed tracks" in legend(table)


def test_a_comparison_says_what_makes_it_say_little(tmp_path: Path) -> None:
    """A class with few validation images, whose trials a study would rank on folds; a baseline that learned nothing."""
    rng = np.random.default_rng(0)
    for name, count in (("a", 30), ("b", 300)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(count):  # noise: nothing in them tells who is what
            image = Image.fromarray(rng.integers(256, size=(8, 8, 3), dtype=np.uint8))
            image.save(tmp_path / "images" / name / f"{index}.png")
    options = ["--epochs", "1", "--trials", "1", "--seeds", "1", "--tolerance", "100", "--image-size", "8"]
    done = camri_tune(
        "compare", "--dataset", tmp_path / "images", "--out", tmp_path / "out", *options,
        "--important", "a,b", "--methods", "ce", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    notice = "Class 0 (a) has only 5 validation images, too few to rank trials by"
    notice += ", but here every method has the same one split."
    said = result_of(done)["datasets"]["images"]["notices"]
    assert said[0] == notice
    assert len(said) == 2
    assert ", not clearly better than always naming class 1 (b) (0.906): " in said[1]
    table = (tmp_path / "out" / "compare" / "comparison.md").read_text()
    for text in said:
        assert text in done.stderr
        assert f"images: {text}" in table


def test_each_bias_has_the_highest_recall_that_keeps_accuracy_on_validation(
    finished: Compared, digits: Dataset
) -> None:
    """Any accuracy is kept here: so every image of the class is found, and no bias that does so is more accurate."""
    images = digits.validation
    for cell in finished.table["cells"]:
        for record, bias in zip(_models(finished, cell), cell["matched"]["biases"], strict=True):
            logits = _logits(finished, record, images.pixels)
            recall, accuracy = _recall_and_accuracy(logits, images.labels, cell["class"], bias)
            assert recall == 1.0
            assert bias >= 0
            others = [_recall_and_accuracy(logits, images.labels, cell["class"], b / 4) for b in range(160)]
            assert accuracy >= max(a for r, a in others if r == 1.0)


# --- again, and more of it --------------------------------------------------------------------------------------------


def _without_time(table: dict[str, Any]) -> dict[str, Any]:
    about = {name: {**facts, "wall_seconds": None} for name, facts in table["datasets"].items()}
    return {**table, "datasets": about}


def test_the_same_command_again_trains_nothing_and_says_the_same(finished: Compared) -> None:
    before = _trials(finished.folder)
    texts = [(finished.folder / f"comparison.{suffix}").read_text() for suffix in ("csv", "md")]
    again = _compare(finished.folder.parent, *ASKED)
    assert _trials(again.folder) == before
    assert _without_time(again.table) == _without_time(finished.table)
    assert [(again.folder / f"comparison.{suffix}").read_text() for suffix in ("csv", "md")] == texts


def test_a_class_and_a_method_that_come_later_train_only_what_is_new(finished: Compared, tmp_path: Path) -> None:
    shutil.copytree(finished.folder, tmp_path / "compare")
    used = {cell["class"] for cell in finished.table["cells"]}
    new = next(c for c in range(10) if c not in used)
    more = _compare(
        tmp_path, "--important", f"worst1,{new},median", "--methods", "camri,arcface,wce,threshold,l2", "--workers", "2"
    )
    assert {key: cell for key, cell in more.cells.items() if key in finished.cells} == finished.cells
    added = set(more.cells) - set(finished.cells)
    assert added == {(str(new), m) for m in (*METHODS, "arcface")} | {(t, "arcface") for t in ("worst1", "median")}
    before, after = _counts(finished.folder), _counts(more.folder)
    grown = {name: after[name] - before.get(name, 0) for name in after if after[name] != before.get(name)}
    assert grown.pop(".l2.finalists", 2) == 2, "for the new class, where no other class has the same finalist"
    assert grown.pop(".arcface.finalists") in (2, 4)
    assert grown == {".arcface": 2} | {
        f".{new}.{loss}{suffix}": 2 for loss in ("wce", "camri") for suffix in ("", ".finalists")
    }


def test_trials_of_an_earlier_call_that_asked_for_more_give_no_method_an_advantage(
    finished: Compared, tmp_path: Path
) -> None:
    shutil.copytree(finished.folder, tmp_path / "compare")
    more = _compare(tmp_path, "--important", "worst1", "--methods", "camri", "--trials", "6", "--workers", "2")
    assert {cell["method"] for cell in more.table["cells"]} == {"ce", "camri"}
    assert max(_counts(more.folder).values()) == 6
    again = _compare(tmp_path, *ASKED)
    assert _without_time(again.table) == _without_time(finished.table)
    paper = _compare(tmp_path, "--important", "worst1", "--methods", "camri", "--protocol", "paper")
    (worst,) = {cell["class"] for cell in paper.table["cells"]}
    retrained = {r.source_trial for r in _store(paper.folder, f"{worst}.camri").records("finalists")}
    assert len(retrained - {0, 1}) <= 1, "but for the finalist of the six"


def test_the_papers_protocol_retrains_what_is_missing_and_chooses_by_test(
    finished: Compared, digits: Dataset, tmp_path: Path
) -> None:
    """The table alone does not have the settings that were not chosen: they are measured anew from the checkpoints."""
    shutil.copytree(finished.folder, tmp_path / "compare")
    ours = {path.name: path.read_bytes() for path in finished.folder.glob("comparison.*")}
    paper = _compare(tmp_path, *ASKED, "--protocol", "paper")
    assert {path.name: path.read_bytes() for path in paper.folder.glob("comparison.*")} == ours
    suffixes = ("json", "csv", "md", "html")
    assert {path.name for path in paper.folder.glob("comparison-paper.*")} == {
        f"comparison-paper.{s}" for s in suffixes
    }
    assert json.loads((paper.folder / "comparison-paper.json").read_text()) == paper.table
    assert paper.table["protocol"] == "paper"
    assert "PAPER" in (paper.folder / "comparison-paper.md").read_text()

    before, after = _trials(finished.folder), _trials(paper.folder)
    for name, trials in after.items():
        assert trials[: len(before[name])] == before[name]
        assert len(trials) == (4 if name.endswith(".finalists") and before[name] else len(before[name]))

    for cell in paper.table["cells"]:
        if cell["method"] in LOSSES:
            records = _store(paper.folder, _label(cell["method"], cell["class"])).records("finalists")
            settings = [sorted((r for r in records if r.source_trial == n), key=lambda r: r.seed or 0) for n in (0, 1)]
            assert [[r.seed for r in models] for models in settings] == [[0, 1]] * 2
            base = [r for r in _store(paper.folder).records("baseline") if r.seed in SEEDS]
            for bias, outcome in ((False, cell["trained"]), (True, cell["matched"])):
                measured = [_on_test(paper, digits, models, base, cell["class"], bias) for models in settings]
                best = max(measured)
                assert outcome["test"]["recall"]["mean"] == pytest.approx(best[0])
                assert outcome["test"]["accuracy"]["mean"] == pytest.approx(best[1])
                if not bias:
                    assert cell["params"] == settings[measured.index(best)][0].params
    for token in ("worst1", "median"):
        assert paper.cells[token, "ce"] == {**finished.cells[token, "ce"], "best": paper.cells[token, "ce"]["best"]}


def _on_test(
    compared: Compared,
    data: Dataset,
    models: Sequence[TrialRecord],
    base: Sequence[TrialRecord],
    important: int,
    bias: bool,
) -> tuple[float, float]:
    """Mean recall and accuracy on test of a setting; if so, with each seed's bias, tuned on validation."""
    validation, test = data.validation, data.test()
    figures = []
    for record, old in zip(models, base, strict=True):
        floor = (old.accuracy or 0.0) - 1.0  # the tolerance
        logits = _logits(compared, record, validation.pixels).numpy()
        shift = tune_bias(logits, validation.labels.numpy(), important=important, floor=floor).bias if bias else 0.0
        figures.append(_recall_and_accuracy(_logits(compared, record, test.pixels), test.labels, important, shift))
    recalls, accuracies = zip(*figures, strict=True)
    return sum(recalls) / len(recalls), sum(accuracies) / len(accuracies)


# --- interrupted, and one at a time -----------------------------------------------------------------------------------


def test_an_interrupted_comparison_resumes_and_is_alone_in_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "compare"
    folder.mkdir()
    options: Sequence[object] = ["--out", tmp_path, *SMALL, "--seeds", "1", "--important", "3", "--methods", "wce,l2"]

    def states(suffix: str) -> list[str]:
        return [
            state for name, found in _trials(folder).items() if name.endswith(suffix) for _, state in found
        ]  # fmt: skip

    with only_run(folder):
        assert_one_line_error(camri_tune("compare", *options), "another run", str(folder), "--name")

    # As from a terminal: where the tests run as a background job, interrupts are ignored, and that is inherited.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [str(COMMAND), "compare", *map(str, options)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        wait_for(lambda: "RUNNING" in states(".wce") + states(".l2"))
    finally:
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
    assert process.returncode == 130, errors
    assert b"resumes" in errors
    assert b"Traceback" not in errors
    assert not (folder / "comparison.json").exists()
    complete = {(name, n) for name, found in _trials(folder).items() for n, s in found if s == "COMPLETE"}
    assert len(complete) >= 5, "the baseline was finished"

    again = camri_tune("compare", *options, "--json")
    assert again.returncode == 0, again.stderr
    assert [cell["method"] for cell in result_of(again)["cells"]] == ["ce", "wce", "l2"]
    trials = _trials(folder)
    after = {(name, n): state for name, found in trials.items() for n, state in found}
    assert all(after[key] == "COMPLETE" for key in complete), "nothing that was finished was lost"
    assert set(after.values()) <= {"COMPLETE", "FAIL"}
    finished = {name: sum(state == "COMPLETE" for _, state in found) for name, found in trials.items()}
    assert finished["compare-digits.3.wce"] == finished["compare-digits.l2"] == 2
    assert finished["compare-digits.3.wce.finalists"] == finished["compare-digits.l2.finalists"] == 1


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--methods", "camri,foo"], ["--methods", "'foo'", "cosface-i"]),
        (["--protocol", "theirs"], ["--protocol", "'theirs'", "ours, paper"]),
        (["--important", "worst1,eleven"], ["--important", "'eleven'", "0 to 9", "median"]),
        (["--methods", "ce,camri", "--weight", "3"], ["--weight", "any of --methods ce, camri", "wce", "leave it out"]),
        (["--dataset", ","], ["--dataset", "','", "at least 1"]),
        (["--dataset", "digits,nowhere"], ["'nowhere'", "digits", "folder"]),
    ],
)
def test_bad_input_gets_one_line_before_anything_is_trained(
    arguments: list[str], parts: list[str], tmp_path: Path
) -> None:
    assert_one_line_error(camri_tune("compare", "--out", tmp_path, *SMALL, *arguments), *parts)
    assert not list(tmp_path.rglob("study.db"))


def test_another_set_up_in_the_same_folder_names_the_field(finished: Compared) -> None:
    before = _trials(finished.folder)
    done = camri_tune("compare", "--out", finished.folder.parent, *SMALL, *ASKED, "--epochs", "2")
    assert_one_line_error(done, "epochs = 5, not 2", "--name")
    assert _trials(finished.folder) == before
