"""Studies in a database: opening, matching against what is asked, queues of trials, checkpoints.

A run is three Optuna studies in one storage: `NAME.baseline`, `NAME` (the search) and `NAME.finalists`. Each is a
queue: whoever plans the work enqueues WAITING trials, workers claim them, and so the number of trials is exact however
many workers there are.
"""

import warnings
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import optuna
import sqlalchemy
from optuna.artifacts import FileSystemArtifactStore, download_artifact, upload_artifact
from optuna.storages import RDBStorage
from optuna.storages._rdb.models import TrialModel
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial
from optuna.trial import TrialState as OptunaState

from camri_tune.config import STAGE_SUFFIXES, StudyConfig
from camri_tune.errors import InputError, StudyMismatchError
from camri_tune.files import sha256
from camri_tune.records import ACCURACY_CURVE, RECALL_CURVE, EpochScores, TrialRecord, TrialState

if TYPE_CHECKING:  # to look at a study must not cost the seconds that torch takes
    from camri_tune.datasets import Dataset

Stage = Literal["baseline", "search", "finalists"]
STAGES: tuple[Stage, ...] = ("baseline", "search", "finalists")
_STATES: dict[OptunaState, TrialState] = {
    OptunaState.WAITING: "waiting",
    OptunaState.RUNNING: "running",
    OptunaState.COMPLETE: "complete",
    OptunaState.PRUNED: "pruned",
    OptunaState.FAIL: "failed",
}
INTERRUPTED = "interrupted; queued again"
STORAGE_VARIABLE = "CAMRI_STORAGE"  # a password in the URL must not stand on a command line


def storage_url(config: StudyConfig) -> str:
    """The storage that `config` names; SQLite in the study's folder by default."""
    if config.storage:
        return config.storage
    path = str((config.folder / "study.db").resolve())
    return sqlalchemy.URL.create("sqlite", database=path).render_as_string(hide_password=False)


def masked(url: str) -> str:
    """The URL without passwords, neither in its login nor in its query."""
    try:
        parsed = sqlalchemy.engine.make_url(url)
    except (sqlalchemy.exc.ArgumentError, ValueError):
        return "(unreadable URL)"
    query = {key: "***" if "pass" in key.lower() else value for key, value in parsed.query.items()}
    return parsed.set(query=query).render_as_string(hide_password=True)


def open_storage(url: str) -> RDBStorage:
    """Connect to the database at `url`, creating tables as needed. Raises InputError with the password masked."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sqlite = url.startswith("sqlite")
    # Workers of one study write at the same time: they wait for each other instead of failing.
    options: dict[str, Any] = {"connect_args": {"timeout": 60}} if sqlite else {"pool_pre_ping": True}
    try:
        if sqlite and sqlalchemy.engine.make_url(url).database in (None, "", ":memory:"):
            raise ValueError("a database in memory cannot be shared with worker processes")
        storage = RDBStorage(url, engine_kwargs=options)
        if sqlite:
            sqlalchemy.event.listen(storage.engine, "connect", _tune_sqlite)
            storage.engine.dispose()  # connections made so far lack the settings
            with storage.engine.connect():
                pass
    except (sqlalchemy.exc.SQLAlchemyError, ImportError, RuntimeError, ValueError) as error:
        reason = str(getattr(error, "orig", error)).splitlines()[0].replace(url, masked(url))
        raise InputError(
            f"storage {masked(url)} cannot be opened ({reason}); give a SQLAlchemy URL such as sqlite:///study.db"
        ) from None
    return storage


def _tune_sqlite(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.close()


class StudyStore:
    """One study's three queues, its stored configuration and its checkpoints.

    A study `within` another, as the cells of a comparison are, shares that one's baseline and folder of checkpoints.
    """

    def __init__(
        self, storage: RDBStorage, name: str, config: StudyConfig, *, within: "StudyStore | None" = None
    ) -> None:
        self.name = name
        self.config = config
        self._storage = storage
        shared = f"{name}.baseline" if within is None else within._names["baseline"]
        self._names: dict[Stage, str] = {"baseline": shared, "search": name, "finalists": f"{name}.finalists"}
        self._folder: Path = config.folder / "artifacts" if within is None else within._folder
        self._artifacts = FileSystemArtifactStore(str(self._folder))
        self._studies: dict[Stage, Study] = {}

    @classmethod
    def create(
        cls, storage: RDBStorage, config: StudyConfig, data: "Dataset", *, within: "StudyStore | None" = None
    ) -> "StudyStore":
        """Open the study that `config` names, or make it. Raises StudyMismatchError, naming a field that differs."""
        store = cls(storage, config.study_name, config, within=within)
        for stage, name in store._names.items():
            study = optuna.create_study(storage=storage, study_name=name, direction="maximize", load_if_exists=True)
            with warnings.catch_warnings(category=optuna.exceptions.ExperimentalWarning, action="ignore"):
                study.set_metric_names(["accuracy" if stage == "baseline" else "recall of the important class"])
        # The content identifies a data set, not the path it lies at.
        identity = {**config.identity(), "dataset": f"{data.name} ({data.fingerprint})"}
        stored = store.attributes.get("identity")
        if stored is None:
            store.set("identity", identity)
        else:
            _require_equal(stored, identity, config)
        store.set("config", config.model_dump(mode="json", exclude={"storage"}))
        store.set("classes", list(data.classes))
        if within is not None:
            within.set("cells", sorted({*within.attributes.get("cells", []), store.name}))
        return store

    @classmethod
    def existing(cls, storage: RDBStorage, name: str) -> "StudyStore":
        """Open a study that is already there. Raises InputError where it is not."""
        try:
            attributes = optuna.load_study(storage=storage, study_name=name).user_attrs
        except KeyError:
            known = [n for n in optuna.get_all_study_names(storage) if not n.endswith(STAGE_SUFFIXES)]
            raise InputError(
                f"study {name!r} is not in this storage, which has {', '.join(map(repr, known)) or 'no studies'}; "
                f"give the name under which it was started"
            ) from None
        if "config" not in attributes:
            raise InputError(f"study {name!r} was not made by camri-tune run; start it with that command first")
        config = StudyConfig.build(attributes["config"], source=f"study {name!r}")
        return cls(storage, name, config)

    def cell(self, name: str) -> "StudyStore":
        """One of the studies within this one; `attributes["cells"]` names those that are there by now."""
        attributes = optuna.load_study(storage=self._storage, study_name=name).user_attrs
        config = StudyConfig.build(attributes["config"], source=f"study {name!r}")
        return StudyStore(self._storage, name, config, within=self)

    def at(self, folder: Path) -> "StudyStore":
        """The same study with its files in `folder`, wherever it was when the study was made."""
        config = self.config.model_copy(update={"out": folder.parent, "name": folder.name})
        return StudyStore(self._storage, self.name, config)

    @property
    def storage(self) -> RDBStorage:
        """The database that the study is in."""
        return self._storage

    @property
    def artifact_folder(self) -> Path:
        """Where the files of its trials lie."""
        return self._folder

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

    def records(self, stage: Stage) -> list[TrialRecord]:
        """Every trial of a queue, in order of its number."""
        return [_record(trial) for trial in self.optuna_study(stage).get_trials(deepcopy=False)]

    def enqueue(self, stage: Stage, params: Mapping[str, float], **attributes: Any) -> None:
        """Add a trial to a queue. Parameters that are not given are the sampler's to choose."""
        self.optuna_study(stage).enqueue_trial(dict(params), user_attrs=attributes)

    def claim(self, stage: Stage, sampler: optuna.samplers.BaseSampler | None = None) -> Trial | None:
        """Take the next waiting trial of a queue for this process alone; None where none waits."""
        study = self.optuna_study(stage)
        for waiting in study.get_trials(deepcopy=False, states=(OptunaState.WAITING,)):
            if self._take(waiting._trial_id):
                if sampler is not None:
                    study.sampler = sampler
                return Trial(study, waiting._trial_id)
        return None

    def _take(self, trial_id: int) -> bool:
        """Turn one trial from WAITING to RUNNING; False where another process did.

        Optuna's own change of state reads, then writes, which two processes on SQLite can do at the same time.
        """
        table = sqlalchemy.inspect(TrialModel).local_table
        take = (
            sqlalchemy.update(table)
            .where(table.c.trial_id == trial_id, table.c.state == OptunaState.WAITING)
            .values(state=OptunaState.RUNNING, datetime_start=datetime.now())
        )
        with self._storage.engine.begin() as connection:
            return bool(connection.execute(take).rowcount == 1)

    def requeue_interrupted(self, worker: str | None = None) -> int:
        """Fail trials that dead processes left RUNNING and queue each again: those of `worker`, or all.

        Those of the studies within this one, too. All is right only for a run that has just taken the study's lock and
        has not started workers yet.
        """
        count = 0
        for stage in STAGES:
            study = self.optuna_study(stage)
            for trial in study.get_trials(deepcopy=False, states=(OptunaState.RUNNING,)):
                if worker is not None and trial.user_attrs.get("worker") != worker:
                    continue
                fixed = trial.system_attrs.get("fixed_params", {})
                keep = {k: v for k, v in trial.user_attrs.items() if k in ("source_trial", "seed", "fold")}
                # What the sampler had chosen is kept: an interrupted trial is run again, not replaced.
                study.enqueue_trial({**fixed, **trial.params}, user_attrs={"retry_of": trial.number, **keep})
                self._storage.set_trial_user_attr(trial._trial_id, "failure", INTERRUPTED)
                study.tell(trial.number, state=OptunaState.FAIL)
                count += 1
        return count + sum(self.cell(name).requeue_interrupted(worker) for name in self.attributes.get("cells", []))

    def save_artifact(self, trial: Trial, path: Path) -> str:
        """Keep a file as an artifact of `trial`, which has not ended; return the artifact's id."""
        self._folder.mkdir(parents=True, exist_ok=True)
        return upload_artifact(
            artifact_store=self._artifacts, file_path=str(path), study_or_trial=trial, storage=self._storage
        )

    def save_checkpoint(self, trial: Trial, path: Path) -> None:
        """Keep a checkpoint file as an artifact of `trial`, with its SHA-256 on the trial."""
        trial.set_user_attr("sha256", sha256(path))
        trial.set_user_attr("checkpoint", self.save_artifact(trial, path))

    def fetch_checkpoint(self, record: TrialRecord, path: Path) -> bool:
        """Copy a trial's checkpoint to `path`; False where it is missing or not what the trial stored."""
        if record.checkpoint is None:
            return False
        try:
            download_artifact(artifact_store=self._artifacts, file_path=str(path), artifact_id=record.checkpoint)
        except (optuna.artifacts.exceptions.ArtifactNotFound, OSError):
            return False
        return sha256(path) == record.sha256


def _record(trial: FrozenTrial) -> TrialRecord:
    attributes = trial.user_attrs
    constraint = trial.constraints.get("accuracy")
    accuracies, curves = attributes.get(ACCURACY_CURVE, {}), attributes.get(RECALL_CURVE, {})
    return TrialRecord(
        number=trial.number,
        state=_STATES[trial.state],
        params=trial.params,
        seed=attributes.get("seed"),
        accuracy=attributes.get("accuracy"),
        recall_per_class=tuple(attributes.get("recall_per_class", ())),
        recall=attributes.get("recall"),
        constraint=constraint,
        checkpoint=attributes.get("checkpoint"),
        sha256=attributes.get("sha256"),
        failure=attributes.get("failure"),
        seconds=attributes.get("seconds"),
        epoch=attributes.get("epoch", 0),
        source_trial=attributes.get("source_trial"),
        fold=attributes.get("fold", 0),
        device=attributes.get("device"),
        confusion=tuple(tuple(row) for row in attributes.get("confusion", ())),
        curve=tuple(
            EpochScores(int(epoch), accuracies[epoch], tuple(recalls))
            for epoch, recalls in curves.items()
            if epoch in accuracies
        ),
    )


def _require_equal(stored: Mapping[str, Any], asked: Mapping[str, Any], config: StudyConfig) -> None:
    for key, value in asked.items():
        if stored.get(key) != value:
            raise StudyMismatchError(
                f"study {config.study_name!r} was started with {key} = {stored.get(key)!r}, not {value!r}: trials "
                f"under both cannot be compared; repeat the first value, or start another study with --name"
            )
