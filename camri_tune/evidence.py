"""What the final judgement saw, kept for the report: each test image's answers and place before and after.

One safetensors file in the study's folder, so that the report can be written again without models or data.
"""

import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from camri_tune.metrics import confusion_matrix

BEFORE, AFTER = 0, 1  # the baseline model and the exported one
SHOWN = 48  # images of each kind that a report shows
SIDE = 64  # pixels; larger images are shrunk to it
_DTYPES = [np.int64, np.int64, np.float32, np.float32, np.int64, np.uint8]  # of the fields below


@dataclass(frozen=True)
class Evidence:
    """N test images under the baseline model (first) and the exported one (second).

    `answers` (2, N) are predicted classes. `to_important` and `to_other` (2, N) are angles in degrees from an image's
    embedding to the important class's weight (its own, or the nearest, with several) and to the nearest other one.
    `rows` (K,) are the images that are shown, and `pixels` uint8 (K, C, S, S) what they look like.
    """

    labels: NDArray[np.int64]
    answers: NDArray[np.int64]
    to_important: NDArray[np.float32]
    to_other: NDArray[np.float32]
    rows: NDArray[np.int64]
    pixels: NDArray[np.uint8]

    def confusion(self, side: int, num_classes: int) -> NDArray[np.int64]:
        """Counts (C, C) of one model: row = true class, column = predicted class."""
        return confusion_matrix(self.labels, self.answers[side], num_classes)

    def save(self, path: Path) -> None:
        """Write the file whole or not at all."""
        partial = path.with_suffix(".partial")
        save_file({name: np.ascontiguousarray(value) for name, value in asdict(self).items()}, partial)
        partial.chmod(0o644)  # the library makes it private; it is as readable as what stands around it
        os.replace(partial, path)

    @classmethod
    def load(cls, path: Path, num_classes: int) -> "Evidence | None":
        """Read it; None where it is missing, or is no such file of so many classes."""
        try:
            if not path.is_file():  # to open a pipe would wait for somebody to write
                return None
            found = cls(**load_file(path))
        except (OSError, SafetensorError, TypeError, AttributeError):  # the last from a type that NumPy lacks
            return None
        return found if found._fits(num_classes) else None

    def _fits(self, num_classes: int) -> bool:
        n = self.labels.size
        classes = np.concatenate([self.labels.ravel(), self.answers.ravel()])
        return (
            [value.dtype for value in vars(self).values()] == _DTYPES
            and self.labels.shape == (n,)
            and self.answers.shape == self.to_important.shape == self.to_other.shape == (2, n)
            and self.rows.shape == self.pixels.shape[:1]
            and self.pixels.ndim == 4
            and self.pixels.shape[1] in (1, 3)
            and bool(np.isfinite([self.to_important, self.to_other]).all())
            and bool(((classes >= 0) & (classes < num_classes)).all())
            and bool(((self.rows >= 0) & (self.rows < n)).all())
        )


def kinds_of_images(
    labels: NDArray[np.int64], answers: NDArray[np.int64], important: list[int]
) -> dict[str, NDArray[np.int64]]:
    """Which test images to look at: rows of the important class's that changed or stayed wrong, and false alarms."""
    own, right = np.isin(labels, important), answers == labels
    alarm = np.isin(answers, important) & ~own
    return {
        "still missed": np.flatnonzero(own & ~right[BEFORE] & ~right[AFTER]),
        "newly caught": np.flatnonzero(own & ~right[BEFORE] & right[AFTER]),
        "newly lost": np.flatnonzero(own & right[BEFORE] & ~right[AFTER]),
        "new false alarms": np.flatnonzero(alarm[AFTER] & ~alarm[BEFORE]),
        "false alarms no more": np.flatnonzero(alarm[BEFORE] & ~alarm[AFTER]),
    }


def angles(
    cosines: NDArray[np.float32], labels: NDArray[np.int64], important: list[int]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Degrees (N,) from embeddings to the important class's weight, and to the nearest other one, by cosines (N, C)."""
    degrees = np.degrees(np.arccos(np.clip(cosines, -1, 1))).astype(np.float32)
    own = degrees[:, important].min(axis=1)
    mine = np.isin(labels, important)
    own[mine] = degrees[mine, labels[mine]]
    others = np.setdiff1d(np.arange(degrees.shape[1]), important)
    other = degrees[:, others].min(axis=1) if len(others) else np.full(len(labels), 180, np.float32)
    return own, other
