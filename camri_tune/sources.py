"""The data sets by name, and the source that a study's configuration names."""

import csv
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, TypeVar
from zipfile import BadZipFile

import numpy as np
import torch

from camri_tune.arrays import array_source, holds_arrays, own_side
from camri_tune.augmentation import Augmentation
from camri_tune.backbones import default_image_size
from camri_tune.config import BUILT_IN_DATASETS, HEAD, StudyConfig, is_data_file, is_printable
from camri_tune.errors import DataError
from camri_tune.folders import (
    PARTS,
    USUAL_SIDE,
    Packed,
    Part,
    Source,
    class_folders,
    image_files,
    is_class_name,
    part_folders,
)
from camri_tune.grouping import Item, NotGroupedError
from camri_tune.images import Images
from camri_tune.listed import listed_files

Opened = TypeVar("Opened")
Relation = Literal["itself", "test", "in", "around"]
PHOTOGRAPHS = Augmentation(shift=0.12, zoom=0.12, light=0.1, mirror=True)
MOST_OF_A_LIST = 2**20  # characters of a list of classes
AWA2_URL = "https://cvml.ista.ac.at/AwA2/AwA2-data.zip"
GTSRB_CLASSES = tuple(
    """Speed limit 20|Speed limit 30|Speed limit 50|Speed limit 60|Speed limit 70|Speed limit 80|
    End of speed limit 80|Speed limit 100|Speed limit 120|No passing|No passing for trucks|Right of way|Priority road|
    Yield|Stop|No vehicles|No trucks|No entry|General caution|Dangerous curve left|Dangerous curve right|Double curve|
    Bumpy road|Slippery road|Road narrows on the right|Road work|Traffic signals|Pedestrians|Children crossing|
    Bicycles crossing|Beware of ice or snow|Wild animals crossing|End of all limits|Turn right ahead|Turn left ahead|
    Ahead only|Go straight or right|Go straight or left|Keep right|Keep left|Roundabout|End of no passing|
    End of no passing for trucks""".replace("\n    ", "").split("|")
)
# Frames of a track. Test images come in tracks, too (Stallkamp et al. 2012): each class has a multiple of so many, but
# they are shuffled, and no file says which belong together.
GTSRB_TRACK = 30
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_KNOWN = f"a folder of class folders, a .csv or .npz file, or one of {', '.join(BUILT_IN_DATASETS)}"
# What a data set's files lie in, under --data-dir.
_FOLDERS = {
    "gtsrb": ("gtsrb",),
    "cifar10": ("cifar10", "cifar-10-batches-py"),
    "mnist": ("MNIST",),
    "awa2": ("awa2", "Animals_with_Attributes2"),
}


def find_source(config: StudyConfig, *, to_judge: bool = False) -> Source:
    """The source that `config` names, to train on or only `to_judge` a model. Raises DataError in one clear line."""
    built_in = {"gtsrb": _gtsrb, "cifar10": _cifar10, "mnist": _mnist, "awa2": _awa2}
    try:
        if config.dataset in BUILT_IN_DATASETS and config.group_by is not None:
            raise NotGroupedError(f"--group-by is for images of your own, and {config.dataset} is not; leave it out")
        if config.dataset == "digits":
            source = _digits()
        elif config.dataset in built_in:
            source = built_in[config.dataset](config.data_dir)
        else:
            source = _own(config.dataset, config.group_by, to_judge)
            # Photographs have no size of their own; small arrays do.
            if config.image_size is None and not source.own_size and (side := default_image_size(config.model)):
                source = replace(source, image_size=side)
    except OSError as error:
        where = f"{error.strerror}: {error.filename!r}"
        raise DataError(f"data set {config.dataset!r} cannot be read ({where}); mend that, or name another") from None
    if source.are_embeddings and config.model != HEAD:
        raise DataError(
            f"data set {config.dataset!r} has embeddings, but --model {config.model} takes images; give --model {HEAD}"
        )
    if config.model == HEAD and not source.are_embeddings:
        raise DataError(
            f"--model {HEAD} is for embeddings (N, D) in a .npz file, but data set {config.dataset!r} has images; give "
            f"another --model"
        )
    return source if config.image_size is None else replace(source, image_size=config.image_size)


def side_of(config: StudyConfig, height: int, width: int) -> int:
    """The side that a study trains images at, those of a data set from Python by the first one's height and width."""
    return config.image_size or own_side(height, width) or default_image_size(config.model) or USUAL_SIDE


def require_there(dataset: str) -> None:
    """Raise DataError where a data set is neither built in nor at that path: before a study makes its folder there."""
    if dataset not in BUILT_IN_DATASETS and not os.path.exists(dataset):
        raise DataError(f"unknown data set {dataset!r}: give one of {_KNOWN}")


def is_data_dir_of(dataset: str, folder: Path) -> bool:
    """Whether `folder` holds the files of that built-in data set, as --data-dir does."""
    return any((folder / name).is_dir() for name in _FOLDERS.get(dataset, ()))


def relation_of(where: str | None, trained_on: StudyConfig) -> Relation | None:
    """How the images that `where` names (None: those of training) lie to the data set of training.

    They are it, its test part, in what was learned from, or around it; None: elsewhere, as far as folders tell, which
    are not looked up in lists. Raises DataError where there is nothing.
    """
    dataset = trained_on.dataset
    if where in (None, dataset):
        return "itself"
    if where in BUILT_IN_DATASETS:
        return None
    require_there(where)
    names = _FOLDERS.get(dataset, ())
    places = [trained_on.data_dir / n for n in names] if dataset in BUILT_IN_DATASETS else [Path(dataset)]
    found = (_relation(Path(where).resolve(), place.resolve()) for place in places if place.exists())
    return next(filter(None, found), None)


def _relation(here: Path, there: Path) -> Relation | None:
    if here == there:
        return "itself"
    if here.suffix.lower() == ".npz":  # which is no file of a folder of images
        part = PARTS.get(here.stem) if here.parent == there and holds_arrays(there) else None
        return "test" if part == "test" else part and "in"
    parts = part_folders(there)  # which may be links that lead elsewhere
    if parts.get("test") == here:
        return "test"
    # What lies beside its parts no training has read.
    learned = [folder for part, folder in parts.items() if part != "test"] if "train" in parts else [there]
    if any(here.is_relative_to(folder) for folder in learned):
        return "in"
    return "around" if any(folder.is_dir() and folder.is_relative_to(here) for folder in (there, *learned)) else None


def _digits() -> Source:
    def read() -> Images:
        # scikit-learn's file, found without the library itself, which takes a second or two to import.
        library = find_spec("sklearn")
        places = (library.submodule_search_locations if library else None) or []
        files = [Path(place, "datasets", "data", "digits.csv.gz") for place in places]
        if files and files[0].is_file():
            rows = np.loadtxt(files[0], delimiter=",")
            values, labels = rows[:, :-1], rows[:, -1]
        else:
            from sklearn.datasets import load_digits  # noqa: PLC0415 - as above

            values, labels = load_digits(return_X_y=True)
        pixels = torch.from_numpy((values * (255 / 16)).round().astype(np.uint8)).view(-1, 1, 8, 8)
        return _ungrouped(pixels, torch.from_numpy(labels))

    return Source(
        name="digits",
        root=None,
        classes=tuple(str(c) for c in range(10)),
        image_size=8,
        epochs=4,  # more, and cross-entropy leaves no error on validation, nothing to gain (docs/measured.md)
        augmentation=Augmentation(rotate=8, shift=0.06, zoom=0.08, shear=0.08),
        packed={"train": Packed((), read)},
    )


def _gtsrb(data_dir: Path) -> Source:
    base = data_dir / "gtsrb"
    training, testing = base / "GTSRB" / "Training", base / "GTSRB" / "Final_Test" / "Images"

    def find(download: bool) -> tuple[dict[str, list[str]], list[tuple[str, int]]]:
        if download:
            from torchvision.datasets import GTSRB  # noqa: PLC0415 - a second that data which are there need not pay

            base.mkdir(parents=True, exist_ok=True)
            # Elsewhere first: what an interrupted download leaves would be taken for the whole.
            with tempfile.TemporaryDirectory(prefix="download-", dir=base) as scratch:
                fresh = Path(scratch) / base.name
                wanted = {"train": [training], "test": [base / "GT-final_test.csv", testing]}
                for split, places in wanted.items():
                    missing = [place for place in places if not place.exists()]
                    if not missing:  # nothing is fetched over what a user has laid out
                        continue
                    GTSRB(scratch, split=split, download=True)
                    for place in missing:
                        place.parent.mkdir(parents=True, exist_ok=True)
                        (fresh / place.relative_to(base)).replace(place)
        with open(base / "GT-final_test.csv", newline="") as file:
            rows = csv.DictReader(file, delimiter=";", skipinitialspace=True)
            test = [(os.path.join(testing, row["Filename"]), int(row["ClassId"])) for row in rows]
        os.stat(testing)
        train = {
            folder.name: sorted(entry.path for entry in os.scandir(folder) if entry.name.lower().endswith(".ppm"))
            for folder in os.scandir(training)
            if folder.is_dir()
        }
        return train, test

    try:
        train, test = _open_or_download(
            find,
            f"data set gtsrb is not complete in --data-dir {str(data_dir)!r}",
            f"put the images under {base}/GTSRB/Training/CLASS/*.ppm and {base}/GTSRB/Final_Test/Images/*.ppm and the "
            f"labels in {base}/GT-final_test.csv, or name the folder that holds 'gtsrb' with --data-dir",
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{base / 'GT-final_test.csv'} is not the list of test labels (it lacks {error}): it is the file of that "
            f"name from GTSRB_Final_Test_GT.zip, not the one beside the test images"
        ) from None
    tracks: dict[tuple[int, str], int] = {}
    items = []
    names = [f"{label:05d}" for label in range(len(GTSRB_CLASSES))]
    absent = [label for label, name in enumerate(names) if not train.get(name)]
    if absent or len(train) != len(names):
        what = f"there are {len(train)}"
        if absent:
            what = f"{names[absent[0]]} ({GTSRB_CLASSES[absent[0]]}) is missing or empty"
        raise DataError(
            f"{training} must hold the folders {names[0]} to {names[-1]} and no others, but {what}; unpack the "
            f"training images again"
        )
    for label, name in enumerate(names):
        for path in train[name]:
            # TRACK_FRAME.ppm: the frames of one track show one physical sign.
            track = tracks.setdefault((label, os.path.basename(path).split("_")[0]), len(tracks))
            items.append(Item(path, label, track))
    missing = [path for path, _ in test if not os.path.isfile(path)]
    if missing:
        raise DataError(f"test image {missing[0]!r} is listed in GT-final_test.csv but does not exist")
    odd = [item.path for item in items if not os.path.isfile(item.path)]
    if odd:
        raise DataError(f"training image {odd[0]!r} is no file; unpack the training images again")
    return Source(
        name="gtsrb",
        root=base,
        classes=GTSRB_CLASSES,
        image_size=32,
        epochs=8,
        augmentation=Augmentation(rotate=16, shift=0.09, zoom=0.16, shear=0.13, light=0.55, blur=0.6),
        parts={"train": items, "test": [Item(path, label, index) for index, (path, label) in enumerate(test)]},
        hidden_group_size=GTSRB_TRACK,
    )


def _cifar10(data_dir: Path) -> Source:
    """From torchvision's files, or from class folders DATA_DIR/cifar10/{train,test}/CLASS/*."""
    folder = data_dir / "cifar10"
    if (folder / "train").is_dir() and (folder / "test").is_dir():
        source = _own(str(folder))
        if odd := sorted({*source.classes} ^ {*CIFAR10_CLASSES}):
            raise DataError(
                f"{folder / 'train'} must hold the class folders {', '.join(CIFAR10_CLASSES)} and no others, but "
                f"{odd[0]!r} is {'one too many' if odd[0] in source.classes else 'missing'}; unpack the images again"
            )
        return replace(source, name="cifar10", epochs=20, augmentation=PHOTOGRAPHS, groups_by="")

    from torchvision.datasets import CIFAR10  # noqa: PLC0415 - two seconds that other data sets need not pay

    def read(part: Part) -> Images:
        data = CIFAR10(str(data_dir), train=part == "train")
        return _ungrouped(torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(data.targets))

    _open_or_download(
        lambda download: CIFAR10(str(data_dir), download=download),
        f"data set cifar10 is not complete in --data-dir {str(data_dir)!r}",
        f"put the Python version's files under {data_dir / CIFAR10.base_folder}/, or images under "
        f"{folder}/train/CLASS/ and {folder}/test/CLASS/, or name the folder that holds one of them with --data-dir",
    )
    batches = data_dir / CIFAR10.base_folder
    names: dict[Part, list[str]] = {
        "train": [name for name, _ in CIFAR10.train_list],
        "test": [name for name, _ in CIFAR10.test_list],
    }
    return Source(
        name="cifar10",
        root=batches,
        classes=CIFAR10_CLASSES,
        image_size=32,
        epochs=20,
        augmentation=PHOTOGRAPHS,
        packed={part: Packed(tuple(batches / n for n in names[part]), partial(read, part)) for part in names},
    )


def _mnist(data_dir: Path) -> Source:
    from torchvision.datasets import MNIST  # noqa: PLC0415 - two seconds that other data sets need not pay

    def read(part: Part) -> Images:
        data = MNIST(str(data_dir), train=part == "train")
        return _ungrouped(data.data[:, None], data.targets)

    def find(download: bool) -> None:
        for path in filter(Path.is_file, paths):  # which torchvision takes as they are, and does not fetch again
            if not _is_whole_idx(path):
                raise DataError(f"{path} is damaged: remove it, and it is downloaded again, or put a whole one there")
        if download:
            MNIST(str(data_dir), download=True)
        for path in paths:
            path.stat()

    raw = data_dir / "MNIST" / "raw"
    prefixes: dict[Part, str] = {"train": "train", "test": "t10k"}
    files: dict[Part, tuple[Path, ...]] = {
        part: (raw / f"{prefix}-images-idx3-ubyte", raw / f"{prefix}-labels-idx1-ubyte")
        for part, prefix in prefixes.items()
    }
    paths = [path for of_part in files.values() for path in of_part]
    _open_or_download(
        find,
        f"data set mnist is not complete in --data-dir {str(data_dir)!r}",
        f"put the four IDX files under {raw}/, or name the folder that holds 'MNIST' with --data-dir",
    )
    return Source(
        name="mnist",
        root=raw,
        classes=tuple(str(c) for c in range(10)),
        image_size=28,
        epochs=8,
        augmentation=Augmentation(rotate=10, shift=0.07, zoom=0.1, shear=0.1),
        packed={part: Packed(files[part], partial(read, part)) for part in files},
    )


def _is_whole_idx(path: Path) -> bool:
    """Whether a file of bytes in MNIST's format is as long as it says, which is told without reading its images."""
    with path.open("rb") as file:
        *kind, dimensions = file.read(4) or b"\0"
        shape = [int.from_bytes(file.read(4), "big") for _ in range(dimensions)]
        return kind == [0, 0, 8] and path.stat().st_size == file.tell() + math.prod(shape)


def _awa2(data_dir: Path) -> Source:
    """Animals with Attributes 2 (Xian et al. 2018): 37,322 photographs of 50 animals, as published.

    Its published split is for zero-shot learning and shares no class between its parts. As the CAMRI paper does, the
    images are split at random instead: test and validation are drawn from all, by class, with the study's seed.
    """
    places = [data_dir / "awa2" / "Animals_with_Attributes2", data_dir / "Animals_with_Attributes2"]

    def find(download: bool) -> Path:
        for place in places:
            if (place / "classes.txt").is_file() and (place / "JPEGImages").is_dir():
                return place
        if there := [place for place in places if place.exists()]:  # nothing is fetched over what a user has laid out
            raise FileNotFoundError(f"{there[0]} is there, but has no classes.txt beside a folder JPEGImages")
        if not download:
            raise FileNotFoundError(places[0])
        from torchvision.datasets.utils import download_and_extract_archive  # noqa: PLC0415 - as above

        places[0].parent.mkdir(parents=True, exist_ok=True)
        # Elsewhere first: what an interrupted download leaves would be taken for the whole.
        with tempfile.TemporaryDirectory(prefix="download-", dir=places[0].parent) as scratch:
            download_and_extract_archive(AWA2_URL, scratch)
            (Path(scratch) / places[0].name).rename(places[0])
        return find(download=False)

    root = _open_or_download(
        find,
        f"data set awa2 is not complete in --data-dir {str(data_dir)!r}",
        f"unpack AwA2-data.zip (13 GB) so that {places[0]}/ holds classes.txt and JPEGImages/CLASS/*.jpg, or name the "
        f"folder that holds 'awa2' with --data-dir",
    )
    with (root / "classes.txt").open(encoding="utf-8", errors="surrogateescape") as file:
        lines = file.read(MOST_OF_A_LIST).splitlines()
    # Such as "     1	antelope".
    classes = tuple(line.split()[-1] for line in lines if line.strip())
    if odd := [name for name in classes if not is_class_name(name)]:
        raise DataError(f"{root / 'classes.txt'} lists {odd[0]!r}, which is no folder's name; unpack the zip again")
    if len(classes) < 2 or len(set(classes)) < len(classes):
        raise DataError(
            f"{root / 'classes.txt'} must list at least 2 classes, each once, as lines such as '1 antelope', but lists "
            f"{len(classes)}, {len(set(classes))} of them different; unpack the zip again"
        )
    items: list[Item] = []
    ignored = 0
    for label, name in enumerate(classes):
        folder = root / "JPEGImages" / name
        found, others = image_files(folder) if folder.is_dir() else ([], 0)
        if not found:
            raise DataError(f"{root / 'classes.txt'} lists {name!r}, but {folder} has no images; unpack the zip again")
        items += [Item(path, label, len(items) + place) for place, path in enumerate(found)]
        ignored += others
    return Source(
        name="awa2",
        root=root,
        classes=classes,
        image_size=64,
        epochs=20,
        augmentation=PHOTOGRAPHS,
        parts={"train": items},
        ignored=ignored,
    )


def _own(dataset: str, group_by: str | None = None, to_judge: bool = False) -> Source:
    """A user's own images, by what lies at the path `dataset`."""
    require_there(dataset)
    path = Path(dataset)
    if not os.path.isdir(path) and not (os.path.isfile(path) and is_data_file(path)):  # a pipe would wait for a writer
        raise DataError(f"data set {dataset!r} is a file of another kind; give {_KNOWN}")
    if not all(map(is_printable, (dataset, str(path.resolve())))):
        raise DataError(f"data set {dataset!r} must have a path in UTF-8 without control characters; rename it")
    if path.suffix.lower() == ".csv" and path.is_file():
        return listed_files(path, group_by, to_judge=to_judge)
    if path.is_file() or holds_arrays(path):
        if group_by is not None:
            raise NotGroupedError(f"--group-by is for paths, which {dataset!r} has none of; save an array 'groups'")
        return array_source(path, to_judge=to_judge)
    return class_folders(path, group_by, to_judge=to_judge)


def _open_or_download(open_it: Callable[[bool], Opened], problem: str, way_out: str) -> Opened:
    """`open_it(False)`, and where that fails `open_it(True)`, which downloads. Raises DataError where both fail."""
    try:
        return open_it(False)
    except (RuntimeError, OSError):
        pass
    try:
        return open_it(True)
    except (RuntimeError, OSError, HTTPException, BadZipFile) as error:  # URLError is an OSError
        raise DataError(f"{problem} and could not be downloaded ({_first_line(error)}): {way_out}") from None


def _ungrouped(pixels: torch.Tensor, labels: torch.Tensor) -> Images:
    return Images(pixels, labels.to(torch.int64), torch.arange(len(labels)))


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
