"""Data sets that are arrays in .npz files: `images` or `embeddings`, `labels`; `groups`, `split`, `classes` if known.

Such a file may come from anybody. Nothing in it is unpickled, what its arrays claim to be is checked before they are
read, and images are read piece by piece into the cache: neither a large file nor a small one that claims to be large
fills memory.
"""

import json
import math
import os
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.lib import format as npy
from numpy.typing import NDArray

from camri_tune.augmentation import Augmentation
from camri_tune.config import printable, shown
from camri_tune.errors import DataError
from camri_tune.files import own_path
from camri_tune.folders import PART_NAMES, PARTS, PIECE, Part, Source, is_class_name, own_data
from camri_tune.grouping import Listed, number_groups
from camri_tune.images import MOST_PIXELS, Pieces

MOST_OF_A_LIST = 2**28  # bytes of labels, groups or splits
PIECE_BYTES = 2**25  # of images that are read at a time
MOST_PACKING = 250  # times: deflate makes a thousandth of zeros, but of images a half or a tenth
FEWEST_PIXELS, LARGEST_OWN_SIDE = 8, 64  # of a side; images no larger than this keep their side
Place = Part | Literal["all"]  # a part, or a file that holds all of them
MOST_NUMBERS = 2**16  # of an embedding
_IMAGES, _EMBEDDINGS = "images", "embeddings"  # arrays, of which a data set has one
_SHAPES = "(N, H, W), (N, H, W, C) or (N, C, H, W) with C of 1 or 3"


class Layout(NamedTuple):
    """One image of an array: C, H and W, and which of its axes these are, None for a channel that is not there.

    An embedding is one of D channels and a single pixel.
    """

    channels: int
    height: int
    width: int
    axes: tuple[int, int, int] | None
    dtype: np.dtype[Any] = np.dtype(np.uint8)

    @classmethod
    def of(cls, shape: Sequence[int]) -> "Layout | None":
        """Of images (N, …) of this shape; None where it is none of those that images have."""
        if len(shape) == 3:
            layout = cls(1, shape[1], shape[2], None)
        elif len(shape) == 4 and shape[3] in (1, 3):
            layout = cls(shape[3], shape[1], shape[2], (2, 0, 1))
        elif len(shape) == 4 and shape[1] in (1, 3):
            layout = cls(shape[1], shape[2], shape[3], (0, 1, 2))
        else:
            return None
        fits = min(layout.height, layout.width) >= FEWEST_PIXELS and layout.height * layout.width <= MOST_PIXELS
        return layout if fits else None

    @classmethod
    def of_embeddings(cls, shape: Sequence[int], dtype: np.dtype[Any]) -> "Layout | None":
        """Of embeddings (N, D) of this shape; None where it is none of those that they have."""
        return cls(shape[1], 1, 1, None, dtype) if len(shape) == 2 and 2 <= shape[1] <= MOST_NUMBERS else None

    @property
    def size(self) -> int:
        """Bytes."""
        return self.channels * self.height * self.width * self.dtype.itemsize

    def read(self, file: IO[bytes], count: int) -> torch.Tensor:
        """The next `count` as (`count`, C, H, W), uint8 or for embeddings float32. ValueError where there are fewer."""
        content = bytearray(file.read(count * self.size))
        if len(content) < count * self.size:
            raise ValueError("it is cut short")
        if self.dtype.kind == "f":
            with np.errstate(over="ignore"):  # infinity is refused
                numbers = np.frombuffer(content, self.dtype).astype(np.float32)
            return torch.from_numpy(numbers).view(count, self.channels, 1, 1)
        found = torch.frombuffer(content, dtype=torch.uint8)
        if self.axes is None:
            return found.view(count, 1, self.height, self.width)
        stored = [(self.channels, self.height, self.width)[self.axes.index(axis)] for axis in range(3)]
        return found.view(count, *stored).permute(0, *(axis + 1 for axis in self.axes))


def own_side(height: int, width: int) -> int | None:
    """The side that images are trained at where the study does not say: their own where they are small squares."""
    return height if height == width and FEWEST_PIXELS <= height <= LARGEST_OWN_SIDE else None


@dataclass(frozen=True, eq=False)
class ArrayPart:
    """Some rows of a file's images, ascending."""

    path: Path
    member: str
    layout: Layout
    known_by: bytes
    labels: NDArray[np.int64]
    groups: NDArray[np.int64]
    rows: NDArray[np.int64]

    def contents(self) -> bytes:
        return self.known_by

    def name_of(self, row: int) -> str:
        what = "embedding" if self.layout.dtype.kind == "f" else "image"
        return f"{what} {self.rows[row]} of {shown(self.path.name)}"

    def pieces(self) -> Pieces:
        labels, groups = torch.from_numpy(self.labels), torch.from_numpy(self.groups)
        return Pieces(labels, groups, self.layout.channels, self._pixels())

    def _pixels(self) -> Iterator[torch.Tensor]:
        at_a_time = max(1, min(PIECE, PIECE_BYTES // self.layout.size))
        with _opened(self.path) as archive, archive.open(self.member) as file:
            (count, *_), _ = _head(file)
            for start in range(0, count, at_a_time):
                piece = self.layout.read(file, min(at_a_time, count - start))
                if piece.is_floating_point() and not bool((finite := piece.isfinite().flatten(1).all(dim=1)).all()):
                    raise DataError(
                        f"embedding {start + int(finite.int().argmin())} of {shown(self.path.name)} holds NaN, "
                        f"infinity or a number that float32 cannot hold; mend it, or leave it out"
                    )
                first, last = np.searchsorted(self.rows, (start, start + len(piece)))
                if last > first:
                    yield piece[torch.from_numpy(self.rows[first:last] - start)]
            if file.read(1):
                raise ValueError(f"{self.member} is longer than it says")


@dataclass(frozen=True, eq=False)
class _Arrays:
    """What one file, or the arrays of one prefix in it, say of images in `member`; `values` by the arrays' names."""

    path: Path
    member: str
    layout: Layout
    known_by: bytes
    values: Mapping[str, NDArray[Any]]


def array_source(path: Path, called: str = "", *, to_judge: bool = False) -> Source:
    """The images of a .npz file, or of a folder with `train.npz` and perhaps `validation.npz` and `test.npz`.

    `images` uint8 (N, H, W), (N, H, W, C) or (N, C, H, W) and `labels` (N,), integers or text; where they are known
    `groups` (N,) and `split` (N,), and `classes`, the names of the labels 0, 1, …. Also as `train_images`,
    `train_labels`, …, as MedMNIST has them. In the place of images, `embeddings` (N, D) of floating-point numbers.
    Images that are only `to_judge` a model need neither a part to train on nor every class. Raises DataError in
    one line where something does not fit, in which the data set is `called` so, or OSError.
    """
    where = called or f"data set {shown(str(path))}"
    found = {place: _read(file, prefix, where) for place, (file, prefix) in _places(path, where).items()}
    classes, labels = _labels(found, where, least=1 if to_judge else 2)
    rows: dict[Part, NDArray[np.int64]] = {}
    for place, arrays in found.items():
        if place == "all":
            rows |= _split(arrays, where)
        elif "split" in arrays.values:
            raise DataError(f"{where} has an array 'split' beside parts that are apart already; leave one out")
        else:
            rows[place] = np.arange(len(labels[place]))
    if "train" not in rows and not to_judge:
        raise DataError(f"{where} has no images to train on; give some the split train, or leave the splits out")
    places: dict[Part, Place] = {part: "all" if "all" in found else part for part in rows}
    groups = _groups({part: (found[place], rows[part]) for part, place in places.items()})
    parts: dict[Part, ArrayPart] = {}
    first = found[places.get("train", next(iter(places.values())))]
    for part, place in places.items():
        arrays, chosen = found[place], labels[place][rows[part]]
        parts[part] = ArrayPart(
            arrays.path,
            arrays.member,
            arrays.layout,
            arrays.known_by,
            chosen,
            groups[part],
            rows[part],
        )
        missing = np.setdiff1d(np.arange(len(classes)), chosen)
        if len(missing) and not to_judge:
            raise DataError(
                f"{where} has no image of class {shown(classes[missing[0]])} in split {part} ({len(missing)} such "
                f"class(es)): every class needs some in each split that is given; add some, or leave class or split out"
            )
        (one, kind), (other, another) = [(a.layout.channels, a.layout.dtype.kind) for a in (first, arrays)]
        if kind != another:
            raise DataError(f"{where} has images in one part and embeddings in another; give all the same")
        if one != other:
            few, many = sorted((one, other))
            what = f"embeddings of {few} numbers" if kind == "f" else f"images of {few} channel"
            raise DataError(f"{where} has {what} in one part and of {many} in another; give all the same")
    layout = first.layout
    side = own_side(layout.height, layout.width)
    usual: dict[str, Any] = {} if side is None else {"image_size": side, "own_size": True}
    if layout.dtype.kind == "f":
        usual = {"image_size": 1, "own_size": True, "augmentation": Augmentation()}
    return own_data(
        own_path(path).stem if path.is_file() else path.resolve().name,
        path,
        classes,
        packed=parts,
        groups_by="an array 'groups'",
        **usual,
    )


def holds_arrays(folder: Path) -> bool:
    """Whether a folder is one of .npz files, a part each."""
    return (folder / "train.npz").is_file()


def _places(path: Path, where: str) -> dict[Place, tuple[Path, str]]:
    """The file and the prefix of the arrays of each part; `all` where they lie together."""
    if path.is_dir():
        files = {name: (path / f"{name}.npz", "") for name in PARTS}
        there = {name for name, (file, _) in files.items() if file.is_file()}
    else:
        with _opened(path) as archive:
            members = set(archive.namelist())
        if any(f"{array}.npy" in members for array in (_IMAGES, _EMBEDDINGS)):
            return {"all": (path, "")}
        files = {name: (path, f"{name}_") for name in PARTS}
        there = {name for name in PARTS if any(f"{name}_{array}.npy" in members for array in (_IMAGES, _EMBEDDINGS))}
        if not there:
            has = ", ".join(shown(name.removesuffix(".npy")) for name in sorted(members)[:8]) or "nothing"
            raise DataError(f"{where} holds {has}, but should hold arrays 'images' (or 'embeddings') and 'labels'")
    places: dict[Place, tuple[Path, str]] = {}
    for name in sorted(there):
        if PARTS[name] in places:
            raise DataError(f"{where} has the part {PARTS[name]} under two names, one of them {name!r}; leave one out")
        places[PARTS[name]] = files[name]
    return places


def _read(path: Path, prefix: str, where: str) -> _Arrays:
    """Everything but the images. Raises DataError where they do not fit together."""
    with _opened(path) as archive:
        infos = {info.filename: info for info in archive.infolist()}
        what = _EMBEDDINGS if f"{prefix}{_EMBEDDINGS}.npy" in infos else _IMAGES
        if what == _EMBEDDINGS and f"{prefix}{_IMAGES}.npy" in infos:
            raise DataError(f"{where} has both {prefix}{_IMAGES} and {prefix}{_EMBEDDINGS}; leave one out")
        names = [name for name in (what, "labels", "groups", "split", "classes") if f"{prefix}{name}.npy" in infos]
        for name in (what, "labels"):
            if name not in names:
                raise DataError(f"{where} has no array {prefix + name!r}; save it beside the others")
        values = {name: _list(archive, infos, f"{prefix}{name}", where) for name in names if name != what}
        layout, count = _layout(archive, infos[f"{prefix}{what}.npy"], where)
    for name in ("labels", "groups", "split"):
        if name in values and len(values[name]) != count:
            raise DataError(f"{where} has {count:,} {what}, but {len(values[name]):,} {prefix}{name}; give each one")
    members = [infos[f"{prefix}{name}.npy"] for name in names]
    # The checksums that the file has of its arrays, packed or not; each is compared where the array is read.
    known_by = json.dumps([(info.filename, info.file_size, info.CRC) for info in members]).encode()
    return _Arrays(path, f"{prefix}{what}.npy", layout, known_by, values)


def _layout(archive: zipfile.ZipFile, info: zipfile.ZipInfo, where: str) -> tuple[Layout, int]:
    """How images or embeddings lie in an array, and how many there are. Raises DataError."""
    name = info.filename.removesuffix(".npy")
    with archive.open(info) as file:
        shape, dtype = _head(file)
    if info.file_size > max(2**20, MOST_PACKING * min(info.compress_size, os.path.getsize(str(archive.filename)))):
        raise DataError(
            f"{where}: {name} takes {info.file_size:,} bytes, but is packed into {info.compress_size:,}, which may be "
            f"a decompression bomb; save it with numpy.savez, which does not pack"
        )
    if name.endswith(_EMBEDDINGS):
        layout, shapes = Layout.of_embeddings(shape, dtype), f"(N, D) with D of 2 to {MOST_NUMBERS:,}"
    else:
        layout, shapes = Layout.of(shape), f"{_SHAPES}, and sides of at least {FEWEST_PIXELS} pixels"
    if layout is None:
        raise DataError(f"{where}: {name} has the shape {shown(shape)}, but should have {shapes}")
    if name.endswith(_EMBEDDINGS) and (dtype.kind != "f" or dtype.itemsize > 8):
        raise DataError(
            f"{where}: {name} is of type {dtype}, but should be float32 (float16 and float64 are read, too): save it "
            f"with .astype('float32')"
        )
    if name.endswith(_IMAGES) and dtype != np.uint8:
        raise DataError(
            f"{where}: {name} is of type {dtype}, but should be uint8 from 0 to 255: scale the values to that, round "
            f"and save them with .astype('uint8')"
        )
    return layout, shape[0]


def embeddings_in(path: Path) -> Iterator[torch.Tensor]:
    """The embeddings of a .npz file, labelled or not, as float32 (n, D), piece by piece. Raises DataError."""
    where = f"file {shown(str(path))}"
    with _opened(path) as archive:
        infos = {info.filename: info for info in archive.infolist()}
        if (member := f"{_EMBEDDINGS}.npy") not in infos:
            raise DataError(f"{where} has no array {_EMBEDDINGS!r}: save it with numpy.savez(path, embeddings=…)")
        layout, count = _layout(archive, infos[member], where)
    nobody = np.zeros(count, np.int64)
    part = ArrayPart(path, member, layout, b"", nobody, nobody, np.arange(count))
    for piece in part.pieces().pixels:
        yield piece.flatten(1)


def _list(archive: zipfile.ZipFile, infos: Mapping[str, zipfile.ZipInfo], name: str, where: str) -> NDArray[Any]:
    """Integers or text, (N,), for (N, 1) as well."""
    with archive.open(infos[f"{name}.npy"]) as file:
        shape, dtype = _head(file)
        if dtype.kind not in "biuUS":
            raise DataError(f"{where}: {name} is of type {dtype}, but should be integers or text; convert it")
        if len(shape) != 1 and not (len(shape) == 2 and shape[1] == 1):
            raise DataError(f"{where}: {name} has the shape {shown(shape)}, but should have (N,); give each image one")
        size = math.prod(shape) * dtype.itemsize
        if size > MOST_OF_A_LIST or not dtype.itemsize:
            raise DataError(
                f"{where}: {name} takes {size:,} bytes, but should take 1 to {MOST_OF_A_LIST:,}; shorten it"
            )
        content = file.read(size + 1)
    if len(content) != size:
        raise DataError(f"{where}: {name} is not as long as it says; save it again")
    values = np.frombuffer(content, dtype).reshape(-1)
    if dtype.kind == "S":
        return np.char.decode(values, "utf-8")
    return values.astype(dtype.newbyteorder("="))


def _labels(
    found: Mapping[Place, _Arrays], where: str, least: int
) -> tuple[tuple[str, ...], dict[Place, NDArray[np.int64]]]:
    """Names of the classes, and each part's labels as indices into them."""
    kinds = {arrays.values["labels"].dtype.kind == "U" for arrays in found.values()}
    given = [arrays.values["classes"] for arrays in found.values() if "classes" in arrays.values]
    if len(kinds) > 1:
        raise DataError(f"{where} has labels that are text in one part and numbers in another; save one kind")
    distinct = np.unique(np.concatenate([np.unique(arrays.values["labels"]) for arrays in found.values()]))
    names = tuple(map(str, given[0].tolist() if given else distinct.tolist()))
    if any(tuple(map(str, other.tolist())) != names for other in given):
        raise DataError(f"{where} has parts with different arrays 'classes'; give all the same")
    if len(names) < least or len(set(names)) < len(names):
        raise DataError(
            f"{where} has {len(names)} class(es), {len(set(names))} of them different, but needs at least {least}, all "
            f"different; mend labels or classes"
        )
    if odd := [name for name in names if not is_class_name(name)]:
        raise DataError(f"{where} has a class {shown(odd[0])}, but a class is called as a folder can be; rename it")
    by_index = bool(given) and kinds == {False}
    known = np.arange(len(names)) if by_index else np.array(names if kinds == {True} else distinct)
    if foreign := [value for value in distinct.tolist() if value not in set(known.tolist())]:
        rule = f"an index from 0 to {len(names) - 1}" if by_index else "one of 'classes'"
        raise DataError(f"{where} has a label {shown(foreign[0])}, which is not {rule}; mend labels or classes")
    order = np.argsort(known)
    return names, {
        part: order[np.searchsorted(known[order], arrays.values["labels"])].astype(np.int64)
        for part, arrays in found.items()
    }


def _split(arrays: _Arrays, where: str) -> dict[Part, NDArray[np.int64]]:
    """The rows of each part, ascending."""
    if "split" not in arrays.values:
        return {"train": np.arange(len(arrays.values["labels"]))}
    split = arrays.values["split"]
    masks: dict[Part, NDArray[np.bool_]] = {}
    for value in np.unique(split).tolist():
        part = PARTS.get(str(value).strip().lower())
        if part is None:
            known = ", ".join(PART_NAMES)
            raise DataError(f"{where} has a split {shown(value)}, but should have some of {known}; rename it")
        masks[part] = masks.get(part, False) | (split == value)
    return {part: np.flatnonzero(masks[part]) for part in PART_NAMES if part in masks}


def _groups(parts: Mapping[Part, tuple[_Arrays, NDArray[np.int64]]]) -> dict[Part, NDArray[np.int64]]:
    """Each part's groups as numbers. Raises DataError where a named one stands in two parts."""
    if not any("groups" in arrays.values for arrays, _ in parts.values()):
        return {part: np.arange(len(rows)) for part, (_, rows) in parts.items()}
    listed = {
        part: [
            Listed(f"image {row}", 0, str(name) or None)
            for row, name in zip(rows, arrays.values["groups"][rows].tolist(), strict=True)
        ]
        if "groups" in arrays.values
        else [Listed(f"image {row}", 0) for row in rows]
        for part, (arrays, rows) in parts.items()
    }
    return {part: np.array([item.group for item in items], np.int64) for part, items in number_groups(listed).items()}


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except DataError:
        raise
    except Exception as error:  # bytes from anybody: what zip, zlib and NumPy raise of them is not to be listed
        raise DataError(
            f"{shown(str(path))} cannot be read as arrays ({printable(str(error) or type(error).__name__)}); save it "
            f"again with numpy.savez(path, images=…, labels=…)"
        ) from None


def _head(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of an array, whose values follow. Raises ValueError for one that is not read."""
    version = npy.read_magic(file)
    if version != (1, 0):  # a head of another version may be of any length
        raise ValueError(f"an array in version {version} of the format, but only (1, 0) is read")
    with warnings.catch_warnings(action="ignore"):  # of files that Python 2 wrote
        shape, in_columns, dtype = npy.read_array_header_1_0(file)
    if dtype.hasobject:
        raise ValueError("an array of Python objects, which are not read; save numbers or text")
    if in_columns and len(shape) > 1:
        raise ValueError("an array in Fortran's order; save numpy.ascontiguousarray of it")
    if min(shape, default=0) < 1:
        raise ValueError("an array without values")
    return shape, dtype
