"""An exported model on image files, or on embeddings: what it decides for and how surely, as a table, CSV or JSON.

Files are decoded and answered a batch at a time, so that a folder may hold more images than memory does.
"""

import csv
import io
import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from camri_tune.answers import Answering, meaning, number_name
from camri_tune.arrays import embeddings_in
from camri_tune.bundle import Bundle
from camri_tune.config import printable, shown
from camri_tune.errors import BundleError, DataError, InputError
from camri_tune.folders import image_files
from camri_tune.images import read_image, to_grey
from camri_tune.records import MOST_OF_A_CELL, csv_cell, named
from camri_tune.training import cpu_count

Format = Literal["table", "csv", "json"]
BATCH = 64


class Prediction(NamedTuple):
    """What a model says of one file. `numbers` (C,) are probabilities, or scores (see answers.py)."""

    path: str
    class_index: int
    numbers: NDArray[np.float32]


class Predictions:
    """What a model says of image files, one after another, in the order of `paths`; folders are looked through, sorted.

    A file that cannot be read raises DataError, unless `on_corrupt` is there to hear of it; then it is left out, and
    counted in `left_out`; `passed_over` counts the files in folders that are no images. Raises InputError, before
    anything is decoded, where a path is none of an image, or a folder has no images. A model of embeddings
    takes .npz files that hold some: their rows are called PATH[0], PATH[1], ….
    """

    def __init__(
        self, bundle: Bundle, paths: Sequence[Path], *, on_corrupt: Callable[[DataError], None] | None = None
    ) -> None:
        spec = bundle.config.spec
        if not spec.are_embeddings and spec.channels not in (1, 3):
            raise InputError(f"the model takes images of {spec.channels} channels, but files are read as grey or RGB")
        self.config = bundle.config
        self.left_out = 0
        find = _arrays_at if spec.are_embeddings else _files_at
        found = [find(path) for path in paths]
        self._files = [file for files, _ in found for file in files]
        self.passed_over = sum(others for _, others in found)
        self._answering = Answering(bundle)
        self._on_corrupt = on_corrupt

    @torch.inference_mode()
    def __iter__(self) -> Iterator[Prediction]:
        for names, inputs in self._embeddings() if self.config.spec.are_embeddings else self._images():
            decided, _, numbers = self._answering(inputs)
            if not bool(numbers.isfinite().all()):
                raise BundleError("the model's weights give no finite numbers; export it again")
            yield from map(Prediction, names, decided.tolist(), numbers.numpy())
        if self.left_out == len(self._files):
            raise DataError(f"none of the {self.left_out:,} image file(s) can be read; name others")

    def _images(self) -> Iterator[tuple[Sequence[str], torch.Tensor]]:
        with ThreadPoolExecutor(cpu_count()) as pool:
            for start in range(0, len(self._files), BATCH):
                files, pixels = self._decoded(pool, self._files[start : start + BATCH])
                if files:
                    yield files, torch.from_numpy(pixels)

    def _embeddings(self) -> Iterator[tuple[Sequence[str], torch.Tensor]]:
        wanted = self.config.spec.channels
        for file in self._files:
            row = 0
            for piece in embeddings_in(Path(file)):
                if piece.shape[1] != wanted:
                    raise DataError(
                        f"file {shown(file)} has embeddings of {piece.shape[1]:,} numbers, but the model takes "
                        f"{wanted:,}: they are of another network"
                    )
                yield [f"{file}[{n}]" for n in range(row, row + len(piece))], piece
                row += len(piece)

    def _decoded(self, pool: ThreadPoolExecutor, files: Sequence[str]) -> tuple[list[str], NDArray[np.uint8]]:
        """Those of the files that can be read, and their pixels (N, C, S, S)."""
        with warnings.catch_warnings():
            # As where data sets are decoded: what Pillow finds odd is either read or refused.
            warnings.filterwarnings("ignore", message=".*(EXIF|Palette images|exceeds limit).*")
            found = list(pool.map(self._decode, files))
        good = []
        for file, pixels in zip(files, found, strict=True):
            if not isinstance(pixels, DataError):
                good.append((file, pixels))
            elif self._on_corrupt is None:
                raise DataError(f"{pixels}: mend or remove it, or pass --skip-corrupt to leave such files out")
            else:
                self.left_out += 1
                self._on_corrupt(pixels)
        return [file for file, _ in good], np.array([pixels for _, pixels in good], np.uint8)

    def _decode(self, file: str) -> NDArray[np.uint8] | DataError:
        spec = self.config.spec
        try:
            pixels = read_image(Path(file), spec.image_size)
        except DataError as error:
            return error
        return to_grey(pixels[None])[0] if spec.channels == 1 else pixels


def _files_at(path: Path) -> tuple[list[str], int]:
    """The image files that a path names, and how many others are passed over. Raises InputError."""
    text = str(path)
    try:
        if os.path.isfile(text):
            if path.suffix.lower() == ".npz":
                raise InputError(
                    f"{shown(text)} holds arrays, but predict reads image files; evaluate takes it as --data"
                )
            return [text], 0
        if not os.path.isdir(text):
            what = "is no file or folder" if os.path.lexists(text) else "does not exist"
            raise InputError(f"image {shown(text)} {what}; name images, or folders of them")
        files, others = image_files(path)
    except ValueError:  # a zero byte
        raise InputError(f"image {shown(text)} is no path; name images, or folders of them") from None
    except OSError as error:
        raise InputError(f"folder {shown(text)} cannot be looked through ({error.strerror}); mend that") from None
    if not files:
        raise InputError(f"folder {shown(text)} has no images; name images, or folders of them")
    return files, others


def _arrays_at(path: Path) -> tuple[list[str], int]:
    """The file of embeddings that a path names. Raises InputError."""
    text = str(path)
    try:
        is_file = path.suffix.lower() == ".npz" and os.path.isfile(text)
    except ValueError:  # a zero byte
        is_file = False
    if not is_file:
        raise InputError(
            f"{shown(text)} is no .npz file, but the model takes embeddings: save them with numpy.savez(path, "
            f"embeddings=…), and name that file"
        )
    return [text], 0


def lines_of(predictions: Predictions, form: Format) -> Iterator[str]:
    """The predictions in a format, line by line as they come. None acts on a terminal, nor, as CSV, on a spreadsheet.

    Nothing is given before the first batch was answered, so that what is wrong at once leaves no half of an output.
    """
    rows = iter(predictions)
    first = next(rows, None)
    assert first is not None, "where nothing can be read an error was raised"

    def everything() -> Iterator[Prediction]:
        yield first
        yield from rows

    makers = {"table": _table, "csv": _csv, "json": _json}
    return makers[form](predictions, everything())


def _table(predictions: Predictions, rows: Iterator[Prediction]) -> Iterator[str]:
    config, classes = predictions.config, predictions.config.spec.classes
    number = number_name(config.spec)
    heads = [f"{number} of {named(c, classes)}" for c in config.important]
    width = max(len("class"), *(len(named(c, classes)) for c in range(len(classes))))
    yield "  ".join([f"{'class':{width}}", number, *heads, "important", "image"])
    for row in rows:
        cells = [f"{named(row.class_index, classes):{width}}", f"{row.numbers[row.class_index]:{len(number)}.4f}"]
        cells += [f"{row.numbers[c]:{len(head)}.4f}" for c, head in zip(config.important, heads, strict=True)]
        cells.append(f"{'yes' if row.class_index in config.important else 'no':9}")
        yield "  ".join([*cells, printable(row.path, MOST_OF_A_CELL)])


def _csv(predictions: Predictions, rows: Iterator[Prediction]) -> Iterator[str]:
    """A path that a spreadsheet would take for a formula begins with `./`, such a class's name with an apostrophe."""
    config, classes = predictions.config, predictions.config.spec.classes
    number = number_name(config.spec)
    names = [f"{number}_of_{c}" for c in config.important]
    yield _csv_line(["path", "class", "class_name", number, *names, "is_important"])
    for row in rows:
        cells: list[object] = [
            csv_cell(row.path, f"{os.curdir}{os.sep}"),
            row.class_index,
            csv_cell(classes[row.class_index]),
        ]
        numbers = [float(row.numbers[c]) for c in (row.class_index, *config.important)]
        yield _csv_line([*cells, *(f"{p:.6g}" for p in numbers), int(row.class_index in config.important)])


def _csv_line(cells: Sequence[object]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="").writerow(cells)
    return out.getvalue()


def _json(predictions: Predictions, rows: Iterator[Prediction]) -> Iterator[str]:
    """One object, which is whole when the last line is there; an image of it is a line."""
    config, spec = predictions.config, predictions.config.spec
    number = number_name(spec)
    head = {
        "classes": list(spec.classes),
        "important": list(config.important),
        "numbers": number,
        "temperature": spec.temperature,
        "meaning": meaning(spec),
    }
    yield f'{json.dumps(head)[:-1]}, "images": ['
    separator = ""
    for row in rows:
        numbers = [round(float(p), 7) for p in row.numbers]
        image = {
            "path": row.path,
            "class": row.class_index,
            "class_name": spec.classes[row.class_index],
            number: numbers[row.class_index],
            "is_important": row.class_index in config.important,
            "by_class": numbers,
        }
        yield f"{separator}{json.dumps(image)}"
        separator = ","
    yield f'], "left_out": {predictions.left_out}, "passed_over": {predictions.passed_over}}}'
