"""Studies in a database, queues that hand each trial to one worker, trials that end as they should, also on folds."""

import errno
import math
import re
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn, cast, get_args

import numpy as np
import optuna
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import Trial
from optuna.trial import TrialState as OptunaState

from camri_tune import trials
from camri_tune import worker as worker_module
from camri_tune.bundle import load_classifier, save_weights
from camri_tune.config import Loss, Model, StudyConfig
from camri_tune.database import masked, open_storage
from camri_tune.datasets import Dataset, open_dataset
from camri_tune.errors import InputError, StoppedError, StudyMismatchError, WorkerError
from camri_tune.files import sha256
from camri_tune.heartbeat import GRACE_SECONDS, HEARTBEAT, WORKER, is_gone, worker_id
from camri_tune.images import Images
from camri_tune.losses import CrossEntropyLoss, NormFaceLoss
from camri_tune.metrics import confusion_matrix
from camri_tune.models import Classifier, build_body
from camri_tune.ranges import SearchRange, nearest
from camri_tune.records import ACCURACY_CURVE, TrialRecord
from camri_tune.search import (
    SPACES,
    Plan,
    head_spec,
    make_sampler,
    model_spec,
    parameter_names,
    search_space,
    starting_points,
    suggest,
)
from camri_tune.storage import MOST_ATTEMPTS, Stage, StudyStore, claim, storage_url
from camri_tune.training import HeadSpec, Recipe, predict_logits, recipe_of, train
from camri_tune.trials import pooled_floor, run_trial
from tests.conftest import MakeFolder

CPU = torch.device("cpu")
SECRET = "hunter2"
DEAD = worker_id(2**30)  # no process has that id


@pytest.fixture
def config(tmp_path: Path) -> StudyConfig:
    return StudyConfig.build({"name": "study", "out": tmp_path, "epochs": 1, "important": "3"})


Create = Callable[[StudyConfig, Dataset], StudyStore]


@pytest.fixture
def create(empty_database: Path) -> Create:
    """Open a study in its default storage, or make it."""

    def create(config: StudyConfig, data: Dataset) -> StudyStore:
        path = config.folder / "study.db"
        if not path.exists():
            path.parent.mkdir(parents=True)
            shutil.copy(empty_database, path)
        return StudyStore.create(open_storage(storage_url(config)), config, data)

    return create


@pytest.fixture
def store(config: StudyConfig, digits: Dataset, create: Create) -> StudyStore:
    return create(config, digits)


def _claimed(store: StudyStore, stage: Stage, params: Mapping[str, float], **attributes: Any) -> Trial:
    store.enqueue(stage, params, **attributes)
    trial = store.claim(stage)
    assert trial is not None
    return trial


def _only(store: StudyStore, stage: Stage) -> TrialRecord:
    (record,) = store.records(stage)
    return record


# --- opening ----------------------------------------------------------------------------------------------------------


def test_sqlite_writes_ahead_so_that_workers_do_not_lock_each_other_out(store: StudyStore, config: StudyConfig) -> None:
    store.set("stage", "running")
    with sqlite3.connect(config.folder / "study.db") as database:
        assert database.execute("pragma journal_mode").fetchone() == ("wal",)
    database.close()


@pytest.mark.parametrize("name", ["with space, ünï", "what?", "50%25", "no#1"])
def test_the_default_storage_lies_in_the_folder_of_the_study(name: str, tmp_path: Path, digits: Dataset) -> None:
    config = StudyConfig.build({"out": tmp_path / name, "name": "study"})
    config.folder.mkdir(parents=True)
    StudyStore.create(open_storage(storage_url(config)), config, digits)
    assert (tmp_path / name / "study" / "study.db").is_file()
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    "url",
    [
        "nonsense",
        f"postgres//user:{SECRET}@host/database",
        f"postgresql://user:{SECRET}@127.0.0.1:1/database",
        f"postgresql://user:{SECRET}@host:port/database",
        f"postgresql+nodriver://user:{SECRET}@127.0.0.1/database",
        f"mysql://user:{SECRET}@127.0.0.1:1/database",
        f"redis://:{SECRET}@127.0.0.1",
        "sqlite:///{folder}/nowhere/study.db",
        "sqlite:///{folder}",
        "sqlite:///{folder}/text.db",
        "sqlite:///{folder}/study.db?timeout=soon",
        "sqlite://",  # in memory: no worker process could ever see it
        "sqlite:///:memory:",
    ],
)
def test_a_storage_that_cannot_be_used_gets_one_line_without_the_password(url: str, tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("this is no database, but long enough to be read as one" * 20)
    with pytest.raises(InputError) as raised:
        open_storage(url.format(folder=tmp_path))
    message = str(raised.value)
    assert "\n" not in message
    assert SECRET not in message
    assert "storage" in message
    assert "sqlite:///study.db" in message


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://user:{SECRET}@db.example/database",
        f"postgresql+psycopg://user:{SECRET}%40%2F@db.example:5432/database",
        f"mysql://user:{SECRET}@db.example/database?charset=utf8",
        f"postgresql://db.example/database?user=me&password={SECRET}",
        f"mssql+pyodbc:///?odbc_connect=DRIVER%3DODBC%3BUID%3Dme%3BPWD%3D{SECRET}",
        f"postgresql://db.example/database?options=-c%20token%3D{SECRET}",
        f"postgresql://us/er:{SECRET}@db.example/database",
        f"postgresql://user:{SECRET}/more@db.example/database",
        f"postgresql://user:p@a/b?c={SECRET}@db.example/database",
        f"postgresql://user:{SECRET}?c=d@db.example/database",
        f"postgresql://user:{SECRET}@db.example:port/database",
        f"postgres//user:{SECRET}@db.example/database",
    ],
)
def test_a_password_is_never_shown(url: str) -> None:
    assert SECRET not in masked(url)


def test_what_is_no_password_is_shown() -> None:
    assert masked("sqlite:///runs/study.db") == "sqlite:///runs/study.db"
    shown = masked(f"postgresql://user:{SECRET}@db.example:5432/database")
    assert shown == "postgresql://user:***@db.example:5432/database"


# --- one study, one folder --------------------------------------------------------------------------------------------


def test_a_folder_holds_one_study_wherever_that_is_stored(
    config: StudyConfig, digits: Dataset, create: Create, tmp_path: Path
) -> None:
    """Else whoever forgets --storage once would train it anew, and overwrite its result and model."""
    first = create(config, digits)
    elsewhere = open_storage(f"sqlite:///{tmp_path / 'other.db'}")
    for other in (config, config.model_copy(update={"important": ("4",)})):
        with pytest.raises(StudyMismatchError, match=r"folder of another study.*--storage"):
            StudyStore.create(elsewhere, other, digits)
    assert StudyStore.names_in(elsewhere) == [], "nothing is left of what was refused"
    known = first.attributes["id"]
    assert create(config, digits).attributes["id"] == known
    (config.folder / "study.db").rename(tmp_path / "away.db")
    with pytest.raises(StudyMismatchError, match="move the folder away"):
        StudyStore.create(open_storage(storage_url(config)), config, digits)
    apart = config.model_copy(update={"name": "apart"})
    assert StudyStore.create(elsewhere, apart, digits).attributes["id"] != known


def test_a_folder_that_was_renamed_keeps_its_study(config: StudyConfig, digits: Dataset, create: Create) -> None:
    """The command of before would begin a second one in the same database."""
    create(config, digits).storage.close()
    for marked in (True, False):
        renamed = config.model_copy(update={"name": "renamed"})
        config.folder.rename(renamed.folder)
        if not marked:
            (renamed.folder / ".study").unlink()
        with pytest.raises(StudyMismatchError, match="is the folder of study 'study': give it that name again"):
            create(renamed, digits)
        renamed.folder.rename(config.folder)
        create(config, digits).storage.close()


def test_a_study_that_cannot_keep_its_files_is_not_begun(config: StudyConfig, digits: Dataset, create: Create) -> None:
    wrong = config.model_copy(update={"artifacts": "gs://bucket/x", "seeds": 1})
    with pytest.raises(InputError, match="gs://bucket/x"):
        create(wrong, digits)
    assert StudyStore.names_in(open_storage(storage_url(config))) == []
    assert create(config, digits).config.seeds == 3, "with other options now"


def test_a_comparison_and_a_study_are_not_taken_for_each_other(
    config: StudyConfig, digits: Dataset, tmp_path: Path
) -> None:
    storage = open_storage(f"sqlite:///{tmp_path / 'shared.db'}")
    config = config.model_copy(update={"storage": storage.url})
    head = config.model_copy(update={"name": "table"})
    trained = StudyStore.create(storage, config, digits)
    trained.enqueue("search", {})
    store = StudyStore.create(storage, head, digits, comparison=True)
    cell = head.model_copy(update={"name": "table.3.wce", "loss": "wce"})
    StudyStore.create(storage, cell, digits, within=store)
    assert StudyStore.create(storage, head, digits, comparison=True).attributes["cells"] == ["table.3.wce"]
    with pytest.raises(StudyMismatchError, match="is of a comparison: camri-tune compare goes on with it"):
        StudyStore.create(storage, head, digits)
    with pytest.raises(StudyMismatchError, match="is of camri-tune run, and no comparison"):
        StudyStore.create(storage, config, digits, comparison=True)
    assert StudyStore.names_in(storage) == ["study", "table"]
    with pytest.raises(InputError, match=r"'table\.3\.wce' is part of a comparison, .* give one of 'study', 'table'"):
        StudyStore.existing(storage, "table.3.wce")


# --- one study, one configuration -------------------------------------------------------------------------------------


def test_creating_a_study_twice_opens_it(config: StudyConfig, digits: Dataset, create: Create) -> None:
    first = create(config, digits)
    first.enqueue("search", {"scale": 8.0})
    second = create(config, digits)
    assert [record.state for record in second.records("search")] == ["waiting"]
    assert second.records("baseline") == second.records("finalists") == []
    assert StudyStore.existing(open_storage(storage_url(config)), "study").config == config
    assert second.attributes["classes"] == list("0123456789")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("important", "4"),
        ("tolerance", 1.0),
        ("epsilon", 1.0),
        ("seed", 1),
        ("loss", "l2"),
        ("epochs", 2),
        ("seeds", 4),
        ("limit", 100),
    ],
)
def test_another_configuration_under_the_same_name_names_the_field(
    key: str, value: object, store: StudyStore, config: StudyConfig, digits: Dataset, create: Create
) -> None:
    stored = store.attributes
    other = StudyConfig.build({**config.model_dump(), key: value})
    with pytest.raises(StudyMismatchError, match=rf"'study' was started with {key} = .*--name") as raised:
        create(other, digits)
    assert "\n" not in str(raised.value)
    assert store.attributes == stored, "the stored study is as it was"


def test_another_data_set_under_the_same_name_is_told_by_its_content(
    image_folder: MakeFolder, tmp_path: Path, create: Create
) -> None:
    def create_with(path: Path) -> StudyStore:
        config = StudyConfig.build({"dataset": str(path), "name": "study", "out": tmp_path / "runs"})
        return create(config, open_dataset(config))

    folder, other = image_folder({"a": 5, "b": 5}), image_folder({"a": 5, "b": 6})
    create_with(folder)
    with pytest.raises(StudyMismatchError, match=r"'study' was started with dataset = "):
        create_with(other)
    (tmp_path / "moved").mkdir()
    create_with(folder.rename(tmp_path / "moved" / folder.name))  # the same images elsewhere are the same data set


def test_the_same_images_under_another_name_are_the_same_data_set(
    config: StudyConfig, digits: Dataset, create: Create, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which `status` then calls by the name that it has now."""
    before = create(config, digits).attributes["identity"]
    monkeypatch.setattr(digits, "name", "numbers")
    renamed = create(config, digits).attributes["identity"]
    assert renamed == {**before, "dataset": f"numbers ({digits.fingerprint})"}
    monkeypatch.setattr(digits, "fingerprint", digits.fingerprint[::-1])
    with pytest.raises(StudyMismatchError, match=rf"with dataset = 'numbers \({digits.fingerprint[::-1]}\)'"):
        create(config, digits)


def test_where_and_how_fast_a_study_runs_may_change(
    store: StudyStore, config: StudyConfig, digits: Dataset, create: Create
) -> None:
    store.enqueue("search", {})
    changes = {"trials": 99, "workers": 7, "device": "cpu", "data_dir": "elsewhere"}
    again = create(StudyConfig.build({**config.model_dump(), **changes}), digits)
    assert len(again.records("search")) == 1
    assert (again.config.trials, again.config.workers, again.config.device) == (99, 7, "cpu")


def test_a_study_whose_files_lie_elsewhere_is_not_gone_on_with(
    store: StudyStore, config: StudyConfig, digits: Dataset, tmp_path: Path
) -> None:
    elsewhere = config.model_copy(update={"out": tmp_path / "elsewhere"})
    place = re.escape(config.artifacts_url)
    with pytest.raises(
        StudyMismatchError, match=f"keeps its checkpoints in '{place}'.* repeat its --out or --artifacts"
    ):
        StudyStore.create(store.storage, elsewhere, digits)
    assert store.attributes["config"]["out"] == str(config.out)
    moved = config.folder.rename(tmp_path / "moved")
    again = StudyConfig.build({**config.model_dump(), "out": moved.parent, "artifacts": str(moved / "artifacts")})
    StudyStore.create(store.storage, again, digits)


def test_a_place_that_takes_no_files_is_refused_before_anything_is_trained(
    config: StudyConfig, digits: Dataset, tmp_path: Path, create: Create
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"--artifacts .*file/folder' cannot be used: Not a directory"):
        create(config.model_copy(update={"artifacts": str(tmp_path / "file" / "folder")}), digits)


def test_what_workers_read_changes_with_the_run_that_holds_the_study(
    store: StudyStore, config: StudyConfig, digits: Dataset, create: Create
) -> None:
    """And not with one that is refused."""
    again = create(config.model_copy(update={"data_dir": Path("/elsewhere")}), digits)
    assert store.attributes["config"]["data_dir"] == str(config.data_dir)
    again.sign()
    assert store.attributes["config"]["data_dir"] == "/elsewhere"


def test_two_runs_that_make_a_study_at_once_agree_on_what_it_is(
    config: StudyConfig, digits: Dataset, create: Create, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the one that works would be locked out of its own folder later."""
    made: list[StudyStore] = []
    naming = optuna.study.Study.set_metric_names

    def between(study: optuna.Study, names: list[str]) -> None:
        monkeypatch.undo()
        made.append(create(config, digits))  # the other, after this one's look
        naming(study, names)

    monkeypatch.setattr(optuna.study.Study, "set_metric_names", between)
    later = create(config, digits)
    (first,) = made
    mark = (config.folder / ".study").read_text()
    assert mark == first.attributes["id"] == later.attributes["id"]
    (config.folder / ".study").write_text("of whoever wrote last")
    first.sign()
    assert (config.folder / ".study").read_text() == mark, "and who holds the study says so again"
    assert not first.has_anothers_folder()


def test_an_option_of_another_version_is_not_dropped(
    store: StudyStore, config: StudyConfig, digits: Dataset, create: Create
) -> None:
    store.set("identity", {**store.attributes["identity"], "mixup": 0.2})
    with pytest.raises(StudyMismatchError, match=r"by another version of camri-tune with mixup = 0\.2, which this"):
        create(config, digits)


def test_the_storage_is_not_stored_with_the_study(config: StudyConfig, digits: Dataset, tmp_path: Path) -> None:
    """Its URL may hold a password, and every dashboard shows what is stored with a study."""
    url = f"sqlite:///{tmp_path / SECRET}.db"
    store = StudyStore.create(open_storage(url), config.model_copy(update={"storage": url}), digits)
    assert SECRET not in str(store.attributes)


def test_studies_whose_names_look_like_queues_do_not_mix(config: StudyConfig, digits: Dataset, tmp_path: Path) -> None:
    """`NAME.baseline` is the baseline's queue of NAME in a storage that several studies share."""
    storage = open_storage(f"sqlite:///{tmp_path / 'shared.db'}")
    first = StudyStore.create(storage, config, digits)
    first.enqueue("baseline", {"learning_rate": 0.01})
    try:
        other = StudyStore.create(storage, StudyConfig.build({**config.model_dump(), "name": "study.baseline"}), digits)
    except InputError:
        return
    assert other.records("search") == []


def test_a_study_that_is_not_there_is_named_with_those_that_are(store: StudyStore, config: StudyConfig) -> None:
    storage = open_storage(storage_url(config))
    with pytest.raises(InputError, match=r"^study 'other' is not in this storage, which has 'study'; give "):
        StudyStore.existing(storage, "other")
    optuna.create_study(storage=storage, study_name="theirs")
    with pytest.raises(InputError, match=r"^study 'theirs' was not made by camri-tune run; [^\n]*$"):
        StudyStore.existing(storage, "theirs")
    assert store.name == "study"


# --- queues -----------------------------------------------------------------------------------------------------------

QUEUED = 40


def test_trials_are_claimed_in_the_order_of_the_queue(store: StudyStore) -> None:
    for rate in (0.3, 0.1, 0.2):
        store.enqueue("baseline", {"learning_rate": rate}, seed=7)
    claimed = [store.claim("baseline") for _ in range(4)]
    assert claimed[3] is None
    rates = [trial.suggest_float("learning_rate", 0.01, 1.0) for trial in claimed[:3] if trial]
    assert rates == [0.3, 0.1, 0.2]
    assert {record.state for record in store.records("baseline")} == {"running"}
    assert {record.seed for record in store.records("baseline")} == {7}
    assert store.claim("search") is None
    assert store.claim("finalists") is None


def test_workers_at_once_never_get_the_same_trial(store: StudyStore, config: StudyConfig) -> None:
    """Each thread with a connection of its own, as each worker process has."""
    for _ in range(QUEUED):
        store.enqueue("baseline", {"learning_rate": 0.1})
    stores = [StudyStore.existing(open_storage(storage_url(config)), "study") for _ in range(6)]
    claimed: list[int] = []
    begin = threading.Barrier(len(stores))

    def claim_all(mine: StudyStore) -> None:
        begin.wait()
        while (trial := mine.claim("baseline")) is not None:
            claimed.append(trial.number)

    _in_threads([partial(claim_all, mine) for mine in stores])
    assert sorted(claimed) == list(range(QUEUED)), f"claimed twice: {[n for n, c in Counter(claimed).items() if c > 1]}"


def _in_threads(functions: Sequence[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=function) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


CLAIM_ALL = """
import sys
from camri_tune.database import open_storage
from camri_tune.storage import StudyStore
store = StudyStore.existing(open_storage(sys.argv[1]), "study")
print("ready", flush=True)
sys.stdin.readline()
while (trial := store.claim("baseline")) is not None:
    print(trial.number, flush=True)
"""


def test_processes_at_once_never_get_the_same_trial(store: StudyStore, config: StudyConfig) -> None:
    for _ in range(QUEUED):
        store.enqueue("baseline", {"learning_rate": 0.1})
    command = [sys.executable, "-c", CLAIM_ALL, storage_url(config)]
    workers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for worker in workers:
        assert worker.stdout
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:
        assert worker.stdin
        worker.stdin.write("go\n")
        worker.stdin.flush()
    claimed = [int(line) for worker in workers for line in worker.communicate()[0].split()]
    assert [worker.returncode for worker in workers] == [0, 0]
    assert sorted(claimed) == list(range(QUEUED))


@pytest.mark.parametrize("state", ["running", "complete"])
def test_a_trial_that_another_worker_took_a_moment_ago_is_passed_over(
    state: str, store: StudyStore, config: StudyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between looking at the queue and taking a trial, another worker takes it, or has even finished it."""
    for _ in range(2):
        store.enqueue("baseline", {"learning_rate": 0.1})
    other = StudyStore.existing(open_storage(storage_url(config)), "study")
    look = store.storage.waiting

    def look_and_lose_the_first(studies: list[int]) -> list[tuple[int, int]]:
        waiting = look(studies)
        taken = other.claim("baseline")
        assert taken is not None
        if state == "complete":
            other.optuna_study("baseline").tell(taken, 0.5)
        return waiting

    monkeypatch.setattr(store.storage, "waiting", look_and_lose_the_first)
    trial = store.claim("baseline")
    assert trial is not None
    assert trial.number == 1


def test_what_a_queued_trial_leaves_open_is_the_samplers_to_choose(store: StudyStore, config: StudyConfig) -> None:
    for _ in range(3):
        store.enqueue("search", {})
    store.enqueue("search", {"scale": 8.0})
    sampler = make_sampler(config, seed=0)
    chosen = []
    for _ in range(4):
        trial = store.claim("search", sampler)
        assert trial is not None
        chosen.append((trial.suggest_float("scale", 4, 64, log=True), trial.suggest_float("margin", 0, 0.6)))
        store.optuna_study("search").tell(trial, 0.5)
    assert chosen[3][0] == 8.0
    assert len({scale for scale, _ in chosen}) == 4
    assert len({margin for _, margin in chosen}) == 4
    assert all(4 <= scale <= 64 and 0 <= margin <= 0.6 for scale, margin in chosen)


def test_an_interrupted_trial_fails_and_runs_again_as_it_was(store: StudyStore) -> None:
    """The sampler's choice and the seed are kept; what an unfinished training had stored of its results is not."""
    trial = _claimed(store, "search", {"scale": 8.0})
    params = {"scale": trial.suggest_float("scale", 4, 64), "margin": trial.suggest_float("margin", 0, 0.6)}
    trial.set_user_attr("seed", 10_003)
    trial.set_user_attr("accuracy", 0.9)
    trial.set_user_attr(ACCURACY_CURVE, {"1": 0.9})
    trial.set_user_attr("sha256", "0" * 64)
    trial.set_user_attr("checkpoint", "gone")
    trial.set_constraint("accuracy", -1.0)
    trial.set_user_attr("worker", DEAD)
    store.enqueue("search", {})
    assert store.requeue_interrupted() == 1

    waiting, again = store.records("search")
    assert waiting.state == again.state == "waiting"
    assert again.seed == 10_003
    interrupted, _, frozen = store.optuna_study("search").get_trials(deepcopy=False)
    assert interrupted.state == OptunaState.FAIL
    assert DEAD in interrupted.user_attrs["failure"]
    assert frozen.system_attrs["fixed_params"] == params
    assert set(frozen.user_attrs) == {"seed", "retry_of", "attempts", "ticket"}
    assert frozen.user_attrs["retry_of"] == 0
    assert not frozen.constraints
    assert store.requeue_interrupted() == 0, "once"


def test_a_trial_that_was_interrupted_before_it_chose_keeps_what_was_asked_for(store: StudyStore) -> None:
    asked = {"learning_rate": 0.01, "scale": 8.0, "margin": 0.1}
    _claimed(store, "finalists", asked, seed=5, source_trial=17, fold=2).set_user_attr("worker", DEAD)
    assert store.requeue_interrupted() == 1
    again = _only(store, "finalists")
    assert (again.seed, again.source_trial, again.fold) == (5, 17, 2)
    frozen = store.optuna_study("finalists").get_trials(deepcopy=False)[1]
    assert frozen.system_attrs["fixed_params"] == asked


def test_only_the_trials_of_the_dead_worker_are_queued_again(store: StudyStore) -> None:
    for worker in (worker_id(), DEAD):
        _claimed(store, "baseline", {"learning_rate": 0.1}).set_user_attr("worker", worker)
    assert store.requeue_interrupted() == 1
    assert [(record.number, record.state) for record in store.records("baseline")] == [(0, "running"), (2, "waiting")]


def test_a_trial_that_was_given_back_counts_until_it_is_queued_again(store: StudyStore) -> None:
    """Or whoever plans would find one too few, and queue another as well."""
    trial = _claimed(store, "search", PARAMS, seed=7)
    trial.suggest_float("margin", 0.0, 0.6)
    trial.set_user_attr("accuracy", 0.5)
    store.release(trial._trial_id, "given back: SIGTERM")
    record = _only(store, "search")
    assert (record.number, record.state, record.seed, record.accuracy, record.failure) == (0, "waiting", 7, None, None)
    assert store.requeue_interrupted() == 1
    again = _only(store, "search")
    assert (again.number, again.state, again.seed) == (1, "waiting", 7)


def test_records_of_ended_trials_are_read_once(store: StudyStore) -> None:
    trial = _claimed(store, "search", PARAMS)
    assert _only(store, "search").state == "running"
    store.optuna_study("search").tell(trial, 0.5)
    first, again = (_only(store, "search") for _ in range(2))
    assert first.state == "complete"
    assert again is first


def test_a_worker_that_is_known_to_be_dead_is_not_waited_for_on_whatever_machine(store: StudyStore) -> None:
    theirs, others = "other-machine:4026531836:17", "other-machine:4026531836:18"
    for worker in (theirs, others):
        _claimed(store, "search", PARAMS).set_user_attr("worker", worker)
    assert store.requeue_interrupted() == 0
    assert store.requeue_interrupted(dead=theirs) == 1
    states = [(trial.state, trial.user_attrs.get("failure")) for trial in store.optuna_study("search").trials]
    assert states[0] == (OptunaState.FAIL, f"{theirs} died; queued again")
    assert [state for state, _ in states[1:]] == [OptunaState.RUNNING, OptunaState.WAITING]


@pytest.mark.parametrize("point", ["set_trial_state_values", "create_new_trial"])
def test_whatever_ends_the_run_while_it_queues_again_the_next_does_the_rest(
    point: str, store: StudyStore, config: StudyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once and not twice: killed before the lost trial has failed, and between that and its successor."""
    _claimed(store, "search", {"scale": 8.0}).set_user_attr("worker", DEAD)

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store.storage if "state" in point else store.optuna_study("search")._storage, point, killed)
        with pytest.raises(KeyboardInterrupt):
            store.requeue_interrupted()
    again = StudyStore.existing(open_storage(storage_url(config)), "study")
    assert again.requeue_interrupted() == 1
    assert again.requeue_interrupted() == 0
    assert _only(again, "search").state == "waiting"


@pytest.mark.parametrize("hours", [-14, -5.5, -1, 0, 1, 5.75, 14])
def test_a_trial_that_was_just_taken_is_not_given_up_in_another_time_zone(hours: float) -> None:
    """Optuna writes the time on the wall of whoever took it."""
    there = datetime.now() + timedelta(hours=hours)
    for seconds, gone in ((0, False), (25, False), (-5, False), (35, True), (300, True), (840, True)):
        assert is_gone({}, there - timedelta(seconds=seconds)) == gone
    assert is_gone({}, None)


def test_a_worker_on_a_machine_of_the_same_name_lives_as_long_as_it_says_so() -> None:
    """As copies of a virtual machine have one, whose first process ids are all in a set of the same number."""
    name, _, namespace, _ = DEAD.rsplit(":", 3)
    other = f"{name}:0a1b2c3d:{namespace}:{2**30}"
    assert is_gone({WORKER: DEAD, HEARTBEAT: time.time()}, None)
    assert not is_gone({WORKER: other, HEARTBEAT: time.time()}, None)
    assert is_gone({WORKER: other, HEARTBEAT: time.time() - GRACE_SECONDS - 1}, None)


def test_a_worker_that_waits_for_its_study_opens_the_database_once(
    config: StudyConfig, store: StudyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each try would leave a connection behind, of which a server has some dozens."""
    opened: list[str] = []

    def counted(url: str, **options: Any) -> Any:
        opened.append(url)
        return open_storage(url, **options)

    monkeypatch.setattr(worker_module, "open_storage", counted)
    monkeypatch.setattr(worker_module, "IDLE_SECONDS", (0.01,))
    with pytest.raises(InputError, match="study 'later' is not in this storage"):
        worker_module._find(storage_url(config), "later", 0.2, lambda: None)
    assert len(opened) == 1


@pytest.mark.usefixtures("no_threads_more")
@pytest.mark.parametrize("changed", ["version", "place", "trials"])
def test_a_worker_that_outlives_its_run_serves_another_only_as_it_joined(
    changed: str, config: StudyConfig, store: StudyStore
) -> None:
    stored = store.attributes["config"]
    asked = 0

    def next_run() -> str | None:
        nonlocal asked
        asked += 1
        if asked == 1 and changed == "version":
            store.set("version", "0.0.1 (elsewhere)")
        elif asked == 1:
            artifacts = str(config.folder / "moved") if changed == "place" else None
            store.set("config", {**stored, "artifacts": artifacts, "trials": 99})
        return "enough" if asked > 100 else None

    match = {"version": r"is run by camri-tune 0\.0\.1", "place": "moved' now, and kept them in", "trials": "enough"}
    with pytest.raises((StudyMismatchError, StoppedError), match=match[changed]):
        worker_module.work(
            storage_url=storage_url(config), name="study", device="cpu", patience=60.0, asked_to_stop=next_run
        )
    torch.set_flush_denormal(False)


def test_what_ran_out_of_memory_is_queued_again_by_the_next_run(store: StudyStore) -> None:
    """Which may have fewer workers; what failed otherwise would fail again."""
    for failure in ("memory", "other"):
        trial = _claimed(store, "search", PARAMS, seed=5)
        trial.suggest_float("margin", 0.0, 0.6)
        trial.set_user_attr("accumulation", 2)
        if failure == "memory":
            trial.set_user_attr("out_of_memory", True)
        store.optuna_study("search").tell(trial, state=OptunaState.FAIL)
    assert [record.state for record in store.records("search")] == ["failed", "failed"]
    assert store.requeue_interrupted() == 0, "not while it runs: that would go on for ever"
    chosen = store.records("search")[0].params
    assert store.requeue_blameless() == 1
    assert [(record.number, record.state) for record in store.records("search")] == [(1, "failed"), (2, "waiting")]
    assert store.requeue_blameless() == 0
    queued = store.optuna_study("search").get_trials(deepcopy=False)[2]
    assert queued.system_attrs["fixed_params"] == {**PARAMS, **chosen}
    assert (queued.user_attrs["seed"], "accumulation" in queued.user_attrs) == (5, False)


def test_what_is_withdrawn_is_nobodys_and_counts_no_more(store: StudyStore) -> None:
    running = _claimed(store, "search", PARAMS)
    for scale in (8.0, 9.0, 10.0):
        store.enqueue("search", {"scale": scale})
    store.withdraw("search", keep=2)
    assert [(record.number, record.state) for record in store.records("search")] == [(0, "running"), (1, "waiting")]
    assert store.requeue_interrupted() == 0
    claimed = store.claim("search")
    assert claimed is not None
    assert claimed.number == 1
    assert store.claim("search") is None
    store.withdraw("search", keep=0)
    assert len(store.records("search")) == 2, "who is at work stays there"
    store.optuna_study("search").tell(running, 0.5)
    store.storage.set_trial_user_attr(claimed._trial_id, "worker", DEAD)
    assert store.requeue_interrupted() == 1
    store.withdraw("search", keep=2)
    assert [(record.number, record.state) for record in store.records("search")] == [(0, "complete"), (4, "waiting")]
    store.withdraw("search", keep=1)
    assert [record.number for record in store.records("search")] == [0]


def test_a_trial_that_is_queued_again_stands_where_it_stood(store: StudyStore) -> None:
    """Of ten, two were interrupted: one of the first five, which is trained again, and one that nobody asks for now."""
    for _ in range(10):
        store.enqueue("search", PARAMS)
    for number in range(8):
        trial = store.claim("search")
        assert trial is not None
        if number in (3, 7):
            store.storage.set_trial_user_attr(trial._trial_id, "worker", DEAD)
        else:
            store.optuna_study("search").tell(trial, 0.5)
    assert store.requeue_interrupted() == 2
    assert [r.number for r in store.records("search") if r.state == "waiting"] == [8, 9, 10, 11]
    assert [r.number for r in store.records("search", first=5)] == [0, 1, 2, 4, 10]
    store.withdraw("search", keep=5)
    assert [r.number for r in store.records("search")] == [0, 1, 2, 4, 5, 6, 10]
    successor = store.claim("search")
    assert successor is not None
    store.storage.set_trial_user_attr(successor._trial_id, "worker", DEAD)
    assert store.requeue_interrupted() == 1
    store.withdraw("search", keep=5)
    assert [r.number for r in store.records("search", first=5)] == [0, 1, 2, 4, 12]
    assert len(store.records("search")) == 7


def test_a_trial_that_ends_its_worker_again_and_again_fails_with_that_reason(store: StudyStore) -> None:
    store.enqueue("search", {"scale": 8.0})
    for _ in range(MOST_ATTEMPTS):
        trial = store.claim("search")
        assert trial is not None
        trial.set_user_attr("worker", DEAD)
        store.requeue_interrupted()
    assert store.claim("search") is None
    record = _only(store, "search")
    assert record.state == "failed"
    assert record.failure == f"its worker died 5 times without getting further; the last was {DEAD}"
    assert not store.has_finished(DEAD), "or a worker that always dies would never be said to"


@pytest.mark.parametrize("stage", ["baseline", "search"])
def test_what_ended_its_workers_is_queued_again_by_the_next_run(stage: Stage, store: StudyStore) -> None:
    """Which may have fewer: where memory is short, the kernel ends those that would have trained well."""
    store.enqueue(stage, {"learning_rate": 0.1}, seed=0)
    for _ in range(MOST_ATTEMPTS):
        trial = store.claim(stage)
        assert trial is not None
        trial.set_user_attr("worker", DEAD)
        store.requeue_interrupted()
    assert _only(store, stage).state == "failed"
    assert store.requeue_interrupted() == 0, "not while this one runs"
    assert store.requeue_blameless() == 1
    again = store.claim(stage)
    assert again is not None
    assert (again.user_attrs["seed"], "attempts" in again.user_attrs) == (0, False), "with as many attempts"
    store.optuna_study(stage).tell(again, 0.5)
    assert _only(store, stage).state == "complete"
    assert store.requeue_blameless() == 0


def test_a_trial_that_gets_further_each_time_is_tried_for_ever(store: StudyStore, tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(b"state")
    store.enqueue("search", {"scale": 8.0})
    for epoch in range(MOST_ATTEMPTS + 3):
        trial = store.claim("search")
        assert trial is not None
        trial.set_user_attr("resumed_at", epoch)
        store.save_resume(trial, tmp_path / "state", epoch + 1)
        trial.set_user_attr("worker", DEAD)
        assert store.requeue_interrupted() == 1
    assert _only(store, "search").state == "waiting"
    assert len(list((tmp_path / "study" / "artifacts").glob("resume-*"))) == 1, "older states are removed"


def test_finished_trials_are_never_queued_again(store: StudyStore) -> None:
    trial = _claimed(store, "baseline", {"learning_rate": 0.1})
    store.optuna_study("baseline").tell(trial, 0.9)
    assert store.requeue_interrupted() == 0
    assert _only(store, "baseline").state == "complete"


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(store: StudyStore, tmp_path: Path) -> Path:
    """The file of the one checkpoint that the store has, of trial 0 of the baseline."""
    path = tmp_path / "weights"
    path.write_bytes(bytes(range(256)) * 10)
    store.save_checkpoint(_claimed(store, "baseline", {"learning_rate": 0.1}), path)
    (artifact,) = (tmp_path / "study" / "artifacts").glob("[!.]*")
    return artifact


def test_a_checkpoint_comes_back_byte_for_byte(store: StudyStore, checkpoint: Path, tmp_path: Path) -> None:
    record = _only(store, "baseline")
    assert record.checkpoint == checkpoint.name
    assert record.sha256 == sha256(tmp_path / "weights")
    assert store.fetch_checkpoint(record, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "weights").read_bytes()


@pytest.mark.parametrize("damage", ["altered", "cut short", "removed", "folder removed"])
def test_a_damaged_checkpoint_is_not_given_out(
    damage: str, store: StudyStore, checkpoint: Path, tmp_path: Path
) -> None:
    content = checkpoint.read_bytes()
    match damage:
        case "altered":
            checkpoint.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        case "cut short":
            checkpoint.write_bytes(content[:-1])
        case _:
            checkpoint.unlink()
    if damage == "folder removed":
        shutil.rmtree(checkpoint.parent)
    assert not store.fetch_checkpoint(_only(store, "baseline"), tmp_path / "copy")


def test_a_store_that_does_not_answer_is_no_missing_checkpoint(
    store: StudyStore, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or an outage of S3 would have a run pass over its best model."""

    def broken(artifact_id: str) -> NoReturn:
        raise OSError(errno.EIO, "nothing answers at its endpoint", artifact_id)

    monkeypatch.setattr(store.artifacts, "open_reader", broken)
    with pytest.raises(OSError, match="nothing answers"):
        store.fetch_checkpoint(_only(store, "baseline"), tmp_path / "copy")


def test_a_trial_without_checkpoint_has_none_to_give(store: StudyStore, tmp_path: Path) -> None:
    assert not store.fetch_checkpoint(TrialRecord(number=0, state="complete", params={}), tmp_path / "copy")


# --- one trial, run ---------------------------------------------------------------------------------------------------


def _plan(config: StudyConfig, digits: Dataset, **values: Any) -> Plan:
    values = {"important": (3,), "floors": (0.05,), "baseline_learning_rate": 4e-3, **values}
    return Plan(config, digits, CPU, **{"folds": len(values["floors"]), **values})


PARAMS = {"learning_rate": 4e-3, "scale": 16.0, "margin": 0.1}


@pytest.fixture
def no_threads_more() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("no_threads_more")
def test_a_finished_trial_carries_all_that_selection_asks_for(
    store: StudyStore, config: StudyConfig, digits: Dataset, tmp_path: Path
) -> None:
    plan = _plan(config, digits, important=(3, 8))
    params = {"learning_rate": 4e-3, "scale": 16.0, "margin_3": 0.1, "margin_8": 0.2}
    run_trial(_claimed(store, "search", params), "search", plan, store)
    record = _only(store, "search")
    (frozen,) = store.optuna_study("search").get_trials()
    confusion = np.array(frozen.user_attrs["confusion"])

    assert record.state == "complete"
    assert record.params == params
    assert record.failure is None
    assert record.epoch == 1
    assert record.seed == 10_000
    assert record.seconds is not None
    assert record.seconds > 0
    assert confusion.shape == (10, 10)
    assert confusion.sum(axis=1).tolist() == torch.bincount(digits.validation.labels).tolist()
    assert record.accuracy == np.trace(confusion) / confusion.sum()
    assert record.recall_per_class == tuple(np.diag(confusion) / confusion.sum(axis=1))
    assert record.recall == frozen.value == min(record.recall_per_class[3], record.recall_per_class[8])
    assert record.accuracy is not None
    assert record.constraint == 0.05 - record.accuracy
    assert frozen.user_attrs["device"] == "cpu"

    with sqlite3.connect(config.folder / "study.db") as database:
        keys = database.execute("select key from trial_system_attributes where key like 'constraints%'").fetchall()
    database.close()
    assert keys == [("constraints:accuracy",)], "the constraint once, and none in the old form"

    path = tmp_path / "model.safetensors"
    assert store.fetch_checkpoint(record, path)
    classifier = load_classifier(path, model_spec(digits, config.model, config.loss, record.params))
    answers = predict_logits(classifier, digits.validation.pixels, CPU).argmax(dim=1)
    assert float((answers == digits.validation.labels).float().mean()) == pytest.approx(record.accuracy)


@pytest.mark.usefixtures("no_threads_more")
def test_the_same_parameters_and_seed_give_the_same_model(
    store: StudyStore, config: StudyConfig, digits: Dataset
) -> None:
    for _ in range(2):
        run_trial(_claimed(store, "finalists", PARAMS, seed=5), "finalists", _plan(config, digits), store)
    first, second = store.records("finalists")
    assert first.sha256 == second.sha256
    assert first.seed == second.seed == 5


@pytest.mark.usefixtures("no_threads_more")
def test_a_trial_of_the_baseline_is_scored_by_accuracy_and_has_no_floor_to_keep(
    store: StudyStore, config: StudyConfig, digits: Dataset
) -> None:
    plan = Plan(config, digits, CPU)
    run_trial(_claimed(store, "baseline", {"learning_rate": 4e-3}, seed=1), "baseline", plan, store)
    record = _only(store, "baseline")
    (frozen,) = store.optuna_study("baseline").get_trials()
    assert record.state == "complete"
    assert frozen.value == record.accuracy
    assert record.recall is None
    assert record.constraint is None
    assert not frozen.constraints
    assert record.checkpoint
    assert not record.feasible


@pytest.mark.usefixtures("no_threads_more")
def test_a_trial_on_folds_is_judged_by_what_all_of_their_models_say(
    store: StudyStore, config: StudyConfig, digits: Dataset
) -> None:
    """The search's trial is compared with one model of each fold alone, of the same parameters and seed."""
    plan = _plan(config, digits, floors=(0.05, 0.25))
    for fold in (0, 1):
        run_trial(_claimed(store, "finalists", PARAMS, seed=5, fold=fold), "finalists", plan, store)
    run_trial(_claimed(store, "search", PARAMS, seed=5), "search", plan, store)
    record, alone = _only(store, "search"), store.records("finalists")
    (frozen,) = store.optuna_study("search").get_trials()
    one, two = (np.array(t.user_attrs["confusion"]) for t in store.optuna_study("finalists").get_trials())
    confusion = np.array(frozen.user_attrs["confusion"])

    for fold, single in enumerate((one, two)):
        assert single.sum(axis=1).tolist() == torch.bincount(digits.fold(fold)[1].labels).tolist()
    assert one.tolist() != two.tolist()
    assert confusion.tolist() == (one + two).tolist()
    assert record.accuracy == np.trace(confusion) / confusion.sum()
    assert record.recall_per_class == tuple(np.diag(confusion) / confusion.sum(axis=1))
    assert record.recall == frozen.value == record.recall_per_class[3]
    assert record.accuracy is not None
    assert record.constraint == pytest.approx(0.15 - record.accuracy, abs=1e-12), "the mean of the floors"
    assert (record.state, record.epoch, record.fold) == ("complete", 2, 0)
    assert frozen.user_attrs[ACCURACY_CURVE] == {"1": alone[0].accuracy}, "the first fold's, which others have, too"
    assert record.sha256 == alone[0].sha256, "the first fold's model is kept"

    assert [r.fold for r in alone] == [0, 1]
    for single_record, floor in zip(alone, plan.floors, strict=True):
        assert single_record.epoch == 1
        assert single_record.accuracy is not None
        assert single_record.constraint == floor - single_record.accuracy, "its own fold's floor"


@pytest.mark.usefixtures("no_threads_more")
def test_a_trial_of_the_baseline_is_trained_and_scored_on_its_fold(
    store: StudyStore, config: StudyConfig, digits: Dataset, tmp_path: Path
) -> None:
    params = {"learning_rate": 4e-3}
    for fold in (2, 0):
        trial = _claimed(store, "baseline", params, seed=1, fold=fold)
        run_trial(trial, "baseline", Plan(config, digits, CPU), store)
    frozen, _ = store.optuna_study("baseline").get_trials()
    record, other = store.records("baseline")
    assert (record.fold, other.fold) == (2, 0)
    assert record.sha256 != other.sha256, "the same rate and seed, but other images"
    assert not frozen.constraints
    assert store.fetch_checkpoint(record, tmp_path / "weights")
    classifier = load_classifier(tmp_path / "weights", model_spec(digits, config.model, "ce", params))
    for fold in range(3):
        validation = digits.fold(fold)[1]
        answers = predict_logits(classifier, validation.pixels, CPU).argmax(dim=1)
        confusion = confusion_matrix(validation.labels.numpy(), answers.numpy(), 10).tolist()
        assert (confusion == frozen.user_attrs["confusion"]) == (fold == 2)


def test_a_trial_that_fails_on_a_later_fold_fails(
    store: StudyStore, config: StudyConfig, digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is said of it from the folds that went well."""
    seen: list[tuple[Images, Images, int]] = []

    def broken(_: Model, __: HeadSpec, training: Images, validation: Images, *, seed: int, **___: Any) -> Any:
        seen.append((training, validation, seed))
        if len(seen) == 3:
            raise RuntimeError("the third")
        classifier = SimpleNamespace(state_dict=dict)
        return SimpleNamespace(classifier=classifier, confusion=np.eye(10, dtype=np.int64))

    monkeypatch.setattr("camri_tune.trials.train", broken)
    run_trial(_claimed(store, "search", PARAMS), "search", _plan(config, digits, floors=(0.05,) * 4), store)
    record = _only(store, "search")
    assert [(training, validation) for training, validation, _ in seen] == [digits.fold(fold) for fold in range(3)]
    assert {seed for _, _, seed in seen} == {10_000}
    assert record.state == "failed"
    assert record.failure
    assert "the third" in record.failure
    assert (record.accuracy, record.constraint, record.checkpoint) == (None, None, None)


@pytest.mark.usefixtures("no_threads_more")
def test_a_diverging_trial_fails_with_its_reason(store: StudyStore, config: StudyConfig, digits: Dataset) -> None:
    plan = _plan(config, digits, baseline_learning_rate=1e30)
    run_trial(_claimed(store, "search", {**PARAMS, "learning_rate": 1e30}), "search", plan, store)
    record = _only(store, "search")
    assert record.state == "failed"
    assert record.failure
    assert "loss became" in record.failure
    assert "learning rate 1e+30" in record.failure
    assert "\n" not in record.failure
    assert record.constraint is None
    assert record.checkpoint is None
    assert record.seconds is not None
    assert not record.feasible


@pytest.mark.usefixtures("no_threads_more")
def test_whatever_goes_wrong_in_training_becomes_the_reason(
    store: StudyStore, config: StudyConfig, digits: Dataset
) -> None:
    """Here a network that is not there."""
    plan = _plan(config.model_copy(update={"model": "none"}), digits)
    run_trial(_claimed(store, "search", PARAMS), "search", plan, store)
    record = _only(store, "search")
    assert record.state == "failed"
    assert record.failure
    assert record.failure.startswith("KeyError")
    assert "backbones.py" in record.failure


@pytest.mark.usefixtures("no_threads_more")
def test_a_gpu_that_does_nothing_more_ends_the_worker_and_fails_no_trial(
    store: StudyStore, config: StudyConfig, digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once its context is broken, a process has every training fail at once, whatever the settings."""
    asked: list[torch.device] = []

    def broken(device: torch.device) -> bool:
        asked.append(device)
        return False

    monkeypatch.setattr(trials, "computes", broken)
    plan = _plan(config.model_copy(update={"model": "none"}), digits)
    store.enqueue("search", PARAMS)
    for attempt in range(1, MOST_ATTEMPTS + 1):
        trial = store.claim("search")
        assert trial is not None
        with pytest.raises(WorkerError, match=r"^cpu does not compute any more: KeyError: 'none'"):
            run_trial(trial, "search", plan, store)
        assert asked == [CPU] * attempt
        assert not store.has_finished(worker_id()), "so that it counts as fruitless"
        assert _only(store, "search").state == ("waiting" if attempt < MOST_ATTEMPTS else "failed")
        store.requeue_interrupted()
    failure = _only(store, "search").failure
    assert failure
    assert re.search(r"its worker died 5 times without getting further; .* \(KeyError: 'none'", failure)


def test_what_a_gpu_answers_tells_whether_it_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here is none: what PyTorch says of one stands in for it."""
    assert trials.computes(CPU)

    def says(error: Exception) -> None:
        def synchronize(_device: torch.device) -> NoReturn:
            raise error

        monkeypatch.setattr(torch.cuda, "synchronize", synchronize)

    says(RuntimeError("CUDA error: device-side assert triggered"))
    assert not trials.computes(torch.device("cuda"))
    says(torch.OutOfMemoryError("CUDA out of memory"))
    assert trials.computes(torch.device("cuda")), "another process may have all of its memory"


@pytest.mark.usefixtures("no_threads_more")
def test_a_checkpoint_that_cannot_be_kept_gives_the_trial_back_and_says_why(
    store: StudyStore, config: StudyConfig, digits: Dataset
) -> None:
    """Here the folder has become a file: no setting is to blame for that, and none would do better."""
    shutil.rmtree(config.folder / "artifacts")
    (config.folder / "artifacts").touch()
    with pytest.raises(WorkerError, match=r"a training could not be kept: \w+Error: "):
        run_trial(_claimed(store, "search", PARAMS), "search", _plan(config, digits), store)
    assert _only(store, "search").state == "waiting"
    assert store.requeue_interrupted() == 1
    assert _only(store, "search").state == "waiting"


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_no_part_of_a_batch_is_a_single_image(size: int, digits: Dataset) -> None:
    """Batch normalisation takes none: half the batch would be an error that says nothing of memory."""
    some = digits.train[np.arange(2 * size)]
    recipe = recipe_of("compact", epochs=1, learning_rate=1e-3, augmentation=digits.augmentation, images=len(some))
    recipe = replace(recipe, batch_size=size, accumulation=2)
    trained = train(
        "compact", HeadSpec("ce"), some, digits.validation, num_classes=10, seed=0, device=CPU, recipe=recipe
    )
    assert trained.confusion.sum() == len(digits.validation)


@pytest.mark.usefixtures("no_threads_more")
@pytest.mark.parametrize("enough", [True, False])
def test_where_memory_runs_out_half_the_batch_is_tried_once(
    enough: bool, store: StudyStore, config: StudyConfig, digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch itself says so, asked for a petabyte."""
    parts = []

    def hungry(*arguments: Any, recipe: Recipe, **options: Any) -> Any:
        parts.append(recipe.accumulation)
        if not enough or recipe.accumulation == 1:
            torch.empty(2**50)
        return train(*arguments, recipe=recipe, **options)

    monkeypatch.setattr(trials, "train", hungry)
    run_trial(_claimed(store, "search", PARAMS), "search", _plan(config, digits), store)
    assert parts == [1, 2]
    record = _only(store, "search")
    if enough:
        assert (record.state, record.failure) == ("complete", None)
    else:
        assert record.state == "failed"
        assert record.failure
        assert record.failure.startswith("out of memory on cpu, also with half the batch at a time (RuntimeError: ")
        assert record.failure.endswith("fewer workers there, or a smaller --image-size")
        assert store.requeue_blameless() == 1


@pytest.mark.usefixtures("no_threads_more")
def test_epochs_that_are_searched_are_those_that_are_trained(
    store: StudyStore, config: StudyConfig, digits: Dataset
) -> None:
    """The baseline, of which they are not searched, has the data set's own."""
    plan = _plan(config.model_copy(update={"epochs": (1.0, 3.0)}), digits)
    for epochs in (3, 1):
        run_trial(_claimed(store, "search", {**PARAMS, "epochs": epochs}), "search", plan, store)
    records = store.records("search")
    assert [(r.state, r.epoch, r.params["epochs"], r.curve[-1].epoch) for r in records] == [
        ("complete", 3, 3, 3),
        ("complete", 1, 1, 1),
    ]
    assert plan.epochs_of({}) == digits.epochs
    run_trial(_claimed(store, "finalists", {**records[1].params}, seed=1), "finalists", plan, store)
    assert [r.epoch for r in store.records("finalists")] == [1]


def test_what_failed_keeps_the_epochs_it_had(
    store: StudyStore, config: StudyConfig, digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trials, "PUBLISH_SECONDS", math.inf)
    plan = _plan(config.model_copy(update={"epochs": 3}), digits)
    steps = 0

    def in_the_second_epoch() -> None:
        nonlocal steps
        steps += 1
        if steps > 1.5 * (len(digits.train) // 128):
            raise ValueError("it broke")

    run_trial(_claimed(store, "search", PARAMS, seed=7), "search", plan, store, in_the_second_epoch)
    (record,) = store.records("search")
    assert (record.state, record.epoch, [scores.epoch for scores in record.curve]) == ("failed", 1, [1])


def test_a_storage_hears_of_a_short_training_once(
    store: StudyStore, config: StudyConfig, digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a longer one now and then; the curves are whole in the end."""
    plan = _plan(config.model_copy(update={"epochs": 3}), digits)
    heard: list[int] = []
    note = Trial.set_user_attr

    def counted(trial: Trial, name: str, value: Any) -> None:
        if name == "epoch":
            heard.append(value)
        note(trial, name, value)

    monkeypatch.setattr(Trial, "set_user_attr", counted)
    for seconds, expected in ((math.inf, [3]), (-1.0, [1, 2, 3])):
        monkeypatch.setattr(trials, "PUBLISH_SECONDS", seconds)
        run_trial(_claimed(store, "search", PARAMS, seed=7), "search", plan, store)
        assert heard == expected
        heard.clear()
    once, each = store.optuna_study("search").trials
    assert once.intermediate_values == each.intermediate_values
    assert [*once.intermediate_values] == [1, 2, 3]
    first, second = store.records("search")
    assert (first.curve, first.epoch) == (second.curve, second.epoch)


@pytest.mark.usefixtures("no_threads_more")
def test_a_training_that_was_given_back_goes_on_to_the_very_same_model(
    store: StudyStore, config: StudyConfig, digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And leaves nothing of its saved states behind."""
    monkeypatch.setattr(trials, "SAVE_SECONDS", 0.0)  # after each epoch
    monkeypatch.setattr(trials, "SAVE_SHARE", math.inf)
    plan = _plan(config.model_copy(update={"epochs": 3}), digits)
    run_trial(_claimed(store, "search", PARAMS, seed=7), "search", plan, store)

    steps = 0

    def in_the_second_epoch() -> str | None:
        nonlocal steps
        steps += 1
        return "SIGTERM" if steps > 1.5 * (len(digits.train) // 128) else None

    with pytest.raises(StoppedError, match="SIGTERM"):
        run_trial(_claimed(store, "search", PARAMS, seed=7), "search", plan, store, in_the_second_epoch)
    assert store.requeue_interrupted() == 1
    again = store.claim("search")
    assert again is not None
    run_trial(again, "search", plan, store)

    whole, resumed = store.records("search")
    assert store.optuna_study("search").trials[2].user_attrs["resumed_at"] == 1
    assert (resumed.state, resumed.sha256, resumed.accuracy) == ("complete", whole.sha256, whole.accuracy)
    assert (resumed.curve, resumed.confusion) == (whole.curve, whole.confusion)
    assert not list((config.folder / "artifacts").glob("resume-*"))


# --- beside the baseline ----------------------------------------------------------------------------------------------

BEFORE = {"important": [3], "folds": 2, "learning_rate": 4e-3}  # what is known while the baseline's models train


@pytest.fixture
def beside_the_baseline(store: StudyStore, config: StudyConfig, digits: Dataset) -> Plan:
    """What a trial of the search knows that is begun before the baseline is complete."""
    store.set("baseline", BEFORE)
    return Plan(config, digits, CPU).as_stored(store)


@pytest.fixture
def run_at_work(store: StudyStore) -> Iterator[None]:
    with store.held():
        yield


@pytest.mark.usefixtures("no_threads_more", "run_at_work")
@pytest.mark.parametrize("floor", [0.05, 0.99])
def test_a_trial_that_is_trained_before_its_floors_are_known_is_as_one_that_is_trained_after(
    floor: float, store: StudyStore, beside_the_baseline: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it misses its first fold's by far, and the other is spared."""
    looks: list[float] = []

    def settled(seconds: float) -> None:  # in the time between two looks
        looks.append(seconds)
        if len(looks) == 3:
            store.set("baseline", {**BEFORE, "floors": [floor, floor]})

    monkeypatch.setattr(trials, "time", SimpleNamespace(perf_counter=time.perf_counter, sleep=settled))
    run_trial(_claimed(store, "search", PARAMS, seed=7), "search", beside_the_baseline, store)
    assert looks == [trials.LOOK_SECONDS] * 3
    run_trial(_claimed(store, "search", PARAMS, seed=7), "search", beside_the_baseline.as_stored(store), store)
    assert len(looks) == 3
    before, after = store.records("search")
    assert replace(before, number=1, seconds=None, checkpoint=None) == replace(after, seconds=None, checkpoint=None)
    assert before.constraint == floor - (before.accuracy or 0.0)
    assert before.state == ("complete" if floor < 0.5 else "pruned")


@pytest.mark.usefixtures("no_threads_more", "run_at_work")
def test_a_trial_that_waits_for_its_floors_makes_way_for_the_model_that_they_wait_for(
    store: StudyStore, beside_the_baseline: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There may be no other worker. What was trained is kept."""
    trained = []

    def counted(*arguments: Any, **options: Any) -> Any:
        trained.append(options["seed"])
        return train(*arguments, **options)

    monkeypatch.setattr(trials, "train", counted)
    store.enqueue("baseline", {"learning_rate": 4e-3}, seed=1)
    run_trial(_claimed(store, "search", PARAMS, seed=7), "search", beside_the_baseline, store)
    assert trained == [7]
    assert _only(store, "search").state == "waiting"
    assert store.requeue_interrupted() == 1
    first = claim([store])
    assert first is not None
    assert first.stage == "baseline", "which comes first"
    run_trial(store.trial("baseline", first.trial_id), "baseline", beside_the_baseline, store)
    record, (frozen,) = _only(store, "baseline"), store.optuna_study("baseline").get_trials()
    assert frozen.value == record.accuracy, "not the recall of whoever is important"
    assert [*frozen.intermediate_values.values()] == [record.accuracy]
    assert record.recall is None
    assert not frozen.constraints
    store.set("baseline", {**BEFORE, "floors": [0.05, 0.05]})
    again = store.claim("search")
    assert again is not None
    run_trial(again, "search", beside_the_baseline.as_stored(store), store)
    assert trained == [7, 1, 7], "the first fold's model is not trained again"
    assert _only(store, "search").state == "complete"


@pytest.mark.usefixtures("no_threads_more", "run_at_work")
def test_a_trial_that_waits_for_its_floors_can_be_stopped(
    store: StudyStore, beside_the_baseline: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[float] = []

    def slept(seconds: float) -> None:
        assert len(looks) < 3, "it goes on waiting"
        looks.append(seconds)

    monkeypatch.setattr(trials, "time", SimpleNamespace(perf_counter=time.perf_counter, sleep=slept))
    trial = _claimed(store, "search", PARAMS, seed=7)
    with pytest.raises(StoppedError, match="SIGTERM"):
        run_trial(trial, "search", beside_the_baseline, store, lambda: "SIGTERM" if len(looks) == 2 else None)
    (frozen,) = store.optuna_study("search").trials
    assert frozen.user_attrs["resume"]["epochs"] == 1, "what was trained is kept"


@pytest.mark.usefixtures("no_threads_more")
def test_a_trial_does_not_wait_for_floors_that_no_run_is_there_to_settle(
    store: StudyStore, beside_the_baseline: Plan
) -> None:
    """Its worker may be one that joined, and has to leave in the end."""
    run_trial(_claimed(store, "search", PARAMS, seed=7), "search", beside_the_baseline, store)
    (frozen,) = store.optuna_study("search").trials
    assert frozen.state == OptunaState.FAIL
    assert frozen.user_attrs["resume"]["epochs"] == 1
    assert _only(store, "search").state == "waiting", "for the next run to queue it again"


# --- what is searched -------------------------------------------------------------------------------------------------

LOSSES: tuple[Loss, ...] = get_args(Loss)


MODELS = ("compact", "wide", "paper-cnn")  # that take images
# Lowest, highest, whether on a logarithmic scale; for ten classes.
SCALE, MARGIN = (3.1, 25.0, True), (0.0, 0.6, False)
WEIGHT, W_FP = (1.0, 32.0, True), (0.03, 8.0, True)
# What is searched beside the learning rate, with one important class and with classes 3 and 8.
SEARCHED: dict[Loss, tuple[dict[str, tuple[float, float, bool]], dict[str, tuple[float, float, bool]]]] = {
    "ce": ({}, {}),
    "wce": ({"weight": WEIGHT}, {"weight_3": WEIGHT, "weight_8": WEIGHT}),
    "crwwce": (
        {"w_fn": WEIGHT, "w_fp": W_FP},
        {"w_fn_3": WEIGHT, "w_fn_8": WEIGHT, "w_fp_3": W_FP, "w_fp_8": W_FP},
    ),
    "l2": ({"scale": SCALE}, {"scale": SCALE}),
    "arcface": ({"scale": SCALE, "margin": MARGIN}, {"scale": SCALE, "margin": MARGIN}),
    "camri": ({"scale": SCALE, "margin": MARGIN}, {"scale": SCALE, "margin_3": MARGIN, "margin_8": MARGIN}),
    "cosface-i": ({"scale": SCALE, "margin": MARGIN}, {"scale": SCALE, "margin_3": MARGIN, "margin_8": MARGIN}),
}


def _suggested(loss: Loss, important: Sequence[int], digits: Dataset, seed: int = 0) -> tuple[Trial, HeadSpec, float]:
    """A random trial of a search whose baseline had the learning rate 0.004."""
    config = StudyConfig(loss=loss)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    trial = study.ask()
    return (trial, *suggest(trial, "search", _plan(config, digits, important=tuple(important))))


@pytest.mark.parametrize("seed", [20_260_131, 2**31 - 1])
def test_a_sampler_takes_any_seed_that_a_study_may_have(seed: int, store: StudyStore) -> None:
    config = StudyConfig(seed=seed)
    assert make_sampler(config, seed=config.seed * 1_000 + 999) is not None
    assert worker_module._sampler(store, config, 999) is not None


def test_a_study_that_goes_on_does_not_draw_the_same_settings_again(
    config: StudyConfig, store: StudyStore, digits: Dataset
) -> None:
    """Each process has a sampler of its own, and what that draws before there is enough to learn from is random."""
    drawn = []
    for index in (0, 1, 0, 0):
        sampler = worker_module._sampler(store, config, index)
        store.enqueue("search", {})
        trial = store.claim("search", sampler)
        assert trial is not None
        drawn.append(suggest(trial, "search", _plan(config, digits))[1])
    assert len(set(drawn)) == 4
    assert trial is not None
    store.release(trial._trial_id, "interrupted in its first draw")
    store.requeue_interrupted()
    assert store.claim("search") is not None, "which goes on"
    store.enqueue("search", {})
    fresh = store.claim("search", worker_module._sampler(store, config, 0))
    assert fresh is not None
    assert suggest(fresh, "search", _plan(config, digits))[1] not in drawn
    assert _drawn(worker_module._sampler(store, config, 0)) == _drawn(worker_module._sampler(store, config, 0))


def _drawn(sampler: optuna.samplers.BaseSampler) -> float:
    return optuna.create_study(sampler=sampler).ask().suggest_float("x", 0, 1)


def test_every_loss_has_its_search_space() -> None:
    assert set(SPACES) == set(SEARCHED) == set(LOSSES)


@pytest.mark.parametrize("important", [(3,), (8, 3)])
@pytest.mark.parametrize("loss", LOSSES)
def test_each_loss_is_searched_over_its_own_parameters(loss: Loss, important: Sequence[int], digits: Dataset) -> None:
    trial, _, learning_rate = _suggested(loss, important, digits)
    expected = {**SEARCHED[loss][len(important) - 1], "learning_rate": (1e-3, 16e-3, True)}
    assert trial.distributions == {
        name: optuna.distributions.FloatDistribution(low, high, log=log) for name, (low, high, log) in expected.items()
    }
    assert set(parameter_names(loss, important)) == set(expected) - {"learning_rate"}
    assert learning_rate == trial.params["learning_rate"]


def test_the_baseline_is_searched_over_its_learning_rate_alone(digits: Dataset) -> None:
    trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)).ask()
    head, learning_rate = suggest(trial, "baseline", Plan(StudyConfig(loss="crwwce"), digits, CPU))
    assert head == HeadSpec("ce")
    assert trial.params == {"learning_rate": learning_rate}
    assert 1e-5 <= learning_rate <= 1


def test_one_parameter_for_each_important_class_that_has_one_of_its_own() -> None:
    assert parameter_names("camri", [14]) == {"scale": "scale", "margin": "margin"}
    assert parameter_names("cosface-i", [0]) == {"scale": "scale", "margin": "margin"}
    assert parameter_names("camri", [3, 8]) == {"scale": "scale", "margin_3": "margin", "margin_8": "margin"}
    assert parameter_names("arcface", [3, 8]) == {"scale": "scale", "margin": "margin"}
    assert parameter_names("wce", [3, 8]) == {"weight_3": "weight", "weight_8": "weight"}
    assert parameter_names("crwwce", [3, 12]) == {
        "w_fn_3": "w_fn",
        "w_fn_12": "w_fn",
        "w_fp_3": "w_fp",
        "w_fp_12": "w_fp",
    }


@pytest.mark.parametrize(
    ("loss", "params", "expected"),
    [
        ("ce", {}, HeadSpec("ce")),
        ("wce", {"weight_3": 2.0, "weight_8": 5.0}, HeadSpec("wce", weights={3: 2.0, 8: 5.0})),
        (
            "crwwce",
            {"w_fn_3": 2.0, "w_fn_8": 5.0, "w_fp_3": 0.1, "w_fp_8": 0.2},
            HeadSpec("crwwce", weights={3: 2.0, 8: 5.0}, w_fp={3: 0.1, 8: 0.2}),
        ),
        ("l2", {"scale": 9.0}, HeadSpec("l2", 9.0)),
        ("arcface", {"scale": 9.0, "margin": 0.3}, HeadSpec("arcface", 9.0, {3: 0.3, 8: 0.3})),
        ("camri", {"scale": 9.0, "margin_3": 0.3, "margin_8": 0.1}, HeadSpec("camri", 9.0, {3: 0.3, 8: 0.1})),
        ("cosface-i", {"scale": 9.0, "margin_3": 0.3, "margin_8": 0.1}, HeadSpec("cosface-i", 9.0, {3: 0.3, 8: 0.1})),
    ],
)
def test_parameters_go_to_the_classes_that_they_name(loss: Loss, params: dict[str, float], expected: HeadSpec) -> None:
    for important in ([3, 8], [8, 3]):
        assert head_spec(loss, {**params, "learning_rate": 0.1}, important) == expected


@pytest.mark.parametrize("important", [(3,), (8, 3), (1, 11, 0)])
@pytest.mark.parametrize("loss", LOSSES)
def test_what_is_suggested_reaches_the_loss_of_its_class(
    loss: Loss, important: tuple[int, ...], digits: Dataset
) -> None:
    """From the trial's parameters to the numbers in the loss: each once, at its class, and nowhere else."""
    trial, spec, _ = _suggested(loss, important, digits)
    head = spec.build(12, 5)

    def asked(name: str, c: int, otherwise: float) -> float:
        if c not in important:
            return otherwise
        return float(trial.params[name if len(important) == 1 else f"{name}_{c}"])

    assert getattr(head, "scale", None) == trial.params.get("scale")
    expected: dict[str, Any]
    match loss:
        case "wce":
            expected = {"weights": [asked("weight", c, 1) for c in range(12)]}
        case "crwwce":
            expected = {
                "w_fn": [asked("w_fn", c, 1) for c in range(12)],
                "w_fp": [[0.0 if k == c else asked("w_fp", c, 0) for k in range(12)] for c in range(12)],
            }
        case "arcface":
            expected = {"margins": [trial.params["margin"]] * 12}
        case "camri" | "cosface-i":
            expected = {"margins": [asked("margin", c, 0) for c in range(12)]}
        case _:
            expected = {}
    buffers = {name: buffer.tolist() for name, buffer in head.named_buffers()}
    assert set(buffers) == set(expected)
    for name, values in expected.items():
        assert torch.equal(torch.tensor(buffers[name]), torch.tensor(values))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("loss", LOSSES)
def test_what_a_trial_trains_is_what_is_rebuilt_for_inference(
    loss: Loss, model: Model, digits: Dataset, tmp_path: Path
) -> None:
    trial, spec, _ = _suggested(loss, (3,), digits)
    body = build_body(model, channels=1, image_size=8)
    classifier = Classifier(body, spec.build(10, body.embedding_size)).eval()
    save_weights(classifier.state_dict(), tmp_path / "weights")
    rebuilt = load_classifier(tmp_path / "weights", model_spec(digits, model, loss, trial.params))
    assert isinstance(rebuilt.head, NormFaceLoss if "scale" in trial.params else CrossEntropyLoss)
    pixels = digits.validation.pixels[:4]
    assert torch.equal(predict_logits(rebuilt, pixels, CPU), predict_logits(classifier, pixels, CPU))


@pytest.mark.usefixtures("no_threads_more")
@pytest.mark.parametrize(("loss", "model"), [("wce", "compact"), ("crwwce", "paper-cnn")])
def test_a_trial_of_another_loss_and_network_runs_like_any(
    loss: Loss, model: Model, config: StudyConfig, create: Create, tmp_path: Path
) -> None:
    config = config.model_copy(update={"loss": loss, "model": model, "limit": 130})
    few = open_dataset(config)
    store = create(config, few)
    (params, *_) = starting_points(config, [3], 10, 1e-3)
    run_trial(_claimed(store, "search", params), "search", _plan(config, few, baseline_learning_rate=1e-3), store)
    record = _only(store, "search")
    assert record.state == "complete", record.failure
    assert record.params == params
    assert record.constraint is not None
    assert store.fetch_checkpoint(record, tmp_path / "copy")
    classifier = load_classifier(tmp_path / "copy", model_spec(few, model, loss, record.params))
    answers = predict_logits(classifier, few.validation.pixels, CPU).argmax(dim=1)
    assert float((answers == few.validation.labels).float().mean()) == pytest.approx(record.accuracy)


@pytest.mark.parametrize("model", MODELS)
def test_a_trial_trains_by_the_recipe_of_its_network(
    model: Model, store: StudyStore, config: StudyConfig, digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes: list[Recipe] = []

    def caught(*_: Any, recipe: Recipe, **__: Any) -> None:
        recipes.append(recipe)
        raise RuntimeError("caught")

    monkeypatch.setattr("camri_tune.trials.train", caught)
    plan = _plan(config.model_copy(update={"model": model, "epochs": 9}), digits)
    run_trial(_claimed(store, "search", {**PARAMS, "learning_rate": 2e-3}), "search", plan, store)
    assert recipes == [
        recipe_of(model, epochs=9, learning_rate=2e-3, augmentation=digits.augmentation, images=len(digits.train))
    ]


@given(
    loss=st.sampled_from(LOSSES),
    important=st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True),
    num_classes=st.integers(2, 10_000),
    learning_rate=st.floats(1e-6, 1),
)
@settings(deadline=None)
def test_starting_points_lie_inside_the_ranges(
    loss: Loss, important: list[int], num_classes: int, learning_rate: float
) -> None:
    config = StudyConfig(loss=loss)
    points = starting_points(config, important, num_classes, learning_rate)
    space = search_space(config, important, num_classes, learning_rate)
    assert len(points) == {"ce": 1, "l2": 5}.get(loss, 6)
    assert points[0]["learning_rate"] == learning_rate, "the baseline's own comes first"
    assert len({tuple(sorted(point.items())) for point in points}) == len(points), "no training twice"
    for point in points:
        assert set(point) == set(space) == {"learning_rate", *parameter_names(loss, important)}
        for name, value in point.items():
            assert isinstance(space[name], SearchRange)
            assert nearest(value, space[name]) == value, name
        assert learning_rate / 4 <= point.pop("learning_rate") <= 4 * learning_rate, "the range that is searched"
        for name, value in point.items():
            kind = re.sub(r"_\d+$", "", name)
            low, high, _ = SEARCHED[loss][0][kind]
            assert kind == "scale" or low <= value <= high  # scales by the number of classes: below


def test_the_first_trials_are_spread_over_margins_and_begin_with_a_careful_one() -> None:
    points = starting_points(StudyConfig(), [3], 10, 4e-3)
    assert points[0] == {"learning_rate": 4e-3, "scale": 6.2, "margin": 0.2}
    _, highest, _ = MARGIN
    assert sorted(point["margin"] for point in points) == pytest.approx([highest * i / 6 for i in range(1, 7)])
    assert {point["learning_rate"] for point in points} == {2e-3, 4e-3, 8e-3}


@pytest.mark.parametrize("loss", ["l2", "arcface", "camri", "cosface-i"])
@pytest.mark.parametrize(
    ("num_classes", "searched", "first"),
    [
        (2, (0.98, 7.8), {1.5, 2.0, 2.9}),
        (3, (0.98, 7.8), {1.5, 2.0, 2.9}),
        (10, (3.1, 25), {4.7, 6.2, 9.4}),
        (43, (5.3, 42), {8.0, 11.0, 16.0}),
        (1000, (9.8, 78), {15.0, 20.0, 29.0}),
    ],
)
def test_scales_are_of_the_size_that_so_many_classes_need(
    loss: Loss, num_classes: int, searched: tuple[float, float], first: set[float]
) -> None:
    """One to eight times AdaCos's fixed scale, sqrt(2) log(C - 1)."""
    config = StudyConfig(loss=loss)
    space = search_space(config, [1], num_classes, 4e-3)
    assert space["scale"] == SearchRange(low=searched[0], high=searched[1], log=True)
    assert {point["scale"] for point in starting_points(config, [1], num_classes, 4e-3)} == first


@pytest.mark.parametrize("fixed", [{"model": "head"}, {"trainable": "head"}])
def test_embeddings_that_do_not_learn_need_larger_scales(fixed: dict[str, Any]) -> None:
    config = StudyConfig.build(fixed)
    assert search_space(config, [1], 3, 4e-3)["scale"] == SearchRange(low=4.0, high=64.0, log=True)
    assert {point["scale"] for point in starting_points(config, [1], 3, 4e-3)} == {7.0, 10.0, 17.0}
    in_part = StudyConfig.build({"trainable": "last:1"})
    assert search_space(in_part, [1], 3, 4e-3) == search_space(StudyConfig(), [1], 3, 4e-3)


def test_a_trial_is_searched_by_the_number_of_its_own_classes() -> None:
    three = cast(Dataset, SimpleNamespace(classes=("a", "b", "c")))
    trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)).ask()
    suggest(trial, "search", _plan(StudyConfig(), three, important=(1,)))
    expected = search_space(StudyConfig(), [1], 3, 4e-3)["scale"]
    assert isinstance(expected, SearchRange)
    assert trial.distributions["scale"] == optuna.distributions.FloatDistribution(expected.low, expected.high, log=True)


def test_every_important_class_starts_alike() -> None:
    config = StudyConfig(loss="crwwce")
    for one, two in zip(starting_points(config, [3], 10, 1e-3), starting_points(config, [3, 8], 10, 1e-3), strict=True):
        assert two["w_fn_3"] == two["w_fn_8"] == one["w_fn"]
        assert two["w_fp_3"] == two["w_fp_8"] == one["w_fp"]


@pytest.mark.parametrize("loss", LOSSES)
def test_a_search_tries_every_starting_point_as_it_stands(
    loss: Loss, store: StudyStore, digits: Dataset, config: StudyConfig
) -> None:
    """A point outside its distribution would be moved or dropped by Optuna."""
    config = config.model_copy(update={"loss": loss})
    points = starting_points(config, [8, 3], 10, 4e-3)
    plan = _plan(config, digits, important=(8, 3))
    for point in points:
        trial = _claimed(store, "search", point)
        suggest(trial, "search", plan)
        assert trial.params == point


def test_what_chooses_a_setting_is_not_what_judges_it() -> None:
    """Seeds of replicates, of the search and of the baseline's tuning are apart, also between studies."""
    for seed in (0, 1, 2**31 - 1):
        config = StudyConfig(seed=seed)
        replicates = {config.replicate_seed(index) for index in range(1_000)}
        search = {seed * 100_000 + 10_000 + number for number in range(1_000)}  # as the first test of a trial has it
        assert not replicates & search
        assert config.tuning_seed not in replicates | search
        assert {value // 100_000 for value in replicates | search | {config.tuning_seed}} == {seed}


# --- folds ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_threads_more")
@pytest.mark.parametrize("floor", [0.99, 0.05])
def test_a_trial_that_misses_the_floor_by_far_on_its_first_fold_is_spared_the_others(
    floor: float, config: StudyConfig, digits: Dataset, create: Create
) -> None:
    store = create(config, digits)
    trial = _claimed(store, "search", {**PARAMS, "learning_rate": 1e-3})
    run_trial(trial, "search", _plan(config, digits, floors=(floor, 0.5)), store)
    record = store.records("search")[-1]
    as_stored = store.optuna_study("search").get_trials()[-1]
    confusion = np.array(as_stored.user_attrs["confusion"])
    assert record.accuracy == np.trace(confusion) / confusion.sum()
    assert as_stored.state == OptunaState.COMPLETE, "else the sampler would not learn from it"
    assert as_stored.value == record.recall
    assert record.seconds is not None
    assert record.accuracy is not None
    if floor == 0.99:
        assert (record.state, record.epoch, record.checkpoint) == ("pruned", 1, None)
        assert confusion.sum() == len(digits.validation)
        assert record.constraint == 0.99 - record.accuracy, "the floor of the fold that it was trained on"
        assert record.constraint > 0
        assert not record.feasible
    else:
        assert (record.state, record.epoch) == ("complete", 2)
        assert record.checkpoint is not None
        assert confusion.sum() == sum(len(digits.fold(fold)[1]) for fold in range(2))
        assert record.constraint == pytest.approx(pooled_floor((floor, 0.5), digits, [0, 1]) - record.accuracy)


@pytest.mark.usefixtures("no_threads_more")
def test_a_miss_that_the_images_of_a_fold_leave_in_doubt_stops_nothing(
    config: StudyConfig, digits: Dataset, create: Create
) -> None:
    store = create(config, digits)

    def tried(floor: float) -> TrialRecord:
        run_trial(
            _claimed(store, "search", PARAMS, seed=1), "search", _plan(config, digits, floors=(floor, 0.0)), store
        )
        return store.records("search")[-1]

    first = tried(1.0)  # which no doubt is about
    assert first.state == "pruned"
    assert first.accuracy is not None
    doubt = 3 * math.sqrt(2 * first.accuracy * (1 - first.accuracy) / len(digits.validation))
    assert tried(first.accuracy + 0.5 * doubt).state == "complete"
    assert tried(min(first.accuracy + 2 * doubt, 1.0)).state == "pruned"


@pytest.mark.usefixtures("no_threads_more")
def test_a_hard_fold_after_the_first_stops_no_trial(config: StudyConfig, digits: Dataset, create: Create) -> None:
    store = create(config, digits)
    run_trial(_claimed(store, "search", PARAMS), "search", _plan(config, digits, floors=(0.05, 1.0, 1.0)), store)
    assert _only(store, "search").state == "complete"


@pytest.mark.usefixtures("no_threads_more")
@pytest.mark.parametrize("stage", ["search", "finalists"])
def test_a_trial_on_one_fold_is_never_stopped(
    stage: Stage, config: StudyConfig, digits: Dataset, create: Create
) -> None:
    store = create(config, digits)
    trial = _claimed(store, stage, {**PARAMS, "learning_rate": 1e-3}, seed=1)
    run_trial(trial, stage, _plan(config, digits, floors=(0.99,) if stage == "search" else (0.99, 0.99)), store)
    record = store.records(stage)[-1]
    assert (record.state, record.feasible) == ("complete", False)
    assert record.checkpoint is not None


def test_the_floors_of_folds_weigh_as_much_as_their_images() -> None:
    """The accuracy over folds is that of all their images together: so is the floor that it must keep."""
    folds = {0: (None, [0] * 100), 1: (None, [0] * 300)}
    data = cast(Dataset, SimpleNamespace(fold=folds.__getitem__))
    for asked, floor in (([0, 1], 0.6), ([0], 0.9), ([1], 0.5)):
        assert pooled_floor((0.9, 0.5), data, asked) == pytest.approx(floor)
