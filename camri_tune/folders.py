"""Lists of images that are not decoded yet: what a data set is made of, and folders of class folders."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

from camri_tune.augmentation import Augmentation
from camri_tune.config import is_printable
from camri_tune.errors import DataError
from camri_tune.images import Images, is_image_file

Part = Literal["train", "validation", "test"]
CACHE_FORMAT = 2  # raise when decoding changes, so that old caches are not read


class Item(NamedTuple):
    path: str  # of a hundred thousand files, `Path`s would take seconds
    label: int
    group: int


class Packed(NamedTuple):
    """A part whose images lie together in a few `files` (none where a library brings them), and how to read it."""

    files: tuple[Path, ...]
    read: Callable[[], Images]

    def contents(self) -> bytes:
        """What tells these images from others."""
        if not self.files:
            images = self.read()
            return hashlib.sha256(images.pixels.numpy().tobytes() + images.labels.numpy().tobytes()).digest()
        digests = []
        for path in self.files:
            with path.open("rb") as file:
                digests.append(hashlib.file_digest(file, "sha256").digest())
        return b"".join(digests)


@dataclass(frozen=True)
class Source:
    """Where a data set's images come from, by part: a file each in `parts`, or `packed`.

    Where a part is missing, it is split from the training part. The images of the test part come in groups of about
    `hidden_group_size` that nobody names: frames of one object without the object's number. 1: each stands alone.
    """

    name: str
    root: Path | None
    classes: tuple[str, ...]
    image_size: int
    epochs: int
    augmentation: Augmentation
    parts: dict[Part, list[Item]] = field(default_factory=dict)
    packed: dict[Part, Packed] = field(default_factory=dict)
    ignored: int = 0
    hidden_group_size: int = 1

    @cached_property
    def _found(self) -> dict[Part, list[os.stat_result]]:
        return {part: [os.stat(item.path) for item in items] for part, items in self.parts.items()}

    def has(self, part: Part) -> bool:
        return part in self.parts or part in self.packed

    def fingerprint(self) -> str:
        """What a study is on: names and sizes of files, or the bytes of packed ones; moving the folder keeps it."""
        digest = hashlib.sha256(json.dumps([self.classes, self.image_size]).encode())
        inside = "" if self.root is None else f"{self.root}{os.sep}"
        for part, items in sorted(self.parts.items()):
            for item, found in zip(items, self._found[part], strict=True):
                path = item.path.removeprefix(inside)
                line = f"{part}\0{path}\0{found.st_size}\0{item.label}\0{item.group}\n"
                digest.update(line.encode(errors="surrogateescape"))  # a file's name may be any bytes
        for part, packed in sorted(self.packed.items()):
            digest.update(part.encode() + packed.contents())
        return digest.hexdigest()[:20]

    def cache_key(self) -> str:
        """What a decoded copy is of: also where the files are and when they changed, for sizes can stay the same."""
        digest = hashlib.sha256(f"{CACHE_FORMAT}\0{self.fingerprint()}".encode())
        for part, items in sorted(self.parts.items()):
            for item, found in zip(items, self._found[part], strict=True):
                digest.update(f"{item.path}\0{found.st_mtime_ns}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()[:20]


def class_folders(root: Path) -> Source:
    """`root/CLASS/*`, or `root/train/CLASS/*` with `val/` and `test/` beside it. Raises DataError, or OSError."""
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
    for name in classes:
        if not is_class_name(name):
            raise DataError(
                f"class folder {str(folders['train'] / name)!r} must have a name in UTF-8 without control characters, "
                f"for it is shown in reports and on terminals; rename it"
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
            if root.resolve().is_relative_to((folder / name).resolve()):
                raise DataError(
                    f"class folder {str(folder / name)!r} is a link to a folder that the data set lies in, so it would "
                    f"hold the images of every class; remove it"
                )
            found, others = image_files(folder / name) if (folder / name).is_dir() else ([], 0)
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


def is_class_name(name: str) -> bool:
    """Whether a class may be called so: what a folder can be called, and what can be shown as it is."""
    is_folder_name = name not in ("", "..") and Path(name).name == name
    return is_folder_name and is_printable(name) and len(name.encode()) <= 255


def image_files(folder: Path) -> tuple[list[str], int]:
    """Image files under a class folder, sorted, and how many other files were passed over. Raises OSError.

    The folder may be a link, and so may its files; links to folders inside it are passed over, for they can go round
    in circles. So is what is no file: to read a pipe or a device has no end.
    """
    found, others = [], 0
    pending = [str(folder)]  # a stack of our own: folders may lie in each other deeper than Python's calls
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                if entry.name.startswith("."):  # .ipynb_checkpoints and .thumbnails hold copies
                    continue
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
                elif os.path.isfile(entry.path) and is_image_file(entry.path):
                    found.append(entry.path)
                else:
                    others += 1
    return sorted(found), others
