"""Intervals for what is claimed. Pure NumPy and SciPy on counts and plain values."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from scipy import stats


class Interval(NamedTuple):
    """Lower and upper end, both inside."""

    low: float
    high: float


def seed_interval(values: Sequence[float], confidence: float = 0.95) -> Interval | None:
    """`mean_interval` of a share, cut to [0, 1]."""
    interval = mean_interval(values, confidence)
    return None if interval is None else Interval(max(0.0, interval.low), min(1.0, interval.high))


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval | None:
    """Student's t interval for the mean over seeds; None with fewer than two seeds.

    It speaks of seeds alone: with the same images, another seed gives a mean like this.
    """
    n = len(values)
    if n < 2:
        return None
    mean = sum(values) / n
    sd = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * sd / math.sqrt(n)
    return Interval(mean - half, mean + half)


def binomial_interval(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Exact (Clopper-Pearson) interval of a share, for one model on n independent images."""
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"{successes} successes of {n} is not a share; both must be counts with successes <= n")
    tail = (1 - confidence) / 2
    low = 0.0 if successes == 0 else float(stats.beta.ppf(tail, successes, n - successes + 1))
    high = 1.0 if successes == n else float(stats.beta.ppf(1 - tail, successes + 1, n - successes))
    return Interval(low, high)


def tango_interval(gained: int, lost: int, n: int, confidence: float = 0.95) -> Interval:
    """Tango's score interval (1998) for the difference of two paired shares, (gained - lost) / n.

    `gained` images are right under the new model alone, `lost` under the old one alone, of `n`. The lower end at
    confidence 1 - 2a is the one-sided lower bound at 1 - a.
    """
    if min(gained, lost) < 0 or gained + lost > n or n < 1:
        raise ValueError(f"gained {gained}, lost {lost} of {n}: discordant counts must be >= 0 and at most n together")
    z = float(stats.norm.ppf((1 + confidence) / 2))
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
