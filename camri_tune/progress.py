"""How far a study is and how long it still takes: arithmetic on records, the same for every display."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from camri_tune.records import TrialRecord

STAGE_TITLES = {"baseline": "Baseline (cross-entropy)", "search": "Search", "finalists": "Finalists on fresh seeds"}

Records = Mapping[str, Sequence[TrialRecord]]  # of each stage


@dataclass(frozen=True)
class Schedule:
    """What a run means to train: trainings `planned` for each stage, `epochs` each, by so many `workers` of its own.

    A trial of the search is `folds` trainings.
    """

    planned: Mapping[str, int]
    epochs: int
    workers: int
    folds: int = 1

    def on_folds(self, folds: int, more_baselines: int) -> "Schedule":
        """The same where a trial trains on so many folds, and so many more baselines are trained."""
        planned = {**self.planned, "search": self.planned["search"] // self.folds * folds}
        planned["baseline"] += more_baselines
        return replace(self, planned=planned, folds=folds)

    def trainings_of(self, stage: str) -> int:
        """How many trainings one trial of a stage is."""
        return self.folds if stage == "search" else 1

    def epochs_of(self, trial: TrialRecord, stage: str) -> int:
        """All epochs of a trial; where they are searched, those that it has drawn."""
        return int(trial.params.get("epochs", self.epochs)) * self.trainings_of(stage)


def done(records: Sequence[TrialRecord], stage: str, schedule: Schedule) -> float:
    """Trials of a stage that are done, those that train counted by their epochs."""

    def share(r: TrialRecord) -> float:
        if r.ended:
            return 1.0
        return min(r.epoch / schedule.epochs_of(r, stage), 1.0) if r.state == "running" else 0.0

    return sum(map(share, records))


def total(records: Records, stage: str, schedule: Schedule) -> int:
    """Trials that a stage has, or will have."""
    planned, found = schedule.planned[stage] // schedule.trainings_of(stage), len(records.get(stage, ()))
    # By the end of the search all finalists are queued, who may be fewer than planned; before it some are.
    return found if stage == current_stage(records) == "finalists" else max(planned, found)


def current_stage(records: Records) -> str:
    """The first stage with something left to do: of the next some may be begun. Else the last with trials."""
    stages = list(STAGE_TITLES)
    left = [stage for stage in stages if not all(r.ended for r in records.get(stage, ()))]
    return next(iter(left or [stage for stage in reversed(stages) if records.get(stage)]), "baseline")


def seconds_left(records: Records, schedule: Schedule) -> float | None:
    """From the mean time of finished trainings; None before one has finished.

    So many at a time as are at work now, since workers may have joined, or as the run has workers, if these are more.
    """
    seconds: list[float] = []
    left = 0.0
    at_work = sum(r.state == "running" for found in records.values() for r in found)
    stages = list(STAGE_TITLES)
    current = stages.index(current_stage(records))
    for place, stage in enumerate(stages):
        found, trainings = records.get(stage, ()), schedule.trainings_of(stage)
        seconds += [r.seconds / trainings for r in found if r.state == "complete" and r.seconds]
        if place >= current:
            left += (total(records, stage, schedule) - done(found, stage, schedule)) * trainings
    if not seconds:
        return None
    return max(left, 0.0) * sum(seconds) / len(seconds) / max(schedule.workers, at_work, 1)


def duration(seconds: float) -> str:
    """'40 s', '12 min' or '3.5 h'."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
