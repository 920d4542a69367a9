"""Accuracy and recall from predictions. Pure NumPy."""

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]


def confusion_matrix(labels: IntArray, predictions: IntArray, num_classes: int) -> IntArray:
    """Counts (C, C): row = true class, column = predicted class."""
    flat = np.bincount(labels * num_classes + predictions, minlength=num_classes**2)
    return flat.reshape(num_classes, num_classes).astype(np.int64)


def accuracy(confusion: IntArray) -> float:
    """Share of all examples that were predicted right."""
    return float(np.trace(confusion) / confusion.sum())


def recall_per_class(confusion: IntArray) -> NDArray[np.float64]:
    """Share (C,) of each class's examples that were predicted right; NaN for a class without examples."""
    totals = confusion.sum(axis=1)
    shares = np.full(len(totals), np.nan)
    np.divide(np.diag(confusion), totals, out=shares, where=totals > 0)
    return shares


def important_recall(confusion: IntArray, important: list[int]) -> float:
    """The lowest recall among the important classes: with several, the worst one counts."""
    return float(recall_per_class(confusion)[important].min())
