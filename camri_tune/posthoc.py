"""Threshold tuning: a bias on the important class's logit of a trained model, chosen on held-out logits. Pure NumPy.

The prediction is argmax_j z_j + b [j = i]: post-hoc logit adjustment (Menon et al., ICLR 2021) of one class i. A sample
goes to i iff b > t = max_{j != i} z_j - z_i, so accuracy and recall are cumulative sums over the sorted t. Tune on
validation logits: training logits are too sure of themselves, and test chooses nothing.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Bias(NamedTuple):
    """A bias in logits, and the accuracy and recall it has on the logits that it was tuned on."""

    bias: float
    accuracy: float
    recall: float


class Curve(NamedTuple):
    """Accuracy and recall (K,) on each stretch of biases that decide alike, and a `bias` (K,) inside each, rising."""

    bias: NDArray[np.float64]
    accuracy: NDArray[np.float64]
    recall: NDArray[np.float64]


def tune_bias(logits: NDArray[np.floating[Any]], labels: NDArray[np.int64], *, important: int, floor: float) -> Bias:
    """The bias of highest recall of `important` whose accuracy is at least `floor` (a share), of those `sweep` offers.

    Logits (N, C), labels (N,). A bias below 0 only where none above reaches the floor: it would cost recall on other
    images for nothing that shows here. Of equal recall the highest accuracy, of those the smallest magnitude. Where no
    bias reaches the floor, the one of highest accuracy, then recall, then smallest magnitude: look at `accuracy`.
    ValueError as in `sweep`, and for a floor that is nan.
    """
    if math.isnan(floor):
        raise ValueError("the accuracy floor is nan; it must be a number")
    curve = sweep(logits, labels, important=important)
    allowed, first, second = np.flatnonzero(curve.accuracy >= floor), curve.recall, curve.accuracy
    if (curve.bias[allowed] >= 0).any():
        allowed = allowed[curve.bias[allowed] >= 0]
    if not allowed.size:
        allowed, first, second = np.arange(len(curve.bias)), curve.accuracy, curve.recall
    best = allowed[np.lexsort((-np.abs(curve.bias[allowed]), second[allowed], first[allowed]))[-1]]
    return Bias(float(curve.bias[best]), float(curve.accuracy[best]), float(curve.recall[best]))


def sweep(logits: NDArray[np.floating[Any]], labels: NDArray[np.int64], *, important: int) -> Curve:
    """The exact curve over every bias, in O(N (C + log N)): one entry below, between and above the K - 1 distinct t.

    Logits (N, C), labels (N,). A stretch's bias is 0 if 0 lies inside it, else its midpoint (1 past the last t at an
    end), rounded to a float32 if that fits. It is never a t, so no sample sits on a tie; b = 0 is not offered where a
    sample's t is 0. A stretch between neighbouring float64 is left out. ValueError: shapes or labels that do not fit,
    an important class out of range or without samples, logits that are not finite.
    """
    rivals, thresholds = _rivals(logits, important)
    num_classes = logits.shape[1]
    if labels.shape != rivals.shape or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"labels are {labels.dtype} {labels.shape}; they must be integers, one a row of {logits.shape}"
        )
    if labels.size and not 0 <= labels.min() <= labels.max() < num_classes:
        raise ValueError(f"labels span {labels.min()} to {labels.max()}; they must lie in 0 to {num_classes - 1}")
    own, kept = labels == important, labels == rivals  # right once given to the important class; right until then
    if not own.any():
        raise ValueError(f"class {important} has no sample among {len(labels)}, so no recall; tune on data that has it")
    cuts, place = np.unique(thresholds, return_inverse=True)
    found, lost = (np.append(0, np.bincount(place[of], minlength=len(cuts)).cumsum()) for of in (own, kept))
    low, high = np.append(-np.inf, cuts), np.append(cuts, np.inf)
    bias = _between(low, high)
    real = (low < bias) & (bias < high)
    accuracy, recall = (kept.sum() - lost + found) / len(labels), found / own.sum()
    return Curve(bias[real], accuracy[real], recall[real])


def biased(logits: NDArray[np.floating[Any]], *, important: int, bias: float) -> NDArray[np.int64]:
    """Predictions (N,) of logits (N, C) with `bias` added to the logit of `important`; a tie goes to the lower index.

    This is np.argmax of the biased logits, without the rounding of the sum: `bias` is compared with t. ValueError as in
    `sweep`, and for a bias that is not finite.
    """
    if not math.isfinite(bias):
        raise ValueError(f"the bias is {bias}; it must be finite")
    rivals, thresholds = _rivals(logits, important)
    return np.where((bias > thresholds) | ((bias == thresholds) & (important < rivals)), important, rivals)


def _rivals(logits: NDArray[np.floating[Any]], important: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The best other class (N,), and the bias t (N,) above which `important` beats it."""
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(f"logits have shape {logits.shape}; they must be (samples, classes) with two classes or more")
    if not 0 <= important < logits.shape[1]:
        raise ValueError(f"important class {important} is not among the classes 0 to {logits.shape[1] - 1}")
    others = np.array(logits, dtype=np.float64)
    if not (np.abs(others) < 1e300).all():  # False for nan, too; beyond it, differences overflow
        raise ValueError("logits hold nan, inf or 1e300 and more; they must be finite, so look at what made them")
    others[:, important] = -np.inf
    rivals = others.argmax(axis=1)
    return rivals, others[np.arange(len(others)), rivals] - logits[:, important].astype(np.float64)


def _between(low: NDArray[np.float64], high: NDArray[np.float64]) -> NDArray[np.float64]:
    """A bias strictly inside each stretch; one of its ends if it holds no float64."""
    middle = np.empty_like(low)
    middle[1:-1] = (low[1:-1] + high[1:-1]) / 2
    middle[0] = high[0] - max(1.0, 1e-6 * abs(high[0]))
    middle[-1] = low[-1] + max(1.0, 1e-6 * abs(low[-1]))
    with np.errstate(over="ignore", under="ignore"):
        single = middle.astype(np.float32).astype(np.float64)
    middle = np.where((low < single) & (single < high), single, middle)
    return np.where((low < 0) & (high > 0), 0.0, middle)
