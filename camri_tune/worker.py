"""A worker: a process that joins a study through its storage and trains what is queued until nothing is left.

Workers hold no state of their own. `run` starts local ones; `camri-tune worker` joins from any machine.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from camri_tune.config import StudyConfig
from camri_tune.datasets import Dataset, open_dataset
from camri_tune.errors import StudyMismatchError, WorkerError
from camri_tune.search import Plan, make_sampler, run_trial, worker_id
from camri_tune.storage import STAGES, STORAGE_VARIABLE, StudyStore, open_storage
from camri_tune.training import cpu_count, pick_device

IDLE_SECONDS = 0.2
MAX_RESTARTS = 3


def work(
    *,
    storage_url: str,
    name: str,
    device: str,
    threads: int | None = None,
    data_dir: Path | None = None,
    index: int = 0,
    parent: int | None = None,
) -> None:
    """Serve study `name` and those within it until its run is done, or until process `parent`, if named, is gone.

    `index` sets this worker's sampler apart from the others'. Raises StudyMismatchError where this machine's data are
    not the study's.
    """
    store = StudyStore.existing(open_storage(storage_url), name)
    config = store.config if data_dir is None else store.config.model_copy(update={"data_dir": data_dir})
    torch.set_flush_denormal(True)  # tiny activations late in training would slow a CPU down
    if threads is not None:
        torch.set_num_threads(threads)
    data = open_dataset(config)
    _require_same_data(store, data)
    target = pick_device(device)
    stores = {name: store}
    samplers = {name: make_sampler(config, seed=config.seed * 1_000 + index)}
    while (attributes := store.attributes).get("stage") != "done" and parent in (None, os.getppid()):
        for cell in attributes.get("cells", []):
            if cell not in stores:
                stores[cell] = store.cell(cell)
                samplers[cell] = make_sampler(config, seed=config.seed * 1_000 + index)
        for stage, serving in product(STAGES, stores.values()):
            trial = serving.claim(stage, samplers[serving.name] if stage == "search" else None)
            if trial is not None:
                run_trial(trial, stage, _plan(serving, data, target), serving)
                break
        else:
            time.sleep(IDLE_SECONDS)


def _plan(store: StudyStore, data: Dataset, device: torch.device) -> Plan:
    baseline = store.attributes.get("baseline")
    if baseline is None:
        return Plan(store.config, data, device)
    return Plan(
        store.config,
        data,
        device,
        important=tuple(baseline["important"]),
        floors=tuple(baseline["floors"]),
        baseline_learning_rate=baseline["learning_rate"],
    )


def _require_same_data(store: StudyStore, data: Dataset) -> None:
    stored = store.attributes["identity"]["dataset"]
    if f"({data.fingerprint})" not in stored:
        raise StudyMismatchError(
            f"study {store.name!r} is on data set {stored}, but here it is {data.name} ({data.fingerprint}): bring the "
            f"same files, or name their folder with --data-dir"
        )


class LocalWorkers:
    """Worker processes of one run on this machine; a dead one is replaced, a repeatedly failing one ends the run."""

    def __init__(
        self, *, store: StudyStore, storage_url: str, device: torch.device, count: int, log_folder: Path
    ) -> None:
        self._store = store
        self._storage_url = storage_url
        self._device = device
        self._count = count
        self._log_folder = log_folder
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._restarts = 0

    def __enter__(self) -> Self:
        self._log_folder.mkdir(parents=True, exist_ok=True)
        for index in range(self._count):
            self._start(index)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes.values():
            process.send_signal(signal.SIGTERM)
        for process in self._processes.values():
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def wait(self, finished: Callable[[], bool], on_tick: Callable[[], None], seconds: float = 0.5) -> None:
        """Wait until `finished()`, calling `on_tick` every `seconds` and replacing workers that died."""
        while not finished():
            self._replace_the_dead()
            on_tick()
            time.sleep(seconds)
        on_tick()

    def _start(self, index: int) -> None:
        threads = max(1, cpu_count() // self._count) if self._device.type == "cpu" else None
        command = [
            sys.executable,
            "-m",
            "camri_tune.worker",
            self._store.name,
            str(self._device),
            str(index),
            str(threads or 0),
        ]
        environment = {**os.environ, STORAGE_VARIABLE: self._storage_url}
        if threads is not None:
            environment["OMP_NUM_THREADS"] = str(threads)
        with self._log(index).open("ab") as log:
            self._processes[index] = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def _log(self, index: int) -> Path:
        return self._log_folder / f"worker-{index}.log"

    def _replace_the_dead(self) -> None:
        for index, process in self._processes.items():
            if process.poll() is None:
                continue
            # Its trial would stay RUNNING for ever: nobody else knows that it ended.
            self._store.requeue_interrupted(worker_id(process.pid))
            self._restarts += 1
            if self._restarts > MAX_RESTARTS:
                lines = self._log(index).read_text(errors="replace").strip().splitlines()
                reason = lines[-1] if lines else f"exit code {process.returncode}"
                raise WorkerError(f"worker processes keep ending ({reason}); the log is {self._log(index)}")
            self._start(index)


def worker_count(config: StudyConfig, device: torch.device) -> int:
    """`auto`: on a CPU one single-threaded worker per core, which beats threads; on a GPU one."""
    if config.workers != "auto":
        return config.workers
    return cpu_count() if device.type == "cpu" else 1


def main(arguments: list[str]) -> None:
    """Entry of the processes that `LocalWorkers` starts: NAME DEVICE INDEX THREADS, storage in the environment."""
    name, device, index, threads = arguments
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    work(
        storage_url=os.environ[STORAGE_VARIABLE],
        name=name,
        device=device,
        index=int(index),
        threads=int(threads) or None,
        parent=os.getppid(),
    )


if __name__ == "__main__":
    main(sys.argv[1:])
