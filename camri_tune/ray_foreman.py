"""The process between a run and Ray, and the actors that work for it on the cluster's machines.

See ray_workers.py, the run's side, for why.
"""

import importlib
import importlib.util
import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from camri_tune.config import printable
from camri_tune.errors import CamriTuneError, InputError, StoppedError
from camri_tune.heartbeat import worker_id

END_SECONDS = 30.0  # for actors to save their trainings, and for Ray to end
POLL_SECONDS = 0.2


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
            model=self._order["model"],
            folder=self._order["folder"],
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
        self,
        storage: Secret,
        *,
        name: str,
        device: str,
        threads: int | None,
        index: int,
        model: str | None,
        folder: str,
    ) -> tuple[str, str]:
        """Work until the study is done. Returns how it ended ("input": all would end like this) and what to say of it.

        `model` is the user's own network that may be imported, from the run's `folder` if it is here.

        Nothing is raised: Ray would make a traceback of it, here and in the run.
        """
        url = storage.reveal()
        try:
            # Only here: the foreman imports this module, too, and should be up at once.
            from camri_tune.own_networks import allow  # noqa: PLC0415
            from camri_tune.worker import work  # noqa: PLC0415

            allow(model, folder=folder)
            work(
                storage_url=url,
                name=name,
                device=device,
                threads=threads,
                index=index,
                asked_to_stop=lambda: "the run asked for it" if self._asked_to_stop else None,
            )
        except StoppedError as stopped:
            return "stopped", stopped.reason
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


if __name__ == "__main__":
    # From the module under its own name: the cluster's machines know no other, and get its classes by name.
    from camri_tune.ray_foreman import main as _main

    sys.exit(_main())
