"""What each stage queues next, on a real database, with figures in place of trainings."""

import math
import random
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast, get_args

import optuna
import pytest
import torch

from camri_tune import stages as stages_module
from camri_tune.baseline import START_FACTORS
from camri_tune.config import MOST_FOLDS, Loss, StudyConfig
from camri_tune.console import Console
from camri_tune.database import open_storage
from camri_tune.datasets import Dataset
from camri_tune.errors import CamriTuneError, InputError, StudyMismatchError
from camri_tune.heartbeat import Heart, worker_id
from camri_tune.images import Images
from camri_tune.progress import Schedule
from camri_tune.records import Baseline, TrialRecord
from camri_tune.search import Plan, looks_at_class, starting_points, suggest
from camri_tune.selection import rank_models
from camri_tune.stages import Crew, Stages, only_run
from camri_tune.storage import STAGES, Stage, StudyStore, storage_url
from camri_tune.training import default_learning_rate
from camri_tune.workers import Workers, places_for

CPU = torch.device("cpu")
RATE = default_learning_rate("compact")

# What a training comes to, from its stage, number and attributes: accuracy and recall of class 3; None is a failure.
Scores = tuple[float, float] | None
Outcome = Callable[[int, Mapping[str, float], Mapping[str, Any]], Scores]


@pytest.fixture
def make(tmp_path: Path, empty_database: Path, digits: Dataset) -> Callable[..., Stages]:
    """The stages of a study; again, those of the same study as another process finds it."""

    def make(**changes: Any) -> Stages:
        values = {"name": "s", "out": tmp_path, "important": "3", "seeds": 2, "finalists": 2, "trials": 6, **changes}
        config = StudyConfig.build(values)
        path = config.folder / "study.db"
        if not path.exists():
            path.parent.mkdir()
            shutil.copy(empty_database, path)
        return Stages(config, digits, StudyStore.create(open_storage(storage_url(config)), config, digits))

    return make


def _train_one(stages: Stages, stage: Stage, outcome: Outcome) -> bool:
    """What a worker does to the next waiting trial, but for the training; False where none waits."""
    end = _begin_one(stages, stage, outcome)
    if end is None:
        return False
    end()
    return True


def _begin_one(stages: Stages, stage: Stage, outcome: Outcome) -> Callable[[], None] | None:
    """The same up to the training's end, which is returned; None where none waits."""
    store = stages.store
    trial = store.claim(stage)
    if trial is None:
        return None
    plan = Plan(store.config, stages.data, CPU).as_stored(store)
    suggest(trial, stage, plan)
    return partial(_end, stages, stage, trial, plan, outcome(trial.number, trial.params, trial.user_attrs))


def _end(stages: Stages, stage: Stage, trial: optuna.Trial, plan: Plan, scores: Scores) -> None:
    study = stages.store.optuna_study(stage)
    plan = plan.as_stored(stages.store)
    if scores is None:
        trial.set_user_attr("failure", f"boom {trial.number}")
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
        return
    accuracy, recall = scores
    recalls = [accuracy] * 10
    recalls[3], recalls[5] = recall, 1 - recall  # who is good at the one is bad at the other
    for key, value in {"accuracy": accuracy, "recall_per_class": recalls, "checkpoint": "c", "sha256": "s"}.items():
        trial.set_user_attr(key, value)
    if stage == "baseline":
        study.tell(trial, accuracy)
        return
    lowest = min(recalls[c] for c in plan.important)
    trial.set_user_attr("recall", lowest)
    floors = plan.floors if stage == "search" else plan.floors[trial.user_attrs["fold"] :][:1]
    trial.set_constraint("accuracy", sum(floors) / len(floors) - accuracy)
    study.tell(trial, lowest)


def _train(stages: Stages, stage: Stage, outcome: Outcome) -> int:
    count = 0
    while _train_one(stages, stage, outcome):
        count += 1
    return count


def _equal(accuracy: float = 0.9, recall: float = 0.5) -> Outcome:
    return lambda *_: (accuracy, recall)


def _by_fold(accuracies: Sequence[float]) -> Outcome:
    return lambda _, __, attributes: (accuracies[attributes.get("fold", 0)], 0.5)


def _waiting(stages: Stages, stage: Stage) -> list[dict[str, Any]]:
    """Parameters and attributes that queued trials ask for."""
    trials = stages.store.optuna_study(stage).get_trials(states=(optuna.trial.TrialState.WAITING,))
    queued = [{**t.system_attrs["fixed_params"], **t.user_attrs} for t in trials]
    return [{key: value for key, value in one.items() if key != "ticket"} for one in queued]


def _baseline(stages: Stages, outcome: Outcome | None = None, folds: int = 1) -> Baseline:
    while (planned := stages.plan_baseline(folds)) is None:
        _train(stages, "baseline", outcome or _equal())
    return planned


def _searched(stages: Stages, scores: Sequence[Scores], by_fold: Sequence[float] = (0.9,)) -> Baseline:
    """A study whose baseline and search are finished, the search's trials with these scores.

    The baseline's accuracy is 0.9, or as given for each fold.
    """
    baseline = _baseline(stages, _by_fold(by_fold), len(by_fold))
    stages.adopt(baseline, (3,))
    stages.plan_search(baseline)
    assert _train(stages, "search", lambda number, *_: scores[number]) == len(scores)
    return baseline


# --- the baseline -----------------------------------------------------------------------------------------------------


def test_the_baselines_learning_rate_is_tuned_first_and_then_it_gets_its_seeds(make: Callable[..., Stages]) -> None:
    stages = make()
    assert stages.plan_baseline() is None
    tuning = stages.config.tuning_seed
    assert _waiting(stages, "baseline") == [{"learning_rate": RATE * f, "seed": tuning} for f in START_FACTORS]
    peak = {RATE * f: a for f, a in zip(START_FACTORS, (0.7, 0.8, 0.95, 0.6), strict=True)}
    assert _train(stages, "baseline", lambda _, params, __: (peak[params["learning_rate"]], 0.5)) == 4

    assert stages.plan_baseline() is None
    assert _waiting(stages, "baseline") == [{"learning_rate": RATE * 2, "seed": seed, "fold": 0} for seed in (0, 1)]
    assert tuning not in stages.seeds() == [0, 1], "what chose the rate does not judge it"
    assert _train(stages, "baseline", lambda _, __, attributes: (0.5 + attributes["seed"] / 10, 0.5)) == 2

    baseline = stages.plan_baseline()
    assert baseline is not None
    assert baseline.learning_rate == RATE * 2
    assert [record.seed for record in baseline.records] == [0, 1]
    assert baseline.accuracy == pytest.approx(0.55), "of the seeds alone, not of the tuning"
    assert stages.plan_baseline() == baseline
    assert not _waiting(stages, "baseline")


def test_a_best_rate_at_the_edge_is_followed_outward(make: Callable[..., Stages]) -> None:
    stages = make()
    stages.plan_baseline()
    _train(stages, "baseline", lambda _, params, __: (0.5 + params["learning_rate"], 0.5))
    assert stages.plan_baseline() is None
    assert _waiting(stages, "baseline") == [{"learning_rate": RATE * 8, "seed": stages.config.tuning_seed}]


def test_a_baseline_on_which_no_rate_trains_says_why(make: Callable[..., Stages]) -> None:
    stages = make()
    with pytest.raises(
        CamriTuneError, match=r"^every training of the baseline failed; the first said: boom 0; .*--name$"
    ):
        _baseline(stages, lambda *_: None)
    assert 4 <= len(stages.store.records("baseline")) <= 6


def test_a_baseline_seed_that_fails_is_named(make: Callable[..., Stages]) -> None:
    """Seeds are not chosen: one that fails is not passed over. A rate that fails is."""
    stages = make()

    def outcome(number: int, params: Mapping[str, float], attributes: Mapping[str, Any]) -> Scores:
        return None if attributes["seed"] == 1 or params["learning_rate"] == RATE * 2 else (0.9, 0.5)

    with pytest.raises(CamriTuneError, match=r"training with seed 1 failed: boom \d; .*fewer --workers"):
        _baseline(stages, outcome)


def test_more_seeds_are_another_study(make: Callable[..., Stages]) -> None:
    make()
    with pytest.raises(StudyMismatchError, match="seeds = 2, not 3"):
        make(seeds=3)


def test_the_floor_is_the_mean_less_the_tolerance_and_never_above_equal_accuracies(make: Callable[..., Stages]) -> None:
    stages = make(tolerance=2.0)
    baseline = _baseline(stages)
    assert stages.floors(baseline) == [pytest.approx(0.88)]
    three = Baseline(0.1, tuple(TrialRecord(n, "complete", {}, accuracy=0.1) for n in range(3)))
    assert sum([0.1] * 3) / 3 > 0.1, "as rounding has it"
    (with_tolerance,), (without,) = make(tolerance=2.0, name="t").floors(three), make(name="u").floors(three)
    assert with_tolerance < 0.08
    assert without <= 0.1


def test_one_rule_chooses_the_model_of_a_finalist_and_the_baselines(make: Callable[..., Stages]) -> None:
    """By recall, then accuracy: the baseline's are trained before it is known whose, and are scored by accuracy."""
    stages = make(seeds=4, tolerance=5.0)
    shown = dict(zip(stages.seeds(), [(0.95, 0.6), (0.89, 0.8), (0.93, 0.7), (0.91, 0.8)], strict=True))
    baseline = _baseline(stages, lambda _, __, attributes: shown.get(attributes["seed"], (0.9, 0.5)))
    stages.adopt(baseline, (3,))
    models = baseline.scored((3,), stages.floors(baseline))
    assert [model.recall for model in models] == [0.6, 0.8, 0.7, 0.8]
    assert [model.seed for model in rank_models(models)] == [stages.seeds()[place] for place in (3, 1, 2, 0)]
    stages.plan_search(baseline)
    _train(stages, "search", _equal())
    while (found := stages.plan_finalists(baseline)) is None:
        _train(stages, "finalists", lambda _, __, attributes: shown[attributes["seed"]])
    alike = next(iter(found.values()))
    assert [(m.recall, m.accuracy, m.constraint) for m in models] == [
        (m.recall, m.accuracy, m.constraint) for m in alike
    ]
    strict = baseline.scored((3,), [baseline.accuracy])
    assert [model.seed for model in rank_models(strict)] == [stages.seeds()[place] for place in (2, 0)]
    several = baseline.scored((2, 3), stages.floors(baseline))  # class 2's recall is the accuracy
    assert [model.recall for model in several] == [0.6, 0.8, 0.7, 0.8]


# --- folds ------------------------------------------------------------------------------------------------------------


def _seeds_and_folds(stages: Stages, stage: Stage) -> list[tuple[int, int]]:
    return [(trial["seed"], trial["fold"]) for trial in _waiting(stages, stage)]


def test_the_rule_asks_of_the_baselines_models_what_it_asks_of_a_finalists(make: Callable[..., Stages]) -> None:
    """Else one that is bad at other classes would be what no class may lose against."""
    stages = make(seeds=3, tolerance=5.0, max_drop=10.0)
    # Class 5's recall is 1 less class 3's: the best at the one is the worst at the other.
    shown = dict(zip(stages.seeds(), [(0.9, 0.5), (0.91, 0.9), (0.92, 0.52)], strict=True))
    baseline = _baseline(stages, lambda _, __, attributes: shown.get(attributes["seed"], (0.9, 0.5)))
    stages.adopt(baseline, (3,))
    assert rank_models(baseline.scored((3,), stages.floors(baseline)))[0].seed == stages.seeds()[1]
    rivals = stages.rivals(baseline)
    assert [model.feasible for model in rivals] == [True, True, True], "no model comes near the mean: it is not asked"
    shown[stages.seeds()[1]] = (0.91, 0.56)
    other = make(name="other", seeds=3, tolerance=5.0, max_drop=2.0)
    baseline = _baseline(other, lambda _, __, attributes: shown.get(attributes["seed"], (0.9, 0.5)))
    other.adopt(baseline, (3,))
    kept = [model.seed for model in other.rivals(baseline) if model.feasible]
    assert kept == [stages.seeds()[2]], "0.48 of class 5, where 0.473 is the mean, and 0.52 of class 3 for 0.527"
    assert rank_models(other.rivals(baseline))[0].seed == stages.seeds()[2]
    assert rank_models(baseline.scored((3,), other.floors(baseline)))[0].seed == stages.seeds()[1]


@pytest.mark.parametrize(
    ("seeds", "folds", "expected"),
    [(3, 1, 0.01), (4, 2, 0.005), (2, 2, math.sqrt(0.9 * 0.1 / 574)), (1, 1, 0.0)],
)
def test_a_trials_scatter_is_that_of_seeds_and_not_of_folds(
    seeds: int, folds: int, expected: float, make: Callable[..., Stages]
) -> None:
    """Of the folds the second is much harder. A trial is scored on all of them together."""
    stages = make(seeds=seeds)

    def scored(_: int, __: Mapping[str, float], attributes: Mapping[str, Any]) -> tuple[float, float]:
        place = attributes["seed"] % 10
        step = (place - 1) * 0.01 if folds == 1 and seeds > 1 else (0.005 if place < 2 else -0.005) if seeds == 4 else 0
        return 0.9 + (0.05, -0.05)[attributes.get("fold", 0)] * (folds - 1) + step, 0.5

    baseline = _baseline(stages, scored, folds)
    stages.adopt(baseline, (3,))
    assert stages.store.attributes["baseline"]["accuracy_sd"] == pytest.approx(expected)


def test_the_baselines_seeds_take_the_folds_in_turn(make: Callable[..., Stages]) -> None:
    stages = make(seeds=5)
    assert stages.plan_baseline(2) is None
    assert [trial.get("fold", 0) for trial in _waiting(stages, "baseline")] == [0] * 4, "the rate is tuned on one split"
    _train(stages, "baseline", _equal())
    assert stages.plan_baseline(2) is None
    assert _seeds_and_folds(stages, "baseline") == [(0, 0), (1, 1), (2, 0), (3, 1), (4, 0)]
    _train(stages, "baseline", _equal())
    baseline = stages.plan_baseline(2)
    assert baseline is not None
    assert [(r.seed, r.fold) for r in baseline.records] == [(0, 0), (1, 1), (2, 0), (3, 1), (4, 0)]
    assert baseline.others == ()
    assert not _waiting(stages, "baseline")


def test_a_baseline_that_goes_to_folds_keeps_what_it_has_on_the_first(make: Callable[..., Stages]) -> None:
    """The important class is known only after a baseline on one split."""
    stages = make(seeds=4)
    first = _baseline(stages)
    assert [r.fold for r in first.records] == [0] * 4
    assert stages.plan_baseline(3) is None
    assert _seeds_and_folds(stages, "baseline") == [(1, 1), (2, 2)], "seeds 0 and 3 have their models"
    _train(stages, "baseline", _equal(0.8))
    baseline = stages.plan_baseline(3)
    assert baseline is not None
    assert [(r.seed, r.fold) for r in baseline.records] == [(0, 0), (1, 1), (2, 2), (3, 0)]
    assert [r.number for r in baseline.records if r.fold == 0] == [r.number for r in first.records if r.seed in (0, 3)]
    assert stages.plan_baseline() == first, "as a run that is resumed sees it"
    assert stages.plan_baseline(3) == baseline
    assert not _waiting(stages, "baseline")


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_folds_that_no_seed_takes_get_a_model_for_their_floor(seeds: int, make: Callable[..., Stages]) -> None:
    accuracies = (0.9, 0.8, 0.7, 0.6, 0.5)
    stages = make(seeds=seeds)
    baseline = _baseline(stages, _by_fold(accuracies), 5)
    assert [(r.seed, r.fold) for r in baseline.records] == [(n, n) for n in range(seeds)]
    assert [(r.seed, r.fold) for r in baseline.others] == [(n, n) for n in range(seeds, 5)]
    assert stages.floors(baseline) == pytest.approx(accuracies)
    assert baseline.accuracy == pytest.approx(sum(accuracies[:seeds]) / seeds), "they are compared with nothing"
    stages.adopt(baseline, (3,))
    assert stages.folds == 5
    assert stages.store.attributes["baseline"]["floors"] == pytest.approx(accuracies)
    trial = TrialRecord(0, "complete", {"learning_rate": RATE, "scale": 16.0, "margin": 0.1})
    assert stages.retrain([trial]) is None
    assert _seeds_and_folds(stages, "finalists") == [(n, n) for n in range(seeds)], "finalists have the seeds alone"


def test_a_baseline_that_fails_on_a_fold_is_named_by_its_seed(make: Callable[..., Stages]) -> None:
    stages = make()
    _baseline(stages)
    with pytest.raises(CamriTuneError, match=r"training with seed 1 failed: boom \d; .*fewer --workers"):
        _baseline(stages, lambda *_: None, 2)
    other = make(name="other")
    with pytest.raises(CamriTuneError, match=r"training with seed 2 failed: boom \d; .*fewer --workers"):
        _baseline(other, lambda _, __, attributes: None if attributes.get("fold", 0) == 2 else (0.9, 0.5), 3)


def test_each_fold_has_a_floor_of_its_own(make: Callable[..., Stages]) -> None:
    """Of the models that were scored on it, less the tolerance."""
    stages = make(seeds=3, tolerance=2.0)
    accuracies = {0: 0.9, 1: 0.75, 2: 0.8}
    baseline = _baseline(stages, lambda _, __, attributes: (accuracies.get(attributes["seed"], 0.1), 0.5), 2)
    assert stages.floors(baseline) == pytest.approx([0.83, 0.73])
    assert stages.folds == 1, "not settled yet"
    stages.adopt(baseline, (3,))
    assert stages.folds == 2
    assert stages.store.attributes["baseline"]["floors"] == stages.floors(baseline)


def test_a_finalist_has_the_folds_of_the_baselines_seeds(make: Callable[..., Stages]) -> None:
    """The study's own seed moves theirs, but not which of them takes which fold."""
    stages = make(seeds=4, seed=1, finalists=1)
    baseline = _searched(stages, SEARCH, (0.9, 0.9, 0.9))
    expected = [(100_000, 0), (100_001, 1), (100_002, 2), (100_003, 0)]
    assert [(r.seed, r.fold) for r in baseline.records] == expected
    assert stages.plan_finalists(baseline) is None
    assert _seeds_and_folds(stages, "finalists") == expected
    _train(stages, "finalists", _equal())
    models = stages.plan_finalists(baseline)
    assert models is not None
    assert {number: [(r.seed, r.fold) for r in records] for number, records in models.items()} == {4: expected}
    assert not _waiting(stages, "finalists")


@pytest.mark.parametrize(("accuracies", "rounds"), [((0.7, 0.9), 1), ((0.9, 0.7), 1), ((0.69, 0.9), 2)])
def test_a_finalist_keeps_accuracy_by_the_floors_of_its_folds(
    accuracies: tuple[float, float], rounds: int, make: Callable[..., Stages]
) -> None:
    """Three seeds on two folds, the first of which is harder and counts twice: the mean of the floors says nothing."""
    stages = make(seeds=3, finalists=1)
    baseline = _searched(stages, [(0.9, 0.6), (0.9, 0.8), *SEARCH[2:]], (0.7, 0.9))
    assert stages.plan_finalists(baseline) is None
    _train(stages, "finalists", _by_fold(accuracies))
    models = stages.plan_finalists(baseline)
    assert (models is None) == (rounds == 2)


def test_a_second_round_has_the_same_folds(make: Callable[..., Stages]) -> None:
    stages = make(finalists=1)
    baseline = _searched(stages, SEARCH, (0.9, 0.9))
    stages.plan_finalists(baseline)
    _train(stages, "finalists", _equal(0.8))
    assert stages.plan_finalists(baseline) is None
    assert _seeds_and_folds(stages, "finalists") == [(0, 0), (1, 1)]


def test_finalists_are_a_quarter_of_the_trials_unless_given(make: Callable[..., Stages]) -> None:
    stages = make(finalists=None, trials=8, seeds=1)
    baseline = _searched(stages, [(0.95, recall / 10) for recall in range(8)])
    assert stages.plan_finalists(baseline) is None
    assert [trial["source_trial"] for trial in _waiting(stages, "finalists")] == [7, 6]


NAMES = ("zero", "one", "two", "three")


def _validated(*sizes: Sequence[int], own: bool = False, **values: Any) -> Stages:
    """A study of classes whose validation images come in groups of these sizes, from a part of its own or not."""
    table = [(label, size) for label, of_class in enumerate(sizes) for size in of_class]
    groups = torch.repeat_interleave(torch.tensor([size for _, size in table]))
    labels = torch.tensor([label for label, _ in table])[groups]
    images = Images(torch.zeros(len(labels), 1, 8, 8, dtype=torch.uint8), labels, groups)
    data = SimpleNamespace(validation=images, classes=NAMES[: len(sizes)], has_folds=not own)
    return Stages(StudyConfig.build(values), cast(Dataset, data), cast(StudyStore, None))


ENOUGH = [1] * 20
AS_FEW: list[list[int]] = [[1] * 20, [4] * 5, [7] * 3, [18, 1, 1]]
TOO_FEW: list[tuple[list[int], str]] = [
    ([1] * 19, "19 validation images"),
    ([1], "1 validation images"),
    ([30] * 2, "60 validation images of 2 group(s)"),
    ([3, 3, 3, 3, 3], "15 validation images of 5 group(s)"),
    ([30], "30 validation images of 1 group(s)"),
]


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("sizes", AS_FEW)
def test_enough_images_are_validated_on_one_split(sizes: list[int], seeds: int) -> None:
    assert _validated([1], sizes, seeds=seeds).folds_wanted((1,)) == (1, None)


def test_digits_need_no_folds(make: Callable[..., Stages]) -> None:
    assert make().folds_wanted((0, 3, 9)) == (1, None)


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize(("sizes", "count"), TOO_FEW)
def test_few_images_or_few_groups_ask_for_folds_and_say_what_they_cost(
    sizes: list[int], count: str, seeds: int
) -> None:
    folds, text = _validated(ENOUGH, sizes, trials=7, seeds=seeds).folds_wanted((1,), ranked=True)
    assert folds == MOST_FOLDS == 5
    assert text is not None
    assert "\n" not in text
    for part in (
        f"Class 1 (one) has only {count}, too few",
        "5 folds",
        "5 times the cost",
        "35 trainings in the search instead of 7, and 4 more of the baseline",
        "--folds 1",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("seeds", "more", "ranked"), [(1, 4, 4), (3, 2, 4), (5, 0, 4), (6, 0, 4), (10, 0, 8), (12, 0, 9)]
)
def test_the_baselines_that_folds_cost_are_counted(
    seeds: int, more: int, ranked: int, make: Callable[..., Stages]
) -> None:
    """Those beyond its R; or as many as are queued when one on one split, which ranked the classes, goes to five."""
    study = _validated(ENOUGH, [1], trials=7, seeds=seeds)
    said = study.folds_wanted((1,))[1] or ""
    assert f"instead of 7{f', and {more} more of the baseline' if more else ''}; --folds 1" in said
    assert f"and {ranked} more of the baseline" in (study.folds_wanted((1,), ranked=True)[1] or "")
    stages = make(seeds=seeds)
    _baseline(stages)
    assert stages.plan_baseline(MOST_FOLDS) is None
    assert len(_waiting(stages, "baseline")) == ranked
    direct = make(seeds=seeds, name="direct")
    direct.plan_baseline(MOST_FOLDS)
    _train(direct, "baseline", _equal())
    direct.plan_baseline(MOST_FOLDS)
    assert len(_waiting(direct, "baseline")) == seeds + more


def test_a_class_called_by_its_number_is_named_once() -> None:
    stages = _validated(ENOUGH, [1])
    text = stages.too_few_to_rank((1,))
    assert text == "Class 1 (one) has only 1 validation images, too few to rank trials by"
    stages.data.classes = ("0", "1")
    assert (stages.too_few_to_rank((1,)) or "").startswith("Class 1 has only")
    assert stages.too_few_to_rank((0,)) is None


def test_the_important_class_that_has_few_decides() -> None:
    sizes = (ENOUGH, [1] * 3, [1] * 19, [5] * 5)
    assert _validated(*sizes).folds_wanted((0, 3)) == (1, None), "others may have few"
    for important, named in (((0, 2, 3), "Class 2 (two)"), ((2, 1), "Class 2 (two)"), ((3, 1), "Class 1 (one)")):
        folds, text = _validated(*sizes).folds_wanted(important)
        assert folds == MOST_FOLDS
        assert text is not None
        assert text.startswith(f"{named} has only ")


@pytest.mark.parametrize("sizes", [ENOUGH, [1]])
@pytest.mark.parametrize("asked", [1, 2, 5])
def test_so_many_folds_as_are_asked_for_and_nothing_said(asked: int, sizes: list[int]) -> None:
    assert _validated(ENOUGH, sizes, folds=asked, seeds=2).folds_wanted((1,)) == (asked, None)


def test_a_validation_part_that_is_too_small_is_said() -> None:
    folds, text = _validated(ENOUGH, [1] * 9, own=True).folds_wanted((1,))
    assert folds == 1
    assert text is not None
    assert "Class 1 (one) has only 9 validation images, too few" in text
    assert "no folder for validation" in text
    assert "\n" not in text
    assert _validated(ENOUGH, [1] * 9, own=True).folds_wanted((0,)) == (1, None)


# --- the search -------------------------------------------------------------------------------------------------------


def test_a_run_that_asks_for_fewer_trials_than_the_last_one_trains_no_more(make: Callable[..., Stages]) -> None:
    stages = make(trials=30)
    baseline = _baseline(stages)
    stages.adopt(baseline, (3,))
    stages.plan_search(baseline)
    for _ in range(4):
        _train_one(stages, "search", _equal())
    fewer = make(trials=7)
    fewer.adopt(baseline, (3,))
    assert fewer.plan_search(baseline) is None
    points = starting_points(StudyConfig(), (3,), 10, baseline.learning_rate)
    assert _waiting(fewer, "search") == [*points[4:], {}]
    assert _train(fewer, "search", _equal()) == 3
    trials = fewer.plan_search(baseline)
    assert trials is not None
    assert [record.state for record in trials] == ["complete"] * 7
    more = make(trials=9)
    more.adopt(baseline, (3,))
    assert more.plan_search(baseline) is None
    assert _train(more, "search", _equal()) == 2


def test_on_an_equal_budget_no_more_counts_than_was_asked_for_now(make: Callable[..., Stages]) -> None:
    """An earlier run of a comparison may have been asked for more, of some methods and not of others."""
    stages = make(trials=6)
    baseline = _baseline(stages)
    stages.adopt(baseline, (3,))
    stages.plan_search(baseline)
    for number in range(5):  # the last waits
        assert _train_one(stages, "search", _equal(recall=0.1 * number))
    fewer = make(trials=3)
    for equal, count, best in ((False, 5, [4, 3]), (True, 3, [2, 1])):
        found = Stages(fewer.config, fewer.data, fewer.store, equal_budget=equal)
        found.adopt(baseline, (3,))
        trials = found.plan_search(baseline)
        assert trials is not None
        assert [r.number for r in trials] == list(range(count)), "what waits is withdrawn"
        assert found.plan_finalists(baseline) is None
        queued = [trial["source_trial"] for trial in _waiting(found, "finalists")]
        assert list(dict.fromkeys(queued[-4:])) == best


def test_a_trial_that_somebody_queued_beside_the_run_is_not_withdrawn(make: Callable[..., Stages]) -> None:
    stages = make(trials=7)
    baseline = _baseline(stages)
    stages.adopt(baseline, (3,))
    stages.plan_search(baseline)
    stages.store.optuna_study("search").enqueue_trial({"margin": 0.5})
    for again in (stages, make(trials=7)):
        again.adopt(baseline, (3,))
        again.plan_search(baseline)
        assert _waiting(again, "search")[-1] == {"margin": 0.5}
    fewer = make(trials=3)
    fewer.adopt(baseline, (3,))
    fewer.plan_search(baseline)
    assert len(_waiting(fewer, "search")) == 3
    assert _waiting(fewer, "search")[-1] == {"margin": 0.5}


def test_a_rate_that_ran_out_of_memory_is_tried_again_only_while_rates_are_tried(make: Callable[..., Stages]) -> None:
    """Or the baseline would be said to have a rate that its models were not trained at."""

    def hungry(stages: Stages) -> None:
        trial = stages.store.claim("baseline")
        assert trial is not None
        trial.suggest_float("learning_rate", 1e-5, 1.0, log=True)
        trial.set_user_attr("out_of_memory", True)
        stages.store.optuna_study("baseline").tell(trial, state=optuna.trial.TrialState.FAIL)

    stages = make()
    assert stages.plan_baseline() is None
    hungry(stages)
    assert stages.store.requeue_blameless() == 1
    hungry(stages)  # again
    baseline = _baseline(stages)
    assert stages.store.requeue_blameless() == 0
    again = make().plan_baseline()
    assert again is not None
    assert again.learning_rate == baseline.learning_rate == again.records[0].params["learning_rate"]


def test_who_a_floor_is_of_is_told_by_the_baseline_that_ranked_the_classes(make: Callable[..., Stages]) -> None:
    """Another one, where a small class was first ranked on one split and is now asked about on folds."""
    stages = make(floor=("worst1>=0.2",))
    baseline = _baseline(stages)
    recalls = [0.5] * 10
    recalls[7] = 0.1
    ranked = replace(baseline, records=tuple(replace(r, recall_per_class=tuple(recalls)) for r in baseline.records))
    stages.adopt(baseline, (7,), ranked)
    assert [constraint.classes for constraint in stages.constraints] == [(7,)]
    stages.adopt(baseline, (3,))
    assert stages.constraints[0].classes != (7,)


def test_the_search_is_filled_up_good_points_first(make: Callable[..., Stages]) -> None:
    count = len(starting_points(StudyConfig(), (3,), 10, RATE))
    stages = make(trials=count + 2)
    baseline = _baseline(stages)
    stages.adopt(baseline, (3,))
    stored = stages.store.attributes["baseline"]
    assert stored["important"] == [3]
    assert stored["floors"] == [pytest.approx(0.9)]
    assert stored["learning_rate"] == baseline.learning_rate
    assert stored["recall_per_class"][3] == 0.5
    assert stored["accuracy_sd"] == baseline.accuracy_sd
    stages.plan_search(baseline)
    points = starting_points(StudyConfig(), (3,), 10, baseline.learning_rate)
    assert _waiting(stages, "search") == [*points, {}, {}]

    again = make(trials=count + 4)  # another process, and two more asked for
    again.adopt(baseline, (3,))
    again.plan_search(baseline)
    again.plan_search(baseline)
    assert len(_waiting(again, "search")) == count + 4
    assert _train(again, "search", _equal()) == count + 4
    again.plan_search(baseline)
    assert not _waiting(again, "search"), "finished ones are not replaced"


def test_an_interrupted_trial_is_not_counted_twice(make: Callable[..., Stages]) -> None:
    stages = make()
    baseline = _baseline(stages)
    stages.adopt(baseline, (3,))
    stages.plan_search(baseline)
    _train_one(stages, "search", _equal())
    lost = stages.store.claim("search")
    assert lost is not None
    lost.set_user_attr("worker", worker_id(2**30))  # there is no such process
    again = make()
    assert again.store.requeue_interrupted() == 1
    again.adopt(baseline, (3,))
    again.plan_search(baseline)
    assert [r.state for r in again.records("search")] == ["complete"] + ["waiting"] * 5
    assert len(again.store.optuna_study("search").get_trials(deepcopy=False)) == 7


def test_a_search_of_failures_alone_is_an_error(make: Callable[..., Stages]) -> None:
    stages = make(trials=2)
    _searched(stages, [None, None])
    with pytest.raises(CamriTuneError, match=r"^every trial of the search failed; the last said: boom 1$"):
        stages.check_search()
    other = make(trials=2, name="other")
    _searched(other, [None, (0.9, 0.5)])
    other.check_search()


# --- finalists --------------------------------------------------------------------------------------------------------

# Trials by recall: 4, 1, 3, 0; trial 2 is better than all, but below the floor; trial 5 failed.
SEARCH: list[Scores] = [(0.95, 0.6), (0.95, 0.8), (0.85, 0.99), (0.91, 0.7), (0.9, 0.9), None]


def test_the_best_few_are_retrained_on_the_baselines_seeds(make: Callable[..., Stages]) -> None:
    stages = make()
    baseline = _searched(stages, SEARCH)
    assert stages.plan_finalists(baseline) is None
    params = {r.number: r.params for r in stages.records("search")}
    assert _waiting(stages, "finalists") == [
        {**params[number], "source_trial": number, "seed": seed, "fold": 0} for number in (4, 1) for seed in (0, 1)
    ]
    assert _train(stages, "finalists", _equal()) == 4
    models = stages.plan_finalists(baseline)
    assert models is not None
    assert list(models) == [4, 1]
    for number, records in models.items():
        assert [(r.source_trial, r.seed, r.params) for r in records] == [(number, s, params[number]) for s in (0, 1)]
    assert stages.plan_finalists(baseline) == models
    assert not _waiting(stages, "finalists"), "one of the first kept accuracy: no second round"


def test_where_one_finalist_keeps_accuracy_there_is_no_second_round(make: Callable[..., Stages]) -> None:
    stages = make()
    baseline = _searched(stages, SEARCH)
    stages.plan_finalists(baseline)
    _train(stages, "finalists", lambda _, __, attributes: (0.95 if attributes["source_trial"] == 1 else 0.8, 0.5))
    models = stages.plan_finalists(baseline)
    assert models is not None
    assert list(models) == [4, 1]


def test_where_no_finalist_keeps_accuracy_the_next_few_are_tried_once(make: Callable[..., Stages]) -> None:
    stages = make(finalists=1)
    baseline = _searched(stages, SEARCH)
    stages.plan_finalists(baseline)
    # On average just below: one seed alone above the floor does not help.
    _train(stages, "finalists", lambda _, __, attributes: (0.91 if attributes["seed"] else 0.88, 0.5))
    assert stages.plan_finalists(baseline) is None
    queued = [(trial["source_trial"], trial["seed"]) for trial in _waiting(stages, "finalists")]
    assert queued == [(1, 0), (1, 1)]
    _train(stages, "finalists", _equal(0.8))
    models = stages.plan_finalists(baseline)
    assert models is not None
    assert list(models) == [4, 1], "and then no more, though two are left"
    assert not _waiting(stages, "finalists")


def test_the_tolerance_lowers_what_finalists_must_keep(make: Callable[..., Stages]) -> None:
    stages = make(tolerance=6.0, trials=3)
    baseline = _searched(stages, [(0.95, 0.6), (0.95, 0.8), (0.85, 0.99)])
    stages.plan_finalists(baseline)
    _train(stages, "finalists", _equal(0.85))
    models = stages.plan_finalists(baseline)
    assert models is not None
    assert list(models) == [2, 1]


def test_without_a_feasible_trial_there_are_no_finalists(make: Callable[..., Stages]) -> None:
    stages = make(trials=2)
    baseline = _searched(stages, [(0.85, 0.99), None])
    assert stages.plan_finalists(baseline) == {}
    assert not _waiting(stages, "finalists")


def test_only_missing_pairs_of_trial_and_seed_are_retrained(make: Callable[..., Stages]) -> None:
    """As when the paper's protocol comes on top of ours: every trial, on every seed, but nothing again."""
    stages = make()
    baseline = _searched(stages, SEARCH)
    stages.plan_finalists(baseline)
    _train(stages, "finalists", _equal())
    complete = [r for r in stages.records("search") if r.state == "complete"]
    assert [r.number for r in complete] == [0, 1, 2, 3, 4]
    assert stages.retrain(complete) is None
    queued = [(trial["source_trial"], trial["seed"]) for trial in _waiting(stages, "finalists")]
    assert queued == [(n, s) for n in (0, 2, 3) for s in (0, 1)]
    _train(stages, "finalists", _equal())
    models = stages.retrain(complete)
    assert models is not None
    assert {n: [r.seed for r in found] for n, found in models.items()} == {n: [0, 1] for n in range(5)}
    first = stages.plan_finalists(baseline)
    assert first == {n: models[n] for n in (4, 1)}, "our protocol's choice is as it was"


# --- studies within a study -------------------------------------------------------------------------------------------


def test_a_loss_looks_at_the_class_or_serves_all_classes() -> None:
    assert [loss for loss in get_args(Loss) if looks_at_class(loss)] == ["wce", "crwwce", "camri", "cosface-i"]


def test_one_search_serves_several_classes_and_each_chooses_for_itself(make: Callable[..., Stages]) -> None:
    study = make(finalists=1, trials=4)
    baseline = _baseline(study)
    study.adopt(baseline, (3, 5))
    study.plan_search(baseline)
    _train(study, "search", lambda number, *_: (0.95, (0.4, 0.9, 0.6, 0.2)[number]))
    assert [r.recall for r in study.records("search")] == pytest.approx([0.4, 0.1, 0.4, 0.2]), "the lowest of both"
    three, five = (Stages(study.config, study.data, study.store, important=(c,)) for c in (3, 5))
    assert [r.recall for r in three.records("search")] == pytest.approx([0.4, 0.9, 0.6, 0.2])
    assert [r.recall for r in five.records("search")] == pytest.approx([0.6, 0.1, 0.4, 0.8])
    assert three.plan_finalists(baseline) is None
    assert five.plan_finalists(baseline) is None
    queued = [(trial["source_trial"], trial["seed"]) for trial in _waiting(study, "finalists")]
    assert queued == [(1, 0), (1, 1), (3, 0), (3, 1)]
    _train(study, "finalists", _equal())
    again = Stages(study.config, study.data, study.store, important=(7,))  # recall 0.95 everywhere: the first wins
    assert again.plan_finalists(baseline) is None
    for stages, number in ((three, 1), (five, 3)):
        models = stages.plan_finalists(baseline)
        assert models is not None
        assert list(models) == [number]


def test_a_study_within_another_shares_its_baseline_and_its_checkpoints(make: Callable[..., Stages]) -> None:
    head = make(loss="ce")
    baseline = _baseline(head)
    storage = open_storage(storage_url(head.config))
    cells = []
    for name, loss in (("s.5.camri", "camri"), ("s.3.wce", "wce"), ("s.5.camri", "camri")):
        config = head.config.model_copy(update={"loss": loss, "name": name})
        cells.append(Stages(config, head.data, StudyStore.create(storage, config, head.data, within=head.store)))
    assert head.store.attributes["cells"] == ["s.3.wce", "s.5.camri"], "each once"
    camri, wce, _ = cells
    assert camri.plan_baseline() == wce.plan_baseline() == baseline
    assert not _waiting(head, "baseline")
    camri.adopt(baseline, (5,))
    wce.adopt(baseline, (3,))
    camri.plan_search(baseline)
    assert (len(camri.records("search")), len(wce.records("search")), len(head.records("search"))) == (6, 0, 0)
    assert [path.name for path in head.config.out.iterdir()] == ["s"], "one folder for all"

    # A worker opens them by name, with what each was made with.
    found = StudyStore.existing(open_storage(storage_url(head.config)), "s").cell("s.5.camri")
    assert (found.name, found.config.loss, found.attributes["baseline"]["important"]) == ("s.5.camri", "camri", [5])
    assert len(found.records("search")) == 6
    assert len(found.records("baseline")) == 6
    trial = found.claim("search")
    assert trial is not None
    weights = head.config.folder / "weights"
    weights.write_bytes(b"weights")
    found.save_checkpoint(trial, weights)
    assert head.store.fetch_checkpoint(camri.records("search")[0], weights.with_name("copy"))

    trial.set_user_attr("worker", worker_id(2**30))  # there is no such process
    # Whoever puts the study's queues in order puts theirs in order, too.
    assert wce.store.requeue_interrupted() == 0
    assert head.store.requeue_interrupted() == 1
    assert [r.state for r in camri.records("search")] == ["waiting"] * 6


def test_a_study_within_another_is_not_resumed_under_other_rules(make: Callable[..., Stages]) -> None:
    head = make(loss="ce")
    storage = open_storage(storage_url(head.config))
    config = head.config.model_copy(update={"loss": "wce", "name": "s.3.wce"})
    StudyStore.create(storage, config, head.data, within=head.store)
    with pytest.raises(StudyMismatchError, match=r"'s\.3\.wce' was started with loss = 'wce', not 'camri'"):
        StudyStore.create(storage, config.model_copy(update={"loss": "camri"}), head.data, within=head.store)


# --- waiting for stages -----------------------------------------------------------------------------------------------


class _Hands:
    """Stands in for the worker processes: all take up what waits, one training ends at each look, and it counts.

    It is the longest at work that ends, or any of them by `chance`; one of the search not before the baseline's floors
    are known.
    """

    def __init__(self, stages: Stages, outcome: Outcome, workers: int = 1, chance: random.Random | None = None) -> None:
        self.stages = stages
        self.outcome = outcome
        self.workers = workers
        self.chance = chance
        self.at_work: list[tuple[Stage, Callable[[], None]]] = []
        self.trained: list[Stage] = []
        self.idle = 0  # workers, at all looks together
        self.patience = 1_000

    def wait(self, finished: Callable[[], bool], on_tick: Callable[[], None]) -> None:
        while not finished():
            on_tick()
            for stage in STAGES:
                while len(self.at_work) < self.workers and (end := _begin_one(self.stages, stage, self.outcome)):
                    self.at_work.append((stage, end))
            assert self.at_work, "it waits for what nobody will do"
            self.idle += self.workers - len(self.at_work)
            known = "floors" in self.stages.store.attributes.get("baseline", {})
            able = [place for place, (stage, _) in enumerate(self.at_work) if known or stage == "baseline"]
            worked, end = self.at_work.pop(self.chance.choice(able) if self.chance else able[0])
            end()
            self.trained.append(worked)
            if len(self.trained) >= self.patience:
                raise KeyboardInterrupt
        on_tick()

    def crew(self, console: Console | None = None) -> Crew:
        schedule = Schedule({"baseline": 6, "search": 6, "finalists": 4}, epochs=1, workers=self.workers)
        heart = SimpleNamespace(lost=False)
        return Crew(
            cast(Workers, self), console or Console(quiet=True), self.stages.store, schedule, cast(Heart, heart)
        )


def _whole_run(stages: Stages, crew: Crew, folds: int = 1, *, named: bool = False) -> dict[int, list[TrialRecord]]:
    """Who is important is `named`, or known after a baseline on one split."""
    one = {"": stages}
    if named:
        stages.important = (3,)
    else:
        crew.carry_out("baseline", stages.plan_baseline, one)
        stages.important = (3,)
    baseline = crew.carry_out("baseline", lambda: stages.plan_baseline(folds), one)
    stages.adopt(baseline, (3,))
    crew.carry_out("search", lambda: stages.plan_search(baseline), one)
    return crew.carry_out("finalists", lambda: stages.plan_finalists(baseline), one)


def _by_stage(number: int, params: Mapping[str, float], attributes: Mapping[str, Any]) -> Scores:
    if "source_trial" in attributes:  # none of the first two finalists keeps accuracy
        return (0.95 if attributes["source_trial"] in (3, 0) else 0.8), 0.5
    return (0.9, 0.5) if "seed" in attributes else SEARCH[number]


def test_a_crew_carries_out_every_stage(make: Callable[..., Stages]) -> None:
    stages = make()
    hands = _Hands(stages, _by_stage)
    models = _whole_run(stages, hands.crew())
    assert list(models) == [4, 1, 3, 0]
    assert hands.trained == ["baseline"] * 6 + ["search"] * 6 + ["finalists"] * 8


@pytest.mark.parametrize(("workers", "chance"), [(2, None), (2, 1), (3, 2), (16, 1)])
@pytest.mark.parametrize("named", [True, False])
def test_several_workers_train_the_same_whichever_of_them_is_faster(
    named: bool, workers: int, chance: int | None, make: Callable[..., Stages]
) -> None:
    stages, alone = make(), make(name="alone")
    hands = _Hands(stages, _by_stage, workers, None if chance is None else random.Random(chance))
    models = _whole_run(stages, hands.crew(), named=named)
    assert list(models) == [4, 1, 3, 0]
    assert not hands.at_work
    assert [hands.trained.count(stage) for stage in STAGES] == [6, 6, 8]
    _whole_run(alone, _Hands(alone, _by_stage).crew())
    for stage in STAGES:
        theirs, ours = ({(r.number, *r.params.values(), r.fold) for r in s.records(stage)} for s in (alone, stages))
        assert ours == theirs or stage == "finalists", "whose numbers are those of the order in which they were sure"


@pytest.mark.parametrize(("named", "idle"), [(True, 0), (False, 1)])
def test_no_worker_waits_for_the_last_trial_of_a_search_nor_for_the_last_seed(
    named: bool, idle: int, make: Callable[..., Stages]
) -> None:
    """One waits at the very end, and beside the last of the baseline's three seeds where that has to say who is
    important: of five trials and two finalists, eleven trainings, the last is alone.
    """
    stages = make(trials=5, seeds=3)
    scores: list[Scores] = [(0.95, 0.6), (0.95, 0.9), (0.95, 0.8), (0.95, 0.7), (0.95, 0.5)]

    def outcome(number: int, _: Mapping[str, float], attributes: Mapping[str, Any]) -> Scores:
        return (0.95, 0.5) if "seed" in attributes else scores[number]

    hands = _Hands(stages, outcome, workers=2)
    assert list(_whole_run(stages, hands.crew(), named=named)) == [1, 2]
    assert [hands.trained.count(stage) for stage in STAGES] == [4 + 3, 5, 6]
    assert hands.idle == idle + 1 + 1, "and while the baseline's last rate is tried"


@pytest.mark.parametrize(("trials", "begun"), [(9, 6), (4, 4)])
def test_the_searchs_starting_points_are_queued_with_the_baselines_seeds(
    trials: int, begun: int, make: Callable[..., Stages]
) -> None:
    """Where it is known by then who is important, for that is what a trial needs to be trained; a floor it does not."""
    stages = make(trials=trials)
    stages.important = (3,)
    assert stages.plan_baseline(2) is None
    assert not _waiting(stages, "search"), "its learning rates are about the baseline's"
    _train(stages, "baseline", _equal())
    for _ in range(2):
        assert stages.plan_baseline(2) is None
        assert _waiting(stages, "search") == starting_points(StudyConfig(), (3,), 10, RATE)[:begun]
        assert stages.store.attributes["baseline"] == {"important": [3], "folds": 2, "learning_rate": RATE}
    plan = Plan(stages.config, stages.data, CPU).as_stored(stages.store)
    assert (plan.important, plan.folds, plan.baseline_learning_rate, plan.floors) == ((3,), 2, RATE, ())

    _train(stages, "baseline", _equal())
    baseline = stages.plan_baseline(2)
    assert baseline is not None
    stages.adopt(baseline, (3,))
    assert Plan(stages.config, stages.data, CPU).as_stored(stages.store).floors == pytest.approx((0.9, 0.9))
    stages.plan_search(baseline)
    assert _waiting(stages, "search") == [
        *starting_points(StudyConfig(), (3,), 10, RATE)[:begun],
        *[{}] * (trials - begun),
    ]


def test_while_nobody_knows_who_is_important_nothing_of_the_search_is_queued(make: Callable[..., Stages]) -> None:
    stages = make()
    _baseline(stages)
    assert not stages.records("search")


def test_who_will_be_a_finalist_whatever_is_left_is_queued_before_the_search_ends(make: Callable[..., Stages]) -> None:
    stages = make(trials=5, finalists=3, seeds=1)
    baseline = _baseline(stages)
    stages.adopt(baseline, (3,))
    assert stages.plan_search(baseline) is None
    ends = [_begin_one(stages, "search", lambda number, *_: (0.95, number / 10)) for _ in range(5)]

    def queued_after(ended: int) -> list[int]:
        end = ends[ended - 1]
        assert end is not None
        end()
        trials = stages.plan_search(baseline)
        assert (trials is None) == (ended < 5)
        return [trial["source_trial"] for trial in _waiting(stages, "finalists")]

    assert queued_after(1) == []
    assert queued_after(2) == [], "three are left, and could all be better"
    assert queued_after(3) == [2]
    assert queued_after(4) == [2, 3], "trial 1 would be a finalist now, and may not be one"
    assert queued_after(5) == [2, 3, 4]
    assert stages.plan_finalists(baseline) is None
    assert _train(stages, "finalists", _equal(0.95)) == 3
    models = stages.plan_finalists(baseline)
    assert models is not None
    assert list(models) == [4, 3, 2]


def test_a_failed_seed_is_shown_before_the_run_ends_with_it(
    make: Callable[..., Stages], capsys: pytest.CaptureFixture[str]
) -> None:
    stages = make()
    hands = _Hands(stages, lambda _, __, attributes: None if attributes["seed"] == 1 else (0.9, 0.5))
    crew = hands.crew(Console())
    with pytest.raises(CamriTuneError, match="training with seed 1 failed"):
        crew.carry_out("baseline", stages.plan_baseline, {"": stages})
    assert re.search(r"Baseline .* #5: failed, boom 5", capsys.readouterr().err)


def test_a_dashboards_note_is_written_for_a_small_share_of_the_time(
    make: Callable[..., Stages], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes longer the more trials there are."""
    clock, written = [0.0], []

    def look(_store: StudyStore, _console: Console) -> None:
        written.append(clock[0])
        clock[0] += 3.0

    monkeypatch.setattr(stages_module, "show", look)
    monkeypatch.setattr(stages_module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    stages = make()
    crew = _Hands(stages, _by_stage).crew()
    stages.store.enqueue("search", {})

    def wait(finished: Callable[[], bool], on_tick: Callable[[], None]) -> None:
        while not finished() and clock[0] < 130:
            on_tick()
            clock[0] += 1.0

    monkeypatch.setattr(crew, "_workers", SimpleNamespace(wait=wait))
    crew.carry_out("search", lambda: True, {"": stages})
    assert written == [0.0, 60.0, 120.0, clock[0] - 3.0], "every twentieth of the time, and at the end"


@pytest.mark.parametrize(
    ("after", "folds", "named"),
    [
        *((after, 1, False) for after in (1, 4, 8, 12, 16, 18)),
        *((after, 3, False) for after in (5, 7, 11, 17)),
        *((5, 1, True), (6, 1, True), (6, 3, True), (12, 3, True)),
    ],
)
def test_a_run_that_is_stopped_anywhere_goes_on_where_it_was(
    after: int, folds: int, named: bool, make: Callable[..., Stages]
) -> None:
    everything = ["baseline"] * (4 + max(2, folds) if named else 6 + folds - 1) + ["search"] * 6 + ["finalists"] * 8
    first = make()
    hands = _Hands(first, _by_stage)
    hands.patience = after
    with pytest.raises(KeyboardInterrupt):
        _whole_run(first, hands.crew(), folds, named=named)
    again = make()
    more = _Hands(again, _by_stage)
    models = _whole_run(again, more.crew(), folds, named=named)
    assert list(models) == [4, 1, 3, 0]
    assert {tuple((r.seed, r.fold) for r in found) for found in models.values()} == {((0, 0), (1, 1 % folds))}
    assert hands.trained + more.trained == everything
    third = make()
    nothing = _Hands(third, _by_stage)
    _whole_run(third, nothing.crew(), folds, named=named)
    assert nothing.trained == []


def test_a_folder_has_one_run_at_a_time(tmp_path: Path) -> None:
    with (
        only_run(tmp_path),
        pytest.raises(InputError, match=r"another run works on .* now; .*--name"),
        only_run(tmp_path),
    ):
        pass
    with only_run(tmp_path):
        pass


@pytest.mark.parametrize(
    ("changes", "cores", "places"),
    [
        ({}, 16, ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]),
        ({}, 3, ["cuda:0", "cuda:1"]),
        ({"model": "torchvision:resnet18"}, 16, ["cuda:0", "cuda:1"]),
        ({"model": "paper-cnn"}, 16, ["cuda:0", "cuda:1"]),
        ({"model": "wide"}, 16, ["cuda:0", "cuda:1"]),
        ({"model": "torchvision:resnet18", "workers_per_gpu": 2}, 1, ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]),
        ({"workers_per_gpu": "1"}, 16, ["cuda:0", "cuda:1"]),
        ({"workers": 3}, 16, ["cuda:0", "cuda:1", "cuda:0"]),
        ({"device": "cuda:1"}, 2, ["cuda:1", "cuda:1"]),
        ({"device": "cpu"}, 3, ["cpu"] * 3),
    ],
)
def test_trainings_of_the_small_network_share_a_gpu_by_twos_where_there_are_cores(
    changes: dict[str, Any], cores: int, places: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("camri_tune.workers.cpu_count", lambda: cores)
    config = StudyConfig.build({"device": "cuda", **changes})
    assert places_for(config, torch.device(config.device), 2) == places
