"""What a study found, as `result.json` holds it."""

from dataclasses import dataclass
from typing import Any, Literal

from camri_tune.calibration import Calibration
from camri_tune.differences import CONFIDENCE, PairedDifference, SeedDifference, Share
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

    `exported_recall` is of that one model on test. `accuracy_difference` and `recall_difference` compare it with the
    baseline model of `baseline_seed`, which the same rule chose on validation, on the same test images; those
    `_over_seeds` compare all R models of both, seed by seed. What is said of recall is said of each important class by
    itself: pooled, one could hide what another loses. `calibration` is of the exported model's probabilities on test; a
    setting that is not exported has none.
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
    calibration: Calibration | None = None

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
                "calibration": self.calibration.as_json() if self.calibration else None,
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
