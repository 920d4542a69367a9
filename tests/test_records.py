"""What the plain records say of themselves."""

import json
import math
import statistics
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from camri_tune.differences import GroupCounts, Known, PairedDifference, SeedDifference, Share
from camri_tune.metrics import Precision
from camri_tune.records import Baseline, Figure, Measured, TrialRecord, TrialState, measured_on_validation, named
from camri_tune.result import Best, Finalist, Result, Side
from camri_tune.stats import (
    Hidden,
    Interval,
    crossed_interval,
    design_effect,
    effective_size,
    hidden_size,
    seed_interval,
    tango_interval,
)

GOOD = TrialRecord(0, "complete", {"learning_rate": 1e-3}, constraint=-0.01)


def _record(seed: int, accuracy: float, recalls: tuple[float, ...]) -> TrialRecord:
    return TrialRecord(
        seed, "complete", {"learning_rate": 1e-3}, seed=seed, accuracy=accuracy, recall_per_class=recalls
    )


def _difference(gained: int, lost: int, n: int) -> PairedDifference:
    return PairedDifference(gained, lost, n, n, 0.95)


@pytest.mark.parametrize("constraint", [-0.5, -1e-12, 0.0])
def test_a_complete_trial_that_meets_its_constraint_is_feasible(constraint: float) -> None:
    assert replace(GOOD, constraint=constraint).feasible


@pytest.mark.parametrize("constraint", [1e-12, 0.5, math.inf, math.nan])
def test_a_trial_below_the_floor_is_not_feasible(constraint: float) -> None:
    assert not replace(GOOD, constraint=constraint).feasible


def test_a_trial_without_a_constraint_is_never_feasible() -> None:
    """Optuna takes a missing constraint for a met one."""
    assert not replace(GOOD, constraint=None).feasible
    assert not TrialRecord(0, "complete", {}, accuracy=1.0, recall=1.0).feasible


@pytest.mark.parametrize("state", ["waiting", "running", "pruned", "failed"])
def test_a_trial_that_did_not_complete_is_never_feasible(state: TrialState) -> None:
    assert GOOD.feasible
    assert not replace(GOOD, state=state).feasible


def test_a_trial_is_read_for_other_classes_by_their_recall() -> None:
    """One training serves several classes where its loss looks at none."""
    trial = replace(GOOD, recall=0.7, recall_per_class=(0.9, 0.7, 0.8))
    assert [trial.for_classes([c]).recall for c in range(3)] == [0.9, 0.7, 0.8]
    assert trial.for_classes((0, 2)).recall == 0.8, "the lowest"
    assert replace(trial.for_classes([0]), recall=0.7) == trial, "and nothing else changes"
    assert trial.for_classes(()) is trial
    unfinished = replace(GOOD, recall=0.7)
    assert unfinished.for_classes([1]) is unfinished
    baseline = replace(GOOD, recall_per_class=(0.9, 0.7, 0.8))
    assert baseline.for_classes([1]) is baseline, "which has no important class"


def test_a_figure_by_hand() -> None:
    figure = Figure((0.25, 0.5, 0.75))
    assert figure.mean == 0.5
    assert figure.sd == 0.25
    assert figure.interval == seed_interval([0.25, 0.5, 0.75])
    assert figure.as_json() == {
        "mean": 0.5,
        "sd": 0.25,
        "n": 3,
        "values": [0.25, 0.5, 0.75],
        "interval": list(seed_interval([0.25, 0.5, 0.75]) or ()),
    }


@given(values=st.lists(st.floats(0, 1), min_size=2, max_size=10))
def test_a_figure_is_mean_and_sample_standard_deviation(values: list[float]) -> None:
    figure = Figure(tuple(values))
    assert figure.mean == pytest.approx(sum(values) / len(values))
    assert figure.sd == pytest.approx(statistics.stdev(values), abs=1e-9)
    if min(values) == max(values):
        assert figure.interval is None, "seeds that agree are no certainty"
        return
    assert figure.interval is not None
    assert figure.interval.low <= figure.mean + 1e-12
    assert figure.interval.high >= figure.mean - 1e-12


def test_one_seed_has_a_mean_but_no_spread() -> None:
    figure = Figure((0.9,))
    assert figure.mean == 0.9
    assert figure.sd is None
    assert figure.interval is None
    assert figure.as_json() == {"mean": 0.9, "sd": None, "n": 1, "values": [0.9], "interval": None}


def test_a_mean_does_not_depend_on_the_order_of_its_seeds() -> None:
    """As sums of binary fractions these three differ, in both directions."""
    means = [Figure(values).mean for values in ((0.8, 0.7, 0.6), (0.6, 0.7, 0.8), (0.7, 0.7, 0.7))]
    assert means == [0.7] * 3
    assert Figure((1 / 3,) * 3).sd == 0.0


def test_of_several_important_classes_each_seeds_worst_is_measured() -> None:
    """The mean of the worst, not the worst of the means: class 1 is the worse one in seed 0, class 2 in seed 1."""
    measured = Measured.over_seeds([0.8, 0.9], [(0.1, 0.5, 0.7), (0.2, 0.9, 0.6)], important=[1, 2])
    assert measured.accuracy == Figure((0.8, 0.9))
    assert measured.recall == Figure((0.5, 0.6))
    assert measured.recall_per_class == (Figure((0.1, 0.2)), Figure((0.5, 0.9)), Figure((0.7, 0.6)))
    assert json.loads(json.dumps(measured.as_json()))["recall"]["values"] == [0.5, 0.6]


def test_seeds_with_different_numbers_of_classes_are_no_measurement() -> None:
    with pytest.raises(ValueError, match="zip"):
        Measured.over_seeds([0.8, 0.9], [(0.1, 0.5), (0.2, 0.9, 0.6)], important=[1])


def test_records_are_measured_on_validation() -> None:
    records = [_record(0, 0.8, (0.7, 0.9)), _record(1, 0.9, (0.8, 1.0))]
    assert measured_on_validation(records, [0]) == Measured.over_seeds([0.8, 0.9], [(0.7, 0.9), (0.8, 1.0)], [0])


def test_the_baseline_is_the_mean_over_its_seeds() -> None:
    baseline = Baseline(2e-3, (_record(0, 0.8, (0.5, 0.9)), _record(1, 0.9, (0.75, 1.0))))
    assert baseline.accuracy == pytest.approx(0.85)
    assert baseline.recall_per_class == pytest.approx((0.625, 0.95))
    assert baseline.measured([0]).recall == Figure((0.5, 0.75))


def test_a_share_has_its_exact_interval() -> None:
    share = Share.of(np.arange(60) < 57, np.arange(60))
    exact = stats.binomtest(57, 60).proportion_ci(method="exact")
    assert share.value == 0.95
    assert share.interval == pytest.approx((exact.low, exact.high))
    assert share.as_json() == {
        "value": 0.95,
        "right": 57,
        "n": 60,
        "effective_n": 60,
        "hidden_groups": None,
        "interval": list(share.interval),
        "exact": True,
    }


def test_a_share_of_frames_counts_their_tracks() -> None:
    """Sixty frames of six tracks, one track wrong throughout: hardly more than five of six."""
    right, tracks = np.arange(60) >= 10, np.arange(60) // 10
    share, alone = Share.of(right, tracks), Share.of(right, np.arange(60))
    assert (share.right, share.n) == (alone.right, alone.n) == (50, 60)
    assert share.effective_n < 6.1
    assert share.interval.low < 0.4
    assert alone.interval.low > 0.7
    assert (share.exact, alone.exact) == (False, True)


def test_a_share_of_frames_whose_tracks_nobody_names_counts_what_validations_show() -> None:
    hidden = Hidden(30, 4.0)
    share = Share.of(np.arange(900) < 890, np.arange(900), hidden)
    assert share.effective_n == hidden_size(900, hidden, 0.975)
    assert share.effective_n < 900 / 4
    assert not share.exact
    assert share.as_json()["hidden_groups"] == {"size": 30, "design_effect": 4.0}
    assert share.interval.low < Share.of(np.arange(900) < 890, np.arange(900)).interval.low


@given(pairs=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=200))
def test_two_models_are_compared_image_by_image(pairs: list[tuple[bool, bool]]) -> None:
    gained = lost = 0
    for new, old in pairs:
        gained += new and not old
        lost += old and not new
    new_right, old_right = (np.array(column) for column in zip(*pairs, strict=True))
    for groups in (None, np.arange(len(pairs))):
        difference = PairedDifference.of(new_right, old_right, groups)
        assert (difference.gained, difference.lost, difference.n) == (gained, lost, len(pairs))
        assert difference.effective_n == len(pairs)
        assert difference.estimate == pytest.approx(new_right.mean() - old_right.mean())
        assert difference.interval == pytest.approx(tango_interval(gained, lost, len(pairs), confidence=0.90))
    assert PairedDifference.of(new_right, old_right, None, 0.99).interval == pytest.approx(
        tango_interval(gained, lost, len(pairs), confidence=0.98)
    )


def test_frames_of_one_object_are_not_so_many_proofs() -> None:
    """Every frame of 3 of 40 tracks is lost: with 20 frames a track the bound is near that of 40 images."""
    old, tracks = np.ones(800, bool), np.arange(800) // 20
    new = tracks >= 3
    grouped, alone, of_tracks = (
        PairedDifference.of(new, old, tracks).lower_bound,
        PairedDifference.of(new, old).lower_bound,
        tango_interval(0, 3, 40, confidence=0.90).low,
    )
    assert grouped == pytest.approx(of_tracks, abs=0.02)
    assert grouped < alone - 0.05


def test_answers_to_different_images_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="not to the same images"):
        PairedDifference.of(np.array([True, False]), np.array([True]))
    with pytest.raises(ValueError, match="not to the same images"):
        SeedDifference.of(np.ones((2, 3), bool), np.ones((1, 3), bool))


def test_a_paired_difference_says_how_its_bound_can_be_had_again() -> None:
    difference = PairedDifference(40, 20, 160, 160, 0.95)
    assert difference.estimate == 0.125
    low, high = difference.interval
    assert json.loads(json.dumps(difference.as_json())) == {
        "gained": 40,
        "lost": 20,
        "n": 160,
        "effective_n": 160,
        "by_group": [],
        "by_group_of": None,
        "hidden_groups": None,
        "confidence": 0.95,
        "interval": [low, high],
        "interval_confidence": pytest.approx(0.90),
        "estimate": 0.125,
        "lower_bound": low,
    }
    assert tango_interval(40, 20, 160, confidence=difference.interval_confidence) == (low, high)


def _unfolded(counts: list[dict[str, int]]) -> tuple[np.ndarray, np.ndarray]:
    """The values and the groups that counts by group stand for."""
    sizes = [row["n"] for row in counts for _ in range(row["groups"])]
    values = [
        np.repeat([1.0, -1.0, 0.0], [row["gained"], row["lost"], row["n"] - row["gained"] - row["lost"]])
        for row in counts
        for _ in range(row["groups"])
    ]
    return np.concatenate(values), np.repeat(np.arange(len(sizes)), sizes)


def test_what_images_in_groups_count_as_can_be_had_again_from_what_is_stored() -> None:
    rng = np.random.default_rng(4)
    groups = rng.permutation(np.repeat(np.arange(50), rng.integers(1, 30, size=50))) * 11
    new, old = (rng.random(len(groups)) < 0.8 + 0.2 * (groups % 3 == 0) for _ in range(2))
    difference = PairedDifference.of(new, old, groups, 0.99)
    written = json.loads(json.dumps(difference.as_json()))
    values, members = _unfolded(written["by_group"])
    assert written["by_group_of"] == "test"
    assert sum(row["groups"] for row in written["by_group"]) == 50
    assert len(values) == written["n"] == len(groups)
    assert ((values > 0).sum(), (values < 0).sum()) == (written["gained"], written["lost"])
    assert effective_size(values, members, written["confidence"]) == pytest.approx(written["effective_n"])


def test_what_unnamed_groups_count_as_can_be_had_again_from_what_is_stored() -> None:
    rng = np.random.default_rng(5)
    tracks = np.arange(1_500) // 30
    values = np.repeat(rng.choice([-1.0, 0.0, 1.0], size=50, p=[0.05, 0.9, 0.05]), 30) * (rng.random(1_500) < 0.7)
    new, old = rng.random(900) < 0.95, rng.random(900) < 0.9
    known = Known(30, values, tracks)
    difference = PairedDifference.of(new, old, np.arange(900), 0.975, known)
    written = json.loads(json.dumps(difference.as_json()))
    assert written["by_group_of"] == "validation"
    again = design_effect(*_unfolded(written["by_group"]), written["hidden_groups"]["size"])
    assert again == pytest.approx(written["hidden_groups"]["design_effect"])
    assert again > 5
    assert written["effective_n"] == pytest.approx(hidden_size(900, Hidden(30, again), 0.975))
    assert difference.lower_bound < PairedDifference.of(new, old, None, 0.975).lower_bound
    assert sum(counts.groups for counts in difference.by_group) == 50
    assert all(isinstance(counts, GroupCounts) and counts.n == 30 for counts in difference.by_group)


def test_a_difference_over_seeds_takes_unnamed_groups_into_account() -> None:
    rng = np.random.default_rng(6)
    new, old = rng.random((3, 900)) < 0.95, rng.random((3, 900)) < 0.9
    known_new, known_old = (np.repeat(rng.random((3, 40)) < share, 30, axis=1) for share in (0.9, 0.8))
    hidden = Known.over_seeds(30, known_new, known_old, np.arange(1_200) // 30).hidden
    assert hidden.size == 30
    assert hidden.effect == pytest.approx(30), "whole tracks changed sides"
    difference = SeedDifference.of(new, old, None, hidden)
    assert difference.interval == crossed_interval(new.astype(float) - old, hidden=hidden)
    low, high = difference.interval or (0, 0)
    narrow = SeedDifference.of(new, old).interval or (0, 0)
    assert high - low > 1.5 * (narrow[1] - narrow[0])


def test_a_difference_over_seeds_is_that_of_each_pair() -> None:
    rng = np.random.default_rng(0)
    new, old = rng.random((3, 500)) < 0.9, rng.random((3, 500)) < 0.7
    difference = SeedDifference.of(new, old)
    assert difference.values == pytest.approx(tuple(n.mean() - o.mean() for n, o in zip(new, old, strict=True)))
    assert difference.mean == pytest.approx(new.mean() - old.mean())
    assert difference.interval == crossed_interval(new.astype(float) - old)
    assert difference.holds_up
    low, high = difference.interval or (0, 0)
    assert difference.in_points() == (f"{100 * difference.mean:+.2f}", f"[{100 * low:+.2f}, {100 * high:+.2f}]")
    assert not SeedDifference.of(old, new).holds_up
    one = SeedDifference.of(new[:1], old[:1])
    assert one.interval is None
    assert not one.holds_up
    assert one.in_points()[1] == ""


def test_no_difference_of_shares_is_beyond_a_whole() -> None:
    """Of two seeds that scatter, Student's t alone would reach from -3 to 4."""
    new, old = np.array([[True] * 100, [True] * 60 + [False] * 40]), np.zeros((2, 100), bool)
    plain = crossed_interval(new.astype(float) - old)
    assert plain is not None
    assert plain.low < -1
    assert plain.high > 1
    assert SeedDifference.of(new, old).interval == (-1, 1)
    assert SeedDifference.of(old, new).interval == (-1, 1)


def test_a_worse_model_has_a_negative_difference() -> None:
    difference = _difference(2, 10, 100)
    assert difference.estimate == -0.08
    assert difference.lower_bound < -0.08


def _result(best: Best | None) -> Result:
    measured = Measured.over_seeds([0.9, 0.92], [(0.8, 1.0), (0.85, 0.99)], [0])
    return Result(
        study="digits-camri-worst1",
        dataset="digits",
        classes=("0", "stop"),
        important=(0, 1),
        loss="camri",
        tolerance=0.0,
        epsilon=0.5,
        seeds=2,
        verdict="none" if best is None else "certified",
        sentence="A sentence.",
        notices=("A notice.",),
        images={"train": 10, "validation": 5, "test": 5},
        validation_per_class=(3, 2),
        folds=1,
        baseline=Side(measured, measured),
        baseline_learning_rate=4e-3,
        best=best,
        finalists=(
            Finalist(7, {"scale": 16.0}, measured, 0.8, True, best.accuracy_difference if best else None),
            Finalist(2, {"scale": 8.0}, None, None, False, None),
        ),
        test_reads=1,
        trials={"complete": 3, "pruned": 1, "failed": 0},
        wall_seconds=1.5,
        versions={"torch": "2"},
        folder="runs/digits-camri-worst1",
    )


def test_a_result_without_a_model_says_so_in_json() -> None:
    value = json.loads(json.dumps(_result(None).as_json()))
    assert value["schema"] == 1
    assert value["verdict"] == "none"
    assert value["best"] is None
    assert value["accuracy_difference"] is None
    assert value["baseline"]["test"]["accuracy"]["values"] == [0.9, 0.92]
    assert value["baseline"]["params"] == {"learning_rate": 4e-3}


def test_a_result_with_a_model_has_its_evidence_in_json() -> None:
    measured = Measured.over_seeds([0.91, 0.93], [(0.9, 1.0), (0.95, 0.99)], [0])
    best = Best(
        trial=7,
        params={"scale": 16.0, "margin": 0.25},
        side=Side(measured, measured),
        exported_seed=1,
        exported_accuracy=Share(93, 100, 100),
        precision={0: (Precision(8, 9), Precision(9, 12))},
        exported_recall={0: Share(19, 20, 20)},
        baseline_seed=0,
        accuracy_difference=_difference(3, 2, 100),
        recall_difference={0: _difference(2, 0, 20), 1: _difference(0, 3, 30)},
        recall_over_seeds={
            0: SeedDifference((0.1, 0.05), Interval(0.01, 0.14)),
            1: SeedDifference((-0.1, -0.1), None),
        },
        accuracy_over_seeds=SeedDifference((0.01, 0.01), Interval(0.0, 0.02)),
    )
    value = json.loads(json.dumps(_result(best).as_json()))
    assert value["best"]["trial"] == 7
    assert value["best"]["params"] == {"scale": 16.0, "margin": 0.25}
    assert value["best"]["test"]["recall"]["mean"] == pytest.approx(0.925)
    assert value["best"]["exported"]["seed"] == 1
    assert value["best"]["exported"]["test"]["accuracy"]["right"] == 93
    assert value["best"]["exported"]["test"]["recall"]["0"]["n"] == 20
    assert value["best"]["exported"]["test"]["precision"]["0"] == {"value": 0.75, "right": 9, "answers": 12}
    assert value["best"]["exported"]["compared_with_test"]["precision"]["0"]["right"] == 8
    assert set(value["best"]["recall_difference"]) == {"0", "1"}
    assert value["best"]["recall_difference"]["0"]["gained"] == 2
    assert value["best"]["recall_difference"]["1"]["lost"] == 3
    assert value["best"]["recall_difference"]["0"]["confidence"] == 0.95
    assert value["best"]["exported"]["compared_with_seed"] == 0
    assert value["best"]["over_seeds"]["recall_difference"]["0"]["interval"] == [0.01, 0.14]
    assert value["best"]["over_seeds"]["recall_difference"]["1"]["mean"] == -0.1
    kept, failed = value["finalists"]
    assert (kept["trial"], kept["kept_accuracy"], kept["recall_lower_bound"]) == (7, True, 0.8)
    assert kept["accuracy_difference"]["gained"] == 3
    assert (failed["kept_accuracy"], failed["validation"], failed["accuracy_difference"]) == (False, None, None)
    difference = value["accuracy_difference"]
    assert (difference["gained"], difference["lost"], difference["n"]) == (3, 2, 100)
    assert difference["epsilon"] == pytest.approx(0.005), "points in the study, a fraction beside fractions"
    assert difference["lower_bound"] == difference["interval"][0] < difference["estimate"] == 0.01
    assert difference["interval_confidence"] == pytest.approx(0.90), "two-sided, so that its lower end holds at 95 %"


def test_a_class_is_named_once() -> None:
    assert named(14, [*"abcdefghijklmn", "Stop"]) == "14 (Stop)"
    assert named(8, [str(c) for c in range(10)]) == "8"
    assert named(3, {3: "three"}) == "3 (three)"
    assert named(1, ["1", "0"]) == "1 (0)", "a digit that is another's index"


def test_important_classes_are_named_where_the_name_is_not_the_number() -> None:
    assert _result(None).important_names == "0, 1 (stop)"
