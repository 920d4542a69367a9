"""CAMRI in an Optuna study of one's own: what to search, the objective with its constraint, the best feasible trial."""

import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial
from optuna.trial import TrialState as OptunaState

from camri_tune.config import Loss, StudyConfig
from camri_tune.constraints import ROUNDING
from camri_tune.errors import InputError
from camri_tune.metrics import IntArray, accuracy, confusion_matrix, important_recall, recall_per_class
from camri_tune.records import without_nan
from camri_tune.search import make_sampler, starting_points, suggest_params

Measure = Callable[[Trial, Mapping[str, float]], tuple[ArrayLike, ArrayLike]]


class ConstrainedObjective:
    """An Optuna objective: recall of the important class, under the constraint that accuracy keeps a floor.

    `measure(trial, params)` is your own training. `params` holds `learning_rate` and what the loss takes (CAMRI:
    `scale`, and `margin` in radians; with several important classes `margin_14` and so on); more can be asked of
    `trial`. It returns the classes of the validation images and the predicted ones, integers (N,) each, as lists,
    arrays or tensors on the CPU. The scale is one for embeddings that learn: where yours do not, ask `trial` for
    another, from 4 to 64, say. `floor` is the accuracy to be kept, a share: your cross-entropy model's on the same
    images, best as a mean over seeds. `learning_rate` is that model's; a quarter to four times of it is searched.

    The value to maximise is the lowest recall of the important classes. A trial that misses the floor is infeasible for
    Optuna's samplers, and `best_trial` passes over it. The best of many noisy trials is partly luck: train its setting
    again on fresh seeds, and judge it on images that chose nothing, as `camri_tune.run` does. Raises InputError where
    an argument, or what `measure` returns, does not fit.

    >>> import optuna
    >>> from camri_tune import ConstrainedObjective
    >>> optuna.logging.set_verbosity(optuna.logging.ERROR)
    >>> def measure(trial, params):  # a training whose recall rises with the margin, and whose accuracy falls
    ...     labels = [0] * 50 + [1] * 50
    ...     caught, kept = round(50 * (0.6 + 0.5 * params["margin"])), round(50 * (1 - 0.4 * params["margin"]))
    ...     return labels, [0] * kept + [1] * (50 - kept) + [1] * caught + [0] * (50 - caught)
    >>> objective = ConstrainedObjective(measure, important=1, floor=0.8, num_classes=2, learning_rate=1e-3)
    >>> study = optuna.create_study(direction="maximize", sampler=objective.sampler(seed=0))
    >>> objective.enqueue(study)
    >>> study.optimize(objective, n_trials=8)
    >>> best = objective.best_trial(study)
    >>> best.user_attrs["accuracy"] >= 0.8
    True
    """

    def __init__(
        self,
        measure: Measure,
        *,
        important: ArrayLike,
        floor: float,
        num_classes: int,
        learning_rate: float,
        loss: Loss = "camri",
    ) -> None:
        try:
            self.important = tuple(dict.fromkeys(map(operator.index, np.atleast_1d(important).tolist())))
        except TypeError:
            raise InputError(f"important is {important!r}, but must be a class's index, or several") from None
        self.floor = floor
        self._measure = measure
        self._config = StudyConfig.build({"loss": loss})
        self._num_classes = num_classes
        self._learning_rate = learning_rate
        if not self.important or not all(0 <= c < num_classes for c in self.important):
            raise InputError(f"important is {important!r}, but must name classes from 0 to {num_classes - 1}")
        if not 0.0 <= floor <= 1.0:
            raise InputError(f"floor is {floor!r}, but must be a share of right answers, from 0 to 1")
        if not 0.0 < learning_rate < float("inf"):
            raise InputError(f"learning_rate is {learning_rate!r}, but must be a positive number")

    def __call__(self, trial: Trial) -> float:
        """Train, and tell Optuna the constraint. Returns the recall; the rest is kept as user attributes."""
        params = suggest_params(trial, self._config, self.important, self._num_classes, self._learning_rate)
        confusion = self._confusion(*self._measure(trial, params))
        trial.set_user_attr("accuracy", accuracy(confusion))
        trial.set_user_attr("recall_per_class", without_nan(recall_per_class(confusion).tolist()))
        trial.set_constraint("accuracy", self.floor - ROUNDING - accuracy(confusion))
        return important_recall(confusion, list(self.important))

    def enqueue(self, study: Study) -> None:
        """Have the study try first what is likely to be good: `camri_tune.search.starting_points`.

        A study that goes on has tried them.
        """
        for point in starting_points(self._config, self.important, self._num_classes, self._learning_rate):
            study.enqueue_trial(point, skip_if_exists=True)

    def sampler(self, seed: int) -> BaseSampler:
        """The sampler of `camri_tune.run`, which models the constraint; see `benchmarks/search.py`."""
        return make_sampler(self._config, seed)

    def best_trial(self, study: Study) -> FrozenTrial | None:
        """The trial of highest recall among those that kept the floor, then of highest accuracy; None without one."""
        complete = study.get_trials(deepcopy=False, states=(OptunaState.COMPLETE,))
        # Optuna takes a constraint that is missing for one that is met; a study may have trials of other objectives.
        ours = [t for t in complete if "accuracy" in t.constraints and "accuracy" in t.user_attrs]
        kept = [t for t in ours if all(value <= 0 for value in t.constraints.values())]
        kept = [t for t in kept if t.user_attrs["accuracy"] >= self.floor - ROUNDING]  # it may have been raised since
        return max(kept, key=lambda t: (t.value or 0.0, t.user_attrs["accuracy"], -t.number), default=None)

    def _confusion(self, labels: ArrayLike, predictions: ArrayLike) -> IntArray:
        true, predicted = self._classes("labels", labels), self._classes("predictions", predictions)
        if len(true) != len(predicted):
            raise InputError(f"measure returned {len(true):,} labels, but {len(predicted):,} predictions; give as many")
        confusion = confusion_matrix(true, predicted, self._num_classes)
        for c in self.important:
            if not confusion[c].any():
                raise InputError(f"no label is the important class {c}, so it has no recall; validate on images of it")
        return confusion

    def _classes(self, name: str, values: Any) -> IntArray:
        found = np.asarray(values)
        if found.ndim != 1 or not np.issubdtype(found.dtype, np.integer):
            raise InputError(
                f"measure returned {name} of shape {found.shape} and type {found.dtype}; they must be integers (N,)"
            )
        if found.size and not 0 <= found.min() <= found.max() < self._num_classes:
            raise InputError(
                f"measure returned {name} from {found.min()} to {found.max()}; classes are 0 to {self._num_classes - 1}"
            )
        return found.astype(np.int64)
