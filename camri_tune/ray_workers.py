"""Workers as actors of a Ray cluster, which places them on whichever of its machines has room.

Ray itself is kept in a process of its own, the foreman (ray_foreman.py), which is told what to start and tells what
became of it. In the run's own process Ray would print to standard output whatever `log_to_driver` says, take over
SIGTERM, show the command line on its dashboard (a storage's password may stand there), try for minutes to reach a
cluster that is not there, and end the run when its cluster goes away.
"""

import importlib
import importlib.util
import json
import os
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy.engine import make_url

from camri_tune.config import StudyConfig, printable
from camri_tune.errors import InputError, WorkerError
from camri_tune.own_networks import allowed, folder_of
from camri_tune.prefork import python_of
from camri_tune.ray_foreman import END_SECONDS

if TYPE_CHECKING:  # the foreman is up at once, and has no need of torch
    from camri_tune.workers import Launch

LOG = "ray.log"  # in the run's folder of logs: what Ray has to say
REACH_SECONDS = 10.0  # for a connection to the cluster's address to come about
CONNECT_SECONDS = 60.0  # for Ray to join a cluster that answers, or to start one
WAITING_SECONDS = 30.0  # until it is said that a worker has found no place yet
CLIENT_PORT = 10001  # of ray:// addresses


class Node(NamedTuple):
    """A machine of the cluster, and what it offers."""

    host: str
    cpus: float
    gpus: float


@contextmanager
def ray_launch(
    config: StudyConfig, *, name: str, storage_url: str, say: Callable[[str], None]
) -> "Iterator[tuple[Launch, list[str]]]":
    """Start workers as actors of the cluster at `config.ray_address`; also the device of each worker there is to be.

    Without an address Ray looks for a cluster on this machine, and starts one that ends with this context if there is
    none. `say` is told where workers wait for a place. Raises InputError where Ray is not installed, where no cluster
    answers, or where it has other machines, which a SQLite storage cannot serve. Workers raise WorkerError where the
    cluster is lost later.
    """
    if importlib.util.find_spec("ray") is None:
        raise InputError("--launcher ray needs Ray, which is not installed: pip install 'camri-tune[ray]'")
    _require_sense(config)
    _require_reachable(config.ray_address or os.environ.get("RAY_ADDRESS"))
    url = make_url(storage_url)
    if sqlite := url.get_backend_name() == "sqlite":
        # Ray's workers start in another folder than the run.
        path = url.database or ""
        url = url.set(database=path if path.startswith("file:") else os.path.abspath(path))
        storage_url = url.render_as_string(hide_password=False)
    order = {"address": config.ray_address, "storage": storage_url, "name": name}
    model = allowed(config.model)
    order |= {"model": model, "folder": os.getcwd() if model is None else folder_of(model)}
    foreman = _Foreman(config.folder / "logs" / LOG, say)
    try:
        nodes = foreman.connect(order, _called(config.ray_address or os.environ.get("RAY_ADDRESS")))
        devices = places_on(config, nodes)
        gpus = config.gpus_per_trial if devices[0] == "cuda" else 0.0
        if sqlite:
            _require_one_host([node.host for node in nodes if (node.gpus if gpus else node.cpus) > 0])
        foreman.expect(len(devices), gpus)
        yield lambda place: foreman.start(place, devices[place]), devices
    finally:
        foreman.close()


def places_on(config: StudyConfig, nodes: Sequence[Node]) -> list[str]:
    """The device of each worker of a run on a cluster of these machines. Raises InputError where there is none.

    GPUs where the cluster has some. `auto`: as many workers as the GPUs have shares of `gpus_per_trial`, or one for
    each CPU. None is left free for the run itself, as on one machine: it sleeps nearly all of the time.
    """
    cuda = config.device == "cuda" or (config.device == "auto" and any(node.gpus for node in nodes))
    if config.workers != "auto":
        count = config.workers  # perhaps more than have room now: clusters grow
    elif cuda:
        # A worker has one GPU, or a share of one: what is left of several GPUs is no room for another.
        shares = int(1 / config.gpus_per_trial + 1e-9)
        count = sum(int(node.gpus) * shares for node in nodes)
    else:
        count = sum(int(node.cpus) for node in nodes)
    if count == 0:
        raise InputError(
            f"Ray's cluster has no {'GPU' if cuda else 'CPU'} for workers now: add nodes that have, or say how many "
            f"workers are to wait for them with --workers"
        )
    return ["cuda" if cuda else "cpu"] * count


def _require_sense(config: StudyConfig) -> None:
    if config.device.startswith("cuda:"):
        raise InputError(f"--device {config.device} is a GPU of one machine, and Ray chooses: give --device cuda")
    if config.workers == 0:
        raise InputError("--workers 0 starts none, here or elsewhere: leave --launcher ray out, or say how many")
    if config.workers_per_gpu not in ("auto", 1):
        raise InputError("--workers-per-gpu is for --launcher local: with ray, give --gpus-per-trial, 0.5 for two")


def _require_one_host(hosts: Sequence[str]) -> None:
    others = sorted(set(hosts) - {socket.gethostname()})
    if others:
        raise InputError(
            f"the study's storage is SQLite on this machine, but Ray's cluster has others ({', '.join(others[:3])}"
            f"{', …' if len(others) > 3 else ''}): give --storage with a database server, such as "
            f"postgresql+psycopg://USER:PASSWORD@HOST/DATABASE, and --artifacts that all of them reach"
        )


def _require_reachable(address: str | None) -> None:
    """Try the address, where there is one: Ray itself would try for minutes."""
    found = re.fullmatch(r"(ray://)?\[?([^/]+?)\]?(?::(\d+))?", address or "")
    if found is None or not (found[1] or found[3]):  # "auto", "local", or what Ray will complain of
        return
    try:
        socket.create_connection((found[2], int(found[3] or CLIENT_PORT)), timeout=REACH_SECONDS).close()
    except (OSError, OverflowError, UnicodeError) as error:
        raise _unusable(_called(address), getattr(error, "strerror", None) or str(error)) from None


def _called(address: str | None) -> str:
    return f"the cluster at --ray-address {printable(repr(address))}" if address else "a cluster on this machine"


def _unusable(what: str, reason: str, log: Path | None = None) -> InputError:
    where = f"; Ray's log is {log}" if log else ""
    return InputError(
        f"Ray cannot use {what} ({reason}): `ray start --head` prints the address to give, and without any Ray starts "
        f"on this machine alone{where}"
    )


class RayActor:
    """A worker in the cluster, as told by the foreman. Its name is empty until it has found a place."""

    def __init__(self, foreman: "_Foreman", number: int) -> None:
        self._foreman = foreman
        self._number = number
        self.name = ""
        self.asked = time.monotonic()
        self.outcome: tuple[str, str] | None = None  # as of `CamriWorker.run`

    @property
    def waits(self) -> bool:
        return not self.name and self.outcome is None

    def ended(self) -> str | None:
        """Why it has ended; None while it works, or waits for a place. Raises InputError, WorkerError."""
        self._foreman.look_after(self)
        if self.outcome is None:
            return None
        kind, said = self.outcome
        host = self.name.partition(":")[0] or "Ray's cluster"
        if kind == "input":
            raise InputError(f"a worker cannot work on {host}: {said}")
        return f"on {host}: {said}"

    def stop(self) -> None:
        """Ask it to give its training back; one that has no place yet is called off."""
        self._foreman.tell({"do": "stop", "number": self._number})

    def wait(self, seconds: float) -> None:
        """Wait until it has ended; after so many seconds, end it."""
        if not self._foreman.wait_for(lambda: self.outcome is not None, seconds):
            self._foreman.tell({"do": "kill", "number": self._number})
            self._foreman.wait_for(lambda: self.outcome is not None, END_SECONDS)


class _Foreman:
    """The process that talks to Ray, seen from the run."""

    def __init__(self, log: Path, say: Callable[[str], None]) -> None:
        self._log = log
        self._say = say
        self._changed = threading.Condition()
        self._first: dict[str, Any] | None = None  # what it said of the cluster
        self._gone = False
        self._actors: list[RayActor] = []
        self._places, self._gpus = 0, 0.0
        self._told = False  # that workers wait
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                python_of("camri_tune.ray_foreman"),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                cwd=log.parent,  # Ray has its workers import from the driver's folder, and the run's may be anybody's
                start_new_session=True,  # a terminal's Ctrl-C is for the run, which then asks the workers to stop
            )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def connect(self, order: Mapping[str, Any], what: str) -> list[Node]:
        """Hand over what it has to know, secrets too, and hear what the cluster has. Raises InputError."""
        self.tell(order)
        self.wait_for(lambda: self._first is not None, CONNECT_SECONDS)
        if self._first is None:
            raise _unusable(what, "Ray ended" if self._gone else f"no answer in {CONNECT_SECONDS:.0f} s", self._log)
        if "refused" in self._first:
            raise _unusable(what, self._first["refused"], self._log)
        return [Node(*node) for node in self._first["nodes"]]

    def expect(self, places: int, gpus: float) -> None:
        """How many workers there will be, and what share of a GPU each of them gets; 0: a CPU instead."""
        self._places, self._gpus = places, gpus

    def start(self, place: int, device: str) -> RayActor:
        self._require_alive()
        number = len(self._actors)
        actor = RayActor(self, number)
        self._actors.append(actor)  # nothing is told of it before it is asked for
        self.tell({"do": "start", "number": number, "place": place, "device": device, "gpus": self._gpus})
        return actor

    def look_after(self, actor: RayActor) -> None:
        """Say so where workers have waited for long. Raises WorkerError where nobody knows what becomes of this one."""
        if actor.outcome is None:
            self._require_alive()
        waiting = [a for a in self._actors if a.waits]
        if not waiting:
            self._told = False
        elif not self._told and time.monotonic() - waiting[0].asked > WAITING_SECONDS:
            self._told = True
            each = f"{self._gpus:g} GPU" if self._gpus else "1 CPU"
            self._say(
                f"Ray has found no place yet for {len(waiting)} of {self._places} worker(s), each of which asks for "
                f"{each}; what waits starts as soon as its cluster has room"
            )

    def tell(self, order: Mapping[str, Any]) -> None:
        """Send one line. Whoever needs an answer will see that there is none."""
        assert self._process.stdin is not None
        with suppress(OSError, ValueError):  # it is gone
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()

    def wait_for(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Wait so long at most for what it tells. True: the condition holds, or it is gone and tells nothing more."""
        with self._changed:
            return self._changed.wait_for(lambda: condition() or self._gone, seconds)

    def close(self) -> None:
        """Let it leave the cluster. Workers that are still there save their trainings and end."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(OSError):
            self._process.stdin.close()
        if self._first is None:  # it is still trying
            self._process.kill()
        try:
            self._process.wait(2 * END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        self._process.stdout.close()

    def _require_alive(self) -> None:
        if self._gone:
            raise WorkerError(
                f"Ray's cluster is lost (its log is {self._log}): what has finished is kept, the same command resumes"
            )

    def _read(self) -> None:
        assert self._process.stdout is not None
        try:
            for line in self._process.stdout:
                with self._changed:
                    self._note(json.loads(line))
                    self._changed.notify_all()
        finally:
            with self._changed:
                self._gone = True
                self._changed.notify_all()

    def _note(self, event: dict[str, Any]) -> None:
        if self._first is None:
            self._first = event
        elif "worker" in event:
            self._actors[event["number"]].name = event["worker"]
        else:
            self._actors[event["number"]].outcome = event["kind"], event["said"]
