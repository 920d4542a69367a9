"""Many methods under one protocol: the paper's Table 1, on any data set.

Every method gets the same budget: as many trials in a search of its own for each important class, and its finalists
retrained on the cross-entropy baseline's seeds. A loss that does not look at the class has one search for all of them,
by the lowest of their recalls. What an earlier call searched beyond that does not count. All searches on a data set
share that baseline and one crew of workers.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from camri_tune import prefork
from camri_tune.baseline import START_FACTORS, check_important, resolve_important
from camri_tune.claims import smoothed_labels
from camri_tune.config import RECIPE_FIELDS, SEARCHABLE, Loss, StudyConfig
from camri_tune.console import Console
from camri_tune.constraints import ROUNDING
from camri_tune.database import open_storage
from camri_tune.datasets import Dataset, open_dataset
from camri_tune.differences import Known, SeedDifference
from camri_tune.errors import CamriTuneError, InputError
from camri_tune.evaluation import Judge, versions
from camri_tune.files import is_writable_folder
from camri_tune.folders import Part
from camri_tune.images import Images
from camri_tune.own_networks import allow
from camri_tune.posthoc import biased, tune_bias
from camri_tune.pretrained import starting_weights
from camri_tune.ranges import is_searched, text_of
from camri_tune.records import Baseline, Figure, TrialRecord
from camri_tune.report import write_comparison
from camri_tune.search import SPACES, looks_at_class, require_searchable
from camri_tune.sources import require_there
from camri_tune.stages import Crew, Stages, only_run, require_held, show
from camri_tune.storage import StudyStore, storage_url
from camri_tune.table1 import Cell, Method, Outcome, Protocol, Scores, Table, paper_figures
from camri_tune.workers import device_here

Key = TypeVar("Key")
Planned = TypeVar("Planned")
Models = Sequence[TrialRecord]  # of one setting, one for each seed
Logits = NDArray[np.float32]


def compare(
    config: StudyConfig,
    *,
    datasets: Sequence[str],
    methods: Sequence[Method],
    protocol: Protocol,
    console: Console | None = None,
) -> Table:
    """Tune and measure every method for every important class of every data set; the same call again resumes.

    `config` holds what all have in common; each of its `important` classes is a column of its own. Under the protocol
    `ours` validation chooses every setting and test chooses nothing. Under `paper` every trial is retrained on all
    seeds, and the best is chosen by its means on test, as the paper did: that flatters whoever was tried most.
    """
    console = console or Console(quiet=True)
    config = config.in_this_environment()
    allow(config.model)
    require_searchable(config, [loss for loss in SPACES if loss in methods], "any of --methods")
    for dataset in datasets:
        require_there(dataset)
    folder = (config.out / (config.name or "compare")).resolve()
    if not is_writable_folder(folder):
        raise InputError(f"--out {str(config.out)!r} is not a folder that can be written to; name another with --out")
    prefork.begin_for(config, datasets)
    with prefork.at_hand(), only_run(folder), console:
        studies = [_study_of(dataset, config, folder) for dataset in datasets]
        if len({study.name for study in studies}) < len(studies):
            raise InputError(f"--dataset {','.join(datasets)!r} has two of one name; compare them under two --name")
        for study in studies:  # before hours are spent on the first of them
            data = open_dataset(study, console.reading)
            check_important(study.important, data.classes)
            start = starting_weights(study, channels=data.channels, image_size=data.image_size)
            if start.text:
                console.say(start.text)
        cells: list[Cell] = []
        facts: dict[str, object] = {}
        names = [study.source_name for study in studies]
        for study, following in zip(studies, [*names[1:], "the judgement"], strict=True):
            console.begin(study.source_name if len(studies) > 1 else "", following)
            if len(studies) > 1:
                console.say(f"Data set {study.source_name}, {names.index(study.source_name) + 1} of {len(names)}")
            found, about = _one_dataset(study, methods, protocol, console)
            cells += found
            facts[study.source_name] = about
        common = ("model", "trials", "finalists", "seeds", "tolerance", "seed")
        settings = {key: getattr(config, key) for key in common} | {"options": _options(config)}
        table = Table(tuple(cells), protocol, {**settings, "datasets": facts, "versions": versions()}, folder)
        write_comparison(table)
        return table


def _options(config: StudyConfig) -> dict[str, str]:
    """What was asked of all trainings and searches that is not the default, by its option, as it can be given again."""
    said = map(config.words_of, ["weights", "image_size", *RECIPE_FIELDS, *SEARCHABLE])
    return {words[0]: words[1] for words in said if words}


def _study_of(dataset: str, config: StudyConfig, folder: Path) -> StudyConfig:
    """The study of one data set, whose folder lies in the comparison's and whose name holds both."""
    study = config.model_copy(update={"dataset": dataset, "out": folder, "loss": "ce", "folds": 1})
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", f"{folder.name}-{study.source_name}")[:70]  # and .CLASS.LOSS
    return study.model_copy(update={"name": name}).absolute()


def _one_dataset(
    config: StudyConfig, methods: Sequence[Method], protocol: Protocol, console: Console
) -> tuple[list[Cell], dict[str, object]]:
    tokens = config.important
    # What the baseline is does not depend on who is important: more classes may join later.
    config = config.model_copy(update={"important": ("worst1",)})
    device = device_here(config)
    data = open_dataset(config, console.reading)
    data.examine()
    config.folder.mkdir(exist_ok=True)
    storage = open_storage(storage_url(config))
    head = Stages(config, data, StudyStore.create(storage, config, data, comparison=True))
    # Cross-entropy and its threshold are made of the baseline's models: nothing to search.
    searched: list[Loss] = [m for m in methods if m != "ce" and m != "threshold"]  # noqa: PLR1714 - mypy reads it so
    count = sum(len(tokens) if looks_at_class(loss) else 1 for loss in searched)
    retrained = config.trials if protocol == "paper" else min(config.most_finalists, config.trials)
    planned = {
        "baseline": (0 if config.fixed_learning_rate else len(START_FACTORS)) + config.seeds,
        "search": count * config.trials,
        "finalists": len(tokens) * len(searched) * retrained * config.seeds,
    }
    with head.store.held() as heart:
        with Crew.at_work(head, planned, device, console, heart) as crew:
            baseline = crew.carry_out("baseline", head.plan_baseline, {"": head})
            columns = {token: resolve_important([token], data.classes, baseline)[0] for token in tokens}
            notices = _notices(head, baseline, list(columns.values()), console)
            head.adopt(baseline, tuple(dict.fromkeys(columns.values())))
            studies: dict[tuple[int, Loss], Stages] = {}
            shown: dict[str, Stages] = {}
            for loss in searched:
                # A loss that does not look at the important class trains the same models whoever that is: one search
                # serves all classes, and each chooses from it for itself.
                owners = [(c,) for c in head.important] if looks_at_class(loss) else [head.important]
                for classes in owners:
                    label = f"{classes[0]}.{loss}" if looks_at_class(loss) else loss
                    mine = config.model_copy(update={"loss": loss, "name": f"{config.name}.{label}"})
                    store = StudyStore.create(storage, mine, data, within=head.store)
                    study = Stages(mine, data, store, equal_budget=True)
                    study.adopt(baseline, classes)
                    shown[label] = study
                    for c in classes:
                        studies[c, loss] = Stages(mine, data, store, important=(c,), equal_budget=True)
            crew.carry_out("search", lambda: _all_of({k: s.plan_search(baseline) for k, s in studies.items()}), shown)
            models = crew.carry_out(
                "finalists", lambda: _all_of({k: _planned(s, baseline, protocol) for k, s in studies.items()}), shown
            )
        console.say("Judging on the test part")
        bench = _Bench(head, baseline, protocol, device)
        paper = _papers(config)
        cells = []
        for token, important in columns.items():
            for method in methods:
                base = {0: list(baseline.records)}
                trained_with: Loss = "ce" if method == "threshold" else method
                settings = models.get((important, trained_with), base)
                params, trained, matched, matched_params = bench.measure(settings, trained_with, important)
                cells.append(
                    Cell(
                        dataset=config.source_name,
                        token=token,
                        important=important,
                        class_name=data.classes[important],
                        method=method,
                        params=params,
                        trained=matched if method == "threshold" else trained,
                        matched=matched,
                        matched_params=matched_params,
                        paper=paper.get((token, method)),
                    )
                )
        require_held(head.store, heart)
        head.store.set("judged", True)
    # By now nothing works on them any more, and their notes say so.
    for study in (head, *shown.values()):
        show(study.store, console)
    return cells, {**_facts(head, baseline, bench.judge.test), "notices": notices}


def _papers(config: StudyConfig) -> dict[tuple[str, str], tuple[float, float]]:
    """The paper's figures by class and method; none of a folder or a file that only has its data set's name."""
    return {(token, method): pair for (name, token, method), pair in paper_figures().items() if name == config.dataset}


def _notices(head: Stages, baseline: Baseline, important: Sequence[int], console: Console) -> list[str]:
    """Say what makes the table say less than it seems to: a baseline that learned nothing, classes of few images."""
    found = [head.too_few_to_rank((c,)) for c in dict.fromkeys(important)]
    notices = [f"{text}, but here every method has the same one split." for text in found if text]
    found = [head.learned_nothing(baseline), smoothed_labels(head.config.label_smoothing)]
    notices += [text for text in found if text is not None]
    for notice in notices:
        console.say(notice)
    return notices


def _all_of(plans: Mapping[Key, Planned | None]) -> dict[Key, Planned] | None:
    """What came of each of these plans; None while something of one is missing."""
    ready = {key: plan for key, plan in plans.items() if plan is not None}
    return ready if len(ready) == len(plans) else None


def _planned(study: Stages, baseline: Baseline, protocol: Protocol) -> dict[int, list[TrialRecord]] | None:
    if protocol == "ours":
        return study.plan_finalists(baseline)
    return study.retrain([r for r in study.records("search") if r.state == "complete"])


def _facts(head: Stages, baseline: Baseline, test: Images) -> dict[str, object]:
    config, data = head.config, head.data
    epochs = config.epochs or data.epochs
    return {
        "train": len(data.train),
        "validation": len(data.validation),
        "test": len(test),
        "limit": config.limit,
        "per_group": config.per_group,
        "epochs": text_of(epochs) if is_searched(epochs) else epochs,
        "fingerprint": data.fingerprint,
        "hidden_group_size": data.hidden_group_size,
        "learning_rate": baseline.learning_rate,
        "wall_seconds": head.store.attributes["wall_seconds"],
    }


class _Bench:
    """Measures settings of one data set, with the logits of each model kept on disk: they are read often."""

    def __init__(self, head: Stages, baseline: Baseline, protocol: Protocol, device: torch.device) -> None:
        config, data = head.config, head.data
        self.judge = Judge(data, head.store, head.important, config.model, device)
        self._data: Dataset = data
        self._folder = config.folder / "logits"
        self._baseline = baseline
        self._tolerance = config.tolerance_fraction
        self._protocol = protocol

    def measure(
        self, settings: Mapping[int, Models], loss: Loss, important: int
    ) -> tuple[Mapping[str, float], Outcome | None, Outcome | None, Mapping[str, float]]:
        """The best setting as trained and the best at matched accuracy, None where none keeps it; their parameters."""
        settings = {n: models for n, models in settings.items() if all(r.state == "complete" for r in models)}
        best = {bias: self._choose(settings, loss, important, bias=bias) for bias in (False, True)}
        first = next((settings[n] for n in best.values() if n is not None), None)
        trained, matched = (
            None if number is None else self._outcome(settings[number], loss, important, bias=bias)
            for bias, number in best.items()
        )
        with_bias = best[True]
        at_matched = {} if with_bias is None else dict(settings[with_bias][0].params)
        return ({} if first is None else dict(first[0].params)), trained, matched, at_matched

    def _choose(self, settings: Mapping[int, Models], loss: Loss, important: int, *, bias: bool) -> int | None:
        """The setting of highest mean recall among those whose mean accuracy keeps cross-entropy's."""
        part: Part = "validation" if self._protocol == "ours" else "test"
        floor = (
            self._scores(self._baseline.records, "ce", important, part, []).accuracy.mean - self._tolerance - ROUNDING
        )
        found = []
        for number, models in settings.items():
            biases = self._biases(models, loss, important) if bias else []
            recall, accuracy = self._scores(models, loss, important, part, biases)
            if accuracy.mean >= floor:
                found.append((-recall.mean, -accuracy.mean, number))
        return min(found)[2] if found else None

    def _biases(self, models: Models, loss: Loss, important: int) -> list[float]:
        """For each model the bias that keeps the accuracy on validation of cross-entropy's model of the same seed.

        None is added where that would cost the setting its mean accuracy: one may have room where another has not.
        """
        labels = self._data.validation.labels.numpy()
        floors = [(old.accuracy or 0.0) - self._tolerance for old in self._baseline.records]
        tuned = [
            tune_bias(self._logits(record, loss, "validation"), labels, important=important, floor=floor)
            for record, floor in zip(models, floors, strict=True)
        ]
        kept = sum(bias.accuracy for bias in tuned) >= sum(floors) - ROUNDING
        return [bias.bias for bias in tuned] if kept else [0.0] * len(tuned)

    def _outcome(self, models: Models, loss: Loss, important: int, *, bias: bool) -> Outcome:
        biases = self._biases(models, loss, important) if bias else []
        parts: dict[Part, Images] = {"validation": self._images("validation"), "test": self._images("test")}
        right = {part: self._right(models, loss, important, part, biases) for part in parts}
        base = {part: self._right(self._baseline.records, "ce", important, part, []) for part in parts}
        ours = {part: (images.labels == important).numpy() for part, images in parts.items()}
        groups = {part: images.groups.numpy() for part, images in parts.items()}
        size, known = self._data.hidden_group_size, ours["validation"]

        def difference(chosen: Mapping[Part, NDArray[np.bool_]]) -> SeedDifference:
            (new, old, together), shown = (
                (right[part][:, chosen[part]], base[part][:, chosen[part]], groups[part][chosen[part]])
                for part in ("test", "validation")
            )
            return SeedDifference.of(new, old, together, Known.over_seeds(size, *shown).hidden if size > 1 else None)

        return Outcome(
            validation=self._scores(models, loss, important, "validation", biases),
            test=self._scores(models, loss, important, "test", biases),
            recall_difference=difference(ours),
            accuracy_difference=difference({part: np.ones_like(mask) for part, mask in ours.items()}),
            hits=right["test"][:, ours["test"]],
            groups=groups["test"][ours["test"]],
            biases=tuple(biases),
            hidden_group_size=size,
            known_hits=right["validation"][:, known] if size > 1 else None,
            known_groups=groups["validation"][known] if size > 1 else None,
        )

    def _scores(self, models: Models, loss: Loss, important: int, part: Part, biases: Sequence[float]) -> Scores:
        ours = (self._images(part).labels == important).numpy()
        right = self._right(models, loss, important, part, biases)
        return Scores(*(Figure(tuple(shares.mean(axis=1).tolist())) for shares in (right[:, ours], right)))

    def _right(
        self, models: Models, loss: Loss, important: int, part: Part, biases: Sequence[float]
    ) -> NDArray[np.bool_]:
        """Whether each of the R models gets each image of a part right (R, N), with its bias, if any."""
        labels = self._images(part).labels.numpy()
        answers = [
            biased(self._logits(record, loss, part), important=important, bias=biases[place] if biases else 0.0)
            for place, record in enumerate(models)
        ]
        right: NDArray[np.bool_] = np.stack(answers) == labels
        return right

    def _images(self, part: Part) -> Images:
        return self.judge.test if part == "test" else self._data.validation

    def _logits(self, record: TrialRecord, loss: Loss, part: Part) -> Logits:
        path = self._folder / f"{record.sha256}.{part}.safetensors"
        try:
            return load_file(path)["logits"].numpy()
        except (OSError, SafetensorError, KeyError):  # not there yet, or cut short
            pass
        logits = self.judge.logits(record, loss, self._images(part))
        if logits is None:
            raise CamriTuneError(
                f"the checkpoint of trial {record.number} ({loss}) is missing or altered: move "
                f"{self._folder.parent} away and run again"
            )
        self._folder.mkdir(exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file({"logits": logits}, partial)
        partial.replace(path)
        return logits.numpy()
