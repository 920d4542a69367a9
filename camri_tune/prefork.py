"""Processes forked from one that has imported everything: they are there at once, and share its memory.

Importing PyTorch takes two seconds of a core. A run starts the forker first of all, so that it imports while the run
does the same. Unlike multiprocessing's fork server, it never imports the user's own script again.
"""

import gc
import importlib
import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from camri_tune.config import BUILT_IN_DATASETS, StudyConfig, is_data_file, package_of
from camri_tune.heartbeat import lives

MODULE = "camri_tune.worker"  # what the forker runs, and forks
POLL_SECONDS = 0.05
CAN_FORK = sys.platform == "linux"  # elsewhere system libraries do not bear it


def python_of(module: str) -> list[str]:
    """The command that runs a module of ours, and no file of the folder that it is run in.

    In a checkout that nobody installed the package is found from here.
    """
    home = str(Path(__file__).parent.parent)
    code = f"import runpy, sys; sys.path.append({home!r}); runpy.run_module({module!r}, run_name='__main__')"
    return [sys.executable, "-P", "-c", code]


class Process(Protocol):
    """A started process, as `subprocess.Popen` shows one."""

    pid: int

    def poll(self) -> int | None: ...

    def send_signal(self, sig: int) -> None: ...

    def wait(self, timeout: float | None = None) -> int: ...


class Forker:
    """The process to fork from. Not for several threads."""

    def __init__(self, module: str = MODULE) -> None:
        self._process = subprocess.Popen(
            python_of(module),
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},  # a process that forks must have no other threads
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # a terminal's Ctrl-C is for the run, which then asks its workers to stop
        )
        self._unread = b""
        self._started: list[int] = []
        self.codes: dict[int, int] = {}  # of its children that have ended
        self.gone = False

    @property
    def pid(self) -> int:
        return self._process.pid

    def start(self, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> "Forked":
        """Fork a process that works on these arguments, its output added to `log`. Raises OSError where that fails."""
        self.tell({"start": list(arguments), "environment": dict(environment), "log": str(log), "cwd": os.getcwd()})
        while not self._started:
            self.listen(None)
            if self.gone:
                raise OSError("the process that workers are forked from has ended")
        return Forked(self, self._started.pop())

    def tell(self, order: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        with suppress(OSError):  # it is gone, which is noticed where it is listened to
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()

    def listen(self, seconds: float | None = 0.0) -> None:
        """Note what it has said, waiting so long for it to say something; None: until it does."""
        if self.gone:
            return
        assert self._process.stdout is not None
        stdout = self._process.stdout.fileno()
        while not self.gone and select.select([stdout], [], [], seconds)[0]:
            said = os.read(stdout, 2**16)
            self.gone = not said
            *lines, self._unread = (self._unread + said).split(b"\n")
            for line in map(json.loads, lines):
                if "started" in line:
                    self._started.append(line["started"])
                else:
                    self.codes[line["ended"]] = line["code"]
            seconds = 0.0

    def close(self) -> None:
        """End it. What was forked from it and still runs notices, and ends by itself."""
        self.gone = True
        self._process.kill()
        with suppress(OSError):
            self._process.communicate()


class Forked:
    """A process that a forker has started."""

    def __init__(self, forker: Forker, pid: int) -> None:
        self._forker = forker
        self.pid = pid

    def poll(self) -> int | None:
        """Its exit code, as in `subprocess`; None while it runs."""
        self._forker.listen()
        if self.pid not in self._forker.codes and self._forker.gone and not lives(self.pid):
            self._forker.codes[self.pid] = -signal.SIGKILL  # for all that is known
        return self._forker.codes.get(self.pid)

    def send_signal(self, sig: int) -> None:
        self._forker.listen()
        if not self._forker.gone:
            # Not from here: once it has ended, its number may be another's.
            self._forker.tell({"signal": int(sig), "pid": self.pid})
        elif self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, sig)

    def wait(self, timeout: float | None = None) -> int:
        end = time.monotonic() + (float("inf") if timeout is None else timeout)
        while (code := self.poll()) is None:
            if time.monotonic() >= end:
                raise subprocess.TimeoutExpired(MODULE, timeout or 0.0)
            time.sleep(POLL_SECONDS)
        return code


_forker: Forker | None = None


def begin() -> None:
    """Start a forker, if there is none, so that it is ready when it is needed."""
    global _forker  # noqa: PLW0603 - the command starts it, and the run that it imports afterwards takes it
    if _forker is not None:
        _forker.listen()
        if _forker.gone:
            _forker.close()
            _forker = None
    if CAN_FORK and _forker is None:
        _forker = Forker()


def begin_for(config: StudyConfig, datasets: Sequence[str]) -> None:
    """The same where a run will start workers here, which it will not where a data set cannot be there."""
    if config.has_local_workers and all(map(_can_be_there, datasets)):
        begin()
        if _forker is not None and (package := package_of(config.model)):
            _forker.tell({"import": package})


def _can_be_there(dataset: str) -> bool:
    is_file = is_data_file(dataset) and os.path.isfile(dataset)
    return dataset in BUILT_IN_DATASETS or is_file or os.path.isdir(dataset)


@contextmanager
def at_hand() -> Iterator[None]:
    """Whatever forker there is or is begun meanwhile, there is none afterwards."""
    global _forker  # noqa: PLW0603
    try:
        yield
    finally:
        if _forker is not None:
            _forker.close()
        _forker = None


def start(arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> Process:
    """Start a process that works on these arguments and on the number of the process whose end it must not outlive."""
    begin()
    if _forker is not None:
        return _forker.start([*arguments, str(_forker.pid)], environment, log)
    with log.open("ab") as output:
        return subprocess.Popen(
            [*python_of(MODULE), *arguments, str(os.getpid())],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def serve(work: Callable[[list[str]], int]) -> int:
    """Be the forker, until nobody listens any more. In each forked process this returns what `work` does there."""
    orders, answers = os.dup(0), os.dup(1)
    os.dup2(2, 1)  # whatever prints here: answers are for whoever asked
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    gc.collect()
    gc.freeze()  # a collection in a forked process would write to what all share
    living: set[int] = set()
    unread = b""

    def answer(what: Mapping[str, int]) -> None:
        with suppress(BrokenPipeError):
            os.write(answers, json.dumps(what).encode() + b"\n")

    while True:
        ready, _, _ = select.select([orders, woken], [], [])
        if woken in ready:
            os.read(woken, 2**12)
            for pid in list(living):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    living.remove(pid)
                    answer({"ended": pid, "code": os.waitstatus_to_exitcode(status)})
        if orders not in ready:
            continue
        if not (told := os.read(orders, 2**16)):
            return 0
        *lines, unread = (unread + told).split(b"\n")
        for order in map(json.loads, lines):
            if _obeyed(order, living):
                continue
            if pid := os.fork():
                living.add(pid)
                answer({"started": pid})
            else:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for descriptor in (orders, answers, woken, wake):
                    os.close(descriptor)
                _become(order["environment"], Path(order["log"]), order["cwd"])
                return work(order["start"])


def _obeyed(order: Mapping[str, Any], living: Collection[int]) -> bool:
    """Carry out an order that is none to fork; whether it was one."""
    if "import" in order:
        with suppress(ImportError):  # which the run tells of
            importlib.import_module(order["import"])
    elif "signal" in order:
        if order["pid"] in living:
            os.kill(order["pid"], order["signal"])
    else:
        return False
    return True


def _become(environment: Mapping[str, str], log: Path, folder: str) -> None:
    """Make this process the one that was asked for."""
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for path, flags, descriptors in (
        (os.devnull, os.O_RDONLY, (0,)),
        (log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, (1, 2)),
    ):
        opened = os.open(path, flags, 0o644)
        for descriptor in descriptors:
            os.dup2(opened, descriptor)
        os.close(opened)
    random.seed()  # what libraries draw for pauses and names should differ
