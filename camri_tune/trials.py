"""One trial from its claim to its result: train, keep what an interruption would lose, score, tell."""

import csv
import math
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import Trial
from optuna.trial import TrialState as OptunaState
from safetensors import SafetensorError
from torch import Tensor

from camri_tune.bundle import save_weights
from camri_tune.checkpoint import TrainingState
from camri_tune.config import SEEDS_APART
from camri_tune.constraints import shortfalls
from camri_tune.datasets import Dataset
from camri_tune.errors import OutOfMemoryError, StoppedError, StorageError, TrainingDivergedError, WorkerError
from camri_tune.files import code_version
from camri_tune.heartbeat import Heart
from camri_tune.metrics import IntArray, accuracy, important_recall, pack, recall_per_class
from camri_tune.records import ACCURACY, ACCURACY_CURVE, RECALL_CURVE, STOPPED
from camri_tune.search import Plan, recipe_choices, suggest
from camri_tune.storage import OUT_OF_MEMORY, Stage, StudyStore
from camri_tune.training import Progress, Recipe, Trained, is_out_of_memory, recipe_of, train, with_choices

# The seeds of each use are apart: what chose a setting is never what it is judged with.
_SEED_OFFSETS: dict[Stage, int] = {"baseline": 0, "search": 10_000, "finalists": 0}
# States are saved no more often than every so many seconds, and than costs a fiftieth of the training.
SAVE_SECONDS, SAVE_SHARE = 2.0, 0.02
PUBLISH_SECONDS = 1.0  # between two notes of how far a training is, each of which a storage takes its time to write
LOOK_SECONDS = 0.5  # between two looks at a baseline that is not complete yet
DOUBT = 3.0  # standard errors of the difference of two accuracies
_FIRST = "first."  # in a saved state: the weights of the first fold's model, the one that is kept


Stop = Callable[[], str | None]  # says why a worker should end, if it should


def run_trial(trial: Trial, stage: Stage, plan: Plan, store: StudyStore, asked_to_stop: Stop = lambda: None) -> None:
    """Train, score and tell one claimed trial.

    What goes wrong in training becomes its reason. What goes wrong around it (no space for a checkpoint, a GPU that
    computes no more) gives the trial back and raises WorkerError or StorageError. When `asked_to_stop` gives a reason,
    at any step, the trial is given back and StoppedError raised. A trial that was taken for abandoned meanwhile is left
    to whoever has it now.
    """
    try:
        with Heart(store.storage, trial._trial_id) as heart:
            _Run(trial, stage, plan, store, asked_to_stop, heart).carry_out()
    except UpdateFinishedTrialError:
        return


class _GiveWayError(Exception):
    """This trial waits for the baseline, which waits for a worker, or for a run."""


class _Run:
    """A trial at work, with what it has found out so far."""

    def __init__(
        self,
        trial: Trial,
        stage: Stage,
        plan: Plan,
        store: StudyStore,
        asked_to_stop: Stop,
        heart: Heart,
    ) -> None:
        self.trial = trial
        self.stage = stage
        # The baseline's models are scored by accuracy, whoever is important and known by then.
        self.plan = replace(plan, important=(), floors=(), constraints=()) if stage == "baseline" else plan
        self.store = store
        self.asked_to_stop = asked_to_stop
        self.heart = heart
        self.epochs = plan.epochs_of({})
        self.folds: Sequence[int] = range(plan.folds) if stage == "search" else [trial.user_attrs.get("fold", 0)]
        self.accuracies: dict[str, float] = {}
        self.recalls: dict[str, list[float]] = {}
        self.values: dict[str, float] = {}
        self._reported: set[str] = set()  # epochs whose values the storage has
        self.confusions: list[IntArray] = []  # of the folds that are done
        self.first: dict[str, Tensor] = {}  # weights of the first fold's model, once trained
        self.state: TrainingState | None = None  # of the fold at hand, after its last epoch
        self._started = self._saved_at = self._published_at = time.perf_counter()
        self._save_seconds = 0.0
        self._unsaved = False

    def carry_out(self) -> None:
        trial, study = self.trial, self.store.optuna_study(self.stage)
        value: float | None = None
        ended = OptunaState.COMPLETE
        try:
            trial.set_user_attr("device", str(self.plan.device))
            confusion = self._train()
            value = self._set_scores(confusion, self.folds[: len(self.confusions)])
        except StoppedError as stopped:
            self._give_back(stopped.reason)
            raise
        except _GiveWayError:
            self._give_back("the baseline comes first")
            return
        except (UpdateFinishedTrialError, StorageError):
            raise
        except OSError as error:  # the settings are not to blame, nor would others do better
            self.store.release(trial._trial_id, f"given back: {_reason(error)}")
            raise WorkerError(f"a training could not be kept: {_reason(error)}") from None
        except Exception as error:
            if not computes(self.plan.device):  # whatever this process tried next would fail as well
                self.store.give_up(self.store.storage.get_trial(trial._trial_id), _reason(error))
                raise WorkerError(f"{self.plan.device} does not compute any more: {_reason(error)}") from None
            ended = OptunaState.FAIL
            told = isinstance(error, TrainingDivergedError | OutOfMemoryError)
            trial.set_user_attr("failure", str(error) if told else _reason(error))
            if isinstance(error, OutOfMemoryError):
                trial.set_user_attr(OUT_OF_MEMORY, True)
            if self._done > trial.user_attrs.get("epoch", 0):
                self._publish()
        trial.set_user_attr("seconds", time.perf_counter() - self._started)
        study.tell(trial, value, state=ended)
        self.store.drop_resume(trial)

    def _train(self) -> IntArray:
        """Train a model on each of the folds, keep the first, and pool what they say of their validation parts.

        Where the first already shows that there is no hope, the others are spared, and no model is kept.
        """
        plan = self.plan
        head, learning_rate = suggest(self.trial, self.stage, plan)
        seed = self.trial.user_attrs.get("seed")
        if seed is None:
            seed = plan.config.seed * SEEDS_APART + _SEED_OFFSETS[self.stage] + self.trial.number
            self.trial.set_user_attr("seed", seed)
        self.epochs = plan.epochs_of(self.trial.params)
        self._resume()
        for fold in self.folds[len(self.confusions) :]:
            if len(self.confusions) == 1:
                self._await_floors()
                if self._misses_by_far():
                    self.trial.set_user_attr(STOPPED, True)
                    break
            training, validation = plan.data.fold(fold)
            recipe = recipe_of(
                plan.config.model,
                epochs=self.epochs,
                learning_rate=learning_rate,
                augmentation=plan.data.augmentation,
                images=len(training),
            )
            choices = recipe_choices(plan.config, self.trial.params)
            recipe = with_choices(recipe, choices, plan.data.augmentation)
            trained = self._within_memory(
                partial(
                    train,
                    plan.config.model,
                    head,
                    training,
                    validation,
                    num_classes=len(plan.data.classes),
                    seed=seed,
                    device=plan.device,
                    on_epoch=self._on_epoch,
                    on_step=self._on_step,
                    start=plan.start,
                ),
                recipe,
            )
            self.state = None
            self.confusions.append(trained.confusion)
            if self.stage != "search":  # test may judge it, and needs to know how it fares on groups that have names
                self.trial.set_user_attr("right", pack(trained.right))
            if not self.first:
                self.first = {
                    name: tensor.cpu().contiguous() for name, tensor in trained.classifier.state_dict().items()
                }
        self._await_floors()
        if len(self.confusions) == len(self.folds):
            self._keep_checkpoint()
        pooled: IntArray = np.sum(self.confusions, axis=0)
        self._keep_confusion(pooled)
        return pooled

    def _await_floors(self) -> None:
        """Wait for the rest of the baseline, beside which this trial was trained, to say what is to be kept.

        Raises _GiveWayError where a model of it is queued, for which there may be no other worker, and where no run is
        at work any more, for which a worker need not wait.
        """
        started = time.perf_counter()
        while self.stage != "baseline" and not self.plan.floors:
            self._on_step()
            self.plan = self.plan.as_stored(self.store)
            if not self.plan.floors:
                if self.store.waits("baseline") or not self.store.is_held:
                    raise _GiveWayError
                time.sleep(LOOK_SECONDS)
        self._started += time.perf_counter() - started  # it is no part of a training

    def _within_memory(self, train_by: Callable[..., Trained], recipe: Recipe) -> Trained:
        """Where memory runs out, go on once with half the batch at a time: the settings need not be bad."""
        while True:
            parts = self.trial.user_attrs.get("accumulation", 1)
            try:
                return train_by(recipe=replace(recipe, accumulation=parts), resume=self.state)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                reason = _reason(error)
            # Only here, where the exception holds on to no tensor any more.
            torch.cuda.empty_cache()
            if parts > 1:
                raise OutOfMemoryError(
                    f"out of memory on {self.plan.device}, also with half the batch at a time ({reason}): fewer "
                    f"workers there, or a smaller --image-size"
                )
            self.trial.set_user_attr("accumulation", 2)

    def _on_step(self) -> None:
        if self.heart.lost:
            raise UpdateFinishedTrialError
        if (reason := self.asked_to_stop()) is not None:
            raise StoppedError(reason)

    def _on_epoch(self, progress: Progress) -> None:
        if progress.confusion is not None and not self.confusions:  # the first fold's curve is the trial's
            self._keep_score(progress.epoch, progress.confusion)
        self.state, self._unsaved = progress.state, True
        if progress.epoch == progress.epochs or time.perf_counter() - self._published_at > PUBLISH_SECONDS:
            self._publish()
        since = time.perf_counter() - self._saved_at
        if progress.epoch < progress.epochs and since > max(SAVE_SECONDS, self._save_seconds / SAVE_SHARE):
            self._save_state()

    def _keep_score(self, epoch: int, confusion: IntArray) -> None:
        self.accuracies[str(epoch)] = accuracy(confusion)
        self.recalls[str(epoch)] = [round(float(r), 5) for r in recall_per_class(confusion)]
        self.values[str(epoch)] = _value(confusion, self.plan)

    def _misses_by_far(self) -> bool:
        """Whether the first fold's model is further below its floor than its validation images leave in doubt.

        Never for its recall, as Optuna's pruners would: they compare values, whether feasible or not. And never in the
        middle of a training: that saved little and misled the search (see docs/measured.md).
        """
        confusion, floor = self.confusions[0], self.plan.floors[self.folds[0]]
        doubt = DOUBT * math.sqrt(2 * floor * (1 - floor) / confusion.sum()) if 0 < floor < 1 else 0.0
        return accuracy(confusion) + doubt < floor

    @property
    def _done(self) -> int:
        """Epochs that are done, of all folds."""
        return len(self.confusions) * self.epochs + (0 if self.state is None else self.state.epoch)

    def _publish(self) -> None:
        """Note how far this trial is, and what is new in its curves."""
        self.trial.set_user_attr("epoch", self._done)
        new = self.values.keys() - self._reported
        if new:
            self.trial.set_user_attr(ACCURACY_CURVE, self.accuracies)
            self.trial.set_user_attr(RECALL_CURVE, self.recalls)
        for evaluated in sorted(new, key=int):
            self.trial.report(self.values[evaluated], int(evaluated))
        self._reported |= new
        self._published_at = time.perf_counter()

    # --- interruptions ------------------------------------------------------------------------------------------------

    def _save_state(self) -> None:
        """Store what an interrupted trial goes on from."""
        started = time.perf_counter()
        state = self.state or TrainingState(0, {})  # a fold that has not done an epoch yet
        first = {f"{_FIRST}{name}": tensor for name, tensor in self.first.items()}
        note: Mapping[str, Any] = {
            "code": code_version(),
            "confusions": [confusion.tolist() for confusion in self.confusions],
            "accuracies": self.accuracies,
            "recalls": self.recalls,
            "values": self.values,
        }
        with _scratch_file() as path:
            replace(state, tensors={**state.tensors, **first}).save(path, note)
            self.store.save_resume(self.trial, path, self._done)
        self._unsaved, self._saved_at = False, time.perf_counter()
        self._save_seconds = self._saved_at - started

    def _resume(self) -> None:
        """Go on from what an interrupted attempt at this trial stored, if it did, under this very code."""
        with _scratch_file() as path:
            found = TrainingState.load(path) if self.store.fetch_resume(self.trial, path) else None
        if found is None or found[1]["code"] != code_version():
            return
        state, note = found
        self.confusions = [np.asarray(confusion, dtype=np.int64) for confusion in note["confusions"]]
        self.accuracies, self.recalls, self.values = note["accuracies"], note["recalls"], note["values"]
        self.first = {k.removeprefix(_FIRST): v for k, v in state.tensors.items() if k.startswith(_FIRST)}
        self.state = state if state.epoch > 0 else None
        self.trial.set_user_attr("resumed_at", self._done)
        self._publish()

    def _give_back(self, reason: str) -> None:
        try:
            if self._unsaved:
                self._save_state()
        except OSError as error:
            reason = f"{reason}; its state could not be saved: {_reason(error)}"
        self.store.release(self.trial._trial_id, f"given back: {reason}")

    # --- what is stored of a trial ------------------------------------------------------------------------------------

    def _set_scores(self, confusion: IntArray, folds: Sequence[int]) -> float:
        """Store what validation says of a trial on these folds; the constraints exactly once, last, accuracy's last."""
        trial, plan = self.trial, self.plan
        trial.set_user_attr("accuracy", accuracy(confusion))
        trial.set_user_attr("recall_per_class", [float(r) for r in recall_per_class(confusion)])
        trial.set_user_attr("confusion", confusion.tolist())
        value = _value(confusion, plan)
        if plan.floors:
            trial.set_user_attr("recall", value)
            recalls = recall_per_class(confusion).tolist()
            for name, shortfall in shortfalls(plan.constraints, recalls, folds).items():
                trial.set_constraint(name, shortfall)
            trial.set_constraint(ACCURACY, pooled_floor(plan.floors, plan.data, folds) - accuracy(confusion))
        return value

    def _keep_checkpoint(self) -> None:
        with _scratch_file() as path:
            save_weights(self.first, path)
            self.store.save_checkpoint(self.trial, path)

    def _keep_confusion(self, confusion: IntArray) -> None:
        """As a table that the dashboard shows: counts of validation images, rows true."""
        # The dashboard would put columns that are called like numbers first.
        classes = [f"class {name}" if name.isdecimal() else name for name in self.plan.data.classes]
        with _scratch_file("confusion.csv") as path:
            with path.open("w", newline="", encoding="utf-8") as file:
                table = csv.writer(file)
                table.writerow([r"true \ predicted", *classes])
                table.writerows([name, *row] for name, row in zip(classes, confusion.tolist(), strict=True))
            self.store.save_artifact(self.trial, path)


def pooled_floor(floors: Sequence[float], data: Dataset, folds: Sequence[int]) -> float:
    """The accuracy to be kept on several folds together: each one's floor weighs as much as its validation images."""
    if len(folds) == 1:
        return floors[folds[0]]
    sizes = {fold: len(data.fold(fold)[1]) for fold in folds}
    return sum(floors[fold] * size for fold, size in sizes.items()) / sum(sizes.values())


def computes(device: torch.device) -> bool:
    """Whether a device still does anything: after some errors a GPU does not, for the process that met them.

    Nor does one that this PyTorch has no code for. One that has no memory left does.
    """
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
        torch.ones(2, device=device).sum().item()
    except Exception as error:
        return is_out_of_memory(error)
    return True


def _value(confusion: IntArray, plan: Plan) -> float:
    return important_recall(confusion, list(plan.important)) if plan.important else accuracy(confusion)


@contextmanager
def _scratch_file(name: str = "model.safetensors") -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        try:
            yield Path(folder) / name
        except SafetensorError as error:  # a disk that is full, in the words of that library
            raise OSError(str(error)) from None


def _reason(error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    # Libraries colour their messages, or break them into lines; this one is shown in tables.
    text = " ".join("".join(c if c.isprintable() else " " for c in str(error)).split())
    return f"{type(error).__name__}: {text} ({Path(last.filename).name}:{last.lineno})"
