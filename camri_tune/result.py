"""What a study found, as `result.json` holds it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from camri_tune.calibration import Calibration
from camri_tune.constraints import OnTest, RecallConstraint
from camri_tune.differences import CONFIDENCE, PairedDifference, SeedDifference, Share
from camri_tune.metrics import Precision
from camri_tune.records import Measured, named

Verdict = Literal["certified", "feasible", "none"]


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

    `exported_recall` is of that one model on test; `precision` of it and, first, of the baseline model that it is
    compared with, by important class. `accuracy_difference` and `recall_difference` compare it with the
    baseline model of `baseline_seed`, which the same rule chose on validation, on the same test images; those
    `_over_seeds` compare all R models of both, seed by seed. What is said of recall is said of each important class by
    itself: pooled, one could hide what another loses. `calibration` is of the exported model's probabilities on test; a
    setting that is not exported has none. `constraints` has what test says of each constraint of
    recall.
    """

    trial: int
    params: dict[str, Any]
    side: Side
    exported_seed: int
    exported_accuracy: Share
    exported_recall: dict[int, Share]
    precision: dict[int, tuple[Precision, Precision]]
    baseline_seed: int
    accuracy_difference: PairedDifference
    recall_difference: dict[int, PairedDifference]
    recall_over_seeds: dict[int, SeedDifference]
    accuracy_over_seeds: SeedDifference
    calibration: Calibration | None = None
    constraints: tuple[OnTest, ...] = ()

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
                    "precision": {str(c): new.as_json() for c, (_, new) in self.precision.items()},
                },
                "compared_with_test": {"precision": {str(c): old.as_json() for c, (old, _) in self.precision.items()}},
                "calibration": self.calibration.as_json() if self.calibration else None,
            },
            "recall_difference": {str(c): found.as_json() for c, found in self.recall_difference.items()},
            "over_seeds": {
                "recall_difference": {str(c): found.as_json() for c, found in self.recall_over_seeds.items()},
                "accuracy_difference": self.accuracy_over_seeds.as_json(),
            },
        }


@dataclass(frozen=True)
class Threshold:
    """The baseline's own R models with a bias on the important class's logit: what recall costs without any training.

    Each bias is tuned on validation to keep its model's accuracy there, less the tolerance. The differences are the
    chosen setting's models less these on test, seed by seed: what tuning adds to a bias; None where nothing is chosen.
    """

    biases: tuple[float, ...]
    side: Side
    recall_difference: SeedDifference | None
    accuracy_difference: SeedDifference | None

    def as_json(self) -> dict[str, Any]:
        recall, accuracy = self.recall_difference, self.accuracy_difference
        return {
            "biases": list(self.biases),
            **self.side.as_json(),
            "best_less_this": {"recall": recall.as_json(), "accuracy": accuracy.as_json()}
            if recall is not None and accuracy is not None
            else None,
        }


@dataclass(frozen=True)
class Finalist:
    """A setting that was retrained on fresh seeds, as validation ranked it, and what test said of it, if it was asked.

    `recall_bound` is the lower bound of its mean recall on validation; None where a training failed, and where seeds
    show no variance. `misses` says of each constraint of recall, by name, by how much each class missed it: in the
    means over seeds, at most 0 where it is kept. Where all means keep it and no one model keeps everything, it is
    `split`, and cannot be exported.
    """

    trial: int
    params: dict[str, Any]
    validation: Measured | None
    recall_bound: float | None
    kept_accuracy: bool
    judged: PairedDifference | None
    misses: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    split: bool = False

    @property
    def kept_recall(self) -> bool:
        """Whether its means keep every constraint of recall."""
        return all(miss <= 0 for of_class in self.misses.values() for miss in of_class.values())

    @property
    def is_candidate(self) -> bool:
        """Whether test may judge it."""
        return self.kept_accuracy and self.kept_recall and not self.split

    def as_json(self) -> dict[str, Any]:
        return {
            "trial": self.trial,
            "params": self.params,
            "validation": self.validation.as_json() if self.validation else None,
            "recall_lower_bound": self.recall_bound,
            "kept_accuracy": self.kept_accuracy,
            "kept_recall": self.kept_recall,
            "is_candidate": self.is_candidate,
            "accuracy_difference": self.judged.as_json() if self.judged else None,
        }


@dataclass(frozen=True)
class Result:
    """What a study found, as `result.json` holds it. `best` is None exactly when the verdict is `none`.

    `provenance` says which data chose and which judged (see claims.py). `threshold` is None with several important
    classes, whose biases would be at odds. `rate_was_tuned`: validation chose the baseline's learning rate. `sharing`:
    how many settings share the doubt, the `candidates` or those of an earlier look at test, if these were more.
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
    validation_per_class: tuple[int, ...]
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
    constraints: tuple[RecallConstraint, ...] = ()
    threshold: Threshold | None = None
    rate_was_tuned: bool = True
    sharing: int = 0

    @property
    def candidates(self) -> int:
        """How many finalists kept accuracy, and what else was asked, on validation: so many test could have judged."""
        return sum(f.is_candidate for f in self.finalists)

    @property
    def important_names(self) -> str:
        return ", ".join(named(c, self.classes) for c in self.important)

    def _constraint_json(self, constraint: RecallConstraint) -> dict[str, Any]:
        """A constraint, the figures of its classes on both sides, and what test shows of the exported model."""
        best, floor = self.best, constraint.kind == "floor"
        judged = next((found for found in best.constraints if found.constraint == constraint), None) if best else None
        on_test = {one.c: one.as_json() for one in judged.classes} if judged else {}
        misses = next((f.misses for f in self.finalists if best is not None and f.trial == best.trial), {})

        def figures(side: Side, c: int) -> dict[str, Any]:
            both = {"validation": side.validation, "test": side.test}
            return {part: measured.recall_per_class[c].as_json() for part, measured in both.items()}

        return {
            "name": constraint.name,
            "kind": constraint.kind,
            "class": constraint.classes[0] if floor else None,
            "floor": constraint.asked if floor else None,
            "points": None if floor else constraint.asked,
            "in_words": constraint.in_words(self.classes),
            "met_on_validation": max(misses[constraint.name].values()) <= 0 if constraint.name in misses else None,
            "status": judged.status if judged else None,
            "classes": [
                {
                    "class": c,
                    "validation_images": self.validation_per_class[c],
                    "baseline": figures(self.baseline, c),
                    "best": figures(best.side, c) if best else None,
                    "test": on_test.get(c),
                }
                for c in constraint.classes
            ],
        }

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
            "test_candidates": self.sharing,
            "baseline": {"params": {"learning_rate": self.baseline_learning_rate}, **self.baseline.as_json()},
            "best": best.as_json() if best else None,
            "threshold": self.threshold.as_json() if self.threshold else None,
            "accuracy_difference": {
                **best.accuracy_difference.as_json(), "epsilon": self.epsilon / 100, "study_confidence": CONFIDENCE
            } if best else None,
            "constraints": [self._constraint_json(constraint) for constraint in self.constraints],
            "finalists": [finalist.as_json() for finalist in self.finalists],
            "trials": self.trials,
            "wall_seconds": self.wall_seconds,
            "versions": self.versions,
        }  # fmt: skip
