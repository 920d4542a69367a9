"""The stages of a run. Each enqueues what is missing and waits, so that a resumed run does only what is left."""

import torch

from camri_tune.baseline import START_FACTORS, best_learning_rate, next_learning_rates, resolve_important
from camri_tune.config import StudyConfig
from camri_tune.console import Console
from camri_tune.datasets import Dataset
from camri_tune.errors import CamriTuneError
from camri_tune.images import describe_counts
from camri_tune.records import Baseline, TrialRecord
from camri_tune.search import replicate_seed, starting_points, tuning_seed
from camri_tune.selection import finalists, nothing_to_gain, rank_settings
from camri_tune.storage import INTERRUPTED, Stage, StudyStore
from camri_tune.training import default_learning_rate
from camri_tune.worker import LocalWorkers, worker_count

ROUNDS_OF_FINALISTS = 2


class Stages:
    """One run's work on one study: what it plans, and what it has found out so far."""

    workers: LocalWorkers

    def __init__(self, config: StudyConfig, data: Dataset, store: StudyStore, console: Console) -> None:
        self.config = config
        self.data = data
        self.store = store
        self.console = console
        self.important: tuple[int, ...] = ()
        self.notices: list[str] = []

    def begin(self, device: torch.device) -> None:
        """Put the queues in order, before any worker looks at them, and say what will be done."""
        config, data = self.config, self.data
        self.store.set("stage", "running")
        again = self.store.requeue_interrupted()
        count = worker_count(config, device)
        if data.skipped_files:
            self.notices.append(f"{data.skipped_files} corrupt image file(s) were left out (--skip-corrupt).")
        if data.ignored_files:
            self.notices.append(f"{data.ignored_files} file(s) that are no images were passed over.")
        planned = {
            "baseline": len(START_FACTORS) + config.seeds,
            "search": config.trials,
            "finalists": min(config.finalists, config.trials) * config.seeds,
        }
        epochs = config.epochs or data.epochs
        self.console.plan(planned, epochs, count)
        self.console.say(
            f"{config.study_name}: {data.name}, {len(data.classes)} classes, train {describe_counts(data.train)}, "
            f"validation {describe_counts(data.validation)}; {epochs} epochs, {count} worker(s) on {device}; "
            f"files in {config.folder}"
        )
        if again:
            self.console.say(f"{again} interrupted training(s) queued again")
        for notice in self.notices:
            self.console.say(notice)

    def measure_baseline(self) -> Baseline:
        """Tune the learning rate of cross-entropy, then train it on R fresh seeds; settle who is important."""
        tuning, seeds = tuning_seed(self.config), self.seeds()
        default = default_learning_rate(self.config.model)
        while True:
            self._finish("baseline")  # what an earlier run left queued comes first
            tried = [r for r in self.records("baseline") if r.seed == tuning]
            rates = next_learning_rates(tried, default)
            if not rates:
                break
            for rate in rates:
                self.store.enqueue("baseline", {"learning_rate": rate}, seed=tuning)
        best = best_learning_rate(tried, default)
        if best is None:
            raise CamriTuneError(f"every training of the baseline failed; the first said: {tried[0].failure}")
        done = {r.seed for r in self.records("baseline")}
        for seed in seeds:
            if seed not in done:
                self.store.enqueue("baseline", {"learning_rate": best}, seed=seed)
        self._finish("baseline")
        by_seed = {r.seed: r for r in self.records("baseline")}
        for seed in seeds:
            if by_seed[seed].state != "complete":
                raise CamriTuneError(f"the baseline's training with seed {seed} failed: {by_seed[seed].failure}")
        baseline = Baseline(best, tuple(by_seed[seed] for seed in seeds))
        self.important = resolve_important(self.config.important, self.data.classes, baseline)
        self.store.set(
            "baseline",
            {
                "important": list(self.important),
                "floor": self.floor(baseline),
                "learning_rate": best,
                "recall_per_class": list(baseline.recall_per_class),
            },
        )
        recalls = ", ".join(f"{c} ({self.data.classes[c]}) {baseline.recall_per_class[c]:.4f}" for c in self.important)
        self.console.say(
            f"Baseline over {len(seeds)} seed(s), learning rate {best:.3g}: validation accuracy "
            f"{baseline.accuracy:.4f}, recall of the important class {recalls}"
        )
        notice = nothing_to_gain(baseline.recall_per_class, self.important, self.data.classes)
        if notice:
            self.notices.append(notice)
            self.console.say(notice)
        return baseline

    def search(self, baseline: Baseline) -> None:
        """Fill the search's queue up to the number of trials asked for, good starting points first."""
        present = len(self.records("search"))
        points = starting_points(
            self.config.loss, self.important, len(self.data.classes), baseline.learning_rate
        )  # fmt: skip
        for index in range(present, self.config.trials):
            self.store.enqueue("search", points[index] if index < len(points) else {})
        self._finish("search")
        records = self.records("search")
        if all(r.state == "failed" for r in records):
            raise CamriTuneError(f"every trial of the search failed; the last said: {records[-1].failure}")

    def retrain_finalists(self, baseline: Baseline) -> dict[int, list[TrialRecord]]:
        """Retrain the best feasible trials on the baseline's seeds: the best of many noisy trials is partly luck.

        Where none of the first few keeps the floor over seeds, the next few get their chance.
        """
        count = self.config.finalists
        candidates = finalists(self.records("search"), count * ROUNDS_OF_FINALISTS)
        retrained: dict[int, list[TrialRecord]] = {}
        for start in range(0, len(candidates), count):
            chosen = candidates[start : start + count]
            done = {(r.source_trial, r.seed) for r in self.records("finalists")}
            for trial in chosen:
                for seed in self.seeds():
                    if (trial.number, seed) not in done:
                        self.store.enqueue("finalists", trial.params, source_trial=trial.number, seed=seed)
            self._finish("finalists")
            records = self.records("finalists")
            for trial in chosen:
                mine = {r.seed: r for r in records if r.source_trial == trial.number}
                retrained[trial.number] = [mine[seed] for seed in self.seeds()]
            if rank_settings(retrained, self.floor(baseline)):
                break
        return retrained

    def seeds(self) -> list[int]:
        """The R seeds that baseline and finalists share."""
        return [replicate_seed(self.config, index) for index in range(self.config.seeds)]

    def floor(self, baseline: Baseline) -> float:
        """The validation accuracy that a setting must keep."""
        # A mean of equal accuracies can round above them: one image in a billion must not decide.
        return baseline.accuracy - self.config.tolerance_fraction - 1e-9

    def records(self, stage: Stage) -> list[TrialRecord]:
        """Trials of a stage that count: an interrupted one lives on in the one queued in its place."""
        return [r for r in self.store.records(stage) if r.failure != INTERRUPTED]

    def _finish(self, stage: Stage) -> None:
        records: list[TrialRecord] = []

        def finished() -> bool:
            records[:] = self.records(stage)
            return all(r.state not in ("waiting", "running") for r in records)

        self.workers.wait(finished, lambda: self.console.update(stage, records, self.data.classes))
