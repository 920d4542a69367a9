"""Probabilities that mean something: a temperature fitted on validation, and how well it holds on other images. Pure
NumPy and SciPy.

Softmax of a cosine head of any scale, trained with a margin, says who wins and not how surely. Divided by one
temperature the logits keep their order and become as sure as they are right (Guo et al., ICML 2017).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import special

LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.01, 100.0
BINS = 15  # as in Guo et al.

Logits = NDArray[np.floating[Any]]


class Bin(NamedTuple):
    """Images whose probability lies in one stretch of [0, 1]: how many, their mean probability, and the share that
    came true."""

    n: int
    probability: float
    share: float


@dataclass(frozen=True)
class Reliability:
    """Stated probabilities beside what came true, in `BINS` stretches of equal width; those without images are left
    out."""

    bins: tuple[Bin, ...]

    @classmethod
    def of(cls, probability: NDArray[np.float64], true: NDArray[np.bool_]) -> "Reliability":
        """From the probability (N,) of something on each image, and whether it was so (N,)."""
        place = np.minimum((probability * BINS).astype(np.int64), BINS - 1)
        filled = np.unique(place)
        chosen = [place == b for b in filled]
        return cls(tuple(Bin(int(c.sum()), float(probability[c].mean()), float(true[c].mean())) for c in chosen))

    @property
    def error(self) -> float:
        """Expected calibration error: how far stated and true shares lie apart in a bin, in the mean over images."""
        return sum(b.n * abs(b.probability - b.share) for b in self.bins) / sum(b.n for b in self.bins)

    def as_json(self) -> dict[str, Any]:
        return {"expected_calibration_error": self.error, "bins": [b._asdict() for b in self.bins]}


@dataclass(frozen=True)
class Calibration:
    """What n images say of probabilities at a temperature, beside those of a plain softmax (`before`).

    `nll` is the mean negative log-likelihood of the true class; `decided` is about the class that the model decides
    for, `of_class` about one class against all others. `fitted_on` is how many validation images chose the temperature.
    """

    temperature: float
    fitted_on: int | None
    n: int
    nll: float
    nll_before: float
    decided: Reliability
    decided_before: Reliability
    of_class: Mapping[int, Reliability]
    of_class_before: Mapping[int, Reliability]

    @classmethod
    def of(
        cls,
        logits: Logits,
        labels: NDArray[np.int64],
        *,
        temperature: float,
        bias: Mapping[int, float],
        important: Sequence[int],
        fitted_on: int | None = None,
    ) -> "Calibration":
        """From logits (N, C) without the `bias` by class that a decision adds to them, and labels (N,)."""
        biased = logits.astype(np.float64)
        for c, value in bias.items():
            biased[:, c] += value
        decided, rows = biased.argmax(axis=1), np.arange(len(labels))
        after, before = probabilities(logits, temperature), probabilities(logits, 1.0)
        right = decided == labels
        return cls(
            temperature=temperature,
            fitted_on=fitted_on,
            n=len(labels),
            nll=negative_log_likelihood(logits, labels, temperature),
            nll_before=negative_log_likelihood(logits, labels, 1.0),
            decided=Reliability.of(after[rows, decided], right),
            decided_before=Reliability.of(before[rows, decided], right),
            of_class={c: Reliability.of(after[:, c], labels == c) for c in important},
            of_class_before={c: Reliability.of(before[:, c], labels == c) for c in important},
        )

    def as_json(self) -> dict[str, Any]:
        return {
            "temperature": self.temperature,
            "fitted_on": self.fitted_on,
            "n": self.n,
            "negative_log_likelihood": self.nll,
            "decided": self.decided.as_json(),
            "of_class": {str(c): found.as_json() for c, found in self.of_class.items()},
            "before": {
                "temperature": 1.0,
                "negative_log_likelihood": self.nll_before,
                "decided": self.decided_before.as_json(),
                "of_class": {str(c): found.as_json() for c, found in self.of_class_before.items()},
            },
        }


def probabilities(logits: Logits, temperature: float) -> NDArray[np.float64]:
    """Softmax (N, C) of logits (N, C) over a temperature."""
    found: NDArray[np.float64] = special.softmax(logits.astype(np.float64) / temperature, axis=1)
    return found


def negative_log_likelihood(logits: Logits, labels: NDArray[np.int64], temperature: float) -> float:
    """Mean over images of -log of the probability of the true class; logits (N, C), labels (N,)."""
    return -float(_log_probabilities(logits, temperature)[np.arange(len(labels)), labels].mean())


def fit_temperature(logits: Logits, labels: NDArray[np.int64]) -> float:
    """The temperature of highest likelihood on held-out logits (N, C) with labels (N,), within bounds.

    As in Platt's scaling one image more is counted, whose class may be any: a model without an error on these images
    would else be certain of everything. Its logits are the mean image's, so that multiplied logits have a multiplied
    temperature. ValueError where there are no images, or logits that are not finite.
    """
    from scipy import optimize  # noqa: PLC0415 - slow to import, and workers fit nothing

    if not len(labels) or not np.isfinite(logits).all():
        raise ValueError(f"logits {logits.shape} must be finite, and of at least one image")
    rows = np.arange(len(labels))

    def cost(log_temperature: float) -> float:
        logs = _log_probabilities(logits, math.exp(log_temperature))
        return -float(logs[rows, labels].sum() + logs.mean())

    bounds = math.log(LOWEST_TEMPERATURE), math.log(HIGHEST_TEMPERATURE)
    # Convex in 1/T, so that there is one minimum.
    found = optimize.minimize_scalar(cost, bounds=bounds, method="bounded", options={"xatol": 1e-6})
    return float(min(max(math.exp(found.x), LOWEST_TEMPERATURE), HIGHEST_TEMPERATURE))


def _log_probabilities(logits: Logits, temperature: float) -> NDArray[np.float64]:
    found: NDArray[np.float64] = special.log_softmax(logits.astype(np.float64) / temperature, axis=1)
    return found
