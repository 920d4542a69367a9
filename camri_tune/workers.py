"""The workers that a run starts and watches over: a dead one is replaced, one that keeps dying ends the run."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import torch

from camri_tune import prefork
from camri_tune.config import Model, StudyConfig
from camri_tune.database import STORAGE_VARIABLE
from camri_tune.errors import InputError, WorkerError
from camri_tune.heartbeat import worker_id
from camri_tune.own_networks import FOLDER_VARIABLE, MODEL_VARIABLE, folder_of
from camri_tune.storage import StudyStore
from camri_tune.training import cpu_count, pick_device

MOST_FRUITLESS = 8  # deaths of one worker in a row without a finished training: more than one bad trial may cause
PAUSES = (0.0, 0.5, 1.0, 2.0, 4.0)  # seconds before a worker is started again, by its fruitless deaths
STOP_SECONDS = 30.0  # for the step at hand and for saving


class Worker(Protocol):
    """A started worker, wherever it runs."""

    @property
    def name(self) -> str:
        """As in the attribute of the trials that it runs (heartbeat.py)."""

    def ended(self) -> str | None:
        """Why it has ended; None while it works. Raises InputError where another like it would end alike."""

    def stop(self) -> None:
        """Ask it to give its training back and end."""

    def wait(self, seconds: float) -> None:
        """Wait until it has ended; after so many seconds, end it."""


Launch = Callable[[int], Worker]  # of the worker in this place


class Workers:
    """As many workers as a run has places for them, started by `launch`."""

    def __init__(self, *, store: StudyStore, launch: Launch, places: int) -> None:
        self._store = store
        self._launch = launch
        self._places = places
        self._workers: dict[int, Worker] = {}
        self._fruitless = dict.fromkeys(range(places), 0)
        self._due: dict[int, float] = {}

    def __enter__(self) -> Self:
        for place in range(self._places):
            self._workers[place] = self._launch(place)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers.values():
            worker.stop()
        end = time.monotonic() + STOP_SECONDS
        for worker in self._workers.values():
            worker.wait(max(0.0, end - time.monotonic()))

    def wait(self, finished: Callable[[], bool], on_tick: Callable[[], None], seconds: float = 0.5) -> None:
        """Wait until `finished()`, calling `on_tick` every `seconds` and replacing workers that died.

        Trainings that died with a worker, here or elsewhere, are queued again.
        """
        while not finished():
            self._replace_the_dead()
            self._store.requeue_interrupted()
            on_tick()
            time.sleep(seconds)
        on_tick()

    def _replace_the_dead(self) -> None:
        for place, worker in list(self._workers.items()):
            if place not in self._due:
                reason = worker.ended()
                if reason is None:
                    continue
                self._store.requeue_interrupted(dead=worker.name)
                fruitless = 0 if self._store.has_finished(worker.name) else self._fruitless[place] + 1
                self._fruitless[place] = fruitless
                if fruitless >= MOST_FRUITLESS:
                    raise WorkerError(f"worker processes keep ending without a finished training ({reason})")
                self._due[place] = time.monotonic() + PAUSES[min(fruitless, len(PAUSES)) - 1 if fruitless else 0]
            if time.monotonic() >= self._due[place]:
                del self._due[place]
                self._workers[place] = self._launch(place)


class LocalProcess:
    """A worker process on this machine, its output in a file."""

    def __init__(self, process: prefork.Process, log: Path) -> None:
        self._process = process
        self._log = log

    @property
    def name(self) -> str:
        return worker_id(self._process.pid)

    def ended(self) -> str | None:
        code = self._process.poll()
        if code is None:
            return None
        lines = self._log.read_text(errors="replace").strip().splitlines()
        said = lines[-1].removeprefix("camri-tune: ") if lines else ""
        if code == InputError.exit_code:
            raise InputError(f"a worker cannot work here: {said}")
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}: {said}"
        return f"{how}; its log is {self._log}"

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)

    def wait(self, seconds: float) -> None:
        try:
            self._process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()


def local_launch(
    *, name: str, storage_url: str, devices: Sequence[str], log_folder: Path, model: Model | None = None
) -> Launch:
    """Start workers as processes on this machine, on these devices. Those on a CPU share its cores.

    One on a GPU has a thread: most of what it computes on the host is small, the sampler's matrices above all.
    `model` is the user's own network that they may import.
    """
    log_folder.mkdir(parents=True, exist_ok=True)
    on_cpu = sum(device == "cpu" for device in devices)
    threads = max(1, cpu_count() // on_cpu) if on_cpu else 1

    def launch(place: int) -> Worker:
        environment = {**os.environ, STORAGE_VARIABLE: storage_url}
        if model is not None:
            environment |= {MODEL_VARIABLE: model, FOLDER_VARIABLE: folder_of(model)}
        environment["OMP_NUM_THREADS"] = str(threads)
        log = log_folder / f"worker-{place}.log"
        try:
            return LocalProcess(prefork.start([name, devices[place], str(place), str(threads)], environment, log), log)
        except OSError as error:
            raise WorkerError(f"worker processes cannot be started: {error}") from None

    return launch


def device_here(config: StudyConfig) -> torch.device:
    """Where the run itself computes: workers elsewhere may have GPUs that this machine lacks. Raises InputError."""
    elsewhere = config.launcher == "ray" or config.workers == 0
    if elsewhere and config.device.startswith("cuda") and not torch.cuda.is_available():
        return torch.device("cpu")
    return pick_device(config.device)


def places_for(config: StudyConfig, device: torch.device, gpus: int) -> list[str]:
    """The device of each worker of a run on a machine with so many GPUs.

    `auto`: on a CPU one single-threaded worker per core, which beats threads; `workers_per_gpu` on each GPU, on all of
    them unless `device` names one. That is two of the network `compact`, if there are cores enough: a GPU waits for the
    host before and after each of its short trainings (1.2 times as many an hour, benchmarks/gpu.json).
    """
    if device.type == "cpu":
        return ["cpu"] * (cpu_count() if config.workers == "auto" else config.workers)
    own = [str(device)] if device.index is not None else [f"cuda:{index}" for index in range(gpus)]
    packed = config.workers_per_gpu
    if packed == "auto":
        packed = 2 if config.model == "compact" and cpu_count() >= 2 * len(own) else 1
    count = len(own) * packed if config.workers == "auto" else config.workers
    return [own[place % len(own)] for place in range(count)]
