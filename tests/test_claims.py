"""What is said of a result: no more than the counts show."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from camri_tune.bundle import BundleConfig, ModelSpec
from camri_tune.calibration import Calibration
from camri_tune.claims import (
    bias_alone,
    few_test_images,
    images_needed,
    no_better_than_guessing,
    nothing_to_gain,
    provenance,
    sentence_of,
)
from camri_tune.config import is_printable, printable
from camri_tune.constraints import ClassOnTest, OnTest, recall_constraints
from camri_tune.differences import PairedDifference, SeedDifference, Share
from camri_tune.metrics import Precision
from camri_tune.records import Measured, figure_head, named
from camri_tune.report import Facts, escaped, model_card
from camri_tune.result import Best, Finalist, Result, Side, Threshold, Verdict
from camri_tune.stats import Hidden, Interval, tango_interval


def _difference(gained: int, lost: int, n: int, *, size: float | None = None, at: float = 0.95) -> PairedDifference:
    return PairedDifference(gained, lost, n, size or n, at)


def _verdict(difference: PairedDifference, epsilon: float) -> Verdict:
    return "certified" if difference.lower_bound >= -epsilon else "feasible"


@pytest.mark.parametrize(
    ("gained", "lost", "epsilon", "at"),
    [
        (60, 60, 0.005, 0.95),
        (60, 60, 0.005, 0.99),
        (40, 65, 0.005, 0.95),
        (300, 200, 0.002, 0.975),
        (400, 430, 0.01, 0.95),
    ],
)
def test_as_many_images_as_are_said_to_be_needed_certify_in_4_of_5_draws(
    gained: int, lost: int, epsilon: float, at: float
) -> None:
    """Of 10,000 images, these shares; test sets of the size that is said are drawn anew."""
    needed = images_needed(_difference(gained, lost, 10_000, at=at), epsilon)
    assert needed is not None
    rng, shares = np.random.default_rng(needed), np.array([gained, lost, 10_000 - gained - lost]) / 10_000
    certified = {}
    for n in (needed, needed // 2):
        drawn, counts = np.unique(rng.multinomial(n, shares, size=3_000)[:, :2], axis=0, return_counts=True)
        passed = [_difference(int(g), int(b), n, at=at).lower_bound >= -epsilon for g, b in drawn]
        certified[n] = float(counts[np.array(passed)].sum() / counts.sum())
    assert 0.765 <= certified[needed] <= 0.85
    assert certified[needed // 2] < 0.65


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
def test_where_the_shares_stay_as_they_are_so_many_images_certify(
    gained: int, lost: int, rest: int, points: int, factor: int
) -> None:
    n = gained + lost + rest + 1
    epsilon = points / 1000
    needed = images_needed(_difference(gained, lost, n), epsilon)
    more = _difference(gained * factor, lost * factor, n * factor)
    if needed is None:
        assert more.estimate <= -epsilon
    elif more.n > 1.05 * needed:
        assert _verdict(more, epsilon) == "certified"


@given(gained=st.integers(0, 20), lost=st.integers(0, 20), rest=st.integers(0, 3000), points=st.integers(1, 30))
@example(gained=0, lost=0, rest=359, points=5)
@settings(deadline=None)
def test_what_was_not_certified_needs_more_images_than_it_had(gained: int, lost: int, rest: int, points: int) -> None:
    difference, epsilon = _difference(gained, lost, gained + lost + rest + 1), points / 1000
    assume(_verdict(difference, epsilon) == "feasible")
    needed = images_needed(difference, epsilon)
    assert needed is None or needed > difference.n


def test_no_number_of_images_certifies_what_is_itself_too_bad() -> None:
    assert images_needed(_difference(0, 10, 1000), 0.005) is None
    assert images_needed(_difference(0, 5, 1000), 0.005) is None
    assert images_needed(_difference(0, 4, 1000), 0.005) is not None


# The sentence


NAMES = ("Stop", "Yield", "2")


def _best(accuracy: PairedDifference, recall: PairedDifference, *others: PairedDifference) -> Best:
    """`others` are the recalls of classes 1, 2, … beside class 0."""
    measured = Measured.over_seeds([0.9], [(0.9, 0.9)], [0])
    return Best(
        trial=3,
        params={"margin": 0.25},
        side=Side(measured, measured),
        exported_seed=0,
        exported_accuracy=Share(90, 100, 100),
        precision={0: (Precision(8, 9), Precision(9, 12))},
        exported_recall={0: Share(9, 10, 10)},
        baseline_seed=1,
        accuracy_difference=accuracy,
        recall_difference=dict(enumerate((recall, *others))),
        recall_over_seeds={c: SeedDifference((0.1,), None) for c in range(1 + len(others))},
        accuracy_over_seeds=SeedDifference((0.0,), None),
    )


def _sentence(
    accuracy: tuple[int, int, int], recall: tuple[int, int, int], *, epsilon: float = 0.5
) -> tuple[Verdict, str]:
    """The verdict and the sentence of these counts of gained, lost and all images; epsilon is in points."""
    best = _best(_difference(*accuracy), _difference(*recall))
    verdict = _verdict(best.accuracy_difference, epsilon / 100)
    return verdict, sentence_of(verdict, best, classes=NAMES, epsilon=epsilon, tolerance=0.0)


def _assert_one_sentence(sentence: str) -> None:
    assert sentence.endswith(".")
    assert "\n" not in sentence
    assert "  " not in sentence
    assert "nan" not in sentence.lower()


def test_a_certified_gain_is_said_with_its_counts_and_its_bound() -> None:
    verdict, sentence = _sentence((60, 40, 12_630), (21, 3, 270))
    bound, gain = (100 * tango_interval(*c, confidence=0.90).low for c in ((60, 40, 12_630), (21, 3, 270)))
    assert verdict == "certified"
    assert sentence == (
        "Recall of Stop on test rose by +6.67 points (21 gained, 3 lost of 270 images; "
        f"95 % lower bound {gain:+.2f} points); "
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
    assert 3_200 < needed < 3_300, "for 80 % power; half of them would be a coin flip"
    assert "is not certified on test to be within 0.5 points of the baseline model's" in sentence
    assert "difference +0.00 points" in sentence
    assert "n = 1,000" in sentence
    assert f"about {needed:,} test images would be needed to certify such a difference in 4 of 5 cases" in sentence


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


def _finals(*kinds: str) -> list[Finalist]:
    """Finalists of which a training failed, that fell below the floor, or that kept accuracy and are not judged."""
    measured = Measured.over_seeds([0.9], [(0.9, 0.9)], [0])
    return [
        Finalist(n, {}, None if kind == "failed" else measured, None if kind == "failed" else 0.7, kind == "kept", None)
        for n, kind in enumerate(kinds)
    ]


@pytest.mark.parametrize(
    ("tolerance", "at"), [(0.0, "at the baseline's"), (0.25, "within 0.25 points of the baseline's")]
)
@pytest.mark.parametrize(
    ("kinds", "reason", "untrue"),
    [
        ((), "no trial of the search was eligible", ("finalist", "failed", "missing")),
        (("below", "below"), "no finalist had its mean validation accuracy over seeds", ("failed", "missing")),
        (("failed", "failed"), "of each of the 2 finalist(s) a training failed", ("accuracy", "missing")),
        (("failed", "below", "below"), "(and of 1 of 3 a training failed)", ("missing",)),
        (("kept", "below", "kept"), "2 finalist(s) with mean validation accuracy", ("failed", "eligible")),
    ],
)
def test_without_a_model_the_true_reason_is_given(
    kinds: tuple[str, ...], reason: str, untrue: tuple[str, ...], tolerance: float, at: str
) -> None:
    finals = _finals(*kinds)
    sentence = sentence_of("none", None, classes=NAMES, epsilon=0.5, tolerance=tolerance, finalists=finals)
    _assert_one_sentence(sentence)
    assert sentence.startswith("No model: ")
    assert reason in sentence
    assert (at in sentence) == (set(kinds) != {"failed"})
    assert ("a checkpoint is missing or altered" in sentence) == ("kept" in kinds)
    assert not [word for word in untrue if word in sentence]
    assert "nothing is exported." in sentence


@pytest.mark.parametrize("verdict", ["certified", "feasible", "none"])
def test_the_sentence_itself_carries_more_than_one_look_at_test(verdict: Verdict) -> None:
    best = None if verdict == "none" else _best(_difference(60, 40, 12_630), _difference(21, 3, 270))
    once, thrice = (
        sentence_of(verdict, best, classes=NAMES, epsilon=0.5, tolerance=0.0, reads=reads) for reads in (1, 3)
    )
    _assert_one_sentence(thrice)
    assert "after 3 looks at this test set" in thrice
    assert ("with less than that confidence" in thrice) == (best is not None)
    assert "looks" not in once


def test_with_a_tolerance_nothing_is_said_to_be_kept() -> None:
    best = _best(_difference(6, 6, 1000), _difference(3, 0, 100))
    strict, loose = (
        sentence_of("feasible", best, classes=NAMES, epsilon=0.5, tolerance=tolerance) for tolerance in (0.0, 2.5)
    )
    assert "accuracy was kept on validation, but" in strict
    assert "accuracy was within 2.5 points of the baseline's on validation, but" in loose
    assert "kept" not in loose


def test_every_important_class_is_spoken_of_in_turn() -> None:
    """Pooled, these three would be a rise: the class that lost half of its images must not hide in it."""
    best = _best(
        _difference(60, 40, 12_630), _difference(90, 0, 900, at=0.975), _difference(0, 30, 60, at=0.975),
        _difference(1, 1, 50, at=0.975),
    )  # fmt: skip
    sentence = sentence_of("certified", best, classes=NAMES, epsilon=0.5, tolerance=0.0)
    _assert_one_sentence(sentence)
    parts = sentence.split("; accuracy")[0].split("; recall")
    assert len(parts) == 3
    assert parts[0].startswith("Recall of Stop on test rose by +10.00 points (90 gained, 0 lost of 900 images; 97.5 %")
    assert parts[1].startswith(" of Yield on test FELL by 50.00 points (0 gained, 30 lost of 60 images)")
    assert parts[2].startswith(" of 2 on test did not change (1 gained, 1 lost of 50 images)")


# Nothing to gain

CLASSES = ("go", "stop", "turn", "wait", "yield")


@pytest.mark.parametrize("recalls", [(0.5, 0.5, 0.5, 0.5, 0.98999), (0.5, 1.0, 1.0, 1.0, 0.0)])
def test_a_class_with_something_to_gain_has_no_warning(recalls: Sequence[float]) -> None:
    assert nothing_to_gain(recalls, [4], CLASSES) is None


def test_a_nearly_perfect_class_is_warned_of_with_better_choices() -> None:
    warning = nothing_to_gain((0.97, 0.99, 0.5, 0.98, 0.9), [1], CLASSES)
    assert warning == (
        "Class 1 (stop) has almost nothing to gain: the baseline's validation recall is 0.990 already. "
        "The classes with most to gain are 2 (turn) at 0.500, 4 (yield) at 0.900, 0 (go) at 0.970."
    )


def test_a_class_whose_name_is_its_number_is_not_named_twice() -> None:
    warning = nothing_to_gain((0.97, 0.99, 0.5), [1], ("0", "1", "2"))
    assert warning is not None
    assert warning.startswith("Class 1 has almost nothing to gain")
    assert warning.endswith("are 2 at 0.500, 0 at 0.970.")
    best = replace(_best(_difference(1, 1, 500), _difference(1, 0, 60)), exported_recall={1: Share(58, 60, 60)})
    (line,) = few_test_images(best, ("0", "1", "2"))
    assert line.startswith("Class 1 has only 60 test images: ")


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


# Few images, groups, several finalists


def test_a_class_with_sixty_test_images_says_so() -> None:
    best = replace(_best(_difference(1, 1, 500), _difference(1, 0, 60)), exported_recall={1: Share(58, 60, 60)})
    assert few_test_images(best, CLASSES) == [
        "Class 1 (stop) has only 60 test images: one image is 1.7 points of recall, and even with all of them right no "
        f"more is shown (95 %) than a recall of {0.025 ** (1 / 60):.3f}."
    ]
    assert few_test_images(replace(best, exported_recall={1: Share(99, 100, 100)}), CLASSES) == []


def test_many_frames_of_few_tracks_are_few_images() -> None:
    best = replace(_best(_difference(1, 1, 500), _difference(1, 0, 60)), exported_recall={1: Share(280, 300, 9.6)})
    (line,) = few_test_images(best, CLASSES)
    assert "has only 300 test images, which count as 10 independent ones for one model's recall: one image" in line
    assert "is 0.3 points of recall, and even with all of them right no more is shown (95 %)" in line
    assert f"a recall of {0.025 ** (1 / 9.6):.3f}." in line


@pytest.mark.parametrize(
    ("wrong", "groups", "images", "counts", "most"),
    [
        ([*range(15)], [0] * 15 + [*range(1, 8)] * 3 + [1] * 4, 40, 2, 0.511),
        ([0, 7, 14], [*range(10)] * 6, 60, 45, 0.612),
    ],
)
def test_what_all_images_right_would_show_is_what_the_interval_says_then(
    wrong: list[int], groups: list[int], images: int, counts: int, most: float
) -> None:
    """However the errors that were made lie in the groups: without any nothing varies, and each group counts once."""
    right, together = np.ones(images, bool), np.array(groups)
    if_all = Share.of(right, together)
    right[wrong] = False
    best = replace(_best(_difference(1, 1, 500), _difference(1, 0, 60)), exported_recall={1: Share.of(right, together)})
    (line,) = few_test_images(best, CLASSES)
    assert f"has only {images} test images, which count as {counts} independent ones for one model's recall" in line
    assert line.endswith(
        f"all of them right, when a group counts as one, no more is shown (95 %) than a recall of {most}."
    )
    assert if_all.interval.low == pytest.approx(most, abs=5e-4)


def test_sixty_frames_of_two_unnamed_tracks_are_two_signs() -> None:
    share = Share(58, 60, 4.1, Hidden(30, 1.0))
    best = replace(_best(_difference(1, 1, 500), _difference(1, 0, 60)), exported_recall={1: share})
    (line,) = few_test_images(best, CLASSES)
    assert "has only 60 test images of about 2 unnamed tracks, which count as 4 independent ones for one" in line
    assert f"a recall of {0.025 ** (1 / 4.1):.3f}." in line


def test_bounds_of_several_finalists_are_said_at_their_own_confidence() -> None:
    best = _best(_difference(60, 40, 12_630, at=0.99), _difference(21, 3, 270, at=0.99))
    sentence = sentence_of("certified", best, classes=NAMES, epsilon=0.5, tolerance=0.0)
    for counts in ((60, 40, 12_630), (21, 3, 270)):
        assert f"99 % lower bound {100 * tango_interval(*counts, confidence=0.98).low:+.2f} points" in sentence


def test_groups_are_said_to_count_as_fewer_images() -> None:
    best = _best(_difference(60, 40, 12_630, size=812.3), _difference(21, 3, 270))
    sentence = sentence_of("feasible", best, classes=NAMES, epsilon=0.5, tolerance=0.0)
    assert "n = 12,630 images in groups, which count as 812;" in sentence
    assert "lost of 270 images; " in sentence, "which count each"
    alone = images_needed(_difference(60, 40, 12_630), 0.005)
    grouped = images_needed(_difference(60, 40, 12_630, size=12_630 / 4), 0.005)
    assert alone is not None
    assert grouped == pytest.approx(4 * alone, abs=4), "more of the same groups"


def test_unnamed_tracks_are_said_with_their_number_and_what_they_count_as() -> None:
    hidden = Hidden(30, 5.0)
    accuracy = PairedDifference(60, 40, 12_630, 2_514.9, 0.95, (), hidden)
    best = _best(accuracy, PairedDifference(22, 1, 690, 126.6, 0.95, (), hidden))
    sentence = sentence_of("feasible", best, classes=NAMES, epsilon=0.5, tolerance=0.0)
    assert "n = 12,630 images of about 421 unnamed tracks, which count as 2,515;" in sentence
    assert "22 gained, 1 lost of 690 images of about 23 unnamed tracks, which count as 127;" in sentence
    assert f"95 % lower bound {100 * best.recall_difference[0].lower_bound:+.2f} points" in sentence
    text = "\n".join(provenance(_result(best, kept=1)))
    assert "5,678 images of about 421 unnamed tracks" in text
    assert "varies 5.0 times as much as with independent images (the design effect)" in text
    assert "design effect" not in "\n".join(
        provenance(_result(_best(_difference(1, 1, 9), _difference(1, 1, 9)), kept=1))
    )


def test_more_confidence_needs_more_images() -> None:
    once, five = (images_needed(_difference(0, 0, 1000, at=at), 0.005) for at in (0.95, 0.99))
    assert once is not None
    assert five == pytest.approx(once * (2.326348 / 1.644854) ** 2, abs=2), "where nothing varies, power is no matter"


# A bias alone


def _threshold(*, gain: float | None, low: float = 0.0, bias: float = 1.5) -> Threshold:
    measured = Measured.over_seeds([0.9, 0.92], [(0.8, 0.96), (0.85, 0.98)], [1])
    difference = None if gain is None else SeedDifference((gain, gain), Interval(low, 2 * gain - low))
    return Threshold((bias, 0.0), Side(measured, measured), difference, difference)


def test_what_is_not_shown_to_be_more_than_a_bias_is_said() -> None:
    best = _best(_difference(1, 1, 5678), _difference(1, 0, 90))
    assert bias_alone(_threshold(gain=0.02, low=0.01), best, "1 (stop)") is None
    for gain, low in ((0.1, -0.05), (0.0, -0.01), (-0.02, -0.03)):
        text = bias_alone(_threshold(gain=gain, low=low), best, "1 (stop)")
        assert text is not None
        assert text.startswith("Not shown to recall more than a bias alone, which trains nothing: the baseline's own")
        assert "on the logit of 1 (stop)" in text
        assert "a recall of 0.9700 and an accuracy of 0.9100 on test, those of the chosen setting 0.9000 and" in text
        assert f"(recall {100 * gain:+.2f} [{100 * low:+.2f}, {100 * (2 * gain - low):+.2f}] points)" in text
        assert "--loss ce --calibrate" in text
        assert "second look" in text
    assert bias_alone(_threshold(gain=0.0, bias=0.0), best, "1 (stop)") is None, "no bias has anything to give"


def test_where_nothing_is_exported_a_bias_may_do() -> None:
    text = bias_alone(_threshold(gain=None), None, "1 (stop)")
    assert text is not None
    assert "a recall of 0.9700 and an accuracy of 0.9100 on test." in text
    assert "chosen setting" not in text
    assert bias_alone(_threshold(gain=None, bias=0.0), None, "1 (stop)") is None, "no bias keeps accuracy"


# Who chose, who judged


def _result(best: Best | None, *, kept: int, folds: int = 1, reads: int = 1) -> Result:
    measured = Measured.over_seeds([0.9, 0.92], [(0.8, 1.0), (0.85, 0.99)], [0])
    finals = tuple(Finalist(n, {}, measured, 0.7, n < kept, None) for n in range(5))
    return Result(
        study="s",
        dataset="digits",
        classes=("go", "stop"),
        important=(1,),
        loss="camri",
        tolerance=0.0,
        epsilon=0.5,
        seeds=3,
        verdict="none" if best is None else "feasible",
        sentence="",
        notices=(),
        images={"train": 10, "validation": 1234, "test": 5678, "validation_important": 60, "test_important": 90},
        validation_per_class=(3, 2),
        folds=folds,
        baseline=Side(measured, measured),
        baseline_learning_rate=4e-3,
        best=best,
        finalists=finals,
        test_reads=reads,
        trials={"complete": 17, "pruned": 2, "failed": 1},
        wall_seconds=1.0,
        versions={},
        folder="runs/s",
    )


def test_it_is_said_who_chose_who_judged_and_what_is_claimed() -> None:
    best = _best(_difference(1, 1, 5678, at=0.975), _difference(1, 0, 90, at=0.975))
    chose, judged, claimed, not_claimed, not_counted = provenance(_result(best, kept=2))
    assert "1,234 images held out" in chose
    assert "20 trial(s), 5 finalist(s) over 3 fresh seed(s) each" in chose
    assert chose.endswith("and the seed that is exported.")
    assert "5,678 images (90 of the important class), which chose nothing" in judged
    assert "(seed 0) does beside the baseline model of seed 1" in claimed
    assert "accuracy's bounds hold together at about 95 %, one-sided, recall's likewise" in claimed
    assert "for all 2 finalists that could have been judged" in claimed
    assert "each of accuracy's at 97.5 %, of recall's at 97.5 %." in claimed
    for what in ("unlike the test set's", "another seed", "more data"):
        assert what in not_claimed
    for what in ("--name", "--seed", "--loss"):
        assert what in not_counted


def test_it_is_said_that_the_baseline_was_measured_with_a_bias_too() -> None:
    best = _best(_difference(1, 1, 5678), _difference(1, 0, 90))
    for result in (_result(best, kept=1), _result(None, kept=0)):
        assert "bias" not in provenance(result)[1]
        assert "with one that validation chose." in provenance(replace(result, threshold=_threshold(gain=None)))[1]


def test_the_classes_share_the_doubt_of_what_is_said_of_recall() -> None:
    recalls = [_difference(1, 0, 90, at=0.9875) for _ in range(2)]
    result = replace(_result(_best(_difference(1, 1, 5678, at=0.975), *recalls), kept=2), important=(0, 1))
    _, judged, claimed, *_ = provenance(result)
    assert "(90 of the important classes)" in judged
    assert (
        "2 finalists that could have been judged and 2 classes: each of accuracy's at 97.5 %, of recall's at 98.75 %"
        in claimed
    )
    one = replace(_result(_best(_difference(1, 1, 5678), *recalls), kept=1), important=(0, 1))
    assert "for one finalist and 2 classes: each of accuracy's at 95 %, of recall's at 98.75 %" in provenance(one)[2]


def test_one_finalist_has_all_the_doubt_to_itself() -> None:
    best = _best(_difference(1, 1, 5678), _difference(1, 0, 90))
    claimed = provenance(_result(best, kept=1))[2]
    assert "accuracy's bound holds at about 95 %, one-sided, recall's likewise." in claimed


def test_who_shared_the_doubt_at_an_earlier_look_shares_it_still() -> None:
    best = _best(_difference(1, 1, 5678, at=0.975), _difference(1, 0, 90, at=0.975))
    claimed = provenance(replace(_result(best, kept=1), sharing=2))[2]
    assert "for all 2 finalists that could have been judged at an earlier look: each of accuracy's at 97.5 %" in claimed


def test_a_learning_rate_that_was_given_was_not_chosen() -> None:
    given = replace(_result(None, kept=0), rate_was_tuned=False)
    assert "They ranked 20 trial(s) and 5 finalist(s)" in provenance(given)[0]
    assert "They ranked 20 trial(s)." in provenance(replace(given, finalists=()))[0]
    on_folds = provenance(replace(_result(None, kept=0, folds=5), rate_was_tuned=False))[0]
    assert "not trained on it. All folds together ranked 20 trial(s)" in on_folds


def test_folds_are_said_and_who_chose_what_on_them() -> None:
    best = _best(_difference(1, 1, 5678), _difference(1, 0, 90))
    chose = provenance(_result(best, kept=1, folds=3))[0]
    assert "in 3 folds, each scored by models not trained on it" in chose
    assert "The first fold ranked the baseline's learning rates, all folds together 20 trial(s)" in chose
    assert "5 finalist(s) over 3 fresh seed(s) each, whose seeds take the folds in turn" in chose
    assert "The first seed that keeps accuracy on its own fold is exported" in chose
    none = provenance(_result(None, kept=0, folds=3))[0]
    assert "exported" not in none


@pytest.mark.parametrize("folds", [1, 3])
def test_without_a_model_nothing_is_claimed_that_did_not_happen(folds: int) -> None:
    result = _result(None, kept=0, folds=folds)
    lines = provenance(result)
    assert [line.split(":")[0] for line in lines] == ["Chose", "Judged", "Not claimed", "Not counted"]
    assert "No finalist was measured on test (5,678 images, 90 of the important class), the baseline alone" in lines[1]
    assert not [line for line in lines if "is exported" in line or "certified" in line]
    assert "5 finalist(s)" in lines[0]
    nobody = provenance(replace(result, finalists=()))
    assert "finalist" not in nobody[0]
    assert "20 trial(s)" in nobody[0]


def test_a_second_look_at_test_is_said_to_cost_confidence() -> None:
    lines = provenance(_result(None, kept=0, reads=3))
    assert "read for 3 different selections" in lines[-2]
    assert "less than the stated confidence" in lines[-2]
    assert not any("read for" in line for line in provenance(_result(None, kept=0, reads=1)))


# The card

FACTS = Facts("camri-tune run --name s", "worst1", "compact", 12, "0a1b2c", "2024-02-29")


def _card(best: Best, *, spec: ModelSpec | None = None, facts: Facts | None = None, **changes: object) -> str:
    result = replace(_result(best, kept=1), classes=NAMES, versions={"camri-tune": "1"}, **changes)  # type: ignore[arg-type]
    bundle = BundleConfig(
        schema=1,
        spec=spec or ModelSpec(model="compact", channels=3, image_size=32, classes=NAMES, head="dense"),
        important=(0,),
        dataset="signs",
        dataset_fingerprint="f1a9e2",
        seed=0,
        skip_corrupt=False,
    )
    return model_card(result, bundle, facts or FACTS)


def test_the_card_says_stays_at_only_without_a_tolerance() -> None:
    best = _best(_difference(6, 6, 1000), _difference(3, 0, 100))
    assert "while accuracy stays at the cross-entropy baseline's" in _card(best)
    loose = _card(best, tolerance=2.5)
    assert "while accuracy stays within 2.5 points of the cross-entropy baseline's" in loose
    assert "stays at" not in loose
    assert "kept" not in loose
    biased = replace(best, params={"bias_0": 0.25})
    assert "so that accuracy there stays within 2.5 points of the baseline's" in _card(biased, tolerance=2.5)
    assert "so that accuracy there stays at the baseline's" in _card(biased)


def test_the_card_calls_an_interval_exact_only_where_every_image_counts() -> None:
    best = _best(_difference(6, 6, 1000), _difference(3, 0, 100))
    assert "| exact 95 % interval |" in _card(best)
    hidden = replace(best, exported_accuracy=Share(90, 100, 20.0, Hidden(30, 5.0)))
    assert "exact" not in _card(hidden)
    assert "| 90 of 100, which count as 20 |" in _card(hidden)
    accuracy = PairedDifference(60, 40, 12_630, 2_514.9, 0.95, (), Hidden(30, 5.0))
    assert "12,630 images of about 421 unnamed tracks, which count as 2,515" in _card(
        replace(best, accuracy_difference=accuracy)
    )


def test_the_card_has_every_important_class_by_itself() -> None:
    best = _best(_difference(6, 6, 1000), _difference(30, 0, 100, at=0.975), _difference(0, 20, 100, at=0.975))
    card = _card(best, important=(0, 1))
    assert "recall of 0 (Stop) +30.00 points (97.5 % lower bound +" in card
    assert "recall of 1 (Yield) -20.00 points (97.5 % lower bound -" in card


def test_the_card_of_a_study_on_folds_says_whose_images_it_counts() -> None:
    best = _best(_difference(6, 6, 1000), _difference(3, 0, 100))
    assert "Trained on 10 images; " in _card(best)
    assert "Trained on 10 images of the first fold" in _card(best, folds=5)


def _calibrated(best: Best, **changes: Any) -> Best:
    logits, labels = np.array([[2.0, 0.0], [0.0, 3.0], [1.0, 0.5]]), np.array([0, 1, 1])
    usual = {"temperature": 1.25, "bias": {}, "important": (0,), "fitted_on": 77}
    return replace(best, calibration=Calibration.of(logits, labels, **{**usual, **changes}))


def test_the_card_holds_what_a_reviewer_files() -> None:
    best = _calibrated(_best(_difference(6, 6, 1000), _difference(3, 0, 100)))
    card = _card(best)
    for fact in (
        "digits (fingerprint f1a9e2), images of 32x32, RGB",
        "Trained on 10 images; validation 1,234 (60 of the important class); test 5,678 (90)",
        "Network compact, loss camri (margin = 0.25), 12 epochs; weights of seed 0",
        "      camri-tune run --name s\n",
        '(`--important`: "worst1"',
        "temperature of 1.25, fitted on the 77 validation images",
        "| mean negative log-likelihood | ",
        'camri_tune.load("FOLDER")',
        "(N, 3, 32, 32) -> (N, 3)",
        "2024-02-29; camri-tune 1.",
        "SHA-256 `0a1b2c`",
    ):
        assert fact in card, card
    calibration = best.calibration
    assert calibration is not None
    assert f"| {calibration.nll_before:.4f} | {calibration.nll:.4f} |" in card
    assert sum(int(n) for n in re.findall(r"^\| [01]\.\d{3} \| (\d+) \| [01]\.\d{3} \|$", card, re.MULTILINE)) == 3


def test_the_card_calls_scores_scores_and_says_that_a_bias_is_in_no_probability() -> None:
    best = _best(_difference(6, 6, 1000), _difference(3, 0, 100))
    assert "is a score, not a probability" in _card(best)
    sentence = "a rule of decision and in no probability"
    assert sentence not in _card(_calibrated(best))
    spec = ModelSpec(model="compact", channels=3, image_size=32, classes=NAMES, head="dense", logit_bias={0: 0.5})
    assert sentence in _card(_calibrated(best), spec=spec)


def test_names_from_elsewhere_are_no_markup_in_the_card() -> None:
    evil = ("<script>x</script>", "[a](http://b) | `c` *d* _e_ ~~f~~ ![g](h) & \\")
    best = _best(_difference(6, 6, 1000), _difference(3, 0, 100), _difference(3, 0, 100))
    card = _card(best, dataset=evil[1], sentence=f"Recall of {evil[0]} rose.", important=(0, 1))
    names = {"classes": evil, "dataset": evil[1], "versions": {"camri-tune": "1"}}
    hostile = replace(_result(best, kept=1), important=(0, 1), **names)  # type: ignore[arg-type]
    spec = ModelSpec(model="compact", channels=3, image_size=32, classes=("a", "b"), head="dense")
    bundle = BundleConfig(
        schema=1, spec=spec, important=(0,), dataset="d", dataset_fingerprint=evil[1], seed=0, skip_corrupt=False
    )
    for text in (card, model_card(hostile, bundle, FACTS)):
        assert "<script" not in text.replace("\\<script", "")
        assert "[a](" not in text.replace("\\[a\\](", "")
    # A cell of a table ends at each bar that is not escaped: all rows of a table have as many.
    for row in re.findall(r"^\| recall of .*, test \|.*$", model_card(hostile, bundle, FACTS), re.MULTILINE):
        assert len(re.findall(r"(?<!\\)\|", row)) == 5


def test_nor_in_its_table_of_what_was_asked_as_well() -> None:
    (floor,) = recall_constraints({0: 0.9}, None, [[0.9] * 2], [[10] * 2])
    shown = OnTest(floor, (ClassOnTest(0, 0.9, Share(95, 100, 100, None, 0.95)),))
    best = _best(_difference(6, 6, 1000), _difference(3, 0, 100), _difference(3, 0, 100))
    evil = ("<script>x</script>|a*b*", "b")
    names = {"classes": evil, "constraints": (floor,), "versions": {"camri-tune": "1"}}
    hostile = replace(_result(replace(best, constraints=(shown,)), kept=1), important=(0, 1), **names)  # type: ignore[arg-type]
    spec = ModelSpec(model="compact", channels=3, image_size=32, classes=("a", "b"), head="dense")
    bundle = BundleConfig(
        schema=1, spec=spec, important=(0,), dataset="d", dataset_fingerprint="f", seed=0, skip_corrupt=False
    )
    (section,) = re.findall(r"## Asked as well\n(.*?)\n\n", model_card(hostile, bundle, FACTS), re.DOTALL)
    assert "<script" not in section.replace("\\<script", "")
    assert "\\|a\\*b\\*" in section
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in section.splitlines()}) == 1


def test_a_figure_says_whose_it_is_and_of_how_many_images() -> None:
    images = {"validation": 50, "test": 1000, "validation_important": 5, "test_important": 100}
    assert figure_head("recall", "test", images, (3,), 1) == "recall on test, n = 100"
    assert figure_head("recall", "validation", images, (3,), 1) == "recall on validation, n = 5"
    assert figure_head("recall", "validation", images, (3,), 5) == "recall on validation, each seed's fold"
    assert figure_head("accuracy", "test", images, (3, 4), 5) == "accuracy on test, n = 1,000"
    lowest = "lowest recall of the important classes on test, n = 100 in all"
    assert figure_head("recall", "test", images, (3, 4), 5) == lowest


def test_a_bias_is_added_to_a_class_that_is_named() -> None:
    best = replace(_best(_difference(6, 6, 1000), _difference(3, 0, 100)), params={"bias_0": 0.5})
    assert f"+0.5 is added to the logit of class {named(0, NAMES)}, tuned" in _card(best)


@settings(deadline=None)
@given(st.text(max_size=60))
def test_escaped_text_renders_as_itself(text: str) -> None:
    """Each mark of markup has a backslash of its own, and without them the text is there as it can be shown."""
    marked = escaped(text)
    assert is_printable(marked)
    assert re.sub(r"\\([\\`*_\[\]<>|~&#$])", r"\1", marked) == printable(text)
    assert not re.search(r"[`*_\[\]<>|~&#$]", re.sub(r"\\.", "", marked))


@pytest.mark.parametrize(("accuracy", "told"), [(0.30, True), (0.44, True), (0.46, False), (0.05, True), (1.0, False)])
def test_a_baseline_that_has_learned_nothing_is_told(accuracy: float, told: bool) -> None:
    """With 400 images, 40 % of them of one class, 46 % is shown to be more and 44 % is not."""
    text = no_better_than_guessing(accuracy, [120, 160, 120], ("a", "b", "c"))
    assert (text is not None) == told
    if text is not None:
        assert (
            f"right on {accuracy:.3f} of validation, not clearly better than always naming class 1 (b) (0.400)" in text
        )
        assert "--epochs" in text
