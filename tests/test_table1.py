"""The arithmetic of the comparison's table: differences over seeds and images, who is best, what may be asked for."""

import csv
import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from camri_tune.comparison import _options, _papers, _study_of
from camri_tune.config import Loss, StudyConfig
from camri_tune.differences import SeedDifference
from camri_tune.errors import InputError
from camri_tune.records import Figure, without_nan
from camri_tune.stats import mean_interval
from camri_tune.table1 import (
    METHODS,
    TITLES,
    Cell,
    Method,
    Outcome,
    Protocol,
    Scores,
    Table,
    below,
    best_of,
    legend,
    paper_figures,
    read_datasets,
    read_methods,
    read_protocol,
)
from tests.samples import MANY, crossed, hits_of

REFERENCE = Path(__file__).parents[2] / "shared" / "reference" / "table1.csv"
ACCURACY = (0.9, 0.9, 0.9)
# Over seeds alone the lead holds up: 11.7 +- 7.2 points. Of twenty images it is two or three.
AHEAD, BEHIND = (0.90, 0.95, 0.90), (0.80, 0.85, 0.75)
FEW = 20


def _outcome(
    recalls: Sequence[float], accuracies: Sequence[float] = ACCURACY, *, images: int = MANY, together: int = 1
) -> Outcome:
    """An outcome whose test figures are these; cross-entropy's recall is 0.5 with every seed, its accuracy 0.9.

    The important class has so many test images, of which as many as `together`, neighbours, are of one group.
    """
    test = Scores(Figure(tuple(recalls)), Figure(tuple(accuracies[: len(recalls)])))
    hits, groups = hits_of(test.recall.values, images), np.arange(images) // together
    return Outcome(
        validation=Scores(Figure((0.5,) * len(recalls)), test.accuracy),
        test=test,
        recall_difference=SeedDifference.of(hits, hits_of((0.5,) * len(recalls), images), groups),
        accuracy_difference=SeedDifference.of(hits_of(test.accuracy.values), hits_of((0.9,) * len(recalls))),
        hits=hits,
        groups=groups,
    )


def _cell(method: Method, trained: Outcome | None, token: str = "worst1", dataset: str = "digits") -> Cell:
    return Cell(dataset, token, 3, "three", method, {"scale": 16.0}, trained, trained, None)


# --- differences ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("images", [10, 1000])
def test_a_difference_is_taken_seed_by_seed(images: int) -> None:
    new, old = hits_of((0.8, 0.9, 0.7), images), hits_of((0.5, 0.7, 0.6), images)
    difference = SeedDifference.of(new, old)
    assert difference.values == pytest.approx((0.3, 0.2, 0.1))
    assert difference.mean == pytest.approx(0.2)
    assert difference.interval == pytest.approx(crossed(new, old))
    assert not difference.holds_up, "0.2 +- 0.24 reaches below zero, however many images"


def test_on_endless_images_the_interval_is_that_over_seeds() -> None:
    low, high = SeedDifference.of(hits_of((0.8, 0.9, 0.7)), hits_of((0.5, 0.7, 0.6))).interval or (0, 0)
    half = float(stats.t.ppf(0.975, 2)) * 0.1 / math.sqrt(3)
    assert (low, high) == pytest.approx((0.2 - half, 0.2 + half), abs=0.002)


def test_a_difference_is_cut_at_a_whole_and_not_where_a_share_is() -> None:
    """A share ends at 0; a difference, and its interval, may well lie below, and end at -1."""
    difference = SeedDifference.of(hits_of((0.1, 0.9)), hits_of((1.0, 1.0)))
    assert difference.values == pytest.approx((-0.9, -0.1))
    assert difference.interval is not None
    assert difference.interval.low == -1


@pytest.mark.parametrize("old", [hits_of((0.8,), 10), hits_of((0.8, 0.9), 20), hits_of((0.8, 0.9, 0.7), 10)])
def test_seeds_or_images_that_do_not_pair_have_no_difference(old: NDArray[np.bool_]) -> None:
    with pytest.raises(ValueError, match="not to the same images"):
        SeedDifference.of(hits_of((0.8, 0.9), 10), old)


@pytest.mark.parametrize(
    ("new", "old", "images", "holds_up"),
    [
        ((0.60, 0.61, 0.62), (0.5, 0.5, 0.5), MANY, True),
        ((0.40, 0.39, 0.38), (0.5, 0.5, 0.5), MANY, False),
        ((0.50, 0.55, 0.51), (0.5, 0.5, 0.5), MANY, False),
        ((0.8,), (0.5,), MANY, False),
        ((0.6, 0.6, 0.6), (0.5, 0.5, 0.5), MANY, True),  # the same with every seed, but not on every image
        ((0.6, 0.6, 0.6), (0.5, 0.5, 0.5), FEW, False),  # two images
        ((0.9, 0.8, 0.7), (0.8, 0.7, 0.6), MANY, True),
        ((34 / 36, 36 / 36), (33 / 36, 35 / 36), 36, False),  # an image each
        ((0.5, 0.5), (0.5, 0.5), MANY, False),
        ((1.0, 1.0), (0.0, 0.0), MANY, False),  # the same with every seed on every image: no spread at all
        ((1.0, 1.0), (0.0, 0.0), 1, False),
    ],
)
def test_a_difference_holds_up_where_its_interval_lies_above_zero(
    new: tuple[float, ...], old: tuple[float, ...], images: int, holds_up: bool
) -> None:
    pair = hits_of(new, images), hits_of(old, images)
    low, high = crossed(*pair) or (0, 0)
    assert SeedDifference.of(*pair).holds_up is (0 < low < high) is holds_up


def test_one_seed_has_a_difference_without_interval() -> None:
    difference = SeedDifference.of(hits_of((0.3,), 10), hits_of((0.0,), 10))
    assert difference.interval is None
    assert difference.as_json() == {"mean": 0.3, "values": [0.3], "interval": None}


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_without_any_spread_there_is_no_interval(share: float) -> None:
    """Every seed gains as much on every image: what another would gain is not known for certain."""
    difference = SeedDifference.of(hits_of((share, share)), hits_of((0.0, 0.0)))
    assert (difference.values, difference.interval) == ((share, share), None)


def test_a_difference_in_json() -> None:
    new, old = hits_of((0.375, 0.5, 0.625), 40), hits_of((0.0, 0.0, 0.0), 40)
    written = json.loads(json.dumps(SeedDifference.of(new, old).as_json(), allow_nan=False))
    assert (written["mean"], written["values"]) == (0.5, [0.375, 0.5, 0.625])
    assert written["interval"] == pytest.approx(crossed(new, old))
    low, high = written["interval"]
    assert low + high == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("values", "expected"),
    [((-0.01, 0.0), True), ((0.01, -0.01), False), ((0.0, 0.0), False), ((1e-17, -3e-17), False), ((0.2, 0.1), False)],
)
def test_below_means_below_by_more_than_rounding(values: tuple[float, ...], expected: bool) -> None:
    assert below(SeedDifference(values, None)) is expected


# --- who is best ------------------------------------------------------------------------------------------------------


def test_the_best_has_the_highest_recall_of_those_that_kept_accuracy() -> None:
    column = [
        _cell("ce", _outcome((0.50, 0.51, 0.52))),
        _cell("camri", _outcome((0.80, 0.82, 0.83))),
        _cell("l2", _outcome((0.60, 0.61, 0.62))),
        _cell("arcface", None),
    ]
    assert best_of(column) is column[1]
    assert best_of(list(reversed(column))) is column[1]


def test_nobody_is_best_by_a_lead_that_does_not_hold_up_over_seeds() -> None:
    """The runner-up counts, seed by seed: not cross-entropy, which is far behind, and not the means alone.

    On so many images that these do not matter.
    """
    lead = [_cell("camri", _outcome((0.90, 0.70, 0.90))), _cell("wce", _outcome((0.80, 0.81, 0.80)))]
    assert best_of([*lead, _cell("ce", _outcome((0.1, 0.1, 0.1)))]) is None
    paired = [_cell("camri", _outcome((0.31, 0.62, 0.93))), _cell("wce", _outcome((0.30, 0.60, 0.90)))]
    assert best_of(paired) is None, "differences 0.01, 0.02, 0.03: 0.02 +- 0.025"
    paired = [_cell("camri", _outcome((0.32, 0.62, 0.93))), _cell("wce", _outcome((0.30, 0.60, 0.90)))]
    assert best_of(paired) is paired[0], "recalls differ widely over seeds, their differences hardly"


@pytest.mark.parametrize(
    ("images", "together", "winner"),
    [
        (FEW, 1, None),
        (MANY, 1, "camri"),
        (MANY, MANY // FEW, None),  # as many frames, of twenty objects
        (MANY, MANY, None),  # of one
    ],
)
def test_nobody_is_best_by_a_lead_that_does_not_hold_up_over_images(
    images: int, together: int, winner: str | None
) -> None:
    """The same figures of the same seeds: what they say of other images depends on how many these are."""
    ours, theirs = (_outcome(recalls, images=images, together=together) for recalls in (AHEAD, BEHIND))
    over_seeds = mean_interval([a - b for a, b in zip(AHEAD, BEHIND, strict=True)])
    assert over_seeds is not None
    assert over_seeds.low > 0.04
    low, high = crossed(ours.hits, theirs.hits, ours.groups) or (0, 0)
    assert (0 < low < high) is (winner is not None)
    best = best_of(
        [
            _cell("ce", _outcome((0.5, 0.5, 0.5), images=images, together=together)),
            _cell("wce", theirs),
            _cell("camri", ours),
        ]
    )
    assert (best and best.method) == winner


def test_frames_of_one_group_count_as_one_image() -> None:
    """Where all frames of an object are right or wrong together; whatever the groups are called, in any order."""
    few, frames, alone = (
        SeedDifference.of(ours.hits, theirs.hits, ours.groups).interval or (0, 0)
        for images, together in ((FEW, 1), (MANY, MANY // FEW), (MANY, 1))
        for ours, theirs in [[_outcome(recalls, images=images, together=together) for recalls in (AHEAD, BEHIND)]]
    )
    assert frames == pytest.approx(few)
    assert frames[1] - frames[0] > 1.5 * (alone[1] - alone[0])
    order = np.random.default_rng(0).permutation(MANY)
    groups = 1000 - 7 * (order // (MANY // FEW))
    shuffled = SeedDifference.of(hits_of(AHEAD)[:, order], hits_of(BEHIND)[:, order], groups).interval
    assert shuffled == pytest.approx(few)


def test_nobody_is_best_of_equals() -> None:
    ours = (0.80, 0.82, 0.83)
    assert best_of([_cell("camri", _outcome(ours)), _cell("wce", _outcome(ours))]) is None
    everywhere = [_cell("camri", _outcome((1.0, 1.0))), _cell("wce", _outcome((0.0, 0.0)))]
    assert best_of(everywhere) is None, "the same lead on every image with every seed: no spread to judge by"
    lead = [_cell("camri", _outcome(ours)), _cell("wce", _outcome((0.79, 0.81, 0.82)))]
    assert best_of(lead) is lead[0], "the same lead with every seed, but not on every image"


def test_nobody_is_best_with_one_seed() -> None:
    assert best_of([_cell("camri", _outcome((0.9,))), _cell("ce", _outcome((0.1,)))]) is None


def test_nobody_is_best_without_a_rival_or_without_anybody() -> None:
    ce = _cell("ce", _outcome((0.5, 0.6, 0.7)))
    assert best_of([]) is None
    assert best_of([_cell("camri", None), ce]) is None
    assert best_of([_cell("camri", _outcome((0.90, 0.91, 0.92)))]) is None


# --- the table --------------------------------------------------------------------------------------------------------


def _table(protocol: Protocol = "ours") -> Table:
    cells = []
    for dataset, token in (("digits", "worst1"), ("digits", "median"), ("mnist", "worst1")):
        cells.append(_cell("ce", _outcome((0.50, 0.51, 0.52)), token, dataset))
        camri = None if token == "median" else _outcome((0.80, 0.82, 0.83), (0.9, 0.8, 0.9))
        cells.append(_cell("camri", camri, token, dataset))
    return Table(tuple(cells), protocol, {"seeds": 3, "trials": 5, "datasets": {}}, Path("somewhere"))


def test_the_legend_says_what_may_be_given_up_and_whose_bias_is_shown() -> None:
    table = _table()
    assert "kept mean accuracy at cross-entropy's; with a bias it may be another setting" in legend(table)
    given = Table(table.cells, table.protocol, {**table.facts, "tolerance": 0.5}, table.folder)
    assert "kept mean accuracy at cross-entropy's less 0.5 points; with a bias" in legend(given)


def test_a_table_has_a_column_for_each_data_set_and_class_in_order() -> None:
    table = _table()
    assert table.columns() == [("digits", "worst1"), ("digits", "median"), ("mnist", "worst1")]
    for dataset, token in table.columns():
        column = table.column(dataset, token)
        assert [cell.method for cell in column] == ["ce", "camri"]
        assert {(cell.dataset, cell.token) for cell in column} == {(dataset, token)}


def test_a_table_in_json_marks_the_best_of_each_column() -> None:
    written = json.loads(json.dumps(without_nan(_table().as_json()), allow_nan=False))
    assert (written["schema"], written["protocol"], written["seeds"], written["trials"]) == (1, "ours", 3, 5)
    assert "folder" not in written
    marks = [(cell["dataset"], cell["important"], cell["method"]) for cell in written["cells"] if cell["best"]]
    assert marks == [("digits", "worst1", "camri"), ("mnist", "worst1", "camri")]
    camri = written["cells"][1]
    assert (camri["class"], camri["class_name"], camri["params"]) == (3, "three", {"scale": 16.0})
    assert camri["trained"]["test"]["recall"]["values"] == [0.80, 0.82, 0.83]
    assert camri["trained"]["accuracy_difference"]["mean"] == pytest.approx(-0.1 / 3)
    assert set(camri["trained"]) == {"validation", "test", "recall_difference", "accuracy_difference", "biases"}
    ends = crossed(hits_of((0.80, 0.82, 0.83)), hits_of((0.5, 0.5, 0.5)))
    assert camri["trained"]["recall_difference"]["interval"] == pytest.approx(ends)
    assert written["cells"][3]["trained"] is None
    assert written["cells"][3]["matched"] is None


def test_an_outcome_without_recall_is_null_in_json() -> None:
    """A class without images has no recall; JSON has no NaN."""
    some, nan = _outcome((0.5, 0.5)), (math.nan, math.nan)
    nothing = replace(some, test=Scores(Figure(nan), some.test.accuracy), recall_difference=SeedDifference(nan, None))
    written = json.loads(json.dumps(without_nan(nothing.as_json()), allow_nan=False))
    assert written["test"]["recall"]["values"] == [None, None]
    assert written["recall_difference"] == {"mean": None, "values": [None, None], "interval": None}


def test_a_cell_has_the_papers_figures_by_name() -> None:
    cell = Cell("gtsrb", "worst1", 3, "three", "ce", {}, None, None, (0.76, 0.98))
    assert cell.as_json()["paper"] == {"recall": 0.76, "accuracy": 0.98}
    assert _cell("ce", None).as_json()["paper"] is None


def test_the_legend_says_what_all_were_trained_with() -> None:
    assert "All with" not in legend(_table())
    given = replace(_table(), facts={**_table().facts, "options": {"--batch-size": "64", "--scale": "4..8 log"}})
    assert "All with --batch-size 64, --scale 4..8 log." in legend(given)


def test_options_that_are_not_the_default_are_told_as_they_can_be_given() -> None:
    assert _options(StudyConfig()) == {}
    given = {"batch_size": 64, "scale": "4..8 log", "optimizer": ["adamw", "sgd"], "weights": "w.pt", "image_size": 16}
    assert _options(StudyConfig.build({"model": "torchvision:resnet18", **given})) == {
        "--weights": "w.pt",
        "--image-size": "16",
        "--optimizer": "adamw,sgd",
        "--batch-size": "64",
        "--scale": "4..8 log",
    }


def test_the_papers_figures_stand_beside_its_own_data_alone(tmp_path: Path) -> None:
    for dataset in ("gtsrb", "cifar10", "awa2"):
        assert ("worst1", "camri") in _papers(_study_of(dataset, StudyConfig(), tmp_path))
        for own in (tmp_path / dataset, tmp_path / f"{dataset}.npz"):
            assert _papers(_study_of(str(own), StudyConfig(), tmp_path)) == {}


def test_the_legend_says_who_chose() -> None:
    ours, paper = legend(_table()), legend(_table("paper"))
    for text in (ours, paper):
        assert "over 3 seeds" in text
        assert "5 trials" in text
        assert "interval over seeds and images" in text
    assert "test chose nothing" in ours
    assert "PAPER'S PROTOCOL" not in ours
    assert "test chose nothing" not in paper
    assert re.search(r"PAPER'S PROTOCOL.* test set itself, which flatters", paper)


# --- what may be asked for --------------------------------------------------------------------------------------------


def test_every_loss_is_a_method_and_has_a_title() -> None:
    assert set(METHODS) == {*get_args(Loss), "threshold"}
    assert set(TITLES) == set(METHODS)
    assert len(set(TITLES.values())) == len(METHODS)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("camri", ("ce", "camri")),
        ("camri, l2 ,threshold", ("ce", "threshold", "l2", "camri")),
        ("camri,ce,camri,", ("ce", "camri")),
        (",".join(reversed(METHODS)), METHODS),
    ],
)
def test_methods_come_in_the_tables_order_with_cross_entropy(text: str, expected: tuple[str, ...]) -> None:
    assert read_methods(text) == expected


@pytest.mark.parametrize("text", ["", " , "])
def test_no_method_at_all_is_no_comparison(text: str) -> None:
    with pytest.raises(InputError, match=f"--methods is {text!r}, but must name at least 1 method of ce, "):
        read_methods(text)


@pytest.mark.parametrize("name", ["nope", "CAMRI", "camri l2", "ours"])
def test_an_unknown_method_is_named_with_those_there_are(name: str) -> None:
    with pytest.raises(InputError) as raised:
        read_methods(f"l2,{name}")
    message = str(raised.value)
    assert "\n" not in message
    assert repr(name) in message
    assert all(method in message for method in METHODS)


def test_data_sets_come_as_asked_each_once() -> None:
    assert read_datasets("gtsrb") == ("gtsrb",)
    assert read_datasets(" mnist , a/b c,mnist,") == ("mnist", "a/b c")


@pytest.mark.parametrize("text", ["", ",", " , "])
def test_no_data_set_at_all_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"^--dataset is '[ ,]*', but must name at least 1 data set$"):
        read_datasets(text)


def test_protocols_by_name() -> None:
    assert [read_protocol(name) for name in ("ours", "paper")] == ["ours", "paper"]
    with pytest.raises(InputError, match=r"^--protocol is 'theirs', but must be one of ours, paper$"):
        read_protocol("theirs")


# --- the paper's figures ----------------------------------------------------------------------------------------------


def test_some_of_the_papers_figures() -> None:
    """Typed off the poster's Table 1."""
    paper = paper_figures()
    assert paper["gtsrb", "worst1", "camri"] == (0.8353, 0.9801)
    assert paper["gtsrb", "worst1", "ce"] == (0.76, 0.98)
    assert paper["cifar10", "worst1", "wce"] == (0.8023, 0.8797)
    assert paper["awa2", "median", "arcface"] == (0.6123, 0.6767)
    assert ("awa2", "worst1", "wce") not in paper, "no setting of it kept accuracy there"
    assert ("cifar10", "median", "crwwce") not in paper
    assert len(paper) == 32
    assert all(method in METHODS for _, _, method in paper)
    assert all(0 < share < 1 for figures in paper.values() for share in figures)


def test_the_packages_copy_of_the_papers_table_is_the_reference() -> None:
    if not REFERENCE.exists():
        pytest.skip(f"the reference table is not at {REFERENCE}")
    with REFERENCE.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert paper_figures() == {
        (row["dataset"], row["important"], row["method"]): (float(row["recall"]), float(row["accuracy"]))
        for row in rows
    }
    assert len(rows) == 32
