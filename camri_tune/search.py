"""What is searched, by whom, and how one trial runs: the bridge between Optuna's trials and `training.train`."""

import math
import os
import socket
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import optuna
import torch
from optuna.trial import Trial
from optuna.trial import TrialState as OptunaState

from camri_tune.bundle import ModelSpec, save_weights
from camri_tune.config import Loss, StudyConfig
from camri_tune.datasets import Dataset
from camri_tune.errors import TrainingDivergedError
from camri_tune.losses import adacos_scale
from camri_tune.metrics import IntArray, accuracy, important_recall, recall_per_class
from camri_tune.pruning import ACCURACY_CURVE, AccuracyFloorPruner
from camri_tune.storage import Stage, StudyStore
from camri_tune.training import HeadSpec, Progress, Recipe, Trained, train

DEFAULT_LEARNING_RATE = 4e-3
SCALE_RANGE = (4.0, 64.0)
MARGIN_RANGE = (0.0, 0.6)
# The seeds of each use are apart: what chose a setting is never what it is judged with.
_SEED_OFFSETS: dict[Stage, int] = {"baseline": 0, "search": 10_000, "finalists": 0}
TUNING_SEED_OFFSET = 20_000


@dataclass(frozen=True)
class Plan:
    """What a trial needs to know beyond its own parameters. The floor and the classes come with the baseline."""

    config: StudyConfig
    data: Dataset
    device: torch.device
    important: tuple[int, ...] = ()
    floor: float | None = None
    baseline_learning_rate: float = DEFAULT_LEARNING_RATE

    @property
    def epochs(self) -> int:
        return self.config.epochs or self.data.epochs


def replicate_seed(config: StudyConfig, index: int) -> int:
    """The seed of the index-th repetition; baseline and finalists share it, which pairs them."""
    return config.seed * 100_000 + index


def tuning_seed(config: StudyConfig) -> int:
    """The seed with which the baseline's learning rate is tuned, and nothing is judged."""
    return config.seed * 100_000 + TUNING_SEED_OFFSET


def has_scale(loss: Loss) -> bool:
    return loss != "ce"


def has_margin(loss: Loss) -> bool:
    return loss in ("camri", "arcface", "cosface-i")


def margin_names(loss: Loss, important: Sequence[int]) -> dict[int, str]:
    """The margin parameter of each important class: `margin`, or with several classes `margin_CLASS`."""
    if loss == "arcface" or len(important) == 1:
        return dict.fromkeys(important, "margin")
    return {c: f"margin_{c}" for c in important}


def starting_points(
    loss: Loss, important: Sequence[int], num_classes: int, learning_rate: float
) -> list[dict[str, float]]:
    """Known good points to try first: the authors' scales 8 and 16 and AdaCos's, margins of a few pi/64."""
    if not has_scale(loss):
        return [{"learning_rate": learning_rate}]
    adacos = min(max(adacos_scale(num_classes), SCALE_RANGE[0]), SCALE_RANGE[1])
    points = []
    for scale, steps in ((16.0, 4), (8.0, 4), (16.0, 8), (adacos, 2)):
        point = {"learning_rate": learning_rate, "scale": scale}
        if has_margin(loss):
            point |= dict.fromkeys(margin_names(loss, important).values(), steps * math.pi / 64)
        points.append(point)
    return points if has_margin(loss) else [p for i, p in enumerate(points) if i != 2]  # without a margin 0 and 2 agree


def suggest(trial: Trial, stage: Stage, plan: Plan) -> tuple[HeadSpec, float]:
    """A trial's head and learning rate: from the sampler, or as enqueued."""
    if stage == "baseline":
        return HeadSpec("ce"), trial.suggest_float("learning_rate", 1e-5, 1.0, log=True)
    loss, base = plan.config.loss, plan.baseline_learning_rate
    learning_rate = trial.suggest_float("learning_rate", base / 4, base * 4, log=True)
    if not has_scale(loss):
        return HeadSpec(loss), learning_rate
    scale = trial.suggest_float("scale", *SCALE_RANGE, log=True)
    margins = {}
    if has_margin(loss):
        names = margin_names(loss, plan.important)
        values = {name: trial.suggest_float(name, *MARGIN_RANGE) for name in sorted(set(names.values()))}
        margins = {c: values[name] for c, name in names.items()}
    return HeadSpec(loss, scale, margins), learning_rate


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
        trained = _train(trial, stage, plan)
        _keep_checkpoint(trial, trained, plan, store)
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
    value = _set_scores(trial, trained.confusion, plan)
    study.tell(trial, value)


def _train(trial: Trial, stage: Stage, plan: Plan) -> Trained:
    head, learning_rate = suggest(trial, stage, plan)
    seed = trial.user_attrs.get("seed")
    if seed is None:
        seed = plan.config.seed * 100_000 + _SEED_OFFSETS[stage] + trial.number
        trial.set_user_attr("seed", seed)
    pruner = AccuracyFloorPruner(epochs=plan.epochs) if stage == "search" else optuna.pruners.NopPruner()
    curve: dict[str, float] = {}

    def on_epoch(progress: Progress) -> None:
        trial.set_user_attr("epoch", progress.epoch)
        if progress.confusion is None:
            return
        curve[str(progress.epoch)] = accuracy(progress.confusion)
        trial.set_user_attr(ACCURACY_CURVE, curve)
        trial.report(_value(progress.confusion, plan), progress.epoch)
        if progress.epoch < progress.epochs:
            study = trial.study
            if pruner.prune(study, study._storage.get_trial(trial._trial_id)):
                _set_scores(
                    trial, progress.confusion, plan
                )  # before pruning: a trial without constraint looks feasible
                raise optuna.TrialPruned

    recipe = Recipe(epochs=plan.epochs, learning_rate=learning_rate, augmentation=plan.data.augmentation)
    return train(
        plan.config.model,
        head,
        plan.data.train,
        plan.data.validation,
        num_classes=len(plan.data.classes),
        recipe=recipe,
        seed=seed,
        device=plan.device,
        on_epoch=on_epoch,
    )


def _value(confusion: IntArray, plan: Plan) -> float:
    return important_recall(confusion, list(plan.important)) if plan.important else accuracy(confusion)


def _set_scores(trial: Trial, confusion: IntArray, plan: Plan) -> float:
    """Store what validation says of a trial; the constraint exactly once, last."""
    trial.set_user_attr("accuracy", accuracy(confusion))
    trial.set_user_attr("recall_per_class", [float(r) for r in recall_per_class(confusion)])
    trial.set_user_attr("confusion", confusion.tolist())
    value = _value(confusion, plan)
    if plan.floor is not None:
        trial.set_user_attr("recall", value)
        trial.set_constraint("accuracy", plan.floor - accuracy(confusion))
    return value


def _keep_checkpoint(trial: Trial, trained: Trained, plan: Plan, store: StudyStore) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_weights(trained.classifier, path)
        store.save_checkpoint(trial, path)


def model_spec(data: Dataset, model: str, loss: Loss, params: Mapping[str, float]) -> ModelSpec:
    """How to rebuild a trial's model for inference."""
    return ModelSpec(
        model=model,
        channels=data.channels,
        image_size=data.image_size,
        classes=data.classes,
        head="dense" if loss == "ce" else "cosine",
        scale=params.get("scale"),
    )


def _reason(error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})"
