"""Do grouped folds pick better trials than one split, where the important class has few validation tracks?

Claim (GTSRB's 14 danger signs; classes 27 and 21, of 8 and 11 training tracks, 2 of them validate a fold; n = 5
repetitions with other splits and seeds, 200 real trainings). Mean true recall of the setting that is picked, out of 7,
by the points of accuracy that may be given up, and five folds less one split with the 95 % t interval over repetitions:

class  points  one split  2 folds  3      5      five less one        best setting
27     5       0.597      0.623    0.641  0.663  +6.6 [-0.7, 13.9]    0.695
27     10      0.600      0.617    0.621  0.663  +6.3 [ 0.0, 12.6]    0.695
27     any     0.583      0.617    0.621  0.663  +8.0 [-1.1, 17.1]    0.695
21     5       0.637      0.610    0.623  0.662  +2.5 [-3.7,  8.7]    0.694
21     10      0.647      0.622    0.624  0.662  +1.5 [-5.4,  8.4]    0.694
21     any     0.647      0.622    0.624  0.662  +1.5 [-5.4,  8.4]    0.694

Better picking is not shown for either class: five of the six intervals reach below zero and the sixth ends at it, the
repetitions share one pool of tracks, which makes them more alike than new data would be, and the truth is measured on
60 test images of 2 signs (27) and 90 of 3 (21). Five folds came out better in every mean, two or three worse than one
split for 21, at as many trainings a trial as folds: `auto` takes five folds or none, and those only where validation
has as few groups as here.

`record DATA_DIR SHARD SHARDS` trains (an hour on 2 cores of an AMD EPYC without AVX-512, torch 2.14), `report` prints
and writes benchmarks/folds.json. Each setting is trained on each of 5 folds in each repetition, 5 frames of each track,
12 epochs. Picks are by pooled validation recall of the folds used (every run of them in turn), among settings whose
pooled accuracy keeps cross-entropy's less the tolerance. A setting's true recall is its mean test recall over the
models of the other repetitions. Both classes have the margin at once, which halves the trainings.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from camri_tune.config import StudyConfig
from camri_tune.datasets import open_dataset
from camri_tune.images import Images
from camri_tune.metrics import accuracy, confusion_matrix, recall_per_class
from camri_tune.splits import folds, thin_groups
from camri_tune.stats import mean_interval
from camri_tune.training import HeadSpec, predict_logits, recipe_of, train

HERE = Path(__file__).parent
ROWS, FIGURES = HERE / "folds_rows.jsonl", HERE / "folds.json"
DANGER_SIGNS = range(18, 32)  # the triangular ones, which are taken for each other
CLASSES = {27: 9, 21: 3}  # GTSRB's number -> ours among the danger signs
FOLDS, REPETITIONS, PER_TRACK, EPOCHS, RATE = 5, 5, 5, 12, 8e-3
# Scale and margin (the same for both classes); None is cross-entropy, whose accuracy is the floor.
SETTINGS = [None, (8.0, 0.1), (8.0, 0.3), (8.0, 0.5), (14.0, 0.1), (14.0, 0.25), (14.0, 0.4), (24.0, 0.25)]


def danger_signs(data_dir: str) -> tuple[Images, Images, Any]:
    """Everything that is not test, and test, of the danger signs alone."""
    data = open_dataset(StudyConfig(dataset="gtsrb", data_dir=Path(data_dir)))
    train_part, validation = data.fold(0)
    parts = []
    for several in ([train_part, validation], [data.test()]):
        columns = [torch.cat([getattr(part, name) for part in several]) for name in ("pixels", "labels", "groups")]
        images = Images(*columns)
        chosen = np.flatnonzero(np.isin(images.labels.numpy(), list(DANGER_SIGNS)))
        images = images[chosen]
        parts.append(Images(images.pixels, images.labels - DANGER_SIGNS.start, images.groups))
    return parts[0], parts[1], data.augmentation


def record(data_dir: str, shard: int, shards: int) -> None:
    """Train every setting on every fold of every repetition; a second call does what is missing."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    pool, test, augmentation = danger_signs(data_dir)
    labels, groups = pool.labels.numpy(), pool.groups.numpy()
    names = [str(c) for c in DANGER_SIGNS]
    done = set()
    if ROWS.exists():
        done = {tuple(json.loads(line)["key"]) for line in ROWS.read_text().splitlines()}
    keys = [(r, f, s) for r in range(REPETITIONS) for f in range(FOLDS) for s in range(len(SETTINGS))]
    for repetition, fold, setting in keys[shard::shards]:
        if (repetition, fold, setting) in done:
            continue
        split = folds(labels, groups, count=FOLDS, fraction=0.2, seed=repetition, classes=names, purpose="validation")[
            fold
        ]
        training, validation = pool[split.kept], pool[split.held_out]
        thinned = thin_groups(training.labels.numpy(), training.groups.numpy(), most=PER_TRACK, seed=repetition)
        training = training[thinned]
        chosen = SETTINGS[setting]
        if chosen is None:
            head = HeadSpec("ce")
        else:
            head = HeadSpec("camri", scale=chosen[0], margins=dict.fromkeys(CLASSES.values(), chosen[1]))
        trained = train(
            "compact",
            head,
            training,
            validation,
            num_classes=len(names),
            recipe=recipe_of(
                "compact", epochs=EPOCHS, learning_rate=RATE, augmentation=augmentation, images=len(training)
            ),
            seed=1_000 * repetition + 100 * fold + setting,
            device=torch.device("cpu"),
        )
        answers = predict_logits(trained.classifier, test.pixels, torch.device("cpu")).argmax(dim=1).numpy()
        row = {"key": [repetition, fold, setting], "seconds": round(trained.seconds, 1)}
        for part, confusion in (
            ("validation", trained.confusion),
            ("test", confusion_matrix(test.labels.numpy(), answers, len(names))),
        ):
            right, count = confusion.diagonal(), confusion.sum(axis=1)
            row[part] = {
                "right": int(right.sum()),
                "n": int(count.sum()),
                **{str(c): [int(right[ours]), int(count[ours])] for c, ours in CLASSES.items()},
            }
        tracks = {str(c): len(torch.unique(validation.groups[validation.labels == o])) for c, o in CLASSES.items()}
        row["validation_tracks"] = tracks
        with ROWS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        text = recall_per_class(trained.confusion)
        print(row["key"], row["seconds"], f"{accuracy(trained.confusion):.3f}", text[[9, 3]], row["test"], flush=True)


Rows = dict[tuple[int, int, int], dict[str, Any]]
USED = (1, 2, 3, 5)
# Points of validation accuracy that may be given up: so briefly trained, few settings keep all of it. 100: any.
TOLERANCES = (5.0, 10.0, 100.0)


def picked(rows: Rows, repetition: int, chosen: list[int], name: str, tolerance: float) -> int | None:
    """The setting of highest recall on these folds together, of those whose accuracy there keeps the floor."""

    def pooled(setting: int) -> tuple[float, float]:
        parts = [rows[repetition, fold, setting]["validation"] for fold in chosen]
        right, count = (sum(part[name][place] for part in parts) for place in (0, 1))
        return right / count, sum(part["right"] for part in parts) / sum(part["n"] for part in parts)

    floor = pooled(0)[1] - tolerance / 100
    scores = {setting: pooled(setting) for setting in range(1, len(SETTINGS))}
    feasible = [setting for setting, (_, accuracy) in scores.items() if accuracy >= floor]
    return max(feasible, key=lambda setting: scores[setting]) if feasible else None


def truth(rows: Rows, setting: int, name: str, *, without: int) -> float:
    """Mean test recall of a setting over all models of the other repetitions: other splits and other seeds."""
    found = [row["test"][name] for (r, _, s), row in rows.items() if s == setting and r != without]
    return float(np.mean([right / count for right, count in found]))


def report() -> None:
    """Print and store, for each class and number of folds, the true recall of what is picked."""
    rows: Rows = {}
    for line in ROWS.read_text().splitlines():
        row = json.loads(line)
        rows[tuple(row["key"])] = row
    assert len(rows) == REPETITIONS * FOLDS * len(SETTINGS), f"{len(rows)} rows: record the rest first"
    results = []
    for name in map(str, CLASSES):
        for tolerance in TOLERANCES:
            by_folds: dict[int, list[float]] = {}
            for used in USED:
                for repetition in range(REPETITIONS):
                    found = []
                    for start in range(FOLDS if used < FOLDS else 1):
                        chosen = [(start + step) % FOLDS for step in range(used)]
                        setting = picked(rows, repetition, chosen, name, tolerance)
                        if setting is not None:
                            found.append(truth(rows, setting, name, without=repetition))
                    by_folds.setdefault(used, []).append(float(np.mean(found)) if found else float("nan"))
            best = [max(truth(rows, s, name, without=r) for s in range(1, len(SETTINGS))) for r in range(REPETITIONS)]
            for used, values in by_folds.items():
                less = np.array(values) - by_folds[1]
                interval = mean_interval(less.tolist()) if used > 1 else None
                results.append(
                    {
                        "class": int(name),
                        "tolerance_points": tolerance,
                        "folds": used,
                        "true_recall": round(float(np.nanmean(values)), 4),
                        "less_one_split": round(float(np.nanmean(less)), 4),
                        "interval": [round(end, 4) for end in interval] if interval else None,
                        "best_possible": round(float(np.mean(best)), 4),
                        "by_repetition": [round(value, 4) for value in values],
                    }
                )
                print(results[-1])
    FIGURES.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1] == "record":
        record(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        report()
