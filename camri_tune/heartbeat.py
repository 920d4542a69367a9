"""Who works on what, and whether they still live: heartbeats of trials and of runs.

Optuna's own heartbeat stops at its gRPC proxy and belongs to `study.optimize`; this one is an attribute of the trial,
which every storage keeps.
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

HEARTBEAT_SECONDS = 60.0
GRACE_SECONDS = 300.0  # without a heartbeat; machines' clocks must agree to within less
CLAIM_SECONDS = 30.0  # from taking a trial to saying who took it: milliseconds, unless whoever took it died
ZONES_SECONDS = 900.0  # time zones are whole quarters of an hour apart
WORKER, HEARTBEAT = "worker", "heartbeat"  # attributes of a trial


def worker_id(pid: int | None = None) -> str:
    """Which process works on a trial, this one by default: machine, set of process ids (containers have theirs), id."""
    return f"{_place()}:{os.getpid() if pid is None else pid}"


@cache
def _place() -> str:
    """Of machines of one name, as copies of a virtual one are, each has started by itself."""
    start, namespace = "", 0
    with suppress(OSError):  # not Linux
        namespace = os.stat("/proc/self/ns/pid").st_ino
        start = Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
    return f"{socket.gethostname()}:{start}:{namespace}"


def is_gone(attributes: Mapping[str, Any], started: datetime | None) -> bool:
    """Whether the process that works on a trial with these attributes has ended, as far as can be told from here.

    On this machine that is known at once, of others after `GRACE_SECONDS` without a sign of life.
    """
    worker = attributes.get(WORKER)
    if worker is None:
        return started is None or _seconds_since(started) > CLAIM_SECONDS
    beat = float(attributes.get(HEARTBEAT, started.timestamp() if started else 0.0))
    place, _, pid = worker.rpartition(":")
    if place == _place() and not lives(int(pid)):
        return True
    return time.time() - beat > GRACE_SECONDS


def _seconds_since(taken: datetime) -> float:
    """Since a trial was taken, whole quarters of an hour left out.

    Optuna writes the local time of whoever took it, and not in which time zone that is. Clocks may differ as well, by
    up to `CLAIM_SECONDS`.
    """
    return (time.time() - taken.timestamp() + CLAIM_SECONDS) % ZONES_SECONDS - CLAIM_SECONDS


def seconds_silent(attributes: Mapping[str, Any]) -> float:
    """Since the last sign of life."""
    return max(0.0, time.time() - float(attributes.get(HEARTBEAT, time.time())))


def lives(pid: int) -> bool:
    """Whether there is a process of this number on this machine."""
    if sys.platform == "win32":  # asking there would end it
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


class _Attributes(Protocol):
    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None: ...


class Heart:
    """Signs of life for one trial, from a thread of its own, from entering to leaving.

    `lost` once the storage refuses one: the trial was given up as abandoned, and is another's now. A storage that does
    not answer is no reason to stop.
    """

    def __init__(self, storage: _Attributes, trial_id: int) -> None:
        self._storage = storage
        self._trial_id = trial_id
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self.lost = False

    def __enter__(self) -> Self:
        # The name comes last: a name without a beat would be as old as Optuna's clock on another wall says.
        self._storage.set_trial_user_attr(self._trial_id, HEARTBEAT, round(time.time(), 1))
        self._storage.set_trial_user_attr(self._trial_id, WORKER, worker_id())
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._end.wait(HEARTBEAT_SECONDS):
            try:
                self._storage.set_trial_user_attr(self._trial_id, HEARTBEAT, round(time.time(), 1))
            except RuntimeError:  # Optuna's, where the trial has ended
                self.lost = True
                return
            except Exception:  # whatever it is, the training's own writing meets it, too
                continue
