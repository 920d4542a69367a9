"""Stop a trial early only where it cannot reach the accuracy floor any more; never for its recall.

Optuna's pruners compare values and ignore constraints: an infeasible trial of high recall would raise the bar for
feasible ones. Here the floor is the bar, and what finished trials still gained tells who can reach it.
`benchmarks/search.py` has what that saves, and what it costs.
"""

import math
from collections.abc import Mapping, Sequence

import optuna
from optuna.study import Study
from optuna.trial import FrozenTrial
from optuna.trial import TrialState as OptunaState

from camri_tune.records import ACCURACY_CURVE

MIN_FINISHED = 5  # trials to learn gains from
DOUBT = 3.0  # standard errors of the difference of two accuracies
Curve = Mapping[str, float]  # accuracy by epoch


class AccuracyFloorPruner(optuna.pruners.BasePruner):
    """Prunes a trial that would miss `floor` even with the largest gain that a finished trial made from there on.

    `images` are what an accuracy was measured on, `epochs` those of a whole training.
    """

    def __init__(self, *, floor: float, images: int, epochs: int) -> None:
        self._floor = floor
        self._images = images
        self._epochs = epochs

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        curve = trial.user_attrs.get(ACCURACY_CURVE, {})
        others = study.get_trials(deepcopy=False, states=(OptunaState.COMPLETE,))
        curves = [other.user_attrs.get(ACCURACY_CURVE, {}) for other in others]
        return is_hopeless(curve, curves, floor=self._floor, images=self._images, epochs=self._epochs)


def is_hopeless(curve: Curve, finished: Sequence[Curve], *, floor: float, images: int, epochs: int) -> bool:
    """Whether a training that has come to the end of `curve` cannot reach the floor, as far as others can tell.

    Both accuracies and gains are of `images` images, so that three standard errors of them are given in. Of fewer than
    five finished trainings, as long as this one, nothing is concluded.
    """
    if not curve:
        return False
    epoch, last = max(curve, key=int), str(epochs)
    as_long = [other for other in finished if epoch in other and max(other, key=int) == last]
    gains = [other[last] - other[epoch] for other in as_long]
    doubt = DOUBT * math.sqrt(2 * floor * (1 - floor) / images) if 0 < floor < 1 else 0.0
    return len(gains) >= MIN_FINISHED and curve[epoch] + max(gains) + doubt < floor
