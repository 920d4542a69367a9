"""Memory and speed of workers against the size of the data.

Claim (2 cores of a Xeon with AMX, 24 GB, torch 2.14; medians of 3 rounds): from 10,000 to 1,000,000 images at 32x32 a
worker has 164 to 241 MB of its own, and both together train on 3,861 to 3,664 images a second; 30 GB of images at
224x224 are opened in 10 ms and trained on at 64 a second, 6 GB at 72.

`python -m benchmarks.scale measure` writes image caches of random pixels of each size into a scratch folder (up to
30 GB, removed afterwards), has two processes of one thread each train on them at once, as workers do, and writes
`benchmarks/scale.json`; `report` prints it. *own* is the memory that belongs to one worker alone, above what it had
before it opened the data; *shared* the pages of the images that all map. *images/s* is of both workers together, from
the first step on, with the page cache emptied before (*cold*) and then once more (*warm*).
"""

import json
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.training import as_a_worker, machine_of
from camri_tune.augmentation import Augmentation
from camri_tune.datasets import _stored, _written_whole
from camri_tune.memory import free_memory
from camri_tune.training import HeadSpec, Recipe, train

FIGURES = Path(__file__).with_suffix(".json")
CASES = ((10_000, 32), (100_000, 32), (1_000_000, 32), (37_000, 224), (200_000, 224))  # images, side
STEPS = {32: 48, 224: 6}
CLASSES, BATCH, WORKERS, REPEATS = 43, 128, 2, 3
STRONG = Augmentation(rotate=16, shift=0.09, zoom=0.16, shear=0.13, light=0.55, blur=0.6)


class _EnoughError(Exception):
    pass


def write(path: Path, count: int, side: int) -> None:
    """A cache file as a data set's decoding leaves it."""
    rng = np.random.default_rng(0)
    with _written_whole(path, (count, 3, side, side)) as arrays:
        arrays["labels"][:] = rng.integers(CLASSES, size=count)
        arrays["groups"][:] = np.arange(count)
        arrays["good"][:] = True
        block = rng.integers(256, size=(1_000, 3, side, side), dtype=np.uint8)
        for start in range(0, count, len(block)):
            arrays["pixels"][start : start + len(block)] = block[: count - start]


def memory_of() -> dict[str, float]:
    """Megabytes of this process: its own, and those it shares or could (clean pages of files)."""
    text = Path("/proc/self/smaps_rollup").read_text()
    found = {key: int(value) / 1024 for key, value in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}
    return {"own": found["Anonymous"], "all": found["Rss"]}


def _work(path: Path, side: int, barrier: Barrier, results: Any) -> None:
    as_a_worker()
    before, opening = memory_of(), time.perf_counter()
    stored = _stored(path)
    assert stored is not None
    order = np.random.default_rng(0).permutation(len(stored.listed))
    training, validation = stored.listed[order[len(order) // 5 :]], stored.listed[order[:BATCH]]
    opened = time.perf_counter() - opening
    taken, started, steps = 0, 0.0, STEPS[side]

    def step() -> None:
        nonlocal taken, started
        if taken == 0:
            barrier.wait()
            started = time.perf_counter()
        if taken == steps:
            raise _EnoughError
        taken += 1

    try:
        train(
            "compact",
            HeadSpec("ce"),
            training,
            validation,
            num_classes=CLASSES,
            recipe=Recipe(1, 1e-3, STRONG, batch_size=BATCH),
            seed=os.getpid(),
            device=torch.device("cpu"),
            on_step=step,
        )
    except _EnoughError:
        seconds = time.perf_counter() - started
    after = memory_of()
    results.put({"open": opened, "seconds": seconds, **{key: after[key] - before[key] for key in after}})


def once(path: Path, side: int) -> dict[str, float]:
    """Both workers at once: the slower one's seconds."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(WORKERS), context.SimpleQueue()
    processes = [context.Process(target=_work, args=(path, side, barrier, results)) for _ in range(WORKERS)]
    for process in processes:
        process.start()
    found = [results.get() for _ in processes]
    for process in processes:
        process.join()
    return {
        "images/s": WORKERS * STEPS[side] * BATCH / max(row["seconds"] for row in found),
        "seconds to open": max(row["open"] for row in found),
        "own MB of a worker": max(row["own"] for row in found),
        "shared MB": max(row["all"] - row["own"] for row in found),
    }


def empty_page_cache() -> bool:
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:  # only root may
        return False
    return True


def measure() -> None:
    figures: dict[str, Any] = {}
    free = free_memory() or 0
    for count, side in CASES:
        with tempfile.TemporaryDirectory(
            prefix="camri-scale-", dir=sys.argv[2] if len(sys.argv) > 2 else None
        ) as folder:
            path = Path(folder) / "train.safetensors"
            write(path, count, side)
            cold = once(path, side) if empty_page_cache() else None
            rows = [once(path, side) for _ in range(REPEATS)]
            row: dict[str, float | None] = {
                key: round(statistics.median(found[key] for found in rows), 3) for key in rows[0]
            }
            row["cold images/s"] = None if cold is None else round(cold["images/s"], 1)
            figures[f"{count:,} at {side}x{side}"] = {"GB of images": round(path.stat().st_size / 1e9, 2), **row}
            print(json.dumps(figures, indent=2), flush=True)
    about = {
        "machine": machine_of(torch.device("cpu")),
        "free GB": round(free / 1e9, 1),
        "workers": WORKERS,
        "batch": BATCH,
        "repeats": REPEATS,
    }
    FIGURES.write_text(json.dumps({**about, "sizes": figures}, indent=2) + "\n")


if __name__ == "__main__":
    measure() if sys.argv[1:2] == ["measure"] else print(FIGURES.read_text())
