"""What of a study is not training?

Claim (2 cores of an AMD EPYC without AVX-512, so in float32, torch 2.14, little else at work; n = 1 study of 52
trainings of 8 epochs by Muon, 51 minutes): 98.1 % of the workers' time was trials; 0.2 % went by before the first one,
which began 5.2 s after the command, 0.1 % was waiting at the ends of stages, and 1.7 % came after the last trial,
nearly all of it the test part's answers in float32. What trials take beside training this study does not tell: by
itself a training was 9 % slower, later in that hour. 52 trials that train nothing take 10 to 12 s, 0.2 % of this time.
That comes to 2.1 %; the goal is 2 %. Where bfloat16 makes trainings shorter, each share is larger (docs/measured.md).

`python -m benchmarks.overhead measure` runs a study of 30 trials on GTSRB (5 images of each track) with the installed
command, CAMRI_DATA naming the data, and then trains the same network on the same images for the same epochs in as many
processes at once, without study, storage or checkpoints, in turns: what a training takes by itself. It writes
`benchmarks/overhead.json`; `report` prints it. All shares are of the workers' time, from the command to its end:

- *training*: epochs that trials trained, at the seconds an epoch takes by itself;
- *in trials*: what else they take: claim, sampler, reports, saved states, checkpoints, the noise of both measurements;
- *waiting*: workers without a trial between the first and the last one: while the last of the baseline's rates
  trains, or the last model of all;
- *before* the first trial and *after* the last: start, data, the test part, result, report.
"""

import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import torch
from optuna.trial import FrozenTrial

from benchmarks.training import as_a_worker, machine_of, open_data
from camri_tune.database import open_storage
from camri_tune.records import ACCURACY_CURVE
from camri_tune.storage import Stage, StudyStore
from camri_tune.training import HeadSpec, cpu_count, recipe_of, train
from tests.command import COMMAND

FIGURES = Path(__file__).with_suffix(".json")
SUBSET, EPOCHS, TRIALS, ROUNDS = {"per_group": 5}, 8, 30, 3


def _alone(barrier: Barrier, results: Any) -> None:
    as_a_worker()
    data = open_data("gtsrb", **SUBSET)
    recipe = recipe_of(
        "compact", epochs=EPOCHS, learning_rate=4e-3, augmentation=data.augmentation, images=len(data.train)
    )
    for seed in range(ROUNDS + 1):  # the first warms up
        barrier.wait()
        trained = train(
            "compact",
            HeadSpec("camri", 16.0, {14: 0.2}),
            data.train,
            data.validation,
            num_classes=len(data.classes),
            recipe=recipe,
            seed=seed,
            device=torch.device("cpu"),
        )
        results.put(trained.seconds if seed else None)


def seconds_of_a_training(workers: int) -> float:
    """By itself, beside as many others as there are workers: the median."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(workers), context.SimpleQueue()
    processes = [context.Process(target=_alone, args=(barrier, results)) for _ in range(workers)]
    for process in processes:
        process.start()
    found = [results.get() for _ in range(workers * (ROUNDS + 1))]
    for process in processes:
        process.join()
    return float(statistics.median(seconds for seconds in found if seconds is not None))


def trials_of(runs: Path, name: str) -> list[FrozenTrial]:
    """All trials of a study, of its baseline and finalists too."""
    storage = open_storage(f"sqlite:///{runs}/{name}/study.db")
    store = StudyStore.existing(storage, name)
    stages: tuple[Stage, ...] = ("baseline", "search", "finalists")
    trials = [trial for stage in stages for trial in store.optuna_study(stage).trials]
    storage.close()
    return trials


def breakdown(
    trials: Sequence[FrozenTrial], started: float, wall: float, workers: int, seconds_of_an_epoch: float
) -> dict[str, Any]:
    """What became of the workers' time in a study that took `wall` seconds from the Unix time `started`."""
    spans = [
        (t.datetime_start.timestamp(), t.datetime_complete.timestamp())
        for t in trials
        if t.datetime_start is not None and t.datetime_complete is not None
    ]
    first, last = min(start for start, _ in spans), max(end for _, end in spans)
    in_trials = sum(end - start for start, end in spans)
    training = seconds_of_an_epoch * sum(max(map(int, t.user_attrs[ACCURACY_CURVE])) for t in trials)
    seconds = {
        "training": training,
        "in trials": in_trials - training,
        "waiting": workers * (last - first) - in_trials,
        "before": workers * (first - started),
        "after": workers * (started + wall - last),
    }
    return {
        "workers": workers,
        "trials": len(trials),
        "seconds": round(wall, 1),
        "seconds to the first trial": round(first - started, 2),
        "seconds of an epoch by itself": round(seconds_of_an_epoch, 3),
        "shares": {name: round(value / (workers * wall), 4) for name, value in seconds.items()},
    }


def measure() -> None:
    options = ["--per-group", SUBSET["per_group"], "--epochs", EPOCHS, "--trials", TRIALS, "--tolerance", 2]
    open_data("gtsrb", **SUBSET)  # a warm cache
    with tempfile.TemporaryDirectory(prefix="camri-overhead-") as folder:
        words = ["run", "--dataset", "gtsrb", "--important", "30", *options, "--name", "overhead"]
        started = datetime.now().timestamp()
        before = time.perf_counter()
        done = subprocess.run([COMMAND, *map(str, words), "--out", folder, "--quiet"], check=False)
        wall = time.perf_counter() - before
        if done.returncode not in (0, 3):
            raise SystemExit(f"the study ended with exit code {done.returncode}")
        trials = trials_of(Path(folder), "overhead")
    workers = cpu_count()
    alone = seconds_of_a_training(workers)
    figures = {
        "command": " ".join(["camri-tune", *map(str, words)]),
        "machine": machine_of(torch.device("cpu")),
        **breakdown(trials, started, wall, workers, alone / EPOCHS),
    }
    FIGURES.write_text(json.dumps(figures, indent=2) + "\n")
    print(FIGURES.read_text())


if __name__ == "__main__":
    measure() if sys.argv[1:2] == ["measure"] else print(FIGURES.read_text())
