"""CAMRI in an Optuna study of one's own, and its loss in training loops that people already have."""

import doctest
import importlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import lightning
import numpy as np
import optuna
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike
from optuna.trial import Trial, TrialState
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import camri_tune
from camri_tune import ConstrainedObjective
from camri_tune.errors import InputError
from camri_tune.losses import CAMRILoss

Answers = tuple[Sequence[int], Sequence[int]]


def _objective(measure: Any, important: ArrayLike = 1, floor: float = 0.0) -> ConstrainedObjective:
    return ConstrainedObjective(measure, important=important, floor=floor, num_classes=3, learning_rate=1e-3)


@pytest.fixture(autouse=True)
def _quiet_and_small() -> Iterator[None]:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small networks gain nothing from more, and lose much where others work
    yield
    torch.set_num_threads(threads)


def _study(objective: ConstrainedObjective, trials: int) -> optuna.Study:
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(objective, n_trials=trials)
    return study


def test_classes_may_be_numpys_numbers_and_nothing_else_than_numbers() -> None:
    right: list[Any] = [np.int64(1), np.array(1), [np.int64(1), 1], np.array([1])]
    for important in right:
        assert _objective(lambda *_: ([], []), important).important == (1,)
    others: list[Any] = ["1", 1.0, [0, "b"], None, np.array([0.5])]
    for wrong in others:
        with pytest.raises(InputError, match="must be a class's index, or several"):
            _objective(lambda *_: ([], []), wrong)


def test_a_trial_carries_recall_accuracy_and_its_constraint() -> None:
    labels, predictions = [0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 0]
    study = _study(_objective(lambda *_: (labels, predictions), 1, 0.75), 1)
    (trial,) = study.trials
    assert trial.value == 0.75
    assert trial.user_attrs == {"accuracy": 4 / 6, "recall_per_class": [0.5, 0.75, None]}, "class 2 has no image"
    assert trial.constraints == {"accuracy": pytest.approx(0.75 - 4 / 6)}
    assert set(trial.params) == {"learning_rate", "scale", "margin"}
    assert 1e-3 / 4 <= trial.params["learning_rate"] <= 4e-3


def test_with_several_important_classes_the_worst_one_counts_and_each_has_a_margin() -> None:
    seen: list[Mapping[str, float]] = []

    def measure(trial: Trial, params: Mapping[str, float]) -> Answers:
        seen.append(params)
        return [0, 0, 1, 1, 2], [0, 2, 1, 1, 2]

    study = _study(_objective(measure, [1, 0], 0.0), 1)
    assert study.trials[0].value == 0.5
    assert set(seen[0]) == {"learning_rate", "scale", "margin_0", "margin_1"}


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10), st.integers(0, 10)), min_size=1, max_size=8), st.integers(0, 20))
def test_the_best_trial_keeps_the_floor_and_no_other_that_does_is_better(
    trials: list[tuple[int, int]], floor: int
) -> None:
    """Each trial gets so many of ten images of either class right."""
    answers = iter(trials)

    def measure(trial: Trial, _: Mapping[str, float]) -> Answers:
        other, own = next(answers)
        return [0] * 10 + [1] * 10, [0] * other + [1] * (10 - other) + [1] * own + [0] * (10 - own)

    objective = _objective(measure, 1, floor / 20)
    best = objective.best_trial(_study(objective, len(trials)))
    kept = [(own, own + other) for other, own in trials if own + other >= floor]
    if not kept:
        assert best is None
    else:
        assert best is not None
        assert trials[best.number] == (max(kept)[1] - max(kept)[0], max(kept)[0])


@pytest.mark.parametrize("right", [11, 15, 19])
def test_who_is_as_good_as_the_floor_keeps_it(right: int) -> None:
    """Also where that is a mean over seeds, which rounds: that of three times 0.76 is 0.7600000000000001."""

    def measure(*_: object) -> Answers:
        return [0] * 20 + [1] * 5, [0] * right + [1] * (20 - right) + [1] * 4 + [0]

    share = (right + 4) / 25
    floor = math.nextafter(float(np.mean([share] * 3)), 1.0)
    objective = _objective(measure, 1, floor)
    assert objective.best_trial(_study(objective, 1)) is not None
    above = _objective(measure, 1, (right + 5) / 25)
    assert above.best_trial(_study(above, 1)) is None
    assert above.best_trial(_study(objective, 1)) is None, "a floor that was raised since holds for all trials"


def test_a_study_that_goes_on_tries_no_starting_point_twice(tmp_path: Path) -> None:
    def measure(*_: object) -> Answers:
        return [1, 0], [1, 0]

    for _ in range(2):  # another process each time
        study = optuna.create_study(storage=f"sqlite:///{tmp_path / 's.db'}", study_name="s", load_if_exists=True)
        objective = _objective(measure, 1, 0.0)
        objective.enqueue(study)
        study.optimize(objective, n_trials=4)
    tried = [tuple(sorted(trial.params.items())) for trial in study.trials if trial.state == TrialState.COMPLETE]
    assert len(tried) == len(set(tried)) == 8


def test_a_loss_that_there_is_none_of_is_named() -> None:
    with pytest.raises(InputError, match="'focal', but should be 'ce', 'wce'"):
        ConstrainedObjective(
            lambda *_: ([], []), important=1, floor=0.5, num_classes=2, learning_rate=1e-3, loss=cast("Any", "focal")
        )


def test_a_trial_that_failed_is_never_the_best() -> None:
    def measure(trial: Trial, _: Mapping[str, float]) -> Answers:
        if trial.number == 0:
            raise RuntimeError
        return [1, 0], [0, 0]

    objective = _objective(measure, 1, 0.0)
    study = optuna.create_study(direction="maximize")
    objective.enqueue(study)
    waiting = len(study.get_trials(states=(TrialState.WAITING,)))
    study.optimize(objective, n_trials=waiting, catch=(RuntimeError,))
    assert waiting >= 3
    best = objective.best_trial(study)
    assert best is not None
    assert best.number > 0


@pytest.mark.parametrize("constraint", [None, "latency"])
def test_trials_of_another_objective_are_none_of_its_own(constraint: str | None) -> None:
    """A study that somebody has had may hold some, with attributes and constraints of theirs."""
    ranges: dict[str, Any] = {"margin": optuna.distributions.FloatDistribution(0.0, 0.6)}

    def measure(trial: Trial, params: Mapping[str, float]) -> Answers:
        return [0] * 3 + [1] * 4, [0] * 3 + [1] * 3 + [0]

    objective = _objective(measure, 1, 0.5)
    study = optuna.create_study(direction="maximize", sampler=objective.sampler(seed=0))
    for margin in np.linspace(0, 0.6, 10):
        theirs = optuna.trial.create_trial(
            value=0.99, params={"margin": margin}, distributions=ranges, user_attrs={"accuracy": 0.4}
        )
        if constraint is not None:
            theirs.set_constraint(constraint, -1.0)
        study.add_trial(theirs)
    assert objective.best_trial(study) is None
    study.optimize(objective, n_trials=9)
    best = objective.best_trial(study)
    assert best is not None
    assert best.number >= 10


def test_its_sampler_stays_away_from_what_misses_the_floor() -> None:
    """Recall rises with the margin, and accuracy falls below the floor from a margin of 0.25 on."""

    def measure(trial: Trial, params: Mapping[str, float]) -> Answers:
        caught, kept = round(100 * (0.5 + 0.5 * params["margin"])), round(100 * (1 - params["margin"]))
        return [0] * 100 + [1] * 100, [0] * kept + [1] * (100 - kept) + [1] * caught + [0] * (100 - caught)

    objective = _objective(measure, 1, (1.5 - 0.5 * 0.25) / 2)
    study = optuna.create_study(direction="maximize", sampler=objective.sampler(seed=0))
    study.optimize(objective, n_trials=12)
    margins = [trial.params["margin"] for trial in study.trials]
    assert min(abs(np.array(margins[6:]) - 0.25)) < 0.02, "it finds the edge"
    assert sum(margin > 0.4 for margin in margins[6:]) <= 2, "instead of what would be best without the floor"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"important": 3}, "important is 3, but must name classes from 0 to 2"),
        ({"important": ()}, r"important is \(\), but must name"),
        ({"floor": 98.0}, "floor is 98.0, but must be a share of right answers, from 0 to 1"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0, but must be a positive number"),
    ],
)
def test_arguments_that_do_not_fit_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ConstrainedObjective(
            lambda *_: ([], []), **{"important": 1, "floor": 0.5, "num_classes": 3, "learning_rate": 1e-3} | arguments
        )


@pytest.mark.parametrize(
    ("labels", "predictions", "message"),
    [
        ([0, 1], [0], "returned 2 labels, but 1 predictions; give as many"),
        ([0, 1], [0.0, 1.0], r"predictions of shape \(2,\) and type float64; they must be integers"),
        ([0, 1], torch.zeros(2, 3), r"predictions of shape \(2, 3\)"),
        ([0, 3], [0, 0], "labels from 0 to 3; classes are 0 to 2"),
        ([0, 2], [0, 0], "no label is the important class 1"),
    ],
)
def test_answers_that_do_not_fit_are_named(labels: Any, predictions: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        _study(_objective(lambda *_: (labels, predictions), 1, 0.5), 1)


@pytest.mark.parametrize("name", ["objective"])
def test_the_examples_in_docstrings_run(name: str) -> None:
    found = doctest.testmod(importlib.import_module(f"camri_tune.{name}"))
    assert found.attempted > 0
    assert not found.failed


def test_everything_promised_can_be_imported_from_the_package() -> None:
    assert all(getattr(camri_tune, name) is not None for name in camri_tune.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        camri_tune.nothing  # noqa: B018


# --- the loss where people already train ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> dict[str, Tensor]:
    """Images (N, 64) and labels (N,) of scikit-learn's digits: the first 1,000 to train on, the rest to validate on."""
    found = load_digits()
    images, labels = torch.tensor(found.data / 16, dtype=torch.float32), torch.tensor(found.target)
    return {"x": images[:1000], "y": labels[:1000], "x_validation": images[1000:], "y_validation": labels[1000:]}


def _body() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))


def test_in_plain_pytorch_and_in_an_existing_optuna_objective(digits: dict[str, Tensor]) -> None:
    def fit(criterion: CAMRILoss, learning_rate: float) -> Tensor:
        """What somebody's own training may look like. Returns predictions."""
        body = _body()
        optimizer = torch.optim.Adam([*body.parameters(), *criterion.parameters()], lr=learning_rate)
        for _ in range(12):
            for rows in torch.randperm(1000).view(20, 50):
                loss = criterion(body(digits["x"][rows]), digits["y"][rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        with torch.no_grad():
            return criterion.get_logits(body(digits["x_validation"])).argmax(dim=1)

    def measure(trial: Trial, params: Mapping[str, float]) -> tuple[Tensor, Tensor]:
        torch.manual_seed(trial.number)
        criterion = CAMRILoss(10, 32, margin={8: params["margin"]}, scale=params["scale"])
        return digits["y_validation"], fit(criterion, params["learning_rate"])

    objective = ConstrainedObjective(measure, important=8, floor=0.85, num_classes=10, learning_rate=2e-3)
    study = optuna.create_study(direction="maximize", sampler=objective.sampler(seed=0))
    objective.enqueue(study)
    study.optimize(objective, n_trials=3)
    best = objective.best_trial(study)
    assert best is not None, "the authors' own settings keep 85 % here"
    assert best.user_attrs["accuracy"] >= 0.85
    assert best.value == best.user_attrs["recall_per_class"][8]


class _Lit(lightning.LightningModule):
    """A Lightning module as people have it, with its cross-entropy replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.body = _body()
        self.criterion = CAMRILoss(10, 32, margin={8: 0.2}, scale=16.0)

    def forward(self, images: Tensor) -> Tensor:
        return self.criterion.get_logits(self.body(images))

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        images, labels = batch
        loss: Tensor = self.criterion(self.body(images), labels)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=2e-3)


@pytest.mark.filterwarnings("ignore")  # Lightning's own, of loaders, loggers and what Python deprecates
def test_in_lightning(digits: dict[str, Tensor], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = _Lit()
    trainer = lightning.Trainer(
        max_epochs=8,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(model, DataLoader(TensorDataset(digits["x"], digits["y"]), batch_size=50, shuffle=True))
    trained = model.eval()
    with torch.no_grad():
        right = trained(digits["x_validation"]).argmax(dim=1) == digits["y_validation"]
    assert right.float().mean() > 0.8, "it learns"
    assert {name.split(".")[0] for name in trained.state_dict()} == {"body", "criterion"}, "the head is saved with it"
