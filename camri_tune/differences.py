"""What test says of two models on the same images: shares and differences with their intervals."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from camri_tune.stats import (
    Hidden,
    Interval,
    binomial_interval,
    crossed_interval,
    design_effect,
    effective_size,
    hidden_size,
    tango_interval,
)

CONFIDENCE = 0.95  # one-sided, of what a study claims


@dataclass(frozen=True)
class Known:
    """What the groups of another part show, for images whose own groups of about `size` nobody names.

    `values` (N,) are of the same models on images whose `groups` (N,) are known: validation's, say.
    """

    size: int
    values: NDArray[np.float64]
    groups: NDArray[np.int64]

    @classmethod
    def over_seeds(
        cls, size: int, new: NDArray[np.bool_], old: NDArray[np.bool_], groups: NDArray[np.int64]
    ) -> "Known":
        """Of the mean over seeds, from whether each one's models (R, N) were right on images of known groups (N,)."""
        return cls(size, _less(new, old).mean(axis=0), groups)

    @cached_property
    def hidden(self) -> Hidden:
        return Hidden(self.size, design_effect(self.values, self.groups, self.size))


@dataclass(frozen=True)
class Share:
    """Right answers of one model on n images, with a binomial interval, exact where every image counts alone.

    `effective_n` is how many independent images they count as (see `stats.effective_size`, and `stats.hidden_size`
    where they come in `hidden` groups), and `all_right_n` how many they would, were all of them right (None: as many):
    no one group is worse than another then.
    """

    right: int
    n: int
    effective_n: float
    hidden: Hidden | None = None
    confidence: float = 0.975  # one-sided, of each end of the interval
    all_right_n: float | None = None

    @classmethod
    def of(
        cls,
        right: NDArray[np.bool_],
        groups: NDArray[np.int64],
        hidden: Hidden | None = None,
        confidence: float = 0.975,
    ) -> "Share":
        """From whether each image (N,) was right, and which images (N,) belong together."""
        size, best = (
            _effective(values.astype(np.float64), groups, confidence, hidden) for values in (right, np.ones_like(right))
        )
        return cls(int(right.sum()), len(right), size, hidden, confidence, best)

    @property
    def value(self) -> float:
        return self.right / self.n

    @property
    def interval(self) -> Interval:
        return binomial_interval(self.value * self.effective_n, self.effective_n, 2 * self.confidence - 1)

    @property
    def most_shown(self) -> float:
        """The lower end of the interval, were all images right."""
        n = self.effective_n if self.all_right_n is None else self.all_right_n
        return binomial_interval(n, n, 2 * self.confidence - 1).low

    @property
    def exact(self) -> bool:
        """Whether every image counts alone, as an exact interval takes for granted."""
        return self.effective_n >= self.n

    def as_json(self) -> dict[str, Any]:
        return {
            "right": self.right,
            "n": self.n,
            "effective_n": self.effective_n,
            "hidden_groups": _hidden_json(self.hidden),
            "value": self.value,
            "interval": list(self.interval),
            "exact": self.exact,
        }


class GroupCounts(NamedTuple):
    """Discordant and all images of a group, and how many groups show the same."""

    gained: int
    lost: int
    n: int
    groups: int


@dataclass(frozen=True)
class PairedDifference:
    """New model minus old on the same images: `gained` are right in the new alone, `lost` in the old alone, of `n`.

    `lower_bound` is Tango's, at `confidence` one-sided, where the images count as `effective_n` independent ones. That
    follows from `by_group`, the counts of each group, empty where every image counts alone; where the groups are
    `hidden` it follows from their effect, and `by_group` has the counts of validation that this was measured on.
    """

    gained: int
    lost: int
    n: int
    effective_n: float
    confidence: float
    by_group: tuple[GroupCounts, ...] = ()
    hidden: Hidden | None = None

    @classmethod
    def of(
        cls,
        new: NDArray[np.bool_],
        old: NDArray[np.bool_],
        groups: NDArray[np.int64] | None = None,
        confidence: float = CONFIDENCE,
        known: Known | None = None,
    ) -> "PairedDifference":
        """From whether each image (N,) was right under the new and the old model, and which (N,) belong together.

        `known` is of their differences on validation, where nobody names the groups of these images.
        """
        difference = _less(new, old)
        alone = np.arange(len(new))
        hidden = None if known is None else known.hidden
        size = _effective(difference, alone if groups is None else groups, confidence, hidden)
        if known is not None:
            counts = _by_group(known.values, known.groups)
        else:
            counts = () if groups is None else _by_group(difference, groups)
        return cls(int((difference > 0).sum()), int((difference < 0).sum()), len(new), size, confidence, counts, hidden)

    @property
    def estimate(self) -> float:
        return (self.gained - self.lost) / self.n

    @property
    def interval_confidence(self) -> float:
        return 2 * self.confidence - 1

    @cached_property
    def interval(self) -> Interval:
        """Two-sided at 1 - 2 (1 - confidence), so that its lower end is the one-sided bound."""
        share = self.effective_n / self.n
        return tango_interval(self.gained * share, self.lost * share, self.effective_n, self.interval_confidence)

    @property
    def lower_bound(self) -> float:
        return self.interval.low

    def as_json(self) -> dict[str, Any]:
        return {
            "gained": self.gained,
            "lost": self.lost,
            "n": self.n,
            "effective_n": self.effective_n,
            "by_group": [counts._asdict() for counts in self.by_group],
            "by_group_of": ("validation" if self.hidden else "test") if self.by_group else None,
            "hidden_groups": _hidden_json(self.hidden),
            "confidence": self.confidence,
            "interval": list(self.interval),
            "interval_confidence": self.interval_confidence,
            "estimate": self.estimate,
            "lower_bound": self.lower_bound,
        }


@dataclass(frozen=True)
class SeedDifference:
    """One setting's R models less another's, seed by seed, in shares: what another seed and other images would give.

    `values` are the seeds' differences. `interval` is a 95 % one for their mean, over seeds and images; None with one
    seed or one image (group), or without any spread to judge by.
    """

    values: tuple[float, ...]
    interval: Interval | None

    @classmethod
    def of(
        cls,
        new: NDArray[np.bool_],
        old: NDArray[np.bool_],
        groups: NDArray[np.int64] | None = None,
        hidden: Hidden | None = None,
    ) -> "SeedDifference":
        """From whether each seed's models (R, N) were right on each image, and which images (N,) belong together."""
        differences = _less(new, old)
        found = crossed_interval(differences, groups, hidden=hidden)
        interval = None if found is None else Interval(max(-1.0, found.low), min(1.0, found.high))  # as shares are
        return cls(tuple(differences.mean(axis=1).tolist()), interval)

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)

    @property
    def holds_up(self) -> bool:
        """Whether the interval lies above zero."""
        return self.interval is not None and self.interval.low > 0

    def in_points(self) -> tuple[str, str]:
        """The mean, and the interval in brackets (empty with one seed), both in points."""
        span = f"[{100 * self.interval.low:+.2f}, {100 * self.interval.high:+.2f}]" if self.interval else ""
        return f"{100 * self.mean:+.2f}", span

    def as_json(self) -> dict[str, Any]:
        return {"mean": self.mean, "values": list(self.values), "interval": list(self.interval or ()) or None}


def tracks(measured: Share | PairedDifference) -> str:
    """Of how many unnamed groups the images are, in words; empty where groups have names."""
    if measured.hidden is None:
        return ""
    return f" of about {measured.n / measured.hidden.size:,.0f} unnamed tracks"


def grouped(measured: Share | PairedDifference, images: str = " images") -> str:
    """What the images count as, where it is less than their number."""
    if measured.effective_n >= measured.n:
        return ""
    where = tracks(measured) or " in groups"
    return f"{images}{where}, which count as {measured.effective_n:,.0f}"


def points(fraction: float, sign: bool = True) -> str:
    """A fraction in percentage points."""
    return f"{100 * fraction:{'+' if sign else ''}.2f} points"


def _less(new: NDArray[np.bool_], old: NDArray[np.bool_]) -> NDArray[np.float64]:
    if new.shape != old.shape:
        raise ValueError(f"answers of shapes {new.shape} and {old.shape} are not to the same images")
    return new.astype(np.float64) - old


def _effective(
    values: NDArray[np.float64], groups: NDArray[np.int64], confidence: float, hidden: Hidden | None
) -> float:
    if hidden is not None:
        return hidden_size(len(values), hidden, confidence)
    return effective_size(values, groups, confidence)


def _by_group(differences: NDArray[np.float64], groups: NDArray[np.int64]) -> tuple[GroupCounts, ...]:
    """The counts of each group; none where every image is a group of its own."""
    members = np.unique(groups, return_inverse=True)[1]
    columns = [np.bincount(members, weights=part).astype(int) for part in (differences > 0, differences < 0)]
    rows = np.stack([*columns, np.bincount(members)], axis=1)
    if len(rows) == len(differences):
        return ()
    different, counts = np.unique(rows, axis=0, return_counts=True)
    return tuple(
        GroupCounts._make([*row, count]) for row, count in zip(different.tolist(), counts.tolist(), strict=True)
    )


def _hidden_json(hidden: Hidden | None) -> dict[str, Any] | None:
    return None if hidden is None else {"size": hidden.size, "design_effect": hidden.effect}
