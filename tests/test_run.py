"""The main job through the installed command: from data to an exported model, resumed, interrupted and doctored."""

import json
import math
import os
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from optuna.trial import TrialState
from PIL import Image
from torch import Tensor

from camri_tune import evaluation, heartbeat, pipeline
from camri_tune.bundle import read_bundle
from camri_tune.calibration import fit_temperature, probabilities
from camri_tune.config import Loss, StudyConfig
from camri_tune.database import open_storage
from camri_tune.datasets import Dataset, Unseen, open_dataset
from camri_tune.errors import InputError, WorkerError
from camri_tune.evaluation import Entrant, Judge, Shown, _hidden, _Tracks
from camri_tune.evidence import AFTER, BEFORE, Evidence
from camri_tune.images import Images
from camri_tune.models import Classifier
from camri_tune.overview import read_overview
from camri_tune.posthoc import tune_bias
from camri_tune.records import Baseline
from camri_tune.sources import find_source
from camri_tune.stages import Stages
from camri_tune.stats import Hidden, crossed_interval, design_effect, hidden_size, tango_interval
from camri_tune.storage import Stage, StudyStore
from camri_tune.training import predict, predict_logits
from tests.command import COMMAND, assert_one_line_error, camri_tune, result_of
from tests.patience import wait_for

# Accuracy may fall by any amount: whether a small noisy run is feasible must not decide these tests.
SMALL = ["--epochs", "3", "--trials", "3", "--seeds", "2", "--finalists", "1", "--tolerance", "100"]

# Long enough to be caught in the act.
LONGER = [*SMALL, "--epochs", "12", "--trials", "4", "--seeds", "1"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A small finished study of the digits, and its result as printed."""
    out = tmp_path_factory.mktemp("runs")
    done = camri_tune("run", "--out", out, "--name", "d", *SMALL, "--json")
    assert done.returncode == 0, done.stderr
    return out / "d", result_of(done)


def _trials(folder: Path, study: str = "d") -> list[tuple[int, str]]:
    with sqlite3.connect(folder / "study.db") as database:
        rows = database.execute(
            "select number, state from trials join studies using (study_id) where study_name = ? order by number",
            (study,),
        ).fetchall()
    return [(number, state) for number, state in rows]


def test_a_run_leaves_the_promised_files(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, result = finished
    assert json.loads((folder / "result.json").read_text()) == result
    status = result_of(camri_tune("status", "d", "--out", folder.parent, "--json"))
    assert (status["stage"], status["running"]) == ("judged", False)
    assert {p.name for p in (folder / "best").iterdir()} == {
        "model.safetensors",
        "config.json",
        "metrics.json",
        "README.md",
    }
    assert (folder / "study.db").exists()
    assert list((folder / "artifacts").iterdir())
    assert not [p for p in folder.rglob("*") if "partial" in p.name or p.name.startswith(".best")]


def test_the_result_has_every_promised_key(finished: tuple[Path, dict[str, Any]]) -> None:
    _, result = finished
    assert result["schema"] == 1
    assert result["dataset"] == "digits"
    assert len(result["important"]) == 1
    assert result["verdict"] in ("certified", "feasible")
    assert result["trials"] == {"complete": 3, "pruned": 0, "failed": 0}
    assert set(result["best"]["params"]) == {"learning_rate", "scale", "margin"}
    for side in (result["baseline"], result["best"]):
        for part in ("validation", "test"):
            assert len(side[part]["recall_per_class"]) == len(result["classes"])
            for name in ("accuracy", "recall"):
                figure = side[part][name]
                assert figure["n"] == len(figure["values"]) == result["seeds"] == 2
                assert math.isclose(figure["mean"], sum(figure["values"]) / 2)
                if figure["values"][0] == figure["values"][1]:
                    assert figure["interval"] is None, "two seeds that agree are no certainty"
                else:
                    assert figure["interval"][0] <= figure["mean"] <= figure["interval"][1]
    (finalist,) = result["finalists"]
    assert finalist["trial"] == result["best"]["trial"]
    assert finalist["kept_accuracy"]
    assert finalist["validation"] == result["best"]["validation"]
    difference = result["accuracy_difference"]
    assert finalist["accuracy_difference"].items() <= difference.items()
    assert difference["confidence"] == difference["study_confidence"] == 0.95, "one finalist shares with nobody"
    assert difference["lower_bound"] == tango_interval(difference["gained"], difference["lost"], 359, 0.90).low
    assert difference["n"] == result["images"]["test"] == 359
    assert math.isclose(difference["estimate"], (difference["gained"] - difference["lost"]) / difference["n"])
    assert difference["lower_bound"] <= difference["estimate"]
    certified = difference["lower_bound"] >= -difference["epsilon"]
    assert result["verdict"] == ("certified" if certified else "feasible")


def test_every_finished_trial_carries_its_constraint_once(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = finished
    with sqlite3.connect(folder / "study.db") as database:
        keys = database.execute(
            "select t.trial_id, count(*) from trials t join studies using (study_id) "
            "join trial_system_attributes a on a.trial_id = t.trial_id and a.key like 'constraints:%' "
            "where study_name in ('d', 'd.finalists') group by t.trial_id"
        ).fetchall()
        mode = database.execute("pragma journal_mode").fetchone()[0]
    assert [count for _, count in keys] == [1] * (3 + 2)
    assert mode == "wal"


def test_what_a_bias_alone_makes_of_the_baseline_stands_beside_the_best(finished: tuple[Path, dict[str, Any]]) -> None:
    """Derived again from the checkpoints: biases that keep accuracy on validation, and what test says of them."""
    folder, result = finished
    found, (c,), data = result["threshold"], result["important"], open_dataset(StudyConfig())
    store = StudyStore.existing(open_storage(f"sqlite:///{folder / 'study.db'}"), "d").at(folder)
    judge = Judge(data, store, (c,), "compact", torch.device("cpu"))
    models = [r for r in store.records("baseline") if r.seed in (0, 1)]
    assert len(models) == len(found["biases"]) == 2
    for part, images in (("validation", data.validation), ("test", data.test())):
        for place, (record, bias) in enumerate(zip(models, found["biases"], strict=True)):
            logits = judge.logits(record, "ce", images)
            assert logits is not None
            plain = (logits.argmax(dim=1) == images.labels).double().mean()
            logits[:, c] += bias
            right = logits.argmax(dim=1) == images.labels
            assert found[part]["accuracy"]["values"][place] == pytest.approx(right.double().mean())
            assert found[part]["recall"]["values"][place] == pytest.approx(right[images.labels == c].double().mean())
            if part == "validation":  # with a tolerance of 100 points all of it may go
                assert right[images.labels == c].all()
                assert right.double().mean() <= plain
    for of in ("recall", "accuracy"):
        both = zip(result["best"]["test"][of]["values"], found["test"][of]["values"], strict=True)
        assert found["best_less_this"][of]["values"] == pytest.approx([new - old for new, old in both])
    assert "with a bias" in camri_tune("run", "--out", folder.parent, "--name", "d", *SMALL).stdout


def test_the_angles_of_a_report_are_those_of_the_exported_models_embeddings(
    finished: tuple[Path, dict[str, Any]],
) -> None:
    """Whatever the lengths of embeddings and weights."""
    folder, result = finished
    evidence = Evidence.load(folder / "evidence.safetensors", 10)
    assert evidence is not None
    classifier, (c,) = read_bundle(folder / "best").classifier, result["important"]
    with torch.no_grad():
        embeddings = classifier.embed(open_dataset(StudyConfig()).test().pixels).double()
    weights = classifier.head.class_weights.detach().double()
    lengths = embeddings.norm(dim=1, keepdim=True) * weights.norm(dim=1)
    degrees = (embeddings @ weights.T / lengths).clamp(-1, 1).acos().rad2deg()
    assert evidence.to_important[AFTER] == pytest.approx(degrees[:, c], abs=0.05)
    degrees[:, c] = 360
    assert evidence.to_other[AFTER] == pytest.approx(degrees.min(dim=1).values, abs=0.05)


@settings(deadline=None)
@given(
    arrays(np.float32, st.tuples(st.integers(1, 20), st.integers(2, 5)), elements=st.integers(-3, 3)),
    st.floats(-4, 4, width=32) | st.integers(-3, 3),
    st.data(),
)
def test_a_bias_changes_answers_as_it_does_in_the_exported_model(
    logits: NDArray[np.float32], bias: float, data: st.DataObject
) -> None:
    """Ties included, without asking the model again."""
    c = data.draw(st.integers(0, logits.shape[1] - 1))
    others = torch.from_numpy(logits.copy())
    others[:, c] = -math.inf
    rivals, none = others.max(dim=1), np.zeros(len(logits), np.float32)
    shown = Shown(logits.argmax(axis=1), none, none, logits[:, c], rivals.values.numpy(), rivals.indices.numpy())
    whole = torch.from_numpy(logits.copy())
    whole[:, c] += bias
    assert shown.biased(c, bias).answers.tolist() == whole.argmax(dim=1).tolist()


@pytest.mark.parametrize(("important", "begins"), [("3", True), ("worst1", False)])
def test_the_search_begins_beside_the_baselines_seeds_where_the_important_class_is_named(
    important: str, begins: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[bool] = []
    plan = Stages.plan_baseline

    def noting(stages: Stages, folds: int = 1) -> Baseline | None:
        planned = plan(stages, folds)
        begun.append(planned is None and bool(stages.records("search")))
        return planned

    monkeypatch.setattr(Stages, "plan_baseline", noting)
    few = {"trials": 1, "epochs": 1, "seeds": 1, "limit": 100, "tolerance": 100.0, "workers": 1}
    result = pipeline.run(StudyConfig.build({**few, "important": important, "out": tmp_path}))
    assert any(begun) == begins
    assert result.trials == {"complete": 1, "pruned": 0, "failed": 0}


def test_with_several_important_classes_no_one_bias_is_set_beside_them(tmp_path: Path) -> None:
    done = camri_tune("run", "--out", tmp_path, "--important", "3,8", *SMALL, "--trials", "1", "--json")
    result = result_of(done)
    assert result["best"] is not None
    assert result["threshold"] is None


def test_evaluating_the_bundle_reproduces_the_stored_figures(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, _ = finished
    moved = shutil.copytree(folder / "best", tmp_path / "elsewhere")  # from the files alone
    figures = json.loads(camri_tune("evaluate", moved, "--data", "digits", "--json").stdout)
    stored = json.loads((moved / "metrics.json").read_text())["test"]
    assert {key: figures[key] for key in stored} == stored
    assert figures["matches_stored"]
    assert "reproduced exactly" in camri_tune("evaluate", moved).stdout


def test_the_temperature_is_validations_and_test_says_how_good_it_is(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, result = finished
    bundle = read_bundle(folder / "best")
    data, cpu = open_dataset(StudyConfig()), torch.device("cpu")
    parts = data.validation, data.test()
    held_out, unseen = (predict_logits(bundle.classifier, images.pixels, cpu).numpy() for images in parts)
    temperature = bundle.config.spec.temperature
    assert temperature is not None
    assert temperature == pytest.approx(fit_temperature(held_out, data.validation.labels.numpy()), rel=1e-3)
    stored = bundle.metrics["calibration"]
    assert stored == result["best"]["exported"]["calibration"]
    assert (stored["temperature"], stored["fitted_on"], stored["n"]) == (temperature, len(data.validation), 359)
    own = np.arange(359), data.test().labels.numpy()
    for text, t in ((stored, temperature), (stored["before"], 1.0)):
        assert text["negative_log_likelihood"] == pytest.approx(-np.log(probabilities(unseen, t)[own]).mean(), rel=1e-4)
    assert sum(b["n"] for b in stored["decided"]["bins"]) == 359
    figures = json.loads(camri_tune("evaluate", folder / "best", "--json").stdout)
    assert figures["calibration"] == {**stored, "fitted_on": None}


def test_evaluating_gives_the_important_class_an_interval_too(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, result = finished
    figures = json.loads(camri_tune("evaluate", folder / "best", "--json").stdout)
    (c,) = result["important"]
    stored = result["best"]["exported"]["test"]
    assert figures["shares"] == stored
    assert {name: set(stored[name]) for name in ("recall", "precision")} == {"recall": {str(c)}, "precision": {str(c)}}
    assert figures["accuracy_interval"] == stored["accuracy"]["interval"]
    text = camri_tune("evaluate", folder / "best").stdout
    low, high = stored["recall"][str(c)]["interval"]
    assert (
        f"recall of {c}: {stored['recall'][str(c)]['value']:.4f} [{low:.4f}, {high:.4f}] (exact 95 % interval)" in text
    )
    assert f"{c} ({c})" not in text


def test_precision_is_told_of_both_models_wherever_recall_is(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, result = finished
    (c,), exported = result["important"], result["best"]["exported"]
    evidence = Evidence.load(folder / "evidence.safetensors", len(result["classes"]))
    assert evidence is not None
    told = []
    for side, test in ((BEFORE, exported["compared_with_test"]), (AFTER, exported["test"])):
        taken = evidence.answers[side] == c
        answers, right = int(taken.sum()), int((evidence.labels[taken] == c).sum())
        assert test["precision"][str(c)] == {"value": right / answers, "right": right, "answers": answers}
        told.append(f"{right:,} of {answers:,} ({right / answers:.4f})")
    before, after = told
    assert f"precision of {c}: {after}\n" in camri_tune("evaluate", folder / "best").stdout
    assert f"takes for {c}, {after} are (precision); of those that the baseline model takes for it, {before}." in (
        folder / "report.html"
    ).read_text(encoding="utf-8")
    assert f"takes for {c}, {after} are, of those that the baseline model takes for it, {before}." in (
        folder / "best" / "README.md"
    ).read_text(encoding="utf-8")
    again = camri_tune("run", "--out", folder.parent, "--name", "d", *SMALL)
    (row,) = (line for line in again.stdout.splitlines() if f"precision of {c} on test" in line)
    assert row.index(before) < row.rindex(after)


class _Grouped(Dataset):
    """Digits in tracks of nine, which validation names and test does not."""

    def __init__(self, config: StudyConfig) -> None:
        super().__init__(find_source(config), config)
        self.hidden_group_size = 9
        for index in range(2):
            training, images = self.fold(index)
            # By class, as tracks are; no two folds share one.
            order = torch.argsort(images.labels, stable=True)
            groups = torch.empty_like(order)
            groups[order] = torch.arange(len(order)) // 9 + 1_000 * index
            self._folds[index] = training, Images(images.pixels, images.labels, groups)
        self.train, self.validation = self.fold(0)


def _right(folder: Path, data: Dataset, stage: Stage, images: Images) -> NDArray[np.bool_]:
    """Whether each seed's model of a stage, of the first finalist, gets each image right (R, N)."""
    store = StudyStore.existing(open_storage(f"sqlite:///{folder / 'study.db'}"), "d").at(folder)
    judge = Judge(data, store, (0,), "compact", torch.device("cpu"))
    records = [r for r in store.records(stage) if r.seed in (0, 1)]
    loss: Loss = "camri" if stage == "finalists" else "ce"
    rows = []
    for record in sorted(records, key=lambda r: r.seed or 0):
        logits = judge.logits(record, loss, images)
        assert logits is not None
        rows.append((logits.argmax(dim=1) == images.labels).numpy())
    return np.stack(rows)


def test_judging_asks_each_model_about_each_test_image_once(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What follows the last training grows with the test part alone, and with whom it has to be asked about."""
    folder, _ = finished
    mine = shutil.copytree(folder, tmp_path / "d")
    asked: list[int] = []
    again: list[int] = []

    def counted(classifier: Classifier, images: Images, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        asked.append(len(images))
        return predict(classifier, images, device)

    def calibrated(classifier: Classifier, images: Images, device: torch.device) -> Tensor:
        again.append(len(images))
        return predict_logits(classifier, images, device)

    monkeypatch.setattr(evaluation, "predict", counted)
    monkeypatch.setattr(evaluation, "predict_logits", calibrated)
    monkeypatch.setattr(pipeline, "open_dataset", lambda config, _: _Grouped(config))  # where validation is looked at
    options = dict(zip([o.removeprefix("--") for o in SMALL[::2]], SMALL[1::2], strict=True))
    config = StudyConfig.build({**options, "out": tmp_path, "name": "d"})
    assert pipeline.run(config).best is not None
    assert asked == [359] * 4, "two seeds of the exported setting, two of the baseline"
    of_exported, of_baseline = again[:2], again[2:]
    assert of_exported == [287, 359], "the exported model alone, whose probabilities are calibrated on validation"
    assert of_baseline == [287] * 2, "what a bias alone would do is tuned on validation; test is not asked again"
    asked.clear()
    store = StudyStore.existing(open_storage(f"sqlite:///{mine / 'study.db'}"), "d").at(mine)
    judge = Judge(_Grouped(config), store, (0,), "compact", torch.device("cpu"))

    def entrant(stage: Stage, loss: Loss) -> Entrant | None:
        return judge.entrant([replace(r, constraint=0.0) for r in store.records(stage) if r.seed in (0, 1)], loss)

    new, old = entrant("finalists", "camri"), entrant("baseline", "ce")
    assert new is not None
    assert old is not None
    judge.accuracy_difference(new, old, 0.95)
    assert asked == [359] * 2, "whoever is not exported is asked with the one model that would have been"


def test_test_images_of_unnamed_tracks_count_as_fewer_in_every_claim(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the design effect that the same models show on validation. Nothing is trained for it."""
    folder, plain = finished
    mine = shutil.copytree(folder, tmp_path / "d")
    monkeypatch.setattr(pipeline, "open_dataset", lambda config, _: _Grouped(config))
    options = dict(zip([o.removeprefix("--") for o in SMALL[::2]], SMALL[1::2], strict=True))
    config = StudyConfig.build({**options, "out": tmp_path, "name": "d"})
    result = pipeline.run(config)
    assert result.best is not None
    data, (c,) = _Grouped(config), result.important
    validation, test = data.validation, data.test()
    tracks, place = validation.groups.numpy(), result.best.exported_seed
    known, known_old = (_right(mine, data, stage, validation) for stage in ("finalists", "baseline"))
    new, old = (_right(mine, data, stage, test) for stage in ("finalists", "baseline"))
    rival = result.best.baseline_seed
    for own, here, paired, over_seeds, share in (
        (np.ones(len(test), bool), np.ones(len(validation), bool), result.best.accuracy_difference,
         result.best.accuracy_over_seeds, result.best.exported_accuracy),
        ((test.labels == c).numpy(), (validation.labels == c).numpy(), result.best.recall_difference[c],
         result.best.recall_over_seeds[c], result.best.exported_recall[c]),
    ):  # fmt: skip
        one = known[place, here].astype(float) - known_old[rival, here]
        effect = design_effect(one, tracks[here], 9)
        assert paired.hidden is not None
        assert paired.hidden.size == 9
        assert paired.hidden.effect == pytest.approx(effect)
        assert paired.effective_n == pytest.approx(hidden_size(own.sum(), Hidden(9, effect), paired.confidence))
        assert (paired.gained, paired.lost) == (
            (new[place, own] & ~old[rival, own]).sum(), (~new[place, own] & old[rival, own]).sum()
        )  # fmt: skip
        of_share = design_effect(known[place, here].astype(float), tracks[here], 9)
        assert share.effective_n == pytest.approx(hidden_size(own.sum(), Hidden(9, of_share), 0.975))
        of_mean = design_effect((known[:, here].astype(float) - known_old[:, here]).mean(axis=0), tracks[here], 9)
        expected = crossed_interval(new[:, own].astype(float) - old[:, own], hidden=Hidden(9, of_mean))
        assert over_seeds.interval == (None if expected is None else pytest.approx(expected))
    assert result.best.accuracy_difference.effective_n < 359
    assert plain["accuracy_difference"]["lower_bound"] > result.best.accuracy_difference.lower_bound
    assert "359 images of about 40 unnamed tracks, which count as " in result.sentence
    assert "unnamed tracks, which count as" in (mine / "best" / "README.md").read_text()
    assert result.test_reads == plain["test_reads"] == 1, "the same models"


@pytest.mark.parametrize(("folds", "expected"), [((0, 0, 0), 6.0), ((0, 1, 2), 1.0)])
def test_validation_is_asked_about_the_two_models_that_test_compares(folds: tuple[int, ...], expected: float) -> None:
    """Their difference may go by whole tracks where that of two models of one seed does not.

    On another fold the baseline's was asked about other images.
    """
    groups = torch.arange(120) // 6
    validation = Images(torch.zeros(120, 1, 1, 1, dtype=torch.uint8), torch.zeros(120, dtype=torch.int64), groups)
    right = np.ones(120, bool)
    whole, single = (groups.numpy() % 4 > 0), np.arange(120) % 6 > 0  # a quarter of all tracks; one frame of each
    pairs = [(validation, right, old) for old in (whole, single, single)]
    tracks = _Tracks(6, pairs, folds, place=1, old_place=0)
    assert tracks.of_one(None).hidden.effect == pytest.approx(expected, abs=0.4)
    assert tracks.of_one(0).hidden == tracks.of_one(None).hidden


def test_a_model_is_evaluated_as_it_was_judged_where_tracks_are_unnamed() -> None:
    """By what is stored with it on its own test part; elsewhere a track counts as one image."""
    image = Images(torch.zeros(0, 1, 8, 8, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    share = {"hidden_groups": {"size": 30, "design_effect": 4.5}}
    test = {"accuracy": share, "recall": {"14": {"hidden_groups": {"size": 30, "design_effect": 2.0}}}}
    metrics = {"study": {"best": {"exported": {"test": test}}}}
    own, other, named = (Unseen(image, "", size, own=mine) for size, mine in ((30, True), (30, False), (1, True)))
    assert _hidden(own, metrics, None) == (30, 4.5)
    assert _hidden(own, metrics, 14) == (30, 2.0)
    assert _hidden(own, metrics, 15) == _hidden(own, {}, None) == _hidden(other, metrics, None) == (30, 30.0)
    assert _hidden(named, metrics, None) is None


def test_several_finalists_share_the_doubt_and_are_judged_in_validations_order(tmp_path: Path) -> None:
    """Two retrained settings: what test says of each is stored, with counts from which anyone has the bound again."""
    done = camri_tune("run", "--out", tmp_path, *SMALL, "--trials", "4", "--finalists", "2", "--json")
    assert done.returncode == 0, done.stderr
    result = result_of(done)
    assert len(result["finalists"]) == 2
    kept = [f for f in result["finalists"] if f["kept_accuracy"]]
    means = [f["validation"]["recall"]["mean"] for f in kept]
    bounds = [
        mean if f["recall_lower_bound"] is None else f["recall_lower_bound"]
        for f, mean in zip(kept, means, strict=True)
    ]
    assert bounds == sorted(bounds, reverse=True)
    level = 1 - 0.05 / len(kept)
    judged = [f for f in kept if f["accuracy_difference"] is not None]
    assert judged
    for finalist in judged:
        difference = finalist["accuracy_difference"]
        counts = difference["gained"], difference["lost"], difference["n"]
        assert difference["confidence"] == pytest.approx(level)
        assert difference["lower_bound"] == pytest.approx(tango_interval(*counts, confidence=2 * level - 1).low)
    passed = [f["accuracy_difference"]["lower_bound"] >= -0.005 for f in judged]
    assert not any(passed[:-1]), "the first that passes ends it"
    exported = judged[-1] if passed[-1] else judged[0]
    assert result["best"]["trial"] == exported["trial"]
    assert result["verdict"] == ("certified" if passed[-1] else "feasible")


def test_folds_cost_as_many_trainings_a_trial_and_are_said(tmp_path: Path) -> None:
    options = ["--epochs", "1", "--trials", "2", "--seeds", "2", "--finalists", "1", "--tolerance", "100"]
    done = camri_tune("run", "--out", tmp_path, "--name", "d", *options, "--folds", "3", "--json")
    assert done.returncode == 0, done.stderr
    result = result_of(done)
    assert result["folds"] == 3
    assert result["images"]["validation"] > 2.5 * 287
    assert "in 3 folds, each scored by models not trained on it" in done.stderr.replace("\n", " ")
    with sqlite3.connect(tmp_path / "d" / "study.db") as database:
        folds = database.execute(
            "select study_name, value_json, count(*) from trial_user_attributes a join trials using (trial_id) "
            "join studies using (study_id) where a.key = 'fold' group by 1, 2 order by 1, 2"
        ).fetchall()
    assert folds[:3] == [("d.baseline", fold, 1) for fold in "012"], "a third seed, for the third fold's floor"
    assert folds[3:] == [("d.finalists", fold, 1) for fold in "01"]
    for part in ("validation", "test"):
        assert result["baseline"][part]["accuracy"]["n"] == result["best"][part]["accuracy"]["n"] == 2


def test_calibrating_adds_the_bias_that_validation_asks_for_and_trains_nothing(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, plain = finished
    mine = shutil.copytree(folder, tmp_path / "d")
    arguments = ["run", "--out", tmp_path, "--name", "d", *SMALL, "--json"]
    done = camri_tune(*arguments, "--calibrate")
    assert done.returncode == 0, done.stderr
    result = result_of(done)
    assert _trials(mine) == _trials(folder)
    (important,) = result["important"]
    bias = result["best"]["params"][f"bias_{important}"]
    # A tolerance of 100 points forbids no bias: the lowest one above zero that misses nothing on validation is taken.
    assert result["best"]["validation"]["recall"]["values"] == [1.0, 1.0]
    assert (plain["test_reads"], result["test_reads"]) == (1, 2), "another model of the same weights"
    bundle = read_bundle(mine / "best")
    assert bundle.config.spec.logit_bias == {important: bias}
    data = open_dataset(StudyConfig())
    logits = predict_logits(bundle.classifier, data.validation.pixels, torch.device("cpu"))
    logits[:, important] -= bias
    labels = data.validation.labels.numpy()
    assert bundle.config.spec.temperature == pytest.approx(fit_temperature(logits.numpy(), labels), rel=1e-3)
    assert tune_bias(logits.numpy(), labels, important=important, floor=-1).bias == pytest.approx(bias, abs=1e-4)
    assert "reproduced exactly" in camri_tune("evaluate", mine / "best").stdout
    assert f"{bias:+.4g} is added to the logit of class {important}" in (mine / "best" / "README.md").read_text()
    again = result_of(camri_tune(*arguments))
    assert again["best"] == plain["best"], "without the option the models are as they were trained"


def test_an_altered_bundle_is_refused(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    bundle = shutil.copytree(finished[0] / "best", tmp_path / "best")
    weights = bundle / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert_one_line_error(camri_tune("evaluate", bundle), "model.safetensors")


def test_a_lost_bundle_is_written_again_as_it_was_and_in_another_format(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, _ = finished
    mine = shutil.copytree(folder, tmp_path / "d")
    shutil.rmtree(mine / "best")
    done = camri_tune("export", "d", "--out", tmp_path)
    assert (done.returncode, done.stdout) == (0, f"{mine / 'best'}\n"), done.stderr
    for path in (folder / "best").iterdir():
        assert (mine / "best" / path.name).read_bytes() == path.read_bytes(), path.name
    done = camri_tune("export", "d", "--out", tmp_path, "--format", "onnx")
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "no warning reaches the user"
    assert "359 images (the test part of digits" in done.stdout
    assert "0 predictions differ" in done.stdout
    session = onnxruntime.InferenceSession(str(mine / "best.onnx"), providers=["CPUExecutionProvider"])
    images = open_dataset(StudyConfig()).test()
    decided = session.run(["class_index"], {"images": images.pixels.numpy()})[0]
    stored = json.loads((mine / "best" / "metrics.json").read_text())["test"]["accuracy"]
    assert (decided == images.labels.numpy()).mean() == stored, "the figures of the file are the bundle's"


def test_the_same_command_again_trains_nothing_and_says_the_same(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, result = finished
    before = _trials(folder)
    again = camri_tune("run", "--out", folder.parent, "--name", "d", *SMALL, "--json")
    assert again.returncode == 0, again.stderr
    assert _trials(folder) == before
    assert {k: v for k, v in result_of(again).items() if k != "wall_seconds"} == {
        k: v for k, v in result.items() if k != "wall_seconds"
    }


@pytest.mark.parametrize(
    ("option", "value", "field"),
    [
        ("--important", "3", "important"),
        ("--tolerance", "1", "tolerance"),
        ("--seed", "5", "seed"),
        ("--loss", "ce", "loss"),
    ],
)
def test_resuming_with_another_configuration_names_the_field(
    finished: tuple[Path, dict[str, Any]], option: str, value: str, field: str
) -> None:
    folder, _ = finished
    done = camri_tune("run", "--out", folder.parent, "--name", "d", *SMALL, option, value)
    assert_one_line_error(done, field, "--name")
    assert (folder / "best").exists()


def test_asking_for_more_trials_adds_just_those(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder = shutil.copytree(finished[0], tmp_path / "d")
    done = camri_tune("run", "--out", tmp_path, "--name", "d", *SMALL, "--trials", "5", "--json")
    assert done.returncode == 0, done.stderr
    assert result_of(done)["trials"]["complete"] == 5
    assert [state for _, state in _trials(folder)] == ["COMPLETE"] * 5


def test_nothing_is_called_best_where_nothing_is_feasible(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """Put a finished study's finalists below the floor: exit code 3, and the earlier export is withdrawn."""
    folder = shutil.copytree(finished[0], tmp_path / "d")
    with sqlite3.connect(folder / "study.db") as database:
        changed = database.execute(
            "update trial_system_attributes set value_json = '0.1' where key = 'constraints:accuracy' and trial_id in "
            "(select trial_id from trials join studies using (study_id) where study_name = 'd.finalists')"
        ).rowcount
        # No other trial shall get its chance as a finalist in their place.
        others = database.execute(
            "update trial_system_attributes set value_json = '0.5' where key = 'constraints:accuracy' and trial_id in "
            "(select trial_id from trials join studies using (study_id) where study_name = 'd' and number not in "
            "(select cast(value_json as integer) from trial_user_attributes where key = 'source_trial'))"
        ).rowcount
    assert changed > 0
    assert others > 0
    done = camri_tune("run", "--out", tmp_path, "--name", "d", *SMALL, "--json")
    assert done.returncode == 3, done.stderr
    result = result_of(done)
    assert result["verdict"] == "none"
    assert result["best"] is None
    assert not (folder / "best").exists()
    assert "No model: no finalist had its mean validation accuracy over seeds within 100 points" in done.stderr
    assert result["test_reads"] == 1, "what test shows now it has shown before"
    assert "Judged: nothing." in " ".join(result["provenance"])


def test_a_study_that_judged_nothing_has_shown_the_baselines_figures_all_the_same(tmp_path: Path) -> None:
    """Counted once. What is judged later on the same test set is a second look, and the sentence says so."""
    folder = tmp_path / "d"
    command = ["run", "--epochs", "1", "--seeds", "1", "--trials", "1", "--limit", "200", "--tolerance", "100"]
    command += ["--out", str(tmp_path), "--name", "d", "--json", "--quiet"]
    first = camri_tune(*command)
    assert first.returncode == 0, first.stderr
    with sqlite3.connect(folder / "study.db") as database:  # as if no trial had been eligible, nor test read
        database.execute("delete from study_user_attributes where key = 'test_reads'")
        kept = database.execute("select trial_system_attribute_id, value_json from trial_system_attributes "
                                "where key = 'constraints:accuracy'").fetchall()  # fmt: skip
        database.execute("update trial_system_attributes set value_json = '5' where key = 'constraints:accuracy'")
    for _ in range(2):
        done = camri_tune(*command)
        assert done.returncode == 3, done.stderr
        result = result_of(done)
        assert result["test_reads"] == 1
        assert result["sentence"].startswith("No model: no trial of the search was eligible")
        assert "after" not in result["sentence"]
        assert not result["finalists"]
    with sqlite3.connect(folder / "study.db") as database:
        database.executemany(
            "update trial_system_attributes set value_json = ? where trial_system_attribute_id = ?",
            [(value, identity) for identity, value in kept],
        )
    for _ in range(2):
        result = result_of(camri_tune(*command))
        assert result["test_reads"] == 2
        assert "after 2 looks at this test set" in result["sentence"]


def test_an_altered_checkpoint_is_never_exported(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Flip one byte in each of the finalists' artifacts: they are passed over by their hash."""
    folder = shutil.copytree(finished[0], tmp_path / "d")
    with sqlite3.connect(folder / "study.db") as database:
        artifacts = database.execute(
            "select value_json from trial_user_attributes where key = 'checkpoint' and trial_id in "
            "(select trial_id from trials join studies using (study_id) where study_name = 'd.finalists')"
        ).fetchall()
    for (identifier,) in artifacts:
        path = folder / "artifacts" / json.loads(identifier)
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(bytes(content))
    done = camri_tune("run", "--out", tmp_path, "--name", "d", *SMALL, "--json")
    assert done.returncode == 3, done.stderr
    assert "missing or altered" in done.stderr
    assert "of each of the 1 finalist(s) with mean validation accuracy over seeds" in result_of(done)["sentence"]
    assert not (folder / "best").exists()


def _states(folder: Path, study: str) -> list[str]:
    try:
        return [state for _, state in _trials(folder, study)]
    except sqlite3.OperationalError:  # not created yet
        return []


def _start(out: Path) -> "subprocess.Popen[bytes]":
    command = [str(COMMAND), "run", "--out", str(out), "--name", "d", *LONGER]
    # As from a terminal: where the tests run as a background job, interrupts are ignored, and that is inherited.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def test_an_interrupted_run_resumes_and_loses_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    process = _start(tmp_path)
    wait_for(lambda: "COMPLETE" in _states(folder, "d") and "RUNNING" in _states(folder, "d"), seconds=600)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130, errors
    assert b"resumes" in errors
    assert b"Traceback" not in errors
    complete = [number for number, state in _trials(folder) if state == "COMPLETE"]
    again = camri_tune("run", "--out", tmp_path, "--name", "d", *LONGER, "--json")
    assert again.returncode == 0, again.stderr
    assert result_of(again)["trials"]["complete"] == 4
    after = dict(_trials(folder))
    assert all(after[number] == "COMPLETE" for number in complete)
    assert set(after.values()) <= {"COMPLETE", "FAIL"}


def _running_workers(folder: Path) -> list[str]:
    """host:pid of the processes that train the search's running trials."""
    with sqlite3.connect(folder / "study.db") as database:
        rows = database.execute(
            "select value_json from trial_user_attributes a join trials t using (trial_id) "
            "join studies using (study_id) where a.key = 'worker' and t.state = 'RUNNING' and study_name = 'd'"
        ).fetchall()
    return [json.loads(value) for (value,) in rows]


def test_a_killed_worker_is_replaced_and_its_trial_runs_again(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    process = _start(tmp_path)
    wait_for(lambda: "RUNNING" in _states(folder, "d"), seconds=600)
    workers: list[str] = []

    def some_worker_trains() -> bool:
        workers[:] = _running_workers(folder)
        return bool(workers)

    wait_for(some_worker_trains, seconds=600)
    os.kill(int(workers[0].split(":")[-1]), signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    states = _states(folder, "d")
    assert states.count("COMPLETE") == 4
    assert set(states) <= {"COMPLETE", "FAIL"}


def test_two_runs_of_one_study_at_once_are_refused(tmp_path: Path) -> None:
    process = _start(tmp_path)
    try:
        wait_for((tmp_path / "d" / "study.db").exists, seconds=600)
        assert_one_line_error(camri_tune("run", "--out", tmp_path, "--name", "d", *SMALL), "another run", "--name")
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate()
    assert process.returncode == 130


def _write_stripes(folder: Path, count: int) -> None:
    """Three classes that a network can learn in seconds: stripes of three directions, with noise."""
    rng = np.random.default_rng(0)
    grid = np.indices((24, 24))
    patterns = {"across": grid[0], "down": grid[1], "diagonal": grid[0] + grid[1]}
    for name, ramp in patterns.items():
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = 128 + 90 * np.sin(ramp * 0.9 + rng.uniform(0, 6)) + rng.normal(0, 25, (24, 24))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name / f"{index}.png")


@pytest.mark.parametrize("taken", [False, True])
def test_a_run_holds_its_study_while_it_judges(
    taken: bool, finished: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else another could begin it meanwhile. One that was taken for dead writes nothing over what the other writes."""
    folder = shutil.copytree(finished[0], tmp_path / "d")
    before = (folder / "result.json").read_bytes()
    store = StudyStore.existing(open_storage(f"sqlite:///{folder / 'study.db'}"), "d")
    monkeypatch.setattr(heartbeat, "HEARTBEAT_SECONDS", 0.05)
    judge, seen = pipeline._judge, []

    def judging(*arguments: Any) -> Any:
        seen.append(read_overview(store).running)
        with pytest.raises(InputError, match="another run works on study 'd' now"), store.held():
            pass
        found = judge(*arguments)
        if taken:
            run = store.storage.get_all_trials(store.storage.get_study_id_from_name("d.runs"))[-2]
            assert run.state == TrialState.RUNNING
            store.storage.set_trial_state_values(run._trial_id, TrialState.FAIL)
            time.sleep(1.0)
        return found

    monkeypatch.setattr(pipeline, "_judge", judging)
    options = {"epochs": 3, "trials": 3, "seeds": 2, "finalists": 1, "tolerance": 100}
    config = StudyConfig.build({"name": "d", "out": tmp_path, "workers": 0, **options})
    if taken:
        with pytest.raises(WorkerError, match="was taken over by another run"):
            pipeline.run(config)
        assert (folder / "result.json").read_bytes() == before
    else:
        pipeline.run(config)
    assert seen == [True]
    assert store.attributes["judged"] is not taken
    assert not read_overview(store).running


def test_a_folder_of_class_folders_from_data_to_model(tmp_path: Path) -> None:
    data = tmp_path / "stripes"
    _write_stripes(data, 40)
    (data / "down" / "torn.png").write_bytes((data / "down" / "0.png").read_bytes()[:200])
    options = [
        "run",
        "--dataset",
        data,
        "--important",
        "Diagonal",
        "--out",
        tmp_path / "runs",
        *SMALL,
        "--epochs",
        "12",
        "--folds",
        "1",
        "--learning-rate",
        "0.001..0.004 log",  # at whose end the baseline's is, and so the first trials'
    ]
    assert_one_line_error(camri_tune(*options, "--quiet"), "torn.png", "--skip-corrupt")
    done = camri_tune(*options, "--skip-corrupt", "--json")
    assert done.returncode == 0, done.stderr
    result = result_of(done)
    assert result["classes"] == ["across", "diagonal", "down"]
    assert result["important"] == [1]
    assert sum(result["images"][part] for part in ("train", "validation", "test")) == 120
    assert any("1 corrupt" in notice for notice in result["notices"])
    assert result["best"]["params"]["learning_rate"] == 0.004
    beyond = "--learning-rate '0.002..0.008 log'"
    assert any("best learning_rate, 0.004, lies at the end" in n and beyond in n for n in result["notices"])
    assert result["baseline"]["test"]["accuracy"]["mean"] > 0.8

    bundle = tmp_path / "runs" / "stripes-camri-Diagonal" / "best"
    same = json.loads(camri_tune("evaluate", bundle, "--data", data, "--json").stdout)
    assert same["matches_stored"], "the training folder gives its held-out part, not what was learned from"
    assert same["images"] == result["images"]["test"]
    foreign = tmp_path / "others"
    _write_stripes(foreign, 10)
    other = json.loads(camri_tune("evaluate", bundle, "--data", foreign, "--json").stdout)
    assert other["images"] == 30
    assert other["matches_stored"] is None
    assert "stored test figures" not in camri_tune("evaluate", bundle, "--data", foreign).stdout
    (foreign / "zigzag").mkdir()
    Image.new("RGB", (8, 8)).save(foreign / "zigzag" / "1.png")
    assert_one_line_error(camri_tune("evaluate", bundle, "--data", foreign), "'zigzag'")


def test_several_important_classes_have_margins_of_their_own(tmp_path: Path) -> None:
    done = camri_tune("run", "--important", "3,8", "--out", tmp_path, *SMALL, "--epochs", "1", "--json", "--quiet")
    assert done.returncode == 0, done.stderr
    result = result_of(done)
    assert result["important"] == [3, 8]
    assert {"margin_3", "margin_8"} <= set(result["best"]["params"])
    best = result["best"]
    for found in (
        best["recall_difference"],
        best["over_seeds"]["recall_difference"],
        best["exported"]["test"]["recall"],
    ):
        assert set(found) == {"3", "8"}
    test = open_dataset(StudyConfig()).test().labels
    for c in ("3", "8"):
        difference = best["recall_difference"][c]
        assert difference["n"] == int((test == int(c)).sum())
        assert difference["confidence"] == pytest.approx(1 - 0.05 / 2), "one finalist, two classes"
        assert difference["estimate"] * difference["n"] == difference["gained"] - difference["lost"]
        gains = best["over_seeds"]["recall_difference"][c]
        of_sides = (side["test"]["recall_per_class"][int(c)]["mean"] for side in (best, result["baseline"]))
        assert gains["mean"] == pytest.approx(next(of_sides) - next(of_sides))
    assert result["accuracy_difference"]["confidence"] == 0.95
    assert result["sentence"].count("ecall of 3 on test") == result["sentence"].count("recall of 8 on test") == 1
    assert (
        "gain in recall of 8 on test, points"
        in camri_tune("run", "--important", "3,8", "--out", tmp_path, *SMALL, "--epochs", "1", "--quiet").stdout
    )
    for part in ("validation", "test"):
        per_class = result["best"][part]["recall_per_class"]
        lowest = [min(a, b) for a, b in zip(per_class[3]["values"], per_class[8]["values"], strict=True)]
        assert result["best"][part]["recall"]["values"] == lowest


@pytest.mark.parametrize("loss", ["ce", "l2", "arcface", "cosface-i"])
def test_every_loss_can_be_tuned(loss: str, tmp_path: Path) -> None:
    done = camri_tune("run", "--loss", loss, "--out", tmp_path, *SMALL, "--epochs", "1", "--trials", "2", "--json")
    assert done.returncode == 0, done.stderr
    expected = {"ce": set(), "l2": {"scale"}}.get(loss, {"scale", "margin"}) | {"learning_rate"}
    assert set(result_of(done)["best"]["params"]) == expected


def test_real_traffic_signs_end_to_end(gtsrb_dir: Path, tmp_path: Path) -> None:
    """Real GTSRB, whole tracks: the model beats chance by far, and its files alone reproduce its test figures."""
    options = ["--dataset", "gtsrb", "--data-dir", gtsrb_dir, "--important", "Stop", "--limit", "4000"]
    options += ["--learning-rate", "0.008", "--out", tmp_path]
    done = camri_tune("run", *options, *SMALL, "--trials", "2", "--seeds", "1", "--json")
    assert done.returncode == 0, done.stderr
    result = result_of(done)
    assert result["important"] == [14]
    assert result["images"]["test"] == 12_630
    assert result["images"]["test_important"] == 270
    assert 4_000 - 30 < result["images"]["train"] <= 4_000
    assert result["images"]["validation"] == 7_830, "a limit is for training"
    assert result["baseline"]["test"]["accuracy"]["mean"] > 0.3
    assert (tmp_path / "gtsrb-camri-Stop" / "report.html").stat().st_size < 10e6
    bundle = tmp_path / "gtsrb-camri-Stop" / "best"
    figures = json.loads(camri_tune("evaluate", bundle, "--data", gtsrb_dir, "--json").stdout)
    assert figures["matches_stored"]
