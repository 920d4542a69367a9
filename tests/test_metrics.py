"""Accuracy and recall against naive loops."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from camri_tune.metrics import (
    IntArray,
    Precision,
    accuracy,
    confusion_matrix,
    important_recall,
    pack,
    recall_per_class,
    unpack,
)


@st.composite
def _answers(draw: st.DrawFn) -> tuple[int, list[tuple[int, int]]]:
    """A number of classes, and pairs of label and prediction; classes may be absent from either."""
    classes = draw(st.integers(1, 8))
    number = st.integers(0, classes - 1)
    return classes, draw(st.lists(st.tuples(number, number), min_size=1, max_size=60))


def _arrays(pairs: list[tuple[int, int]]) -> tuple[IntArray, IntArray]:
    table = np.array(pairs, dtype=np.int64)
    return table[:, 0], table[:, 1]


@given(drawn=_answers())
def test_the_confusion_matrix_counts_label_by_prediction(drawn: tuple[int, list[tuple[int, int]]]) -> None:
    classes, pairs = drawn
    naive = [[0] * classes for _ in range(classes)]
    for label, prediction in pairs:
        naive[label][prediction] += 1
    confusion = confusion_matrix(*_arrays(pairs), classes)
    assert confusion.tolist() == naive
    assert confusion.dtype == np.int64


@given(drawn=_answers())
def test_accuracy_and_recall_are_shares_of_right_answers(drawn: tuple[int, list[tuple[int, int]]]) -> None:
    classes, pairs = drawn
    confusion = confusion_matrix(*_arrays(pairs), classes)
    assert accuracy(confusion) == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))
    recalls = recall_per_class(confusion).tolist()
    assert len(recalls) == classes
    for c, recall in enumerate(recalls):
        answers = [b for a, b in pairs if a == c]
        if answers:
            assert recall == pytest.approx(answers.count(c) / len(answers))
        else:
            assert math.isnan(recall), "a class without examples has no recall, not a bad one"


@given(drawn=_answers())
def test_precision_is_a_share_of_the_answers(drawn: tuple[int, list[tuple[int, int]]]) -> None:
    classes, pairs = drawn
    confusion = confusion_matrix(*_arrays(pairs), classes)
    for c in range(classes):
        labels = [a for a, b in pairs if b == c]
        precision = Precision.of(confusion, c)
        assert precision == (labels.count(c), len(labels))
        value = precision.as_json()["value"]
        assert value == (pytest.approx(labels.count(c) / len(labels)) if labels else None)
        assert str(precision).startswith(f"{labels.count(c)} of {len(labels)}")


@given(drawn=_answers(), data=st.data())
def test_of_several_important_classes_the_worst_counts(
    drawn: tuple[int, list[tuple[int, int]]], data: st.DataObject
) -> None:
    classes, pairs = drawn
    confusion = confusion_matrix(*_arrays(pairs), classes)
    present = sorted({label for label, _ in pairs})
    important = data.draw(st.lists(st.sampled_from(present), min_size=1, unique=True))
    recalls = recall_per_class(confusion)
    assert important_recall(confusion, important) == min(recalls[c] for c in important)


@pytest.mark.parametrize("important", [[2], [0, 2], [2, 0]])
def test_an_important_class_without_examples_is_not_passed_over(important: list[int]) -> None:
    confusion = confusion_matrix(np.array([0, 0, 1]), np.array([0, 1, 1]), 3)
    assert math.isnan(important_recall(confusion, important))


def test_a_small_example_by_hand() -> None:
    """Row: true class; column: answer. Seven of ten right."""
    confusion = confusion_matrix(np.array([0, 0, 0, 0, 1, 1, 1, 2, 2, 2]), np.array([0, 0, 0, 1, 1, 1, 2, 2, 2, 0]), 3)
    assert confusion.tolist() == [[3, 1, 0], [0, 2, 1], [1, 0, 2]]
    assert accuracy(confusion) == 0.7
    assert recall_per_class(confusion).tolist() == [0.75, pytest.approx(2 / 3), pytest.approx(2 / 3)]
    assert important_recall(confusion, [0]) == 0.75
    assert important_recall(confusion, [0, 1]) == pytest.approx(2 / 3)


@given(st.lists(st.booleans(), max_size=70))
def test_packed_truth_values_come_back(values: list[bool]) -> None:
    text = pack(np.array(values, dtype=bool))
    assert text.isascii()
    assert len(text) <= 4 * -(-len(values) // 24)
    assert unpack(text, len(values)).tolist() == values
    with pytest.raises(ValueError, match="were expected"):
        unpack(text, len(values) + 8)
