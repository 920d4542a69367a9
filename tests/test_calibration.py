"""Temperatures are those of highest likelihood, and what is said of probabilities is what the counts show."""

import json
import math
from typing import cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import special

from camri_tune.calibration import (
    BINS,
    HIGHEST_TEMPERATURE,
    LOWEST_TEMPERATURE,
    Calibration,
    Reliability,
    fit_temperature,
    negative_log_likelihood,
    probabilities,
)
from camri_tune.config import Loss, StudyConfig
from camri_tune.datasets import Dataset, open_dataset
from camri_tune.evaluation import Judge
from camri_tune.images import Images
from camri_tune.records import TrialRecord
from camri_tune.storage import StudyStore
from tests.opening import same


def _sample(seed: int, n: int, classes: int, temperature: float) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Logits, and labels drawn from their softmax over a temperature."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (n, classes)).astype(np.float32)
    chances = special.softmax(logits.astype(np.float64) / temperature, axis=1)
    return logits, np.array([rng.choice(classes, p=row) for row in chances])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_that_labels_were_drawn_at_is_found(temperature: float) -> None:
    logits, labels = _sample(0, 20_000, 5, temperature)
    assert fit_temperature(logits, labels) == pytest.approx(temperature, rel=0.05)


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 60), st.integers(2, 6), st.floats(0.2, 5))
def test_no_other_temperature_is_likelier(seed: int, n: int, classes: int, true: float) -> None:
    """Naively, on a grid: the images' likelihood, and that of one image more of any class."""
    logits, labels = _sample(seed, n, classes, true)

    def cost(temperature: float) -> float:
        logs = [math.log(max(p, 1e-300)) for p in probabilities(logits, temperature)[np.arange(n), labels]]
        anybody = special.log_softmax(logits.astype(np.float64) / temperature, axis=1).mean()
        return -sum(logs) - float(anybody)

    found = fit_temperature(logits, labels)
    assert LOWEST_TEMPERATURE <= found <= HIGHEST_TEMPERATURE
    assert cost(found) <= min(cost(t) for t in np.geomspace(0.05, 100, 60)) + 1e-6


@settings(deadline=None)
@given(st.integers(0, 10**6), st.floats(0.25, 4))
def test_multiplied_logits_have_a_multiplied_temperature(seed: int, factor: float) -> None:
    logits, labels = _sample(seed, 50, 4, 1.0)
    assert fit_temperature(logits * factor, labels) == pytest.approx(factor * fit_temperature(logits, labels), rel=1e-3)


def test_a_model_without_an_error_is_not_certain_of_everything() -> None:
    labels = np.arange(100) % 4
    logits = np.eye(4, dtype=np.float32)[labels] * 8
    surest = probabilities(logits, fit_temperature(logits, labels)).max()
    assert 0.98 < surest < 0.9999, "one image in a hundred, and no certainty"


@pytest.mark.parametrize("logits", [np.zeros((0, 3)), np.array([[0.0, math.nan]]), np.array([[0.0, math.inf]])])
def test_what_no_temperature_fits_is_refused(logits: NDArray[np.float64]) -> None:
    with pytest.raises(ValueError, match="finite"):
        fit_temperature(logits, np.zeros(len(logits), np.int64))


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=80))
def test_the_calibration_error_is_that_of_its_definition(pairs: list[tuple[float, bool]]) -> None:
    found = Reliability.of(np.array([p for p, _ in pairs]), np.array([t for _, t in pairs]))
    total = 0.0
    for b in range(BINS):
        mine = [(p, t) for p, t in pairs if int(p * BINS) == b or (b == BINS - 1 and p == 1)]
        if mine:
            total += abs(sum(p for p, _ in mine) - sum(t for _, t in mine)) / len(pairs)
    assert found.error == pytest.approx(total, abs=1e-9)
    assert sum(b.n for b in found.bins) == len(pairs)
    assert 0 <= found.error <= 1


def test_a_bias_decides_and_is_in_no_probability() -> None:
    logits, labels = np.array([[1.0, 0.0], [0.0, 2.0]]), np.array([1, 1])
    plain = Calibration.of(logits, labels, temperature=2.0, bias={}, important=(1,))
    biased = Calibration.of(logits, labels, temperature=2.0, bias={1: 1.5}, important=(1,))
    assert (plain.nll, plain.of_class) == (biased.nll, biased.of_class)
    sure = [1 / (1 + math.exp(-0.5)), 1 / (1 + math.exp(-1))]
    error = (sure[0] + (1 - sure[1])) / 2  # each in a bin of its own
    assert plain.decided.error == pytest.approx(error), "decided for the likelier, of which the second was right"
    assert biased.decided.error == pytest.approx(error), "decided for the less likely, and so the other way round"
    assert sorted(b.probability for b in biased.decided.bins) == pytest.approx(sorted([1 - sure[0], sure[1]]))
    assert negative_log_likelihood(logits, labels, 2.0) == pytest.approx(plain.nll)
    assert plain.nll == pytest.approx(-(math.log(1 - sure[0]) + math.log(sure[1])) / 2)


def test_before_is_a_plain_softmax_and_all_of_it_is_json() -> None:
    logits, labels = _sample(1, 400, 3, 2.5)
    found = Calibration.of(logits, labels, temperature=2.5, bias={}, important=(0, 2), fitted_on=9)
    same = Calibration.of(logits, labels, temperature=1.0, bias={}, important=(0, 2))
    assert (found.nll_before, found.decided_before, found.of_class_before) == (same.nll, same.decided, same.of_class)
    assert found.nll < found.nll_before
    assert found.decided.error < found.decided_before.error
    stored = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert stored["decided"]["expected_calibration_error"] == found.decided.error
    assert stored["before"]["negative_log_likelihood"] == found.nll_before
    assert (stored["temperature"], stored["fitted_on"], stored["n"]) == (2.5, 9, 400)


class _Listening(Judge):
    """Answers as any model could, and remembers what it was asked."""

    asked: list[tuple[dict[str, float], Images]]
    worst = 0.0

    def logits(self, record: TrialRecord, loss: Loss, images: Images) -> torch.Tensor | None:
        self.asked.append((record.params, images))
        logits = torch.randn((len(images), 10), generator=torch.Generator().manual_seed(len(self.asked)))
        logits[0, 0] += self.worst
        return logits


def _judge(data: Dataset) -> _Listening:
    judge = _Listening(data, cast("StudyStore", None), (8,), "compact", torch.device("cpu"))  # nothing is fetched
    judge.asked = []
    return judge


def test_a_temperature_is_fitted_on_images_that_the_model_was_not_trained_on_without_its_bias() -> None:
    data = open_dataset(StudyConfig(folds=3))
    judge = _judge(data)
    record = TrialRecord(3, "complete", {"scale": 9.0, "bias_8": 50.0}, fold=2)
    found = judge.calibration(record, "camri")
    assert found is not None
    assert [params for params, _ in judge.asked] == [{"scale": 9.0}] * 2
    training, validation = data.fold(2)
    held_out, unseen = (images for _, images in judge.asked)
    assert same(held_out, validation)
    assert same(unseen, data.test())
    assert held_out.rows is not None
    assert training.rows is not None
    assert not set(held_out.rows.tolist()) & set(training.rows.tolist())
    assert not same(held_out, data.validation), "which is of the first fold"
    assert (found.fitted_on, found.n) == (len(validation), len(unseen))
    decided_for_8 = (unseen.labels == 8).float().mean().item()
    share = sum(b.n * b.share for b in found.decided.bins) / found.n
    assert share == pytest.approx(decided_for_8), "a bias of 50 decides for one class, always"


@pytest.mark.parametrize("worst", [math.nan, math.inf])
def test_logits_that_are_no_numbers_have_no_calibration(worst: float) -> None:
    judge = _judge(open_dataset(StudyConfig()))
    judge.worst = worst
    assert judge.calibration(TrialRecord(3, "complete", {"scale": 9.0}), "camri") is None
