"""Who goes to the final, who wins it, and what is said of the winner."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from camri_tune.records import (
    Best,
    Figure,
    Measured,
    PairedDifference,
    Share,
    Side,
    TrialRecord,
    TrialState,
    Verdict,
)
from camri_tune.selection import (
    finalists,
    images_needed,
    nothing_to_gain,
    paired_difference,
    rank_models,
    rank_settings,
    sentence_of,
    verdict_of,
)
from camri_tune.stats import Interval, tango_interval


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


def _difference(gained: int, lost: int, n: int) -> PairedDifference:
    return PairedDifference(gained, lost, n, tango_interval(gained, lost, n, confidence=0.90))


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


def test_settings_are_ranked_by_mean_recall_then_accuracy_then_age() -> None:
    retrained = {
        3: [_trial(10, 0.75, 0.5), _trial(11, 0.25, 0.5)],
        2: [_trial(12, 0.5, 0.75), _trial(13, 0.5, 0.5)],
        7: [_trial(14, 1.0, 0.5), _trial(15, 0.125, 0.5)],
        1: [_trial(16, 0.5, 0.5), _trial(17, 0.5, 0.75)],
    }
    assert rank_settings(retrained, 0.5) == [7, 1, 2, 3]


def test_the_mean_over_seeds_keeps_the_floor_not_each_seed() -> None:
    above = [_trial(0, accuracy=0.75), _trial(1, accuracy=0.25, constraint=0.25)]
    below = [_trial(2, accuracy=0.75), _trial(3, accuracy=0.125, constraint=0.375)]
    assert rank_settings({0: above, 1: below}, 0.5) == [0], "a mean at the floor keeps it"


@pytest.mark.parametrize("state", ["waiting", "running", "pruned", "failed"])
def test_a_setting_with_a_seed_that_did_not_complete_is_left_out(state: TrialState) -> None:
    broken = replace(_trial(1, None, None, constraint=None), state=state)
    assert rank_settings({0: [_trial(0, 1.0, 1.0), broken], 5: [_trial(2), _trial(3)]}, 0.5) == [5]


def test_a_setting_without_models_is_left_out() -> None:
    assert rank_settings({0: []}, 0.0) == []
    assert rank_settings({}, 0.0) == []


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
    kept = rank_settings({0: records}, floor)
    if kept:
        assert rank_models(records)
    if sorted(mine) == sorted(theirs):
        assert kept == [0]


# One model against another

RIGHT = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=200)


@given(pairs=RIGHT)
@settings(deadline=None)
def test_two_models_are_compared_image_by_image(pairs: list[tuple[bool, bool]]) -> None:
    gained = lost = 0
    for new, old in pairs:
        if new and not old:
            gained += 1
        if old and not new:
            lost += 1
    difference = paired_difference([new for new, _ in pairs], [old for _, old in pairs])
    assert (difference.gained, difference.lost, difference.n) == (gained, lost, len(pairs))
    accuracies = [sum(column) / len(pairs) for column in zip(*pairs, strict=True)]
    assert difference.estimate == pytest.approx(accuracies[0] - accuracies[1])
    assert difference.interval == tango_interval(gained, lost, len(pairs), confidence=0.90)


def test_answers_to_different_images_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="shorter"):
        paired_difference([True, False], [True])


@pytest.mark.parametrize(
    ("low", "epsilon", "verdict"),
    [
        (-0.004, 0.005, "certified"),
        (-0.005, 0.005, "certified"),
        (-0.0051, 0.005, "feasible"),
        (0.001, 0.0, "certified"),
        (0.0, 0.0, "certified"),
        (-0.001, 0.0, "feasible"),
    ],
)
def test_certified_means_that_the_lower_bound_keeps_epsilon(low: float, epsilon: float, verdict: Verdict) -> None:
    assert verdict_of(PairedDifference(5, 5, 1000, Interval(low, 0.1)), epsilon) == verdict


def test_without_any_difference_a_few_images_certify_nothing() -> None:
    assert verdict_of(_difference(0, 0, 360), 0.005) == "feasible"
    assert verdict_of(_difference(0, 0, 12_630), 0.005) == "certified"


@given(
    gained=st.integers(0, 20),
    lost=st.integers(0, 20),
    rest=st.integers(20, 1500),
    points=st.integers(1, 30),
    factor=st.integers(1, 12),
)
@example(gained=0, lost=0, rest=359, points=5, factor=1)
@example(gained=0, lost=0, rest=99, points=5, factor=6)
@settings(deadline=None, max_examples=300)
def test_about_as_many_images_as_are_said_to_be_needed_do_certify(
    gained: int, lost: int, rest: int, points: int, factor: int
) -> None:
    """The same shares of gained and lost images on a multiple of the images: enough of them, or too few."""
    n = gained + lost + rest + 1
    epsilon = points / 1000
    needed = images_needed(_difference(gained, lost, n), epsilon)
    more = _difference(gained * factor, lost * factor, n * factor)
    if needed is None:
        assert more.estimate <= -epsilon
    elif more.n > 1.1 * needed:
        assert verdict_of(more, epsilon) == "certified"
    elif more.n < 0.9 * needed:
        assert verdict_of(more, epsilon) == "feasible"


@given(gained=st.integers(0, 20), lost=st.integers(0, 20), rest=st.integers(0, 3000), points=st.integers(1, 30))
@example(gained=0, lost=0, rest=359, points=5)
@settings(deadline=None)
def test_what_was_not_certified_needs_more_images_than_it_had(gained: int, lost: int, rest: int, points: int) -> None:
    difference, epsilon = _difference(gained, lost, gained + lost + rest + 1), points / 1000
    assume(verdict_of(difference, epsilon) == "feasible")
    needed = images_needed(difference, epsilon)
    assert needed is None or needed > difference.n


def test_no_number_of_images_certifies_what_is_itself_too_bad() -> None:
    assert images_needed(_difference(0, 10, 1000), 0.005) is None
    assert images_needed(_difference(0, 5, 1000), 0.005) is None
    assert images_needed(_difference(0, 4, 1000), 0.005) is not None


# The sentence


def _best(accuracy: PairedDifference, recall: PairedDifference) -> Best:
    measured = Measured.over_seeds([0.9], [(0.9, 0.9)], [0])
    return Best(
        trial=3,
        params={"margin": 0.25},
        side=Side(measured, measured),
        exported_seed=0,
        exported_accuracy=Share(90, 100),
        exported_recall={0: Share(9, 10)},
        accuracy_difference=accuracy,
        recall_difference=recall,
    )


def _sentence(
    accuracy: tuple[int, int, int], recall: tuple[int, int, int], *, epsilon: float = 0.5
) -> tuple[Verdict, str]:
    """The verdict and the sentence of these counts of gained, lost and all images; epsilon is in points."""
    best = _best(_difference(*accuracy), _difference(*recall))
    verdict = verdict_of(best.accuracy_difference, epsilon / 100)
    return verdict, sentence_of(verdict, best, names="Stop", epsilon=epsilon, tolerance=0.0)


def _assert_one_sentence(sentence: str) -> None:
    assert sentence.endswith(".")
    assert "\n" not in sentence
    assert "  " not in sentence
    assert "nan" not in sentence.lower()


def test_a_certified_gain_is_said_with_its_counts_and_its_bound() -> None:
    verdict, sentence = _sentence((60, 40, 12_630), (21, 3, 270))
    bound = 100 * tango_interval(60, 40, 12_630, confidence=0.90).low
    assert verdict == "certified"
    assert sentence == (
        "Recall of Stop on test rose by +6.67 points (21 gained, 3 lost of 270 images); "
        "accuracy is certified to be not more than 0.5 points below the baseline model's "
        f"(difference +0.16 points, 95 % lower bound {bound:+.2f} points, n = 12,630)."
    )


def test_a_gain_that_may_be_luck_is_said_to_be_so() -> None:
    _, sentence = _sentence((60, 40, 12_630), (3, 2, 270))
    assert "rose by +0.37 points (3 gained, 2 lost of 270 images: too few to tell from no gain)" in sentence


def test_no_change_is_said_to_be_none() -> None:
    _, sentence = _sentence((60, 40, 12_630), (0, 0, 270))
    assert sentence.startswith("Recall of Stop on test did not change")
    assert "rose" not in sentence
    assert "FELL" not in sentence


def test_a_loss_is_shouted() -> None:
    _, sentence = _sentence((60, 40, 12_630), (1, 5, 1270))
    assert sentence.startswith("Recall of Stop on test FELL by 0.31 points (1 gained, 5 lost of 1,270 images)")


def test_what_is_not_certified_says_how_many_images_would_tell() -> None:
    verdict, sentence = _sentence((6, 6, 1000), (3, 0, 100))
    needed = images_needed(_difference(6, 6, 1000), 0.005)
    assert verdict == "feasible"
    assert needed is not None
    assert 1_200 < needed < 1_800
    assert "is not certified on test to be within 0.5 points of the baseline model's" in sentence
    assert "difference +0.00 points" in sentence
    assert "n = 1,000" in sentence
    assert f"about {needed:,} test images would be needed to tell" in sentence


def test_what_fell_too_far_on_test_is_said_to_have_fallen() -> None:
    verdict, sentence = _sentence((0, 10, 1000), (3, 0, 100))
    assert verdict == "feasible"
    assert "difference -1.00 points" in sentence
    assert "accuracy on test itself fell by more than 0.5 points" in sentence


@given(
    accuracy=st.tuples(st.integers(0, 50), st.integers(0, 50), st.integers(1, 2000)),
    recall=st.tuples(st.integers(0, 20), st.integers(0, 20), st.integers(1, 200)),
    epsilon=st.sampled_from([0.0, 0.1, 0.5, 2.0]),
)
@settings(deadline=None)
def test_the_sentence_says_no_more_than_the_counts(
    accuracy: tuple[int, int, int], recall: tuple[int, int, int], epsilon: float
) -> None:
    (gained, lost, rest), (r_gained, r_lost, r_rest) = accuracy, recall
    n, r_n = gained + lost + rest, r_gained + r_lost + r_rest
    verdict, sentence = _sentence((gained, lost, n), (r_gained, r_lost, r_n), epsilon=epsilon)
    _assert_one_sentence(sentence)
    assert ("is certified" in sentence) == (verdict == "certified")
    assert ("not certified" in sentence) == (verdict == "feasible")
    assert ("rose" in sentence) == (r_gained > r_lost)
    assert ("FELL" in sentence) == (r_gained < r_lost)
    if r_gained != r_lost:
        assert f"{r_gained} gained, {r_lost} lost of {r_n:,} images" in sentence
        assert f"{100 * abs(r_gained - r_lost) / r_n:.2f} points" in sentence
    proven = tango_interval(r_gained, r_lost, r_n, confidence=0.90).low > 0
    assert ("too few to tell" in sentence) == (r_gained > r_lost and not proven)
    assert f"n = {n:,}" in sentence
    assert "95 % lower bound" in sentence
    assert " on test " in sentence


@given(
    gained=st.integers(0, 20), lost=st.integers(0, 20), rest=st.integers(1, 2000), points=st.sampled_from([0, 1, 5, 20])
)
@example(gained=0, lost=0, rest=999, points=0)
@example(gained=0, lost=5, rest=995, points=5)
@settings(deadline=None)
def test_accuracy_is_said_to_have_fallen_too_far_only_where_it_did(
    gained: int, lost: int, rest: int, points: int
) -> None:
    """In tenths of a point, so that whole numbers decide. An epsilon of zero is allowed, and no change is no fall."""
    n = gained + lost + rest
    _, sentence = _sentence((gained, lost, n), (1, 0, 10), epsilon=points / 10)
    if "fell by more than" in sentence:
        assert 1000 * (lost - gained) > points * n


@pytest.mark.parametrize(("tolerance", "part"), [(0.0, "at the baseline's;"), (0.25, "less 0.25 points;")])
def test_no_model_is_said_plainly(tolerance: float, part: str) -> None:
    sentence = sentence_of("none", None, names="Stop", epsilon=0.5, tolerance=tolerance)
    _assert_one_sentence(sentence)
    assert sentence.startswith("No model: ")
    assert part in sentence
    assert "validation accuracy over seeds" in sentence
    assert "nothing is exported" in sentence


# Nothing to gain

CLASSES = ("go", "stop", "turn", "wait", "yield")


@pytest.mark.parametrize("recalls", [(0.5, 0.5, 0.5, 0.5, 0.98999), (0.5, 1.0, 1.0, 1.0, 0.0)])
def test_a_class_with_something_to_gain_has_no_warning(recalls: Sequence[float]) -> None:
    assert nothing_to_gain(recalls, [4], CLASSES) is None


def test_a_nearly_perfect_class_is_warned_of_with_better_choices() -> None:
    warning = nothing_to_gain((0.97, 0.99, 0.5, 0.98, 0.9), [1], CLASSES)
    assert warning == (
        "Class 1 (stop) has almost nothing to gain: the baseline's validation recall is 0.990 already. "
        "The classes with most to gain are 2 (turn, 0.500), 4 (yield, 0.900), 0 (go, 0.970)."
    )


def test_where_all_classes_are_nearly_perfect_none_is_recommended() -> None:
    warning = nothing_to_gain((0.99, 1.0, 1.0, 1.0, 1.0), [1, 2], CLASSES)
    assert warning is not None
    assert warning.startswith("Class 1 (stop), 2 (turn) has almost nothing to gain")
    assert warning.endswith("No other class has more to gain.")


def test_of_several_important_classes_one_with_something_to_gain_is_enough() -> None:
    assert nothing_to_gain((1.0, 0.5, 1.0, 1.0, 1.0), [0, 1], CLASSES) is None
    warning = nothing_to_gain((1.0, 0.5, 0.992, 1.0, 1.0), [0, 2], CLASSES)
    assert warning is not None
    assert "is 0.992 already" in warning, "the lowest of them"


def test_a_missing_number_ranks_last() -> None:
    """A complete trial always has its figures; should one be missing, it must not win."""
    assert [t.number for t in finalists([_trial(0, None), _trial(1, 0.0)], 2)] == [1, 0]
    assert rank_settings({0: [_trial(0, accuracy=None)]}, 0.0) == []
    assert math.isfinite(rank_models([_trial(0, None), _trial(1, 0.1)])[0].recall or math.nan)
