"""A worker: a process that joins a study through its storage and trains what is queued until nothing is left.

Workers hold no state of their own. `run` starts some (workers.py); `camri-tune worker` joins from any machine.
"""

import atexit
import gc
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from optuna.samplers import BaseSampler
from optuna.trial import TrialState as OptunaState

from camri_tune.config import Model, StudyConfig
from camri_tune.database import STORAGE_VARIABLE, import_sql, masked, open_storage
from camri_tune.datasets import Dataset, open_dataset
from camri_tune.errors import CamriTuneError, InputError, StoppedError, StudyMismatchError
from camri_tune.files import code_version, sha256
from camri_tune.memory import keep_freed_memory
from camri_tune.own_networks import FOLDER_VARIABLE, MODEL_VARIABLE, allow, identified
from camri_tune.prefork import serve
from camri_tune.pretrained import starting_weights
from camri_tune.search import Plan, make_sampler
from camri_tune.storage import StudyStore, claim
from camri_tune.training import pick_device
from camri_tune.trials import Stop, run_trial

# Between looks at empty queues, which a database far away should not feel for long.
IDLE_SECONDS = (0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.5, 0.5, 1.0, 2.0)
REST_SECONDS = 0.05  # between two looks at whether to stop


def work(
    *,
    storage_url: str,
    name: str,
    device: str,
    threads: int | None = None,
    data_dir: Path | None = None,
    weights: Path | None = None,
    model: Model | None = None,
    index: int = 0,
    patience: float | None = None,
    asked_to_stop: Stop = lambda: None,
) -> None:
    """Serve study `name` and those within it until its run is done.

    `model` is the user's own network that may be imported here. `index` sets this worker's sampler apart from the
    others'. With `patience`, so many seconds are waited for the study to be there, and for a run to hold it while
    nothing is queued; None expects the study to be there, and waits for its run for ever. Raises StoppedError once
    `asked_to_stop` says why, the training at hand saved and given back; StudyMismatchError where this machine's data,
    program or files are not the study's, or are no longer, as of another run.
    """
    store = _find(storage_url, name, patience, asked_to_stop)
    config = store.config
    if (here := data_dir or _data_here(config.data_dir)) is not None:
        config = config.model_copy(update={"data_dir": here})
    _require_same_program(store, store.attributes)
    _require_same_files(store)
    allow(model)
    _require_same_network(store)
    torch.set_flush_denormal(True)  # tiny activations late in training would slow a CPU down
    keep_freed_memory()
    if threads is not None:
        torch.set_num_threads(threads)
    data = open_dataset(config)
    _require_same_data(store, data)
    config = config.model_copy(update={"weights": _same_weights(store, weights or config.weights)})
    start = starting_weights(config, channels=data.channels, image_size=data.image_size).weights
    plan = Plan(config, data, pick_device(device), start=start)
    stores = {name: store}
    samplers = {name: _sampler(store, config, index)}
    idle, run_seen = 0, time.monotonic()
    while (attributes := store.attributes).get("stage") != "done":
        _require_same_program(store, attributes)  # the run may have ended, and another begun
        _require_same_place(store, attributes)
        for cell in attributes.get("cells", []):
            if cell not in stores:
                stores[cell] = store.cell(cell)
                samplers[cell] = _sampler(stores[cell], config, index)
        claimed = claim(list(stores.values()))
        if claimed is not None:
            serving, stage = claimed.store, claimed.stage
            trial = serving.trial(stage, claimed.trial_id, samplers[serving.name] if stage == "search" else None)
            run_trial(trial, stage, plan.as_stored(serving), serving, asked_to_stop)
            idle, run_seen = 0, time.monotonic()
            continue
        if (reason := asked_to_stop()) is not None:
            raise StoppedError(reason)
        if patience is not None and idle >= len(IDLE_SECONDS):  # not at each look: that costs two more queries
            if store.is_held:
                run_seen = time.monotonic()
            elif time.monotonic() - run_seen > patience:
                return
        _rest(IDLE_SECONDS[min(idle, len(IDLE_SECONDS) - 1)], asked_to_stop)
        idle += 1


def _sampler(store: StudyStore, config: StudyConfig, index: int) -> BaseSampler:
    """A sampler for this process: another for each worker, and each time that a study goes on.

    Else what is drawn at random, before there are trials to learn from, would be drawn again.
    """
    trials = store.optuna_study("search").get_trials(deepcopy=False)
    begun = sum(trial.state != OptunaState.WAITING for trial in trials)  # also what was interrupted
    return make_sampler(config, int(np.random.SeedSequence([config.seed, index, begun]).generate_state(1)[0]))


def _rest(seconds: float, asked_to_stop: Stop) -> None:
    """Sleep, but not on once asked to stop: a run waits for its workers to end before it judges."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0 and asked_to_stop() is None:
        time.sleep(min(left, REST_SECONDS))


def _find(storage_url: str, name: str, patience: float | None, asked_to_stop: Stop) -> StudyStore:
    """The study, once it is there."""
    started, storage = time.monotonic(), None
    for tries in count():
        try:
            storage = storage or open_storage(storage_url)
            return StudyStore.existing(storage, name)
        except InputError as error:
            if time.monotonic() - started >= (patience or 0.0):
                raise
            if tries == 0:
                print(f"camri-tune: waiting for study {name!r} in {masked(storage_url)} ({error})", file=sys.stderr)
        _rest(IDLE_SECONDS[-1], asked_to_stop)
        if (reason := asked_to_stop()) is not None:
            raise StoppedError(reason)
    raise AssertionError("the loop above does not end by itself")


def _data_here(run_has: Path) -> Path | None:
    """Where this machine's data lie, if not where they are on the run's: what CAMRI_DATA says here."""
    named = os.environ.get("CAMRI_DATA")
    return Path(named) if named and not run_has.is_dir() else None


def _require_same_program(store: StudyStore, attributes: Mapping[str, Any]) -> None:
    if (theirs := attributes.get("version")) != code_version():
        raise StudyMismatchError(
            f"study {store.name!r} is run by camri-tune {theirs}, but here it is {code_version()}: trainings of both "
            f"cannot be compared; install the same here, or give the run's command again with this one"
        )


def _require_same_files(store: StudyStore) -> None:
    if not store.artifacts.belongs_to(store.attributes["id"]):
        raise StudyMismatchError(
            f"study {store.name!r} keeps its checkpoints in {store.artifacts_url!r}, and that is another place as seen "
            f"from here: give its run --artifacts with a shared folder or s3://bucket/prefix"
        )


def _require_same_place(store: StudyStore, attributes: Mapping[str, Any]) -> None:
    now = StudyConfig.build(attributes["config"], source=f"study {store.name!r}").artifacts_url
    if now != store.artifacts_url:
        raise StudyMismatchError(
            f"study {store.name!r} keeps its checkpoints in {now!r} now, and kept them in {store.artifacts_url!r} when "
            f"this worker joined: start it again"
        )


def _require_same_network(store: StudyStore) -> None:
    stored, here = store.attributes["identity"]["model"], identified(store.config.model)
    if stored != here:
        raise StudyMismatchError(
            f"study {store.name!r} is on network {stored}, but here it is {here}: bring the same file"
        )


def _require_same_data(store: StudyStore, data: Dataset) -> None:
    stored = store.attributes["identity"]["dataset"]
    if f"({data.fingerprint})" not in stored:
        raise StudyMismatchError(
            f"study {store.name!r} is on data set {stored}, but here it is {data.name} ({data.fingerprint}): bring the "
            f"same files, or name their folder with --data-dir"
        )


def _same_weights(store: StudyStore, here: Path | None) -> Path | None:
    """The file of weights that the study starts from, where it lies on this machine."""
    digest = store.attributes["identity"].get("weights")
    if digest is None:
        return None
    if here is None or not here.is_file() or sha256(here) != digest:
        raise StudyMismatchError(
            f"study {store.name!r} starts from weights whose SHA-256 is {digest}, and {str(here)!r} is no such file "
            f"here: copy the run's file to this machine, and name it with --weights"
        )
    return here


@contextmanager
def stopping_on_signals() -> Iterator[Stop]:
    """SIGTERM and SIGINT become a reason to stop at the next step; a second one ends the process where it stands."""
    asked: list[str] = []

    def note(number: int, _frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(signal.Signals(number).name)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: asked[0] if asked else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _with_parent(parent: int, stop: Stop) -> Stop:
    """Also stop once process `parent` is gone: what nobody supervises would be in the way of the run that resumes."""
    return lambda: stop() or (None if os.getppid() == parent else "the run has ended")


def main(arguments: list[str]) -> int:
    """Work of the processes that a run starts here: NAME DEVICE INDEX THREADS PARENT; storage in the environment."""
    name, device, index, threads, parent = arguments
    with stopping_on_signals() as stop:
        model = os.environ.get(MODEL_VARIABLE)
        try:
            allow(model, folder=os.environ.get(FOLDER_VARIABLE))
            work(
                storage_url=os.environ[STORAGE_VARIABLE],
                name=name,
                device=device,
                index=int(index),
                threads=int(threads),
                model=model,
                asked_to_stop=_with_parent(int(parent), stop),
            )
        except CamriTuneError as error:
            print(f"camri-tune: {error}", file=sys.stderr)
            return error.exit_code
    return 0


if __name__ == "__main__":
    atexit.register(gc.freeze)  # as in cli.py: a run waits for its workers to have ended
    if sys.argv[1:]:
        sys.exit(main(sys.argv[1:]))
    import_sql()
    sys.exit(serve(main))
