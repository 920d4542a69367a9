"""Threshold tuning against naive loops over every bias."""

import math
from fractions import Fraction
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from camri_tune.posthoc import Bias, biased, sweep, tune_bias

Logits = NDArray[np.floating[Any]]


class Case(NamedTuple):
    logits: NDArray[np.float64]
    labels: NDArray[np.int64]
    important: int


WHOLE = st.integers(-3, 3).map(float)  # few values, so ties everywhere
ANY = st.floats(-1e299, 1e299)
FLOOR = st.sampled_from([-1.0, 0.0, 0.2, 0.25, 1 / 3, 0.5, 0.6, 2 / 3, 0.75, 0.9, 1.0, 1.5, math.inf])


@st.composite
def _cases(draw: st.DrawFn, value: st.SearchStrategy[float] = WHOLE, max_size: int = 12) -> Case:
    """Logits and labels of a few samples; at least one of the important class, perhaps all."""
    classes = draw(st.integers(2, 4))
    important = draw(st.integers(0, classes - 1))
    label = draw(st.sampled_from([st.integers(0, classes - 1), st.just(important)]))
    rows = draw(st.lists(st.tuples(label, *[value] * classes), min_size=0, max_size=max_size))
    rows.append((important, *[draw(value) for _ in range(classes)]))
    return Case(np.array([row[1:] for row in rows]), np.array([row[0] for row in rows], np.int64), important)


def _naive_predictions(case: Case, bias: float) -> list[int]:
    """Argmax, first of equals, in exact arithmetic."""
    predictions = []
    for row in case.logits.tolist():
        exact = [Fraction(z) + (Fraction(bias) if j == case.important else 0) for j, z in enumerate(row)]
        predictions.append(exact.index(max(exact)))
    return predictions


def _naive_shares(case: Case, predictions: list[int]) -> tuple[float, float]:
    labels = case.labels.tolist()
    right = [label == prediction for label, prediction in zip(labels, predictions, strict=True)]
    own = [r for r, label in zip(right, labels, strict=True) if label == case.important]
    return sum(right) / len(right), sum(own) / len(own)


def _naive_cuts(case: Case) -> list[float]:
    """The distinct biases at which a sample sits on a tie; exact for whole logits."""
    i = case.important
    return sorted({max(row[:i] + row[i + 1 :]) - row[i] for row in case.logits.tolist()})


def _naive_biases(case: Case) -> list[float]:
    """Every midpoint and both ends."""
    cuts = _naive_cuts(case)
    middles = [(a + b) / 2 for a, b in pairwise(cuts)]
    return [cuts[0] - 1, *middles, cuts[-1] + 1]


def _naive_best(case: Case, floor: float) -> Bias:
    candidates = _naive_biases(case) + ([] if 0 in _naive_cuts(case) else [0.0])
    every = [Bias(b, *_naive_shares(case, _naive_predictions(case, b))) for b in candidates]
    feasible = [c for c in every if c.accuracy >= floor]
    if feasible:
        return max(feasible, key=lambda c: (c.bias >= 0, c.recall, c.accuracy, -abs(c.bias), c.bias))
    return max(every, key=lambda c: (c.accuracy, c.recall, -abs(c.bias), c.bias))


@given(case=_cases())
def test_the_curve_is_that_of_every_bias_tried_in_turn(case: Case) -> None:
    curve = sweep(case.logits, case.labels, important=case.important)
    naive = [_naive_shares(case, _naive_predictions(case, b)) for b in _naive_biases(case)]
    assert list(zip(curve.accuracy.tolist(), curve.recall.tolist(), strict=True)) == naive
    ends = [-math.inf, *_naive_cuts(case), math.inf]
    assert all(low < b < high for b, (low, high) in zip(curve.bias.tolist(), pairwise(ends), strict=True))
    assert 0 in curve.bias or 0 in ends, "the model as it is stands on the curve, unless it decides a tie"
    assert (np.diff(curve.recall) >= 0).all()
    assert (curve.recall[0], curve.recall[-1]) == (0, 1)


@given(case=_cases(), data=st.data())
def test_the_best_bias_is_the_best_of_all_tried_in_turn(case: Case, data: st.DataObject) -> None:
    reached = sweep(case.logits, case.labels, important=case.important).accuracy.tolist()
    floor = data.draw(st.one_of(FLOOR, st.sampled_from(reached)), label="floor")
    best = tune_bias(case.logits, case.labels, important=case.important, floor=floor)
    assert best == _naive_best(case, floor)
    predictions = biased(case.logits, important=case.important, bias=best.bias)
    assert _naive_shares(case, predictions.tolist()) == (best.accuracy, best.recall)
    assert all(type(value) is float for value in best)


@given(case=_cases(), bias=st.one_of(st.integers(-7, 7).map(float), st.floats(-10, 10)))
def test_predictions_are_the_argmax_ties_included(case: Case, bias: float) -> None:
    predictions = biased(case.logits, important=case.important, bias=bias)
    assert predictions.tolist() == _naive_predictions(case, bias)
    assert predictions.dtype == np.int64
    unmoved = biased(case.logits, important=case.important, bias=0.0)
    assert (unmoved == case.logits.argmax(axis=1)).all()


@given(case=_cases(value=ANY, max_size=6))
def test_figures_hold_in_exact_arithmetic_whatever_the_logits(case: Case) -> None:
    curve = sweep(case.logits, case.labels, important=case.important)
    for bias, accuracy, recall in zip(*map(np.ndarray.tolist, curve), strict=True):
        predictions = _naive_predictions(case, bias)
        assert _naive_shares(case, predictions) == (accuracy, recall)
        assert biased(case.logits, important=case.important, bias=bias).tolist() == predictions


def test_the_ends_clear_the_last_sample_at_any_magnitude() -> None:
    logits = np.array([[0.0, 2.0**70], [2.0**70, 0.0]])
    curve = sweep(logits, np.array([0, 1]), important=0)
    assert curve.recall.tolist() == [0.0, 0.0, 1.0]
    assert (_plain_argmax(logits.astype(np.float32), 0, float(curve.bias[-1])) == 0).all()


def test_a_stretch_without_a_float_in_it_is_left_out() -> None:
    logits = np.array([[0.0, 1.0], [0.0, np.nextafter(1.0, 2.0)], [0.0, 3.0]])
    curve = sweep(logits, np.array([0, 0, 1]), important=0)
    assert curve.bias.tolist() == [0.0, 2.0, 4.0]
    assert curve.recall.tolist() == [0.0, 1.0, 1.0]


@given(case=_cases(), floors=st.tuples(FLOOR, FLOOR))
def test_a_lower_floor_never_costs_recall(case: Case, floors: tuple[float, float]) -> None:
    low, high = (tune_bias(case.logits, case.labels, important=case.important, floor=f) for f in sorted(floors))
    assert low.recall >= high.recall


@given(case=_cases(), floor=FLOOR, shift=st.integers(-9, 9))
def test_a_constant_per_sample_and_float32_change_nothing(case: Case, floor: float, shift: int) -> None:
    best = tune_bias(case.logits, case.labels, important=case.important, floor=floor)
    moved = case.logits + shift * np.arange(len(case.labels))[:, None]
    before = moved.copy()
    assert tune_bias(moved, case.labels, important=case.important, floor=floor) == best
    assert (moved == before).all(), "the caller's logits are left alone"
    single = case.logits.astype(np.float32)
    assert tune_bias(single, case.labels, important=case.important, floor=floor) == best


def _plain_argmax(logits: Logits, important: int, bias: float) -> NDArray[np.int64]:
    """What a model that adds the bias in its own precision would answer."""
    moved = logits.copy()
    moved[:, important] += logits.dtype.type(bias)
    predictions: NDArray[np.int64] = moved.argmax(axis=1)
    return predictions


def test_as_many_samples_as_gtsrb_has() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 43, 50_000)
    logits = rng.normal(size=(50_000, 43)).astype(np.float32)
    logits[np.arange(50_000), labels] += 3
    curve = sweep(logits, labels, important=14)
    for k in [0, len(curve.bias) - 1, *rng.integers(0, len(curve.bias), 20)]:
        predictions = _plain_argmax(logits.astype(np.float64), 14, float(curve.bias[k]))
        assert curve.accuracy[k] == (predictions == labels).mean()
        assert curve.recall[k] == (predictions[labels == 14] == 14).mean()
    plain = (logits.argmax(axis=1) == labels).mean()
    best = tune_bias(logits, labels, important=14, floor=plain - 0.01)
    assert best.accuracy >= plain - 0.01
    assert best.recall == curve.recall[curve.accuracy >= plain - 0.01].max()
    assert best.recall > (logits[labels == 14].argmax(axis=1) == 14).mean()
    single = _plain_argmax(logits, 14, best.bias)
    assert (single == biased(logits, important=14, bias=best.bias)).all(), "the bias also works added in float32"
    assert (curve.bias.astype(np.float32) == curve.bias).mean() > 0.99, "all but the narrowest stretches hold a float32"


def test_the_smallest_bias_wins_among_equals_and_a_surplus_of_the_class_gives_a_negative_one() -> None:
    labels = np.array([0, 0, 1])
    vain = np.array([[0.0, 2.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 4.0]])  # the third is wrong at any bias
    assert tune_bias(vain, labels, important=0, floor=0.5) == Bias(3.0, 2 / 3, 1.0)
    good = np.array([[2.0, 0.0], [5.0, 0.0], [0.0, 4.0]])
    assert tune_bias(good, labels, important=0, floor=1.0) == Bias(0.0, 1.0, 1.0)
    eager = np.array([[2.0, 0.0], [5.0, 0.0], [1.0, 0.0]])
    assert tune_bias(eager, labels, important=0, floor=1.0) == Bias(-1.5, 1.0, 1.0)


LABELS = np.array([0, 1])
ZEROS = np.zeros((2, 3))


@pytest.mark.parametrize(
    ("logits", "labels", "important", "floor", "message"),
    [
        (ZEROS, LABELS, 2, 0.5, "class 2 has no sample among 2"),
        (np.zeros((0, 3)), np.zeros(0, np.int64), 0, 0.5, "class 0 has no sample among 0"),
        (ZEROS, LABELS, 3, 0.5, "class 3 is not among the classes 0 to 2"),
        (ZEROS, LABELS, -1, 0.5, "class -1 is not among"),
        (ZEROS + np.nan, LABELS, 0, 0.5, "logits hold nan"),
        (ZEROS + np.inf, LABELS, 0, 0.5, "logits hold nan, inf"),
        (ZEROS + 1e301, LABELS, 0, 0.5, "1e300"),
        (ZEROS[:, :1], LABELS, 0, 0.5, r"shape \(2, 1\); they must be \(samples, classes\)"),
        (ZEROS[0], LABELS, 0, 0.5, r"shape \(3,\)"),
        (ZEROS, np.array([0, 1, 2]), 0, 0.5, r"labels are int64 \(3,\)"),
        (ZEROS, np.array([0.0, 1.0]), 0, 0.5, "labels are float64"),
        (ZEROS, np.array([0, 3]), 0, 0.5, "labels span 0 to 3; they must lie in 0 to 2"),
        (ZEROS, np.array([0, -1]), 0, 0.5, "labels span -1 to 0"),
        (ZEROS, LABELS, 0, math.nan, "floor is nan"),
    ],
)
def test_what_cannot_be_tuned_is_one_clear_line(
    logits: Logits, labels: NDArray[np.int64], important: int, floor: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        tune_bias(logits, labels, important=important, floor=floor)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bias", [math.nan, math.inf])
def test_a_bias_is_finite(bias: float) -> None:
    with pytest.raises(ValueError, match="must be finite"):
        biased(ZEROS, important=0, bias=bias)
