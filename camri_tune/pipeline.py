"""The whole job: baseline, search, finalists, judgement, export."""

import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from camri_tune.baseline import (
    START_FACTORS,
    best_learning_rate,
    check_important,
    next_learning_rates,
    resolve_important,
)
from camri_tune.bundle import BundleConfig, load_classifier, read_bundle, write_bundle
from camri_tune.config import StudyConfig
from camri_tune.console import Console
from camri_tune.datasets import Dataset, Images, describe_counts, open_dataset, open_test_images
from camri_tune.errors import BundleError, CamriTuneError, InputError
from camri_tune.metrics import confusion_matrix, recall_per_class
from camri_tune.records import (
    Baseline,
    Best,
    Measured,
    Result,
    Share,
    Side,
    TrialRecord,
    Verdict,
    measured_on_validation,
)
from camri_tune.report import model_card
from camri_tune.search import (
    DEFAULT_LEARNING_RATE,
    model_spec,
    replicate_seed,
    starting_points,
    tuning_seed,
)
from camri_tune.selection import (
    finalists,
    nothing_to_gain,
    paired_difference,
    rank_models,
    rank_settings,
    sentence_of,
    verdict_of,
)
from camri_tune.storage import INTERRUPTED, Stage, StudyStore, is_writable_folder, open_storage, storage_url
from camri_tune.training import pick_device, predict_logits
from camri_tune.worker import LocalWorkers, worker_count

ROUNDS_OF_FINALISTS = 2


def run(config: StudyConfig, console: Console | None = None) -> Result:
    """Tune, select and export as `config` says; the same call again resumes. Progress goes to `console`, if any.

    Raises InputError for what the user can mend. A result with verdict `none` is a result: nothing is exported then.
    """
    console = console or Console(quiet=True)
    config = config.absolute()
    device = pick_device(config.device)
    if not is_writable_folder(config.folder):
        raise InputError(f"--out {str(config.out)!r} is not a folder that can be written to; name another with --out")
    with _only_run(config.folder), console:
        started = time.monotonic()
        data = open_dataset(config, console.reading)
        check_important(config.important, data.classes)
        store = StudyStore.create(open_storage(storage_url(config)), config, data)
        study = _Study(config, data, store, console)
        study.begin(device)
        try:
            with LocalWorkers(
                store=store,
                storage_url=storage_url(config),
                device=device,
                count=worker_count(config, device),
                log_folder=config.folder / "logs",
            ) as workers:
                study.workers = workers
                baseline = study.measure_baseline()
                study.search(baseline)
                retrained = study.retrain_finalists(baseline)
                store.set("stage", "done")
        finally:
            store.set("wall_seconds", store.attributes.get("wall_seconds", 0.0) + time.monotonic() - started)
        console.say("Judging on the test part")
        result, chosen = study.judge(baseline, retrained, device)
        _write_json(config.folder / "result.json", result.as_json())
        study.export(result, chosen)
        return result


class _Study:
    """One run's stages. Each enqueues what is missing and waits, so a resumed run does only what is left."""

    workers: LocalWorkers

    def __init__(self, config: StudyConfig, data: Dataset, store: StudyStore, console: Console) -> None:
        self.config = config
        self.data = data
        self.store = store
        self.console = console
        self.important: tuple[int, ...] = ()
        self.notices: list[str] = []

    @property
    def epochs(self) -> int:
        return self.config.epochs or self.data.epochs

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
        self.console.plan(planned, self.epochs, count)
        self.console.say(
            f"{config.study_name}: {data.name}, {len(data.classes)} classes, train {describe_counts(data.train)}, "
            f"validation {describe_counts(data.validation)}; {self.epochs} epochs, {count} worker(s) on {device}; "
            f"files in {config.folder}"
        )
        if again:
            self.console.say(f"{again} interrupted training(s) queued again")
        for notice in self.notices:
            self.console.say(notice)

    def measure_baseline(self) -> Baseline:
        """Tune the learning rate of cross-entropy, then train it on R fresh seeds; settle who is important."""
        tuning, seeds = tuning_seed(self.config), self._seeds()
        while True:
            self._finish("baseline")  # what an earlier run left queued comes first
            tried = [r for r in self._records("baseline") if r.seed == tuning]
            rates = next_learning_rates(tried, DEFAULT_LEARNING_RATE)
            if not rates:
                break
            for rate in rates:
                self.store.enqueue("baseline", {"learning_rate": rate}, seed=tuning)
        best = best_learning_rate(tried, DEFAULT_LEARNING_RATE)
        if best is None:
            raise CamriTuneError(f"every training of the baseline failed; the first said: {tried[0].failure}")
        done = {r.seed for r in self._records("baseline")}
        for seed in seeds:
            if seed not in done:
                self.store.enqueue("baseline", {"learning_rate": best}, seed=seed)
        self._finish("baseline")
        by_seed = {r.seed: r for r in self._records("baseline")}
        for seed in seeds:
            if by_seed[seed].state != "complete":
                raise CamriTuneError(f"the baseline's training with seed {seed} failed: {by_seed[seed].failure}")
        baseline = Baseline(best, tuple(by_seed[seed] for seed in seeds))
        self.important = resolve_important(self.config.important, self.data.classes, baseline)
        self.store.set(
            "baseline",
            {
                "important": list(self.important),
                "floor": self._floor(baseline),
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
        present = len(self._records("search"))
        points = starting_points(
            self.config.loss, self.important, len(self.data.classes), baseline.learning_rate
        )  # fmt: skip
        for index in range(present, self.config.trials):
            self.store.enqueue("search", points[index] if index < len(points) else {})
        self._finish("search")
        records = self._records("search")
        if all(r.state == "failed" for r in records):
            raise CamriTuneError(f"every trial of the search failed; the last said: {records[-1].failure}")

    def retrain_finalists(self, baseline: Baseline) -> dict[int, list[TrialRecord]]:
        """Retrain the best feasible trials on the baseline's seeds: the best of many noisy trials is partly luck.

        Where none of the first few keeps the floor over seeds, the next few get their chance.
        """
        count = self.config.finalists
        candidates = finalists(self._records("search"), count * ROUNDS_OF_FINALISTS)
        retrained: dict[int, list[TrialRecord]] = {}
        for start in range(0, len(candidates), count):
            chosen = candidates[start : start + count]
            done = {(r.source_trial, r.seed) for r in self._records("finalists")}
            for trial in chosen:
                for seed in self._seeds():
                    if (trial.number, seed) not in done:
                        self.store.enqueue("finalists", trial.params, source_trial=trial.number, seed=seed)
            self._finish("finalists")
            records = self._records("finalists")
            for trial in chosen:
                mine = {r.seed: r for r in records if r.source_trial == trial.number}
                retrained[trial.number] = [mine[seed] for seed in self._seeds()]
            if rank_settings(retrained, self._floor(baseline)):
                break
        return retrained

    def judge(
        self, baseline: Baseline, retrained: dict[int, list[TrialRecord]], device: torch.device
    ) -> tuple["Result", TrialRecord | None]:
        """Read the test part, for the baseline's models and for those of the best setting that is intact."""
        test = self.data.test()
        judged = _Judge(self, test, device)
        old = [judged.predictions(record, "ce") for record in baseline.records]
        if any(answers is None for answers in old):
            raise CamriTuneError(
                f"a checkpoint of the baseline is missing or altered under {self.config.folder / 'artifacts'}: move "
                f"{self.config.folder} away and run again"
            )
        old_answers = [answers for answers in old if answers is not None]
        best, chosen = None, None
        for number in rank_settings(retrained, self._floor(baseline)):
            records = retrained[number]
            new = [judged.predictions(record, self.config.loss) for record in records]
            if any(answers is None for answers in new):
                self.notices.append(f"Trial {number} was passed over: a checkpoint of it is missing or altered.")
                self.console.say(self.notices[-1])
                continue
            chosen = rank_models(records)[0]
            place = records.index(chosen)
            answers = [a for a in new if a is not None]
            best = judged.best(number, records, answers, place, old_answers[place])
            break
        verdict: Verdict = "none"
        if best is not None:
            verdict = verdict_of(best.accuracy_difference, self.config.epsilon / 100)
        result = self._result(baseline, judged, old_answers, verdict, best)
        return result, chosen

    def export(self, result: Result, chosen: TrialRecord | None) -> None:
        """Write `best/`; or remove one of an earlier run where nothing may be called best any more."""
        folder = self.config.folder / "best"
        if chosen is None or result.best is None:
            if folder.exists():
                folder.rename(self.config.folder / f"withdrawn-{int(time.time())}")
            return
        spec = model_spec(self.data, self.config.model, self.config.loss, chosen.params)
        config = BundleConfig(
            schema=1,
            spec=spec,
            important=self.important,
            dataset=self.config.dataset,
            dataset_fingerprint=self.data.fingerprint,
            seed=self.config.seed,
            skip_corrupt=self.config.skip_corrupt,
        )
        place = [replicate_seed(self.config, i) for i in range(self.config.seeds)].index(result.best.exported_seed)
        metrics = {
            "verdict": result.verdict,
            "sentence": result.sentence,
            **{
                part: _one_model(measured, place)
                for part, measured in (("test", result.best.side.test), ("validation", result.best.side.validation))
            },
            "study": result.as_json(),
        }
        with tempfile.TemporaryDirectory() as scratch:
            weights = Path(scratch) / "model.safetensors"
            if not self.store.fetch_checkpoint(chosen, weights):
                raise CamriTuneError(f"the checkpoint of the chosen model (trial {chosen.number}) was altered just now")
            write_bundle(folder, weights=weights, config=config, metrics=without_nan(metrics), card=model_card(result))

    def _result(
        self, baseline: Baseline, judged: "_Judge", old: list["Answers"], verdict: Verdict, best: Best | None
    ) -> Result:
        config, data = self.config, self.data
        records = self._records("search")
        names = ", ".join(data.classes[c] for c in self.important)
        return Result(
            study=config.study_name,
            dataset=data.name,
            classes=data.classes,
            important=self.important,
            loss=config.loss,
            tolerance=config.tolerance,
            epsilon=config.epsilon,
            seeds=config.seeds,
            verdict=verdict,
            sentence=sentence_of(verdict, best, names=names, epsilon=config.epsilon, tolerance=config.tolerance),
            notices=tuple(self.notices),
            images={
                "train": len(data.train),
                "validation": len(data.validation),
                "test": len(judged.test),
                "validation_important": self._count_important(data.validation),
                "test_important": self._count_important(judged.test),
            },
            baseline=Side(baseline.measured(self.important), judged.measured(old)),
            baseline_learning_rate=baseline.learning_rate,
            best=best,
            trials={state: sum(r.state == state for r in records) for state in ("complete", "pruned", "failed")},
            wall_seconds=float(self.store.attributes["wall_seconds"]),
            versions=versions(),
            folder=str(config.folder),
        )

    def _count_important(self, images: Images) -> int:
        return int(torch.isin(images.labels, torch.tensor(self.important)).sum())

    def _seeds(self) -> list[int]:
        return [replicate_seed(self.config, index) for index in range(self.config.seeds)]

    def _floor(self, baseline: Baseline) -> float:
        # A mean of equal accuracies can round above them: one image in a billion must not decide.
        return baseline.accuracy - self.config.tolerance_fraction - 1e-9

    def _records(self, stage: Stage) -> list[TrialRecord]:
        """Trials of a stage that count: an interrupted one lives on in the one queued in its place."""
        return [r for r in self.store.records(stage) if r.failure != INTERRUPTED]

    def _finish(self, stage: Stage) -> None:
        records: list[TrialRecord] = []

        def finished() -> bool:
            records[:] = self._records(stage)
            return all(r.state not in ("waiting", "running") for r in records)

        self.workers.wait(finished, lambda: self.console.update(stage, records, self.data.classes))


Answers = NDArray[np.int64]  # predicted class of each test image


@dataclass
class _Judge:
    """Models measured on the test part."""

    study: _Study
    test: Images
    device: torch.device

    def predictions(self, record: TrialRecord, loss: Any) -> Answers | None:
        """Answers of a trial's model; None where its checkpoint is missing or altered."""
        study = self.study
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "model.safetensors"
            if not study.store.fetch_checkpoint(record, path):
                return None
            try:
                spec = model_spec(study.data, study.config.model, loss, record.params)
                classifier = load_classifier(path, spec).to(self.device)
            except BundleError:
                return None
        return predict_logits(classifier, self.test.pixels, self.device).argmax(dim=1).numpy()

    def measured(self, answers: Sequence[Answers]) -> Measured:
        labels = self.test.labels.numpy()
        recalls = [
            recall_per_class(confusion_matrix(labels, a, len(self.study.data.classes))).tolist() for a in answers
        ]
        return Measured.over_seeds([float((a == labels).mean()) for a in answers], recalls, self.study.important)

    def best(self, trial: int, records: list[TrialRecord], new: list[Answers], place: int, old: Answers) -> Best:
        """Describe the chosen setting; `place` is the exported model's seed, `old` the baseline's answers with it."""
        labels, important = self.test.labels.numpy(), self.study.important
        right, old_right = new[place] == labels, old == labels
        ours = np.isin(labels, important)
        return Best(
            trial=trial,
            params={k: float(v) for k, v in records[place].params.items()},
            side=Side(measured_on_validation(records, important), self.measured(new)),
            exported_seed=records[place].seed or 0,
            exported_accuracy=Share(int(right.sum()), len(right)),
            exported_recall={c: Share(int(right[labels == c].sum()), int((labels == c).sum())) for c in important},
            accuracy_difference=paired_difference(right.tolist(), old_right.tolist()),
            recall_difference=paired_difference(right[ours].tolist(), old_right[ours].tolist()),
        )


def evaluate_bundle(folder: Path, where: str | None, *, data_dir: Path, skip_corrupt: bool = False) -> dict[str, Any]:
    """Measure an exported model on a data set, from its files alone. Figures as JSON values; see `open_test_images`."""
    bundle = read_bundle(folder)
    config = bundle.config
    trained_on = StudyConfig(
        dataset=config.dataset,
        data_dir=data_dir,
        seed=config.seed,
        skip_corrupt=config.skip_corrupt or skip_corrupt,
        image_size=config.spec.image_size,
    )
    images, text = open_test_images(
        where, trained_on=trained_on, fingerprint=config.dataset_fingerprint, classes=bundle.classes
    )
    if images.pixels.shape[1] != config.spec.channels:
        raise InputError(
            f"{where!r} has images of {images.pixels.shape[1]} channel(s), but the model takes {config.spec.channels}"
        )
    answers = predict_logits(bundle.classifier, images.pixels, torch.device("cpu")).argmax(dim=1).numpy()
    labels = images.labels.numpy()
    recalls = recall_per_class(confusion_matrix(labels, answers, len(bundle.classes)))
    present = [c for c in config.important if not math.isnan(recalls[c])]
    figures = {
        "accuracy": float((answers == labels).mean()),
        "recall": float(min(recalls[c] for c in present)) if present else None,
        "recall_per_class": recalls.tolist(),
        "images": len(labels),
    }
    stored = {key: bundle.metrics["test"][key] for key in ("accuracy", "recall", "recall_per_class")}
    clean = without_nan(figures)
    return {
        "data": text,
        **clean,
        "accuracy_interval": list(Share(int((answers == labels).sum()), len(labels)).interval),
        "important": list(config.important),
        "classes": list(bundle.classes),
        "matches_stored": all(clean[key] == value for key, value in stored.items()),
    }


def versions() -> dict[str, str]:
    """What the figures were made with."""
    packages = {name: metadata.version(name) for name in ("camri-tune", "torch", "optuna", "numpy")}
    return {**packages, "python": platform.python_version(), "machine": f"{platform.machine()}, {os.cpu_count()} cores"}


@contextmanager
def _only_run(folder: Path) -> Iterator[None]:
    """Two runs of one study at once would plan the same work twice."""
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(
            f"another run works on {str(folder)!r} now; wait for it, or start another study with --name"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _one_model(measured: Measured, place: int) -> dict[str, Any]:
    return {
        "accuracy": measured.accuracy.values[place],
        "recall": measured.recall.values[place],
        "recall_per_class": [figure.values[place] for figure in measured.recall_per_class],
    }


def without_nan(value: Any) -> Any:
    """JSON has no NaN: a class without test images has no recall, which is null."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _write_json(path: Path, value: Any) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(without_nan(value), indent=2) + "\n")
    os.replace(partial, path)
