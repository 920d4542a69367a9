"""Which scale does a cosine softmax need, by the number of classes?

Claim (n = 3 seeds, 2 cores of an EPYC without AVX-512): where embeddings learn, accuracy is best at 0.5 to 2 times
AdaCos's scale for so many classes and falls beyond: at 8 times it is 2 points lower with ten classes of MNIST, 3 with
three of CIFAR-10; two classes of MNIST lose nothing up to 8 times. Where nothing but the head learns, ten classes are
best at 4 times and lose 2 to 7 points at 0.5 to 2.

`python -m benchmarks.cosine_scale` trains CAMRI (margin 0.3 for one class) on a few images of 2 to 10 classes, at
scales from half to 32 times AdaCos's for so many classes, `compact` by Muon or nothing but a head, one thread a process
and a process a core, and writes `benchmarks/cosine_scale.json`: accuracy and recall of that class, both means over
seeds, on images that no training saw. `benchmarks/grid.py` has the same for ten classes of CIFAR-10 and 43 of GTSRB,
over margins and learning rates as well.
"""

import json
import multiprocessing
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.training import as_a_worker, machine_of, open_data
from camri_tune.augmentation import Augmentation
from camri_tune.config import Model, Optimizer
from camri_tune.images import Images
from camri_tune.losses import adacos_scale
from camri_tune.training import HeadSpec, Recipe, cpu_count, train

FIGURES = Path(__file__).with_suffix(".json")
TIMES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # AdaCos's scale; None stands for cross-entropy
MARGIN, BATCH, SEEDS, TRUTH = 0.3, 16, 3, 2_000
DEVICE = torch.device("cpu")


@dataclass(frozen=True)
class Setup:
    """What to train on: of each class as many images as `limit` images of all ten have. The first one is important."""

    dataset: str
    limit: int
    classes: tuple[int, ...]
    epochs: int
    rate: float
    model: Model = "compact"  # of a head alone the pixels are the embeddings


SETUPS = (
    Setup("mnist", 200, (8, 3), 40, 0.004),  # about as many steps as with ten
    Setup("mnist", 200, (8, 3, 5), 27, 0.004),
    Setup("mnist", 200, (8, 3, 5, 9, 2), 16, 0.004),
    Setup("mnist", 200, (8, 3, 5, 9, 2, 0, 1, 4, 6, 7), 8, 0.004),
    Setup("cifar10", 2_000, (3, 5, 2), 12, 0.008),
    Setup("digits", 1_000, (8, 3), 20, 0.064, "head"),
    Setup("digits", 1_000, (8, 3, 5), 20, 0.064, "head"),
    Setup("digits", 1_000, (8, 3, 5, 9, 2, 0, 1, 4, 6, 7), 20, 0.064, "head"),
)


@cache
def _parts(setup: Setup) -> tuple[Images, Images, Augmentation]:
    """Images to train on, others, and how the former are changed; once a process."""
    as_a_worker()
    data = open_data(setup.dataset, limit=setup.limit)
    rows = np.random.default_rng(0).permutation(len(data.validation))
    parts = []
    for images, most in ((data.train, None), (data.validation[rows], TRUTH)):
        places = np.array([setup.classes.index(c) if c in setup.classes else -1 for c in images.labels.tolist()])
        kept = np.flatnonzero(places >= 0)[:most]
        part = replace(images[kept], labels=torch.from_numpy(places[kept]))
        if setup.model == "head":
            part = replace(part, store=part.pixels.float().reshape(len(part), -1, 1, 1), rows=None)
        parts.append(part)
    return parts[0], parts[1], data.augmentation if setup.model != "head" else Augmentation()


def _trained(job: tuple[Setup, float | None, int]) -> tuple[float, float]:
    """Accuracy and recall."""
    setup, times, seed = job
    images, others, augmentation = _parts(setup)
    count = len(setup.classes)
    head = HeadSpec("ce") if times is None else HeadSpec("camri", times * adacos_scale(count), {0: MARGIN})
    optimizer: Optimizer = "adamw" if setup.model == "head" else "muon"
    recipe = Recipe(setup.epochs, setup.rate, augmentation, batch_size=BATCH, optimizer=optimizer)
    confusion = train(
        setup.model, head, images, others, num_classes=count, recipe=recipe, seed=seed, device=DEVICE
    ).confusion
    return float(np.trace(confusion) / confusion.sum()), float(confusion[0, 0] / confusion[0].sum())


def main() -> None:
    jobs = list(product(SETUPS, (None, *TIMES), range(SEEDS)))
    found: dict[Setup, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    with multiprocessing.get_context("spawn").Pool(cpu_count()) as pool:
        for (setup, times, _), measured in zip(jobs, pool.imap(_trained, jobs, chunksize=1), strict=True):
            found[setup]["cross-entropy" if times is None else f"{times:g}"].append(measured)
    figures: dict[str, Any] = {"machine": machine_of(DEVICE), "seeds": SEEDS, "margin": MARGIN}
    for setup, by_scale in found.items():
        name = f"{setup.model}, {setup.dataset}, classes {', '.join(map(str, setup.classes))}"
        figures[name] = {"AdaCos": round(adacos_scale(len(setup.classes)), 2)} | {
            scale: dict(zip(("accuracy", "recall"), np.mean(measured, axis=0).round(4).tolist(), strict=True))
            for scale, measured in by_scale.items()
        }
    FIGURES.write_text(json.dumps(figures, indent=2) + "\n")
    print(FIGURES.read_text())


if __name__ == "__main__":
    main()
