"""What kills, full disks and lost databases leave behind: nothing lost, nothing twice, and the same command goes on.

Every worker and run here is a process of its own, every signal, disk and database server a real one.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import sqlalchemy
from optuna.trial import FrozenTrial
from optuna.trial import TrialState as OptunaState

import camri_tune
from camri_tune import heartbeat
from camri_tune.bundle import read_bundle
from camri_tune.config import StudyConfig
from camri_tune.database import open_storage
from camri_tune.datasets import open_dataset
from camri_tune.files import sha256
from camri_tune.heartbeat import WORKER
from camri_tune.storage import StudyStore, storage_url
from tests.command import assert_one_line_error, result_of, started
from tests.command import camri_tune as command
from tests.conftest import MakeFolder
from tests.database_server import DatabaseServer
from tests.dying import DOOMED, PLACES
from tests.patience import wait_for

PARAMS = [{"learning_rate": 4e-3, "scale": 16.0, "margin": margin} for margin in (0.1, 0.2)]
EPOCHS = 4
SAVED = {  # epochs from which a successor goes on, by the place of the death
    "after the claim": None,
    "in an epoch": 2,
    "in a state's write": 1,
    "in a checkpoint's write": 3,
    "between constraint and result": 3,
    "SIGTERM": 2,
    "SIGINT": 2,
}
_CHEAP = [
    "--limit",
    "400",
    "--seeds",
    "1",
    "--finalists",
    "1",
    "--tolerance",
    "100",
    "--important",
    "3",
    "--folds",
    "1",
]
SMALL = [*_CHEAP, "--epochs", "3", "--trials", "3"]
# Long enough to be caught in the act.
LONGER = [*_CHEAP, "--epochs", "12", "--trials", "5"]


# --- workers ----------------------------------------------------------------------------------------------------------


def _study(out: Path, database: Path, **options: Any) -> StudyStore:
    """A study with two trainings in its queue. The test holds it in the place of a run."""
    options = {"name": "f", "out": out, "epochs": EPOCHS, "important": "3", **options}
    config = StudyConfig.build(options)
    config.folder.mkdir(parents=True)
    shutil.copy(database, config.folder / "study.db")
    store = StudyStore.create(open_storage(storage_url(config)), config, open_dataset(config))
    store.set("stage", "running")
    floors = {"important": [3], "floors": [0.05], "search_floor": 0.05, "learning_rate": 4e-3}
    store.set("baseline", floors)
    for seed, params in enumerate(PARAMS):
        store.enqueue("search", params, seed=seed)
    return store


def _worker(store: StudyStore) -> "subprocess.CompletedProcess[str]":
    """One that does what is queued and ends, as nobody runs the study."""
    return command("worker", "--study", "f", "--storage", storage_url(store.config), "--threads", "1")


def _dying_worker(store: StudyStore, place: str) -> "subprocess.CompletedProcess[str]":
    arguments = [sys.executable, "-m", "tests.dying", place, "f", storage_url(store.config)]
    folder = Path(__file__).parents[1]
    return subprocess.run(arguments, cwd=folder, capture_output=True, text=True, check=False)


def _trials(store: StudyStore) -> list[FrozenTrial]:
    return store.optuna_study("search").get_trials()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> list[FrozenTrial]:
    """Both trainings as a worker ends them that nobody disturbs."""
    store = _study(tmp_path_factory.mktemp("undisturbed"), empty_database)
    done = _worker(store)
    assert done.returncode == 0, done.stderr
    trials = _trials(store)
    assert [t.state for t in trials] == [OptunaState.COMPLETE] * 2
    return trials


def _assert_same_result(trial: FrozenTrial, whole: FrozenTrial) -> None:
    for key in ("sha256", "confusion", "accuracy_curve", "recall_curve"):
        assert trial.user_attrs.get(key) == whole.user_attrs.get(key), key
    assert (trial.state, trial.value, trial.params) == (OptunaState.COMPLETE, whole.value, whole.params)
    assert trial.constraints == whole.constraints


def _assert_only_whole_files(store: StudyStore) -> None:
    """Under final names lies what trials name, as they name it, and nothing else."""
    folder, prefix = store.config.folder / "artifacts", "artifacts:"
    found = {path.name for path in folder.iterdir() if not path.name.endswith(".partial")}
    known = {f".study-{store.attributes['id']}"}
    for trial in _trials(store):
        files = {key.removeprefix(prefix) for key in trial.system_attrs if key.startswith(prefix)}
        known |= files
        if trial.state == OptunaState.COMPLETE:
            assert files <= found
            assert sha256(folder / trial.user_attrs["checkpoint"]) == trial.user_attrs["sha256"]
    assert found <= known


@pytest.mark.parametrize("place", PLACES)
def test_a_training_whose_worker_dies_anywhere_ends_as_if_nothing_had_been(
    place: str,
    undisturbed: list[FrozenTrial],
    tmp_path: Path,
    empty_database: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = _study(tmp_path, empty_database)
    died = _dying_worker(store, place)
    first, doomed = _trials(store)
    _assert_same_result(first, undisturbed[0])
    if place.startswith("SIG"):
        assert died.returncode == 130
        assert died.stderr == f"camri-tune: stopped ({place}); a training at hand was saved and given back\n"
        assert (doomed.state, doomed.user_attrs["failure"]) == (OptunaState.FAIL, f"given back: {place}")
    else:
        assert (died.returncode, died.stderr) == (-signal.SIGKILL, "")
        assert doomed.state == OptunaState.RUNNING
    assert bool(doomed.constraints) == (place == "between constraint and result")
    partial = list((store.config.folder / "artifacts").glob(".*.partial"))
    assert len(partial) == ("write" in place)

    if place == "after the claim":  # nobody knows whose it is: it is waited for somebody to say so
        assert store.requeue_interrupted() == 0
        monkeypatch.setattr(heartbeat, "CLAIM_SECONDS", 0.0)
    assert store.requeue_interrupted() == 1
    assert store.requeue_interrupted() == 0, "once"
    waiting = _trials(store)[-1]
    assert waiting.state == OptunaState.WAITING
    assert not waiting.constraints
    assert not {"checkpoint", "accuracy", "confusion", "recall"} & set(waiting.user_attrs)
    assert not [key for key in waiting.system_attrs if key.startswith("artifacts")]

    done = _worker(store)
    assert done.returncode == 0, done.stderr
    *_, given_up, again = trials = _trials(store)
    assert [t.state for t in trials] == [OptunaState.COMPLETE, OptunaState.FAIL, OptunaState.COMPLETE]
    assert (given_up.number, again.user_attrs["retry_of"]) == (DOOMED, DOOMED)
    assert again.user_attrs.get("resumed_at") == SAVED[place]
    _assert_same_result(again, undisturbed[1])
    _assert_same_result(trials[0], undisturbed[0])
    assert [r.number for r in store.records("search")] == [0, 2], "the training counts once"
    _assert_only_whole_files(store)


@pytest.mark.parametrize("damage", ["cut short", "altered", "gone"])
def test_a_damaged_state_is_not_gone_on_from(
    damage: str, undisturbed: list[FrozenTrial], tmp_path: Path, empty_database: Path
) -> None:
    store = _study(tmp_path, empty_database)
    _dying_worker(store, "SIGTERM")
    (state,) = (store.config.folder / "artifacts").glob("resume-*")
    content = bytearray(state.read_bytes())
    match damage:
        case "cut short":
            state.write_bytes(content[:-100])
        case "altered":
            content[-1] ^= 1
            state.write_bytes(content)
        case "gone":
            state.unlink()
    store.requeue_interrupted()
    done = _worker(store)
    assert done.returncode == 0, done.stderr
    again = _trials(store)[-1]
    assert "resumed_at" not in again.user_attrs
    _assert_same_result(again, undisturbed[1])
    _assert_only_whole_files(store)


def test_a_worker_with_another_version_is_refused_by_name(tmp_path: Path, empty_database: Path) -> None:
    store = _study(tmp_path / "runs", empty_database)
    package = shutil.copytree(Path(camri_tune.__file__).parent, tmp_path / "other" / "camri_tune")
    with (package / "losses.py").open("a") as source:
        source.write("# one line more\n")
    arguments = ["worker", "--study", "f", "--storage", storage_url(store.config)]
    done = command(*arguments, PYTHONPATH=str(tmp_path / "other"))
    ours = str(store.attributes["version"])
    assert_one_line_error(done, "'f'", ours, "install the same here")
    assert done.stderr.count("(") >= 2
    assert [t.state for t in _trials(store)] == [OptunaState.WAITING] * 2


def test_a_worker_with_another_data_set_is_refused_by_name(
    tmp_path: Path, empty_database: Path, image_folder: MakeFolder
) -> None:
    counts = {f"{part}/{name}": 12 for part in ("train", "val", "test") for name in ("cat", "dog")}
    ours = image_folder(counts)
    store = _study(tmp_path / "runs", empty_database, dataset=str(ours), important="cat")
    theirs = image_folder({**counts, "train/dog": 13})
    ours.rename(tmp_path / "away")
    theirs.rename(ours)  # as on another machine, where other files lie at the same place
    done = _worker(store)
    assert_one_line_error(done, "'f'", str(store.attributes["identity"]["dataset"]), "bring the same files")
    assert [t.state for t in _trials(store)] == [OptunaState.WAITING] * 2


# --- runs -------------------------------------------------------------------------------------------------------------


def _run(out: Path, *options: object) -> "AbstractContextManager[subprocess.Popen[str]]":
    return started("run", "--out", out, "--name", "f", *LONGER, *options)


class _Trial(NamedTuple):
    study: str
    number: int
    state: str
    value: float | None
    attributes: dict[str, Any]


class _Counts(NamedTuple):
    """What a database has of the three stages' trials."""

    trials: list[_Trial]

    @property
    def complete(self) -> dict[tuple[str, int], float | None]:
        return {(t.study, t.number): t.value for t in self.trials if t.state == "COMPLETE"}

    @property
    def running(self) -> list[_Trial]:
        return [t for t in self.trials if t.state == "RUNNING"]

    @property
    def searched(self) -> int:
        return sum(t.study == "f" and t.state in ("COMPLETE", "PRUNED") for t in self.trials)


def _counts(url: str) -> _Counts:
    """Read by SQL: a look with all that Optuna does would slow down what is looked at."""
    engine = sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool)
    with engine.connect() as connection:
        trials = connection.execute(
            sqlalchemy.text(
                "select trials.trial_id, study_name, number, state, value from trials "
                "join studies on studies.study_id = trials.study_id "
                "left join trial_values on trial_values.trial_id = trials.trial_id "
                "where study_name in ('f', 'f.baseline', 'f.finalists') order by trials.trial_id"
            )
        ).fetchall()
        attributes = connection.execute(
            sqlalchemy.text(
                "select trial_id, key, value_json from trial_user_attributes "
                "where key in ('worker', 'ticket', 'retry_of', 'resumed_at')"
            )
        ).fetchall()
    of: dict[int, dict[str, Any]] = {}
    for trial_id, key, value in attributes:
        of.setdefault(trial_id, {})[key] = json.loads(value)
    return _Counts(
        [_Trial(study, number, state, value, of.get(trial_id, {})) for trial_id, study, number, state, value in trials]
    )


def _in_the_search(url: str) -> _Counts | None:
    """What there is once a training of the search is complete and another at work."""
    try:
        counts = _counts(url)
    except sqlalchemy.exc.SQLAlchemyError:  # no study yet, or no tables
        return None
    return counts if counts.searched and any(WORKER in t.attributes for t in counts.running) else None


def _assert_finished(done: Mapping[str, Any], url: str, before: _Counts, trials: int = 5) -> None:
    """All trainings that were asked for, each once, those that were complete as they were, none at work any more."""
    assert (sum(done["trials"].values()), done["trials"]["failed"]) == (trials, 0)
    after = _counts(url)
    assert before.complete.items() <= after.complete.items()
    assert not after.running
    assert after.searched == trials
    ends = [t for t in after.trials if t.state == "COMPLETE"]
    for key in ("ticket", "retry_of"):
        named = [(t.study, t.attributes[key]) for t in ends if key in t.attributes]
        assert len(set(named)) == len(named), "nothing was queued or queued again twice"
    storage = open_storage(url)
    assert not StudyStore.existing(storage, "f").is_held
    storage.close()


def _sqlite(out: Path) -> str:
    return f"sqlite:///{out / 'f' / 'study.db'}"


def _alive(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_a_killed_run_leaves_no_workers_behind_and_the_same_command_resumes(tmp_path: Path) -> None:
    with _run(tmp_path) as process:
        before = wait_for(lambda: _in_the_search(_sqlite(tmp_path)), process)
        process.send_signal(signal.SIGKILL)
    workers = {int(t.attributes[WORKER].rpartition(":")[2]) for t in before.running if WORKER in t.attributes}
    wait_for(lambda: not any(map(_alive, workers)), seconds=60)
    again = command("run", "--out", tmp_path, "--name", "f", *LONGER, "--json")
    assert again.returncode == 0, again.stderr
    assert "queued again" in again.stderr
    _assert_finished(result_of(again), _sqlite(tmp_path), before)


def test_a_run_outlives_the_process_that_its_workers_were_forked_from(tmp_path: Path) -> None:
    """They give their trainings back and end; others are forked from another one, and go on."""
    with started("run", "--out", tmp_path, "--name", "f", *LONGER, "--json") as process:
        before = wait_for(lambda: _in_the_search(_sqlite(tmp_path)), process)
        workers = {int(t.attributes[WORKER].rpartition(":")[2]) for t in before.running if WORKER in t.attributes}
        forkers = {int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1]) for worker in workers}
        assert process.pid not in forkers
        os.kill(forkers.pop(), signal.SIGKILL)
        assert not forkers
        output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert not any(map(_alive, workers))
    _assert_finished(json.loads(output), _sqlite(tmp_path), before)


def test_a_run_that_is_asked_to_end_says_how_to_resume(tmp_path: Path) -> None:
    with _run(tmp_path) as process:
        before = wait_for(lambda: _in_the_search(_sqlite(tmp_path)), process)
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate()
    assert (process.returncode, output) == (130, "")
    assert errors.splitlines()[-1] == "camri-tune: interrupted; the same command resumes"
    assert "Traceback" not in errors
    assert not _counts(_sqlite(tmp_path)).running
    again = command("run", "--out", tmp_path, "--name", "f", *LONGER, "--json")
    assert again.returncode == 0, again.stderr
    _assert_finished(result_of(again), _sqlite(tmp_path), before)


def test_a_database_server_may_be_away_for_half_a_minute(postgres_server: DatabaseServer, tmp_path: Path) -> None:
    url = postgres_server.url
    with _run(tmp_path, "--storage", url, "--json") as process:
        before = wait_for(lambda: _in_the_search(url), process)
        postgres_server.stop()
        try:
            time.sleep(30)
        finally:
            postgres_server.start()
        assert process.poll() is None, "it waits"
        output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    assert "does not answer" in errors
    password = url.split(":")[2].split("@")[0]
    logs = "".join(path.read_text() for path in (tmp_path / "f" / "logs").iterdir())
    assert password not in output + errors + logs
    done = command("run", "--out", tmp_path, "--name", "f", *LONGER, "--storage", url, "--json")
    _assert_finished(result_of(done), url, before)


def test_of_two_runs_that_start_at_once_one_works(tmp_path: Path) -> None:
    """From two folders, as on two machines, where no file lock is shared."""
    shared = ["--storage", f"sqlite:///{tmp_path / 'shared.db'}", "--artifacts", tmp_path / "artifacts"]
    with _run(tmp_path / "a", *shared) as first, _run(tmp_path / "b", *shared) as second:
        said = {process: process.communicate()[1] for process in (first, second)}
    loser = next(process for process in (first, second) if process.returncode != 0)
    winner = second if loser is first else first
    assert (winner.returncode, loser.returncode) == (0, 2), said
    last = said[loser].splitlines()[-1]
    assert last.startswith("camri-tune: another run works on study 'f' now"), said[loser]
    counts = _counts(str(shared[1]))
    assert (counts.searched, counts.running) == (5, [])


def test_a_second_run_changes_nothing_for_the_workers_of_the_first(tmp_path: Path) -> None:
    shared = ["--storage", f"sqlite:///{tmp_path / 'shared.db'}"]
    with _run(tmp_path / "a", *shared) as process:
        wait_for(lambda: _in_the_search(str(shared[1])), process)
        done = command("run", "--out", tmp_path / "b", "--name", "f", *LONGER, *shared)
        artifacts = str(tmp_path / "a" / "f" / "artifacts")
        assert_one_line_error(done, "'f'", artifacts, "--out or --artifacts")
        storage = open_storage(str(shared[1]))
        assert StudyStore.existing(storage, "f").artifacts_url == artifacts
        storage.close()
        process.send_signal(signal.SIGINT)
        process.communicate()


def test_a_run_without_workers_leaves_the_work_to_those_that_join(tmp_path: Path) -> None:
    with _run(tmp_path, "--workers", "0", "--device", "cuda", "--json") as process:
        joined = command("worker", "--study", "f", "--storage", _sqlite(tmp_path), "--wait", "60", "--threads", "1")
        output, errors = process.communicate()
    assert (joined.returncode, process.returncode) == (0, 0), joined.stderr + errors
    assert "none of its own: see `camri-tune worker`" in errors
    _assert_finished(json.loads(output), _sqlite(tmp_path), _Counts([]))
    assert len({t.attributes[WORKER] for t in _counts(_sqlite(tmp_path)).trials}) == 1


def test_optunas_proxy_serves_a_study_and_may_go_away_for_a_moment(tmp_path: Path) -> None:
    database = f"sqlite:///{tmp_path / 'behind.db'}"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = (
        "import sys; from optuna.storages import RDBStorage, run_grpc_proxy_server as serve; "
        "serve(RDBStorage(sys.argv[1]), host='127.0.0.1', port=int(sys.argv[2]))"
    )

    def proxy() -> "subprocess.Popen[bytes]":
        arguments = [sys.executable, "-W", "ignore", "-c", program, database, str(port)]
        return subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    server = proxy()
    try:
        with _run(tmp_path, "--storage", f"grpc://127.0.0.1:{port}", "--json") as process:
            before = wait_for(lambda: _in_the_search(database), process)
            server.kill()
            server.wait()
            time.sleep(3)
            server = proxy()
            output, errors = process.communicate()
        assert process.returncode == 0, errors
        assert "Traceback" not in errors
        _assert_finished(json.loads(output), database, before)
    finally:
        server.kill()
        server.wait()


# --- full disks -------------------------------------------------------------------------------------------------------


def _resize(disk: Path, megabytes: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={megabytes}m", str(disk)], check=True)


def _fill(disk: Path) -> None:
    with suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def _last_line(errors: str) -> str:
    assert "Traceback" not in errors
    return errors.splitlines()[-1]


def test_a_disk_without_room_for_a_checkpoint_ends_the_run_with_that_reason(small_disk: Path, tmp_path: Path) -> None:
    options = [*SMALL, "--workers", "1"]
    place = ["--out", tmp_path, "--name", "f", "--artifacts", small_disk]
    done = command("run", *place, *options)
    assert (done.returncode, done.stdout) == (1, "")
    assert "No space left on device" in _last_line(done.stderr)
    assert [path.name for path in small_disk.iterdir() if path.stat().st_size > 1000] == []
    before = _counts(_sqlite(tmp_path))
    assert not before.running
    _resize(small_disk, 64)
    again = command("run", *place, *options, "--json")
    assert again.returncode == 0, again.stderr
    _assert_finished(result_of(again), _sqlite(tmp_path), before, trials=3)


def test_a_disk_without_room_for_the_database_loses_nothing_that_was_in_it(small_disk: Path, tmp_path: Path) -> None:
    _resize(small_disk, 16)
    artifacts = ["--artifacts", tmp_path / "artifacts"]
    with _run(small_disk, *artifacts) as process:
        before = wait_for(lambda: _in_the_search(_sqlite(small_disk)), process)
        _fill(small_disk)
        output, errors = process.communicate()
    assert (process.returncode, output) == (1, ""), errors
    assert "full" in _last_line(errors) or "No space left" in _last_line(errors)
    (small_disk / "filler").unlink()
    again = command("run", "--out", small_disk, "--name", "f", *LONGER, *artifacts, "--json")
    assert again.returncode == 0, again.stderr
    _assert_finished(result_of(again), _sqlite(small_disk), before)


def test_a_disk_without_room_for_the_model_leaves_the_last_one_whole(small_disk: Path, tmp_path: Path) -> None:
    _resize(small_disk, 16)
    elsewhere = ["--storage", f"sqlite:///{tmp_path / 'study.db'}", "--artifacts", tmp_path / "artifacts"]
    arguments = ["run", "--out", small_disk, "--name", "f", *SMALL, *elsewhere, "--json"]
    first = command(*arguments)
    assert first.returncode == 0, first.stderr
    best = small_disk / "f" / "best"
    whole = {path.name: sha256(path) for path in best.iterdir()}
    _fill(small_disk)
    with (small_disk / "filler").open("rb+") as filler:  # room for all but the weights
        filler.truncate(filler.seek(0, os.SEEK_END) - 1_200_000)
    done = command(*arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert "No space left on device" in _last_line(done.stderr)
    assert {path.name: sha256(path) for path in best.iterdir()} == whole
    assert not [path.name for path in (small_disk / "f").iterdir() if path.name.startswith(".best")]
    read_bundle(best)
    (small_disk / "filler").unlink()
    again = command(*arguments)
    assert again.returncode == 0, again.stderr
    assert {key: result_of(again)[key] for key in ("best", "trials")} == {
        key: result_of(first)[key] for key in ("best", "trials")
    }
    assert {path.name for path in best.iterdir()} == set(whole)
