"""Where images come from: the built-in data sets and folders of class folders, listed but not yet decoded."""

import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

from camri_tune.augmentation import Augmentation
from camri_tune.config import BUILT_IN_DATASETS, StudyConfig
from camri_tune.errors import DataError
from camri_tune.images import Images, is_image_file

Part = Literal["train", "validation", "test"]
CACHE_FORMAT = 1  # raise when decoding changes, so that old caches are not read
GTSRB_CLASSES = tuple(
    """Speed limit 20|Speed limit 30|Speed limit 50|Speed limit 60|Speed limit 70|Speed limit 80|
    End of speed limit 80|Speed limit 100|Speed limit 120|No passing|No passing for trucks|Right of way|Priority road|
    Yield|Stop|No vehicles|No trucks|No entry|General caution|Dangerous curve left|Dangerous curve right|Double curve|
    Bumpy road|Slippery road|Road narrows on the right|Road work|Traffic signals|Pedestrians|Children crossing|
    Bicycles crossing|Beware of ice or snow|Wild animals crossing|End of all limits|Turn right ahead|Turn left ahead|
    Ahead only|Go straight or right|Go straight or left|Keep right|Keep left|Roundabout|End of no passing|
    End of no passing for trucks""".replace("\n    ", "").split("|")
)


class Item(NamedTuple):
    path: Path
    label: int
    group: int


@dataclass(frozen=True)
class Source:
    """Where a data set's images come from. `parts` holds files; `arrays` holds what needs no decoding."""

    name: str
    root: Path | None
    classes: tuple[str, ...]
    image_size: int
    epochs: int
    augmentation: Augmentation
    parts: dict[Part, list[Item]] = field(default_factory=dict)
    arrays: Images | None = None
    ignored: int = 0

    def fingerprint(self) -> str:
        """What a study is on: names and sizes of files, or the bytes of arrays; moving the folder keeps it."""
        digest = hashlib.sha256(json.dumps([self.classes, self.image_size]).encode())
        for part, items in sorted(self.parts.items()):
            for item in items:
                path = item.path.relative_to(self.root) if self.root else item.path
                digest.update(f"{part}\0{path}\0{item.path.stat().st_size}\0{item.label}\0{item.group}\n".encode())
        if self.arrays is not None:
            digest.update(self.arrays.pixels.numpy().tobytes() + self.arrays.labels.numpy().tobytes())
        return digest.hexdigest()[:20]

    def cache_key(self) -> str:
        """What a decoded copy is of: also where the files are and when they changed, for sizes can stay the same."""
        digest = hashlib.sha256(f"{CACHE_FORMAT}\0{self.fingerprint()}".encode())
        for _, items in sorted(self.parts.items()):
            for item in items:
                digest.update(f"{item.path}\0{item.path.stat().st_mtime_ns}\n".encode())
        return digest.hexdigest()[:20]


def find_source(config: StudyConfig) -> Source:
    """The source that `config` names. Raises DataError in one clear line where there is none."""
    if config.dataset == "digits":
        source = _digits()
    elif config.dataset == "gtsrb":
        source = _gtsrb(config.data_dir)
    else:
        source = _folder(config.dataset)
    if config.image_size is not None and config.image_size != source.image_size:
        source = _resized(source, config.image_size)
    return source


def _digits() -> Source:
    from sklearn.datasets import load_digits  # noqa: PLC0415 - half a second that other data sets need not pay

    bunch = load_digits()
    pixels = torch.from_numpy((bunch.images * (255 / 16)).round().astype(np.uint8))[:, None]
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    return Source(
        name="digits",
        root=None,
        classes=tuple(str(c) for c in range(10)),
        image_size=8,
        epochs=20,
        augmentation=Augmentation(rotate=8, shift=0.06, zoom=0.08, shear=0.08),
        arrays=Images(pixels, labels, torch.arange(len(labels))),
    )


def _gtsrb(data_dir: Path) -> Source:
    from torchvision.datasets import GTSRB  # noqa: PLC0415 - two seconds that other data sets need not pay

    def listed(split: str) -> list[tuple[str, int]]:
        try:
            data = GTSRB(str(data_dir), split=split)
        except (RuntimeError, OSError):
            data = GTSRB(str(data_dir), split=split, download=True)
        return list(data._samples)  # the list of (path, label); there is no public name for it

    try:
        train, test = listed("train"), listed("test")
    except (KeyError, ValueError) as error:
        raise DataError(
            f"{data_dir / 'gtsrb' / 'GT-final_test.csv'} is not the list of test labels (it lacks {error}): it is the "
            f"file of that name from GTSRB_Final_Test_GT.zip, not the one beside the test images"
        ) from None
    except (RuntimeError, OSError) as error:  # URLError is an OSError
        base = data_dir / "gtsrb"
        raise DataError(
            f"data set gtsrb is not complete in --data-dir {str(data_dir)!r} and could not be downloaded "
            f"({_first_line(error)}): put the images under {base}/GTSRB/Training/CLASS/*.ppm and "
            f"{base}/GTSRB/Final_Test/Images/*.ppm and the labels in {base}/GT-final_test.csv, or name the folder that "
            f"holds 'gtsrb' with --data-dir"
        ) from None
    tracks: dict[tuple[int, str], int] = {}
    items = []
    folders = {Path(path).parent.name for path, _ in train}
    absent = [c for c in range(len(GTSRB_CLASSES)) if f"{c:05d}" not in folders]
    if absent or len(folders) != len(GTSRB_CLASSES):
        # torchvision numbers the folders that are there: one missing would shift every later label.
        what = f"there are {len(folders)}"
        if absent:
            what = f"{absent[0]:05d} ({GTSRB_CLASSES[absent[0]]}) is missing or empty"
        raise DataError(
            f"{data_dir / 'gtsrb' / 'GTSRB' / 'Training'} must hold the folders 00000 to {len(GTSRB_CLASSES) - 1:05d} "
            f"and no others, but {what}; unpack the training images again"
        )
    for path, label in sorted(train):
        # TRACK_FRAME.ppm: the frames of one track show one physical sign.
        track = tracks.setdefault((label, Path(path).stem.split("_")[0]), len(tracks))
        items.append(Item(Path(path), label, track))
    missing = [name for path, _ in test if not (name := Path(path)).exists()]
    if missing:
        raise DataError(f"test image {str(missing[0])!r} is listed in GT-final_test.csv but does not exist")
    return Source(
        name="gtsrb",
        root=data_dir / "gtsrb",
        classes=GTSRB_CLASSES,
        image_size=32,
        epochs=12,
        augmentation=Augmentation(rotate=16, shift=0.09, zoom=0.16, shear=0.13, light=0.55, blur=0.6),
        parts={"train": items, "test": [Item(Path(p), label, i) for i, (p, label) in enumerate(test)]},
    )


def _folder(dataset: str) -> Source:
    root = Path(dataset)
    if not root.is_dir():
        known = ", ".join(BUILT_IN_DATASETS)
        if root.exists():
            raise DataError(f"data set {dataset!r} is a file; give a folder of class folders, or one of {known}")
        raise DataError(f"unknown data set {dataset!r}: give one of {known}, or the path of a folder of class folders")
    try:
        return _class_folders(root)
    except OSError as error:
        raise DataError(f"data set folder {dataset!r} cannot be read ({error.strerror}: {error.filename})") from None


def _class_folders(root: Path) -> Source:
    names: dict[Part, tuple[str, ...]] = {
        "train": ("train", "training"),
        "validation": ("val", "valid", "validation"),
        "test": ("test", "testing"),
    }
    # A folder called "train" or "test" that holds no folders is a class of that name.
    by_lower_name = {
        entry.name.lower(): entry
        for entry in root.iterdir()
        if entry.is_dir() and any(_is_class_folder(inner) for inner in entry.iterdir())
    }
    folders: dict[Part, Path] = {}
    for part, choices in names.items():
        for name in choices:
            if name in by_lower_name:
                folders.setdefault(part, by_lower_name[name])
    held_out = [folder for part, folder in folders.items() if part != "train"]
    folders.setdefault("train", root)
    classes = tuple(
        sorted(entry.name for entry in folders["train"].iterdir() if _is_class_folder(entry) and entry not in held_out)
    )
    if len(classes) < 2:
        raise DataError(
            f"data set folder {str(folders['train'])!r} has {len(classes)} class folder(s), but a classifier needs at "
            f"least 2: lay it out as PATH/CLASS/*.jpg or PATH/train/CLASS/*.jpg"
        )
    parts: dict[Part, list[Item]] = {}
    ignored = 0
    for part, folder in folders.items():
        unknown = sorted({entry.name for entry in folder.iterdir() if _is_class_folder(entry)} - set(classes))
        if unknown:
            raise DataError(
                f"class folder {str(folder / unknown[0])!r} has no counterpart in {str(folders['train'])!r}"
            )
        items = []
        for label, name in enumerate(classes):
            found, others = _image_files(folder / name)
            ignored += others
            if not found:
                raise DataError(f"class folder {str(folder / name)!r} has no images; add some or remove the folder")
            items += [(path, label) for path in found]
        parts[part] = [Item(path, label, index) for index, (path, label) in enumerate(items)]
    return Source(
        name=root.resolve().name,
        root=root,
        classes=classes,
        image_size=32,
        epochs=20,
        augmentation=Augmentation(rotate=8, shift=0.1, zoom=0.1, light=0.1),
        parts=parts,
        ignored=ignored,
    )


def _is_class_folder(entry: Path) -> bool:
    return entry.is_dir() and not entry.name.startswith((".", "__"))


def _image_files(folder: Path) -> tuple[list[Path], int]:
    """Image files under a class folder, sorted, and how many other files were passed over."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and not _is_hidden(p.relative_to(folder))]
    found = [p for p in files if is_image_file(p)]
    return found, len(files) - len(found)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)  # .ipynb_checkpoints and .thumbnails hold copies


def _resized(source: Source, size: int) -> Source:
    arrays = source.arrays
    if arrays is not None:
        pixels = torch.nn.functional.interpolate(arrays.pixels.float(), (size, size), mode="bilinear", antialias=True)
        arrays = replace(arrays, pixels=pixels.round().clamp(0, 255).to(torch.uint8))
    return replace(source, image_size=size, arrays=arrays)


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
