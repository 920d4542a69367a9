"""What is said of a result: no more than the counts show."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from camri_tune.claims import few_test_images, images_needed, nothing_to_gain, provenance, sentence_of
from camri_tune.records import Best, Finalist, Measured, PairedDifference, Result, SeedDifference, Share, Side, Verdict
from camri_tune.stats import tango_interval


def _difference(gained: int, lost: int, n: int, *, size: float | None = None, at: float = 0.95) -> PairedDifference:
    return PairedDifference(gained, lost, n, size or n, at)


def _verdict(difference: PairedDifference, epsilon: float) -> Verdict:
    return "certified" if difference.lower_bound >= -epsilon else "feasible"


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
        assert _verdict(more, epsilon) == "certified"
    elif more.n < 0.9 * needed:
        assert _verdict(more, epsilon) == "feasible"


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


def _best(accuracy: PairedDifference, recall: PairedDifference) -> Best:
    measured = Measured.over_seeds([0.9], [(0.9, 0.9)], [0])
    return Best(
        trial=3,
        params={"margin": 0.25},
        side=Side(measured, measured),
        exported_seed=0,
        exported_accuracy=Share(90, 100, 100),
        exported_recall={0: Share(9, 10, 10)},
        baseline_seed=1,
        accuracy_difference=accuracy,
        recall_difference=recall,
        recall_over_seeds=SeedDifference((0.1,), None),
        accuracy_over_seeds=SeedDifference((0.0,), None),
    )


def _sentence(
    accuracy: tuple[int, int, int], recall: tuple[int, int, int], *, epsilon: float = 0.5
) -> tuple[Verdict, str]:
    """The verdict and the sentence of these counts of gained, lost and all images; epsilon is in points."""
    best = _best(_difference(*accuracy), _difference(*recall))
    verdict = _verdict(best.accuracy_difference, epsilon / 100)
    return verdict, sentence_of(verdict, best, names="Stop", epsilon=epsilon, tolerance=0.0)


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
    assert "has only 300 test images, which count as 10 independent ones: one image is 0.3 points" in line
    assert f"a recall of {0.025 ** (1 / 9.6):.3f}." in line


def test_bounds_of_several_finalists_are_said_at_their_own_confidence() -> None:
    best = _best(_difference(60, 40, 12_630, at=0.99), _difference(21, 3, 270, at=0.99))
    sentence = sentence_of("certified", best, names="Stop", epsilon=0.5, tolerance=0.0)
    for counts in ((60, 40, 12_630), (21, 3, 270)):
        assert f"99 % lower bound {100 * tango_interval(*counts, confidence=0.98).low:+.2f} points" in sentence


def test_groups_are_said_to_count_as_fewer_images() -> None:
    best = _best(_difference(60, 40, 12_630, size=812.3), _difference(21, 3, 270))
    sentence = sentence_of("feasible", best, names="Stop", epsilon=0.5, tolerance=0.0)
    assert "n = 12,630 images in groups, which count as 812;" in sentence
    alone = images_needed(_difference(60, 40, 12_630), 0.005)
    grouped = images_needed(_difference(60, 40, 12_630, size=12_630 / 4), 0.005)
    assert alone is not None
    assert grouped == pytest.approx(4 * alone, abs=4), "more of the same groups"


def test_more_confidence_needs_more_images() -> None:
    once, five = (images_needed(_difference(6, 6, 1000, at=at), 0.005) for at in (0.95, 0.99))
    assert once is not None
    assert five == pytest.approx(once * (2.326348 / 1.644854) ** 2, abs=1)


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
    chose, judged, claimed, not_claimed = provenance(_result(best, kept=2))
    assert "1,234 images held out" in chose
    assert "20 trial(s), 5 finalist(s) over 3 fresh seed(s) each" in chose
    assert "5,678 images (90 of the important class), which chose nothing" in judged
    assert "(seed 0) does beside the baseline model of seed 1" in claimed
    assert "97.5 %, those of all 2 finalists that kept accuracy on validation together at 95 %" in claimed
    for what in ("unlike the test set's", "another seed", "more data"):
        assert what in not_claimed


def test_one_finalist_has_all_the_doubt_to_itself() -> None:
    best = _best(_difference(1, 1, 5678), _difference(1, 0, 90))
    claimed = provenance(_result(best, kept=1))[2]
    assert "each bound holds at 95 %, one-sided" in claimed


def test_folds_are_said() -> None:
    assert "in 3 folds, each scored by models not trained on it" in provenance(_result(None, kept=0, folds=3))[0]


def test_without_a_model_nothing_is_claimed() -> None:
    assert [line.split(":")[0] for line in provenance(_result(None, kept=0))] == ["Chose", "Judged", "Not claimed"]


def test_a_second_look_at_test_is_said_to_cost_confidence() -> None:
    lines = provenance(_result(None, kept=0, reads=3))
    assert "read for 3 different selections" in lines[-1]
    assert "less than the stated confidence" in lines[-1]
    assert not any("read for" in line for line in provenance(_result(None, kept=0, reads=1)))
