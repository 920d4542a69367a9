"""A study at a glance, from its storage alone: what `status`, `report` and `dashboard` show, also while it runs."""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from camri_tune.config import StudyConfig, names_a_database, shown, why_no_path
from camri_tune.constraints import RecallConstraint
from camri_tune.database import masked, open_storage
from camri_tune.errors import InputError
from camri_tune.progress import Records, Schedule, current_stage, seconds_left
from camri_tune.records import Baseline, Figure, TrialRecord, named
from camri_tune.result import Verdict
from camri_tune.selection import finalists
from camri_tune.storage import DATABASE, MARK, STAGES, StudyStore, storage_url

_KINDS = {
    "verdict": str,
    "sentence": str,
    "best": dict | None,
    "baseline": dict,
    "finalists": list,
    "images": dict,
    "notices": list,
    "provenance": list,
    "accuracy_difference": dict | None,
}
_WRITE_ANEW = "run the study's command again, which trains nothing anew and writes the file"
RESULT, EVIDENCE, REPORT = "result.json", "evidence.safetensors", "report.html"


@dataclass(frozen=True)
class Overview:
    """One study as it stands. The floor is known once the baseline is trained, and who is important by then.

    `records` leaves interrupted trainings out, which live on in those queued in their place. `floor` is the validation
    accuracy that a trial must keep, on all of its folds together. `running` says whether a run works on it now, on any
    machine. `constraints` are those of recall. `storage` is the database's URL without passwords, where it is not the
    study's own file. `result` is `result.json`, once there is one. `through` says whether the last run
    has judged all that it planned. `is_comparison`: the study is the part of a comparison that has its baseline, and
    `together` are its records with those of the studies within it; `within` is the comparison that this one is part of.
    `known_as` is the name under which a folder's study was started, where the folder has another by now.
    """

    config: StudyConfig
    folder: Path
    dataset: str
    classes: tuple[str, ...]
    important: tuple[int, ...]
    floor: float | None
    records: Records
    schedule: Schedule | None
    running: bool
    wall_seconds: float | None
    storage: str | None
    result: Mapping[str, Any] | None
    constraints: tuple[RecallConstraint, ...] = ()
    through: bool = True
    is_comparison: bool = False
    together: Records | None = None
    within: str | None = None
    known_as: str | None = None

    @property
    def name(self) -> str:
        return self.config.study_name

    @property
    def search(self) -> Sequence[TrialRecord]:
        return self.records["search"]

    @property
    def best(self) -> TrialRecord | None:
        """The best feasible trial so far: a candidate, not a result."""
        return next(iter(finalists(self.search, 1)), None)

    @property
    def feasible(self) -> int:
        """How many trials of the search met every constraint."""
        return sum(t.feasible for t in self.search)

    @property
    def baseline(self) -> Baseline | None:
        """The baseline's R models; None while some are missing."""
        by_seed = {r.seed: r for r in self.records["baseline"] if r.state == "complete"}
        seeds = [self.config.replicate_seed(index) for index in range(self.config.seeds)]
        if self.floor is None or not all(seed in by_seed for seed in seeds):
            return None
        models = tuple(by_seed[seed] for seed in seeds)
        return Baseline(models[0].params["learning_rate"], models)

    @property
    def retrained(self) -> dict[int, list[TrialRecord]]:
        """Finished models of each finalist, by the number of its trial in the search."""
        models: dict[int, list[TrialRecord]] = {}
        for record in self.records["finalists"]:
            if record.state == "complete" and record.source_trial is not None:
                models.setdefault(record.source_trial, []).append(record)
        return models

    @property
    def finalist_figures(self) -> dict[int, tuple[Figure, Figure]]:
        """Accuracy and recall over seeds of each finalist, as it was judged: with biases where these were tuned."""
        told = {f["trial"]: f["validation"] for f in (self.result or {}).get("finalists", ()) if f["validation"]}
        figures = {}
        for number, records in self.retrained.items():
            if number in told:
                columns = [told[number][name]["values"] for name in ("accuracy", "recall")]
            else:
                columns = [[r.accuracy for r in records], [r.recall for r in records]]
            accuracy, recall = (Figure(tuple(math.nan if v is None else v for v in column)) for column in columns)
            figures[number] = accuracy, recall
        return figures

    @property
    def important_names(self) -> str:
        """'14 (Stop)'; the words of the study's configuration until the baseline has said who that is."""
        if not self.important:
            return ", ".join(self.config.important)
        return ", ".join(named(c, self.classes) for c in self.important)

    @property
    def command(self) -> str:
        """The command that goes on with the study; of a comparison, which holds several data sets, its beginning."""
        if self.is_comparison:
            return "camri-tune compare"
        where = f' --storage "{self.storage}"' if self.storage else ""
        config = self.config.model_copy(update={"name": self.known_as}) if self.known_as else self.config
        return f"{config.command(with_places=True)}{where}"

    @property
    def before_command(self) -> str:
        """What to do before `command` is given, in words that end with a blank; empty where nothing is."""
        return f"call the folder {self.known_as!r} first, as its study is called; then " if self.known_as else ""

    @property
    def everything(self) -> Records:
        """All that its run trains: what `schedule` counts."""
        return self.together or self.records

    @property
    def finished(self) -> bool:
        """Whether the result is of the last run: one for more trials may have been interrupted since."""
        return self.through and not self.running and (self.result is not None or self.is_comparison)

    @property
    def stage(self) -> str:
        """What is being worked on, or was last: `baseline`, `search`, `finalists`; `judged` once all is through."""
        return "judged" if self.finished else current_stage(self.everything)

    @property
    def failures(self) -> list[str]:
        """What each training that failed said, those of the baseline by name."""
        names = {"baseline": "baseline #", "search": "#", "finalists": "finalist #"}
        return [
            f"{names[stage]}{r.number}: {r.failure}"
            for stage, records in self.records.items()
            for r in records
            if r.state == "failed"
        ]

    @property
    def seconds_left(self) -> float | None:
        """Until the run is through, at the pace so far; None before a training has finished."""
        return seconds_left(self.everything, self.schedule) if self.schedule is not None else None

    def as_json(self) -> dict[str, Any]:
        """What `status --json` prints."""
        states = ("waiting", "running", "complete", "pruned", "failed")
        best, baseline = self.best, self.baseline
        return {
            "study": self.name,
            "folder": str(self.folder),
            "stage": self.stage,
            "running": self.running,
            "dataset": self.dataset,
            "important": list(self.important),
            "loss": self.config.loss,
            "floor": self.floor,
            "constraints": [
                {"name": c.name, "kind": c.kind, "asked": c.asked, "in_words": c.in_words(self.classes)}
                for c in self.constraints
            ],
            "baseline": {
                "accuracy": baseline.accuracy,
                "recall": baseline.measured(self.important).recall.mean,
                "learning_rate": baseline.learning_rate,
            }
            if baseline is not None
            else None,
            "trials": {
                stage: {state: sum(r.state == state for r in records) for state in states}
                for stage, records in self.records.items()
            },
            "feasible": self.feasible,
            "best": {
                "trial": best.number,
                "recall": best.recall,
                "accuracy": best.accuracy,
                "params": best.params,
            }
            if best is not None
            else None,
            "failures": {str(t.number): t.failure for t in self.search if t.state == "failed"},
            "seconds_left": self.seconds_left if self.running else None,
            "wall_seconds": self.wall_seconds,
            "verdict": self.result["verdict"] if self.result else None,
            "sentence": self.result["sentence"] if self.result else None,
        }


def read_overview(store: StudyStore) -> Overview:
    """The study as it stands, its files looked for in the folder that its configuration names."""
    attributes, folder = store.attributes, store.config.folder
    if not attributes.keys() >= {"identity", "classes"}:  # its run is at the very start, or ended there
        raise InputError(f"study {store.name!r} is not all there yet; wait a moment, or give its run's command again")
    baseline = attributes.get("baseline") or {}
    important = tuple(baseline.get("important", ()))
    constraints = tuple(map(RecallConstraint.from_json, baseline.get("constraints", ())))
    asked = [constraint.name for constraint in constraints]
    records: dict[str, list[TrialRecord]] = {
        stage: [r.for_classes(important) for r in store.records(stage)] for stage in STAGES
    }
    for stage in ("search", "finalists"):
        records[stage] = [r.bound_by(asked) for r in records[stage]]
    schedule = attributes.get("schedule")
    cells = [store.cell(name) for name in attributes.get("cells", ())]
    shared = {**records, **{s: [r for each in cells for r in each.records(s)] for s in ("search", "finalists")}}
    return Overview(
        config=store.config,
        folder=folder,
        dataset=attributes["identity"]["dataset"].rpartition(" (")[0],
        classes=tuple(attributes["classes"]),
        important=important,
        floor=baseline.get("search_floor"),
        records=records,
        schedule=Schedule(**schedule) if schedule else None,
        running=store.is_held,
        wall_seconds=attributes.get("wall_seconds"),
        storage=None if store.storage.url == storage_url(store.config) else masked(store.storage.url),
        result=_read_result(folder / RESULT),
        constraints=constraints,
        through=attributes.get("judged", attributes.get("stage") == "done"),  # an earlier version noted no judgement
        is_comparison="cells" in attributes,
        together=shared if cells else None,
        within=store.within,
        known_as=None if store.name == store.config.study_name else store.name,
    )


def find_study(name: str | None, *, out: Path, storage: str | None) -> StudyStore:
    """Open an existing study: by the name of its folder in `out` or the folder itself; or by its name in `storage`.

    Without a name, the one in `out` that was worked on last. Raises InputError, naming the studies that are there.
    """
    if reason := why_no_path(str(out)):
        raise InputError(f"--out is {shown(str(out))}, where no folder can be: {reason}; name another")
    if name is not None and names_a_database(name):
        raise InputError(
            f"{masked(name)!r} is the URL of a database: give it as --storage, and the NAME of a study in it"
        )
    if storage is not None:
        if name is None:
            raise InputError(
                "--storage (or $CAMRI_STORAGE) needs the NAME of a study in it; without, the last one in --out is taken"
            )
        store = StudyStore.existing(open_storage(storage, existing=True), name)
        taken = False
        if not store.config.folder.is_dir():  # its files are on another machine
            store = store.at(out.resolve() / name)
            taken = (store.config.folder / DATABASE).exists()
        # A folder of that name here may be another study's.
        if taken or store.has_anothers_folder():
            raise InputError(
                f"folder {str(store.config.folder)!r} is of another study of that name; give another --out"
            )
        return store
    for folder in _folders_of(name, out):
        config = StudyConfig().model_copy(update={"name": folder.name, "out": folder.parent})
        database = open_storage(storage_url(config))
        names = StudyStore.names_in(database)
        if names or name is not None:
            # A folder may have been renamed, or copied, since.
            return StudyStore.existing(database, names[0] if len(names) == 1 else folder.name).at(folder)
    raise InputError(f"--out {str(out)!r} has no studies; start one with camri-tune run, or name its --out")


def studies_in(out: Path) -> list[Path]:
    """Folders of studies in `out`, the one that was worked on last at the end."""
    return sorted((path.parent for path in out.glob(f"*/{DATABASE}")), key=lambda folder: _changed(folder / DATABASE))


def holds_a_study(folder: Path) -> bool:
    """Whether a study has been at work in its folder: by its mark, which copies may lack, or by what it left."""
    return any((folder / name).exists() for name in (MARK, DATABASE, "artifacts", RESULT))


def _folders_of(name: str | None, out: Path) -> list[Path]:
    """The folder of that name; without one all, the last first, as a run that was refused leaves no study there."""
    known = studies_in(out)
    if name is None:
        return [folder.resolve() for folder in reversed(known)]
    there = f"--out {str(out)!r}, which has {', '.join(folder.name for folder in known[-5:]) or 'no studies'}"
    for folder in (out / name, Path(name)):
        if reason := why_no_path(str(folder)):
            raise InputError(f"study {shown(name)} is no folder that can be opened: {reason}; give one in {there}")
        if (folder / DATABASE).is_file():
            return [folder.resolve()]
    raise InputError(f"study {name!r} is not in {there}; name another --out, or the study's --storage")


def _changed(database: Path) -> float:
    # In WAL mode the newest changes stand beside the database.
    changed, beside = database.stat().st_mtime, database.with_name(f"{database.name}-wal")
    with suppress(FileNotFoundError):
        if (found := beside.stat()).st_size > 0:  # to look at a study leaves an empty one
            changed = max(changed, found.st_mtime)
    return changed


def _read_result(path: Path) -> Mapping[str, Any] | None:
    """`result.json`; None where there is none. Raises InputError where it is no result of this version."""
    try:
        result: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{str(path)!r} cannot be read ({error}); {_WRITE_ANEW}") from None
    if not (
        isinstance(result, dict)
        and all(key in result and isinstance(result[key], kind) for key, kind in _KINDS.items())
        and isinstance(result.get("threshold"), dict | None)  # which an earlier version did not ask for
        and result["verdict"] in get_args(Verdict)
    ):
        raise InputError(f"{str(path)!r} is no result of this version of camri-tune; {_WRITE_ANEW}")
    return result
