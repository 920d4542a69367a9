"""What is searched, by whom, and how one trial runs: the bridge between Optuna's trials and `training.train`."""

import csv
import math
import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import optuna
import torch
from optuna.trial import FrozenTrial, Trial
from optuna.trial import TrialState as OptunaState

from camri_tune.bundle import ModelSpec, save_weights
from camri_tune.config import SEEDS_APART, Loss, Model, StudyConfig
from camri_tune.datasets import Dataset
from camri_tune.errors import TrainingDivergedError
from camri_tune.losses import adacos_scale
from camri_tune.metrics import IntArray, accuracy, important_recall, recall_per_class
from camri_tune.pruning import AccuracyFloorPruner
from camri_tune.records import ACCURACY_CURVE, RECALL_CURVE, biases_of
from camri_tune.storage import Stage, StudyStore
from camri_tune.training import HeadSpec, Progress, Trained, recipe_of, train


class Range(NamedTuple):
    """What a parameter of a loss may be, and whether each important class has one of its own."""

    low: float
    high: float
    log: bool
    per_class: bool


SCALE = Range(4.0, 64.0, log=True, per_class=False)
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
# The seeds of each use are apart: what chose a setting is never what it is judged with.
_SEED_OFFSETS: dict[Stage, int] = {"baseline": 0, "search": 10_000, "finalists": 0}
MIN_TRIALS_FOR_IMPORTANCE = 5


@dataclass(frozen=True)
class Plan:
    """What a trial needs to know beyond its own parameters. The floors and the classes come with the baseline.

    There is a floor of accuracy for each fold, and so as many folds as floors.
    """

    config: StudyConfig
    data: Dataset
    device: torch.device
    important: tuple[int, ...] = ()
    floors: tuple[float, ...] = ()
    baseline_learning_rate: float = 0.0

    @property
    def epochs(self) -> int:
        return self.config.epochs or self.data.epochs


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
    loss: Loss, important: Sequence[int], num_classes: int, learning_rate: float
) -> list[dict[str, float]]:
    """Points to try first: scales about the authors' 8 and 16 and AdaCos's, margins of a few pi/64, weights of a few.

    Not all at the baseline's learning rate: what suits cross-entropy need not suit another loss.
    """
    step = math.pi / 64
    adacos = min(max(adacos_scale(num_classes), SCALE.low), SCALE.high)
    rates = (1.0, 1.0, 2.0, 0.5, 2.0, 2.0)
    values = {
        "scale": (16.0, 8.0, 12.0, adacos, 12.0, 16.0),
        "margin": (4 * step, 4 * step, 4 * step, 2 * step, 2 * step, 6 * step),
        "weight": (2.0, 4.0, 2.0, 1.4, 4.0, 1.4),
        "w_fn": (2.0, 4.0, 2.0, 1.4, 4.0, 1.4),
        "w_fp": (0.1, 0.3, 0.1, 0.1, 0.3, 0.3),
    }
    names = parameter_names(loss, important)
    if not names:
        return [{"learning_rate": learning_rate}]
    points = [
        {"learning_rate": rate * learning_rate, **{name: values[kind][place] for name, kind in names.items()}}
        for place, rate in enumerate(rates)
    ]
    return [point for place, point in enumerate(points) if point not in points[:place]]


def suggest(trial: Trial, stage: Stage, plan: Plan) -> tuple[HeadSpec, float]:
    """A trial's head and learning rate: from the sampler, or as enqueued."""
    if stage == "baseline":
        return HeadSpec("ce"), trial.suggest_float("learning_rate", 1e-5, 1.0, log=True)
    loss, base = plan.config.loss, plan.baseline_learning_rate
    learning_rate = trial.suggest_float("learning_rate", base / 4, base * 4, log=True)
    params = {}
    for name, kind in parameter_names(loss, plan.important).items():
        allowed = SPACES[loss][kind]
        params[name] = trial.suggest_float(name, allowed.low, allowed.high, log=allowed.log)
    return head_spec(loss, params, plan.important), learning_rate


def parameter_importance(store: StudyStore) -> dict[str, dict[str, float]]:
    """Share of the variance of recall and of accuracy over the search that each parameter accounts for (fANOVA).

    Empty where too few trials are complete, or nothing varies.
    """
    study = store.optuna_study("search")
    targets: dict[str, Callable[[FrozenTrial], float]] = {
        "recall": lambda t: float(t.user_attrs["recall"]),
        "accuracy": lambda t: float(t.user_attrs["accuracy"]),
    }
    found = {}
    for name, target in targets.items():
        complete = study.get_trials(deepcopy=False, states=(OptunaState.COMPLETE,))
        values = {target(t) for t in complete if "recall" in t.user_attrs}
        if len(complete) < MIN_TRIALS_FOR_IMPORTANCE or len(values) < 2:
            continue
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        found[name] = optuna.importance.get_param_importances(study, evaluator=evaluator, target=target)
    return found


def make_sampler(config: StudyConfig, seed: int) -> optuna.samplers.BaseSampler:
    """The sampler of the search: `benchmarks/search.py` has what was measured to choose it."""
    return optuna.samplers.GPSampler(seed=seed, n_startup_trials=6, deterministic_objective=False)


def worker_id(pid: int) -> str:
    """Which process runs a trial: host and process id."""
    return f"{socket.gethostname()}:{pid}"


def run_trial(trial: Trial, stage: Stage, plan: Plan, store: StudyStore) -> None:
    """Train, score and tell one claimed trial. Whatever goes wrong becomes its reason; only interrupts pass through."""
    study = store.optuna_study(stage)
    started = time.perf_counter()
    trial.set_user_attr("worker", worker_id(os.getpid()))
    trial.set_user_attr("device", str(plan.device))
    try:
        folds = range(len(plan.floors)) if stage == "search" else [trial.user_attrs.get("fold", 0)]
        confusion = _train(trial, stage, plan, folds, store)
    except optuna.TrialPruned:
        trial.set_user_attr("seconds", time.perf_counter() - started)
        study.tell(trial, state=OptunaState.PRUNED)
        return
    except Exception as error:
        reason = str(error) if isinstance(error, TrainingDivergedError) else _reason(error)
        trial.set_user_attr("failure", reason)
        trial.set_user_attr("seconds", time.perf_counter() - started)
        study.tell(trial, state=OptunaState.FAIL)
        return
    trial.set_user_attr("seconds", time.perf_counter() - started)
    value = _set_scores(trial, confusion, plan, folds)
    study.tell(trial, value)


def _train(trial: Trial, stage: Stage, plan: Plan, folds: Sequence[int], store: StudyStore) -> IntArray:
    """Train a model on each of the folds, keep the first, and pool what they say of their validation parts."""
    head, learning_rate = suggest(trial, stage, plan)
    seed = trial.user_attrs.get("seed")
    if seed is None:
        seed = plan.config.seed * SEEDS_APART + _SEED_OFFSETS[stage] + trial.number
        trial.set_user_attr("seed", seed)
    pruner = AccuracyFloorPruner(epochs=plan.epochs) if stage == "search" else optuna.pruners.NopPruner()
    accuracies: dict[str, float] = {}
    recalls: dict[str, list[float]] = {}
    trained: list[Trained] = []

    def on_epoch(progress: Progress) -> None:
        trial.set_user_attr("epoch", len(trained) * progress.epochs + progress.epoch)
        if progress.confusion is None or trained:  # the first fold's curve is the trial's
            return
        accuracies[str(progress.epoch)] = accuracy(progress.confusion)
        recalls[str(progress.epoch)] = [round(float(r), 5) for r in recall_per_class(progress.confusion)]
        trial.set_user_attr(ACCURACY_CURVE, accuracies)
        trial.set_user_attr(RECALL_CURVE, recalls)
        trial.report(_value(progress.confusion, plan), progress.epoch)
        if progress.epoch < progress.epochs or len(folds) > 1:
            study = trial.study
            if pruner.prune(study, study._storage.get_trial(trial._trial_id)):
                # Before pruning: a trial without constraint looks feasible.
                _keep_confusion(trial, progress.confusion, plan, store)
                _set_scores(trial, progress.confusion, plan, folds[:1])
                raise optuna.TrialPruned

    model, data = plan.config.model, plan.data
    for fold in folds:
        training, validation = data.fold(fold)
        recipe = recipe_of(
            model,
            epochs=plan.epochs,
            learning_rate=learning_rate,
            augmentation=data.augmentation,
            images=len(training),
        )
        model_of_fold = train(
            model,
            head,
            training,
            validation,
            num_classes=len(data.classes),
            recipe=recipe,
            seed=seed,
            device=plan.device,
            on_epoch=on_epoch,
        )
        trained.append(model_of_fold)
    _keep_checkpoint(trial, trained[0], plan, store)
    pooled: IntArray = np.sum([t.confusion for t in trained], axis=0)
    _keep_confusion(trial, pooled, plan, store)
    return pooled


def _value(confusion: IntArray, plan: Plan) -> float:
    return important_recall(confusion, list(plan.important)) if plan.important else accuracy(confusion)


def _set_scores(trial: Trial, confusion: IntArray, plan: Plan, folds: Sequence[int]) -> float:
    """Store what validation says of a trial on these folds; the constraint exactly once, last."""
    trial.set_user_attr("accuracy", accuracy(confusion))
    trial.set_user_attr("recall_per_class", [float(r) for r in recall_per_class(confusion)])
    trial.set_user_attr("confusion", confusion.tolist())
    value = _value(confusion, plan)
    if plan.floors:
        trial.set_user_attr("recall", value)
        trial.set_constraint("accuracy", pooled_floor(plan.floors, plan.data, folds) - accuracy(confusion))
    return value


def pooled_floor(floors: Sequence[float], data: Dataset, folds: Sequence[int]) -> float:
    """The accuracy to be kept on several folds together: each one's floor weighs as much as its validation images."""
    if len(folds) == 1:
        return floors[folds[0]]
    sizes = {fold: len(data.fold(fold)[1]) for fold in folds}
    return sum(floors[fold] * size for fold, size in sizes.items()) / sum(sizes.values())


def _keep_checkpoint(trial: Trial, trained: Trained, plan: Plan, store: StudyStore) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_weights(trained.classifier, path)
        store.save_checkpoint(trial, path)


def _keep_confusion(trial: Trial, confusion: IntArray, plan: Plan, store: StudyStore) -> None:
    """As a table that the dashboard shows: counts of validation images, rows true."""
    # The dashboard would put columns that are called like numbers first.
    classes = [f"class {name}" if name.isdecimal() else name for name in plan.data.classes]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "confusion.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow([r"true \ predicted", *classes])
            table.writerows([name, *row] for name, row in zip(classes, confusion.tolist(), strict=True))
        store.save_artifact(trial, path)


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


def _reason(error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    # Libraries colour their messages, or break them into lines; this one is shown in tables.
    text = " ".join("".join(c if c.isprintable() else " " for c in str(error)).split())
    return f"{type(error).__name__}: {text} ({Path(last.filename).name}:{last.lineno})"
