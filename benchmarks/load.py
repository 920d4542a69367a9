"""Does a study survive its workers, and does a trial cost more the more trials there are?

Claim: it does, and hardly. 32 workers, 1,000 trials on PostgreSQL and 8 workers, 400 trials on SQLite (n = 1 soak each;
110 workers killed in each, and the run once and twice): trials lost 0, duplicated 0, left waiting or running 0,
checkpoints missing or altered 0. Each training of 0.2 to 0.3 CPU seconds by itself cost 0.8 and 0.9 more around it,
and 1.2 and 1.9 with the starts of workers, nearly all of them made by the kills. From 100 to 10,000 finished trials
(medians of 9) claim + report + tell go from 41 to 44 ms on SQLite and from 78 to 90 on PostgreSQL; a choice from 0.6 s
(GPSampler, up to 400 trials) to 0.1 and 0.2 (TPE); a look of the run that plans, twice a second, from 44 to 86 ms and
from 60 to 127; its note and figures from 0.1 to 1.4 and 3.2 s, for at most a twentieth of the time.
Measured on 2 cores of a Xeon with AMX, torch 2.14, PostgreSQL 15; the soak on PostgreSQL while tests ran beside it for
its first minutes.

`soak` is the installed command: `camri-tune run` with its own workers, on a database, and beside it a process that
ends random workers with SIGKILL at random moments, and now and then the run itself, whose command is then given again.
Afterwards the database and the files are audited. Each trial that was asked for must have ended exactly once, however
many workers died over it.
`growth` fills a study with copies of real finished trials and times the package's own calls on it: what a worker does
around a training, through `run_trial` with a training that takes no time, and what the run that plans does at each
look. 32 trials run and 64 wait meanwhile, as with 32 workers.

    python -m benchmarks.load soak postgres|sqlite     # some ten minutes each; Linux alone
    python -m benchmarks.load growth postgres|sqlite   # some five minutes each
    python -m benchmarks.load report                   # print benchmarks/load.json

A PostgreSQL server is started for it from what is installed (Debian: apt-get install postgresql), with its usual
settings, fsync among them.
"""

import argparse
import json
import math
import os
import platform
import random
import re
import resource
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self
from unittest import mock

import optuna
import sqlalchemy
import torch
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial
from optuna.trial import TrialState as OptunaState

from camri_tune import trials as trials_module
from camri_tune.config import StudyConfig
from camri_tune.console import Console
from camri_tune.database import STORAGE_VARIABLE, SqlStorage, open_storage
from camri_tune.datasets import open_dataset
from camri_tune.heartbeat import HEARTBEAT, WORKER, worker_id
from camri_tune.overview import read_overview
from camri_tune.progress import Schedule
from camri_tune.search import Plan, make_sampler, starting_points, suggest
from camri_tune.stages import Stages, show
from camri_tune.storage import INTERRUPTED, STAGES, StudyStore, claim
from camri_tune.training import HeadSpec, Progress, Trained, cpu_count, recipe_of, train
from camri_tune.trials import run_trial
from tests.database_server import database_server, find_server

FIGURES = Path(__file__).with_name("load.json")
IMAGES = 60  # so few that a training is a fraction of a second: what is measured is everything around it
EPOCHS = 2  # of trainings that are played again
SIZES = (100, 300, 1_000, 3_000, 10_000)  # with those that run and wait, the last that GPSampler chooses are at 300
REPEATS = 9
RUNNING = 32
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


class Load(NamedTuple):
    """A soak: how much work, and how many workers and runs are killed over it."""

    trials: int
    epochs: int
    workers: int
    kills: int
    deaths_of_run: int


LOADS = {"postgres": Load(1_000, 12, 32, 110, 1), "sqlite": Load(400, 12, 8, 110, 2)}
LATEST_KILL = 2.0  # seconds after the trial that it was drawn for


# --- databases --------------------------------------------------------------------------------------------------------


@contextmanager
def database(kind: str, folder: Path) -> Iterator[tuple[str, int | None]]:
    """The URL of an empty database, and the server's process."""
    if kind == "sqlite":
        yield f"sqlite:///{folder}/study.db", None
        return
    programs = find_server()
    if programs is None:
        sys.exit("no PostgreSQL server: apt-get install postgresql")
    with database_server(programs) as server:
        yield server.url, server.pid


# --- processes --------------------------------------------------------------------------------------------------------


def _stat(pid: int) -> list[str]:
    """What the kernel says of a process, from its state on; empty where it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def children(parent: int, word: str = "") -> list[int]:
    """The live processes that `parent` has started and whose command has this word."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        stat = _stat(int(entry.name))
        if not stat or stat[0] == "Z" or int(stat[1]) != parent:
            continue
        try:
            command = (entry / "cmdline").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if word in command:
            found.append(int(entry.name))
    return found


def workers_of(run: int) -> list[int]:
    """Its workers, which are forked from a process that it has started."""
    return [worker for forker in children(run, "camri_tune.worker") for worker in children(forker)]


def own_cpu(pid: int) -> float:
    """Seconds of CPU that a process has used, without its children."""
    stat = _stat(pid)
    return sum(map(int, stat[11:13])) / TICKS_PER_SECOND if stat else 0.0


def family_cpu(pid: int) -> float:
    """The same with its children, the living and the dead."""
    stat = _stat(pid)
    dead = sum(map(int, stat[13:15])) / TICKS_PER_SECOND if stat else 0.0
    return own_cpu(pid) + dead + sum(map(own_cpu, children(pid)))


# --- soak -------------------------------------------------------------------------------------------------------------


class _Soak:
    """A run with its workers, and the death of some of them."""

    def __init__(self, load: Load, url: str, folder: Path, seed: int) -> None:
        self.load = load
        self.log = folder / "run.log"
        self.cpu = self.run_cpu = 0.0  # of runs that were killed
        self.kills = self.runs = 0
        self._url = url
        self._random = random.Random(seed)
        # Any moment may be the last: each falls within seconds after a trial that is drawn from all but the last few.
        self._kills_after = self._drawn(range(19 * load.trials // 20), load.kills)
        self._deaths_after = self._drawn(range(load.trials // 5, 4 * load.trials // 5), load.deaths_of_run)
        options = (
            f"--limit {IMAGES} --epochs {load.epochs} --trials {load.trials} --workers {load.workers} --device cpu"
        )
        self._command = [
            str(Path(sys.executable).with_name("camri-tune")),
            *f"run --storage {url} --dataset digits --name soak --folds 1 --finalists 1 {options} --out".split(),
            str(folder / "runs"),
        ]

    def carry_out(self) -> int:
        """Until the run has ended by itself. Returns its exit code."""
        run, planning = self._start(), 0.0
        due: list[float] = []
        while True:
            time.sleep(0.1)
            planning = own_cpu(run.pid) or planning
            if (code := run.poll()) is not None:
                self.run_cpu += planning
                return code
            finished = self.finished()
            while self._kills_after and finished >= self._kills_after[0]:
                self._kills_after.pop(0)
                due.append(time.monotonic() + self._random.uniform(0.0, LATEST_KILL))
            if self._deaths_after and finished >= self._deaths_after[0]:
                self._deaths_after.pop(0)
                self.cpu += sum(map(family_cpu, children(run.pid)))  # its orphans are counted by nobody else
                self.run_cpu += planning
                run.kill()
                run.wait()
                run, planning = self._start(), 0.0
            elif due and time.monotonic() >= min(due) and (workers := workers_of(run.pid)):
                due.remove(min(due))
                os.kill(self._random.choice(workers), signal.SIGKILL)
                self.kills += 1

    @property
    def command(self) -> str:
        """What a user would have given."""
        words = ["camri-tune", *self._command[1:-1], "FOLDER"]
        return " ".join(words).replace(self._url, "URL")

    def finished(self) -> int:
        """Trials of the search that the runs have reported so far."""
        return len(re.findall(r"^Search #", self.log.read_text(), re.MULTILINE))

    def _drawn(self, trials: range, count: int) -> list[int]:
        return sorted(self._random.choices(trials, k=count))

    def _start(self) -> "subprocess.Popen[bytes]":
        self.runs += 1
        environment = {**os.environ, STORAGE_VARIABLE: self._url}
        with self.log.open("ab") as log:
            # Its standard output is the table of results; the log has what it says while it works.
            return subprocess.Popen(
                self._command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log
            )


def soak(kind: str, load: Load, seed: int = 0) -> dict[str, Any]:
    """Carry out one soak and audit what it leaves."""
    with tempfile.TemporaryDirectory(prefix="camri-load-") as name, ExitStack() as stack:
        folder = Path(name)
        url, server = stack.enter_context(database(kind, folder))
        before = _children_seconds()
        served = family_cpu(server) if server else 0.0
        started = time.monotonic()
        running = _Soak(load, url, folder, seed)
        code = running.carry_out()
        wall = time.monotonic() - started
        cpu = running.cpu + _children_seconds() - before
        served = family_cpu(server) - served if server else 0.0
        if code not in (0, 3):
            print(running.log.read_text()[-2_000:], file=sys.stderr)
            sys.exit(f"the run ended with exit code {code}")
        store = StudyStore.existing(open_storage(url), "soak")
        found = audit(store, load.trials)
        found["worker logs with an error"] = sum(
            "Error" in path.read_text() for path in (store.config.folder / "logs").iterdir()
        )
        if kind == "sqlite":
            with sqlite3.connect(folder / "study.db") as connection:
                found["database is whole"] = connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        trainings = found["trainings that ended"]
        training, start = training_seconds(store.config), start_seconds()
        started_workers = load.workers * running.runs + running.kills
        rest = cpu + served - trainings * training - started_workers * start
        return {
            "machine": machine(kind, url),
            "command": running.command,
            "workers": load.workers,
            "trials": load.trials,
            "workers killed": running.kills,
            "runs killed": running.runs - 1,
            "exit code": code,
            **found,
            "wall seconds": round(wall),
            "CPU seconds": {
                "all processes": round(cpu + served),
                "of these the run that plans": round(running.run_cpu, 1),
                "of these the database server": round(served, 1) if server else None,
                f"{trainings} trainings by themselves": round(trainings * training, 1),
                f"{started_workers} starts of workers by themselves": round(started_workers * start, 1),
                "one training by itself": round(training, 3),
                "one start of a worker by itself": round(start, 2),
            },
            "overhead, CPU seconds per training, without starts": round(rest / trainings, 3),
            "overhead, CPU seconds per training, with starts": round((cpu + served) / trainings - training, 3),
        }


def audit(store: StudyStore, asked: int) -> dict[str, Any]:
    """What became of the trials that were asked for, and of their files."""
    lost = duplicated = left = interrupted = resumed = ended = broken = 0
    named: set[str] = set()
    for stage in STAGES:
        trials = store.optuna_study(stage).get_trials(deepcopy=False)
        gave_up = {t.number for t in trials if t.state == OptunaState.FAIL and t.user_attrs.get(INTERRUPTED)}
        counted = [t for t in trials if t.state.is_finished() and t.number not in gave_up]
        successors = Counter(t.user_attrs["retry_of"] for t in trials if "retry_of" in t.user_attrs)
        queued = len(trials) - successors.total()
        lost += sum(successors[number] == 0 for number in gave_up)
        # Queued again twice, or although it had ended.
        duplicated += sum(count - (number in gave_up) for number, count in successors.items())
        # Trained under two numbers: what a training is for, and its ticket, no other has.
        seeded = [t for t in counted if "seed" in t.user_attrs]
        for keys in (map(_purpose, seeded), (t.user_attrs["ticket"] for t in trials)):
            duplicated += sum(count - 1 for count in Counter(keys).values())
        if stage == "search":
            lost += max(0, asked - queued, asked - len(counted))
            duplicated += max(0, queued - asked, len(counted) - asked)
        left += sum(not t.state.is_finished() for t in trials)
        interrupted += len(gave_up)
        resumed += sum("resumed_at" in t.user_attrs for t in trials)
        ended += len(counted)
        complete = [r for r in store.records(stage) if r.state == "complete"]
        with tempfile.TemporaryDirectory() as scratch:
            broken += sum(not store.fetch_checkpoint(r, Path(scratch) / str(r.number)) for r in complete)
        for trial in counted:
            named |= {json.loads(v)["artifact_id"] for k, v in trial.system_attrs.items() if k.startswith("artifacts:")}
    runs = optuna.load_study(storage=store.storage, study_name=f"{store.name}.runs").get_trials()
    result = json.loads((store.config.folder / "result.json").read_text())
    files = [path.name for path in Path(store.artifacts_url).iterdir()]
    return {
        "trials lost": lost,
        "trials duplicated": duplicated,
        "trials left waiting or running": left,
        "trials of the search in the result": sum(result["trials"].values()),
        "runs left running": sum(not t.state.is_finished() for t in runs),
        "checkpoints missing or altered": broken,
        "trainings that ended": ended,
        "trainings interrupted and queued again": interrupted,
        "trainings that went on from a saved state": resumed,
        # What a worker that is killed while it writes or tidies leaves: a file too many, which no trial relies on.
        "files half written": sum(name.endswith(".partial") for name in files),
        "whole files of no training that ended": sum(not name.startswith(".") and name not in named for name in files),
        "files in all": len(files),
    }


def _purpose(trial: FrozenTrial) -> tuple[object, ...]:
    """What a training is for. Of the baseline's one seed tries several learning rates."""
    rate = trial.params.get("learning_rate") if "source_trial" not in trial.user_attrs else None
    return (*(trial.user_attrs.get(key) for key in ("seed", "fold", "source_trial")), rate)


def training_seconds(config: StudyConfig, repeats: int = 15) -> float:
    """CPU seconds of one of these trainings by itself, on one thread: the median."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    data = open_dataset(config)

    def once() -> None:
        recipe = recipe_of(
            config.model,
            epochs=config.epochs_of(1),
            learning_rate=4e-3,
            augmentation=data.augmentation,
            images=len(data.train),
        )
        train(
            config.model,
            HeadSpec("camri", 16.0, {0: 0.2}),
            data.train,
            data.validation,
            num_classes=len(data.classes),
            recipe=recipe,
            seed=0,
            device=torch.device("cpu"),
            on_epoch=lambda _: None,
        )

    once()
    return statistics.median(_seconds(once, time.process_time) for _ in range(repeats))


def start_seconds(repeats: int = 3) -> float:
    """CPU seconds until a worker's process has its libraries: the median."""

    def once() -> None:
        subprocess.run([sys.executable, "-c", "import camri_tune.worker"], check=True)

    once()
    return statistics.median(_seconds(once, _children_seconds) for _ in range(repeats))


def _children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _seconds(call: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    started = clock()
    call()
    return clock() - started


# --- growth -----------------------------------------------------------------------------------------------------------


class _Tape:
    """Real trainings, recorded once and played again in no time."""

    def __init__(self) -> None:
        self._recorded: list[tuple[list[Progress], Trained]] = []
        self._random = random.Random(0)

    def record(self, *arguments: Any, on_epoch: Callable[[Progress], None], **options: Any) -> Trained:
        heard: list[Progress] = []

        def hear(progress: Progress) -> None:
            heard.append(progress)
            on_epoch(progress)

        trained = train(*arguments, on_epoch=hear, **options)
        self._recorded.append((heard, trained))
        return trained

    @property
    def points(self) -> int:
        """How many trainings of the search are among them: those after the baseline's."""
        return len(starting_points(StudyConfig(), (0,), 10, 1.0))

    @contextmanager
    def played(self) -> Iterator[None]:
        """Let trials have these trainings instead of ones of their own."""
        with mock.patch.object(trials_module, "train", self._play):
            yield

    def _play(self, *_arguments: Any, on_epoch: Callable[[Progress], None], **_options: Any) -> Trained:
        heard, trained = self._random.choice(self._recorded)
        for progress in heard:
            on_epoch(progress)
        return trained


class _Study:
    """A study in a database, to be filled with finished trials, as its run sees it."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url = url
        self.config = StudyConfig.build(
            {"name": "growth", "out": folder, "storage": url, "limit": IMAGES, "epochs": EPOCHS, "folds": 1}
            | {"trials": 2 * SIZES[-1], "device": "cpu"}
        )
        self.data = open_dataset(self.config)
        self.store = StudyStore.create(open_storage(url), self.config, self.data)
        self.stages = Stages(self.config, self.data, self.store)
        self.console = Console(quiet=True)
        self._random = random.Random(0)
        schedule = Schedule({"baseline": 7, "search": self.config.trials, "finalists": 15}, EPOCHS, RUNNING)
        self.store.set("schedule", vars(schedule))
        self.console.plan(schedule)
        self.tape = _Tape()
        with mock.patch.object(trials_module, "train", self.tape.record):
            while (baseline := self.stages.plan_baseline()) is None:
                self._work_off()
            self.stages.adopt(baseline, (0,))
            for point in starting_points(StudyConfig(), (0,), len(self.data.classes), baseline.learning_rate):
                self.store.enqueue("search", point)
            self._work_off()
        self.baseline = baseline

    def plan_of(self, store: StudyStore) -> Plan:
        """What a worker makes its trials by."""
        return Plan(store.config, self.data, torch.device("cpu")).as_stored(store)

    def fill(self, size: int) -> None:
        """Finish what is under way, then add finished trials up to so many; then let more run and wait, as in a run.

        The trials are copies of real ones with parameters and scores of their own, row by row: to add them through
        Optuna would take longer than all that is measured.
        """
        study = self.store.optuna_study("search")
        with self.tape.played():
            for trial in study.get_trials(deepcopy=False, states=(OptunaState.RUNNING,)):
                run_trial(Trial(study, trial._trial_id), "search", self.plan_of(self.store), self.store)
            self._work_off()
        self._copy(size - len(study.get_trials(deepcopy=False)))
        for _ in range(RUNNING):
            self.store.enqueue("search", {})
            claimed = claim([self.store], ["search"])
            assert claimed is not None
            running = self.store.trial("search", claimed.trial_id)
            suggest(running, "search", self.plan_of(self.store))
            running.set_user_attr(WORKER, worker_id())
            running.set_user_attr(HEARTBEAT, time.time())
        self.stages.plan_search(self.baseline)

    def _work_off(self) -> None:
        while (claimed := claim([self.store])) is not None:
            trial = self.store.trial(claimed.stage, claimed.trial_id)
            run_trial(trial, claimed.stage, self.plan_of(self.store), self.store)

    def _copy(self, count: int) -> None:
        assert isinstance(self.store.storage, SqlStorage)
        engine, study_id = self.store.storage.engine, self.store.study_id("search")
        metadata = sqlalchemy.MetaData()
        metadata.reflect(engine)
        trials = metadata.tables["trials"]
        others = [t for t in metadata.tables.values() if "trial_id" in t.c and t is not trials]
        with engine.begin() as connection:

            def rows(table: sqlalchemy.Table, condition: Any) -> list[dict[str, Any]]:
                return [dict(row) for row in connection.execute(sqlalchemy.select(table).where(condition)).mappings()]

            present = rows(trials, trials.c.study_id == study_id)
            made = [row for row in present if row["state"] in ("COMPLETE", OptunaState.COMPLETE)][: self.tape.points]
            numbers = range(len(present), len(present) + count)
            copies = {number: self._random.choice(made) for number in numbers}
            points = {number: _Point.drawn(self._random) for number in numbers}
            new = [{**row, "number": number} for number, row in copies.items()]
            connection.execute(trials.insert(), [_without(row, "trial_id") for row in new])
            ids = {
                row["number"]: row["trial_id"]
                for row in rows(trials, (trials.c.study_id == study_id) & (trials.c.number >= numbers.start))
            }
            for table in others:
                key = next(iter(table.primary_key)).name
                parts: dict[int, list[dict[str, Any]]] = {row["trial_id"]: [] for row in made}
                for part in rows(table, table.c.trial_id.in_(list(parts))):
                    parts[part["trial_id"]].append(_without(part, key))
                added = [
                    _varied({**part, "trial_id": ids[number]}, points[number])
                    for number, row in copies.items()
                    for part in parts[row["trial_id"]]
                ]
                if added:
                    connection.execute(table.insert(), added)


class _Point(NamedTuple):
    """Where a copied trial lies, each parameter from 0 to 1, and how far its scores are off."""

    place: tuple[float, float, float]
    noise: float

    @classmethod
    def drawn(cls, draw: random.Random) -> Self:
        return cls((draw.random(), draw.random(), draw.random()), draw.gauss(0.0, 0.03))

    @property
    def score(self) -> float:
        """Highest in the middle, as a search for a scale, a margin and a learning rate finds it."""
        return 0.6 + 0.3 * math.exp(-4 * sum((x - 0.5) ** 2 for x in self.place)) + self.noise


def _varied(row: dict[str, Any], point: _Point) -> dict[str, Any]:
    """A row of a copy, where it says what the sampler or the choice of finalists looks at."""
    if "param_value" in row:
        allowed = json.loads(row["distribution_json"])["attributes"]
        share = point.place[("learning_rate", "margin", "scale").index(row["param_name"])]
        low, high = allowed["low"], allowed["high"]
        row["param_value"] = low * (high / low) ** share if allowed["log"] else low + (high - low) * share
    elif row.get("key") == "recall_per_class":
        row["value_json"] = json.dumps([point.score, *json.loads(row["value_json"])[1:]])
    elif row.get("key") in ("recall", "accuracy"):
        row["value_json"] = json.dumps(point.score)
    elif row.get("key") == "constraints:accuracy":
        row["value_json"] = json.dumps(0.75 - point.score)
    elif "value" in row:
        row["value"] = point.score
    return row


def _without(row: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != key}


class _Clock:
    """Seconds that named calls took, summed until they are read."""

    def __init__(self) -> None:
        self._sums: Counter[str] = Counter()  # of nanoseconds

    @contextmanager
    def on(self, name: str) -> Iterator[None]:
        started = time.perf_counter_ns()
        try:
            yield
        finally:
            self._sums[name] += time.perf_counter_ns() - started

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            with self.on(name):
                return call(*arguments, **options)

        return timed

    def read(self) -> dict[str, float]:
        found = {name: nanoseconds / 1e6 for name, nanoseconds in self._sums.items()}
        self._sums.clear()
        return found


def growth(kind: str, sizes: Sequence[int] = SIZES) -> dict[str, Any]:
    """What a trial costs beside its training, and a run's look at its study, by the number of finished trials."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="camri-load-") as name, ExitStack() as stack:
        url, _ = stack.enter_context(database(kind, Path(name)))
        study = _Study(url, Path(name))
        table = []
        for size in sizes:
            study.fill(size)
            table.append({"finished trials": size, **_measured(study, seed=size)})
            print(table[-1], file=sys.stderr, flush=True)
        return {"machine": machine(kind, url), "milliseconds, medians": table}


def _measured(study: _Study, seed: int) -> dict[str, float]:
    """Milliseconds. A trial is claimed and told by a worker between any two looks of the run."""
    clock, rows = _Clock(), []
    with clock.on("join: open the study and read its trials, once in a worker's life"):
        store = StudyStore.existing(open_storage(study.url), study.config.study_name)
        store.optuna_study("search").get_trials(deepcopy=False)
    once = clock.read()
    sampler = make_sampler(study.config, seed)
    for _ in range(REPEATS + 1):
        with (
            mock.patch.object(trials_module, "suggest", clock.timed("suggest", suggest)),
            mock.patch.object(Study, "tell", clock.timed("tell", Study.tell)),
            study.tape.played(),
        ):
            with clock.on("ask: claim"):
                assert store.attributes["stage" if "stage" in store.attributes else "schedule"]
                claimed = claim([store])
                assert claimed is not None
            with clock.on("ask: read what is new"):
                trial = store.trial("search", claimed.trial_id, sampler)
            with clock.on("all"):
                run_trial(trial, "search", study.plan_of(store), store)
        with clock.on("look: plan"):
            study.stages.plan_search(study.baseline)
            records = {str(stage): {"": study.stages.records(stage)} for stage in STAGES[1:]}
        with clock.on("look: queue again"):
            study.store.requeue_interrupted()
        with clock.on("look: console"):
            study.console.update("search", records)
        with clock.on("note and figures"):
            show(study.store, study.console)
        row = clock.read()
        row["report, checkpoint, attributes"] = row.pop("all") - row["suggest"] - row["tell"]
        row["ask: choose"] = row.pop("suggest")
        rows.append(row)
    del rows[0]  # which loads the samplers' libraries
    medians = {name: statistics.median(row[name] for row in rows) for name in sorted(rows[0])}
    with clock.on("status: read all, from outside"):
        read_overview(StudyStore.existing(open_storage(study.url), study.config.study_name))
    return {name: round(value, 1) for name, value in {**medians, **once, **clock.read()}.items()}


# --- the command ------------------------------------------------------------------------------------------------------


def machine(kind: str, url: str) -> str:
    """What the figures were recorded on."""
    model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    engine = sqlalchemy.create_engine(url)
    with engine.connect() as connection:
        query = "SHOW server_version" if kind == "postgres" else "SELECT sqlite_version()"
        server = str(connection.execute(sqlalchemy.text(query)).scalar()).split()[0]
    engine.dispose()
    name = "PostgreSQL" if kind == "postgres" else "SQLite"
    return (
        f"{cpu_count()} cores of an {model[1] if model else 'unknown CPU'}; {name} {server}, "
        f"Python {platform.python_version()}, torch {torch.__version__}, Optuna {optuna.__version__}"
    )


def keep(part: str, kind: str, figures: dict[str, Any]) -> None:
    """Store figures beside the others, and print them."""
    stored = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    stored.setdefault(part, {})[kind] = figures
    FIGURES.write_text(json.dumps(stored, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("soak", "growth", "report"))
    parser.add_argument("database", nargs="?", choices=tuple(LOADS), default="sqlite")
    for name, kind in Load.__annotations__.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help="of a soak")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="of studies whose growth is measured")
    given = parser.parse_args()
    if given.part == "report":
        print(FIGURES.read_text())
    elif given.part == "growth":
        keep("growth", given.database, growth(given.database, given.sizes))
    else:
        changes = {name: value for name in Load._fields if (value := getattr(given, name)) is not None}
        load = LOADS[given.database]._replace(**changes)
        keep("soak", given.database, soak(given.database, load))


if __name__ == "__main__":
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    main()
