"""The Optuna dashboard on a study: what its view says of constraints, what is served, and what a person sees."""

import csv
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any
from wsgiref.util import setup_testing_defaults

import optuna
import optuna_dashboard
import pytest
import sqlalchemy
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from optuna.artifacts import get_all_artifact_meta
from optuna.artifacts.exceptions import ArtifactNotFound
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, create_trial
from optuna.trial import TrialState as OptunaState

from camri_tune.config import StudyConfig
from camri_tune.dashboard import UNKNOWN_CONSTRAINT, DashboardStorage, StudyArtifacts, application, serve
from camri_tune.database import SqlStorage, Storage, open_storage
from camri_tune.datasets import Dataset, open_dataset
from camri_tune.errors import InputError
from camri_tune.overview import RESULT, read_overview
from camri_tune.records import STOPPED
from camri_tune.search import Plan
from camri_tune.storage import Stage, StudyStore, storage_url
from camri_tune.study_note import publish
from camri_tune.trials import run_trial
from tests.command import COMMAND, assert_one_line_error, camri_tune

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

LEARNING_RATE = FloatDistribution(1e-5, 1.0, log=True)
FLOOR = 0.9
FEASIBLE, INFEASIBLE, PRUNED, FAILED, RUNNING, UNKNOWN = range(6)  # numbers of the trials of `hand_made`


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return open_dataset(StudyConfig(limit=200))


def _trial(
    recall: float | None = None,
    shortfall: float | None = None,
    state: OptunaState = OptunaState.COMPLETE,
    **attributes: Any,
) -> FrozenTrial:
    """A trial as a worker leaves it; `shortfall` is what its accuracy misses the floor by."""
    if recall is not None:
        attributes["recall"] = recall
    if shortfall is not None:
        attributes["accuracy"] = FLOOR - shortfall
    return create_trial(
        state=state,
        value=recall if state == OptunaState.COMPLETE else None,
        params={"learning_rate": 0.01},
        distributions={"learning_rate": LEARNING_RATE},
        user_attrs={"recall_per_class": [recall or 0.0] * 10, "seconds": 1.5, **attributes},
        constraints=None if shortfall is None else {"accuracy": shortfall},
    )


def _adopt_baseline(store: StudyStore) -> None:
    learned = {
        "important": [3],
        "floors": [FLOOR],
        "search_floor": FLOOR,
        "learning_rate": 0.01,
        "recall_per_class": [0.5] * 10,
    }
    store.set("baseline", learned)
    schedule = {"planned": {"baseline": 4, "search": 8, "finalists": 2}, "epochs": 1, "workers": 1, "folds": 1}
    store.set("schedule", schedule)


def _fill(store: StudyStore) -> None:
    """One trial of each kind, in the order of their names above."""
    _adopt_baseline(store)
    study = store.optuna_study("search")
    study.add_trial(_trial(0.80, -0.02, checkpoint="c", sha256="s"))
    study.add_trial(_trial(0.95, 0.001, checkpoint="c", sha256="s"))
    study.add_trial(_trial(state=OptunaState.PRUNED))
    study.add_trial(_trial(state=OptunaState.FAIL, failure="ValueError: no (x.py:1)"))
    study.add_trial(_trial(state=OptunaState.RUNNING))
    study.add_trial(_trial(0.99))


@pytest.fixture
def config(tmp_path: Path) -> StudyConfig:
    return StudyConfig.build({"name": "study", "out": tmp_path, "epochs": 1, "important": "3", "limit": 200})


@pytest.fixture
def empty_store(config: StudyConfig, digits: Dataset, empty_database: Path) -> StudyStore:
    config.folder.mkdir(parents=True)
    shutil.copy(empty_database, config.folder / "study.db")
    return StudyStore.create(open_storage(storage_url(config)), config, digits)


@pytest.fixture(params=["sqlite", "postgres"])
def any_store(request: pytest.FixtureRequest, config: StudyConfig, digits: Dataset) -> Iterator[StudyStore]:
    """The hand-made study on each kind of database."""
    if request.param == "sqlite":
        store: StudyStore = request.getfixturevalue("empty_store")
    else:
        config = config.model_copy(update={"name": f"study-{time.monotonic_ns()}"})
        store = StudyStore.create(open_storage(request.getfixturevalue("postgres")), config, digits)
    _fill(store)
    yield store
    store.storage.close()  # connections to a server are not left to the garbage collector


@pytest.fixture
def store(empty_store: StudyStore) -> StudyStore:
    """The hand-made study on SQLite."""
    _fill(empty_store)
    return empty_store


Ask = Callable[..., tuple[int, bytes]]


def _asking(app: Any) -> Ask:
    """Ask a WSGI application as a server would, without one."""

    def ask(path: str, method: str = "GET", body: object = None) -> tuple[int, bytes]:
        sent = b"" if body is None else json.dumps(body).encode()
        environ: dict[str, Any] = {"CONTENT_TYPE": "application/json", "CONTENT_LENGTH": str(len(sent))}
        setup_testing_defaults(environ)
        path, _, query = path.partition("?")
        environ |= {"REQUEST_METHOD": method, "PATH_INFO": path, "QUERY_STRING": query, "wsgi.input": BytesIO(sent)}
        status: list[str] = []
        answer = app(environ, lambda line, headers, *_: status.append(line))
        content = b"".join(answer)
        if hasattr(answer, "close"):
            answer.close()
        return int(status[0].split()[0]), content

    return ask


def _detail(ask: Ask, study_id: int) -> dict[str, Any]:
    status, content = ask(f"/api/studies/{study_id}")
    assert status == 200, content
    detail: dict[str, Any] = json.loads(content, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    return detail


def _id(store: StudyStore, suffix: str = "") -> int:
    return store.storage.get_study_id_from_name(store.name + suffix)


def _rows(storage: Storage) -> dict[str, list[tuple[Any, ...]]]:
    """Everything in the database."""
    assert isinstance(storage, SqlStorage)
    tables = sqlalchemy.MetaData()
    tables.reflect(storage.engine)
    with storage.engine.connect() as connection:
        return {
            name: sorted(map(tuple, connection.execute(sqlalchemy.select(table))), key=str)
            for name, table in tables.tables.items()
        }


# --- the view ---------------------------------------------------------------------------------------------------------


def test_the_view_shows_which_trials_meet_the_floor(any_store: StudyStore) -> None:
    trials = DashboardStorage(any_store.storage).get_all_trials(_id(any_store), deepcopy=False)
    shown = [trial.system_attrs.get("constraints") for trial in trials]
    assert shown[FEASIBLE] == [-0.02]
    assert shown[INFEASIBLE] == [0.001]
    assert shown[PRUNED] == shown[UNKNOWN] == [UNKNOWN_CONSTRAINT]
    assert shown[FAILED] is None
    assert shown[RUNNING] is None
    assert trials[FEASIBLE].constraints["accuracy"] == -0.02


def test_the_best_trial_is_feasible_where_others_have_a_higher_recall(any_store: StudyStore) -> None:
    assert any_store.storage.get_best_trial(_id(any_store)).number == UNKNOWN, (
        "what the dashboard says without the view"
    )
    best = DashboardStorage(any_store.storage).get_best_trial(_id(any_store))
    assert best.number == FEASIBLE
    record = read_overview(any_store).best
    assert record is not None
    assert record.number == best.number, "as every other display has it"


def test_the_api_gives_constraints_and_the_feasible_best(any_store: StudyStore) -> None:
    detail = _detail(_asking(application(any_store)), _id(any_store))
    assert [t["number"] for t in detail["best_trials"]] == [FEASIBLE]
    feasible = [all(c <= 0 for c in t["constraints"]) for t in detail["trials"]]
    assert [n for n, yes in enumerate(feasible) if not yes] == [INFEASIBLE, PRUNED, UNKNOWN]


def test_looking_alters_nothing(any_store: StudyStore) -> None:
    before = _rows(any_store.storage)
    ask, study_id = _asking(application(any_store)), _id(any_store)
    for path in ("/", "/dashboard", "/api/meta", "/api/studies", f"/api/studies/{study_id}", f"/csv/{study_id}"):
        assert ask(path)[0] in (200, 302), path
    view = DashboardStorage(any_store.storage)
    for trial in view.get_all_trials(study_id):
        view.get_trial(trial._trial_id)
    view.get_best_trial(study_id)
    assert _rows(any_store.storage) == before


def test_where_nothing_is_feasible_there_is_no_best_trial(empty_store: StudyStore) -> None:
    study = empty_store.optuna_study("search")
    ask, study_id = _asking(application(empty_store)), _id(empty_store)
    assert _detail(ask, study_id)["best_trials"] == []
    study.add_trial(_trial(0.99))
    study.add_trial(_trial(0.95, 0.001))
    detail = _detail(_asking(application(empty_store)), study_id)
    assert detail["best_trials"] == []
    assert len(detail["trials"]) == 2
    with pytest.raises(ValueError, match="No feasible trials"):
        optuna.load_study(study_name=study.study_name, storage=DashboardStorage(empty_store.storage)).best_trial  # noqa: B018


def test_a_study_without_constraints_is_as_optuna_has_it(empty_store: StudyStore) -> None:
    study = empty_store.optuna_study("baseline")
    study.add_trial(create_trial(value=0.7))
    study.add_trial(create_trial(value=0.9))
    study.add_trial(create_trial(state=OptunaState.PRUNED))
    detail = _detail(_asking(application(empty_store)), _id(empty_store, ".baseline"))
    assert [t["number"] for t in detail["best_trials"]] == [1]
    assert [t["constraints"] for t in detail["trials"]] == [[], [], []]


def test_a_study_of_others_in_the_same_storage_is_shown_too(store: StudyStore) -> None:
    old = optuna.create_study(storage=store.storage, study_name="old", direction="minimize")
    for value, constraint in ((0.1, 1.0), (0.3, -1.0), (0.2, 0.0)):
        old.add_trial(create_trial(value=value, system_attrs={"constraints": [constraint]}))
    two = optuna.create_study(storage=store.storage, study_name="two", directions=["minimize", "maximize"])
    two.add_trial(create_trial(values=[1.0, 2.0]))
    ask = _asking(application(store))
    assert [t["number"] for t in _detail(ask, old._study_id)["best_trials"]] == [2]
    assert [t["number"] for t in _detail(ask, two._study_id)["best_trials"]] == [0]
    assert len(json.loads(ask("/api/studies")[1])["study_summaries"]) == 5


KEYS = ("accuracy", "0", "1", "latency")
CONSTRAINTS = st.dictionaries(st.sampled_from(KEYS), st.floats(allow_nan=False), max_size=3)
ENDED = st.sampled_from([OptunaState.COMPLETE, OptunaState.PRUNED, OptunaState.FAIL])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=st.lists(st.tuples(ENDED, st.integers(0, 3), CONSTRAINTS), max_size=5))
def test_of_any_study_the_view_shows_what_its_trials_are(
    store: StudyStore, drawn: list[tuple[OptunaState, int, dict[str, float]]]
) -> None:
    """Whatever constraints are called and hold: feasible is who recorded them all met, and the best is one of those."""
    study = optuna.create_study(storage=store.storage, direction="maximize")
    for state, value, constraints in drawn:
        complete = state == OptunaState.COMPLETE
        study.add_trial(create_trial(state=state, value=value if complete else None, constraints=constraints))
    constrained = any(constraints for _, _, constraints in drawn)
    detail = _detail(_asking(application(store)), study._study_id)

    def is_fine(state: OptunaState, constraints: dict[str, float]) -> bool:
        if constrained and not constraints:
            return state == OptunaState.FAIL
        return all(value <= 0 for value in constraints.values())

    judged = [is_fine(state, constraints) for state, _, constraints in drawn]
    assert [all(c <= 0 for c in t["constraints"]) for t in detail["trials"]] == judged
    candidates = [
        (-value, number)
        for number, (state, value, _) in enumerate(drawn)
        if state == OptunaState.COMPLETE and judged[number]
    ]
    best = [t["number"] for t in detail["best_trials"]]
    if constrained:
        assert best == [number for _, number in sorted(candidates)[:1]]
    else:
        assert [drawn[number][1] for number in best] == [-value for value, _ in sorted(candidates)[:1]]
    assert [t.constraints for t in study.get_trials()] == [constraints for _, _, constraints in drawn]


def test_long_tables_are_left_to_the_artifacts_and_not_lost(store: StudyStore) -> None:
    """A confusion of 43 classes on one line would make a trial's page 8,000 pixels wide."""
    study = store.optuna_study("search")
    curves: dict[str, Any] = {"accuracy_curve": {"1": 0.91}, "recall_curve": {"1": [0.5] * 43}}
    study.add_trial(_trial(0.7, -0.01, confusion=[[10] * 43] * 43, **curves))
    ask = _asking(application(store))
    attributes = {a["key"] for a in _detail(ask, _id(store))["trials"][-1]["user_attrs"]}
    assert {"accuracy", "recall", "seconds", "accuracy_curve"} <= attributes
    assert attributes.isdisjoint({"confusion", "recall_curve"})
    assert store.records("search")[-1].confusion == ((10,) * 43,) * 43


def test_a_study_renamed_in_the_dashboard_keeps_what_was_stored(store: StudyStore) -> None:
    before = [trial.system_attrs for trial in store.optuna_study("search").get_trials()]
    status, _ = _asking(application(store))(f"/api/studies/{_id(store)}/rename", "POST", {"study_name": "other"})
    assert status == 201
    renamed = optuna.load_study(storage=store.storage, study_name="other")
    assert [trial.system_attrs for trial in renamed.get_trials()] == before


def test_plain_optuna_dashboard_works_on_the_same_storage(any_store: StudyStore) -> None:
    publish(read_overview(any_store), any_store)
    detail = _detail(_asking(optuna_dashboard.wsgi(any_store.storage)), _id(any_store))
    assert len(detail["trials"]) == 6
    assert "does not read the constraint" in detail["note"]["body"]
    assert {figure["id"] for figure in detail["plotly_graph_objects"]} == {"recall-accuracy", "search-history"}
    mended = _detail(_asking(application(any_store)), _id(any_store))
    assert [figure["id"] for figure in mended["plotly_graph_objects"]] == ["recall-accuracy", "search-history"]


# --- artifacts --------------------------------------------------------------------------------------------------------


def _with_artifact(store: StudyStore, content: bytes, tmp_path: Path) -> tuple[str, int, str]:
    """A running trial with a file: where the dashboard has it, the trial's id, and the artifact's."""
    store.enqueue("search", {"learning_rate": 0.01})
    trial = store.claim("search")
    assert trial is not None
    path = tmp_path / "file.csv"
    path.write_bytes(content)
    identifier = store.save_artifact(trial, path)
    return f"/artifacts/{_id(store)}/{trial._trial_id}/{identifier}", trial._trial_id, identifier


def test_artifacts_are_found_in_the_folders_of_all_studies_in_the_storage(
    empty_store: StudyStore, digits: Dataset, tmp_path: Path
) -> None:
    other_config = empty_store.config.model_copy(update={"name": "other", "out": tmp_path / "elsewhere"})
    other = StudyStore.create(empty_store.storage, other_config, digits)
    optuna.create_study(storage=empty_store.storage, study_name="alien").set_user_attr("config", 7)
    ask = _asking(application(empty_store))
    for store, content in ((empty_store, b"mine"), (other, b"another's")):
        url, _, identifier = _with_artifact(store, content, tmp_path)
        assert ask(url) == (200, content)
        (Path(store.artifacts_url) / identifier).unlink()
        assert ask(url)[0] == 404


def test_artifacts_are_read_only(empty_store: StudyStore, tmp_path: Path) -> None:
    url, trial_id, identifier = _with_artifact(empty_store, b"mine", tmp_path)
    ask, study_id = _asking(application(empty_store)), _id(empty_store)
    file = {"file": "data:text/plain;base64,AAAA", "filename": "a.txt"}
    for answer in (
        ask(f"/api{url}", "DELETE"),
        ask(f"/api/artifacts/{study_id}/{trial_id}", "POST", file),
        ask(f"/api/studies/{study_id}", "DELETE", {"remove_associated_artifacts": True}),
    ):
        assert answer[0] == 403
        assert b"read only" in answer[1]
    assert ask(url) == (200, b"mine")
    assert ask(f"/api/studies/{study_id}", "DELETE", {"remove_associated_artifacts": False})[0] == 204
    assert (Path(empty_store.artifacts_url) / identifier).read_bytes() == b"mine"
    with pytest.raises(ArtifactNotFound):
        StudyArtifacts(empty_store).open_reader("0" * 8)


def _run(store: StudyStore, stage: Stage, digits: Dataset, floors: tuple[float, ...] = (0.01,)) -> FrozenTrial:
    """Train a trial of one stage for real."""
    store.enqueue(stage, {"learning_rate": 0.01})
    trial = store.claim(stage)
    assert trial is not None
    floors = () if stage == "baseline" else floors
    important = () if stage == "baseline" else (3,)
    plan = Plan(store.config, digits, torch.device("cpu"), important, floors, 0.01, folds=len(floors))
    run_trial(trial, stage, plan, store)
    return store.optuna_study(stage).get_trials()[trial.number]


def _table(store: StudyStore, trial: FrozenTrial) -> list[list[str]]:
    """The trial's confusion as its artifact has it."""
    (found,) = (a for a in get_all_artifact_meta(trial, storage=store.storage) if a.filename == "confusion.csv")
    assert found.mimetype == "text/csv"
    text = StudyArtifacts(store).open_reader(found.artifact_id)
    with TextIOWrapper(text, encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def test_a_finished_trial_has_its_confusion_as_a_table_beside_its_model(
    empty_store: StudyStore, digits: Dataset
) -> None:
    names = [f"class {c}" for c in range(10)]
    stages: tuple[Stage, ...] = ("baseline", "search")
    for stage in stages:
        trial = _run(empty_store, stage, digits)
        assert trial.state == OptunaState.COMPLETE, trial.user_attrs
        model, table = sorted(get_all_artifact_meta(trial, storage=empty_store.storage), key=lambda a: a.filename)[::-1]
        assert (model.filename, table.filename) == ("model.safetensors", "confusion.csv")
        assert trial.user_attrs["checkpoint"] == model.artifact_id
        head, *rows = _table(empty_store, trial)
        assert head == [r"true \ predicted", *names]
        assert [row[0] for row in rows] == names
        assert [[int(count) for count in row[1:]] for row in rows] == trial.user_attrs["confusion"]


def test_a_pruned_trial_has_its_confusion_too(empty_store: StudyStore, digits: Dataset) -> None:
    trial = _run(empty_store, "search", digits, floors=(0.999, 0.999))
    assert STOPPED in trial.user_attrs
    assert [a.filename for a in get_all_artifact_meta(trial, storage=empty_store.storage)] == ["confusion.csv"]
    counts = [[int(count) for count in row[1:]] for row in _table(empty_store, trial)[1:]]
    assert counts == trial.user_attrs["confusion"]


# --- note and figures -------------------------------------------------------------------------------------------------


def _note(store: StudyStore) -> str:
    return str(optuna_dashboard.get_note(store.optuna_study("search")))


def test_only_what_has_changed_is_published(any_store: StudyStore) -> None:
    assert publish(read_overview(any_store), any_store) == ["note", "recall-accuracy", "search-history"]
    before = _rows(any_store.storage)
    assert publish(read_overview(any_store), any_store) == []
    assert _rows(any_store.storage) == before
    any_store.optuna_study("search").add_trial(_trial(0.85, -0.01, checkpoint="c", sha256="s"))
    assert "note" in publish(read_overview(any_store), any_store)
    assert "Trial **6**: recall 85.00%" in _note(any_store)


def test_the_note_says_how_the_study_stands(empty_store: StudyStore) -> None:
    publish(read_overview(empty_store), empty_store)
    assert "baseline is still training" in _note(empty_store)
    assert "Nothing is trained yet" in _note(empty_store)
    assert "None has met the floor yet" in _note(empty_store)
    _fill(empty_store)
    publish(read_overview(empty_store), empty_store)
    note = _note(empty_store)
    for words in (
        "recall of **3** with loss `camri`",
        "at least 90.00%",
        "Search: 5 of 8 done",
        f"Trial **{FEASIBLE}**: recall 80.00%, accuracy 92.00%, `learning_rate` 0.01",
        "candidate on validation, not a result",
        "writes `study/best`",
        "`camri-tune dashboard study`",
        "As of 2",
    ):
        assert words in note


def test_the_note_of_a_running_study_says_how_long_it_takes(store: StudyStore, config: StudyConfig) -> None:
    with store.held():
        publish(read_overview(store), store)
    assert re.search(r"Search: 5 of 8 done\. About \d+ s to go in all", _note(store))


@pytest.mark.parametrize(
    ("best", "words"),
    [({"trial": 5}, "`study/best` is a model with the parameters of trial 5"), (None, "nothing is exported")],
)
def test_the_note_has_the_result(
    store: StudyStore, config: StudyConfig, best: dict[str, int] | None, words: str
) -> None:
    lists: dict[str, list[str]] = {key: [] for key in ("notices", "provenance", "finalists")}
    figures = {"images": {}, "baseline": {}, "accuracy_difference": None, "best": best}
    result = {"verdict": "certified", "sentence": "Recall of 3 *rose*.", **lists, **figures}
    (config.folder / RESULT).write_text(json.dumps(result))
    store.set("stage", "done")
    publish(read_overview(store), store)
    note = _note(store)
    assert "The run is through" in note
    assert r"**Result.** Recall of 3 \*rose\*." in note
    assert words in note


# --- the command ------------------------------------------------------------------------------------------------------


@dataclass
class Served:
    url: str
    process: "subprocess.Popen[str]"
    said: str = ""

    @property
    def root(self) -> str:
        return self.url.split("/dashboard")[0]


@contextmanager
def _serving(*arguments: object, **environment: str) -> Iterator[Served]:
    """`camri-tune dashboard` until the block is left, then ended as Ctrl-C does."""
    command = [str(COMMAND), "dashboard", "--port", "0", *map(str, arguments)]
    # As from a terminal: where the tests run as a background job, interrupts are ignored, and that is inherited.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
    ) as process:
        assert process.stdout is not None
        served = Served(process.stdout.readline().strip(), process)
        try:
            assert served.url.startswith("http://127.0.0.1:"), process.communicate()
            yield served
        finally:
            process.send_signal(signal.SIGINT)
            rest, served.said = process.communicate(timeout=30)
    assert rest == "", "the URL is all of standard output"
    assert process.returncode == 0, served.said
    assert "Traceback" not in served.said


def _fetch(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=20) as answer:
        return json.loads(answer.read())


def test_the_command_serves_a_study_while_it_runs(store: StudyStore, config: StudyConfig) -> None:
    with _serving("study", "--out", config.out) as served:
        api = f"{served.root}/api/studies/{_id(store)}"
        assert [t["number"] for t in _fetch(api)["best_trials"]] == [FEASIBLE]
        stranger = urllib.request.Request(api, headers={"Host": f"evil.example:{served.root.rsplit(':', 1)[1]}"})
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(stranger, timeout=20)
        # Another browser that is slow to ask holds nobody up.
        with socket.create_connection(("127.0.0.1", int(served.root.rsplit(":", 1)[1]))):
            study = store.optuna_study("search")
            study.add_trial(_trial(0.9, -0.001))
            store.storage.set_trial_user_attr(study.get_trials()[RUNNING]._trial_id, "epoch", 1)
            study.tell(RUNNING, state=OptunaState.FAIL)
            deadline = time.monotonic() + 20
            while (detail := _fetch(api))["trials"][RUNNING]["state"] != "Fail" and time.monotonic() < deadline:
                time.sleep(0.3)
        assert detail["trials"][RUNNING]["state"] == "Fail"
        assert [t["number"] for t in detail["best_trials"]] == [6]
    assert served.said.splitlines() == [
        f"camri-tune: dashboard of study 'study' in sqlite:///{config.folder / 'study.db'}; Ctrl-C ends it",
        "camri-tune: dashboard ended",
    ], "no line for each request"


def test_the_password_of_a_database_is_not_shown_and_other_addresses_are_warned_of(
    postgres: str, config: StudyConfig, digits: Dataset
) -> None:
    password = sqlalchemy.make_url(postgres).password
    assert password
    named = config.model_copy(update={"name": f"study-{time.monotonic_ns()}"})
    store = StudyStore.create(open_storage(postgres), named, digits)
    _fill(store)
    with _serving(store.name, "--host", "0.0.0.0", CAMRI_STORAGE=postgres) as served:
        assert password not in json.dumps(_fetch(f"{served.root}/api/studies/{_id(store)}"))
    store.storage.close()
    assert password not in served.said
    assert "tester:***@127.0.0.1" in served.said
    warning = served.said.splitlines()[0]
    assert warning.startswith("camri-tune: warning: --host 0.0.0.0")
    assert "no login" in warning
    assert "delete" in warning


def test_a_whole_run_on_postgresql_can_be_looked_at_and_keeps_its_password(postgres: str, tmp_path: Path) -> None:
    password = sqlalchemy.make_url(postgres).password
    assert password
    small = ["--epochs", "1", "--trials", "2", "--seeds", "1", "--tolerance", "100", "--limit", "200", "--name", "pg"]
    done = camri_tune("run", *small, "--important", "8", "--storage", postgres, "--out", tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    said = [done.stdout + done.stderr]
    for command in ("status", "report"):
        done = camri_tune(command, "pg", "--out", tmp_path, CAMRI_STORAGE=postgres)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout + done.stderr)
    assert "pg: finished" in said[1]
    assert not (tmp_path / "pg" / "study.db").exists()
    with _serving("pg", "--out", tmp_path, CAMRI_STORAGE=postgres) as served:
        detail = _fetch(served.url.replace("/dashboard/studies/", "/api/studies/"))
    assert len(detail["trials"]) == 2
    assert len(detail["best_trials"]) == 1
    said += [json.dumps(detail), served.said]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert (tmp_path / "pg" / "report.html") in files
    assert not [path for path in files if password.encode() in path.read_bytes()]
    assert not [text for text in said if password in text]


def test_a_port_that_is_taken_is_one_line(store: StudyStore, config: StudyConfig) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = camri_tune("dashboard", "study", "--out", config.out, "--port", port)
    assert_one_line_error(done, f"--port {port}", "is in use on 127.0.0.1")


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid", "a" * 70, "2001:db8::1"])
def test_an_address_of_another_machine_is_an_error(store: StudyStore, host: str) -> None:
    with pytest.raises(InputError, match=f"--host '{host}'"):
        serve(store, host=host, port=0)


def test_an_unknown_study_is_one_line(store: StudyStore, config: StudyConfig) -> None:
    done = camri_tune("dashboard", "nosuch", "--out", config.out)
    assert_one_line_error(done, "'nosuch'", "study")


# --- as a person sees it ----------------------------------------------------------------------------------------------

PLOTS = "() => [...document.querySelectorAll('.js-plotly-plot')].flatMap(p => p.data.map(d => ({...d, plot: p.id})))"


@pytest.fixture
def page(browser: "Browser") -> Iterator["Page"]:
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    yield page
    page.close()


def test_what_is_on_the_page(page: "Page", empty_store: StudyStore, config: StudyConfig, digits: Dataset) -> None:
    """A trained trial that is feasible, and one beside it of higher recall that misses the floor by a hair."""
    _adopt_baseline(empty_store)
    _run(empty_store, "search", digits)
    (trained,) = empty_store.records("search")
    assert trained.feasible, trained
    empty_store.optuna_study("search").add_trial(_trial(1.0, 0.001))
    publish(read_overview(empty_store), empty_store)
    failures: list[str] = []
    page.on("console", lambda message: failures.append(message.text) if message.type == "error" else None)
    page.on("response", lambda answer: failures.append(answer.url) if answer.status >= 400 else None)
    with _serving("--out", config.out) as served:
        page.goto(served.url)
        page.get_by_text("Best Trial (number=0)").wait_for()
        page.wait_for_function("() => document.querySelectorAll('.js-plotly-plot .point').length > 4")
        traces = page.evaluate(PLOTS)
        history = {t["name"]: t for t in traces if t["plot"] == "plot-history"}
        assert list(history["Infeasible Trial of study"]["x"]) == [1]
        assert history["Infeasible Trial of study"]["marker"]["color"] == "#cccccc"
        assert list(history["recall of the important class of study"]["x"]) == [0]
        assert max(history["Best Value of study"]["y"]) == pytest.approx(trained.recall)
        for figure in ("recall-accuracy", "search-history"):
            assert page.locator(f"[id='user-defined-plot:{figure}'] svg.main-svg").first.is_visible()
        assert page.get_by_text("floor: 90.00 %").is_visible()

        page.goto(f"{served.url}/trials?numbers=0")
        card = page.get_by_text("confusion.csv").locator("xpath=ancestor::*[.//button][1]")
        card.get_by_role("button").first.click()
        page.get_by_text(r"true \ predicted").wait_for()
        table = [
            [cell.split("\n")[0] for cell in row.locator("th, td").all_inner_texts()]
            for row in page.locator("table").last.locator("tr").all()
        ]
        assert table[0] == [r"true \ predicted", *(f"class {c}" for c in range(10))]
        assert [[int(count) for count in row[1:]] for row in table[1:]] == [list(row) for row in trained.confusion]

        page.goto(f"{served.url}/note")
        page.get_by_text("candidate on validation, not a result").wait_for()
    assert failures == []
