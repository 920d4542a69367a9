"""Lists of images that are not decoded yet: what a data set is made of, and folders of class folders."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from camri_tune.augmentation import Augmentation
from camri_tune.config import is_printable, printable, shown
from camri_tune.errors import DataError
from camri_tune.grouping import Item, Listed, match_groups, number_groups, tell_unmatched
from camri_tune.images import Images, Pieces, is_image_file

Part = Literal["train", "validation", "test"]
PART_NAMES: dict[Part, tuple[str, ...]] = {  # what users call them
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
PARTS: dict[str, Part] = {name: part for part, names in PART_NAMES.items() for name in names}
USUAL_SIDE = 32  # of images that nobody here knows
CACHE_FORMAT = 3  # raise when decoding changes, so that old caches are not read


PIECE = 1024  # images that are read at a time


class Together(Protocol):
    """A part whose images lie together, in a few files or in none."""

    def contents(self) -> bytes:
        """What tells these images from others."""

    def pieces(self) -> Pieces:
        """The images, to be read once. Raises RuntimeError, OSError or DataError where that is no longer possible."""

    def name_of(self, row: int) -> str:
        """What a message calls one of them."""


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

    def pieces(self) -> Pieces:
        images = self.read()
        return Pieces(images.labels, images.groups, images.channels, images.split(PIECE))

    def name_of(self, row: int) -> str:
        return f"image {row:,}"


@dataclass(frozen=True)
class Source:
    """Where a data set's images come from, by part: a file each in `parts`, or `packed`.

    Where a part is missing, it is split from the training part. The images of the test part come in groups of about
    `hidden_group_size` that nobody names: frames of one object without the object's number. 1: each stands alone.
    `groups_by` says how a user may name groups, '' where there is no way; `notices` what is to be known of the files.
    Embeddings are images of a single pixel (see Images). `image_size` is usual, or the images' `own_size`.
    """

    name: str
    root: Path | None
    classes: tuple[str, ...]
    image_size: int
    epochs: int
    augmentation: Augmentation
    parts: dict[Part, list[Item]] = field(default_factory=dict)
    packed: Mapping[Part, Together] = field(default_factory=dict)
    ignored: int = 0
    own_size: bool = False
    hidden_group_size: int = 1
    groups_by: str = ""
    notices: tuple[str, ...] = ()

    @cached_property
    def _found(self) -> dict[Part, list[os.stat_result]]:
        return {part: [os.stat(item.path) for item in items] for part, items in self.parts.items()}

    @property
    def are_embeddings(self) -> bool:
        return self.image_size == 1

    def has(self, part: Part) -> bool:
        return part in self.parts or part in self.packed

    def name_of(self, part: Part, row: int) -> str:
        """What a message calls an image of a part."""
        if part in self.packed:
            return self.packed[part].name_of(row)
        return shown(self._inside(self.parts[part][row].path))

    def _inside(self, path: str) -> str:
        """A file's path, from the data set's folder on."""
        return path if self.root is None else path.removeprefix(f"{self.root}{os.sep}")

    def fingerprint(self) -> str:
        """What a study is on: names and sizes of files, or the bytes of packed ones; moving the folder keeps it."""
        digest = hashlib.sha256(json.dumps([self.classes, self.image_size]).encode())
        for part, items in sorted(self.parts.items()):
            for item, found in zip(items, self._found[part], strict=True):
                line = f"{part}\0{self._inside(item.path)}\0{found.st_size}\0{item.label}\0{item.group}\n"
                digest.update(line.encode(errors="surrogateescape"))  # a file's name may be any bytes
        for part, packed in sorted(self.packed.items()):
            digest.update(part.encode() + packed.contents())
        return digest.hexdigest()[:20]

    def cache_key(self) -> str:
        """What a decoded copy is of: also where the files are and when they changed, for sizes can stay the same."""
        digest = hashlib.sha256(f"{CACHE_FORMAT}\0{self.fingerprint()}".encode())
        for part, items in sorted(self.parts.items()):
            for item, found in zip(items, self._found[part], strict=True):
                # A folder that is renamed has the same files in it, and one from an archive may have one time for all.
                known = f"{found.st_ino}\0{found.st_mtime_ns}\0{found.st_ctime_ns}"
                digest.update(f"{os.path.abspath(item.path)}\0{known}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()[:20]


def own_data(name: str, root: Path, classes: tuple[str, ...], **values: Any) -> Source:
    """A source of images that nobody here knows: small, and changed as is safe with what may not be mirrored."""
    usual = {
        "image_size": USUAL_SIDE,
        "epochs": 20,
        "augmentation": Augmentation(rotate=8, shift=0.1, zoom=0.1, light=0.1),
    }
    return Source(name=name, root=root, classes=classes, **{**usual, **values})


def class_folders(root: Path, group_by: str | None = None, *, to_judge: bool = False) -> Source:
    """`root/CLASS/*`, or `root/train/CLASS/*` with `val/` and `test/` beside it. Raises DataError, or OSError.

    Images that are only `to_judge` a finished model need neither a part to train on nor every class. `group_by` is a
    pattern that is searched in the files' paths from `root` on; see `match_groups`.
    """
    folders = _folders_of_parts(root)
    held_out = [folder for part, folder in folders.items() if part != "train"]
    beside = _left_out(root, folders.values()) if "train" in folders and not to_judge else []
    if not (to_judge and folders):
        folders.setdefault("train", root)
    homes = list(folders.values()) if to_judge else [folders["train"]]
    classes = tuple(
        sorted(
            {
                entry.name
                for home in homes
                for entry in home.iterdir()
                if _is_class_folder(entry) and entry not in held_out
            }
        )
    )
    least = 1 if to_judge else 2
    if len(classes) < least:
        raise DataError(
            f"data set folder {str(homes[0])!r} has {len(classes)} class folder(s), but a classifier needs at least "
            f"{least}: lay it out as PATH/CLASS/*.jpg or PATH/train/CLASS/*.jpg"
        )
    for name in classes:
        if not is_class_name(name):
            raise DataError(
                f"class folder {str(homes[0] / name)!r} must have a name in UTF-8 without control characters, "
                f"for it is shown in reports and on terminals; rename it"
            )
    parts: dict[Part, list[Listed]] = {}
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
            if not (folder / name).is_dir() and not to_judge:
                raise DataError(
                    f"class folder {str(folder / name)!r} is missing; add it, with images, or remove "
                    f"{str(folders['train'] / name)!r}"
                )
            if not found and not to_judge:
                raise DataError(f"class folder {str(folder / name)!r} has no images; add some or remove the folder")
            items += [Listed(path, label) for path in found]
        parts[part] = items
    notices: list[str] = []
    if group_by is not None:
        parts, notices = grouped_by(group_by, parts, root)
    if beside:
        notices.insert(0, f"Folders beside {folders['train'].name}/ are no classes: {', '.join(beside)} left out.")
    return own_data(
        root.resolve().name,
        root,
        classes,
        parts=number_groups(parts),
        ignored=ignored,
        groups_by="--group-by",
        notices=tuple(notices),
    )


def grouped_by(
    pattern: str, parts: Mapping[Part, list[Listed]], root: Path
) -> tuple[dict[Part, list[Listed]], list[str]]:
    """The same files with the groups that `pattern` finds in their paths from `root` on, and what to tell of them."""
    names = [
        file.path.removeprefix(f"{root}{os.sep}").replace(os.sep, "/") for files in parts.values() for file in files
    ]
    groups = match_groups(pattern, names)
    found = iter(groups)
    named = {part: [file._replace(group=next(found)) for file in files] for part, files in parts.items()}
    return named, tell_unmatched(pattern, names, groups)


def _folders_of_parts(root: Path) -> dict[Part, Path]:
    """Folders that are called as parts are. One that holds no folders is a class of that name."""
    by_lower_name = {
        entry.name.lower(): entry
        for entry in root.iterdir()
        if entry.is_dir() and any(_is_class_folder(inner) for inner in entry.iterdir())
    }
    folders: dict[Part, Path] = {}
    for part, choices in PART_NAMES.items():
        there = [by_lower_name[name] for name in choices if name in by_lower_name]
        if len(there) > 1:
            raise DataError(
                f"data set folder {str(root)!r} has the part {part} under two names, {there[0].name!r} and "
                f"{there[1].name!r}; leave one out"
            )
        folders.update((part, folder) for folder in there)
    return folders


def part_folders(root: Path) -> dict[Part, Path]:
    """Folders of a data set's parts; none where it has none, or cannot be looked through."""
    try:
        return {part: folder.resolve() for part, folder in _folders_of_parts(root).items()}
    except (OSError, DataError):
        return {}


def _left_out(root: Path, parts: Iterable[Path]) -> list[str]:
    """Folders of images that lie beside the parts: somebody's classes, perhaps, one of which is called train."""
    known = set(parts)
    beside = sorted(entry for entry in root.iterdir() if _is_class_folder(entry) and entry not in known)
    counts = [(entry, len(image_files(entry)[0])) for entry in beside]
    return [f"{printable(repr(entry.name), 80)} ({count:,} images)" for entry, count in counts if count]


def _is_class_folder(entry: Path) -> bool:
    # What zip files from a Mac hold beside the files, and what Python leaves.
    return entry.is_dir() and not entry.name.startswith(".") and entry.name not in ("__MACOSX", "__pycache__")


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
