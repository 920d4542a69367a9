"""A study made by hand, as its workers would have left it: figures in place of trainings."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, create_trial
from optuna.trial import TrialState as OptunaState

from camri_tune.config import StudyConfig
from camri_tune.database import open_storage
from camri_tune.datasets import Dataset
from camri_tune.progress import Schedule
from camri_tune.records import ACCURACY_CURVE, RECALL_CURVE
from camri_tune.storage import StudyStore, storage_url

IMPORTANT = 3
FLOOR = 0.9
SPACE = {
    "learning_rate": FloatDistribution(1e-5, 1.0, log=True),
    "scale": FloatDistribution(4.0, 64.0, log=True),
    "margin": FloatDistribution(0.0, 0.6),
}
PARAMS = {"learning_rate": 0.004, "scale": 12.0, "margin": 0.2}


def trial(
    recall: float | None = None,
    accuracy: float | None = None,
    state: OptunaState = OptunaState.COMPLETE,
    params: dict[str, float] | None = None,
    **attributes: Any,
) -> FrozenTrial:
    """A trial of a digits study with the floor at `FLOOR`: scored where it has a recall and an accuracy."""
    values = PARAMS if params is None else params
    constraints = None
    if recall is not None and accuracy is not None:
        per_class = [accuracy] * 10
        per_class[IMPORTANT] = recall
        curve = {ACCURACY_CURVE: {"1": accuracy / 2, "2": accuracy}, RECALL_CURVE: {"1": per_class, "2": per_class}}
        confusion = np.diag([10] * 10).tolist()
        scores = {"accuracy": accuracy, "recall": recall, "recall_per_class": per_class, "confusion": confusion}
        attributes = {**scores, **curve, "epoch": 2, "checkpoint": "c", "sha256": "s", "seconds": 3.0, **attributes}
        constraints = {"accuracy": FLOOR - accuracy}
    return create_trial(
        state=state,
        value=recall if state == OptunaState.COMPLETE else None,
        params=values,
        distributions={name: SPACE[name] for name in values},
        user_attrs={"device": "cpu", **attributes},
        constraints=constraints,
    )


def hand_made(
    out: Path,
    data: Dataset,
    database: Path,
    search: Sequence[FrozenTrial],
    finalists: Sequence[FrozenTrial] = (),
    **options: Any,
) -> StudyStore:
    """A study of the digits in `out`, its baseline trained, with these trials. `database` is an empty one to copy."""
    config = StudyConfig.build(
        {
            "name": "s",
            "out": out,
            "important": str(IMPORTANT),
            "epochs": 2,
            "trials": max(1, len(search)),
            "seeds": 2,
            **options,
        }
    )
    config.folder.mkdir(parents=True)
    shutil.copy(database, config.folder / "study.db")
    store = StudyStore.create(open_storage(storage_url(config)), config, data)
    rate = {"learning_rate": 0.004}
    for index, (recall, accuracy) in enumerate([(0.7, FLOOR + 0.01), (0.74, FLOOR - 0.01)]):
        model = trial(recall, accuracy, params=rate, seed=config.replicate_seed(index))
        # Nobody knows yet who is important, nor what is to be kept.
        model.user_attrs = {key: value for key, value in model.user_attrs.items() if key != "recall"}
        model.system_attrs = {}
        store.optuna_study("baseline").add_trial(model)
    learned = {
        "important": [IMPORTANT],
        "floors": [FLOOR],
        "search_floor": FLOOR,
        "learning_rate": 0.004,
        "recall_per_class": [0.72] * 10,
    }
    store.set("baseline", learned)
    trials = sum(not one.user_attrs.get("interrupted") for one in search)
    schedule = Schedule({"baseline": 2, "search": trials, "finalists": 2}, epochs=2, workers=1)
    store.set("schedule", vars(schedule))
    for one in search:
        store.optuna_study("search").add_trial(one)
    for one in finalists:
        store.optuna_study("finalists").add_trial(one)
    return store
