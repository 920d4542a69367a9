"""What tests of a comparison share: answers with given shares right, and the interval of a difference, naively."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from fractions import Fraction

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

MANY = 10_000  # images of which every share with four digits is a whole number


def hits_of(shares: Sequence[float], images: int = MANY) -> NDArray[np.bool_]:
    """Answers (R, `images`): each seed gets the first images right, as many as its share says."""
    hits = np.stack([np.arange(images) < round(share * images) for share in shares])
    assert hits.mean(axis=1) == pytest.approx(shares, abs=1e-12), f"no such shares of {images} images"
    return hits


def crossed(
    new: NDArray[np.bool_], old: NDArray[np.bool_], groups: Iterable[int] | None = None
) -> tuple[float, float] | None:
    """The 95 % interval over seeds and images of new (R, N) less old (R, N), in fractions up to the square root.

    None with one seed, one group or no spread.
    """
    differences = [[int(a) - int(b) for a, b in zip(*rows, strict=True)] for rows in zip(new, old, strict=True)]
    seeds, images = len(differences), len(differences[0])
    mean = Fraction(sum(map(sum, differences)), seeds * images)
    off_by_group: dict[int, Fraction] = defaultdict(Fraction)
    for group, column in zip(range(images) if groups is None else groups, zip(*differences, strict=True), strict=True):
        off_by_group[int(group)] += Fraction(sum(column), seeds) - mean
    count = len(off_by_group)
    if min(seeds, count) < 2:
        return None
    by_seed = sum((Fraction(sum(row), images) - mean) ** 2 for row in differences) / (seeds - 1) / seeds
    by_image = sum(off**2 for off in off_by_group.values()) * count / (count - 1) / images**2
    variance = float(by_seed + by_image)
    if variance == 0:
        return None
    freedom = variance**2 / float(by_seed**2 / (seeds - 1) + by_image**2 / (count - 1))
    half = float(stats.t.ppf(0.975, freedom)) * math.sqrt(variance)
    return float(mean) - half, float(mean) + half
