"""The whole job: baseline, search, finalists, judgement, export."""

import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from camri_tune.baseline import START_FACTORS, check_important, resolve_important
from camri_tune.bundle import BundleConfig, write_bundle
from camri_tune.config import Loss, StudyConfig
from camri_tune.console import Console
from camri_tune.datasets import open_dataset
from camri_tune.errors import CamriTuneError, InputError
from camri_tune.evaluation import Answers, Judge, versions
from camri_tune.images import Images
from camri_tune.records import Baseline, Best, Result, Side, TrialRecord, Verdict, without_nan
from camri_tune.report import model_card
from camri_tune.search import model_spec
from camri_tune.selection import nothing_to_gain, rank_models, rank_settings, sentence_of, verdict_of
from camri_tune.stages import Crew, Stages, only_run
from camri_tune.storage import StudyStore, is_writable_folder, open_storage, storage_url
from camri_tune.training import pick_device


def run(config: StudyConfig, console: Console | None = None) -> Result:
    """Tune, select and export as `config` says; the same call again resumes. Progress goes to `console`, if any.

    Raises InputError for what the user can mend. A result with verdict `none` is a result: nothing is exported then.
    """
    console = console or Console(quiet=True)
    config = config.absolute()
    device = pick_device(config.device)
    if not is_writable_folder(config.folder):
        raise InputError(f"--out {str(config.out)!r} is not a folder that can be written to; name another with --out")
    with only_run(config.folder), console:
        data = open_dataset(config, console.reading)
        check_important(config.important, data.classes)
        store = StudyStore.create(open_storage(storage_url(config)), config, data)
        stages = Stages(config, data, store)
        planned = {
            "baseline": len(START_FACTORS) + config.seeds,
            "search": config.trials,
            "finalists": min(config.finalists, config.trials) * config.seeds,
        }
        one = {"": stages}
        with Crew.at_work(stages, planned, device, console) as crew:
            baseline = crew.carry_out("baseline", stages.plan_baseline, one)
            stages.adopt(baseline, resolve_important(config.important, data.classes, baseline))
            notices = data.notices() + _describe(stages, baseline, console)
            stages.plan_search(baseline)
            crew.finish("search", one)
            stages.check_search()
            retrained = crew.carry_out("finalists", lambda: stages.plan_finalists(baseline), one)
        console.say("Judging on the test part")
        result, chosen = _judge(stages, baseline, retrained, device, notices, console)
        write_json(config.folder / "result.json", result.as_json())
        _export(stages, result, chosen)
        return result


def _describe(stages: Stages, baseline: Baseline, console: Console) -> list[str]:
    """Say how good the baseline is. Returns what to notice."""
    classes, recall = stages.data.classes, baseline.recall_per_class
    recalls = ", ".join(f"{c} ({classes[c]}) {recall[c]:.4f}" for c in stages.important)
    console.say(
        f"Baseline over {stages.config.seeds} seed(s), learning rate {baseline.learning_rate:.3g}: validation accuracy "
        f"{baseline.accuracy:.4f}, recall of the important class {recalls}"
    )
    notice = nothing_to_gain(recall, stages.important, classes)
    if notice is None:
        return []
    console.say(notice)
    return [notice]


def _judge(
    stages: Stages,
    baseline: Baseline,
    retrained: dict[int, list[TrialRecord]],
    device: torch.device,
    notices: list[str],
    console: Console,
) -> tuple[Result, TrialRecord | None]:
    """Read the test part, for the baseline's models and for those of the best setting that is intact."""
    config = stages.config
    judge = Judge(stages.data, stages.store, stages.important, config.model, device)
    if config.calibrate:
        retrained = _calibrated(judge, retrained, config.loss, stages.floor(baseline))
    old = [judge.predictions(record, "ce") for record in baseline.records]
    if any(answers is None for answers in old):
        raise CamriTuneError(
            f"a checkpoint of the baseline is missing or altered under {config.folder / 'artifacts'}: move "
            f"{config.folder} away and run again"
        )
    old_answers = [answers for answers in old if answers is not None]
    best, chosen = None, None
    for number in rank_settings(retrained, stages.floor(baseline)):
        records = retrained[number]
        new = [judge.predictions(record, config.loss) for record in records]
        if any(answers is None for answers in new):
            notices.append(f"Trial {number} was passed over: a checkpoint of it is missing or altered.")
            console.say(notices[-1])
            continue
        chosen = rank_models(records)[0]
        place = records.index(chosen)
        answers = [a for a in new if a is not None]
        best = judge.best(number, records, answers, place, old_answers[place])
        break
    verdict: Verdict = "none"
    if best is not None:
        verdict = verdict_of(best.accuracy_difference, config.epsilon / 100)
    return _result(stages, baseline, judge, old_answers, verdict, best, notices), chosen


def _calibrated(
    judge: Judge, retrained: dict[int, list[TrialRecord]], loss: Loss, floor: float
) -> dict[int, list[TrialRecord]]:
    """Each setting's models with a bias tuned on validation; as trained where that would cost the setting its floor."""
    settings = {}
    for number, records in retrained.items():
        found = [judge.calibrated(r, loss, floor) if r.state == "complete" else None for r in records]
        biased = [r for r in found if r is not None]
        kept = len(biased) == len(records) and rank_settings({number: biased}, floor)
        settings[number] = biased if kept else records
    return settings


def _export(stages: Stages, result: Result, chosen: TrialRecord | None) -> None:
    """Write `best/`; or remove one of an earlier run where nothing may be called best any more."""
    config, best = stages.config, result.best
    folder = config.folder / "best"
    if chosen is None or best is None:
        if folder.exists():
            folder.rename(config.folder / f"withdrawn-{int(time.time())}")
        return
    bundle_config = BundleConfig(
        schema=1,
        spec=model_spec(stages.data, config.model, config.loss, chosen.params),
        important=stages.important,
        dataset=config.dataset,
        dataset_fingerprint=stages.data.fingerprint,
        seed=config.seed,
        skip_corrupt=config.skip_corrupt,
    )
    place = stages.seeds().index(best.exported_seed)
    metrics = {
        "verdict": result.verdict,
        "sentence": result.sentence,
        **{
            part: measured.of_seed(place)
            for part, measured in (("test", best.side.test), ("validation", best.side.validation))
        },
        "study": result.as_json(),
    }
    with tempfile.TemporaryDirectory() as scratch:
        weights = Path(scratch) / "model.safetensors"
        if not stages.store.fetch_checkpoint(chosen, weights):
            raise CamriTuneError(f"the checkpoint of the chosen model (trial {chosen.number}) was altered just now")
        write_bundle(
            folder, weights=weights, config=bundle_config, metrics=without_nan(metrics), card=model_card(result)
        )


def _result(
    stages: Stages,
    baseline: Baseline,
    judge: Judge,
    old: Sequence[Answers],
    verdict: Verdict,
    best: Best | None,
    notices: Sequence[str],
) -> Result:
    config, data, important = stages.config, stages.data, stages.important
    records = stages.records("search")
    names = ", ".join(data.classes[c] for c in important)
    return Result(
        study=config.study_name,
        dataset=data.name,
        classes=data.classes,
        important=important,
        loss=config.loss,
        tolerance=config.tolerance,
        epsilon=config.epsilon,
        seeds=config.seeds,
        verdict=verdict,
        sentence=sentence_of(verdict, best, names=names, epsilon=config.epsilon, tolerance=config.tolerance),
        notices=tuple(notices),
        images={
            "train": len(data.train),
            "validation": len(data.validation),
            "test": len(judge.test),
            "validation_important": _count(data.validation, important),
            "test_important": _count(judge.test, important),
        },
        baseline=Side(baseline.measured(important), judge.measured(old)),
        baseline_learning_rate=baseline.learning_rate,
        best=best,
        trials={state: sum(r.state == state for r in records) for state in ("complete", "pruned", "failed")},
        wall_seconds=float(stages.store.attributes["wall_seconds"]),
        versions=versions(),
        folder=str(config.folder),
    )


def _count(images: Images, important: Sequence[int]) -> int:
    return int(torch.isin(images.labels, torch.tensor(important)).sum())


def write_json(path: Path, value: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(without_nan(value), indent=2) + "\n")
    os.replace(partial, path)
