"""Does select-then-certify err as seldom as it says, and how often does it certify what is good?

Claim (n = 2,000 simulated studies in each world; benchmarks/certificate.json has every figure). Where every model is
worse by exactly epsilon and validation lets all of them through, 4.1 % of studies end with a certificate, 4.9 % with
one finalist, about 5 % being promised; 18.1 % would if each of five were tested at 95 % by itself. Of exported models
that are truly within epsilon of the baseline model's accuracy 99.8 % are certified with GTSRB's 12,630 test images, if
they are independent, 92 % with 2,000, 42 % with 360, and 68 % in a world where nearly all settings are worse by about
epsilon ("all worse, by luck or not"; 12,630 images). The best of 20 trials claims 2.5 points of recall more than its
setting has on average, and that setting truly breaks the floor in 20 % of studies. Ordering finalists by our lower
bound exports a true recall of 0.9440 (3 seeds), by the mean 0.9438, by each setting's own t bound 0.9406.

Two limits. Tango's bound is an approximation: with one finalist that gains no image, 540 test images and epsilon 0.5, a
certificate is false in 6.7 % of draws (`exact_error`, no simulation). And a rare loss of whole groups that is not in
the sample cannot be seen in it: where each model but the baseline's misses all 30 images of an object in 185, which is
just over epsilon, and test has 421 objects, 11.2 % of studies end with a false certificate with one finalist, and
23.9 % with five.

Studies go through the real `selection.py` and `stats.py`: 20 noisy trials, finalists on fresh seeds, models chosen on
validation, certificate on test. `python benchmarks/certificate.py` takes six minutes on one core.
"""

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from camri_tune.differences import CONFIDENCE, PairedDifference
from camri_tune.records import Figure, TrialRecord
from camri_tune.selection import certify, finalists, rank_models, rank_settings

FIGURES = Path(__file__).parent / "certificate.json"
Array = NDArray[np.float64]
Rank = Callable[[dict[int, list[TrialRecord]]], list[int]]
# A model gets an image right where its skill, the image's ease and a noise of both together are above zero.
EASE, NOISE = 1.5, 0.7
SPREAD = float(np.hypot(EASE, NOISE))


@dataclass(frozen=True)
class World:
    """What is true in one kind of study. Shares, not points; `cost` and `gain` are of a setting less the baseline."""

    validation: tuple[int, int] = (60, 2_000)  # images of the important class, others
    test: tuple[int, int] = (60, 12_570)
    accuracy: float = 0.95  # of all but the important class
    recall: float = 0.90
    cost: tuple[float, float] = (-0.003, 0.010)  # mean and sd over settings
    gain: tuple[float, float] = (0.01, 0.03)
    seed_accuracy: float = 0.002  # sd over seeds
    seed_recall: float = 0.015
    tolerance: float = 0.0
    epsilon: float = 0.005
    trials: int = 20
    finalists: int = 5
    seeds: int = 3
    group: int = 1  # images of one object, neighbours
    lost_whole: float = 0.0  # share of the objects of which every model but the baseline's misses all images


WORLDS = {
    "GTSRB's sizes": World(),
    "GTSRB's sizes, 5 seeds": World(seeds=5),
    "small test": World(test=(100, 1_900)),
    "a test set of 360": World(test=(36, 324), validation=(30, 250)),
    # The worst case for the certificate: every model is worse by epsilon and validation lets every one through.
    "all at the limit": World(cost=(-0.005, 0), gain=(-0.005, 0), seed_accuracy=0, seed_recall=0, tolerance=0.02),
    "all at the limit, small test": World(
        cost=(-0.005, 0), gain=(-0.005, 0), seed_accuracy=0, seed_recall=0, tolerance=0.02, test=(60, 4_000)
    ),
    "all at the limit, one finalist": World(
        cost=(-0.005, 0), gain=(-0.005, 0), seed_accuracy=0, seed_recall=0, tolerance=0.02, finalists=1
    ),
    "all worse, by luck or not": World(cost=(-0.008, 0.004), gain=(0.02, 0.03), tolerance=0.01),
    # What no resampling of groups can see: a loss of whole objects that is not in the sample, of 421 objects here.
    "whole objects are lost, seldom; one finalist": World(
        cost=(0, 0), gain=(0, 0), seed_accuracy=0, seed_recall=0, tolerance=0.02, finalists=1,
        validation=(60, 2_010), group=30, lost_whole=0.0054,
    ),
    "whole objects are lost, seldom": World(
        cost=(0, 0), gain=(0, 0), seed_accuracy=0, seed_recall=0, tolerance=0.02,
        validation=(60, 2_010), group=30, lost_whole=0.0054,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """One study's end: the verdict, the exported setting's true recall, and its model's true difference in accuracy."""

    verdict: str
    true_recall: float
    true_difference: float
    claimed_by_best_trial: float
    true_of_best_trial: float
    best_trial_breaks_floor: bool
    recall_shown: bool
    true_recall_difference: float


class _Measured:
    """What test says of one model, and what is true of it."""

    def __init__(self, difference: PairedDifference, recall: PairedDifference, truth: tuple[float, float]) -> None:
        self.accuracy_difference = difference
        self.recall_difference = recall
        self.truth = truth


class Study:
    """One simulated study."""

    def __init__(self, world: World, rng: np.random.Generator) -> None:
        self.world, self.rng = world, rng
        self.ease = {name: [EASE * rng.normal(size=n) for n in getattr(world, name)] for name in ("validation", "test")}
        self.skills: dict[tuple[int, int], Array] = {}  # (setting, seed) -> for the important class, for the others

    def train(self, setting: int, seed: int, recall: float, accuracy: float) -> Array:
        """The skills of one model of a setting with these means."""
        world = self.world
        shares = [recall + world.seed_recall * self.rng.normal(), accuracy + world.seed_accuracy * self.rng.normal()]
        self.skills[setting, seed] = SPREAD * stats.norm.ppf(np.clip(shares, 0.2, 0.9995))
        return self.skills[setting, seed]

    def right(self, skills: Array, part: str, *, baseline: bool = False) -> NDArray[np.bool_]:
        """Whether a model gets each image right, those of the important class first."""
        pairs = zip(skills, self.ease[part], strict=True)
        right = np.concatenate([s + e + NOISE * self.rng.normal(size=len(e)) > 0 for s, e in pairs])
        if self.world.lost_whole and not baseline:
            objects = len(right) // self.world.group
            right &= ~np.repeat(self.rng.random(objects) < self.world.lost_whole, self.world.group)
        return right

    def groups(self, count: int) -> NDArray[np.int64]:
        """Which of the first `count` test images show one object."""
        return np.arange(count) // self.world.group

    def record(self, number: int, seed: int, skills: Array, floor: float) -> TrialRecord:
        right, first = self.right(skills, "validation", baseline=number < 0), self.world.validation[0]
        accuracy = float(right.mean())
        return TrialRecord(
            number,
            "complete",
            {},
            seed=seed,
            accuracy=accuracy,
            recall=float(right[:first].mean()),
            constraint=floor - accuracy,
            checkpoint="c",
            sha256="s",
        )

    def truth(self, skills: Array, *, baseline: bool = False) -> tuple[float, float]:
        """(accuracy, recall) of a model on all images there could be."""
        kept = 1.0 if baseline else 1 - self.world.lost_whole
        recall, others = (kept * float(p) for p in stats.norm.cdf(skills / SPREAD))
        first, rest = self.world.test
        return (first * recall + rest * others) / (first + rest), recall

    def run(self, rank: Rank, confidence: Callable[[float], float]) -> Outcome | None:
        """Select and certify; None where nothing kept accuracy. `confidence` may replace that of each test."""
        world, rng = self.world, self.rng
        base = [self.train(-1, seed, world.recall, world.accuracy) for seed in range(world.seeds)]
        measured = [self.record(-1, seed, skills, 0.0) for seed, skills in enumerate(base)]
        floor = Figure(tuple(r.accuracy or 0.0 for r in measured)).mean - world.tolerance - 1e-9
        measured = [replace(r, constraint=floor - (r.accuracy or 0.0)) for r in measured]
        recalls = world.recall + world.gain[0] + world.gain[1] * rng.normal(size=world.trials)
        accuracies = world.accuracy + world.cost[0] + world.cost[1] * rng.normal(size=world.trials)
        trials = [
            self.record(t, 100, self.train(t, 100, recalls[t], accuracies[t]), floor) for t in range(world.trials)
        ]
        chosen = finalists(trials, world.finalists)
        retrained = {
            t.number: [
                self.record(t.number, s, self.train(t.number, s, recalls[t.number], accuracies[t.number]), floor)
                for s in range(world.seeds)
            ]
            for t in chosen
        }
        order = rank(retrained)
        if not order:
            return None
        rival = base[measured.index(rank_models(measured)[0])]
        old = self.right(rival, "test", baseline=True)

        judged: dict[int, _Measured] = {}

        def judge(number: int, shared: float) -> PairedDifference:
            skills = self.skills[number, rank_models(retrained[number])[0].seed or 0]
            new, first, at = self.right(skills, "test"), world.test[0], confidence(shared)
            truth, groups = (self.truth(skills), self.truth(rival, baseline=True)), self.groups(len(new))
            judged[number] = _Measured(
                PairedDifference.of(new, old, groups, at),
                PairedDifference.of(new[:first], old[:first], groups[:first], at),
                (truth[0][0] - truth[1][0], truth[0][1] - truth[1][1]),
            )
            return judged[number].accuracy_difference

        verdict, exported, _ = certify(order, judge, world.epsilon)
        assert exported is not None
        best = judged[exported]
        top = chosen[0]
        return Outcome(
            verdict=verdict,
            true_recall=float(recalls[exported]),
            true_difference=best.truth[0],
            claimed_by_best_trial=top.recall or 0.0,
            true_of_best_trial=float(recalls[top.number]),
            best_trial_breaks_floor=bool(accuracies[top.number] < world.accuracy - world.tolerance),
            recall_shown=best.recall_difference.lower_bound > 0,
            true_recall_difference=best.truth[1],
        )


def by_mean(retrained: dict[int, list[TrialRecord]]) -> list[int]:
    """The order of mean recall, among the same settings."""
    return sorted(rank_settings(retrained), key=lambda n: -Figure(tuple(r.recall or 0.0 for r in retrained[n])).mean)


def by_own_bound(retrained: dict[int, list[TrialRecord]]) -> list[int]:
    """The order of Student's t bound, each setting with its own scatter alone."""
    kept = rank_settings(retrained)
    return sorted(kept, key=lambda n: -_student(tuple(r.recall or 0.0 for r in retrained[n])))


def _student(values: Sequence[float]) -> float:
    n = len(values)
    return float(np.mean(values) - stats.t.ppf(0.95, n - 1) * np.std(values, ddof=1) / np.sqrt(n))


def simulate(
    world: World,
    studies: int,
    seed: int = 0,
    rank: Rank = rank_settings,
    confidence: Callable[[float], float] = lambda shared: shared,
) -> dict[str, Any]:
    """Shares over many studies. A certificate is false where the exported model is worse by epsilon or more."""
    rng = np.random.default_rng(seed)
    ends = [end for end in (Study(world, rng).run(rank, confidence) for _ in range(studies)) if end is not None]
    certified = [end for end in ends if end.verdict == "certified"]
    at_fault = [end for end in certified if end.true_difference <= -world.epsilon + 1e-12]
    good = [end for end in ends if end.true_difference > -world.epsilon + 1e-12]
    wrong_gains = [end for end in ends if end.recall_shown and end.true_recall_difference <= 0]
    return {
        "studies": studies,
        "something kept accuracy": len(ends) / studies,
        "false certificates": len(at_fault) / studies,
        "certified": len(certified) / studies,
        "certified of those that keep accuracy": sum(e.verdict == "certified" for e in good) / max(len(good), 1),
        "recall wrongly shown to rise": len(wrong_gains) / studies,
        "true recall of the exported setting": _mean(ends, "true_recall"),
        "recall claimed by the best trial": _mean(ends, "claimed_by_best_trial"),
        "true recall of the best trial": _mean(ends, "true_of_best_trial"),
        "best trial breaks the floor": _mean(ends, "best_trial_breaks_floor"),
    }


def exact_error(n: int, epsilon: float, confidence: float = CONFIDENCE) -> float:
    """How often one finalist gets a false certificate that is worse by exactly `epsilon` and gains no image.

    Over all that n independent test images can show, without simulation: Tango's bound is a good approximation, not an
    exact one, and this is where it errs most.
    """
    counts = np.arange(math.ceil(n * epsilon) + 1)  # more than that are never certified
    passed = [PairedDifference(0, int(lost), n, n, confidence).lower_bound >= -epsilon for lost in counts]
    return float(stats.binom.pmf(counts[np.array(passed)], n, epsilon).sum())


def _mean(ends: Sequence[Outcome], name: str) -> float:
    return float(np.mean([getattr(end, name) for end in ends])) if ends else float("nan")


def main(studies: int) -> None:
    """Print and store every world, and what simpler rules would do in some of them."""
    found: dict[str, dict[str, Any]] = {}
    for name, world in WORLDS.items():
        found[name] = simulate(world, studies)
    limit = "all at the limit"
    found[f"{limit}; each finalist tested at 95 % (not ours)"] = simulate(
        WORLDS[limit], studies, confidence=lambda _: 0.95
    )
    for name, rank in {"mean recall": by_mean, "each setting's own t bound": by_own_bound}.items():
        for sizes in ("GTSRB's sizes", "GTSRB's sizes, 5 seeds"):
            found[f"{sizes}; ordered by {name} (not ours)"] = simulate(WORLDS[sizes], studies, rank=rank)
    found["one finalist, nothing gained: exact"] = {
        f"false certificates, {n:,} test images": exact_error(n, World().epsilon) for n in (540, 1_000, 2_000, 12_630)
    }
    rounded = {n: {k: round(v, 4) for k, v in figures.items()} for n, figures in found.items()}
    FIGURES.write_text(json.dumps(rounded, indent=1) + "\n")
    print(FIGURES.read_text())


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2_000)
