"""The whole job: baseline, search, finalists, judgement, export."""

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from camri_tune import prefork
from camri_tune.baseline import START_FACTORS, check_important, named_classes, resolve_important
from camri_tune.bundle import EMBEDDINGS, IMAGES, BundleConfig, write_bundle
from camri_tune.claims import (
    bias_alone,
    few_test_images,
    nothing_to_gain,
    provenance,
    sentence_of,
    smoothed_labels,
)
from camri_tune.config import Loss, StudyConfig, floor_of, is_own_model
from camri_tune.console import Console
from camri_tune.constraint_claims import doubtful_constraints
from camri_tune.constraints import RecallConstraint
from camri_tune.database import open_storage
from camri_tune.datasets import open_dataset
from camri_tune.differences import PairedDifference
from camri_tune.errors import CamriTuneError, InputError
from camri_tune.evaluation import Entrant, Judge, versions
from camri_tune.evidence import Evidence
from camri_tune.export import withdraw
from camri_tune.files import is_writable_folder, write_text
from camri_tune.folders import Part
from camri_tune.images import Images
from camri_tune.overview import EVIDENCE, RESULT, holds_a_study
from camri_tune.own_networks import allow
from camri_tune.pretrained import starting_weights
from camri_tune.records import BIAS, Baseline, TrialRecord, biases_of, measured_on_validation, named, without_nan
from camri_tune.report import Facts, model_card, write_report
from camri_tune.result import Best, Finalist, Result, Side, Threshold, Verdict
from camri_tune.search import model_spec, require_searchable, worth_widening
from camri_tune.selection import (
    certify,
    mean_shortfall,
    rank_models,
    rank_settings,
    recall_bounds,
    shared_confidence,
)
from camri_tune.sources import require_there, side_of
from camri_tune.stages import Crew, Stages, only_run, require_held, show
from camri_tune.storage import EXPORTED, StudyStore, storage_url
from camri_tune.torch_data import file_for, write_arrays
from camri_tune.workers import device_here


def run(
    config: StudyConfig,
    console: Console | None = None,
    *,
    dataset: "Dataset[Any] | None" = None,
    validation: "Dataset[Any] | None" = None,
    test: "Dataset[Any] | None" = None,
    classes: Sequence[str] | None = None,
) -> Result:
    """Tune, select and export as `config` says; the same call again resumes. Progress goes to `console`, if any.

    The images are those that `config` names, or those of `dataset`, whose items are (image, label) or (image, label,
    group): a PIL image or a tensor (C, H, W) of uint8, or of floats from 0 to 1; an integer or text; and what the image
    shows, so that no two images of it stand on both sides of a split. `validation` and `test` are drawn from it unless
    they are given, and `classes` names the labels 0, 1, …. They are read once, into a file in the study's folder.

    >>> import torch
    >>> from camri_tune import StudyConfig, run
    >>> class Stripes(torch.utils.data.Dataset):
    ...     def __len__(self):
    ...         return 120
    ...     def __getitem__(self, index):
    ...         image = torch.rand(1, 16, 16, generator=torch.Generator().manual_seed(index)) / 2
    ...         image[:, :: 1 + index % 2] += 0.5  # every line, or every other
    ...         return image, index % 2
    >>> config = StudyConfig(name="stripes", important=("striped",), trials=1, epochs=1, seeds=1, folds=1)
    >>> result = run(config, dataset=Stripes(), classes=["plain", "striped"])
    >>> result.dataset, result.classes, result.images["train"], result.images["validation"], result.images["test"]
    ('stripes', ('plain', 'striped'), 76, 20, 24)

    What `config` does not say of the places of data sets and studies is as $CAMRI_DATA and $CAMRI_STORAGE say. Raises
    InputError for what the user can mend. A result with verdict `none` is a result: nothing is exported then.
    """
    console = console or Console(quiet=True)
    given: dict[Part, Dataset[Any] | None] = {"train": dataset, "validation": validation, "test": test}
    if dataset is None and any(value is not None for value in (validation, test, classes)):
        raise InputError("validation, test and classes belong to a data set from Python: give dataset=… as well")
    arrays = None if dataset is None else file_for(config)
    allow(config.model)
    config = config.in_this_environment().absolute()
    device = device_here(config)
    if dataset is None:
        require_there(config.dataset)
    if not is_writable_folder(config.folder):
        raise InputError(f"--out {str(config.out)!r} is not a folder that can be written to; name another with --out")
    prefork.begin_for(config, [config.dataset])
    with prefork.at_hand(), only_run(config.folder), console:
        if arrays is not None:
            parts = {part: data for part, data in given.items() if data is not None}
            write_arrays(
                arrays,
                parts,
                classes=classes,
                side=partial(side_of, config),
                on_progress=console.reading,
                in_use=holds_a_study(config.folder),
            )
            config = config.model_copy(update={"dataset": str(arrays.resolve())})
        data = open_dataset(config, console.reading)
        check_important(config.important, data.classes)
        require_searchable(config)
        check_important([token for token, _ in map(floor_of, config.floor)], data.classes, option="--floor")
        data.examine()
        start = starting_weights(config, channels=data.channels, image_size=data.image_size)
        store = StudyStore.create(open_storage(storage_url(config)), config, data)
        if start.text:
            console.say(start.text)
        stages = Stages(config, data, store)
        planned = {
            "baseline": (0 if config.fixed_learning_rate else len(START_FACTORS)) + config.seeds,
            "search": config.trials,
            "finalists": min(config.most_finalists, config.trials) * config.seeds,
        }
        one = {"": stages}
        console.begin()
        with store.held() as heart:
            with Crew.at_work(stages, planned, device, console, heart) as crew:
                baseline, notices = _settle_baseline(stages, crew, console)
                crew.carry_out("search", lambda: stages.plan_search(baseline), one)
                stages.check_search()
                retrained = crew.carry_out("finalists", lambda: stages.plan_finalists(baseline), one)
            result, chosen, evidence = _judge(stages, baseline, retrained, device, notices, console)
            require_held(store, heart)
            console.say("Writing the result and its report")
            if evidence is not None:
                evidence.save(config.folder / EVIDENCE)
            else:
                (config.folder / EVIDENCE).unlink(missing_ok=True)
            write_text(config.folder / RESULT, json.dumps(without_nan(result.as_json()), indent=2) + "\n")
            _export(stages, result, chosen)
            store.set("judged", True)
    # By now nothing works on the study any more, and both say so.
    write_report(store)
    show(store, console)
    return result


def _settle_baseline(stages: Stages, crew: Crew, console: Console) -> tuple[Baseline, list[str]]:
    """Train the baseline, and settle who is important and on how many folds a trial trains. Also what to notice."""
    config, data, one = stages.config, stages.data, {"": stages}
    stages.important = named_classes(config.important, data.classes)
    data.require_test_images(stages.important)
    folds, notice = stages.folds_wanted(stages.important)
    said = [smoothed_labels(config.label_smoothing), notice]
    for text in filter(None, said):
        console.say(text)
    if folds > 1:
        crew.on_folds(folds, more_baselines=stages.more_baselines(folds))
    ranked = baseline = crew.carry_out("baseline", lambda: stages.plan_baseline(folds), one)
    if not stages.important:
        first, stages.important = folds, resolve_important(config.important, data.classes, baseline)
        data.require_test_images(stages.important)
        folds, notice = stages.folds_wanted(stages.important, ranked=True)
        if notice is not None:
            said.append(notice)
            console.say(notice)
        if folds != first:
            # The models on fold 0 ranked the classes; those whose seeds belong there stay.
            crew.on_folds(folds, more_baselines=stages.more_baselines(folds, ranked=True))
            baseline = crew.carry_out("baseline", lambda: stages.plan_baseline(folds), one)
    stages.adopt(baseline, stages.important, ranked)
    notices = [*data.notices(), *filter(None, said)]
    return baseline, notices + _describe(stages, baseline, console)


def _describe(stages: Stages, baseline: Baseline, console: Console) -> list[str]:
    """Say how good the baseline is. Returns what to notice."""
    classes, recall = stages.data.classes, baseline.recall_per_class
    recalls = ", ".join(f"{named(c, classes)} {recall[c]:.4f}" for c in stages.important)
    console.say(
        f"Baseline over {stages.config.seeds} seed(s), learning rate {baseline.learning_rate:.3g}: validation accuracy "
        f"{baseline.accuracy:.4f}, recall of the important class {recalls}"
    )
    notice = nothing_to_gain(recall, stages.important, classes)
    notices = [] if notice is None else [notice]
    if (text := stages.learned_nothing(baseline)) is not None:
        notices.append(text)
    validation = stages.data.validation_of(stages.folds)
    groups = [validation.groups[validation.labels == c] for c in range(len(classes))]
    images, units = [len(found) for found in groups], [len(torch.unique(found)) for found in groups]
    notices += doubtful_constraints(stages.constraints, recall, images, units, classes)
    for line in notices:
        console.say(line)
    return notices


def _judge(
    stages: Stages,
    baseline: Baseline,
    retrained: dict[int, list[TrialRecord]],
    device: torch.device,
    notices: list[str],
    console: Console,
) -> tuple[Result, TrialRecord | None, Evidence | None]:
    """Read the test part, for the baseline's models and for the settings that kept accuracy, in validation's order."""
    config, floors = stages.config, stages.floors(baseline)
    judge = Judge(stages.data, stages.store, stages.important, config.model, device, stages.constraints)
    if config.calibrate:
        retrained = _calibrated(judge, retrained, config.loss, floors, stages.constraints)
    order = rank_settings(retrained, stages.constraints)
    console.judging(0, len(order))
    old = judge.entrant(stages.rivals(baseline), "ce")
    if old is None:
        raise CamriTuneError(
            f"a checkpoint of the baseline is missing or altered under {stages.store.artifacts_url}: move "
            f"{config.folder} away and run again"
        )
    entrants: dict[int, Entrant] = {}

    def judged(number: int, confidence: float) -> PairedDifference | None:
        entrant = judge.entrant(retrained[number], config.loss)
        if entrant is None:
            notices.append(f"Trial {number} was passed over: a checkpoint of it is missing or altered.")
            console.say(notices[-1])
            return None
        entrants[number] = entrant
        found = judge.accuracy_difference(entrant, old, confidence)
        console.judging(len(entrants), len(order))
        return found

    def breaks(number: int, confidence: float) -> bool:
        return any(one.status == "broken" for one in judge.constraints(entrants[number], old, confidence))

    # Whoever has seen what several settings show does not get a surer bound by asking for fewer of them again.
    sharing = max(len(order), stages.store.attributes.get("test_candidates", 0))
    verdict, number, found = certify(order, judged, config.epsilon / 100, breaks, sharing)
    best = None if number is None else judge.best(number, entrants[number], old, shared_confidence(sharing))
    stages.store.set("test_candidates", max(sharing, stages.store.attributes.get("test_candidates", 0)))
    reads = _note_reading(stages, [retrained[number] for number in found], baseline.records)
    if best is not None:
        notices += few_test_images(best, stages.data.classes)
        classes, rate = len(stages.data.classes), baseline.learning_rate
        notices += worth_widening(config, stages.important, classes, rate, best.params, len(stages.data.train))
        best = replace(best, calibration=judge.calibration(entrants[best.trial].chosen, config.loss))
    finals = _finalists(retrained, order, found, stages)
    threshold = judge.threshold(old, None if best is None else entrants[best.trial], config.tolerance_fraction)
    if threshold is not None and config.loss != "ce" and not stages.constraints:  # of which a bias knows nothing
        text = bias_alone(threshold, best, named(stages.important[0], stages.data.classes))
        notices += [] if text is None else [text]
    result = _result(stages, baseline, judge, old, verdict, best, threshold, finals, reads, sharing, notices)
    if best is None:
        return result, None, None
    entrant = entrants[best.trial]
    return result, entrant.chosen, judge.evidence(entrant, old)


def _finalists(
    retrained: Mapping[int, Sequence[TrialRecord]],
    order: Sequence[int],
    judged: Mapping[int, PairedDifference],
    stages: Stages,
) -> list[Finalist]:
    """Every finalist, those that kept what was asked first, in the order in which test may judge them."""
    bounds = recall_bounds(retrained)
    return [
        Finalist(
            trial=number,
            params={
                k: v for k, v in retrained[number][0].params.items() if not k.startswith(BIAS)
            },  # each seed has its own
            validation=measured_on_validation(retrained[number], stages.important) if number in bounds else None,
            recall_bound=bounds.get(number),
            kept_accuracy=number in bounds and mean_shortfall(retrained[number]) <= 0,
            judged=judged.get(number),
            misses={c.name: c.misses_over_seeds(retrained[number]) for c in stages.constraints if number in bounds},
            split=number in bounds and not rank_models(retrained[number]),
        )
        for number in dict.fromkeys([*order, *retrained])
    ]


def _note_reading(stages: Stages, judged: Sequence[Sequence[TrialRecord]], baseline: Sequence[TrialRecord]) -> int:
    """Store which models test has judged. Returns how often it showed models that no earlier look had shown.

    Where it judged nothing, its first look showed the baseline's models all the same.
    """
    earlier = stages.store.attributes.get("test_reads", [])
    # A bias added after training makes another model of the same weights.
    shown = [[r.sha256, *biases_of(r.params).values()] for records in judged for r in records]
    if not shown and not earlier:
        shown = [[r.sha256] for r in baseline]
    if all(any(model in look for look in earlier) for model in shown):
        return len(earlier)
    stages.store.set("test_reads", [*earlier, shown])
    return len(earlier) + 1


def _calibrated(
    judge: Judge,
    retrained: dict[int, list[TrialRecord]],
    loss: Loss,
    floors: Sequence[float],
    constraints: Sequence[RecallConstraint],
) -> dict[int, list[TrialRecord]]:
    """Each setting's models with a bias tuned on validation; as trained where that would cost the setting a floor."""
    settings = {}
    for number, records in retrained.items():
        found = [judge.calibrated(r, loss, floors[r.fold]) if r.state == "complete" else None for r in records]
        biased = [r for r in found if r is not None]
        kept = len(biased) == len(records) and rank_settings({number: biased}, constraints)
        settings[number] = biased if kept else records
    return settings


def _export(stages: Stages, result: Result, chosen: TrialRecord | None) -> None:
    """Write `best/`; or rename one of an earlier run, and what came of it, where none may be called best any more."""
    config, best = stages.config, result.best
    folder = config.folder / "best"
    if chosen is None or best is None:
        if folder.exists():
            folder.rename(config.folder / f"withdrawn-{int(time.time())}")
        withdraw(config.folder, None, None)
        stages.store.set(EXPORTED, None)
        return
    spec = model_spec(stages.data, config.model, config.loss, chosen.params)
    if best.calibration is not None:
        spec = spec.model_copy(update={"temperature": best.calibration.temperature})
    bundle_config = BundleConfig(
        schema=1,
        spec=spec,
        important=stages.important,
        dataset=config.dataset,
        dataset_fingerprint=stages.data.fingerprint,
        seed=config.seed,
        group_by=config.group_by,
        skip_corrupt=config.skip_corrupt,
        input=EMBEDDINGS if spec.are_embeddings else IMAGES,
        # As it was when the study began: the file may have been edited since, the processes that trained go on with it.
        network=stages.store.attributes["identity"]["model"] if is_own_model(config.model) else "",
    )
    place = stages.seeds().index(best.exported_seed)
    metrics = {
        "verdict": result.verdict,
        "sentence": result.sentence,
        **{
            part: measured.of_seed(place)
            for part, measured in (("test", best.side.test), ("validation", best.side.validation))
        },
        "calibration": best.calibration.as_json() if best.calibration else None,
    }
    earlier = stages.store.attributes.get(EXPORTED) or {}
    stored, today = bundle_config.model_dump(mode="json", by_alias=True), f"{datetime.now(UTC):%Y-%m-%d}"
    same = (earlier.get("sha256"), earlier.get("config")) == (chosen.sha256, stored)  # a run that is given again
    facts = Facts(
        command=config.command(),
        asked=",".join(config.important),
        network=config.model,
        epochs=config.epochs_of(stages.data.epochs, chosen.params),
        sha256=chosen.sha256 or "",
        date=earlier["date"] if same else today,
    )
    card = model_card(result, bundle_config, facts)
    # What writes the bundle again (see export.py); the study's result is in its own file.
    stages.store.set(
        EXPORTED,
        {
            "trial": chosen.number,
            "sha256": chosen.sha256,
            "date": facts.date,
            "config": stored,
            "metrics": without_nan(metrics),
            "card": card,
        },
    )
    metrics["study"] = result.as_json()
    with tempfile.TemporaryDirectory() as scratch:
        weights = Path(scratch) / "model.safetensors"
        if not stages.store.fetch_checkpoint(chosen, weights):
            raise CamriTuneError(f"the checkpoint of the chosen model (trial {chosen.number}) was altered just now")
        write_bundle(folder, weights=weights, config=bundle_config, metrics=without_nan(metrics), card=card)
    withdraw(config.folder, spec, chosen.sha256)


def _result(
    stages: Stages,
    baseline: Baseline,
    judge: Judge,
    old: Entrant,
    verdict: Verdict,
    best: Best | None,
    threshold: Threshold | None,
    finals: Sequence[Finalist],
    test_reads: int,
    sharing: int,
    notices: Sequence[str],
) -> Result:
    config, data, important = stages.config, stages.data, stages.important
    validation = data.validation_of(stages.folds)
    records = stages.records("search")
    result = Result(
        study=config.study_name,
        dataset=data.name,
        classes=data.classes,
        important=important,
        loss=config.loss,
        tolerance=config.tolerance,
        epsilon=config.epsilon,
        seeds=config.seeds,
        verdict=verdict,
        sentence=sentence_of(
            verdict,
            best,
            classes=data.classes,
            epsilon=config.epsilon,
            tolerance=config.tolerance,
            finalists=finals,
            reads=test_reads,
            constraints=stages.constraints,
            trials=records,
        ),
        notices=tuple(notices),
        images={
            "train": len(data.train),
            "validation": len(validation),
            "test": len(judge.test),
            "validation_important": _count(validation, important),
            "test_important": _count(judge.test, important),
        },
        validation_per_class=tuple(torch.bincount(validation.labels, minlength=len(data.classes)).tolist()),
        folds=stages.folds,
        baseline=Side(baseline.measured(important), judge.measured(old)),
        baseline_learning_rate=baseline.learning_rate,
        best=best,
        finalists=tuple(finals),
        test_reads=test_reads,
        sharing=sharing,
        trials={state: sum(r.state == state for r in records) for state in ("complete", "pruned", "failed")},
        wall_seconds=float(stages.store.attributes["wall_seconds"]),
        versions=versions(),
        folder=str(config.folder),
        constraints=stages.constraints,
        threshold=threshold,
        rate_was_tuned=config.fixed_learning_rate is None,
    )
    return replace(result, provenance=tuple(provenance(result)))


def _count(images: Images, important: Sequence[int]) -> int:
    return int(torch.isin(images.labels, torch.tensor(important)).sum())
