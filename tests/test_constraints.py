"""Floors under the recall of single classes, and the largest drop: arithmetic, what is said of them, and runs."""

import json
import math
import re
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers._gp import sampler
from optuna.trial import FrozenTrial, create_trial
from scipy import stats

from camri_tune.baseline import resolve_floors
from camri_tune.charts import recall_accuracy
from camri_tune.claims import sentence_of
from camri_tune.config import StudyConfig, floor_of
from camri_tune.constraint_claims import (
    constraint_table,
    doubtful_constraints,
    obstacle,
    said_of_constraint,
)
from camri_tune.constraints import (
    ClassOnTest,
    OnTest,
    RecallConstraint,
    recall_constraints,
    shortfalls,
    why_infeasible,
)
from camri_tune.dashboard import DashboardStorage
from camri_tune.database import SqlStorage
from camri_tune.datasets import Dataset
from camri_tune.differences import PairedDifference, Share
from camri_tune.errors import StudyMismatchError
from camri_tune.overview import read_overview
from camri_tune.records import Baseline, Measured, TrialRecord
from camri_tune.result import Best, Finalist, Side
from camri_tune.search import make_sampler
from camri_tune.selection import certify, finalists, rank_models, rank_settings
from camri_tune.stats import tango_interval
from camri_tune.storage import StudyStore
from camri_tune.study_page import _verdict
from tests.command import assert_one_line_error, camri_tune, result_of
from tests.studies import hand_made, trial

CLASSES = ("Stop", "Yield", "2")


def _record(
    recalls: Sequence[float], *, number: int = 0, accuracy: float = 0.01, fold: int = 0, **missed: float
) -> TrialRecord:
    """A complete trial that is `accuracy` above the floor of accuracy."""
    return TrialRecord(
        number,
        "complete",
        {"learning_rate": 1e-3},
        seed=number,
        accuracy=0.9 + accuracy,
        recall=recalls[0],
        recall_per_class=tuple(recalls),
        constraint=-accuracy,
        shortfalls=missed,
        checkpoint="c",
        sha256="s",
        fold=fold,
    )


def _both(images: Sequence[Sequence[int]] = ((10, 10, 10),)) -> tuple[RecallConstraint, RecallConstraint]:
    """A floor of 0.9 under class 1, and a drop of 5 points below a baseline of 0.9 everywhere."""
    floor, drop = recall_constraints({1: 0.9}, 5.0, [[0.9] * 3] * len(images), images)
    return floor, drop


# --- what is asked ----------------------------------------------------------------------------------------------------


@given(
    name=st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1).filter(str.strip),
    share=st.integers(0, 10**6).map(lambda k: k / 10**6),
)
@settings(deadline=None)
def test_any_name_and_share_are_read_back(name: str, share: float) -> None:
    written = Decimal(str(share))
    assert floor_of(f"{name}>={written:f}") == floor_of(f" {name} >= {100 * written:f} %") == (name.strip(), share)
    floors = StudyConfig.build({"floor": f"{name}>={written:f}"}).floor
    assert StudyConfig.build({"floor": list(floors)}).floor == floors


@given(st.lists(st.tuples(st.sampled_from(["0", "Stop", "STOP", "Yield", "1", "worst1"]), st.integers(0, 100))))
def test_of_two_floors_of_a_class_the_higher_keeps_both(pairs: list[tuple[str, int]]) -> None:
    baseline = Baseline(0.1, (_record((0.5, 0.4, 0.6)),))  # worst1 is class 1
    index = {"0": 0, "Stop": 0, "STOP": 0, "Yield": 1, "1": 1, "worst1": 1}
    expected: dict[int, float] = {}
    for token, percent in pairs:
        expected[index[token]] = max(percent / 100, expected.get(index[token], 0.0))
    config = StudyConfig.build({"floor": [f"{token}>={percent}%" for token, percent in pairs]})
    assert resolve_floors(config.floor, CLASSES, baseline) == expected


def test_the_command_that_is_shown_asks_for_the_same() -> None:
    asked = {"floor": ["No entry>=90%", "a>=b>=.5", "worst1>=1"], "max_drop": 2.0}
    config = StudyConfig.build(asked)
    assert config.floor == ("No entry>=0.9", "a>=b>=0.5", "worst1>=1")
    assert config.command().endswith("--floor 'No entry>=0.9' --floor 'a>=b>=0.5' --floor 'worst1>=1' --max-drop 2.0")
    assert StudyConfig.build({"floor": list(config.floor)}).floor == config.floor


# --- arithmetic on validation -----------------------------------------------------------------------------------------

COUNTS = st.integers(1, 4).flatmap(
    lambda folds: st.tuples(
        st.lists(st.tuples(*[st.integers(1, 30)] * 3), min_size=folds, max_size=folds),
        st.integers(0, 10_000),
        st.integers(0, 100),
        st.integers(0, 50),
    )
)


@given(COUNTS)
@settings(deadline=None)
def test_a_trial_is_compared_with_the_baseline_on_the_same_images(
    drawn: tuple[list[tuple[int, int, int]], int, int, int],
) -> None:
    """Naively: right answers of both, counted over all images of all folds, in fractions."""
    images, seed, floor, points = drawn
    rng = np.random.default_rng(seed)
    right, base = ([[int(rng.integers(0, n + 1)) for n in fold] for fold in images] for _ in range(2))
    before = [[b / n for b, n in zip(*rows, strict=True)] for rows in zip(base, images, strict=True)]
    total = [sum(fold[c] for fold in images) for c in range(3)]
    pooled = [Fraction(sum(fold[c] for fold in right), total[c]) for c in range(3)]
    old = [Fraction(sum(fold[c] for fold in base), total[c]) for c in range(3)]
    asked = recall_constraints({2: floor / 100, 0: 0.0}, float(points), before, images)
    found = shortfalls(asked, [float(r) for r in pooled], range(len(images)))
    assert list(found) == ["floor_0", "floor_2", "max_drop"]
    naive = {
        "floor_0": -pooled[0],
        "floor_2": Fraction(floor, 100) - pooled[2],
        "max_drop": max(o - p for o, p in zip(old, pooled, strict=True)) - Fraction(points, 100),
    }
    for name, value in naive.items():
        assert math.isclose(found[name], float(value), abs_tol=1e-8)
        assert (found[name] <= 0) == (value <= 0), "rounding does not decide"


def test_means_over_seeds_come_before_the_worst_class() -> None:
    """Each model has an unlucky class of its own; no class is unlucky in the mean."""
    _, drop = _both()
    models = [_record((0.8, 1.0, 0.9)), _record((1.0, 0.8, 0.9))]
    assert all(max(drop.misses(m.recall_per_class, [0]).values()) > 0 for m in models)
    assert drop.misses_over_seeds(models) == pytest.approx(dict.fromkeys(range(3), -0.05), abs=1e-8)


def test_each_model_is_measured_against_its_own_fold() -> None:
    constraint = RecallConstraint("max_drop", "max_drop", 0.0, (0,), ((0.5, 0.9),), ((10, 30),))
    assert constraint.misses([0.7], [0, 1])[0] == pytest.approx((10 * 0.5 + 30 * 0.9) / 40 - 0.7)
    models = [_record((0.6,), fold=0), _record((0.8,), fold=1)]
    assert constraint.misses_over_seeds(models)[0] == pytest.approx(0.0)
    assert constraint.scatter(models) is None, "of each fold's seeds there is one"
    models += [_record((0.7,), fold=0), _record((0.9,), fold=1)]
    assert constraint.scatter(models) == pytest.approx(float(np.std([0.6, 0.7], ddof=1)))
    assert constraint.scatter(models[::2]) == pytest.approx(float(np.std([0.6, 0.7], ddof=1)))


def test_constraints_are_stored_as_json() -> None:
    for constraint in _both(((10, 12, 9), (11, 12, 13))):
        assert RecallConstraint.from_json(json.loads(json.dumps(constraint.as_json()))) == constraint


def test_a_trial_without_one_of_its_constraints_is_not_feasible() -> None:
    record = _record((0.9, 0.9, 0.9), floor_1=-0.1, stray=5.0)
    assert record.bound_by(["floor_1"]).feasible
    assert not record.bound_by(["floor_1", "max_drop"]).feasible
    assert not replace(record, shortfalls={"floor_1": 0.1}).feasible
    assert not replace(record, shortfalls={}, constraint=None).feasible


# --- selection --------------------------------------------------------------------------------------------------------


def test_a_near_miss_of_each_constraint_fills_up_the_final_within_its_own_slack() -> None:
    good, near, far = (
        _record((0.5,), number=0, floor_1=0.0),
        _record((0.9,), number=1, floor_1=0.02),
        _record((1.0,), number=2, floor_1=0.2),
    )
    assert [t.number for t in finalists([far, near, good], 5)] == [0]
    assert [t.number for t in finalists([far, near, good], 5, 0.0, {"floor_1": 0.05})] == [0, 1]
    assert [t.number for t in finalists([far, near, good], 5, 0.5, {"max_drop": 0.5})] == [0]


RECALLS = st.tuples(*[st.sampled_from([0.7, 0.85, 0.9, 1.0])] * 3)


@given(st.lists(st.tuples(RECALLS, st.sampled_from([-0.01, 0.0, 0.01])), min_size=1, max_size=4))
def test_a_setting_is_ranked_where_its_means_and_one_of_its_models_keep_everything(
    models: list[tuple[tuple[float, float, float], float]],
) -> None:
    asked = _both()
    records = [
        replace(_record(r, number=n, accuracy=a), shortfalls=shortfalls(asked, r, [0]))
        for n, (r, a) in enumerate(models)
    ]
    means = np.mean([r for r, _ in models], axis=0)
    kept = means[1] >= 0.9 - 1e-9 and bool((means >= 0.85 - 1e-9).all()) and sum(a for _, a in models) >= -1e-12
    alone = [a >= 0 and r[1] >= 0.9 and min(r) >= 0.85 for r, a in models]
    assert bool(rank_settings({7: records}, asked)) == (kept and any(alone))
    assert {r.seed for r in rank_models(records)} == {n for n, fits in enumerate(alone) if fits}


def test_a_certificate_is_withheld_where_test_contradicts_a_constraint_and_only_there() -> None:
    passing, failing = PairedDifference(5, 5, 9_000, 9_000, 0.95), PairedDifference(0, 90, 900, 900, 0.95)
    asked: list[int] = []

    def breaks(number: int, confidence: float) -> bool:
        assert confidence == pytest.approx(1 - 0.05 / 3)
        asked.append(number)
        return number == 2

    order = [1, 2, 3]
    assert certify(order, lambda n, _: failing if n == 1 else passing, 0.005, breaks)[:2] == ("certified", 3)
    assert asked == [2, 3], "of one whose accuracy is not shown nothing else is asked"
    assert certify(order, lambda n, _: passing if n == 2 else failing, 0.005, breaks)[:2] == ("feasible", 1)


# --- what test says ---------------------------------------------------------------------------------------------------


@given(
    n=st.integers(1, 200),
    share=st.floats(0, 1),
    percent=st.integers(1, 99),
    confidence=st.sampled_from([0.95, 0.975, 0.9995]),
)
@settings(deadline=None)
def test_a_floor_is_shown_or_broken_where_the_binomial_test_says_so(
    n: int, share: float, percent: int, confidence: float
) -> None:
    right, floor = round(share * n), percent / 100
    one = ClassOnTest(0, floor, Share(right, n, n, None, confidence))
    high, low = (float(p) for p in (stats.binom.sf(right - 1, n, floor), stats.binom.cdf(right, n, floor)))
    doubt = 1 - confidence
    if min(abs(high - doubt), abs(low - doubt)) < 1e-9:
        return
    expected = "shown" if high < doubt else "broken" if low < doubt else "held" if right / n >= floor else "missed"
    assert one.status == expected


def _floor_on_test(right: int, n: int, asked: float = 0.9) -> OnTest:
    (constraint,) = recall_constraints({1: asked}, None, [[0.9] * 3], [[10] * 3])
    return OnTest(constraint, (ClassOnTest(1, asked, Share(right, n, n, None, 0.95)),) if n else ())


def _drop_on_test(*counts: tuple[int, int, int], asked: float = 5.0, confidence: float = 0.95) -> OnTest:
    (constraint,) = recall_constraints({}, asked, [[0.9] * 3], [[10] * 3])
    return OnTest(
        constraint,
        tuple(
            ClassOnTest(c, -asked / 100, PairedDifference(*count, count[2], confidence))
            for c, count in enumerate(counts)
            if count[2]
        ),
    )


def test_each_status_of_a_floor_is_said_plainly_and_with_its_counts() -> None:
    said = {right: said_of_constraint(_floor_on_test(right, 100), CLASSES) for right in (97, 92, 88, 70)}
    assert said[97].startswith("recall of 1 (Yield) is shown to be at least 0.9 (0.9700, 97 of 100 images; 95 % lower")
    assert "which is NOT shown (0.9200, 92 of 100 images; 95 % lower bound 0.8603)" in said[92]
    assert "was BELOW its floor of 0.9 on test, as chance may have it (0.8800, 88 of 100" in said[88]
    assert "is BELOW its floor of 0.9, beyond chance (0.7000, 70 of 100 images; 95 % upper bound 0.7751)" in said[70]
    assert "NOT shown, for test has no images" in said_of_constraint(_floor_on_test(0, 0), CLASSES)


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20), st.integers(0, 400)), min_size=3, max_size=3))
@settings(deadline=None)
def test_a_drop_is_said_to_be_shown_only_where_it_is_for_every_class(counts: list[tuple[int, int, int]]) -> None:
    found = _drop_on_test(*[(g, b, g + b + rest if rest else 0) for g, b, rest in counts])
    sentence = said_of_constraint(found, CLASSES)
    shown = len(found.classes) == 3 and all(one.measured.interval.low >= -0.05 for one in found.classes)
    assert (found.status == "shown") == shown
    assert ("is shown to be not more than 5 points below" in sentence) == shown
    assert shown or "NOT shown" in sentence or "WAS more than 5 points below" in sentence
    assert ("beyond chance" in sentence) == any(one.measured.interval.high < -0.05 for one in found.classes)
    assert "\n" not in sentence


def test_the_worst_class_is_named() -> None:
    found = _drop_on_test((0, 0, 1_000), (0, 30, 1_000), (0, 300, 1_000))
    assert found.status == "broken"
    assert found.worst.c == 2
    assert said_of_constraint(found, CLASSES) == (
        "recall of 1 of 3 classes (2) WAS more than 5 points below the baseline model's on test, beyond chance for 2 "
        f"(the worst, 2: -30.00 points, 1,000 images; 95 % upper bound {100 * found.worst.measured.interval.high:+.2f} "
        "points); that it is not is shown for 2"
    )


def _best(*constraints: OnTest, gained: int = 60) -> Best:
    measured = Measured.over_seeds([0.9], [(0.9, 0.9, 0.9)], [0])
    accuracy = PairedDifference(gained, 40, 12_630, 12_630, 0.95)
    recall = {0: PairedDifference(21, 3, 270, 270, 0.95)}
    share = Share(90, 100, 100)
    seeds: Any = None
    return Best(
        3,
        {},
        Side(measured, measured),
        0,
        share,
        {0: share},
        {},
        1,
        accuracy,
        recall,
        seeds,
        seeds,
        constraints=constraints,
    )


@given(right=st.integers(0, 100), certified=st.booleans())
def test_no_sentence_lets_a_reader_believe_a_floor_that_is_not_shown(right: int, certified: bool) -> None:
    found = _floor_on_test(right, 100)
    sentence = sentence_of(
        "certified" if certified else "feasible", _best(found), classes=CLASSES, epsilon=0.5, tolerance=0.0
    )
    shown, broken = found.status == "shown", found.status == "broken"
    assert ("is shown to be at least 0.9" in sentence) == shown
    assert shown or "NOT shown" in sentence or "BELOW its floor" in sentence
    assert ("gets no certificate, for recall is not as asked" in sentence) == (broken and not certified)


def test_the_table_has_every_class_that_is_near_its_limit() -> None:
    entry: dict[str, Any] = {"validation": {"mean": 0.9, "sd": None}, "test": {"mean": None, "sd": None}}
    classes = [
        {"class": c, "baseline": entry, "best": entry, "test": None if c == 9 else _drop_json(c)} for c in range(10)
    ]
    rows = constraint_table(
        [{"in_words": "asked", "met_on_validation": None, "classes": classes}], [str(c) for c in range(10)]
    )
    assert [row[1] for row in rows] == ["9", "8", "7", "6", "5", "and 5 more, less near their limit"]
    assert rows[0][-1] == "not measured"
    assert rows[1][2:4] == ("90.00 %, 90.00 %", "-, -")
    assert "-8.00 points to the baseline model [" in rows[1][4]


def test_what_is_stored_of_a_class_has_the_counts_from_which_anyone_has_its_bound() -> None:
    right, old, groups = np.arange(60) < 50, np.arange(60) < 55, np.arange(60) // 6
    of_drop = ClassOnTest(0, -0.05, PairedDifference.of(right, old, groups, 0.99)).as_json()
    assert (of_drop["gained"], of_drop["lost"], of_drop["n"], of_drop["status"]) == (0, 5, 60, "missed")
    assert sum(one["lost"] * one["groups"] for one in of_drop["by_group"]) == 5
    assert (of_drop["of"], of_drop["value"], of_drop["confidence"]) == (
        "difference to the baseline model",
        -5 / 60,
        0.99,
    )
    share = of_drop["effective_n"] / 60
    assert of_drop["interval"] == list(tango_interval(0, 5 * share, 60 * share, 0.98))
    of_floor = ClassOnTest(0, 0.9, Share.of(right, groups, None, 0.99)).as_json()
    assert (of_floor["of"], of_floor["right"], of_floor["n"], of_floor["confidence"]) == ("recall", 50, 60, 0.99)


def _drop_json(lost: int) -> dict[str, Any]:
    return ClassOnTest(0, -0.05, PairedDifference(0, lost, 100, 100, 0.95)).as_json()


# --- before the search, and when nothing was found --------------------------------------------------------------------


def test_a_baseline_at_its_floor_is_not_said_to_be_below_it() -> None:
    records = tuple(TrialRecord(n, "complete", {}, recall_per_class=(0.7,), seed=n) for n in range(3))
    floors = recall_constraints({0: 0.7}, None, [[0.7]], [[2_000]])
    assert doubtful_constraints(floors, Baseline(1e-3, records).recall_per_class, [2_000], [2_000], CLASSES) == []


def test_small_classes_and_a_baseline_below_its_floor_are_said_before_the_search() -> None:
    images = [[12, 300, 2_000]]
    floors = recall_constraints({0: 0.9, 1: 0.95, 2: 0.9}, None, [[0.9] * 3], images)
    lines = doubtful_constraints(floors, [0.95, 0.9, 0.9], images[0], images[0], CLASSES)
    assert len(lines) == 2
    assert "floor of class 0 (Stop), 0.9, cannot be told from noise" in lines[0]
    assert "12 validation images, and one image is 8.3 points" in lines[0]
    assert f"{0.05 ** (1 / 12):.3f}" in lines[0]
    assert "does not meet the floor of class 1 (Yield): its validation recall is 0.9000, and 0.95" in lines[1]
    grouped = doubtful_constraints(floors[1:2], [1.0] * 3, images[0], [12, 10, 100], CLASSES)
    assert "300 validation images of 10 groups, and one group is 10.0 points" in grouped[0]
    drop = recall_constraints({}, 2.0, [[0.9] * 3], images)
    (line,) = doubtful_constraints(drop, [0.9] * 3, images[0], images[0], CLASSES)
    assert "for 1 of 3 classes: the smallest, 0 (Stop), has 12" in line
    assert doubtful_constraints(drop, [0.9] * 3, [2_000] * 3, [2_000] * 3, CLASSES) == []


def _finalist(number: int, misses: Mapping[str, Mapping[int, float]], *, split: bool = False) -> Finalist:
    measured = Measured.over_seeds([0.9], [(0.9, 0.9, 0.9)], [0])
    return Finalist(number, {}, measured, 0.9, True, None, misses, split)


def test_without_a_model_the_obstacle_is_named_with_the_nearest_and_the_way_out() -> None:
    floor, drop = asked = _both()
    finals = [
        _finalist(4, {"floor_1": {1: 0.2}, "max_drop": {0: -0.1, 1: 0.3, 2: 0.0}}, split=True),
        _finalist(6, {"floor_1": {1: -0.01}, "max_drop": {0: 0.02, 1: 0.0, 2: 0.0}}, split=True),
    ]
    said: dict[str, Any] = {"classes": CLASSES, "epsilon": 0.5, "tolerance": 0.0, "constraints": asked}
    assert sentence_of("none", None, finalists=finals, **said) == (
        "No model: no finalist that kept accuracy on validation kept recall as asked: of the nearest, trial #6, recall "
        "of class 0 (Stop) was 7.00 points below the baseline's, and 5 are allowed (ways out: more --trials; a larger "
        "--max-drop or a larger --tolerance, under another --name); nothing is exported."
    )
    one = [_finalist(1, {"floor_1": {1: -0.1}, "max_drop": {0: -0.1}}, split=True)]
    assert "no one model kept both" in sentence_of("none", None, finalists=one, **said)
    trials = [
        replace(_record(r, number=n), shortfalls=shortfalls(asked, r, [0]))
        for n, r in enumerate([(0.9, 0.5, 0.9), (0.9, 0.86, 0.9)])
    ]
    sentence = sentence_of("none", None, trials=trials, **said)
    assert "no trial of the search that kept accuracy" in sentence
    assert "trial #1, recall of class 1 (Yield) was 0.8600, and its floor is 0.9" in sentence
    assert "a lower --floor" in obstacle({"x": {"floor_1": {1: 0.1}}}, [floor, drop], CLASSES)


def test_why_a_trial_is_infeasible_is_said_of_each_constraint() -> None:
    asked = _both()
    good, bad = (replace(_record(r), shortfalls=shortfalls(asked, r, [0])) for r in ((0.9,) * 3, (0.9, 0.8, 0.8)))
    assert why_infeasible(good, asked, CLASSES) == []
    assert why_infeasible(replace(bad, constraint=0.01), asked, CLASSES) == [
        "accuracy is 1.00 points below its floor",
        "recall of class 1 (Yield) was 0.8000, and its floor is 0.9",
        "recall of class 1 (Yield) was 10.00 points below the baseline's, and 5 are allowed",
        "recall of class 2 was 10.00 points below the baseline's, and 5 are allowed",
    ]


# --- Optuna and its dashboard -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("baseline", "more"), [(None, 0.0), (0.93, 0.0), ({"accuracy_sd": None}, 0.0), ({"accuracy_sd": 0.25}, 0.25)]
)
def test_the_sampler_takes_each_constraint_for_itself_and_wants_more_accuracy_than_seeds_move(
    baseline: dict[str, Any] | float | None, more: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In whatever order a database has them; and what the database has stays as it is."""
    seen: list[Any] = []
    original = sampler._get_constraint_vals_and_feasibility

    def spy(study: optuna.Study, trials: list[FrozenTrial]) -> Any:
        seen.append(original(study, trials))
        return seen[-1]

    monkeypatch.setattr(sampler, "_get_constraint_vals_and_feasibility", spy)
    study = optuna.create_study(direction="maximize", sampler=make_sampler(StudyConfig(), seed=1))
    if baseline is not None:
        study.set_user_attr("baseline", baseline)
    space: dict[str, BaseDistribution] = {"x": FloatDistribution(0.0, 1.0)}
    for place in range(8):
        values = {"accuracy": -1.0 - place, "floor_1": 10.0 + place, "max_drop": 100.0 + place}
        system = {f"constraints:{key}": values[key] for key in sorted(values, reverse=bool(place % 2))}
        study.add_trial(
            create_trial(value=place / 8, params={"x": place / 8}, distributions=space, system_attrs=system)
        )
    assert 0 <= study.ask(space).params["x"] <= 1
    (values, feasible), *_ = seen
    assert values.tolist() == [[-1.0 - n + more, 10.0 + n, 100.0 + n] for n in range(8)]
    assert not feasible.any()
    assert [t.constraints["accuracy"] for t in study.trials[:8]] == [-1.0 - n for n in range(8)]


def _bound(recall: float, accuracy: float, **constraints: float) -> FrozenTrial:
    made = trial(recall, accuracy)
    made.system_attrs = {**made.system_attrs, **{f"constraints:{name}": value for name, value in constraints.items()}}
    return made


def test_a_trial_that_misses_a_floor_is_infeasible_wherever_it_is_shown(
    tmp_path: Path, digits: Dataset, empty_database: Path
) -> None:
    search = [_bound(0.8, 0.95, floor_5=-0.05), _bound(0.99, 0.95, floor_5=0.02), _bound(0.95, 0.95)]
    search[1].user_attrs["recall_per_class"][5] = 0.88
    store = hand_made(tmp_path, digits, empty_database, search)
    asked = recall_constraints({5: 0.9}, None, [[0.9] * 10], [[30] * 10])
    store.set("baseline", {**store.attributes["baseline"], "constraints": [c.as_json() for c in asked]})
    overview = read_overview(store)
    assert [t.feasible for t in overview.search] == [True, False, False]
    assert overview.feasible == overview.as_json()["feasible"] == 1
    assert overview.best is not None
    assert overview.best.number == 0
    traces = {trace.name: trace for trace in recall_accuracy(overview).data}
    missed = traces["above the floor, but recall not as asked"]
    assert list(missed.y) == [99.0, 95.0]
    assert "recall of class 5 was 0.8800, and its floor is 0.9" in missed.text[0]
    assert list(traces["trials that meet every constraint"].y) == [80.0]
    assert isinstance(store.storage, SqlStorage)
    shown = DashboardStorage(store.storage).get_all_trials(store.study_id("search"))
    lists = [t.system_attrs["constraints"] for t in shown]
    assert [len(values) for values in lists] == [2, 2, 2]
    assert [all(value <= 0 for value in values) for values in lists] == [True, False, False]
    best = DashboardStorage(store.storage).get_best_trial(store.study_id("search"))
    assert best.number == 0


# --- through the installed command ------------------------------------------------------------------------------------

TINY = ["--epochs", "1", "--trials", "1", "--seeds", "1", "--limit", "200", "--tolerance", "100"]
ASKED = ["--important", "3", "--floor", "8>=0%", "--floor", "worst1>=0", "--max-drop", "100"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("runs")
    done = camri_tune("run", "--out", out, "--name", "c", *TINY, *ASKED, "--json")
    assert done.returncode == 0, done.stderr
    return out, result_of(done)


def test_a_run_keeps_its_floors_and_says_what_test_shows_of_each(finished: tuple[Path, dict[str, Any]]) -> None:
    out, result = finished
    kinds = [(c["kind"], c["floor"], c["points"]) for c in result["constraints"]]
    floors = sum(kind == "floor" for kind, _, _ in kinds)
    assert floors in (1, 2), "the worst class may be 8"
    assert ("floor", 0.0, None) in kinds
    assert kinds[-1] == ("max_drop", None, 100.0)
    for constraint in result["constraints"]:
        assert constraint["met_on_validation"]
        assert constraint["status"] in ("shown", "held", "missed", "broken")
        sharing = floors if constraint["kind"] == "floor" else 10
        for one in constraint["classes"]:
            c, test = one["class"], one["test"]
            assert one["baseline"]["validation"] == result["baseline"]["validation"]["recall_per_class"][c]
            assert one["best"]["test"] == result["best"]["test"]["recall_per_class"][c]
            assert test["confidence"] == pytest.approx(1 - 0.05 / sharing)
            if constraint["kind"] == "floor":
                right = round(test["value"] * test["n"])
                low = float(stats.beta.ppf(0.05 / sharing, right, test["n"] - right + 1)) if right else 0.0
                assert test["interval"][0] == pytest.approx(low)
                assert test["value"] == one["best"]["test"]["values"][0], "one seed, and so one model"
    for page in ("report.html", "best/README.md"):
        text = (out / "c" / page).read_text()
        assert "Asked as well" in text
        assert "recall of no class more than 100 points below" in text
    assert "recall of 8 is shown to be at least 0 (" in result["sentence"], "as it always is"


def test_every_trial_of_a_run_carries_every_constraint_once(finished: tuple[Path, dict[str, Any]]) -> None:
    out, result = finished
    with sqlite3.connect(out / "c" / "study.db") as database:
        rows = database.execute(
            "select t.trial_id, a.key from trials t join studies using (study_id) "
            "join trial_system_attributes a on a.trial_id = t.trial_id and a.key like 'constraints:%' "
            "where study_name in ('c', 'c.finalists')"
        ).fetchall()
    names = sorted(f"constraints:{name}" for name in ["accuracy", *(c["name"] for c in result["constraints"])])
    for trial_id in {row[0] for row in rows}:
        assert sorted(key for number, key in rows if number == trial_id) == names
    assert len(rows) == 2 * len(names), "a trial and a finalist"
    said = json.loads(camri_tune("status", "c", "--out", out, "--json").stdout)
    assert said["feasible"] == said["trials"]["search"]["complete"] == 1
    assert [c["name"] for c in said["constraints"]] == [c["name"] for c in result["constraints"]]


def test_a_study_with_another_floor_is_another_study(finished: tuple[Path, dict[str, Any]]) -> None:
    asked = ["--important", "3", "--floor", "8>=0.06", "--max-drop", "100"]
    done = camri_tune("run", "--out", finished[0], "--name", "c", *TINY, *asked)
    assert_one_line_error(done, "with floor = ['8>=0', 'worst1>=0'], not ['8>=0.06']", "--name")


def test_what_constrains_a_study_is_what_it_was_started_with(
    tmp_path: Path, digits: Dataset, empty_database: Path
) -> None:
    store = hand_made(tmp_path, digits, empty_database, [])
    for other in ({"max_drop": 3.0}, {"floor": "8>=0.9"}):
        config = store.config.model_copy(update=StudyConfig.build(other).model_dump(include=set(other)))
        with pytest.raises(StudyMismatchError, match=f"with {next(iter(other))} = "):
            StudyStore.create(store.storage, config, digits)
    # A study of a version that had no such constraints goes on without any.
    stored = {k: v for k, v in store.attributes["identity"].items() if k not in ("floor", "max_drop")}
    store.set("identity", stored)
    StudyStore.create(store.storage, store.config, digits)


def test_where_nothing_keeps_a_floor_the_sentence_names_it_and_nothing_is_exported(tmp_path: Path) -> None:
    tiny = ["--epochs", "1", "--trials", "1", "--seeds", "1", "--limit", "100", "--tolerance", "100"]
    done = camri_tune("run", "--out", tmp_path, "--name", "n", *tiny, "--floor", "8>=100%", "--floor", "3>=1", "--json")
    assert done.returncode == 3, done.stderr
    result = result_of(done)
    assert result["verdict"] == "none"
    assert result["best"] is None
    assert re.search(r"recall of class [38] was 0\.\d+, and its floor is 1", result["sentence"])
    assert "--floor" in result["sentence"]
    assert [c["name"] for c in result["constraints"]] == ["floor_3", "floor_8"]
    for constraint in result["constraints"]:
        assert constraint["status"] is constraint["met_on_validation"] is None
        assert constraint["classes"][0]["best"] is None
        notice = f"The floor of class {constraint['class']}, 1, cannot be told from noise"
        assert any(line.startswith(notice) for line in result["notices"])
        assert notice in done.stderr, "said before the search"
    assert not (tmp_path / "n" / "best").exists()
    assert "Asked as well" in (tmp_path / "n" / "report.html").read_text()


def test_no_badge_lets_a_reader_believe_what_is_not_shown() -> None:
    for status, badge in (("shown", "✓ Certified<"), ("held", "✓ Accuracy certified; not all"), (None, "✓ Certified<")):
        asked = [] if status is None else [{"status": "shown"}, {"status": status}]
        assert badge in _verdict({"verdict": "certified", "sentence": "", "constraints": asked})
