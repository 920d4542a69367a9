"""What tests of data sets share: opening one small, comparing what was read, and what an error must look like."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from camri_tune import datasets
from camri_tune.config import StudyConfig
from camri_tune.datasets import Dataset, open_dataset
from camri_tune.errors import DataError
from camri_tune.images import Images

Pixels = NDArray[np.uint8]
SIDE = 8


def open_data(dataset: object, **values: object) -> Dataset:
    return open_dataset(build_config(dataset, **values))


def build_config(dataset: object, **values: object) -> StudyConfig:
    return StudyConfig.build({"dataset": str(dataset), "image_size": SIDE, **values})


def same(first: Images, second: Images) -> bool:
    pairs = ((first.pixels, second.pixels), (first.labels, second.labels), (first.groups, second.groups))
    return all(torch.equal(a, b) for a, b in pairs)


def read_rgb(path: Path) -> Pixels:
    """An 8-bit RGB file as (H, W, 3)."""
    with Image.open(path) as image:
        assert image.mode == "RGB"
        return np.asarray(image).copy()


def message_of(raised: "pytest.ExceptionInfo[DataError]") -> str:
    message = str(raised.value)
    assert "\n" not in message
    return message


def forbid_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, size: int) -> Pixels:
        raise AssertionError(f"{path} is decoded again at {size}")

    monkeypatch.setattr(datasets, "read_image", refuse)
