"""Studies in a database: matching against what is asked, queues of trials, what became of each, checkpoints.

A run is three Optuna studies in one storage: `NAME.baseline`, `NAME` (the search) and `NAME.finalists`. Each is a
queue: whoever plans the work enqueues WAITING trials, workers claim them, and so the number of trials is exact however
many workers there are. A fourth, `NAME.runs`, has a trial for each run, whose value is the seconds it took: the one
that is RUNNING may plan.
"""

import functools
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import optuna
import sqlalchemy
from optuna.artifacts import download_artifact, upload_artifact
from optuna.artifacts.exceptions import ArtifactNotFound
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial
from optuna.trial import TrialState as OptunaState

from camri_tune.artifacts import ArtifactStore, open_artifacts
from camri_tune.config import StudyConfig
from camri_tune.database import Storage, patiently
from camri_tune.errors import InputError, StudyMismatchError
from camri_tune.files import code_version, sha256, write_text
from camri_tune.heartbeat import GRACE_SECONDS, WORKER, Heart, is_gone, seconds_silent
from camri_tune.own_networks import identified
from camri_tune.records import ACCURACY, ACCURACY_CURVE, RECALL_CURVE, STOPPED, EpochScores, TrialRecord, TrialState

if TYPE_CHECKING:  # to look at a study must not cost the seconds that torch takes
    from camri_tune.datasets import Dataset

Stage = Literal["baseline", "search", "finalists"]
STAGES: tuple[Stage, ...] = ("baseline", "search", "finalists")
_STATES: dict[OptunaState, TrialState] = {
    OptunaState.WAITING: "waiting",
    OptunaState.RUNNING: "running",
    OptunaState.COMPLETE: "complete",
    OptunaState.PRUNED: "pruned",  # by whoever adds trials from outside
    OptunaState.FAIL: "failed",
}
MOST_ATTEMPTS = 5  # at one epoch: a training that ends its worker each time would end all of them
RESUME, INTERRUPTED, WITHDRAWN = "resume", "interrupted", "withdrawn"
OUT_OF_MEMORY, WORKER_DIED = "out_of_memory", "worker_died"  # of failures for which the settings need not be to blame
MARK = ".study"  # in a study's folder: the id of the study whose result and model lie there
DATABASE = "study.db"  # there, unless --storage names another
TICKET = "ticket"  # of each trial that a run has queued
EXPORTED = "exported"  # among a study's attributes: what writes its exported model again
# What a trial that is queued again keeps. Not its scores, its constraint, or the ids of its files: they are another's.
_PURPOSE = ("source_trial", "seed", "fold")
_KEPT = (*_PURPOSE, "accumulation", RESUME, "attempts")


def storage_url(config: StudyConfig) -> str:
    """The storage that `config` names; SQLite in the study's folder by default."""
    if config.storage:
        return config.storage
    path = str((config.folder / DATABASE).resolve())
    return sqlalchemy.URL.create("sqlite", database=path).render_as_string(hide_password=False)


class Claimed(NamedTuple):
    """A trial that this process alone may run now."""

    store: "StudyStore"
    stage: Stage
    trial_id: int


def claim(stores: Sequence["StudyStore"], stages: Sequence[Stage] = STAGES) -> Claimed | None:
    """Take the next waiting trial of these studies, earlier stages first; None where none waits."""
    queues = {store.study_id(stage): (store, stage) for stage in stages for store in stores}
    places = {study: place for place, study in enumerate(queues)}
    storage = stores[0].storage
    for study, trial_id in sorted(storage.waiting(list(queues)), key=lambda found: places[found[0]]):
        try:
            if storage.set_trial_state_values(trial_id, OptunaState.RUNNING):
                return Claimed(*queues[study], trial_id)
        except optuna.exceptions.UpdateFinishedTrialError:  # by now it has even ended
            continue
    return None


class StudyStore:
    """One study's three queues, its stored configuration and its checkpoints.

    A study `within` another, as the cells of a comparison are, shares that one's baseline and folder of checkpoints.
    """

    def __init__(self, storage: Storage, name: str, config: StudyConfig, *, within: "StudyStore | None" = None) -> None:
        self.name = name
        self.config = config
        self._storage = storage
        self._within = within
        shared = f"{name}.baseline" if within is None else within._names["baseline"]
        self._names: dict[Stage, str] = {"baseline": shared, "search": name, "finalists": f"{name}.finalists"}
        self.artifacts_url: str = config.artifacts_url if within is None else within.artifacts_url
        self._studies: dict[Stage, Study] = {}
        self._cells: dict[str, StudyStore] = {}
        self._ended: dict[Stage, dict[int, TrialRecord]] = {stage: {} for stage in STAGES}  # which change no more

    @classmethod
    def create(
        cls,
        storage: Storage,
        config: StudyConfig,
        data: "Dataset",
        *,
        comparison: bool = False,
        within: "StudyStore | None" = None,
    ) -> "StudyStore":
        """Open the study that `config` names, or make it; of a `comparison` the one that all its cells are within.

        Raises StudyMismatchError, naming a field that differs, and InputError where its files cannot be kept. Then
        nothing is made or changed.
        """
        store = cls(storage, config.study_name, config, within=within)
        if within is None:
            store.artifacts.check()  # first: it may take seconds, in which another run could make the study
        attributes = store._stored()
        # The content identifies a data set, weights and somebody's network, not the path that they lie at.
        identity = {**config.identity(), "dataset": f"{data.name} ({data.fingerprint})"}
        identity["model"] = identified(config.model)
        identity["weights"] = None if config.weights is None else sha256(config.weights)
        if "identity" in attributes:
            stored = dict(attributes["identity"])
            if stored["dataset"].endswith(f" ({data.fingerprint})"):
                stored["dataset"] = identity["dataset"]
            # What an earlier version could not be asked for was as it is by default.
            _require_equal({**StudyConfig().identity(), **stored}, identity, config)
            store._require_its_kind(attributes, comparison)
        if within is None:
            if "config" in attributes:
                store._require_its_files(attributes)
            store._require_its_folder(attributes)
        for stage, name in store._names.items():
            study = optuna.create_study(storage=storage, study_name=name, direction="maximize", load_if_exists=True)
            with warnings.catch_warnings(category=optuna.exceptions.ExperimentalWarning, action="ignore"):
                study.set_metric_names(["accuracy" if stage == "baseline" else "recall of the important class"])
        attributes = store.attributes  # anew: who makes it at the same time must not get another id
        if comparison and "cells" not in attributes:
            store.set("cells", [])
        if "identity" not in attributes or attributes["identity"]["dataset"] != identity["dataset"]:
            store.set("identity", identity)  # by the name that the data set has now
        if "id" not in attributes:
            store.set("id", uuid.uuid4().hex)
        store.set("classes", list(data.classes))
        if within is not None or "config" not in attributes:
            store.sign()
        if within is not None:
            within.set("cells", sorted({*within.attributes.get("cells", []), store.name}))
        return store

    @classmethod
    def existing(cls, storage: Storage, name: str) -> "StudyStore":
        """Open a study that is already there. Raises InputError where it is not."""
        known = cls.names_in(storage)
        try:
            attributes = optuna.load_study(storage=storage, study_name=name).user_attrs
        except KeyError:
            raise InputError(
                f"study {name!r} is not in this storage, which has {', '.join(map(repr, known)) or 'no studies'}; "
                f"give the name under which it was started"
            ) from None
        if "config" in attributes and name not in known:
            raise InputError(
                f"study {name!r} is part of a comparison, whose table has its figures; to look at one study by itself, "
                f"give one of {', '.join(map(repr, known))}"
            )
        if "config" not in attributes:
            raise InputError(f"study {name!r} was not made by camri-tune run; start it with that command first")
        config = StudyConfig.build(attributes["config"], source=f"study {name!r}")
        return cls(storage, name, config)

    @staticmethod
    def names_in(storage: Storage) -> list[str]:
        """Names of the studies in a database that stand by themselves: each has a baseline of its own."""
        found = set(optuna.get_all_study_names(storage))
        return sorted(name for name in found if f"{name}.baseline" in found)

    def has_anothers_folder(self, study_id: str | None = None) -> bool:
        """Whether the folder for its files says that it is another study's; `study_id` where it is known."""
        try:
            found = (self.config.folder / MARK).read_text(encoding="utf-8")
        except (OSError, ValueError):
            return False
        return found != (study_id or self._stored().get("id"))

    def _stored(self) -> Mapping[str, Any]:
        """Its `attributes`; none where there is no such study yet."""
        try:
            return self.attributes
        except KeyError:
            return {}

    def _require_its_kind(self, attributes: Mapping[str, Any], comparison: bool) -> None:
        of_comparison = "cells" in attributes
        if of_comparison and not comparison:
            raise StudyMismatchError(
                f"study {self.name!r} is of a comparison: camri-tune compare goes on with it; start another with --name"
            )
        if comparison and not of_comparison and self.records("search"):
            raise StudyMismatchError(
                f"study {self.name!r} is of camri-tune run, and no comparison: start another with --name"
            )

    def _require_its_folder(self, attributes: Mapping[str, Any]) -> None:
        own = self._storage.url == storage_url(
            self.config.model_copy(update={"storage": None})
        )  # the folder's database
        others = self.names_in(self._storage) if own else []
        if others and self.name not in others:
            raise StudyMismatchError(
                f"{str(self.config.folder)!r} is the folder of study {others[0]!r}: give it that name again, or start "
                f"another study with --name"
            )
        if self.has_anothers_folder(attributes.get("id")):
            raise StudyMismatchError(
                f"{str(self.config.folder)!r} is the folder of another study, whose database is elsewhere or gone: "
                f"repeat its --storage (or $CAMRI_STORAGE), move the folder away, or start another study with --name"
            )

    def sign(self) -> None:
        """Note with the study, for its workers, how it is carried out from now on. For the run that holds it alone."""
        if self._within is None:
            study_id = self.attributes["id"]
            self.config.folder.mkdir(parents=True, exist_ok=True)
            write_text(self.config.folder / MARK, study_id)
            self.artifacts.claim_for(study_id)
        self.set("version", code_version())  # a worker must have the same
        self.set("config", self.config.model_dump(mode="json", exclude={"storage"}))

    def _require_its_files(self, attributes: Mapping[str, Any]) -> None:
        if not self.artifacts.belongs_to(attributes["id"]):
            before = StudyConfig.build(attributes["config"], source=f"study {self.name!r}").artifacts_url
            raise StudyMismatchError(
                f"study {self.name!r} keeps its checkpoints in {before!r}, and {self.artifacts_url!r} is not that "
                f"place: repeat its --out or --artifacts, or start another study with --name"
            )

    def cell(self, name: str) -> "StudyStore":
        """One of the studies within this one; `attributes["cells"]` names those that are there by now."""
        if name not in self._cells:  # a new one would read every trial again
            attributes = optuna.load_study(storage=self._storage, study_name=name).user_attrs
            config = StudyConfig.build(attributes["config"], source=f"study {name!r}")
            self._cells[name] = StudyStore(self._storage, name, config, within=self)
        return self._cells[name]

    def at(self, folder: Path) -> "StudyStore":
        """The same study with its files in `folder`, wherever it was when the study was made."""
        config = self.config.model_copy(update={"out": folder.parent, "name": folder.name})
        return StudyStore(self._storage, self.name, config)

    @functools.cached_property
    def artifacts(self) -> ArtifactStore:
        """Where its files lie."""
        return open_artifacts(self.artifacts_url) if self._within is None else self._within.artifacts

    @property
    def storage(self) -> Storage:
        """The database that the study is in."""
        return self._storage

    @property
    def within(self) -> str | None:
        """The name of the study that this one is within."""
        return None if self._within is None else self._within.name

    @property
    def attributes(self) -> Mapping[str, Any]:
        """What is stored with the study as a whole (read anew)."""
        return self.optuna_study("search").user_attrs

    def set(self, key: str, value: Any) -> None:
        """Store a JSON value with the study as a whole."""
        self.optuna_study("search").set_user_attr(key, value)

    def optuna_study(self, stage: Stage) -> Study:
        """The Optuna study behind one queue."""
        if stage not in self._studies:
            self._studies[stage] = optuna.load_study(storage=self._storage, study_name=self._names[stage])
        return self._studies[stage]

    def study_id(self, stage: Stage) -> int:
        """The database's number of the study behind a queue."""
        return self.optuna_study(stage)._study_id

    def records(self, stage: Stage, *, first: int | None = None) -> list[TrialRecord]:
        """Every trial of a queue that counts, or so many that were queued `first`, in order of its number.

        One that is queued again lives on in its successor. An interrupted one waits itself until that is queued:
        whoever counts must not take it for missing, or it would be replaced and queued again as well.
        """
        ended, found = self._ended[stage], []
        trials = self.optuna_study(stage).get_trials(deepcopy=False)
        standing = set(_standing(trials)[:first])
        for trial in trials:
            if trial.number not in standing:
                continue
            if (record := ended.get(trial.number)) is not None:
                found.append(record)
            elif _interrupted(trial):
                found.append(_waiting_again(_record(trial)))
            else:
                found.append(_record(trial))
                if trial.state.is_finished():
                    ended[trial.number] = found[-1]
        return found

    def enqueue(self, stage: Stage, params: Mapping[str, float], **attributes: Any) -> None:
        """Add a trial to a queue. Parameters that are not given are the sampler's to choose."""
        study, ticket = self.optuna_study(stage), uuid.uuid4().hex
        tries = 0

        def add() -> None:
            nonlocal tries
            tries += 1
            # A database that went away may have stored what it could not confirm.
            if tries == 1 or all(t.user_attrs.get(TICKET) != ticket for t in study.get_trials(deepcopy=False)):
                study.enqueue_trial(dict(params), user_attrs={TICKET: ticket, **attributes})

        patiently(add, self._storage.url)

    def waits(self, stage: Stage) -> bool:
        """Whether a trial of a queue waits for a worker."""
        return bool(self._storage.waiting([self.study_id(stage)]))

    def claim(self, stage: Stage, sampler: optuna.samplers.BaseSampler | None = None) -> Trial | None:
        """Take the next waiting trial of a queue for this process alone; None where none waits."""
        claimed = claim([self], [stage])
        return None if claimed is None else self.trial(stage, claimed.trial_id, sampler)

    def trial(self, stage: Stage, trial_id: int, sampler: optuna.samplers.BaseSampler | None = None) -> Trial:
        """A claimed trial, its parameters to be chosen by `sampler`."""
        study = self.optuna_study(stage)
        if sampler is not None:
            study.sampler = sampler
        study.get_trials(deepcopy=False)  # or Optuna's cache would not know it
        return Trial(study, trial_id)

    def release(self, trial_id: int, reason: str) -> None:
        """Give a trial of this process back: the run that plans queues it again, to go on where it was saved last."""
        self._storage.set_trial_user_attr(trial_id, "failure", reason)
        self._storage.set_trial_user_attr(trial_id, INTERRUPTED, True)
        self._storage.set_trial_state_values(trial_id, OptunaState.FAIL)

    def withdraw(self, stage: Stage, *, keep: int) -> None:
        """Take out of a queue what a run has queued and nobody has taken beyond the first `keep` trials.

        One that is queued again stands where the first that it replaces stood. What somebody else has queued comes
        before all: it stays, in the place of one of the run's.
        """
        trials = self.optuna_study(stage).get_trials(deepcopy=False)
        waiting = {t.number: t for t in trials if t.state == OptunaState.WAITING}
        others = {number for number, trial in waiting.items() if TICKET not in trial.user_attrs}
        ours = [number for number in _standing(trials) if number not in others]
        for trial in [waiting[number] for number in ours[max(0, keep - len(others)) :] if number in waiting]:
            with suppress(optuna.exceptions.UpdateFinishedTrialError):  # it was taken and has ended by now
                self._storage.set_trial_user_attr(trial._trial_id, WITHDRAWN, True)
                self._storage.set_trial_state_values(trial._trial_id, OptunaState.FAIL)

    def requeue_blameless(self) -> int:
        """Queue again what failed for want of memory, or with its workers; return how many.

        For a run that starts: it may have more memory, fewer workers, or another machine.

        Not a learning rate of the baseline's by which others were judged already: the models are of the best of those.
        """
        count = 0
        for stage in STAGES:
            trials = self.optuna_study(stage).get_trials(deepcopy=False)
            left_alone = _replaced(trials)
            tuning = {t.number for t in trials if t.user_attrs.get("seed") == self.config.tuning_seed}
            if stage == "baseline" and len(tuning) < len(trials):
                left_alone |= tuning
            for trial in trials:
                if trial.user_attrs.keys() & {OUT_OF_MEMORY, WORKER_DIED} and trial.number not in left_alone:
                    self._queue_again(stage, trial, _PURPOSE)  # from its start, with the whole batch
                    count += 1
        return count + sum(self.cell(name).requeue_blameless() for name in self.attributes.get("cells", []))

    def requeue_interrupted(self, dead: str | None = None) -> int:
        """Give up trials whose worker is gone, and queue again what was interrupted; return how many.

        Those of the studies within this one, too. `dead` is a worker that is known to be gone, on whatever machine.
        For the run that holds the study alone: two would queue them twice. Whatever ends it in the middle, the next
        call does the rest. A trial whose worker ended `MOST_ATTEMPTS` times at one epoch fails.
        """
        count = sum(self._requeue_in(stage, dead) for stage in STAGES)
        return count + sum(self.cell(name).requeue_interrupted(dead) for name in self.attributes.get("cells", []))

    def _requeue_in(self, stage: Stage, dead: str | None) -> int:
        trials = self.optuna_study(stage).get_trials(deepcopy=False)
        lost = [t for t in trials if t.state == OptunaState.RUNNING and _is_lost(t, dead)]
        for trial in lost:
            self.give_up(trial)
        if lost:
            trials = self.optuna_study(stage).get_trials(deepcopy=False)
        replaced = _replaced(trials)
        open_ends = [t for t in trials if _interrupted(t) and t.number not in replaced]
        for trial in open_ends:
            self._queue_again(stage, trial, _KEPT)
        return len(open_ends)

    def _queue_again(self, stage: Stage, trial: FrozenTrial, keep: Sequence[str]) -> None:
        fixed = trial.system_attrs.get("fixed_params", {})
        kept = {key: trial.user_attrs[key] for key in keep if key in trial.user_attrs}
        # What the sampler had chosen is kept: it is run again, not replaced.
        self.enqueue(stage, {**fixed, **trial.params}, retry_of=trial.number, **kept)

    def give_up(self, trial: FrozenTrial, reason: str = "") -> None:
        """End a trial whose worker died, or has to for this `reason`: it is given back, but not for ever.

        Should the worker live after all, its next word on the trial is refused.
        """
        attributes, worker = trial.user_attrs, trial.user_attrs.get(WORKER, "a worker")
        further = _epochs_kept(attributes.get(RESUME)) > attributes.get("resumed_at", 0)
        attempts = 1 if further else attributes.get("attempts", 0) + 1
        why = f" ({reason})" if reason else ""
        try:
            if attempts < MOST_ATTEMPTS:
                self._storage.set_trial_user_attr(trial._trial_id, "attempts", attempts)
                self.release(trial._trial_id, f"{worker} died{why}; queued again")
                return
            failure = f"its worker died {attempts} times without getting further; the last was {worker}{why}"
            self._storage.set_trial_user_attr(trial._trial_id, "failure", failure)
            self._storage.set_trial_user_attr(trial._trial_id, WORKER_DIED, True)
            self._storage.set_trial_state_values(trial._trial_id, OptunaState.FAIL)
        except optuna.exceptions.UpdateFinishedTrialError:
            pass  # it ended at this very moment

    def has_finished(self, worker: str) -> bool:
        """Whether this worker has brought a training to its end."""
        studies = [self.optuna_study(stage) for stage in STAGES]
        ended = (OptunaState.COMPLETE, OptunaState.PRUNED, OptunaState.FAIL)
        if any(
            trial.user_attrs.get(WORKER) == worker and not _interrupted(trial) and WORKER_DIED not in trial.user_attrs
            for study in studies
            for trial in study.get_trials(deepcopy=False, states=ended)
        ):
            return True
        return any(self.cell(name).has_finished(worker) for name in self.attributes.get("cells", []))

    @contextmanager
    def held(self) -> Iterator[Heart]:
        """Hold the study as the one run that plans its work. Raises InputError where another does."""
        study = optuna.create_study(storage=self._storage, study_name=f"{self.name}.runs", load_if_exists=True)
        mine, started, seconds = study.ask(), time.monotonic(), None
        with Heart(self._storage, mine._trial_id) as heart:
            try:
                for other in study.get_trials(deepcopy=False, states=(OptunaState.RUNNING,)):
                    if other.number < mine.number:
                        self._take_over(other)
                yield heart
                seconds = time.monotonic() - started
            finally:
                if not heart.lost:
                    study.tell(mine, seconds, state=OptunaState.FAIL if seconds is None else OptunaState.COMPLETE)

    def _take_over(self, other: FrozenTrial) -> None:
        if not is_gone(other.user_attrs, other.datetime_start):
            silent = seconds_silent(other.user_attrs)
            raise InputError(
                f"another run works on study {self.name!r} now ({other.user_attrs.get(WORKER, 'it starts')}, heard of "
                f"{silent:.0f} s ago); wait for it, or start another study with --name. Should it be dead, the study "
                f"is free in {max(0.0, GRACE_SECONDS - silent):.0f} s"
            )
        with suppress(optuna.exceptions.UpdateFinishedTrialError):
            self._storage.set_trial_state_values(other._trial_id, OptunaState.FAIL)

    @property
    def is_held(self) -> bool:
        """Whether a run works on the study now, on any machine."""
        try:
            study = optuna.load_study(storage=self._storage, study_name=f"{self.name}.runs")
        except KeyError:
            return False
        running = study.get_trials(deepcopy=False, states=(OptunaState.RUNNING,))
        return any(not is_gone(trial.user_attrs, trial.datetime_start) for trial in running)

    def save_artifact(self, trial: Trial, path: Path) -> str:
        """Keep a file as an artifact of `trial`, which has not ended; return the artifact's id."""
        return upload_artifact(
            artifact_store=self.artifacts, file_path=str(path), study_or_trial=trial, storage=self._storage
        )

    def save_checkpoint(self, trial: Trial, path: Path) -> None:
        """Keep a checkpoint file as an artifact of `trial`, with its SHA-256 on the trial."""
        trial.set_user_attr("sha256", sha256(path))
        trial.set_user_attr("checkpoint", self.save_artifact(trial, path))

    def fetch_checkpoint(self, record: TrialRecord, path: Path) -> bool:
        """Copy a trial's checkpoint to `path`; False where it is missing or not what the trial stored.

        Raises OSError.
        """
        return record.checkpoint is not None and self._fetch(record.checkpoint, record.sha256, path)

    def save_resume(self, trial: Trial, path: Path, epochs: int) -> None:
        """Keep the state of a training that has done so many epochs, in the place of an earlier one."""
        earlier = trial.user_attrs.get(RESUME)
        identifier = f"resume-{uuid.uuid4()}"
        with path.open("rb") as file:
            self.artifacts.write(identifier, file)
        trial.set_user_attr(RESUME, {"id": identifier, "sha256": sha256(path), "epochs": epochs})
        self._drop(earlier)

    def fetch_resume(self, trial: Trial, path: Path) -> bool:
        """Copy the state that a training goes on from to `path`; False where there is none, or it was altered.

        Raises OSError.
        """
        kept = trial.user_attrs.get(RESUME)
        return kept is not None and self._fetch(kept["id"], kept["sha256"], path)

    def drop_resume(self, trial: Trial) -> None:
        """Delete the state of a training that has ended. What its trial says of it stays: it can be told no more."""
        self._drop(trial.user_attrs.get(RESUME))

    def _drop(self, kept: Mapping[str, Any] | None) -> None:
        if kept is not None:
            with suppress(OSError, ArtifactNotFound):  # a file too many harms nobody
                self.artifacts.remove(kept["id"])

    def _fetch(self, identifier: str, digest: str | None, path: Path) -> bool:
        try:
            download_artifact(artifact_store=self.artifacts, file_path=str(path), artifact_id=identifier)
        except ArtifactNotFound:
            return False
        return sha256(path) == digest


def _replaced(trials: Sequence[FrozenTrial]) -> set[int]:
    """The numbers of those that were queued again."""
    return {t.user_attrs["retry_of"] for t in trials if "retry_of" in t.user_attrs}


def _standing(trials: Sequence[FrozenTrial]) -> list[int]:
    """The numbers of those that count, each where the first stood that it was queued again for."""
    places: dict[int, int] = {}
    for trial in trials:
        places[trial.number] = places.get(trial.user_attrs.get("retry_of", -1), trial.number)
    left_out = _replaced(trials) | {t.number for t in trials if WITHDRAWN in t.user_attrs}
    return sorted(places.keys() - left_out, key=places.__getitem__)


def _interrupted(trial: FrozenTrial) -> bool:
    return trial.state == OptunaState.FAIL and bool(trial.user_attrs.get(INTERRUPTED))


def _is_lost(running: FrozenTrial, dead: str | None) -> bool:
    worker = running.user_attrs.get(WORKER)
    return (worker is not None and worker == dead) or is_gone(running.user_attrs, running.datetime_start)


def _epochs_kept(resume: Mapping[str, Any] | None) -> int:
    return 0 if resume is None else int(resume["epochs"])


def _record(trial: FrozenTrial) -> TrialRecord:
    attributes = trial.user_attrs
    shortfalls = trial.constraints
    constraint = shortfalls.pop(ACCURACY, None)
    accuracies, curves = attributes.get(ACCURACY_CURVE, {}), attributes.get(RECALL_CURVE, {})
    return TrialRecord(
        number=trial.number,
        state="pruned" if trial.state == OptunaState.COMPLETE and STOPPED in attributes else _STATES[trial.state],
        params=trial.params,
        seed=attributes.get("seed"),
        accuracy=attributes.get("accuracy"),
        recall_per_class=tuple(attributes.get("recall_per_class", ())),
        recall=attributes.get("recall"),
        constraint=constraint,
        shortfalls=shortfalls,
        checkpoint=attributes.get("checkpoint"),
        sha256=attributes.get("sha256"),
        failure=attributes.get("failure"),
        seconds=attributes.get("seconds"),
        epoch=attributes.get("epoch", 0),
        source_trial=attributes.get("source_trial"),
        fold=attributes.get("fold", 0),
        device=attributes.get("device"),
        confusion=tuple(tuple(row) for row in attributes.get("confusion", ())),
        right=attributes.get("right"),
        curve=tuple(
            EpochScores(int(epoch), accuracies[epoch], tuple(recalls))
            for epoch, recalls in curves.items()
            if epoch in accuracies
        ),
    )


def _waiting_again(record: TrialRecord) -> TrialRecord:
    """An interrupted trial as its successor will be: what it is for, and nothing of what it came to."""
    return TrialRecord(
        number=record.number,
        state="waiting",
        params=record.params,
        seed=record.seed,
        source_trial=record.source_trial,
        fold=record.fold,
    )


def _require_equal(stored: Mapping[str, Any], asked: Mapping[str, Any], config: StudyConfig) -> None:
    for key in stored.keys() - asked.keys():
        raise StudyMismatchError(
            f"study {config.study_name!r} was started by another version of camri-tune with {key} = {stored[key]!r}, "
            f"which this one does not know: go on with that version, or start another study with --name"
        )
    for key, value in asked.items():
        if stored.get(key) != value:
            raise StudyMismatchError(
                f"study {config.study_name!r} was started with {key} = {stored.get(key)!r}, not {value!r}: trials "
                f"under both cannot be compared; repeat the first value, or start another study with --name"
            )
