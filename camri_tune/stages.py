"""The stages of a run. Each queues what is missing, so that a resumed run does only what is left."""

import importlib
import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import torch
from filelock import FileLock, Timeout

from camri_tune.baseline import best_learning_rate, next_learning_rates, resolve_floors
from camri_tune.claims import no_better_than_guessing
from camri_tune.config import MOST_FOLDS, StudyConfig
from camri_tune.console import Console
from camri_tune.constraints import ROUNDING, RecallConstraint, recall_constraints, shortfalls
from camri_tune.datasets import Dataset
from camri_tune.errors import CamriTuneError, InputError, WorkerError
from camri_tune.heartbeat import Heart
from camri_tune.images import Images
from camri_tune.interrupts import heard, raise_swallowed
from camri_tune.overview import read_overview
from camri_tune.own_networks import allowed
from camri_tune.progress import Schedule
from camri_tune.ranges import is_searched
from camri_tune.ray_workers import ray_launch
from camri_tune.records import Baseline, TrialRecord, named
from camri_tune.search import starting_points
from camri_tune.selection import finalists, rank_models, rank_settings
from camri_tune.storage import STAGES, Stage, StudyStore, storage_url
from camri_tune.study_note import publish
from camri_tune.training import default_learning_rate
from camri_tune.trials import pooled_floor
from camri_tune.workers import Launch, Workers, local_launch, places_for

_WAY_OUT = (
    "what ran out of memory or ended its workers is trained again by the same command, perhaps with fewer --workers; "
    "else mend what it says, and start another study with --name"
)
ROUNDS_OF_FINALISTS = 2
LOCK = ".lock"  # held by the run that works on a folder
MOST_WAITING = 64  # and more than there are workers, mostly
PUBLISH_SECONDS, PUBLISH_SHARE = 20.0, 0.05  # between two writings of a study's note and figures; at most, of the time
# An important class with fewer in validation is ranked on folds: those of `benchmarks/folds.py` have 2 groups.
FEW_IMAGES, FEW_GROUPS = 20, 3
Planned = TypeVar("Planned")


class Stages:
    """One study's work: what it plans next, and what it has found out so far.

    `important` is given where the study's trials serve other classes than those it was searched for; else it is settled
    as soon as it is known. On an `equal_budget` no more of the search counts than its first `trials`, whatever an
    earlier run asked for: so many every method of a comparison has.
    """

    def __init__(
        self,
        config: StudyConfig,
        data: Dataset,
        store: StudyStore,
        important: tuple[int, ...] = (),
        *,
        equal_budget: bool = False,
    ) -> None:
        self.config = config
        self.data = data
        self.store = store
        self.important = important
        self.equal_budget = equal_budget
        self.folds = 1
        self.constraints: tuple[RecallConstraint, ...] = ()
        self._searching = False

    def plan_baseline(self, folds: int = 1) -> Baseline | None:
        """The cross-entropy baseline; None while something of it is missing, which is queued by then.

        First its learning rate is tuned, unless the study fixes it, then it is trained on R fresh seeds, which take the
        folds in turn, and on folds that are left. By then `folds` are the search's, too, if it is known who is
        important: its starting points are queued as well, so that no worker waits for the last seeds. Raises
        CamriTuneError where it fails.
        """
        optimizer, tuning = self.config.optimizer, self.config.tuning_seed
        default = default_learning_rate(self.config.model, optimizer if isinstance(optimizer, str) else None)
        records = self.records("baseline")
        if _left(records):
            return None
        tried = [r for r in records if r.seed == tuning]
        fixed = self.config.fixed_learning_rate
        rates = [] if fixed else next_learning_rates(tried, default)
        for rate in rates:
            self.store.enqueue("baseline", {"learning_rate": rate}, seed=tuning)
        if rates:
            return None
        best = fixed or best_learning_rate(tried, default)
        if best is None:
            said = tried[0].failure
            raise CamriTuneError(f"every training of the baseline failed; the first said: {said}; {_WAY_OUT}")
        found = {(r.seed, r.fold): r for r in records}
        count = max(self.config.seeds, folds)
        wanted = [(self.config.replicate_seed(index), index % folds) for index in range(count)]
        missing = [key for key in wanted if key not in found]
        for seed, fold in missing:
            self.store.enqueue("baseline", {"learning_rate": best}, seed=seed, fold=fold)
        if missing:
            if self.important:
                self.store.set("baseline", self._settled(best, folds))
                self._queue_search(best, self.records("search"), only_known=True)
            return None
        models = tuple(found[key] for key in wanted)
        for record in models:
            if record.state != "complete":
                raise CamriTuneError(
                    f"the baseline's training with seed {record.seed} failed: {record.failure}; {_WAY_OUT}"
                )
        return Baseline(best, models[: self.config.seeds], models[self.config.seeds :])

    def adopt(self, baseline: Baseline, important: tuple[int, ...], ranked: Baseline | None = None) -> None:
        """Settle who is important and what must be kept on each fold, for this study's trials.

        `ranked` is the baseline that ranked the classes, where it was another: worst1 is one class wherever it is said.
        """
        self.important = important
        self.folds = len(baseline.accuracy_by_fold)
        self.constraints = recall_constraints(
            resolve_floors(self.config.floor, self.data.classes, ranked or baseline),
            self.config.max_drop,
            baseline.recall_by_fold,
            [self._per_class(self.data.fold(fold)[1]) for fold in range(self.folds)],
        )
        floors = self.floors(baseline)
        self.store.set(
            "baseline",
            {
                **self._settled(baseline.learning_rate, self.folds),
                "floors": floors,
                "search_floor": pooled_floor(floors, self.data, range(self.folds)),
                "accuracy_sd": self._accuracy_sd(baseline),
                "recall_per_class": list(baseline.recall_per_class),
                "constraints": [constraint.as_json() for constraint in self.constraints],
            },
        )

    def _settled(self, learning_rate: float, folds: int) -> dict[str, Any]:
        """What the baseline's learning rate settles for the search (see `Plan.as_stored`)."""
        return {"important": list(self.important), "folds": folds, "learning_rate": learning_rate}

    def _per_class(self, images: Images) -> list[int]:
        """How many images each class has."""
        counts: list[int] = torch.bincount(images.labels, minlength=len(self.data.classes)).tolist()
        return counts

    def plan_search(self, baseline: Baseline) -> list[TrialRecord] | None:
        """The search's trials; None while some are left to do, which are queued, good starting points first.

        No more than `MOST_WAITING` at a time: whoever looks at the queue reads all that waits. Queued as well is who
        will be a finalist whatever the trials that are left come to, so that no worker waits for the last of them.
        """
        if not self._searching:  # an earlier run may have been asked for more
            self._searching = True
            self.store.withdraw("search", keep=self.config.trials)
        records = self.records("search")
        self._queue_search(baseline.learning_rate, records)
        left = _left(records) + max(0, self.config.trials - len(records))
        sure = max(0, self.config.most_finalists - left)  # each that is left may come before one of them
        if sure:
            self._queue_finalists(self._candidates(records, baseline)[:sure], self.records("finalists"))
        return None if left else records

    def _queue_search(self, rate: float, records: Sequence[TrialRecord], *, only_known: bool = False) -> None:
        """Queue what the search lacks, as far as `MOST_WAITING` lets it; or no more than its starting points."""
        present, waiting = len(records), sum(r.state == "waiting" for r in records)
        points = starting_points(self.config, self.important, len(self.data.classes), rate)
        end = min(self.config.trials, len(points) if only_known else present + MOST_WAITING - waiting)
        for index in range(present, end):
            self.store.enqueue("search", points[index] if index < len(points) else {})

    def check_search(self) -> None:
        """Raise CamriTuneError where no trial of the search could be trained."""
        records = self.records("search")
        if all(r.state == "failed" for r in records):
            raise CamriTuneError(f"every trial of the search failed; the last said: {records[-1].failure}")

    def plan_finalists(self, baseline: Baseline) -> dict[int, list[TrialRecord]] | None:
        """The finalists' models by trial, one for each of the baseline's seeds; None while some are left to train.

        The search must have ended. The best of many noisy trials is partly luck: hence fresh seeds. Where none of the
        first few finalists keeps every floor over seeds, the next few get their chance.
        """
        count = self.config.most_finalists
        candidates = self._candidates(self.records("search"), baseline)
        models: dict[int, list[TrialRecord]] = {}
        for start in range(0, len(candidates), count):
            found = self.retrain(candidates[start : start + count])
            if found is None:
                return None
            models |= found
            if rank_settings(models, self.constraints):
                break
        return models

    def rivals(self, baseline: Baseline) -> list[TrialRecord]:
        """The baseline's R models as a finalist's are, of which the same rule chooses the one to compare with.

        Where none meets what is asked of recall, as a floor above what cross-entropy reaches, that is not asked.
        """
        scored = baseline.scored(self.important, self.floors(baseline))
        bound = [replace(r, shortfalls=shortfalls(self.constraints, r.recall_per_class, [r.fold])) for r in scored]
        return bound if rank_models(bound) else list(scored)

    def _candidates(self, trials: Sequence[TrialRecord], baseline: Baseline) -> list[TrialRecord]:
        """Who may become a finalist, best first; trials that missed a floor by less than seeds scatter come last."""
        slacks = {
            constraint.name: self._of_a_trial(constraint.scatter(baseline.records)) for constraint in self.constraints
        }
        count = self.config.most_finalists * ROUNDS_OF_FINALISTS
        return finalists(trials, count, self._accuracy_sd(baseline), slacks)

    def _accuracy_sd(self, baseline: Baseline) -> float:
        """How much seeds alone move a trial's accuracy; 0 where one seed says nothing of that.

        On folds a trial has a model on each, and is scored by all of them together. Where no fold has two seeds, which
        would tell, it is taken for what chance alone does to so many images.
        """
        if baseline.accuracy_sd is not None or self.folds == 1:
            return self._of_a_trial(baseline.accuracy_sd)
        return math.sqrt(baseline.accuracy * (1 - baseline.accuracy) / len(self.data.validation_of(self.folds)))

    def _of_a_trial(self, scatter: float | None) -> float:
        """What seeds alone move a trial by, from what they do to a model; 0 where nothing tells."""
        return (scatter or 0.0) / math.sqrt(self.folds)

    def retrain(self, chosen: Sequence[TrialRecord]) -> dict[int, list[TrialRecord]] | None:
        """Models of these trials' settings on the baseline's seeds; None while some are left to train."""
        records = self.records("finalists")
        if self._queue_finalists(chosen, records):
            return None
        models = {(r.source_trial, r.seed): r for r in records}
        found = {trial.number: [models[trial.number, seed] for seed in self.seeds()] for trial in chosen}
        return None if any(_left(of_trial) for of_trial in found.values()) else found

    def _queue_finalists(self, chosen: Sequence[TrialRecord], present: Sequence[TrialRecord]) -> int:
        """Queue the models of these settings that are not `present`; return how many."""
        found = {(r.source_trial, r.seed) for r in present}
        seeds = [(seed, index % self.folds) for index, seed in enumerate(self.seeds())]
        missing = [(trial, seed, fold) for trial in chosen for seed, fold in seeds if (trial.number, seed) not in found]
        for trial, seed, fold in missing:
            self.store.enqueue("finalists", trial.params, source_trial=trial.number, seed=seed, fold=fold)
        return len(missing)

    def seeds(self) -> list[int]:
        """The R seeds that baseline and finalists share."""
        return [self.config.replicate_seed(index) for index in range(self.config.seeds)]

    def floors(self, baseline: Baseline) -> list[float]:
        """The validation accuracy that a setting must keep on each fold."""
        return [accuracy - self.config.tolerance_fraction - ROUNDING for accuracy in baseline.accuracy_by_fold]

    def folds_wanted(self, important: tuple[int, ...], *, ranked: bool = False) -> tuple[int, str | None]:
        """How many folds a trial is to train on, and what to tell of it: several where one validates too little.

        `ranked`: a baseline on one split has said who is important.
        """
        asked, config = self.config.folds, self.config
        if asked != "auto":
            return asked, None
        text = self.too_few_to_rank(important)
        if text is None:
            return 1, None
        if not self.data.has_folds:
            return 1, f"{text}: add some, or give no folder for validation, and folds of the training images are used."
        more = self.more_baselines(MOST_FOLDS, ranked=ranked)
        baselines = f", and {more} more of the baseline" if more else ""
        return MOST_FOLDS, (
            f"{text}: each trial trains on {MOST_FOLDS} folds instead of one split, at {MOST_FOLDS} times the cost "
            f"({config.trials * MOST_FOLDS} trainings in the search instead of {config.trials}{baselines}; --folds 1 "
            f"for one split)."
        )

    def more_baselines(self, folds: int, *, ranked: bool = False) -> int:
        """How many models a baseline on so many folds has beyond its R, which are all on the first if they `ranked`."""
        count = max(self.config.seeds, folds)
        return sum(index % folds > 0 for index in range(count)) if ranked else count - self.config.seeds

    def too_few_to_rank(self, important: tuple[int, ...]) -> str | None:
        """Which important class has too few validation images or groups to rank trials by, in words; None: none has."""
        labels, groups = self.data.validation.labels.numpy(), self.data.validation.groups.numpy()
        for c in important:
            images, units = int((labels == c).sum()), len(np.unique(groups[labels == c]))
            if images < FEW_IMAGES or units < FEW_GROUPS:
                count = f"{images} validation images" + (f" of {units} group(s)" if units < images else "")
                return f"Class {named(c, self.data.classes)} has only {count}, too few to rank trials by"
        return None

    def learned_nothing(self, baseline: Baseline) -> str | None:
        """What to say of a baseline that is not shown to beat always naming the largest class; None: it does."""
        classes, labels = self.data.classes, self.data.validation_of(self.folds).labels
        counts = torch.bincount(labels, minlength=len(classes)).tolist()
        return no_better_than_guessing(baseline.accuracy, counts, classes)

    def records(self, stage: Stage) -> list[TrialRecord]:
        """Trials of a stage, with the recall of this study's important classes and the constraints that bind them."""
        first = self.config.trials if stage == "search" and self.equal_budget else None
        found = [r.for_classes(self.important) for r in self.store.records(stage, first=first)]
        return found if stage == "baseline" else [r.bound_by([c.name for c in self.constraints]) for r in found]


def _left(records: Iterable[TrialRecord]) -> int:
    """How many are queued or running."""
    return sum(not r.ended for r in records)


class Crew:
    """The workers of a run, and the console that shows what they do."""

    def __init__(self, workers: Workers, console: Console, store: StudyStore, schedule: Schedule, heart: Heart) -> None:
        self._workers = workers
        self._heart = heart
        self._console = console
        self._store = store
        self._publish_at = -math.inf
        self._plan(schedule)

    def on_folds(self, folds: int, more_baselines: int) -> None:
        """A trial of the search is `folds` trainings from now on, and so many more of the baseline are needed."""
        self._plan(self._schedule.on_folds(folds, more_baselines))

    def _plan(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._console.plan(schedule)
        self._store.set("schedule", asdict(schedule))  # for those who look on from outside

    @classmethod
    @contextmanager
    def at_work(
        cls, study: Stages, planned: Mapping[str, int], device: torch.device, console: Console, heart: Heart
    ) -> Iterator[Self]:
        """Put the queues in order, say what will be done, and have workers serve the study meanwhile.

        `heart` is of the run that holds the study.
        """
        config, data, store = study.config, study.data, study.store
        started = time.monotonic()
        with heard(signal.SIGINT), _launching(study, device, console) as (launch, places):
            store.sign()
            store.artifacts.sweep()
            store.set("stage", "running")
            store.set("judged", False)
            again, once_more = store.requeue_interrupted(), store.requeue_blameless()
            where = f"Ray's cluster ({places[0]})" if config.launcher == "ray" else device
            epochs = config.most_epochs(data.epochs)
            most = "up to " if is_searched(config.epochs) else ""
            at_hand = f"{len(places)} worker(s) on {where}" if places else "none of its own: see `camri-tune worker`"
            console.say(f"{config.study_name}: {data}; {most}{epochs} epochs, {at_hand}; files in {config.folder}")
            if again:
                console.say(f"{again} interrupted training(s) queued again")
            if once_more:
                console.say(f"{once_more} training(s) that ran out of memory, or ended their workers, queued again")
            for notice in data.notices():
                console.say(notice)
            try:
                with Workers(store=store, launch=launch, places=len(places)) as workers:
                    yield cls(workers, console, store, Schedule(dict(planned), epochs, len(places)), heart)
                    store.set("stage", "done")
            finally:
                if not heart.lost:
                    store.requeue_interrupted()  # what the workers have just given back
                    store.set("wall_seconds", store.attributes.get("wall_seconds", 0.0) + time.monotonic() - started)

    def carry_out(self, stage: Stage, plan: Callable[[], Planned | None], studies: Mapping[str, Stages]) -> Planned:
        """Finish a stage: until `plan` says what came of it, and nothing of the stage is queued or running.

        `plan` is asked again and again, and queues what is missing then, also of the next stage where that is sure to
        be needed. `studies` by the label that they are shown with.
        """
        found: list[Planned] = []
        shown = STAGES[STAGES.index(stage) :]

        def look() -> None:
            records = {str(each): {label: s.records(each) for label, s in studies.items()} for each in shown}
            self._console.update(stage, records)

        def finished() -> bool:
            try:
                planned = plan()
            except CamriTuneError:  # the last training has not been shown yet
                look()
                self._publish(studies)
                raise
            found[:] = [] if planned is None else [planned]
            return planned is not None and not any(_left(study.records(stage)) for study in studies.values())

        def on_tick() -> None:
            raise_swallowed()
            require_held(self._store, self._heart)
            look()
            if time.monotonic() >= self._publish_at:
                self._publish(studies)

        self._workers.wait(finished, on_tick)
        self._publish(studies)
        return found[0]

    def _publish(self, studies: Mapping[str, Stages]) -> None:
        """Write the dashboard's note and figures anew."""
        importlib.import_module("optuna_dashboard")  # once, a second or two that are not the note's
        started = time.monotonic()
        for study in studies.values():
            show(study.store, self._console)
        took = time.monotonic() - started
        self._publish_at = started + max(PUBLISH_SECONDS * len(studies), took / PUBLISH_SHARE)


def require_held(store: StudyStore, heart: Heart) -> None:
    """Raise WorkerError where this run, whose heart it is, holds the study no more."""
    if heart.lost:
        raise WorkerError(f"study {store.name!r} was taken over by another run while this one hung")


@contextmanager
def _launching(study: Stages, device: torch.device, console: Console) -> Iterator[tuple[Launch, list[str]]]:
    """How this run starts its workers, and the device of each."""
    config, name, url = study.config, study.store.name, storage_url(study.config)
    if config.launcher == "ray":
        with ray_launch(config, name=name, storage_url=url, say=console.say) as found:
            yield found
        return
    places = places_for(config, device, torch.cuda.device_count() if device.type == "cuda" else 0)
    model, logs = allowed(config.model), config.folder / "logs"
    yield local_launch(name=name, storage_url=url, devices=places, log_folder=logs, model=model), places


def show(store: StudyStore, console: Console) -> None:
    """Write what the dashboard shows of a study beside its trials. Should that fail, it is said, and no more."""
    try:
        publish(read_overview(store), store)
    except Exception as error:  # a picture is no reason to lose a training
        console.say(f"What the dashboard shows of {store.name!r} could not be written: {type(error).__name__}: {error}")


@contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Two runs of one study at once would plan the same work twice."""
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=1)  # whoever only asks whether it is held has it for a moment
    except Timeout:
        raise InputError(
            f"another run works on {str(folder)!r} now; wait for it, or start another study with --name"
        ) from None
    try:
        yield
    finally:
        lock.release()
