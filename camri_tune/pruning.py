"""Stop a trial early only where it is about to miss the accuracy floor; never for its recall.

Optuna's pruners compare values and ignore constraints: an infeasible trial of high recall would raise the bar for
feasible ones. Here the bar is what feasible trials had at the same epoch, so a trial that one of them once looked like
is never stopped.
"""

from collections.abc import Mapping, Sequence

import optuna
from optuna.study import Study
from optuna.trial import FrozenTrial
from optuna.trial import TrialState as OptunaState

from camri_tune.records import ACCURACY_CURVE


class AccuracyFloorPruner(optuna.pruners.BasePruner):
    """Prunes a trial whose accuracy at an epoch is below that of every feasible trial at that epoch, less `slack`.

    It waits for `min_feasible` finished feasible trials and for the first `patience` share of the epochs.
    """

    def __init__(self, *, epochs: int, min_feasible: int = 4, patience: float = 0.5, slack: float = 0.005) -> None:
        self._epochs = epochs
        self._min_feasible = min_feasible
        self._patience = patience
        self._slack = slack

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        curve = trial.user_attrs.get(ACCURACY_CURVE, {})
        if not curve:
            return False
        epoch = max(curve, key=int)
        if int(epoch) < self._patience * self._epochs:
            return False
        others = study.get_trials(deepcopy=False, states=(OptunaState.COMPLETE,))
        curves = [t.user_attrs.get(ACCURACY_CURVE, {}) for t in others if is_feasible(t)]
        return below_all(curve[epoch], epoch, curves, min_curves=self._min_feasible, slack=self._slack)


def below_all(
    accuracy: float, epoch: str, curves: Sequence[Mapping[str, float]], *, min_curves: int, slack: float
) -> bool:
    """Whether `accuracy` is more than `slack` below every curve's accuracy at `epoch`, of at least `min_curves`."""
    rivals = [curve[epoch] for curve in curves if epoch in curve]
    return len(rivals) >= min_curves and accuracy < min(rivals) - slack


def is_feasible(trial: FrozenTrial) -> bool:
    """Constraint recorded and met; Optuna itself takes a missing constraint for a met one."""
    return bool(trial.constraints) and all(value <= 0 for value in trial.constraints.values())
