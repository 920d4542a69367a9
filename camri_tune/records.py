"""Trainings as plain records, and figures over seeds. No torch, no Optuna: arithmetic on them is easy to test."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from camri_tune.config import printable
from camri_tune.stats import Interval, seed_interval

TrialState = Literal["waiting", "running", "complete", "pruned", "failed"]
ACCURACY = "accuracy"  # the constraint that every study has
# A trial's curves, as Optuna stores them with it: {"epoch": accuracy} and {"epoch": recall of each class}.
ACCURACY_CURVE, RECALL_CURVE = "accuracy_curve", "recall_curve"
# Of a trial that had no hope after its first fold. For Optuna it is complete, since its Gaussian process learns from no
# other, and would go on proposing the like.
STOPPED = "stopped_after_first_fold"
MOST_OF_A_CELL = 4_096  # characters
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

    So do the `shortfalls` of the study's other constraints, by name (see constraints.py).

    `confusion` (C, C) is of validation, rows true; `curve` has what validation said after some of the epochs. `right`,
    packed (see metrics.py), says which validation images the model gets right: of those that test may judge.
    """

    number: int
    state: TrialState
    params: dict[str, Any]  # numbers, and words of the recipe
    seed: int | None = None
    accuracy: float | None = None
    recall_per_class: tuple[float, ...] = ()
    recall: float | None = None
    constraint: float | None = None
    shortfalls: Mapping[str, float] = field(default_factory=dict)
    checkpoint: str | None = None
    sha256: str | None = None
    failure: str | None = None
    seconds: float | None = None
    epoch: int = 0
    source_trial: int | None = None
    fold: int = 0
    device: str | None = None
    confusion: tuple[tuple[int, ...], ...] = ()
    right: str | None = None
    curve: tuple["EpochScores", ...] = ()

    @property
    def ended(self) -> bool:
        """Whether nothing more will come of it."""
        return self.state not in ("waiting", "running")

    @property
    def feasible(self) -> bool:
        """Complete, with every constraint recorded and met: what Optuna's `best_trial` does not insist on."""
        values = (self.constraint, *self.shortfalls.values())
        return self.state == "complete" and all(value is not None and value <= 0 for value in values)

    def bound_by(self, names: Sequence[str]) -> "TrialRecord":
        """The same training in a study with these constraints beside accuracy's: one that it lacks is not met."""
        return replace(self, shortfalls={name: self.shortfalls.get(name, math.inf) for name in names})

    def for_classes(self, important: Sequence[int]) -> "TrialRecord":
        """The same training with `recall` of these classes (the lowest), where both are known."""
        if self.recall is None or not self.recall_per_class or not important:
            return self
        recall = min(self.recall_per_class[c] for c in important)
        return self if recall == self.recall else replace(self, recall=recall)


@dataclass(frozen=True)
class Figure:
    """A measured share over seeds: mean, standard deviation, n, the values, and a 95 % t interval over seeds.

    No interval with one seed, nor where all seeds agree.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """To 12 digits: how a sum rounds, which goes by the order of the seeds, must not tell two equal means apart."""
        return round(self._mean, 12)

    @property
    def sd(self) -> float | None:
        if len(self.values) < 2:
            return None
        return math.sqrt(sum((v - self._mean) ** 2 for v in self.values) / (len(self.values) - 1))

    @property
    def _mean(self) -> float:
        return sum(self.values) / len(self.values)

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
    def recall_by_fold(self) -> tuple[tuple[float, ...], ...]:
        """Mean validation recall of each class (C,) of the models that were scored on each fold."""
        by_fold: dict[int, list[tuple[float, ...]]] = {}
        for record in (*self.records, *self.others):
            by_fold.setdefault(record.fold, []).append(record.recall_per_class)
        return tuple(
            tuple(Figure(column).mean for column in zip(*by_fold[fold], strict=True)) for fold in sorted(by_fold)
        )

    @property
    def accuracy_sd(self) -> float | None:
        """How much seeds alone move validation accuracy on a fold; None where no fold has two seeds."""
        return sd_on_folds(self._accuracy.values, [r.fold for r in self.records])

    @property
    def _accuracy(self) -> Figure:
        return Figure(tuple(_known(r.accuracy) for r in self.records))

    @property
    def recall_per_class(self) -> tuple[float, ...]:
        """Mean validation recall of each class."""
        return tuple(Figure(column).mean for column in zip(*(r.recall_per_class for r in self.records), strict=True))

    def measured(self, important: Sequence[int]) -> Measured:
        return measured_on_validation(self.records, important)

    def scored(self, important: Sequence[int], floors: Sequence[float]) -> tuple[TrialRecord, ...]:
        """Its R models as a finalist's are: with their recall, and by how much they miss the floor of their fold.

        They are trained before it is known who is important. The rule that chooses one of a finalist's models chooses
        the one that it is compared with, too: that of the best seed of one side alone would flatter it.
        """
        return tuple(
            replace(
                record,
                recall=min(record.recall_per_class[c] for c in important),
                constraint=floors[record.fold] - _known(record.accuracy),
            )
            for record in self.records
        )


def sd_on_folds(values: Sequence[float], folds: Sequence[int]) -> float | None:
    """Standard deviation over the seeds that share a fold; None where none does.

    Folds are of other images, and values of two of them differ whatever the seeds do.
    """
    by_fold: dict[int, list[float]] = {}
    for fold, value in zip(folds, values, strict=True):
        by_fold.setdefault(fold, []).append(value)
    freedom = len(values) - len(by_fold)
    if not freedom:
        return None
    figures = [Figure(tuple(some)) for some in by_fold.values()]
    return math.sqrt(sum((v - figure.mean) ** 2 for figure in figures for v in figure.values) / freedom)


def named(c: int, classes: Sequence[str] | Mapping[int, str]) -> str:
    """'14 (Stop)'; '8' where that is its name."""
    return str(c) if classes[c] == str(c) else f"{c} ({classes[c]})"


def recall_of(important: Sequence[int]) -> str:
    """Whose recall is told in one figure: with several important classes it is each model's lowest of theirs."""
    return "recall of the important class" if len(important) == 1 else "lowest recall of the important classes"


def figure_head(name: str, part: str, images: Mapping[str, int], important: Sequence[int], folds: int) -> str:
    """What a row's figures over seeds are, and of how many images: 'recall on test, n = 450'.

    `images` are those of `result.json`. On folds each seed's model has a validation part of its own.
    """
    several = name == "recall" and len(important) > 1
    count = f"n = {images[f'{part}_important' if name == 'recall' else part]:,}{' in all' if several else ''}"
    if part == "validation" and folds > 1:
        count = "each seed's fold"
    return f"{recall_of(important) if several else name} on {part}, {count}"


def parameters(params: Mapping[str, Any]) -> str:
    """A trial's parameters in a line."""
    return ", ".join(f"{name} {value_text(value)}" for name, value in sorted(params.items()))


def value_text(value: float | str, digits: int = 3) -> str:
    """Of a parameter: a number in so many digits, or a word."""
    return value if isinstance(value, str) else f"{value:.{digits}g}"


def biases_of(params: Mapping[str, float]) -> dict[int, float]:
    """What calibration adds to the logit of each class, if anything."""
    return {int(name.removeprefix(BIAS)): value for name, value in params.items() if name.startswith(BIAS)}


def measured_on_validation(records: Sequence[TrialRecord], important: Sequence[int]) -> Measured:
    """Figures over the seeds of `records`, all complete."""
    return Measured.over_seeds([_known(r.accuracy) for r in records], [r.recall_per_class for r in records], important)


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


def csv_cell(text: str, guard: str = "'") -> str:
    """Text as a cell may hold it: with `guard` before it where a spreadsheet would take it for a formula."""
    text = printable(text, MOST_OF_A_CELL)
    return f"{guard}{text}" if text.startswith(("=", "+", "-", "@")) else text
