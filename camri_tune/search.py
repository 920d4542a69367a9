"""What is searched, and by whom: spaces, starting points, the sampler."""

import copy
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import optuna
import torch
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial
from optuna.trial import TrialState as OptunaState

from camri_tune.bundle import ModelSpec
from camri_tune.config import RECIPE_FIELDS, SEARCHABLE, Loss, Model, StudyConfig
from camri_tune.constraints import RecallConstraint
from camri_tune.datasets import Dataset
from camri_tune.errors import InputError
from camri_tune.losses import adacos_scale
from camri_tune.ranges import Choice, Searchable, SearchRange, is_searched, nearest, range_beyond, text_of
from camri_tune.records import biases_of
from camri_tune.storage import Stage, StudyStore
from camri_tune.training import HeadSpec


class Range(NamedTuple):
    """What a parameter of a loss may be, and whether each important class has one of its own."""

    low: float
    high: float
    log: bool
    per_class: bool


# A scale is in units of AdaCos's for so many classes. Embeddings that do not learn keep their wide angles, however few
# the classes, and need more: theirs is the number itself (benchmarks/cosine_scale.py).
SCALE, SCALE_OF_FIXED = Range(1.0, 8.0, log=True, per_class=False), Range(4.0, 64.0, log=True, per_class=False)
MARGIN = Range(0.0, 0.6, log=False, per_class=True)
WEIGHT = Range(1.0, 32.0, log=True, per_class=True)
W_FP = Range(0.03, 8.0, log=True, per_class=True)
# Beside the learning rate, which every loss has.
SPACES: dict[Loss, dict[str, Range]] = {
    "ce": {},
    "wce": {"weight": WEIGHT},
    "crwwce": {"w_fn": WEIGHT, "w_fp": W_FP},
    "l2": {"scale": SCALE},
    "arcface": {"scale": SCALE, "margin": MARGIN._replace(per_class=False)},
    "camri": {"scale": SCALE, "margin": MARGIN},
    "cosface-i": {"scale": SCALE, "margin": MARGIN},
}
# Where in its range each parameter of the starting points lies, from 0 to 1; their learning rates, by the baseline's.
PLACES = {
    "scale": (1 / 3, 0.2, 1 / 3, 0.53, 0.2, 1 / 3),
    "margin": (1 / 3, 2 / 3, 1.0, 1 / 2, 5 / 6, 1 / 6),
    "weight": (0.2, 0.4, 0.1, 0.2, 0.4, 0.1),
    "w_fn": (0.2, 0.4, 0.1, 0.2, 0.4, 0.1),
    "w_fp": (0.2, 0.4, 0.2, 0.2, 0.4, 0.4),
}
RATES = (1.0, 2.0, 1.0, 2.0, 1.0, 0.5)
MIN_TRIALS_FOR_IMPORTANCE, MOST_TRIALS_FOR_IMPORTANCE = 5, 400  # its time grows faster than they do: 50 s at 2,000
_ACCURACY = "constraints:accuracy"  # where Optuna keeps that constraint of a trial
MOST_TRIALS_OF_GP = 400  # 0.24 s a choice there, 3.7 s at 1,000 trials, 28 s at 2,000: see docs/many-workers.md


@dataclass(frozen=True)
class Plan:
    """What a trial needs to know beyond its own parameters.

    The search may begin beside the last models of the baseline, with which the `floors` of accuracy come, one for each
    of the `folds`, and the `constraints` of recall: a trial needs both once it is trained. `start` has the weights that
    every training starts from, by their names in the network.
    """

    config: StudyConfig
    data: Dataset
    device: torch.device
    important: tuple[int, ...] = ()
    floors: tuple[float, ...] = ()
    baseline_learning_rate: float = 0.0
    constraints: tuple[RecallConstraint, ...] = ()
    start: Mapping[str, torch.Tensor] = field(default_factory=dict)
    folds: int = 1

    def as_stored(self, store: StudyStore) -> "Plan":
        """The same with what `store` says by now of the baseline, and of its own study."""
        found = store.attributes.get("baseline")
        if found is None:
            return replace(self, config=store.config)
        floors = tuple(found.get("floors", ()))
        return replace(
            self,
            config=store.config,
            important=tuple(found["important"]),
            floors=floors,
            baseline_learning_rate=found["learning_rate"],
            constraints=tuple(map(RecallConstraint.from_json, found.get("constraints", ()))),
            folds=found.get("folds", len(floors)),  # an earlier version stored none without floors
        )

    def epochs_of(self, params: Mapping[str, Any]) -> int:
        """The epochs of a training with these parameters."""
        return self.config.epochs_of(self.data.epochs, params)


def looks_at_class(loss: Loss) -> bool:
    """Whether training depends on which class is important."""
    return any(allowed.per_class for allowed in SPACES[loss].values())


def parameter_names(loss: Loss, important: Sequence[int]) -> dict[str, str]:
    """Every parameter of a loss by its name in a study, with its name in `SPACES`.

    With several important classes one per class is called `margin_CLASS`.
    """
    names: dict[str, str] = {}
    for name, allowed in SPACES[loss].items():
        several = allowed.per_class and len(important) > 1
        names |= {f"{name}_{c}": name for c in sorted(important)} if several else {name: name}
    return names


def head_spec(loss: Loss, params: Mapping[str, float], important: Sequence[int]) -> HeadSpec:
    """The head and loss that a trial's parameters stand for."""

    def by_class(name: str) -> dict[int, float]:
        return {c: params[key] for c in important if (key := name if name in params else f"{name}_{c}") in params}

    return HeadSpec(
        loss,
        scale=params.get("scale", HeadSpec.scale),
        margins=by_class("margin"),
        weights=by_class("weight") or by_class("w_fn"),
        w_fp=by_class("w_fp"),
    )


def starting_points(
    config: StudyConfig, important: Sequence[int], num_classes: int, base: float
) -> list[dict[str, float]]:
    """Points of `search_space` to try first, but for a recipe's; the rest is the sampler's.

    With usual ranges scales are 1.5 to 3 times AdaCos's, 4.7 to 9.3 for ten classes (the authors took 8 and 16, for 300
    epochs of a constant rate), and margins are spread over what is searched: CAMRI's accuracy hangs on them less than
    on scale and rate (`benchmarks/grid.py`). Not all are at the baseline's learning rate, `base`: what suits
    cross-entropy need not suit another loss. Other ranges have their points at the same places.
    """
    space = search_space(config, important, num_classes, base)
    names = parameter_names(config.loss, important)
    points = [
        {"learning_rate": nearest(factor * base, space["learning_rate"])}
        | {name: _at(PLACES[kind][index], space[name]) for name, kind in names.items()}
        for index, factor in enumerate(RATES if names else RATES[:1])
    ]
    return [point for index, point in enumerate(points) if point not in points[:index]]


def _at(place: float, allowed: Choice) -> float:
    """What is allowed at a place from 0, the lowest, to 1, the highest."""
    if isinstance(allowed, SearchRange):
        low, high = allowed.low, allowed.high
        value = low * (high / low) ** place if allowed.log else low + place * (high - low)
        return nearest(_short(value), allowed)
    if isinstance(allowed, tuple):
        numbers = sorted(value for value in allowed if not isinstance(value, str))
        return numbers[min(int(place * len(numbers)), len(numbers) - 1)]
    return nearest(0.0, allowed)


def _short(value: float) -> float:
    """The same to two digits, as people write scales and margins."""
    return float(f"{value:.2g}")


def suggest(trial: Trial, stage: Stage, plan: Plan) -> tuple[HeadSpec, float]:
    """A trial's head and learning rate: from the sampler, or as enqueued."""
    if stage == "baseline":
        return HeadSpec("ce"), trial.suggest_float("learning_rate", 1e-5, 1.0, log=True)
    classes, rate = len(plan.data.classes), plan.baseline_learning_rate
    params = suggest_params(trial, plan.config, plan.important, classes, rate)
    return head_spec(plan.config.loss, params, plan.important), params["learning_rate"]


def suggest_params(
    trial: Trial, config: StudyConfig, important: Sequence[int], num_classes: int, base: float
) -> dict[str, Any]:
    """A value for every parameter of `search_space`."""
    space = search_space(config, important, num_classes, base)
    return {name: _suggested(trial, name, allowed) for name, allowed in space.items()}


def _suggested(trial: Trial, name: str, allowed: Choice) -> float | str:
    if isinstance(allowed, str):
        return allowed
    if isinstance(allowed, tuple):
        chosen = trial.suggest_categorical(name, allowed)
        return chosen if isinstance(chosen, str) else float(chosen)
    if not isinstance(allowed, SearchRange):
        return trial.suggest_float(name, allowed, allowed)
    if name in SEARCHABLE and SEARCHABLE[name].whole:
        return trial.suggest_int(name, int(allowed.low), int(allowed.high), log=allowed.log)
    return trial.suggest_float(name, allowed.low, allowed.high, log=allowed.log)


def search_space(config: StudyConfig, important: Sequence[int], num_classes: int, base: float) -> dict[str, Choice]:
    """Every parameter of a trial with what it may be. `base` is the baseline's learning rate.

    Of the recipe only what is searched is a parameter: the rest is the same in all trials, and in the baseline.
    """
    space: dict[str, Choice] = {"learning_rate": SearchRange(low=base / 4, high=base * 4, log=True)}
    if config.learning_rate is not None:
        space["learning_rate"] = config.learning_rate
    for name, kind in parameter_names(config.loss, important).items():
        given: Searchable | None = getattr(config, kind)
        space[name] = _usual_range(config, kind, num_classes) if given is None else given
    recipe = (*RECIPE_FIELDS, "epochs")
    return space | {name: value for name in recipe if is_searched(value := getattr(config, name))}


def _usual_range(config: StudyConfig, kind: str, num_classes: int) -> SearchRange:
    low, high, log, _ = SPACES[config.loss][kind]
    if kind == "scale" and config.embeddings_learn:
        low, high = (_short(times * adacos_scale(num_classes)) for times in (low, high))
    elif kind == "scale":
        low, high, *_ = SCALE_OF_FIXED
    return SearchRange(low=low, high=high, log=log)


def recipe_choices(config: StudyConfig, params: Mapping[str, Any]) -> dict[str, Any]:
    """What a study says of a trial's recipe, by the recipe's fields; None where it says nothing.

    What is searched is among the trial's parameters, but not among those of the baseline, which has the network's own.
    """
    choices = {name: getattr(config, name) for name in RECIPE_FIELDS}
    choices |= {name: params.get(name) for name, value in choices.items() if is_searched(value)}
    if (size := choices["batch_size"]) is not None:
        choices["batch_size"] = int(size)
    return choices


def worth_widening(
    config: StudyConfig,
    important: Sequence[int],
    num_classes: int,
    base: float,
    params: Mapping[str, Any],
    images: int,
) -> list[str]:
    """A plain notice of each parameter that came out at an end of the range that was searched.

    Of so many training `images` no larger batch can be made.
    """
    kinds = parameter_names(config.loss, important)
    lines = []
    for name, searched in search_space(config, important, num_classes, base).items():
        if not isinstance(searched, SearchRange):
            continue
        kind = kinds.get(name, name)
        bounds = SEARCHABLE[kind]
        if kind == "batch_size":
            bounds = bounds._replace(high=min(bounds.high, images))
        if (beyond := range_beyond(params[name], searched, bounds)) is not None:
            lines.append(
                f"The best {name}, {params[name]:.3g}, lies at the end of what was searched, {text_of(searched)}: "
                f"better may lie beyond. Another study (--name) with --{kind.replace('_', '-')} '{text_of(beyond)}' "
                f"looks there."
            )
    return lines


def require_searchable(config: StudyConfig, losses: Sequence[Loss] = (), option: str = "--loss") -> None:
    """Raise InputError where a study says something of a parameter that its loss lacks, or all `losses` of `option`."""
    asked = losses or [config.loss]
    for name in sorted({name for space in SPACES.values() for name in space}):
        if getattr(config, name) is not None and not any(name in SPACES[loss] for loss in asked):
            owners = ", ".join(loss for loss, space in SPACES.items() if name in space)
            raise InputError(
                f"--{name.replace('_', '-')} is no parameter of {option} {', '.join(asked)}, but of {owners}: leave it "
                f"out"
            )


def parameter_importance(store: StudyStore) -> dict[str, dict[str, float]]:
    """How much each parameter moves recall and accuracy over the search (fANOVA), as shares of 1.

    Empty where too few trials are complete, or fewer than two parameters vary. Of many trials some are drawn, the same
    each time. Trials that were queued with a value beyond what was searched are left out.
    """
    targets: dict[str, Callable[[FrozenTrial], float]] = {
        "recall": lambda t: float(t.user_attrs["recall"]),
        "accuracy": lambda t: float(t.user_attrs["accuracy"]),
    }
    complete = store.optuna_study("search").get_trials(deepcopy=False, states=(OptunaState.COMPLETE,))
    complete = [trial for trial in complete if _was_searched(trial)]
    if len(complete) > MOST_TRIALS_FOR_IMPORTANCE:
        complete = random.Random(0).sample(complete, MOST_TRIALS_FOR_IMPORTANCE)
    names = {name for trial in complete for name in trial.params}
    if sum(len({trial.params.get(name) for trial in complete}) > 1 for name in names) < 2:
        return {}
    study = optuna.create_study(direction="maximize")
    study.add_trials(complete)
    found = {}
    for name, target in targets.items():
        values = {target(t) for t in complete if "recall" in t.user_attrs}
        if len(complete) < MIN_TRIALS_FOR_IMPORTANCE or len(values) < 2:
            continue
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        found[name] = optuna.importance.get_param_importances(study, evaluator=evaluator, target=target)
    return found


def _was_searched(trial: FrozenTrial) -> bool:
    """Whether a trial's numbers are within its ranges: Optuna queues others, too, and then has no place for them."""
    ranges = {name: d for name, d in trial.distributions.items() if isinstance(d, FloatDistribution | IntDistribution)}
    return all(allowed.low <= trial.params[name] <= allowed.high for name, allowed in ranges.items())


def make_sampler(config: StudyConfig, seed: int) -> optuna.samplers.BaseSampler:
    """The sampler of the search: `benchmarks/search.py` has what was measured to choose it."""
    return _Relay(
        _CautiousGP(seed=seed % 2**32, n_startup_trials=6, deterministic_objective=False),
        optuna.samplers.TPESampler(seed=seed % 2**32),  # more is no seed to NumPy
    )


class _CautiousGP(optuna.samplers.GPSampler):
    """GPSampler that wants the accuracy floor exceeded by what seeds alone move accuracy by, as the baseline showed.

    Of many single trainings those that recall most and just keep the floor do so by luck. Whoever takes them for what
    is to be improved on searches where accuracy is lost (`benchmarks/search.py`).
    """

    def _sample_relative_impl(
        self,
        study: Study,
        completed_trials: list[FrozenTrial],
        running_trials: list[FrozenTrial],
        search_space: dict[str, BaseDistribution],
    ) -> dict[str, Any]:
        baseline = study.user_attrs.get("baseline")  # in a study of one's own it may be anything
        more = (baseline.get("accuracy_sd") if isinstance(baseline, dict) else None) or 0.0
        # A study of one's own may have trials of other objectives, which tell nothing of this constraint.
        told = [trial for trial in completed_trials if _ACCURACY in trial.system_attrs] or completed_trials
        if len(told) < self._n_startup_trials:
            return {}
        completed = [_with_stricter_floor(trial, more) for trial in told]
        return super()._sample_relative_impl(study, completed, running_trials, search_space)


def _with_stricter_floor(trial: FrozenTrial, more: float) -> FrozenTrial:
    """A copy: what the storage hands out is its own. Constraints come in one order, which no database has to keep."""
    trial = copy.copy(trial)
    attributes = dict(sorted(trial.system_attrs.items()))
    if _ACCURACY in attributes:
        attributes[_ACCURACY] += more
    trial.system_attrs = attributes
    return trial


class _Relay(optuna.samplers.BaseSampler):
    """A sampler that is good with few trials, then one whose cost grows less: both know all trials there are."""

    def __init__(self, first: optuna.samplers.BaseSampler, then: optuna.samplers.BaseSampler) -> None:
        self._first = first
        self._then = then

    def _of(self, trial: FrozenTrial) -> optuna.samplers.BaseSampler:
        return self._first if trial.number < MOST_TRIALS_OF_GP else self._then

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._of(trial).infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        # Where one constraint is out of reach everywhere, its weights are 0 / 0, which it copes with.
        with np.errstate(invalid="ignore"):
            return self._of(trial).sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._of(trial).sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self._of(trial).before_trial(study, trial)

    def after_trial(self, study: Study, trial: FrozenTrial, state: OptunaState, values: Sequence[float] | None) -> None:
        self._of(trial).after_trial(study, trial, state, values)

    def reseed_rng(self) -> None:
        self._first.reseed_rng()
        self._then.reseed_rng()


def model_spec(data: Dataset, model: Model, loss: Loss, params: Mapping[str, float]) -> ModelSpec:
    """How to rebuild a trial's model for inference."""
    return ModelSpec(
        model=model,
        channels=data.channels,
        image_size=data.image_size,
        classes=data.classes,
        head="cosine" if "scale" in SPACES[loss] else "dense",
        scale=params.get("scale"),
        logit_bias=biases_of(params),
    )
