"""Plain records that the rooms hand to each other. No torch, no Optuna: arithmetic on them is easy to test."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

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
    seed_interval,
    tango_interval,
)

TrialState = Literal["waiting", "running", "complete", "pruned", "failed"]
Verdict = Literal["certified", "feasible", "none"]
CONFIDENCE = 0.95  # one-sided, of what a study claims
# A trial's curves, as Optuna stores them with it: {"epoch": accuracy} and {"epoch": recall of each class}.
ACCURACY_CURVE, RECALL_CURVE = "accuracy_curve", "recall_curve"
BIAS = "bias_"  # and the class: the parameter that calibration adds to a trained model's


@dataclass(frozen=True)
class EpochScores:
    """What validation said of a model after an epoch, counted from 1."""

    epoch: int
    accuracy: float
    recall_per_class: tuple[float, ...]


@dataclass(frozen=True)
class TrialRecord:
    """One training as it stands in the storage. `constraint` <= 0 means that the accuracy floor was met.

    `confusion` (C, C) is of validation, rows true; `curve` has what validation said after some of the epochs.
    """

    number: int
    state: TrialState
    params: dict[str, float]
    seed: int | None = None
    accuracy: float | None = None
    recall_per_class: tuple[float, ...] = ()
    recall: float | None = None
    constraint: float | None = None
    checkpoint: str | None = None
    sha256: str | None = None
    failure: str | None = None
    seconds: float | None = None
    epoch: int = 0
    source_trial: int | None = None
    fold: int = 0
    device: str | None = None
    confusion: tuple[tuple[int, ...], ...] = ()
    curve: tuple["EpochScores", ...] = ()

    @property
    def feasible(self) -> bool:
        """Complete, with the constraint recorded and met: what Optuna's `best_trial` does not insist on."""
        return self.state == "complete" and self.constraint is not None and self.constraint <= 0

    def for_classes(self, important: Sequence[int]) -> "TrialRecord":
        """The same training with `recall` of these classes (the lowest), where both are known."""
        if self.recall is None or not self.recall_per_class or not important:
            return self
        return replace(self, recall=min(self.recall_per_class[c] for c in important))


@dataclass(frozen=True)
class Figure:
    """A measured share over seeds: mean, standard deviation, n, the values, and a 95 % t interval over seeds.

    No interval with one seed, nor where all seeds agree.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)

    @property
    def sd(self) -> float | None:
        if len(self.values) < 2:
            return None
        return math.sqrt(sum((v - self.mean) ** 2 for v in self.values) / (len(self.values) - 1))

    @property
    def interval(self) -> Interval | None:
        return seed_interval(self.values)

    def as_json(self) -> dict[str, Any]:
        return {
            "mean": self.mean,
            "sd": self.sd,
            "n": len(self.values),
            "values": list(self.values),
            "interval": list(self.interval) if self.interval else None,
        }


@dataclass(frozen=True)
class Measured:
    """Figures of R models on one part of the data. `recall` is of the important class (the lowest, with several)."""

    accuracy: Figure
    recall: Figure
    recall_per_class: tuple[Figure, ...]

    @classmethod
    def over_seeds(
        cls, accuracies: Sequence[float], recalls: Sequence[Sequence[float]], important: Sequence[int]
    ) -> "Measured":
        """From each seed's accuracy and recalls per class."""
        return cls(
            accuracy=Figure(tuple(accuracies)),
            recall=Figure(tuple(min(row[c] for c in important) for row in recalls)),
            recall_per_class=tuple(Figure(column) for column in zip(*(tuple(row) for row in recalls), strict=True)),
        )

    def of_seed(self, place: int) -> dict[str, Any]:
        """The figures of one of the R models."""
        return {
            "accuracy": self.accuracy.values[place],
            "recall": self.recall.values[place],
            "recall_per_class": [figure.values[place] for figure in self.recall_per_class],
        }

    def as_json(self) -> dict[str, Any]:
        return {
            "accuracy": self.accuracy.as_json(),
            "recall": self.recall.as_json(),
            "recall_per_class": [figure.as_json() for figure in self.recall_per_class],
        }


@dataclass(frozen=True)
class Baseline:
    """The cross-entropy baseline on validation: its tuned learning rate and its R models, one per seed.

    `others` are models on folds that the R did not reach: they set those folds' floors and are compared with nothing.
    """

    learning_rate: float
    records: tuple[TrialRecord, ...]
    others: tuple[TrialRecord, ...] = ()

    @property
    def accuracy(self) -> float:
        """Mean validation accuracy."""
        return self._accuracy.mean

    @property
    def accuracy_by_fold(self) -> tuple[float, ...]:
        """Mean validation accuracy of the models that were scored on each fold: the floors, before tolerance."""
        by_fold: dict[int, list[float]] = {}
        for record in (*self.records, *self.others):
            by_fold.setdefault(record.fold, []).append(_known(record.accuracy))
        return tuple(Figure(tuple(by_fold[fold])).mean for fold in sorted(by_fold))

    @property
    def accuracy_sd(self) -> float | None:
        """How much seeds alone move validation accuracy; None with one seed."""
        return self._accuracy.sd

    @property
    def _accuracy(self) -> Figure:
        return Figure(tuple(_known(r.accuracy) for r in self.records))

    @property
    def recall_per_class(self) -> tuple[float, ...]:
        """Mean validation recall of each class."""
        return tuple(
            sum(column) / len(column) for column in zip(*(r.recall_per_class for r in self.records), strict=True)
        )

    def measured(self, important: Sequence[int]) -> Measured:
        return measured_on_validation(self.records, important)


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
    """Right answers of one model on n images, with a 95 % binomial interval, exact where every image counts alone.

    `effective_n` is how many independent images they count as (see `stats.effective_size`, and `stats.hidden_size`
    where they come in `hidden` groups).
    """

    right: int
    n: int
    effective_n: float
    hidden: Hidden | None = None

    @classmethod
    def of(cls, right: NDArray[np.bool_], groups: NDArray[np.int64], hidden: Hidden | None = None) -> "Share":
        """From whether each image (N,) was right, and which images (N,) belong together."""
        size = _effective(right.astype(np.float64), groups, 0.975, hidden)
        return cls(int(right.sum()), len(right), size, hidden)

    @property
    def value(self) -> float:
        return self.right / self.n

    @property
    def interval(self) -> Interval:
        return binomial_interval(self.value * self.effective_n, self.effective_n)

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
        interval = crossed_interval(differences, groups, hidden=hidden)
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


@dataclass(frozen=True)
class Side:
    """One of the two things compared: R models on validation and on test."""

    validation: Measured
    test: Measured

    def as_json(self) -> dict[str, Any]:
        return {"validation": self.validation.as_json(), "test": self.test.as_json()}


@dataclass(frozen=True)
class Best:
    """The chosen setting (its trial, its parameters, its R models) and the one model of them that is exported.

    `exported_recall` is of that one model on test. `accuracy_difference` and `recall_difference` compare it with the
    baseline model of `baseline_seed`, which the same rule chose on validation, on the same test images; those
    `_over_seeds` compare all R models of both, seed by seed. What is said of recall is said of each important class by
    itself: pooled, one could hide what another loses.
    """

    trial: int
    params: dict[str, float]
    side: Side
    exported_seed: int
    exported_accuracy: Share
    exported_recall: dict[int, Share]
    baseline_seed: int
    accuracy_difference: PairedDifference
    recall_difference: dict[int, PairedDifference]
    recall_over_seeds: dict[int, SeedDifference]
    accuracy_over_seeds: SeedDifference

    def as_json(self) -> dict[str, Any]:
        return {
            "trial": self.trial,
            "params": self.params,
            **self.side.as_json(),
            "exported": {
                "seed": self.exported_seed,
                "compared_with_seed": self.baseline_seed,
                "test": {
                    "accuracy": self.exported_accuracy.as_json(),
                    "recall": {str(c): share.as_json() for c, share in self.exported_recall.items()},
                },
            },
            "recall_difference": {str(c): found.as_json() for c, found in self.recall_difference.items()},
            "over_seeds": {
                "recall_difference": {str(c): found.as_json() for c, found in self.recall_over_seeds.items()},
                "accuracy_difference": self.accuracy_over_seeds.as_json(),
            },
        }


@dataclass(frozen=True)
class Finalist:
    """A setting that was retrained on fresh seeds, as validation ranked it, and what test said of it, if it was asked.

    `recall_bound` is the lower bound of its mean recall on validation; None where a training failed.
    """

    trial: int
    params: dict[str, float]
    validation: Measured | None
    recall_bound: float | None
    kept_accuracy: bool
    judged: PairedDifference | None

    def as_json(self) -> dict[str, Any]:
        return {
            "trial": self.trial,
            "params": self.params,
            "validation": self.validation.as_json() if self.validation else None,
            "recall_lower_bound": self.recall_bound,
            "kept_accuracy": self.kept_accuracy,
            "accuracy_difference": self.judged.as_json() if self.judged else None,
        }


@dataclass(frozen=True)
class Result:
    """What a study found, as `result.json` holds it. `best` is None exactly when the verdict is `none`.

    `provenance` says which data chose and which judged (see claims.py).
    """

    study: str
    dataset: str
    classes: tuple[str, ...]
    important: tuple[int, ...]
    loss: str
    tolerance: float
    epsilon: float
    seeds: int
    verdict: Verdict
    sentence: str
    notices: tuple[str, ...]
    images: dict[str, int]
    folds: int
    baseline: Side
    baseline_learning_rate: float
    best: Best | None
    finalists: tuple[Finalist, ...]
    test_reads: int
    trials: dict[str, int]
    wall_seconds: float
    versions: dict[str, str]
    folder: str
    provenance: tuple[str, ...] = ()

    @property
    def candidates(self) -> int:
        """How many finalists kept accuracy on validation: so many could have been judged on test."""
        return sum(f.kept_accuracy for f in self.finalists)

    @property
    def important_names(self) -> str:
        return ", ".join(named(c, self.classes) for c in self.important)

    def as_json(self) -> dict[str, Any]:
        best = self.best
        return {
            "schema": 1,
            "study": self.study,
            "dataset": self.dataset,
            "classes": list(self.classes),
            "important": list(self.important),
            "loss": self.loss,
            "tolerance": self.tolerance,
            "seeds": self.seeds,
            "verdict": self.verdict,
            "sentence": self.sentence,
            "notices": list(self.notices),
            "provenance": list(self.provenance),
            "images": self.images,
            "folds": self.folds,
            "test_reads": self.test_reads,
            "baseline": {"params": {"learning_rate": self.baseline_learning_rate}, **self.baseline.as_json()},
            "best": best.as_json() if best else None,
            "accuracy_difference": {
                **best.accuracy_difference.as_json(), "epsilon": self.epsilon / 100, "study_confidence": CONFIDENCE
            } if best else None,
            "finalists": [finalist.as_json() for finalist in self.finalists],
            "trials": self.trials,
            "wall_seconds": self.wall_seconds,
            "versions": self.versions,
        }  # fmt: skip


def named(c: int, classes: Sequence[str] | Mapping[int, str]) -> str:
    """'14 (Stop)'; '8' where that is its name."""
    return str(c) if classes[c] == str(c) else f"{c} ({classes[c]})"


def biases_of(params: Mapping[str, float]) -> dict[int, float]:
    """What calibration adds to the logit of each class, if anything."""
    return {int(name.removeprefix(BIAS)): value for name, value in params.items() if name.startswith(BIAS)}


def measured_on_validation(records: Sequence[TrialRecord], important: Sequence[int]) -> Measured:
    """Figures over the seeds of `records`, all complete."""
    return Measured.over_seeds([_known(r.accuracy) for r in records], [r.recall_per_class for r in records], important)


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


def _known(value: float | None) -> float:
    assert value is not None, "a complete trial has its accuracy"
    return value


def without_nan(value: Any) -> Any:
    """JSON has no NaN: a class without test images has no recall, which is null."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
