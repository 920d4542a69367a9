"""Workers on a Ray cluster: Ray's own processes, several nodes of them on this machine."""

import importlib
import importlib.util
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy
from optuna.trial import TrialState as OptunaState

from camri_tune import ray_foreman, ray_workers
from camri_tune.config import StudyConfig
from camri_tune.database import open_storage
from camri_tune.datasets import open_dataset
from camri_tune.errors import InputError, WorkerError
from camri_tune.heartbeat import WORKER
from camri_tune.ray_foreman import Secret
from camri_tune.ray_workers import Node, RayActor, places_on, ray_launch
from camri_tune.storage import STAGES, StudyStore, storage_url
from tests.command import COMMAND, assert_one_line_error, camri_tune, started
from tests.conftest import _not_here
from tests.loopback import refusing_url
from tests.patience import wait_for

MEMORY = 80 * 2**20  # for Ray's store of objects, of which there are none
# Accuracy may fall by any amount: whether a small noisy run is feasible must not decide these tests.
SMALL = ["--trials", "3", "--epochs", "1", "--finalists", "1", "--seeds", "1", "--tolerance", "100"]
LONGER = [*SMALL, "--epochs", "5"]  # to be caught in the act


@dataclass
class Nodes:
    """A cluster that runs, and how to change it."""

    cluster: Any
    folder: Path  # Ray's session

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    @contextmanager
    def one_more(self, *, cpus: int = 1, gpus: int = 0) -> Iterator[Any]:
        with _keeping_sigterm():
            node = self.cluster.add_node(num_cpus=cpus, num_gpus=gpus, object_store_memory=MEMORY)
        try:
            yield node
        finally:
            if node in self.cluster.worker_nodes:
                self.cluster.remove_node(node)


@contextmanager
def _keeping_sigterm() -> Iterator[None]:
    """Ray's nodes would have a test fail by it, and the others go on without a cluster."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """Two nodes of one CPU each."""
    if importlib.util.find_spec("ray") is None:
        _not_here("no Ray: pip install 'camri-tune[ray]'")
    Cluster = importlib.import_module("ray.cluster_utils").Cluster  # noqa: N806

    # Not pytest's own folder, whose long name the sockets could not have.
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    Path("/tmp/ray").mkdir(exist_ok=True)  # where Ray notes the cluster's address, and takes to be there
    head = {"num_cpus": 1, "object_store_memory": MEMORY, "temp_dir": str(folder), "include_dashboard": False}
    with _keeping_sigterm():
        cluster = Cluster(initialize_head=True, head_node_args=head)
        cluster.add_node(num_cpus=1, object_store_memory=MEMORY)
    try:
        yield Nodes(cluster, folder)
    finally:
        cluster.shutdown()
        shutil.rmtree(folder)


def _started(out: Path, *options: str) -> "AbstractContextManager[subprocess.Popen[str]]":
    """A run that is longer than it takes to disturb it."""
    return started("run", "--out", out, "--name", "r", "--launcher", "ray", *LONGER, *options)


def _at_work(url: str, parents: Sequence[int] | None = None) -> list[int]:
    """The processes, of these parents if given, that train what has got somewhere, and has far to go."""
    if url.startswith("sqlite") and not Path(url.removeprefix("sqlite:///")).exists():
        return []
    engine = sqlalchemy.create_engine(url)
    try:
        with engine.connect() as connection:
            rows = connection.exec_driver_sql(
                "select a.value_json from trial_user_attributes a join trial_user_attributes b using (trial_id) "
                "join trials t using (trial_id) join studies using (study_id) where a.key = 'worker' "
                "and b.key = 'epoch' and b.value_json in ('1', '2') and t.state = 'RUNNING' "
                "and study_name in ('r.baseline', 'r', 'r.finalists')"
            ).fetchall()
    except (sqlalchemy.exc.OperationalError, sqlalchemy.exc.ProgrammingError):  # not created yet
        return []
    finally:
        engine.dispose()
    pids = [int(json.loads(value).rpartition(":")[2]) for (value,) in rows]
    return [pid for pid in pids if parents is None or _parent(pid) in parents]


def _parent(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def _raylet(node: Any) -> int:
    return int(node.all_processes["raylet"][0].process.pid)


def _logged(nodes: Nodes) -> set[int]:
    """The processes that Ray has started for workers."""
    return {int(path.stem.rpartition("-")[2]) for path in nodes.folder.glob("session_*/logs/worker-*.out")}


def _trials(url: str) -> dict[str, list[optuna.trial.FrozenTrial]]:
    storage = open_storage(url)
    try:
        store = StudyStore.existing(storage, "r")
        return {stage: store.optuna_study(stage).get_trials() for stage in STAGES}
    finally:
        storage.close()


def _assert_all_trained_once(url: str, interrupted: int | None = None) -> None:
    """Every planned training is there, and those that were interrupted were queued again once each."""
    trials = _trials(url)
    complete = {stage: [t for t in found if t.state == OptunaState.COMPLETE] for stage, found in trials.items()}
    assert [len(complete[stage]) for stage in ("search", "finalists")] == [3, 1]
    settings = [(t.params["learning_rate"], t.user_attrs["seed"]) for t in complete["baseline"]]
    assert len(set(settings)) == len(settings) >= 5
    given_up = 0
    for found in trials.values():
        assert {t.state for t in found} <= {OptunaState.COMPLETE, OptunaState.FAIL}
        failed = [t.number for t in found if t.state == OptunaState.FAIL]
        assert sorted(t.user_attrs["retry_of"] for t in found if "retry_of" in t.user_attrs) == failed
        given_up += len(failed)
    assert given_up >= 1 if interrupted is None else given_up == interrupted


# --- whole runs -------------------------------------------------------------------------------------------------------


def test_a_run_is_carried_out_by_the_processes_of_the_cluster(nodes: Nodes, tmp_path: Path) -> None:
    """With a network of the user's own, which lies in the run's folder, not in theirs."""
    (tmp_path / "raynet.py").write_text(
        "from torch import nn\n\n"
        "def small():\n    return nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(48, 32))\n"
    )
    place = ["--launcher", "ray", "--ray-address", nodes.address, "--workers", "auto", "--model", "raynet:small"]
    done = camri_tune("run", "--out", tmp_path, "--name", "r", *SMALL, *place, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((tmp_path / "r" / "result.json").read_text())
    assert "2 worker(s) on Ray's cluster (cpu)" in done.stderr
    assert "raylet" not in done.stderr
    assert "INFO" not in done.stderr
    url = f"sqlite:///{tmp_path / 'r' / 'study.db'}"
    _assert_all_trained_once(url, interrupted=0)
    workers = {t.user_attrs[WORKER] for found in _trials(url).values() for t in found}
    assert {int(name.rpartition(":")[2]) for name in workers} <= _logged(nodes)
    assert all(name.startswith(f"{socket.gethostname()}:") for name in workers)


def test_what_ran_on_a_killed_actor_or_a_lost_node_runs_again(nodes: Nodes, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'r' / 'study.db'}"
    place = ["--ray-address", nodes.address, "--workers", "3", "--json"]
    with nodes.one_more() as node, _started(tmp_path, *place) as process:
        killed = wait_for(lambda: _at_work(url), process)[0]
        assert Path(f"/proc/{killed}/cmdline").read_text().startswith("ray::CamriWorker")
        os.kill(killed, signal.SIGKILL)
        (lost, *_) = wait_for(lambda: [pid for pid in _at_work(url, [_raylet(node)]) if pid != killed], process)
        nodes.cluster.remove_node(node, allow_graceful=False)
        output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert json.loads(output)["study"] == "r", "what Ray says of the deaths must not stand there, too"
    assert "Traceback" not in errors
    _assert_all_trained_once(url)
    given_up = [t for found in _trials(url).values() for t in found if t.state == OptunaState.FAIL]
    assert {int(t.user_attrs[WORKER].rpartition(":")[2]) for t in given_up} == {killed, lost}


def test_a_run_that_is_killed_has_its_trainings_given_back_and_resumes_on_a_cluster_of_its_own(
    nodes: Nodes, tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path / 'r' / 'study.db'}"
    with _started(tmp_path, "--ray-address", nodes.address, "--workers", "2") as process:
        wait_for(lambda: _at_work(url), process)
    wait_for(lambda: all(t.state != OptunaState.RUNNING for found in _trials(url).values() for t in found))
    given_back = [t for found in _trials(url).values() for t in found if t.state == OptunaState.FAIL]
    assert {t.user_attrs["failure"] for t in given_back} == {"given back: the run asked for it"}
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    # Ray writes a token for its cluster into the user's home.
    home = str(tmp_path)
    try:
        place = ["--launcher", "ray", "--ray-address", "local", "--workers", "2"]
        done = camri_tune("run", "--out", tmp_path, "--name", "r", *LONGER, *place, RAY_TMPDIR=folder, HOME=home)
        assert done.returncode == 0, done.stderr
        assert "raylet" not in done.stdout + done.stderr
        assert list(Path(folder).rglob("worker-*.out"))
        wait_for(lambda: not any(folder in command for _, command in _command_lines()))
    finally:
        shutil.rmtree(folder)
    _assert_all_trained_once(url, interrupted=len(given_back))
    resumed = [t for found in _trials(url).values() for t in found if t.user_attrs.get("resumed_at")]
    assert resumed, "from the epoch at which it was saved, not from the start"


# --- passwords --------------------------------------------------------------------------------------------------------


def _command_lines() -> set[tuple[int, str]]:
    """What anybody sees of processes: id and command line."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended
            command = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            found.add((int(path.parent.name), command))
    return found


def _jobs(address: str) -> str:
    """What Ray's dashboard shows of its jobs."""
    program = "import sys, ray; ray.init(sys.argv[1], log_to_driver=False); print(ray._private.state.jobs())"
    done = subprocess.run(
        [str(COMMAND.parent / "python"), "-c", program, address], capture_output=True, text=True, check=True
    )
    return done.stdout


def test_a_password_is_nowhere_in_the_cluster(nodes: Nodes, postgres: str, tmp_path: Path) -> None:
    password = str(sqlalchemy.make_url(postgres).password)
    seen: set[tuple[int, str]] = set()

    def some_train() -> list[int]:
        seen.update(_command_lines())
        return _at_work(postgres)

    place = ["--ray-address", nodes.address, "--workers", "2", "--storage", postgres]
    with _started(tmp_path, *place) as process:
        wait_for(some_train, process)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate()
    assert process.returncode == 130, errors
    assert errors.endswith("camri-tune: interrupted; the same command resumes\n")
    assert not [t for found in _trials(postgres).values() for t in found if t.state == OptunaState.RUNNING]
    assert any(command.startswith("ray::CamriWorker") for _, command in seen)
    # A child has its parent's command line until it becomes a program of its own.
    (typed,) = {command for _, command in seen if password in command}
    assert (process.pid, typed) in seen, "where the user put it"
    assert "camri_tune.ray_foreman" in (jobs := _jobs(nodes.address))
    assert password not in jobs + output + errors
    logs = [path for path in nodes.folder.rglob("*") if path.is_file()]
    assert any(path.name.startswith("gcs_server") for path in logs)
    for path in [*logs, *(tmp_path / "r").rglob("*.log")]:
        assert password.encode() not in path.read_bytes(), path


def test_a_secret_is_masked_where_it_is_shown_and_whole_where_it_is_used() -> None:
    secret = pickle.loads(pickle.dumps(Secret("hunter2")))
    assert f"{secret} {secret!r} {[secret]}" == "*** *** [***]"
    assert secret.reveal() == "hunter2"


# --- what cannot work -------------------------------------------------------------------------------------------------


def test_an_address_where_nobody_answers_is_named_in_one_line(tmp_path: Path) -> None:
    address = refusing_url().removeprefix("http://")
    done = camri_tune("run", "--out", tmp_path, "--launcher", "ray", "--ray-address", address)
    assert_one_line_error(done, f"--ray-address {address!r}", "refused", "ray start --head")
    with pytest.raises(InputError, match="refused"), _launching(_config(tmp_path, ray_address=f"ray://{address}")):
        pass


@pytest.mark.parametrize(
    ("address", "reason"),
    [("nonsense", "Invalid address"), ("http://127.0.0.1:8265", "Invalid Ray address"), ("no host:1", "not known")],
)
def test_what_is_no_address_is_named_in_one_line(address: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=reason) as raised, _launching(_config(tmp_path, ray_address=address)):
        pass
    assert "\n" not in str(raised.value)
    assert repr(address) in str(raised.value)


def test_somebody_who_never_answers_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_workers, "CONNECT_SECONDS", 3.0)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        config = _config(tmp_path, ray_address=f"127.0.0.1:{mute.getsockname()[1]}")
        with pytest.raises(InputError, match="no answer in 3 s"), _launching(config):
            pass


def _other_program(folder: Path, *, broken: bool) -> str:
    """Have the cluster's processes for a run find another camri_tune than the run's."""
    package = Path(ray_workers.__file__).parent
    other = folder / "elsewhere" / package.name
    other.mkdir(parents=True)
    if broken:
        (other / "__init__.py").write_text("raise ModuleNotFoundError(\"No module named 'camri_tune'\")\n")
    else:
        for path in package.glob("*.py"):
            shutil.copy(path, other)
        (other / "more.py").write_text("# newer\n")
    job = {"runtime_env": {"env_vars": {"PYTHONPATH": str(other.parent)}}}
    return json.dumps(job)


@pytest.mark.parametrize(
    ("broken", "parts"),
    [(False, ("is run by camri-tune", "install the same")), (True, ("No module named 'camri_tune'", "every node"))],
)
def test_a_cluster_with_another_program_ends_the_run_with_one_line(
    broken: bool, parts: Sequence[str], nodes: Nodes, tmp_path: Path
) -> None:
    job = _other_program(tmp_path, broken=broken)
    options = [*SMALL, "--launcher", "ray", "--ray-address", nodes.address, "--workers", "2"]
    # From a folder without the program: Ray shows the run's folder to its workers, too.
    done = camri_tune("run", "--quiet", *options, "--out", tmp_path, cwd=tmp_path, RAY_JOB_CONFIG_JSON_ENV_VAR=job)
    assert_one_line_error(done, "a worker cannot work on ", *parts)


def test_gpus_are_asked_for_where_the_cluster_has_some(nodes: Nodes, study: StudyConfig) -> None:
    """What its node calls a GPU is none, and the worker that is put there says so."""
    config = study.model_copy(update={"workers": "auto", "gpus_per_trial": 0.5})
    with nodes.one_more(cpus=0, gpus=1), _launching(config) as (launch, devices):
        assert devices == ["cuda", "cuda"]
        actor = launch(0)
        with pytest.raises(InputError, match=rf"cannot work on {socket.gethostname()}: .*cuda"):
            wait_for(actor.ended)


def test_sqlite_does_not_serve_other_machines(nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = socket.gethostname()
    monkeypatch.setattr(socket, "gethostname", lambda: "another")
    config = _config(tmp_path, ray_address=nodes.address)
    with pytest.raises(InputError, match=rf"SQLite.*{here}.*--storage"), _launching(config):
        pass
    with _launching(config, storage="postgresql://host/database") as (_, devices):
        assert devices == ["cpu", "cpu"]


def test_without_ray_the_way_to_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'camri-tune\[ray\]'"), _launching(_config(tmp_path)):
        pass


@pytest.mark.parametrize(
    ("options", "way_out"),
    [({"device": "cuda:1"}, "--device cuda"), ({"workers_per_gpu": 2}, "--gpus-per-trial, 0.5 for two")],
)
def test_options_of_one_machine_are_refused(options: dict[str, Any], way_out: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=way_out), _launching(_config(tmp_path, **options)):
        pass


def test_a_cluster_that_wants_a_token_says_so() -> None:
    """As of Ray 2.60, where the reason stands in the text of the cause alone."""
    error = ConnectionError("Failed to connect to Ray cluster at 10.0.0.1:6379")
    error.__cause__ = RuntimeError("Last connection error: ray.exceptions.AuthenticationError: InvalidAuthToken: …")
    assert "RAY_AUTH_MODE=token" in ray_foreman._why_refused(error)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("Failed to connect to Ray cluster at 10.0.0.1:6379", None),
        ("", "ConnectionError"),
        (
            "Version mismatch: it has:\n    Ray: 2.60.0\nThis has:\n    Ray: 2.59.0\n",
            "Version mismatch: it has: Ray: 2.60.0",
        ),
        (
            "The actor died.\n\tpid: 7\nThe actor is dead because of X. More. Some common causes are Y.",
            "The actor is dead",
        ),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
    ],
)
def test_what_ray_says_becomes_one_line(text: str, line: str | None) -> None:
    said = ray_foreman._why_refused(ConnectionError(text))
    assert said.startswith(text if line is None else line)
    assert said.isprintable()
    assert "common causes" not in said


# --- how many, and where ----------------------------------------------------------------------------------------------

CPUS = [Node("a", 4.0, 0.0), Node("b", 2.0, 0.0)]
GPUS = [Node("a", 16.0, 2.0), Node("b", 8.0, 1.0)]


@pytest.mark.parametrize(
    ("cluster", "options", "expected"),
    [
        (CPUS, {}, ["cpu"] * 6),
        (CPUS, {"workers": 8}, ["cpu"] * 8),
        (CPUS, {"workers": 2, "device": "cuda"}, ["cuda"] * 2),
        (GPUS, {}, ["cuda"] * 3),
        (GPUS, {"gpus_per_trial": 0.5}, ["cuda"] * 6),
        (GPUS, {"gpus_per_trial": 0.3}, ["cuda"] * 9),
        (GPUS, {"gpus_per_trial": 0.1}, ["cuda"] * 30),
        (GPUS, {"gpus_per_trial": 0.6}, ["cuda"] * 3),
        (GPUS, {"workers": 1}, ["cuda"]),
        (GPUS, {"device": "cpu"}, ["cpu"] * 24),
        ([Node("head", 0.0, 0.0), Node("a", 1.0, 0.0)], {}, ["cpu"]),
    ],
)
def test_a_cluster_has_so_many_places(
    cluster: list[Node], options: dict[str, Any], expected: list[str], tmp_path: Path
) -> None:
    assert places_on(_config(tmp_path, **options), cluster) == expected


@pytest.mark.parametrize(
    ("cluster", "options", "lacks"),
    [([Node("head", 0.0, 0.0)], {}, "no CPU"), (CPUS, {"device": "cuda"}, "no GPU"), ([], {}, "no CPU")],
)
def test_a_cluster_without_a_place_is_refused(
    cluster: list[Node], options: dict[str, Any], lacks: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=lacks):
        places_on(_config(tmp_path, **options), cluster)


# --- from close by ----------------------------------------------------------------------------------------------------


def _config(tmp_path: Path, **options: Any) -> StudyConfig:
    return StudyConfig.build({"name": "r", "out": tmp_path, "launcher": "ray", **options})


@contextmanager
def _launching(
    config: StudyConfig, storage: str | None = None, said: list[str] | None = None
) -> "Iterator[tuple[Callable[[int], RayActor], list[str]]]":
    url = storage or storage_url(config)
    with ray_launch(config, name="r", storage_url=url, say=(said if said is not None else []).append) as found:
        yield found  # type: ignore[misc]  # a Worker, which is all that a run knows


@pytest.fixture
def study(empty_database: Path, nodes: Nodes, tmp_path: Path) -> StudyConfig:
    """A study in which there is nothing to do."""
    config = _config(tmp_path, ray_address=nodes.address, workers=3)
    config.folder.mkdir()
    shutil.copy(empty_database, config.folder / "study.db")
    storage = open_storage(storage_url(config))
    StudyStore.create(storage, config, open_dataset(config)).set("stage", "running")
    storage.close()
    return config


def test_workers_without_a_place_are_told_once_and_called_off(
    study: StudyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_workers, "WAITING_SECONDS", 1.0)
    said: list[str] = []
    with _launching(study, said=said) as (launch, devices):
        assert devices == ["cpu"] * 3
        actors = [launch(place) for place in range(3)]
        wait_for(lambda: sum(bool(actor.name) for actor in actors) == 2)
        for _ in range(2):
            time.sleep(1.0)
            assert [actor.ended() for actor in actors] == [None] * 3
        assert said == [
            "Ray has found no place yet for 1 of 3 worker(s), each of which asks for 1 CPU; what waits starts as soon "
            "as its cluster has room"
        ]
        (waiting,) = [actor for actor in actors if not actor.name]
        waiting.stop()
        waiting.wait(60)
        assert "ray.kill" in str(waiting.ended())
        first, second = [actor for actor in actors if actor.name]
        first.stop()
        first.wait(60)
        assert str(first.ended()).endswith("the run asked for it")
        assert second.ended() is None
        second.wait(0)
        assert "ray.kill" in str(second.ended())


def test_a_worker_that_dies_leaves_its_place_to_the_next(study: StudyConfig) -> None:
    with _launching(study) as (launch, _):
        actors = [launch(0), launch(1)]
        wait_for(lambda: all(actor.name for actor in actors))
        os.kill(int(actors[0].name.rpartition(":")[2]), signal.SIGKILL)
        reason = wait_for(actors[0].ended)
        assert reason.startswith(f"on {socket.gethostname()}: The actor is dead because its worker process has died")
        assert "\n" not in reason
        again = launch(0)
        wait_for(lambda: again.name)
        assert again.name != actors[0].name


def test_a_lost_cluster_ends_the_run_in_one_line(study: StudyConfig) -> None:
    with _launching(study) as (launch, _):
        actor = launch(0)
        wait_for(lambda: actor.name)
        (foreman,) = [pid for pid, command in _command_lines() if _is_our_foreman(pid, command)]
        os.kill(foreman, signal.SIGKILL)
        with pytest.raises(WorkerError, match="cluster is lost") as raised:
            wait_for(actor.ended)
        assert "\n" not in str(raised.value)
        with pytest.raises(WorkerError, match="cluster is lost"):
            launch(0)
        actor.stop()
        actor.wait(60)


def _is_our_foreman(pid: int, command: str) -> bool:
    return "camri_tune.ray_foreman" in command and _parent(pid) == os.getpid()
