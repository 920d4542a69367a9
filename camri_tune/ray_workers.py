"""Workers as actors of a Ray cluster, which places them on whichever of its machines has room.

Ray itself is kept in a process of its own, the foreman (`main`), which is told what to start and tells what became of
it. In the run's own process Ray would print to standard output whatever `log_to_driver` says, take over SIGTERM, show
the command line on its dashboard (a storage's password may stand there), try for minutes to reach a cluster that is
not there, and end the run when its cluster goes away.
"""

import importlib
import importlib.util
import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from sqlalchemy.engine import make_url

from camri_tune.config import StudyConfig, printable
from camri_tune.errors import CamriTuneError, InputError, WorkerError
from camri_tune.heartbeat import worker_id

if TYPE_CHECKING:  # the foreman is up at once, and has no need of torch
    from camri_tune.workers import Launch

LOG = "ray.log"  # in the run's folder of logs: what Ray has to say
REACH_SECONDS = 10.0  # for a connection to the cluster's address to come about
CONNECT_SECONDS = 60.0  # for Ray to join a cluster that answers, or to start one
WAITING_SECONDS = 30.0  # until it is said that a worker has found no place yet
END_SECONDS = 30.0  # for actors to save their trainings, and for Ray to end
POLL_SECONDS = 0.2
CLIENT_PORT = 10001  # of ray:// addresses


class Node(NamedTuple):
    """A machine of the cluster, and what it offers."""

    host: str
    cpus: float
    gpus: float


# --- in the run's process ---------------------------------------------------------------------------------------------


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
    order = {"address": config.ray_address, "storage": storage_url, "name": name, "data_dir": str(config.data_dir)}
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
    if config.workers_per_gpu > 1:
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
                [sys.executable, "-m", "camri_tune.ray_workers"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
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


# --- in the foreman's process -----------------------------------------------------------------------------------------


class _Tell(Protocol):
    def __call__(self, **event: Any) -> None: ...


@dataclass
class _Started:
    """An actor, and the answers that are awaited of it."""

    handle: Any
    name: Any
    outcome: Any
    placed: bool = False


def main() -> int:
    """Entry of the foreman: orders on standard input, what happens on standard output, one JSON object a line.

    It ends once its input does, which is also when the run was killed: then the workers give their trainings back.
    """
    # Ray prints to standard output, too: that goes where standard error goes, a file.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def tell(**event: Any) -> None:
        with suppress(OSError):  # nobody listens any more: the end of the input says so, too
            answers.write(json.dumps(event) + "\n")
            answers.flush()

    order = json.loads(sys.stdin.readline() or "{}")
    try:
        ray = importlib.import_module("ray")
        # A cluster that is started only for this run needs no web server.
        ray.init(
            address=order["address"],
            log_to_driver=False,
            **({"include_dashboard": False} if order["address"] is None else {}),
        )
        # Ray has made SIGTERM its own. Whoever sends it to all has sent it to the run, too, which then ends this.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        nodes = [node for node in ray.nodes() if node["Alive"]]
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        tell(refused=_why_refused(error))
        return 1
    try:
        offers = [(node["NodeManagerHostname"], node["Resources"]) for node in nodes]
        tell(nodes=[[host, has.get("CPU", 0.0), has.get("GPU", 0.0)] for host, has in offers])
        _Supervision(ray, order, tell).carry_on()
    finally:
        ray.shutdown()
    return 0


class _Supervision:
    """Carries out orders and tells what becomes of the actors, until there are no more orders."""

    def __init__(self, ray: Any, order: Mapping[str, Any], tell: _Tell) -> None:
        self._ray = ray
        self._order = order
        self._tell = tell
        self._orders: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._actors: dict[int, _Started] = {}
        threading.Thread(target=self._listen, daemon=True).start()

    def carry_on(self) -> None:
        end: float | None = None
        while end is None or (self._actors and time.monotonic() < end):
            with suppress(queue.Empty):
                while True:
                    order = self._orders.get_nowait()
                    if order is None:
                        end = time.monotonic() + END_SECONDS
                        for number in list(self._actors):
                            self._stop(number)
                        continue
                    getattr(self, f"_{order.pop('do')}")(**order)
            self._poll()

    def _listen(self) -> None:
        for line in sys.stdin:
            self._orders.put(json.loads(line))
        self._orders.put(None)

    def _start(self, *, number: int, place: int, device: str, gpus: float) -> None:
        resources = {"num_gpus": gpus, "num_cpus": 0} if gpus else {"num_cpus": 1, "num_gpus": 0}
        # Two calls at once: the work, and `stop`. What dies is replaced by the run, which counts the deaths.
        kind = self._ray.remote(max_concurrency=2, max_restarts=0, max_task_retries=0, **resources)(CamriWorker)
        handle = kind.remote()
        # Not to the constructor: the cluster's head keeps what that is called with.
        outcome = handle.run.remote(
            Secret(self._order["storage"]),
            name=self._order["name"],
            device=device,
            threads=None if gpus else 1,
            index=place,
            data_dir=self._order["data_dir"],
        )
        self._actors[number] = _Started(handle, handle.name.remote(), outcome)

    def _stop(self, number: int) -> None:
        if (actor := self._actors.get(number)) is None:
            return
        if actor.placed:
            actor.handle.stop.remote()
        else:
            self._kill(number)

    def _kill(self, number: int) -> None:
        if (actor := self._actors.get(number)) is not None:
            self._ray.kill(actor.handle)

    def _poll(self) -> None:
        awaited = {ref: number for number, actor in self._actors.items() for ref in _awaited(actor)}
        if not awaited:
            time.sleep(POLL_SECONDS)
            return
        ready, _ = self._ray.wait(list(awaited), num_returns=1, timeout=POLL_SECONDS)
        for ref in ready:
            number = awaited[ref]
            actor = self._actors[number]
            if ref == actor.name:
                actor.placed = True
                with suppress(self._ray.exceptions.RayError):  # of which the other call tells
                    self._tell(number=number, worker=self._ray.get(ref))
                continue
            kind, said = self._outcome_of(ref)
            del self._actors[number]
            self._ray.kill(actor.handle)  # or it would keep its place
            self._tell(number=number, kind=kind, said=said)

    def _outcome_of(self, ref: Any) -> tuple[str, str]:
        try:
            kind, said = self._ray.get(ref)
        except self._ray.exceptions.RayError as error:
            text = str(error)
            print(text, file=sys.stderr)
            if "No module named" in text:
                return "input", _not_installed(text[text.rindex("No module named") :].splitlines()[0])
            return "died", _in_one_line(error)
        return kind, said


def _awaited(actor: _Started) -> list[Any]:
    return [actor.outcome] if actor.placed else [actor.name, actor.outcome]


def _why_refused(error: BaseException) -> str:
    """Why Ray could not be joined: what it raises says less than what it quotes of the tries."""
    if "AuthenticationError" in "".join(traceback.format_exception(error)):
        # Clusters ask for one by default since 2.60, and `ray.init` sends none to an address that is given.
        return (
            "it asks for a token: set RAY_AUTH_MODE=token here, with the token of its head node in ~/.ray/auth_token "
            "or RAY_AUTH_TOKEN"
        )
    return _in_one_line(error)


def _in_one_line(error: BaseException) -> str:
    """What Ray says, without the paragraphs on what it might mean."""
    text = " ".join(str(error).split()) or type(error).__name__
    death = text.find("The actor is dead because")
    told = text.partition(". ")[0] if death < 0 else text[death:].partition(" Some common causes")[0]
    return printable(told.rstrip(".:"))


# --- on the cluster's machines ----------------------------------------------------------------------------------------


class Secret:
    """Text that is not shown where a call's arguments are."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return "***"

    def reveal(self) -> str:
        return self._text


class CamriWorker:
    """The actor: a worker in a process of the cluster."""

    def __init__(self) -> None:
        self._asked_to_stop = False

    def name(self) -> str:
        """As in the attribute of the trials that this process runs."""
        return worker_id()

    def stop(self) -> None:
        """Have the training at hand saved and given back."""
        self._asked_to_stop = True

    def run(
        self, storage: Secret, *, name: str, device: str, threads: int | None, index: int, data_dir: str
    ) -> tuple[str, str]:
        """Work until the study is done. Returns how it ended ("input": all would end like this) and what to say of it.

        Nothing is raised: Ray would make a traceback of it, here and in the run.
        """
        url = storage.reveal()
        try:
            # Only here: the foreman imports this module, too, and should be up at once.
            from camri_tune.trials import StoppedError  # noqa: PLC0415
            from camri_tune.worker import work  # noqa: PLC0415

            try:
                work(
                    storage_url=url,
                    name=name,
                    device=device,
                    threads=threads,
                    index=index,
                    data_dir=_data_here(data_dir),
                    asked_to_stop=lambda: "the run asked for it" if self._asked_to_stop else None,
                )
            except StoppedError as stopped:
                return "stopped", str(stopped)
        except InputError as error:
            return "input", str(error)
        except CamriTuneError as error:
            return "failed", str(error)
        except ImportError as error:
            return "input", _not_installed(str(error))
        except Exception as error:
            print(traceback.format_exc().replace(url, repr(storage)), file=sys.stderr)
            return "failed", printable(f"{type(error).__name__}: {error}".replace(url, repr(storage)))
        return "done", "it found the study done"


def _not_installed(reason: str) -> str:
    return f"{printable(reason)}: install camri-tune and what it needs on every node"


def _data_here(run_has: str) -> Path | None:
    """Where this machine's data lie, if not where they are on the run's: what CAMRI_DATA says here."""
    named = os.environ.get("CAMRI_DATA")
    return Path(named) if named and not Path(run_has).is_dir() else None


if __name__ == "__main__":
    # From the module under its own name: the cluster's machines know no other, and get its classes by name.
    from camri_tune.ray_workers import main as _main

    sys.exit(_main())
