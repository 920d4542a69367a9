"""The audit of a soak finds what it is there to find, and a small soak of the real command passes it."""

import json
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
from optuna.trial import Trial
from optuna.trial import TrialState as OptunaState

from benchmarks import load
from benchmarks.load import FIGURES, Load, audit, soak
from camri_tune.config import StudyConfig
from camri_tune.database import open_storage
from camri_tune.datasets import open_dataset
from camri_tune.storage import StudyStore, storage_url

ASKED = 3
FAULTS = ("trials lost", "trials duplicated", "trials left waiting or running", "checkpoints missing or altered")


@pytest.fixture
def store(tmp_path: Path, empty_database: Path) -> StudyStore:
    """A study whose run is through: two of its trainings failed, and one has a checkpoint and was interrupted once."""
    config = StudyConfig.build({"name": "s", "out": tmp_path, "limit": 60, "trials": ASKED})
    config.folder.mkdir()
    (config.folder / "study.db").write_bytes(empty_database.read_bytes())
    store = StudyStore.create(open_storage(storage_url(config)), config, open_dataset(config))
    (config.folder / "result.json").write_text(json.dumps({"trials": {"complete": 1, "failed": 2}}))
    with store.held():
        for seed in range(ASKED):
            store.enqueue("search", {}, seed=seed)
        for _ in range(ASKED - 1):
            _ended(store, OptunaState.FAIL)
        store.release(_claimed(store)._trial_id, "killed")
        store.requeue_interrupted()
        _ended(store, OptunaState.COMPLETE)
    return store


def _claimed(store: StudyStore) -> Trial:
    trial = store.claim("search")
    assert trial is not None
    return trial


def _ended(store: StudyStore, state: OptunaState) -> None:
    trial = _claimed(store)
    if state == OptunaState.COMPLETE:
        path = store.config.folder / "model"
        path.write_text("weights")
        store.save_checkpoint(trial, path)
    value = 1.0 if state == OptunaState.COMPLETE else None
    store.optuna_study("search").tell(trial, value, state=state)


def test_a_study_that_lost_nothing_passes(store: StudyStore) -> None:
    found = audit(store, ASKED)
    assert {name: found[name] for name in FAULTS} == dict.fromkeys(FAULTS, 0)
    assert found["trainings that ended"] == found["trials of the search in the result"] == ASKED
    assert found["trainings interrupted and queued again"] == 1
    assert (
        found["runs left running"] == found["files half written"] == found["whole files of no training that ended"] == 0
    )


def _lose(store: StudyStore) -> None:
    """Interrupted, and never queued again."""
    store.enqueue("search", {}, seed=9)
    store.release(_claimed(store)._trial_id, "killed")


def _queue_one_too_many(store: StudyStore) -> None:
    store.enqueue("search", {}, seed=9)
    _ended(store, OptunaState.FAIL)


def _train_twice(store: StudyStore) -> None:
    """Queued again although it had ended."""
    store.enqueue("search", {}, seed=0, retry_of=0)
    _ended(store, OptunaState.FAIL)


def _alter(store: StudyStore) -> None:
    record = store.records("search")[-1]
    assert record.checkpoint is not None
    (Path(store.artifacts_url) / record.checkpoint).write_text("others")


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (_lose, "trials lost"),
        (_queue_one_too_many, "trials duplicated"),
        (_train_twice, "trials duplicated"),
        (lambda store: store.enqueue("search", {}), "trials left waiting or running"),
        (_alter, "checkpoints missing or altered"),
    ],
)
def test_the_audit_finds_each_fault(store: StudyStore, spoil: Callable[[StudyStore], None], fault: str) -> None:
    spoil(store)
    assert audit(store, ASKED)[fault] > 0


def test_a_run_that_is_still_held_is_found(store: StudyStore) -> None:
    optuna.load_study(storage=store.storage, study_name="s.runs").ask()
    assert audit(store, ASKED)["runs left running"] == 1


def test_a_small_soak_of_the_real_command_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    # What a start of a worker costs is of no interest here.
    monkeypatch.setattr(load, "start_seconds", lambda: 0.0)
    monkeypatch.setattr(load, "training_seconds", lambda _: 0.0)
    found = soak("sqlite", Load(trials=12, epochs=1, workers=2, kills=1, deaths_of_run=0), seed=3)
    assert found["workers killed"] == 1
    assert {name: found[name] for name in FAULTS} == dict.fromkeys(FAULTS, 0)
    assert found["trials of the search in the result"] == 12


@pytest.mark.parametrize("kind", ["postgres", "sqlite"])
def test_the_recorded_soaks_lost_nothing(kind: str) -> None:
    """What README.md says of them."""
    found = json.loads(FIGURES.read_text())["soak"][kind]
    assert found["workers killed"] >= 100
    assert {name: found[name] for name in FAULTS} == dict.fromkeys(FAULTS, 0)
    assert found["trials of the search in the result"] == found["trials"]
