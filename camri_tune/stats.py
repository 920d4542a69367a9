"""Intervals for what is claimed. Pure NumPy and SciPy on counts and plain values."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import special  # not scipy.stats, whose import takes a worker a second


class Interval(NamedTuple):
    """Lower and upper end, both inside."""

    low: float
    high: float


class Hidden(NamedTuple):
    """Images that come in groups of about `size` which nobody names, and what that costs.

    `effect` is the design effect that known groups of their kind show: see `design_effect`.
    """

    size: int
    effect: float


def seed_interval(values: Sequence[float], confidence: float = 0.95) -> Interval | None:
    """`mean_interval` of a share, cut to [0, 1]."""
    interval = mean_interval(values, confidence)
    return None if interval is None else Interval(max(0.0, interval.low), min(1.0, interval.high))


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval | None:
    """Student's t interval for the mean over seeds; None with fewer than two, where all are equal, or one is no number.

    It speaks of seeds alone: with the same images, another seed gives a mean like this. Two or three seeds that happen
    to agree are no certainty that the next one will.
    """
    n = len(values)
    if n < 2 or min(values) == max(values) or math.isnan(sum(values)):
        return None
    mean = sum(values) / n
    sd = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    half = float(special.stdtrit(n - 1, (1 + confidence) / 2)) * sd / math.sqrt(n)
    return Interval(mean - half, mean + half)


def crossed_interval(
    differences: NDArray[np.float64],
    groups: NDArray[np.int64] | None = None,
    confidence: float = 0.95,
    hidden: Hidden | None = None,
) -> Interval | None:
    """Interval for a mean difference that speaks of other seeds and other images.

    None with fewer than two of either, and where nothing varies: that is no certainty.
    `differences` (R, N) is new less old for each seed and image; `groups` (N,) names the images that belong together.
    Where they are `hidden`, the variance over images is multiplied by their effect, and there are as many as they say.
    Student's t on the sum of both variances of the mean, that over seeds and that over images, with Satterthwaite's
    degrees of freedom. The noise that is neither's is counted in both: a little too wide rather than too narrow.
    """
    seeds, images = differences.shape
    members = np.arange(images) if groups is None else np.unique(groups, return_inverse=True)[1]
    count: float = int(members.max()) + 1 if images else 0
    if hidden is not None:
        count = images / hidden.size
    if min(seeds, count) < 2:
        return None
    mean = float(differences.mean())
    by_seed = float(differences.mean(axis=1).var(ddof=1)) / seeds
    by_image = _variance_over_groups(differences.mean(axis=0), members) * (hidden.effect if hidden else 1.0)
    variance = by_seed + by_image
    if variance < 1e-24:  # none but rounding's
        return None
    freedom = variance**2 / (by_seed**2 / (seeds - 1) + by_image**2 / (count - 1))
    half = float(special.stdtrit(freedom, (1 + confidence) / 2)) * math.sqrt(variance)
    return Interval(mean - half, mean + half)


def effective_size(values: NDArray[np.float64], groups: NDArray[np.int64], confidence: float = 0.95) -> float:
    """How many independent images say as much of a mean as these (N,), of which `groups` (N,) belong together.

    N less the design effect: the variance over whole groups as resampling them shows it, beside that of independent
    images; and less what Student's t of few groups asks for at a one-sided `confidence` (Korn and Graubard 1998). Where
    nothing varies, a group counts as one image. At most N; at least 1.
    """
    n = len(values)
    members = np.unique(groups, return_inverse=True)[1]
    count = int(members.max()) + 1
    if count == n:
        return float(n)
    if count == 1:
        return 1.0
    alone = float(values.var()) / n
    together = _variance_over_groups(values, members)
    size = n * min(1.0, alone / together) if alone > 0 and together > 0 else count
    return max(1.0, size * _few(count, confidence))


def design_effect(values: NDArray[np.float64], groups: NDArray[np.int64], most: float) -> float:
    """How many times the variance of a mean of these (N,) grows where whole `groups` (N,) are resampled, not images.

    At least 1 and at most `most`, which it is where nothing varies, there is one group, or each has one image: then
    nothing shows less.
    """
    members = np.unique(groups, return_inverse=True)[1]
    alone = float(values.var()) / len(values) if len(values) else 0.0
    if alone <= 0 or members.max() + 1 in (1, len(values)):
        return most
    return min(max(_variance_over_groups(values, members) / alone, 1.0), most)


def hidden_size(n: int, hidden: Hidden, confidence: float = 0.95) -> float:
    """`effective_size` of n images whose groups nobody names: n over their design effect, less what few groups cost."""
    count = n / hidden.size
    if count <= 1:
        return 1.0
    return max(1.0, n / hidden.effect * (_few(count, confidence) if hidden.size > 1 else 1.0))


def _few(count: float, confidence: float) -> float:
    """By how much fewer images count where a variance is known from so many groups only, in place of for certain."""
    return float(special.ndtri(confidence) / special.stdtrit(count - 1, confidence)) ** 2


def _variance_over_groups(values: NDArray[np.float64], members: NDArray[np.int64]) -> float:
    """Variance of the mean of `values` (N,) when whole groups are resampled: the linearised bootstrap over groups."""
    sums = np.bincount(members, weights=values - values.mean())
    return float((sums**2).sum()) * len(sums) / (len(sums) - 1) / len(values) ** 2


def binomial_interval(successes: float, n: float, confidence: float = 0.95) -> Interval:
    """Exact (Clopper-Pearson) interval of a share, for one model on n images that count as independent."""
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"{successes} successes of {n} is not a share; both must be counts with successes <= n")
    tail = (1 - confidence) / 2
    low = 0.0 if successes == 0 else float(special.betaincinv(successes, n - successes + 1, tail))
    high = 1.0 if successes == n else float(special.betaincinv(successes + 1, n - successes, 1 - tail))
    return Interval(low, high)


def tango_interval(gained: float, lost: float, n: float, confidence: float = 0.95) -> Interval:
    """Tango's score interval (1998) for the difference of two paired shares, (gained - lost) / n.

    `gained` images are right under the new model alone, `lost` under the old one alone, of `n`. The lower end at
    confidence 1 - 2a is the one-sided lower bound at 1 - a. Counts need not be whole: see `effective_size`.
    """
    if min(gained, lost) < 0 or gained + lost > n * (1 + 1e-9) or n < 1:
        raise ValueError(f"gained {gained}, lost {lost} of {n}: discordant counts must be >= 0 and at most n together")
    z = float(special.ndtri((1 + confidence) / 2))
    estimate = (gained - lost) / n

    def score(delta: float) -> float:
        # The restricted estimate of P(lost) given the difference delta (Tango 1998, eq. 3).
        a = 2 * n
        b = -gained - lost + (2 * n - gained + lost) * delta
        c = -lost * delta * (1 - delta)
        q = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
        variance = n * (2 * q + delta * (1 - delta))
        return (
            (gained - lost - n * delta) / math.sqrt(variance)
            if variance > 0
            else math.copysign(math.inf, estimate - delta)
        )

    low = _bisect(lambda d: score(d) - z, -1.0, estimate)
    high = _bisect(lambda d: score(d) + z, estimate, 1.0)
    return Interval(low, high)


def _bisect(falling: Callable[[float], float], left: float, right: float) -> float:
    """The zero of a falling function on [left, right], to 1e-9."""
    for _ in range(60):
        middle = (left + right) / 2
        if falling(middle) > 0:
            left = middle
        else:
            right = middle
    return (left + right) / 2
