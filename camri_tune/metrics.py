"""Accuracy, recall and precision from predictions. Pure NumPy."""

import base64
from typing import Any, NamedTuple

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


class Precision(NamedTuple):
    """How many of the images that a model takes for a class are of it: `right` of its `answers`.

    Unlike recall it is also a matter of how frequent the class is among the images.
    """

    right: int
    answers: int

    @classmethod
    def of(cls, confusion: IntArray, c: int) -> "Precision":
        """Of class `c` by counts (C, C)."""
        return cls(int(confusion[c, c]), int(confusion[:, c].sum()))

    def __str__(self) -> str:
        share = f" ({self.right / self.answers:.4f})" if self.answers else ""
        return f"{self.right:,} of {self.answers:,}{share}"

    def as_json(self) -> dict[str, Any]:
        """`value` is None where the model answers with the class to no image."""
        return {"value": self.right / self.answers if self.answers else None, **self._asdict()}


def pack(truths: NDArray[np.bool_]) -> str:
    """Truth values (N,) as text, six of them in a character."""
    return base64.b64encode(np.packbits(truths).tobytes()).decode()


def unpack(text: str, count: int) -> NDArray[np.bool_]:
    """The `count` truth values that `pack` made text of. ValueError where the text holds another number of them."""
    packed = np.frombuffer(base64.b64decode(text, validate=True), np.uint8)
    if len(packed) != -(-count // 8):
        raise ValueError(f"{8 * len(packed)} truth values or a few less; {count} were expected")
    return np.unpackbits(packed, count=count).astype(bool)


def important_recall(confusion: IntArray, important: list[int]) -> float:
    """The lowest recall among the important classes: with several, the worst one counts."""
    return float(recall_per_class(confusion)[important].min())
