"""Any `torch.utils.data.Dataset` as a file of arrays in the study's folder.

A study needs images that are the same whenever, wherever and by however many workers they are read. So a data set from
Python is read once, and the study is on that file as if it had been given with `--dataset`: it resumes, from the
command line as well, and its workers and `evaluate` find it.
"""

import operator
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from camri_tune.arrays import array_source
from camri_tune.config import StudyConfig, printable, shown
from camri_tune.errors import DataError, InputError, StudyMismatchError
from camri_tune.folders import Part
from camri_tune.images import squeezed, to_rgb

_IMAGES = (
    "a PIL image, a tensor (C, H, W) with C of 1 or 3, of uint8 or of floating-point numbers from 0 to 1, or an "
    "embedding, floating-point numbers (D,)"
)


def file_for(config: StudyConfig) -> Path:
    """Where a study keeps a data set from Python. Raises InputError where the study has no name of its own."""
    if "dataset" in config.model_fields_set:
        raise InputError(
            f"the configuration names the data set {config.dataset!r}, and another is given; leave one out"
        )
    if config.name is None:
        raise InputError("a data set from Python has no name to call its study by: give StudyConfig(name=…)")
    return config.folder / f"{config.study_name}.npz"


def write_arrays(
    path: Path,
    parts: Mapping[Part, "Dataset[Any]"],
    *,
    classes: Sequence[str] | None,
    side: Callable[[int, int], int],
    on_progress: Callable[[int, int], None],
    in_use: bool,
) -> None:
    """Write data sets of (image, label) or (image, label, group) as a file of arrays at `path`, whole or not at all.

    In the place of images, embeddings (D,). Images are resized to what `side` says of the first one's height and width.
    A file that is `in_use` by a study must hold the same: raises StudyMismatchError where it does not, and DataError,
    naming the item, for what is no image or no label.
    """
    scratch = path.with_name(f"{path.name}.partial")
    try:
        _write(scratch, parts, classes, side, on_progress)
        source = array_source(scratch, f"data set {path.stem!r}")
        if in_use and path.exists() and array_source(path).fingerprint() != source.fingerprint():
            raise StudyMismatchError(
                f"{str(path)!r} holds other images or labels than this data set: trainings on both cannot be compared; "
                f"give the same (images that change at random each time are not), or start another study with name=…"
            )
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def _write(
    path: Path,
    parts: Mapping[Part, "Dataset[Any]"],
    classes: Sequence[str] | None,
    side_of: Callable[[int, int], int],
    on_progress: Callable[[int, int], None],
) -> None:
    sizes = {part: _length(data, part) for part, data in parts.items()}
    total = sum(sizes.values())
    first, *_ = _item(parts["train"], "train", 0)
    array, kind, shape, side = "embeddings", "<f4", tuple(first.shape), 1
    if first.ndim == 3:
        side = side_of(*first.shape[1:])
        array, kind, shape = "images", "|u1", (len(first), side, side)
    labels: list[int | str] = []
    groups: list[str] = []
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open(f"{array}.npy", "w", force_zip64=True) as file:
            npy.write_array_header_1_0(file, {"descr": kind, "fortran_order": False, "shape": (total, *shape)})
            for part, data in parts.items():
                for index in range(sizes[part]):
                    pixels, label, group = _item(data, part, index)
                    like_first = (pixels.ndim, len(pixels)) == (first.ndim, len(first))
                    if not like_first or (labels and isinstance(label, str) != isinstance(labels[0], str)):
                        raise DataError(
                            f"item {index} of the {part} data set has {_kind(pixels)} and the label {shown(label)}, "
                            f"unlike the first, with {_kind(first)} and {shown((labels or [label])[0])}; give all "
                            f"images one number of channels, or all embeddings one length, and all labels one kind"
                        )
                    row = pixels if pixels.ndim == 1 else squeezed(pixels[None], side)
                    file.write(row.numpy().tobytes())
                    labels.append(label)
                    groups.append(group)
                    if len(labels) % 500 == 0 or len(labels) == total:
                        on_progress(len(labels), total)
        lists = {"labels": labels, "split": [part for part, size in sizes.items() for _ in range(size)]}
        if any(groups):
            lists["groups"] = groups
        if classes is not None:
            lists["classes"] = list(classes)
        for name, values in lists.items():
            with archive.open(f"{name}.npy", "w") as file:
                npy.write_array(file, np.array(values), version=(1, 0), allow_pickle=False)


def _length(data: "Dataset[Any]", part: Part) -> int:
    try:
        size = len(data)  # type: ignore[arg-type]
    except TypeError:
        raise DataError(
            f"the {part} data set has no length: give one that has `__len__` and `__getitem__`, not a stream"
        ) from None
    if size == 0:
        raise DataError(f"the {part} data set is empty; give it images, or leave it out")
    return size


def _kind(pixels: torch.Tensor) -> str:
    return f"{len(pixels)} channel(s)" if pixels.ndim == 3 else f"an embedding of {len(pixels)} numbers"


def _item(data: "Dataset[Any]", part: Part, index: int) -> tuple[torch.Tensor, int | str, str]:
    """Pixels uint8 (C, H, W) or float32 (D,), label, and the group's name, '' where there is none."""
    where = f"item {index} of the {part} data set"
    item = data[index]
    if not isinstance(item, tuple | list) or len(item) not in (2, 3):
        raise DataError(
            f"{where} is {shown(type(item).__name__)}, but should be (image, label) or (image, label, group)"
        )
    image, label, group = (*item, None)[:3]
    name = "" if group is None else str(_scalar(group, f"the group of {where}"))
    return _pixels(image, where), _scalar(label, f"the label of {where}"), name


def _pixels(image: Any, where: str) -> torch.Tensor:
    if isinstance(image, Image.Image):
        try:
            upright = ImageOps.exif_transpose(image)  # as files are read, and by `predict`, too
            return torch.from_numpy(np.asarray(to_rgb(upright, None)).transpose(2, 0, 1).copy())
        except Exception as error:  # as of files
            raise DataError(f"the image of {where} cannot be read ({printable(str(error))}); mend it") from None
    if isinstance(image, torch.Tensor) and image.ndim == 1 and image.is_floating_point() and len(image) > 1:
        numbers = image.detach().cpu().float()
        if not numbers.isfinite().all():
            raise DataError(
                f"the embedding of {where} holds NaN, infinity or a number that float32 cannot hold; mend it"
            )
        return numbers
    if not isinstance(image, torch.Tensor) or image.ndim != 3 or len(image) not in (1, 3) or not image.numel():
        what = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, torch.Tensor) else type(image).__name__
        raise DataError(f"the image of {where} is {shown(what)}, but should be {_IMAGES}")
    pixels: torch.Tensor = image.detach().cpu()
    if pixels.dtype == torch.uint8:
        return pixels
    if not pixels.is_floating_point():
        raise DataError(f"the image of {where} is of {pixels.dtype}, but should be {_IMAGES}")
    low, high = float(pixels.min()), float(pixels.max())
    if not (low >= 0 and high <= 1):  # nor where one is NaN
        raise DataError(
            f"the image of {where} has values from {low:.3g} to {high:.3g}, but should be {_IMAGES}: leave "
            f"normalisation to the model"
        )
    return (pixels.float() * 255).round().to(torch.uint8)


def _scalar(value: Any, what: str) -> int | str:
    """An integer or text, also where NumPy or PyTorch has it."""
    try:
        plain: Any = value.item() if isinstance(value, np.generic | np.ndarray | torch.Tensor) else value
        number = plain if isinstance(plain, str) else operator.index(plain)
    except (TypeError, ValueError, RuntimeError):  # as of two values
        number = None
    if number is None or (isinstance(number, int) and number.bit_length() >= 64):
        raise DataError(f"{what} is {shown(value)}, but should be text or an integer of at most 64 bits")
    return number
