"""Who goes to the final, in which order it is judged, and who is exported."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from camri_tune.differences import PairedDifference
from camri_tune.records import Figure, TrialRecord, TrialState
from camri_tune.selection import certify, finalists, rank_models, rank_settings, recall_bounds, shared_confidence
from camri_tune.stats import tango_interval


def _trial(
    number: int, recall: float | None = 0.9, accuracy: float | None = 0.95, *, constraint: float | None = -0.01
) -> TrialRecord:
    """A complete trial with a checkpoint. Its seed runs against its number, so that the two cannot be confused."""
    return TrialRecord(
        number,
        "complete",
        {"learning_rate": 1e-3},
        seed=100 - number,
        accuracy=accuracy,
        recall=recall,
        constraint=constraint,
        checkpoint=f"artifact-{number}",
        sha256="0" * 64,
    )


# Few distinct values, so that ties are common.
TRIALS = st.lists(
    st.builds(
        _trial,
        st.integers(0, 30),
        st.sampled_from([0.8, 0.9, 1.0]),
        st.sampled_from([0.9, 0.95]),
        constraint=st.sampled_from([-0.1, 0.0, 0.1, None]),
    ),
    max_size=20,
    unique_by=lambda trial: trial.number,
)

# Finalists


def test_finalists_are_ordered_by_recall_then_accuracy_then_age() -> None:
    trials = [_trial(4, 0.9, 0.95), _trial(3, 0.9, 0.96), _trial(2, 0.95, 0.9), _trial(5, 0.8, 0.99), _trial(1, 0.9)]
    assert [t.number for t in finalists(trials, 5)] == [2, 3, 1, 4, 5]
    assert [t.number for t in finalists(trials, 2)] == [2, 3]


@pytest.mark.parametrize("state", ["waiting", "running", "pruned", "failed"])
def test_only_complete_trials_go_to_the_final(state: TrialState) -> None:
    best = replace(_trial(0, 1.0, 1.0), state=state)
    assert [t.number for t in finalists([best, _trial(1)], 5)] == [1]


@pytest.mark.parametrize(
    "spoilt",
    [
        _trial(0, 1.0, 1.0, constraint=1e-9),
        _trial(0, 1.0, 1.0, constraint=None),
        replace(_trial(0, 1.0, 1.0), checkpoint=None),
        replace(_trial(0, 1.0, 1.0), sha256=None),
    ],
    ids=["below the floor", "without constraint", "without checkpoint", "without hash"],
)
def test_a_better_trial_that_cannot_be_trusted_stays_out_of_the_final(spoilt: TrialRecord) -> None:
    assert [t.number for t in finalists([spoilt, _trial(1)], 5)] == [1]
    assert finalists([spoilt], 5) == []


def test_near_misses_come_after_every_feasible_trial_and_only_within_the_slack() -> None:
    trials = [
        _trial(1, 0.99, constraint=0.004),
        _trial(2, 0.50, constraint=0.0),
        _trial(3, 1.00, constraint=0.0051),
        _trial(4, 0.995, constraint=0.005),
        _trial(5, 0.999, constraint=None),
    ]
    assert [t.number for t in finalists(trials, 5, slack=0.005)] == [2, 4, 1]
    assert [t.number for t in finalists(trials, 2, slack=0.005)] == [2, 4]
    assert [t.number for t in finalists(trials, 5)] == [2]


@given(trials=TRIALS, count=st.integers(1, 6))
def test_no_feasible_trial_outside_the_final_is_better_than_one_inside(trials: list[TrialRecord], count: int) -> None:
    chosen = finalists(trials, count)
    feasible = [t for t in trials if t.constraint is not None and t.constraint <= 0]
    assert len(chosen) == min(count, len(feasible))
    left = [t for t in feasible if t not in chosen]
    for inside in chosen:
        assert inside in feasible
        for outside in left:
            assert (inside.recall or 0, inside.accuracy or 0) >= (outside.recall or 0, outside.accuracy or 0)
    assert finalists(trials[::-1], count) == chosen, "the order of the list says nothing"


# Settings over seeds


def test_settings_are_ranked_by_recall_then_accuracy_then_age() -> None:
    """All scatter alike here, so the bounds stand in the order of the means."""
    retrained = {
        3: [_trial(10, 0.75, 0.5), _trial(11, 0.25, 0.5)],
        2: [_trial(12, 0.25, 0.75), _trial(13, 0.75, 0.5)],
        7: [_trial(14, 1.0, 0.5), _trial(15, 0.5, 0.5)],
        1: [_trial(16, 0.75, 0.5), _trial(17, 0.25, 0.75)],
    }
    assert rank_settings(retrained) == [7, 1, 2, 3]


def test_rounding_decides_no_order() -> None:
    """The same recalls in another order: accuracy decides, and where that is the same, too, age."""
    recalls = (0.8, 0.7, 0.6)
    less = [_trial(n, recall, 0.95) for n, recall in enumerate(recalls)]
    as_less, accurate = ([_trial(n, recall, a) for n, recall in enumerate(recalls[::-1])] for a in (0.95, 0.99))
    assert rank_settings({0: less, 1: as_less, 2: accurate}) == [2, 0, 1]
    assert rank_settings({0: as_less, 1: less, 2: accurate}) == [2, 0, 1]


def test_of_two_settings_of_one_mean_the_steadier_goes_first() -> None:
    steady = [_trial(n, recall) for n, recall in enumerate((0.90, 0.91, 0.92))]
    wild = [_trial(n, recall) for n, recall in enumerate((0.82, 0.93, 0.99))]
    assert sum(r.recall or 0 for r in wild) > sum(r.recall or 0 for r in steady)
    assert rank_settings({0: wild, 1: steady}) == [1, 0]


def test_the_bound_of_a_lone_setting_is_student_t_with_a_little_more_freedom() -> None:
    recalls = (0.90, 0.91, 0.95)
    (bound,) = recall_bounds({4: [_trial(n, recall) for n, recall in enumerate(recalls)]}).values()
    assert bound is not None
    half = stats.t.ppf(0.95, 2 + 4) * np.std(recalls, ddof=1) / math.sqrt(3)
    assert bound == pytest.approx(np.mean(recalls) - half)


def test_a_settings_scatter_is_drawn_towards_what_all_show() -> None:
    """Three equal recalls are luck, not certainty: the bound lies below them."""
    equal, other = [_trial(n, 0.9) for n in range(3)], [_trial(n, recall) for n, recall in enumerate((0.8, 0.9, 1.0))]
    bounds = recall_bounds({0: equal, 1: other})
    shared = (0.0 + 0.01) / 2
    assert bounds[0] == pytest.approx(0.9 - stats.t.ppf(0.95, 6) * math.sqrt(4 * shared / 6 / 3))
    assert bounds[1] == pytest.approx(0.9 - stats.t.ppf(0.95, 6) * math.sqrt((2 * 0.01 + 4 * shared) / 6 / 3))


@pytest.mark.parametrize("seeds", [1, 3])
def test_without_a_variance_there_is_no_bound_and_the_mean_decides(seeds: int) -> None:
    """One seed shows none, and seeds that all agree show none either."""
    retrained = {number: [_trial(n, recall) for n in range(seeds)] for number, recall in enumerate((0.7, 0.9, 0.8))}
    assert recall_bounds(retrained) == {0: None, 1: None, 2: None}
    assert rank_settings(retrained) == [1, 2, 0]


def test_the_mean_over_seeds_keeps_the_floor_not_each_seed() -> None:
    above = [_trial(0, constraint=-0.25), _trial(1, constraint=0.25)]
    below = [_trial(2, constraint=-0.25), _trial(3, constraint=0.375)]
    assert rank_settings({0: above, 1: below}) == [0], "a mean at the floor keeps it"
    barely = [_trial(4, constraint=-0.25), _trial(5, constraint=0.25 + 1e-6)]
    assert rank_settings({0: above, 1: barely}) == [0], "and none below it, by however little"


@pytest.mark.parametrize("state", ["waiting", "running", "pruned", "failed"])
def test_a_setting_with_a_seed_that_did_not_complete_is_left_out(state: TrialState) -> None:
    broken = replace(_trial(1, None, None, constraint=None), state=state)
    assert rank_settings({0: [_trial(0, 1.0, 1.0), broken], 5: [_trial(2), _trial(3)]}) == [5]


def test_a_setting_without_models_is_left_out() -> None:
    assert rank_settings({0: []}) == []
    assert rank_settings({}) == []


def test_models_of_a_setting_are_ranked_by_recall_then_accuracy_then_seed() -> None:
    records = [_trial(1, 0.9, 0.95), _trial(2, 0.9, 0.95), _trial(3, 0.9, 0.96), _trial(4, 0.95, 0.9)]
    assert [r.number for r in rank_models(records)] == [4, 3, 2, 1], "of equals the lower seed, not the lower number"


def test_a_model_below_the_floor_is_not_exported_however_good_its_recall() -> None:
    records = [_trial(1, 1.0, 0.9, constraint=0.01), _trial(2, 1.0, 0.9, constraint=None), _trial(3, 0.8)]
    assert [r.number for r in rank_models(records)] == [3]


COUNTS = st.lists(st.integers(0, 300), min_size=1, max_size=5)


@given(mine=COUNTS, theirs=COUNTS, tolerance=st.sampled_from([0.0, 0.005, 0.01]))
def test_a_setting_that_keeps_the_floor_has_a_model_to_export(
    mine: list[int], theirs: list[int], tolerance: float
) -> None:
    """Means of floats round: with all seeds equal to the baseline's, the mean must not fall below its own values."""
    floor = Figure(tuple(c / 300 for c in theirs)).mean - tolerance - 1e-9
    records = [_trial(i, 0.9, c / 300, constraint=floor - c / 300) for i, c in enumerate(mine)]
    kept = rank_settings({0: records})
    if kept:
        assert rank_models(records)
    if sorted(mine) == sorted(theirs):
        assert kept == [0]


def test_models_scored_on_different_images_are_taken_by_seed() -> None:
    """A fold of easy tracks must not choose the seed. Seeds run against numbers here."""
    one, two, three = _trial(1, 0.99), replace(_trial(2, 0.8), fold=1), replace(_trial(3, 0.9), fold=2)
    assert [r.number for r in rank_models([one, two, three])] == [3, 2, 1]
    assert [r.number for r in rank_models([one, replace(two, constraint=0.1), three])] == [3, 1]


# The certificate


def _judge(
    counts: Mapping[int, tuple[int, int, int] | None], asked: list[tuple[int, float]]
) -> Callable[[int, float], PairedDifference | None]:
    """A judge that knows of each setting how many images it gained and lost of how many (None: damaged).

    It notes what it is asked.
    """

    def judge(number: int, confidence: float) -> PairedDifference | None:
        asked.append((number, confidence))
        found = counts[number]
        return None if found is None else PairedDifference(*found, found[2], confidence)

    return judge


def test_the_first_that_passes_is_exported_and_nothing_after_it_is_judged() -> None:
    asked: list[tuple[int, float]] = []
    counts = {5: (0, 900, 10_000), 2: (90, 80, 10_000), 9: (500, 0, 10_000)}
    verdict, best, judged = certify([5, 2, 9], _judge(counts, asked), 0.005)
    assert (verdict, best) == ("certified", 2)
    assert list(judged) == [5, 2], "the better one comes later in validation's order: test does not choose"
    assert [number for number, _ in asked] == [5, 2]


def test_where_none_passes_the_first_in_validations_order_is_feasible() -> None:
    counts = {5: (0, 900, 10_000), 2: (0, 100, 10_000)}
    verdict, best, judged = certify([5, 2], _judge(counts, []), 0.005)
    assert (verdict, best) == ("feasible", 5), "not the one that came out better on test"
    assert list(judged) == [5, 2]


def test_a_damaged_setting_is_passed_over() -> None:
    verdict, best, judged = certify([5, 2], _judge({5: None, 2: (90, 80, 10_000)}, []), 0.005)
    assert (verdict, best, list(judged)) == ("certified", 2, [2])
    assert certify([5], _judge({5: None}, []), 0.005) == ("none", None, {})
    assert certify([], _judge({}, []), 0.005) == ("none", None, {})


@pytest.mark.parametrize(("count", "confidence"), [(1, 0.95), (2, 0.975), (4, 0.9875), (5, 0.99)])
def test_all_that_may_be_judged_share_the_doubt(count: int, confidence: float) -> None:
    """However early it ends: how many could be judged is known before test is read."""
    asked: list[tuple[int, float]] = []
    certify(list(range(count)), _judge(dict.fromkeys(range(count), (0, 0, 100000)), asked), 0.005)
    ((number, at),) = asked
    assert (number, at) == (0, shared_confidence(count))
    assert shared_confidence(count) == pytest.approx(confidence)


def test_fewer_at_a_later_look_have_no_more_confidence() -> None:
    """A bound that two settings miss at 97.5 % each is not met by the one that is left, at 95 %."""
    counts = (30, 60, 10_000)
    alone, shared = (tango_interval(*counts, confidence=2 * at - 1).low for at in (0.95, 0.975))
    epsilon = -(alone + shared) / 2
    assert certify([5], _judge({5: counts}, []), epsilon)[0] == "certified"
    asked: list[tuple[int, float]] = []
    assert certify([5], _judge({5: counts}, asked), epsilon, sharing=2)[0] == "feasible"
    assert asked == [(5, shared_confidence(2))]
    certify([5, 6, 7], _judge(dict.fromkeys((5, 6, 7), counts), asked), epsilon, sharing=2)
    assert asked[-1] == (7, shared_confidence(3)), "more share it from then on"


@pytest.mark.parametrize(("gained", "lost", "passes"), [(40, 20, True), (30, 60, True), (20, 60, False)])
def test_certified_means_that_the_lower_bound_keeps_epsilon(gained: int, lost: int, passes: bool) -> None:
    low = tango_interval(gained, lost, 10_000, confidence=0.90).low
    assert (low >= -0.0047) is passes
    for epsilon in (-low, -low + 1e-6):
        assert certify([0], _judge({0: (gained, lost, 10_000)}, []), epsilon)[0] == "certified"
    assert certify([0], _judge({0: (gained, lost, 10_000)}, []), -low - 1e-6)[0] == "feasible"


def test_without_any_difference_a_few_images_certify_nothing() -> None:
    assert certify([0], _judge({0: (0, 0, 360)}, []), 0.005)[0] == "feasible"
    assert certify([0], _judge({0: (0, 0, 12_630)}, []), 0.005)[0] == "certified"


def test_a_missing_number_ranks_last() -> None:
    """A complete trial always has its figures; should one be missing, it must not win."""
    assert [t.number for t in finalists([_trial(0, None), _trial(1, 0.0)], 2)] == [1, 0]
    assert rank_settings({0: [_trial(0, constraint=None)]}) == []
    assert math.isfinite(rank_models([_trial(0, None), _trial(1, 0.1)])[0].recall or math.nan)
