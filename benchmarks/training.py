"""How fast does a network train here, beside a careful PyTorch loop and Lightning, and to which accuracy?

Claim (`race`, GTSRB, 5,230 images, n = 6 seeds, 2 cores of an AMD EPYC without AMX, torch 2.14): the plain loop takes
78 s to a validation accuracy of 0.969, ours 11.9 s to 0.977: 6.6 times as fast to a higher accuracy (+0.8 points
[+0.4, +1.1]), with Muon and 5 epochs where the plain loop has AdamW and 12. With ours' own former AdamW it was 3.6
times. The goal of 6 times is met in seconds to an accuracy; in images a second it is not: with AdamW (n = 5 rounds of
4,096 images, 2 cores of a Xeon with AMX) two processes of one thread each, as in a study, trained 4,524 images a
second, 5.1 times the plain loop's 894, one of two threads 3,921, Lightning 920, and at the same epochs and initial
weights ours was more accurate (+2.6 points [+1.6, +3.6], 6 paired seeds, for which the changes to images, alike but
not equal, may be the reason). With Muon neither was measured there. On a GPU: see gpu.py.
`python benchmarks/training.py speed [--dataset gtsrb|cifar10]` times the contenders in turn, a process each, several
rounds; `accuracy` trains ours and the plain loop from the same initial weights for as many epochs over several seeds;
`race` times both to the accuracy that the plain loop comes to; `goals` times trainings whose test accuracy should be
94 % on CIFAR-10 and 98.9 % on GTSRB, `peer` those of `airbench` 0.1.8 (`train94`) and then ours on CIFAR-10, which
wants a CUDA device; `report` prints benchmarks/training.json. What is finished there is kept, so that they can run one
by one.

All but those of `peer` train the same network and head (`CompactCNN`, cross-entropy; 0.44 M parameters) with the same
schedule, batch size and changes to images; ours with Muon at a rate of 0.016, the others with AdamW at 0.008. The plain
loop is that of PyTorch's own examples: a data set of PIL images in memory (as torchvision's CIFAR10 has them: to decode
files would take longer), transforms v2, a DataLoader with two workers that persist, float32, as many threads as there
are cores. Lightning has the same loader. Where v2 has no equal: shear is along x alone as here, but each pixel beyond
the edge is grey instead of the edge's, zoom does not stretch, colour is ColorJitter's brightness, contrast and
saturation, no side lies in the shade, and the blur is a Gaussian's.
Timed is training alone, without start-up, evaluation and each contender's first steps.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import math
import multiprocessing
import os
import platform
import queue
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from camri_tune import datasets
from camri_tune.augmentation import Augmentation
from camri_tune.config import Model, StudyConfig
from camri_tune.images import Images
from camri_tune.memory import keep_freed_memory
from camri_tune.metrics import accuracy
from camri_tune.models import Classifier, CompactCNN
from camri_tune.stats import mean_interval
from camri_tune.training import (
    HeadSpec,
    Recipe,
    _optimizer,
    cpu_count,
    evaluate,
    has_fast_bfloat16,
    pick_device,
    recipe_of,
    schedule_of,
    train,
)

FIGURES = Path(__file__).with_suffix(".json")
RATE, PLAIN_RATE = 16e-3, 8e-3  # good for Muon, and for AdamW
WARM_IMAGES = 512
CAMRI = HeadSpec("camri", 16.0, {14: 0.2})
GOAL = {"gtsrb": 0.989, "cifar10": 0.94}
SUBSETS = {"gtsrb": {"per_group": 5}, "cifar10": {"limit": 5_000}}  # where accuracy is compared
GPU_EPOCHS = 8  # of all images: one would be over before it can be timed


def open_data(name: str, **subset: int) -> datasets.Dataset:
    """The data set under CAMRI_DATA, or below the working directory."""
    folder = Path(os.environ.get("CAMRI_DATA", "data"))
    return datasets.open_dataset(StudyConfig.model_validate({"dataset": name, "data_dir": folder, **subset}))


def some(images: Images, count: int) -> Images:
    """As many, again and again where there are fewer."""
    rows: NDArray[np.int64] = np.random.default_rng(0).permutation(max(count, len(images)))[:count] % len(images)
    return images[rows]


def recipe_for(data: datasets.Dataset, epochs: int, rate: float = RATE, model: Model = "compact") -> Recipe:
    """For a full-sized training set's batches, whatever part of it is timed."""
    return recipe_of(model, epochs=epochs, learning_rate=rate, augmentation=data.augmentation, images=20_000)


# --- the contenders ---------------------------------------------------------------------------------------------------


def train_ours(
    images: Images,
    validation: Images,
    classes: int,
    recipe: Recipe,
    device: torch.device,
    seed: int = 0,
    model: Model = "compact",
) -> tuple[float, Classifier]:
    """Seconds of training, from the first step to the last epoch's end without its evaluation."""
    marks: list[float] = []
    last = len(images) // min(recipe.batch_size, len(images)) * recipe.epochs - 1

    def step() -> None:
        if device.type == "cuda" and len(marks) in (0, last):
            torch.cuda.synchronize(device)  # all steps before this one are done, not only on their way
        marks.append(time.perf_counter())

    trained = train(
        model,
        HeadSpec("ce"),
        images,
        validation,
        num_classes=classes,
        recipe=recipe,
        seed=seed,
        device=device,
        on_step=step,
    )
    # The last step's own time is not marked: it counts as the mean of the others.
    return (marks[-1] - marks[0]) * len(marks) / (len(marks) - 1), trained.classifier


class InMemory(Dataset[tuple[Tensor, int]]):
    """PIL images and labels, as torchvision's data sets give them."""

    def __init__(self, images: Images, transform: Callable[[Image.Image], Tensor]) -> None:
        self._arrays = images.pixels.permute(0, 2, 3, 1).contiguous().numpy()
        self._labels = images.labels.tolist()
        self._transform = transform

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._transform(Image.fromarray(self._arrays[index])), self._labels[index]


def transform_of(how: Augmentation) -> Callable[[Image.Image], Tensor]:
    from torchvision.transforms import v2  # noqa: PLC0415 - two seconds that our own processes need not pay

    steps: list[nn.Module] = []
    if how.mirror:
        steps.append(v2.RandomHorizontalFlip())
    shear = math.degrees(math.atan(how.shear))
    steps.append(
        v2.RandomAffine(
            how.rotate,
            (how.shift, how.shift),
            (1 - how.zoom, 1 + how.zoom),
            shear or None,
            interpolation=v2.InterpolationMode.BILINEAR,
            fill=128,
        )
    )
    if how.light:
        steps.append(v2.ColorJitter(how.light, how.light, how.light * 0.3))
    # Each step on what it is faster with: up to here PIL images, by half.
    steps.append(v2.PILToTensor())
    if how.blur:
        steps.append(v2.RandomApply([v2.GaussianBlur(3)], p=how.blur))
    steps.append(v2.ToDtype(torch.float32))  # of range 0 to 255, as the network takes them
    return cast(Callable[[Image.Image], Tensor], v2.Compose(steps))


def loader_of(images: Images, recipe: Recipe, device: torch.device) -> DataLoader[tuple[Tensor, int]]:
    return DataLoader(
        InMemory(images, transform_of(recipe.augmentation)),
        batch_size=recipe.batch_size,
        shuffle=True,
        num_workers=2,
        drop_last=True,
        persistent_workers=True,
        pin_memory=device.type == "cuda",
    )


def plain_parts(
    images: Images, classes: int, recipe: Recipe
) -> tuple[Classifier, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Network and schedule as ours has them, and AdamW."""
    body = CompactCNN(images.pixels.shape[1], images.pixels.shape[2])
    classifier = Classifier(body, HeadSpec("ce").build(classes, body.embedding_size))
    groups = _optimizer(classifier, recipe, torch.device("cpu")).groups
    kept = [{"params": group.parameters, "weight_decay": group.weight_decay} for group in groups]
    optimizer = torch.optim.AdamW(kept, lr=PLAIN_RATE, betas=recipe.betas)
    factor = schedule_of(len(images) // recipe.batch_size * recipe.epochs, recipe)
    return classifier, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def train_plain(
    images: Images, classes: int, recipe: Recipe, device: torch.device, seed: int = 0
) -> tuple[float, Classifier]:
    torch.manual_seed(seed)
    classifier, optimizer, schedule = plain_parts(images, classes, recipe)
    classifier.to(device).train()
    loader = loader_of(images, recipe, device)
    first = iter(loader)  # starts the workers, which is not timed
    start = time.perf_counter()
    for epoch in range(recipe.epochs):
        for pixels, labels in first if epoch == 0 else loader:
            x, y = pixels.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            optimizer.zero_grad()
            loss = classifier.head(classifier.embed(x), y)
            loss.backward()
            optimizer.step()
            schedule.step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, classifier


def train_lightning(images: Images, classes: int, recipe: Recipe, device: torch.device) -> float:
    import lightning  # noqa: PLC0415 - for this benchmark alone

    class Module(lightning.LightningModule):
        started = ended = 0.0

        def __init__(self) -> None:
            super().__init__()
            self.classifier, self._optimizer, self._schedule = plain_parts(images, classes, recipe)

        def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
            loss: Tensor = self.classifier.head(self.classifier.embed(batch[0]), batch[1])
            return loss

        def configure_optimizers(self) -> Any:
            schedule = {"scheduler": self._schedule, "interval": "step"}
            return {"optimizer": self._optimizer, "lr_scheduler": schedule}

        def on_train_batch_start(self, *_: Any) -> None:
            self.started = self.started or time.perf_counter()  # with the workers running and a batch at hand

        def on_train_end(self) -> None:
            self.ended = time.perf_counter()

    trainer = lightning.Trainer(
        max_epochs=recipe.epochs,
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Module()
    trainer.fit(module, loader_of(images, recipe, device))
    return module.ended - module.started


# --- images per second ------------------------------------------------------------------------------------------------


def rate_of(contender: str, dataset: str, count: int, device: torch.device) -> float:
    """Images per second of one contender in this process."""
    data = open_data(dataset)
    images, classes, recipe = some(data.train, count), len(data.classes), recipe_for(data, 1)
    warm = some(data.train, WARM_IMAGES)
    if contender == "Lightning":
        train_lightning(warm, classes, recipe, device)
        seconds = train_lightning(images, classes, recipe, device)
    elif contender == "plain loop":
        train_plain(warm, classes, recipe, device)
        seconds, _ = train_plain(images, classes, recipe, device)
    elif device.type == "cuda":
        count = len(data.train) * GPU_EPOCHS
        few = some(data.validation, 64)
        train_ours(warm, few, classes, recipe, device)
        seconds, _ = train_ours(data.train, few, classes, recipe_for(data, GPU_EPOCHS), device)
    else:
        seconds = seconds_at_once(1, images, data, device)
    return count // recipe.batch_size * recipe.batch_size / seconds


def seconds_at_once(
    processes: int,
    images: Images,
    data: datasets.Dataset,
    device: torch.device,
    *,
    whole: bool = False,
    most: float = math.inf,
) -> float:
    """Seconds of a training in each of so many processes at once, the slowest's.

    An epoch's steps alone, or a `whole` one: the usual epochs with start, evaluations and all, which leave a GPU idle.
    Raises RuntimeError where a process fails, or all of it takes more than `most` seconds.
    """
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(processes), context.Queue()
    threads = max(1, cpu_count() // processes)
    validation = data.validation if whole else some(data.validation, 64)
    recipe = recipe_for(data, data.epochs if whole else 1)
    arguments = (images, validation, len(data.classes), recipe, device, threads, whole, barrier, results)
    running = [context.Process(target=_ours, args=arguments) for _ in range(processes)]
    for process in running:
        process.start()
    found: list[float] = []
    started = time.perf_counter()
    while len(found) < processes:
        try:
            found.append(results.get(timeout=1))
        except queue.Empty:
            failed = any(process.exitcode for process in running)
            if failed or time.perf_counter() - started > most:
                for process in running:
                    process.kill()
                why = "one failed" if failed else f"not done after {most:.0f} s"
                raise RuntimeError(f"{processes} processes: {why}") from None
    for process in running:
        process.join()
    return max(found)


def _ours(
    images: Images,
    validation: Images,
    classes: int,
    recipe: Recipe,
    device: torch.device,
    threads: int,
    whole: bool,
    barrier: Barrier,
    results: "multiprocessing.Queue[float]",
) -> None:
    as_a_worker(threads)
    train_ours(some(images, WARM_IMAGES), validation, classes, replace(recipe, epochs=1), device)
    barrier.wait()
    if whole:
        seconds = train(
            "compact", CAMRI, images, validation, num_classes=classes, recipe=recipe, seed=0, device=device
        ).seconds
    else:
        seconds, _ = train_ours(images, validation, classes, recipe, device)
    barrier.wait()  # none has the machine to itself at the end
    results.put(seconds)


def as_a_worker(threads: int = 1) -> None:
    """Have this process train as a study's workers do."""
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    keep_freed_memory()


def contenders(device: torch.device) -> list[str]:
    ours = ["ours"] if device.type == "cuda" or cpu_count() == 1 else ["ours", f"ours, {cpu_count()} processes"]
    others = ["plain loop"]
    if importlib.util.find_spec("lightning") is None:
        print("Lightning is not installed and left out: pip install lightning", file=sys.stderr)
    else:
        others.append("Lightning")
    return ours + others


def speed(options: argparse.Namespace) -> None:
    """Every contender once a round, in turn, so that what else the machine does falls on all.

    On a CPU each time in a process of its own, with as many threads as it would have. On a GPU all in this one.
    """
    device = pick_device(options.device)
    warnings.filterwarnings("ignore")
    names = contenders(device)
    rates: dict[str, list[float]] = {name: [] for name in names}
    data = open_data(options.dataset)  # decoded before anything is timed
    for _ in range(options.repeats):
        for name in names:
            if device.type == "cuda":
                rates[name].append(rate_of(name, options.dataset, options.images, device))
            else:
                rates[name].append(_measured(name, options))
            print(f"{name}: {rates[name][-1]:,.0f} images/s", file=sys.stderr, flush=True)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    base = medians["plain loop"]
    keep(
        f"speed, {options.dataset}, {device.type}",
        {
            "images": options.images,
            "images of ours": len(data.train) * GPU_EPOCHS if device.type == "cuda" else options.images,
            "rounds": options.repeats,
            "images per second": {
                name: {
                    "median": round(medians[name]),
                    "least": round(min(values)),
                    "most": round(max(values)),
                    "times the plain loop": round(medians[name] / base, 2),
                }
                for name, values in rates.items()
            },
        },
        device,
    )


def _measured(name: str, options: argparse.Namespace) -> float:
    """In a process of its own."""
    settings = ["--dataset", options.dataset, "--images", str(options.images), "--device", options.device]
    command = [sys.executable, "-m", "benchmarks.training", "one", "--contender", name, *settings]
    done = subprocess.run(command, cwd=FIGURES.parents[1], check=True, capture_output=True, text=True)
    return float(done.stdout.splitlines()[-1])


def one(options: argparse.Namespace) -> None:
    """What `speed` starts for each contender."""
    warnings.filterwarnings("ignore")
    device = pick_device(options.device)
    name = options.contender
    if name.startswith("ours, "):
        data, count = open_data(options.dataset), cpu_count()
        recipe = recipe_for(data, 1)
        seconds = seconds_at_once(count, some(data.train, options.images), data, device)
        print(count * (options.images // recipe.batch_size * recipe.batch_size) / seconds)
    else:
        print(rate_of(name, options.dataset, options.images, device))


# --- accuracy ---------------------------------------------------------------------------------------------------------


def accuracy_of_both(options: argparse.Namespace) -> None:
    """Ours and the plain loop from the same initial weights, for as many epochs, on part of the training images."""
    device = pick_device(options.device)
    data = open_data(options.dataset, **SUBSETS[options.dataset])
    epochs = options.epochs or 5
    classes, recipe = len(data.classes), recipe_for(data, epochs)
    shown = device.type == "cuda" or cpu_count() == 1
    found: dict[str, list[tuple[float, float]]] = {"ours": [], "plain loop": []}
    as_a_worker(1 if shown else cpu_count())
    for seed in range(options.seeds):
        for name, rows in found.items():
            if name == "ours":
                seconds, classifier = train_ours(data.train, some(data.validation, 64), classes, recipe, device, seed)
            else:
                seconds, classifier = train_plain(data.train, classes, recipe, device, seed)
            right = _right(classifier, data.validation, classes, device)
            rows.append((right, seconds))
            print(f"seed {seed}, {name}: {right:.4f} in {seconds:.1f} s", file=sys.stderr, flush=True)
    figures: dict[str, Any] = {"training images": len(data.train), "epochs": epochs, "seeds": options.seeds}
    for name, rows in found.items():
        values = [right for right, _ in rows]
        figures[name] = {
            "validation accuracy": round(statistics.mean(values), 4),
            "sd": round(statistics.stdev(values), 4),
            "seconds, median": round(statistics.median(seconds for _, seconds in rows), 1),
        }
    apart = [mine - theirs for (mine, _), (theirs, _) in zip(*found.values(), strict=True)]
    figures["ours less plain, 95 % t interval over paired seeds"] = _interval(apart)
    keep(f"accuracy, {options.dataset}, {device.type}", figures, device)


# --- seconds to an accuracy -------------------------------------------------------------------------------------------


def race(options: argparse.Namespace) -> None:
    """Seconds to the accuracy that the plain loop has after its epochs: ours with its usual ones, and with ever fewer.

    The plain loop has the machine to itself; ours trains one seed a core, as a study does, and a training counts as its
    share of that. Ours gets fewer epochs until the mean accuracy over seeds is below the plain loop's.
    """
    device = pick_device(options.device)
    data = open_data(options.dataset, **SUBSETS[options.dataset])
    epochs = options.epochs or data.epochs
    if device.type != "cuda" and options.seeds % cpu_count():
        sys.exit(f"--seeds {options.seeds} should be a multiple of {cpu_count()}: so many train at once")
    as_a_worker(cpu_count())
    classes, theirs = len(data.classes), []
    for seed in range(options.seeds):
        seconds, classifier = train_plain(data.train, classes, recipe_for(data, epochs), device, seed)
        theirs.append((_right(classifier, data.validation, classes, device), seconds))
        print(f"plain loop, seed {seed}: {theirs[-1][0]:.4f} in {seconds:.1f} s", file=sys.stderr, flush=True)
    least, base = (statistics.mean(column) for column in zip(*theirs, strict=True))
    figures: dict[str, Any] = {
        "training images": len(data.train),
        "seeds": options.seeds,
        "plain loop": {"epochs": epochs, "validation accuracy": round(least, 4), "seconds, mean": round(base, 2)},
    }
    for fewer in range(min(epochs, data.epochs), 0, -1):
        mine = _on_all_cores(data, recipe_for(data, fewer), device, options.seeds)
        right, seconds = (statistics.mean(column) for column in zip(*mine, strict=True))
        apart = [ours - plain for (ours, _), (plain, _) in zip(mine, theirs, strict=True)]
        figures[f"ours, {fewer} epochs"] = {
            "validation accuracy": round(right, 4),
            "less the plain loop's": _interval(apart),
            "seconds, mean": round(seconds, 2),
            "times as fast": round(base / seconds, 2),
        }
        print(f"ours, {fewer} epochs: {right:.4f} in {seconds:.1f} s", file=sys.stderr, flush=True)
        if right < least:
            break
    keep(f"race, {options.dataset}, {device.type}", figures, device)


def _on_all_cores(
    data: datasets.Dataset, recipe: Recipe, device: torch.device, seeds: int
) -> list[tuple[float, float]]:
    """Accuracy on validation of each seed's training and its share of the machine's seconds, one thread a training."""
    count = 1 if device.type == "cuda" else cpu_count()
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(count)
    with context.Pool(count, initializer=_beside_others, initargs=(barrier,)) as pool:
        rows = pool.map(partial(_one_seed, data, recipe, device), range(seeds), chunksize=1)
    return [(right, seconds / count) for right, seconds in rows]


_start: Barrier  # of a pool's process


def _beside_others(barrier: Barrier) -> None:
    global _start  # noqa: PLW0603 - a barrier reaches a pool's process when it is started, and only then
    _start = barrier
    as_a_worker()


def _one_seed(data: datasets.Dataset, recipe: Recipe, device: torch.device, seed: int) -> tuple[float, float]:
    classes, few = len(data.classes), some(data.validation, 64)
    train_ours(some(data.train, WARM_IMAGES), few, classes, replace(recipe, epochs=1), device)
    _start.wait()  # whoever waits takes no other seed: all processes train at once
    seconds, classifier = train_ours(data.train, few, classes, recipe, device, seed)
    _start.wait()
    return _right(classifier, data.validation, classes, device), seconds


def _interval(apart: Sequence[float]) -> list[float | None]:
    """Mean of paired differences between the ends of its 95 % t interval, which one seed does not have."""
    low, high = mean_interval(apart) or (None, None)
    return [None if value is None else round(value, 4) for value in (low, statistics.mean(apart), high)]


def _right(classifier: Classifier, images: Images, classes: int, device: torch.device) -> float:
    return float(accuracy(evaluate(classifier, images, num_classes=classes, device=device)))


# --- seconds to an accuracy, on a GPU ---------------------------------------------------------------------------------


def goals(options: argparse.Namespace) -> None:
    """Seconds of trainings of the usual epochs, all of it but the evaluation, and their accuracy on test."""
    device = pick_device(options.device)
    figures = {"goal": GOAL[options.dataset], **_trainings(open_data(options.dataset), options, device)}
    keep(f"goal, {options.dataset}, {device.type}", figures, device)


def peer(options: argparse.Namespace) -> None:
    """Seconds and test accuracy of airbench's own trainings, then of ours, on the same images and GPU."""
    device = pick_device(options.device)
    if device.type != "cuda" or importlib.util.find_spec("airbench") is None:
        sys.exit("peer wants a CUDA device, and airbench: pip install airbench==0.1.8")
    data = open_data("cifar10")
    theirs = []
    for right, seconds in _airbench(_pool(data), data.test(), options.seeds):
        theirs.append((right, seconds))
        print(f"airbench, {len(theirs)}: {right:.4f} in {seconds:.2f} s", file=sys.stderr, flush=True)
    figures = {"airbench 0.1.8, train94": _summary(theirs), **_trainings(data, options, device)}
    keep(f"peer, cifar10, {device.type}", figures, device)


def _trainings(data: datasets.Dataset, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """How ours train on all training and validation images, and their accuracy on test and seconds."""
    model, epochs = options.model, options.epochs or data.epochs
    pool, test, classes = _pool(data), data.test(), len(data.classes)
    recipe = recipe_for(data, epochs, options.rate, model)
    as_a_worker(1 if device.type == "cuda" else cpu_count())
    few = some(test, 64)
    train_ours(some(pool, 8 * recipe.batch_size), few, classes, replace(recipe, epochs=1), device, model=model)
    rows = []
    for seed in range(options.seeds):
        start = time.perf_counter()
        _, classifier = train_ours(pool, few, classes, recipe, device, seed, model)
        seconds = time.perf_counter() - start
        rows.append((_right(classifier, test, classes, device), seconds))
        print(f"ours, {len(rows)}: {rows[-1][0]:.4f} in {seconds:.2f} s", file=sys.stderr, flush=True)
    how = {"model": model, "epochs": epochs, "learning rate": options.rate, "seeds": options.seeds}
    return {**how, "ours": _summary(rows)}


def _pool(data: datasets.Dataset) -> Images:
    """Training and validation images together."""
    parts = (data.train, data.validation)
    return Images(*(torch.cat([getattr(part, name) for part in parts]) for name in ("pixels", "labels", "groups")))


def _airbench(training: Images, test: Images, seeds: int) -> Iterator[tuple[float, float]]:
    """Its own trainings, in a folder that holds the images in its format."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "cifar10").mkdir()
        for name, images in (("train", training), ("test", test)):
            stored = {"images": images.pixels.permute(0, 2, 3, 1).contiguous(), "labels": images.labels}
            torch.save({**stored, "classes": [str(c) for c in range(10)]}, Path(folder) / "cifar10" / f"{name}.pt")
        here = Path.cwd()
        os.chdir(folder)
        try:
            airbench = importlib.import_module("airbench")
            airbench.warmup94(verbose=False)
            for _ in range(seeds):
                torch.cuda.synchronize()
                start = time.perf_counter()
                net = airbench.train94(verbose=False)
                torch.cuda.synchronize()
                seconds = time.perf_counter() - start
                yield float(airbench.evaluate(net, airbench.CifarLoader("cifar10", train=False))), seconds
        finally:
            os.chdir(here)


def _summary(rows: list[tuple[float, float]]) -> dict[str, float]:
    return {
        "test accuracy": round(statistics.mean(right for right, _ in rows), 4),
        "least": round(min(right for right, _ in rows), 4),
        "most": round(max(right for right, _ in rows), 4),
        "seconds, median": round(statistics.median(seconds for _, seconds in rows), 2),
    }


# --- the record -------------------------------------------------------------------------------------------------------


def recorded_in(file: Path) -> dict[str, Any]:
    """What `keep` has recorded so far."""
    return json.loads(file.read_text()) if file.exists() else {}


def keep(name: str, figures: dict[str, Any], device: torch.device, file: Path = FIGURES) -> None:
    """Add to what is recorded, with where it was measured, and print it."""
    recorded = recorded_in(file)
    versions = {
        package: importlib.metadata.version(package)
        for package in ("torch", "torchvision", "lightning", "airbench")
        if importlib.util.find_spec(package) is not None
    }
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    machine = {"device": where, "cores": cpu_count(), "bfloat16": has_fast_bfloat16(device), **versions}
    recorded[name] = {**figures, "machine": machine}
    file.write_text(json.dumps(recorded, indent=2) + "\n")
    print(json.dumps({name: recorded[name]}, indent=2))


def machine_of(device: torch.device) -> str:
    """What a figure was measured on, in words."""
    where = f"{os.cpu_count()} cores of {_processor()}"
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    return f"{where}, torch {torch.__version__}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())


def report(_: argparse.Namespace) -> None:
    """Print the recorded figures."""
    print(FIGURES.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands: dict[str, Callable[[argparse.Namespace], None]] = {
        "speed": speed,
        "accuracy": accuracy_of_both,
        "race": race,
        "goals": goals,
        "peer": peer,
        "report": report,
        "one": one,
    }
    parser.add_argument("command", nargs="?", choices=commands, default="report")
    parser.add_argument("--dataset", choices=sorted(GOAL), default="gtsrb")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--images", type=int, default=6_144, help="images of an epoch that is timed")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--epochs", type=int, help="of accuracy (5), race, goals and peer (the data set's usual)")
    parser.add_argument("--rate", type=float, default=RATE, help="the learning rate of goals and peer")
    parser.add_argument("--model", default="compact", help="the network of goals and peer")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--contender", default="ours")
    options = parser.parse_args()
    commands[options.command](options)


if __name__ == "__main__":
    main()
