"""What the recall of single classes must keep beside accuracy: floors, and how far any may fall below the baseline's.

Pure arithmetic. On validation a constraint is met by what is observed; on test it is shown, or it is not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from camri_tune.differences import PairedDifference, Share
from camri_tune.records import TrialRecord, named, sd_on_folds

Kind = Literal["floor", "max_drop"]
# On test: a bound shows it; it is observed, not shown; it is not observed, as chance may have it; a bound shows that it
# is not kept; there are no images to tell.
Status = Literal["shown", "held", "missed", "broken", "unseen"]
_WORST_FIRST: tuple[Status, ...] = ("broken", "missed", "unseen", "held", "shown")
ROUNDING = 1e-9  # a mean of equal shares can round past them: one image in a billion must not decide


@dataclass(frozen=True)
class RecallConstraint:
    """Recalls to be kept: that of one class at a floor, or that of every class near the baseline's (`max_drop`).

    `name` is what Optuna calls it. `asked` is the floor, a share, or the drop in points. `least` and `images` (K, F)
    are, for each of the K `classes` and each fold, the validation recall to be kept and the images it is measured on.
    All classes of a drop are one constraint, of which the worst decides: the sampler models each constraint by itself,
    and of 43 that hardly differ it would take the product of 43 chances.
    """

    name: str
    kind: Kind
    asked: float
    classes: tuple[int, ...]
    least: tuple[tuple[float, ...], ...]
    images: tuple[tuple[int, ...], ...]

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "RecallConstraint":
        """As `as_json` wrote it."""
        rows = {key: tuple(map(tuple, stored[key])) for key in ("least", "images")}
        return cls(**{**stored, "classes": tuple(stored["classes"]), **rows})

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def limit(self) -> float:
        """The least recall, or the least difference to the baseline's, as a fraction."""
        return self.asked if self.kind == "floor" else -self.asked / 100

    def misses(self, recalls: Sequence[float], folds: Sequence[int]) -> dict[int, float]:
        """By how much each class's recall, pooled over `folds`, is below what must be kept; at most 0 where it is kept.

        `recalls` (C,) are of all classes. Each fold weighs as much as it has images of the class.
        """
        found = {}
        for c, least, images in zip(self.classes, self.least, self.images, strict=True):
            count = sum(images[fold] for fold in folds)
            found[c] = sum(images[fold] * least[fold] for fold in folds) / count - recalls[c]
        return found

    def misses_over_seeds(self, records: Sequence[TrialRecord]) -> dict[int, float]:
        """The means of `misses` over models, each on its own fold.

        The worst class is looked for among the means: the mean of each model's worst would be that of the unluckiest.
        """
        each = [self.misses(record.recall_per_class, [record.fold]) for record in records]
        return {c: sum(one[c] for one in each) / len(each) for c in self.classes}

    def scatter(self, records: Sequence[TrialRecord]) -> float | None:
        """How much seeds alone move the worst class's miss on a fold; None where no fold has two models.

        Where each has one, the misses of a drop are all the same: the baseline's recall is that model's.
        """
        worst = [max(self.misses(record.recall_per_class, [record.fold]).values()) for record in records]
        return sd_on_folds(worst, [record.fold for record in records])

    def in_words(self, classes: Sequence[str]) -> str:
        """What is asked, as a noun."""
        if self.kind == "floor":
            return f"recall of class {named(self.classes[0], classes)} at least {self.asked:g}"
        return f"recall of no class more than {self.asked:g} points below the baseline's"

    def missed_in_words(self, c: int, miss: float, classes: Sequence[str]) -> str:
        """What a recall on validation was that is off by `miss`, and what it should be."""
        if self.kind == "floor":
            return f"recall of class {named(c, classes)} was {self.asked - miss:.4f}, and its floor is {self.asked:g}"
        return (
            f"recall of class {named(c, classes)} was {self.asked + 100 * miss:.2f} points below the baseline's, and "
            f"{self.asked:g} are allowed"
        )


def recall_constraints(
    floors: Mapping[int, float],
    max_drop: float | None,
    baseline: Sequence[Sequence[float]],
    images: Sequence[Sequence[int]],
) -> tuple[RecallConstraint, ...]:
    """The constraints of a study: a floor (a share) for some classes, the largest drop in points for all, or both.

    `baseline` (F, C) is its mean validation recall of each class on each fold, `images` (F, C) how many there are.
    """
    folds, classes = len(images), range(len(images[0]))
    of_class = [tuple(fold[c] for fold in images) for c in classes]
    found = [
        RecallConstraint(f"floor_{c}", "floor", share, (c,), ((share - ROUNDING,) * folds,), (of_class[c],))
        for c, share in sorted(floors.items())
    ]
    if max_drop is not None:
        least = tuple(tuple(fold[c] - max_drop / 100 - ROUNDING for fold in baseline) for c in classes)
        found.append(RecallConstraint("max_drop", "max_drop", max_drop, tuple(classes), least, tuple(of_class)))
    return tuple(found)


def shortfalls(
    constraints: Sequence[RecallConstraint], recalls: Sequence[float], folds: Sequence[int]
) -> dict[str, float]:
    """Each constraint's value as Optuna takes it, by name: that of its worst class, at most 0 where it is met."""
    return {constraint.name: max(constraint.misses(recalls, folds).values()) for constraint in constraints}


def why_infeasible(record: TrialRecord, constraints: Sequence[RecallConstraint], classes: Sequence[str]) -> list[str]:
    """What a complete trial of the search does not meet, each in a few words; empty where it meets everything."""
    found = []
    if record.constraint is None or record.constraint > 0:
        by = "" if record.constraint is None else f" {100 * record.constraint:.2f} points"
        found.append(f"accuracy is{by} below its floor")
    for constraint in constraints:
        if record.shortfalls.get(constraint.name, 1.0) <= 0:
            continue
        misses = constraint.misses(record.recall_per_class, range(len(constraint.images[0])))
        found += [constraint.missed_in_words(c, miss, classes) for c, miss in misses.items() if miss > 0]
    return found


@dataclass(frozen=True)
class ClassOnTest:
    """What test says of one class: the exported model's recall, or its difference to the baseline model's.

    `limit` is what it should not be below. Both ends of the measured interval are one-sided bounds.
    """

    c: int
    limit: float
    measured: Share | PairedDifference

    @property
    def value(self) -> float:
        return self.measured.value if isinstance(self.measured, Share) else self.measured.estimate

    @property
    def status(self) -> Status:
        low, high = self.measured.interval
        if low >= self.limit:
            return "shown"
        if high < self.limit:
            return "broken"
        return "held" if self.value >= self.limit - ROUNDING else "missed"

    def as_json(self) -> dict[str, Any]:
        return {
            "of": "recall" if isinstance(self.measured, Share) else "difference to the baseline model",
            **self.measured.as_json(),
            "value": self.value,
            "confidence": self.measured.confidence,
            "status": self.status,
        }


@dataclass(frozen=True)
class OnTest:
    """What test says of a constraint: `classes` has those that it has images of."""

    constraint: RecallConstraint
    classes: tuple[ClassOnTest, ...]

    @property
    def status(self) -> Status:
        """Of all classes together the worst; shown only where every one of them is."""
        found = {one.status for one in self.classes}
        if len(self.classes) < len(self.constraint.classes):
            found.add("unseen")
        return next(status for status in _WORST_FIRST if status in found)

    @property
    def worst(self) -> ClassOnTest:
        """The class that is furthest below its limit, or least above it."""
        return min(self.classes, key=lambda one: (one.value - one.limit, one.measured.interval.low))

    def of_status(self, *statuses: Status) -> list[ClassOnTest]:
        return [one for one in self.classes if one.status in statuses]
